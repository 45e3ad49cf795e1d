"""The further modalities of an ONNX export: towers, what is said of their inputs, and inputs to check them with."""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..model.losses_gap_closed_clip import unit_vectors
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.record_processing_gap_closed_clip import RecordProcessor
from .samples import made_up, records


class FurtherEncoder(nn.Module):
    """A further modality's inputs, in the order of their names, -> (B, D), the embeddings of the model's forward."""

    def __init__(self, model: GapClosedClipModel, modality: str, inputs: tuple[str, ...]):
        super().__init__()
        self.model, self.modality, self.inputs = model, modality, inputs

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.inputs, values, strict=True))
        return unit_vectors(self.model.get_features(self.modality, return_dict=True, **given).pooler_output)


def further_files(name: str) -> tuple[str, str]:
    """The files of a further modality."""
    return f"{name}.onnx", f"{name}.onnx_data"


def example_inputs(processor: GapClosedClipProcessor) -> dict[str, dict[str, Tensor]]:
    """{modality: {input of its tower: (2, ...)}} of made-up samples."""
    return {name: _encode(processor, name, samples * 2, 2) for name, samples in made_up(processor).items()}


def _encode(processor: GapClosedClipProcessor, name: str, samples: list[Any], number: int) -> dict[str, Tensor]:
    """The first samples as the tower takes them; None is an image."""
    image = Image.linear_gradient("L").convert("RGB")
    values = [image if sample is None else sample for sample in samples[:number]]
    given: dict[str, Any] = {name: values}
    encoded = processor(**given, return_tensors="pt")
    return {key.removeprefix(f"{name}_"): tensor for key, tensor in encoded.items() if key != "modality_mask"}


def further_batches(
    processor: GapClosedClipProcessor, name: str, batch_sizes: tuple[int, ...]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is in a batch, and the batch: of random numbers, and of made-up samples through the processor."""
    generator = torch.Generator().manual_seed(0)
    own = processor.modality_processors[name]
    samples = made_up(processor)[name]
    for size in batch_sizes:
        processed = _encode(processor, name, samples * size, size)
        yield "processed", processed
        noise = {
            key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for key, tensor in processed.items()
        }
        if isinstance(own, RecordProcessor):
            noise["numbers_mask"] = torch.rand(noise["numbers"].shape, generator=generator) > 0.5
            ids = [torch.randint(n, (size,), generator=generator) for n in own.category_sizes]
            noise["categories"] = torch.stack(ids, dim=1) if ids else noise["categories"]
        yield "random", noise


def describe_further(processor: GapClosedClipProcessor) -> dict[str, Any]:
    """Of each further modality its file, inputs and output, and its processor as processor_config.json has it."""
    found = {}
    for name, inputs in example_inputs(processor).items():
        described = {
            key: {"shape": ["batch", *tensor.shape[1:]], "dtype": str(tensor.dtype).removeprefix("torch.")}
            for key, tensor in inputs.items()
        }
        own = processor.modality_processors[name]
        preprocessing = {key: value for key, value in own.to_dict().items() if key != "auto_map"}
        found[name] = {"file": f"{name}.onnx", "inputs": described, "output": f"{name}_embeds"}
        if isinstance(own, RecordProcessor):
            found[name] |= {"field_order": own.field_names, "example": records(own)[0]}
        found[name]["preprocessing"] = preprocessing
    return found


def further_rows(description: dict[str, Any]) -> list[str]:
    """Rows of the README's table of files."""
    rows = []
    for each in description.get("modalities", {}).values():
        takes = ", ".join(
            f"`{key}` ({', '.join(map(str, part['shape']))}) {part['dtype']}" for key, part in each["inputs"].items()
        )
        rows.append(
            f"| `{each['file']}` | {takes} | `{each['output']}` (batch, {description['embedding']['dimension']}) |\n"
        )
    return rows


def further_readme(description: dict[str, Any]) -> str:
    """What the README says of further modalities; nothing where there are none."""
    modalities = description.get("modalities", {})
    if not modalities:
        return ""
    parts = [OTHERS]
    for name, each in modalities.items():
        if each["preprocessing"].get("modality_processor_type") == "RecordProcessor":
            parts.append(RECORD.replace("NAME", name))
    return "\n" + "\n".join(parts)


OTHERS = """\
Further modalities are under `modalities` in `preprocessing.json`: the inputs of each file, and what its processor
(`preprocessing`) does. Arrays go in as they are, in the shape that is given there.
"""
RECORD = """\
A record becomes three arrays. A number is standardised by its field's `mean` and `std`; of a date it is the years
(365.25 days each) from it to `relative_to`, another date of the record or the one that is written there. Where it is
missing, `numbers` is 0 and `numbers_mask` false. Of a category 0 is missing, 1 an unknown word, and from 2 on the
field's `categories`, whatever their case and white space. None, NaN and a text without any character to see count as
missing. Numbers and dates come first, then categories, each in the schema's order.

```python
import datetime
import json

import numpy as np
import onnxruntime

schema = json.load(open("preprocessing.json", encoding="utf-8"))["modalities"]["NAME"]
fields = schema["preprocessing"]["fields"]


def value_of(record, name):
    value = record.get(name)
    value = value.strip() if isinstance(value, str) else value
    return None if value == "" or value != value else value  # NaN is not equal to itself


def day(text):
    return datetime.date.fromisoformat(str(text)[:10])


def number(field, record):
    value = value_of(record, field["name"])
    if value is None or field["kind"] == "number":
        return value
    other = field["relative_to"]
    fixed = other[:4].isdigit() and other[4:5] == "-"
    other = other if fixed else value_of(record, other)
    return None if other is None else (day(other) - day(value)).days / 365.25


def category(field, record):
    value = value_of(record, field["name"])
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    words, word = [known.casefold() for known in field["categories"]], " ".join(str(value).split()).casefold()
    return words.index(word) + 2 if word in words else 1


def inputs(record):
    found = [(number(field, record), field) for field in fields if field["kind"] != "category"]
    given = [value is not None for value, _ in found]
    numbers = [0.0 if value is None else (float(value) - field["mean"]) / field["std"] for value, field in found]
    categories = [category(field, record) for field in fields if field["kind"] == "category"]
    arrays = np.float32(numbers), np.array(given, bool), np.array(categories, np.int64)
    return {name: array[None] for name, array in zip(("numbers", "numbers_mask", "categories"), arrays)}


record_model = onnxruntime.InferenceSession(schema["file"])
taken = {each.name for each in record_model.get_inputs()}
given = {name: array for name, array in inputs(schema["example"]).items() if name in taken}
record_embeds = record_model.run(None, given)[0]
```
"""

__all__ = [
    "FurtherEncoder",
    "describe_further",
    "example_inputs",
    "further_batches",
    "further_files",
    "further_readme",
    "further_rows",
]
