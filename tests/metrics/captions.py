"""Captions to measure: a few written by hand, and a larger set drawn from a fixed seed."""

import random


# Row by row: alike, the same, half alike, in another order, nothing alike, a single word, empty, longer than its
# references, one word again and again. No punctuation and no capitals, so that tokens are what lies between spaces.
PREDICTIONS = [
    "axial ct of the chest with a small nodule in the left lung",
    "sagittal mr image of the brain",
    "chest radiograph showing a large left pleural effusion",
    "of the abdomen ct axial",
    "ultrasound shows gallstones",
    "radiograph",
    "",
    "coronal t2-weighted mr image of the knee with a tear of the medial meniscus and fluid around the joint",
    "the the the the the mass",
]
REFERENCES = [
    ["axial ct of the chest shows a nodule in the left upper lung", "small nodule of the left lung on axial ct"],
    ["sagittal mr image of the brain"],
    ["chest radiograph with a pleural effusion on the left", "large left pleural effusion", "effusion"],
    ["axial ct of the abdomen", "axial ct image of the upper abdomen"],
    ["axial ct of the chest", "brain mr"],
    ["radiograph", "radiograph of the hand"],
    ["frontal radiograph of the chest"],
    ["coronal mr of the knee", "tear of the medial meniscus", "mr image of the knee", "knee mr"],
    ["the mass in the liver", "a large mass of the liver", "mass"],
]

_WORDS = (
    "axial coronal sagittal ct mr radiograph image of the a in with shows left right lung liver brain chest knee mass "
    "nodule effusion small large 3.5 cm t2-weighted contrast"
).split()


def drawn_captions(rows: int = 50, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions of 0 to 14 words, one to five references of 1 to 14 words each; parts of references come back."""
    draw = random.Random(seed)

    def words(fewest: int) -> list[str]:
        return [draw.choice(_WORDS) for _ in range(draw.randint(fewest, 14))]

    predictions, references = [], []
    for _ in range(rows):
        texts = [words(1) for _ in range(draw.randint(1, 5))]
        start = draw.randint(0, 4)
        predictions.append(" ".join(draw.choice(texts)[start : start + 8] + words(0)[:6]))
        references.append([" ".join(text) for text in texts])
    return predictions, references
