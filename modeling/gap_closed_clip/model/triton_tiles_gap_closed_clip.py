"""
Tiles of the objective's N x N matrices on GPUs: the functions of `tiles_gap_closed_clip` as Triton kernels.

A program multiplies one block of the tile and finishes it in registers: the weights go to memory, or the block's share
of the log-sum-exps, never the cosines. Blocks add up through partial results that torch reduces and not through
atomics, so the result is the same on every run. Operands of 16 bit are multiplied as they are; sums and all that
follows are float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles_gap_closed_clip import Tile, TileFunctions


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The tiled objective's GPU kernels need the package triton.") from error


# GPUs take powers and logarithms of base 2.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Blocks(NamedTuple):
    """
    How a tile is cut into programs, and what these are compiled for.

    Args:
        rows, columns: of the block that a program computes.
        depth: how much of D is multiplied at a time.
        group: so many blocks of rows go through the columns side by side, to find them in the L2 cache.
        precision: of products of float32, as Triton calls it.
        warps, stages: Triton's num_warps and num_stages.
    """

    rows: int
    columns: int
    depth: int
    group: int
    precision: str
    warps: int
    stages: int


# Fixed, not autotuned: tuning would run again for every new N. Three stages take 96 kB of shared memory, which leaves
# room for two programs on a multiprocessor of an H100: one multiplies while the other takes exponentials. (Compiled
# for it, not yet timed on one.)
BLOCKS_16_BIT = Blocks(128, 128, 64, group=8, precision="ieee", warps=8, stages=3)
BLOCKS_TF32 = Blocks(128, 128, 32, group=8, precision="tf32", warps=8, stages=3)
BLOCKS_FLOAT32 = Blocks(64, 64, 16, group=8, precision="ieee", warps=4, stages=3)  # no tensor cores


def log_sum_exps(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """
    log sum exp(scale * a @ b.T) of each row and of each column of a tile, float32; -inf where nothing counts.

    Args:
        a: (rows, D), b: (columns, D), float32 or 16 bit.
        scale: scalar, float32, on the same device.
    """
    a, b, blocks = _prepare(a, b)
    of_rows, of_columns = _partial_results(a, b, blocks)
    _launch(_log_sum_exps_kernel, a, b, tile, blocks, scale, of_rows, of_columns)
    return of_rows.logsumexp(0), of_columns.logsumexp(0)


def contrastive_weights(
    a: Tensor, b: Tensor, scale: Tensor, tile: Tile, row_lse: Tensor, column_lse: Tensor
) -> Tensor:
    """
    Softmax of the row plus softmax of the column, less 2 for a true pair: (rows, columns) in a's dtype.

    Args:
        row_lse: (rows,), column_lse: (columns,), float32: log-sum-exps of the whole rows and columns.
    """
    weights = a.new_empty(len(a), len(b))
    a, b, blocks = _prepare(a, b)
    _launch(_contrastive_kernel, a, b, tile, blocks, scale, row_lse.contiguous(), column_lse.contiguous(), weights)
    return weights


def uniformity_weights(
    a: Tensor, b: Tensor, a_norms: Tensor, b_norms: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """
    exp(-2 || a_i - b_j ||^2), exactly 0 where a pair doesn't count: (rows, columns) in a's dtype, and its row and
    column sums in float32, from before rounding.

    Args:
        a_norms: (rows,), b_norms: (columns,), float32: squared norms.
    """
    weights = a.new_empty(len(a), len(b))
    a, b, blocks = _prepare(a, b)
    of_rows, of_columns = _partial_results(a, b, blocks)
    norms = a_norms.contiguous(), b_norms.contiguous()
    _launch(_uniformity_kernel, a, b, tile, blocks, *norms, weights, of_rows, of_columns)
    return weights, of_rows.sum(0), of_columns.sum(0)


def add_product(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """total (rows, D), float32, += weights (rows, columns) @ x (columns, D); sums in float32."""
    if weights.dtype == torch.float32 or not total.is_cuda or torch.version.hip is not None:
        total.addmm_(weights.float(), x.float())
    else:
        # Not total += mm(...): with long columns that takes more memory, and more time than the product.
        torch.addmm(total, weights, x.to(weights.dtype), out_dtype=torch.float32, out=total)


def blocks_for(a: Tensor) -> Blocks:
    """How tiles with operands like a are cut."""
    # Triton no longer knows the tensor cores of before Ampere, and most AMD GPUs have no TF32.
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 0):
        return BLOCKS_FLOAT32
    if a.element_size() == 2:
        return BLOCKS_16_BIT
    # The setting of cuBLAS, so of `add_product`: "medium" of torch.set_float32_matmul_precision is TF32 there too.
    # torch.get_float32_matmul_precision raises where the newer torch.backends.fp32_precision is set, as transformers
    # does.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return BLOCKS_TF32 if tf32 else BLOCKS_FLOAT32


def _prepare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Blocks]:
    """Operands as the kernels take them: of one dtype, row after row."""
    # Triton's interpreter, for tests without a GPU, has no products of bfloat16.
    if a.dtype != b.dtype or not a.is_cuda:
        a, b = a.float(), b.float()
    return a.contiguous(), b.contiguous(), blocks_for(a)


def _partial_results(a: Tensor, b: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Room for one number per row and block of columns, (blocks, rows), and the same for columns; uninitialised."""
    of_rows = a.new_empty(triton.cdiv(len(b), blocks.columns), len(a), dtype=torch.float32)
    of_columns = a.new_empty(triton.cdiv(len(a), blocks.rows), len(b), dtype=torch.float32)
    return of_rows, of_columns


