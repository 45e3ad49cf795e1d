"""Phantoms: radiology-like image-caption pairs drawn from a seed. Needs no download and holds no patient's data.

They are a demonstration and a test bed, **not medical images**: cartoons of chest radiographs, chest CT, brain MR,
abdominal ultrasound and mammograms, good for trying the training out and for testing it, and for nothing clinical. No
model trained on them, and no figure measured on them, says anything about real radiology.

They are made as awkward as real pairs: findings are long-tailed; captions vary in wording, leave out side, place or
even the finding, and tell what no picture shows (age, history, histology, follow-up); several pictures of one case
share one caption word for word, and now and then one picture has two captions.
"""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, Image, Value

from .brain import draw_brain
from .captions import write_caption
from .cases import Case, draw_case, zipf_index
from .ct import draw_ct
from .drawing import Canvas
from .findings_chest import CT, RADIOGRAPH
from .findings_other import BRAIN, MAMMOGRAM, ULTRASOUND
from .mammogram import draw_mammogram
from .radiograph import draw_radiograph
from .ultrasound import draw_ultrasound


MODALITIES = (RADIOGRAPH, CT, BRAIN, ULTRASOUND, MAMMOGRAM)

# name -> painter and strength of the grain
_PAINTERS = {
    RADIOGRAPH.name: (draw_radiograph, 0.02),
    CT.name: (draw_ct, 0.03),
    BRAIN.name: (draw_brain, 0.025),
    ULTRASOUND.name: (draw_ultrasound, 0.015),
    MAMMOGRAM.name: (draw_mammogram, 0.015),
}

FEATURES = Features(
    {
        "image": Image(decode=False),
        "image_id": Value("string"),
        "caption": Value("string"),
        "label": Value("string"),
        "case_id": Value("string"),
        "modality": Value("string"),
        "view": Value("string"),
        "finding": Value("string"),
        "side": Value("string"),
        "zone": Value("string"),
        "size": Value("string"),
        "age": Value("int32"),
        "sex": Value("string"),
    }
)


def make_phantoms(num_pairs: int, seed: int, image_size: int = 128) -> Dataset:
    """Draw image-caption pairs.

    The first n pairs of a longer set of the same seed are the set of n pairs; different seeds share no picture.

    Args:
        num_pairs: pairs (rows) to make; a little fewer pictures, since a few have two captions.
        seed: non-negative; give every split its own.
        image_size: side of the square pictures in pixels.

    Returns:
        Dataset with the columns `image` (8-bit gray PNG bytes, undecoded), `image_id`, `caption`, `label`
        ("modality / family of findings") and the facts the picture was drawn from: `case_id`, `modality`, `view`,
        `finding`, `side` (the patient's), `zone`, `size`, `age` (years), `sex`.

    Raises:
        ValueError: num_pairs below 1, a negative seed, or image_size below 32.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}: ask for at least 1 pair")
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must not be negative")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}: phantoms need at least 32 pixels a side")
    columns: dict[str, list] = {name: [] for name in FEATURES}
    number = 0
    while len(columns["image"]) < num_pairs:
        for row in _case_rows(seed, number, image_size):
            for name, value in row.items():
                columns[name].append(value)
        number += 1
    return Dataset.from_dict({name: values[:num_pairs] for name, values in columns.items()}, features=FEATURES)


def _case_rows(seed: int, number: int, image_size: int) -> Iterator[dict]:
    """Rows of one case: usually one picture, at times two to four under one caption, rarely one picture twice."""
    rng = np.random.default_rng([seed, number])
    case = draw_case(rng, MODALITIES)
    pictures = 1 if rng.random() > 0.09 else 2 + zipf_index(rng, 3)
    views = [case.views[zipf_index(rng, len(case.views), 0.8)]]
    views += [
        views[0] if rng.random() < 0.5 else case.views[rng.integers(len(case.views))] for _ in range(pictures - 1)
    ]
    caption = write_caption(case, views[0], rng)
    second = write_caption(case, views[0], rng) if pictures == 1 and rng.random() < 0.03 else None
    case_id = f"phantom-{seed}-{number:06d}"
    for picture, view in enumerate(views):
        row = {
            "image": {
                "bytes": _draw(case, view, "arrow" in caption, image_size, [seed, number, picture]),
                "path": None,
            },
            "image_id": f"{case_id}-{picture}",
            "caption": caption,
            "label": case.label,
            "case_id": case_id,
            "modality": case.modality,
            "view": view,
            "finding": case.finding.key,
            "side": case.side,
            "zone": case.zone,
            "size": case.size_word,
            "age": case.age,
            "sex": case.sex,
        }
        yield row
        if second is not None:
            yield row | {"caption": second}


def _draw(case: Case, view: str, arrow: bool, image_size: int, entropy: list[int], jitter: float = 1.0) -> bytes:
    """One picture of a case as PNG bytes: anatomy, finding, marks, exposure."""
    rng = np.random.default_rng([*entropy, 1])
    right_breast = case.modality == MAMMOGRAM.name and case.side == "right"
    canvas = Canvas(image_size, rng, jitter, mirror=right_breast or case.finding.key == "dextrocardia")
    painter, grain = _PAINTERS[case.modality]
    target = painter(canvas, case, view)
    if arrow and target is not None and rng.random() < 0.8:
        canvas.arrow(*target, value=0.98)
    _mark(canvas, case, view, right_breast)
    return canvas.encode(grain, exposure=jitter)


def _mark(canvas: Canvas, case: Case, view: str, right_breast: bool) -> None:
    """Side letters and collimation, as they are burned into real pictures."""
    rng = canvas.rng
    if case.modality == RADIOGRAPH.name:
        if rng.random() < 0.3:
            canvas.collimate(*rng.uniform(0, 0.07, 4))
        if view != "lateral" and rng.random() < 0.6:
            if rng.random() < 0.5:
                canvas.text("R", -0.92, rng.uniform(-0.9, -0.6))  # the patient's right is at the image left
            else:
                canvas.text("L", 0.8, rng.uniform(-0.9, -0.6))
    elif case.modality == MAMMOGRAM.name and rng.random() < 0.6:
        letters = ("R" if right_breast else "L") + view
        canvas.text(letters, -0.92 if right_breast else 0.92 - 0.125 * len(letters), rng.uniform(-0.92, 0.8))
    elif case.modality in (BRAIN.name, CT.name) and not view.startswith("sagittal") and rng.random() < 0.2:
        canvas.text("R", -0.96, -0.05)
