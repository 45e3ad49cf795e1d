"""The `lora:` section, from its checks to an adapter folder that evaluates and resumes."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config, tiny_inputs
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_run import NO_MORE, TINY
from torch import nn

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import load_pairs
from gap_closed_clip.evaluation import evaluate_model, read_metrics
from gap_closed_clip.training import LoraArguments, add_adapters, build_peft_config, load_config, train
from gap_closed_clip.training.gradients import without_gradient
from gap_closed_clip.training.lora import METHODS


SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
ARCHITECTURES = ["eva_giant_patch14_clip_224", "eva02_tiny_patch14_224", "eva02_base_patch16_clip_224"]
LORA = ["lora.rank=2", "lora.layers=all", "lora.dropout=0.1"]


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


# --- train.py


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A trained model to put adapters on."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    train(load_config([tiny], [f"output_dir={folder}", *NO_MORE]))
    return folder


@pytest.fixture(scope="module")
def from_whole(tiny, whole):
    """from_whole(folder, "seed=3", ...): the tiny run with adapters on `whole`."""
    towers = [f"checkpoint={whole}", "vision=null", "text=null"]
    return lambda folder, *words: load_config([tiny], [*towers, f"output_dir={folder}", *LORA, *words])


@pytest.fixture(scope="module")
def finished(from_whole, tmp_path_factory):
    """Folder, configuration and result of a run with adapters."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = from_whole(folder)
    return folder, config, train(config)


def tensors_of(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def test_the_folder_holds_the_adapter_and_no_copy_of_the_model(finished, whole):
    folder, config, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"}
    assert names >= {"train_config.yaml", "run.json", "metrics.json", "projection.png"}
    assert not names & {"config.json", "model.safetensors", "base", "training_args.bin"}
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(whole) and adapter["revision"] is None
    assert load_config([folder / "train_config.yaml"]) == config


def test_the_adapter_evaluates_as_it_did_after_training(finished):
    folder, config, result = finished
    assert read_metrics(folder / "metrics.json")["run"] == pytest.approx(result.metrics, nan_ok=True)
    model, processor = load_checkpoint(folder)
    assert type(model) is GapClosedClipModel
    again = evaluate_model(model, processor, load_pairs(config.data, "test"), batch_size=8)
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True, abs=1e-5)


def test_peft_and_transformers_load_the_adapter(finished, whole):
    folder, _, _ = finished
    expected = load_checkpoint(folder)[0]
    weights = tensors_of(folder)
    by_peft = PeftModel.from_pretrained(GapClosedClipModel.from_pretrained(whole), folder)
    if Version(transformers.__version__) < Version("5.18"):
        with pytest.raises(RuntimeError, match="use transformers 5.18 or newer, or load the adapter with peft"):
            GapClosedClipModel.from_pretrained(folder)
        return
    by_transformers = GapClosedClipModel.from_pretrained(folder).eval()
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = [model(pixel_values=pixels).image_embeds for model in (expected, by_peft, by_transformers)]
    assert torch.equal(embeds[1], embeds[2])
    torch.testing.assert_close(embeds[0], embeds[1], rtol=0, atol=1e-6)
    # of the training pairs as inference sees them, set after training
    mean = weights["base_model.model.visual_centering.running_mean"]
    assert torch.equal(by_transformers.visual_centering.running_mean, mean)
    assert not torch.equal(tensors_of(folder / "checkpoint-6")["base_model.model.visual_centering.running_mean"], mean)


def test_a_frozen_tower_stays_as_it_was_and_the_optimizer_knows_adapters_only(finished):
    folder, _, _ = finished
    state = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    named = sum(value.numel() for value in tensors_of(folder).values() if value.ndim)
    centering = 4 * 16 - 32  # two means of 16 numbers are no parameters
    assert sum(entry["exp_avg"].numel() for entry in state.values()) == named - centering


