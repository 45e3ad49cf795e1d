"""What limits the captions of `generate`, and what of its arguments a captioner does not take."""

import copy
import logging
import warnings

import pytest
import torch
from conftest import captioner_of, tiny_inputs
from transformers import GenerationConfig


@pytest.fixture
def captioner(tiny_processor):
    return captioner_of(tiny_processor.tokenizer)


@pytest.fixture
def images():
    return tiny_inputs(4)["pixel_values"]


@pytest.mark.parametrize("more", [0, 5])
def test_a_prompt_that_leaves_no_room_is_to_be_shortened(captioner, images, more):
    length = captioner.max_caption_length + more
    prompt = torch.full((4, length), 7)
    for limit in ({}, {"max_new_tokens": 2}, {"generation_config": GenerationConfig(do_sample=False)}):
        with pytest.raises(ValueError, match=f"^A prompt of {length} tokens leaves no room .*: shorten the prompt.$"):
            captioner.generate(images, input_ids=prompt, **limit)
    for limit in ({"max_length": 3}, {"generation_config": GenerationConfig(max_length=3)}):
        with pytest.raises(ValueError, match="max_length is 3, and the prompt has 4 tokens.*: shorten the prompt, or"):
            captioner.generate(images, input_ids=prompt[:, :4], **limit)


def test_the_length_of_a_given_config_is_that_of_the_argument(captioner, images, caplog):
    logging.getLogger("transformers").propagate = True
    prompt, config = torch.full((4, 3), 7), GenerationConfig(max_length=6, eos_token_id=199)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert captioner.generate(images, generation_config=config).shape == (4, 6)
        prompted = captioner.generate(images, input_ids=prompt, generation_config=config)
    assert prompted.shape == (4, 6) and (config.max_length, config.max_new_tokens) == (6, None) and not caplog.records
    assert captioner.generate(images, generation_config=config, max_length=5).shape == (4, 5)
    assert captioner.generate(images, generation_config=config, max_new_tokens=7).shape == (4, 8)
    handed_over = copy.deepcopy(captioner.generation_config)  # as a pipeline does
    assert captioner.generate(images, generation_config=handed_over, max_length=5).shape == (4, 5)
    both = GenerationConfig(max_length=6, max_new_tokens=2, eos_token_id=199)  # the library's order
    assert captioner.generate(images, generation_config=both).shape == (4, 3)
    unlimited = GenerationConfig(eos_token_id=199)  # the model's own limit, as far as the decoder goes
    long = captioner.generate(images, input_ids=prompt, generation_config=unlimited)
    assert long.shape == (4, captioner.max_caption_length)


def test_guidance_is_refused(captioner, images, monkeypatch):
    message = "guidance_scale is not supported: .* Leave it out."
    for given in ({"guidance_scale": 1.5}, {"generation_config": GenerationConfig(guidance_scale=1.5)}):
        with pytest.raises(ValueError, match=message):
            captioner.generate(images, **given)
    plain = captioner.generate(images, max_new_tokens=4)
    assert torch.equal(captioner.generate(images, guidance_scale=1.0, max_new_tokens=4), plain)
    monkeypatch.setattr(captioner.generation_config, "guidance_scale", 1.5)
    with pytest.raises(ValueError, match=message):
        captioner.generate(images)
