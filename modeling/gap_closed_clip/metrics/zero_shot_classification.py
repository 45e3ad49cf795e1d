"""Zero-shot classification of images by the embeddings of the classes' names: accuracy and calibration."""

from collections.abc import Iterator
from typing import Any

import evaluate
import numpy as np
from datasets import Features

from ._embeddings import EMBEDDING, INTEGER, TIE, EmbeddingMetric, UnitRows, blocks, is_missing, require_one_space


_DESCRIPTION = """\
Images are given the class whose embedding is nearest (Radford et al. 2021), with probabilities softmax(logit_scale *
cosine) over the classes. Of several templates ("a CT of {}", "a scan that shows {}") a class's embedding is the mean
of its unit vectors, made a unit vector again, as in that paper.

- `zero_shot_accuracy`: fraction (0..1) of the images whose own class is the nearest. Ties count against the model: a
  class as near as the own one (within a cosine of 1e-9) makes it wrong. Equal embeddings get 0, not 1 / C.
- `zero_shot_balanced_accuracy`: the same as the mean over the classes that occur of each one's fraction (recall).
- `zero_shot_ece`: expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3): 15 bins of equal width
  of the highest probability, ((m - 1) / 15, m / 15], and the mean over the images of how far their bin's accuracy is
  from its mean probability.
- `zero_shot_brier`: mean over the images of the sum over the classes of (probability - 1 if it is the own class)^2,
  0 is best, 2 worst (Brier 1950, the form for several classes).
- `zero_shot_nll`: mean of -log of the own class's probability, in nats.
- `zero_shot_chance_accuracy`: 1 / C of C classes. What balanced accuracy has to beat, too.
- `zero_shot_majority_accuracy`: the fraction of the most frequent class, which who knows the labels gets by naming it
  always.

Calibration depends on `logit_scale` (1 / temperature): give the model's own. Everything is computed in float64, block
by block: O(block_size * C) memory.
"""

_CITATION = """\
@inproceedings{radford2021learning,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
               Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
               Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2021}
}
@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2017}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    image_embeds: (N, D) image embeddings: a numpy array, a torch tensor, or one list of D floats an image. They are
        read as float32 and normalised to unit length here.
    labels: N integers, the class of each image, from 0 to C - 1.
    class_embeds: (C, D) embeddings of the classes, or (T, C, D) of T templates; likewise.
    logit_scale (`float`): what cosines are multiplied by before the softmax, e.g. model.logit_scale.exp().
    num_bins (`int`, defaults to 15): of the expected calibration error.
    block_size (`int`, defaults to 4096): images scored at once.

Returns:
    dict of floats: zero_shot_accuracy, zero_shot_balanced_accuracy, zero_shot_ece, zero_shot_brier, zero_shot_nll,
    zero_shot_chance_accuracy, zero_shot_majority_accuracy.

Raises:
    ValueError: no image, rows of different length, a zero vector, a value that is not finite, a label that is no
    class, templates that cancel out, a logit_scale that is not positive, or num_bins below 1; the row is named.

Examples:
    Three images at 0, 0 and 90 degrees, two classes at 0 and 90 degrees; the second image belongs to the second class.

    >>> import evaluate
    >>> metric = evaluate.load("zero_shot_classification.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]],
    ...     labels=[0, 1, 1],
    ...     class_embeds=[[1.0, 0.0], [0.0, 1.0]],
    ...     logit_scale=2.0,
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'zero_shot_accuracy': 0.6667, 'zero_shot_balanced_accuracy': 0.75, 'zero_shot_ece': 0.2141,
     'zero_shot_brier': 0.5361, 'zero_shot_nll': 0.7936, 'zero_shot_chance_accuracy': 0.5,
     'zero_shot_majority_accuracy': 0.6667}
"""


def _as_floats(values):
    """A torch tensor, of whatever device and type, as an array; all else as it is."""
    return values.detach().cpu().float().numpy() if hasattr(values, "detach") else values


def _class_vectors(class_embeds) -> np.ndarray:
    """(C, D) unit vectors of the classes, the templates ensembled."""
    if isinstance(class_embeds, list | tuple):
        class_embeds = [_as_floats(part) for part in class_embeds]
        if len(shapes := {np.shape(part) for part in class_embeds}) > 1:
            raise ValueError(f"class_embeds: the parts differ in shape, {sorted(shapes)}.")
    embeds = np.asarray(_as_floats(class_embeds), dtype=np.float32)
    if embeds.ndim not in (2, 3) or 0 in embeds.shape:
        raise ValueError(f"class_embeds: the shape is {embeds.shape}; give (C, D), or (T, C, D) of T templates.")
    if embeds.ndim == 2:
        return UnitRows(embeds, "class_embeds", "classes")[:]
    templates = [UnitRows(part, f"class_embeds of template {number}")[:] for number, part in enumerate(embeds)]
    mean = np.mean(templates, axis=0)
    lengths = np.linalg.norm(mean, axis=1, keepdims=True)
    if lengths.min() < TIE:
        raise ValueError(f"class_embeds: the templates of class {int(lengths.argmin())} cancel out, none is left.")
    return mean / lengths


