"""Adapters (peft) on the model itself, by every way peft and transformers offer, without help of the package."""

import copy
import re

import peft
import pytest
import torch
import transformers
from conftest import checkpoint_activations, tiny_config, tiny_inputs
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from gap_closed_clip import GapClosedClipModel, MicroBatches


SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
TOWERS = {
    "EVA-01": {"architecture": "eva_giant_patch14_clip_224", "model_args": {**SMALL, "mlp_ratio": 2.0}},
    "EVA-02 fused": {"architecture": "eva02_tiny_patch14_224", "model_args": SMALL},
    "EVA-02 split": {"architecture": "eva02_base_patch16_clip_224", "model_args": SMALL},
}
# Others whose attention can read its weights past the layer, or pools by attention.
RELATIVES = {
    "beit_base_patch16_224": SMALL,
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (1, 1),
        "num_heads": (2, 2),
    },
    "vit_base_patch16_siglip_224": SMALL,
}
ALL = {**TOWERS, **{name: {"architecture": name, "model_args": args} for name, args in RELATIVES.items()}}
PARTS = ["visual_projection", "text_projection", "visual_centering", "text_centering", "temperature"]


# 5.24 asks for peft 0.22 in the methods that add an adapter and switch it on and off, though not to load one.
switches_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} asks for peft {MIN_PEFT_VERSION}",
)
LOADS_WHOLE_MODULES = Version(transformers.__version__) >= Version("5.18")  # `modules_to_save`
loads_adapters = pytest.mark.skipif(
    not LOADS_WHOLE_MODULES, reason=f"transformers {transformers.__version__} leaves modules_to_save at random"
)


def make_model(vision: dict, **config) -> GapClosedClipModel:
    torch.manual_seed(0)
    vision_config = {"model_type": "timm_wrapper", **vision}
    return GapClosedClipModel(tiny_config(vision_config=vision_config, center_projections=True, **config))


def linear_layers(model: nn.Module) -> list[str]:
    """Of both towers."""
    modules = model.named_modules()
    return [n for n, module in modules if isinstance(module, nn.Linear) and n.startswith(("vision_", "text_model"))]


def peft_config(model: nn.Module, **kwargs) -> LoraConfig:
    return LoraConfig(r=2, target_modules=linear_layers(model), modules_to_save=PARTS, **kwargs)


def train_a_little(model: nn.Module, steps: int = 3, seed: int = 0) -> nn.Module:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny_inputs(6, seed=seed + step)).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def outputs_of(model: nn.Module) -> Tensor:
    """Embeddings and logits: the latter tell of the temperature."""
    model.eval()
    outputs = model(**tiny_inputs(5, seed=9))
    return torch.cat([x.flatten() for x in (outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image / 10)])


@pytest.fixture(scope="module", params=TOWERS)
def trained(request, tmp_path_factory):
    """Folder with `base` and `adapter`, the trained PeftModel, its outputs and those without adapter."""
    folder = tmp_path_factory.mktemp("trained")
    base = train_a_little(make_model(TOWERS[request.param]))
    base.save_pretrained(folder / "base")
    before = outputs_of(base)
    base = load_base(folder)
    model = get_peft_model(base, peft_config(base))
    train_a_little(model, seed=20)
    model.save_pretrained(folder / "adapter")
    return folder, model, outputs_of(model), before


def load_base(folder) -> GapClosedClipModel:
    return GapClosedClipModel.from_pretrained(folder / "base")


def assert_same_parts(found: nn.Module, expected: nn.Module) -> None:
    """Temperature and the statistics of the centering."""
    assert torch.equal(found.logit_scale, expected.logit_scale)
    for name in ("visual_centering", "text_centering"):
        for buffer in ("running_mean", "num_batches_tracked"):
            assert torch.equal(getattr(getattr(found, name), buffer), getattr(getattr(expected, name), buffer))


# --- no dead adapter


