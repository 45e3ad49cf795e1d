"""The tiled objective against the dense one and against naive loops; its memory, and when it is chosen."""

import pytest
import torch
from test_losses_gap_closed_clip import WEIGHTS, loss_and_gradients, naive_loss, random_embeddings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip.model.losses_gap_closed_clip import TILED_FROM, gap_closed_loss


TILE = 16
GROUPS = {
    "all": lambda n: None,
    "one column": lambda n: torch.arange(n) // 3,
    "two columns": lambda n: torch.stack([torch.arange(n) % max(n - 4, 1), torch.arange(n).flip(0) // 2], dim=1),
    "one group": lambda n: torch.zeros(n, dtype=torch.int64),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_module, "CPU_TILE", TILE)


def objective(tiled, ids, **weights):
    return lambda z, s: gap_closed_loss(z, s, ids, **{**WEIGHTS, **weights}, tiled=tiled)


def assert_equal(found, expected, tolerance):
    """Compares two results of `loss_and_gradients` by relative error, tensor by tensor."""
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        # The floor is for what is zero but for rounding, as where no negative is left or with one sample.
        error = (x - y).norm() / y.norm().clamp(min=0.03)
        assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("n", [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 67])
def test_value_and_gradients_are_those_of_the_dense_form(small_tiles, n, modalities, groups, dtype, tolerance):
    embeddings = [z.detach().to(dtype) for z in random_embeddings(n, modalities, dim=24, seed=n)]
    scale = torch.tensor(14.0, dtype=dtype)
    ids = GROUPS[groups](n)
    found = loss_and_gradients(objective(True, ids), embeddings, scale)
    assert_equal(found, loss_and_gradients(objective(False, ids), embeddings, scale), tolerance)


@pytest.mark.parametrize("modalities", [2, 3])
def test_value_and_gradients_against_loops(small_tiles, modalities):
    embeddings = random_embeddings(37, modalities)
    for z in embeddings:
        z.data[3] = z.data[20]  # a duplicate in another tile
        z.data[5] = 0
    groups = [(i % 30, i // 3) for i in range(37)]
    scale = torch.tensor(14.0, dtype=torch.float64)
    found = loss_and_gradients(objective(True, torch.tensor(groups)), embeddings, scale)
    assert_equal(found, loss_and_gradients(naive_loss(groups), embeddings, scale), 1e-10)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_the_largest_scale_neither_overflows_nor_underflows(small_tiles, cosine):
    """At scale 100 the logits of one tile span 200 and their exponentials 87 digits, more than float32 can hold."""
    first = random_embeddings(40, 1, dim=2)[0].detach().float()
    embeddings = [first, cosine * first]
    scale = torch.tensor(100.0)
    found = loss_and_gradients(objective(True, None), embeddings, scale)
    assert all(x.isfinite().all() for x in [*found[0], *found[1]])
    double = [z.double() for z in embeddings]
    values, gradients = loss_and_gradients(objective(False, None), double, scale.double())
    expected = [x.float() for x in values], [x.float() for x in gradients]
    assert_equal(found, expected, 1e-4)  # the rounding of unit vectors, times the scale


def test_half_precision_is_computed_in_float32(small_tiles):
    embeddings = [z.detach().to(torch.bfloat16) for z in random_embeddings(40, 2, dim=24)]
    scale = torch.tensor(20.0)
    found = loss_and_gradients(objective(True, None), embeddings, scale)
    expected = loss_and_gradients(objective(False, None), [z.float() for z in embeddings], scale)
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(expected[0]), rtol=1e-5, atol=1e-6)
    for x, y in zip(found[1][:-1], expected[1][:-1], strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), y, rtol=2**-8, atol=1e-6)  # rounded once, at the end


def test_backward_under_autocast_stays_in_float32(small_tiles):
    embeddings, scale = [z.detach().float() for z in random_embeddings(40, 2, dim=24)], torch.tensor(50.0)
    expected = loss_and_gradients(objective(True, None), embeddings, scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(objective(True, None), embeddings, scale)
    assert_equal(found, expected, 1e-7)


@pytest.mark.parametrize("fixed", ["anchor", "other", "scale"])
def test_what_needs_no_gradient_gets_none(small_tiles, fixed):
    """The other inputs get the gradient they had before; this is the case of a locked tower or a fixed temperature."""
    image, text = (z.detach() for z in random_embeddings(40, 2))
    inputs = {"anchor": image, "other": text, "scale": torch.tensor(14.0, dtype=torch.float64)}
    gradients = {}
    for locked in (None, fixed):
        leaves = {name: x.clone().requires_grad_(name != locked) for name, x in inputs.items()}
        losses = gap_closed_loss([leaves["anchor"], leaves["other"]], leaves["scale"], **WEIGHTS, tiled=True)
        losses.loss.backward()
        gradients[locked] = {name: x.grad for name, x in leaves.items()}
    assert gradients[fixed].pop(fixed) is None
    for name, gradient in gradients[fixed].items():
        torch.testing.assert_close(gradient, gradients[None][name], rtol=0, atol=0)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("term", ["align_weight", "uniformity_weight"])
def test_a_term_of_weight_zero_has_its_value_and_no_backward(small_tiles, term, tiled):
    embeddings, scale = random_embeddings(40, 3), torch.tensor(14.0, dtype=torch.float64)
    zero = torch.tensor(0.0, dtype=torch.float64)
    found = loss_and_gradients(objective(tiled, None, **{term: 0}), embeddings, scale)
    expected = loss_and_gradients(objective(tiled, None, **{term: zero}), embeddings, scale)
    assert_equal(found, expected, 1e-12)
    value = dict(zip(WEIGHTS, found[0][1:], strict=True))[term]
    assert not value.requires_grad and value != 0


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns, also in the backward pass."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensor(n: int, **kwargs) -> int:
    """Elements of the largest tensor of one forward and backward pass of n samples."""
    embeddings = [z.detach().float().requires_grad_() for z in random_embeddings(n, 2, dim=4)]
    with LargestTensor() as largest:
        gap_closed_loss(embeddings, torch.tensor(14.0, requires_grad=True), torch.arange(n), **kwargs).loss.backward()
    return largest.elements


def test_no_matrix_is_larger_than_a_tile(small_tiles):
    n = 160
    assert largest_tensor(n, tiled=False) == n * n
    assert largest_tensor(n, tiled=True) <= max(TILE * TILE, n * 4)


def test_by_default_large_batches_are_tiled():
    n = TILED_FROM
    assert largest_tensor(n - 1) == (n - 1) ** 2
    tile = tiled_module.CPU_TILE
    assert n < 2 * tile and largest_tensor(2 * tile) <= tile * tile  # at n itself the matrix is one tile


def test_compiled_training_breaks_the_graph_and_nothing_else(small_tiles):
    embeddings, scale = random_embeddings(40, 2), torch.tensor(14.0, dtype=torch.float64)
    compiled = torch.compile(objective(True, None), backend="aot_eager")
    found = loss_and_gradients(compiled, embeddings, scale)
    assert_equal(found, loss_and_gradients(objective(True, None), embeddings, scale), 1e-12)
