"""Exports all towers to ONNX files, with what is needed to use them without torch and transformers."""

import contextlib
import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import check_writable
from ..model.losses_gap_closed_clip import unit_vectors
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.tower_kinds_gap_closed_clip import longest_text
from .onnx_check import CHECK, Difference, OnnxMismatch, check_onnx, import_onnxruntime
from .onnx_further import FurtherEncoder, example_inputs, further_files
from .onnx_preprocessing import (
    PREPROCESSING,
    TEXT_MODEL,
    TOKENIZER,
    VISION_MODEL,
    describe,
    example_size,
    readme,
    size_step,
    tokenizer_of,
)
from .samples import check_modalities


# The oldest that torch's exporter writes without converting: old runtimes and browsers read it.
OPSET = 18
# A protobuf file, which an .onnx is, holds less than 2 GiB.
LARGEST_FILE = 2**31 - 2**26
# What an export writes, beside the files of further modalities (`files_of`).
FILES = (
    *(VISION_MODEL, f"{VISION_MODEL}_data", TEXT_MODEL, f"{TEXT_MODEL}_data"),
    *(PREPROCESSING, TOKENIZER, CHECK, "README.md"),
)


def files_of(modalities: Iterable[str]) -> tuple[str, ...]:
    """All that an export can write of a model with these further modalities."""
    return (*FILES, *(file for name in modalities for file in further_files(name)))


class ImageEncoder(nn.Module):
    """pixel_values (B, 3, height, width) -> image_embeds (B, D), the unit vectors that the model's forward gives."""

    def __init__(self, model: GapClosedClipModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return unit_vectors(self.model.get_image_features(pixel_values, return_dict=True).pooler_output)


class TextEncoder(nn.Module):
    """input_ids, attention_mask, token_type_ids (B, length) -> text_embeds (B, D), as the model's forward gives."""

    def __init__(self, model: GapClosedClipModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        features = self.model.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True)
        return unit_vectors(features.pooler_output)


def export_onnx(
    model: GapClosedClipModel,
    processor: GapClosedClipProcessor,
    folder: str | Path,
    *,
    name: str | None = None,
    weights: str | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    external_data: bool = False,
) -> list[Difference]:
    """
    Writes `vision_model.onnx`, `text_model.onnx`, `preprocessing.json`, `tokenizer.json` and `README.md`; and for each
    further modality `{name}.onnx`, whose inputs have its tower's names (`numbers`, `numbers_mask`, `categories` of a
    record), with its processor's settings in `preprocessing.json`.

    The files take any batch and any text length up to the tower's, images of the processor's size (of any size where
    the tower takes any, except one with TensorFlow's padding, or of transformers and patches) and give unit vectors in
    float32, centered as at inference. Input and output names are those of optimum's and transformers.js' CLIP. A model
    in another dtype, or on another device, is exported from a float32 copy; the model itself stays as it is. The
    folder appears whole or not at all.

    Args:
        folder: to be made; its parent too.
        name: of the model, for the descriptions; default: what it was loaded from.
        weights: digest of the model's weights (`digest_of_weights`), by which a publication sees that the files were
            exported from them.
        tolerance: compare with torch first (`check_onnx`), and write the differences into `check.json`; a folder that
            fails does not appear.
        overwrite: replace a folder that this function made before.
        external_data: weights into files beside (`vision_model.onnx_data`), as is done anyway from 2 GB on.

    Returns:
        What the comparison found; an empty list without `tolerance`.

    Raises:
        ImportError: onnx, onnxscript or, with `tolerance`, onnxruntime is not installed.
        FileExistsError: there is such a folder already.
        ValueError: LoRA adapters are attached, the processor does what can't be described, a tower can't be exported,
            the folder is where a disk is mounted.
        OnnxMismatch: a difference above `tolerance`.
    """
    if tolerance is not None:
        import_onnxruntime()  # before the minutes that an export of large towers takes
    _import_exporter()
    _refuse_adapters(model)
    check_modalities(model, processor)
    name = name or Path(model.name_or_path).name or model.config.model_type
    max_length = min(processor.tokenizer.model_max_length, longest_text(model.config.text_config))
    description = describe(model, processor, name, max_length, OPSET) | {"weights": weights}
    tokenizer = tokenizer_of(processor.tokenizer, max_length)
    exported = float32_model(model)
    with _new_folder(Path(folder), overwrite) as draft:
        _export_images(exported, processor, draft, external_data)
        _export_texts(exported, max_length, draft, external_data)
        for modality, inputs in example_inputs(processor).items():
            axes = {0: torch.export.Dim("batch_size")}
            encoder = FurtherEncoder(exported, modality, tuple(inputs))
            _export(encoder, inputs, axes, f"{modality}_embeds", draft, external_data, f"{modality}.onnx")
        tokenizer.save(str(draft / TOKENIZER))
        _write(draft / PREPROCESSING, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        _write(draft / "README.md", readme(description))
        return [] if tolerance is None else check_onnx(exported, processor, draft, tolerance)


def float32_model(model: GapClosedClipModel) -> GapClosedClipModel:
    """The model itself if it computes in float32 on the CPU without dropout, else a copy that does."""
    weights = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    is_plain = all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights)
    if is_plain and not any(module.training for module in model.modules()):
        return model
    model = copy.deepcopy(model).cpu().float().eval()
    for module in [*model.vision_model.modules(), *model.modality_towers.modules()]:
        # Tables of positions, computed and never saved: those of a bfloat16 model are rounded to it.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return model


def _export_images(
    model: GapClosedClipModel, processor: GapClosedClipProcessor, folder: Path, external_data: bool
) -> None:
    height, width = example_size(processor)
    axes = {0: torch.export.Dim("batch_size")}
    step = size_step(model)
    if step is not None:
        axes |= {2: _multiple("height", step[0]), 3: _multiple("width", step[1])}
    pixel_values = torch.zeros(2, 3, height, width)
    _export(
        ImageEncoder(model), {"pixel_values": pixel_values}, axes, "image_embeds", folder, external_data, VISION_MODEL
    )


def _export_texts(model: GapClosedClipModel, max_length: int, folder: Path, external_data: bool) -> None:
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=max_length)}
    ids = torch.ones(2, min(7, max_length), dtype=torch.int64)
    attention_mask = ids.clone()
    attention_mask[0, -2:] = 0  # padding, so that no path is taken that holds without it only
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "token_type_ids": torch.zeros_like(ids)}
    _export(TextEncoder(model), inputs, axes, "text_embeds", folder, external_data, TEXT_MODEL)