def test_resuming_ends_where_the_unbroken_run_did(finished, from_whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoint-2", folder / "checkpoint-2")
    result = train(from_whole(folder, "resume_from_checkpoint=true"))
    expected, found = tensors_of(finished[0]), tensors_of(folder)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert result.metrics == pytest.approx(finished[2].metrics, nan_ok=True)
    with pytest.raises(ValueError, match="holds another run"):
        train(from_whole(folder))


def test_micro_batches_checkpointing_and_a_text_tower_without_adapters(from_whole, tmp_path):
    words = ["per_device_train_batch_size=4", "contrastive_batch_size=8", "gradient_checkpointing=true", "bf16=true"]
    train(from_whole(tmp_path / "run", *words, "towers=[vision]", "final_split=none", "eval_strategy=no"))
    names = tensors_of(tmp_path / "run")
    assert not any("text_model" in name for name in names) and any("vision_model" in name for name in names)


def test_adapters_on_towers_bring_their_base_along(tiny, tmp_path):
    folder = tmp_path / "run"
    train(load_config([tiny], [f"output_dir={folder}", *LORA, "final_split=none", "eval_strategy=no"]))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    moved = folder.rename(tmp_path / "moved")
    base, adapted = load_checkpoint(moved / "base")[0], load_checkpoint(moved)[0]
    name = "vision_model.timm_model.blocks.0.attn.qkv.weight"
    assert (base.state_dict()[name] - adapted.state_dict()[name]).abs().max() > 1e-5
    train(load_config([tiny], [f"output_dir={folder}", f"checkpoint={moved}", "vision=null", "text=null", *NO_MORE]))
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("word", "copied"), [("align_weight=1.5", False), ("hypothesis_template='A {}.'", True)])
def test_the_base_is_copied_only_where_it_is_another_than_the_checkpoint(from_whole, tmp_path, word, copied):
    train(from_whole(tmp_path / "run", *NO_MORE, word))
    assert (tmp_path / "run" / "base").exists() is copied


def test_merged(from_whole, finished, tmp_path):
    folder = tmp_path / "run"
    result = train(from_whole(folder, "lora.merge=true"))
    assert (folder / "model.safetensors").exists() and not (folder / "adapter_model.safetensors").exists()
    assert not (folder / "base").exists()
    expected, model = load_checkpoint(finished[0])[0].state_dict(), load_checkpoint(folder)[0].state_dict()
    expected.pop("training_progress")  # which no adapter holds: that of the base
    assert all(torch.allclose(expected[name], model[name], atol=1e-6) for name in expected)
    assert result.metrics == pytest.approx(finished[2].metrics, nan_ok=True, abs=1e-5)


def test_a_dead_adapter_stops_the_first_step(from_whole, tmp_path, monkeypatch, caplog):
    original = GapClosedClipModel.train
    monkeypatch.setattr(GapClosedClipModel, "train", lambda self, mode=True: make_dead(self) or original(self, mode))
    message = r"2 trainable parameters got no gradient from the first batch .*attn\.qkv\.lora_A\.default\.weight"
    with pytest.raises(ValueError, match=message):
        train(from_whole(tmp_path / "run", *NO_MORE))
    with caplog.at_level(logging.WARNING):
        train(from_whole(tmp_path / "other", *NO_MORE, "ddp_find_unused_parameters=true"))
    assert "2 trainable parameters got no gradient" in caplog.text


def test_the_command(command, tiny, whole, tmp_path):
    towers = [f"checkpoint={whole}", "vision=null", "text=null", f"output_dir={tmp_path / 'run'}"]
    code, out, err = command("train", str(tiny), *towers, *LORA)
    assert code == 0, err
    assert f"The adapter is {tmp_path / 'run'}; its card is README.md there." in out and "true-pair cosine" in out
    code, _, err = command("train", str(tiny), *towers, *LORA, "push_to_hub=true")
    assert code == 1 and "only if its base model is on the Hub" in err


# --- adapter folders that do not load


@pytest.fixture
def damaged(finished, whole, tmp_path) -> Path:
    """The finished adapter and its base, to damage."""
    shutil.copytree(whole, tmp_path / "whole")
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "whole")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_checkpoint(folder)
    return folder


def test_an_adapter_without_its_base(damaged):
    shutil.rmtree(damaged.parent / "whole")
    with pytest.raises(
        OSError, match=r"run is an adapter, and its base model .*whole could not be loaded: There is no"
    ):
        load_checkpoint(damaged)


def test_an_adapter_on_another_base(damaged):
    other = make_model()
    other.save_pretrained(damaged.parent / "whole")
    with pytest.raises(ValueError, match="run does not belong to its base model .*whole"):
        load_checkpoint(damaged)


def test_half_an_adapter(damaged):
    path = damaged / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "qkv.lora_B" in name))
    whole_file = path.read_bytes()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not belong to its base model"):
        load_checkpoint(damaged)
    path.write_bytes(whole_file[:-1])
    with pytest.raises(ValueError, match="run is damaged: adapter_model.safetensors is truncated"):
        load_checkpoint(damaged)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="run has no weights: adapter_model.safetensors is missing"):
        load_checkpoint(damaged)


def test_killed_while_an_adapter_was_being_saved(finished, from_whole, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    train(from_whole(tmp_path / "run", "resume_from_checkpoint=true", "final_split=none"))
    expected, found = tensors_of(finished[0]), tensors_of(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
