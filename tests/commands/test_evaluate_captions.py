"""`gap-closed-clip eval` on captioners beside encoders, as a user calls it, in this process."""

import json

import pytest
import yaml
from conftest import captioner_of

from gap_closed_clip.checkpoint import load_captioner, load_checkpoint
from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.evaluation import embed_pairs, evaluate_captioner, nearest_captions, read_metrics, score_captions

from .test_evaluate import evaluate  # noqa: F401


DATA = {"source": "phantoms", "phantom_test_pairs": 8, "phantom_train_pairs": 10, "phantom_size": 32}


@pytest.fixture
def folders(tiny_model, tiny_processor, tmp_path):
    """An encoder and a captioner around another one, which writes seven tokens; both know their data."""
    captioner = captioner_of(tiny_processor.tokenizer, projection_dim=24)
    captioner.generation_config.max_new_tokens = 7
    for name, model in (("demo", tiny_model), ("captioner", captioner)):
        model.save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)
        config = {"data": DATA, "training": {"final_split": "test"}}
        (tmp_path / name / "train_config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def read_captions(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_encoder_and_captioner_in_one_table(evaluate, folders):  # noqa: F811
    code, out, err = evaluate("demo", "captioner", "num_workers=0", "output=report", "nearest_caption=true")
    assert code == 0, err
    assert "| modality gap" in out and "| CIDEr-D" in out and "8 pairs, split 'test' of 'phantoms'" in out
    results = read_metrics(folders / "report" / "metrics.json")
    columns = ["demo", "demo, nearest caption", "captioner", "captioner, nearest caption"]
    assert list(results) == columns
    pairs, train = (load_pairs(DataArguments(**DATA), split) for split in ("test", "train"))
    model, processor = load_captioner("captioner")
    expected, captions = evaluate_captioner(model, processor, pairs)
    assert results["captioner"] == pytest.approx(expected, abs=1e-6)
    assert "modality_gap" not in results["captioner"] and "cider_d" not in results["demo"]
    assert all(
        "clip_score" in results[name] for name in ("captioner", "captioner, nearest caption", "demo, nearest caption")
    )
    assert "clip_score" not in results["demo"]
    rows = read_captions(folders / "report")
    found = {"captioner": captions.captions}
    for name in ("demo", "captioner"):
        encoder, processor = load_checkpoint(name)
        nearest = nearest_captions(*(embed_pairs(encoder, processor, p) for p in (pairs, train)))
        found[f"{name}, nearest caption"] = nearest.captions
    assert [row["image_id"] for row in rows] == captions.image_ids
    assert {name: [row["captions"][name] for row in rows] for name in found} == found
    assert {row["captions"]["demo, nearest caption"] for row in rows} <= set(train["caption"])
    assert {path.name for path in (folders / "report").iterdir()} >= {"captions.png", "projection.png", "cosines.png"}


def test_one_scorer_for_all_and_beams(evaluate, folders):  # noqa: F811
    words = ("num_workers=0", "output=report", "nearest_caption=true", "scorer=demo", "num_beams=3")
    code, _, err = evaluate("captioner", *words)
    assert code == 0, err
    results = read_metrics(folders / "report" / "metrics.json")
    pairs = load_pairs(DataArguments(**DATA), "test")
    model, processor = load_captioner("captioner")
    expected, captions = evaluate_captioner(model, processor, pairs, score=False, num_beams=3)
    scorer, _ = load_checkpoint("demo")
    images = embed_pairs(scorer, processor, pairs).by_image()
    expected |= score_captions(scorer, processor, captions, images)
    assert results["captioner"] == pytest.approx(expected, abs=1e-6)
    assert [row["captions"]["captioner"] for row in read_captions(folders / "report")] == captions.captions
    assert {"clip_score", "ref_clip_score"} <= results["captioner, nearest caption"].keys()
    assert not (folders / "report" / "projection.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["captioner", "num_beams=-1"], "num_beams is -1; it must be at least 0."),
        (["captioner", "scorer=./nowhere"], "There is no model folder nowhere"),
        (["captioner", "nearest_captions=true"], "Did you mean 'nearest_caption'?"),
        (["captioner", "nearest_caption=1"], "nearest_caption is '1'; it must be of type bool."),
    ],
)
def test_bad_input_is_one_line(evaluate, folders, words, message):  # noqa: F811
    code, out, err = evaluate(*words)
    assert (
        code == 1
        and out == ""
        and err.startswith("gap-closed-clip eval: ")
        and message in err
        and err.count("\n") == 1
    )
