"""Queries of several modalities: simulated unit vectors whose best weights are known, and naive searches."""

import itertools

import numpy as np
import pytest
import torch

from gap_closed_clip.evaluation import PairEmbeddings
from gap_closed_clip.evaluation.fusion import fuse, fusion_weights
from gap_closed_clip.evaluation.queries import measure_queries, queries_of_two
from gap_closed_clip.model import fusion_gap_closed_clip

from .records import of_three
from .test_every_pair import naive_ranks


def simulated(cosines: dict[str, float], n: int = 3000, dim: int = 64, shared: float = 0.0, cone: float = 0.0):
    """
    Texts t, and of each modality c t + sqrt(1 - c^2) e, with e orthogonal to t and of length 1.

    Args:
        shared: the part of the errors' squares that all modalities have in common.
        cone: how far all embeddings are pulled into one direction.
    """
    random = np.random.default_rng(0)

    def unit(z):
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def orthogonal(z, t):
        return unit(z - np.sum(z * t, axis=1, keepdims=True) * t)

    text = unit(random.normal(size=(n, dim)))
    common = orthogonal(random.normal(size=(n, dim)), text)
    embeds = {"text": text}
    for name, c in cosines.items():
        own = orthogonal(random.normal(size=(n, dim)), text)
        error = unit(np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        embeds[name] = c * text + np.sqrt(1 - c**2) * error
    pull = np.eye(dim)[0] * cone
    embeds = {name: unit(z + pull).astype(np.float32) for name, z in embeds.items()}
    ids = [str(k) for k in range(n)]
    image, texts = embeds.pop("image"), embeds.pop("text")
    return PairEmbeddings(image, texts, ids, ids, [""] * n, further=embeds)


def cosine_to_text(embeddings, weights, names) -> float:
    query = fuse({name: embeddings.embeds(name) for name in names}, weights)
    return float(np.sum(query * embeddings.text_embeds, axis=1).mean())


@pytest.mark.parametrize("shared", [0.0, 0.6])
@pytest.mark.parametrize("cosines", [(0.6, 0.2), (0.5, 0.5), (0.8, 0.05), (0.3, 0.7)])
def test_weighted_is_at_least_as_near_as_each_alone_and_as_the_plain_mean(cosines, shared):
    names = ("image", "record")
    embeddings = simulated(dict(zip(names, cosines, strict=True)), shared=shared)
    half = np.arange(1500)
    weights = fusion_weights(embeddings.select(half), "text")
    others = embeddings.select(half + 1500)  # that nothing was fitted on
    found = cosine_to_text(others, weights, names)
    alone = [cosine_to_text(others, {name: 1.0}, [name]) for name in names]
    assert found >= max(*alone, cosine_to_text(others, None, names)) - 2e-3
    best = max(cosine_to_text(others, {"image": a, "record": 1 - a}, names) for a in np.linspace(0, 1, 101))
    assert found == pytest.approx(best, abs=2e-3)


def test_independent_errors_have_the_weights_of_maximal_ratio_combining():
    cosines = {"image": 0.6, "record": 0.3, "audio": 0.45}
    weights = fusion_weights(simulated(cosines), "text")
    expected = np.array([c / (1 - c**2) for c in cosines.values()])
    np.testing.assert_allclose(list(weights.values()), expected / expected.mean(), rtol=0.05)
    assert np.mean(list(weights.values())) == pytest.approx(1)
    assert sum(cosines[name] ** 2 / (1 - cosines[name] ** 2) for name in cosines) == pytest.approx(
        cosine_to_text(simulated(cosines), weights, cosines) ** 2
        / (1 - cosine_to_text(simulated(cosines), weights, cosines) ** 2),
        rel=0.05,
    )


def test_errors_in_common_count_once():
    """By hand: G = [[1, g], [g, 1]], g = c1 c2 + s1 s2 h; w proportional to (c1 - g c2, c2 - g c1), none below 0."""
    c1, c2 = 0.6, 0.3
    s1, s2 = np.sqrt(1 - c1**2), np.sqrt(1 - c2**2)
    for shared, h in ((0.2, 0.2), (0.9, 0.9)):
        g = c1 * c2 + s1 * s2 * h
        expected = np.maximum([c1 - g * c2, c2 - g * c1], 0)
        weights = fusion_weights(simulated({"image": c1, "record": c2}, shared=shared), "text")
        np.testing.assert_allclose(list(weights.values()), expected / expected.mean(), atol=0.08)


def test_a_cone_counts_for_nothing():
    """In a cone all cosines are high; what tells samples apart is as before."""
    plain, cone = (fusion_weights(simulated({"image": 0.6, "record": 0.2}, cone=pull), "text") for pull in (0.0, 1.0))
    assert plain["record"] == pytest.approx(cone["record"], abs=0.1)
    crowded = simulated({"image": 0.6, "record": 0.2}, cone=1.0)
    assert np.sum(crowded.further["record"] * crowded.text_embeds, axis=1).mean() > 0.5


def test_general_weights_are_the_mean_over_the_targets():
    """By hand, from the true-pair cosines: there is no cone."""
    embeddings = simulated({"image": 0.6, "record": 0.3})
    z = {name: embeddings.embeds(name).astype(np.float64) for name in embeddings.modalities}
    expected = {}
    for name in z:
        cosines = [np.sum(z[name] * z[other], axis=1).mean() for other in z if other != name]
        expected[name] = np.mean([c / (1 - c**2) for c in cosines])
    found = fusion_weights(embeddings)
    mean = np.mean(list(expected.values()))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value / mean, rel=0.05)
    assert list(found) == ["image", "text", "record"]


