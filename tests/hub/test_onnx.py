"""Tiny towers exported to ONNX and run in onnxruntime beside torch."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CAPTIONS, tiny_config, tiny_inputs
from PIL import Image

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.hub import check_onnx, export_onnx, onnx
from gap_closed_clip.hub.onnx import float32_model
from gap_closed_clip.hub.onnx_check import OnnxMismatch
from gap_closed_clip.hub.onnx_preprocessing import example_size

from .conftest import ROOT, processor_of


EXPORT = str(ROOT / "export_onnx.py")
TOLERANCE = 2e-6
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FILES = {"vision_model.onnx", "text_model.onnx", "preprocessing.json", "tokenizer.json", "README.md"}


def eva(architecture: str, **kwargs) -> dict:
    args = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3, **kwargs}
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": args}


def lively(model: GapClosedClipModel) -> GapClosedClipModel:
    """Large random weights and means: at their initial 0.02 attention is uniform, and errors in it would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        for centering in (model.visual_centering, model.text_centering):
            if model.config.center_projections:
                centering.running_mean.normal_(std=0.3)
        for part in (model.visual_map, model.text_map):
            for buffer in part.buffers():
                buffer.normal_()
    return model.eval()


class Case:
    """A model, its processor, and where both were exported to."""

    def __init__(self, config, processor, folder: Path, **kwargs):
        self.model, self.processor, self.folder = lively(GapClosedClipModel(config)), processor, folder
        self.differences = export_onnx(self.model, processor, folder, **kwargs)

    def run(self, name: str, **inputs: torch.Tensor) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(self.folder / f"{name}_model.onnx"))
        return session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]


