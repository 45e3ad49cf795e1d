"""Batches without shared images and captions: checked pair by pair, and through accelerate's own sharding."""

import logging
import time
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader

from gap_closed_clip.data import DistinctSampler, OneSourceSampler, group_ids, group_ids_of


def teaching_file(number: int, seed: int = 0) -> list[tuple[int, int]]:
    """A third of the pairs share captions with up to 12 others, some images have several captions."""
    random = np.random.default_rng(seed)
    groups = []
    while len(groups) < number:
        caption = len(groups)
        for image in range(random.choice([1, 1, 1, 1, 2, 3, 12])):
            groups.append((7 * number + len(groups), caption))
            if image == 0 and random.random() < 0.1:
                groups.append((groups[-1][0], 3 * number + len(groups)))
    return groups[:number]


def distinct_batches(
    groups: list[tuple[int, int]], batch_size: int, seed: int = 0, drop_last: bool = False, num_processes: int = 1
) -> BatchSampler:
    """As a DataLoader cuts them, pairs kept apart across the consecutive batches that go to `num_processes`."""
    return BatchSampler(DistinctSampler(groups, batch_size * num_processes, seed), batch_size, drop_last)


def shared(groups: list[tuple[int, int]], batch: list[int]) -> int:
    """Pairs in a batch whose image or caption is there already."""
    return sum(len(batch) - len({groups[index][side] for index in batch}) for side in (0, 1))


def test_distinct_within_batches_and_every_pair_once():
    groups = teaching_file(1000)
    sampler = distinct_batches(groups, batch_size=64, seed=1)
    for epoch in range(5):
        sampler.sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 16
        assert [len(batch) for batch in batches] == [64] * 15 + [40]
        assert sorted(index for batch in batches for index in batch) == list(range(1000))
        assert sum(shared(groups, batch) for batch in batches) == 0
    random_order = np.random.default_rng(0).permutation(1000).reshape(-1, 50).tolist()
    assert sum(shared(groups, batch) for batch in random_order) > 50  # the test would notice


