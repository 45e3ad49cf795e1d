"""What a batch tells of the space, of every two modalities, and when there is something to warn of."""

import dataclasses
import re

import pytest
import torch
from conftest import tiny_config, tiny_inputs

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.model.outputs_gap_closed_clip import GapClosedClipOutput
from gap_closed_clip.training import GapClosedClipTrainer
from gap_closed_clip.training.diagnostics import RunningMeans, batch_diagnostics, warning_of


def missing_output() -> tuple[GapClosedClipOutput, torch.Tensor]:
    """Eight samples of three modalities, of which the fourth, sixth and seventh lack some; and the mask (8, 3)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[3, 0] = mask[5, 1] = mask[6, 2] = mask[7, 2] = False
    embeds = torch.nn.functional.normalize(torch.randn(3, 8, 5, generator=generator), dim=-1) * mask.T.unsqueeze(-1)
    terms = {name: torch.tensor(1.0) for name in ("contrastive_loss", "align_loss", "uniformity_loss")}
    outputs = GapClosedClipOutput(
        **terms,
        image_embeds=embeds[0],
        text_embeds=embeds[1],
        further_embeds={"record": embeds[2]},
        modality_mask=mask,
    )
    return outputs, mask


def test_diagnostics_of_every_two_modalities_are_those_of_naive_loops():
    outputs, mask = missing_output()
    found = batch_diagnostics(outputs)
    embeds = {name: z.double() for name, z in outputs.embeds.items()}
    for (i, first), (j, second) in [
        ((0, "image"), (1, "text")),
        ((0, "image"), (2, "record")),
        ((1, "text"), (2, "record")),
    ]:
        suffix = "" if j == 1 else f"_{first}_{second}"
        both = [row for row in range(8) if mask[row, i] and mask[row, j]]
        x, y = embeds[first], embeds[second]
        true = [float(x[row] @ y[row]) for row in both]
        random = [float(x[a] @ y[b]) for a in both for b in both if a != b]
        gap = (x[both].mean(0) - y[both].mean(0)).norm()
        assert found[f"true_pair_cosine{suffix}"] == pytest.approx(sum(true) / len(true), abs=1e-6)
        assert found[f"random_pair_cosine{suffix}"] == pytest.approx(sum(random) / len(random), abs=1e-6)
        assert found[f"modality_gap{suffix}"] == pytest.approx(float(gap), abs=1e-6)
    for column, (name, z) in enumerate(embeds.items()):
        rows = [row for row in range(8) if mask[row, column]]
        inside = [float(z[a] @ z[b]) for a in rows for b in rows if a != b]
        assert found[f"mean_cosine_{name}"] == pytest.approx(sum(inside) / len(inside), abs=1e-6)


def test_batches_without_a_pair_have_no_part_in_the_means():
    outputs, _ = missing_output()
    empty = dataclasses.replace(outputs, further_embeds={"record": torch.zeros(8, 5)})
    assert batch_diagnostics(empty)["true_pair_cosine_image_record"].isnan()
    means = RunningMeans()
    means.add(batch_diagnostics(empty))
    assert "true_pair_cosine_image_record" not in means.take()
    for batch in (outputs, empty, outputs):
        means.add(batch_diagnostics(batch))
    expected = batch_diagnostics(outputs)["true_pair_cosine_image_record"]
    found = means.take()
    assert found["true_pair_cosine_image_record"] == pytest.approx(float(expected), abs=1e-6)
    assert means.take() == {}
    means.add({"contrastive_loss": torch.tensor(float("nan"))})
    assert means.take()["contrastive_loss"] != means.take().get("contrastive_loss")  # a NaN of the loss is seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"random_pair_cosine_text_record": 0.7},
            "collapsing: random pairs of text and record have a mean cosine of 0.70",
        ),
        (
            {"true_pair_cosine_image_record": 0.1},
            "scattered: true pairs of image and record have .* 0.10 after 60% .*If record",
        ),
        ({"true_pair_cosine": 0.1}, r"scattered: true pairs have a mean cosine of only 0.10 .*uniformity_weight\.$"),
        ({}, None),
    ],
)
def test_a_collapse_or_scatter_of_any_two_modalities_is_told(changes, message):
    pairs = ("", "_image_record", "_text_record")
    means = {
        f"{kind}_pair_cosine{suffix}": value for suffix in pairs for kind, value in (("true", 0.6), ("random", 0.1))
    }
    found = warning_of({**means, "align_weight": 1.0, **changes}, ("image", "text", "record"), 0.6)
    assert found is None if message is None else re.search(message, found)


def test_the_gradients_are_checked_in_the_first_batch_that_has_every_modality():
    """An adapter of a modality that no sample of a batch has gets zeros, and is none the worse."""
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:, 2] = False
    shows = GapClosedClipTrainer._shows_every_gradient
    assert not shows(None, None, {"modality_mask": mask})
    assert shows(None, None, {"micro_batches": [{"modality_mask": mask}, {"modality_mask": ~mask}]})
    assert shows(None, None, {"modality_mask": torch.ones(4, 3, dtype=torch.bool)}) and shows(None, None, {})


def test_two_modalities_have_the_diagnostics_that_they_had():
    model = GapClosedClipModel(tiny_config())
    found = batch_diagnostics(model(**tiny_inputs(4)))
    assert list(found) == [
        *("contrastive_loss", "align_loss", "uniformity_loss"),
        *("modality_gap", "true_pair_cosine", "random_pair_cosine", "mean_cosine_image", "mean_cosine_text"),
    ]
