"""What the objective is computed from: its inputs, checked; pairs of modalities; samples that do not count."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


Pairs = Sequence[tuple[int, int]]


class SharedSamples(NamedTuple):
    """
    For each of P pairs of modalities the samples that have both.

    Args:
        samples: (P, rows), bool: whether a sample has both modalities of a pair.
        counts: (P,), integers: how many samples of the whole batch have both; more than `samples` says where other
            processes hold rows of the batch too.
    """

    samples: Tensor
    counts: Tensor

    @classmethod
    def of(cls, modality_mask: Tensor, pairs: Pairs) -> "SharedSamples":
        """From a `modality_mask` (N, M) of the whole batch."""
        firsts, seconds = zip(*pairs, strict=True)
        samples = (modality_mask[:, list(firsts)] & modality_mask[:, list(seconds)]).T
        return cls(samples, samples.sum(1))

    def mean(self, losses: Tensor) -> Tensor:
        """
        The mean over those pairs of modalities that any sample has both of; 0 if there is none.

        Args:
            losses: (P,), for each pair the mean over all rows, where a sample that lacks one of the two counts as 0.
        """
        rows_per_sample = self.samples.shape[1] / self.counts.clamp(min=1).to(losses.dtype)
        return (losses * rows_per_sample).sum() / (self.counts > 0).sum().clamp(min=1)


def anchor_pairs(num_modalities: int) -> list[tuple[int, int]]:
    """The first modality, the anchor, with each of the others: (0, 1), (0, 2), ..."""
    return [(0, modality) for modality in range(1, num_modalities)]


def zero_absent(embeddings: list[Tensor], modality_mask: Tensor) -> list[Tensor]:
    """
    Rows of modalities that a sample lacks become zeros, whatever they hold, NaN too; their gradient is 0.

    Args:
        embeddings: M tensors (N, D).
        modality_mask: (N, M), bool.
    """
    return [z.masked_fill(~has_it[:, None], 0.0) for z, has_it in zip(embeddings, modality_mask.T, strict=True)]


def without_samples(excluded: Tensor | None, samples: Tensor) -> Tensor:
    """
    `excluded` (N, N), bool, with all pairs of samples besides of which any is left out; None stands for no pair.

    Args:
        samples: (N,), bool: False for samples that are left out.
    """
    left_out = ~(samples[:, None] & samples)
    return left_out if excluded is None else excluded | left_out


def scale_of(logit_scale: Tensor | float, embeddings: Tensor) -> Tensor:
    """The scale as a scalar tensor on the device of the embeddings. The value of a tensor is not looked at."""
    if not isinstance(logit_scale, Tensor) and not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}: it is 1 / temperature, a number above 0.")
    return _scalar("logit_scale", logit_scale, embeddings)


def bias_of(logit_bias: Tensor | float | None, embeddings: Tensor) -> Tensor | None:
    """The bias as a scalar tensor on the device of the embeddings, or None. A tensor's value is not looked at."""
    if logit_bias is None:
        return None
    if not isinstance(logit_bias, Tensor) and not math.isfinite(logit_bias):
        raise ValueError(f"logit_bias is {logit_bias}: it is a finite number, or None for the softmax.")
    return _scalar("logit_bias", logit_bias, embeddings)


def _scalar(name: str, value: Tensor | float, embeddings: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}: it is one number.")
        return value.reshape(()).to(embeddings.device)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return torch.tensor(float(value), dtype=dtype, device=embeddings.device)


def excluded_pairs(group_ids: Tensor | None, device: torch.device) -> Tensor | None:
    """(N, N), bool: whether samples i and j agree in any column of `group_ids`, (N,) or (N, G); None without ids."""
    if group_ids is None:
        return None
    ids = group_ids.to(device).reshape(len(group_ids), -1)  # (N, G)
    excluded = torch.zeros(len(ids), len(ids), dtype=torch.bool, device=device)
    for column in ids.T:
        excluded |= column[:, None] == column
    return excluded


def excluded_of(excluded: Tensor | None, modality_ids: Tensor | None, *modalities: int) -> Tensor | None:
    """
    `excluded` (N, N), bool, with all pairs of samples besides that have an equal value of one of some modalities; None
    stands for no pair.

    Args:
        modality_ids: (N, M) integers, equal where two samples have an equal value; None: all differ.
        modalities: their places among the M.
    """
    if modality_ids is None:
        return excluded
    for modality in modalities:
        ids = modality_ids[:, modality]
        equal = ids[:, None] == ids
        excluded = equal if excluded is None else excluded | equal
    return excluded


def check_loss_inputs(
    embeddings: list[Tensor],
    group_ids: Tensor | None,
    modality_mask: Tensor | None,
    pairs: Pairs | None,
    modality_ids: Tensor | None = None,
) -> None:
    """Raises a ValueError that says what is wrong; see `gap_closed_loss`. Values of tensors are not looked at."""
    if len(embeddings) < 2:
        raise ValueError(
            f"The objective compares modalities: give a list of two or more (N, D) tensors, not {len(embeddings)}."
        )
    shapes = [tuple(z.shape) for z in embeddings]
    # Compared and not put into a set: under torch.export sizes may be symbols, which have no hash.
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(
            f"Embeddings of shapes {shapes}: every modality needs one (N, D) tensor of the same shape, row i of each "
            "belonging to sample i, and at least one row."
        )
    num_rows = shapes[0][0]
    for name, value in (
        ("group_ids", group_ids),
        ("modality_mask", modality_mask),
        ("modality_ids", modality_ids),
    ):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: give a tensor, torch.tensor({name}).")
    if group_ids is not None and (group_ids.ndim not in (1, 2) or len(group_ids) != num_rows):
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}: give (N,) or (N, G) with N = {num_rows}.")
    for name, value in (("modality_mask", modality_mask), ("modality_ids", modality_ids)):
        if value is not None and tuple(value.shape) != (num_rows, len(embeddings)):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: give (N, M) = ({num_rows}, {len(embeddings)}), a row for "
                "each sample and a column for each modality, in the order of the embeddings."
            )
    if modality_mask is not None and modality_mask.dtype != torch.bool:
        raise ValueError(
            f"modality_mask has dtype {modality_mask.dtype}: give torch.bool, True where a sample has the modality."
        )
    if pairs is not None:
        _check_pairs(pairs, len(embeddings))


def _check_pairs(pairs: Pairs, num_modalities: int) -> None:
    if not pairs:
        raise ValueError(
            "pairs is empty: name at least one pair of modalities, or None for the first with each other."
        )
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= modality < num_modalities for modality in pair):
            raise ValueError(
                f"pairs has {tuple(pair)}: a pair is two different modalities of the {num_modalities} there are, "
                f"numbered from 0 to {num_modalities - 1}."
            )
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise ValueError(f"pairs has a pair twice, which would count twice: {[tuple(pair) for pair in pairs]}.")


__all__ = [
    "Pairs",
    "SharedSamples",
    "anchor_pairs",
    "bias_of",
    "check_loss_inputs",
    "excluded_of",
    "excluded_pairs",
    "scale_of",
    "without_samples",
    "zero_absent",
]
