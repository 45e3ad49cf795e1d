"""Runs with a section `lora`: the adapter's folder, how it evaluates, resumes and is damaged."""

import json
import logging
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lora import make_dead, make_model
from test_run import NO_MORE, TINY
from transformers import AutoTokenizer, BertConfig

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import load_pairs
from gap_closed_clip.evaluation import evaluate_model, read_metrics
from gap_closed_clip.training import load_config, train


LORA = ["lora.rank=2", "lora.layers=all", "lora.dropout=0.1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A trained model to put adapters on."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    train(load_config([tiny], [f"output_dir={folder}", *NO_MORE]))
    return folder


@pytest.fixture(scope="module")
def from_whole(tiny, whole):
    """from_whole(folder, "seed=3", ...): the tiny run with adapters on `whole`."""
    towers = [f"checkpoint={whole}", "vision=null", "text=null"]
    return lambda folder, *words: load_config([tiny], [*towers, f"output_dir={folder}", *LORA, *words])


@pytest.fixture(scope="module")
def finished(from_whole, tmp_path_factory):
    """Folder, configuration and result of a run with adapters."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = from_whole(folder)
    return folder, config, train(config)


def tensors_of(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def test_the_folder_holds_the_adapter_and_no_copy_of_the_model(finished, whole):
    folder, config, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert names >= {"train_config.yaml", "run.json", "metrics.json", "projection.png"}
    assert not names & {"config.json", "model.safetensors", "base", "training_args.bin"}
    rights = {(folder / f"adapter_{name}").stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(rights) == 1  # safetensors makes files for their owner alone
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(whole) and adapter["revision"] is None
    assert load_config([folder / "train_config.yaml"]) == config


def test_the_adapter_evaluates_as_it_did_after_training(finished):
    folder, config, result = finished
    assert read_metrics(folder / "metrics.json")["run"] == pytest.approx(result.metrics, nan_ok=True)
    model, processor = load_checkpoint(folder)
    assert type(model) is GapClosedClipModel
    again = evaluate_model(model, processor, load_pairs(config.data, "test"), batch_size=8)
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True, abs=1e-5)


def test_peft_and_transformers_load_the_adapter(finished, whole):
    folder, _, _ = finished
    expected = load_checkpoint(folder)[0]
    weights = tensors_of(folder)
    by_peft = PeftModel.from_pretrained(GapClosedClipModel.from_pretrained(whole), folder)
    if Version(transformers.__version__) < Version("5.18"):
        with pytest.raises(RuntimeError, match="weights of the adapter out .* peft.PeftModel"):
            GapClosedClipModel.from_pretrained(folder)
        return
    by_transformers = GapClosedClipModel.from_pretrained(folder).eval()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = [model(pixel_values=pixels).image_embeds for model in (expected, by_peft, by_transformers)]
    assert torch.equal(embeds[1], embeds[2])
    torch.testing.assert_close(embeds[0], embeds[1], rtol=0, atol=1e-6)
    # of the training pairs as inference sees them, set after training
    mean = weights["base_model.model.visual_centering.running_mean"]
    assert torch.equal(by_transformers.visual_centering.running_mean, mean)
    assert not torch.equal(tensors_of(folder / "checkpoint-6")["base_model.model.visual_centering.running_mean"], mean)


def test_a_frozen_tower_stays_as_it_was_and_the_optimizer_knows_adapters_only(finished):
    folder, _, _ = finished
    state = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    named = sum(value.numel() for value in tensors_of(folder).values() if value.ndim)
    centering = 4 * 16 - 32  # two means of 16 numbers are no parameters
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == named - centering


def test_resuming_ends_where_the_unbroken_run_did(finished, from_whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoint-2", folder / "checkpoint-2")
    result = train(from_whole(folder, "resume_from_checkpoint=true"))
    expected, found = tensors_of(finished[0]), tensors_of(folder)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert result.metrics == pytest.approx(finished[2].metrics, nan_ok=True)
    with pytest.raises(ValueError, match="holds another run"):
        train(from_whole(folder))


def test_micro_batches_checkpointing_and_a_text_tower_without_adapters(from_whole, tmp_path):
    words = ["per_device_train_batch_size=4", "contrastive_batch_size=8", "gradient_checkpointing=true", "bf16=true"]
    train(from_whole(tmp_path / "run", *words, "towers=[vision]", "final_split=none", "eval_strategy=no"))
    names = tensors_of(tmp_path / "run")
    assert not any("text_model" in name for name in names) and any("vision_model" in name for name in names)


def test_adapters_on_towers_bring_their_base_along(tiny, tmp_path):
    folder = tmp_path / "run"
    train(load_config([tiny], [f"output_dir={folder}", *LORA, "final_split=none", "eval_strategy=no"]))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    moved = folder.rename(tmp_path / "moved")
    base, adapted = load_checkpoint(moved / "base")[0], load_checkpoint(moved)[0]
    name = "vision_model.timm_model.blocks.0.attn.qkv.weight"
    assert (base.state_dict()[name] - adapted.state_dict()[name]).abs().max() > 1e-5
    train(load_config([tiny], [f"output_dir={folder}", f"checkpoint={moved}", "vision=null", "text=null", *NO_MORE]))
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("word", "copied"), [("align_weight=1.5", False), ("hypothesis_template='A {}.'", True)])
def test_the_base_is_copied_only_where_it_is_another_than_the_checkpoint(from_whole, tmp_path, word, copied):
    train(from_whole(tmp_path / "run", *NO_MORE, word))
    assert (tmp_path / "run" / "base").exists() is copied


def test_merged(from_whole, finished, tmp_path):
    folder = tmp_path / "run"
    result = train(from_whole(folder, "lora.merge=true"))
    assert (folder / "model.safetensors").exists() and not (folder / "adapter_model.safetensors").exists()
    assert not (folder / "base").exists()
    expected, model = load_checkpoint(finished[0])[0].state_dict(), load_checkpoint(folder)[0].state_dict()
    expected.pop("training_progress")  # which no adapter holds: that of the base
    assert all(torch.allclose(expected[name], model[name], atol=1e-6) for name in expected)
    assert result.metrics == pytest.approx(finished[2].metrics, nan_ok=True, abs=1e-5)


def test_a_dead_adapter_stops_the_first_step(from_whole, tmp_path, monkeypatch, caplog):
    original = GapClosedClipModel.train
    monkeypatch.setattr(GapClosedClipModel, "train", lambda self, mode=True: make_dead(self) or original(self, mode))
    message = r"2 trainable parameters got no gradient from the first batch .*attn\.qkv\.lora_A\.default\.weight"
    with pytest.raises(ValueError, match=message):
        train(from_whole(tmp_path / "run", *NO_MORE))
    with caplog.at_level(logging.WARNING):
        train(from_whole(tmp_path / "other", *NO_MORE, "ddp_find_unused_parameters=true"))
    assert "2 trainable parameters got no gradient" in caplog.text


def test_the_command(command, tiny, whole, tmp_path):
    towers = [f"checkpoint={whole}", "vision=null", "text=null", f"output_dir={tmp_path / 'run'}"]
    code, out, err = command("train", str(tiny), *towers, *LORA)
    assert code == 0, err
    assert f"The adapter is {tmp_path / 'run'}; its card is README.md there." in out and "true-pair cosine" in out
    code, _, err = command("train", str(tiny), *towers, *LORA, "push_to_hub=true")
    assert code == 1 and "only if its base model is on the Hub" in err


# --- adapter folders that do not load


@pytest.fixture
def damaged(finished, whole, tmp_path) -> Path:
    """The finished adapter and its base, to damage."""
    shutil.copytree(whole, tmp_path / "whole")
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "whole")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_checkpoint(folder)
    return folder


def test_an_adapter_without_its_base(damaged):
    shutil.rmtree(damaged.parent / "whole")
    with pytest.raises(
        OSError, match=r"run is an adapter, and its base model .*whole could not be loaded: There is no"
    ):
        load_checkpoint(damaged)


def test_an_adapter_on_another_base(damaged):
    tokens = len(AutoTokenizer.from_pretrained(damaged))
    text = tiny_config().text_config.to_dict() | {"vocab_size": tokens}
    other = make_model(text_config=BertConfig(**text))
    other.save_pretrained(damaged.parent / "whole")
    with pytest.raises(ValueError, match="run does not belong to its base model .*whole"):
        load_checkpoint(damaged)


def test_an_adapter_whose_base_was_trained_again_in_place(damaged, tiny):
    base, note = damaged.parent / "whole", damaged / "base_weights.json"
    assert json.loads(note.read_text()) == {"sha256": sha256((base / "model.safetensors").read_bytes()).hexdigest()}
    train(load_config([tiny], [f"output_dir={base}", "overwrite_output_dir=true", "seed=7", *NO_MORE]))
    with pytest.raises(
        ValueError, match=r"run is an adapter, and its base model \S*whole has other weights than when"
    ):
        load_checkpoint(damaged)


def test_a_run_does_not_go_on_with_another_base(whole, from_whole, tiny, tmp_path):
    base = shutil.copytree(whole, tmp_path / "whole")
    words = [f"checkpoint={base}", "eval_strategy=no", "final_split=none"]
    train(from_whole(tmp_path / "run", *words, "max_steps=2"))
    train(from_whole(tmp_path / "run", *words, "max_steps=3", "resume_from_checkpoint=true"))
    train(load_config([tiny], [f"output_dir={base}", "overwrite_output_dir=true", "seed=7", *NO_MORE]))
    with pytest.raises(
        ValueError, match="has other weights than when the adapter was trained: .* train the adapter ag"
    ):
        train(from_whole(tmp_path / "run", *words, "max_steps=4", "resume_from_checkpoint=true"))


def test_an_adapter_without_a_note_of_its_base_loads_on_any(damaged, tiny):
    (damaged / "base_weights.json").unlink()
    base = damaged.parent / "whole"
    train(load_config([tiny], [f"output_dir={base}", "overwrite_output_dir=true", "seed=7", *NO_MORE]))
    load_checkpoint(damaged)
    load_checkpoint(damaged / "checkpoint-6")


def test_a_base_beside_the_adapter_is_noted_too(tiny, tmp_path):
    folder = tmp_path / "run"
    train(load_config([tiny], [f"output_dir={folder}", *LORA, *NO_MORE]))
    weights = (folder / "base" / "model.safetensors").read_bytes()
    assert json.loads((folder / "base_weights.json").read_text()) == {"sha256": sha256(weights).hexdigest()}


def test_half_an_adapter(damaged):
    path = damaged / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "qkv.lora_B" in name))
    whole_file = path.read_bytes()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not belong to its base model"):
        load_checkpoint(damaged)
    path.write_bytes(whole_file[:-1])
    with pytest.raises(ValueError, match="run is damaged: adapter_model.safetensors is truncated"):
        load_checkpoint(damaged)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="run has no weights: adapter_model.safetensors is missing"):
        load_checkpoint(damaged)


def test_killed_while_an_adapter_was_being_saved(finished, from_whole, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    train(from_whole(tmp_path / "run", "resume_from_checkpoint=true", "final_split=none"))
    expected, found = tensors_of(finished[0]), tensors_of(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
