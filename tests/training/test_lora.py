"""The `lora:` section: its checks, the layers it names, the gradients that reach them."""

import re

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from modalities import modalities_config, modalities_inputs
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import DebertaConfig, DebertaV2Config

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.training import LoraArguments, add_adapters, build_peft_config, load_config
from gap_closed_clip.training.gradients import without_gradient
from gap_closed_clip.training.lora import METHODS


SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
ARCHITECTURES = ["eva_giant_patch14_clip_224", "eva02_tiny_patch14_224", "eva02_base_patch16_clip_224"]


def make_model(architecture: str = ARCHITECTURES[1], **config) -> GapClosedClipModel:
    torch.manual_seed(0)
    vision = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": SMALL}
    return GapClosedClipModel(tiny_config(**{"vision_config": vision, "center_projections": True, **config}))


# --- the peft configuration


@pytest.mark.parametrize(
    ("layers", "architecture", "expected"),
    [
        ("attention", ARCHITECTURES[0], {"attn.qkv", "attn.proj"}),
        ("attention", ARCHITECTURES[1], {"attn.qkv", "attn.proj"}),
        ("attention", ARCHITECTURES[2], {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj"}),
        ("mlp", ARCHITECTURES[0], {"mlp.fc1", "mlp.fc2"}),
        ("mlp", ARCHITECTURES[2], {"mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}),
    ],
)
def test_layers_by_name(layers, architecture, expected):
    model = make_model(architecture)
    add_adapters(model, LoraArguments(layers=layers), "somewhere", None)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    vision = {name.split("blocks.")[1][2:] for name in adapted if name.startswith("vision_model")}
    assert vision == expected
    text = {name.split("layer.0.")[1] for name in adapted if name.startswith("text_model")}
    if layers == "attention":
        parts = {"query", "key", "value"}
        assert text == {f"attention.self.{part}" for part in parts} | {"attention.output.dense"}
    else:
        assert text == {"intermediate.dense", "output.dense"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_are_the_linear_ones_and_never_the_patch_embedding_or_a_projection(architecture):
    model = make_model(architecture, projection_hidden_dim=20)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "projection" not in n}
    add_adapters(model, LoraArguments(layers="all"), "somewhere", None)
    assert {name for name, module in model.named_modules() if hasattr(module, "lora_A")} == linear


def test_a_modality_that_is_saved_whole_is_centered_by_its_batches(tmp_path):
    """The running mean that it started with stayed as it was, and was subtracted in training too."""
    torch.manual_seed(0)
    base = GapClosedClipModel(modalities_config(center_projections=True))
    base.save_pretrained(tmp_path / "base")
    wrapped = add_adapters(base, LoraArguments(), str(tmp_path / "base"), None, whole=["record"]).train()
    inputs = modalities_inputs()
    features = base.get_features(
        "record", **{k.removeprefix("record_"): v for k, v in inputs.items() if "record" in k}
    )
    torch.testing.assert_close(features.pooler_output.mean(0), torch.zeros(32), rtol=0, atol=1e-6)
    wrapped(**inputs)
    trained, audio = base.parts("record").centering, base.parts("audio").centering
    assert trained.num_batches_tracked == 2 and trained.running_mean.abs().max() > 0.01
    assert audio.num_batches_tracked == 1  # its centering alone is saved, with its projection
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(GapClosedClipModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected, found = wrapped.eval()(**inputs).embeds, loaded.eval()(**inputs).embeds
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_beside_a_modality_that_is_saved_whole(method):
    torch.manual_seed(0)
    model = GapClosedClipModel(modalities_config(center_projections=True))
    wrapped = add_adapters(model, LoraArguments(method=method), "somewhere", None, whole=["record"]).eval()
    with torch.no_grad():
        model.parts("record").projection.weight.mul_(2)
        expected = wrapped(**modalities_inputs()).embeds
        merged = wrapped.merge_and_unload().eval()
        for name, found in merged(**modalities_inputs()).embeds.items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-5)
    assert not any("adapter" in name or "modules_to_save" in name for name in merged.state_dict())


@pytest.mark.parametrize("architecture", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_attention_to_a_class_token_is_adapted_as_a_whole(architecture):
    with torch.device("meta"):
        model = make_model(vision_config={"model_type": "timm_wrapper", "architecture": architecture})
    pattern = build_peft_config(LoraArguments(towers=["vision"]), model).target_modules
    heads = {
        name for name, _ in model.named_modules() if re.search(r"(token_only|cls_attn_blocks)\.0\.attn\.\w$", name)
    }
    assert {name[-1] for name in heads} == {"q", "k", "v"} and all(re.fullmatch(pattern, name) for name in heads)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("family", [DebertaConfig, DebertaV2Config])
def test_the_attention_of_a_deberta_is_adapted_and_merged(family, relative):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    positions = {"relative_attention": relative, "pos_att_type": ["p2c", "c2p"]} if relative else {}
    model = make_model(text_config=family(**sizes, vocab_size=200, **positions))
    heads = {"in_proj"} if family is DebertaConfig else {"query_proj", "key_proj", "value_proj"}
    wrapped = add_adapters(model, LoraArguments(towers=["text"]), "somewhere", None)
    adapted = {name.split("attention.")[1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"output.dense", *(f"self.{head}" for head in heads)}
    wrapped.train()(**tiny_inputs()).loss.backward()
    assert not without_gradient(wrapped)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    expected = wrapped.eval()(**tiny_inputs()).text_embeds
    merged = wrapped.merge_and_unload().eval()
    torch.testing.assert_close(merged(**tiny_inputs()).text_embeds, expected, rtol=0, atol=1e-5)


# --- convolutional towers


MOBILENET = "mobilenetv3_small_050"


def make_convolutional(architecture: str = MOBILENET) -> GapClosedClipModel:
    """With the usual initial weights and statistics that are not those of a new layer."""
    torch.manual_seed(0)
    vision = {"model_type": "timm_wrapper", "architecture": architecture}
    model = GapClosedClipModel(tiny_config(vision_config=vision, center_projections=True))
    with torch.no_grad():
        for module in model.vision_model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        model.train().vision_model(torch.randn(8, 3, 64, 64))
    return model.eval()


def convolutional_inputs(n: int) -> dict[str, torch.Tensor]:
    return {**tiny_inputs(n), "pixel_values": torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(n))}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("tf_efficientnet_lite0", {"conv_pw", "conv_pwl", "conv_head"}),
        (MOBILENET, {"conv_pw", "conv_pwl", "se.conv_reduce", "se.conv_expand", "conv_head"}),
        ("resnet18", {"conv1", "conv2"}),
        ("resnet26", {"conv1", "conv2", "conv3"}),
        ("convnext_atto", {"mlp.fc1", "mlp.fc2"}),
    ],
)
def test_layers_of_a_convolutional_tower(architecture, expected):
    with torch.device("meta"):
        model = make_model(architecture, vision_config={"model_type": "timm_wrapper", "architecture": architecture})
    for layers in ("mlp", "all"):
        pattern = build_peft_config(LoraArguments(layers=layers), model).target_modules
        matched = [n for n, _ in model.named_modules() if n.startswith("vision") and re.fullmatch(pattern, n)]
        assert {re.sub(r".*\.\d+\.|.*timm_model\.", "", name) for name in matched} == expected
        assert all(model.get_submodule(name).groups == 1 for name in matched)
        assert not any(name.endswith("timm_model.conv1") for name in matched)  # the stem


def test_a_tower_without_attention_says_so():
    with pytest.raises(ValueError, match="It has no attention: lora.layers=mlp, or all, adapts its other"):
        add_adapters(make_convolutional(), LoraArguments(), "somewhere", None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_convolutions(method):
    # OFT's rank is a number of blocks: 8 of 8 channels would leave nothing to rotate.
    lora = LoraArguments(method=method, layers="all", **({"rank": 4} if method == "oft" else {}))
    if method == "vera":
        with pytest.raises(ValueError, match="lora.method='vera' does not fit the layers: Target module Conv2d"):
            add_adapters(make_convolutional(), lora, "somewhere", None)
        return
    model = add_adapters(make_convolutional(), lora, "somewhere", None)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running_" in name and "bn" in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        model.train()
        optimizer.zero_grad()
        model(**convolutional_inputs(6)).loss.backward()
        if step == 0:
            assert without_gradient(model) == []
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    # They are no part of the adapter, which would meet others where it is loaded.
    assert before and all(torch.equal(buffer, model.get_buffer(name)) for name, buffer in before.items())
    model.eval()
    with torch.no_grad():
        expected = model(**convolutional_inputs(4)).image_embeds
        merged = model.merge_and_unload()(**convolutional_inputs(4)).image_embeds
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_convolutions_loads(tmp_path):
    make_convolutional().save_pretrained(tmp_path / "base")
    model = add_adapters(make_convolutional(), LoraArguments(layers="all"), str(tmp_path / "base"), None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.train()(**convolutional_inputs(6))
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(GapClosedClipModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**convolutional_inputs(4)).image_embeds
        torch.testing.assert_close(loaded.eval()(**convolutional_inputs(4)).image_embeds, expected, rtol=0, atol=1e-6)


# --- the configuration, and what trains


def test_the_configuration_is_a_plain_one():
    model = make_model()
    lora = LoraArguments(rank=4, dropout=0.1, towers=["vision"], options={"use_rslora": True})
    config = build_peft_config(lora, model)
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert re.fullmatch(config.target_modules, "vision_model.timm_model.blocks.0.attn.proj")
    assert not re.fullmatch(config.target_modules, "text_model.encoder.layer.0.attention.self.query")
    parts = ["text_centering", "text_projection", "temperature", "visual_centering", "visual_projection"]
    assert sorted(config.modules_to_save) == sorted(parts)


@pytest.mark.parametrize("config", [{}, {"projection_hidden_dim": 24}])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_second_adapter_beside_the_first(method, config):
    """Its configuration is that of a model without adapters, and it trains without a change to the first."""
    lora = LoraArguments(layers="all", method=method)
    expected = build_peft_config(lora, make_model(**config))
    model = make_model(**config)
    adapted = add_adapters(model, lora, "somewhere", None)
    second = build_peft_config(lora, model)
    assert (second.target_modules, second.modules_to_save) == (expected.target_modules, expected.modules_to_save)
    first = adapted.eval()(**tiny_inputs()).image_embeds
    adapted.add_adapter("second", second)
    adapted.set_adapter("second")
    adapted.train()(**tiny_inputs()).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.grad is not None], lr=1.0).step()
    assert not torch.allclose(adapted.eval()(**tiny_inputs()).image_embeds, first)
    adapted.set_adapter("default")
    assert torch.equal(adapted(**tiny_inputs()).image_embeds, first)


def test_what_trains_beside_the_adapters():
    model = make_model()
    assert sorted(build_peft_config(LoraArguments(train=[]), model).modules_to_save) == [
        "text_centering",
        "visual_centering",
    ]
    fixed = make_model(learnable_temperature=False, center_projections=False)
    lora = LoraArguments(train=["temperature", "vision_model.timm_model.fc_norm"])
    assert build_peft_config(lora, fixed).modules_to_save == ["vision_model.timm_model.fc_norm"]
    wrapped = add_adapters(
        make_model().train(), LoraArguments(towers=["vision"], train=["projections"]), "somewhere", None
    )
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "_projection.modules_to_save" in name for name in trainable)
    assert not any("text_model" in name for name in trainable)
    model = wrapped.get_base_model()
    assert model.vision_model.training and not model.text_model.training  # frozen, so without dropout


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_merges(method):
    base = make_model(projection_hidden_dim=20)
    model = add_adapters(base, LoraArguments(method=method, layers="all"), "somewhere", None)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(3):
        optimizer.zero_grad()
        model(**tiny_inputs(6)).loss.backward()
        if step == 0:
            assert without_gradient(model) == []
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    model.eval()
    with torch.no_grad():
        expected = model(**tiny_inputs(4)).image_embeds
        torch.testing.assert_close(
            model.merge_and_unload()(**tiny_inputs(4)).image_embeds, expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.ranks=3"], "unknown key 'ranks' in section 'lora': did you mean 'rank'?"),
        (["lora.rank=0"], "lora.rank is 0: it is the adapters' inner dimension, 1 or more."),
        (["lora.alpha=0"], "lora.alpha is 0: use a number above 0"),
        (["lora.dropout=1"], "lora.dropout is 1: use a number from 0 to below 1."),
        (["lora.method=loar"], "lora.method: unknown method 'loar': did you mean 'lora'?"),
        (["towers=[visoin]"], "lora.towers: unknown tower 'visoin': did you mean 'vision'?"),
        (["towers=[]"], "lora.towers is empty: name vision, text or both."),
        (["lora.layers=attn("], r"lora.layers is 'attn\(', which is no regular expression"),
        (["lora.method=ia3", "lora.rank=4"], "lora.rank: the method 'ia3' has none. Leave it out."),
        (["lora.options={use_rslor: true}"], "LoraConfig has no 'use_rslor': did you mean 'use_rslora'?"),
        (["lora.options={target_modules: x}"], "lora.options: set lora.layers instead of target_modules."),
        (["lora.rank=4", "freeze_text=true"], "model.freeze_text is true and lora.towers has 'text'"),
    ],
)
def test_wrong_settings(words, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_config([], words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers": r"vision_model\..*\.qkv"},
            "matches no layer of the text tower. Its linear layers: e.g. text_model",
        ),
        ({"layers": ".*attn.*"}, r"also matches vision_model.*attn \(EvaAttention\), which takes no adapter"),
        ({"train": ["projection"]}, "lora.train: the model has no 'projection': did you mean 'projections'"),
        ({"options": {"layers_to_transform": [0]}}, "lora.options: LoraConfig refuses this: .*layers_to_transform"),
        (
            {"method": "ia3", "towers": ["text"], "layers": r".*\.word_embeddings"},
            "lora.method='ia3' does not fit the layers: .*Embedding",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(make_model(), LoraArguments(**settings), "somewhere", None)


def test_the_section_is_kept_and_absent_by_default(tmp_path):
    assert load_config([], []).lora is None and "lora" not in load_config([], []).to_dict()
    (tmp_path / "empty.yaml").write_text("lora: {}")
    config = load_config([tmp_path / "empty.yaml"])
    assert config.lora == LoraArguments()
    config.save(tmp_path / "again.yaml")
    assert load_config([tmp_path / "again.yaml"]) == config


# --- parameters that the loss does not reach


def make_dead(model: nn.Module) -> None:
    """timm's own way: the attention reads the weight of its layer and does not call it."""
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = False


def test_dead_adapters_are_found():
    model = add_adapters(make_model(), LoraArguments(), "somewhere", None).train()
    make_dead(model)
    model(**tiny_inputs(6)).loss.backward()
    missing = without_gradient(model)
    assert len(missing) == 4 and all(".attn.qkv.lora_" in name for name in missing)


def test_adapters_whose_gradients_are_all_zero_are_found():
    model = add_adapters(make_model(), LoraArguments(), "somewhere", None).train()
    model(**tiny_inputs(6)).loss.backward()
    assert without_gradient(model) == []  # although those of lora_A are zero in the first step
    layer = model.get_submodule("base_model.model.text_model.encoder.layer.0.attention.self.query")
    for parameter in layer.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    assert [name.rpartition("query.")[2] for name in without_gradient(model)] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"contrastive_weight": 0.0},
        {"uniformity_weight": 0.0, "align_weight": 0.0},
        {"contrastive_loss": "sigmoid", "contrastive_weight": 0.0, "learnable_temperature": False},
        {},
    ],
)
def test_full_fine_tuning_reaches_everything(config):
    model = GapClosedClipModel(tiny_config(**config)).train()
    model(**tiny_inputs(6)).loss.backward()
    assert without_gradient(model) == []
