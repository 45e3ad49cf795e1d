"""Clusters, neighbours and probe against loops, and above all: no figure is bought with the pair's own partner."""

import logging
import math
from collections import Counter

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score

from .conftest import dot, random_pairs, unit_lists


KNN = ("knn_accuracy_image_to_text", "knn_accuracy_text_to_image")
PROBE = ("linear_probe_accuracy_image_to_text", "linear_probe_accuracy_text_to_image")
MAJORITY = ("majority_accuracy_image_to_text", "majority_accuracy_text_to_image")
BALANCED = tuple(name.replace("accuracy", "balanced_accuracy") for name in (*KNN, *PROBE))


def compute(load, image, text, labels, image_ids=None, caption_ids=None, **kwargs):
    return load("cross_modal_grouping").compute(
        image_embeds=image,
        text_embeds=text,
        labels=labels,
        image_ids=image_ids or [f"i{n}" for n in range(len(labels))],
        caption_ids=caption_ids or [f"c{n}" for n in range(len(labels))],
        **kwargs,
    )


def grouped_pairs(n=40, num_groups=3, dim=6, gap=0.0, seed=0):
    """Noisy groups that both modalities share, `gap` apart in the last dimension; labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_groups, n)
    centres = 2 * random.normal(size=(num_groups, dim))
    image, text = centres[labels] + random.normal(size=(2, n, dim))
    image[:, -1] += gap / 2
    text[:, -1] -= gap / 2
    return image.astype(np.float32), text.astype(np.float32), [f"group {label}" for label in labels]


def repeated_ids(n=40, seed=1):
    random = np.random.default_rng(seed)
    return [f"i{k}" for k in random.integers(0, 60, n)], [f"c{k}" for k in random.integers(0, 50, n)]


def same_content(image, text, image_ids, caption_ids):
    """Rows of one id get one embedding."""
    first_image = {identifier: row for row, identifier in reversed(list(enumerate(image_ids)))}
    first_text = {identifier: row for row, identifier in reversed(list(enumerate(caption_ids)))}
    return image[[first_image[i] for i in image_ids]], text[[first_text[c] for c in caption_ids]]


def families_of(image_ids, caption_ids) -> list[int]:
    """Family of each row, by merging until nothing changes."""
    family = list(range(len(image_ids)))
    changed = True
    while changed:
        changed = False
        for i in range(len(family)):
            for j in range(len(family)):
                linked = image_ids[i] == image_ids[j] or caption_ids[i] == caption_ids[j]
                if linked and family[i] > family[j]:
                    family[i], changed = family[j], True
    return family


def items_of(vectors, ids, labels, families):
    """Distinct (id, label): (vector, label, family)."""
    items = {}
    for vector, identifier, label, family in zip(unit_lists(vectors), ids, labels, families, strict=True):
        items.setdefault((identifier, label), (vector, label, family))
    return list(items.values())


def naive_knn(fitted, tested, k) -> list[str]:
    """The label that each tested item gets."""
    winners = []
    for query, _, family in tested:
        others = [(dot(query, vector), other) for vector, other, its_family in fitted if its_family != family]
        kth = sorted((cosine for cosine, _ in others), reverse=True)[:k][-1]
        votes, cosines = Counter(), Counter()
        for cosine, other in others:
            if cosine >= kth - 1e-9:
                votes[other] += 1
                cosines[other] += cosine
        winners.append(min(votes, key=lambda name: (-votes[name], -round(cosines[name], 9), name)))
    return winners


def naive_probe(fitted, tested) -> list[str]:
    """The label that each tested item gets; leave one family out."""
    predicted = {}
    for family in sorted({item[2] for item in tested}):
        x = np.array([vector for vector, _, its_family in fitted if its_family != family])
        y = [label for _, label, its_family in fitted if its_family != family]
        rms = math.sqrt(sum(sum(v * v for v in row) for row in x - x.mean(axis=0)) / len(x))
        probe = LogisticRegression(C=32.0, max_iter=1000).fit(x / rms, y)
        for row, (vector, _, its_family) in enumerate(tested):
            if its_family == family:
                predicted[row] = probe.predict([np.array(vector) / rms])[0]
    return [predicted[row] for row in range(len(tested))]


def naive_majority(fitted, tested) -> list[str]:
    """The most frequent label of the other families' items, the first by name among equals."""
    predicted = []
    for _, _, family in tested:
        counts = Counter(label for _, label, its_family in fitted if its_family != family)
        predicted.append(min(counts, key=lambda label: (-counts[label], label)))
    return predicted


def accuracy(tested, predicted) -> float:
    return sum(label == guess for (_, label, _), guess in zip(tested, predicted, strict=True)) / len(tested)


