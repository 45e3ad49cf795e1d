"""A killed run that goes on is the unbroken one, also in a later pass of a stream and with workers that live on."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from trainers import losses, make_trainer


def run(folder, streamed: bool, checkpoint=None, kind="ours", max_steps=8, seen=None, **arguments):
    """Eight steps, of which three (of a stream with two workers, two) make a pass; `seen` gets the batches."""
    trainer = make_trainer(kind, folder, save_steps=1, max_steps=max_steps, **arguments)
    if seen is not None:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: seen.append([row["image_id"] for row in rows]) or collate(rows)
    if streamed:
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=5)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


@pytest.mark.parametrize(
    ("streamed", "arguments"),
    [
        (True, {"dataloader_num_workers": 0}),
        (True, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        (False, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
    ],
)
def test_a_killed_run_goes_on_in_any_pass(tmp_path, streamed, arguments):
    unbroken = run(tmp_path, streamed, **arguments)
    expected = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    for step in (3, 5, 7):
        resumed = run(tmp_path, streamed, tmp_path / f"checkpoint-{step}", **arguments)
        assert losses(resumed) == losses(unbroken), step
        found = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_stream_in_micro_batches_goes_on_in_any_pass(tmp_path):
    unbroken = run(tmp_path, True, kind="micro-batches", dataloader_num_workers=0)
    resumed = run(tmp_path, True, tmp_path / "checkpoint-5", kind="micro-batches", dataloader_num_workers=0)
    assert losses(resumed) == losses(unbroken)


def test_a_longer_training_goes_on_where_the_stream_was(tmp_path):
    """`max_steps` may change: the place in the stream is that of the checkpoint."""
    before: list[list[str]] = []
    after: list[list[str]] = []
    whole: list[list[str]] = []
    arguments = {"dataloader_num_workers": 0}
    run(tmp_path, True, max_steps=5, seen=before, **arguments)
    run(tmp_path, True, tmp_path / "checkpoint-5", max_steps=12, seen=after, **arguments)
    run(tmp_path / "whole", True, max_steps=12, seen=whole, **arguments)
    assert before[:5] + after[-7:] == whole[:12]


@pytest.mark.parametrize(
    ("batches", "drop_last", "sizes"),
    [
        (2, True, [(8, 8)] * 3),
        (3, False, [(8, 8, 8)] * 3),
        (2, False, [(8, 8), (8, 2)] * 2),
    ],
)
def test_a_pass_ends_with_a_whole_step(tmp_path, batches, drop_last, sizes):
    """With accumulated gradients: those of a batch left over would be added to the first step of the next pass."""
    trainer = make_trainer(
        "ours",
        tmp_path,
        save_strategy="no",
        max_steps=len(sizes),
        gradient_accumulation_steps=batches,
        dataloader_num_workers=0,
        dataloader_drop_last=drop_last,
    )
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()  # of 26 pairs
    found: list[list[int]] = []
    step = trainer.training_step

    def spy(model, inputs, *args):
        if all(parameter.grad is None for parameter in model.parameters()):
            found.append([])
        found[-1].append(len(inputs["input_ids"]))
        return step(model, inputs, *args)

    trainer.training_step = spy
    trainer.train()
    assert found == [list(each) for each in sizes]


@pytest.mark.parametrize(("batches", "drop_last"), [(4, True), (5, False)])
def test_a_stream_without_a_whole_step_is_refused(tmp_path, batches, drop_last):
    trainer = make_trainer(
        "ours",
        tmp_path,
        gradient_accumulation_steps=batches,
        dataloader_num_workers=0,
        dataloader_drop_last=drop_last,
    )
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()  # of 26 pairs
    count, step = itertools.count(), trainer.training_step
    # (Its passes would never end.)
    trainer.training_step = lambda *args: pytest.fail("it trains") if next(count) > 8 else step(*args)
    with pytest.raises(ValueError, match=f"no whole step of {8 * batches}: lower .*, gradient_accumulation_steps, or"):
        trainer.train()
