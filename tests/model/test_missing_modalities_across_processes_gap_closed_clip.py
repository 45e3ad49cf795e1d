"""
Two and four processes whose samples lack modalities, against naive loops over the whole batch in one process.

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
from test_further_terms_gap_closed_clip import naive_terms as naive_further_terms
from test_losses_gap_closed_clip import WEIGHTS, random_embeddings
from test_missing_modalities_gap_closed_clip import naive_partial_terms, random_mask
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig

import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip import GapClosedClipModel, MicroBatches
from gap_closed_clip.model.losses_gap_closed_clip import gap_closed_loss, unit_vectors
from gap_closed_clip.model.projection_gap_closed_clip import ProjectionCentering


N, MODALITIES, DIM = 22, 4, 6
# Which rows each process holds: those up to its number, from the one before.
SHARES = {2: [5, N], 4: [7, 9, 10, N]}
# Two columns of groups, some of which are shared by rows of several processes.
GROUPS = [(i % 17, (N - i) // 2) for i in range(N)]
EVERY_PAIR = [(i, j) for i in range(MODALITIES) for j in range(i + 1, MODALITIES)]
TERMS = ("contrastive_loss", "align_loss", "uniformity_loss")
# The sigmoid loss, and uniformity in and between modalities.
FURTHER = {
    "align_weight": 0,
    "uniformity_weight": 0,
    "modality_uniformity_weight": 0.7,
    "cross_uniformity_weight": 1.3,
}
FURTHER_TERMS = ("contrastive_loss", "modality_uniformity_loss", "cross_uniformity_loss")
NO_SIDE_TERMS = dict(zip(WEIGHTS, (1.0, 0, 0), strict=True))


def mask_of(name: str) -> torch.Tensor:
    """(N, M), bool; the anchor is modality 0. The first process always holds rows 0 to 4."""
    if name == "random":
        return random_mask(N, MODALITIES)
    if name == "nobody lacks anything":
        return torch.ones(N, MODALITIES, dtype=torch.bool)
    mask = random_mask(N, MODALITIES, share=0.8, seed=1)
    first = torch.arange(N) < 5
    changes = {
        "one process lacks a modality": lambda: mask[:, 2].masked_fill_(first, False),
        "one process alone has a modality": lambda: mask[:, 2].copy_(first),
        "one process lacks the anchor": lambda: mask[:, 0].masked_fill_(first, False),
        "one process has nothing": lambda: mask.masked_fill_(first[:, None], False),
        "one sample has a modality": lambda: mask[:, 3].copy_(torch.arange(N) == 6),
        "nobody has a modality": lambda: mask[:, 1].fill_(False),
        "nobody has a pair": lambda: mask[:, 1].copy_(~mask[:, 0]),
        "nobody has anything": lambda: mask.fill_(False),
    }
    changes[name]()
    return mask


# By name: the mask, whether there are groups, the pairs, the weights.
CASES = {
    "random": ("random", True, None, WEIGHTS),
    "every pair": ("random", False, EVERY_PAIR, WEIGHTS),
    **{
        name: (name, False, None, WEIGHTS)
        for name in (
            "one process lacks a modality",
            "one process alone has a modality",
            "one process lacks the anchor",
            "one process has nothing",
            "one sample has a modality",
            "nobody has a modality",
            "nobody has a pair",
            "nobody has anything",
        )
    },
    "contrastive alone": ("nobody has a modality", True, EVERY_PAIR, NO_SIDE_TERMS),
    "further terms": ("random", True, EVERY_PAIR, FURTHER),
    "further terms, one process has nothing": ("one process has nothing", False, None, FURTHER),
    "further terms, nobody has anything": ("nobody has anything", False, None, FURTHER),
    "further terms, nobody lacks anything": ("nobody lacks anything", True, None, FURTHER),
}


class Heads(torch.nn.Module):
    """A linear head for each modality, centered, and a scale. `forward` gives the loss and its terms."""

    def __init__(self, with_bias: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(DIM, DIM) for _ in range(MODALITIES)).double()
        self.centerings = torch.nn.ModuleList(ProjectionCentering(DIM, 0.1).double() for _ in range(MODALITIES))
        self.scale = torch.nn.Parameter(torch.tensor(14.0, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.tensor(-9.0, dtype=torch.float64)) if with_bias else None

    def forward(self, inputs, group_ids, mask, pairs, weights, no_mask=False):
        features = [head(x) for head, x in zip(self.heads, inputs, strict=True)]
        features = [center(x, has) for center, x, has in zip(self.centerings, features, mask.T, strict=True)]
        embeddings = [unit_vectors(x) for x in features]
        weights = {**weights, "logit_bias": self.bias, "modality_mask": None if no_mask else mask}
        return gap_closed_loss(embeddings, self.scale, group_ids, **weights, across_processes=True, pairs=pairs)


def inputs_of(seed: int) -> list[torch.Tensor]:
    return [z.detach() for z in random_embeddings(N, MODALITIES, DIM, seed)]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def local_results(name: str, rows: slice) -> dict[str, torch.Tensor]:
    """What this process gets from its rows in the second of two steps, by name."""
    mask, groups, pairs, weights = CASES[name]
    no_mask = mask == "nobody lacks anything"
    mask, ids = mask_of(mask), torch.tensor(GROUPS) if groups else None
    model = Heads(with_bias=weights is FURTHER).train()
    wrapped = DistributedDataParallel(model)
    for seed in (1, 2):
        model.zero_grad()
        inputs = [x[rows] for x in inputs_of(seed)]
        losses = wrapped(inputs, None if ids is None else ids[rows], mask[rows], pairs, weights, no_mask)
        losses.loss.backward()
    terms = {term: getattr(losses, term).detach() for term in (FURTHER_TERMS if weights is FURTHER else TERMS)}
    return gradients_of(model) | dict(model.named_buffers()) | terms


def naive_results(name: str) -> dict[str, torch.Tensor]:
    """The same from the whole batch in one process, by naive means and loops."""
    mask, groups, pairs, weights = CASES[name]
    mask, model = mask_of(mask), Heads(with_bias=weights is FURTHER)
    running_means = {m: torch.zeros(DIM, dtype=torch.float64) for m in range(MODALITIES)}
    for step, seed in enumerate((1, 2), start=1):
        model.zero_grad()
        embeddings = []
        for m, (head, x) in enumerate(zip(model.heads, inputs_of(seed), strict=True)):
            features = head(x)
            present = [row for row, has in zip(features, mask[:, m], strict=True) if has]
            mean = running_means[m]
            if len(present) > 1:  # one row alone would be its own mean, and nothing left of it
                mean = sum(present) / len(present)
                running_means[m] = running_means[m] + (mean.detach() - running_means[m]) / step
            centered = features - mean if present else features * 0
            embeddings.append(torch.stack([row / row.norm() if row.norm() > 0 else row * 0 for row in centered]))
        groups_of = GROUPS if groups else None
        if weights is FURTHER:
            named = pairs or [(0, m) for m in range(1, MODALITIES)]
            terms = naive_further_terms(embeddings, model.scale, model.bias, groups_of, mask, named)
            (terms[0] + 0.7 * terms[1] + 1.3 * terms[2]).backward()
        else:
            terms = naive_partial_terms(embeddings, model.scale, groups_of, mask, pairs)
            sum(weight * term for weight, term in zip(weights.values(), terms, strict=True)).backward()
    means = {f"centerings.{m}.running_mean": mean for m, mean in running_means.items()}
    counts = {f"centerings.{m}.num_batches_tracked": 2.0 * (mask[:, m].sum() > 1) for m in range(MODALITIES)}
    names = FURTHER_TERMS if weights is FURTHER else TERMS
    return gradients_of(model) | means | counts | {term: x.detach() for term, x in zip(names, terms, strict=True)}


def model_results(rows: slice, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    """Gradients, running means and terms of a whole model's second step with these rows of the batch."""
    text = modalities_config().text_config.to_dict() | {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(1)
    config = modalities_config(text_config=BertConfig(**text), center_projections=True, anchor=None)
    model = GapClosedClipModel(config).double().train()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    mask = mask_of("one process alone has a modality")
    for seed in (1, 2):
        model.zero_grad()
        inputs = modalities_inputs(N, seed) | {"group_ids": torch.tensor(GROUPS), "modality_mask": mask}
        inputs = {name: x[rows].double() if x.is_floating_point() else x[rows] for name, x in inputs.items()}
        split = {"micro_batches": MicroBatches.split(inputs, micro_batch)} if micro_batch else inputs
        outputs = wrapped(**split)
        outputs.loss.backward()
    buffers = {name: buffer for name, buffer in model.named_buffers() if "centering" in name}
    return gradients_of(model) | buffers | {term: outputs[term].detach() for term in TERMS}


def run_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ends = dist.get_rank(), SHARES[dist.get_world_size()]
    rows = slice(0 if rank == 0 else ends[rank - 1], ends[rank])
    tiled_module.CPU_TILE = 4
    for name in CASES:
        save_file(local_results(name, rows), folder / f"{name}-{rank}.safetensors")
    for micro_batch in (None, 3):
        save_file(model_results(rows, micro_batch), folder / f"model {micro_batch}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, Path]:
    """The folders with the results of two and of four processes."""
    folders = {number: tmp_path_factory.mktemp(f"of-{number}") for number in SHARES}
    for number, folder in folders.items():
        run_in_processes(__file__, folder, number)
    return folders


@pytest.fixture(scope="module")
def whole_model() -> dict[str, torch.Tensor]:
    return model_results(slice(None))


def assert_equal(folder: Path, name: str, number: int, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compares the results of every process by relative error; the floor is for zeros up to rounding."""
    floor = 1e-4 * torch.stack([torch.as_tensor(x).double().norm() for x in expected.values()]).norm().clamp(min=1)
    for rank in range(number):
        found = load_file(folder / f"{name}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for key, reference in expected.items():
            reference = torch.as_tensor(reference).to(found[key])
            error = (found[key] - reference).norm() / reference.norm().clamp(min=floor)
            assert error < tolerance, f"{key} of process {rank}: relative error {error:.1e}"


@pytest.mark.parametrize("number", SHARES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_means_and_terms_are_those_of_loops_over_the_whole_batch(results, name, number):
    assert_equal(results[number], name, number, naive_results(name), 1e-10)


@pytest.mark.parametrize("number", SHARES)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_model_takes_the_step_of_one_process(results, whole_model, micro_batch, number):
    assert_equal(results[number], f"model {micro_batch}", number, whole_model, 1e-7)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
