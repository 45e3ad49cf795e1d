"""open_clip's text towers in transformers: Hugging Face's own, CLIP's, and the one of SigLIP."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers.utils import logging

from ..messages import did_you_mean
from .open_clip_weights import (
    PLAIN_BLOCKS,
    Layers,
    Weights,
    activation,
    check_fields,
    load_weights,
    norm_eps,
    renamed,
    take,
    take_layers,
    take_matrix,
)


logger = logging.get_logger(__name__)

SECTION = "text_cfg"
OF_TOKENIZER = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
OF_HUGGING_FACE = ("hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")
OF_TRANSFORMER = (
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "pool_type",
    "eos_id",
    "no_causal_mask",
    "proj_type",
    "proj_bias",
    "act_kwargs",
    "norm_kwargs",
    # Without effect on an embedding.
    "pad_id",
    "output_tokens",
    "final_ln_after_pool",
)
FIXED = {"embed_cls": False, **PLAIN_BLOCKS}
TRANSFORMER_NAMES = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
POOLERS = {"cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls", "mean_pooler": "mean"}
# Attention heads of a BERT by its width, where nothing else is known of it: those of BERT-base and BERT-large, and of
# all that came from them. Smaller ones differ (MiniLM has 12 of 32, BERT-mini 4 of 64).
BERT_HEADS = {768: 12, 1024: 16}


def text_tower(
    fields: dict[str, Any], weights: Weights, embed_dim: int, quick_gelu: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Layers, str]:
    """
    The text tower, its projection and what represents a text (`text_pooling` of [`ClipParts`]).

    Args:
        fields: `text_cfg`.
        weights: those of the text tower are moved out: either all that begin with `text.`, or all but the temperature.
        embed_dim: width of the common space.
        quick_gelu: of open_clip's own tower.
        tokenizer: the one that goes with it.

    Raises:
        ValueError: there is no such tower in transformers, or the weights are of another one.
        OSError: the configuration of the Hugging Face model can't be found.
    """
    if any(name.startswith("text.") for name in weights):
        weights = take(weights, "text.")
    else:
        weights = {name: weights.pop(name) for name in list(weights) if not name.startswith("logit_")}
    weights.pop("attn_mask", None)
    if fields.get("hf_model_name"):
        return _hugging_face_tower(fields, weights)
    check_fields(SECTION, fields, (*OF_TRANSFORMER, *OF_TOKENIZER, *OF_HUGGING_FACE), FIXED)
    if fields.get("no_causal_mask"):
        return _siglip_tower(fields, weights, embed_dim, quick_gelu, tokenizer)
    return _clip_tower(fields, weights, quick_gelu, tokenizer)


def _clip_tower(
    fields: dict[str, Any], weights: Weights, quick_gelu: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Layers, str]:
    settings = _transformer_settings(fields, quick_gelu)
    pool = fields.get("pool_type", "argmax")
    if pool == "argmax":
        # The highest id of a text is its end in CLIP's own vocabulary. In others it need not be, and transformers
        # takes the highest id where the configuration has the 2 of early conversions.
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id == settings["vocab_size"] - 1 else 2
    elif pool == "eos" and fields.get("eos_id", 2) != 2:
        eos = fields["eos_id"]
    else:
        raise ValueError(
            f"{SECTION}.pool_type is {pool!r}: CLIPTextModel pools at the end of a text, which is 'argmax', or 'eos' "
            "with an eos_id other than 2."
        )
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos}
    projection = _own_projection(weights)
    model = CLIPTextModel(CLIPTextConfig(**settings, **ids)).eval()
    load_weights(model, renamed(weights, TRANSFORMER_NAMES), "text")
    return model, projection, "pooler"


def _siglip_tower(
    fields: dict[str, Any], weights: Weights, embed_dim: int, quick_gelu: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Layers, str]:
    """A tower without a causal mask, whose last token, padding included, represents the text: as SigLIP's."""
    pool = fields.get("pool_type", "argmax")
    if pool != "last" or not fields.get("hf_tokenizer_name"):
        raise ValueError(
            f"{SECTION}.no_causal_mask goes with pool_type 'last' and an hf_tokenizer_name, as in SigLIP's text "
            f"tower; here pool_type is {pool!r} and hf_tokenizer_name {fields.get('hf_tokenizer_name')!r}."
        )
    settings = _transformer_settings(fields, quick_gelu)
    width = settings["hidden_size"]
    # SigLIP's projection is part of the tower in transformers, its head.
    weight, bias = (_own_projection(weights) or [(torch.eye(width), None)])[0]
    head = {"head.weight": weight, "head.bias": torch.zeros(len(weight)) if bias is None else bias}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = SiglipTextConfig(**settings, **ids, projection_size=len(weight))
    if len(weight) != embed_dim:
        raise ValueError(f"model_cfg.embed_dim is {embed_dim}, but texts are projected to {len(weight)} dimensions.")
    model = SiglipTextModel(config).eval()
    load_weights(model, renamed(weights, TRANSFORMER_NAMES) | head, "text")
    return model, [], "pooler"


