"""`gap-closed-clip train` as a user calls it, in this process."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gap_closed_clip.training.config import CONFIGS


TINY = {
    "model": {
        "vision": {
            "architecture": "eva02_tiny_patch14_224",
            "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
        },
        "text": {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "max_position_embeddings": 96},
        "projection_dim": 16,
    },
    "data": {
        "phantom_train_pairs": 24,
        "phantom_validation_pairs": 10,
        "phantom_test_pairs": 12,
        "phantom_size": 32,
    },
    "training": {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "final_split": "test",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    },
}


@pytest.fixture
def tiny(tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture
def train(command):
    """train("tiny.yaml", ...) -> (exit code, standard output, standard error)."""
    return partial(command, "train")


def test_a_model_folder_with_a_card_and_its_repetition(train, tiny, tmp_path):
    words = (tiny, f"output_dir={tmp_path / 'run'}")
    code, out, err = train(*words)
    assert code == 0, err
    assert "12 pairs, split 'test' of 'phantoms'" in out and "| modality gap" in out
    assert f"The model folder is {tmp_path / 'run'}; its card is README.md there." in out
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "run" / "metrics.json").is_file()
    code, _, err = train(*words)  # the folder holds this run now
    expected = f"gap-closed-clip train: training.output_dir {tmp_path / 'run'} holds another run."
    assert code == 1 and err.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lerning_rate=1e-3",), "The command line: unknown key 'lerning_rate': did you mean training.learning_rate?"),
        (("demoo.yaml",), "There is no config file demoo.yaml. Did you mean demo.yaml?"),
        (("--max_steps", "3"), "There is no option --max_steps: write max_steps=3."),
        (("clip_lt.yaml",), "model.vision is not set"),
        (("captioning.yaml",), "model.vision is not set"),
        (("learning_rate",), "There is no config file learning_rate. Did you mean learning_rate=VALUE?"),
    ],
)
def test_bad_input_is_one_line(train, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = train(*words)
    assert code == 1 and out == ""
    assert err.startswith(f"gap-closed-clip train: {message}") and err.count("\n") == 1


def test_an_interruption_says_where_to_go_on(train, tiny, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("gap_closed_clip.commands.train.train", interrupt)
    complete = tmp_path / "run" / "checkpoint-2"
    complete.mkdir(parents=True)
    (complete / "config.json").write_text("{}")
    (complete / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"weight": torch.ones(1)}, complete / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, complete / name)
    words = (tiny, f"output_dir={tmp_path / 'run'}")
    assert train(*words) == (
        130,
        "",
        f"\ngap-closed-clip train: interrupted. {complete} is complete: the same command with "
        "resume_from_checkpoint=true goes on from there.\n",
    )
    shutil.rmtree(tmp_path / "run")
    assert train(*words) == (
        130,
        "",
        f"\ngap-closed-clip train: interrupted. {tmp_path / 'run'} holds no complete checkpoint to go on from; "
        "training.save_strategy asks for them.\n",
    )


def test_the_captioning_config_on_a_trained_encoder(train, tiny, tmp_path, monkeypatch):
    assert train(tiny, f"output_dir={tmp_path / 'encoder'}", "final_split=none")[0] == 0
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={tmp_path / 'encoder'}", "output_dir=captioner", "max_steps=2", "eval_steps=2"]
    words += ["phantom_train_pairs=16", "phantom_validation_pairs=6", "phantom_test_pairs=7", "phantom_size=32"]
    words += ["per_device_train_batch_size=8", "cache_images=null", "report_to=none", "use_cpu=true"]
    code, out, err = train("configs/captioning.yaml", *words, "captioning.num_layers=null", "max_new_tokens=8")
    assert code == 0, err
    assert "7 images, split 'test' of 'phantoms'" in out and "| CIDEr-D" in out
    assert Path("captioner/README.md").is_file()


def test_the_package_has_the_configs_that_a_checkout_shows():
    shown = Path(__file__).parents[2] / "configs"
    assert {path.name for path in shown.glob("*.yaml")} == {path.name for path in CONFIGS.glob("*.yaml")} != set()
    assert shown.resolve() == CONFIGS.resolve()
