"""Models of pretrained towers: a timm checkpoint and a BERT in folders, with their head or with a new projection."""

import json

import pytest
import timm
import torch
from conftest import IMAGE_SIZE, tiny_config, tiny_inputs
from safetensors.torch import load_file, save_file
from test_modeling_gap_closed_clip import assert_same_embeddings
from torch.nn.functional import normalize
from transformers import BartConfig, BartModel, BertModel, TimmWrapperConfig

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.processing_gap_closed_clip import image_processor_for


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A timm CLIP checkpoint with its head, as on the Hub, and a BERT, each in a folder."""
    folder = tmp_path_factory.mktemp("towers")
    args = {"img_size": IMAGE_SIZE, "embed_dim": 48, "depth": 1, "num_heads": 3}
    vision = timm.create_model("eva02_tiny_patch14_224", num_classes=24, **args)
    (folder / "vision").mkdir()
    save_file(vision.state_dict(), folder / "vision" / "model.safetensors")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, IMAGE_SIZE, IMAGE_SIZE]}
    config = {
        "architecture": "eva02_tiny_patch14_224",
        "num_classes": 24,
        "model_args": args,
        "pretrained_cfg": pretrained,
    }
    (folder / "vision" / "config.json").write_text(json.dumps(config))
    text = BertModel(tiny_config().text_config)
    text.save_pretrained(folder / "text")
    return folder, vision, text


def test_from_vision_text_pretrained(towers):
    folder, vision, text = towers
    model = GapClosedClipModel.from_vision_text_pretrained(
        str(folder / "vision"), str(folder / "text"), keep_vision_projection=True, align_weight=2.0
    ).eval()
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = normalize(vision.eval()(inputs["pixel_values"]))  # timm's own model, its own head
        torch.testing.assert_close(model(inputs["pixel_values"]).image_embeds, expected)
        hidden = text.eval()(inputs["input_ids"]).last_hidden_state
        torch.testing.assert_close(model.text_model(inputs["input_ids"]).last_hidden_state, hidden)
    assert model.config.projection_dim == 24 and model.config.align_weight == 2.0


def test_from_vision_text_pretrained_with_a_new_projection_and_reload(towers, tmp_path):
    folder = towers[0]
    model = GapClosedClipModel.from_vision_text_pretrained(
        str(folder / "vision"), str(folder / "text"), projection_dim=16
    )
    model.save_pretrained(tmp_path)
    assert "visual_projection.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_embeddings(model, GapClosedClipModel.from_pretrained(tmp_path), tiny_inputs())


def test_other_timm_models_and_towers_from_scratch(towers):
    config = TimmWrapperConfig(architecture="resnet10t")
    model = GapClosedClipModel.from_vision_text_pretrained(config, str(towers[0] / "text")).eval()
    assert model(torch.randn(1, 3, 64, 96)).image_embeds.shape == (1, 512)


def test_from_vision_text_pretrained_refuses_what_does_not_fit(towers):
    folder = towers[0]
    vision, text = str(folder / "vision"), str(folder / "text")
    with pytest.raises(ValueError, match="is a bert model, which takes no images"):
        GapClosedClipModel.from_vision_text_pretrained(text, text)
    with pytest.raises(ValueError, match="leave projection_dim"):
        GapClosedClipModel.from_vision_text_pretrained(vision, text, keep_vision_projection=True, projection_dim=8)
    with pytest.raises(ValueError, match="from scratch has no pretrained projection"):
        config = tiny_config().vision_config
        GapClosedClipModel.from_vision_text_pretrained(config, text, keep_vision_projection=True)
    for towers in ((str(folder / "nothing"), text), (vision, "google-bert/nothing")):
        with pytest.raises(OSError, match="nothing' could not be loaded. Is it .*Hub within reach .*says: ") as error:
            GapClosedClipModel.from_vision_text_pretrained(*towers)
        assert "\n" not in str(error.value)


def test_a_tower_with_weights_of_other_names_is_refused(towers, tmp_path):
    text = towers[0] / "text"
    (tmp_path / "config.json").write_text((text / "config.json").read_text())
    weights = load_file(text / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weights of a BertModel"):
        GapClosedClipModel.from_vision_text_pretrained(str(towers[0] / "vision"), str(tmp_path))


def test_an_encoder_with_a_decoder_behind_it_is_refused(towers, tmp_path):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    BartModel(BartConfig(vocab_size=50, **sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bart model, with a decoder of its own: name an encoder alone"):
        GapClosedClipModel.from_vision_text_pretrained(str(towers[0] / "vision"), str(tmp_path))


def test_processor_fits_the_tower(towers):
    folder = towers[0]
    model = GapClosedClipModel.from_vision_text_pretrained(str(folder / "vision"), str(folder / "text"))
    image_processor = image_processor_for(model.vision_model)
    assert list(image_processor.image_mean) == [0.1, 0.2, 0.3] and list(image_processor.image_std) == [0.4, 0.5, 0.6]
    assert dict(image_processor.crop_size) == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def test_a_model_does_not_tell_where_its_towers_lay_nor_the_classes_of_a_head_that_is_gone(towers):
    folder, _, _ = towers
    model = GapClosedClipModel.from_vision_text_pretrained(str(folder / "vision"), str(folder / "text"))
    assert str(folder) not in model.config.to_json_string()
    assert model.config.vision_config.to_dict()["label_names"] == []


def test_towers_stored_in_half_precision_make_a_model_in_float32_unless_asked_otherwise(towers, tmp_path):
    vision = str(towers[0] / "vision")
    text = BertModel(tiny_config().text_config).half()
    text.save_pretrained(tmp_path)
    model = GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path)).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = text.state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_model.state_dict()["embeddings.word_embeddings.weight"], stored.float())
    half = GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for kwargs in ({"vision_kwargs": {"dtype": torch.float16}}, {"text_kwargs": {"torch_dtype": "float16"}}):
        with pytest.raises(ValueError, match="a dtype is that of the whole model"):
            GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path), **kwargs)


def test_a_field_that_is_not_there_is_refused(towers):
    folders = str(towers[0] / "vision"), str(towers[0] / "text")
    with pytest.raises(ValueError, match="no field 'align_wieght'. Did you mean 'align_weight'?"):
        GapClosedClipModel.from_vision_text_pretrained(*folders, align_wieght=7.0)
