"""Convolutional image towers that run in every step: in the faster memory layout, and saved in the usual one."""

import pytest
import torch
from captioners import caption_config
from safetensors.torch import load_file
from test_run import NO_MORE, TINY
from torch import nn

from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.build import build
from gap_closed_clip.training.preflight import preflight


TOWER = "model.vision={architecture: mobilenetv3_small_050}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("layout") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def encoder(tiny):
    folder = tiny.parent / "encoder"
    train(load_config([tiny], [TOWER, f"output_dir={folder}", *NO_MORE]))
    return folder


def is_channels_last(config) -> bool:
    """Whether all spatial convolutions of the image tower that is trained with are in channels last."""
    tower = build(config, preflight(config)).encoder.vision_model
    found = {
        conv.weight.is_contiguous(memory_format=torch.channels_last)
        for conv in tower.modules()
        if isinstance(conv, nn.Conv2d) and conv.weight.shape[1] > 1 and conv.kernel_size != (1, 1)
    }
    (same,) = found
    return same


@pytest.mark.parametrize(("frozen", "expected"), [("false", True), ("true", False)])
def test_an_encoder_whose_tower_trains(tiny, tmp_path, frozen, expected):
    words = [TOWER, f"freeze_vision={frozen}", f"output_dir={tmp_path / 'run'}", *NO_MORE]
    assert is_channels_last(load_config([tiny], words)) is expected


@pytest.mark.parametrize(("kind", "expected"), [("image", True), ("text", False)])
def test_a_captioner_that_is_trained_on_images(encoder, tmp_path, kind, expected):
    config = caption_config(encoder, tmp_path / "run", f"train_on={kind}", *NO_MORE)
    assert is_channels_last(config) is expected


def test_what_is_saved_is_the_encoder_s(encoder, tmp_path):
    config = caption_config(encoder, tmp_path / "run", *NO_MORE)
    train(config)
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, tmp_path / "run"))
    vision = {name: value for name, value in before.items() if name.startswith("vision_model.")}
    assert vision and all(torch.equal(value, after[f"gap_closed_clip.{name}"]) for name, value in vision.items())