@pytest.mark.parametrize("vision", ALL.values(), ids=ALL)
def test_an_adapter_on_any_linear_layer_trains(vision):
    base = make_model(vision)
    model = get_peft_model(base, peft_config(base)).train()
    size = vision["model_args"]["img_size"]
    inputs = {**tiny_inputs(6), "pixel_values": torch.randn(6, 3, size, size)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first moves lora_B away from zero, which keeps the gradient of lora_A at zero
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(linear_layers(make_model(vision))) + 4 + 1
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
def test_calling_the_layer_changes_no_output(vision):
    model = make_model(vision).eval()
    attention = [module for module in model.vision_model.modules() if hasattr(module, "qkv_bias_separate")]
    assert all(module.qkv_bias_separate for module in attention)
    for module in attention:
        if module.q_bias is not None:
            nn.init.normal_(module.q_bias)
            nn.init.normal_(module.v_bias)
    called = outputs_of(model)
    for module in attention:
        module.qkv_bias_separate = False
    torch.testing.assert_close(outputs_of(model), called, rtol=0, atol=1e-6)


# --- each way in and out


def test_the_adapter_changes_the_output_and_can_be_switched_off(trained):
    _, model, expected, before = trained
    assert (expected - before).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs_of(model), before)
    assert torch.equal(outputs_of(model), expected)


def test_peft_model_from_pretrained(trained):
    folder, model, expected, _ = trained
    loaded = PeftModel.from_pretrained(load_base(folder), folder / "adapter")
    assert torch.equal(outputs_of(loaded), expected)
    assert_same_parts(loaded, model)


@pytest.mark.skipif(LOADS_WHOLE_MODULES, reason="transformers loads modules_to_save since 5.18")
def test_an_adapter_that_transformers_loads_in_part_is_refused(trained):
    folder = trained[0]
    for load in (load_base(folder).load_adapter, GapClosedClipModel.from_pretrained):
        with pytest.raises(RuntimeError, match=r"leaves 9 weights of the adapter out .* peft.PeftModel"):
            load(str(folder / "adapter"))


@loads_adapters
def test_load_adapter_of_transformers(trained):
    folder, model, expected, _ = trained
    loaded = load_base(folder)
    loaded.load_adapter(str(folder / "adapter"))
    assert torch.equal(outputs_of(loaded), expected)
    assert_same_parts(loaded, model)
    assert torch.equal(outputs_of(GapClosedClipModel.from_pretrained(folder / "adapter")), expected)


@pytest.mark.parametrize("name", ["default", "x"])  # "x" is also in the names of the text tower's weights
@pytest.mark.parametrize("dora", [False, True])
@loads_adapters
def test_load_adapter_gives_the_outputs_of_peft_or_says_what_does(trained, dora, name, tmp_path):
    base = load_base(trained[0])
    model = train_a_little(get_peft_model(base, peft_config(base, use_dora=dora)), seed=30)
    model.save_pretrained(tmp_path)
    expected = outputs_of(PeftModel.from_pretrained(load_base(trained[0]), tmp_path))
    assert torch.equal(expected, outputs_of(model))
    loaded = load_base(trained[0])
    try:
        loaded.load_adapter(str(tmp_path), adapter_name=name)
    except RuntimeError as error:
        number = len(linear_layers(load_base(trained[0])))
        message = rf"leaves {number} weights of the adapter out .*magnitude.*load_checkpoint"
        assert dora and re.search(message, str(error))
    else:
        assert torch.equal(outputs_of(loaded), expected)


@loads_adapters
def test_a_second_adapter_is_not_taken_for_a_part_of_the_first(trained):
    loaded = load_base(trained[0])
    for name in ("first", "second"):
        loaded.load_adapter(str(trained[0] / "adapter"), adapter_name=name)
    weights = loaded.state_dict()
    of_first = [name for name in weights if ".first" in name]
    assert len(of_first) == 2 * len(linear_layers(load_base(trained[0]))) + 9
    assert all(torch.equal(weights[name], weights[name.replace(".first", ".second")]) for name in of_first)


@loads_adapters
@switches_adapters
def test_adapters_are_switched_off_and_on_by_transformers(trained):
    folder, _, expected, before = trained
    loaded = load_base(folder)
    loaded.load_adapter(str(folder / "adapter"))
    loaded.disable_adapters()
    assert torch.equal(outputs_of(loaded), before)
    loaded.enable_adapters()
    assert torch.equal(outputs_of(loaded), expected)


@switches_adapters
def test_add_adapter_of_transformers(trained, tmp_path):
    folder, _, _, before = trained
    model = load_base(folder)
    model.add_adapter(peft_config(model))
    train_a_little(model)
    expected = outputs_of(model)
    assert (expected - before).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(PeftModel.from_pretrained(load_base(folder), tmp_path)), expected)
    if LOADS_WHOLE_MODULES:
        again = load_base(folder)
        again.load_adapter(str(tmp_path))
        assert torch.equal(outputs_of(again), expected)


