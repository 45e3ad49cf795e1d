"""Uniformity in and between modalities, and the sigmoid loss, against naive loops in float64, dense and in tiles."""

import math

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from test_losses_gap_closed_clip import loss_and_gradients, random_embeddings
from test_missing_modalities_gap_closed_clip import MASKS, random_mask, with_nan
from test_tiled_gap_closed_clip import LargestTensor, assert_equal

import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel, MicroBatches
from gap_closed_clip.model.losses_gap_closed_clip import FURTHER_TERMS, gap_closed_loss


N, TILE = 15, 4
SCALE, BIAS = (torch.tensor(x, dtype=torch.float64) for x in (12.0, -7.0))
WEIGHTS = {
    "align_weight": 0,
    "uniformity_weight": 0,
    "modality_uniformity_weight": 0.7,
    "cross_uniformity_weight": 1.3,
}
GROUPS = {"none": None, "two columns": [(i % 12, i // 4) for i in range(N)], "one group": [(0,)] * N}


@pytest.fixture(params=[False, True], ids=["dense", "tiled"])
def tiled(request, monkeypatch) -> bool:
    monkeypatch.setattr(tiled_module, "CPU_TILE", TILE)
    return request.param


def related(groups, i: int, j: int) -> bool:
    return groups is not None and any(a == b for a, b in zip(groups[i], groups[j], strict=True))


def naive_uniformity(x, y, samples, groups) -> torch.Tensor:
    """log mean over i != j of exp(-2 |x_i - y_j|^2); 0 without a pair."""
    pairs = [(i, j) for i in samples for j in samples if i != j and not related(groups, i, j)]
    values = [torch.exp(-2 * ((x[i] - y[j]) ** 2).sum()) for i, j in pairs]
    return torch.log(sum(values) / len(values)) if values else x.sum() * 0


def naive_sigmoid(x, y, scale, bias, samples, groups) -> torch.Tensor:
    """-1/N sum_ij log sigmoid(y_ij (t x_i . y_j + b)), by 1 / (1 + exp(-...))."""
    total = x.sum() * 0
    for i in samples:
        for j in samples:
            if i == j or not related(groups, i, j):
                label = 1 if i == j else -1
                total = total - torch.log(1 / (1 + torch.exp(-label * (scale * (x[i] * y[j]).sum() + bias))))
    return total / len(samples)


def naive_terms(embeddings, scale, bias, groups, mask, pairs):
    """The sigmoid loss, uniformity of the modalities and between them: means over what any sample has."""
    n, modalities = mask.shape
    zero = sum(z.sum() for z in embeddings) * 0 + (scale + bias) * 0

    def mean(values):
        return (sum(values) / len(values) if values else 0) + zero

    has = {
        (i, j): [k for k in range(n) if mask[k, i] and mask[k, j]]
        for i in range(modalities)
        for j in range(modalities)
    }
    compared = [(i, j) for i, j in pairs if has[i, j]]
    own = [naive_uniformity(z, z, has[m, m], groups) for m, z in enumerate(embeddings) if has[m, m]]
    cross = [naive_uniformity(embeddings[i], embeddings[j], has[i, j], groups) for i, j in compared]
    sigmoid = [naive_sigmoid(embeddings[i], embeddings[j], scale, bias, has[i, j], groups) for i, j in compared]
    return mean(sigmoid), mean(own), mean(cross)


def naive(groups, mask, pairs):
    """A function for `loss_and_gradients`, whose last embedding stands for the bias."""

    def function(inputs, scale):
        *embeddings, bias = inputs
        terms = naive_terms(embeddings, scale, bias, groups, mask, pairs)
        return terms[0] + 0.7 * terms[1] + 1.3 * terms[2], *terms

    return function


def ours(tiled, groups, mask, pairs):
    ids = None if groups is None else torch.tensor(groups)

    def function(inputs, scale):
        *embeddings, bias = inputs
        found = gap_closed_loss(
            embeddings, scale, ids, tiled=tiled, modality_mask=mask, pairs=pairs, logit_bias=bias, **WEIGHTS
        )
        return found.loss, found.contrastive_loss, found.modality_uniformity_loss, found.cross_uniformity_loss

    return function


def assert_equal_to_naive(tiled, modalities, groups=None, mask=None, pairs=None, n=N):
    embeddings = [z.detach() for z in random_embeddings(n, modalities)]
    whole = torch.ones(n, modalities, dtype=torch.bool) if mask is None else mask
    named = pairs or [(0, m) for m in range(1, modalities)]
    given = embeddings if mask is None else with_nan(embeddings, mask)
    found = loss_and_gradients(ours(tiled, groups, mask, pairs), [*given, BIAS], SCALE)
    assert_equal(found, loss_and_gradients(naive(groups, whole, named), [*embeddings, BIAS], SCALE), 1e-10)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_value_and_gradients_against_loops(tiled, modalities, groups):
    assert_equal_to_naive(tiled, modalities, GROUPS[groups])


@pytest.mark.parametrize("pairs", [None, [(0, 1), (0, 2), (1, 2)]])
@pytest.mark.parametrize("groups", ["none", "two columns"])
def test_where_samples_lack_modalities(tiled, groups, pairs):
    assert_equal_to_naive(tiled, 3, GROUPS[groups], random_mask(N, 3), pairs)


@pytest.mark.parametrize("name", ["one sample has it", "nobody has it", "nobody has anything", "some have nothing"])
def test_few_samples_or_none_have_a_modality(tiled, name):
    mask = MASKS[name]
    assert_equal_to_naive(tiled, 3, None, mask, n=len(mask))


def test_one_sample(tiled):
    assert_equal_to_naive(tiled, 2, n=1)


def test_sigmoid_by_hand(tiled):
    # Two pairs, cosines 1 on the diagonal and 0 off it, t = 2, b = -1: logits 1 and -1, both losses log(1 + exp(-1)).
    z = torch.eye(2, dtype=torch.float64)
    found = gap_closed_loss([z, z], 2.0, logit_bias=-1.0, tiled=tiled)
    assert found.contrastive_loss.item() == pytest.approx(4 * math.log1p(math.exp(-1)) / 2, rel=1e-12)


def test_large_logits_stay_finite_and_small_losses_exact(tiled):
    """Of scale 100 the true pairs have a logit of 90 and a loss of exp(-90), the others one of -110."""
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (100.0, -10.0))
    loss = gap_closed_loss(
        [first, first], scale, align_weight=0, uniformity_weight=0, logit_bias=bias, tiled=tiled
    ).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-90), rel=1e-4)
    assert all(x.grad.isfinite().all() for x in (first, scale, bias))


