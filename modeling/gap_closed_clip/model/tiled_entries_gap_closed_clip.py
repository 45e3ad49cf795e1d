"""
The terms of the objective that are sums over the entries of an N x N matrix between two modalities, without ever
keeping it: cross-modal uniformity and SigLIP's sigmoid loss. As in `tiled_gap_closed_clip` they are those of the
global batch.

What an entry adds to the gradient depends on no other entry, but for a factor that all have in common: one visit of
the tiles gives the sum and the gradient. Each process visits the tiles of its local rows, whose sum is its share of
the loss, and those of its local columns, which complete the gradient of the other modality. Only the shares travel.

Memory, beside the embeddings and their gradients: a few tiles, and O(N). Work: 3 matrix products of N^2 D.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed_gap_closed_clip import sum_across_processes
from .tiled_gap_closed_clip import GlobalBatch, tile_functions, tile_ranges
from .tiles_gap_closed_clip import Tile


# What a tile has: the sum and the number of its entries (2,), float64; the weights (rows, columns) that the gradient
# is made of, and the sums of their rows and of their columns.
Entries = Callable[[Tile], tuple[Tensor, Tensor, Tensor, Tensor]]


@torch.compiler.disable  # torch.compile would unroll the loop over tiles
def tiled_cross_uniformity_loss(x: Tensor, y: Tensor, batch: GlobalBatch, pair: tuple[int, int]) -> Tensor:
    """
    `pairwise_uniformity_loss` of the global batch, between two modalities.

    Args:
        x, y: (local rows, D), float32 or float64, in which the loss is computed: this process's rows of the two
            tensors of `batch.embeddings` that `pair` names. They get the gradient, times the number of processes.
    """
    if not torch.is_grad_enabled():
        x, y = x.detach(), y.detach()  # The forward pass would otherwise compute the gradient.
    return _CrossUniformity.apply(x, y, *(batch.embeddings[modality] for modality in pair), batch)


@torch.compiler.disable
def tiled_sigmoid_loss(
    anchor: Tensor, other: Tensor, logit_scale: Tensor, logit_bias: Tensor, batch: GlobalBatch, pair: tuple[int, int]
) -> Tensor:
    """
    `sigmoid_loss` of the global batch, between two modalities. Its tiles are torch's, also on GPUs.

    Args:
        anchor, other: as x and y of [`tiled_cross_uniformity_loss`], in the dtype of `logit_scale`.
        logit_scale, logit_bias: scalars, float32 or float64; the loss is computed in their dtype.
    """
    inputs: tuple[Tensor, ...] = (anchor, other, logit_scale, logit_bias)
    if not torch.is_grad_enabled():
        inputs = tuple(x.detach() for x in inputs)
    return _Sigmoid.apply(*inputs, *(batch.embeddings[modality] for modality in pair), batch)


class _CrossUniformity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, all_x, all_y, batch):
        functions = tile_functions(all_x)
        x_norms, y_norms = (z.to(x.dtype).square().sum(-1) for z in (all_x, all_y))  # (N,)

        def entries(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            rows, columns = tile.rows, tile.columns
            weights, row_sums, column_sums = functions.uniformity_weights(
                all_x[rows], all_y[columns], x_norms[rows], y_norms[columns], tile
            )
            total = row_sums.sum(dtype=torch.float64)
            # Without groups the number of pairs is known, and to read the tile again would take a GPU long.
            count = total.new_zeros(()) if batch.group_ids is None else weights.count_nonzero().double()
            return torch.stack([total, count]), weights, row_sums, column_sums

        sums = _visit((x, y), (all_x, all_y), batch, entries, ctx.needs_input_grad[:2], keep_diagonal=False)
        weight_sum, num_pairs = sums.totals
        if batch.group_ids is None:
            num_pairs = torch.full_like(num_pairs, len(batch) * (len(batch) - 1))
        has_pairs = num_pairs > 0  # else the loss is log(1 / 1) = 0
        weight_sum, num_pairs = (value.where(has_pairs, 1.0) for value in (weight_sum, num_pairs))
        # d/d x_i of log sum_ij w_ij = 4 (sum_j w_ij y_j - x_i sum_j w_ij) / sum_ij w_ij, and likewise for y_j
        factor = (4 * batch.num_processes / weight_sum).to(x.dtype)
        ctx.save_for_backward(
            sums.row_products.addcmul_(sums.row_sums[:, None], x.detach(), value=-1).mul_(factor),
            sums.column_products.addcmul_(sums.column_sums[:, None], y.detach(), value=-1).mul_(factor),
        )
        return (weight_sum / num_pairs).log().to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x_grad, y_grad = ctx.saved_tensors
        return grad * x_grad, grad * y_grad, None, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, other, scale, bias, all_anchor, all_other, batch):
        def entries(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            a, b = all_anchor[tile.rows].to(scale.dtype), all_other[tile.columns].to(scale.dtype)
            logits = tile.fill_excluded_(torch.addmm(bias, a * scale, b.T), -torch.inf)
            _negate_diagonal_(logits, tile)  # The loss of an entry is now log(1 + exp(logit)), also of a true pair.
            total = -F.logsigmoid(-logits).sum(dtype=torch.float64)
            weights = logits.sigmoid_()
            _negate_diagonal_(weights, tile)
            return torch.stack([total, total.new_zeros(())]), weights, weights.sum(1), weights.sum(0)

        # The gradient of the scale is made from that of the anchor.
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        sums = _visit((anchor, other), (all_anchor, all_other), batch, entries, needed, keep_diagonal=True)
        factor = batch.num_processes / len(batch)
        # The sum over all i, j of weights_ij * cosine_ij, row by row.
        scale_grad = factor * torch.linalg.vecdot(sums.row_products, anchor.detach()).sum()
        bias_grad = factor * sums.row_sums.sum()
        anchor_grad, other_grad = (x.mul_(factor * scale) for x in (sums.row_products, sums.column_products))
        ctx.save_for_backward(anchor_grad, other_grad, scale_grad, bias_grad)
        return (sums.totals[0] / len(batch)).to(scale.dtype)

    @staticmethod
    def backward(ctx, grad):
        return *(grad * x for x in ctx.saved_tensors), None, None, None


class _Sums(NamedTuple):
    """
    Sums over the entries of an N x N matrix between x and y.

    Args:
        totals: (2,), float64: the sum and the number of the entries of the whole matrix.
        row_sums, column_sums: (local rows,): of the weights of this process's rows, and of its columns.
        row_products, column_products: (local rows, D): weights @ y and weights.T @ x; zeros where not needed.
    """

    totals: Tensor
    row_sums: Tensor
    column_sums: Tensor
    row_products: Tensor
    column_products: Tensor


def _visit(
    local: tuple[Tensor, Tensor],
    everything: tuple[Tensor, Tensor],
    batch: GlobalBatch,
    entries: Entries,
    needed: tuple[bool, bool],
    keep_diagonal: bool,
) -> _Sums:
    """
    Visits the tiles that have a part in this process's sums.

    Args:
        local: x and y, (local rows, D), in the dtype of the sums.
        everything: the same of all processes, (N, D).
        entries: what a tile has.
        needed: whether there is to be a gradient of x, and one of y.
        keep_diagonal: whether the true pairs count.
    """
    (all_x, all_y), (needs_x, needs_y) = everything, needed
    add_product = tile_functions(all_x).add_product
    row_sums, column_sums = (z.new_zeros(len(z)) for z in local)
    row_products, column_products = map(torch.zeros_like, local)
    totals = row_sums.new_zeros(2, dtype=torch.float64)
    # Ranges of rows and of columns, and whether their sums are of this process's rows, and of its columns.
    regions = [
        ([batch.local_rows], [batch.local_rows], True, True),
        ([batch.local_rows], batch.remote_rows, True, False),
    ]
    if needs_y:
        regions.append((batch.remote_rows, [batch.local_rows], False, True))
    for row_ranges, column_ranges, of_rows, of_columns in regions:
        for rows, columns in tile_ranges(all_x, row_ranges, column_ranges):
            tile_totals, weights, *sums = entries(Tile(rows, columns, batch.group_ids, keep_diagonal))
            if of_rows:
                totals += tile_totals
                row_sums[batch.to_local(rows)] += sums[0]
                if needs_x:
                    add_product(row_products[batch.to_local(rows)], weights, all_y[columns])
            if of_columns and needs_y:
                column_sums[batch.to_local(columns)] += sums[1]
                add_product(column_products[batch.to_local(columns)], weights.T, all_x[rows])
    if batch.num_processes > 1:
        totals = sum_across_processes(totals)
    return _Sums(totals, row_sums, column_sums, row_products, column_products)


def _negate_diagonal_(x: Tensor, tile: Tile) -> None:
    """Changes the sign of those entries of a tile (rows, columns) that are true pairs."""
    if tile.meets_diagonal:
        x.diagonal(tile.diagonal_offset).neg_()


__all__ = ["tiled_cross_uniformity_loss", "tiled_sigmoid_loss"]
