"""Which pairs come together in a batch: distinct ones, of one source, whole batches and batches in parts."""

import logging

import pytest
import torch
from trainers import BATCH, losses, make_trainer

from gap_closed_clip.data import PairCollator


class Spy:
    """A collator that remembers which rows it was given."""

    def __init__(self, collator: PairCollator):
        self.collator = collator
        self.batches = []

    def __call__(self, rows):
        self.batches.append([(row["image_id"], row["caption"]) for row in rows])
        return self.collator(rows)


def batches_of(folder, **arguments) -> list[list[list[tuple[str, str]]]]:
    """Batches of each of three epochs."""
    training = make_trainer("ours", folder, save_strategy="no", max_steps=9, dataloader_num_workers=0, **arguments)
    spy = training.data_collator = Spy(training.data_collator)
    training.train()
    assert len(spy.batches) == 9
    return [spy.batches[start : start + 3] for start in (0, 3, 6)]


def is_distinct(batch: list[tuple[str, str]]) -> bool:
    return all(len(set(values)) == len(batch) for values in zip(*batch, strict=True))


def test_batches_hold_no_image_and_no_caption_twice(tmp_path):
    epochs = batches_of(tmp_path)
    assert all(len(batch) == BATCH and is_distinct(batch) for epoch in epochs for batch in epoch)
    for epoch in epochs:
        assert len({row for batch in epoch for row in batch}) == 24  # every pair at most once an epoch
    assert len({str(epoch) for epoch in epochs}) == 3  # in another order each time
    assert batches_of(tmp_path) == epochs
    assert batches_of(tmp_path, data_seed=0) != epochs  # 0 is a seed, too
    assert batches_of(tmp_path, data_seed=42) == epochs  # as `seed` is by default


def test_distinct_batches_can_be_switched_off(tmp_path):
    epochs = batches_of(tmp_path, distinct_batches=False)
    assert not all(is_distinct(batch) for epoch in epochs for batch in epoch)


@pytest.mark.parametrize(("size", "distinct"), [(BATCH, True), (BATCH, False), (4, True)])
def test_batches_of_one_source(tmp_path, size, distinct):
    """Encoded at once or in parts; sources take turns by chance. Without `mix_sources=false` they are mixed."""
    arguments = {"mix_sources": False, "per_device_train_batch_size": size, "distinct_batches": distinct}
    if size < BATCH:
        arguments["contrastive_batch_size"] = BATCH
    training = make_trainer("ours", tmp_path, save_strategy="no", max_steps=6, dataloader_num_workers=0, **arguments)
    # No image and no caption is in "a" twice, and none more than twice in "b", which has two batches.
    sources = ["a" if row in (0, 3, 4, 5, 6, 8, 12, 19, 20) else "b" for row in range(26)]
    training.train_dataset = training.train_dataset.add_column("source", sources)
    pairs = zip(training.train_dataset["image_id"], training.train_dataset["caption"], strict=True)
    source_of = dict(zip(pairs, sources, strict=True))
    spy = training.data_collator = Spy(training.data_collator)
    training.train()
    rows = [row for batch in spy.batches for row in batch]
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    assert training.state.global_step == len(batches) == 6  # 9 + 17 pairs make 1 + 2 batches an epoch
    names = [{source_of[row] for row in batch} for batch in batches]
    assert [sorted(map(sorted, names[start : start + 3])) for start in (0, 3)] == [[["a"], ["b"], ["b"]]] * 2
    assert not distinct or all(is_distinct(batch) for batch in batches)
    training.train_dataset, whole = training.train_dataset.remove_columns("source"), training.train_dataset
    assert len(training.get_train_dataloader()) == 3 * BATCH // size  # one plain source: nothing to keep apart
    training.train_dataset, training.args.mix_sources = whole, True
    mixed = [{sources[row] for row in batch} for batch in training.get_train_dataloader().batch_sampler]
    assert {"a", "b"} in mixed


# --- micro-batches (that they make the steps of one batch: test_distributed.py)


