"""Both kinds in one gallery, against loops over every query and every item, and numbers by hand."""

import logging
import math

import numpy as np
import pandas
import pytest

from .conftest import dot, random_pairs, traced_peak, unit_lists


SHARES = ("other_kind_share", "chance_other_kind_share")
PRECISIONS = ("mixed_label_precision", "chance_mixed_label_precision", "other_kind_label_precision")


def compute(load, image, text, labels=None, image_ids=None, caption_ids=None, **kwargs):
    inputs = {"image_embeds": image, "text_embeds": text, "labels": labels}
    return load("mixed_gallery_search").compute(**inputs, image_ids=image_ids, caption_ids=caption_ids, **kwargs)


def items_of(image, text, labels, image_ids, caption_ids) -> list[dict]:
    """Every distinct image and caption with its vector, its labels and the number of its family."""
    items, family = {}, {}
    for kind, rows, ids in (("image", image, image_ids), ("caption", text, caption_ids)):
        for vector, identifier, label in zip(unit_lists(rows), ids, labels, strict=True):
            item = items.setdefault((kind, identifier), {"kind": kind, "vector": vector, "labels": set()})
            item["labels"] |= {label} - {""}
    for number, key in enumerate(items):
        family[key] = number
    for _ in items:  # the smaller number spreads along the pairs
        for pair in zip(image_ids, caption_ids, strict=True):
            keys = ("image", pair[0]), ("caption", pair[1])
            smaller = min(family[key] for key in keys)
            family.update(dict.fromkeys(keys, smaller))
    return [item | {"family": family[key]} for key, item in items.items()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def reference(image, text, labels, image_ids, caption_ids, k=10) -> dict[str, float]:
    """From the definition, one query after the other."""
    items = items_of(image, text, labels, image_ids, caption_ids)
    found = {name: [] for name in SHARES + PRECISIONS}
    for query in items:
        left = [item for item in items if item["family"] != query["family"]]
        cosines = [dot(query["vector"], item["vector"]) for item in left]
        kth = sorted(cosines, reverse=True)[:k][-1]
        near = [item for item, cosine in zip(left, cosines, strict=True) if cosine >= kth - 1e-9]
        found["other_kind_share"].append(mean([item["kind"] != query["kind"] for item in near]))
        found["chance_other_kind_share"].append(mean([item["kind"] != query["kind"] for item in left]))

        def precision(of, query=query):
            return mean([bool(item["labels"] & query["labels"]) for item in of if item["labels"]])

        if query["labels"] and any(item["labels"] for item in near):
            found["mixed_label_precision"].append(precision(near))
            found["chance_mixed_label_precision"].append(precision(left))
        others = [item for item in near if item["labels"] and item["kind"] != query["kind"]]
        if query["labels"] and others:
            found["other_kind_label_precision"].append(precision(others))
    return {f"{name}@{k}": mean(values) for name, values in found.items()}


def repeated(n: int, num_labels: int, seed: int = 0):
    """Rows of items that come several times: labels (some empty), ids of images and of captions."""
    random = np.random.default_rng(seed)
    labels = ["" if label == num_labels else f"group {label}" for label in random.integers(0, num_labels + 1, n)]
    return labels, [f"i{number}" for number in random.integers(0, n, n)], [
        f"c{number}" for number in random.integers(0, 2 * n, n)
    ]  # fmt: skip


def same_content(rows, ids):
    """Rows of one id get one embedding, that of the first."""
    return rows[[ids.index(identifier) for identifier in ids]]


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_equals_the_loops(load, k, block_size):
    labels, *ids = repeated(60, 3)
    image, text = (same_content(rows, column) for rows, column in zip(random_pairs(60, 4), ids, strict=True))
    expected = reference(image, text, labels, *ids, k=k)
    result = compute(load, image, text, labels, *ids, k=k, block_size=block_size)
    assert list(result) == [f"{name}@{k}" for name in SHARES + PRECISIONS]
    assert result == pytest.approx(expected, abs=1e-12)
    assert len({round(value, 6) for value in expected.values()}) == 5  # the test tells something
    items = items_of(image, text, labels, *ids)
    assert any(not item["labels"] for item in items) and any(len(item["labels"]) > 1 for item in items)


def test_written_out(load):
    """Images at 0, 30 and 90 degrees, captions at 10, 70 and 85, which pair up in this order; one neighbour.

    Without its partner, image 0 sees image 30; image 30 sees caption 10; image 90 sees caption 70; caption 10 sees
    image 30; captions 70 and 85 see one another. Three of the six are of the other kind. Labels a, a, b: those of
    image 0, image 30 and caption 10 fit, two of which are of the other kind. Of the four that are left to a query two
    are of the other kind; two fit if its label is a, none if it is b.
    """
    degrees = np.deg2rad([[0, 30, 90], [10, 70, 85]])
    image, text = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in degrees)
    assert compute(load, image, text, ["a", "a", "b"], k=1) == pytest.approx(
        {
            "other_kind_share@1": 1 / 2,
            "chance_other_kind_share@1": 1 / 2,
            "mixed_label_precision@1": 1 / 2,
            "chance_mixed_label_precision@1": (4 * 2 / 4 + 2 * 0) / 6,
            "other_kind_label_precision@1": 2 / 3,
        }
    )


