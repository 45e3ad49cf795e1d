"""build_captioner: from an encoder, from towers, from a captioner; decoders of every kind."""

import pytest
import torch
from captioners import train_encoder
from conftest import CAPTIONS, tiny_config
from test_run import TINY
from transformers import BertConfig, BertLMHeadModel, BertModel

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.training import CaptioningArguments, ModelArguments, load_config
from gap_closed_clip.training.captioning import build_captioner


BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def encoder(tmp_path, tiny_processor):
    """A saved encoder of 64 text positions, and the folder."""
    torch.manual_seed(1)
    model = GapClosedClipModel(tiny_config(center_projections=True))
    model.save_pretrained(tmp_path / "encoder")
    tiny_processor.save_pretrained(tmp_path / "encoder")
    return model, tmp_path / "encoder"


def build(folder, model_fields=None, **fields):
    """build_captioner with captions that fit 64 positions."""
    args = CaptioningArguments(**{"max_new_tokens": 20, **fields})
    return build_captioner(args, ModelArguments(checkpoint=str(folder), **(model_fields or {})), None)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(found, expected):
    """Two modules' parameters and buffers, bit by bit."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_from_an_encoders_folder(encoder):
    expected, folder = encoder
    model, processor = build(folder, num_beams=3)
    assert_same(model.gap_closed_clip, expected)
    text, decoder = expected.text_model, model.decoder.base_model
    assert_same(decoder.embeddings, text.embeddings)
    assert_same(decoder.encoder.layer[0].attention, text.encoder.layer[0].attention)
    own = {name for name, _ in model.named_parameters() if not name.startswith("gap_closed_clip.")}
    assert own and trainable(model) == own
    model.train()
    assert model.decoder.training and not any(module.training for module in model.gap_closed_clip.modules())
    generation = model.generation_config
    special = processor.tokenizer.cls_token_id, processor.tokenizer.sep_token_id, processor.tokenizer.pad_token_id
    assert (generation.max_new_tokens, generation.num_beams) == (20, 3)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == special


def test_from_towers():
    config = load_config([], [])
    config.model.vision = {
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
    }
    config.model.text = {**BERT, "vocab_size": 150, "max_position_embeddings": 40}
    args = CaptioningArguments(train_on="text", max_new_tokens=39, embedding_tokens=2, noise=0.25)
    model, processor = build_captioner(args, config.model, CAPTIONS)
    assert len(processor.tokenizer) <= 150 and processor.tokenizer("nodule")["input_ids"][1:-1] != []
    assert model.config.decoder_config.hidden_size == 24 and model.config.decoder_config.num_hidden_layers == 2
    assert (model.config.decoder_memory, model.config.embedding_noise) == ("embedding", 0.25)
    assert model.memory.patch_projection is None and model.memory.embedding_projection.out_features == 2 * 24


def test_from_a_captioners_folder_it_goes_on(encoder, tmp_path):
    first, processor = build(encoder[1], memory="embedding", train_on="text", noise=0.5)
    first.set_image_shift(torch.arange(32.0))
    first.generation_config.no_repeat_ngram_size = 3  # what the section says nothing of
    for parameter in first.decoder.parameters():
        parameter.data.add_(0.01)  # no fresh decoder
    first.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    fields = {"memory": "embedding", "label_smoothing": 0.3, "max_new_tokens": 9, "num_beams": 2, "encoders": "joint"}
    model, _ = build(tmp_path / "captioner", {"config": {"align_weight": 1.5}}, **fields)
    assert_same(model, first)
    assert (model.config.label_smoothing, model.config.embedding_noise, model.config.align_weight) == (0.3, 0.0, 1.5)
    assert model.config.caption_objective_weight == 1.0 and model.gap_closed_clip.config.align_weight == 1.5
    assert (model.generation_config.max_new_tokens, model.generation_config.num_beams) == (9, 2)
    assert model.generation_config.eos_token_id == processor.tokenizer.sep_token_id
    assert model.generation_config.no_repeat_ngram_size == 3


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ({}, {"decoder": "somewhere"}, "is a captioner and brings its decoder: leave captioning.decoder and"),
        ({}, {"num_layers": 1}, "brings its decoder: leave captioning.decoder and captioning.num_layers out"),
        ({}, {"memory": "embedding"}, "with decoder_memory=patches_and_embedding, and embedding is asked for"),
        ({}, {"embedding_tokens": 2}, "with decoder_embedding_tokens=4, and 2 is asked for"),
        ({"projection_dim": 16}, {}, "the weights of .*captioner do not fit .*'projection_dim': 16"),
        ({"align_weight": -1}, {}, "align_weight is -1"),
    ],
)
def test_what_does_not_fit_a_captioner(encoder, tmp_path, config, fields, message):
    model, processor = build(encoder[1])
    model.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "captioner", {"config": config}, **fields)


@pytest.mark.parametrize("model_class", [BertModel, BertLMHeadModel])
@pytest.mark.parametrize("place", ["folder", "package"])
def test_a_decoder_from_a_folder(encoder, tmp_path, monkeypatch, model_class, place):
    torch.manual_seed(2)
    bert = model_class(BertConfig(vocab_size=200, max_position_embeddings=32, **BERT))
    bert.save_pretrained(tmp_path / "wheel" / "my_decoder" / "bert")
    (tmp_path / "wheel" / "my_decoder" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "wheel")
    name = "package:my_decoder/bert" if place == "package" else str(tmp_path / "wheel" / "my_decoder" / "bert")
    model, processor = build(encoder[1], decoder=name)
    expected = bert.base_model.state_dict()
    found = model.decoder.base_model.state_dict()
    own = [name for name in expected if "pooler" not in name]
    assert own and all(torch.equal(found[name], expected[name]) for name in own)
    assert any("crossattention" in name for name in found)
    if model_class is BertLMHeadModel:
        heads = [model.decoder.cls.predictions.transform.dense, bert.cls.predictions.transform.dense]
        assert torch.equal(heads[0].weight, heads[1].weight)
    assert processor.tokenizer.model_max_length == 32  # the encoder takes 64


def test_the_first_layers_of_the_text_tower(tmp_path, tiny_processor):
    torch.manual_seed(1)
    text = {**tiny_config().text_config.to_dict(), "num_hidden_layers": 3}
    expected = GapClosedClipModel(tiny_config(text_config=text))
    expected.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model, _ = build(tmp_path, num_layers=2)
    layers = model.decoder.base_model.encoder.layer
    assert len(layers) == 2 and model.config.decoder_config.num_hidden_layers == 2
    for layer, of_text in zip(layers, expected.text_model.encoder.layer, strict=False):
        assert_same(layer.attention, of_text.attention)
    assert len(build(tmp_path)[0].decoder.base_model.encoder.layer) == 3
    with pytest.raises(ValueError, match="num_layers is 4: the text tower has 3"):
        build(tmp_path, num_layers=4)


def test_a_decoder_from_a_mapping(encoder):
    model, _ = build(encoder[1], decoder={**BERT, "max_position_embeddings": 21})
    config = model.config.decoder_config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (24, 2, 200)
    assert config.is_decoder and config.add_cross_attention and config.max_position_embeddings == 21
    assert build(encoder[1], decoder=BERT)[0].config.decoder_config.max_position_embeddings == 64


@pytest.mark.parametrize(
    ("decoder", "error", "message"),
    [
        ("./nowhere", FileNotFoundError, r"captioning\.decoder: there is no folder nowhere"),
        ("package:no_such_package/bert", ValueError, "there is no installed package no_such_package"),
        (
            {**BERT, "vocab_size": 77},
            ValueError,
            "has a vocabulary of 77 tokens, the text tower one of 200",
        ),
        (
            {**BERT, "max_position_embeddings": 20},
            ValueError,
            "max_new_tokens is 20, but the decoder takes 20 tokens",
        ),
    ],
)
def test_a_decoder_that_does_not_fit(encoder, tmp_path, monkeypatch, decoder, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        build(encoder[1], decoder=decoder)


@pytest.mark.parametrize("learnable", [True, False])
def test_encoders_that_train_along(encoder, learnable):
    model, _ = build(encoder[1], {"config": {"learnable_temperature": learnable}}, encoders="joint")
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    assert {name.rpartition(".")[2] for name in frozen} == (set() if learnable else {"logit_scale"})
    model, _ = build(encoder[1], {"freeze_text": True}, encoders="joint")
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    assert frozen and all(name.startswith("gap_closed_clip.text_model.") for name in frozen)
    model.train()
    assert model.gap_closed_clip.vision_model.training and not model.gap_closed_clip.text_model.training


def test_without_the_objective_only_what_sees_images_trains(encoder):
    model_section = {"config": {"contrastive_loss": "sigmoid"}}  # whose bias has no part in it either
    model, processor = build(encoder[1], model_section, encoders="joint", objective_weight=0.0)
    labels = processor.tokenizer(CAPTIONS[:1], return_tensors="pt")["input_ids"]
    model.train()(torch.randn(1, 3, 28, 28), labels=labels).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)
    assert any("vision_model" in name for name in trainable(model))


def test_a_new_captioner_of_an_encoder_that_train_left(tmp_path):
    """... is what `from_pretrained` of its folder makes, but for what starts at random."""
    folder = train_encoder(tmp_path)
    assert "center_projections: true" in TINY
    model, _ = build(folder)
    expected = GapClosedClipForConditionalGeneration.from_pretrained(folder)
    assert_same(model.gap_closed_clip, expected.gap_closed_clip)
    assert_same(model.decoder.base_model.embeddings, expected.decoder.base_model.embeddings)