def balanced_accuracy(tested, predicted) -> float:
    """Mean recall of the labels."""
    recalls = []
    for label in {item[1] for item in tested}:
        guesses = [guess for (_, other, _), guess in zip(tested, predicted, strict=True) if other == label]
        recalls.append(guesses.count(label) / len(guesses))
    return sum(recalls) / len(recalls)


def naive_v_measure(truth, clusters) -> float:
    """2 h c / (h + c) with homogeneity and completeness from entropies (Rosenberg and Hirschberg 2007)."""
    n = len(truth)

    def entropy(values):
        return -sum(count / n * math.log(count / n) for count in Counter(values).values())

    joint = entropy(list(zip(truth, clusters, strict=True)))
    h = 1 - (joint - entropy(clusters)) / entropy(truth)
    c = 1 - (joint - entropy(truth)) / entropy(clusters)
    return 2 * h * c / (h + c)


def naive_rand_index(truth, clusters) -> float:
    """(index - expected) / (maximum - expected) over pairs of points (Hubert and Arabie 1985)."""

    def pairs_in(values):
        return sum(math.comb(count, 2) for count in Counter(values).values())

    a, b = pairs_in(truth), pairs_in(clusters)
    expected = a * b / math.comb(len(truth), 2)
    return (pairs_in(list(zip(truth, clusters, strict=True))) - expected) / ((a + b) / 2 - expected)


@pytest.mark.parametrize("num_neighbors", [1, 2, 5])
def test_neighbours_and_probe_equal_the_loops(load, num_neighbors):
    image, text, labels = grouped_pairs(gap=1.5)
    image_ids, caption_ids = repeated_ids()
    image, text = same_content(image, text, image_ids, caption_ids)
    families = families_of(image_ids, caption_ids)
    assert 10 < len(set(families)) < 25 and max(Counter(families).values()) > 3  # chains of several pairs too
    images, texts = items_of(image, image_ids, labels, families), items_of(text, caption_ids, labels, families)
    kwargs = {"num_neighbors": num_neighbors, "num_folds": 1000, "block_size": 7}
    result = compute(load, image, text, labels, image_ids, caption_ids, **kwargs)
    for direction, fitted, tested in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        guesses = {"knn": naive_knn(fitted, tested, num_neighbors), "linear_probe": naive_probe(fitted, tested)}
        for name, predicted in guesses.items():
            assert result[f"{name}_accuracy_{direction}"] == pytest.approx(accuracy(tested, predicted))
            balanced = balanced_accuracy(tested, predicted)
            assert result[f"{name}_balanced_accuracy_{direction}"] == pytest.approx(balanced)
            assert abs(balanced - accuracy(tested, predicted)) > 1e-4  # the test tells something
        majority = accuracy(tested, naive_majority(fitted, tested))
        assert result[f"majority_accuracy_{direction}"] == pytest.approx(majority)
    assert all(0.2 < result[name] < 1 for name in (*KNN, *PROBE, *BALANCED))  # the test tells something
    assert all(0 < result[name] < 1 for name in MAJORITY)
    assert result["chance_balanced_accuracy"] == pytest.approx(1 / 3)


def test_a_probe_that_only_knows_the_majority_is_seen_as_such(load):
    """Eight of ten pairs are CT, and the embeddings know nothing: 80% are right, and half of each label on average."""
    constant = np.ones((10, 3), np.float32)
    result = compute(load, constant, constant, [*["CT"] * 4, "MR", *["CT"] * 4, "MR"])
    for name in (*KNN, *PROBE, *MAJORITY):
        assert result[name] == pytest.approx(0.8)
    for name in (*BALANCED, "chance_balanced_accuracy"):
        assert result[name] == pytest.approx(0.5)


def test_the_majority_is_that_of_the_other_folds(load):
    """Two folds, of captions p and q: each is told of the other's label alone, b or a."""
    image, text = random_pairs(5, 3)
    result = compute(load, image, text, [*"bbbaa"], caption_ids=[*"pppqq"], num_folds=2)
    assert [result[name] for name in MAJORITY] == [0, 0]


def test_of_equally_frequent_labels_the_first_is_the_majority(load):
    """Two folds, of captions p and of q and r.

    The captions q (a) and r (b) say a of p's three images, which are b; p says b of q's image and of r's two.
    """
    image, text = random_pairs(6, 3)
    result = compute(load, image, text, [*"bbbabb"], caption_ids=[*"pppqrr"], num_folds=2)
    assert result["majority_accuracy_text_to_image"] == pytest.approx(2 / 6)