def test_a_gap_hides_the_other_kind(load):
    """Two kinds far apart: no query sees the other one, of which nothing is known then."""
    image, text = random_pairs(50, 8)
    offset = np.eye(8, dtype=np.float32)[0] * 1000
    open_ = compute(load, image + offset, text - offset, ["a", "b"] * 25)
    assert open_["other_kind_share@10"] == 0 and open_["chance_other_kind_share@10"] == 1 / 2
    assert math.isnan(open_["other_kind_label_precision@10"])
    assert 0.2 < open_["mixed_label_precision@10"] < 0.8
    closed = np.random.default_rng(0).normal(size=(2, 500, 8)).astype(np.float32)
    assert compute(load, *closed)["other_kind_share@10"] == pytest.approx(1 / 2, abs=0.01)


def test_the_own_family_is_left_out(load):
    """Each caption equals its image: with it in the gallery the nearest would always be the partner."""
    embeds = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    result = compute(load, embeds, embeds, [f"group {k}" for k in range(40)], k=1)
    assert result["mixed_label_precision@1"] == result["chance_mixed_label_precision@1"] == 0
    assert result["other_kind_share@1"] == 1 / 2  # of each other pair both tie


def test_every_query_counts_the_same(load):
    """One image of two captions (a family), and another pair: five queries.

    Of the first family's three each has one image and one caption left, of the other two each one image, two captions.
    """
    image, text = random_pairs(3, 4)
    result = compute(load, image, text, image_ids=["a", "a", "b"], caption_ids=["p", "q", "r"])
    by_hand = (3 * 1 / 2 + 2 / 3 + 1 / 3) / 5
    assert result == pytest.approx({"other_kind_share@10": by_hand, "chance_other_kind_share@10": by_hand})