def _transformer_settings(fields: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
    width = fields.get("width", 512)
    return {
        "vocab_size": fields.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * fields.get("mlp_ratio", 4.0)),
        "num_hidden_layers": fields.get("layers", 12),
        "num_attention_heads": fields.get("heads", 8),
        "max_position_embeddings": fields.get("context_length", 77),
        "hidden_act": activation(SECTION, fields, quick_gelu),
        "layer_norm_eps": norm_eps(SECTION, fields),
    }


def _own_projection(weights: Weights) -> Layers:
    return take_matrix(weights, "text_projection") or take_layers(weights, ("text_projection",))


def _hugging_face_tower(fields: dict[str, Any], weights: Weights) -> tuple[PreTrainedModel, Layers, str]:
    check_fields(SECTION, fields, (*OF_HUGGING_FACE, *OF_TOKENIZER, *OF_TRANSFORMER, *FIXED), {})
    pooler = fields.get("hf_pooler_type", "mean_pooler")
    if pooler not in POOLERS:
        raise ValueError(f"{SECTION}.hf_pooler_type can't be taken over: {pooler!r}{did_you_mean(pooler, POOLERS)}")
    pooling = POOLERS[pooler]
    projection = take_layers(weights, ("proj", "proj.0", "proj.2"))
    weights = {
        name.removeprefix("transformer."): value
        for name, value in weights.items()
        # Positions are no weights any more. Checkpoints of before may have a pooler that is not used.
        if not name.endswith(".position_ids") and not (pooling != "pooler" and ".pooler." in name)
    }
    config = _hugging_face_config(fields["hf_model_name"], weights)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{SECTION}.hf_model_name {fields['hf_model_name']!r} is the encoder of an encoder-decoder "
            f"({config.model_type}): only encoders that are whole models can be taken over."
        )
    try:
        model = AutoModel.from_config(config, add_pooling_layer=pooling == "pooler").eval()
    except TypeError:  # an encoder that never has a pooler
        model = AutoModel.from_config(config).eval()
    if pooling == "pooler" and getattr(model, "pooler", None) is None:
        pooling = "cls"
    load_weights(model, weights, "text")
    return model, projection, pooling


def _hugging_face_config(name: str, weights: Weights) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        config = bert_config(weights)
        if config is None:
            raise OSError(
                f"{SECTION}.hf_model_name: the configuration of {name!r} could not be loaded, and the weights are not "
                "those of a BERT-base or BERT-large, of which it could be told. Put its config.json into a folder and "
                f"name that in open_clip_config.json. The library says: {str(error).strip().splitlines()[0]}"
            ) from error
    logger.warning(
        f"{SECTION}.hf_model_name: the configuration of {name!r} is out of reach. By their shapes, the weights are "
        f"of a BERT of {config.num_hidden_layers} layers and width {config.hidden_size}: it is taken to have "
        f"{config.num_attention_heads} heads and GELU, as those of that width have."
    )
    return config


def bert_config(weights: dict[str, Tensor]) -> BertConfig | None:
    """
    The configuration of a BERT by the shapes of its weights; None where they may be of another model.

    RoBERTa and its kin have the same names, and one type of token instead of two.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    words, types = (
        shapes.get("embeddings.word_embeddings.weight"),
        shapes.get("embeddings.token_type_embeddings.weight"),
    )
    positions = shapes.get("embeddings.position_embeddings.weight")
    inner = shapes.get("encoder.layer.0.intermediate.dense.weight")
    if not (words and types and positions and inner) or types[0] != 2 or words[1] not in BERT_HEADS:
        return None
    return BertConfig(
        vocab_size=words[0],
        hidden_size=words[1],
        num_hidden_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layer.")}),
        num_attention_heads=BERT_HEADS[words[1]],
        intermediate_size=inner[0],
        max_position_embeddings=positions[0],
    )


__all__ = ["bert_config", "text_tower"]