def test_clusters_equal_the_entropies(load):
    image, text, labels = grouped_pairs(seed=3)
    stacked = np.array(unit_lists(image) + unit_lists(text))
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(stacked).tolist()
    result = compute(load, image, text, labels)
    assert result["v_measure"] == pytest.approx(naive_v_measure(labels + labels, clusters))
    nmi = normalized_mutual_info_score(labels + labels, clusters, average_method="arithmetic")
    assert result["nmi"] == pytest.approx(nmi) == pytest.approx(naive_v_measure(labels + labels, clusters))
    assert result["ari"] == pytest.approx(naive_rand_index(labels + labels, clusters))
    assert 0.1 < result["v_measure"] < 0.95


def test_a_gap_spoils_the_clusters_that_it_leaves_inside_each_modality(load):
    """Two groups, two clusters: with a gap the clusters are the modalities and say nothing of the groups."""
    image, text, labels = grouped_pairs(num_groups=2)
    closed, open_ = compute(load, image, text, labels), compute(load, *grouped_pairs(num_groups=2, gap=40))
    assert closed["v_measure"] > 0.5 and closed["linear_probe_accuracy_image_to_text"] > 0.9
    assert open_["v_measure"] == pytest.approx(0, abs=0.01)
    assert open_["ari"] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("repeats", [1, 3])
def test_own_partner_is_no_help(load, repeats):
    """Labels drawn at random, partners with equal embeddings: whoever may look at the partner is always right.

    With `repeats`, each caption belongs to several images whose embeddings are equal as well, under ids of their own.
    """
    random = np.random.default_rng(0)
    embeds = np.repeat(random.normal(size=(120, 200)).astype(np.float32), repeats, axis=0)
    labels = [f"group {k}" for k in np.repeat(random.integers(0, 2, 120), repeats)]
    captions = [f"c{k}" for k in np.repeat(np.arange(120), repeats)]
    result = compute(load, embeds, embeds, labels, caption_ids=captions, num_neighbors=1)
    for name in (*KNN, *PROBE):
        assert 0.3 < result[name] < 0.7, name


def test_images_with_several_captions_are_not_split(load):
    random = np.random.default_rng(0)
    embeds = np.repeat(random.normal(size=(120, 200)).astype(np.float32), 2, axis=0)
    labels = [f"group {k}" for k in np.repeat(random.integers(0, 2, 120), 2)]
    images = [f"i{k}" for k in np.repeat(np.arange(120), 2)]
    result = compute(load, embeds, embeds, labels, image_ids=images, num_neighbors=1)
    for name in (*KNN, *PROBE):
        assert 0.3 < result[name] < 0.7, name


def test_rows_without_a_label_are_left_out(load):
    image, text, labels = grouped_pairs(seed=5)
    for row in (3, 11, 20):
        labels[row] = "  " if row == 3 else ""
    kept = [row for row, label in enumerate(labels) if label.strip()]
    ids = [f"i{n}" for n in range(40)], [f"c{n}" for n in range(40)]
    result = compute(load, image, text, labels, *ids)
    assert result == compute(load, image[kept], text[kept], [labels[k] for k in kept],
                             *([column[k] for k in kept] for column in ids))  # fmt: skip


def test_a_row_without_a_label_still_links(load):
    """Each caption of group a finds the other pair's image, unless a pair without a label ties the two pairs."""
    image = [[1, 0, 0], [0, 1, 0], *([[0, 0, 1]] * 4), [1, 0, 0]]
    text = [[0, 1, 0], [1, 0, 0], *([[0, 0, 1]] * 4), [1, 0, 0]]
    captions = ["c0", "c1", "c2", "c3", "c4", "c5", "c1"]
    kwargs = {"caption_ids": captions, "num_neighbors": 1}
    apart = compute(load, image, text, [*"aabbbb", ""], ["i0", "i1", "i2", "i3", "i4", "i5", "i6"], **kwargs)
    tied = compute(load, image, text, [*"aabbbb", ""], ["i0", "i1", "i2", "i3", "i4", "i5", "i0"], **kwargs)
    assert apart["knn_accuracy_image_to_text"] == 1
    assert tied["knn_accuracy_image_to_text"] == pytest.approx(4 / 6)


def test_order_of_the_rows_does_not_matter_across_modalities(load):
    image, text, labels = grouped_pairs(seed=7)
    image_ids, caption_ids = repeated_ids()
    image, text = same_content(image, text, image_ids, caption_ids)
    result = compute(load, image, text, labels, image_ids, caption_ids)
    order = np.random.default_rng(0).permutation(40)
    columns = [[column[k] for k in order] for column in (labels, image_ids, caption_ids)]
    shuffled = compute(load, image[order], text[order], *columns)
    for name in (*KNN, *PROBE):
        assert shuffled[name] == pytest.approx(result[name])


