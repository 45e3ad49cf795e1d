"""Ranks against loops over every query and every item."""

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import top_k_accuracy_score

from .conftest import dot, random_pairs, traced_peak, unit_lists


def reference(image, text, image_ids, caption_ids, ks=(1, 5, 10)) -> dict[str, float]:
    """Recall, its chance and median rank from their definition, with ties against the model."""
    images, captions = {}, {}
    for identifier, row in zip(image_ids, unit_lists(image), strict=True):
        images.setdefault(identifier, row)
    for identifier, row in zip(caption_ids, unit_lists(text), strict=True):
        captions.setdefault(identifier, row)
    pairs = set(zip(image_ids, caption_ids, strict=True))
    result = {}
    directions = {
        "image_to_text": (images, captions, pairs),
        "text_to_image": (captions, images, {(caption, image) for image, caption in pairs}),
    }
    for name, (queries, gallery, correct) in directions.items():
        ranks, chances = [], {k: [] for k in ks}
        for query, vector in queries.items():
            cosines = {item: dot(vector, other) for item, other in gallery.items()}
            best = max(cosines[item] for item in gallery if (query, item) in correct)
            wrong = [item for item in gallery if (query, item) not in correct]
            ranks.append(1 + sum(cosines[item] >= best - 1e-9 for item in wrong))
            for k in ks:
                chances[k].append(1 - math.comb(len(wrong), k) / math.comb(len(gallery), k) if k < len(gallery) else 1)
        result |= {f"{name}_recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
        result |= {f"{name}_chance_recall@{k}": statistics.mean(chances[k]) for k in ks}
        result[f"{name}_median_rank"] = statistics.median(ranks)
    for what in (f"{what}@{k}" for what in ("recall", "chance_recall") for k in ks):
        result[what] = (result[f"image_to_text_{what}"] + result[f"text_to_image_{what}"]) / 2
    return result


def compute(load, image, text, image_ids, caption_ids, **kwargs):
    metric = load("cross_modal_retrieval")
    inputs = {"image_embeds": image, "text_embeds": text, "image_ids": image_ids, "caption_ids": caption_ids}
    return metric.compute(**inputs, **kwargs)


def numbered(prefix: str, numbers) -> list[str]:
    return [f"{prefix}{number}" for number in numbers]


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_one_caption_an_image(load, block_size):
    image, text = random_pairs(30, 4)
    ids = numbered("i", range(30)), numbered("c", range(30))
    result = compute(load, image, text, *ids, block_size=block_size)
    assert result == pytest.approx(reference(image, text, *ids))
    assert 0 < result["text_to_image_recall@1"] < result["text_to_image_recall@10"] < 1  # the test tells something


def test_without_ties_scikit_learn_counts_the_same_and_scipy_ranks_the_same(load):
    image, text = random_pairs(50, 4)
    result = compute(load, image, text, numbered("i", range(10, 60)), numbered("c", range(10, 60)))
    cosines = np.array(unit_lists(image)) @ np.array(unit_lists(text)).T
    for way, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        for k in (1, 5, 10):
            assert result[f"{way}_recall@{k}"] == pytest.approx(top_k_accuracy_score(np.arange(50), scores, k=k))
        assert result[f"{way}_median_rank"] == np.median(np.diag(rankdata(-scores, axis=1)))


@pytest.mark.parametrize("block_size", [3, 256])
def test_several_captions_an_image_and_images_a_caption(load, block_size):
    random = np.random.default_rng(3)
    image_number, caption_number = random.integers(0, 15, 40), random.integers(0, 20, 40)
    image, text = random_pairs(40, 4)
    image, text = image[image_number], text[caption_number]
    ids = numbered("i", image_number), numbered("c", caption_number)
    result = compute(load, image, text, *ids, ks=(1, 3), block_size=block_size)
    assert result == pytest.approx(reference(image, text, *ids, ks=(1, 3)))
    as_if_all_were_distinct = compute(load, image, text, numbered("i", range(40)), numbered("c", range(40)))
    assert result["text_to_image_recall@1"] > as_if_all_were_distinct["text_to_image_recall@1"]


def test_each_correct_item_counts_and_does_not_stand_in_the_way_of_another(load):
    """Image a has three captions, all nearer to it than the caption of b is: rank 1, not 2 or 3.

    Drawn at random, the first of the four captions is one of a's three times in four, b's once in four.
    """
    image = [[1, 0], [1, 0], [1, 0], [0, 1]]
    text = [[1, 0.3], [1, 0.2], [1, 0.1], [0, 1]]
    result = compute(load, image, text, ["a", "a", "a", "b"], ["p", "q", "r", "s"], ks=(1,))
    assert result == {
        "image_to_text_recall@1": 1,
        "image_to_text_chance_recall@1": (3 / 4 + 1 / 4) / 2,
        "image_to_text_median_rank": 1,
        "text_to_image_recall@1": 1,
        "text_to_image_chance_recall@1": 1 / 2,
        "text_to_image_median_rank": 1,
        "recall@1": 1,
        "chance_recall@1": 1 / 2,
    }


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
def test_chance_is_the_mean_over_all_rankings(load, k):
    """Image a with three of five captions, b with two of them, one of which is a's as well, c with another."""
    pairs = [("a", "p"), ("a", "q"), ("a", "r"), ("b", "r"), ("b", "s"), ("c", "t")]
    image, text = random_pairs(6, 4)
    result = compute(load, image, text, *(list(column) for column in zip(*pairs, strict=True)), ks=(k,))
    found = {"image_to_text": [], "text_to_image": []}
    for query in "abc":
        for ranking in itertools.permutations("pqrst"):
            found["image_to_text"].append(any((query, item) in pairs for item in ranking[:k]))
    for query in "pqrst":
        for ranking in itertools.permutations("abc"):
            found["text_to_image"].append(any((item, query) in pairs for item in ranking[:k]))
    for direction, hits in found.items():
        assert result[f"{direction}_chance_recall@{k}"] == pytest.approx(statistics.mean(map(int, hits)), abs=1e-12)


def test_random_embeddings_have_the_recall_of_chance(load):
    """300 captions of 100 images, which know nothing of one another; three standard deviations."""
    image, text = np.random.default_rng(0).normal(size=(2, 300, 50)).astype(np.float32)
    result = compute(load, image, text, numbered("i", np.arange(300) % 100), numbered("c", range(300)))
    for name in ("recall@1", "recall@5", "recall@10"):
        chance = result[f"chance_{name}"]
        assert abs(result[name] - chance) < 3 * math.sqrt(chance * (1 - chance) / 200)


def test_written_out(load):
    """Cosines decrease with the angle: images at 0, 40, 90 degrees, captions at 50, 10, 80 degrees."""
    degrees = np.deg2rad([[0, 40, 90], [50, 10, 80]])
    image, text = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in degrees)
    result = compute(load, image, text, ["a", "b", "c"], ["p", "q", "r"], ks=(1, 2))
    # a -> q, p, r: its own p is 2nd. b -> p (10), q (30), r (40): its own q is 2nd. c -> r: 1st.
    # p -> b (10), c (40), a (50): its own a is 3rd. q -> a (10), b (30): 2nd. r -> c: 1st.
    assert result == pytest.approx(
        {
            "image_to_text_recall@1": 1 / 3,
            "image_to_text_recall@2": 1,
            "image_to_text_median_rank": 2,
            "text_to_image_recall@1": 1 / 3,
            "text_to_image_recall@2": 2 / 3,
            "text_to_image_median_rank": 2,
            "recall@1": 1 / 3,
            "recall@2": 5 / 6,
            **{f"{way}chance_recall@{k}": k / 3 for way in ("", "image_to_text_", "text_to_image_") for k in (1, 2)},
        }
    )