@pytest.mark.parametrize("dim", [3, 100])
def test_a_constant_embedding_has_what_chance_has(load, dim):
    """One direction at several lengths: the unit vectors differ in their last bits, which must not break the ties."""
    random = np.random.default_rng(0)
    constant = (random.integers(1, 50, dim) * random.integers(1, 9, (150, 1))).astype(np.float32)
    labels, *ids = repeated(150, 3)
    result = compute(load, constant, constant[::-1], labels, *ids)
    assert result["other_kind_share@10"] == pytest.approx(result["chance_other_kind_share@10"], abs=1e-12)
    assert result["mixed_label_precision@10"] == pytest.approx(result["chance_mixed_label_precision@10"], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loops_with_ties(load, seed):
    """Embeddings of small integers: many a cosine occurs several times."""
    random = np.random.default_rng(seed)
    labels, *ids = repeated(150, 4, seed)
    image, text = (random.integers(-2, 3, size=(150, 4)) + [0, 0, 0, 3.0] for _ in range(2))
    image, text = (same_content(rows, column) for rows, column in zip((image, text), ids, strict=True))
    result = compute(load, image, text, labels, *ids)
    assert result == pytest.approx(reference(image, text, labels, *ids), abs=1e-12)


@pytest.mark.parametrize(("num_around", "k"), [(30, 10), (250, 10)], ids=["a few", "a crowd"])
def test_near_ties_are_decided_in_float64(load, num_around, k):
    """Around each of six captions images at cosines that lie 1e-10 to 1e-8 apart, which float32 does not tell."""
    random = np.random.default_rng(0)
    text = random.normal(size=(6, 64))
    around = np.repeat(text, num_around, axis=0)
    aside = random.normal(size=around.shape)
    aside -= around * np.sum(aside * around, axis=1, keepdims=True) / np.sum(around**2, axis=1, keepdims=True)
    aside *= np.linalg.norm(around, axis=1, keepdims=True) / np.linalg.norm(aside, axis=1, keepdims=True)
    angles = np.tile(np.sqrt(2 * np.geomspace(1e-10, 1e-8, num_around)), 6)[:, None]  # 1 - cos = angle^2 / 2
    far = random.normal(size=around.shape)
    image = np.concatenate([far[:6], around + angles * aside]).astype(np.float32)
    text = np.concatenate([text, far]).astype(np.float32)
    labels = [f"group {number}" for number in random.integers(0, 3, len(image))]
    ids = [f"i{number:05}" for number in range(len(image))], [f"c{number:05}" for number in range(len(image))]
    x = np.concatenate([image, text]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines, pair = x @ x.T, np.tile(np.arange(len(image)), 2)
    cosines[pair[:, None] == pair] = -np.inf
    near = cosines >= np.sort(cosines, axis=1)[:, -k, None] - 1e-9
    group = np.array(labels + labels)
    expected = (near & (group[:, None] == group)).sum(axis=1) / near.sum(axis=1)
    assert compute(load, image, text, labels, *ids, k=k)["mixed_label_precision@10"] == pytest.approx(
        expected.mean(), abs=1e-12
    )
    assert near[len(image) : len(image) + 6].sum() > 6 * k  # ties: the test tells something


def test_more_items_than_a_group_of_the_bound_has(load):
    """The float32 bound is of groups of 16; 1,400 items, several of the nearest in one group."""
    image, text = random_pairs(700, 5)
    labels = [f"group {number % 7}" for number in range(700)]
    x = np.concatenate([image, text]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines, pair, kind = x @ x.T, np.tile(np.arange(700), 2), np.repeat([0, 1], 700)
    cosines[pair[:, None] == pair] = -np.inf
    nearest = np.argsort(-cosines, axis=1)[:, :10]
    result = compute(load, image, text, labels)
    assert result["other_kind_share@10"] == pytest.approx(np.mean(kind[nearest] != kind[:, None]), abs=1e-12)
    fits = pair[nearest] % 7 == pair[:, None] % 7
    assert result["mixed_label_precision@10"] == pytest.approx(np.mean(fits), abs=1e-12)


def test_without_labels_nothing_is_said_of_them(load):
    image, text = random_pairs(30, 4)
    expected = compute(load, image, text, [f"group {number % 2}" for number in range(30)])
    for labels in (None, [""] * 30, ["  "] * 30):
        assert compute(load, image, text, labels) == {f"{name}@10": expected[f"{name}@10"] for name in SHARES}


@pytest.mark.parametrize("nothing", [None, math.nan, np.nan, np.float32("nan"), pandas.NA, pandas.NaT], ids=repr)
@pytest.mark.parametrize("metric", ["mixed_gallery_search", "cross_modal_grouping"])
def test_a_label_none_or_nan_is_no_label(load, metric, nothing):
    image, text = np.random.default_rng(0).normal(size=(2, 12, 4))
    vectors = {"image_embeds": image, "text_embeds": text}
    for labels in (4 * ["a", "b", nothing], [nothing, "a", "b"] + 3 * ["", "a", "b"]):
        plain = [label if isinstance(label, str) else "" for label in labels]
        expected = load(metric).compute(**vectors, labels=plain)
        found = load(metric).compute(**vectors, labels=labels)
        assert found == pytest.approx(expected, nan_ok=True) and len(found) > 2


def test_a_column_of_a_data_frame(load):
    """What pandas makes of a column with gaps, of names and of numbers: None, NaN, NA, 1.0 instead of 1."""
    image, text = np.random.default_rng(0).normal(size=(2, 12, 4))
    expected = compute(load, image, text, 4 * ["1", "2", ""])
    numbers = pandas.Series(4 * [1, 2, None])
    for column in (numbers, numbers.astype("Int64"), numbers.astype(object), numbers.to_numpy(), numbers.tolist()):
        assert compute(load, image, text, column) == expected
    for column in (pandas.Series(4 * ["1", "2", None]), pandas.Series(4 * ["1", "2", None], dtype="string")):
        assert compute(load, image, text, column) == expected


def test_without_ids_and_in_batches(load):
    """Ids that no two rows share are the default, labels too may come in batches or not at all."""
    image, text = random_pairs(30, 4)
    labels = [f"group {number % 3}" for number in range(30)]
    ids = [f"{number:02}" for number in range(30)]
    expected = compute(load, image, text, labels, ids, ids)
    assert compute(load, image, text, labels) == expected
    metric = load("mixed_gallery_search")
    for rows in (slice(0, 17), slice(17, 30)):
        metric.add_batch(image_embeds=image[rows], text_embeds=text[rows], labels=labels[rows])
    assert metric.compute() == expected
    metric.add_batch(image_embeds=image, text_embeds=text)
    assert metric.compute() == compute(load, image, text)


def test_fewer_items_than_neighbours(load):
    """Whatever is left is near: each has what chance has."""
    image, text = random_pairs(4, 3)
    result = compute(load, image, text, [*"aabb"])
    assert result["other_kind_share@10"] == result["chance_other_kind_share@10"] == 1 / 2
    assert result["mixed_label_precision@10"] == result["chance_mixed_label_precision@10"] == pytest.approx(1 / 3)


def test_a_single_family_is_nan_and_said(load, caplog):
    image, text = random_pairs(3, 2)
    with caplog.at_level(logging.WARNING):
        result = compute(load, image, text, [*"aab"], caption_ids=["c"] * 3)
    assert len(result) == 5 and all(math.isnan(value) for value in result.values())
    assert "all pairs share images or captions" in caplog.text


def test_faults_are_named(load):
    with pytest.raises(ValueError, match="text_embeds: row 1 is a zero vector"):
        compute(load, [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="k is 0, it has to be 1 or more"):
        compute(load, [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]], k=0)


def test_memory_stays_below_a_square_of_cosines(load):
    """8,000 x 8,000 cosines would take 256 MB in float32, a block of 256 rows 8 MB."""
    image, text = random_pairs(4000, 16)
    metric = load("mixed_gallery_search")
    with traced_peak() as peak:
        metric.compute(image_embeds=image, text_embeds=text, labels=[f"group {row % 5}" for row in range(4000)])
    assert peak.bytes < 40e6
