"""Small models that open_clip itself makes at random and saves in its layout on the Hub."""

import copy
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, linear, normalize
from transformers import BertConfig, CLIPTokenizer, RobertaConfig

from gap_closed_clip.conversion import ClipParts
from gap_closed_clip.training.encoder import train_tokenizer


CAPTIONS = [
    "Axial CT of the chest showing a nodule in the right upper lobe (arrow).",
    "  Chest radiograph,\twith  LEFT effusion; 5\u00a0\u00b5m \u2013 \u201cbat wing\u201d, O\u2019Brien\u2019s line. ",
    "Sagittal T2 weighted MR image: \ufb01brosis &lt; 5 mm &amp; \u03b1-particles, na\u00efve re-read.",
    "x",
]
LONG = "a long report of many words about the left lower lobe " * 30
TINY_VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TANH = {"act_kwargs": {"approximate": "tanh"}}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160}
BERT = {"hf_model_name": "bert", "hf_tokenizer_name": "bert", "context_length": 32}
KINDS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"quick_gelu": True, "vision_cfg": TINY_VIT, "text_cfg": TINY_TEXT},
    "ViT, custom text": {
        "custom_text": True,
        "vision_cfg": {**TINY_VIT, **TANH, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 3},
        "text_cfg": {**TINY_TEXT, "proj_bias": True, "norm_kwargs": {"eps": 1e-3}},
        "preprocess": {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.25,) * 3},
    },
    "BiomedCLIP": {
        "vision_cfg": {**TIMM, "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {**BERT, "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"},
    },
    "EVA-02": {
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "eva02_tiny_patch14_224", "image_size": 224, "timm_pool": "token", "timm_proj": None,
        },
        "text_cfg": TINY_TEXT,
    },
    "timm mlp, RoBERTa mean": {
        "vision_cfg": {**TIMM, "timm_pool": "avg", "timm_proj": "mlp", "timm_proj_bias": True},
        "text_cfg": {**BERT, "hf_model_name": "roberta", "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"},
    },
    "ConvNeXt, BERT pooler": {
        "vision_cfg": {**TIMM, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {**BERT, "hf_proj_type": "mlp", "hf_pooler_type": "cls_pooler"},
    },
    "SigLIP": {
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**TIMM, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **TINY_TEXT, "vocab_size": 400, "context_length": 24, "hf_tokenizer_name": "bert", "no_causal_mask": True,
            "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6},
            **TANH, "tokenizer_kwargs": {"clean": "canonicalize"},
        },
        "preprocess": {"resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    },
}  # fmt: skip


@dataclass
class Reference:
    """A model of open_clip, loaded by it from `folder`."""

    folder: Path
    model: torch.nn.Module
    preprocess: Any
    tokenizer: Any


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer, of the vocabulary that open_clip brings along."""
    simple = SimpleTokenizer()
    vocab = {name: index for name, index in simple.encoder.items() if index < simple.sot_token_id}
    vocab |= {"<|startoftext|>": simple.sot_token_id, "<|endoftext|>": simple.eot_token_id}
    return CLIPTokenizer(vocab=vocab, merges=sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__))


def save_model(kind: str, folder: Path, safe: bool = True, hidden_size: int = 48) -> Path:
    """A model of KINDS in `folder`/model, saved by open_clip; the towers' own configurations lie beside it."""
    config = copy.deepcopy(KINDS[kind])
    config["embed_dim"] = 96 if kind == "SigLIP" else 48  # which is also the width of its image tower
    bert = {"vocab_size": 400, "hidden_size": hidden_size, "num_hidden_layers": 2, "num_attention_heads": 12}
    bert |= {"intermediate_size": 64, "max_position_embeddings": 48}
    BertConfig(**bert).save_pretrained(folder / "bert")
    RobertaConfig(**bert, pad_token_id=0).save_pretrained(folder / "roberta")
    text = config["text_cfg"]
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder / text["hf_model_name"]), "hf_model_pretrained": False}
    preprocess = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest", **config.pop("preprocess", {})}
    torch.manual_seed(0)
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    model = (CustomTextCLIP if config.get("custom_text") or "hf_model_name" in text else CLIP)(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 0:  # norms and biases that are not 1 and 0, so that each of them counts
                parameter.add_(0.1 * torch.randn_like(parameter))
    set_model_preprocess_cfg(model, preprocess)
    tokenizer = clip_tokenizer() if "hf_tokenizer_name" not in text else train_tokenizer([*CAPTIONS, LONG], 400)
    save_for_hf(model, tokenizer, config, folder / "model", safe_serialization=safe)
    return folder / "model"


def load_reference(folder: Path) -> Reference:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return Reference(folder, model.eval(), preprocess, open_clip.get_tokenizer(name))


def real_images() -> list[Image.Image]:
    """Radiographs where there are some (RADIOLOGY_DATA), and structured noise of sizes that are hard to crop."""
    pattern = os.path.join(os.environ.get("RADIOLOGY_DATA", "none"), "rocov2_800/train/**/*.jpg")
    images = [Image.open(path).convert("RGB") for path in sorted(glob.glob(pattern, recursive=True))[:3]]
    random = np.random.default_rng(0)
    for width, height in ((350, 320), (320, 350), (163, 160), (33, 97), (700, 640)):
        coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        grain = random.normal(0, 12, (height, width, 3))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + grain
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return images


def project(pooled: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    for index, (weight, bias) in enumerate(layers):
        pooled = linear(pooled if index == 0 else gelu(pooled), weight, bias)
    return normalize(pooled, dim=-1)


@torch.no_grad()
def embed_images(parts: ClipParts, images: list[Image.Image]) -> Tensor:
    outputs = parts.vision_model(**parts.image_processor(images, return_tensors="pt"))
    assert parts.image_pooling == "pooler"
    return project(outputs.pooler_output, parts.image_projection)


@torch.no_grad()
def embed_texts(parts: ClipParts, texts: list[str]) -> Tensor:
    """Padded to the longest text; to the context length where there is no attention mask."""
    padding = "longest" if "attention_mask" in parts.tokenizer.model_input_names else "max_length"
    tokens = parts.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    outputs = parts.text_model(**tokens)
    if parts.text_pooling == "pooler":
        pooled = outputs.pooler_output
    elif parts.text_pooling == "cls":
        pooled = outputs.last_hidden_state[:, 0]
    else:
        mask = tokens.attention_mask[..., None]
        pooled = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)
    return project(pooled, parts.text_projection)