def test_a_contrastive_batch_in_parts_is_one_step_of_distinct_pairs(tmp_path):
    """And the pairs that fill no batch are left out, although they would fill a part."""
    arguments = {"per_device_train_batch_size": 2, "contrastive_batch_size": BATCH, "dataloader_num_workers": 0}
    training = make_trainer("ours", tmp_path, save_strategy="no", max_steps=6, **arguments)
    spy = training.data_collator = Spy(training.data_collator)
    training.train()
    assert training.state.global_step == 6 and training.state.epoch == 2 and len(losses(training)) == 6
    assert [len(part) for part in spy.batches] == [2] * 24
    for step in range(6):
        assert is_distinct([row for part in spy.batches[4 * step : 4 * step + 4] for row in part])


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_parts_in_another_order_drop_the_last_batch_too(tmp_path, order):
    arguments = {"per_device_train_batch_size": 2, "contrastive_batch_size": 12, "distinct_batches": False}
    arguments["train_sampling_strategy"] = order
    training = make_trainer("ours", tmp_path, save_strategy="no", max_steps=4, num_train_epochs=1, **arguments)
    assert len(training.get_train_dataloader()) == 12  # of 26 pairs 24
    training.args.dataloader_drop_last = False
    assert len(training.get_train_dataloader()) == 13


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        ({"contrastive_batch_size": 8}, {"contrastive_batch_size": 16}, 8),
        ({"contrastive_batch_size": 16}, {"contrastive_batch_size": 8}, 8),
        ({"contrastive_batch_size": 16}, {"per_device_train_batch_size": 4}, 4),
        ({"contrastive_batch_size": 16}, {"per_device_train_batch_size": 16}, 16),
        ({}, {"contrastive_batch_size": 16}, 8),
        ({"contrastive_batch_size": 16}, {"contrastive_batch_size": None}, 8),
    ],
)
def test_the_next_training_has_the_sizes_that_it_is_given(before, after, part, tmp_path):
    """As where hyperparameters are searched for, which sets them between the trainings of one Trainer."""
    training = make_trainer("ours", tmp_path, save_strategy="no", max_steps=2, dataloader_num_workers=0, **before)
    training.train()
    for name, value in after.items():
        setattr(training.args, name, value)
    training._train_batch_size = part  # as the search sets it
    spy = training.data_collator = Spy(training.data_collator)
    compared, compute_loss = [], training.compute_loss

    def look(model, inputs, *args, **kwargs):
        loss, outputs = compute_loss(model, inputs, return_outputs=True, **kwargs)
        compared.append(len(outputs.image_embeds))
        return loss

    training.compute_loss = look
    training.train()
    whole = {**before, **after}["contrastive_batch_size"] or part
    assert compared == [whole, whole] and training.state.global_step == 2
    assert {len(rows) for rows in spy.batches} == {part} and len(spy.batches) >= 2 * whole // part


@pytest.mark.parametrize("compared", [None, 16])
def test_arguments_that_are_set_between_two_trainings_are_heard(compared, tmp_path):
    """By hand, without a search, which tells the Trainer of batch sizes in a way of its own."""
    arguments = {"contrastive_batch_size": compared, "save_strategy": "no", "dataloader_num_workers": 0}
    training = make_trainer("ours", tmp_path, max_steps=1, **arguments)
    training.train()
    training.args.per_device_train_batch_size = 4
    spy = training.data_collator = Spy(training.data_collator)
    training.train()
    whole = compared or 4
    pairs = training.train_dataset.select(list(training._get_train_sampler())[:whole])
    expected = list(zip(pairs["image_id"], pairs["caption"], strict=True))
    assert {len(rows) for rows in spy.batches} == {4}
    assert [pair for part in spy.batches[: whole // 4] for pair in part] == expected


def test_pairs_of_similar_length_are_compared_in_whole_batches(tmp_path):
    """Of 26 pairs 24 in each epoch, and others in another one; the last step compared two pairs."""
    arguments = {"per_device_train_batch_size": 2, "contrastive_batch_size": 12, "distinct_batches": False}
    arguments |= {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2}
    training = make_trainer("ours", tmp_path, save_strategy="no", max_steps=-1, dataloader_num_workers=0, **arguments)
    pairs = training.train_dataset
    training.train_dataset = pairs.add_column("length", [len(caption) for caption in pairs["caption"]])
    spy = training.data_collator = Spy(training.data_collator)
    training.train()
    assert training.state.global_step == 4 and [len(part) for part in spy.batches] == [2] * 24
    epochs = [[pair for part in spy.batches[start : start + 12] for pair in part] for start in (0, 12)]
    assert all(len(set(epoch)) == 24 for epoch in epochs) and epochs[0] != epochs[1]


def test_parts_wait_on_the_cpu_for_their_turn(tmp_path):
    """accelerate's loader would move all of them to the GPU first."""
    loaders = [make_trainer(kind, tmp_path).get_train_dataloader() for kind in ("ours", "micro-batches")]
    assert [loader.device for loader in loaders] == [torch.device("cpu"), None]


def test_accumulated_gradients_are_said_to_add_no_negatives(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer("ours", tmp_path, gradient_accumulation_steps=4)
    (message,) = [record.message for record in caplog.records if "accumulation" in record.message]
    assert "compared with the 7 others" in message and "set contrastive_batch_size=32 instead" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer("micro-batches", tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrastive_batch_size": 20}, r"20: it has to be a multiple of the 8 .*on one device\), e.g. 16"),
        ({"contrastive_batch_size": 4}, "has to be a multiple of the 8 .*e.g. 8"),
        (
            {"contrastive_batch_size": 16, "gradient_accumulation_steps": 3},
            "accumulation_steps is 3: leave the latter",
        ),
    ],
)
def test_contrastive_batches_that_cannot_be_made(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer("ours", tmp_path, **arguments)
