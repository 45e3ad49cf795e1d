"""
Equal values of a modality, such as equal records, against naive loops: no negatives of one another where that modality
is compared, and negatives where others are. Of two processes as well.

`python this_file folder` is what each process runs; it writes its results to files in the folder.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from modalities import modalities_config, modalities_inputs
from processes import run_in_processes
from safetensors.torch import load_file, save_file
from test_further_terms_gap_closed_clip import BIAS, SCALE, naive_sigmoid, naive_uniformity
from test_losses_gap_closed_clip import loss_and_gradients, random_embeddings
from test_missing_modalities_gap_closed_clip import naive_partial_terms, random_mask, with_nan
from test_tiled_gap_closed_clip import assert_equal

import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip import GapClosedClipModel, MicroBatches
from gap_closed_clip.model.losses_gap_closed_clip import gap_closed_loss


N, MODALITIES = 15, 3
GROUPS = [(i % 12, i // 4) for i in range(N)]
# Modality 1 has two values, modality 2 five, and of modality 0 all are different.
IDS = [(i, i % 2, i % 5) for i in range(N)]
EVERY_PAIR = [(0, 1), (0, 2), (1, 2)]
WEIGHTS = {
    "contrastive_weight": 1.0,
    "align_weight": 0.6,
    "uniformity_weight": 0.4,
    "modality_uniformity_weight": 0.7,
    "cross_uniformity_weight": 1.3,
}


def naive(groups, mask, pairs, with_bias):
    """A function for `loss_and_gradients`, whose last embedding stands for the bias: the loss and its five terms."""

    def groups_with(*modalities):
        return [(*(groups[k] if groups else ()), *(IDS[k][m] for m in modalities)) for k in range(N)]

    def function(inputs, scale):
        *embeddings, bias = inputs
        zero = sum(z.sum() for z in inputs) * 0 + scale * 0
        contrastive, cross, own = [], [], []
        for i, j in pairs:
            both = [k for k in range(N) if mask[k, i] and mask[k, j]]
            if both:
                related = groups_with(i, j)
                x, y = embeddings[i], embeddings[j]
                softmax = naive_partial_terms(embeddings, scale, related, mask, [(i, j)])[0]
                contrastive.append(naive_sigmoid(x, y, scale, bias, both, related) if with_bias else softmax)
                cross.append(naive_uniformity(x, y, both, related))
        for m, z in enumerate(embeddings):
            if samples := [k for k in range(N) if mask[k, m]]:
                own.append(naive_uniformity(z, z, samples, groups_with(m)))
        _, align, uniformity = naive_partial_terms(embeddings, scale, groups, mask, pairs)
        means = [sum(terms) / len(terms) if terms else zero for terms in (contrastive, own, cross)]
        terms = [means[0], align, uniformity, means[1], means[2]]
        return sum(w * term for w, term in zip(WEIGHTS.values(), terms, strict=True)) + zero, *terms

    return function


def ours(groups, mask, pairs, with_bias, **settings):
    ids = None if groups is None else torch.tensor(groups)

    def function(inputs, scale):
        *embeddings, bias = inputs
        found = gap_closed_loss(
            embeddings,
            scale,
            ids,
            modality_mask=mask,
            modality_ids=torch.tensor(IDS),
            pairs=pairs,
            logit_bias=bias if with_bias else None,
            **WEIGHTS,
            **settings,
        )
        zero = 0 * bias
        return found.loss + zero, *(value + zero for value in found[1:])

    return function


@pytest.mark.parametrize("tiled", [False, True], ids=["dense", "tiled"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("lacking", [False, True], ids=["complete", "lacking"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["no groups", "groups"])
@pytest.mark.parametrize("pairs", [None, EVERY_PAIR], ids=["anchor", "every pair"])
def test_value_and_gradients_against_loops(monkeypatch, pairs, groups, lacking, with_bias, tiled):
    monkeypatch.setattr(tiled_module, "CPU_TILE", 4)
    embeddings = [z.detach() for z in random_embeddings(N, MODALITIES)]
    mask = random_mask(N, MODALITIES) if lacking else None
    whole = torch.ones(N, MODALITIES, dtype=torch.bool) if mask is None else mask
    given = embeddings if mask is None else with_nan(embeddings, mask)
    found = loss_and_gradients(ours(groups, mask, pairs, with_bias, tiled=tiled), [*given, BIAS], SCALE)
    expected = naive(groups, whole, pairs or [(0, 1), (0, 2)], with_bias)
    assert_equal(found, loss_and_gradients(expected, [*embeddings, BIAS], SCALE), 1e-10)


@pytest.mark.parametrize("tiled", [False, True], ids=["dense", "tiled"])
def test_records_of_two_values_that_are_told_apart_have_no_loss(tiled):
    """Four women, four men: each image lies on its record. Without the ids log 4 is the least there can be."""
    z = torch.eye(2, dtype=torch.float64)[[k % 2 for k in range(8)]]
    ids = torch.tensor([(k, k % 2) for k in range(8)])
    for modality_ids, expected in ((ids, 0.0), (None, 4.0)):
        loss = gap_closed_loss([z, z], 100.0, modality_ids=modality_ids, tiled=tiled).contrastive_loss
        assert loss.exp().item() - (modality_ids is not None) == pytest.approx(expected, abs=1e-9)


def test_ids_of_another_shape():
    embeddings = random_embeddings(N, MODALITIES)
    with pytest.raises(ValueError, match=r"modality_ids has shape \(15, 2\): give \(N, M\) = \(15, 3\)"):
        gap_closed_loss(embeddings, 10.0, modality_ids=torch.tensor(IDS)[:, :2])
    with pytest.raises(ValueError, match="modality_ids is a list: give a tensor"):
        gap_closed_loss(embeddings, 10.0, modality_ids=IDS)


# --- the model


def batch_of(names: tuple[str, ...] = ("image", "text", "record", "audio")) -> dict[str, torch.Tensor]:
    begins = {"image": "pixel_values", "text": ("input_ids", "attention_mask"), "record": "record", "audio": "audio"}
    inputs = modalities_inputs(8)
    chosen = {name: x for name, x in inputs.items() if any(name.startswith(begins[kind]) for kind in names)}
    ids = torch.tensor([(k, k, k % 2, k % 3) for k in range(8)])
    return chosen | {"modality_ids": ids, "group_ids": torch.arange(8)}


@pytest.mark.parametrize("names", [("image", "text", "record", "audio"), ("image", "record"), ("text", "audio")])
def test_a_model_hands_the_columns_of_what_it_embeds_on(names):
    torch.manual_seed(0)
    model = GapClosedClipModel(modalities_config(anchor=None)).double().eval()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch_of(names).items()}
    outputs = model(**inputs)
    places = [("image", "text", "record", "audio").index(name) for name in names]
    embeds = [outputs.embeds[name] for name in names]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    settings = {**model.objective_weights(), "pairs": pairs, "group_ids": inputs["group_ids"]}
    expected = gap_closed_loss(
        embeds, model.logit_scale.exp(), modality_ids=inputs["modality_ids"][:, places], **settings
    )
    without = gap_closed_loss(embeds, model.logit_scale.exp(), **settings)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert abs(outputs.loss - without.loss) > 1e-3
    model.config.mask_groups = False
    torch.testing.assert_close(
        model(**inputs).loss, gap_closed_loss(embeds, model.logit_scale.exp(), **(settings | {"group_ids": None})).loss
    )


def test_micro_batches_have_the_ids_of_the_whole_batch():
    torch.manual_seed(0)
    model = GapClosedClipModel(modalities_config()).double().eval()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch_of().items()}
    found = model(micro_batches=MicroBatches.split(inputs, 3))
    torch.testing.assert_close(found.loss, model(**inputs).loss)


# --- two processes


CASES = {"complete": (False, False), "lacking": (True, False), "sigmoid": (True, True)}
ENDS = [6, N]


def results_of(name: str, rows: slice, number: int) -> dict[str, torch.Tensor]:
    """Loss, and the gradients of the embeddings of some rows, of a batch that `number` processes hold."""
    lacking, with_bias = CASES[name]
    embeddings = [z.detach()[rows].clone().requires_grad_() for z in random_embeddings(N, MODALITIES)]
    found = gap_closed_loss(
        embeddings,
        SCALE,
        torch.tensor(GROUPS)[rows],
        modality_mask=random_mask(N, MODALITIES)[rows] if lacking else None,
        modality_ids=torch.tensor(IDS)[rows],
        pairs=EVERY_PAIR,
        logit_bias=BIAS if with_bias else None,
        across_processes=number > 1,
        **WEIGHTS,
    )
    found.loss.backward()
    gradients = {f"gradient {m}": z.grad / number for m, z in enumerate(embeddings)}
    return {"loss": found.loss.detach()} | gradients


def run_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    tiled_module.CPU_TILE = 4
    rank = dist.get_rank()
    rows = slice(0 if rank == 0 else ENDS[rank - 1], ENDS[rank])
    for name in CASES:
        save_file(results_of(name, rows, len(ENDS)), folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    run_in_processes(__file__, tmp_path, len(ENDS))
    for name in CASES:
        expected = results_of(name, slice(None), 1)
        parts = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(len(ENDS))]
        for m in range(MODALITIES):
            together = torch.cat([part[f"gradient {m}"] for part in parts])
            torch.testing.assert_close(together, expected[f"gradient {m}"], atol=1e-12, rtol=1e-9)
        for part in parts:
            torch.testing.assert_close(part["loss"], expected["loss"], atol=1e-12, rtol=1e-12)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
