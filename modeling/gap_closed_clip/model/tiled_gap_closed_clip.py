"""
The objective's two terms of all pairs without an N x N matrix, and exact across processes.

With unit vectors, the contrastive term and Centroid Uniformity are both log-sum-exps of a matrix of cosines, which is
visited in tiles and never kept:

1. Contrastive, forward: the log-sum-exp of every row and of every column. Backward: every tile again, as the softmax
   of its rows plus that of its columns, multiplied with the embeddings at once.
2. Uniformity: its exponents lie in [-8, 0] and need no maximum, so one visit gives the sum and, up to a factor, the
   gradient; the matrix is symmetric, so half of the tiles do.
3. Several processes: each gathers all embeddings, visits the tiles of its own rows, and gathers the log-sum-exps. Then
   it can compute the whole gradient of its own rows, and no gradient travels.

Memory beside the embeddings and their gradients: one tile, and O(N). Work in matrix products of N^2 D: 4 (contrastive,
each pair of modalities) and 1.5 (uniformity), where the dense form has 3 and 3 and keeps several N x N matrices. With
more processes a product or so is added, as what they could share would have to travel.

Tiles are computed by torch (`tiles_gap_closed_clip`), on GPUs by Triton kernels (`triton_tiles_gap_closed_clip`).
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed_gap_closed_clip import gather_rows, rows_of_processes, sum_across_processes
from .tiles_gap_closed_clip import TORCH_TILES, Tile, TileFunctions


# Rows and columns of a tile on CPUs: long enough for fast matrix products, small enough for the caches.
CPU_TILE = 1024
# On GPUs a tile takes all columns and as many rows as fit into this many bytes: few launches, long matrix products.
GPU_TILE_BYTES = 2**30


@dataclass
class GlobalBatch:
    """
    The rows of all processes, and which of them are this process' own.

    Args:
        embeddings: M tensors (N, D), without gradient.
        group_ids: (N, G) integers or None.
        own: the rows of this process.
        counts: how many rows each process has.
    """

    embeddings: list[Tensor]
    group_ids: Tensor | None
    own: slice
    counts: list[int]

    @classmethod
    def gather(cls, embeddings: list[Tensor], group_ids: Tensor | None, across_processes: bool) -> "GlobalBatch":
        """Of this process' rows alone, or with those of all processes; group_ids: (own rows,) or (own rows, G)."""
        num_rows, device = len(embeddings[0]), embeddings[0].device
        counts = rows_of_processes(num_rows, device) if across_processes else [num_rows]
        start = sum(counts[: dist.get_rank()]) if len(counts) > 1 else 0
        if group_ids is not None:
            group_ids = gather_rows(group_ids.to(device).reshape(num_rows, -1), counts)
        own = slice(start, start + num_rows)
        return cls([gather_rows(z, counts) for z in embeddings], group_ids, own, counts)

    def __len__(self) -> int:
        return sum(self.counts)

    def mean_over_rows(self, own_mean: Tensor) -> Tensor:
        """The mean over all rows of what has this mean over the own ones; with the gradient's scale."""
        if len(self.counts) == 1:
            return own_mean
        share = own_mean * (self.counts[dist.get_rank()] / len(self))
        value = sum_across_processes(share.detach())
        # The value of the whole; the gradient is that of the own share, times the number of processes.
        return value + len(self.counts) * (share - share.detach())

    def others(self) -> list[slice]:
        """The rows of the other processes."""
        return [slice(0, self.own.start), slice(self.own.stop, len(self))]

    def within_own(self, rows: slice) -> slice:
        """Rows of the global batch, counted within this process' own."""
        return slice(rows.start - self.own.start, rows.stop - self.own.start)