def test_samples_that_lack_modalities():
    whole, some = of_three(n=2000), of_three(n=2000, lacking=0.4)
    for target in ("text", "image", None):
        expected, found = fusion_weights(whole, target), fusion_weights(some, target)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=0.1)
        assert target is None or target not in found


def test_a_modality_that_knows_nothing_has_no_weight():
    embeddings = simulated({"image": 0.6, "record": 0.0})
    assert fusion_weights(embeddings, "text")["record"] < 0.1


def test_messages():
    embeddings = of_three(n=20)
    with pytest.raises(ValueError, match="there is no audio"):
        fusion_weights(embeddings, "audio")
    with pytest.raises(ValueError, match="needs two modalities beside text"):
        fusion_weights(embeddings, "text", ["image"])
    with pytest.raises(ValueError, match="1 samples have the modality image; two at least"):
        fusion_weights(embeddings.select(np.array([0])))
    with pytest.raises(ValueError, match="no weight of record, only of image"):
        fuse({"image": np.eye(2), "record": np.eye(2)}, {"image": 1.0})


def test_fused_in_torch_and_in_numpy():
    embeddings = of_three(n=50, lacking=0.6)
    names, weights = embeddings.modalities, {"image": 1.5, "text": 1.0, "record": 0.5}
    parts = {name: embeddings.embeds(name) for name in names}
    tensors = {name: torch.from_numpy(z) for name, z in parts.items()}
    for given in (None, weights):
        expected = np.zeros((50, 24))
        for row in range(50):
            summed = sum((given or dict.fromkeys(names, 1.0))[name] * parts[name][row].astype(float) for name in names)
            expected[row] = summed / (np.linalg.norm(summed) or 1)
        np.testing.assert_allclose(fuse(parts, given), expected, atol=1e-6)
        np.testing.assert_allclose(fusion_gap_closed_clip.fuse(tensors, given).numpy(), expected, atol=1e-6)
    nothing = ~np.logical_or.reduce(list(embeddings.present.values()))
    assert nothing.any() and not fuse(parts)[nothing].any()
    with pytest.raises(ValueError, match="no embeddings"):
        fusion_gap_closed_clip.fuse({})
    with pytest.raises(ValueError, match="of different shapes"):
        fusion_gap_closed_clip.fuse({"image": torch.eye(2), "text": torch.eye(3)})
    with pytest.raises(ValueError, match="no weight of text, only of image"):
        fusion_gap_closed_clip.fuse({"image": torch.eye(2), "text": torch.eye(2)}, {"image": 1.0})


