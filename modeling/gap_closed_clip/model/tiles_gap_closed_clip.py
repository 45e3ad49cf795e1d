"""
Tiles of the objective's N x N matrices, computed by torch: the reference, and what runs where there are no kernels.

`triton_tiles_gap_closed_clip` has the same functions for GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TileFunctions(NamedTuple):
    """What is done with a tile; see the functions of the same names below."""

    log_sum_exps: Callable
    contrastive_weights: Callable
    uniformity_weights: Callable
    add_product: Callable


@dataclass
class Tile:
    """
    Rows and columns of an N x N matrix, and which of its entries count.

    Args:
        rows, columns: slices of 0 .. N with start and stop.
        group_ids: integers (N, G): entries (i, j) that agree in any column don't count. None: all count.
        diagonal: whether the entries (i, i), the true pairs, count; they do or don't whatever their groups.
    """

    rows: slice
    columns: slice
    group_ids: Tensor | None
    diagonal: bool

    @property
    def offset(self) -> int:
        """Where the N x N matrix' diagonal runs in the tile, as `Tensor.diagonal` counts."""
        return self.rows.start - self.columns.start

    @property
    def meets_diagonal(self) -> bool:
        return self.rows.start < self.columns.stop and self.columns.start < self.rows.stop

    def exclude_(self, x: Tensor, value: float) -> Tensor:
        """Puts `value` into those entries of x (rows, columns) that don't count."""
        if self.group_ids is not None:
            ids = self.group_ids
            excluded = ids[self.rows, None, 0] == ids[self.columns, 0]
            for column in range(1, ids.shape[1]):
                excluded |= ids[self.rows, None, column] == ids[self.columns, column]
            if self.meets_diagonal:
                excluded.diagonal(self.offset).fill_(not self.diagonal)
            x.masked_fill_(excluded, value)
        elif self.meets_diagonal and not self.diagonal:
            x.diagonal(self.offset).fill_(value)
        return x


def log_sum_exps(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """
    log sum exp(scale * a @ b.T) of each row and of each column of a tile; -inf where nothing counts.

    Args:
        a: (rows, D), b: (columns, D).
        scale: scalar, float32 or float64: what the tile is computed in.
    """
    logits = _logits(a, b, scale, tile)
    # The largest float below, where all is -inf: -inf - (-inf) would be NaN.
    row_max = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    column_max = logits.amax(0).clamp_(min=torch.finfo(logits.dtype).min)
    # not torch.logsumexp, which takes ten times as long on CPUs (torch 2.15)
    rows = (logits - row_max).exp_().sum(1).log_() + row_max.squeeze(1)
    columns = logits.sub_(column_max).exp_().sum(0).log_() + column_max
    return rows, columns


def contrastive_weights(
    a: Tensor, b: Tensor, scale: Tensor, tile: Tile, row_lse: Tensor, column_lse: Tensor
) -> Tensor:
    """
    The gradient of the contrastive term with respect to a tile's logits, times 2 N: softmax of the row plus softmax of
    the column, less 2 for a true pair; (rows, columns).

    Args:
        row_lse: (rows,), column_lse: (columns,): log-sum-exps of the whole rows and columns.
    """
    logits = _logits(a, b, scale, tile)
    weights = (logits - row_lse[:, None]).exp_()
    weights += logits.sub_(column_lse).exp_()
    if tile.meets_diagonal:
        weights.diagonal(tile.offset).sub_(2)
    return weights


def uniformity_weights(
    a: Tensor, b: Tensor, a_norms: Tensor, b_norms: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """
    exp(-2 || a_i - b_j ||^2), exactly 0 where a pair doesn't count: (rows, columns), and its row and column sums.

    Args:
        a_norms: (rows,), b_norms: (columns,): squared norms, float32 or float64: what the tile is computed in.
    """
    a, b = a.to(a_norms.dtype), b.to(a_norms.dtype)
    # -2 |a - b|^2 = 4 a.b - 2 |a|^2 - 2 |b|^2
    weights = torch.addmm(b_norms, a, b.T, beta=-2, alpha=4).sub_(2 * a_norms[:, None]).exp_()
    tile.exclude_(weights, 0.0)
    return weights, weights.sum(1), weights.sum(0)


def add_product(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """total (rows, D) += weights (rows, columns) @ x (columns, D)."""
    total.addmm_(weights, x.to(weights.dtype))


def _logits(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    logits = torch.mm(a.to(scale.dtype) * scale, b.to(scale.dtype).T)
    return tile.exclude_(logits, -torch.inf)


TORCH_TILES = TileFunctions(log_sum_exps, contrastive_weights, uniformity_weights, add_product)

__all__ = ["TORCH_TILES", "Tile", "TileFunctions"]
