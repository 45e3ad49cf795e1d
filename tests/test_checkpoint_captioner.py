"""A captioner's folder, an encoder's and an adapter's, whole and broken, by what is asked for."""

import copy
import json

import pytest
import torch
from conftest import captioner_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.checkpoint import is_captioner, load_captioner, load_checkpoint


@pytest.fixture
def captioner(tiny_processor, tmp_path):
    """Model and folder."""
    model = captioner_of(tiny_processor.tokenizer)
    model.set_image_shift(torch.arange(32.0))
    model.save_pretrained(tmp_path / "captioner")
    tiny_processor.save_pretrained(tmp_path / "captioner")
    return model, tmp_path / "captioner"


@pytest.fixture
def encoder(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "encoder")
    tiny_processor.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def adapter(tiny_processor, encoder, tmp_path):
    base = GapClosedClipModel.from_pretrained(encoder)
    model = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["text_projection"]))
    model.peft_config["default"].base_model_name_or_path = str(encoder)
    model.save_pretrained(tmp_path / "adapter")
    tiny_processor.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_a_captioner(captioner, encoder, adapter):
    assert is_captioner(captioner[1]) is True
    assert is_captioner(encoder) is False and is_captioner(adapter) is False


def test_a_captioner_is_loaded_whole(captioner):
    expected, folder = captioner
    model, processor = load_captioner(folder)
    assert type(model) is GapClosedClipForConditionalGeneration and not model.training
    found, expected = model.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert model.generation_config.eos_token_id == processor.tokenizer.sep_token_id


def test_its_encoder_is_loaded_alone(captioner):
    expected, folder = captioner
    model, _ = load_checkpoint(folder)
    assert type(model) is GapClosedClipModel
    found, expected = model.state_dict(), expected.gap_closed_clip.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_has_no_decoder_writes_no_captions(encoder, adapter):
    """`from_pretrained` would make a new decoder, untrained."""
    for folder in (encoder, adapter):
        with pytest.raises(ValueError, match=f"{folder} has no decoder, so .*captioning.yaml checkpoint={folder}"):
            load_captioner(folder)


@pytest.mark.parametrize("part", ["decoder", "gap_closed_clip.text_model", "memory"])
def test_an_adapter_on_a_captioner_is_to_be_merged(captioner, tiny_processor, part, tmp_path):
    _, base = captioner
    layers = "embedding_projection" if part == "memory" else r".*\.query"
    model = get_peft_model(load_captioner(base)[0], LoraConfig(target_modules=rf"{part}\.{layers}"))
    model.save_pretrained(tmp_path / "adapter")
    tiny_processor.save_pretrained(tmp_path / "adapter")
    for load in (load_captioner, is_captioner, load_checkpoint):
        with pytest.raises(ValueError, match="/adapter is an adapter on a captioner.* Merge it first: Peft") as error:
            load(tmp_path / "adapter")
        assert "\n" not in str(error.value) and "no decoder" not in str(error.value)
    # What the message says to do.
    merged = PeftModel.from_pretrained(
        GapClosedClipForConditionalGeneration.from_pretrained(base), str(tmp_path / "adapter")
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_processor.save_pretrained(tmp_path / "merged")
    load_captioner(tmp_path / "merged")


def test_an_adapter_on_the_encoder_of_a_captioner_is_loaded(captioner, tiny_processor, tmp_path):
    _, base = captioner
    model = get_peft_model(load_checkpoint(base)[0], LoraConfig(target_modules=["query"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    tiny_processor.save_pretrained(tmp_path / "adapter")
    assert type(load_checkpoint(tmp_path / "adapter")[0]) is GapClosedClipModel
    assert is_captioner(tmp_path / "adapter") is False


@pytest.mark.parametrize("load", [load_captioner, is_captioner, load_checkpoint])
def test_broken_folders(captioner, load, tmp_path):
    _, folder = captioner
    with pytest.raises(FileNotFoundError, match="There is no model folder .*nowhere"):
        load(tmp_path / "nowhere")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(ValueError, match="captioner is damaged: model.safetensors is truncated"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="captioner has no weights: model.safetensors is missing"):
        load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a model of type 'bert', not 'gap_closed_clip'"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "of_encoder"),
    [
        ("decoder.bert.encoder.layer.0.crossattention.self.query.weight", False),
        ("memory.embedding_projection.weight", False),
        ("gap_closed_clip.visual_projection.weight", True),
    ],
)
def test_weights_that_are_missing(captioner, name, of_encoder):
    _, folder = captioner
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"captioner lacks 1 weights, the first: {name}"):
        load_captioner(folder)
    if of_encoder:
        with pytest.raises(ValueError, match="lacks 1 weights, the first: .*visual_projection.weight"):
            load_checkpoint(folder)
    else:
        load_checkpoint(folder)


def test_a_decoder_of_fewer_tokens_than_the_tokenizer(captioner, tiny_processor):
    model, folder = captioner
    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer.add_tokens([f"<finding{index}>" for index in range(201 - len(processor.tokenizer))])
    model.gap_closed_clip.resize_token_embeddings(201)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="captioner: the tokenizer has 201 tokens and the decoder embeds 200"):
        load_captioner(folder)
    load_checkpoint(folder)  # the encoder alone
    model.resize_token_embeddings(201)
    model.save_pretrained(folder)
    load_captioner(folder)


def test_weights_of_other_shapes(captioner):
    _, folder = captioner
    weights = load_file(folder / "model.safetensors")
    weights["memory.patch_norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="captioner: the weights do not fit config.json"):
        load_captioner(folder)
