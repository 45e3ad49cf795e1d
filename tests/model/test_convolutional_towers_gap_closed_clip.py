"""Convolutional image towers do what an EVA does: with BatchNorm, maps in place of tokens, and any image size."""

import json

import pytest
import timm
import torch
from conftest import caption_labels, checkpoint_activations, noise_image, tiny_config, tiny_inputs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, pipeline

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel, MicroBatches


SIZE = 64
TOWERS = {
    "mobilenetv3_small_050": {},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]},
}
BATCH_NORM = ["mobilenetv3_small_050", "resnet18"]


def make_model(architecture: str = "mobilenetv3_small_050", **kwargs) -> GapClosedClipModel:
    """With batch statistics that are not those of a new layer, in eval mode."""
    torch.manual_seed(0)
    vision = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": TOWERS[architecture]}
    model = GapClosedClipModel(tiny_config(**{"vision_config": vision, **kwargs}))
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
        model.train().vision_model(torch.randn(16, 3, SIZE, SIZE))
    return model.eval()


def inputs(n: int = 4, size: int = SIZE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {**tiny_inputs(n), "pixel_values": torch.randn(n, 3, size, size, generator=generator)}


def gradients(model: nn.Module, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def lite0_model(lite0) -> GapClosedClipModel:
    torch.manual_seed(0)
    return GapClosedClipModel.from_vision_text_pretrained(lite0, tiny_config().text_config, projection_dim=32).eval()


@pytest.mark.parametrize("size", [64, 96])
@torch.no_grad()
def test_published_weights_give_the_features_of_timm_itself(lite0, lite0_model, size):
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    weights = {n: w for n, w in load_file(f"{lite0}/model.safetensors").items() if not n.startswith("classifier.")}
    reference.load_state_dict(weights)
    pixels = inputs(size=size)["pixel_values"]
    features = nn.functional.normalize(lite0_model.visual_projection(reference(pixels)), dim=-1)
    torch.testing.assert_close(lite0_model(**inputs(size=size)).image_embeds, features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", TOWERS)
def test_a_step_reaches_every_weight(architecture):
    model = make_model(architecture).train()
    assert set(gradients(model, **inputs())) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("architecture", TOWERS)
@torch.no_grad()
def test_hidden_states_are_the_maps_of_the_stages(architecture):
    model = make_model(architecture)
    tower = model.vision_model.timm_model
    output = model(**inputs(), output_hidden_states=True).vision_model_output
    expected_last, expected = tower.forward_intermediates(inputs()["pixel_values"])
    torch.testing.assert_close(output.last_hidden_state, expected_last)
    assert [state.shape for state in output.hidden_states] == [state.shape for state in expected]
    assert all(
        state.ndim == 4 and torch.equal(state, e) for state, e in zip(output.hidden_states, expected, strict=True)
    )
    chosen = model(**inputs(), output_hidden_states=[1, -1]).vision_model_output.hidden_states
    assert [state is not None for state in chosen] == [i in (1, len(expected) - 1) for i in range(len(expected))]


@pytest.mark.parametrize("architecture", BATCH_NORM)
@torch.no_grad()
def test_saving_keeps_batch_statistics(architecture, tmp_path):
    model = make_model(architecture)
    statistics = {name for name, _ in model.vision_model.named_buffers() if "running_mean" in name}
    assert statistics and all(model.vision_model.get_buffer(name).any() for name in statistics)
    model.save_pretrained(tmp_path)
    for loaded in (GapClosedClipModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        found = loaded.state_dict()
        for name, tensor in (*model.named_buffers(), *model.state_dict().items()):
            assert torch.equal(tensor, found[name] if name in found else loaded.get_buffer(name)), name
        # Not bit for bit: where in memory a weight lies can change the order of a convolution's sums.
        expected, embeds = model(**inputs()).image_embeds, loaded.eval()(**inputs()).image_embeds
        torch.testing.assert_close(embeds, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_pipelines(tiny_processor):
    model = make_model()
    tokenizer, images = tiny_processor.tokenizer, tiny_processor.image_processor
    images = type(images)(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    parts = {"model": model, "tokenizer": tokenizer, "image_processor": images, "device": "cpu"}
    image, texts = noise_image(90, (90, 70)), ["chest radiograph", "brain"]
    found = pipeline("zero-shot-image-classification", **parts)(
        image, candidate_labels=texts, hypothesis_template="{}"
    )
    pixels = images(image, return_tensors="pt")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    expected = model(**pixels, **tokens).logits_per_image.softmax(-1)[0]
    scores = {hit["label"]: hit["score"] for hit in found}
    assert [scores[text] for text in texts] == pytest.approx(expected.tolist(), abs=1e-5)
    features = pipeline("image-feature-extraction", **parts)(image)
    assert features[0] == pytest.approx(model(**pixels).image_embeds[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("architecture", TOWERS)
def test_checkpointing_activations_changes_no_gradient(architecture):
    model = make_model(architecture)  # in eval mode: batch statistics would move twice
    expected = gradients(model, **inputs())
    checkpoint_activations(model)
    assert any(getattr(module, "grad_checkpointing", False) for module in model.vision_model.modules())
    found = gradients(model, **inputs())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", BATCH_NORM)
def test_micro_batches_are_exact_where_batch_statistics_stay(architecture):
    model = make_model(architecture)
    for module in model.vision_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    model.train()
    for part in (model.text_model, model.vision_model.timm_model):  # dropout aside
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    expected = gradients(model, **inputs(6))
    found = gradients(model, micro_batches=MicroBatches.split(inputs(6), 2))
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm().clamp(min=1e-3 * norm), name


def test_batch_statistics_move_where_their_layer_trains_and_nowhere_else():
    model = make_model()
    layers = {n: m for n, m in model.vision_model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    frozen = {name for i, name in enumerate(layers) if i % 2}
    for name in frozen:
        layers[name].requires_grad_(False)
    before = {name: layer.running_mean.clone() for name, layer in layers.items()}
    model.train().get_image_features(inputs()["pixel_values"])
    stayed = {name for name, layer in layers.items() if torch.equal(layer.running_mean, before[name])}
    assert stayed == frozen and len(frozen) > 5
    model.freeze_towers()
    assert all(layer.training for layer in layers.values())


def test_the_clip_head_of_a_convnext_is_kept(tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("convnext_atto", num_classes=20, **TOWERS["convnext_atto"]).eval()
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    description = {"architecture": "convnext_atto", "model_args": TOWERS["convnext_atto"], "num_classes": 20}
    description["model_type"] = "timm_wrapper"
    (tmp_path / "config.json").write_text(json.dumps(description))
    model = GapClosedClipModel.from_vision_text_pretrained(
        str(tmp_path), tiny_config().text_config, keep_vision_projection=True, center_projections=False
    ).eval()
    with torch.no_grad():
        pixels = inputs()["pixel_values"]
        features = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(features, published(pixels), rtol=0, atol=1e-6)


def test_a_classifier_is_no_clip_head(lite0):
    with pytest.raises(ValueError, match="has no head.weight in model.safetensors; use a CLIP"):
        GapClosedClipModel.from_vision_text_pretrained(lite0, tiny_config().text_config, keep_vision_projection=True)


@pytest.mark.parametrize("architecture", [*TOWERS, "lite0"])
def test_a_captioner_attends_to_the_places_of_the_map(architecture, tiny_processor, request):
    if architecture == "lite0":
        clip = request.getfixturevalue("lite0_model")
    else:
        clip = make_model(architecture)
    tokenizer = tiny_processor.tokenizer
    model = GapClosedClipForConditionalGeneration.from_clip(clip, tokenizer).eval()
    pixels = inputs(3, size=96)["pixel_values"]
    with torch.no_grad():
        memory, _ = model.encode(pixels)
        maps = clip.vision_model(pixels).last_hidden_state  # (3, C, 3, 3)
        assert maps.shape[2:] == (3, 3)
        place = model.memory.patch_norm(model.memory.patch_projection(maps[:, :, 1, 2]))
    number = model.config.decoder_embedding_tokens
    assert memory.shape[1] == number + 9
    torch.testing.assert_close(memory[:, number + 5], place)  # row 1, column 2
    labels = caption_labels(tokenizer, ["chest radiograph", "brain", "a stone"])
    model(pixel_values=pixels, labels=labels).loss.backward()
    assert model.generate(pixel_values=pixels, max_new_tokens=3).shape[0] == 3


def test_a_pooler_without_weights_stays_where_the_map_is_averaged_instead():
    """transformers' ResNet calls its pooler in any case."""
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = GapClosedClipModel(tiny_config(vision_config=vision, image_pooling="mean")).eval()
    inputs = tiny_inputs()
    tokens = model.vision_model(inputs["pixel_values"]).last_hidden_state  # (B, C, height, width)
    pooled = model.encode_image(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(pooled, tokens.mean((2, 3)))
    assert model.train()(**inputs).loss.isfinite()
