"""What a captioner's decoder is made of: its first weights, and the prompts it goes on from."""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .towers_gap_closed_clip import not_loaded, refuse_adapter


def decoder_config_like(text_config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The configuration of a decoder of a text tower's shape.

    Raises:
        ValueError: the tower's family has no decoder with cross-attention.
    """
    config = copy.deepcopy(text_config)
    if type(config) not in AutoModelForCausalLM._model_mapping or not hasattr(config, "is_decoder"):
        raise ValueError(
            f"A text tower of type {config.model_type!r} can't be made a decoder: name one (a BERT with the same "
            "vocabulary)."
        )
    config.is_decoder = config.add_cross_attention = config.use_cache = True
    return config


def build_decoder(
    text_config: PreTrainedConfig,
    decoder: str | PreTrainedConfig | None,
    num_layers: int | None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """
    A decoder with the vocabulary of a text tower.

    Args:
        text_config: the text tower's.
        decoder: Hub id or folder of a BERT to load, or the configuration of one to start at random; None for one of
            the text tower's shape, with random weights.
        num_layers: of a decoder of the text tower's shape, where it has fewer layers.
        dtype: of the weights, whatever those were stored in that it starts from.

    Raises:
        OSError: a decoder that can't be found or downloaded.
        ValueError: a decoder that is not of the BERT family, or has another vocabulary; more layers than there are.
    """
    if isinstance(decoder, str):
        model = load_decoder(decoder, dtype)
    else:
        config = decoder_config_like(text_config if decoder is None else decoder)
        if decoder is None and num_layers is not None:
            if not 1 <= num_layers <= config.num_hidden_layers:
                raise ValueError(
                    f"num_layers is {num_layers}: the text tower has {config.num_hidden_layers}, use 1 to as many."
                )
            config.num_hidden_layers = num_layers
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.config.vocab_size != text_config.vocab_size:
        raise ValueError(
            f"The decoder has a vocabulary of {model.config.vocab_size} tokens, the text tower one of "
            f"{text_config.vocab_size}: one tokenizer serves both, so name a decoder with the same."
        )
    return model


def load_decoder(name_or_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A BERT's weights as those of a decoder; what they lack, cross-attention for one, starts at random."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            is_decoder=True,
            add_cross_attention=True,
            use_cache=True,
            use_safetensors=True,
        )
    except OSError as error:
        raise not_loaded(f"The decoder {name_or_path!r}", error) from error
    refuse_adapter(name_or_path, model)
    return model


def copy_layers(text_model: PreTrainedModel, decoder_model: PreTrainedModel) -> None:
    """
    Copies all weights of a text tower to a decoder of its shape.

    Raises:
        ValueError: the decoder has other layers, its cross-attention aside.
    """
    missing = decoder_model.load_state_dict(text_model.state_dict(), strict=False).missing_keys
    lacking = [name for name in missing if "crossattention" not in name]
    if lacking:
        raise ValueError(f"The text tower has no weights for the decoder's {lacking[0]}: name another decoder.")


def head_of(decoder_model: nn.Module) -> nn.Module | None:
    """
    What makes logits of a decoder's last hidden states; None where its family has more than one module for that, or
    where it is wrapped by something that has to see every call.
    """
    if not isinstance(decoder_model, PreTrainedModel) or decoder_model.base_model is decoder_model:
        return None
    return getattr(decoder_model, "cls", None) or getattr(decoder_model, "lm_head", None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """
    The ids of the tokens that captions begin with, end with and are padded with, as fields of a generation config.

    Raises:
        ValueError: a tokenizer without one of them.
    """
    names = {"bos_token_id": "cls_token", "eos_token_id": "sep_token", "pad_token_id": "pad_token"}
    for name in names.values():
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(f"The tokenizer has no {name}: captions need one.")
    return {field: getattr(tokenizer, f"{name}_id") for field, name in names.items()}


def open_prompts(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
) -> tuple[Tensor, Tensor]:
    """
    Prompts as generation goes on from them: without the token that closes a text, padded on the left.

    Args:
        input_ids, attention_mask: (B, L), padded on either side. Without a mask, padding is told by its token, as in
            `GenerationMixin.generate`.
        eos_token_id: of the tokens that close a text, those of a generation config.
        pad_token_id: of padding.

    Returns:
        Tokens and mask, (B, at most L) each.

    Raises:
        ValueError: a prompt that is padding alone.
    """
    pad = 0 if pad_token_id is None else pad_token_id
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, device=input_ids.device).flatten()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        if pad_token_id is not None and not (ends == pad_token_id).any():
            attention_mask = input_ids != pad_token_id
    mask = attention_mask.bool()
    if not mask.any(1).all():
        raise ValueError("A prompt has no token: its attention_mask is all zeros. Leave out input_ids for no prompt.")
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1, keepdim=True)  # (B, 1) place of the last token
    closed = torch.isin(input_ids.gather(1, last), ends) & (mask.sum(1, keepdim=True) > 1)
    mask = mask.scatter(1, last, mask.gather(1, last) & ~closed)
    order = mask.long().argsort(dim=1, stable=True)  # padding first, tokens in their order
    mask, input_ids = mask.gather(1, order), input_ids.gather(1, order)
    longest = int(mask.sum(1).max())
    input_ids, mask = input_ids[:, -longest:], mask[:, -longest:]
    return input_ids.masked_fill(~mask, pad), mask.long()


def one_for_each(input_ids: Tensor, attention_mask: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """
    Prompts for `number` images: one for each, or a single one repeated for all of them.

    Raises:
        ValueError: another number of prompts.
    """
    if len(input_ids) not in (1, number):
        raise ValueError(f"{len(input_ids)} prompts and {number} images: give one for each image, or one for all.")
    return input_ids.expand(number, -1), attention_mask.expand(number, -1)


__all__ = [
    "build_decoder",
    "copy_layers",
    "decoder_config_like",
    "head_of",
    "load_decoder",
    "one_for_each",
    "open_prompts",
    "special_tokens",
]
