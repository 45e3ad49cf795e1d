"""The model: embeddings, loss, saving and loading, freezing, checkpointing, autocast, compile."""

import logging
import pydoc
import re
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_SIZE, checkpoint_activations, tiny_config, tiny_inputs
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, BertConfig, TimmWrapperConfig
from transformers.utils.logging import warning_once

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel, gap_closed_loss
from gap_closed_clip.model.projection_gap_closed_clip import ProjectionCentering
from gap_closed_clip.training import TrainingProgressCallback


def embeds(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.image_embeds, output.text_embeds


def assert_same_embeddings(a, b, inputs):
    for x, y in zip(embeds(a, inputs), embeds(b, inputs), strict=True):
        assert torch.equal(x, y)


def test_forward_equals_the_towers_put_together_by_hand(tiny_model):
    inputs, model = tiny_inputs(), tiny_model.eval()
    text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        output = model(**inputs)
        vision, text = model.vision_model.timm_model, model.text_model
        image = normalize(
            model.visual_projection(vision.forward_head(vision.forward_features(inputs["pixel_values"])))
        )
        caption = normalize(model.text_projection(text(**text_inputs).last_hidden_state[:, 0]))
    torch.testing.assert_close(output.image_embeds, image)
    torch.testing.assert_close(output.text_embeds, caption)
    torch.testing.assert_close(output.logits_per_image, image @ caption.T / 0.07)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    expected = gap_closed_loss([image, caption], torch.tensor(1 / 0.07))
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.loss == output.contrastive_loss + output.align_loss + output.uniformity_loss


def test_text_pooling():
    inputs = tiny_inputs()
    text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    for pooling in ("mean", "pooler"):
        model = GapClosedClipModel(tiny_config(text_pooling=pooling)).eval()
        with torch.no_grad():
            outputs = model.text_model(**text_inputs)
            if pooling == "mean":
                rows = zip(outputs.last_hidden_state, inputs["attention_mask"], strict=True)
                pooled = torch.stack([hidden[mask.bool()].mean(0) for hidden, mask in rows])
            else:
                pooled = outputs.pooler_output
            expected = normalize(model.text_projection(pooled))
            torch.testing.assert_close(model(**text_inputs).text_embeds, expected)


def test_texts_pooled_before_give_the_same(tiny_model):
    inputs = tiny_inputs()
    expected = tiny_model.eval()(**inputs)
    pixel_values = inputs.pop("pixel_values")
    pooled = tiny_model.encode_text(**inputs).pooler_output
    output = tiny_model(pixel_values, pooled_text=pooled)
    assert torch.equal(output.text_embeds, expected.text_embeds) and output.loss == expected.loss


def test_one_modality_alone_comes_first_in_the_output(tiny_model):
    inputs = tiny_inputs()
    image, text = embeds(tiny_model, inputs)
    with torch.no_grad():
        assert torch.equal(tiny_model(inputs["pixel_values"])[0], image)
        alone = tiny_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(alone[0], text)
    assert alone.loss is None and alone.image_embeds is None
    with pytest.raises(ValueError, match="none of pixel_values, input_ids: give images"):
        tiny_model()


def test_hidden_states_by_argument_by_config_and_by_index():
    config = tiny_config()
    config.text_config.num_hidden_layers, config.vision_config.model_args["depth"] = 3, 2
    model, inputs = GapClosedClipModel(config).eval(), tiny_inputs()
    with torch.no_grad():
        nothing = model(**inputs)
        everything = model(**inputs, output_hidden_states=True)
        # 3 is beyond the image tower
        some = model(**inputs, output_hidden_states=[0, 3])
        last = model(**inputs, output_hidden_states=[-1])
        for tower in (model.config.vision_config, model.config.text_config):
            tower.output_hidden_states = True
        by_config = model(**inputs)
    for name, n, kept in (("vision_model_output", 2, [0]), ("text_model_output", 4, [0, 3])):
        states = everything[name].hidden_states
        assert nothing[name].hidden_states is None and len(states) == len(by_config[name].hidden_states) == n
        assert [i for i, state in enumerate(some[name].hidden_states) if state is not None] == kept
        assert torch.equal(some[name].hidden_states[0], states[0])
        assert [state is None for state in last[name].hidden_states] == [True] * (n - 1) + [False]


def test_different_numbers_at_inference_and_in_training(tiny_model):
    inputs = tiny_inputs(4) | {"pixel_values": tiny_inputs(3)["pixel_values"]}
    output = tiny_model.eval()(**inputs)
    assert output.loss is None and output.logits_per_image.shape == (3, 4)
    with pytest.raises(ValueError, match="3 images and 4 texts"):
        tiny_model.train()(**inputs)


def test_group_ids_reach_the_loss_unless_masking_is_off(tiny_model):
    inputs, ids = tiny_inputs(), torch.tensor([[0, 0], [1, 0], [2, 1], [3, 2]])
    output = tiny_model.eval()(**inputs, group_ids=ids)
    expected = gap_closed_loss([output.image_embeds, output.text_embeds], torch.tensor(1 / 0.07), ids)
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.group_ids, ids)
    plain = tiny_model(**inputs).loss
    assert not torch.isclose(plain, output.loss)
    tiny_model.config.mask_groups = False
    assert tiny_model(**inputs, group_ids=ids).loss == plain