def test_no_unique_pairs_at_all():
    """As in COCO: five captions an image, and every caption at two images."""
    groups = [(index // 5, 10_000 + index % 500) for index in range(1000)]
    sampler = distinct_batches(groups, batch_size=100)
    for epoch in range(10):
        sampler.sampler.set_epoch(epoch)
        assert sum(shared(groups, batch) for batch in sampler) == 0


def test_as_many_copies_as_batches():
    groups = [(index, 0 if index < 10 else index) for index in range(100)]  # 10 batches, 10 times one caption
    for epoch in range(5):
        sampler = distinct_batches(groups, batch_size=10, seed=epoch)
        assert sum(shared(groups, batch) for batch in sampler) == 0


def test_drop_last_leaves_out_what_fills_no_batch():
    """A batch of the sampler may be several of the loader, of which the last would be full."""
    groups = teaching_file(50)
    whole, cut = DistinctSampler(groups, 16, seed=3), DistinctSampler(groups, 16, seed=3, drop_last=True)
    assert len(cut) == 48 and list(cut) == list(whole)[:48]
    assert len(whole) == 50


def test_what_cannot_be_kept_apart_is_not_dropped(caplog):
    groups = [(index, 0 if index < 60 else index) for index in range(100)]
    with caplog.at_level(logging.WARNING):
        sampler = distinct_batches(groups, batch_size=20)
    assert "50" not in caplog.text and "55 of 100 pairs" in caplog.text and "the 5 batches" in caplog.text
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert [len(batch) for batch in batches] == [20] * 5


@pytest.mark.parametrize("groups", [[(0, index) for index in range(30)], [(0, 0)] * 30])
def test_one_image_for_all(groups):
    batches = list(distinct_batches(groups, batch_size=8))
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    assert sorted(index for batch in batches for index in batch) == list(range(30))


@pytest.mark.parametrize("number, batch_size", [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (50, 1)])
def test_small_numbers(number, batch_size):
    for drop_last in (False, True):
        sampler = distinct_batches(teaching_file(number), batch_size, drop_last=drop_last)
        batches = list(sampler)
        assert len(batches) == len(sampler) == (number // batch_size if drop_last else -(-number // batch_size))
        assert sum(map(len, batches)) == (len(batches) * batch_size if drop_last else number)


def test_order_depends_on_seed_and_epoch_alone():
    groups = teaching_file(300)

    def order(seed: int, epoch: int) -> list[list[int]]:
        np.random.seed(epoch)  # other generators do not matter
        torch.manual_seed(seed)
        sampler = distinct_batches(groups, 32, seed=seed)
        sampler.sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


def test_pairs_mix_over_epochs():
    """Pairs with shared captions meet other pairs in each epoch, and drop_last does not always leave out the same."""
    groups = teaching_file(200)
    sampler = distinct_batches(groups, 32, drop_last=True)
    left_out, companions = Counter(), set()
    for epoch in range(200):
        sampler.sampler.set_epoch(epoch)
        batches = list(sampler)
        left_out.update(set(range(200)) - {index for batch in batches for index in batch})
        companions.update(*(batch for batch in batches if 0 in batch))
    # 8 of 200 pairs are left out an epoch: 8 times each in 200 epochs
    assert len(left_out) == 200 and max(left_out.values()) < 25
    partners = {index for index in range(200) if index and not set(groups[0]) & set(groups[index])}
    assert companions == partners | {0}


def test_across_the_processes_of_one_step():
    groups = teaching_file(1000)
    sampler = distinct_batches(groups, batch_size=32, num_processes=2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 32
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert shared(groups, first + second) == 0


def loaders(groups, num_processes: int, **options) -> list:
    """The data loaders of each process, as accelerate prepares them."""
    result = []
    for index in range(num_processes):
        sampler = distinct_batches(groups, 16, num_processes=num_processes)
        loader = DataLoader(torch.arange(len(groups)), batch_sampler=sampler)
        result.append(
            prepare_data_loader(
                loader, num_processes=num_processes, process_index=index, put_on_device=False, **options
            )
        )
    return result


@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerate_shards_it_and_passes_the_epoch_on(num_processes):
    groups = teaching_file(512)
    epochs = []
    for _ in range(2):
        shards = loaders(groups, num_processes)
        for epoch in range(3):
            for loader in shards:
                loader.set_epoch(epoch)
            epochs.append([[batch.tolist() for batch in loader] for loader in shards])
            steps = list(zip(*epochs[-1], strict=True))
            assert len(steps) == len(shards[0]) == 512 // 16 // num_processes
            assert sorted(index for step in steps for batch in step for index in batch) == list(range(512))
            assert sum(shared(groups, sum(step, [])) for step in steps) == 0
    assert epochs[:3] == epochs[3:]
    assert epochs[0] != epochs[1] != epochs[2]


def test_accelerate_splits_batches():
    groups = teaching_file(512)
    sampler = distinct_batches(groups, 32)
    loader = DataLoader(torch.arange(512), batch_sampler=sampler)
    shards = [
        prepare_data_loader(loader, num_processes=2, process_index=index, split_batches=True, put_on_device=False)
        for index in range(2)
    ]
    for first, second in zip(*shards, strict=True):
        assert len(first) == len(second) == 16
        assert shared(groups, first.tolist() + second.tolist()) == 0


def test_the_sampler_alone_gives_the_same_batches():
    groups = teaching_file(300)
    loader = DataLoader(torch.arange(300), batch_size=32, sampler=DistinctSampler(groups, 32, seed=5))
    assert [batch.tolist() for batch in loader] == list(distinct_batches(groups, 32, seed=5))


def test_groups_of_a_dataset_are_the_collators():
    captions, ids = ["Chest CT", "chest  ct", "other"], ["a", "b", "a"]
    pairs = Dataset.from_dict({"caption": captions, "image_id": ids})
    assert group_ids_of(pairs) == [group_ids(i, c) for i, c in zip(ids, captions, strict=True)]


def test_a_hundred_thousand_pairs_in_seconds():
    groups = teaching_file(100_000)
    start = time.perf_counter()
    sampler = distinct_batches(groups, batch_size=256)
    batches = list(sampler)
    assert time.perf_counter() - start < 10
    assert sum(shared(groups, batch) for batch in batches) == 0


def test_nothing_to_sample():
    with pytest.raises(ValueError, match="0 pairs in batches of 4"):
        distinct_batches([], 4)
    with pytest.raises(ValueError, match="batches of 0"):
        distinct_batches([(0, 0)], 0)


# Batches of one source


def three_sources(number: int = 1500) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of three sources in random order; sources share captions."""
    names = np.random.default_rng(0).choice(["a", "b", "c"], number, p=[0.5, 0.3, 0.2]).tolist()
    return teaching_file(number), names


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_batch_is_of_one_source(drop_last):
    groups, sources = three_sources()
    sampler = OneSourceSampler(groups, sources, 16, seed=1, drop_last=drop_last)
    sizes = Counter(sources)
    orders, orders_of_sources, contents = [], [], set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = [order[start : start + 16] for start in range(0, len(order), 16)]
        assert len(order) == len(sampler) and {len(batch) for batch in batches} == {16}
        assert all(len({sources[row] for row in batch}) == 1 for batch in batches)
        assert all(shared(groups, batch) == 0 for batch in batches)
        assert all(len(set(batch)) == 16 for batch in batches)
        rounded = {name: size // 16 if drop_last else -(-size // 16) for name, size in sizes.items()}
        assert Counter(sources[batch[0]] for batch in batches) == rounded
        assert drop_last or set(order) == set(range(1500))
        orders.append(order)
        contents.add(frozenset(map(frozenset, batches)))
        orders_of_sources.append([sources[batch[0]] for batch in batches])
    assert len(contents) == 4 and len({tuple(order) for order in orders_of_sources}) == 4
    again = OneSourceSampler(groups, sources, 16, seed=1, drop_last=drop_last)
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert list(OneSourceSampler(groups, sources, 16, seed=2, drop_last=drop_last)) != orders[0]


def test_a_source_smaller_than_a_batch_is_named():
    with pytest.raises(ValueError, match="source 'b' has 3 training pairs, fewer than one batch of 4"):
        OneSourceSampler([(i, i) for i in range(9)], ["a"] * 6 + ["b"] * 3, 4)