def test_equal_votes_go_to_the_larger_cosines(load):
    """One neighbour of each label: the nearer decides."""
    image = [[1.0, 0.0], [1.0, 0.9], [0.0, 1.0]]
    text = [[-1.0, -1.0], [1.0, 0.1], [0.1, 1.0]]
    result = compute(load, image, text, ["a", "a", "b"], num_neighbors=2)
    # Captions: 0 (a) sees images 1 (a), 2 (b): cosines -0.999, -0.71, so b. 1 (a) sees 0 (a) and 2 (b): a.
    # 2 (b) sees 0 and 1, both a.
    assert result["knn_accuracy_image_to_text"] == pytest.approx(1 / 3)


def test_two_votes_beat_one_that_is_nearer(load):
    image = [[1.0, 0.0], [0.3, 1.0], [0.2, 1.0], [1.0, -0.5]]
    text = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    result = compute(load, image, text, ["a", "b", "b", "a"], num_neighbors=3)
    assert result["knn_accuracy_image_to_text"] == 0  # each sees one image of its own label and two of the other


def test_an_item_with_two_labels_counts_with_each(load):
    image, text, labels = grouped_pairs(n=12)
    ids = ["i0", "i0", *(f"i{n}" for n in range(2, 12))]
    image[1] = image[0]
    labels[:2] = ["group 0", "group 1"]
    result = compute(load, image, text, labels, ids, num_neighbors=1)
    assert (12 * result["knn_accuracy_text_to_image"]) % 1 == pytest.approx(0)  # 12 items, not 11
    labels[1] = "group 0"
    result = compute(load, image, text, labels, ids, num_neighbors=1)
    assert (11 * result["knn_accuracy_text_to_image"]) % 1 == pytest.approx(0)


@pytest.mark.parametrize("labels", [["", "", ""], ["CT", "", "CT"]])
def test_fewer_than_two_labels_is_nan_and_said(load, labels, caplog):
    image, text = random_pairs(3, 2)
    with caplog.at_level(logging.WARNING):
        result = compute(load, image, text, labels)
    assert len(result) == 14 and all(math.isnan(value) for value in result.values())
    assert "two different labels or more, got " + str(sorted({*labels} - {""})) in caplog.text


def test_one_pair_is_nan(load):
    result = compute(load, [[1.0, 0.0]], [[1.0, 0.0]], ["CT"])
    assert all(math.isnan(value) for value in result.values())


def test_a_single_family_leaves_the_clusters(load, caplog):
    image, text, labels = grouped_pairs(n=8)
    with caplog.at_level(logging.WARNING):
        result = compute(load, image, text, labels, caption_ids=["c"] * 8)
    assert not math.isnan(result["v_measure"])
    assert all(math.isnan(result[name]) for name in (*KNN, *PROBE, *MAJORITY, *BALANCED, "chance_balanced_accuracy"))
    assert "all pairs share images or captions" in caplog.text


def test_a_fold_with_one_label_to_fit_predicts_it(load):
    result = compute(load, [[1.0, 0.1], [0.1, 1.0]], [[1.0, 0.2], [0.2, 1.0]], ["a", "b"])
    assert {result[name] for name in (*KNN, *PROBE, *MAJORITY, *BALANCED)} == {
        0
    }  # each is told of the other label only


@pytest.mark.parametrize(("setting", "least"), [("num_neighbors", 1), ("num_folds", 2)])
def test_settings_that_leave_nothing(load, setting, least):
    image, text = random_pairs(12, 4)
    message = f"{setting} is {least - 1}, it has to be {least} or more"
    with pytest.raises(ValueError, match=message):
        compute(load, image, text, ["a", "b"] * 6, **{setting: least - 1})


def test_constant_embeddings(load):
    """A collapsed space: no warning of scikit-learn's, no information."""
    constant = np.ones((20, 4), np.float32)
    labels = ["a"] * 12 + ["b"] * 8
    result = compute(load, constant, constant, labels)
    assert result["v_measure"] == result["ari"] == 0
    assert all(result[name] <= 0.6 for name in PROBE)


def test_without_ids_every_row_is_a_family_of_its_own(load):
    image, text, labels = grouped_pairs(gap=1.5)
    ids = [f"{row:02}" for row in range(40)]  # sorted, as the folds go by the order of the ids
    metric = load("cross_modal_grouping")
    inputs = {"image_embeds": image, "text_embeds": text, "labels": labels}
    expected = compute(load, image, text, labels, ids, ids)
    assert metric.compute(**inputs) == expected
    for rows in (slice(0, 25), slice(25, 40)):
        metric.add_batch(**{name: column[rows] for name, column in inputs.items()})
    assert metric.compute() == expected


def test_zero_vector_is_named(load):
    with pytest.raises(ValueError, match="text_embeds: row 1 is a zero vector"):
        compute(load, [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], ["a", "b"])