def _launch(kernel, a: Tensor, b: Tensor, tile: Tile, blocks: Blocks, *of_kernel: Tensor) -> None:
    """Runs a kernel on every block of a tile; `of_kernel`: what this kernel alone takes."""
    row_ids = column_ids = None
    if tile.group_ids is not None:
        group_ids = tile.group_ids.contiguous()
        row_ids, column_ids = group_ids[tile.rows], group_ids[tile.columns]
    programs = triton.cdiv(len(a), blocks.rows) * triton.cdiv(len(b), blocks.columns)
    with torch.cuda.device_of(a):  # Triton launches on the current device
        kernel[(programs,)](
            a, b, row_ids, column_ids, *of_kernel, len(a), len(b), tile.offset,
            DIM=a.shape[1], GROUPS=0 if row_ids is None else row_ids.shape[1], DIAGONAL=tile.diagonal,
            BLOCK_ROWS=blocks.rows, BLOCK_COLUMNS=blocks.columns, DEPTH=blocks.depth, GROUP=blocks.group,
            PRECISION=blocks.precision, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip


# The number of rows and the offset vary from tile to tile: not compiled for values that divide by 16.
_jit_for_any_tile = triton.jit(do_not_specialize=["num_rows", "offset"])


@_jit_for_any_tile
def _log_sum_exps_kernel(
    a,
    b,
    row_ids,
    column_ids,
    scale,
    of_rows,
    of_columns,
    num_rows,
    num_columns,
    offset,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """of_rows (blocks of columns, rows), of_columns (blocks of rows, columns): the log-sum-exps of this block."""
    row_block, column_block = _own_block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    logits = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION) * (tl.load(scale) * LOG2_E)
    logits += tl.where(rows < num_rows, 0.0, -float("inf"))[:, None]
    logits += tl.where(columns < num_columns, 0.0, -float("inf"))[None, :]
    logits = _exclude(
        logits, -float("inf"), row_ids, column_ids, rows, columns, num_rows, num_columns, offset, GROUPS, DIAGONAL
    )
    _store_partial(of_rows, _log_sum_exp2(logits, 1), column_block, rows, num_rows)
    _store_partial(of_columns, _log_sum_exp2(logits, 0), row_block, columns, num_columns)


@_jit_for_any_tile
def _contrastive_kernel(
    a,
    b,
    row_ids,
    column_ids,
    scale,
    row_lse,
    column_lse,
    weights,
    num_rows,
    num_columns,
    offset,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """weights (rows, columns), see `contrastive_weights`."""
    row_block, column_block = _own_block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    logits = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION) * (tl.load(scale) * LOG2_E)
    of_rows = tl.load(row_lse + rows, mask=rows < num_rows, other=0.0) * LOG2_E
    of_columns = tl.load(column_lse + columns, mask=columns < num_columns, other=0.0) * LOG2_E
    values = tl.exp2(logits - of_rows[:, None]) + tl.exp2(logits - of_columns[None, :])
    values = _exclude(values, 0.0, row_ids, column_ids, rows, columns, num_rows, num_columns, offset, GROUPS, DIAGONAL)
    values = tl.where(_on_diagonal(rows, columns, offset), values - 2.0, values)
    _store_block(weights, values, rows, columns, num_rows, num_columns)


@_jit_for_any_tile
def _uniformity_kernel(
    a,
    b,
    row_ids,
    column_ids,
    a_norms,
    b_norms,
    weights,
    of_rows,
    of_columns,
    num_rows,
    num_columns,
    offset,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """weights (rows, columns), see `uniformity_weights`; of_rows (blocks of columns, rows), of_columns: its sums."""
    row_block, column_block = _own_block(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    cosines = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION)
    # -2 |a - b|^2 = 4 a.b - 2 |a|^2 - 2 |b|^2; outside the tile norms are infinite and weights 0
    a_part = tl.load(a_norms + rows, mask=rows < num_rows, other=float("inf")) * (-2 * LOG2_E)
    b_part = tl.load(b_norms + columns, mask=columns < num_columns, other=float("inf")) * (-2 * LOG2_E)
    values = tl.exp2(cosines * (4 * LOG2_E) + (a_part[:, None] + b_part[None, :]))
    values = _exclude(values, 0.0, row_ids, column_ids, rows, columns, num_rows, num_columns, offset, GROUPS, DIAGONAL)
    _store_partial(of_rows, tl.sum(values, 1), column_block, rows, num_rows)
    _store_partial(of_columns, tl.sum(values, 0), row_block, columns, num_columns)
    _store_block(weights, values, rows, columns, num_rows, num_columns)


@triton.jit
def _own_block(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Which block this program computes: its number among the blocks of rows and among those of columns."""
    programs_of_group = GROUP * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first_row_block = tl.program_id(0) // programs_of_group * GROUP
    within_group = tl.program_id(0) % programs_of_group
    row_blocks = tl.minimum(tl.cdiv(num_rows, BLOCK_ROWS) - first_row_block, GROUP)  # fewer in the last group
    return first_row_block + within_group % row_blocks, within_group // row_blocks


@triton.jit
def _cosines(
    a,
    b,
    rows,
    columns,
    num_rows,
    num_columns,
    DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[rows] @ b[columns].T, float32; rows and columns outside the tile repeat its last ones."""
    depth = tl.arange(0, DEPTH)
    a_rows = a + _int64_within(rows, num_rows)[:, None] * DIM + depth[None, :]
    b_rows = b + _int64_within(columns, num_columns)[:, None] * DIM + depth[None, :]
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, DIM, DEPTH):
        if DIM % DEPTH == 0:
            x, y = tl.load(a_rows + start), tl.load(b_rows + start)
        else:
            inside = depth[None, :] < DIM - start
            x, y = tl.load(a_rows + start, mask=inside, other=0.0), tl.load(b_rows + start, mask=inside, other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def _exclude(
    x,
    value,
    row_ids,
    column_ids,
    rows,
    columns,
    num_rows,
    num_columns,
    offset,
    GROUPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """x with `value` in the entries that don't count, see `Tile`; row_ids (rows, GROUPS), column_ids."""
    if GROUPS > 0:
        row_ids += _int64_within(rows, num_rows) * GROUPS
        column_ids += _int64_within(columns, num_columns) * GROUPS
        for group in tl.static_range(GROUPS):
            excluded = tl.load(row_ids + group)[:, None] == tl.load(column_ids + group)[None, :]
            if DIAGONAL:
                excluded = excluded & ~_on_diagonal(rows, columns, offset)
            x = tl.where(excluded, value, x)
    elif not DIAGONAL:
        x = tl.where(_on_diagonal(rows, columns, offset), value, x)
    return x


@triton.jit
def _on_diagonal(rows, columns, offset):
    """Which entries of a block are true pairs."""
    return (rows + offset)[:, None] == columns[None, :]


@triton.jit
def _int64_within(indices, size):
    """Indices below `size`, ready to be multiplied: N times anything may pass 2^31."""
    return tl.minimum(indices, size - 1).to(tl.int64)


@triton.jit
def _log_sum_exp2(x, AXIS: tl.constexpr):
    """log sum 2^x along an axis of x, -inf where all of x is."""
    largest = tl.max(x, AXIS)
    largest = tl.where(largest == -float("inf"), 0.0, largest)  # -inf - (-inf) would be NaN
    return (largest + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(largest, AXIS)), AXIS))) * LN_2


@triton.jit
def _store_partial(partials, values, block, indices, size):
    """values to partials (blocks, size)."""
    tl.store(partials + block.to(tl.int64) * size + indices, values, mask=indices < size)


@triton.jit
def _store_block(matrix, values, rows, columns, num_rows, num_columns):
    """values to matrix (num_rows, num_columns), in its dtype."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(matrix + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], values, mask=inside)


TRITON_TILES = TileFunctions(log_sum_exps, contrastive_weights, uniformity_weights, add_product)

__all__ = ["TRITON_TILES"]
