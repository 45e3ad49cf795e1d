"""The captioner: its loss, memory, training modes, first weights, saving and loading."""

import copy
import logging

import pytest
import torch
from conftest import CAPTIONS, caption_labels, captioner_of, tiny_config, tiny_inputs
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
)

from gap_closed_clip import GapClosedClipConfig, GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.model.caption_outputs_gap_closed_clip import CACHE


@pytest.fixture
def tokenizer(tiny_processor):
    return copy.deepcopy(tiny_processor.tokenizer)


@pytest.fixture
def clip_folder(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.fixture
def captioner(tokenizer):
    return captioner_of(tokenizer)


@pytest.fixture
def images():
    return tiny_inputs(4)["pixel_values"]


@pytest.fixture
def labels(tokenizer):
    return caption_labels(tokenizer, CAPTIONS[:4])


def naive_loss(logits, labels, smoothing):
    """Cross-entropy in float64, token by token."""
    terms = []
    for row, tokens in zip(logits.detach().double(), labels, strict=True):
        for position in range(len(tokens) - 1):
            target = tokens[position + 1]
            if target != -100:
                log_probs = row[position] - row[position].logsumexp(0)
                terms.append(-(1 - smoothing) * log_probs[target] - smoothing * log_probs.mean())
    return torch.stack(terms).mean()


def test_the_loss_is_the_naive_one_smoothed_in_training_alone(captioner, images, labels):
    evaluated = captioner(images, labels=labels)
    assert evaluated.loss is evaluated.caption_loss and getattr(evaluated, CACHE) is None
    torch.testing.assert_close(evaluated.loss.double(), naive_loss(evaluated.logits, labels, 0.0), rtol=1e-5, atol=0)
    trained = captioner.train()(images, labels=labels)
    torch.testing.assert_close(trained.loss.double(), naive_loss(trained.logits, labels, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_without_logits_is_the_same_and_so_are_its_gradients(tokenizer, images, training, padding_side):
    tokenizer.padding_side = padding_side
    labels = caption_labels(tokenizer, CAPTIONS[:4])
    assert (labels == -100).any()
    model = captioner_of(tokenizer, embedding_noise=0.0).train(training)
    found = {}
    for skip_logits in (False, True):
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        output = model(images, labels=labels, skip_logits=skip_logits)
        output.loss.backward()
        assert (output.logits is None) == skip_logits
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found[skip_logits] = output.loss, gradients
        if padding_side == "right" and not skip_logits:
            expected = naive_loss(output.logits, labels, 0.1 if training else 0.0)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)
    assert any(name.startswith("decoder.cls") for name in found[True][1])
    if padding_side == "right":
        torch.testing.assert_close(found[True][0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["roberta", "camembert", "bert-generation", "electra", "roformer"])
def test_other_families_of_decoders_have_the_same_loss_without_logits(tokenizer, images, labels, family):
    """Whatever their head is called; where it is no single module, the logits are made as ever."""
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    shape |= {"vocab_size": len(tokenizer), "is_decoder": True, "add_cross_attention": True}
    decoder = AutoConfig.for_model(family, **shape)
    model = captioner_of(tokenizer).eval()
    model.decoder = AutoModelForCausalLM.from_config(decoder).eval()
    losses = [model(images, labels=labels, skip_logits=skip).loss for skip in (False, True)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert (model(images, labels=labels, skip_logits=True).logits is None) == (family != "electra")


def test_a_caption_without_labels_keeps_its_logits(captioner, images, labels):
    tokens = labels.clamp(min=0)
    assert captioner(images, input_ids=tokens, skip_logits=True).logits is not None


def test_padding_of_labels_is_left_out(captioner, images, labels):
    wider = torch.cat([labels, torch.full((4, 3), -100)], dim=1)
    torch.testing.assert_close(captioner(images, labels=wider).loss, captioner(images, labels=labels).loss)
    one = captioner(images[1:2], labels=labels[1:2, : (labels[1] >= 0).sum()])
    torch.testing.assert_close(
        captioner(images, labels=labels).logits[1:2, : one.logits.shape[1]], one.logits, rtol=1e-4, atol=1e-4
    )


def test_logits_do_not_look_ahead_and_step_by_step_they_are_the_same(captioner, images):
    tokens = tiny_inputs(4)["input_ids"]
    logits = captioner(images, input_ids=tokens).logits
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 190
    other = captioner(images, input_ids=changed).logits
    assert torch.equal(logits[:, :6], other[:, :6])
    assert (logits[:, 6:] - other[:, 6:]).abs().amax(-1).min() > 1e-3

    memory, cache, steps = captioner.encode(images)[0], None, []
    for place in range(tokens.shape[1]):
        step = captioner(
            input_ids=tokens[:, place : place + 1],
            encoder_hidden_states=memory,
            cache=cache,
            use_cache=True,
        )
        cache = getattr(step, CACHE)
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-4, atol=1e-4)
    assert (captioner(images.flip(0), input_ids=tokens).logits - logits).abs().max() > 1e-2  # images matter
    last = captioner(images, input_ids=tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-4, atol=1e-4)
    embedded = captioner(images, inputs_embeds=captioner.get_input_embeddings()(tokens)).logits
    torch.testing.assert_close(embedded, logits)


def without_cross_attention(model, tokens):
    """Last hidden states of the decoder's layers alone, as if there was no memory."""
    states = {name: value for name, value in model.decoder.bert.state_dict().items() if "crossattention" not in name}
    config = copy.deepcopy(model.config.text_config)
    config.is_decoder = config.add_cross_attention = False
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(states)
    return bert(tokens).last_hidden_state


@pytest.mark.parametrize("way", ["from_clip", "from_pretrained"])
def test_the_decoder_starts_from_the_text_tower(way, tiny_model, tokenizer, clip_folder):
    if way == "from_clip":
        model = GapClosedClipForConditionalGeneration.from_clip(tiny_model, tokenizer)
        assert model.gap_closed_clip is tiny_model
    else:
        model = GapClosedClipForConditionalGeneration.from_pretrained(clip_folder, decoder_embedding_tokens=2)
        assert model.config.decoder_embedding_tokens == 2 and not model.training
    text, decoder = model.gap_closed_clip.text_model.state_dict(), model.decoder.bert.state_dict()
    assert set(text) < set(decoder) and all(torch.equal(decoder[name], text[name]) for name in text)
    assert all("crossattention" in name for name in set(decoder) - set(text))
    tokens = tiny_inputs()["input_ids"]
    expected = model.gap_closed_clip.text_model.eval()(tokens).last_hidden_state
    torch.testing.assert_close(without_cross_attention(model, tokens), expected)
    head = model.decoder.cls.predictions
    assert head.decoder.weight is model.decoder.bert.embeddings.word_embeddings.weight
    assert head.decoder.weight is not model.gap_closed_clip.text_model.embeddings.word_embeddings.weight
    assert model.generation_config.max_new_tokens == 63  # the decoder takes 64
    assert model.generation_config.eos_token_id == model.config.decoder_config.eos_token_id == tokenizer.sep_token_id


@pytest.mark.parametrize("saved", [BertForMaskedLM, BertModel])
def test_the_decoder_starts_from_a_bert(saved, tiny_model, tokenizer, tmp_path):
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=200
    )
    bert = saved(config)
    bert.save_pretrained(tmp_path / "bert")
    model = GapClosedClipForConditionalGeneration.from_clip(tiny_model, tokenizer, decoder=str(tmp_path / "bert"))
    states = (bert.bert if saved is BertForMaskedLM else bert).state_dict()
    kept = {name: value for name, value in states.items() if "pooler" not in name}
    assert len(kept) > 30 and all(torch.equal(model.decoder.bert.state_dict()[name], kept[name]) for name in kept)
    if saved is BertForMaskedLM:
        head = model.decoder.cls.predictions
        assert torch.equal(head.transform.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert model.config.decoder_config.hidden_size == 24 and model.generation_config.max_new_tokens == 64
    inputs = tiny_inputs(2)
    assert model.generate(inputs["pixel_values"], max_new_tokens=3).shape == (2, 4)
    logits = model.eval()(inputs["pixel_values"], inputs["input_ids"]).logits
    shorter = model(inputs["pixel_values"], inputs["input_ids"][:, :5]).logits
    torch.testing.assert_close(shorter, logits[:, :5])  # no look ahead


def test_a_decoder_from_scratch(tiny_model, tokenizer):
    config = BertConfig(vocab_size=200, hidden_size=24, num_attention_heads=2, num_hidden_layers=3)
    model = GapClosedClipForConditionalGeneration.from_clip(tiny_model, tokenizer, decoder=config)
    assert len(model.decoder.bert.encoder.layer) == 3 and model.decoder.config is model.config.decoder_config
    assert model.config.decoder_config.is_decoder and model.config.decoder_config.add_cross_attention
    assert not config.is_decoder  # the one given is left alone
    weight = model.decoder.bert.encoder.layer[2].output.dense.weight
    assert 0.01 < weight.std() < 0.03


def test_what_does_not_fit_is_refused_and_changes_nothing(tiny_model, tokenizer, clip_folder, tmp_path):
    from_clip, before = GapClosedClipForConditionalGeneration.from_clip, tiny_model.config.to_dict()
    config = BertConfig(hidden_size=24, vocab_size=300, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="vocabulary of 300 tokens, the text tower one of 200"):
        from_clip(tiny_model, tokenizer, decoder=str(tmp_path / "b"))
    with pytest.raises(OSError, match=r"The decoder '.*nowhere' could not be loaded"):
        from_clip(tiny_model, tokenizer, decoder=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        from_clip(tiny_model, tokenizer, label_smoothing=2.0)
    with pytest.raises(ValueError, match="hidden size"):
        from_clip(tiny_model, tokenizer, decoder=BertConfig(vocab_size=200, hidden_size=50))
    distil = tiny_config(text_config={"model_type": "distilbert", "vocab_size": 200, "n_layers": 1, "dim": 48})
    with pytest.raises(ValueError, match="text tower of type 'distilbert' can't be made a decoder"):
        GapClosedClipForConditionalGeneration(distil)
    with pytest.raises(ValueError, match="is_decoder=True and add_cross_attention=True"):
        GapClosedClipForConditionalGeneration(tiny_config(decoder_config={"model_type": "bert", "vocab_size": 200}))
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match="The tokenizer has no cls_token"):
        from_clip(tiny_model, tokenizer)
    assert tiny_model.config.to_dict() == before
    with pytest.raises(ValueError, match="decoder_memory is 'all'"):
        GapClosedClipForConditionalGeneration.from_pretrained(clip_folder, decoder_memory="all")


def test_saved_and_loaded_to_the_last_bit(tokenizer, images, labels, tmp_path):
    model = captioner_of(tokenizer, decoder_memory="embedding", center_projections=True)
    model.set_image_shift(torch.linspace(-0.1, 0.1, 32))
    model.gap_closed_clip.visual_centering.running_mean.fill_(0.03)
    model.save_pretrained(tmp_path)
    for cls in (GapClosedClipForConditionalGeneration, AutoModelForImageTextToText):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is GapClosedClipForConditionalGeneration
        assert not any(info.values()), info
        states = loaded.state_dict()
        assert states.keys() == model.state_dict().keys()
        assert all(torch.equal(states[name], value) for name, value in model.state_dict().items())
        head = loaded.decoder.cls.predictions.decoder
        assert head.weight is loaded.decoder.bert.embeddings.word_embeddings.weight
        assert torch.equal(loaded(images, labels=labels).logits, model(images, labels=labels).logits)
        assert torch.equal(loaded.generate(images, max_new_tokens=9), model.generate(images, max_new_tokens=9))
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id, saved.max_new_tokens) == (2, 3, 0, 63)
    assert loaded.generation_config.to_diff_dict() == saved.to_diff_dict()
    half = GapClosedClipForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.decoder.dtype == torch.bfloat16 and half.generate(images.bfloat16(), max_new_tokens=3).shape == (4, 4)
    torch.testing.assert_close(
        half(images.bfloat16(), labels=labels).loss.float(), model(images, labels=labels).loss, rtol=0.1, atol=0
    )


def test_a_resized_vocabulary_is_that_of_both_towers(captioner, images, labels, tmp_path):
    before = captioner(images, labels=labels).logits
    captioner.resize_token_embeddings(210, mean_resizing=False)
    assert captioner.decoder.cls.predictions.decoder.weight is captioner.get_input_embeddings().weight
    logits = captioner(images, labels=labels).logits
    assert logits.shape[-1] == 210
    torch.testing.assert_close(logits[..., :200], before)
    assert captioner.gap_closed_clip.text_model.embeddings.word_embeddings.num_embeddings == 210
    captioner.save_pretrained(tmp_path)
    loaded, info = GapClosedClipForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.decoder_config.vocab_size == 210
    assert torch.equal(loaded(images, labels=labels).logits, logits)


def test_its_folder_is_an_encoders_folder_too(captioner, tmp_path, caplog):
    captioner.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        encoder, info = GapClosedClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not caplog.records and not info["missing_keys"]
    expected = captioner.gap_closed_clip(**tiny_inputs())
    output = encoder(**tiny_inputs())
    assert torch.equal(output.image_embeds, expected.image_embeds)
    assert torch.equal(output.text_embeds, expected.text_embeds) and output.loss == expected.loss


def test_weights_without_a_place_are_told_of(captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    config = GapClosedClipConfig.from_pretrained(tmp_path, decoder_memory="embedding")
    cls = GapClosedClipForConditionalGeneration
    _, info = cls.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {name.split(".")[1] for name in info["unexpected_keys"]} == {"patch_projection", "patch_norm"}


def test_an_encoders_folder_makes_a_captioner(clip_folder, tokenizer, images, tmp_path):
    cls = GapClosedClipForConditionalGeneration
    model, info = cls.from_pretrained(clip_folder, output_loading_info=True, revision="main", label_smoothing=0.2)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.label_smoothing == 0.2
    encoder = GapClosedClipModel.from_pretrained(clip_folder)
    assert torch.equal(model.encode(images)[1], encoder(images).image_embeds)
    config = GapClosedClipConfig.from_pretrained(clip_folder, decoder_memory="embedding")
    assert cls.from_pretrained(clip_folder, config=config).memory.patch_projection is None
    assert cls.from_pretrained(clip_folder, config=clip_folder).memory.patch_projection is not None  # named, too
    assert cls.from_pretrained(clip_folder, dtype=torch.bfloat16).decoder.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(cls.from_pretrained(tmp_path / "again").encode(images)[0], model.encode(images)[0])
    with pytest.raises(OSError):
        cls.from_pretrained(str(tmp_path / "nowhere"))


def test_fields_of_the_configuration_may_be_given_with_a_folder(captioner, clip_folder, images, tmp_path):
    captioner.save_pretrained(tmp_path)
    cls = GapClosedClipForConditionalGeneration
    given = {"label_smoothing": 0.3, "align_weight": 2.5, "output_hidden_states": True, "dtype": torch.float64}
    for folder in (tmp_path, clip_folder):
        model = cls.from_pretrained(folder, **given)
        assert (model.config.label_smoothing, model.config.align_weight) == (0.3, 2.5)
        assert model.config.output_hidden_states and {each.dtype for each in model.parameters()} == {torch.float64}
    loaded = cls.from_pretrained(tmp_path, embedding_noise=0.5)
    assert torch.equal(loaded.generate(images, max_new_tokens=6), captioner.generate(images, max_new_tokens=6))
    assert loaded.config.embedding_noise == 0.5


def test_one_encoder_serves_two_captioners(tokenizer, images):
    first = captioner_of(tokenizer)
    expected = first.generate(images, max_new_tokens=6)
    second = GapClosedClipForConditionalGeneration.from_clip(
        first.gap_closed_clip, tokenizer, decoder_memory="embedding", embedding_noise=1.0
    )
    assert (first.config.decoder_memory, first.config.embedding_noise) == ("patches_and_embedding", 0.0)
    assert second.config.decoder_memory == "embedding"
    assert second.gap_closed_clip.vision_model.config is second.config.vision_config
    assert torch.equal(first.generate(images, max_new_tokens=6), expected)


def test_a_new_decoder_is_told_of(clip_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("gap_closed_clip"), "propagate", True)
    GapClosedClipForConditionalGeneration.from_pretrained(clip_folder)
    assert f"{clip_folder} is an encoder without a decoder" in caplog.text


@pytest.mark.parametrize("shape", [(1, 7), (32,), (1, 2, 32)])
def test_embeddings_of_another_shape_are_refused(tokenizer, shape):
    model = captioner_of(tokenizer, decoder_memory="embedding")
    with pytest.raises(ValueError, match=r"shared_embeds has the shape .*: give a tensor \(B, 32\)"):
        model.encode(shared_embeds=torch.ones(shape))


def test_a_prompt_without_a_token_is_refused(captioner, images):
    ids = torch.tensor([[2, 7, 8], [0, 0, 0], [2, 7, 0], [2, 9, 9]])
    with pytest.raises(ValueError, match="A prompt has no token"):
        captioner.generate(images, ids, (ids > 0).long())


def test_max_length_is_what_was_asked_for(captioner, images):
    captioner.generation_config.eos_token_id = None
    assert captioner.generate(images, max_length=10, eos_token_id=None).shape == (4, 10)
    assert captioner.generation_config.max_new_tokens is not None
