"""[`GapClosedClipCaptionOutput`]: what a captioner returns, and what transformers calls the cache in it."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg


# transformers calls the keys and values of the tokens so far `past_key_values` up to 5.23, and `cache` from 5.24 on:
# as an argument of `forward` and `generate`, and as a field of outputs. The captioner's code says `cache`, and CACHE
# is the name in the installed version. The decorator lets callers use the old name with any version: from 5.24 on with
# the library's own deprecation warning, before that without one (version "0" lies in the past). When 5.23 is no longer
# supported, CACHE goes and the output has a plain field `cache`; the decorator can stay until the library drops the
# old name in 5.40.
CACHE = "cache" if hasattr(CausalLMOutputWithCrossAttentions, "cache") else "past_key_values"
takes_past_key_values = deprecate_kwarg(
    "past_key_values", version="5.40.0" if CACHE == "cache" else "0", new_name="cache"
)


@dataclass
class GapClosedClipCaptionOutput(ModelOutput):
    """
    Output of [`GapClosedClipForConditionalGeneration`] for B captions of L tokens.

    Args:
        loss (scalar): `caption_loss`, plus the weighted objective of the space where the config asks for it.
        caption_loss (scalar): mean cross-entropy of a caption's tokens in nats; smoothed in training.
        logits (B, L, vocabulary): of the next token at each position.
        cache ([`EncoderDecoderCache`]): keys and values of the caption so far, and of the memory. Its name is
            `past_key_values` with transformers below 5.24, as in the library's own outputs.
        hidden_states, attentions, cross_attentions: the decoder's, where they were asked for.
        shared_embeds (B, D): what the captions are written from, unit vectors.
        encoder_hidden_states (B, M, hidden): the decoder's memory.
    """

    loss: Tensor | None = None
    caption_loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "cache":
        cache: EncoderDecoderCache | None = None
    else:
        past_key_values: EncoderDecoderCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    shared_embeds: Tensor | None = None
    encoder_hidden_states: Tensor | None = None


def with_memory_cache(cache: Cache | None) -> EncoderDecoderCache | None:
    """A cache with a place for the keys and values of the memory, which those that `generate` makes do not have."""
    if cache is None or isinstance(cache, EncoderDecoderCache):
        return cache
    return EncoderDecoderCache(cache, DynamicCache())


__all__ = ["CACHE", "GapClosedClipCaptionOutput", "takes_past_key_values", "with_memory_cache"]
