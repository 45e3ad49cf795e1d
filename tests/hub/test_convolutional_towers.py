"""A convolutional image tower travels to the Hub and to ONNX as an EVA does."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_config, tiny_inputs
from safetensors.torch import load_file, save_file
from torch import nn

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.hub import export_onnx
from gap_closed_clip.model.losses_gap_closed_clip import unit_vectors

from .conftest import WITHOUT_PACKAGE, processor_of
from .handler.examples import save


TOWERS = {
    "tf_mobilenetv3_small_minimal_100": {},  # TensorFlow's padding
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]},
}
ELSEWHERE = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    embeds = model(**load_file(f"{out}/inputs.safetensors")).image_embeds
save_file({"embeds": embeds}, f"{out}/embeds.safetensors")
"""


def make(architecture: str, tokenizer):
    """A model whose batch statistics have moved, in eval mode, and a processor of 64 pixels."""
    torch.manual_seed(0)
    vision = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": TOWERS[architecture]}
    model = GapClosedClipModel(tiny_config(vision_config=vision, center_projections=True))
    with torch.no_grad():
        for module in model.vision_model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        model.train().vision_model(torch.randn(8, 3, 64, 64))
    size = {"height": 64, "width": 64}
    return model.eval(), processor_of(tokenizer, size={"shortest_edge": 64}, crop_size=size)


def test_a_folder_works_without_the_package(python, tiny_processor, tmp_path):
    model, processor = make("resnet18", tiny_processor.tokenizer)
    save(tmp_path / "model", model, processor)
    inputs = {**tiny_inputs(3), "pixel_values": torch.randn(3, 3, 64, 64)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    python("-c", WITHOUT_PACKAGE + ELSEWHERE, str(tmp_path / "model"), str(tmp_path), HF_HUB_OFFLINE="1")
    with torch.no_grad():
        expected = model(**inputs).image_embeds
    assert torch.equal(load_file(tmp_path / "embeds.safetensors")["embeds"], expected)


@pytest.mark.parametrize("architecture", TOWERS)
def test_an_export_agrees_with_torch(architecture, tiny_processor, tmp_path):
    model, processor = make(architecture, tiny_processor.tokenizer)
    differences = export_onnx(model, processor, tmp_path / "onnx", tolerance=2e-5)
    shapes = {tuple(d.shape[2:]) for d in differences if d.file == "vision_model.onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "vision_model.onnx"))
    steps = json.loads((tmp_path / "onnx" / "preprocessing.json").read_text())["image"]
    assert steps["size"] == [64, 64]
    sizes = [(64, 64)]
    if architecture == "resnet18":
        sizes += [(65, 97), (40, 128)]
        assert len(shapes) > 1
    else:
        assert shapes == {(64, 64)}  # the size of the processor alone
        assert session.get_inputs()[0].shape[2:] == [64, 64]
    for size in sizes:
        pixels = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected = unit_vectors(model.get_image_features(pixels).pooler_output).numpy()
        found = session.run(None, {"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=2e-5)