@pytest.fixture(scope="module")
def plain(tiny_processor, tmp_path_factory) -> Case:
    """EVA-02 as in the demo, first token, centered."""
    folder = tmp_path_factory.mktemp("plain") / "onnx"
    config = tiny_config(center_projections=True)
    return Case(config, tiny_processor, folder, name="owner/tiny", tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def oblong(tiny_processor, tmp_path_factory) -> Case:
    """The paper's EVA-01 with an oblong image, mean of the tokens, hidden layer, not centered; weights beside."""
    vision = eva("eva_giant_patch14_clip_224", img_size=(28, 42))
    config = tiny_config(vision_config=vision, text_pooling="mean", projection_hidden_dim=24)
    size = {"height": 28, "width": 42}
    processor = processor_of(tiny_processor.tokenizer, size=size, do_center_crop=False, image_mean=[0.1, 0.2, 0.3])
    return Case(config, processor, tmp_path_factory.mktemp("oblong") / "a" / "onnx", external_data=True)


@pytest.fixture(scope="module")
def any_size(tiny_processor, tmp_path_factory) -> Case:
    """EVA-02 that takes any size, the tower's own pooler, centered."""
    config = tiny_config(
        vision_config=eva("eva02_tiny_patch14_224", dynamic_img_size=True),
        text_pooling="pooler",
        center_projections=True,
    )
    return Case(config, tiny_processor, tmp_path_factory.mktemp("any_size") / "onnx", tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def mapped(tiny_processor, tmp_path_factory) -> Case:
    """Centered, with a map behind the embeddings."""
    config = tiny_config(center_projections=True, embedding_map="whitening")
    return Case(config, tiny_processor, tmp_path_factory.mktemp("mapped") / "onnx", tolerance=TOLERANCE)


@pytest.fixture(params=["plain", "oblong", "any_size", "mapped"])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_images(case, batch_size):
    height, width = example_size(case.processor)
    pixel_values = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(batch_size))
    found = case.run("vision", pixel_values=pixel_values)
    with torch.no_grad():
        expected = case.model(pixel_values=pixel_values).image_embeds.numpy()
    assert found.dtype == np.float32 and found.shape == (batch_size, 32)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(np.linalg.norm(found, axis=-1) - 1).max() < 1e-5


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("length", [2, 9, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_texts(case, batch_size, length, padded):
    ids = torch.randint(5, 200, (batch_size, length), generator=torch.Generator().manual_seed(length))
    attention_mask = torch.ones_like(ids)
    if padded:
        attention_mask[::2, length // 2 :] = 0
    inputs = dict(zip(TEXT_INPUTS, (ids, attention_mask, torch.zeros_like(ids)), strict=True))
    with torch.no_grad():
        expected = case.model(**inputs).text_embeds.numpy()
    found = case.run("text", **inputs)
    assert found.shape == (batch_size, 32) and np.abs(found - expected).max() < TOLERANCE


def test_inputs_tell_apart(plain):
    """Otherwise the comparisons above would prove little."""
    inputs = tiny_inputs(4)
    images = plain.run("vision", pixel_values=inputs["pixel_values"])
    texts = plain.run("text", **{name: inputs[name] for name in TEXT_INPUTS})
    for embeds in (images, texts):
        assert (embeds @ embeds.T)[~np.eye(4, dtype=bool)].max() < 0.9


def test_names_and_axes(plain, any_size):
    def axes(case, name):
        session = onnxruntime.InferenceSession(str(case.folder / f"{name}_model.onnx"))
        return {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}

    assert axes(plain, "vision") == {"pixel_values": ["batch_size", 3, 28, 28], "image_embeds": ["batch_size", 32]}
    text = dict.fromkeys(TEXT_INPUTS, ["batch_size", "sequence_length"])
    assert axes(plain, "text") == {**text, "text_embeds": ["batch_size", 32]}
    assert axes(any_size, "vision")["pixel_values"] == ["batch_size", 3, "14*height", "14*width"]


def test_other_sizes(any_size):
    pixel_values = torch.randn(3, 3, 56, 42)
    with torch.no_grad():
        expected = any_size.model(pixel_values=pixel_values).image_embeds.numpy()
    assert np.abs(any_size.run("vision", pixel_values=pixel_values) - expected).max() < TOLERANCE
    assert json.loads((any_size.folder / "preprocessing.json").read_text())["image"]["other_sizes"] == {
        "multiple_of": [14, 14]
    }


def test_folder(plain, oblong):
    assert {path.name for path in plain.folder.iterdir()} == FILES | {"check.json"}
    assert list(plain.folder.parent.iterdir()) == [plain.folder]  # no draft
    weights = {"vision_model.onnx_data", "text_model.onnx_data"}
    assert {path.name for path in oblong.folder.iterdir()} == FILES | weights
    for name in ("vision", "text"):
        graph, data = (oblong.folder / f"{name}_model.onnx{end}" for end in ("", "_data"))
        tower = sum(p.numel() for p in getattr(oblong.model, f"{name}_model").parameters())
        assert data.stat().st_size > 4 * tower and graph.stat().st_size < 3e5


def test_preprocessing(plain, oblong, any_size):
    content = json.loads((plain.folder / "preprocessing.json").read_text())
    assert content["model"] == "owner/tiny" and content["opset"] == 18
    assert content["logit_scale"] == pytest.approx(1 / 0.07) and content["hypothesis_template"].count("{}") == 1
    assert content["embedding"] == {"dimension": 32, "dtype": "float32", "unit_length": True}
    assert set(content["versions"]) >= {"gap_closed_clip", "onnx", "torch", "timm"}
    image = plain.processor.image_processor
    assert content["image"] == {
        "file": "vision_model.onnx",
        "input": "pixel_values",
        "output": "image_embeds",
        "mode": "RGB",
        "resize": {"shortest_edge": 28, "resample": "bicubic"},
        "center_crop": {"height": 28, "width": 28},
        "rescale_factor": 1 / 255,
        "mean": list(image.image_mean),
        "std": list(image.image_std),
        "layout": "batch, channel, height, width",
        "dtype": "float32",
        "size": [28, 28],
        "other_sizes": None,
    }
    assert content["text"]["max_length"] == 64 and content["text"]["padding_id"] == 0
    other = json.loads((oblong.folder / "preprocessing.json").read_text())["image"]
    assert other["resize"] == {"height": 28, "width": 42, "resample": "bicubic"} and other["center_crop"] is None
    assert other["mean"] == [0.1, 0.2, 0.3] and other["size"] == [28, 42]
    assert json.loads((any_size.folder / "preprocessing.json").read_text())["model"] == "gap_closed_clip"


@pytest.mark.parametrize("size", [(40, 30), (28, 28), (20, 333), (301, 200)])
def test_readme_example_runs(case, size, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    text = (case.folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "torch" not in code and "transformers" not in code and "$" not in text
    monkeypatch.chdir(case.folder)
    names = {}
    exec(code.replace('"image.png"', repr(str(tmp_path / "image.png"))), names)
    sentences = ["Chest radiograph.", "Axial MR image of the brain."]
    image = Image.open(tmp_path / "image.png")
    inputs = case.processor(images=[image], text=sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = case.model(**inputs)
    levels = np.array(case.processor.image_processor.image_std)[:, None, None] * 255
    distance = np.abs(names["pixels"](tmp_path / "image.png") - inputs["pixel_values"][0].numpy()) * levels
    mixed = (size[0] > 28) != (size[1] > 42) and "width" in case.processor.image_processor.to_dict()["size"]
    if mixed:  # torchvision and Pillow may filter in another order, as the README says
        assert distance.max() < 16 and "one side shrinks" in text
    else:
        assert distance.max() < 1.01 and (distance > 0.01).mean() < 0.02
    assert np.abs(names["text_embeds"] - expected.text_embeds.numpy()).max() < TOLERANCE
    assert names["image_embeds"][0] @ expected.image_embeds[0].numpy() > (0.99 if mixed else 0.9999)
    if not mixed:
        assert np.abs(names["logits"] - expected.logits_per_image.numpy()).max() < 0.1


def test_long_texts_are_cut_by_the_tokenizer_itself(plain):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(plain.folder / "tokenizer.json"))
    texts = [" ".join(2 * CAPTIONS), "CHEST"]
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokens = plain.processor.tokenizer(texts, padding=True, truncation=True, max_length=64)
    assert found == tokens["input_ids"] and len(found[0]) == 64


def test_check(plain, any_size):
    shapes = {(difference.file, difference.inputs, *difference.shape[:2]) for difference in plain.differences}
    for batch_size in (1, 5):
        assert ("vision_model.onnx", "random", batch_size, 3) in shapes
        assert ("vision_model.onnx", "processed", batch_size, 3) in shapes
        for length in (11, 64):
            for inputs in ("random", "random, padded"):
                assert ("text_model.onnx", inputs, batch_size, length) in shapes
    assert 2 not in {difference.shape[0] for difference in plain.differences}
    content = json.loads((plain.folder / "check.json").read_text())
    assert content["maximum"] == max(difference.maximum for difference in plain.differences) < TOLERANCE
    assert len(content["differences"]) == len(plain.differences)
    assert [28, 28] in [d.shape[2:] for d in any_size.differences]
    assert [84, 28] in [d.shape[2:] for d in any_size.differences]


@pytest.mark.parametrize("part", ["visual_centering.running_mean", "text_projection.bias"])
def test_check_finds_another_model(plain, part):
    value = plain.model.get_parameter(part) if "bias" in part else plain.model.get_buffer(part)
    before = (plain.folder / "check.json").read_text()
    kept = value.detach().clone()
    try:
        with torch.no_grad():
            value[0] += 0.1
        with pytest.raises(OnnxMismatch, match=r"_model\.onnx differs from the model by .* than the tolerance 1e-05"):
            check_onnx(plain.model, plain.processor, plain.folder)
    finally:
        with torch.no_grad():
            value.copy_(kept)
    assert (plain.folder / "check.json").read_text() == before


def test_check_finds_another_tokenizer(plain):
    processor = copy.deepcopy(plain.processor)  # a tokenizer keeps the way it padded last, and saves it
    processor.tokenizer.padding_side = "left"
    with pytest.raises(OnnxMismatch, match=r"tokenizer\.json gives other input_ids"):
        check_onnx(plain.model, processor, plain.folder)


def test_half_precision_becomes_float32(tmp_path):
    model = lively(GapClosedClipModel(tiny_config(center_projections=True))).bfloat16().train()
    model.save_pretrained(tmp_path)
    copied = float32_model(model)
    assert model.dtype == torch.bfloat16 and model.training and not copied.training
    expected = GapClosedClipModel.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = tiny_inputs()
    with torch.no_grad():
        assert torch.equal(copied(**inputs).image_embeds, expected(**inputs).image_embeds)
        assert torch.equal(copied(**inputs).text_embeds, expected(**inputs).text_embeds)
    assert float32_model(expected) is expected


def test_command(script, plain, tmp_path, monkeypatch):
    demo = tmp_path / "outputs" / "demo"
    plain.model.save_pretrained(demo)
    plain.processor.save_pretrained(demo)
    with monkeypatch.context() as patch:  # an export takes seconds, and this model's is there
        for function, name in (("_export_images", "vision_model.onnx"), ("_export_texts", "text_model.onnx")):
            patch.setattr(onnx, function, lambda *args, name=name: shutil.copy(plain.folder / name, args[2]))
        code, out, err = script(EXPORT, "outputs/demo", "--check", "--tolerance", "0")
    assert code == 1 and "gap-closed-clip export-onnx: " in err
    assert "more than the tolerance 0e+00. Nothing was kept." in err
    assert "processed" in out and not (demo / "onnx").exists() and not list(demo.glob(".onnx*"))
    code, out, err = script(EXPORT, "outputs/demo", "--check")
    assert code == 0, err
    assert len(re.findall(r"^vision_model\.onnx +\w+ +[15] x 3 x 28 x 28 +\d\.\de-\d\d$", out, flags=re.M)) == 4
    assert "torch.onnx" not in out + err and "Skipping" not in out + err
    assert json.loads((demo / "onnx" / "preprocessing.json").read_text())["model"] == "demo"
    GapClosedClipModel.from_pretrained(demo)  # the folder of the model stays one
    code, out, err = script(EXPORT, "outputs/demo")
    assert code == 1 and err.endswith("exists: name another folder, or replace it with --overwrite.\n")
