"""Metrics of every two of three modalities against naive forms, inside the Trainer too."""

import dataclasses
import itertools

import numpy as np
import pytest
from datasets import Dataset
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score
from transformers import Trainer, TrainingArguments

from gap_closed_clip.data import PairCollator
from gap_closed_clip.evaluation import (
    PairEmbeddings,
    build_compute_metrics,
    embed_pairs,
    evaluate_embeddings,
    metric_names,
    metrics_report,
)
from gap_closed_clip.evaluation.every_pair import AVERAGED, centroid_spread, name_for
from gap_closed_clip.training.arguments import lower_is_better

from .conftest import synthetic
from .records import of_three, record_model, record_pairs


PAIRS = (("image", "text"), ("image", "record"), ("text", "record"))


def naive_ranks(queries, targets, query_ids, target_ids) -> list[int]:
    """Rank of the best right target of each distinct query, ties against it; every id that occurs with it is right."""
    first_target = {}
    for row, each in enumerate(target_ids):
        first_target.setdefault(each, row)
    ranks = []
    for query in dict.fromkeys(query_ids):
        row = query_ids.index(query)
        right = {target_ids[k] for k, each in enumerate(query_ids) if each == query}
        cosines = {each: float(queries[row] @ targets[place]) for each, place in first_target.items()}
        best = max(cosines[each] for each in right)
        ranks.append(1 + sum(cosine >= best - 1e-9 for each, cosine in cosines.items() if each not in right))
    return ranks


def test_every_pair_is_measured_over_the_samples_that_have_both():
    embeddings = of_three(lacking=0.25)
    result = evaluate_embeddings(embeddings, ks=(1, 5, 10))
    for first, second in PAIRS:
        rows = np.flatnonzero(embeddings.present[first] & embeddings.present[second])
        x, y = (embeddings.embeds(name)[rows].astype(np.float64) for name in (first, second))
        n = len(rows)
        assert 20 < n < 90 and result[name_for("num_pairs", first, second)] == n
        cosines = x @ y.T
        true, random = np.diag(cosines).mean(), cosines[~np.eye(n, dtype=bool)].mean()
        gap = np.linalg.norm(x.mean(0) - y.mean(0))
        for name, value in (("true_pair_cosine", true), ("margin", true - random), ("modality_gap", gap)):
            assert result[name_for(name, first, second)] == pytest.approx(value, abs=1e-6), (first, second, name)
        ids = [[embeddings.ids(name)[row] for row in rows] for name in (first, second)]
        for way, (a, b) in (("image_to_text", (0, 1)), ("text_to_image", (1, 0))):
            ranks = np.array(naive_ranks((x, y)[a], (x, y)[b], ids[a], ids[b]))
            metric = name_for(f"{way}_recall@5", first, second)
            assert result[metric] == pytest.approx(np.mean(ranks <= 5)), metric
            assert result[name_for(f"{way}_median_rank", first, second)] == np.median(ranks)
    for name in AVERAGED:
        mean = np.mean([result[name_for(name, *pair)] for pair in PAIRS])
        assert result[f"mean_over_pairs_{name}"] == pytest.approx(mean), name


def test_equal_records_are_all_right():
    """Two samples of the record "45, female": each of their images is right for it, and the record for both."""
    embeddings = of_three(n=4)
    same = embeddings.values["record"]
    same.ids[:] = ["a", "a", "b", "c"]
    record = np.eye(24, dtype=np.float32)[[0, 0, 1, 2]]
    images = np.eye(24, dtype=np.float32)[[0, 5, 1, 2]]  # the second is nowhere near
    images[1, 0] = 0.1
    found = dataclasses.replace(embeddings, image_embeds=images, further={"record": record})
    result = evaluate_embeddings(found, grouping=False)
    assert result["record_to_image_recall@1"] == 1 and result["image_to_record_recall@1"] == 1
    same.ids[:] = ["a", "d", "b", "c"]
    result = evaluate_embeddings(found, grouping=False)
    assert result["image_to_record_recall@1"] == 0.5  # they tie now, and ties count against the model