@pytest.mark.parametrize("dim", [3, 100])
def test_constant_embedding_gets_the_worst_rank(load, dim):
    """One direction at several lengths: the unit vectors differ in their last bits, which must not break the ties."""
    random = np.random.default_rng(0)
    constant = (random.integers(1, 50, dim) * random.integers(1, 9, (37, 1))).astype(np.float32)
    ids = numbered("i", range(37)), numbered("c", range(37))
    result = compute(load, constant, constant[::-1], *ids, block_size=5)
    assert result["text_to_image_recall@10"] == result["image_to_text_recall@10"] == 0
    assert result["text_to_image_median_rank"] == result["image_to_text_median_rank"] == 37


def test_an_item_equal_to_the_correct_one_ranks_before_it(load):
    image = [[1, 0], [1, 0], [0, 1]]
    text = [[1, 0], [0.5, 0.5], [0, 1]]
    result = compute(load, image, text, ["a", "b", "c"], ["p", "q", "r"], ks=(1, 2))
    assert result["text_to_image_recall@1"] == pytest.approx(1 / 3)  # r alone: p ties a and b, q ties all three
    assert result["text_to_image_recall@2"] == pytest.approx(2 / 3)


def test_one_pair(load):
    result = compute(load, [[1.0, 2.0]], [[-1.0, 0.5]], ["a"], ["p"])
    assert result["text_to_image_recall@1"] == result["image_to_text_median_rank"] == 1


