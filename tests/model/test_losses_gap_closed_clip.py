"""The objective against a naive reference in float64, which is written as the papers write the formulas."""

import math

import pytest
import torch

from gap_closed_clip.model.losses_gap_closed_clip import (
    centroid_uniformity_loss,
    gap_closed_loss,
    scheduled_weight,
    unit_vectors,
)


WEIGHTS = {"contrastive_weight": 0.9, "align_weight": 1.7, "uniformity_weight": 0.6}


def naive_terms(embeddings: list[torch.Tensor], scale: torch.Tensor, groups: list[tuple] | None):
    """
    The contrastive, the align and the uniformity loss as the papers write them: sample by sample, with differences and
    sums of exponentials in float64, without matrix products and log-sum-exps. They can be differentiated.
    """
    n, others = len(embeddings[0]), range(1, len(embeddings))

    def share_a_group(i: int, j: int) -> bool:
        return groups is not None and any(a == b for a, b in zip(groups[i], groups[j], strict=True))

    negatives = [[j for j in range(n) if j != i and not share_a_group(i, j)] for i in range(n)]
    zero = embeddings[0].sum() * 0
    contrastive, align = zero, zero
    for m in others:
        a, b = embeddings[0], embeddings[m]
        for i in range(n):
            candidates = [i, *negatives[i]]
            of_row = torch.exp(scale * (b[candidates] * a[i]).sum(-1)).sum()
            of_column = torch.exp(scale * (a[candidates] * b[i]).sum(-1)).sum()
            true_pair = scale * (a[i] * b[i]).sum()
            contrastive = contrastive + (of_row.log() + of_column.log() - 2 * true_pair) / 2 / n / len(others)
            align = align + ((b[i] - a[i]) ** 2).sum() / n / len(others)
    centroids = []
    for i in range(n):
        mean = sum(z[i] for z in embeddings) / len(embeddings)
        norm = (mean**2).sum().sqrt()
        centroids.append(mean / norm if norm > 0 else mean * 0)
    centroids = torch.stack(centroids)
    count, total = sum(map(len, negatives)), zero
    for i in range(n):
        total = total + torch.exp(-2 * ((centroids[negatives[i]] - centroids[i]) ** 2).sum(-1)).sum()
    return contrastive, align, torch.log(total / count) if count else zero


