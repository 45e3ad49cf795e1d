"""Steps whose numbers break: what is said, what is kept, and what is passed over."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import NO_MORE, configure, finished, tiny  # noqa: F401

from gap_closed_clip.data import PairCollator
from gap_closed_clip.model.modeling_gap_closed_clip import GapClosedClipModel
from gap_closed_clip.training import train
from gap_closed_clip.training.sound_numbers import SoundNumbers, broken_inputs


STEP = 4  # whose batch is broken
ONE_LOG = [
    "max_steps=6",
    "save_strategy=steps",
    "save_steps=1",
    "save_total_limit=2",
    "eval_strategy=no",
    "final_split=none",
]


@pytest.fixture
def broken_pixel(monkeypatch):
    """A NaN in the third image of the fourth batch; the ids of that batch are returned."""
    calls, seen = [], []
    images = PairCollator.images

    def with_nan(self, rows):
        batch = images(self, rows)
        calls.append(len(rows))
        if len(calls) == STEP:
            batch["pixel_values"][2, 1, 3, 5] = math.nan
            seen.append(rows[2]["image_id"])
        return batch

    monkeypatch.setattr(PairCollator, "images", with_nan)
    return seen


@pytest.mark.parametrize("words", [[], ["contrastive_batch_size=8", "per_device_train_batch_size=4"]])
def test_a_nan_pixel_ends_the_command_and_names_its_image(tiny, tmp_path, command, broken_pixel, words):
    run = tmp_path / "run"
    code, _, said = command("train", str(tiny), f"output_dir={run}", *ONE_LOG, *words)
    step = STEP if not words else STEP // 2
    wrong = said[said.index("gap-closed-clip train: ") :]
    assert code == 1 and wrong.startswith(
        f"gap-closed-clip train: Step {step}: the loss is nan. NaN or infinity came in with pixel_values of training "
    )
    assert f"image '{broken_pixel[0]}'. Training stops here" in wrong and wrong.count("\n") == 1
    kept = sorted(path.name for path in run.iterdir())  # no lock, no half-written file
    assert kept == [f"checkpoint-{number}" for number in range(max(step - 2, 1), step)]
    weights = load_file(run / kept[-1] / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_so_many_broken_steps_may_be_passed_over(configure, tmp_path, broken_pixel, caplog):
    train(configure(*ONE_LOG, "skip_broken_steps=1"))
    assert "The step is skipped (1 of 1)." in caplog.text
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_a_step_that_is_passed_over_changes_no_weight(configure, tmp_path, monkeypatch):
    """Only the fourth of four: the weights are those of a run of three."""
    same = ["save_strategy=steps", "save_steps=1", "lr_scheduler_type=constant", "align_weight=1.0"]
    more = [*NO_MORE, *same, "max_steps=4"]
    loss = GapClosedClipModel.compute_loss
    number = []

    def infinite_at_last(self, *args, **kwargs):
        found = loss(self, *args, **kwargs)
        number.append(found)
        return found._replace(loss=found.loss * (math.inf if len(number) == STEP else 1.0))

    monkeypatch.setattr(GapClosedClipModel, "compute_loss", infinite_at_last)
    train(configure(*more, "skip_broken_steps=2"))
    third, fourth = (load_file(tmp_path / "run" / f"checkpoint-{k}" / "model.safetensors") for k in (3, 4))
    moving = [name for name in third if "running_mean" in name or "num_batches" in name or "progress" in name]
    assert moving and all(torch.equal(third[name], fourth[name]) for name in third if name not in moving)


def test_a_broken_gradient_is_seen_where_the_loss_is_sound():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    numbers = SoundNumbers(1, None)
    assert numbers.check(torch.tensor(1.0), model, {}, 1)
    assert model.weight.grad is not None
    model.weight.grad[0, 1] = math.inf
    assert numbers.check(torch.tensor(1.0), model, {}, 2, scaled=True)  # as float16's scaler expects
    assert not numbers.check(torch.tensor(1.0), model, {}, 2) and model.weight.grad is None
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad[0] = math.nan
    with pytest.raises(
        ValueError, match=r"Step 3: the gradient is NaN or infinite\. The inputs are finite.*1 steps were skipped"
    ):
        numbers.check(torch.tensor(1.0), model, {}, 3)


def test_where_inputs_are_broken():
    inputs = {
        "pixel_values": torch.zeros(3, 2),
        "input_ids": torch.zeros(3, 2, dtype=torch.int64),
        "one": torch.tensor(1.0),
    }
    assert list(broken_inputs(inputs)) == []
    inputs["pixel_values"][1, 1] = -math.inf
    ((name, rows, ids),) = broken_inputs(inputs)
    assert (name, rows, ids) == ("pixel_values", [1], None)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rate=.inf", "training.learning_rate is inf: use a finite number, 0 or more"),
        ("learning_rate=-1.0", "training.learning_rate is -1.0"),
        ("weight_decay=.nan", "training.weight_decay is nan"),
        ("max_grad_norm=.nan", "training.max_grad_norm is nan"),
        ("contrastive_batch_size=0", "training.contrastive_batch_size is 0: use a finite number, 1 or more"),
        ("per_device_train_batch_size=0", "training.per_device_train_batch_size is 0"),
        ("dataloader_num_workers=1000", "each is a process; use as many as there are cores"),
        ("align_weight=1e308", r"align_weight is 1e\+308: .* values are from 0 to 10000"),
        ("align_weight=.nan", "align_weight is nan"),
        ("skip_broken_steps=-1", "training.skip_broken_steps is -1"),
        ("max_steps=0", "training.max_steps is 0: use a number of steps, or -1, for num_train_epochs"),
        ("eval_steps=0", "training.eval_steps is 0: use a finite number, above 0"),
        ("save_steps=-2", "training.save_steps is -2: use a finite number, above 0"),
        ("logging_steps=0", "training.logging_steps is 0: use a finite number, above 0"),
        ("seed=-1", "training.seed is -1: use a finite number, 0 or more"),
        ("data_seed=-1", "training.data_seed is -1"),
        ("fp16=true", "training.fp16 is true, which needs a GPU, and none is used here. Set fp16=false"),
        ("report_to=wandbb", "training.report_to: there is no 'wandbb': did you mean 'wandb'"),
        ("report_to=[none, flyte]", "training.report_to is flyte, .* pip install flytekit, or report_to=none"),
    ],
)
def test_numbers_that_would_break_a_run_are_refused_at_the_start(configure, word, message):
    with pytest.raises(ValueError, match=message):
        train(configure("source=nowhere", word))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["load_best_model_at_end=true", "save_strategy=no"],
            "load_best_model_at_end is true and .*eval_strategy is no",
        ),
        (
            ["eval_on_start=true"],
            "training.eval_on_start is true and .* Set eval_strategy=epoch or steps, or eval_on_st",
        ),
        (
            ["prediction_loss_only=true", "metric_for_best_model=mean_recall@10"],
            "metric_for_best_model is mean_recall@10",
        ),
    ],
)
def test_evaluations_that_are_to_decide_have_to_be_there(configure, words, message):
    with pytest.raises(ValueError, match=message):
        train(configure("source=nowhere", "eval_strategy=no", *words))
    sound = ["eval_steps=null", "prediction_loss_only=true", "metric_for_best_model=eval_loss", "max_steps=-1"]
    assert configure(*sound, "seed=0").training_arguments().greater_is_better is False


@pytest.mark.parametrize("epochs", ["0", "-5", ".nan"])
def test_no_epochs(configure, epochs):
    with pytest.raises(ValueError, match=r"training.num_train_epochs is (0|-5|nan).*above 0"):
        train(configure("source=nowhere", "max_steps=-1", f"num_train_epochs={epochs}"))


def test_no_token_is_left_in_a_folder(configure, tmp_path):
    train(configure(*NO_MORE, "save_strategy=steps", "save_steps=1", "hub_token=hf_secret"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"checkpoint-1", "run"} <= {path.parent.name for path in files}
    assert [path.name for path in files if b"hf_secret" in path.read_bytes()] == []
    assert [path.name for path in files if path.name == "training_args.bin"] == []
