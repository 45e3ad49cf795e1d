"""
Tiles of the objective's N x N matrices on GPUs: the functions of `tiles_gap_closed_clip` as Triton kernels.

Each program of a kernel multiplies one block of the tile and finishes it in registers: only the weights, or the share
of the block in the log-sum-exps, are written to memory, never the cosines. Blocks are summed through partial results,
which torch reduces, and not through atomics, so that every run gives the same result. Operands of 16 bits are
multiplied as they are; sums and everything after them are float32.
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


# GPUs have instructions for powers and logarithms of base 2 only.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Blocks(NamedTuple):
    """
    How a tile is cut into the blocks of the programs, and what these are compiled for.

    Args:
        rows, columns: the size of a block.
        depth: how many of the D features are multiplied at a time.
        swizzle: programs run through the blocks column by column within this many rows of blocks, which then share
            operands in the L2 cache.
        precision: Triton's `input_precision`, that of products of float32.
        warps, stages: Triton's `num_warps` and `num_stages`.
    """

    rows: int
    columns: int
    depth: int
    swizzle: int
    precision: str
    warps: int
    stages: int


# These are fixed, because autotuning would run again for every new N. Three stages take 96 kB of shared memory, so a
# multiprocessor of an H100 has room for two programs: one multiplies while the other takes exponentials. On an H200,
# with 32,768 columns and D = 512: 280 to 400 TFLOP/s in 16 bits, 220 to 245 in TF32 (cuBLAS's products of such a tile:
# 800 in 16 bits). Of seven other shapes of 16 bits only one was faster throughout, by 0 to 20%: four warps.
BLOCKS_16_BIT = Blocks(128, 128, 64, swizzle=8, precision="ieee", warps=8, stages=3)
BLOCKS_TF32 = Blocks(128, 128, 32, swizzle=8, precision="tf32", warps=8, stages=3)
# Without tensor cores: 21 TFLOP/s there, where blocks of 64 x 64 reached 14 (cuBLAS: 50).
BLOCKS_FLOAT32 = Blocks(128, 64, 16, swizzle=8, precision="ieee", warps=4, stages=3)


def log_sum_exps(a: Tensor, b: Tensor, scale: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """
    log sum exp(scale * a @ b.T) of each row and of each column of a tile: (rows,) and (columns,), float32; -inf where
    no entry counts.

    Args:
        a: (rows, D), b: (columns, D), float32 or 16 bits.
        scale: scalar, float32, on the same device.
    """
    a, b, blocks = _prepare(a, b)
    row_partials, column_partials = _partial_results(a, b, blocks)
    _launch(_log_sum_exps_kernel, a, b, tile, blocks, scale, row_partials, column_partials)
    return row_partials.logsumexp(0), column_partials.logsumexp(0)


def contrastive_weights(
    a: Tensor, b: Tensor, scale: Tensor, tile: Tile, row_lse: Tensor, column_lse: Tensor
) -> Tensor:
    """
    The softmax of the row plus the softmax of the column, minus 2 for a true pair: (rows, columns), in a's dtype.

    Args:
        a, b, scale: as in [`log_sum_exps`].
        row_lse: (rows,), column_lse: (columns,), float32: log-sum-exps of whole rows and columns of the N x N matrix.
    """
    weights = a.new_empty(len(a), len(b))
    a, b, blocks = _prepare(a, b)
    _launch(_contrastive_kernel, a, b, tile, blocks, scale, row_lse.contiguous(), column_lse.contiguous(), weights)
    return weights


def uniformity_weights(
    a: Tensor, b: Tensor, a_squared_norms: Tensor, b_squared_norms: Tensor, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """
    exp(-2 || a_i - b_j ||^2), exactly 0 for a pair that does not count: (rows, columns) in a's dtype, with the sums of
    its rows and of its columns in float32, taken before the weights are rounded to that dtype.

    Args:
        a: (rows, D), b: (columns, D), float32 or 16 bits.
        a_squared_norms: (rows,), b_squared_norms: (columns,), float32.
    """
    weights = a.new_empty(len(a), len(b))
    a, b, blocks = _prepare(a, b)
    row_partials, column_partials = _partial_results(a, b, blocks)
    squared_norms = a_squared_norms.contiguous(), b_squared_norms.contiguous()
    _launch(_uniformity_kernel, a, b, tile, blocks, *squared_norms, weights, row_partials, column_partials)
    return weights, row_partials.sum(0), column_partials.sum(0)


def add_product(total: Tensor, weights: Tensor, x: Tensor) -> None:
    """total (rows, D), float32, += weights (rows, columns) @ x (columns, D), in place and summed in float32."""
    if weights.dtype == torch.float32 or not total.is_cuda or torch.version.hip is not None:
        total.addmm_(weights.float(), x.float())
    else:
        # Not total += mm(...): with many columns, adding takes more memory, and more time than the product itself.
        torch.addmm(total, weights, x.to(weights.dtype), out_dtype=torch.float32, out=total)


def blocks_for(a: Tensor) -> Blocks:
    """The blocks for tiles whose operands are like a."""
    # Triton does not support the tensor cores of GPUs older than Ampere, and most AMD GPUs have no TF32.
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 0):
        return BLOCKS_FLOAT32
    if a.element_size() == 2:
        return BLOCKS_16_BIT
    # The setting of cuBLAS, which `add_product` follows: torch.set_float32_matmul_precision("medium") means TF32 there
    # too. torch.get_float32_matmul_precision raises where the newer torch.backends.fp32_precision is set, as
    # transformers does.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return BLOCKS_TF32 if tf32 else BLOCKS_FLOAT32


def _prepare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Blocks]:
    """The operands as the kernels need them, contiguous and of one dtype, and the blocks for them."""
    # Triton's interpreter, in which tests run the kernels without a GPU, has no products of bfloat16.
    if a.dtype != b.dtype or not a.is_cuda:
        a, b = a.float(), b.float()
    return a.contiguous(), b.contiguous(), blocks_for(a)


def _partial_results(a: Tensor, b: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Uninitialised memory for what each block tells of its rows, (blocks of columns, rows), and of its columns."""
    row_partials = a.new_empty(triton.cdiv(len(b), blocks.columns), len(a), dtype=torch.float32)
    column_partials = a.new_empty(triton.cdiv(len(a), blocks.rows), len(b), dtype=torch.float32)
    return row_partials, column_partials


