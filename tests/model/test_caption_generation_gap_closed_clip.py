"""Captions from `generate`: cache, batches, prompts, lengths; on a decoder that has learned four captions by heart."""

import copy
import logging
import warnings

import pytest
import torch
import transformers
from conftest import CAPTIONS, caption_labels, tiny_config, tiny_inputs
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, GenerationConfig

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.model.caption_outputs_gap_closed_clip import CACHE
from gap_closed_clip.model.decoder_gap_closed_clip import decoder_config_like, open_prompts


LEARNED = [CAPTIONS[1], CAPTIONS[3], CAPTIONS[4], CAPTIONS[0]]  # of 8 to 19 tokens
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 200,
    "max_position_embeddings": 34,
    "pad_token_id": 0,  # that of the tokenizer; positions begin at 1
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "sampled": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


def tokenized(tokenizer, texts, side="right"):
    return tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")


def learned_captioner(tokenizer, **config):
    """Two decoder layers over a text tower of one, trained until each image has its own caption."""
    torch.manual_seed(0)
    clip_model = GapClosedClipModel(tiny_config(**config))
    decoder_config = decoder_config_like(clip_model.config.text_config)
    decoder_config.num_hidden_layers, decoder_config.max_position_embeddings = 2, 34
    model = GapClosedClipForConditionalGeneration.from_clip(
        clip_model, tokenizer, decoder=decoder_config, label_smoothing=0.0
    )
    model.train().freeze_encoder()
    optimizer = torch.optim.AdamW(model.memory.parameters(), lr=5e-3)
    optimizer.add_param_group({"params": model.decoder.parameters()})
    pixel_values, labels = tiny_inputs(4)["pixel_values"], caption_labels(tokenizer, LEARNED)
    for _ in range(50):
        model(pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


@pytest.fixture(scope="module", params=["bert", "roberta"])
def captioner(request, tokenizer):
    return learned_captioner(tokenizer, **({} if request.param == "bert" else {"text_config": dict(ROBERTA)}))


@pytest.fixture
def images():
    return tiny_inputs(4)["pixel_values"]


@pytest.fixture
def prompts(tokenizer):
    """Prompts of 3, 5, 1 and 2 tokens, none of which goes on as another does."""
    return ["Chest radio", "Ultrasound of the gallbladder", "", "Axial"]


def generate(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(return_dict_in_generate=True, output_scores=True, output_logits=True, **kwargs)


def assert_same_generation(one, other):
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def trimmed(row, pad=0, sep=3):
    """The tokens of a row without the padding around them: beam search of transformers pads with sep if pad is 0."""
    tokens = [token for token in row.tolist() if token != pad]
    return tokens[: tokens.index(sep) + 1] if sep in tokens else tokens


def test_each_image_gets_its_caption_and_ends_where_it_ends(captioner, tokenizer, images):
    tokens = captioner.generate(images)
    expected = tokenized(tokenizer, LEARNED)
    assert torch.equal(tokens, expected.input_ids)  # eos, then padding, at four different places
    assert sorted(expected.attention_mask.sum(1).tolist()) == [8, 9, 10, 19]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompted", [False, True])
def test_the_cache_changes_nothing(captioner, tokenizer, images, prompts, way, prompted):
    prompt = dict(tokenized(tokenizer, prompts)) if prompted else {}
    kwargs = {"pixel_values": images, "max_new_tokens": 12, **prompt, **WAYS[way]}
    cached, plain = generate(captioner, **kwargs), generate(captioner, use_cache=False, **kwargs)
    assert getattr(cached, CACHE) is not None and getattr(plain, CACHE) is None
    assert_same_generation(cached, plain)


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_batch_is_its_rows_one_by_one(captioner, tokenizer, images, prompts, way, prompted):
    # The best beam alone: transformers goes on with the others of a row while another row is not done.
    kwargs = {"max_new_tokens": 20, **WAYS[way], "num_return_sequences": 1}
    batch_prompt = dict(tokenized(tokenizer, prompts)) if prompted else {}
    together = generate(captioner, pixel_values=images, **batch_prompt, **kwargs)
    for row in range(4):
        prompt = dict(tokenized(tokenizer, [prompts[row]])) if prompted else {}
        alone = generate(captioner, pixel_values=images[row : row + 1], **prompt, **kwargs)
        assert trimmed(together.sequences[row]) == trimmed(alone.sequences[0])
        if way == "greedy":
            for a, b in zip(together.logits, alone.logits, strict=False):
                torch.testing.assert_close(a[row], b[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_prompts_padded_on_either_side_give_the_same(captioner, tokenizer, images, prompts, way):
    kwargs = {"pixel_values": images, "max_new_tokens": 12, **WAYS[way]}
    right = generate(captioner, **tokenized(tokenizer, prompts), **kwargs)
    left = generate(captioner, **tokenized(tokenizer, prompts, side="left"), **kwargs)
    assert_same_generation(right, left)


def test_captions_begin_with_the_prompt_without_its_end(captioner, tokenizer, images, prompts):
    tokens = captioner.generate(images, **tokenized(tokenizer, prompts), max_new_tokens=20)
    for row, prompt in zip(tokens, prompts, strict=True):
        begins = tokenizer(prompt).input_ids[:-1]  # without [SEP]
        assert trimmed(row)[: len(begins)] == begins and tokenizer.sep_token_id not in begins
        assert trimmed(row).count(tokenizer.sep_token_id) == 1
    words = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert words[1].lower().startswith("ultrasound of the gallbladder showing a stone")
    assert words[2].lower() == tokenizer.decode(tokenizer(LEARNED[2]).input_ids, skip_special_tokens=True)


def test_open_prompts_written_out():
    tokens = torch.tensor([[2, 7, 8, 3, 0], [2, 3, 0, 0, 0], [0, 0, 2, 9, 3], [2, 7, 3, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    opened, opened_mask = open_prompts(tokens, mask, eos_token_id=[3, 5], pad_token_id=0)
    assert opened.tolist() == [[0, 2, 7, 8], [0, 0, 0, 2], [0, 0, 2, 9], [2, 7, 3, 8]]  # only a last [SEP] goes
    assert opened_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert open_prompts(tokens[:1], None, None, None)[0].tolist() == tokens[:1].tolist()
    assert open_prompts(tokens[:1], None, 0, 0)[0].tolist() == tokens[:1, :4].tolist()  # padding that may be an end
    found = open_prompts(tokens, None, eos_token_id=[3, 5], pad_token_id=0)
    assert [part.tolist() for part in found] == [opened.tolist(), opened_mask.tolist()]


def test_generation_scores_are_the_logits_of_teacher_forcing(captioner, tokenizer, images, prompts):
    generated = generate(captioner, pixel_values=images, max_new_tokens=12)
    start = 1
    forced = captioner(images, input_ids=generated.sequences).logits[:, start - 1 : -1]  # (B, new, vocabulary)
    ended = (generated.sequences[:, start:] == tokenizer.pad_token_id).unsqueeze(-1)
    stepped = torch.stack(generated.logits, 1)
    torch.testing.assert_close(stepped.masked_fill(ended, 0), forced.masked_fill(ended, 0), rtol=1e-4, atol=1e-4)


def test_lengths(captioner, tokenizer, images):
    assert captioner.generation_config.max_new_tokens == 32 + (captioner.config.decoder_config.model_type == "bert")
    assert captioner.generate(images, max_new_tokens=3).shape == (4, 4)
    prompt = tokenizer(["Chest radiograph"] * 4, return_tensors="pt")
    assert captioner.generate(images, **prompt, max_new_tokens=3).shape == (4, prompt.input_ids.shape[1] - 1 + 3)
    limit = 34 - (captioner.config.decoder_config.model_type == "roberta")
    longest = captioner.generate(images, max_new_tokens=limit - 1, min_new_tokens=limit - 1)
    assert longest.shape == (4, limit)
    with pytest.raises(ValueError, match=f"decoder takes {limit} at most: max_new_tokens={limit - 1} or less"):
        captioner.generate(images, max_new_tokens=limit)
    with pytest.raises(ValueError, match=f"prompt of 3 tokens .* max_new_tokens={limit - 3} or less"):
        captioner.generate(images, input_ids=torch.full((4, 3), 7), max_new_tokens=limit - 2)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens long, the decoder takes {limit}"):
        captioner(images, input_ids=torch.full((4, limit + 1), 7))


CHOICES = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 3},
    "prefilled in chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("prompted", [False, True])
def test_ways_to_get_the_same_sooner(captioner, tokenizer, images, prompts, choice, prompted):
    kwargs = {"pixel_values": images, "max_new_tokens": 12} | (tokenized(tokenizer, prompts) if prompted else {})
    plain = generate(captioner, **kwargs, num_beams=CHOICES[choice].get("num_beams", 1))
    assert_same_generation(generate(captioner, **kwargs, **CHOICES[choice]), plain)


def test_a_compiled_step_is_one_graph(captioner, images, monkeypatch):
    expected = captioner.generate(images, max_new_tokens=12)
    counter = CompileCounter()
    monkeypatch.setattr(captioner, "forward", torch.compile(captioner.forward, backend=counter, fullgraph=True))
    static = {"cache_implementation": "static", "disable_compile": True}  # not once more by transformers
    assert torch.equal(captioner.generate(images, max_new_tokens=12, **static), expected)
    assert counter.frame_count == 2  # the prompt, and every step after it


@pytest.mark.parametrize("drafts", ["the prompt's", "another model's"])
def test_drafts_change_nothing(captioner, tokenizer, images, drafts):
    prompt = tokenizer("Chest radiograph with left pleural chest radiograph", return_tensors="pt")
    kwargs = {"pixel_values": images[:1], "max_new_tokens": 12, "eos_token_id": 3, **prompt}
    if drafts == "the prompt's":
        by_drafts = captioner.generate(prompt_lookup_num_tokens=3, **kwargs)
    else:
        assistant = copy.deepcopy(captioner)
        with torch.no_grad():
            assistant.decoder.get_output_embeddings().bias.copy_(4 * torch.randn(200))  # often wrong
        by_drafts = captioner.generate(assistant_model=assistant, **kwargs)
    assert torch.equal(by_drafts, captioner.generate(**kwargs))


@pytest.mark.parametrize("prompted", [False, True])
def test_going_on_with_the_cache_of_before(captioner, tokenizer, images, prompts, prompted):
    prompt = dict(tokenized(tokenizer, prompts)) if prompted else {}
    at_once = captioner.generate(images, **prompt, max_new_tokens=12)
    begun = captioner.generate(images, **prompt, max_new_tokens=8, return_dict_in_generate=True)
    mask = (begun.sequences != tokenizer.pad_token_id).long()
    ended = captioner.generate(images, begun.sequences, mask, cache=getattr(begun, CACHE), max_new_tokens=4)
    assert torch.equal(ended[:, : mask.shape[1]], begun.sequences)  # captions at their end, too
    for a, b in zip(ended, at_once, strict=True):
        assert trimmed(a) == trimmed(b)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_by_the_librarys_name_of_this_version_and_of_the_other(captioner, images, name):
    renamed = Version(transformers.__version__) >= Version("5.24.dev0")
    field = "cache" if renamed else "past_key_values"
    begun = captioner.generate(images, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    step = captioner(images, input_ids=begun.sequences[:, :-1], use_cache=True)
    assert field in begun and list(step).index(field) == list(step).index("logits") + 1
    cache = step[field]
    deprecated = renamed and name == "past_key_values"  # by the library's own models, too
    message = "`past_key_values` is deprecated .* Use `cache` instead"
    with pytest.warns(FutureWarning, match=message) if deprecated else warnings.catch_warnings():
        if not deprecated:
            warnings.simplefilter("error")
        memory = {"encoder_hidden_states": step.encoder_hidden_states, "attention_mask": torch.ones(4, 5).long()}
        last = captioner(input_ids=begun.sequences[:, -1:], **memory, **{name: cache}).logits[:, -1]
    with pytest.warns(FutureWarning, match=message) if deprecated else warnings.catch_warnings():
        if not deprecated:
            warnings.simplefilter("error")
        ended = captioner.generate(images, begun.sequences, max_new_tokens=4, **{name: begun[field]})
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(last, captioner(images, begun.sequences).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(ended, captioner.generate(images, max_new_tokens=8))
    caption_cache = DynamicCache()  # without a place for the memory, as generate makes them
    captioner(images, input_ids=begun.sequences, cache=caption_cache)
    assert caption_cache.get_seq_length() == 5


def test_prompts_as_embeddings(captioner, tokenizer, images):
    tokens = tokenizer("Ultrasound of the", return_tensors="pt").input_ids[:, :-1]
    embeds = captioner.get_input_embeddings()(tokens)
    new = captioner.generate(images[1:2], inputs_embeds=embeds, max_new_tokens=9)
    assert torch.equal(new, captioner.generate(images[1:2], tokens, max_new_tokens=9)[:, tokens.shape[1] :])


def test_a_generation_config_without_tokens_takes_the_models(captioner, tokenizer, images, prompts):
    tokens = tokenized(tokenizer, prompts)
    config = GenerationConfig(max_new_tokens=7)
    expected = captioner.generate(images, **tokens, max_new_tokens=7)
    assert torch.equal(captioner.generate(images, **tokens, generation_config=config), expected)
    default = copy.deepcopy(captioner.generation_config)
    expected = captioner.generate(images, **tokens)
    assert torch.equal(captioner.generate(images, **tokens, generation_config=default), expected)
    assert default == captioner.generation_config
    with pytest.raises(ValueError, match="prompt of 5 tokens"):  # the number that a user asks for
        captioner.generate(images, **tokens, generation_config=GenerationConfig(max_new_tokens=60))
    kept = captioner.generate(images, **tokens, eos_token_id=5, max_new_tokens=1)
    assert (kept == tokenizer.sep_token_id).sum() >= 4  # no end by this argument


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_a_model_whose_generation_config_has_no_tokens_takes_the_decoders(
    captioner, tokenizer, images, prompts, monkeypatch, settings
):
    """As after `captioner.generation_config = GenerationConfig(...)`, or of a folder with such a file."""
    tokens = tokenized(tokenizer, prompts)
    expected = captioner.generate(images, **settings), captioner.generate(images, **tokens, **settings)
    assert (expected[0] == tokenizer.sep_token_id).any()  # a caption that ends
    limit = captioner.generation_config.max_new_tokens
    monkeypatch.setattr(captioner, "generation_config", GenerationConfig(max_new_tokens=limit, **settings))
    assert torch.equal(captioner.generate(images), expected[0])
    assert torch.equal(captioner.generate(images, **tokens), expected[1])
    assert captioner.generation_config.eos_token_id is None


def test_sequences_and_outputs_asked_for(captioner, images):
    output = captioner.generate(
        images,
        num_beams=4,
        num_return_sequences=3,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
    )
    assert output.sequences.shape == (12, 6)
    assert output.sequences_scores.shape == (12,) and len(output.scores) == 5
    assert output.sequences_scores.view(4, 3).diff(dim=1).max() <= 0  # best first
    best = captioner.generate(images, num_beams=4, max_new_tokens=5)
    assert torch.equal(best, output.sequences[::3])


def test_nothing_is_warned_of(captioner, tokenizer, images, prompts, caplog):
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        captioner.generate(images)
        captioner.generate(images, **tokenized(tokenizer, prompts), max_new_tokens=9, num_beams=2)
        captioner.generate(images, do_sample=True, max_new_tokens=9, use_cache=False)
    assert not caplog.records


def test_what_pipelines_and_the_trainer_hand_on_is_taken(captioner, tokenizer, images):
    labels = caption_labels(tokenizer, LEARNED)
    plain = captioner.generate(images)
    assert torch.equal(captioner.generate(pixel_values=images, labels=labels), plain)
    tokens = tokenized(tokenizer, [""] * 4)  # an empty prompt is none
    assert torch.equal(captioner.generate(pixel_values=images, **tokens | {"max_new_tokens": 20}), plain)
    assert torch.equal(captioner.generate(images, input_ids=torch.empty(4, 0, dtype=torch.long)), plain)
    memory = captioner.encode(images)[0]
    assert torch.equal(captioner.generate(encoder_hidden_states=memory), plain)


def test_the_images_are_encoded_once(captioner, images):
    calls = []
    handle = captioner.gap_closed_clip.vision_model.register_forward_hook(lambda *args: calls.append(1))
    captioner.generate(images, num_beams=2, max_new_tokens=6)
    handle.remove()
    assert len(calls) == 1