def test_weights_follow_training_progress():
    config = tiny_config(align_weight=[[0.2, 1.0], [0.7, 2.0]], uniformity_weight=[[0.2, 1.0], [0.7, 0.0]])
    model, inputs = GapClosedClipModel(config).eval(), tiny_inputs()
    model.set_training_progress(0.45)
    output = model(**inputs)
    expected = output.contrastive_loss + 1.5 * output.align_loss + 0.5 * output.uniformity_loss
    torch.testing.assert_close(output.loss, expected)


def test_a_schedule_that_nothing_drives_is_warned_of(caplog):
    model = GapClosedClipModel(tiny_config(align_weight=[[0.0, 1.0], [1.0, 2.0]])).train()
    warning_once.cache_clear()  # another test may have been warned of the same
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model(**tiny_inputs())
    finally:
        logger.removeHandler(caplog.handler)
    name = re.search(r"Give the Trainer ([\w.]+)\(\)", caplog.text)[1]
    assert pydoc.locate(name) is TrainingProgressCallback and callable(model.set_training_progress)


def test_learnable_scale_is_capped_and_comes_back_from_the_cap():
    model = GapClosedClipModel(tiny_config(logit_scale_init_value=4.0)).train()
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    output = model(**tiny_inputs())
    cosines = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, 100 * cosines)
    output.loss.backward()
    assert model.logit_scale.grad != 0
    fixed = GapClosedClipModel(tiny_config(learnable_temperature=False))
    assert not fixed.logit_scale.requires_grad


def test_centering_uses_the_batch_in_training_and_running_statistics_after():
    centering = ProjectionCentering(32, momentum=0.4).train()
    batches = [torch.randn(6, 32) for _ in range(4)]
    for x in batches:
        torch.testing.assert_close(centering(x), x - x.mean(0))
    first, second, third, fourth = (x.mean(0) for x in batches)
    plain = (first + second) / 2  # 1/1 and 1/2 are above the momentum, 1/3 is not
    expected = 0.6 * (0.6 * plain + 0.4 * third) + 0.4 * fourth
    torch.testing.assert_close(centering.running_mean, expected)
    torch.testing.assert_close(centering.eval()(batches[0]), batches[0] - expected)
    torch.testing.assert_close(centering.running_mean, expected)


def test_gradient_goes_through_the_batch_mean():
    gradient = torch.autograd.functional.jacobian(ProjectionCentering(2, 0.1).train(), torch.zeros(2, 2))
    by_hand = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])  # d(x_i - mean)/dx_j
    torch.testing.assert_close(gradient[:, 0, :, 0], by_hand)