def random_embeddings(n: int, modalities: int, dim: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(modalities, n, dim, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in torch.nn.functional.normalize(z, dim=-1)]


def loss_and_gradients(function, embeddings, scale):
    """What `function(embeddings, scale)` returns, and the gradients of its first value, in embeddings and scale."""
    inputs = [z.detach().clone().requires_grad_() for z in embeddings] + [scale.detach().clone().requires_grad_()]
    values = function(inputs[:-1], inputs[-1])
    gradients = torch.autograd.grad(values[0], inputs)
    return values, gradients


def naive_loss(groups):
    """A function for `loss_and_gradients`: the weighted sum of `naive_terms`, and the terms."""

    def function(embeddings, scale):
        terms = naive_terms(embeddings, scale, groups)
        return sum(w * t for w, t in zip(WEIGHTS.values(), terms, strict=True)), *terms

    return function


def assert_equal_to_naive(embeddings, groups=None, dtype=torch.float64, tolerance=1e-10):
    scale = torch.tensor(14.0, dtype=torch.float64)
    ids = None if groups is None else torch.tensor(groups)
    ours, our_gradients = loss_and_gradients(
        lambda z, s: gap_closed_loss(z, s, ids, **WEIGHTS), [z.to(dtype) for z in embeddings], scale.to(dtype)
    )
    expected, gradients = loss_and_gradients(naive_loss(groups), embeddings, scale)
    for value, reference in zip([*ours, *our_gradients], [*expected, *gradients], strict=True):
        # Relative to the largest entry: one near zero is a difference of numbers that have seven digits in float32.
        largest = max(reference.abs().max().item(), 1)
        torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_value_and_gradient_against_loops(n, modalities):
    assert_equal_to_naive(random_embeddings(n, modalities))


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_and_gradient_at_256(modalities, grouped):
    embeddings = random_embeddings(256, modalities, dim=32)
    groups = [(i % 200, i // 3) for i in range(256)] if grouped else None
    assert_equal_to_naive(embeddings, groups)
    assert_equal_to_naive(embeddings, groups, dtype=torch.float32, tolerance=1e-6)


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize(
    "groups",
    [
        [(0,), (1,), (0,), (2,), (1,), (3,), (0,)],
        [(0, 9), (1, 8), (2, 9), (2, 7), (4, 6), (5, 5), (5, 8)],  # two columns: images and captions
        [(0,), (0,), (0,), (0,), (0,), (0,), (0,)],  # no negative is left
    ],
)
def test_groups_are_left_out_of_every_negative(groups, modalities):
    assert_equal_to_naive(random_embeddings(7, modalities), groups)


def test_group_ids_of_one_dimension_are_one_column():
    embeddings, ids, scale = random_embeddings(5, 2), torch.tensor([0, 1, 0, 2, 1]), torch.tensor(10.0)
    assert gap_closed_loss(embeddings, scale, ids) == gap_closed_loss(embeddings, scale, ids[:, None])


@pytest.mark.parametrize("modalities", [2, 3])
def test_duplicates_and_zero_vectors(modalities):
    embeddings = [z.detach() for z in random_embeddings(7, modalities)]
    for z in embeddings:
        z[3] = z[1]  # a duplicate in every modality, so its centroid is one too
        z[5] = 0  # zero in every modality: the centroid has no direction and stays zero
    embeddings[0][6] = 0  # zero in one modality only
    assert_equal_to_naive([z.requires_grad_() for z in embeddings])


def test_opposite_embeddings_have_no_centroid_and_finite_gradients():
    z = random_embeddings(4, 1)[0].detach()
    pair = [z.clone().requires_grad_(), (-z).requires_grad_()]
    gap_closed_loss(pair, torch.tensor(10.0)).loss.backward()
    assert all(x.grad.isfinite().all() for x in pair)


def test_uniformity_of_two_points_by_hand():
    # Orthogonal unit vectors are sqrt(2) apart: log(exp(-2 * 2)) = -4. The same vector twice: 0.
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert centroid_uniformity_loss([a, a]).item() == pytest.approx(-4, abs=1e-6)
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert centroid_uniformity_loss([b, b]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    embeddings = [z.detach().float() for z in random_embeddings(64, 2, dim=16)]
    plain = gap_closed_loss(embeddings, torch.tensor(100.0))
    with torch.autocast("cpu", dtype):
        inputs = [z.clone().requires_grad_() for z in embeddings]
        cast = gap_closed_loss(inputs, torch.tensor(100.0))
    cast.loss.backward()
    assert cast.loss.dtype == torch.float32
    torch.testing.assert_close(torch.stack(cast).detach(), torch.stack(plain), rtol=0, atol=0)
    assert all(z.grad.isfinite().all() for z in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_computed_in_float32(dtype):
    embeddings = [z.detach().to(dtype).requires_grad_() for z in random_embeddings(32, 3, dim=16)]
    losses = gap_closed_loss(embeddings, torch.tensor(100.0))
    expected = gap_closed_loss([z.detach().float() for z in embeddings], torch.tensor(100.0))
    losses.loss.backward()
    torch.testing.assert_close(torch.stack(losses).detach(), torch.stack(expected), rtol=0, atol=0)
    assert all(z.grad.isfinite().all() for z in embeddings)


def test_contrastive_equals_the_symmetric_loss_of_transformers_clip():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text = random_embeddings(9, 2)
    expected = image_text_contrastive_loss(20 * text @ image.T)
    torch.testing.assert_close(gap_closed_loss([image, text], torch.tensor(20.0)).contrastive_loss, expected)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([torch.ones(3, 2)], "two or more"),
        ([torch.ones(3, 2), torch.ones(4, 2)], "same shape"),
        ([torch.ones(0, 2), torch.ones(0, 2)], "at least one row"),
    ],
)
def test_wrong_embeddings(embeddings, message):
    with pytest.raises(ValueError, match=message):
        gap_closed_loss(embeddings, torch.tensor(1.0))


def test_wrong_group_ids():
    with pytest.raises(ValueError, match="group_ids has shape"):
        gap_closed_loss(random_embeddings(3, 2), torch.tensor(1.0), torch.zeros(4, dtype=torch.int64))


def test_unit_vectors():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_vectors(x)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    unit.sum().backward()
    # d(unit)/dx summed over components: (1 - u u^T) 1 / |x| = ((1 - 1.4 * 0.6) / 5, (1 - 1.4 * 0.8) / 5)
    torch.testing.assert_close(x.grad, torch.tensor([[0.032, -0.024], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 1), (0.2, 1), (0.45, 0.5), (0.7, 0), (0.75, 0), (0.8, 0), (0.9, 1.5), (1, 3)]
)
def test_schedule_against_hand_computed_values(progress, expected):
    weight = [[0.2, 1.0], [0.7, 0.0], [0.8, 0.0], [1.0, 3.0]]
    assert float(scheduled_weight(weight, torch.tensor(float(progress)))) == pytest.approx(expected, abs=1e-6)


def test_constant_weight_and_single_point():
    assert scheduled_weight(2, torch.tensor(0.3)) == 2
    assert scheduled_weight([[0.5, 4.0]], torch.tensor(0.1)).item() == 4


def test_scale_gradient_by_hand():
    # Two samples, cosines 1 on the diagonal and 0 off it: loss = log(1 + exp(-s)), d/ds = -1 / (1 + exp(s)).
    z = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    gap_closed_loss([z, z], scale, align_weight=0.0, uniformity_weight=0.0).loss.backward()
    assert scale.grad.item() == pytest.approx(-1 / (1 + math.exp(2)), rel=1e-12)