def test_the_first_embedding_of_an_id_counts(load):
    image, text = random_pairs(6, 4)
    ids = ["a", "b", "c", "a", "b", "c"], numbered("c", range(6))
    result = compute(load, image, text, *ids)
    image[3:] = 7  # other embeddings for a, b, c
    assert compute(load, image, text, *ids) == result


@pytest.mark.parametrize("wrong", [0, 2.5])
def test_a_cut_off_below_one_or_between_two_is_refused(load, wrong):
    with pytest.raises(ValueError, match=f"ks holds {wrong}, each has to be a whole number, 1 or more"):
        load("cross_modal_retrieval").compute(image_embeds=np.eye(2), text_embeds=np.eye(2), ks=[1, wrong])


def test_zero_vector_is_named(load):
    with pytest.raises(ValueError, match="image_embeds: row 1 is a zero vector"):
        compute(load, [[1, 0], [0, 0]], [[1, 0], [0, 1]], ["a", "b"], ["p", "q"])


def naive_ranks(image, text, image_ids, caption_ids) -> dict[str, np.ndarray]:
    """Ranks from the whole float64 matrix of cosines."""
    x, y = (z.astype(np.float64) / np.linalg.norm(z.astype(np.float64), axis=1, keepdims=True) for z in (image, text))
    (images, first_image), (captions, first_text) = (np.unique(z, return_index=True) for z in (image_ids, caption_ids))
    cosines = x[first_image] @ y[first_text].T
    correct = np.zeros(cosines.shape, dtype=bool)
    correct[np.searchsorted(images, image_ids), np.searchsorted(captions, caption_ids)] = True
    ranks = {}
    for name, scores, right in (("image_to_text", cosines, correct), ("text_to_image", cosines.T, correct.T)):
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[name] = 1 + (~right & (scores >= best - 1e-9)).sum(axis=1)
    return ranks


def assert_ranks(result: dict[str, float], ranks: dict[str, np.ndarray], ks) -> None:
    """Recalls at each k from 1 to the size of the gallery are the distribution of the ranks."""
    for name, expected in ranks.items():
        for k in ks:
            assert result[f"{name}_recall@{k}"] == pytest.approx(np.mean(expected <= k), abs=1e-12), (name, k)
        assert result[f"{name}_median_rank"] == np.median(expected)