@pytest.mark.parametrize(
    "kwargs", [{}, {"center_projections": True, "projection_hidden_dim": 40, "text_pooling": "mean"}]
)
def test_save_and_load_is_exact(tmp_path, kwargs):
    model, inputs = GapClosedClipModel(tiny_config(**kwargs)), tiny_inputs()
    model.train()(**inputs)  # running statistics away from zero
    model.set_training_progress(0.375)
    with torch.no_grad():
        model.logit_scale.fill_(3.21)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").exists()
    for loaded in (GapClosedClipModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is GapClosedClipModel
        assert_same_embeddings(model, loaded, inputs)
        assert torch.equal(loaded.logit_scale, model.logit_scale)
        assert loaded.training_progress == 0.375
        assert loaded.config.center_projections == model.config.center_projections


def test_embeddings_of_a_new_process_are_bit_identical(tmp_path, tiny_model):
    inputs = tiny_inputs()
    tiny_model.save_pretrained(tmp_path)
    save_file(dict(zip(("image", "text"), embeds(tiny_model, inputs), strict=True)), tmp_path / "expected.safetensors")
    save_file(inputs, tmp_path / "inputs.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
from gap_closed_clip import GapClosedClipModel
torch.set_num_threads(1)
folder = sys.argv[1]
with torch.no_grad():
    output = GapClosedClipModel.from_pretrained(folder).eval()(**load_file(folder + "/inputs.safetensors"))
expected = load_file(folder + "/expected.safetensors")
assert torch.equal(output.image_embeds, expected["image"]) and torch.equal(output.text_embeds, expected["text"])
print("bit-identical")
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "bit-identical" in result.stdout, result.stderr


def test_config_round_trip_and_defaults(tmp_path):
    config = tiny_config(align_weight=[[0.5, 1.0], [1.0, 2.0]], center_projections=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GapClosedClipConfig and loaded.align_weight == config.align_weight
    assert loaded.vision_config.model_args == config.vision_config.model_args
    bare = GapClosedClipConfig()
    assert isinstance(bare.vision_config, TimmWrapperConfig) and isinstance(bare.text_config, BertConfig)
    assert bare.projection_dim == 512 and bare.logit_scale_init_value == pytest.approx(2.6592, abs=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"align_weight": -1}, "align_weight is -1"),
        ({"align_weight": "2"}, "align_weight is '2'"),
        ({"uniformity_weight": [[0.7, 1], [0.2, 0]]}, "rise strictly"),
        ({"contrastive_weight": [[0, 1], [2, 0]]}, "between 0 and 1"),
        ({"text_pooling": "max"}, "text_pooling is 'max'"),
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"logit_scale_init_value": 14.3}, "log of the scale"),
        ({"centering_momentum": 0.0}, "centering_momentum is 0"),
        ({"hypothesis_template": "Radiology image."}, "hypothesis_template is 'Radiology image.': it holds {} once"),
        ({"vision_config": {"architecture": "eva02_tiny_patch14_224"}}, "vision_config has no model_type"),
    ],
)
def test_wrong_configs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GapClosedClipConfig(**kwargs)


def test_too_long_texts_name_the_limit(tiny_model):
    tiny_model(input_ids=torch.ones(1, 64, dtype=torch.int64))
    message = "65 tokens long, the text tower takes 64 at most: tokenize with truncation=True .* = 64.$"
    with pytest.raises(ValueError, match=message) as raised:
        tiny_model(input_ids=torch.ones(1, 65, dtype=torch.int64))
    assert "max_length=" not in str(raised.value)  # that would cut texts elsewhere than the tokenizer's own limit


def test_wrong_image_size_names_both_sizes(tiny_model):
    with pytest.raises(ValueError, match=rf"30 x 30 pixels, the image tower takes {IMAGE_SIZE} x {IMAGE_SIZE}"):
        tiny_model(torch.randn(1, 3, 30, 30))
    vision = dict(tiny_config().vision_config.to_dict())
    vision["model_args"] = vision["model_args"] | {"dynamic_img_size": True}
    dynamic = GapClosedClipModel(tiny_config(vision_config=vision)).eval()
    assert dynamic(torch.randn(1, 3, 42, 42)).image_embeds.shape == (1, 32)


def test_frozen_towers_get_no_gradient_and_stay_in_eval_mode(tiny_model):
    tiny_model.freeze_towers(vision=True, text=False)
    tiny_model.train()
    assert not tiny_model.vision_model.training and tiny_model.text_model.training
    tiny_model(**tiny_inputs()).loss.backward()
    assert all(parameter.grad is None for parameter in tiny_model.vision_model.parameters())
    assert all(parameter.grad is not None for parameter in tiny_model.text_model.parameters())
    assert tiny_model.visual_projection.weight.grad.abs().sum() > 0


