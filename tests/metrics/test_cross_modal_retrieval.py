"""Ranks against loops over every query and every item."""

import statistics

import numpy as np
import pytest

from .conftest import dot, random_pairs, unit_lists


def reference(image, text, image_ids, caption_ids, ks=(1, 5, 10)) -> dict[str, float]:
    """Recall and median rank from their definition, with ties against the model."""
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
        ranks = []
        for query, vector in queries.items():
            cosines = {item: dot(vector, other) for item, other in gallery.items()}
            best = max(cosines[item] for item in gallery if (query, item) in correct)
            wrong = [item for item in gallery if (query, item) not in correct]
            ranks.append(1 + sum(cosines[item] >= best - 1e-9 for item in wrong))
        result |= {f"{name}_recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
        result[f"{name}_median_rank"] = statistics.median(ranks)
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
    """Image a has three captions, all nearer to it than the caption of b is: rank 1, not 2 or 3."""
    image = [[1, 0], [1, 0], [1, 0], [0, 1]]
    text = [[1, 0.3], [1, 0.2], [1, 0.1], [0, 1]]
    result = compute(load, image, text, ["a", "a", "a", "b"], ["p", "q", "r", "s"], ks=(1,))
    assert result == {
        "image_to_text_recall@1": 1,
        "image_to_text_median_rank": 1,
        "text_to_image_recall@1": 1,
        "text_to_image_median_rank": 1,
    }


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


def test_zero_vector_is_named(load):
    with pytest.raises(ValueError, match="image_embeds: row 1 is a zero vector"):
        compute(load, [[1, 0], [0, 0]], [[1, 0], [0, 1]], ["a", "b"], ["p", "q"])


def test_memory_stays_below_a_square_of_cosines(load):
    """6,000 x 6,000 cosines would take 288 MB; a block of 64 takes 3 MB."""
    import tracemalloc

    image, text = random_pairs(6000, 2)
    metric = load("cross_modal_retrieval")
    ids = {"image_ids": numbered("i", range(6000)), "caption_ids": numbered("c", range(6000))}
    tracemalloc.start()
    metric.compute(image_embeds=image, text_embeds=text, **ids, block_size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