def _whole(labels) -> list[int]:
    """The labels as integers, without names and fractions, of which `evaluate` would speak as of literals, or cut the
    latter off.
    """
    found = []
    for row, label in enumerate(labels.tolist() if hasattr(labels, "tolist") else labels):
        value = label.item() if hasattr(label, "item") else label  # of numpy and torch
        if isinstance(value, str | list) or is_missing(value) or value != value // 1:
            raise ValueError(
                f"labels: row {row} is {value!r:.80}: give the number of its class, its place in class_embeds from 0 "
                "on, such as [names.index(label) for label in labels]."
            )
        found.append(int(value))
    return found


def _checked_labels(labels, num_classes: int) -> np.ndarray:
    """(N,) integers, each one a class."""
    numbers = np.asarray(labels)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"labels: row {row} is {numbers[row]}, but the {num_classes} classes are 0 to {num_classes - 1}."
        )
    return numbers


def _scored(
    images: UnitRows, classes: np.ndarray, labels: np.ndarray, logit_scale: float, block_size: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Of each block (n,) booleans, which images are right, and (n,) highest probability, Brier score and NLL."""
    for block in blocks(len(images), block_size):
        own, rows = labels[block], np.arange(block.stop - block.start)
        cosines = images[block] @ classes.T  # (n, C)
        others = cosines.copy()
        others[rows, own] = -np.inf
        right = cosines[rows, own] - TIE > others.max(axis=1)
        logits = logit_scale * cosines
        logits -= logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits).sum(axis=1))
        probabilities = np.exp(logits - log_sums[:, None])
        highest = probabilities.max(axis=1)
        nll = log_sums - logits[rows, own]
        probabilities[rows, own] -= 1
        yield right, highest, np.sum(probabilities**2, axis=1), nll


def _calibration_error(right: np.ndarray, highest: np.ndarray, num_bins: int) -> float:
    """Expected calibration error over bins (edge, next edge] of equal width."""
    edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.digitize(highest, edges, right=True)
    return float(np.abs(np.bincount(bins, right - highest)).sum() / len(right))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ZeroShotClassification(EmbeddingMetric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"image_embeds": EMBEDDING, "labels": INTEGER}),
            reference_urls=["https://arxiv.org/abs/2103.00020", "https://arxiv.org/abs/1706.04599"],
        )

    def _with_defaults(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As of every metric of embeddings; labels that are no whole numbers are refused by their row."""
        if inputs.get("labels") is not None:
            inputs = {**inputs, "labels": _whole(inputs["labels"])}
        return super()._with_defaults(inputs)

    def _compute(self, image_embeds, labels, class_embeds, logit_scale, num_bins=15, block_size=4096):
        scale = np.asarray(_as_floats(logit_scale)).item()  # a model's own has a gradient
        if not 0 < scale < np.inf:
            raise ValueError(f"logit_scale is {scale:g}; give the factor of the cosines, 1 / temperature.")
        if num_bins < 1:
            raise ValueError(f"zero_shot_classification: num_bins is {num_bins}, it has to be 1 or more.")
        images, classes = UnitRows(image_embeds, "image_embeds", "images"), _class_vectors(class_embeds)
        require_one_space(images, UnitRows(classes, "class_embeds"), "class_embeds")
        labels = _checked_labels(labels, len(classes))
        scored = _scored(images, classes, labels, scale, block_size)
        right, highest, brier, nll = (np.concatenate(values) for values in zip(*scored, strict=True))
        counts = np.bincount(labels, minlength=len(classes))
        recalls = np.bincount(labels, right, minlength=len(classes))[counts > 0] / counts[counts > 0]
        return {
            "zero_shot_accuracy": float(right.mean()),
            "zero_shot_balanced_accuracy": float(recalls.mean()),
            "zero_shot_ece": _calibration_error(right, highest, num_bins),
            "zero_shot_brier": float(brier.mean()),
            "zero_shot_nll": float(nll.mean()),
            "zero_shot_chance_accuracy": 1 / len(classes),
            "zero_shot_majority_accuracy": float(counts.max() / len(labels)),
        }
