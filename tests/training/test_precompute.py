"""What is computed once: the frozen text tower's output, and the exact centres after training."""

import pytest
import torch
from conftest import tiny_config

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.data import Augmentation, PairCollator
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.training.precompute import pool_captions_once
from gap_closed_clip.training.recenter import recenter


@pytest.fixture(scope="module")
def pairs():
    return make_phantoms(20, seed=3, image_size=32)


def test_pooled_captions_train_the_projection_as_the_captions_do(pairs, tiny_processor):
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(text_pooling="mean"))
    model.freeze_towers(text=True)
    collator = PairCollator(tiny_processor)
    pooled = pool_captions_once(pairs, model, collator, batch_size=3, device=torch.device("cpu"))
    gradients = []
    for rows in (pairs, pooled):
        batch = collator([rows[i] for i in range(8)])
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert "input_ids" not in batch and batch["pooled_text"].shape == (8, 48)
    for with_tower, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_tower, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen_text", [False, True])
def test_recentered_features_have_mean_zero_over_the_training_pairs(pairs, tiny_processor, frozen_text):
    model = GapClosedClipModel(tiny_config(center_projections=True)).train()
    collator = PairCollator(tiny_processor, Augmentation())
    model(**collator([pairs[i] for i in range(8)]))  # statistics of one augmented batch: not yet the exact ones
    rows = pairs
    if frozen_text:
        rows = pool_captions_once(pairs, model, collator, batch_size=8, device=torch.device("cpu"))
        model.train()
    recenter(model, rows, collator, batch_size=6, num_workers=0)
    assert model.training
    batch = PairCollator(tiny_processor)(list(pairs))
    batch.pop("group_ids")
    pixel_values = batch.pop("pixel_values")
    with torch.no_grad():
        image = model.eval().get_image_features(pixel_values).pooler_output
        text = model.get_text_features(**batch).pooler_output
    for features in (image, text):
        assert features.std(0).min() > 0  # it is no constant that has been centered
        assert (features.mean(0).abs() / features.std(0)).max() < 1e-3
