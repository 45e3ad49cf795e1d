"""Training: a plain Trainer, killed and resumed runs, what the log tells, the warnings."""

import json
import logging
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from processes import PythonProcess
from trainers import BATCH, STEPS, losses, make_pairs, make_processor, make_trainer
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

from gap_closed_clip.data import PairCollator
from gap_closed_clip.model.modeling_gap_closed_clip import GapClosedClipModel, GapClosedClipOutput
from gap_closed_clip.training import (
    GapClosedCaptionTrainer,
    GapClosedClipTrainer,
    TrainingProgressCallback,
    trainer,
)
from gap_closed_clip.training.resume import EarlyStopping


KILLED_AT = 8
KINDS = ("vanilla", "ours", "micro-batches")


class Killer(TrainerCallback):
    """SIGKILL before the step after KILLED_AT: no handler runs, nothing is flushed."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


# --- a plain Trainer


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """A plain Trainer after three steps, and what its evaluation gives."""
    trainer = make_trainer(
        "vanilla", tmp_path_factory.mktemp("vanilla"), max_steps=3, eval_dataset=make_pairs(20, augment=False)
    )
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.fixture(scope="module")
def by_hand(vanilla):
    """Loss and embeddings of the evaluation pairs, in batches as the Trainer makes them."""
    trainer = vanilla[0]
    model, rows, collate = trainer.model.eval(), list(trainer.eval_dataset), PairCollator(make_processor())
    total, parts = 0.0, []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = collate(rows[start : start + BATCH])
            output = model(**batch)
            total += output.loss.item() * len(output.image_embeds)
            parts.append((output.image_embeds, output.text_embeds))
    return total / len(rows), *(torch.cat(embeds).double().numpy() for embeds in zip(*parts, strict=True))


def test_vanilla_trainer_gives_the_mean_loss_of_the_pairs(vanilla, by_hand):
    assert vanilla[1]["eval_loss"] == pytest.approx(by_hand[0], rel=1e-6)
    assert len(losses(vanilla[0])) == 3


def test_vanilla_trainer_gives_the_metrics(vanilla, by_hand):
    metrics, (_, image, text) = vanilla[1], by_hand
    gap = np.linalg.norm(image.mean(0) - text.mean(0))
    assert metrics["eval_modality_gap"] == pytest.approx(gap, abs=1e-5)
    assert metrics["eval_true_pair_cosine"] == pytest.approx((image * text).sum(1).mean(), abs=1e-5)
    assert metrics["eval_num_pairs"] == 20
    recalls = [f"eval_{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert {*recalls, "eval_margin", "eval_v_measure", "eval_random_pair_cosine"} <= metrics.keys()
    assert all(0 <= metrics[name] <= 1 for name in recalls)


# --- killed and resumed


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder for each kind, left behind by processes that were killed in the middle."""
    folder = tmp_path_factory.mktemp("killed")
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    result = PythonProcess([__file__, str(folder)], os.environ | {"PYTHONPATH": os.pathsep.join(paths)}).wait()
    assert result.returncode == 0, result.stderr
    ends = json.loads((folder / "ends.json").read_text())
    assert ends == dict.fromkeys(KINDS, -signal.SIGKILL), result.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(kind, killed, tmp_path):
    end_of_epoch = 8 if kind == "vanilla" else 6
    unbroken = make_trainer(kind, tmp_path, save_steps=end_of_epoch)
    unbroken.train()
    assert len(set(losses(unbroken))) == STEPS  # another loss in every step, so that order matters
    assert [path.name for path in (killed / kind).glob("checkpoint-*")] == ["checkpoint-5"]
    for checkpoint in (killed / kind / "checkpoint-5", tmp_path / f"checkpoint-{end_of_epoch}"):
        resumed = make_trainer(kind, checkpoint.parent)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert losses(resumed) == losses(unbroken)
        expected, state = unbroken.model.state_dict(), resumed.model.state_dict()
        assert [name for name in expected if not torch.equal(expected[name], state[name])] == []


# --- the log