def _launch(kernel, a: Tensor, b: Tensor, tile: Tile, blocks: Blocks, *kernel_arguments: Tensor) -> None:
    """Runs a kernel on all blocks of a tile; `kernel_arguments` are those that the three kernels don't share."""
    row_ids = column_ids = None
    if tile.group_ids is not None:
        group_ids = tile.group_ids.contiguous()
        row_ids, column_ids = group_ids[tile.rows], group_ids[tile.columns]
    programs = triton.cdiv(len(a), blocks.rows) * triton.cdiv(len(b), blocks.columns)
    with torch.cuda.device_of(a):  # Triton launches on the current device
        kernel[(programs,)](
            a, b, row_ids, column_ids, *kernel_arguments, len(a), len(b), tile.diagonal_offset,
            DIM=a.shape[1], ID_COLUMNS=0 if row_ids is None else row_ids.shape[1], KEEP_DIAGONAL=tile.keep_diagonal,
            BLOCK_ROWS=blocks.rows, BLOCK_COLUMNS=blocks.columns, DEPTH=blocks.depth, SWIZZLE=blocks.swizzle,
            PRECISION=blocks.precision, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip


# The number of rows and the offset vary from tile to tile: without this, Triton would compile once more for values
# that 16 divides.
_jit_for_any_tile = triton.jit(do_not_specialize=["num_rows", "offset"])

# The kernels share these arguments: a (num_rows, DIM), b (num_columns, DIM), row_ids (num_rows, ID_COLUMNS) and
# column_ids (num_columns, ID_COLUMNS), row after row; `offset` is the tile's `diagonal_offset`.


@_jit_for_any_tile
def _log_sum_exps_kernel(
    a, b, row_ids, column_ids, scale, row_partials, column_partials, num_rows, num_columns, offset,
    DIM: tl.constexpr, ID_COLUMNS: tl.constexpr, KEEP_DIAGONAL: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SWIZZLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """row_partials (blocks of columns, rows), column_partials (blocks of rows, columns): log-sum-exps of the block."""
    row_block, column_block, rows, columns = _block_of_program(
        num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, SWIZZLE
    )
    logits = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION) * (tl.load(scale) * LOG2_E)
    logits += tl.where(rows < num_rows, 0.0, -float("inf"))[:, None]
    logits += tl.where(columns < num_columns, 0.0, -float("inf"))[None, :]
    logits = _fill_excluded(
        logits, -float("inf"), row_ids, column_ids, rows, columns, num_rows, num_columns, offset,
        ID_COLUMNS, KEEP_DIAGONAL,
    )  # fmt: skip
    _store_partial(row_partials, _log_sum_exp2(logits, 1), column_block, rows, num_rows)
    _store_partial(column_partials, _log_sum_exp2(logits, 0), row_block, columns, num_columns)


@_jit_for_any_tile
def _contrastive_kernel(
    a, b, row_ids, column_ids, scale, row_lse, column_lse, weights, num_rows, num_columns, offset,
    DIM: tl.constexpr, ID_COLUMNS: tl.constexpr, KEEP_DIAGONAL: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SWIZZLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights (rows, columns), see `contrastive_weights`."""
    row_block, column_block, rows, columns = _block_of_program(
        num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, SWIZZLE
    )
    logits = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION) * (tl.load(scale) * LOG2_E)
    row_log2_sums = tl.load(row_lse + rows, mask=rows < num_rows, other=0.0) * LOG2_E
    column_log2_sums = tl.load(column_lse + columns, mask=columns < num_columns, other=0.0) * LOG2_E
    values = tl.exp2(logits - row_log2_sums[:, None]) + tl.exp2(logits - column_log2_sums[None, :])
    values = _fill_excluded(
        values, 0.0, row_ids, column_ids, rows, columns, num_rows, num_columns, offset, ID_COLUMNS, KEEP_DIAGONAL
    )
    values = tl.where(_on_diagonal(rows, columns, offset), values - 2.0, values)
    _store_block(weights, values, rows, columns, num_rows, num_columns)


@_jit_for_any_tile
def _uniformity_kernel(
    a, b, row_ids, column_ids, a_squared_norms, b_squared_norms, weights, row_partials, column_partials,
    num_rows, num_columns, offset,
    DIM: tl.constexpr, ID_COLUMNS: tl.constexpr, KEEP_DIAGONAL: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SWIZZLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights (rows, columns), see `uniformity_weights`; row_partials, column_partials: sums over the block."""
    row_block, column_block, rows, columns = _block_of_program(
        num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, SWIZZLE
    )
    cosines = _cosines(a, b, rows, columns, num_rows, num_columns, DIM, DEPTH, PRECISION)
    # -2 |a - b|^2 = 4 a.b - 2 |a|^2 - 2 |b|^2. Outside the tile, norms are infinite and so weights are 0.
    a_part = tl.load(a_squared_norms + rows, mask=rows < num_rows, other=float("inf")) * (-2 * LOG2_E)
    b_part = tl.load(b_squared_norms + columns, mask=columns < num_columns, other=float("inf")) * (-2 * LOG2_E)
    values = tl.exp2(cosines * (4 * LOG2_E) + (a_part[:, None] + b_part[None, :]))
    values = _fill_excluded(
        values, 0.0, row_ids, column_ids, rows, columns, num_rows, num_columns, offset, ID_COLUMNS, KEEP_DIAGONAL
    )
    _store_partial(row_partials, tl.sum(values, 1), column_block, rows, num_rows)
    _store_partial(column_partials, tl.sum(values, 0), row_block, columns, num_columns)
    _store_block(weights, values, rows, columns, num_rows, num_columns)


@triton.jit
def _block_of_program(
    num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SWIZZLE: tl.constexpr
):
    """The block that this program computes: which block of rows, which of columns, and their indices in the tile."""
    swizzled_programs = SWIZZLE * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first_row_block = tl.program_id(0) // swizzled_programs * SWIZZLE
    position = tl.program_id(0) % swizzled_programs
    row_blocks = tl.minimum(tl.cdiv(num_rows, BLOCK_ROWS) - first_row_block, SWIZZLE)  # at the end there may be fewer
    row_block, column_block = first_row_block + position % row_blocks, position // row_blocks
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row_block, column_block, rows, columns


@triton.jit
def _cosines(
    a, b, rows, columns, num_rows, num_columns, DIM: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    """a[rows] @ b[columns].T, float32; rows and columns outside the tile repeat its last ones."""
    depth = tl.arange(0, DEPTH)
    a_rows = a + _int64_below(rows, num_rows)[:, None] * DIM + depth[None, :]
    b_rows = b + _int64_below(columns, num_columns)[:, None] * DIM + depth[None, :]
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
def _fill_excluded(
    x, value, row_ids, column_ids, rows, columns, num_rows, num_columns, offset,
    ID_COLUMNS: tl.constexpr, KEEP_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """x with `value` in the entries that do not count, see `Tile`."""
    if ID_COLUMNS > 0:
        row_ids += _int64_below(rows, num_rows) * ID_COLUMNS
        column_ids += _int64_below(columns, num_columns) * ID_COLUMNS
        for id_column in tl.static_range(ID_COLUMNS):
            excluded = tl.load(row_ids + id_column)[:, None] == tl.load(column_ids + id_column)[None, :]
            if KEEP_DIAGONAL:
                excluded = excluded & ~_on_diagonal(rows, columns, offset)
            x = tl.where(excluded, value, x)
    elif not KEEP_DIAGONAL:
        x = tl.where(_on_diagonal(rows, columns, offset), value, x)
    return x


@triton.jit
def _on_diagonal(rows, columns, offset):
    """Which entries of a block are on the diagonal of the N x N matrix, the true pairs."""
    return (rows + offset)[:, None] == columns[None, :]


@triton.jit
def _int64_below(indices, size):
    """The indices, those of `size` and more replaced by the last below it, as int64: products with N may pass 2^31."""
    return tl.minimum(indices, size - 1).to(tl.int64)


@triton.jit
def _log_sum_exp2(x, AXIS: tl.constexpr):
    """log sum 2^x (a natural logarithm) along an axis of x; -inf where all of x is -inf."""
    largest = tl.max(x, AXIS)
    largest = tl.where(largest == -float("inf"), 0.0, largest)  # -inf - (-inf) would be NaN
    return (largest + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(largest, AXIS)), AXIS))) * LN_2


@triton.jit
def _store_partial(partials, values, block, indices, size):
    """Stores the values of a block's indices to `partials` (blocks, size)."""
    tl.store(partials + block.to(tl.int64) * size + indices, values, mask=indices < size)


@triton.jit
def _store_block(matrix, values, rows, columns, num_rows, num_columns):
    """Stores the values of a block to `matrix` (num_rows, num_columns), in its dtype."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(matrix + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], values, mask=inside)


TRITON_TILES = TileFunctions(log_sum_exps, contrastive_weights, uniformity_weights, add_product)

__all__ = ["TRITON_TILES"]
