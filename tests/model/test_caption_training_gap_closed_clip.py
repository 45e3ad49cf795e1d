"""The captioner in training: what its decoder attends to, freezing, the space's own objective beside the captions."""

import copy

import pytest
import torch
from conftest import CAPTIONS, caption_labels, captioner_of, checkpoint_activations, tiny_config, tiny_inputs
from torch.nn.functional import normalize
from transformers import TimmWrapperConfig

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.model.caption_outputs_gap_closed_clip import CACHE


ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 200,
    "max_position_embeddings": 66,
    "pad_token_id": 0,  # that of the tokenizer; positions begin at 1
}


@pytest.fixture
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


@pytest.fixture
def images():
    return tiny_inputs(4)["pixel_values"]


@pytest.fixture
def labels(tokenizer):
    return caption_labels(tokenizer, CAPTIONS[:4])


def unit(n, dim=32, seed=1):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def step(model, **inputs):
    """One step of training; gives the output before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model.train()(**inputs)
    output.loss.backward()
    optimizer.step()
    return output


def test_a_memory_of_the_embedding_is_that_of_whatever_was_embedded(tokenizer, images):
    model = captioner_of(tokenizer, decoder_memory="embedding", decoder_embedding_tokens=3)
    inputs = tiny_inputs()
    space = model.gap_closed_clip(**inputs)
    memory, embeds = model.encode(images)
    assert memory.shape == (4, 3, 48) and model.memory.patch_projection is None
    assert torch.equal(embeds, space.image_embeds)
    torch.testing.assert_close(model.encode(shared_embeds=space.image_embeds)[0], memory)
    by_hand = model.memory.embedding_projection(space.text_embeds * 32**0.5).view(4, 3, 48)
    texts = model.encode(shared_embeds=space.text_embeds)[0]
    torch.testing.assert_close(texts, model.memory.embedding_norm(by_hand))
    by_image = model.generate(images, max_new_tokens=7)
    assert torch.equal(model.generate(shared_embeds=space.image_embeds, max_new_tokens=7), by_image)
    assert (model.encode(shared_embeds=space.text_embeds)[0] - memory).abs().max() > 0.1


def test_a_memory_of_patches_by_hand(tokenizer, images):
    model = captioner_of(tokenizer)
    tower = model.gap_closed_clip.vision_model.timm_model
    patches = tower.forward_features(images)  # (B, P, width)
    expected = model.memory.patch_norm(model.memory.patch_projection(patches))
    memory = model.encode(images)[0]
    assert memory.shape == (4, 4 + patches.shape[1], 48)
    torch.testing.assert_close(memory[:, 4:], expected)
    output = model(images, input_ids=tiny_inputs()["input_ids"])
    assert torch.equal(output.encoder_hidden_states, memory) and torch.equal(
        output.shared_embeds, model.encode(images)[1]
    )


def test_what_to_write_from_is_checked(tokenizer, images, labels):
    model = captioner_of(tokenizer)
    with pytest.raises(ValueError, match='there is no image: give pixel_values. .*decoder_memory="embedding"'):
        model.generate(shared_embeds=unit(4))
    with pytest.raises(ValueError, match="one of them"):
        model(images, shared_embeds=unit(4), labels=labels)
    with pytest.raises(ValueError, match="neither input_ids nor labels"):
        model(images)
    of_embedding = captioner_of(tokenizer, decoder_memory="embedding", caption_objective_weight=1.0)
    with pytest.raises(ValueError, match="one of them"):
        of_embedding.generate()
    with pytest.raises(ValueError, match="caption_objective_weight is above 0.* give pixel_values"):
        of_embedding(shared_embeds=unit(4), labels=labels)


def test_noise_in_training_alone_and_as_long_as_documented(tokenizer):
    model = captioner_of(tokenizer, decoder_memory="embedding", embedding_noise=0.8)
    embeds, seen = unit(1).expand(4000, -1), []
    model.memory.embedding_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0] / 32**0.5))
    model.encode(shared_embeds=embeds)
    torch.testing.assert_close(seen[0], embeds)
    torch.manual_seed(0)
    model.train().encode(shared_embeds=embeds)
    torch.testing.assert_close(seen[1].norm(dim=1), torch.ones(4000))
    # Before normalising, x = e + n with E|n|^2 = 0.8^2: its part across e over that along it tells the length of n.
    along = (seen[1] * embeds).sum(1)
    across = (seen[1] - along[:, None] * embeds).square().sum(1) / along.square()
    torch.manual_seed(0)
    noise = torch.randn(4000, 32) * 0.8 / 32**0.5
    assert abs(float(noise.square().sum(1).mean().sqrt()) - 0.8) < 0.01
    torch.testing.assert_close(seen[1], normalize(embeds + noise))
    assert abs(float(along.mean()) - 1 / (1 + 0.8**2) ** 0.5) < 0.01 and across.mean() > 0.5


def test_the_shift_is_of_images_alone(tokenizer, images):
    model = captioner_of(tokenizer, decoder_memory="embedding")
    shift, embeds, (plain, own) = 0.3 * unit(1, seed=3)[0], unit(4), model.encode(images)
    of_texts = model.encode(shared_embeds=embeds)[0]
    model.set_image_shift(shift)
    shifted, still_own = model.encode(images)
    assert torch.equal(model.encode(shared_embeds=embeds)[0], of_texts) and torch.equal(still_own, own)
    torch.testing.assert_close(shifted, model.encode(shared_embeds=normalize(own + shift))[0])
    assert (shifted - plain).abs().max() > 1e-2
    model.set_image_shift(None)
    assert torch.equal(model.encode(images)[0], plain)


def test_a_frozen_encoder_stays_as_it_is(tokenizer, images, labels):
    model = captioner_of(tokenizer, center_projections=True)
    model.freeze_encoder()
    before = copy.deepcopy(model.gap_closed_clip.state_dict())
    step(model, pixel_values=images, labels=labels)
    assert model.training and model.decoder.training and model.memory.training
    assert not any(module.training for module in model.gap_closed_clip.modules())
    assert all(parameter.grad is None for parameter in model.gap_closed_clip.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.gap_closed_clip.state_dict().items())
    assert all(p.grad is not None for part in (model.decoder, model.memory) for p in part.parameters())
    model.freeze_encoder(False)
    assert model.gap_closed_clip.visual_centering.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    step(model, pixel_values=images, labels=labels)
    mean = model.gap_closed_clip.visual_centering.running_mean
    assert not torch.equal(mean, before["visual_centering.running_mean"])


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2]])
def test_the_objective_beside_the_captions(tokenizer, images, labels, groups):
    model = captioner_of(tokenizer, caption_objective_weight=0.7, label_smoothing=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    group_ids = None if groups is None else torch.tensor(groups)
    tokens = tokenizer(CAPTIONS[:4], padding=True, return_tensors="pt")
    alone = model.gap_closed_clip(images, tokens.input_ids, tokens.attention_mask, group_ids=group_ids)
    captions = model(images, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
    targets = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(captions[:, :-1].flatten(0, 1), targets)
    output = model.train()(images, labels=labels, group_ids=group_ids)
    torch.testing.assert_close(output.caption_loss, expected)
    torch.testing.assert_close(output.loss, expected + 0.7 * alone.loss)
    ungrouped = model(images, labels=labels).loss
    assert torch.equal(output.loss, ungrouped) if groups is None else output.loss < ungrouped - 1e-3
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given", ["labels", "input_ids", "inputs_embeds"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_captions_padded_on_the_left_train_the_same(tokenizer, images, labels, kind, given, attention):
    """The loss is that of the captions one by one, each without padding; logits stand where the tokens do."""
    text = dict(ROBERTA) if kind == "roberta" else tiny_config().text_config
    model = captioner_of(tokenizer, text_config=text, caption_objective_weight=0.5)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        alone = [model(images[row : row + 1], input_ids=labels[row : row + 1, labels[row] >= 0]) for row in range(4)]
    targets = [tokens[tokens >= 0] for tokens in labels]
    nats = [
        torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[1:], reduction="none")
        for output, tokens in zip(alone, targets, strict=True)
    ]
    found = {}
    for side in ("left", "right"):
        tokens = tokenizer(CAPTIONS[:4], padding=True, padding_side=side, return_tensors="pt")
        mask = tokens.attention_mask
        ids = {} if given == "labels" else {"input_ids": tokens.input_ids, "attention_mask": mask}
        if given == "inputs_embeds":
            ids["inputs_embeds"] = model.get_input_embeddings()(ids.pop("input_ids"))
        inputs = {"pixel_values": images, "labels": tokens.input_ids.masked_fill(mask == 0, -100), **ids}
        with torch.no_grad():
            output = model(**inputs)
        torch.testing.assert_close(output.caption_loss, torch.cat(nats).mean())
        for row in range(4):
            torch.testing.assert_close(output.logits[row, mask[row] > 0], alone[row].logits[0], rtol=1e-4, atol=1e-4)
        found[side] = gradients(model, **inputs)
    assert found["left"].keys() == found["right"].keys()
    for name, gradient in found["right"].items():
        torch.testing.assert_close(found["left"][name], gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_caption_begun_in_a_cache_goes_on_behind_its_padding(tokenizer, images):
    """Without positions from outside, as `generate` gives them."""
    model = captioner_of(tokenizer)
    tokens = tokenizer(CAPTIONS[:4], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    alone = [model(images[row : row + 1], input_ids=ids[row : row + 1, mask[row] > 0]).logits[0] for row in range(4)]
    begun = model(images, input_ids=ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
    memory = {"encoder_hidden_states": begun.encoder_hidden_states, "cache": getattr(begun, CACHE)}
    ended = model(input_ids=ids[:, -2:], attention_mask=mask, **memory).logits
    torch.testing.assert_close(ended, torch.stack([logits[-2:] for logits in alone]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_whose_labels_are_left_out_is_what_the_rest_is_predicted_from(tokenizer, images):
    model = captioner_of(tokenizer)
    tokens = tokenizer(CAPTIONS[:4], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    labels = torch.cat([torch.full_like(ids[:, :-3], -100), ids[:, -3:]], dim=1)
    output = model(images, input_ids=ids, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, -4:-1].flatten(0, 1), ids[:, -3:].flatten())
    torch.testing.assert_close(output.loss, expected)


def gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_checkpointing_changes_no_gradient(tokenizer, images, labels):
    model = captioner_of(tokenizer, caption_objective_weight=0.5).train()
    plain = gradients(model, pixel_values=images, labels=labels)
    checkpoint_activations(model)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert any(module in layers for module in model.decoder.modules())
    assert model.gap_closed_clip.vision_model.timm_model.grad_checkpointing
    again = gradients(model, pixel_values=images, labels=labels)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)
    checkpoint_activations(model, enable=False)
    assert not model.gap_closed_clip.vision_model.timm_model.grad_checkpointing


def test_a_convolutional_tower(tokenizer, labels):
    vision = TimmWrapperConfig(architecture="test_resnet", model_args={"in_chans": 3})
    model = captioner_of(tokenizer, vision_config=vision)
    pixel_values = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    feature_map = model.gap_closed_clip.vision_model.timm_model.forward_features(pixel_values)  # (B, C, h, w)
    memory = model.encode(pixel_values)[0]
    assert memory.shape[1] == 4 + feature_map.shape[2] * feature_map.shape[3]
    first = model.memory.patch_norm(model.memory.patch_projection(feature_map[:, :, 0, 1]))
    torch.testing.assert_close(memory[:, 5], first)
    assert model.generate(pixel_values, max_new_tokens=4).shape == (4, 5)
    step(model, pixel_values=pixel_values, labels=labels)


def test_fields_of_the_config_are_checked():
    for field, wrong in {
        "decoder_embedding_tokens": 0,
        "embedding_noise": -0.1,
        "label_smoothing": 1.0,
        "caption_objective_weight": float("inf"),
    }.items():
        with pytest.raises(ValueError, match=f"{field} is {wrong}"):
            tiny_config(**{field: wrong})


def test_without_a_decoder_config_it_has_the_text_towers_shape():
    model = GapClosedClipForConditionalGeneration(tiny_config())
    assert model.config.decoder_config.hidden_size == 48 and model.config.decoder_config.is_decoder
    assert not getattr(model.config.text_config, "is_decoder", False)
    assert isinstance(model.base_model, GapClosedClipModel)