def test_diagnostics_are_those_of_all_pairs_of_pairs():
    generator = torch.Generator().manual_seed(3)
    for n in (1, 2, 9):
        image, text = (
            torch.nn.functional.normalize(torch.randn(n, 6, generator=generator) + 0.5, dim=-1) for _ in range(2)
        )
        outputs = GapClosedClipOutput(
            contrastive_loss=torch.tensor(1.5, requires_grad=True),
            align_loss=torch.tensor(0.5),
            uniformity_loss=torch.tensor(-2.0),
            image_embeds=image,
            text_embeds=text,
        )
        z, c = image.double().numpy(), text.double().numpy()
        apart = [(i, j) for i in range(n) for j in range(n) if i != j]

        def mean(a, b, indices):
            return np.mean([sum(a[i, d] * b[j, d] for d in range(6)) for i, j in indices]) if indices else 0.0

        expected = {
            "contrastive_loss": 1.5,
            "align_loss": 0.5,
            "uniformity_loss": -2.0,
            "modality_gap": np.sqrt(sum((z[:, d].mean() - c[:, d].mean()) ** 2 for d in range(6))),
            "true_pair_cosine": mean(z, c, [(i, i) for i in range(n)]),
            "random_pair_cosine": mean(z, c, apart),
            "mean_cosine_image": mean(z, z, apart),
            "mean_cosine_text": mean(c, c, apart),
        }
        found = trainer.batch_diagnostics(outputs)
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-6)
        assert not any(value.requires_grad for value in found.values())


def test_the_log_averages_over_the_steps_since_the_last_one(tmp_path, monkeypatch):
    seen, original = [], trainer.batch_diagnostics
    monkeypatch.setattr(trainer, "batch_diagnostics", lambda outputs: seen.append(original(outputs)) or seen[-1])
    training = make_trainer(
        "ours", tmp_path, max_steps=4, logging_steps=2, save_strategy="no", eval_dataset=make_pairs(10, augment=False)
    )
    training.train()
    training.evaluate()  # is no training: adds nothing to the next log
    assert len(seen) == 4
    entries = [entry for entry in training.state.log_history if "loss" in entry]
    for entry, steps in zip(entries, (seen[:2], seen[2:]), strict=True):
        for name in steps[0]:
            assert entry[name] == pytest.approx(np.mean([step[name].item() for step in steps]), abs=1e-4)
    last = entries[-1]
    assert last["logit_scale"] == pytest.approx(training.model.logit_scale.exp().item(), abs=1e-4)
    assert last["uniformity_weight"] == 0.5 and last["contrastive_weight"] == 1.0


def test_the_log_tells_further_terms_where_they_are_used(tmp_path):
    config = {"contrastive_loss": "sigmoid", "modality_uniformity_weight": [[0.0, 1.0], [1.0, 3.0]]}
    training = make_trainer("ours", tmp_path, config=config, max_steps=2, save_strategy="no", weight_decay=0.1)
    training.train()
    first, last = (entry for entry in training.state.log_history if "loss" in entry)
    assert (first["modality_uniformity_weight"], last["modality_uniformity_weight"]) == (1.0, 2.0)
    assert first["modality_uniformity_loss"] < 0 and not any("cross_uniformity" in name for name in first)
    assert last["logit_bias"] == pytest.approx(training.model.logit_bias.item(), abs=1e-4) != -10
    decayed = training.get_decay_parameter_names(training.model)
    assert decayed and not any("temperature" in name for name in decayed)
    plain = make_trainer("ours", tmp_path, max_steps=1, save_strategy="no")
    plain.train()
    assert not any(
        name.startswith(("modality_unif", "cross_unif", "logit_bias")) for name in plain.state.log_history[0]
    )


# --- weights that follow a schedule


