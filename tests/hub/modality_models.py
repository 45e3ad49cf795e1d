"""A tiny model of image, text, record and spectrogram, with its processor: what the tests of the hub share."""

import numpy as np
import torch
from conftest import tiny_config
from modalities import AUDIO, RECORD

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor


# A category before the numbers: the tower takes numbers first, whatever the schema's order.
FIELDS = [
    {"name": "sex", "kind": "category", "categories": ["female", "male"]},
    {"name": "age", "kind": "number", "mean": 50.0, "std": 20.0},
    {"name": "birth", "kind": "date", "relative_to": "study", "mean": 50.0, "std": 20.0, "allow_later": False},
    {"name": "ward", "kind": "category", "categories": ["3"]},
]
RECORDS = [{"age": 62, "sex": "Female", "birth": "1961-02-03", "study": "2020-01-01"}, {"age": 41, "ward": 4}]
WEIGHTS = {"image": 1.5, "text": 2.0, "record": 0.25, "audio": 0.75}


def spectrogram(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(24, 16)).astype(np.float32).round(3)


def processor_of_four(tiny_processor, fields=FIELDS) -> GapClosedClipProcessor:
    further = {"record": RecordProcessor(fields), "audio": ArrayProcessor("input_values", [24, 16])}
    return GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)


def model_of_four(fields=FIELDS, **kwargs) -> GapClosedClipModel:
    """Of weights so large that a mistake shows."""
    torch.manual_seed(0)
    schema = RecordProcessor(fields)
    record = {**RECORD, "num_numbers": schema.num_numbers, "categories": schema.category_sizes}
    modalities = {"record": {"tower": record}, "audio": {"tower": AUDIO}}
    model = GapClosedClipModel(tiny_config(center_projections=True, modalities=modalities, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name in model.config.modality_names:
            model.parts(name).centering.running_mean.normal_(std=0.3)
    return model


def embeds_of(model, processor, **samples) -> dict[str, torch.Tensor]:
    """By the model and processor themselves, one modality at a time."""
    found = {}
    for name, values in samples.items():
        key, options = ("images", {}) if name == "image" else (name, {})
        options = {"padding": True, "truncation": True} if name == "text" else options
        with torch.no_grad():
            outputs = model(**processor(**{key: values}, return_tensors="pt", **options))
        found[name] = outputs.embeds[name]
    return found
