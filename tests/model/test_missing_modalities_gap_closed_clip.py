"""The objective and the centering where samples lack modalities, against naive loops in float64."""

import math

import pytest
import torch
from test_losses_gap_closed_clip import WEIGHTS, loss_and_gradients, naive_terms, random_embeddings
from test_tiled_gap_closed_clip import assert_equal, small_tiles  # noqa: F401 (a fixture)

from gap_closed_clip.model.losses_gap_closed_clip import gap_closed_loss
from gap_closed_clip.model.micro_batches_gap_closed_clip import MicroBatches, encode_in_micro_batches
from gap_closed_clip.model.projection_gap_closed_clip import ProjectionCentering


N = 37  # with tiles of 16 rows and columns, several are visited
SCALE = torch.tensor(14.0, dtype=torch.float64)
GROUPS = {
    "all": None,
    "one column": [(i // 3,) for i in range(N)],
    "two columns": [(i % 30, (N - i) // 2) for i in range(N)],
}
PAIRS = {
    "anchor": lambda modalities: None,
    "every pair": lambda modalities: [(i, j) for i in range(modalities) for j in range(i + 1, modalities)],
}


def random_mask(n: int, modalities: int, share: float = 0.6, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, modalities, generator=torch.Generator().manual_seed(seed)) < share


def only(modality: int, rows: list[int], n: int = N, modalities: int = 3) -> torch.Tensor:
    """A mask by which every sample has all modalities, but one of them only in these rows."""
    mask = torch.ones(n, modalities, dtype=torch.bool)
    mask[:, modality] = False
    mask[rows, modality] = True
    return mask


def alternating() -> torch.Tensor:
    """A mask by which every sample has one of three modalities, so that no two can be compared."""
    return torch.arange(N)[:, None] % 3 == torch.arange(3)


MASKS = {
    "one sample has it": only(2, [20]),
    "two samples have it": only(2, [3, 30]),
    "nobody has it": only(2, []),
    "only one sample has the anchor": only(0, [7]),
    "no two modalities together": alternating(),
    "nobody has anything": torch.zeros(N, 3, dtype=torch.bool),
    "one sample has anything": only(0, [7]) & only(1, [7]) & only(2, [7]),
    "some have nothing": random_mask(N, 3, 0.3),
    "a whole tile lacks it": only(1, list(range(16))),
}


def naive_partial_terms(embeddings, scale, groups, mask, pairs=None):
    """The three terms sample by sample; the two that compare modalities from `naive_terms` of those that have both."""
    n, modalities = mask.shape
    zero = sum(z.sum() for z in embeddings) * 0 + scale * 0
    terms = []
    for first, second in pairs or [(0, other) for other in range(1, modalities)]:
        both = [i for i in range(n) if mask[i, first] and mask[i, second]]
        if both:
            chosen = None if groups is None else [groups[i] for i in both]
            terms.append(naive_terms([embeddings[first][both], embeddings[second][both]], scale, chosen)[:2])
    contrastive, align = (sum(values) / len(terms) for values in zip(*terms, strict=True)) if terms else (zero, zero)
    centroids = {}
    for i in range(n):
        present = [embeddings[m][i] for m in range(modalities) if mask[i, m]]
        if present:
            mean = sum(present) / len(present)
            centroids[i] = mean / (mean**2).sum().sqrt()
    exponentials = [
        torch.exp(-2 * ((centroids[i] - centroids[j]) ** 2).sum())
        for i in centroids
        for j in centroids
        if i != j and not (groups and any(a == b for a, b in zip(groups[i], groups[j], strict=True)))
    ]
    uniformity = torch.log(sum(exponentials) / len(exponentials)) if exponentials else zero
    return contrastive + zero, align + zero, uniformity + zero


def naive_loss(groups, mask, pairs=None, weights=WEIGHTS):
    """A function for `loss_and_gradients`: the weighted sum of `naive_partial_terms`, and the terms."""

    def function(embeddings, scale):
        terms = naive_partial_terms(embeddings, scale, groups, mask, pairs)
        return sum(weight * term for weight, term in zip(weights.values(), terms, strict=True)), *terms

    return function


def objective(tiled, groups=None, **kwargs):
    ids = None if groups is None else torch.tensor(groups)
    return lambda z, s: gap_closed_loss(z, s, ids, **WEIGHTS, tiled=tiled, **kwargs)


def with_nan(embeddings, mask):
    """The embeddings with NaN wherever a sample lacks the modality."""
    return [z.detach().masked_fill(~mask[:, m, None], math.nan) for m, z in enumerate(embeddings)]


def assert_equal_to_naive(mask, tiled, groups=None, pairs=None, n=N):
    embeddings = random_embeddings(n, mask.shape[1])
    found = loss_and_gradients(
        objective(tiled, groups, modality_mask=mask, pairs=pairs), with_nan(embeddings, mask), SCALE
    )
    assert_equal(found, loss_and_gradients(naive_loss(groups, mask, pairs), embeddings, SCALE), 1e-10)
    for m, gradient in enumerate(found[1][:-1]):
        assert not gradient[~mask[:, m]].any()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_value_and_gradients_against_loops(small_tiles, modalities, groups, pairs, tiled):  # noqa: F811
    mask = random_mask(N, modalities, seed=modalities)
    assert_equal_to_naive(mask, tiled, GROUPS[groups], PAIRS[pairs](modalities))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", MASKS)
def test_few_samples_or_none_have_a_modality(small_tiles, name, pairs, tiled):  # noqa: F811
    assert_equal_to_naive(MASKS[name], tiled, GROUPS["two columns"], PAIRS[pairs](3))


@pytest.mark.parametrize("tiled", [False, True])
def test_one_sample(small_tiles, tiled):  # noqa: F811
    assert_equal_to_naive(torch.tensor([[True, False, True]]), tiled, n=1)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("modalities", [2, 3])
def test_a_mask_that_lacks_nothing_changes_nothing(small_tiles, modalities, tiled):  # noqa: F811
    embeddings = [z.detach().float() for z in random_embeddings(N, modalities)]
    mask = torch.ones(N, modalities, dtype=torch.bool)
    found = loss_and_gradients(objective(tiled, modality_mask=mask), embeddings, SCALE.float())
    assert_equal(found, loss_and_gradients(objective(tiled), embeddings, SCALE.float()), 1e-6)


@pytest.mark.parametrize("tiled", [False, True])
def test_every_pair_without_a_mask(small_tiles, tiled):  # noqa: F811
    pairs = [(0, 1), (2, 0), (1, 2)]
    embeddings, everything = random_embeddings(N, 3), torch.ones(N, 3, dtype=torch.bool)
    found = loss_and_gradients(objective(tiled, pairs=pairs), embeddings, SCALE)
    assert_equal(found, loss_and_gradients(naive_loss(None, everything, pairs), embeddings, SCALE), 1e-10)


@pytest.mark.parametrize("tiled", [False, True])
def test_half_precision_is_computed_in_float32(small_tiles, tiled):  # noqa: F811
    embeddings, mask = [z.detach().bfloat16() for z in random_embeddings(N, 3)], random_mask(N, 3)
    found = loss_and_gradients(objective(tiled, modality_mask=mask), with_nan(embeddings, mask), SCALE.float())
    expected = loss_and_gradients(naive_loss(None, mask), [z.double() for z in embeddings], SCALE)
    torch.testing.assert_close(torch.stack(found[0]).double(), torch.stack(expected[0]), rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(found[1][:-1], expected[1][:-1], strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), reference, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("tiled", [False, True])
def test_compiled_training_meets_masks_of_any_count(small_tiles, tiled):  # noqa: F811
    embeddings = random_embeddings(N, 3)
    compiled = torch.compile(
        lambda z, s, mask: gap_closed_loss(z, s, **WEIGHTS, tiled=tiled, modality_mask=mask), backend="aot_eager"
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            mask = random_mask(N, 3, seed=seed)
            found = loss_and_gradients(lambda z, s, mask=mask: compiled(z, s, mask), embeddings, SCALE)
            assert_equal(found, loss_and_gradients(objective(tiled, modality_mask=mask), embeddings, SCALE), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality_mask": torch.ones(3, 2, dtype=torch.bool)}, r"modality_mask has shape \(3, 2\).*\(4, 3\)"),
        ({"modality_mask": torch.ones(4, dtype=torch.bool)}, r"modality_mask has shape \(4,\)"),
        ({"modality_mask": torch.ones(4, 3)}, "modality_mask has dtype torch.float32: give torch.bool"),
        ({"pairs": []}, "pairs is empty"),
        ({"pairs": [(0, 1), (0, 3)]}, r"pairs has \(0, 3\): .*numbered from 0 to 2"),
        ({"pairs": [(-1, 1)]}, r"pairs has \(-1, 1\)"),
        ({"pairs": [(1, 1)]}, r"pairs has \(1, 1\): a pair is two different modalities"),
        ({"pairs": [(0, 1, 2)]}, r"pairs has \(0, 1, 2\)"),
        ({"pairs": [(0, 1), (1, 0)]}, "pairs has a pair twice"),
    ],
)
def test_wrong_masks_and_pairs(arguments, message):
    with pytest.raises(ValueError, match=message):
        gap_closed_loss(random_embeddings(4, 3), 10.0, **arguments)


def test_centering_by_those_present():
    """The first and the third batch have no row of the modality, and the last a single one, which has no mean."""
    centering, momentum = ProjectionCentering(4, momentum=0.4).double().train(), 0.4
    generator = torch.Generator().manual_seed(0)
    running_mean = torch.zeros(4, dtype=torch.float64)
    masks = [[False] * 5, [True, False, True, True, False], [False] * 5, [False, True] * 3, [True] * 7, [True, False]]
    tracked = 0
    for mask in masks:
        x = torch.randn(len(mask), 4, generator=generator, dtype=torch.float64)
        present = [row for row, is_there in zip(x, mask, strict=True) if is_there]
        mean = sum(present) / len(present) if len(present) > 1 else running_mean
        tracked += len(present) > 1
        if len(present) > 1:
            share = max(1 / tracked, momentum)
            running_mean = (1 - share) * running_mean + share * mean
        mask = torch.tensor(mask)
        centered = centering(x.masked_fill(~mask[:, None], math.nan), mask)
        torch.testing.assert_close(centered[mask], (x - mean)[mask], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(centering.running_mean, running_mean, rtol=1e-12, atol=1e-12)
        assert centering.num_batches_tracked == tracked
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    centering.eval()
    torch.testing.assert_close(centering(x, torch.tensor([True, False, True])), x - running_mean)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_leaves_no_trace_in_the_running_mean(broken):
    """Not even where the next batches are sound."""
    centering = ProjectionCentering(3, momentum=0.5)
    sound = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    centering(sound)
    bad = sound.clone()
    bad[1, 2] = broken
    assert not centering(bad).isfinite().all()  # nothing is hidden from who looks at the loss
    assert centering.running_mean.tolist() == [2.0, 2.0, 2.0] and centering.num_batches_tracked == 1
    centering(sound + 2)
    assert centering.running_mean.tolist() == [3.0, 3.0, 3.0]


def test_gradients_of_centering_are_those_of_the_present_rows_alone():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, weights = torch.tensor([True, False, True, True, False, True]), torch.arange(24.0).reshape(6, 4).double()
    masked, alone = x.masked_fill(~mask[:, None], math.nan).requires_grad_(), x[mask].requires_grad_()
    centered = ProjectionCentering(4, 0.1).train()(masked, mask)
    (centered.masked_fill(~mask[:, None], 0.0).square() * weights).sum().backward()
    mean = sum(alone) / 4
    ((alone - mean).square() * weights[mask]).sum().backward()
    torch.testing.assert_close(masked.grad[mask], alone.grad, rtol=1e-12, atol=1e-12)
    assert not masked.grad[~mask].any()


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1.0), (torch.float16, 300.0)])
def test_centering_of_many_rows_in_half_precision(dtype, value):
    """257 rows are one more than bfloat16 can count, and the sum of their values is beyond float16."""
    centering = ProjectionCentering(1, 0.1).train()
    for rows, mask in ((257, None), (300, torch.arange(300) < 257)):
        centered = centering(torch.full((rows, 1), value, dtype=dtype), mask)
        assert centering.running_mean == value
        assert centered.dtype == dtype and not centered.any()


def test_micro_batches_with_masks_give_the_gradients_of_the_whole_batch():
    """Three heads and their centering, through `encode_in_micro_batches`, against the whole batch and naive loops."""
    n, ids = 10, torch.arange(10) // 2
    mask = random_mask(n, 3)
    inputs = {f"pooled_{m}": z.detach() for m, z in enumerate(random_embeddings(n, 3, seed=1))}
    inputs |= {"group_ids": ids, "modality_mask": mask}
    torch.manual_seed(0)
    heads = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3)).double()

    def encode(**batch):
        return tuple(head(batch[f"pooled_{m}"]) for m, head in enumerate(heads))

    def gradients(features, objective):
        centered = [ProjectionCentering(6, 0.1).train()(x, mask[:, m]) for m, x in enumerate(features)]
        loss = objective([torch.nn.functional.normalize(x, dim=-1) for x in centered])
        return loss.detach(), torch.autograd.grad(loss, list(heads.parameters()))

    micro_batches, popped = MicroBatches.split(inputs, 3).pop("group_ids", "modality_mask")
    assert {name for batch in micro_batches for name in batch} == {"pooled_0", "pooled_1", "pooled_2"}
    features = encode_in_micro_batches(encode, micro_batches, torch.device("cpu"))
    found = gradients(features, lambda z: gap_closed_loss(z, SCALE, **popped, **WEIGHTS).loss)
    groups = [(int(i),) for i in ids]
    expected = gradients(encode(**inputs), lambda z: naive_loss(groups, mask)(z, SCALE)[0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_only_inputs_that_are_there_are_popped():
    micro_batches = MicroBatches([{"input_ids": torch.ones(2), "group_ids": torch.arange(2)}] * 2)
    remaining, popped = micro_batches.pop("modality_mask", "group_ids")
    assert list(popped) == ["group_ids"] and popped["group_ids"].tolist() == [0, 1, 0, 1]
    assert [list(batch) for batch in remaining] == [["input_ids"]] * 2
    assert remaining.pop("modality_mask", "group_ids") == (remaining, {})