def _export(
    encoder: nn.Module,
    inputs: dict[str, Tensor],
    axes: dict,
    output: str,
    folder: Path,
    external_data: bool,
    name: str,
) -> None:
    """Writes one tower to its file; the `axes` of every input can vary."""
    import onnx_ir  # of onnxscript

    is_further = isinstance(encoder, FurtherEncoder)  # which takes them in their order
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                encoder.eval(),
                tuple(inputs.values()) if is_further else (),
                kwargs={} if is_further else inputs,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=((axes,) * len(inputs),) if is_further else dict.fromkeys(inputs, axes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{name}: torch can't export this tower ({type(cause).__name__}: {str(cause).strip().splitlines()[0]}). "
            "Try another version of torch or timm."
        ) from error
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    beside = f"{name}_data" if external_data or size > LARGEST_FILE else None
    onnx_ir.save(program.model, folder / name, external_data=beside)


def _multiple(name: str, step: int):
    """An axis whose length is a multiple of `step`."""
    axis = torch.export.Dim(name)
    return axis if step == 1 else step * axis


def _refuse_adapters(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model has LoRA adapters attached, an ONNX file has no place for them: merge them first "
            "(PeftModel.merge_and_unload)."
        )


def _import_exporter() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The export needs {error.name}, which is not installed: pip install 'gap-closed-clip[onnx]'."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log: the exporter writes a line for every constant it leaves alone."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends, and vanishes when it fails."""
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        _check_replaceable(folder, overwrite)
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mounted disk or volume, which no export can replace: name a folder in it.")
    check_writable(folder.parent, "The ONNX files appear whole in their place, and the folder around it,")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.new")  # beside it: renaming stays on one file system
    old = draft.with_suffix(".old")
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed: in containers, all have the same number
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(draft, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not (folder / PREPROCESSING).is_file():
        raise FileExistsError(f"{folder} exists and is no earlier ONNX export: name another folder, or remove it.")
    own = files_of(_exported_modalities(folder))
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if foreign:
        raise FileExistsError(
            f"{folder} holds what no export wrote, {foreign[0]}: move it away, or name another folder."
        )
    if not overwrite:
        raise FileExistsError(f"{folder} exists: name another folder, or replace it with --overwrite.")


def _exported_modalities(folder: Path) -> list[str]:
    """The further modalities of an earlier export."""
    try:
        return list(json.loads((folder / PREPROCESSING).read_text(encoding="utf-8")).get("modalities", {}))
    except (ValueError, AttributeError):
        return []


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


__all__ = ["FILES", "Difference", "OnnxMismatch", "check_onnx", "export_onnx", "files_of", "float32_model"]
