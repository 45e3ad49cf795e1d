"""The fixed map behind the embeddings: where it is, what it gives, and that it is nowhere else."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_inputs
from transformers import AutoModel

from gap_closed_clip import GapClosedClipModel, MicroBatches
from gap_closed_clip.model.projection_gap_closed_clip import EmbeddingMap


def mapped_model(**config) -> GapClosedClipModel:
    """A model whose maps are far from the identity."""
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(embedding_map="whitening", **config)).eval()
    with torch.no_grad():
        for part in (model.visual_map, model.text_map):
            part.weight.normal_()
            part.bias.normal_()
            part.shift.normal_(std=0.5)
    return model


def naive(part: EmbeddingMap, features: torch.Tensor) -> np.ndarray:
    """The formula, row by row in float64."""
    weight, bias, shift = (buffer.double().numpy() for buffer in (part.weight, part.bias, part.shift))
    rows = []
    for row in features.detach().double().numpy():
        row = weight @ (row / np.linalg.norm(row)) + bias
        row = row / np.linalg.norm(row) + shift
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def test_there_is_none_where_the_configuration_names_none():
    model = GapClosedClipModel(tiny_config())
    assert model.config.embedding_map is None
    assert not [name for name in model.state_dict() if "map" in name]


def test_a_new_map_is_the_identity_on_unit_vectors():
    torch.manual_seed(0)
    plain = GapClosedClipModel(tiny_config()).eval()
    config = tiny_config(embedding_map="realign")
    mapped = GapClosedClipModel.from_pretrained(None, config=config, state_dict=plain.state_dict()).eval()
    with torch.no_grad():
        expected, found = plain(**tiny_inputs()), mapped(**tiny_inputs())
    torch.testing.assert_close(found.image_embeds, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_all_ways_to_an_embedding_go_through_it(centered):
    model = mapped_model(center_projections=centered)
    inputs = tiny_inputs()
    images = {"pixel_values": inputs["pixel_values"]}
    texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        if centered:
            model.visual_centering.running_mean.fill_(0.1)
            model.text_centering.running_mean.fill_(-0.1)
        image_features = model.visual_projection(model.vision_model(**images).pooler_output)
        text_features = model.text_projection(model.encode_text(**texts).pooler_output)
        shift = 0.1 if centered else 0.0
        expected = naive(model.visual_map, image_features - shift), naive(model.text_map, text_features + shift)
        outputs = [model(**inputs), model(micro_batches=MicroBatches.split(inputs, 3))]
        features = model.get_image_features(**images).pooler_output, model.get_text_features(**texts).pooler_output
    found = [(output.image_embeds, output.text_embeds) for output in outputs] + [features]
    for pair in found:
        for values, rows in zip(pair, expected, strict=True):
            np.testing.assert_allclose(values.numpy(), rows, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    model = mapped_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.embedding_map == "whitening"
    with torch.no_grad():
        for name in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(loaded(**tiny_inputs())[name], model(**tiny_inputs())[name], atol=0, rtol=0)


def test_autocast_does_not_round_the_map():
    part = mapped_model().visual_map
    features = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = part(features)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), naive(part, features), atol=1e-6)


def test_training_goes_on_through_the_map_and_leaves_it():
    """The gradient is that of the objective of embeddings mapped by hand."""
    model = mapped_model()  # without dropout
    by_hand = copy.deepcopy(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "map" in name}
    model(**tiny_inputs()).loss.backward()
    inputs = tiny_inputs()
    image = by_hand.visual_projection(by_hand.vision_model(inputs.pop("pixel_values")).pooler_output)
    text = by_hand.text_projection(by_hand.encode_text(**inputs).pooler_output)
    embeds = []
    for part, z in ((by_hand.visual_map, image), (by_hand.text_map, text)):
        z = torch.nn.functional.normalize(z) @ part.weight.T + part.bias
        embeds.append(torch.nn.functional.normalize(torch.nn.functional.normalize(z) + part.shift))
    by_hand.compute_loss(embeds).loss.backward()
    weight, expected = model.visual_projection.weight.grad, by_hand.visual_projection.weight.grad
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-4)
    assert weight.abs().max() > 1e-4
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if "map" in name)
