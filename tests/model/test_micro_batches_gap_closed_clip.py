"""A large batch in micro-batches: same embeddings and gradients, but only one micro-batch's activations in memory."""

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, TimmWrapperConfig

import gap_closed_clip.model.micro_batches_gap_closed_clip as micro_batches_module
from gap_closed_clip import GapClosedClipModel, MicroBatches
from gap_closed_clip.model.losses_gap_closed_clip import TILED_FROM


BATCH, MICRO_BATCH = 10, 3  # the last micro-batch is smaller
TERMS = ("loss", "contrastive_loss", "align_loss", "uniformity_loss")


def noisy_model(dropout: float = 0.2, **kwargs) -> GapClosedClipModel:
    """A model with dropout in the text tower, and with dropout and drop-path in the image tower."""
    config = tiny_config(**kwargs)
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    vision["model_args"] |= {"depth": 2, "drop_path_rate": dropout, "proj_drop_rate": dropout}
    text |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(1)
    towers = {"vision_config": TimmWrapperConfig(**vision), "text_config": BertConfig(**text)}
    return GapClosedClipModel(tiny_config(**towers, **kwargs)).train()


def inputs_with_groups() -> dict[str, torch.Tensor]:
    return tiny_inputs(BATCH, seed=3) | {"group_ids": torch.arange(BATCH) // 2}


def with_lora(model):
    for block in model.vision_model.timm_model.blocks:
        block.attn.qkv_bias_separate = True  # otherwise adapters of the fused qkv layer get no gradient
    return get_peft_model(model, LoraConfig(target_modules=["qkv", "query", "value"], lora_dropout=0.3))


def step(model, **inputs):
    """The output and the gradients by name of one step, always from the same random state."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance=1e-5):
    for name in (*TERMS, "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[0][name], expected[0][name], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    total_norm = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        # The floor is for gradients that are zero but for rounding, because attention or centering cancels them out.
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * total_norm)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("centered", [False, True])
def test_without_dropout_a_step_is_that_of_the_whole_batch(centered):
    """In float64, since centering leaves of some gradients nothing but rounding."""
    model, same_model = (noisy_model(dropout=0.0, center_projections=centered).double() for _ in range(2))
    inputs = inputs_with_groups()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    found = step(model, micro_batches=MicroBatches.split(inputs, MICRO_BATCH))
    assert_same_step(found, step(same_model, **inputs), tolerance=1e-11)
    # The running means have seen the whole batch, once.
    means, expected = (
        {name: buffer for name, buffer in each.named_buffers() if "centering" in name} for each in (model, same_model)
    )
    assert len(means) == (4 if centered else 0)
    for name, mean in means.items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_with_dropout_the_gradients_are_those_of_keeping_all_activations(lora, precision, monkeypatch):
    """The reference encodes the same micro-batches in the same order, and recomputes nothing in the backward pass."""
    model = noisy_model(center_projections=True)
    model = with_lora(model) if lora else model
    micro_batches = MicroBatches.split(inputs_with_groups(), MICRO_BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        found = step(model, micro_batches=micro_batches)
        monkeypatch.setattr(micro_batches_module, "checkpoint", lambda run, *args, use_reentrant: run(*args))
        expected = step(model, micro_batches=micro_batches)
        torch.manual_seed(8)
        with_other_masks = model(micro_batches=micro_batches)
    assert_same_step(found, expected)
    assert (with_other_masks.loss - expected[0].loss).abs() > 1e-3  # the masks do matter
    if lora:
        adapters = [name for name in found[1] if "lora_B" in name]
        assert len(adapters) == 4 and all(found[1][name].norm() > 0 for name in adapters)


def test_the_backward_pass_leaves_the_random_state_as_it_was():
    model, micro_batches = noisy_model(), MicroBatches.split(inputs_with_groups(), MICRO_BATCH)
    torch.manual_seed(7)
    loss = model(micro_batches=micro_batches).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_only_features_are_kept_for_the_backward_pass():
    model = noisy_model()
    kept = {}

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    sizes = []
    for batch in (8, 32):
        kept.clear()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        micro_batches = MicroBatches.split(tiny_inputs(batch), 4)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(micro_batches=micro_batches)
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in weights))
    # Features, unit vectors, centroids, ... of 32 floats each, and N x N matrices, but no activations of the towers.
    assert sizes[1] - sizes[0] < 24 * 4 * (20 * 32 + 20 * 32)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        kept.clear()
        model(**tiny_inputs(32))
    assert sum(kept.values()) > 10 * sizes[1]


@pytest.mark.parametrize("pooled_image", [False, True])
def test_micro_batches_of_pooled_features_at_inference(pooled_image):
    model, inputs = noisy_model().eval(), tiny_inputs(BATCH)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = model(**inputs)
        pooled = model.encode_text(**text).pooler_output
        images = {"pixel_values": inputs["pixel_values"]}
        if pooled_image:
            images = {"pooled_image": model.vision_model(inputs["pixel_values"]).pooler_output}
        inputs = {**images, "pooled_text": pooled}
        output = model(micro_batches=MicroBatches.split(inputs, MICRO_BATCH))
    for name in ("loss", "image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(output[name], expected[name], rtol=1e-5, atol=1e-5)


def test_micro_batches_may_differ_in_text_length():
    model, inputs = noisy_model().eval(), tiny_inputs(4)
    first = {name: value[:2, :5] if value.ndim == 2 else value[:2] for name, value in inputs.items()}
    second = {name: value[2:] for name, value in inputs.items()}
    output = model(micro_batches=MicroBatches([first, second]))
    torch.testing.assert_close(output.text_embeds[:2], model(**first).text_embeds)
    torch.testing.assert_close(output.text_embeds[2:], model(**second).text_embeds)


def test_large_batches_have_no_logits_in_training(monkeypatch):
    monkeypatch.setattr("gap_closed_clip.model.objective_gap_closed_clip.TILED_FROM", BATCH)
    model, inputs = noisy_model(), tiny_inputs(BATCH)
    assert TILED_FROM > BATCH
    assert model(**inputs).logits_per_image is None and model(**inputs).loss is not None
    assert model(**tiny_inputs(BATCH - 1)).logits_per_image.shape == (BATCH - 1, BATCH - 1)
    assert model.eval()(**inputs).logits_per_image.shape == (BATCH, BATCH)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "one micro-batch or more.*none"),
        ([{"pixel_values": 1, "input_ids": 2}, {"pixel_values": 1}], "input_ids, pixel_values; pixel_values"),
    ],
)
def test_micro_batches_without_the_same_inputs(batches, message):
    with pytest.raises(ValueError, match=message):
        MicroBatches(batches)


def test_micro_batches_of_one_modality():
    with pytest.raises(ValueError, match="micro_batches hold input_ids: give both pixel_values and input_ids"):
        noisy_model()(micro_batches=MicroBatches([{"input_ids": torch.ones(2, 4, dtype=torch.int64)}]))
