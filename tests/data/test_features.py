"""Features on disk: what is kept, what a killed run leaves, and the rows that training gets."""

import errno
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from gap_closed_clip.data import features as features_module
from gap_closed_clip.data.features import FeaturePairs, FeatureStore, StoredFeatures, digest
from gap_closed_clip.data.hashing import group_ids
from gap_closed_clip.data.phantoms import make_phantoms


VIEWS, WIDTH = 3, 5
ITEMS = [digest(bytes([number])) for number in range(8)]


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(len(ITEMS), VIEWS, WIDTH)).astype(np.float16)


@pytest.fixture
def store(tmp_path, values):
    store = FeatureStore(tmp_path, {"tower": "one"}, VIEWS, WIDTH)
    with store.writing(ITEMS):
        store.append(ITEMS[:3], values[:3])
        store.append(ITEMS[3:6], values[3:6])
    return store


def reopened(tmp_path, description="one", views=VIEWS):
    return FeatureStore(tmp_path, {"tower": description}, views, WIDTH)


def everything(store, items):
    rows = store.rows(items)
    return np.stack([store.read(rows, np.full(len(rows), view)) for view in range(store.views)], axis=1)


def test_what_was_appended_is_read_in_any_order_by_the_next_run(store, tmp_path, values):
    again = reopened(tmp_path)
    order = [4, 0, 5, 0, 2]
    np.testing.assert_array_equal(everything(again, [ITEMS[index] for index in order]), values[order])
    assert len(again) == 6 and again.missing([*ITEMS, ITEMS[7]]) == [6, 7]


def test_another_tower_or_number_of_views_meets_none_of_it(store, tmp_path):
    assert len(reopened(tmp_path, description="another")) == 0
    assert len(reopened(tmp_path, views=2)) == 0


@pytest.mark.parametrize("torn", ["features", "digest", "digest before its features"])
def test_a_killed_run_loses_only_what_it_was_writing(store, tmp_path, values, torn):
    path, digests = store.folder / "features.bin", store.folder / "digests.bin"
    if torn == "features":
        path.write_bytes(path.read_bytes() + b"half an item")
    elif torn == "digest":
        path.write_bytes(path.read_bytes() + values[6].tobytes())
        digests.write_bytes(digests.read_bytes() + ITEMS[6][:7])
    else:  # a file system that lost the tail of one file
        path.write_bytes(path.read_bytes()[:-4])
    again = reopened(tmp_path)
    kept = 5 if torn.startswith("digest before") else 6
    assert len(again) == kept
    with again.writing(ITEMS):
        again.append(ITEMS[kept:], values[kept:])
    np.testing.assert_array_equal(everything(reopened(tmp_path), ITEMS), values)


def test_digests_whose_features_were_lost_do_not_come_back(store, tmp_path, values):
    path = store.folder / "features.bin"
    path.write_bytes(path.read_bytes()[: 4 * values[0].nbytes])  # two of six items are lost
    again = reopened(tmp_path)
    with again.writing(ITEMS):
        again.append(ITEMS[6:7], values[6:7])
    path.write_bytes(path.read_bytes() + values[7].tobytes())  # the next was killed before it wrote its digest
    assert reopened(tmp_path).missing(ITEMS) == [4, 5, 7]