@torch.compiler.disable  # the loop over tiles would be unrolled
def tiled_contrastive_loss(
    anchor: Tensor, other: Tensor, logit_scale: Tensor, batch: GlobalBatch, modality: int
) -> Tensor:
    """
    `contrastive_loss` of the global batch, between its anchor and one more modality.

    Args:
        anchor, other: (own rows, D), this process' rows of `batch.embeddings` 0 and `modality`, in the type of
            `logit_scale`; they get the gradient, times the number of processes.
        logit_scale: scalar, float32 or float64: what the loss is computed in.
    """
    return _Contrastive.apply(anchor, other, logit_scale, batch.embeddings[0], batch.embeddings[modality], batch)


@torch.compiler.disable  # the loop over tiles would be unrolled
def tiled_uniformity_loss(centroids: Tensor, all_centroids: Tensor, batch: GlobalBatch) -> Tensor:
    """
    `centroid_uniformity_loss` of the global batch.

    Args:
        centroids: (own rows, D), unit vectors or zeros, float32 or float64: what the loss is computed in. They get the
            gradient, times the number of processes.
        all_centroids: (N, D), those of the global batch.
    """
    if not torch.is_grad_enabled():
        centroids = centroids.detach()  # there won't be a backward pass to prepare
    return _Uniformity.apply(centroids, all_centroids, batch)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, other, scale, all_anchor, all_other, batch):
        functions = tile_functions(all_anchor)
        row_lse = scale.new_full((len(batch),), -torch.inf)
        column_lse = row_lse.clone()
        for rows, columns in _grid(all_anchor, [batch.own], [slice(0, len(batch))]):
            tile = Tile(rows, columns, batch.group_ids, diagonal=True)
            of_rows, of_columns = functions.log_sum_exps(all_anchor[rows], all_other[columns], scale, tile)
            row_lse[rows] = torch.logaddexp(row_lse[rows], of_rows)
            column_lse[columns] = torch.logaddexp(column_lse[columns], of_columns)
        if len(batch.counts) > 1:
            row_lse = gather_rows(row_lse[batch.own], batch.counts)
            # (processes, N): the columns' sums over the rows of each process
            column_lse = gather_rows(column_lse[None], [1] * len(batch.counts)).logsumexp(0)
        true_pairs = torch.linalg.vecdot(all_anchor.to(scale.dtype), all_other.to(scale.dtype))  # (N,)
        ctx.save_for_backward(all_anchor, all_other, scale, row_lse, column_lse)
        ctx.batch = batch
        return ((row_lse + column_lse) / 2 - scale * true_pairs).mean()

    @staticmethod
    def backward(ctx, grad):
        batch, own = ctx.batch, ctx.batch.own
        all_anchor, all_other, scale, row_lse, column_lse = ctx.saved_tensors
        functions = tile_functions(all_anchor)
        for_anchor, for_other = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        of_anchor, of_other = (torch.zeros_like(z[own], dtype=scale.dtype) for z in (all_anchor, all_other))

        def visit(rows: slice, columns: slice, add_to_anchor: bool, add_to_other: bool) -> None:
            tile, lses = Tile(rows, columns, batch.group_ids, diagonal=True), (row_lse[rows], column_lse[columns])
            weights = functions.contrastive_weights(all_anchor[rows], all_other[columns], scale, tile, *lses)
            if add_to_anchor:
                functions.add_product(of_anchor[batch.within_own(rows)], weights, all_other[columns])
            if add_to_other:
                functions.add_product(of_other[batch.within_own(columns)], weights.T, all_anchor[rows])

        with torch.autocast(all_anchor.device.type, enabled=False):
            for rows, columns in _grid(all_anchor, [own], [own]):
                visit(rows, columns, for_anchor, for_other)
            for rows, columns in _grid(all_anchor, [own] if for_anchor else [], batch.others()):
                visit(rows, columns, True, False)
            for rows, columns in _grid(all_anchor, batch.others() if for_other else [], [own]):
                visit(rows, columns, False, True)
            factor = grad * len(batch.counts) / (2 * len(batch))
            # sum over i, j of weights_ij * cosine_ij, row by row
            of_scale = factor * torch.linalg.vecdot(of_anchor, all_anchor[own].to(scale.dtype)).sum()
        return of_anchor.mul_(factor * scale), of_other.mul_(factor * scale), of_scale, None, None, None


