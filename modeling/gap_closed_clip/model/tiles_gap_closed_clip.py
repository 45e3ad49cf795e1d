"""
Tiles of the objective's N x N matrices, computed by torch. This is the reference for, and the alternative to, the GPU
kernels of `triton_tiles_gap_closed_clip`, which has the same functions.

A tile is a block of rows and columns of the matrix that compares the rows of one tensor (N, D) with those of another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TileFunctions(NamedTuple):
    """The computations on tiles, as one implementation has them; see the functions of the same names below."""

    log_sum_exps: Callable
    contrastive_weights: Callable
    uniformity_weights: Callable
    add_product: Callable


@dataclass
class Tile:
    """
    The position of a tile in its N x N matrix, and which of its entries count.

    Args:
        rows, columns: slices of 0 .. N, with start and stop.
        group_ids: integers (N, G): an entry (i, j) does not count where samples i and j agree in any column. None:
            all entries count.
        keep_diagonal: whether the entries (i, i), the true pairs, count; this holds whatever the groups are.
    """

    rows: slice
    columns: slice
    group_ids: Tensor | None
    keep_diagonal: bool

    @property
    def diagonal_offset(self) -> int:
        """Which diagonal of the tile is the matrix's main diagonal, as the `offset` of `Tensor.diagonal`."""
        return self.rows.start - self.columns.start

    @property
    def meets_diagonal(self) -> bool:
        """Whether any entry of the tile is on the matrix's main diagonal."""
        return self.rows.start < self.columns.stop and self.columns.start < self.rows.stop

    def fill_excluded_(self, x: Tensor, value: float) -> Tensor:
        """Sets the entries of x (rows, columns) that do not count to `value`, in place."""
        if self.group_ids is not None:
            ids = self.group_ids
            excluded = ids[self.rows, None, 0] == ids[self.columns, 0]
            for column in range(1, ids.shape[1]):
                excluded |= ids[self.rows, None, column] == ids[self.columns, column]
            if self.meets_diagonal:
                excluded.diagonal(self.diagonal_offset).fill_(not self.keep_diagonal)
            x.masked_fill_(excluded, value)
        elif self.meets_diagonal and not self.keep_diagonal:
            x.diagonal(self.diagonal_offset).fill_(value)
        return x


def log_sum_exps(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """
    log sum exp(scale * a @ b.T) of each row and of each column of a tile: (rows,) and (columns,); -inf where no entry
    counts.

    Args:
        a: (rows, D), b: (columns, D).
        scale: scalar, float32 or float64; the tile is computed in its dtype.
    """
    logits = _logits(a, b, scale, tile)
    # The clamp is for rows and columns in which no entry counts: -inf - (-inf) would be NaN.
    row_max = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    column_max = logits.amax(0).clamp_(min=torch.finfo(logits.dtype).min)
    # Not torch.logsumexp, which takes ten times as long on CPUs (torch 2.15).
    row_lse = (logits - row_max).exp_().sum(1).log_() + row_max.squeeze(1)
    column_lse = logits.sub_(column_max).exp_().sum(0).log_() + column_max
    return row_lse, column_lse


def contrastive_weights(
    a: Tensor, b: Tensor, scale: Tensor, tile: Tile, row_lse: Tensor, column_lse: Tensor
) -> Tensor:
    """
    2 N times the gradient of the contrastive loss with respect to a tile's logits, (rows, columns): the softmax of the
    row plus the softmax of the column, minus 2 for a true pair.

    Args:
        a, b, scale: as in [`log_sum_exps`].
        row_lse: (rows,), column_lse: (columns,): log-sum-exps of whole rows and columns of the N x N matrix.
    """
    logits = _logits(a, b, scale, tile)
    weights = (logits - row_lse[:, None]).exp_()
    weights += logits.sub_(column_lse).exp_()
    if tile.meets_diagonal:
        weights.diagonal(tile.diagonal_offset).sub_(2)
    return weights


def uniformity_weights(
    a: Tensor, b: Tensor, a_squared_norms: Tensor, b_squared_norms: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """
    exp(-2 || a_i - b_j ||^2), exactly 0 for a pair that does not count: (rows, columns), with the sums of its rows and
    of its columns.

    Args:
        a: (rows, D), b: (columns, D).
        a_squared_norms: (rows,), b_squared_norms: (columns,), float32 or float64; the tile is computed in their dtype.
    """
    a, b = a.to(a_squared_norms.dtype), b.to(a_squared_norms.dtype)
    # -2 |a - b|^2 = 4 a.b - 2 |a|^2 - 2 |b|^2
    weights = torch.addmm(b_squared_norms, a, b.T, beta=-2, alpha=4).sub_(2 * a_squared_norms[:, None]).exp_()
    tile.fill_excluded_(weights, 0.0)
    return weights, weights.sum(1), weights.sum(0)


def add_product(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """total (rows, D) += weights (rows, columns) @ x (columns, D), in place."""
    total.addmm_(weights, x.to(weights.dtype))


def _logits(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """scale * a @ b.T, (rows, columns); -inf for entries that do not count."""
    logits = torch.mm(a.to(scale.dtype) * scale, b.to(scale.dtype).T)
    return tile.fill_excluded_(logits, -torch.inf)


TORCH_TILES = TileFunctions(log_sum_exps, contrastive_weights, uniformity_weights, add_product)

__all__ = ["TORCH_TILES", "Tile", "TileFunctions"]