def test_a_full_disk_keeps_what_was_there(store, tmp_path, values, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"), store.writing(ITEMS):
        patch.setattr(features_module.os, "fsync", fail)
        store.append(ITEMS[6:], values[6:])
    again = reopened(tmp_path)
    np.testing.assert_array_equal(everything(again, ITEMS[:6]), values[:6])
    with again.writing(ITEMS):
        again.append(ITEMS[6:], values[6:])
    np.testing.assert_array_equal(everything(reopened(tmp_path), ITEMS), values)


def test_a_second_writer_finds_what_the_first_has_written(store, tmp_path, values):
    other = reopened(tmp_path)
    with store.writing(ITEMS):
        store.append(ITEMS[6:], values[6:])
    assert other.missing(ITEMS) == [6, 7]
    with other.writing(ITEMS) as missing:
        assert missing == []


def test_equal_digests_in_a_damaged_file_do_not_move_rows(store, tmp_path, values):
    path = store.folder / "digests.bin"
    path.write_bytes(ITEMS[0] + 4 * bytes(16) + ITEMS[5])
    again = reopened(tmp_path)
    with again.writing(ITEMS) as missing:
        again.append([ITEMS[index] for index in missing], values[missing])
    np.testing.assert_array_equal(everything(reopened(tmp_path), ITEMS), values)


def test_damaged_features_are_named_while_reading(store):
    path = store.folder / "features.bin"
    path.write_bytes(b"\xff" * len(path.read_bytes()))
    with pytest.raises(OSError, match="features.bin is damaged. Delete the folder"):
        store.read(np.array([0]), np.array([0]))


def test_a_complete_store_need_not_be_writable(store, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(features_module, "FileLock", refuse)
    with store.writing(ITEMS[:6]) as missing:
        assert missing == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_what_float16_cannot_hold_is_refused(store, value):
    with store.writing(ITEMS), pytest.raises(ValueError, match="data.feature_views=0"):
        store.append(ITEMS[6:7], np.full((1, VIEWS, WIDTH), value, dtype=np.float32))
    assert len(store) == 6


def test_a_folder_that_is_a_file_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="data.feature_cache"):
        FeatureStore(tmp_path / "file", {}, VIEWS, WIDTH)


def test_workers_read_the_same_rows(store, values):
    copy = pickle.loads(pickle.dumps(store))
    rows = store.rows(ITEMS[:6])
    np.testing.assert_array_equal(copy.read(rows, np.zeros(6, dtype=int)), values[:6, 0])


def test_a_truncated_file_is_named_while_reading(store):
    (store.folder / "features.bin").write_bytes(b"")
    with pytest.raises(OSError, match="features.bin has been truncated"):
        store.read(np.array([0]), np.array([0]))


@pytest.fixture
def pairs():
    return make_phantoms(8, seed=1, image_size=32)


@pytest.fixture
def stored(store, values):
    with store.writing(ITEMS):
        store.append(ITEMS[6:], values[6:])
    return StoredFeatures(store, store.rows(ITEMS))


def test_rows_hold_the_plain_view_and_the_group_ids(pairs, stored, values):
    rows = FeaturePairs(pairs, stored, stored).__getitems__([5, 2])
    for row, index in zip(rows, (5, 2), strict=True):
        assert row.keys() == {"pooled_image", "pooled_text", "group_ids"}
        np.testing.assert_array_equal(row["pooled_image"], values[index, 0])
        assert tuple(row["group_ids"]) == group_ids(pairs["image_id"][index], pairs["caption"][index])


def test_one_frozen_tower_leaves_what_the_other_needs(pairs, stored):
    assert {"image", "caption", "pooled_text"} <= FeaturePairs(pairs, None, stored)[0].keys()
    row = FeaturePairs(pairs, stored, None)[0]
    assert row["caption"] == pairs[0]["caption"] and "image" not in row


def test_all_views_are_drawn_and_a_batch_always_draws_the_same(pairs, stored, values):
    varied = FeaturePairs(pairs, stored, stored, varied=True)
    drawn = set()
    for epoch in range(40):
        batch = np.random.default_rng(epoch).permutation(8).tolist()
        rows = varied.__getitems__(batch)
        for index, row in zip(batch, rows, strict=True):
            (view,) = [v for v in range(VIEWS) if np.array_equal(row["pooled_image"], values[index, v])]
            drawn.add((index, view))
        again = varied.__getitems__(batch)
        assert all(np.array_equal(a["pooled_image"], b["pooled_image"]) for a, b in zip(rows, again, strict=True))
    assert len(drawn) == 8 * VIEWS
    np.testing.assert_array_equal(varied.plain()[3]["pooled_image"], values[3, 0])


def test_selected_pairs_keep_their_features(pairs, stored, values):
    some = FeaturePairs(pairs, stored, stored).select([6, 1])
    assert len(some) == 2 and some["caption"][:] == [pairs[6]["caption"], pairs[1]["caption"]]
    np.testing.assert_array_equal(some[0]["pooled_image"], values[6, 0])
    assert tuple(some[1]["group_ids"]) == group_ids(pairs[1]["image_id"], pairs[1]["caption"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_every_pair_once(pairs, stored, values, num_workers):
    loader = DataLoader(FeaturePairs(pairs, stored, stored), batch_size=3, num_workers=num_workers, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    np.testing.assert_array_equal(np.stack([row["pooled_image"] for row in rows]), values[:, 0])
