"""
The terms of the objective that compare all pairs of samples, without ever keeping an N x N matrix, and exactly those
of the global batch where its rows lie on several processes. (Sums over the entries of a matrix between two modalities
are in `tiled_entries_gap_closed_clip`.)

The contrastive loss and Centroid Uniformity are both log-sum-exps of an N x N matrix of products. Here the matrix is
visited tile by tile:

1. Contrastive loss, forward: the log-sum-exp of every row and of every column. Backward: every tile is computed again,
   as the softmax of its rows plus the softmax of its columns, and is multiplied with the embeddings at once.
2. Centroid Uniformity: its exponents lie in [-8, 0], so that no maximum has to be found first. One visit gives the sum
   and, up to a factor, the gradient; as the matrix is symmetric, half of its tiles are enough.
3. Several processes: each process gathers all embeddings, visits the tiles of its local rows, and gathers the
   log-sum-exps. With these it computes the whole gradient of its local rows; no gradient has to travel.

Memory, beside the embeddings and their gradients: one tile, and O(N); a copy of the rows that are compared, where some
samples lack a modality. Work, in matrix products of N^2 D: 4 for each contrastive loss and 1.5 for Centroid
Uniformity, where the dense form takes 3 and 3 and keeps several N x N matrices. Several processes compute about one
product more than one process would, rather than send its parts to each other.

Tiles are computed by torch (`tiles_gap_closed_clip`) or, on GPUs, by Triton kernels (`triton_tiles_gap_closed_clip`).
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed_gap_closed_clip import gather_row_counts, gather_rows, sum_across_processes
from .tiles_gap_closed_clip import TORCH_TILES, Tile, TileFunctions


# Rows and columns of a tile on CPUs: many enough for fast matrix products, few enough for the caches.
CPU_TILE = 1024
# On GPUs a tile has all columns, and as many rows as fit into this many bytes: few launches, large matrix products.
GPU_TILE_BYTES = 2**30


@dataclass
class GlobalBatch:
    """
    The rows of all processes, and which of them are this process's.

    Args:
        embeddings: M tensors (N, D), one for each modality, without gradient.
        group_ids: (N, G) integers or None.
        local_rows: the rows of this process.
        row_counts: how many rows each process has, in the order of the ranks.
        modality_ids: (N, M) integers or None, see `comparing`.
    """

    embeddings: list[Tensor]
    group_ids: Tensor | None
    local_rows: slice
    row_counts: list[int]
    modality_ids: Tensor | None = None

    @classmethod
    def gather(
        cls,
        embeddings: list[Tensor],
        group_ids: Tensor | None,
        across_processes: bool,
        modality_ids: Tensor | None = None,
    ) -> "GlobalBatch":
        """
        The global batch of which this process holds these rows, or a batch of these rows alone.

        Args:
            embeddings: M tensors (local rows, D).
            group_ids: (local rows,) or (local rows, G) integers, or None.
            across_processes: whether other processes hold rows of the batch too; then every process has to call this.
            modality_ids: (local rows, M) integers, or None.
        """
        num_rows, device = len(embeddings[0]), embeddings[0].device
        row_counts = gather_row_counts(num_rows, device) if across_processes else [num_rows]
        start = sum(row_counts[: dist.get_rank()]) if len(row_counts) > 1 else 0
        if group_ids is not None:
            group_ids = gather_rows(group_ids.to(device).reshape(num_rows, -1), row_counts)
        if modality_ids is not None:
            modality_ids = gather_rows(modality_ids.to(device), row_counts)
        all_embeddings = [gather_rows(z, row_counts) for z in embeddings]
        return cls(all_embeddings, group_ids, slice(start, start + num_rows), row_counts, modality_ids)

    def comparing(self, *modalities: int) -> "GlobalBatch":
        """The batch for a term that compares these modalities: equal values of one of them are of one group, too."""
        if self.modality_ids is None:
            return self
        own = self.modality_ids[:, list(modalities)]
        group_ids = own if self.group_ids is None else torch.cat([self.group_ids, own], dim=1)
        return replace(self, group_ids=group_ids, modality_ids=None)

    def select(self, embeddings: list[Tensor], samples: Tensor) -> "GlobalBatch":
        """
        The batch of some samples alone. Nothing travels between the processes: each of them knows all rows.

        Args:
            embeddings: tensors (N, D) of the rows of all processes, e.g. those of two modalities.
            samples: (N,), bool: True for those samples; the same on every process.
        """
        # One wait for the GPU, however many processes there are.
        row_counts = torch.stack([rows.sum() for rows in samples.split(self.row_counts)]).tolist()
        if row_counts != self.row_counts:
            embeddings = [z[samples] for z in embeddings]
        rank = dist.get_rank() if len(row_counts) > 1 else 0
        start = sum(row_counts[:rank])
        group_ids = None if self.group_ids is None else self.group_ids[samples]
        return GlobalBatch(embeddings, group_ids, slice(start, start + row_counts[rank]), row_counts)

    def __len__(self) -> int:
        """N, the number of rows of all processes."""
        return sum(self.row_counts)

    @property
    def num_processes(self) -> int:
        return len(self.row_counts)

    @property
    def remote_rows(self) -> list[slice]:
        """The rows of the other processes: those before and those after this process's."""
        return [slice(0, self.local_rows.start), slice(self.local_rows.stop, len(self))]

    def to_local(self, rows: slice) -> slice:
        """Some of this process's rows, counted from its first row instead of from the first of the global batch."""
        return slice(rows.start - self.local_rows.start, rows.stop - self.local_rows.start)

    def global_mean(self, local_mean: Tensor) -> Tensor:
        """The mean over the rows of all processes, from the mean over this process's rows."""
        if self.num_processes == 1:
            return local_mean
        return self.global_sum(local_mean * (self.row_counts[dist.get_rank()] / len(self)))

    def global_sum(self, share: Tensor) -> Tensor:
        """The sum of what each process adds to a loss."""
        if self.num_processes == 1:
            return share
        value = sum_across_processes(share.detach())
        # The last term is 0. Its gradient is that of this process's share, times the number of processes.
        return value + self.num_processes * (share - share.detach())


