"""Samples of three modalities, or of four: a tiny model of them, pairs of which some lack something."""

import numpy as np
import torch
from conftest import CAPTIONS, IMAGE_SIZE, tiny_config
from datasets import Dataset, Features, Image, List, Value
from modalities import AUDIO
from transformers import CLIPImageProcessor

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.evaluation import PairEmbeddings
from gap_closed_clip.evaluation.modality_values import values_of
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor
from gap_closed_clip.training.encoder import train_tokenizer

from .conftest import png


RECORDS = [
    {"age": 45, "sex": "female"},
    {"age": 45, "sex": " Female"},  # the same
    {"age": 62, "sex": "male"},
    None,
    {"age": None, "sex": "male"},
    {"age": 62, "sex": "male"},
    {"age": 7, "sex": None},
    {"age": None, "sex": None},  # none
]


def record_processor() -> RecordProcessor:
    return RecordProcessor(
        [
            {"name": "age", "kind": "number", "mean": 50.0, "std": 20.0},
            {"name": "sex", "kind": "category", "categories": ["female", "male"]},
        ]
    )


def record_model(audio: bool = False, **kwargs) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """Image, text and record, with `audio` also spectrograms of 24 x 16."""
    torch.manual_seed(0)
    tower = {
        "model_type": "gap_closed_clip_record",
        "num_numbers": 1,
        "categories": [4],
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    modalities, processors = {"record": {"tower": tower}}, {"record": record_processor()}
    if audio:
        modalities["audio"] = {"tower": AUDIO}
        processors["audio"] = ArrayProcessor("input_values", [24, 16])
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 64
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    model = GapClosedClipModel(tiny_config(modalities=modalities, **kwargs))
    return model, GapClosedClipProcessor(images, tokenizer, modality_processors=processors)


def record_pairs(audio: bool = False) -> Dataset:
    """Eight samples: the third lacks the image, the sixth the caption, the fourth and the last the record."""
    images = [0, 1, None, 0, 3, 4, 5, 1]
    captions = [*CAPTIONS[:5], "", CAPTIONS[2], CAPTIONS[0]]
    text = Value("string")
    rows = {
        "image": [None if number is None else {"bytes": png(number), "path": None} for number in images],
        "caption": captions,
        "image_id": ["" if number is None else f"image {number}" for number in images],
        "label": ["CT", "", "MR", "CT", "US", "CT", "", "MR"],
        "record": RECORDS,
    }
    features = {"image": Image(decode=False), "caption": text, "image_id": text, "label": text}
    features["record"] = {"age": Value("float64"), "sex": text}
    if audio:
        sounds = np.random.default_rng(0).normal(size=(3, 24, 16)).astype(np.float32)
        rows["audio"] = [None if k == 5 else sounds[k % 3].tolist() for k in range(8)]
        features["audio"] = List(List(Value("float32")))
    return Dataset.from_dict(rows, features=Features(features))


def of_three(n: int = 90, dim: int = 24, seed: int = 0, lacking: float = 0.0, gap: float = 0.0) -> PairEmbeddings:
    """Unit vectors of image, text and record with content in common; the record has the least of it."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(n, dim))
    noise = {"image": 0.8, "text": 1.0, "record": 2.5}
    embeds, present = {}, {}
    for number, (name, level) in enumerate(noise.items()):
        z = shared + level * random.normal(size=(n, dim))
        z[:, number] += gap * np.sqrt(dim)
        present[name] = random.random(n) >= lacking
        embeds[name] = (z / np.linalg.norm(z, axis=1, keepdims=True) * present[name][:, None]).astype(np.float32)
    ages = (50 + 20 * shared[:, 0]).round()
    rows = [
        {"age": age, "sex": "female" if x > 0 else "male"} if given else None
        for age, x, given in zip(ages.tolist(), shared[:, 1], present["record"], strict=True)
    ]
    return PairEmbeddings(
        image_embeds=embeds["image"],
        text_embeds=embeds["text"],
        image_ids=[f"i{k}" if given else "" for k, given in enumerate(present["image"])],
        captions=[f"case {k}, {k % 3} years" if given else "" for k, given in enumerate(present["text"])],
        labels=["even" if k % 2 == 0 else "odd" for k in range(n)],
        values={"record": values_of(rows)},
        further={"record": embeds["record"]},
        present=present,
    )
