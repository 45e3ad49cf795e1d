"""Several sources measured together and apart, against the metrics of each source's pairs by themselves."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import captioner_of
from transformers import EvalPrediction

from gap_closed_clip.evaluation import (
    Captions,
    Evaluation,
    PairEmbeddings,
    build_caption_metrics,
    build_compute_metrics,
    embed_pairs,
    evaluate_captions,
    evaluate_embeddings,
    evaluate_model,
    mean_over_sources,
    metrics_report,
    nearest_captions,
    read_metrics,
    score_captions,
    write_report,
)

from .conftest import synthetic


SOURCES = ["b", "a", "b", "b", "a", "a", "a", "a"]  # of the fixture's pairs; image 0 and 1 come twice
MEANS = ("recall@10", "margin", "debiased_modality_gap", "true_pair_cosine", "random_pair_cosine")


@pytest.fixture
def sourced(pairs):
    """The pairs with images of their own in each source, as `load_pairs` names them."""
    ids = [f"{source}/{image_id}" for source, image_id in zip(SOURCES, pairs["image_id"], strict=True)]
    pairs = pairs.remove_columns("image_id").add_column("image_id", ids)
    return pairs.add_column("source", SOURCES)


def rows_of(pairs, source: str):
    return pairs.filter(lambda row: row["source"] == source)


def recall(metrics: dict[str, float]) -> float:
    return (metrics["text_to_image_recall@10"] + metrics["image_to_text_recall@10"]) / 2


def test_an_encoder_together_and_apart(tiny_model, tiny_processor, sourced):
    found = evaluate_model(tiny_model, tiny_processor, sourced)
    assert list(found.by_source) == ["b", "a"]
    for source, metrics in found.by_source.items():
        alone = embed_pairs(tiny_model, tiny_processor, rows_of(sourced, source))
        assert metrics == pytest.approx(evaluate_embeddings(alone), abs=1e-5, nan_ok=True)
    assert found.metrics["num_pairs"] == 8 and found.by_source["b"]["num_pairs"] == 3
    assert found.by_source["b"]["text_to_image_recall@5"] == 1  # three images in its gallery
    assert found.means["margin"] == pytest.approx(np.mean([m["margin"] for m in found.by_source.values()]))
    streamed = evaluate_model(tiny_model, tiny_processor, sourced.to_iterable_dataset())
    for source, metrics in found.by_source.items():
        assert streamed.by_source[source] == pytest.approx(metrics, abs=1e-5, nan_ok=True)


def test_a_plain_source_has_no_parts(tiny_model, tiny_processor, pairs):
    found = evaluate_model(tiny_model, tiny_processor, pairs)
    assert found.by_source == {} and set(found.embeddings.sources) == {""}
    assert found.means == pytest.approx({name: found.metrics.get(name, recall(found.metrics)) for name in MEANS})


def test_one_named_source_is_not_measured_twice():
    embeddings = dataclasses.replace(synthetic(40), sources=["only"] * 40)
    calls = []

    def measure(part):
        calls.append(part)
        return {"margin": 1.0}

    assert Evaluation.of(embeddings, measure).by_source == {"only": {"margin": 1.0}} and len(calls) == 1


def test_parts_differ_in_length():
    z = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="'sources': 2"):
        PairEmbeddings(z, z, ["a", "b", "c"], ["", "", ""], [""] * 3, ["x", "y"])


def test_means_by_hand():
    parts = {
        "a": {"recall@10": 0.2, "margin": 0.5, "v_measure": 0.1},
        "b": {"recall@10": 0.7, "margin": 0.1},
    }
    found = mean_over_sources({"margin": 9.0}, parts, ("recall@10", "margin", "v_measure"))
    assert found == pytest.approx({"recall@10": 0.45, "margin": 0.3})  # not all have a V-measure
    assert mean_over_sources({"margin": 9.0}, {}, ("margin",)) == {"margin": 9.0}


@pytest.mark.parametrize("several", [True, False])
def test_metrics_of_a_trainer(sourced, several):
    """`<source>_<metric>` and means beside what there is for one; `mean_recall@10` is there for any number."""
    pairs = sourced if several else sourced.remove_columns("source")
    random = np.random.default_rng(0)
    z = random.normal(size=(2, 8, 4)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    found = build_compute_metrics(pairs)(EvalPrediction(predictions=tuple(z), label_ids=None))
    whole = PairEmbeddings(*z, pairs["image_id"], pairs["caption"], pairs["label"])
    expected = evaluate_embeddings(whole)
    parts = []
    for source in ("a", "b") if several else ():
        rows = [row for row in range(8) if SOURCES[row] == source]
        columns = ([pairs[name][row] for row in rows] for name in ("image_id", "caption", "label"))
        parts.append(evaluate_embeddings(PairEmbeddings(z[0][rows], z[1][rows], *columns)))
        expected |= {f"{source}_{name}": value for name, value in parts[-1].items()}
    for name in MEANS:
        values = [recall(part) if name == "recall@10" else part[name] for part in parts or [expected]]
        expected[f"mean_{name}"] = np.mean(values)
    assert found == pytest.approx(expected, nan_ok=True)


# --- captions


def test_a_captioner_together_and_apart(tiny_processor, sourced):
    captioner = captioner_of(tiny_processor.tokenizer)
    found = evaluate_model(captioner, tiny_processor, sourced)
    assert found.captions.sources == [image_id.partition("/")[0] for image_id in found.captions.image_ids]
    for source, metrics in found.by_source.items():
        expected = evaluate_model(captioner, tiny_processor, rows_of(sourced, source))
        assert metrics == pytest.approx(expected.metrics, abs=1e-4)
        assert found.captions.by_source()[source].captions == expected.captions.captions


def test_captions_inside_the_trainer(tiny_processor, sourced):
    texts = ["chest radiograph", "a nodule", "brain", "mass", "ct", "ct of the abdomen", "left", "ultrasound"]
    tokens = np.array(tiny_processor.tokenizer(texts, padding=True)["input_ids"])
    prediction = EvalPrediction(predictions=tokens, label_ids=tokens)
    found = build_caption_metrics(sourced, tiny_processor)(prediction)
    for source in ("a", "b"):
        rows = [row for row in range(8) if SOURCES[row] == source]
        part = EvalPrediction(predictions=tokens[rows], label_ids=tokens[rows])
        alone = build_caption_metrics(rows_of(sourced, source).remove_columns("source"), tiny_processor)(part)
        for name, value in alone.items():
            if not name.startswith("mean_"):
                assert found[f"{source}_{name}"] == pytest.approx(value)
    assert found["mean_cider_d"] == pytest.approx((found["a_cider_d"] + found["b_cider_d"]) / 2)


def test_nearest_captions_keep_their_sources(tiny_model, tiny_processor, sourced):
    embeddings = embed_pairs(tiny_model, tiny_processor, sourced)
    captions = nearest_captions(embeddings, embeddings)
    assert captions.sources == [image_id.partition("/")[0] for image_id in captions.image_ids]
    parts = captions.by_source()
    assert [len(parts[source]) for source in ("a", "b")] == [4, 2]
    images = embeddings.by_image()
    found = Evaluation.of(
        captions, lambda c: evaluate_captions(c) | score_captions(tiny_model, tiny_processor, c, images)
    )
    assert found.by_source["b"]["num_images"] == 2 and found.captions is captions


def test_captions_without_sources_are_of_one():
    assert Captions(["x"], ["a"], [["b"]]).sources == [""] and Captions(["x"], ["a"], [["b"]]).by_source() == {}


# --- the report


def test_report_of_several_models(tmp_path):
    names = ["a"] * 70 + ["b"] * 50
    models = {"CLIP": synthetic(gap=0.4), "ours": synthetic()}
    evaluations = {
        name: Evaluation.of(dataclasses.replace(found, sources=names), evaluate_embeddings)
        for name, found in models.items()
    }
    text = write_report(tmp_path, evaluations, {"source": ["x/a", "x/b"]}, "test")
    assert (tmp_path / "metrics.md").read_text() == text + "\n"
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert titles == ["### all in one gallery", "### a", "### b", "### mean of the sources"]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["sources"]["b"]["CLIP"] == evaluations["CLIP"].by_source["b"]
    assert read_metrics(tmp_path / "metrics.json") == {name: e.metrics for name, e in evaluations.items()}
    means = text.split("### mean of the sources")[1]
    margin = np.mean([evaluations["ours"].by_source[source]["margin"] for source in "ab"])
    assert f"{margin:.3f} |\n" in means.split("margin (true - random)")[1] and "pairs" not in means


def test_report_of_one_model_is_one_table():
    parts = {"a": {"ours": {"margin": 0.2}}, "b": {"ours": {"margin": 0.4}}}
    lines = metrics_report({"ours": {"margin": 0.5}}, parts).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert cells == [
        ["metric", "all in one gallery", "a", "b", "mean of the sources"],
        ["margin (true - random) ↑", "0.500", "0.200", "0.400", "0.300"],
    ]
    only = metrics_report({"ours": {"margin": 0.5}}, {"a": {"ours": {"margin": 0.5}}})
    assert only == metrics_report({"ours": {"margin": 0.5}}, {})
