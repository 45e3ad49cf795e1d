"""Weights are read from safetensors files alone, also on the Hub: a pickle can run any code when it is read."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, tiny_config
from safetensors.torch import load_file
from transformers import BertModel

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.model.towers_gap_closed_clip import pickled_weights
from gap_closed_clip.training import LoraArguments, ModelArguments, add_adapters, build_model_and_processor
from gap_closed_clip.training.encoder import train_tokenizer

from .loopback_hub import LoopbackHub, Repository


VISION = tiny_config().vision_config
# In the form of a configuration.
TOWERS = {
    "vision": {"architecture": VISION.architecture, "model_args": VISION.model_args},
    "text": {"hidden_size": 48, "num_attention_heads": 3},
}


def load(name: str) -> str:
    """ "loaded", or why a model or a tower of the Hub was not."""
    try:
        if "tower" in name:
            tower = {"vision" if "vision" in name else "text": name}
            build_model_and_processor(ModelArguments(**TOWERS | tower), ["a caption"])
        else:
            load_checkpoint(name)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def pickle_weights(folder: Path, name: str = "model.safetensors", pickled: str = "pytorch_model.bin") -> Path:
    """The weights as a pickle that the libraries would read, and nothing else."""
    torch.save(load_file(folder / name), folder / pickled)
    (folder / name).unlink()
    return folder


def push(hub: LoopbackHub, name: str, folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    hub.repositories[f"tester/{name}"] = Repository(private=False)
    hub.repositories[f"tester/{name}"].commit("weights", files)


def save_text_tower(folder: Path) -> Path:
    BertModel(tiny_config().text_config).save_pretrained(folder)
    train_tokenizer(CAPTIONS, 200).save_pretrained(folder)
    return folder


def save_vision_tower(folder: Path, model: GapClosedClipModel) -> Path:
    model.vision_model.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: GapClosedClipModel, processor) -> Path:
    add_adapters(model, LoraArguments(rank=2), "tester/whole", None).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_on_the_hub(online, tiny_model, tiny_processor, tmp_path):
    hub = online
    for name in ("whole", "pickled", "both"):
        tiny_model.save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)
    push(hub, "whole", tmp_path / "whole")
    push(hub, "pickled", pickle_weights(tmp_path / "pickled"))
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"no pickle")
    push(hub, "both", tmp_path / "both")
    push(hub, "text-tower", save_text_tower(tmp_path / "text"))
    push(hub, "pickled-text-tower", pickle_weights(tmp_path / "text"))
    push(hub, "vision-tower", save_vision_tower(tmp_path / "vision", tiny_model))
    push(hub, "pickled-vision-tower", pickle_weights(tmp_path / "vision"))
    adapter = save_adapter(tmp_path / "adapter", tiny_model, tiny_processor)
    push(hub, "adapter", adapter)
    push(hub, "pickled-adapter", pickle_weights(adapter, "adapter_model.safetensors", "adapter_model.bin"))
    (tmp_path / "whole" / "model.safetensors").unlink()
    push(hub, "empty", tmp_path / "whole")

    found = {name: load(name) for name in sorted(hub.repositories)}
    loaded = {name for name in found if found[name] == "loaded"}
    assert loaded == {f"tester/{name}" for name in ("adapter", "both", "text-tower", "vision-tower", "whole")}
    missing = "has no weights: {} is missing, {} is pickled and not read. Save it again"
    assert missing.format("model.safetensors", "pytorch_model.bin") in found["tester/pickled"]
    assert missing.format("adapter_model.safetensors", "adapter_model.bin") in found["tester/pickled-adapter"]
    for name in ("tester/pickled-text-tower", "tester/pickled-vision-tower"):
        assert found[name].startswith(f"ValueError: {name} has pickled weights alone (pytorch_model.bin), which can")
        assert "a copy with model.safetensors" in found[name]
    assert found["tester/empty"].startswith("OSError: tester/empty is neither a folder with a model nor a Hub id")
    assert not any("\n" in answer for answer in found.values())
    # The pickles were not even downloaded.
    assert not any(path.endswith(".bin") for method, path in hub.requests if method == "GET")


@pytest.mark.parametrize("index", [False, True], ids=["one file", "shards"])
def test_towers_of_this_disk(tiny_model, tmp_path, index):
    for folder in (save_text_tower(tmp_path / "text"), save_vision_tower(tmp_path / "vision", tiny_model)):
        pickle_weights(folder, pickled="pytorch_model-00001-of-00001.bin" if index else "pytorch_model.bin")
        if index:
            names = torch.load(folder / "pytorch_model-00001-of-00001.bin")
            weights = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        towers = {"vision": tiny_config().vision_config, "text": tiny_config().text_config, folder.name: str(folder)}
        with pytest.raises(ValueError, match=rf"{folder.name} has pickled weights alone \(pytorch_model.*\.bin\)"):
            GapClosedClipModel.from_vision_text_pretrained(towers["vision"], towers["text"])


def test_a_model_folder_of_this_disk(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is pickled and not read"):
        load_checkpoint(pickle_weights(tmp_path / "model"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["open_clip_pytorch_model.bin", "config.json"], "open_clip_pytorch_model.bin"),
        (["adapter_model.bin"], "adapter_model.bin"),
        (["pytorch_model.bin", "model-00001-of-00002.safetensors"], None),
        (["training_args.bin", "config.json"], None),
        ([], None),
    ],
)
def test_which_files_are_pickled_weights(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    assert pickled_weights(str(tmp_path)) == expected


def test_where_the_hub_cannot_be_asked(monkeypatch):
    assert pickled_weights("nobody/nothing") is None  # switched off, as for all tests
    assert pickled_weights("no id at all!") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again, longer and longer
    assert pickled_weights("nobody/nothing") is None
