"""One image tower through timm and through transformers: a frozen run keeps the same features."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from gap_closed_clip.data import PairCollator
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.evaluation import fast_tower
from gap_closed_clip.training import ModelArguments, build_model_and_processor
from gap_closed_clip.training.precompute import FeatureSettings, embed_pairs_once


SIDE, WIDTH, DEPTH, HEADS = 64, 48, 2, 3
SHAPE = {"img_size": SIDE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.35]
NAMES = {
    "cls_token": "embeddings.class_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def by_transformers_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's weights of a CLIP ViT by the names of transformers' `CLIPVisionModel`."""
    renamed = {}
    for name, value in weights.items():
        if name in NAMES:
            renamed[NAMES[name]] = value.flatten() if name == "cls_token" else value.squeeze(0)
            continue
        *block, last = name.split(".")
        prefix = ""
        if block[0] == "blocks":
            prefix, block = f"encoder.layers.{block[1]}.", block[2:]
        if block == ["attn", "qkv"]:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefix}self_attn.{part}_proj.{last}"] = third
        else:
            renamed[f"{prefix}{NAMES['.'.join(block)]}.{last}"] = value
    return renamed


@pytest.fixture
def towers(tmp_path) -> dict[str, str]:
    torch.manual_seed(0)
    timm_model = timm.create_model("vit_base_patch32_clip_224", num_classes=0, **SHAPE)
    weights = {name: 0.1 * torch.randn_like(value) for name, value in timm_model.state_dict().items()}
    for library in ("timm", "transformers"):
        (tmp_path / library).mkdir()
    save_file(weights, tmp_path / "timm" / "model.safetensors")
    pretrained = {"mean": MEAN, "std": STD, "input_size": [3, SIDE, SIDE]}
    described = {"architecture": "vit_base_patch32_clip_224", "num_classes": 0, "pretrained_cfg": pretrained}
    (tmp_path / "timm" / "config.json").write_text(json.dumps({**described, "model_args": SHAPE}))
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=32, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config)
    model.load_state_dict(by_transformers_names(weights), strict=False)
    model.save_pretrained(tmp_path / "transformers")
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path / "transformers")
    return {library: str(tmp_path / library) for library in ("timm", "transformers")}


def test_features_of_a_frozen_tower_are_the_same(towers, tmp_path, monkeypatch):
    monkeypatch.setattr(fast_tower, "LARGEST_DISTANCE", -1.0)  # the weights as they are, to compare to rounding
    pairs = make_phantoms(12, seed=3, image_size=96)
    text = tiny_config().text_config.to_diff_dict() | {"vocab_size": 200}
    text = {name: text[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    features = {}
    for library, folder in towers.items():
        args = ModelArguments(vision=folder, text=text, freeze_vision=True)
        model, processor = build_model_and_processor(args, pairs["caption"])
        settings = FeatureSettings(
            tmp_path / "cache", views=1, batch_size=4, num_workers=0, device=torch.device("cpu")
        )
        stored = embed_pairs_once(pairs, model, PairCollator(processor), settings, vary=False)
        features[library] = np.stack([row["pooled_image"] for row in stored.__getitems__(list(range(len(pairs))))])
    assert features["timm"].std() > 0.1
    np.testing.assert_allclose(features["transformers"], features["timm"], rtol=1e-3, atol=1e-4)  # kept in 16 bits
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in features.values()]
    assert (1 - (unit[0] * unit[1]).sum(1)).max() < 1e-6
