"""Phantoms: radiology-like image-caption pairs drawn from a seed, without any download or patient's data.

They are a demonstration and a test bed, **not medical images**: cartoons of chest radiographs, chest CT, brain MR,
abdominal ultrasound and mammograms, good for trying the training out and for testing it, and for nothing clinical. No
model trained on them, and no figure measured on them, says anything about real radiology.

They are made as awkward as real pairs: a few findings are frequent and many are rare; captions vary in wording, leave
out the side, the place or even the finding, and tell what no image shows (age, history, histology, follow-up); several
images of one case share one caption word for word, and now and then one image has two captions.
"""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features, Image, Value

from .brain import draw_brain
from .captions import write_caption
from .cases import Case, sample_case, zipf_index
from .ct import draw_ct
from .drawing import Canvas
from .findings_chest import CT, RADIOGRAPH
from .findings_other import BRAIN, MAMMOGRAM, ULTRASOUND
from .mammogram import draw_mammogram
from .radiograph import draw_radiograph
from .ultrasound import draw_ultrasound


MODALITIES = (RADIOGRAPH, CT, BRAIN, ULTRASOUND, MAMMOGRAM)

# For each modality the function that paints it, and the strength of the grain.
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
        "organ": Value("string"),
        "finding_size": Value("float32"),
    }
)
RECORD = 2  # what tells the random numbers of records from those of images, which have 1 there
UNKNOWN = {"age": 0.05, "sex": 0.05, "finding_size": 0.1}  # shares of the records that do not tell it


def make_phantoms(num_pairs: int, seed: int, image_size: int = 128) -> Dataset:
    """Draw image-caption pairs.

    With the same seed, a smaller set is the beginning of a larger one. Sets of different seeds share no image.

    Args:
        num_pairs: pairs (rows) to make. There are a few images less, since some have two captions.
        seed: not negative; give every split its own.
        image_size: side of the square images in pixels.

    Returns:
        A data set with the columns `image` (8-bit gray PNG bytes, undecoded), `image_id`, `caption`, `label`
        ("modality / family of findings"), the facts that the image was drawn from: `case_id`, `modality`, `view`,
        `finding`, `side` (the patient's), `zone`, `size`, and what the patient's record tells: `age` (years), `sex`,
        `organ` (of the finding) and `finding_size` (mm, as a caption may quote it). As in real records some is missing
        (None): of every twentieth case the age, of others the sex; the size of what nobody measures, of no finding,
        and of every tenth other.

    Raises:
        ValueError: `num_pairs` is below 1, `seed` is negative, or `image_size` is below 32.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; ask for at least 1 pair.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}; phantoms need at least 32 pixels a side.")
    columns: dict[str, list] = {name: [] for name in FEATURES}
    case_number = 0
    while len(columns["image"]) < num_pairs:
        for row in _rows_of_case(seed, case_number, image_size):
            for name, value in row.items():
                columns[name].append(value)
        case_number += 1
    return Dataset.from_dict({name: values[:num_pairs] for name, values in columns.items()}, features=FEATURES)


def _rows_of_case(seed: int, case_number: int, image_size: int) -> Iterator[dict]:
    """The pairs of a case: usually one image, at times two to four with one caption, rarely one with two captions."""
    rng = np.random.default_rng([seed, case_number])
    case = sample_case(rng, MODALITIES)
    num_images = 1 if rng.random() > 0.09 else 2 + zipf_index(rng, 3)
    views = [case.views[zipf_index(rng, len(case.views), 0.8)]]
    for _ in range(num_images - 1):
        views.append(views[0] if rng.random() < 0.5 else case.views[rng.integers(len(case.views))])
    caption = write_caption(case, views[0], rng)
    second_caption = write_caption(case, views[0], rng) if num_images == 1 and rng.random() < 0.03 else None
    case_id = f"phantom-{seed}-{case_number:06d}"
    record = _record(case, np.random.default_rng([seed, case_number, 0, RECORD]))
    for image_number, view in enumerate(views):
        entropy = [seed, case_number, image_number]
        row = {
            "image": {"bytes": draw_image(case, view, "arrow" in caption, image_size, entropy), "path": None},
            "image_id": f"{case_id}-{image_number}",
            "caption": caption,
            "label": case.label,
            "case_id": case_id,
            "modality": case.modality,
            "view": view,
            "finding": case.finding.key,
            "side": case.side,
            "zone": case.zone,
            "size": case.size_word,
            **record,
        }
        yield row
        if second_caption is not None:
            yield row | {"caption": second_caption}


def _record(case: Case, rng: np.random.Generator) -> dict[str, str | float | None]:
    """What the patient's record tells of a case; what it does not tell is None."""
    record: dict[str, str | float | None] = {"age": case.age, "sex": case.sex, "organ": case.organ}
    record["finding_size"] = case.millimetres
    return {name: None if rng.random() < UNKNOWN.get(name, 0) else value for name, value in record.items()}


def draw_image(case: Case, view: str, arrow: bool, image_size: int, entropy: list[int], jitter: float = 1.0) -> bytes:
    """Draw one image of a case: its anatomy, finding, marks and exposure.

    Args:
        case: what is to be seen.
        view: one of the case's views.
        arrow: usually point an arrow to the finding, as the caption says.
        image_size: side of the square image in pixels.
        entropy: numbers that fix all chance in this image.
        jitter: strength of the variation in shape and exposure; 0 draws the plain anatomy.

    Returns:
        An 8-bit gray PNG file.
    """
    rng = np.random.default_rng([*entropy, 1])
    right_breast = case.modality == MAMMOGRAM.name and case.side == "right"
    canvas = Canvas(image_size, rng, jitter, mirror=right_breast or case.finding.key == "dextrocardia")
    painter, grain = _PAINTERS[case.modality]
    target = painter(canvas, case, view)
    if arrow and target is not None and rng.random() < 0.8:
        canvas.arrow(*target, value=0.98)
    _burn_in_marks(canvas, case, view, right_breast)
    return canvas.encode(grain, exposure=jitter)


def _burn_in_marks(canvas: Canvas, case: Case, view: str, right_breast: bool) -> None:
    """Add side letters and collimation, as they are burned into real images."""
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