def test_queries_of_two_by_hand():
    """Over the samples that have all three; each alone is asked the same questions."""
    embeddings = of_three(n=60, lacking=0.2)
    weights = {"image": 2.0, "text": 1.0, "record": 0.4}
    found = measure_queries(embeddings, (1, 5), weights)
    rows = np.flatnonzero(np.logical_and.reduce(list(embeddings.present.values())))
    z = {name: embeddings.embeds(name)[rows].astype(np.float64) for name in embeddings.modalities}
    ids = {name: [embeddings.ids(name)[row] for row in rows] for name in z}
    for first, second, target in (("image", "record", "text"), ("image", "text", "record")):
        both = [f"{a}|{b}" for a, b in zip(ids[first], ids[second], strict=True)]
        ways = {
            "plain": z[first] + z[second],
            "weighted": weights[first] * z[first] + weights[second] * z[second],
            first: z[first],
            second: z[second],
        }
        for way, query in ways.items():
            query /= np.linalg.norm(query, axis=1, keepdims=True)
            ranks = np.array(naive_ranks(query, z[target], both, ids[target]))
            begin = f"{first}+{second}_to_{target}_{way}"
            assert found[f"{begin}_recall@5"] == pytest.approx(np.mean(ranks <= 5)), begin
            assert found[f"{begin}_median_rank"] == np.median(ranks)
    assert found["image+record_to_text_num_pairs"] == len(rows)
    assert found["image+record_to_text_weight_image"] == pytest.approx(2 / 2.4)
    assert len(list(queries_of_two(("image", "text", "record", "audio")))) == 12


def test_two_modalities_without_weight_are_searched_by_their_plain_mean():
    """As `together` of pipelines and handler does; of four modalities two may have none."""
    found = measure_queries(of_three(n=40), (1, 5), {"image": 0.0, "text": 2.0, "record": 0.0})
    begin = "image+record_to_text_"
    for metric in ("recall@1", "recall@5", "median_rank"):
        assert found[f"{begin}weighted_{metric}"] == found[f"{begin}plain_{metric}"]
    assert found[f"{begin}weight_image"] == 0.5


def test_without_weights_each_half_has_those_of_the_other():
    """The weights of a query were not fitted on it: with content that only one half has, they differ."""
    embeddings = of_three(n=400)
    found = measure_queries(embeddings, (1,))
    expected = fusion_weights(embeddings, "text")
    share = expected["image"] / sum(expected.values())
    assert found["image+record_to_text_weight_image"] == pytest.approx(share, abs=0.05)
    begin = "image+record_to_text_"
    alone = max(found[f"{begin}{way}_recall@1"] for way in ("image", "record"))
    assert found[f"{begin}weighted_recall@1"] >= alone > found[f"{begin}chance_recall@1"]


def test_every_two_of_four():
    embeddings = simulated({"image": 0.6, "record": 0.3, "audio": 0.4}, n=40)
    found = measure_queries(embeddings, (10,))
    for first, second in itertools.combinations(embeddings.modalities, 2):
        for target in {*embeddings.modalities} - {first, second}:
            assert f"{first}+{second}_to_{target}_plain_recall@10" in found


def test_embeddings_that_are_not_finite_are_refused():
    embeddings = of_three(n=20)
    embeddings.further["record"][[3, 5]] = np.nan
    for target in (None, "record"):
        with pytest.raises(ValueError, match="2 rows of record are NaN"):
            fusion_weights(embeddings, target)