def test_metrics_of_images_and_captions_stay_what_they_are():
    embeddings = of_three()
    two = dataclasses.replace(embeddings, further={}, values={}, present={})
    expected, found = evaluate_embeddings(two), evaluate_embeddings(embeddings)
    assert {name: found[name] for name in expected} == expected
    assert "num_samples" not in expected


def test_spread_of_the_means():
    """Naive sums over different samples; half of the gap, and of the debiased one, where there are two modalities."""
    embeddings = of_three(n=30, lacking=0.3, gap=0.3)
    z = {name: embeddings.embeds(name).astype(np.float64) for name in embeddings.modalities}
    means = [z[name][embeddings.present[name]].mean(0) for name in z]
    middle = np.mean(means, axis=0)
    found = centroid_spread(z)
    spread = np.sqrt(np.mean([np.sum((mean - middle) ** 2) for mean in means]))
    assert found["centroid_spread"] == pytest.approx(spread, rel=1e-6)
    u = {}
    for a, b in itertools.product(z, z):
        there = [(i, j) for i in range(30) for j in range(30) if i != j]
        there = [(i, j) for i, j in there if embeddings.present[a][i] and embeddings.present[b][j]]
        u[a, b] = np.mean([z[a][i] @ z[b][j] for i, j in there])
    squares = [u[a, a] + u[b, b] - 2 * u[a, b] for a, b in itertools.combinations(z, 2)]
    assert found["debiased_centroid_spread"] == pytest.approx(np.sqrt(sum(squares)) / 3, rel=1e-5)
    assert found["mean_cosine_record"] == pytest.approx(u["record", "record"], abs=1e-6)
    two = synthetic(gap=0.4)
    metrics = evaluate_embeddings(two, grouping=False)
    found = centroid_spread({"image": two.image_embeds.astype(np.float64), "text": two.text_embeds.astype(np.float64)})
    assert found["centroid_spread"] == pytest.approx(metrics["modality_gap"] / 2, rel=1e-5)
    assert found["debiased_centroid_spread"] == pytest.approx(metrics["debiased_modality_gap"] / 2, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_what_a_single_sample_has_has_no_cosine_inside():
    """It was infinite where the sums left a rounding error, and the spread then 0, as of a closed gap."""
    for seed in range(40):
        z = np.random.default_rng(seed).normal(size=(3, 4, 16))
        z /= np.linalg.norm(z, axis=-1, keepdims=True)
        z[2, 1:] = 0
        found = centroid_spread(dict(zip(("image", "text", "record"), z, strict=True)))
        assert np.isnan([found["mean_cosine_record"], found["debiased_centroid_spread"]]).all(), (seed, found)
        between = [z[0, i] @ z[0, j] for i, j in itertools.permutations(range(4), 2)]
        assert found["mean_cosine_image"] == pytest.approx(np.mean(between), abs=1e-12)


def test_debiasing_takes_the_floor_of_few_samples_away():
    plain, debiased = [], []
    for seed in range(20):
        z = np.random.default_rng(seed).normal(size=(3, 40, 50))
        z /= np.linalg.norm(z, axis=-1, keepdims=True)
        found = centroid_spread(dict(zip("abc", z, strict=True)))
        plain.append(found["centroid_spread"])
        debiased.append(found["debiased_centroid_spread"])
    assert np.mean(plain) > 0.1 and np.mean(debiased) < 0.03


def test_all_modalities_stacked():
    embeddings = of_three(n=60, lacking=0.2)
    embeddings.labels[:] = [["a", "b", ""][k % 3] for k in range(60)]
    z, truth = [], []
    for name in embeddings.modalities:
        rows = [k for k in range(60) if embeddings.present[name][k] and embeddings.labels[k]]
        z.append(embeddings.embeds(name)[rows].astype(np.float64))
        truth += [embeddings.labels[k] for k in rows]
    stacked = np.concatenate(z)
    stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    clusters = KMeans(n_clusters=2, n_init=10, random_state=0).fit_predict(stacked)
    assert evaluate_embeddings(embeddings)["all_v_measure"] == pytest.approx(v_measure_score(truth, clusters))


def test_no_sample_with_image_and_caption():
    embeddings = of_three(n=20)
    embeddings.present["text"][:10] = False
    embeddings.present["image"][10:] = False
    result = evaluate_embeddings(embeddings)
    assert "margin" not in result and "image_record_margin" in result and "text_record_margin" in result
    mean = (result["image_record_margin"] + result["text_record_margin"]) / 2
    assert result["mean_over_pairs_margin"] == pytest.approx(mean)
    assert "image - record" in metrics_report({"ours": result}, {})


def test_a_source_called_like_a_modality_takes_no_name():
    embeddings = of_three(n=40)
    found = evaluate_embeddings(embeddings)
    for source in ("image", "text", "record", "to"):
        others = {f"{source}_{name}" for name in evaluate_embeddings(embeddings)}
        assert not others & found.keys(), source


def test_which_way_is_better():
    lower = ("image_to_record_median_rank", "image_record_modality_gap", "centroid_spread")
    assert all(map(lower_is_better, (*lower, "mean_over_pairs_modality_gap", "text_to_record[age]_mae@10")))
    assert not lower_is_better("image_to_record_recall@10") and not lower_is_better("mean_over_pairs_margin")


@pytest.mark.parametrize("batch_size", [3, 8])
def test_inside_the_trainer(tmp_path, batch_size):
    """What a Trainer gathers of outputs with a mapping and a mask; the last batch is a short one."""
    model, processor = record_model(audio=True)
    pairs = record_pairs(audio=True)
    args = TrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        per_device_eval_batch_size=batch_size,
    )
    weights = {"image": 2.0, "text": 1.0, "record": 0.5, "audio": 1.0}
    compute = build_compute_metrics(pairs, fusion_weights=weights)
    trainer = Trainer(model, args, eval_dataset=pairs, data_collator=PairCollator(processor), compute_metrics=compute)
    found = trainer.evaluate()
    expected = evaluate_embeddings(embed_pairs(model, processor, pairs), fusion_weights=weights)
    assert {f"eval_{name}" for name in expected} <= found.keys()
    for name, value in expected.items():
        if not name.endswith(("v_measure", "nmi", "ari")):  # k-means of so few hangs on the last bit
            assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    names = metric_names(pairs, modalities=("record", "audio"))
    assert {"image_record_recall@10", "text_audio_margin", "centroid_spread", "num_samples"} <= {*names}
    assert {f"eval_{name}" for name in names if "[" not in name} <= found.keys()


