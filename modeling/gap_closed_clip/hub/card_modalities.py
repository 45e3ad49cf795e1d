"""What the card tells of modalities beyond image and text: their towers, their inputs, and how to use them."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modality_processing_gap_closed_clip import load_modality_processors
from ..model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor
from ..model.record_tower_gap_closed_clip import GapClosedClipRecordConfig
from .escaping import as_code, as_code_in_cell, as_text, one_line
from .samples import records


SHOWN = 10  # words of a vocabulary that the card shows
IN_EXAMPLE = 3  # fields of the example's record


def read_modalities(folder: Path, config: GapClosedClipConfig) -> list[dict[str, Any]]:
    """
    Of each further modality in order: `name`, `tower` (in words), `num_parameters` (of the tower and what is behind
    it; None where the folder has no weights), `takes` (in words), `fields` (rows of the card's table; of a record),
    `example` (Python code of one sample; None where there is none to write down).

    Raises:
        ValueError: processor_config.json describes a processor that can't be.
    """
    if not config.modalities:
        return []
    path = folder / "processor_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    processors = load_modality_processors(content.get("modality_processors"))
    return [_facts(folder, name, entry, processors.get(name)) for name, entry in config.modalities.items()]


def _facts(folder: Path, name: str, entry: dict[str, Any], processor: Any) -> dict[str, Any]:
    tower = entry["tower"]
    facts: dict[str, Any] = {
        "name": name,
        "tower": _tower(tower),
        "num_parameters": _count(folder, f"modality_towers.{name}."),
    }
    facts |= {
        "fields": [],
        "example": None,
        "takes": f"what its processor makes of it, a `{type(processor).__name__}`",
    }
    if isinstance(processor, RecordProcessor):
        shown = records(processor, IN_EXAMPLE)[0]
        fields = [_field(field) for field in processor.fields]
        facts |= {"fields": fields, "example": repr(shown), "takes": "a mapping of fields to values"}
    elif isinstance(processor, ArrayProcessor):
        shape = as_text(" x ".join(map(str, processor.shape)))
        facts |= {
            "example": f"np.zeros({one_line(processor.shape)}, np.float32)",
            "takes": f"an array of {shape} numbers",
        }
    elif getattr(processor, "sampling_rate", None):
        rate = one_line(processor.sampling_rate)
        facts |= {
            "example": f"np.zeros({rate}, np.float32)",
            "takes": f"a waveform of {as_text(rate)} samples a second",
        }
    elif processor is not None and hasattr(processor, "image_mean"):
        facts |= {"example": "images[0]", "takes": "an image"}
    return facts


def _tower(tower: Any) -> str:
    layers, width = getattr(tower, "num_hidden_layers", None), getattr(tower, "hidden_size", None)
    size = f" ({as_text(layers)} layers of width {as_text(width)})" if layers and width else ""
    if isinstance(tower, GapClosedClipRecordConfig):
        return (
            f"a transformer over fields, FT-Transformer ([arXiv 2106.11959](https://arxiv.org/abs/2106.11959)){size}"
        )
    return f"`{as_code(tower.model_type)}`{size}"


def _field(field: dict[str, Any]) -> dict[str, str]:
    """A row of the card's table, safe in Markdown."""
    if field["kind"] == "category":
        words = [f"`{as_code_in_cell(word)}`" for word in field["categories"][:SHOWN]]
        rest = len(field["categories"]) - SHOWN
        told = ", ".join(words) + (f", and {rest} more" if rest > 0 else "")
    else:
        told = f"mean {field['mean']:.4g}, standard deviation {field['std']:.4g}"
        if field["kind"] == "date":
            told = f"years to `{as_code_in_cell(field['relative_to'])}`: {told}"
    return {"name": as_code_in_cell(field["name"]), "kind": field["kind"], "told": told}


def _count(folder: Path, prefix: str) -> int | None:
    number = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]
            number += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return number or None


def told_in_captions(metrics: dict[str, float]) -> dict[str, float]:
    """{field: share of the captions that tell its value word for word}, of those that some caption tells."""
    found = {}
    for metric, value in metrics.items():
        if metric.startswith("caption_tells_") and metric.endswith("]") and value > 0:
            found[as_code_in_cell(metric.partition("[")[2][:-1])] = value
    return found


__all__ = ["read_modalities", "told_in_captions"]
