"""
Tiles computed by Triton kernels against tiles computed by torch in float64; the objective with these kernels against
the dense objective.

The kernels run in Triton's interpreter on the CPU, and on a GPU where there is one. The interpreter has to be chosen
before Triton is imported, so all of its results come from a process of its own: `python this_file folder`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip.model.losses_gap_closed_clip import gap_closed_loss, unit_vectors
from gap_closed_clip.model.tiles_gap_closed_clip import TORCH_TILES, Tile


if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

N = 150
SCALE = 100.0  # exp(100) is beyond float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative rounding errors of weights: in float32 that of exponentials of up to 100, otherwise that of the dtype, where
# the interpreter truncates to bfloat16 instead of rounding.
ROUNDING = {"float32": 3e-5, "bfloat16": 2**-7, "float16": 2**-10}
IDS = ["no ids", "one column", "two columns", "one group"]


class Shape(NamedTuple):
    """A tile of the N x N matrix of unit vectors with `dim` features, and whether it is cut into small blocks."""

    rows: slice
    columns: slice
    dim: int
    small_blocks: bool


SHAPES = {
    "square": Shape(slice(10, 50), slice(10, 50), 24, True),
    "strip": Shape(slice(20, 57), slice(0, 70), 40, True),
    "off the diagonal": Shape(slice(0, 33), slice(33, 70), 32, True),
    "default blocks": Shape(slice(20, N), slice(0, N), 40, False),
}


class Case(NamedTuple):
    """One tile: the dtype of the embeddings, a kind of `group_ids`, `Tile.keep_diagonal`, one of `SHAPES`."""

    dtype: str
    ids: str
    diagonal: bool
    shape: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.ids}, {'diagonal' if self.diagonal else 'no diagonal'}, {self.shape}"


CASES = [
    Case(dtype, ids, diagonal, shape)
    for dtype in DTYPES
    for ids in IDS
    for diagonal in (True, False)
    for shape in SHAPES
    if (dtype == "float32" and shape != "default blocks") or (ids == "two columns" and diagonal)
]
OBJECTIVES = [
    ("float32", 2, "no ids"),
    ("float32", 3, "two columns"),
    ("bfloat16", 2, "one column"),
    ("bfloat16 and float32", 2, "no ids"),
]


def group_ids(kind: str) -> torch.Tensor | None:
    """Group ids (N, G), among them negative ones and ones that differ only in their upper 32 bits; None for no ids."""
    columns = torch.randint(0, 12, (N, 2), generator=torch.Generator().manual_seed(1))
    columns = (columns - 6) << torch.tensor([0, 33])
    ids = {"one column": columns[:, 1:], "two columns": columns, "one group": torch.full((N, 1), 5)}
    return ids.get(kind)


def embeddings(count: int, dim: int, dtype: str) -> list[torch.Tensor]:
    """
    Unit vectors of `count` modalities, (N, dim) each, with rows of zeros, duplicates and opposites among them.

    Args:
        dtype: that of all modalities, or two, "bfloat16 and float32": that of the first and that of the others.
    """
    z = unit_vectors(torch.randn(count, N, dim, generator=torch.Generator().manual_seed(dim)))
    z[:, 30] = 0
    z[1:, 22] = z[0, 40]
    z[1:, 41] = -z[0, 41]
    first, *others = dtype.split(" and ")
    return [z[0].to(DTYPES[first]), *z[1:].to(DTYPES[others[0] if others else first])]


def tile_results(functions, case: Case, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """The results of the four functions for one tile, with scale and squared norms in `dtype`."""
    rows, columns, dim, _ = SHAPES[case.shape]
    ids = group_ids(case.ids)
    tile = Tile(rows, columns, None if ids is None else ids.to(device), case.diagonal)
    a, b = (z[part].to(device) for z, part in zip(embeddings(2, dim, case.dtype), (rows, columns), strict=True))
    b = b.T.contiguous().T  # the functions have to take any strides
    squared_norms = [x.to(dtype).square().sum(1) for x in (a, b)]
    scale = torch.tensor(SCALE, device=device, dtype=dtype)
    # A whole row of the matrix holds more entries than those in the tile: one more logit, of 0.
    lses = [x.logaddexp(torch.zeros_like(x)) for x in TORCH_TILES.log_sum_exps(a, b, scale.double(), tile)]
    contrastive = functions.contrastive_weights(a, b, scale, tile, *[x.float().to(dtype) for x in lses])
    uniformity, row_sums, column_sums = functions.uniformity_weights(a, b, *squared_norms, tile)
    weights = (a.double() @ b.double().T).to(a.dtype)
    row_total, column_total = torch.ones_like(a, dtype=dtype), torch.ones_like(b, dtype=dtype)
    if functions is TORCH_TILES:
        weights = weights.to(dtype)
    functions.add_product(row_total, weights, b)
    functions.add_product(column_total, weights.T, a)
    row_lse, column_lse = functions.log_sum_exps(a, b, scale, tile)
    return {
        "row_lse": row_lse,
        "column_lse": column_lse,
        "contrastive": contrastive,
        "uniformity": uniformity,
        "row_sums": row_sums,
        "column_sums": column_sums,
        "product of rows": row_total,
        "product of columns": column_total,
    }


def objective_results(
    tiled: bool, dtype: str, modalities: int, ids: str, double: bool, device: str
) -> dict[str, torch.Tensor]:
    """The loss, its terms and its gradients by name; computed in float64 if `double`."""
    inputs = [z.to(device, torch.float64 if double else z.dtype) for z in embeddings(modalities, 24, dtype)]
    scale = torch.tensor(14.0, device=device, dtype=torch.float64 if double else torch.float32)
    for x in (*inputs, scale):
        x.requires_grad_()
    values = gap_closed_loss(inputs, scale, group_ids(ids), 0.9, 1.7, 0.6, tiled=tiled)
    values.loss.backward()
    gradients = {f"gradient {i}": x.grad for i, x in enumerate([*inputs, scale])}
    return {**{name: x.detach() for name, x in values._asdict().items()}, **gradients}


def kernel_results(device: str) -> dict[str, torch.Tensor]:
    """The kernels' results for all tiles and objectives: tensors by names like "case: name"."""
    import gap_closed_clip.model.triton_tiles_gap_closed_clip as kernels

    small = kernels.Blocks(16, 32, 16, swizzle=2, precision="ieee", warps=4, stages=2)
    results = {}
    for case in CASES:
        blocks_for = (lambda a: small) if SHAPES[case.shape].small_blocks else kernels.blocks_for
        with patch.object(kernels, "blocks_for", blocks_for):
            found = tile_results(kernels.TRITON_TILES, case, torch.float32, device)
        results |= {f"{case}: {name}": x for name, x in found.items()}
    tiles = {"tile_functions": lambda x: kernels.TRITON_TILES, "CPU_TILE": 64, "GPU_TILE_BYTES": 0}
    for case in OBJECTIVES:
        with patch.multiple(tiled_module, **tiles):
            found = objective_results(True, *case, False, device)
        results |= {f"{case}: {name}": x for name, x in found.items()}
    return results


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


