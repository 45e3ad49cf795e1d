"""A trained model whose gap a post-hoc method has closed: the folder gives what the method gives by hand."""

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, IMAGE_SIZE, tiny_config
from datasets import Dataset
from evaluation.records import of_three, record_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModel

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.data import PairCollator
from gap_closed_clip.evaluation import PairEmbeddings, embed_pairs
from gap_closed_clip.evaluation.post_hoc import METHODS, fit
from gap_closed_clip.training import close_gap, fit_post_hoc, recenter


def make_pairs(seed: int, number: int = 40) -> Dataset:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (number, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    rows = {
        "image": [Image.fromarray(image) for image in pixels],
        "caption": [f"{CAPTIONS[k % 6]} {' '.join(random.permutation(CAPTIONS[0].split()))}" for k in range(number)],
        "image_id": [f"{seed}/{k}" for k in range(number)],
    }
    return Dataset.from_dict(rows)


def lively(processor, **config) -> GapClosedClipModel:
    """A tiny model with a gap as wide as its embeddings are spread; at random they would be nearly equal."""
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(**config)).eval()
    features = embed_pairs(model, processor, make_pairs(3), normalize=False)
    with torch.no_grad():
        for part, z in (
            (model.visual_projection, features.image_embeds),
            (model.text_projection, features.text_embeds),
        ):
            mean, spread = torch.tensor(z.mean(0)), float((z - z.mean(0)).std())
            part.bias.sub_(mean).div_(spread).add_(torch.randn(len(mean)))
            part.weight.div_(spread)
        if config.get("center_projections"):
            model.visual_centering.running_mean.normal_(std=0.5)
            model.visual_centering.num_batches_tracked.fill_(7)
    return model


def unit(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_folder_gives_what_the_method_gives(method, centered, tiny_processor, tmp_path):
    model = lively(tiny_processor, center_projections=centered)
    train, others = make_pairs(1), make_pairs(2, 7)
    features = embed_pairs(model, tiny_processor, train, normalize=False)
    maps = fit_post_hoc(method, features)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    close_gap(model, method, maps).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    found = embed_pairs(loaded, tiny_processor, others)

    raw = embed_pairs(model, tiny_processor, others, normalize=False)
    if method == "centering":
        means = [z.mean(0, dtype=np.float64) for z in (features.image_embeds, features.text_embeds)]
        expected = unit(raw.image_embeds - means[0]), unit(raw.text_embeds - means[1])
    else:
        by_hand = fit(method, unit(features.image_embeds), unit(features.text_embeds))
        expected = by_hand.image(unit(raw.image_embeds)), by_hand.text(unit(raw.text_embeds))
    np.testing.assert_allclose(found.image_embeds, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.text_embeds, expected[1], atol=1e-6)
    applied = maps.apply(raw)  # what the command evaluates
    np.testing.assert_allclose(found.text_embeds, applied.text_embeds, atol=1e-6)
    assert np.abs(found.text_embeds - unit(raw.text_embeds)).max() > 0.05
    # The weights are those of the model, which is as it was.
    weights = loaded.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(weights[name], value) for name, value in before.items() if "centering" not in name)
    assert loaded.config.center_projections is (centered or method == "centering")
    assert loaded.config.embedding_map == (None if method == "centering" else method)


def test_centering_is_what_recenter_does(tiny_processor):
    model, train = lively(tiny_processor, center_projections=True), make_pairs(1)
    maps = fit_post_hoc("centering", embed_pairs(model, tiny_processor, train, normalize=False))
    closed = close_gap(model, "centering", maps)
    recenter(model, DataLoader(train, batch_size=8, collate_fn=PairCollator(tiny_processor)))
    for name in ("visual_centering", "text_centering"):
        expected, found = getattr(model, name), getattr(closed, name)
        torch.testing.assert_close(found.running_mean, expected.running_mean, atol=1e-5, rtol=0)
        assert torch.equal(found.num_batches_tracked, expected.num_batches_tracked)


def test_recentering_looks_behind_no_map(tiny_processor):
    """The running means are those of the projections, also where a map follows."""
    model, train = lively(tiny_processor, center_projections=True), make_pairs(1)
    features = embed_pairs(model, tiny_processor, train, normalize=False)
    closed = close_gap(model, "whitening", fit_post_hoc("whitening", features))
    batches = DataLoader(train, batch_size=8, collate_fn=PairCollator(tiny_processor))
    recenter(model, batches)
    recenter(closed, batches)
    torch.testing.assert_close(closed.visual_centering.running_mean, model.visual_centering.running_mean)
    assert model.visual_centering.running_mean.abs().max() > 0.1


def test_a_map_of_a_map_is_refused(tiny_processor):
    model = lively(tiny_processor)
    features = embed_pairs(model, tiny_processor, make_pairs(1), normalize=False)
    closed = close_gap(model, "whitening", fit_post_hoc("whitening", features))
    with pytest.raises(ValueError, match=r"already has a map \(whitening\) behind its embeddings"):
        close_gap(closed, "centering", fit_post_hoc("centering", features))


def test_a_modality_that_the_pairs_lack_stays_which_is_told(caplog):
    model, _ = record_model()
    features = of_three(16, dim=32)
    without = PairEmbeddings(
        features.image_embeds, features.text_embeds, features.image_ids, features.captions, features.labels
    )
    closed = close_gap(model, "procrustes", fit_post_hoc("procrustes", without))
    assert "procrustes: the pairs it was fitted on have no record (data.modalities), whose embeddings" in caplog.text
    same = torch.eye(32)
    assert torch.equal(closed.parts("record").map.weight, same) and not torch.allclose(closed.text_map.weight, same)
    caplog.clear()
    close_gap(model, "procrustes", fit_post_hoc("procrustes", features))
    assert "fitted on have no" not in caplog.text