def test_merged_is_the_same_model_and_a_plain_one(trained, tmp_path):
    _, model, expected, _ = trained
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is GapClosedClipModel
    torch.testing.assert_close(outputs_of(merged), expected, rtol=0, atol=1e-6)
    assert_same_parts(merged, model)
    merged.save_pretrained(tmp_path)
    reloaded, info = GapClosedClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs_of(reloaded), outputs_of(merged))


def test_several_adapters_on_one_base(trained, tmp_path):
    folder, model, expected, before = trained
    base = load_base(folder)
    other = train_a_little(get_peft_model(base, peft_config(base)), seed=40)
    other.save_pretrained(tmp_path)
    expected_other = outputs_of(other)
    both = PeftModel.from_pretrained(load_base(folder), folder / "adapter", adapter_name="first")
    both.load_adapter(tmp_path, "second")
    for name, outputs, source in (("second", expected_other, other), ("first", expected, model)):
        both.set_adapter(name)
        assert torch.equal(outputs_of(both), outputs)
        assert_same_parts(both, source)
    assert not torch.equal(expected, expected_other)
    with both.disable_adapter():
        assert torch.equal(outputs_of(both), before)


def test_training_moves_the_statistics_of_the_adapter_and_not_of_the_base(trained):
    folder, model, _, _ = trained
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = load_base(folder)
    assert weights["base_model.model.visual_centering.num_batches_tracked"] == 6
    assert base.visual_centering.num_batches_tracked == 3
    assert weights["base_model.model.temperature.logit_scale"] == model.logit_scale != base.logit_scale


# --- with other ways to train


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
def test_micro_batches_and_activation_checkpointing_give_the_same_gradients(vision):
    base = make_model(vision)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the masks would differ between parts and the whole
    model = get_peft_model(base, peft_config(base))
    train_a_little(model).train()
    inputs, parts = tiny_inputs(6), MicroBatches.split(tiny_inputs(6), 2)

    def run(**kwargs) -> dict[str, Tensor]:
        model.zero_grad()
        model(**kwargs).loss.backward()
        return gradients(model)

    plain, in_parts = run(**inputs), run(micro_batches=parts)
    checkpoint_activations(base)
    assert base.vision_model.timm_model.grad_checkpointing
    checkpointed, both = run(**inputs), run(micro_batches=parts)
    for found in (in_parts, checkpointed, both):
        for name, expected in plain.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_bfloat16():
    base = make_model(TOWERS["EVA-02 fused"])
    model = get_peft_model(base, peft_config(base)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**tiny_inputs(6)).loss
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert all(gradient.any() for name, gradient in gradients(model).items() if "lora_B" in name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compiled_training_is_one_graph_with_the_same_gradients(checkpointing):
    base = make_model(TOWERS["EVA-02 fused"])
    model = get_peft_model(base, peft_config(base)).train()
    if checkpointing:
        checkpoint_activations(base)

    def run(forward) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        forward(**tiny_inputs(6)).loss.backward()
        return gradients(model)

    plain = run(model)
    # aot_eager traces forward and backward without the minutes of C++ compilation
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), plain)


@pytest.mark.parametrize("modules_to_save", [None, ["visual_projection", "text_projection"], PARTS])
@pytest.mark.parametrize("target", [".*qkv", ".*query"])
def test_an_adapter_that_is_saved_and_loaded_is_the_same_model(tmp_path, modules_to_save, target):
    """Also one of a configuration that does not name the centering, whose running mean it would not save."""
    model = make_model(TOWERS["EVA-02 fused"])
    with torch.no_grad():
        model.train()(**tiny_inputs(seed=7))  # sets the running means
    model.save_pretrained(tmp_path / "base")
    base = model.eval()(**tiny_inputs()).image_embeds
    config = LoraConfig(r=2, target_modules=target, modules_to_save=modules_to_save)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        adapted(**tiny_inputs(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    fresh = GapClosedClipModel.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    for field in ("image_embeds", "text_embeds"):
        expected = adapted(**tiny_inputs())[field]
        torch.testing.assert_close(loaded(**tiny_inputs())[field], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded.merge_and_unload()(**tiny_inputs())[field], expected, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**tiny_inputs()).image_embeds, base, rtol=0, atol=1e-6)