def test_sigmoid_is_the_loss_of_transformers_siglip():
    image, text = random_embeddings(9, 2)
    labels = 2 * torch.eye(9, dtype=torch.float64) - 1
    expected = -torch.nn.functional.logsigmoid(labels * (10 * text @ image.T - 10)).sum(-1).mean()
    torch.testing.assert_close(gap_closed_loss([image, text], 10.0, logit_bias=-10.0).contrastive_loss, expected)


def test_no_matrix_is_larger_than_a_tile(monkeypatch):
    monkeypatch.setattr(tiled_module, "CPU_TILE", 16)
    n, inputs = 160, [z.detach().float().requires_grad_() for z in random_embeddings(160, 2, dim=4)]
    for tiled, most in ((False, n * n), (True, n * 4)):
        with LargestTensor() as largest:
            bias = torch.tensor(-10.0, requires_grad=True)
            gap_closed_loss(inputs, 10.0, torch.arange(n), logit_bias=bias, **WEIGHTS, tiled=tiled).loss.backward()
        assert largest.elements == most


@pytest.mark.parametrize("fixed", range(4))
def test_what_needs_no_gradient_gets_none(tiled, fixed):
    inputs = [*(z.detach() for z in random_embeddings(N, 2)), SCALE, BIAS]
    gradients = {}
    for locked in (None, fixed):
        leaves = [x.clone().requires_grad_(place != locked) for place, x in enumerate(inputs)]
        gap_closed_loss(leaves[:2], leaves[2], logit_bias=leaves[3], **WEIGHTS, tiled=tiled).loss.backward()
        gradients[locked] = [x.grad for x in leaves]
    assert gradients[fixed][fixed] is None
    for place in set(range(4)) - {fixed}:
        torch.testing.assert_close(gradients[fixed][place], gradients[None][place], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("used", [(), FURTHER_TERMS[:1], FURTHER_TERMS[1:], FURTHER_TERMS])
def test_terms_of_weight_zero_are_not_computed(tiled, used):
    embeddings = random_embeddings(N, 2)
    found = gap_closed_loss(embeddings, SCALE, tiled=tiled, **{f"{name}_weight": 2.0 for name in used})._asdict()
    plain = gap_closed_loss(embeddings, SCALE, tiled=tiled)
    further = {name: value for name, value in found.items() if name not in plain._fields and value is not None}
    assert list(further) == [f"{name}_loss" for name in used]
    assert torch.equal(sum((2 * value for value in further.values()), plain.loss), found["loss"])


@pytest.mark.parametrize("bias", [math.nan, torch.zeros(2)])
def test_wrong_bias(bias):
    with pytest.raises(ValueError, match="logit_bias"):
        gap_closed_loss(random_embeddings(3, 2), 1.0, logit_bias=bias)


# --- the model


def all_terms(**kwargs) -> GapClosedClipModel:
    torch.manual_seed(0)
    weights = {"modality_uniformity_weight": [[0.0, 1.0], [1.0, 3.0]], "cross_uniformity_weight": 0.5}
    return GapClosedClipModel(tiny_config(contrastive_loss="sigmoid", **weights, **kwargs))


def test_the_models_loss_is_that_of_its_embeddings_and_parameters():
    model, inputs = all_terms().eval(), tiny_inputs(5)
    model.set_training_progress(0.25)
    output = model(**inputs, group_ids=torch.tensor([0, 1, 0, 2, 3]))
    z = [output.image_embeds.double(), output.text_embeds.double()]
    scale, bias = model.logit_scale.double().exp(), torch.tensor(-10.0, dtype=torch.float64)
    groups, mask = [(0,), (1,), (0,), (2,), (3,)], torch.ones(5, 2, dtype=torch.bool)
    sigmoid, own, cross = naive_terms(z, scale, bias, groups, mask, [(0, 1)])
    found = [output.contrastive_loss, output.modality_uniformity_loss, output.cross_uniformity_loss]
    torch.testing.assert_close(
        torch.stack(found).double(), torch.stack([sigmoid, own, cross]).flatten(), rtol=1e-5, atol=1e-6
    )
    expected = sigmoid + output.align_loss + output.uniformity_loss + 1.5 * own + 0.5 * cross
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(output.logits_per_image.double(), scale * z[0] @ z[1].T + bias, rtol=1e-5, atol=1e-5)


def test_micro_batches_take_the_same_step():
    losses, gradients = [], []
    for size in (None, 2):
        model, inputs = all_terms().double().train(), tiny_inputs(6)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        given = {"micro_batches": MicroBatches.split(inputs, size)} if size else inputs
        losses.append(model(**given).loss)
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert gradients[0]["temperature.logit_bias"].abs() > 0


def test_the_bias_is_a_parameter_with_the_sigmoid_alone(tmp_path):
    plain, model = GapClosedClipModel(tiny_config()), all_terms()
    assert set(model.state_dict()) - set(plain.state_dict()) == {"temperature.logit_bias"}
    assert plain.logit_bias == 0 and model.logit_bias.item() == -10
    assert all_terms(logit_bias=-12.5).logit_bias.item() == -12.5
    model.temperature.logit_bias.data.fill_(-3.0)
    model.save_pretrained(tmp_path)
    reloaded = GapClosedClipModel.from_pretrained(tmp_path).eval()
    assert reloaded.logit_bias.item() == -3.0
    torch.testing.assert_close(reloaded(**tiny_inputs()).loss, model.eval()(**tiny_inputs()).loss)


def test_a_trained_model_goes_on_with_another_contrastive_loss(tmp_path):
    GapClosedClipModel(tiny_config()).save_pretrained(tmp_path)
    model = GapClosedClipModel.from_pretrained(tmp_path, contrastive_loss="sigmoid")
    assert model.logit_bias.item() == -10
    model.config.contrastive_loss = "softmax"
    with pytest.raises(ValueError, match="contrastive_loss is 'softmax', and the model was built for another"):
        model(**tiny_inputs())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contrastive_loss": "hinge"}, "contrastive_loss is 'hinge': use one of softmax, sigmoid"),
        ({"modality_uniformity_weight": -1.0}, "modality_uniformity_weight is -1.0: use a number of 0 or more"),
        ({"cross_uniformity_weight": [[0.5, 1.0], [0.2, 1.0]]}, "cross_uniformity_weight is .* rise strictly"),
        ({"cross_uniformity_weight": math.nan}, "cross_uniformity_weight is nan"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        GapClosedClipConfig(**fields)
