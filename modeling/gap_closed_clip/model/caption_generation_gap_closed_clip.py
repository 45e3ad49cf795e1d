"""[`CaptionGenerationMixin`]: `generate` of a captioner, with the prompts, lengths and positions that it needs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.utils import ModelOutput

from .caption_outputs_gap_closed_clip import CACHE, takes_past_key_values, with_memory_cache
from .configuration_gap_closed_clip import GapClosedClipConfig
from .decoder_gap_closed_clip import one_for_each, open_prompts
from .tower_kinds_gap_closed_clip import first_position, longest_text


MAX_NEW_TOKENS = 64  # of a new captioner; captions of radiology are longer than the library's 20 tokens


def caption_generation_config(decoder_config: PreTrainedConfig, special_tokens: dict[str, int]) -> GenerationConfig:
    """What a new captioner generates by: `MAX_NEW_TOKENS`, or as many as its decoder takes behind the first token."""
    max_new_tokens = min(MAX_NEW_TOKENS, longest_text(decoder_config) - 1)
    return GenerationConfig(max_new_tokens=max_new_tokens, **special_tokens)


class CaptionGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a decoder that attends to an image or to an embedding, not to tokens of a prompt alone."""

    config: GapClosedClipConfig
    encode: Callable[..., tuple[Tensor, Tensor]]  # images or embeddings to the decoder's memory, and the embeddings

    @property
    def max_caption_length(self) -> int:
        """Tokens of the longest caption that the decoder takes, a prompt and `cls_token` included."""
        return longest_text(self.config.decoder_config)

    @takes_past_key_values
    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shared_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        pooled_image: Tensor | None = None,
        image_tokens: Tensor | None = None,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """
        Captions, as `GenerationMixin.generate`, whose arguments it takes, all but `guidance_scale`: greedy, beams,
        sampling, ...

        The images are encoded once. A prompt is what the captions begin with; the tokenizer's `sep_token` at its end
        is dropped, and prompts of different lengths are padded on the left, whatever side they come padded on. The
        sequences of an earlier call, with its `cache`, are left as they are.

        Args:
            pixel_values, shared_embeds, pooled_image, image_tokens, encoder_hidden_states: what to write from, as in
                `forward`.
            input_ids, attention_mask: (B, L), prompts as the tokenizer makes them, or (1, L), one for all; default
                `cls_token` alone.
            token_type_ids, labels: not used; accepted because pipelines and the Trainer hand them on.
            cache: of an earlier call (`past_key_values` in transformers below 5.24, which is accepted as well).

        Returns:
            (B, length) token ids with the prompts; with `num_return_sequences`, that many rows for each image.

        Raises:
            ValueError: as `encode`; another number of prompts than of images; a prompt and `max_new_tokens` beyond
                what the decoder takes, or a prompt as long as that or as `max_length`. (The generation config's own
                `max_new_tokens` gives way to a prompt.) A `guidance_scale`, in a generation config, too.
        """
        if self._generation_setting("guidance_scale", kwargs) not in (None, 1):
            raise ValueError(
                "guidance_scale is not supported: it compares the next token with what the decoder would write "
                "without an image, which this one has not learned. Leave it out."
            )
        # A generation config that replaced the model's own has none, and captions would not end; of a BERT tokenizer,
        # which has no token of this name, the Trainer of transformers 5.17 removes the first.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if self._generation_setting(name, kwargs) is None:
                kwargs[name] = getattr(self.decoder.config, name)
        if encoder_hidden_states is None:
            encoder_hidden_states, _ = self.encode(pixel_values, shared_embeds, pooled_image, image_tokens)
        if input_ids is None or not input_ids.shape[1]:
            input_ids = attention_mask = None
        elif cache is None or not cache.get_seq_length():
            ends, pad = (self._generation_setting(name, kwargs) for name in ("eos_token_id", "pad_token_id"))
            input_ids, attention_mask = open_prompts(input_ids, attention_mask, ends, pad)
            input_ids, attention_mask = one_for_each(input_ids, attention_mask, len(encoder_hidden_states))
        kwargs = self._with_length_limit(kwargs, prompt_length=1 if input_ids is None else input_ids.shape[1])
        if cache is not None:
            kwargs[CACHE] = with_memory_cache(cache)
        return super().generate(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states, **kwargs
        )

    def _generation_setting(self, name: str, kwargs: dict) -> Any:
        """A setting of `generate`: its argument, or of the generation config it gets, or of the model's own."""
        configs = (kwargs.get("generation_config"), self.generation_config)
        values = (kwargs.get(name), *(getattr(config, name) for config in configs if config is not None))
        return next((value for value in values if value is not None), None)

    def _with_length_limit(self, kwargs: dict, prompt_length: int) -> dict:
        """
        Arguments of `generate` that limit the number of new tokens, whichever way the length was limited before.

        A `max_length`, an argument or of the generation config that is given, becomes `max_new_tokens`, because the
        `max_new_tokens` of the model's generation config would win over it. Without either, the model's own holds as
        far as the decoder can go on from the prompt.
        """
        if "max_new_tokens" in kwargs:
            return kwargs
        kwargs, config = dict(kwargs), kwargs.get("generation_config")
        max_length, given = kwargs.pop("max_length", None), None if config is None else config.max_new_tokens
        if max_length is None and config is not None and given is None:
            max_length = config.max_length  # None unless it was set
        default, room = self.generation_config.max_new_tokens, self.max_caption_length - prompt_length
        if max_length is not None:
            new_tokens = max_length - prompt_length
            if new_tokens < 1:
                raise ValueError(
                    f"max_length is {max_length}, and the prompt has {prompt_length} tokens, which count: shorten the "
                    "prompt, or limit the new tokens alone, by max_new_tokens."
                )
        elif default is not None and given in (None, default) and room > 0:
            # `default` in a given config is the model's, handed over by a pipeline of transformers 5.17.
            new_tokens = min(default, room)
        else:
            return kwargs
        if config is None:
            return kwargs | {"max_new_tokens": new_tokens}
        config = copy.copy(config)
        config.max_new_tokens, config.max_length = new_tokens, None
        return kwargs | {"generation_config": config}

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length) -> None:
        limit = self.max_caption_length
        if input_ids_length >= limit:
            raise ValueError(
                f"A prompt of {input_ids_length} tokens leaves no room for new ones, as the decoder takes {limit} at "
                "most: shorten the prompt."
            )
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        if generation_config.max_length > limit:
            raise ValueError(
                f"A prompt of {input_ids_length} tokens and the new ones make up to {generation_config.max_length}, "
                f"the decoder takes {limit} at most: max_new_tokens={limit - input_ids_length} or less."
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        # transformers counts from 0, whatever the decoder does
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs) + first_position(
            self.config.decoder_config
        )


__all__ = ["MAX_NEW_TOKENS", "CaptionGenerationMixin", "caption_generation_config"]