@torch.compiler.disable  # torch.compile would unroll the loop over tiles
def tiled_contrastive_loss(
    anchor: Tensor, other: Tensor, logit_scale: Tensor, batch: GlobalBatch, pair: tuple[int, int]
) -> Tensor:
    """
    `contrastive_loss` of the global batch, between two modalities.

    Args:
        anchor, other: (local rows, D), in the dtype of `logit_scale`: this process's rows of the two tensors of
            `batch.embeddings` that `pair` names. They get the gradient, times the number of processes.
        logit_scale: scalar, float32 or float64; the loss is computed in its dtype.
    """
    all_anchor, all_other = (batch.embeddings[modality] for modality in pair)
    return _Contrastive.apply(anchor, other, logit_scale, all_anchor, all_other, batch)


@torch.compiler.disable  # torch.compile would unroll the loop over tiles
def tiled_uniformity_loss(centroids: Tensor, all_centroids: Tensor, batch: GlobalBatch) -> Tensor:
    """
    `centroid_uniformity_loss` of the global batch; of one modality's embeddings in the place of the centroids, their
    uniformity.

    Args:
        centroids: (local rows, D), unit vectors or zeros, float32 or float64; the loss is computed in their dtype.
            They get the gradient, times the number of processes.
        all_centroids: (N, D), the centroids of the global batch, without gradient.
    """
    if not torch.is_grad_enabled():
        centroids = centroids.detach()  # The forward pass would otherwise compute the gradient.
    return _Uniformity.apply(centroids, all_centroids, batch)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, other, scale, all_anchor, all_other, batch):
        functions = tile_functions(all_anchor)
        row_lse = scale.new_full((len(batch),), -torch.inf)
        column_lse = row_lse.clone()
        for rows, columns in tile_ranges(all_anchor, [batch.local_rows], [slice(0, len(batch))]):
            tile = Tile(rows, columns, batch.group_ids, keep_diagonal=True)
            tile_row_lse, tile_column_lse = functions.log_sum_exps(all_anchor[rows], all_other[columns], scale, tile)
            row_lse[rows] = torch.logaddexp(row_lse[rows], tile_row_lse)
            column_lse[columns] = torch.logaddexp(column_lse[columns], tile_column_lse)
        if batch.num_processes > 1:
            row_lse = gather_rows(row_lse[batch.local_rows], batch.row_counts)
            # Each process has summed the columns over its local rows only: gather (processes, N).
            column_lse = gather_rows(column_lse[None], [1] * batch.num_processes).logsumexp(0)
        true_pairs = torch.linalg.vecdot(all_anchor.to(scale.dtype), all_other.to(scale.dtype))  # (N,), cosines
        ctx.save_for_backward(all_anchor, all_other, scale, row_lse, column_lse)
        ctx.batch = batch
        return ((row_lse + column_lse) / 2 - scale * true_pairs).mean()

    @staticmethod
    def backward(ctx, grad):
        batch, local_rows = ctx.batch, ctx.batch.local_rows
        all_anchor, all_other, scale, row_lse, column_lse = ctx.saved_tensors
        functions = tile_functions(all_anchor)
        # The gradient of the scale is made from that of the anchor.
        needs_anchor, needs_other = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        anchor_grad, other_grad = (torch.zeros_like(z[local_rows], dtype=scale.dtype) for z in (all_anchor, all_other))
        # The rows of the matrix are the anchor's and its columns the other modality's: tiles of local rows give the
        # gradient of the anchor, tiles of local columns that of the other modality.
        regions = [
            ([local_rows], [local_rows], needs_anchor, needs_other),
            ([local_rows], batch.remote_rows, needs_anchor, False),
            (batch.remote_rows, [local_rows], False, needs_other),
        ]
        with torch.autocast(all_anchor.device.type, enabled=False):
            for row_ranges, column_ranges, adds_to_anchor, adds_to_other in regions:
                if not (adds_to_anchor or adds_to_other):
                    continue
                for rows, columns in tile_ranges(all_anchor, row_ranges, column_ranges):
                    tile = Tile(rows, columns, batch.group_ids, keep_diagonal=True)
                    weights = functions.contrastive_weights(
                        all_anchor[rows], all_other[columns], scale, tile, row_lse[rows], column_lse[columns]
                    )
                    if adds_to_anchor:
                        functions.add_product(anchor_grad[batch.to_local(rows)], weights, all_other[columns])
                    if adds_to_other:
                        functions.add_product(other_grad[batch.to_local(columns)], weights.T, all_anchor[rows])
            factor = grad * batch.num_processes / (2 * len(batch))
            # The sum over all i, j of weights_ij * cosine_ij, row by row.
            scale_grad = factor * torch.linalg.vecdot(anchor_grad, all_anchor[local_rows].to(scale.dtype)).sum()
        return anchor_grad.mul_(factor * scale), other_grad.mul_(factor * scale), scale_grad, None, None, None


