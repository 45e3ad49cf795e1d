"""Compares ONNX files with the model that they were exported from."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .onnx_further import further_batches
from .onnx_preprocessing import PREPROCESSING, TEXT_MODEL, TOKENIZER, VISION_MODEL, example_size, size_step


CHECK = "check.json"
BATCH_SIZES = (1, 5)  # neither is that of the export's example, 2
SHORT = 11  # tokens; the example has 7
SENTENCES = (
    "Chest radiograph with left pleural effusion.",
    "Axial CT of the abdomen after contrast, portal venous phase, showing a lesion of the liver (arrow).",
    "Normal.",
    "Sagittal T2-weighted MR image: disc herniation at L5/S1, 7 mm.",
    "Follow-up " * 600,  # longer than any tower takes
)


@dataclass
class Difference:
    """Largest absolute difference between a file's and the model's embeddings of one batch.

    Args:
        file: `vision_model.onnx`, `text_model.onnx`, or a further modality's, `record.onnx`.
        inputs: what the batch holds, e.g. "random, padded".
        shape: of `pixel_values`, `input_ids`, or what a further tower takes first, the batch first.
        maximum: that largest difference.
    """

    file: str
    inputs: str
    shape: list[int]
    maximum: float

    def __str__(self) -> str:
        return f"{self.file:18} {self.inputs:17} {' x '.join(map(str, self.shape)):20} {self.maximum:.1e}"


class OnnxMismatch(ValueError):
    """A file gives other embeddings than the model; `differences` has all that was measured."""

    def __init__(self, message: str, differences: list[Difference]):
        super().__init__(message)
        self.differences = differences


def check_onnx(
    model: GapClosedClipModel, processor: GapClosedClipProcessor, folder: str | Path, tolerance: float = 1e-5
) -> list[Difference]:
    """
    Runs all files in onnxruntime and compares them with the model; the differences go into the folder's `check.json`.

    Batches of 1 and 5 are compared: of random numbers, texts short and as long as can be, with and without padding; of
    images and sentences through the processor. So are the tokens of `tokenizer.json` with the processor's.

    Args:
        model: in evaluation mode, float32, on the CPU.
        folder: as `export_onnx` wrote it.
        tolerance: largest absolute difference that passes. The vectors have length one; correct exports differ by
            1e-7 to 1e-6.

    Raises:
        ImportError: onnxruntime is not installed.
        OnnxMismatch: a difference above `tolerance`, or other tokens.
    """
    onnxruntime = import_onnxruntime()
    folder = Path(folder)
    max_length = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))["text"]["max_length"]
    _check_tokenizer(processor, folder / TOKENIZER, max_length)
    batches = {
        VISION_MODEL: _image_batches(model, processor),
        TEXT_MODEL: _text_batches(model, processor, max_length),
    }
    for name in processor.modality_processors:
        batches[f"{name}.onnx"] = further_batches(processor, name, BATCH_SIZES)
    differences = []
    for file, named_batches in batches.items():
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        taken = [each.name for each in session.get_inputs()]  # a record without numbers has none in its graph
        for inputs, batch in named_batches:
            found = session.run(None, {name: batch[name].numpy() for name in taken})[0]
            modality = file.removesuffix(".onnx")
            prefix = "" if file in (VISION_MODEL, TEXT_MODEL) else f"{modality}_"
            maximum = float(np.abs(found - _embed(model, batch, prefix)).max())
            differences.append(Difference(file, inputs, list(next(iter(batch.values())).shape), maximum))
    _raise_if_above(tolerance, differences)
    content = {
        "tolerance": tolerance,
        "maximum": max(difference.maximum for difference in differences),
        "onnxruntime": onnxruntime.__version__,
        "differences": [asdict(difference) for difference in differences],
    }
    (folder / CHECK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return differences


def _raise_if_above(tolerance: float, differences: list[Difference]) -> None:
    failed = [difference for difference in differences if not difference.maximum <= tolerance]  # nan fails too
    if failed:
        worst = max(failed, key=lambda difference: np.nan_to_num(difference.maximum, nan=np.inf))
        raise OnnxMismatch(
            f"{worst.file} differs from the model by {worst.maximum:.1e} ({worst.inputs}, "
            f"{' x '.join(map(str, worst.shape))}), more than the tolerance {tolerance:.0e}.",
            differences,
        )


def import_onnxruntime():
    """The module onnxruntime.

    Raises:
        ImportError: it is not installed; how to get it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "The check needs onnxruntime, which is not installed: pip install 'gap-closed-clip[onnx]'."
        ) from error
    return onnxruntime


