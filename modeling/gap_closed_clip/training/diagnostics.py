"""What a batch tells of the space: alignment, collapse and scatter of every pair of modalities, and their means."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from ..model.modeling_gap_closed_clip import GapClosedClipOutput


# Random pairs this close: both modalities sit in one narrow cone, where every pair looks aligned.
COLLAPSED = 0.5
# True pairs this far apart in the second half of training, although they are being aligned.
SCATTERED = 0.15
TERMS = ("contrastive_loss", "align_loss", "uniformity_loss")
FURTHER_TERMS = ("modality_uniformity_loss", "cross_uniformity_loss")  # where they are used


@torch.no_grad()
def batch_diagnostics(outputs: GapClosedClipOutput) -> dict[str, Tensor]:
    """
    What tells alignment from collapse and scatter in one batch: scalars, by closed forms of O(B D).

    The terms of the loss; `modality_gap` = |mean image - mean text|; `true_pair_cosine`, `random_pair_cosine` (i !=
    j); `mean_cosine_image`, `mean_cosine_text` (i != j inside a modality). Plain batch statistics of the present
    process: over B pairs the gap has a sampling floor of about sqrt(2 / B).

    With further modalities also `modality_gap_image_record` and so on for each two, over the samples that have both,
    and `mean_cosine_record` for each. NaN where there are too few of those.
    """
    further = outputs.get("further_embeds") or {}
    embeds = {"image": outputs["image_embeds"], "text": outputs["text_embeds"], **further}
    embeds = {name: z.float() for name, z in embeds.items() if z is not None}  # (B, D)
    present: dict[str, Tensor] = {}
    if outputs.get("modality_mask") is not None:
        present = {name: z.any(-1) for name, z in embeds.items()}  # rows of zeros stand for what a sample lacks
    used = [*TERMS, *(name for name in FURTHER_TERMS if outputs.get(name) is not None)]
    found = {name: outputs[name].detach() for name in used}
    for first, second in combinations(embeds, 2):
        both = present[first] & present[second] if present else None
        suffix = pair_suffix(first, second)
        for name, value in _of_pair(embeds[first], embeds[second], both).items():
            found[f"{name}{suffix}"] = value
    for name, z in embeds.items():
        total = z.sum(0)
        _, others = _counts(len(z), present.get(name))
        found[f"mean_cosine_{name}"] = (total @ total - z.square().sum()) / others
    return found


def pair_suffix(first: str, second: str) -> str:
    """Of the names of what is measured between two modalities: empty for image and text."""
    return "" if (first, second) == ("image", "text") else f"_{first}_{second}"


def _of_pair(first: Tensor, second: Tensor, both: Tensor | None) -> dict[str, Tensor]:
    if both is not None:
        first, second = first * both.unsqueeze(-1), second * both.unsqueeze(-1)
    number, others = _counts(len(first), both)
    first_sum, second_sum, true_pairs = first.sum(0), second.sum(0), (first * second).sum()
    return {
        "modality_gap": (first_sum - second_sum).norm() / number,
        "true_pair_cosine": true_pairs / number,
        "random_pair_cosine": (first_sum @ second_sum - true_pairs) / others,
    }


def _counts(rows: int, mask: Tensor | None) -> tuple[int | Tensor, int | Tensor]:
    """Samples, and ordered pairs of different ones; NaN where a mask leaves none."""
    if mask is None:
        return rows, max(rows * (rows - 1), 1)
    number = mask.sum().float()
    others = number * (number - 1)
    return number.where(number > 0, torch.nan), others.where(others > 0, torch.nan)


class RunningMeans:
    """Means of `batch_diagnostics` over steps; a step counts for what it has a value of."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Those of one step."""
        for name, value in values.items():
            # A term of the loss is never left out: where it is NaN, that has to be seen.
            is_term = name in TERMS or name in FURTHER_TERMS
            counts = torch.ones_like(value) if is_term else value.isfinite().to(value.dtype)
            value = value if is_term else value.nan_to_num(0.0, 0.0, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def take(self) -> dict[str, float]:
        """The means so far, of those that there are, and begins anew."""
        counts = {name: count.item() for name, count in self.counts.items()}
        means = {name: total.item() / counts[name] for name, total in self.sums.items() if counts[name]}
        self.__init__()  # type: ignore[misc]
        return means


def warning_of(means: Mapping[str, float], modalities: tuple[str, ...], progress: float) -> str | None:
    """
    What there is to warn of: a space that collapses, or scatters although it is being aligned.

    Args:
        means: of `RunningMeans`, with the weights of the objective.
        modalities: their names in order.
        progress: fraction of training that is done.
    """
    for first, second in combinations(modalities, 2):
        suffix = pair_suffix(first, second)
        of_pair = f" of {first} and {second}" if suffix else ""
        random, true = means.get(f"random_pair_cosine{suffix}"), means.get(f"true_pair_cosine{suffix}")
        if random is None or true is None:
            continue
        if random > COLLAPSED:
            return (
                f"The space is collapsing: random pairs{of_pair} have a mean cosine of {random:.2f} (true pairs "
                f"{true:.2f}). A gap closed by crowding is no alignment: lower model.align_weight, keep "
                "model.uniformity_weight above 0 for longer, or set model.center_projections=true."
            )
        if true < SCATTERED and means["align_weight"] > 0:
            weak = f" (If {second} says little of {first}, no setting brings them closer.)" if suffix else ""
            return (
                f"The space is scattered: true pairs{of_pair} have a mean cosine of only {true:.2f} after "
                f"{progress:.0%} of training. Raise model.align_weight or lower model.uniformity_weight.{weak}"
            )
    return None


__all__ = ["RunningMeans", "batch_diagnostics", "pair_suffix", "warning_of"]