@pytest.fixture(scope="module", params=DEVICES)
def found(request, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What `kernel_results` returns, on CPUs from the process that runs the interpreter."""
    if request.param == "cuda":
        return {name: x.cpu() for name, x in kernel_results("cuda").items()}
    folder = tmp_path_factory.mktemp("interpreter")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__, folder], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return load_file(folder / "results.safetensors")


@pytest.fixture
def expected(case) -> dict[str, torch.Tensor]:
    return tile_results(TORCH_TILES, case, torch.float64, "cpu")


def assert_close(found, expected, case, name, rtol, atol, dtype=torch.float32):
    x = found[f"{case}: {name}"]
    assert x.dtype == dtype
    torch.testing.assert_close(x.double(), expected[name].double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_sum_exps(found, expected, case):
    for name in ("row_lse", "column_lse"):
        assert_close(found, expected, case, name, rtol=1e-6, atol=3e-5)
    if case.ids == "one group" and not case.diagonal:
        assert (found[f"{case}: row_lse"] == -torch.inf).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contrastive_weights(found, expected, case):
    dtype = DTYPES[case.dtype]
    assert_close(found, expected, case, "contrastive", rtol=ROUNDING[case.dtype], atol=3e-5, dtype=dtype)
    assert (found[f"{case}: contrastive"][expected["contrastive"] == 0] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_uniformity_weights(found, expected, case):
    dtype = DTYPES[case.dtype]
    assert_close(found, expected, case, "uniformity", rtol=ROUNDING[case.dtype], atol=0, dtype=dtype)
    assert ((found[f"{case}: uniformity"] == 0) == (expected["uniformity"] == 0)).all()
    for name in ("row_sums", "column_sums"):
        assert_close(found, expected, case, name, rtol=3e-6, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_product(found, expected, case):
    for name in ("product of rows", "product of columns"):
        assert_close(found, expected, case, name, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "modalities", "ids"), OBJECTIVES)
def test_objective_is_that_of_the_dense_form(found, dtype, modalities, ids):
    expected = objective_results(False, dtype, modalities, ids, True, "cpu")
    for name, y in expected.items():
        x = found[f"{(dtype, modalities, ids)}: {name}"].double()
        # Weights and gradients are rounded to the dtype of the embeddings.
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        assert (x - y).norm() <= tolerance * y.norm(), name


@pytest.fixture
def cublas():
    """The settings of cuBLAS; its precision is restored after the test."""
    cublas = torch.backends.cuda.matmul
    before = cublas.fp32_precision
    yield cublas
    cublas.fp32_precision = before


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_float32_are_as_precise_as_those_of_cublas(device, cublas):
    import gap_closed_clip.model.triton_tiles_gap_closed_clip as kernels

    x = torch.ones(1, 1, device=device)
    cublas.fp32_precision = "ieee"
    assert kernels.blocks_for(x).precision == "ieee"
    cublas.fp32_precision = "tf32"
    assert kernels.blocks_for(x).precision == "tf32"
    assert kernels.blocks_for(x.bfloat16()) == kernels.BLOCKS_16_BIT
    if device == "cuda":
        case = Case("float32", "two columns", True, "default blocks")
        found = tile_results(kernels.TRITON_TILES, case, torch.float32, device)["uniformity"].cpu()
        error = (found - tile_results(TORCH_TILES, case, torch.float64, "cpu")["uniformity"]).abs().max()
        assert 1e-6 < error < 5e-3  # TF32 has 10 bits of mantissa instead of 23


if __name__ == "__main__":
    results = {name: x.contiguous() for name, x in kernel_results("cpu").items()}
    save_file(results, Path(sys.argv[1]) / "results.safetensors")
