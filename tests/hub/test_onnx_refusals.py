"""What is not exported to ONNX, and what is said of it; none of these gets as far as an export."""

import os
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    PoolFormerImageProcessor,
    SiglipImageProcessor,
)

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.hub import export_onnx, onnx
from gap_closed_clip.hub.onnx_preprocessing import describe, example_size, readme
from gap_closed_clip.model.image_processing_gap_closed_clip import GapClosedClipImageProcessor

from .conftest import ROOT, processor_of


EXPORT = str(ROOT / "export_onnx.py")


@pytest.fixture(autouse=True)
def no_export(monkeypatch):
    def export(*args, **kwargs):
        raise RuntimeError("no\nmatter what")

    monkeypatch.setattr(torch.onnx, "export", export)


def test_nothing_is_left_of_an_export_that_fails(tiny_model, tiny_processor, tmp_path):
    earlier = tmp_path / "onnx"
    earlier.mkdir()
    (earlier / "preprocessing.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vision_model\.onnx: torch can't export .*\(RuntimeError: no\)"):
        export_onnx(tiny_model, tiny_processor, earlier, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["onnx", "preprocessing.json"]
    with pytest.raises(ValueError, match="torch can't export"):
        export_onnx(tiny_model, tiny_processor, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_exists(tiny_model, tiny_processor, tmp_path):
    (tmp_path / "preprocessing.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists: name another folder, or replace it with --overwrite"):
        export_onnx(tiny_model, tiny_processor, tmp_path)
    (tmp_path / "preprocessing.json").rename(tmp_path / "config.json")
    with pytest.raises(FileExistsError, match="no earlier ONNX export"):
        export_onnx(tiny_model, tiny_processor, tmp_path, overwrite=True)
    around = rf"the folder around it, {tmp_path / 'config.json'} can't be written .*: name a folder that can"
    with pytest.raises(OSError, match=around):
        export_onnx(tiny_model, tiny_processor, tmp_path / "config.json" / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_killed_export_left_is_not_in_the_way_of_the_next(tmp_path):
    """In a container every process may have the same number, and so the same draft."""
    left = {name: tmp_path / f".onnx.{os.getpid()}.{name}" for name in ("new", "old")}
    for path in left.values():
        path.mkdir()
        (path / "preprocessing.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "preprocessing.json").write_text("{}")
    with onnx._new_folder(tmp_path / "onnx", overwrite=True) as draft:
        assert draft == left["new"] and not any(draft.iterdir())
        (draft / "README.md").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["onnx", "onnx/README.md"]


def test_a_mounted_folder_is_refused_before_the_export(tiny_model, tiny_processor, tmp_path, monkeypatch):
    """It can't be renamed: all was exported, and then lost by "Device or resource busy"."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == volume)
    with pytest.raises(ValueError, match="volume is a mounted disk or volume, .*: name a folder in it"):
        export_onnx(tiny_model, tiny_processor, volume)
    with pytest.raises(ValueError, match="torch can't export"):  # past the refusal
        export_onnx(tiny_model, tiny_processor, volume / "onnx")
    assert [path.name for path in tmp_path.rglob("*")] == ["volume"]


def test_missing_packages(tiny_model, tiny_processor, tmp_path, monkeypatch):
    for package, tolerance in (("onnxruntime", 1e-5), ("onnxscript", None)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"needs {package}.*gap-closed-clip\[onnx\]"):
                export_onnx(tiny_model, tiny_processor, tmp_path / "onnx", tolerance=tolerance)
    assert list(tmp_path.iterdir()) == []


def test_lora_has_to_be_merged_first(tiny_model, tiny_processor, tmp_path):
    targets = LoraConfig(r=2, target_modules=["query", "value"])
    adapted = get_peft_model(tiny_model, targets)
    with pytest.raises(ValueError, match="merge them first"):
        export_onnx(adapted.base_model.model, tiny_processor, tmp_path / "onnx")
    merged = adapted.merge_and_unload()
    with pytest.raises(ValueError, match="torch can't export"):  # past the refusal
        export_onnx(merged, tiny_processor, tmp_path / "onnx")


def test_steps_that_a_processor_leaves_out(tiny_model, tiny_processor):
    off = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
    processor = processor_of(tiny_processor.tokenizer, crop_size={"height": 28, "width": 28}, **off)
    description = describe(tiny_model, processor, "bare", 64, 18)
    left_out = ("resize", "rescale_factor", "mean", "std")
    assert [description["image"][name] for name in left_out] == [None] * 4
    # Images become RGB in any case, before the image processor sees them.
    gray = processor(images=[Image.linear_gradient("L")], return_tensors="pt")["pixel_values"]
    assert gray.shape == (1, 3, 28, 28) and description["image"]["mode"] == "RGB"
    code = readme(description).replace('.convert(settings["mode"])', "", 1)
    assert "settings[" not in code.replace('settings["center_crop"]', "") and "convert" not in code
    small = {"longest_edge": 20, "shortest_edge": 10}
    for settings, words in (({"size": small}, "longest_edge"), ({"do_pad": True}, "do_pad")):
        with pytest.raises(ValueError, match=words):
            describe(tiny_model, processor_of(tiny_processor.tokenizer, **settings), "odd", 64, 18)
    with pytest.raises(ValueError, match="no fixed size"):
        example_size(processor_of(tiny_processor.tokenizer, do_center_crop=False))


@pytest.mark.parametrize(
    "image_processor",
    [
        EfficientNetImageProcessor(size={"height": 28, "width": 28}),  # divides by the standard deviation twice
        LevitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),  # resizes to 32
        PoolFormerImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),  # crop_pct
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_processor_that_does_more_than_is_described(tiny_model, tiny_processor, image_processor):
    processor = GapClosedClipProcessor(image_processor, tiny_processor.tokenizer)
    with pytest.raises(ValueError, match=f"{type(image_processor).__name__}, does more than resize, crop, rescale"):
        describe(tiny_model, processor, "odd", 64, 18)


@pytest.mark.parametrize("side", [5, 28, 500])  # the image that it is tried with becomes smaller, and larger
def test_a_processor_that_does_what_is_described(tiny_model, tiny_processor, side):
    square = {"height": side, "width": side}
    bare = {"do_rescale": False, "do_normalize": False}
    for image_processor in (
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square),
        CLIPImageProcessor(size={"shortest_edge": side + 3}, crop_size=square, **bare),
        SiglipImageProcessor(size=square),
        GapClosedClipImageProcessor(size={"shortest_edge": side}, crop_size=square),
    ):
        processor = GapClosedClipProcessor(image_processor, tiny_processor.tokenizer)
        assert describe(tiny_model, processor, "usual", 64, 18)["image"]["size"] == [side, side]


def test_a_slip_in_the_name_is_one_line(script, tmp_path):
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    expected = "gap-closed-clip export-onnx: There is no folder outputs/demoo. Did you mean outputs/demo?\n"
    assert script(EXPORT, "outputs/demoo") == (1, "", expected)


def test_command_says_what_is_missing(script):
    for words, expected in ((("nobody/nothing",), "name one to write to"), (("./nowhere",), "no model folder")):
        code, _, err = script(EXPORT, *words)
        assert code == 1 and expected in err and err.count("\n") == 1