def test_names_of_metrics_whose_samples_come_late():
    """Of samples that lack one thing each, the first ones show few of the modalities together."""
    rows = [{"image_id": "", "caption": f"c {k}", "record": {"age": float(k)}} for k in range(6)]
    rows += [{"image_id": f"i {k}", "caption": "", "record": {"age": float(k)}} for k in range(6)]
    rows += [{"image_id": f"i {k}", "caption": f"c {k}", "record": None} for k in range(6)]
    names = metric_names(Dataset.from_list(rows), grouping=False, modalities=("record",))
    assert {"recall@10", "image_record_recall@10", "text_record_margin", "mean_over_pairs_recall@10"} <= {*names}


def test_pairs_in_another_order_are_refused(tmp_path):
    model, processor = record_model()
    pairs = record_pairs()
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    compute = build_compute_metrics(pairs.select(list(range(7, -1, -1))), modalities=["record"])
    trainer = Trainer(model, args, eval_dataset=pairs, data_collator=PairCollator(processor), compute_metrics=compute)
    with pytest.raises(ValueError, match="not in the order of the pairs"):
        trainer.evaluate()


def test_sources_apart():
    embeddings = of_three(n=60)
    sources = ["a" if k % 2 else "b" for k in range(60)]
    parts = dataclasses.replace(embeddings, sources=sources).by_source()
    assert isinstance(parts["a"], PairEmbeddings) and parts["a"].ids("record") == embeddings.ids("record")[1::2]
    one, two = ({"ours": evaluate_embeddings(part)} for part in parts.values())
    report = metrics_report({"ours": evaluate_embeddings(embeddings)}, {"a": one, "b": two})
    for title in (
        "### ours: every two modalities",
        "### ours, a: every two modalities",
        "### ours, b: two modalities",
    ):
        assert title in report