class _Uniformity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, centroids, all_centroids, batch):
        functions = tile_functions(all_centroids)
        squared_norms = all_centroids.to(centroids.dtype).square().sum(-1)  # (N,)
        gradient = torch.zeros_like(centroids) if ctx.needs_input_grad[0] else None
        row_sums = centroids.new_zeros(len(centroids))
        num_pairs = torch.zeros((), dtype=torch.int64, device=centroids.device)
        for rows, columns, counts_twice in _uniformity_tiles(all_centroids, batch):
            tile = Tile(rows, columns, batch.group_ids, keep_diagonal=False)
            weights, tile_row_sums, tile_column_sums = functions.uniformity_weights(
                all_centroids[rows], all_centroids[columns], squared_norms[rows], squared_norms[columns], tile
            )
            # Reading a tile again to count takes a GPU longer than computing it.
            counted = _num_off_diagonal(rows, columns) if batch.group_ids is None else weights.count_nonzero()
            num_pairs += (1 + counts_twice) * counted
            row_sums[batch.to_local(rows)] += tile_row_sums
            if counts_twice:
                row_sums[batch.to_local(columns)] += tile_column_sums
            if gradient is not None:
                functions.add_product(gradient[batch.to_local(rows)], weights, all_centroids[columns])
                if counts_twice:
                    functions.add_product(gradient[batch.to_local(columns)], weights.T, all_centroids[rows])
        totals = torch.stack([row_sums.sum(dtype=torch.float64), num_pairs.double()])
        if batch.num_processes > 1:
            totals = sum_across_processes(totals)
        weight_sum, num_pairs = totals.masked_fill(totals[1] == 0, 1.0)  # without any pair the loss is log(1 / 1) = 0
        if gradient is not None:
            # d/d mu_i of log sum_ij w_ij = 8 (sum_j w_ij mu_j - mu_i sum_j w_ij) / sum_ij w_ij
            gradient.addcmul_(row_sums[:, None], centroids, value=-1)
            ctx.save_for_backward(gradient.mul_((8 * batch.num_processes / weight_sum).to(gradient.dtype)))
        return (weight_sum / num_pairs).log().to(centroids.dtype)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def tile_functions(x: Tensor) -> TileFunctions:
    """What computes the tiles of x: Triton kernels on NVIDIA and AMD GPUs, torch on other devices and in float64."""
    if x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from .triton_tiles_gap_closed_clip import TRITON_TILES

        return TRITON_TILES
    return TORCH_TILES


