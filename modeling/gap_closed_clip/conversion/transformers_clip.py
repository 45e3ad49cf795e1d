"""CLIPs of transformers (CLIP, SigLIP, ChineseCLIP, MetaCLIP 2, a VisionTextDualEncoder, ...) to their parts."""

from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..model.tower_kinds_gap_closed_clip import FULL_LENGTH, longest_text, takes
from ..model.towers_gap_closed_clip import loading_in_one_line, not_loaded, pickled_weights, refuse_adapter
from .parts import ClipParts, Reference
from .preprocessing import agree_on_padding, load_image_processor, load_tokenizer


# In these a text is represented by its first token, and the text tower has no pooler, or it is left out.
FIRST_TOKEN = ("altclip", "chinese_clip")


def transformers_parts(name: str, revision: str | None = None, allow_pickle: bool = False) -> ClipParts:
    """
    The parts of a whole model that transformers loads by `AutoModel`, in float32.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
        allow_pickle: whether pickled weights may be read, by `torch.load(weights_only=True)`, where there are no
            others.

    Raises:
        OSError: it can't be found.
        ValueError: a model that has not both towers, or takes images as lists of patches; weights that are pickled or
            missing; no image processor or tokenizer, or an image processor of another size.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise not_loaded(name, error) from error
    except StrictDataclassError as error:
        raise ValueError(f"{name}: config.json is damaged. {' '.join(str(error).split())}") from error
    except ValueError as error:  # no config.json, or no model of the library's
        raise ValueError(
            f"{name} holds no model that can be read: it needs config.json of one of transformers, or "
            f"open_clip_config.json. Name the folder that has it. The library says: {str(error).splitlines()[0]}"
        ) from error
    kind = config.model_type
    for half, sub_config in (("image", "vision_config"), ("text", "text_config")):
        if not hasattr(config, sub_config):
            raise ValueError(
                f"{name} is a {kind} model, which has no {half} tower of its own, so it is no CLIP. As one tower of a "
                "new model: GapClosedClipModel.from_vision_text_pretrained, or model.vision=... model.text=..."
            )
    with torch.device("meta"):  # before its weights are downloaded
        blank = AutoModel.from_config(config)
    missing = [part for part in ("vision_model", "text_model", "logit_scale") if not hasattr(blank, part)]
    if missing:
        raise ValueError(f"{name} is a {kind} model, which can't be taken over: it has no {', '.join(missing)}.")
    if takes(blank.vision_model, "spatial_shapes"):
        raise ValueError(
            f"{name} is a {kind} model of NaFlex, which takes images of any shape as patches (pixel_attention_mask, "
            "spatial_shapes), and can't be taken over. Take one of a fixed size, as google/siglip2-base-patch16-224."
        )
    source = load_source(name, kind, revision, allow_pickle)
    image_processor, tokenizer = load_image_processor(name, revision), load_tokenizer(name, revision)
    agree_on_padding(name, source.text_model.config, tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(source.text_model.config))
    reference = embed_by_source(source, image_processor, tokenizer, name)
    return ClipParts(
        vision_model=source.vision_model,
        text_model=source.text_model,
        image_projection=_layers(getattr(source, "visual_projection", None)),
        text_projection=_layers(getattr(source, "text_projection", None)),
        logit_scale=source.logit_scale.item(),
        logit_bias=source.logit_bias.item() if hasattr(source, "logit_bias") else 0.0,
        image_pooling="pooler",
        text_pooling="cls" if kind in FIRST_TOKEN else "pooler",
        image_processor=image_processor,
        tokenizer=tokenizer,
        reference=reference,
    )


def load_source(name: str, kind: str, revision: str | None, allow_pickle: bool) -> PreTrainedModel:
    """
    The whole model, in float32.

    Raises:
        OSError: it can't be found.
        ValueError: its weights are pickled and not to be read, some are missing, or an adapter lies beside them.
    """
    settings: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    settings["trust_remote_code"] = False  # without it the library asks on a terminal
    if kind == "clipseg":  # saved with a decoder; transformers before 5.21 does not look for it under this name
        settings["key_mapping"] = {r"^clip\.": ""}
    try:
        with loading_in_one_line():
            model, info = AutoModel.from_pretrained(name, use_safetensors=True, **settings)
    except OSError as error:
        pickled = pickled_weights(name, revision)
        if pickled is None:
            raise not_loaded(name, error) from error
        if not allow_pickle:
            raise ValueError(
                f"{name} has pickled weights alone ({pickled}). They are read only where you say so, with "
                "allow_pickle=true (export-onnx: --allow-pickle), by torch.load with weights_only=True, which runs no "
                "code of theirs."
            ) from error
        try:
            with loading_in_one_line():
                model, info = AutoModel.from_pretrained(name, use_safetensors=False, weights_only=True, **settings)
        except UnpicklingError as unsafe:
            raise ValueError(
                f"{name}: {pickled} holds more than weights, code perhaps, and is not read. Ask for safetensors."
            ) from unsafe
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a safetensors file is truncated or damaged ({error}). Download it again."
        ) from error
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"{name}: the weights do not fit config.json. {error} Download it again, or save it whole."
        ) from error
    refuse_adapter(name, model)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, the first: {missing[0]}. Download it "
            "again, or save it whole."
        )
    # Older versions of the library saved the positions, which are counted; CLIPSeg's decoder segments, and embeds not.
    no_part = ("decoder.",) if kind == "clipseg" else ()
    unexpected = sorted(
        key for key in info["unexpected_keys"] if not (key.endswith("position_ids") or key.startswith(no_part))
    )
    if unexpected:
        raise ValueError(
            f"{name}: config.json has no place for {len(unexpected)} of its weights, the first: {unexpected[0]}."
        )
    return model.eval()


@torch.no_grad()
def embed_by_source(
    source: PreTrainedModel, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, name: str
) -> Reference:
    """
    What the library's own model makes of an image and two texts, by its own preprocessing.

    Raises:
        ValueError: the image processor, of the folder or Hub id `name`, makes images that the model does not take.
    """
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    texts = ["Chest radiograph with a small effusion.", "CT."]
    text_config = source.text_model.config
    padding = "max_length" if text_config.model_type in FULL_LENGTH else "longest"
    tokens = tokenizer(
        texts, padding=padding, truncation=True, max_length=longest_text(text_config), return_tensors="pt"
    )
    if text_config.model_type in FULL_LENGTH:
        tokens = {"input_ids": tokens["input_ids"]}  # they were trained without a mask
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    try:
        image_features = source.get_image_features(pixel_values=pixel_values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_wrong_images(name, source, pixel_values, error)) from error
    features = image_features, source.get_text_features(**tokens)
    image_embeds, text_embeds = (
        nn.functional.normalize(part if isinstance(part, Tensor) else part.pooler_output, dim=-1) for part in features
    )
    return Reference(image, texts, image_embeds, text_embeds)


def _wrong_images(name: str, source: PreTrainedModel, pixel_values: Tensor, error: Exception) -> str:
    """What is said of an image processor whose images the model does not take."""
    side = getattr(source.vision_model.config, "image_size", None)
    own = (side, side) if isinstance(side, int) else side
    size = tuple(pixel_values.shape[-2:])
    if own is None or tuple(own) == size:
        reason = str(error).strip().partition("\n")[0]
        return f"{name}: the model does not take the images that its preprocessor_config.json makes: {reason}"
    return (
        f"{name}: preprocessor_config.json makes images of {size[0]} x {size[1]}, and the model takes "
        f"{own[0]} x {own[1]} (vision_config.image_size in config.json). Put the preprocessor_config.json there that "
        "the model was trained with, or write that size into it."
    )


def _layers(projection: nn.Module | None) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a projection, which is linear in all of these models; empty where there is none."""
    if projection is None:
        return []
    if not isinstance(projection, nn.Linear):
        raise ValueError(f"A projection of type {type(projection).__name__} can't be taken over: it has to be linear.")
    return [(projection.weight.detach(), None if projection.bias is None else projection.bias.detach())]


__all__ = ["embed_by_source", "load_source", "transformers_parts"]