def test_every_parameter_gets_a_gradient(tiny_model):
    tiny_model.train()(**tiny_inputs()).loss.backward()
    assert [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None] == []


def test_checkpointing_reaches_both_towers_and_keeps_the_gradients(tiny_model):
    inputs = tiny_inputs()

    def gradients():
        torch.manual_seed(0)
        tiny_model.zero_grad()
        tiny_model.train()(**inputs).loss.backward()
        return [parameter.grad.clone() for parameter in tiny_model.parameters()]

    plain = gradients()
    tiny_model._set_gradient_checkpointing(True)
    assert tiny_model.vision_model.timm_model.grad_checkpointing
    tiny_model._set_gradient_checkpointing(False)
    checkpoint_activations(tiny_model)
    assert tiny_model.vision_model.timm_model.grad_checkpointing
    assert all(layer.gradient_checkpointing for layer in tiny_model.text_model.encoder.layer)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    checkpoint_activations(tiny_model, enable=False)
    assert not tiny_model.vision_model.timm_model.grad_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tiny_model, dtype):
    inputs = tiny_inputs()
    with torch.autocast("cpu", dtype):
        output = tiny_model.train()(**inputs)
    output.loss.backward()
    assert output.image_embeds.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(4), rtol=1e-6, atol=1e-6)
    assert all(p.grad.isfinite().all() for p in tiny_model.parameters())


def test_a_bfloat16_model_gives_float32_unit_vectors(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    model = GapClosedClipModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    image, text = embeds(model, tiny_inputs())
    assert image.dtype == text.dtype == torch.float32
    assert torch.isfinite(model(**tiny_inputs()).loss)


def test_compiled_forward_is_one_graph_with_the_same_loss(tiny_model):
    inputs = tiny_inputs()
    plain = tiny_model.eval()(**inputs).loss
    # aot_eager traces forward and backward without the minutes of C++ compilation
    compiled = torch.compile(tiny_model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, plain)
    tiny_model.train()
    compiled(**inputs).loss.backward()


def test_device_map_auto(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    placed = GapClosedClipModel.from_pretrained(tmp_path, device_map="auto")
    inputs = tiny_inputs()
    found = embeds(placed, {name: tensor.to(placed.device) for name, tensor in inputs.items()})
    tolerance = {"rtol": 0, "atol": 0} if placed.device.type == "cpu" else {}
    for x, y in zip(embeds(tiny_model, inputs), found, strict=True):
        torch.testing.assert_close(y.cpu(), x, **tolerance)


def test_dropout_of_the_projections_is_of_training_alone_and_renames_no_weight():
    plain = GapClosedClipModel(tiny_config(projection_hidden_dim=40))
    dropped = GapClosedClipModel(tiny_config(projection_hidden_dim=40, projection_dropout=0.5))
    assert list(dropped.state_dict()) == list(plain.state_dict())
    assert {"visual_projection.0.weight", "visual_projection.2.weight"} <= set(plain.state_dict())
    dropped.load_state_dict(plain.state_dict())
    pooled = torch.randn(6, 48)
    torch.testing.assert_close(
        dropped.eval().text_projection(pooled), plain.eval().text_projection(pooled), rtol=0, atol=0
    )
    hidden = torch.nn.functional.gelu(dropped.text_projection[0](pooled))
    kept = dropped.train().text_projection[1](dropped.text_projection[0](pooled))
    torch.testing.assert_close(kept[kept != 0], 2 * hidden[kept != 0])
    assert 0.2 < (kept == 0).float().mean() < 0.8


@pytest.mark.parametrize("dropout, hidden", [(1.0, 40), (-0.1, 40), (0.1, None)])
def test_a_dropout_that_cannot_be_is_refused(dropout, hidden):
    with pytest.raises(ValueError, match="projection_dropout"):
        tiny_config(projection_hidden_dim=hidden, projection_dropout=dropout)
