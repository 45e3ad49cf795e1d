"""What trains inside the towers: blocks, batch statistics, learning rates; and the image size of a second stage."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import CAPTIONS, tiny_inputs
from PIL import Image
from safetensors.torch import load_file, save_file
from test_run import NO_MORE, TINY
from torch import nn
from transformers import AutoModel, DebertaV2Config, DistilBertConfig, MPNetConfig, TimmWrapperConfig

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.training import ModelArguments, build_model_and_processor, load_config, train
from gap_closed_clip.training.arguments import GapClosedTrainingArguments
from gap_closed_clip.training.release import image_blocks, set_tower_learning_rate, text_blocks
from gap_closed_clip.training.trainer import GapClosedClipTrainer


TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 150,
    "max_position_embeddings": 32,
}
MOBILENET = {"architecture": "mobilenetv3_small_050"}


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory) -> str:
    """A published convolutional tower with BatchNorm: random weights, statistics that are not those of a new layer."""
    folder = tmp_path_factory.mktemp("mobilenet")
    torch.manual_seed(0)
    model = timm.create_model(MOBILENET["architecture"], num_classes=3).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps({**MOBILENET, "num_classes": 3, "pretrained_cfg": pretrained}))
    return str(folder)


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def statistics(model: GapClosedClipModel) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.vision_model.named_buffers() if "running" in n or "tracked" in n}


# --- blocks


@pytest.mark.parametrize(
    ("architecture", "number", "last"),
    [
        ("tf_efficientnet_lite0", 16, {"blocks.6.0", "conv_head", "bn2"}),
        ("eva02_tiny_patch14_224", 12, {"blocks.11", "fc_norm"}),
        ("vit_tiny_patch16_224", 12, {"blocks.11", "norm"}),
        ("convnext_atto", 12, {"stages.3.blocks.1", "head.norm"}),
        ("resnet18", 8, {"layer4.1"}),
        ("mobilenetv3_small_050", 12, {"blocks.5.0", "conv_head"}),
        ("swin_tiny_patch4_window7_224", 12, {"layers.3.blocks.1", "norm"}),
    ],
)
def test_blocks_of_an_image_tower(architecture, number, last):
    with torch.device("meta"):
        tower = AutoModel.from_config(TimmWrapperConfig(architecture=architecture))
    model = tower.timm_model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [[names[id(parameter)] for parameter in block] for block in image_blocks(tower)]
    assert len(blocks) == number
    expected = {name for name in names.values() if any(name.startswith(f"{part}.") for part in last)}
    assert set(blocks[-1]) == expected and len(blocks[-1]) == len(expected)
    everything = [name for block in blocks for name in block]
    assert len(set(everything)) == len(everything)
    outside = set(names.values()) - set(everything)
    stem = ("conv_stem.", "bn1.", "conv1.", "stem.", "patch_embed.", "cls_token", "pos_embed")
    assert outside and all(name.startswith(stem) for name in outside)


def test_the_last_blocks_of_both_towers(mobilenet):
    args = {"freeze_vision": True, "train_vision_blocks": 2, "freeze_text": True, "train_text_blocks": 1}
    model, _ = build_model_and_processor(ModelArguments(vision=mobilenet, text=TEXT, **args), CAPTIONS)
    vision, text = trained(model.vision_model.timm_model), trained(model.text_model)
    assert {name.rsplit(".", 1)[0] for name in vision} == {  # and no BatchNorm
        *("blocks.4.2.conv_pw", "blocks.4.2.conv_dw", "blocks.4.2.conv_pwl", "blocks.5.0.conv", "conv_head"),
        *("blocks.4.2.se.conv_reduce", "blocks.4.2.se.conv_expand"),
    }
    assert text and all(name.startswith("encoder.layer.2.") for name in text)
    assert all(parameter.requires_grad for parameter in model.visual_projection.parameters())


def test_the_pooler_belongs_to_the_last_layer():
    args = ModelArguments(
        vision=MOBILENET, text=TEXT, freeze_text=True, train_text_blocks=1, config={"text_pooling": "pooler"}
    )
    model, _ = build_model_and_processor(args, CAPTIONS)
    assert {name.split(".")[0] for name in trained(model.text_model)} == {"encoder", "pooler"}


def test_gradients_reach_the_last_blocks_and_no_others(mobilenet):
    args = {"freeze_vision": True, "train_vision_blocks": 1, "freeze_text": True, "train_text_blocks": 1}
    model, _ = build_model_and_processor(ModelArguments(vision=mobilenet, text=TEXT, **args), CAPTIONS)
    inputs = {name: value for name, value in tiny_inputs().items()} | {"pixel_values": torch.randn(4, 3, 64, 64)}
    inputs["input_ids"] = inputs["input_ids"] % model.config.text_config.vocab_size
    model.train()(**inputs).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == trained(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_vision": True, "train_vision_blocks": 13}, "model.train_vision_blocks is 13, .* has 12 blocks"),
        ({"freeze_text": True, "train_text_blocks": 4}, "model.train_text_blocks is 4, and the tower has 3 blocks"),
        ({"train_vision_blocks": 1}, "all of the tower trains already. Set model.freeze_vision=true"),
        ({"freeze_text": True, "train_text_blocks": 0}, "model.train_text_blocks is 0: use 1 or more"),
        ({"image_size": 0}, "model.image_size is 0: it is a number of pixels"),
    ],
)
def test_blocks_that_are_not_there(mobilenet, settings, message):
    with pytest.raises(ValueError, match=message):
        build_model_and_processor(ModelArguments(vision=mobilenet, text=TEXT, **settings), CAPTIONS)


def test_a_text_tower_of_another_family():
    model = AutoModel.from_config(DistilBertConfig(dim=48, n_heads=3, n_layers=2, hidden_dim=64, vocab_size=50))
    blocks = text_blocks(model)
    assert [len(block) for block in blocks] == [16, 16]
    assert {id(p) for p in blocks[1]} == {id(p) for p in model.transformer.layer[1].parameters()}
    with pytest.raises(ValueError, match="model.train_text_blocks: LSTM has no list of layers"):
        text_blocks(torch.nn.LSTM(4, 4))


SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}


@pytest.mark.parametrize(
    "config",
    [
        MPNetConfig(**SHAPE, vocab_size=50),
        DebertaV2Config(
            **SHAPE, vocab_size=50, relative_attention=True, norm_rel_ebd="layer_norm", conv_kernel_size=3
        ),
    ],
    ids=["MPNet", "DeBERTa"],
)
def test_the_last_layer_leaves_the_output_of_those_before_it_as_it_was(config):
    torch.manual_seed(0)
    model, ids = AutoModel.from_config(config).eval(), torch.arange(5, 15)[None]
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states
        for parameter in text_blocks(model)[-1]:
            parameter.add_(torch.randn_like(parameter))
        after = model(ids, output_hidden_states=True).hidden_states
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, True, False]


# --- batch statistics


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({}, False),
        ({"freeze_batch_norm": False}, True),
        ({"freeze_vision": True, "freeze_batch_norm": False}, False),
        ({"freeze_vision": True, "train_vision_blocks": 12}, False),
    ],
)
def test_batch_statistics_of_a_published_tower(mobilenet, settings, moves):
    model, _ = build_model_and_processor(ModelArguments(vision=mobilenet, text=TEXT, **settings), CAPTIONS)
    before = statistics(model)
    model.train()  # as the Trainer does before every step
    for _ in range(2):
        model.get_image_features(torch.randn(4, 3, 64, 64))
    changed = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert before and changed == (set(before) if moves else set())
    assert model.vision_model.training == (not settings.get("freeze_vision") or "train_vision_blocks" in settings)


def test_a_tower_from_scratch_learns_its_statistics():
    model, _ = build_model_and_processor(ModelArguments(vision=MOBILENET, text=TEXT), CAPTIONS)
    before = statistics(model)
    model.train().get_image_features(torch.randn(4, 3, 64, 64))
    assert all(not torch.equal(value, before[name]) for name, value in statistics(model).items())


# --- the learning rate of the towers


def make_trainer(model, folder, **kwargs) -> GapClosedClipTrainer:
    args = GapClosedTrainingArguments(
        str(folder), learning_rate=1e-2, weight_decay=0.1, use_cpu=True, report_to="none", max_steps=4, **kwargs
    )
    return GapClosedClipTrainer(model=model, args=args)


def test_two_learning_rates(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, tower_learning_rate=1e-4, warmup_steps=2, lr_scheduler_type="linear")
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["initial_lr"], group["weight_decay"])
    assert set(found) == set(names.values())
    for name, (rate, decay) in found.items():
        assert rate == (1e-4 if name.startswith(("vision_model.", "text_model.")) else 1e-2)
        assert decay == (0.1 if name in trainer.get_decay_parameter_names(tiny_model) else 0.0)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    rates = {group["initial_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-2: pytest.approx(5e-3), 1e-4: pytest.approx(5e-5)}


def test_one_learning_rate_without_the_field(tiny_model, tmp_path):
    optimizer = make_trainer(tiny_model, tmp_path).create_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]


def test_a_learning_rate_of_towers_that_are_frozen(tiny_model):
    tiny_model.freeze_towers(vision=True, text=True)
    optimizer = torch.optim.AdamW([p for p in tiny_model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="tower_learning_rate is 0.1, and no weight of a tower is trained"):
        set_tower_learning_rate(optimizer, tiny_model, 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tower_learning_rate=1e-4", "freeze_vision=true", "freeze_text=true"], "freeze_text are true. Leave one"),
        (["tower_learning_rate=1e-4", "lora.rank=4"], "tower_learning_rate is 0.0001, and the section lora is there"),
        (["freeze_text=true", "train_text_blocks=1", "lora.rank=4", "towers=[vision]"], "train_text_blocks is 1, and"),
        (["freeze_text=true", "train_text_blocks=1", "captioning.num_beams=2"], "captioning.encoders is frozen"),
        (
            ["freeze_text=true", "train_text_blocks=1", "captioning.encoders=joint", "objective_weight=0"],
            "captioning.objective_weight is 0: no caption goes through the text tower",
        ),
    ],
)
def test_settings_that_contradict_each_other(words, message):
    with pytest.raises(ValueError, match=message):
        load_config([], words)


def test_a_learning_rate_of_zero():
    with pytest.raises(ValueError, match="training.tower_learning_rate is 0: use a number above 0. To keep towers"):
        GapClosedTrainingArguments(tower_learning_rate=0)


# --- the image size


def test_the_image_size_of_a_convolutional_tower(mobilenet):
    args = ModelArguments(vision=mobilenet, text=TEXT, image_size=96)
    model, processor = build_model_and_processor(args, CAPTIONS)
    image = Image.fromarray(np.zeros((50, 200, 3), np.uint8))
    pixels = processor(images=image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 96, 96) and model.get_image_features(pixels).pooler_output.shape[0] == 1
    assert list(processor.image_processor.image_mean) == [0.5] * 3
    assert model.image_size is None


def test_trying_an_image_size_moves_nothing():
    config = {"center_projections": True}
    model, _ = build_model_and_processor(
        ModelArguments(vision=MOBILENET, text=TEXT, image_size=96, config=config), CAPTIONS
    )
    counts = {name: buffer for name, buffer in model.named_buffers() if "num_batches_tracked" in name}
    assert len(counts) > 10 and not any(counts.values())
    assert model.training and model.vision_model.training


def test_the_image_size_of_a_tower_that_takes_one_size_alone():
    vision = {
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
    }
    with pytest.raises(ValueError, match="model.image_size is 56, .* takes no images of that size .*28 x 28"):
        build_model_and_processor(ModelArguments(vision=vision, text=TEXT, image_size=56), CAPTIONS)
    dynamic = {**vision, "model_args": {**vision["model_args"], "dynamic_img_size": True}}
    model, processor = build_model_and_processor(ModelArguments(vision=dynamic, text=TEXT, image_size=56), CAPTIONS)
    assert processor.image_processor.crop_size == {"height": 56, "width": 56}
    with pytest.raises(ValueError, match="model.image_size is 57, and the image tower takes no images of that size"):
        build_model_and_processor(ModelArguments(vision=dynamic, text=TEXT, image_size=57), CAPTIONS)


# --- a second stage


def test_a_second_stage_from_frozen_towers(mobilenet, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = [f"model.text.{name}={TEXT[name]}" for name in ("num_hidden_layers", "hidden_size")]
    first = [f"model.vision={mobilenet}", *text, "freeze_vision=true", "freeze_text=true", *NO_MORE]
    train(load_config([tmp_path / "tiny.yaml"], [*first, f"output_dir={tmp_path / 'first'}"]))
    second = [f"checkpoint={tmp_path / 'first'}", "model.vision=null", "model.text=null", "image_size=32", *NO_MORE]
    blocks = ["freeze_vision=true", "train_vision_blocks=1", "freeze_text=true", "train_text_blocks=1"]
    rates = ["tower_learning_rate=1e-4", "learning_rate=1e-2", "max_steps=2", f"output_dir={tmp_path / 'second'}"]
    train(load_config([tmp_path / "tiny.yaml"], [*second, *blocks, *rates]))
    (before, _), (after, processor) = load_checkpoint(tmp_path / "first"), load_checkpoint(tmp_path / "second")
    moved = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    vision = {name.removeprefix("vision_model.timm_model.") for name in moved if name.startswith("vision_model.")}
    assert vision == {"blocks.5.0.conv.weight", "conv_head.weight", "conv_head.bias"}
    assert {name.split(".")[3] for name in moved if name.startswith("text_model.")} == {"2"}
    assert "visual_projection.weight" in moved
    assert all(torch.equal(value, statistics(before)[name]) for name, value in statistics(after).items())
    assert processor.image_processor.crop_size == {"height": 32, "width": 32}
    assert json.loads((tmp_path / "second" / "processor_config.json").read_text())["image_processor"]["crop_size"] == {
        "height": 32,
        "width": 32,
    }


def test_resuming_keeps_both_learning_rates(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["eval_strategy=no", "final_split=none", "max_steps=4", "tower_learning_rate=1e-4", "learning_rate=1e-2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(load_config([tmp_path / "tiny.yaml"], [*words, f"output_dir={whole}"]))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    again = [*words, f"output_dir={resumed}", f"resume_from_checkpoint={resumed / 'checkpoint-2'}"]
    train(load_config([tmp_path / "tiny.yaml"], again))
    weights = [load_file(folder / "model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    state = torch.load(resumed / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert sorted({group["initial_lr"] for group in state["param_groups"]}) == [1e-4, 1e-2]
