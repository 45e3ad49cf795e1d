"""What stands for an image or a text in towers of transformers: poolers, first tokens, means of patches."""

import json

import pytest
import torch
from conftest import CAPTIONS
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    DeiTConfig,
    Dinov2WithRegistersConfig,
    GPT2Config,
    GPT2Model,
    SqueezeBertConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.training.gradients import without_gradient

from .clip_models import (
    ENDS,
    SIDE,
    TEXT,
    TEXT_LENGTH,
    TOKENIZER,
    VISION,
    dinov2_xlm_roberta,
    save_source,
    vit_bert,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_source("CLIP", tmp_path_factory.mktemp("clip"))


def test_the_first_token_of_a_causal_tower_says_nothing(clip):
    with pytest.raises(
        ValueError, match="text_pooling is 'cls', and .* reads from left to right.* use text_pooling='pooler'"
    ):
        GapClosedClipModel.from_vision_text_pretrained(str(clip), str(clip), text_pooling="cls")


def test_towers_from_configurations_are_checked_too():
    vision = ViTConfig(**VISION)
    with pytest.raises(ValueError, match="text_pooling is 'cls': in a clip_text_model no token but the last"):
        GapClosedClipModel.from_vision_text_pretrained(vision, CLIPTextConfig(**ENDS), text_pooling="cls")


def test_a_pooler_without_weights_is_not_used(tmp_path):
    dual, _ = vit_bert()
    weights = {name: value for name, value in dual.vision_model.state_dict().items() if "pooler" not in name}
    dual.vision_model.save_pretrained(tmp_path, state_dict=weights)
    model = GapClosedClipModel.from_vision_text_pretrained(str(tmp_path), BertConfig(**TEXT))
    assert model.config.image_pooling == "cls" and model.vision_model.pooler is None
    with pytest.raises(ValueError, match="image_pooling is 'pooler', and .* has no weights of one"):
        GapClosedClipModel.from_vision_text_pretrained(str(tmp_path), BertConfig(**TEXT), image_pooling="pooler")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_of_image_tokens(pooling):
    dual, _ = dinov2_xlm_roberta()
    model = GapClosedClipModel.from_vision_text_pretrained(
        dual.vision_model.config, BertConfig(**TEXT), image_pooling=pooling
    ).eval()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        expected = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].sum(1) / 4  # four patches
        torch.testing.assert_close(model.encode_image(pixels).pooler_output, expected)


def test_pooling_of_a_model_of_sentence_transformers(tmp_path):
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    vision = ViTConfig(**VISION)
    assert GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path)).config.text_pooling == "cls"
    (tmp_path / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path)).config.text_pooling == "mean"
    model = GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path), text_pooling="cls")
    assert model.config.text_pooling == "cls"


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_a_text_tower_that_calls_its_pooler_whether_it_is_there_or_not(pooling, tmp_path):
    config = SqueezeBertConfig(**{**TEXT, "embedding_size": 32, "num_attention_heads": 4})
    model = GapClosedClipModel.from_vision_text_pretrained(ViTConfig(**VISION), config, text_pooling=pooling).eval()
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with torch.no_grad():
        hidden = model.text_model(**tokens).last_hidden_state
        own = {"cls": hidden[:, 0], "mean": hidden[:, :3].mean(1)}
        expected = own[pooling] if pooling in own else model.text_model(**tokens).pooler_output
        torch.testing.assert_close(model.encode_text(**tokens).pooler_output, expected)
        model.save_pretrained(tmp_path)
        again = GapClosedClipModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again.encode_text(**tokens).pooler_output, expected)
    names = [name for name, _ in model.text_model.named_parameters() if name.startswith("pooler.")]
    assert bool(names) == (pooling == "pooler")  # a parameter without a gradient would stop several processes


@pytest.mark.parametrize(
    ("mode", "pooling"), [("mean", "mean"), ("cls", "cls"), ("max", "cls"), (("cls", "mean"), "cls")]
)
def test_pooling_as_sentence_transformers_itself_saves_it(tmp_path, mode, pooling):
    """That of BERT itself, the first token, where it is none of ours."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    modules.Pooling(TEXT["hidden_size"], pooling_mode=mode).save(str(tmp_path / "1_Pooling"))
    model = GapClosedClipModel.from_vision_text_pretrained(ViTConfig(**VISION), str(tmp_path))
    assert model.config.text_pooling == pooling


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (SwinConfig(image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4), 0),
        (DeiTConfig(**VISION), 2),  # a class token and a distillation token
        (Dinov2WithRegistersConfig(**{**VISION, "mlp_ratio": 2}, num_register_tokens=4), 5),
    ],
    ids=["Swin", "DeiT", "DINOv2 with registers"],
)
def test_the_mean_is_that_of_all_patches_and_nothing_else(config, prefix):
    model = GapClosedClipModel.from_vision_text_pretrained(config, BertConfig(**TEXT), image_pooling="mean").eval()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        expected = tokens[:, prefix:].mean(1)
        torch.testing.assert_close(model.encode_image(pixels).pooler_output, expected)
        if not prefix:
            model.config.image_pooling = "cls"
            with pytest.raises(ValueError, match="the first token of a swin model is a patch"):
                model.encode_image(pixels)


def test_a_masked_autoencoder_sees_the_whole_image():
    config = ViTMAEConfig(**VISION)
    model = GapClosedClipModel.from_vision_text_pretrained(config, BertConfig(**TEXT), image_pooling="cls").eval()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        first, second = (model(pixel_values=pixels).image_embeds for _ in range(2))
    torch.testing.assert_close(first, second)
    with pytest.raises(ValueError, match="image_pooling is 'pooler', and a vit_mae model has none"):
        GapClosedClipModel.from_vision_text_pretrained(config, BertConfig(**TEXT)).encode_image(pixels)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_all_of_a_clips_halves_trains_with_another_pooling(clip, tmp_path, pooling):
    for folder, text_pooling in ((clip, "pooler"), (save_source("SigLIP", tmp_path), "mean")):
        image_pooling = "mean" if folder != clip else pooling  # SigLIP's images have no class token
        model = GapClosedClipModel.from_vision_text_pretrained(
            str(folder), str(folder), image_pooling=image_pooling, text_pooling=text_pooling
        )
        model.train()
        tokens = TOKENIZER(CAPTIONS[:4], padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        model(pixel_values=torch.randn(4, 3, SIDE, SIDE), **tokens).loss.backward()
        assert without_gradient(model) == []


def test_a_decoder_is_no_text_tower_by_its_first_token(tmp_path):
    GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=150, n_positions=20)).save_pretrained(tmp_path)
    vision = ViTConfig(**VISION)
    with pytest.raises(ValueError, match="reads from left to right, .* use text_pooling='mean'"):
        GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path))
    assert GapClosedClipModel.from_vision_text_pretrained(vision, str(tmp_path), text_pooling="mean")