def _embed(model: GapClosedClipModel, batch: dict[str, Tensor], prefix: str = "") -> np.ndarray:
    """The embeddings that the model's forward gives, (B, D); `prefix` is put before the inputs' names."""
    with torch.no_grad():
        outputs = model(**{f"{prefix}{name}": value for name, value in batch.items()})
    return next(iter(outputs.embeds.values())).numpy()


def _image_batches(
    model: GapClosedClipModel, processor: GapClosedClipProcessor
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    height, width = example_size(processor)
    step = size_step(model)
    sizes = [(height, width)] if step is None else [(height, width), (height + 4 * step[0], width)]
    for batch_size in BATCH_SIZES:
        for size in sizes:
            yield "random", {"pixel_values": torch.randn(batch_size, 3, *size, generator=generator)}
        images = _example_images(batch_size, max(height, width))
        yield "processed", {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}


def _text_batches(
    model: GapClosedClipModel, processor: GapClosedClipProcessor, max_length: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.text_config.vocab_size
    for batch_size in BATCH_SIZES:
        for length in sorted({min(SHORT, max_length), max_length}):
            ids = torch.randint(vocabulary, (batch_size, length), generator=generator)
            whole = torch.ones_like(ids)
            lengths = torch.arange(1, batch_size + 1)[:, None] * length // (batch_size + 1)  # (B, 1)
            padded = (torch.arange(length) < lengths.clamp(min=1)).long()  # (B, length)
            types = torch.zeros_like(ids)
            yield "random", {"input_ids": ids, "attention_mask": whole, "token_type_ids": types}
            yield "random, padded", {"input_ids": ids, "attention_mask": padded, "token_type_ids": types}
        yield "processed", _tokens(processor, SENTENCES[:batch_size], max_length)


def _tokens(processor: GapClosedClipProcessor, sentences: tuple[str, ...], max_length: int) -> dict[str, Tensor]:
    tokens = processor.tokenizer(
        list(sentences), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    # RoBERTa's tokenizer makes none
    return batch | {"token_type_ids": tokens.get("token_type_ids", torch.zeros_like(tokens["input_ids"]))}


def _example_images(number: int, side: int) -> list[Image.Image]:
    """Smooth and noisy images, upright, wide, smaller and larger than what the tower takes."""
    generator = np.random.default_rng(0)
    images = []
    for index in range(number):
        height, width = side + 37 * index, max(side // 2, side + 150 - 61 * index)
        slope = np.linspace(0, 200, height)[:, None] + np.linspace(0, 55, width) * (index % 2)  # (height, width)
        noise = generator.integers(0, 55, (height, width))
        images.append(Image.fromarray((slope * 0.78 + noise).clip(0, 255).astype(np.uint8)))
    return images


def _check_tokenizer(processor: GapClosedClipProcessor, path: Path, max_length: int) -> None:
    encodings = Tokenizer.from_file(str(path)).encode_batch(list(SENTENCES))
    expected = _tokens(processor, SENTENCES, max_length)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    for name, field in fields.items():
        if [getattr(encoding, field) for encoding in encodings] != expected[name].tolist():
            raise OnnxMismatch(f"tokenizer.json gives other {name} than the processor.", [])


__all__ = ["Difference", "OnnxMismatch", "check_onnx", "import_onnxruntime"]