class _Uniformity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, centroids, all_centroids, batch):
        functions, own = tile_functions(all_centroids), batch.own
        norms = all_centroids.to(centroids.dtype).square().sum(-1)  # (N,), squared
        gradient = torch.zeros_like(centroids) if ctx.needs_input_grad[0] else None
        row_sums = centroids.new_zeros(len(centroids))
        num_pairs = torch.zeros((), dtype=torch.int64, device=centroids.device)

        def visit(rows: slice, columns: slice, mirrored: bool) -> None:
            tile = Tile(rows, columns, batch.group_ids, diagonal=False)
            weights, of_rows, of_columns = functions.uniformity_weights(
                all_centroids[rows], all_centroids[columns], norms[rows], norms[columns], tile
            )
            num_pairs.add_(weights.count_nonzero(), alpha=1 + mirrored)
            row_sums[batch.within_own(rows)] += of_rows
            if mirrored:
                row_sums[batch.within_own(columns)] += of_columns
            if gradient is not None:
                functions.add_product(gradient[batch.within_own(rows)], weights, all_centroids[columns])
                if mirrored:
                    functions.add_product(gradient[batch.within_own(columns)], weights.T, all_centroids[rows])

        for rows in _blocks(_tile_shape(all_centroids)[0], [own]):
            visit(rows, rows, mirrored=False)
            for _, columns in _grid(all_centroids, [rows], [slice(rows.stop, own.stop)]):
                visit(rows, columns, mirrored=True)
            for _, columns in _grid(all_centroids, [rows], batch.others()):
                visit(rows, columns, mirrored=False)
        total = torch.stack([row_sums.sum(dtype=torch.float64), num_pairs.double()])
        if len(batch.counts) > 1:
            total = sum_across_processes(total)
        weight_sum, num_pairs = total.masked_fill(total[1] == 0, 1.0)
        if gradient is not None:
            # d/d mu_i of log sum_ij w_ij = 8 (sum_j w_ij mu_j - mu_i sum_j w_ij) / sum_ij w_ij
            gradient.addcmul_(row_sums[:, None], centroids, value=-1)
            ctx.save_for_backward(gradient.mul_((8 * len(batch.counts) / weight_sum).to(gradient.dtype)))
        return (weight_sum / num_pairs).log().to(centroids.dtype)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def tile_functions(x: Tensor) -> TileFunctions:
    """What computes the tiles of x: Triton's kernels on NVIDIA and AMD GPUs, torch elsewhere and in float64."""
    if x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from .triton_tiles_gap_closed_clip import TRITON_TILES

        return TRITON_TILES
    return TORCH_TILES


def _tile_shape(x: Tensor) -> tuple[int, int]:
    """Most rows and columns of a tile of the N x N matrix of x (N, D)."""
    if x.is_cuda:
        return max(GPU_TILE_BYTES // (len(x) * x.element_size()), 128), len(x)
    return CPU_TILE, CPU_TILE


def _blocks(size: int, ranges: list[slice]) -> Iterator[slice]:
    """The ranges in parts of at most `size`."""
    for whole in ranges:
        for start in range(whole.start, whole.stop, size):
            yield slice(start, min(start + size, whole.stop))


def _grid(x: Tensor, row_ranges: list[slice], column_ranges: list[slice]) -> Iterator[tuple[slice, slice]]:
    """The tiles of those rows and columns of the N x N matrix of x (N, D)."""
    max_rows, max_columns = _tile_shape(x)
    for rows in _blocks(max_rows, row_ranges):
        for columns in _blocks(max_columns, column_ranges):
            yield rows, columns


__all__ = ["GlobalBatch", "tiled_contrastive_loss", "tiled_uniformity_loss", "tile_functions"]