def _uniformity_tiles(x: Tensor, batch: GlobalBatch) -> Iterator[tuple[slice, slice, bool]]:
    """
    Tiles from which the local rows of the symmetric N x N matrix of x (N, D) are known: rows, columns, and whether the
    tile counts twice, for itself and for its mirror image, which is in local rows too and is not visited.
    """
    max_rows, _ = _tile_shape(x)
    for rows in _split([batch.local_rows], max_rows):
        yield rows, rows, False
        for _, columns in tile_ranges(x, [rows], [slice(rows.stop, batch.local_rows.stop)]):
            yield rows, columns, True
        for _, columns in tile_ranges(x, [rows], batch.remote_rows):
            yield rows, columns, False


def _num_off_diagonal(rows: slice, columns: slice) -> int:
    """How many entries of a tile are not on the diagonal of the N x N matrix."""
    on_diagonal = max(min(rows.stop, columns.stop) - max(rows.start, columns.start), 0)
    return (rows.stop - rows.start) * (columns.stop - columns.start) - on_diagonal


def tile_ranges(x: Tensor, row_ranges: list[slice], column_ranges: list[slice]) -> Iterator[tuple[slice, slice]]:
    """The rows and columns of the tiles that cover these ranges of the N x N matrix of x (N, D)."""
    max_rows, max_columns = _tile_shape(x)
    for rows in _split(row_ranges, max_rows):
        for columns in _split(column_ranges, max_columns):
            yield rows, columns


def _tile_shape(x: Tensor) -> tuple[int, int]:
    """How many rows and columns a tile of the N x N matrix of x (N, D) may have."""
    if x.is_cuda:
        return max(GPU_TILE_BYTES // (len(x) * x.element_size()), 128), len(x)
    return CPU_TILE, CPU_TILE


def _split(ranges: list[slice], size: int) -> Iterator[slice]:
    """The ranges, cut into pieces of at most `size`; empty ranges give none."""
    for whole in ranges:
        for start in range(whole.start, whole.stop, size):
            yield slice(start, min(start + size, whole.stop))


__all__ = ["GlobalBatch", "tile_functions", "tile_ranges", "tiled_contrastive_loss", "tiled_uniformity_loss"]