@pytest.mark.parametrize("kind", ["vanilla", "ours"])
def test_scheduled_weights_move_with_the_training(kind, tmp_path):
    weights = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.objective_weights()["align_weight"].item())

    callbacks = [Recorder()] if kind == "ours" else [TrainingProgressCallback(), Recorder()]
    config = {"align_weight": [[0.25, 1.0], [0.75, 3.0]]}
    training = make_trainer(kind, tmp_path, callbacks, config, max_steps=8, save_strategy="no")
    training.train()
    assert weights == [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert training.model.training_progress == 7 / 8
    if kind == "ours":
        assert [entry["align_weight"] for entry in training.state.log_history if "loss" in entry] == weights


# --- collapse and scatter


def train_standing_still(folder, caplog, image_axis: int, text_axis: int, align_weight: float, max_steps: int = 4):
    """Trains with no learning rate and every image, and every caption, at one place; returns the warnings."""
    still = {"align_weight": align_weight, "center_projections": False, "uniformity_weight": 0.0}
    training = make_trainer("ours", folder, config=still, max_steps=max_steps, learning_rate=0.0, save_strategy="no")
    model = training.model
    for projection, axis in ((model.visual_projection, image_axis), (model.text_projection, text_axis)):
        torch.nn.init.zeros_(projection.weight)
        with torch.no_grad():
            projection.bias.copy_(torch.eye(32)[axis])
    with caplog.at_level(logging.WARNING):
        training.train()
    records = [record for record in caplog.records if record.name.startswith("gap_closed_clip.training")]
    return [record.getMessage() for record in records]


def test_each_training_of_one_trainer_has_its_own_allowance_of_broken_steps_and_its_own_warning(tmp_path, caplog):
    training = make_trainer("ours", tmp_path, max_steps=2, save_strategy="no", skip_broken_steps=1, learning_rate=0.0)
    loss = training.model.compute_loss
    steps = []

    def infinite_at_first(*args, **kwargs):
        found = loss(*args, **kwargs)
        steps.append(found)
        return found._replace(loss=found.loss * math.inf) if len(steps) % 2 else found

    training.model.compute_loss = infinite_at_first
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            training.train()
        messages = [record.getMessage() for record in caplog.records]
        assert sum("The step is skipped (1 of 1)." in message for message in messages) == 1
        assert sum(message.startswith("The space is scattered") for message in messages) == 1
    assert len(steps) == 4


def test_collapse_is_warned_of_once_and_not_before_half_of_the_training(tmp_path, caplog):
    (warning,) = train_standing_still(tmp_path, caplog, 0, 0, align_weight=1.0)
    assert "The space is collapsing: random pairs have a mean cosine of 1.00 (true pairs 1.00)" in warning
    assert "lower model.align_weight" in warning


def test_scatter_is_warned_of_where_pairs_are_being_aligned(tmp_path, caplog):
    (warning,) = train_standing_still(tmp_path, caplog, 0, 1, align_weight=1.0)
    assert "The space is scattered: true pairs have a mean cosine of only 0.00 after 50% of training" in warning
    caplog.clear()
    assert train_standing_still(tmp_path, caplog, 0, 1, align_weight=0.0) == []


def run_until_killed(folder: Path) -> None:
    ends = {}
    for kind in KINDS:
        child = os.fork()  # before any training: the library's threads do not survive a fork
        if child == 0:
            make_trainer(kind, folder / kind, [Killer()]).train()
            os._exit(0)
        ends[kind] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "ends.json").write_text(json.dumps(ends))


@pytest.mark.parametrize("other", [{}, {"distinct_batches": False, "mix_sources": False}])
def test_an_order_that_would_not_be_heard_is_refused(tmp_path, other):
    name = "mix_sources is false" if other else "distinct_batches is true"
    with pytest.raises(ValueError, match=f"train_sampling_strategy is sequential, and training.{name}"):
        make_trainer("ours", tmp_path, train_sampling_strategy="sequential", **other)


def test_pairs_in_their_own_order_are_varied_in_each_epoch(tmp_path):
    """Their batches are the same in each, and so would be their images."""
    order = {"train_sampling_strategy": "sequential", "distinct_batches": False}
    trainer = make_trainer("ours", tmp_path, save_strategy="no", max_steps=9, dataloader_num_workers=0, **order)
    seen, collate = [], trainer.data_collator
    set_epoch = collate.set_epoch

    class Spy(PairCollator):
        def __call__(self, rows):
            batch = collate(rows)
            seen.append(batch["pixel_values"])
            return batch

        def set_epoch(self, epoch):
            set_epoch(epoch)

    trainer.data_collator = Spy(collate.processor)
    trainer.train()
    first, second, third = seen[0], seen[3], seen[6]  # of 26 pairs three batches
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)


def test_a_batch_size_that_shrinks_by_itself_is_refused(tmp_path):
    message = "auto_find_batch_size is true: .* lower per_device_train_batch_size; contrastive_batch_size"
    with pytest.raises(ValueError, match=message):
        make_trainer("ours", tmp_path, auto_find_batch_size=True)


def test_a_second_training_counts_anew_until_it_stops_early(tmp_path):
    """Nothing is learned: the first evaluation is the best, and the second one stops. The next took no step at all."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mean_recall@10", "learning_rate": 0.0}
    every_step = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
    pairs = make_pairs(16, augment=False)
    still = {"center_projections": False}
    training = make_trainer("ours", tmp_path, [EarlyStopping(1)], still, pairs, **best, **every_step)
    for _ in range(2):
        training.train()
        assert training.state.global_step == 2


def test_label_smoothing_of_the_library_is_refused(tmp_path):
    """It changed nothing where there are pairs, and took a captioner's labels, whose forward then had none."""
    with pytest.raises(ValueError, match=r"would take the labels from the model: set .*of a captioner's config"):
        make_trainer("ours", tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("kind", [GapClosedClipTrainer, GapClosedCaptionTrainer])
@pytest.mark.parametrize("of_the_library", [None, TrainingArguments, Seq2SeqTrainingArguments])
def test_arguments_of_the_library_are_refused_by_name(tmp_path, kind, of_the_library):
    """They lacked a field, in an AttributeError."""
    args = of_the_library and of_the_library(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=f"{kind.__name__} got .*: give GapClosedTrainingArguments"):
        kind(model=GapClosedClipModel(tiny_config()), args=args)


if __name__ == "__main__":
    run_until_killed(Path(sys.argv[1]))
