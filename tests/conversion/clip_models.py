"""Small CLIPs of transformers with random weights, saved as transformers saves them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import CAPTIONS
from PIL import Image
from torch import Tensor
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitImageProcessor,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    Dinov2Config,
    Dinov2Model,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from gap_closed_clip.training.encoder import train_tokenizer


SIDE = 32
TEXT_LENGTH = 20
TOKENIZER = train_tokenizer(CAPTIONS, 150)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**SHAPE, "image_size": SIDE, "patch_size": 16}
TEXT = {
    **SHAPE,
    "vocab_size": len(TOKENIZER),
    "max_position_embeddings": TEXT_LENGTH,
    "pad_token_id": TOKENIZER.pad_token_id,
}
# The end of a text, which CLIP's text tower looks for.
ENDS = {**TEXT, "bos_token_id": TOKENIZER.cls_token_id, "eos_token_id": TOKENIZER.sep_token_id}
SQUARE = {"height": SIDE, "width": SIDE}


def clip() -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = CLIPConfig(text_config=ENDS, vision_config=VISION, projection_dim=16)
    return CLIPModel(config), CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)


def clipseg() -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = CLIPSegConfig(text_config=ENDS, vision_config=VISION, projection_dim=16)
    return CLIPSegModel(config), ViTImageProcessor(size=SQUARE)


def altclip() -> tuple[PreTrainedModel, BaseImageProcessor]:
    text = {**TEXT, "max_position_embeddings": TEXT_LENGTH + TOKENIZER.pad_token_id + 1, "project_dim": 24}
    config = AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return AltCLIPModel(config), CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)


def metaclip_2() -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = MetaClip2Config(text_config=ENDS, vision_config=VISION, projection_dim=16)
    return MetaClip2Model(config), CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)


def siglip() -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = SiglipConfig(text_config={**ENDS, "projection_size": 32}, vision_config=VISION)
    return SiglipModel(config), SiglipImageProcessor(size=SQUARE)


def chinese_clip() -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return ChineseCLIPModel(config), ChineseCLIPImageProcessor(size=SQUARE, crop_size=SQUARE)


def vit_bert() -> tuple[PreTrainedModel, BaseImageProcessor]:
    towers = {"vision_model": ViTModel(ViTConfig(**VISION)), "text_model": BertModel(BertConfig(**TEXT))}
    return VisionTextDualEncoderModel(**towers), ViTImageProcessor(size=SQUARE)


def dinov2_xlm_roberta() -> tuple[PreTrainedModel, BaseImageProcessor]:
    vision = Dinov2Model(Dinov2Config(**{**VISION, "mlp_ratio": 2}))
    positions = TEXT_LENGTH + TOKENIZER.pad_token_id + 1
    text = XLMRobertaModel(XLMRobertaConfig(**{**TEXT, "max_position_embeddings": positions}))
    processor = BitImageProcessor(size={"shortest_edge": SIDE + 8}, crop_size=SQUARE)
    return VisionTextDualEncoderModel(vision_model=vision, text_model=text), processor


KINDS: dict[str, Callable[[], tuple[PreTrainedModel, BaseImageProcessor]]] = {
    "CLIP": clip,
    "CLIPSeg": clipseg,
    "AltCLIP": altclip,
    "MetaCLIP 2": metaclip_2,
    "SigLIP": siglip,
    "ChineseCLIP": chinese_clip,
    "dual encoder, ViT + BERT": vit_bert,
    "dual encoder, DINOv2 + XLM-R": dinov2_xlm_roberta,
}


def save_source(kind: str, folder: Path) -> Path:
    """A folder as transformers writes it, with weights large enough to tell one input from another."""
    torch.manual_seed(0)
    model, image_processor = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif name in ("logit_scale", "logit_bias"):  # the scale is exp(4.75) = 116, above our cap
                parameter.fill_({"logit_scale": 4.75, "logit_bias": -12.5}[name])
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def photo() -> Image.Image:
    """An image with edges and shades, larger than any tower takes and not square."""
    rows, columns = np.mgrid[:90, :120]
    shades = np.stack([rows * 2.5, columns * 2, 60 * np.sin(rows / 5) * np.cos(columns / 7) + 128], axis=-1)
    shades[30:60, 40:80] = 230
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def embed_by_transformers(folder: Path, image: Image.Image, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers makes of an image and texts: both unit vectors, and the logits."""
    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    # SigLIP's texts are padded to the full length, and it is given no mask.
    is_siglip = model.config.model_type == "siglip"
    settings = {"padding": "max_length" if is_siglip else True, "truncation": True, "max_length": TEXT_LENGTH}
    tokens = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **settings)
    wanted = {"siglip": ["input_ids"], "clip": ["input_ids", "attention_mask"]}
    wanted["metaclip_2"] = wanted["clipseg"] = wanted["clip"]
    tokens = {name: tokens[name] for name in wanted.get(model.config.model_type, tokens)}
    outputs = model(pixel_values=pixels, **tokens)
    return outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image