@pytest.mark.parametrize("block_size", [1, 17, 64, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_whole_matrix_with_duplicates_and_ties(load, seed, block_size):
    """Embeddings of small integers: many a cosine occurs several times, and items with other ids are equal."""
    random = np.random.default_rng(seed)
    image, text = random.integers(-2, 3, size=(2, 150, 5)).astype(np.float32)
    image, text = image + [0, 0, 0, 0, 3], text + [0, 0, 0, 0, 3]
    ids = numbered("i", random.integers(0, 120, 150)), numbered("c", random.integers(0, 100, 150))
    ks = range(1, 121)
    ranks = naive_ranks(image, text, *ids)
    assert_ranks(compute(load, image, text, *ids, ks=ks, block_size=block_size), ranks, ks)
    assert len(set(ranks["image_to_text"])) > 10  # the test tells something


def test_more_items_than_a_tile_has(load):
    random = np.random.default_rng(0)
    image, text = random_pairs(2600, 8)
    ids = numbered("i", random.integers(0, 2400, 2600)), numbered("c", random.integers(0, 6000, 2600))
    ks = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert min(len(set(column)) for column in ids) > 1024
    assert_ranks(compute(load, image, text, *ids, ks=ks), naive_ranks(image, text, *ids), ks)


def test_near_ties_are_decided_in_float64(load):
    """Cosines that differ from the best one by 1e-10 to 1e-8, far below what float32 products resolve."""
    random = np.random.default_rng(0)
    text = random.normal(size=(30, 64))
    others = np.repeat(text, 20, axis=0)  # 20 wrong images around each caption, at growing angles
    aside = random.normal(size=others.shape)
    aside -= others * np.sum(aside * others, axis=1, keepdims=True) / np.sum(others**2, axis=1, keepdims=True)
    aside *= np.linalg.norm(others, axis=1, keepdims=True) / np.linalg.norm(aside, axis=1, keepdims=True)
    angles = np.tile(np.sqrt(2 * np.geomspace(1e-10, 1e-8, 20)), 30)[:, None]  # 1 - cos = angle^2 / 2
    image = np.concatenate([text, others + angles * aside]).astype(np.float32)
    text = np.concatenate([text, random.normal(size=others.shape)]).astype(np.float32)
    ids = numbered("i", range(len(image))), numbered("c", range(len(text)))
    ks = range(1, len(image) + 1)
    ranks = naive_ranks(image, text, *ids)
    assert_ranks(compute(load, image, text, *ids, ks=ks), ranks, ks)
    near = ranks["text_to_image"][np.argsort(np.argsort(ids[1]))][:30]  # `naive_ranks` sorts the ids
    assert set(near) <= {10, 11, 12}  # 1 - cos up to 1e-9 is a tie: about half of the 20


def test_without_ids_every_row_is_an_item_of_its_own(load):
    image, text = random_pairs(30, 4)
    vectors = {"image_embeds": image, "text_embeds": text}
    images, captions = numbered("i", range(30)), numbered("c", [*range(25), *range(5)])
    metric = load("cross_modal_retrieval")
    expected = compute(load, image, text, images, numbered("c", range(30)))
    assert metric.compute(**vectors) == expected
    assert metric.compute(**vectors, image_ids=None) == expected
    assert metric.compute(**vectors, caption_ids=captions) == compute(load, image, text, images, captions)
    for start in (0, 13):
        rows = slice(start, 13 if start == 0 else None)
        metric.add_batch(image_embeds=image[rows], text_embeds=text[rows])
    assert metric.compute() == expected
    for x, y in zip(image, text, strict=True):
        metric.add(image_embeds=x, text_embeds=y)
    assert metric.compute() == expected


def test_a_required_input_is_named(load):
    with pytest.raises(ValueError, match="cross_modal_retrieval: inputs are missing: .'text_embeds'."):
        load("cross_modal_retrieval").compute(image_embeds=[[1.0, 0.0]])


def test_memory_stays_below_a_square_of_cosines(load):
    """6,000 x 6,000 cosines would take 288 MB, two tiles 16 MB; no vector is copied as a whole."""
    image, text = random_pairs(6000, 64)
    metric = load("cross_modal_retrieval")
    with traced_peak() as peak:
        metric.compute(image_embeds=image, text_embeds=text)
    assert peak.bytes < 24e6
