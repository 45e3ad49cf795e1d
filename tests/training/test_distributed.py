"""Two processes do what one does with the whole batch: gradients, running statistics, the Trainer, train()."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CAPTIONS, tiny_config, tiny_inputs
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.data import PairCollator
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.modeling_gap_closed_clip import GapClosedClipOutput
from gap_closed_clip.processing_gap_closed_clip import image_processor_for
from gap_closed_clip.training import GapClosedClipTrainer, GapClosedTrainingArguments, load_config, train
from gap_closed_clip.training.build import train_tokenizer


PROCESSES, GLOBAL_BATCH, STEPS, SAVED = 2, 8, 7, 4  # 26 pairs: three steps an epoch
# Pairs of both processes share an image (1 and 5) or a caption (2 and 6); two of one process share one, too.
GROUPS = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [4, 3], [1, 5], [6, 2], [7, 7]])
CASES = {
    f"{'centred' if centred else 'plain'}-{'groups' if groups else 'all'}": (centred, groups)
    for centred in (True, False)
    for groups in (True, False)
}


RUN = """
model:
  vision:
    architecture: eva02_tiny_patch14_224
    model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300}
  text_pooling: mean
  freeze_text: true
  learnable_temperature: false
  center_projections: true
data:
  phantom_train_pairs: 17
  phantom_validation_pairs: 9
  phantom_size: 32
training:
  max_steps: 2
  per_device_train_batch_size: 4
  eval_strategy: steps
  eval_steps: 2
  final_split: validation
  use_cpu: true
  disable_tqdm: true
  dataloader_pin_memory: false
  report_to: none
"""


def make_model(**kwargs) -> GapClosedClipModel:
    """Without dropout, which draws other masks in every process."""
    torch.manual_seed(1)
    text = tiny_config().text_config.to_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return GapClosedClipModel(tiny_config(**{"text_config": BertConfig(**text), "uniformity_weight": 0.5, **kwargs}))


def step(model, rows: slice, centred: bool, groups: bool) -> tuple[GapClosedClipOutput, dict[str, torch.Tensor]]:
    """Two forward passes, the second one backward: (output, gradients and running statistics), in float64."""
    for seed in (3, 4):
        inputs = {name: value[rows] for name, value in tiny_inputs(GLOBAL_BATCH, seed).items()}
        inputs["pixel_values"] = inputs["pixel_values"].double()
        output = model(**inputs, group_ids=GROUPS[rows] if groups else None)
    output.loss.backward()
    inner = getattr(model, "module", model)
    tensors = {name: parameter.grad for name, parameter in inner.named_parameters()}
    return output, tensors | {name: b for name, b in inner.named_buffers() if "centering" in name}


def make_trainer(folder: Path, batch_size: int, resume_from: Path | None = None) -> GapClosedClipTrainer:
    """A Trainer that has trained; its batches are in `data_collator.batches`."""
    pairs = make_phantoms(26, seed=2, image_size=32)
    model = make_model(center_projections=True, align_weight=[[0.0, 1.0], [1.0, 3.0]])
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 64
    args = GapClosedTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        learning_rate=0.01,
        optim="sgd",  # Adam makes a whole step of what is only rounding
        logging_steps=1,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collator = PairCollator(GapClosedClipProcessor(image_processor_for(model.vision_model), tokenizer))
    trainer = GapClosedClipTrainer(model=model, args=args, train_dataset=pairs, data_collator=Spy(collator))
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


class Spy:
    """A collator that remembers the images of its batches."""

    def __init__(self, collator: PairCollator):
        self.collator = collator
        self.batches: list[list[str]] = []

    def __call__(self, rows):
        self.batches.append([row["image_id"] for row in rows])
        return self.collator(rows)


def losses(trainer: GapClosedClipTrainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def work(folder: Path) -> None:
    """What each of the two processes does; the results go to files."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = GLOBAL_BATCH // PROCESSES
    rows = slice(rank * share, (rank + 1) * share)
    for name, case in CASES.items():
        model = DistributedDataParallel(make_model(center_projections=case[0]).double().train())
        output, tensors = step(model, rows, *case)
        terms = {term: output[term].detach() for term in ("loss", "contrastive_loss", "align_loss", "uniformity_loss")}
        save_file(tensors | terms, folder / f"{name}-{rank}.safetensors")
    trainer = make_trainer(folder / "trainer", share)
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    resumed = make_trainer(folder / "resumed", share, resume_from=folder / "trainer" / f"checkpoint-{SAVED}")
    if rank == 0:
        save_file(state | {"losses": losses(trainer), "resumed": losses(resumed)}, folder / "trainer.safetensors")
    batches = {"trainer": trainer.data_collator.batches, "resumed": resumed.data_collator.batches}
    (folder / f"batches-{rank}.json").write_text(json.dumps(batches))
    result = train(load_config([folder / "run.yaml"], [f"output_dir={folder / 'run'}"]))
    (folder / f"metrics-{rank}.txt").write_text(str(result.metrics.get("num_pairs")))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder that two processes wrote to."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "run.yaml").write_text(RUN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(PROCESSES),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
    return folder


