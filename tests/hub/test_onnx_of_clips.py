"""ONNX files of models with towers of transformers, as `from_clip` makes them."""

import json
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conversion.clip_models import SIDE, embed_by_transformers, photo, save_source
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, ResNetConfig, ResNetModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from gap_closed_clip import from_clip
from gap_closed_clip.commands import export_onnx as export_command
from gap_closed_clip.hub.onnx import export_onnx
from gap_closed_clip.hub.onnx_preprocessing import size_step


TEXTS = ["CT.", "Chest radiograph with a small effusion of the left side."]


@pytest.mark.parametrize("kind", ["CLIP", "dual encoder, DINOv2 + XLM-R"])
def test_a_clip_that_was_taken_over(kind, tmp_path):
    """It passes the check, which runs images of every size that the files are to take, and embeds as the source."""
    source, folder = save_source(kind, tmp_path / "source"), tmp_path / "onnx"
    differences = export_onnx(*from_clip(source), folder, tolerance=1e-5)
    assert {each.shape[-1] for each in differences if each.file == "vision_model.onnx"} == {SIDE}
    assert json.loads((folder / "preprocessing.json").read_text())["image"]["other_sizes"] is None
    assert f"(batch, 3, {SIDE}, {SIDE}) float32, no other size" in (folder / "README.md").read_text()
    images, texts = (onnxruntime.InferenceSession(str(folder / f"{name}_model.onnx")) for name in ("vision", "text"))
    assert images.get_inputs()[0].shape[1:] == [3, SIDE, SIDE]
    pixels = AutoImageProcessor.from_pretrained(source)(photo(), return_tensors="np")["pixel_values"]
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(TEXTS)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    tokens = {name: np.array([getattr(text, field) for text in encoded]) for name, field in fields.items()}
    image_embeds, text_embeds, _ = embed_by_transformers(source, photo(), TEXTS)
    np.testing.assert_allclose(images.run(None, {"pixel_values": pixels})[0], image_embeds, atol=1e-5)
    np.testing.assert_allclose(texts.run(None, tokens)[0], text_embeds, atol=1e-5)


def test_the_command_reads_pickled_weights_where_it_is_told_to(tmp_path, capsys):
    source = save_source("CLIP", tmp_path / "source")
    images = embed_by_transformers(source, photo(), TEXTS)[0]
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    words = [str(source), str(tmp_path / "onnx"), "--check"]
    with pytest.raises(
        ValueError, match="has pickled weights alone .* with allow_pickle=true .export-onnx: --allow-pic"
    ):
        export_command.run(export_command.parse(words))
    assert not (tmp_path / "onnx").exists()
    export_command.run(export_command.parse([*words, "--allow-pickle"]))
    assert "vision_model.onnx and text_model.onnx are in" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "vision_model.onnx"))
    pixels = AutoImageProcessor.from_pretrained(source)(photo(), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(session.run(None, {"pixel_values": pixels})[0], images, atol=1e-5)


def test_towers_without_positions_take_any_size():
    small = {"image_size": SIDE, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    towers = [
        (ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), (1, 1)),
        (ViTModel(ViTConfig(**small, intermediate_size=8)), None),
        (SwinModel(SwinConfig(image_size=SIDE, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)), None),
    ]
    for tower, step in towers:
        assert size_step(SimpleNamespace(vision_model=tower, image_size=None)) == step, type(tower).__name__
