"""The augmentation of training images, against torchvision and by counting."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from gap_closed_clip.data import Augmentation

from .conftest import three


@pytest.fixture
def image() -> Image.Image:
    """Dark on the left, bright on the right."""
    gray = np.tile(np.linspace(60, 180, 120).round().astype(np.uint8), (90, 1))
    return Image.fromarray(three(gray))


def test_crops_keep_their_share_and_shape(image):
    torch.manual_seed(0)
    sizes = np.array([Augmentation(brightness=0, contrast=0)(image).size for _ in range(500)], float)
    shares = sizes.prod(axis=1) / (120 * 90)
    assert 0.68 < shares.min() < 0.72 and 0.98 < shares.max() <= 1
    shapes = sizes[:, 0] / sizes[:, 1] / (120 / 90)
    assert 1 / 1.13 < shapes.min() < 0.95 and 1.05 < shapes.max() < 1.13  # 1.1, and whole pixels


def test_crops_are_pieces_of_the_image():
    numbered = np.arange(90 * 120).reshape(90, 120)
    rgb = np.stack([numbered // 256, numbered % 256, numbered * 0], axis=-1).astype(np.uint8)
    corners = set()
    for seed in range(50):
        torch.manual_seed(seed)
        crop = np.asarray(Augmentation(brightness=0, contrast=0)(Image.fromarray(rgb))).astype(int)
        value = crop[..., 0] * 256 + crop[..., 1]
        top, left = divmod(int(value[0, 0]), 120)
        np.testing.assert_array_equal(value, numbered[top : top + len(value), left : left + value.shape[1]])
        corners.add((top, left))
    assert len(corners) > 30


def test_nothing_to_vary_changes_nothing(image):
    same = Augmentation(crop_scale=(1, 1), brightness=0, contrast=0)(image)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))


def test_brightness_and_contrast_as_torchvision(image):
    torch.manual_seed(3)
    draws = torch.rand(7)
    torch.manual_seed(3)
    varied = Augmentation(crop_scale=(1, 1), brightness=0.4, contrast=0.6)(image)
    expected = tv.adjust_brightness(image, 1 + 0.4 * (2 * draws[4].item() - 1))
    expected = tv.adjust_contrast(expected, 1 + 0.6 * (2 * draws[5].item() - 1))
    np.testing.assert_allclose(np.asarray(varied, int), np.asarray(expected, int), atol=2)
    assert np.abs(np.asarray(varied, int) - np.asarray(image, int)).max() > 20


def test_no_mirroring_by_default(image):
    def mirrored(augmentation):
        return sum(np.diff(np.asarray(augmentation(image))[0, [0, -1], 0].astype(int))[0] < 0 for _ in range(200))

    torch.manual_seed(0)
    assert mirrored(Augmentation()) == 0
    assert 70 < mirrored(Augmentation(horizontal_flip=True)) < 130


def test_augmentation_repeats_with_torchs_seed_and_pickles(image):
    augmentation = pickle.loads(pickle.dumps(Augmentation()))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(np.asarray(augmentation(image)))
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0].shape != results[2].shape or (results[0] != results[2]).any()


def test_shorter_side_leaves_enough_for_every_crop():
    augmentation = Augmentation(brightness=0, contrast=0)
    side = augmentation.shorter_side(96)
    assert side < 96 * 1.3
    torch.manual_seed(0)
    square = Image.new("RGB", (side, side))
    assert min(min(augmentation(square).size) for _ in range(500)) >= 96


@pytest.mark.parametrize(
    "field, value", [("crop_scale", (0, 1)), ("crop_scale", (0.9, 0.8)), ("crop_scale", (0.5, 1.2)),
                     ("brightness", -0.1), ("contrast", 1.0), ("aspect_jitter", 0.9)]
)  # fmt: skip
def test_augmentation_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})