def global_batches(results: Path, name: str) -> list[list[str]]:
    """Image ids of the batches of both processes together."""
    both = [json.loads((results / f"batches-{rank}.json").read_text())[name] for rank in range(PROCESSES)]
    return [[image for half in halves for image in half] for halves in zip(*both, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_averaged_gradients_are_those_of_the_whole_batch(results, name):
    model = make_model(center_projections=CASES[name][0]).double().train()
    output, expected = step(model, slice(None), *CASES[name])
    assert "logit_scale" in expected and expected["logit_scale"].abs() > 1e-3
    whole = torch.stack([tensor.norm() for tensor in expected.values()]).norm().item()
    for rank in range(PROCESSES):
        found = load_file(results / f"{name}-{rank}.safetensors")
        for term in ("loss", "contrastive_loss", "align_loss", "uniformity_loss"):
            torch.testing.assert_close(found[term], output[term].detach(), rtol=1e-10, atol=1e-12)
        assert expected.keys() <= found.keys()
        for key, tensor in expected.items():
            # Below the floor is the rounding of gradients that are zero: what attention or the centring cancels out.
            floor = 1e-9 * whole
            error = (found[key] - tensor).norm() / tensor.norm().clamp(min=floor)
            assert error < 1e-6, f"{key}: relative error {error:.1e}"


def test_running_statistics_are_those_of_the_whole_batch(results):
    _, expected = step(make_model(center_projections=True).double().train(), slice(None), True, True)
    names = [name for name in expected if "centering" in name]
    assert len(names) == 4
    for rank in range(PROCESSES):
        found = load_file(results / f"centred-groups-{rank}.safetensors")
        for name in names:
            assert expected[name].abs().max() > 0
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_the_cases_differ():
    gradients = [
        step(make_model(center_projections=case[0]).double().train(), slice(None), *case)[1]["logit_scale"].item()
        for case in CASES.values()
    ]
    assert len({round(gradient, 6) for gradient in gradients}) == len(CASES)


def test_the_trainer_in_two_processes_takes_the_steps_of_one(results, tmp_path):
    trainer = make_trainer(tmp_path, GLOBAL_BATCH)
    found = load_file(results / "trainer.safetensors")
    torch.testing.assert_close(found.pop("losses"), losses(trainer), rtol=1e-4, atol=0)
    expected = trainer.model.state_dict()
    assert expected["training_progress"] == (STEPS - 1) / STEPS
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    batches = global_batches(results, "trainer")[:STEPS]
    assert batches == trainer.data_collator.batches[:STEPS]
    assert all(len(set(batch)) == GLOBAL_BATCH for batch in batches)


def test_resumed_processes_meet_the_same_batches(results):
    found = load_file(results / "trainer.safetensors")
    torch.testing.assert_close(found["resumed"], found["losses"], rtol=1e-6, atol=0)
    expected = global_batches(results, "trainer")[SAVED:STEPS]
    assert global_batches(results, "resumed")[: STEPS - SAVED] == expected


def test_train_in_two_processes_leaves_one_model_folder(results):
    names = {path.name for path in (results / "run").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "train_config.yaml"}
    assert [(results / f"metrics-{rank}.txt").read_text() for rank in range(PROCESSES)] == ["9.0", "None"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
