"""Two and four processes do what one process does with the whole batch: gradients, running means, Trainer, train()."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CAPTIONS, tiny_config, tiny_inputs
from processes import run_in_processes
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor, MicroBatches
from gap_closed_clip.data import PairCollator
from gap_closed_clip.data.phantoms import make_phantoms
from gap_closed_clip.model.modeling_gap_closed_clip import GapClosedClipOutput
from gap_closed_clip.model.processing_gap_closed_clip import image_processor_for
from gap_closed_clip.training import GapClosedClipTrainer, GapClosedTrainingArguments, load_config, train
from gap_closed_clip.training.encoder import train_tokenizer


GLOBAL_BATCH, STEPS, SAVED = 8, 20, 17  # 26 pairs: three steps an epoch
# The image and the caption of each pair. Rows 1 and 5 share an image, rows 2 and 6 a caption, always across processes;
# rows 3 and 4 share a caption, across processes or, where rows are unevenly distributed, within one.
GROUPS = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 3], [4, 3], [1, 5], [6, 2], [7, 7]])
CASES = {
    f"{'centered' if centered else 'plain'}-{'groups' if groups else 'all'}": (centered, groups)
    for centered in (True, False)
    for groups in (True, False)
}
TERMS = ("loss", "contrastive_loss", "align_loss", "uniformity_loss")
# For each number of processes: by what the model is wrapped, and whether rows come in micro-batches or are unevenly
# distributed.
SETUPS = {2: ("ddp", "uneven", "micro-batches", "fsdp", "fsdp-micro-batches"), 4: ("ddp", "micro-batches")}


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
    """A model without dropout, whose masks would differ between the processes."""
    torch.manual_seed(1)
    text = tiny_config().text_config.to_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return GapClosedClipModel(tiny_config(**{"text_config": BertConfig(**text), "uniformity_weight": 0.5, **kwargs}))


def step(model, rows: slice, centered: bool, groups: bool, micro_batch: int | None = None) -> GapClosedClipOutput:
    """Two forward passes and, for the second, a backward pass, in float64; in micro-batches of that many rows."""
    for seed in (3, 4):
        inputs = {name: value[rows] for name, value in tiny_inputs(GLOBAL_BATCH, seed).items()}
        inputs["pixel_values"] = inputs["pixel_values"].double()
        if groups:
            inputs["group_ids"] = GROUPS[rows]
        if micro_batch:
            output = model(micro_batches=MicroBatches.split(inputs, micro_batch))
        else:
            output = model(**inputs)
    output.loss.backward()
    return output


def results_of(model, output: GapClosedClipOutput) -> dict[str, torch.Tensor]:
    """Gradients, running means and the terms of the loss, by name."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    running_means = {name: buffer for name, buffer in model.named_buffers() if "centering" in name}
    return gradients | running_means | {term: output[term].detach() for term in TERMS}


def single_process_results(name: str) -> dict[str, torch.Tensor]:
    """The results of one process with the whole batch."""
    model = make_model(center_projections=CASES[name][0]).double().train()
    return results_of(model, step(model, slice(None), *CASES[name]))


def local_results(setup: str, name: str) -> dict[str, torch.Tensor]:
    """The results of this process, one of several, with its rows of the batch."""
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    rows = slice(rank * share, (rank + 1) * share)
    if setup == "uneven":
        rows = slice(0, 3) if rank == 0 else slice(3, GLOBAL_BATCH)
    model = make_model(center_projections=CASES[name][0]).double().train()
    wrapped = model
    if setup.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model.vision_model, model.text_model, model):
            fully_shard(module, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model)
    micro_batch = 2 if setup.endswith("micro-batches") else None
    return results_of(model, step(wrapped, rows, *CASES[name], micro_batch))


def make_trainer(
    folder: Path,
    batch_size: int,
    resume_from: Path | None = None,
    contrastive_batch_size: int | None = None,
    streaming: bool = False,
) -> GapClosedClipTrainer:
    """A Trainer that has trained; its `data_collator.batches` are the image ids of its batches."""
    pairs = make_phantoms(26, seed=2, image_size=32)
    if streaming:
        pairs = pairs.to_iterable_dataset(num_shards=5).shuffle(seed=4, buffer_size=7)
    model = make_model(center_projections=True, align_weight=[[0.0, 1.0], [1.0, 3.0]])
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 64
    args = GapClosedTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        contrastive_batch_size=contrastive_batch_size,
        learning_rate=0.01,
        optim="sgd",  # Adam would scale differences that are only rounding up to a whole step
        logging_steps=1,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collator = PairCollator(GapClosedClipProcessor(image_processor_for(model.vision_model), tokenizer))
    collator = RecordingCollator(collator)
    trainer = GapClosedClipTrainer(model=model, args=args, train_dataset=pairs, data_collator=collator)
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


class RecordingCollator:
    """A collator that records the image ids of its batches."""

    def __init__(self, collator: PairCollator):
        self.collator = collator
        self.batches: list[list[str]] = []

    def __call__(self, rows):
        self.batches.append([row["image_id"] for row in rows])
        return self.collator(rows)


def losses(trainer: GapClosedClipTrainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def run_rank(folder: Path) -> None:
    """What each of the processes runs; it writes its results to files in the folder."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for setup in SETUPS[dist.get_world_size()]:
        for name in CASES:
            save_file(local_results(setup, name), folder / f"{setup}-{name}-{rank}.safetensors")
    if dist.get_world_size() == 2:
        train_in_two(folder, rank)
    dist.destroy_process_group()


def train_in_two(folder: Path, rank: int) -> None:
    """Trains with the Trainer and by `train`, an encoder and then a captioner, as one of two processes."""
    share = GLOBAL_BATCH // 2
    trainers = {"trainer": make_trainer(folder / "trainer", share)}
    trainers["resumed"] = make_trainer(folder / "resumed", share, folder / "trainer" / f"checkpoint-{SAVED}")
    trainers["micro-batches"] = make_trainer(folder / "micro-batches", share // 2, contrastive_batch_size=GLOBAL_BATCH)
    trainers["stream"] = make_trainer(folder / "stream", share, streaming=True)
    trainers["stream-micro-batches"] = make_trainer(
        folder / "stream-micro-batches", share // 2, contrastive_batch_size=GLOBAL_BATCH, streaming=True
    )
    for name, trainer in trainers.items():
        (folder / f"batches-{name}-{rank}.json").write_text(json.dumps(trainer.data_collator.batches))
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        if rank == 0:
            save_file(state | {"losses": losses(trainer)}, folder / f"{name}.safetensors")
    result = train(load_config([folder / "run.yaml"], [f"output_dir={folder / 'run'}"]))
    (folder / f"metrics-{rank}.txt").write_text(str(result.metrics.get("num_pairs")))
    dist.barrier()  # until the other process has saved the model folder
    result = train(load_config([folder / "captioner.yaml"], [f"output_dir={folder / 'captioner'}"]))
    (folder / f"captions-{rank}.txt").write_text(str(result.metrics.get("num_images")))


def run_processes(folder: Path, number: int) -> Path:
    """Runs `run_rank` in that many processes; returns the folder."""
    (folder / "run.yaml").write_text(RUN)
    data_and_training = RUN[RUN.index("data:") :]  # with 9 pairs to evaluate, which two processes can't share evenly
    (folder / "captioner.yaml").write_text(
        f"model:\n  checkpoint: {folder / 'run'}\ncaptioning: {{encoders: joint, max_new_tokens: 4}}\n"
        f"{data_and_training}  predict_with_generate: true\n"
    )
    run_in_processes(__file__, folder, number)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, Path]:
    """The folders with the results of two and of four processes."""
    return {number: run_processes(tmp_path_factory.mktemp(f"of-{number}"), number) for number in SETUPS}


def global_batches(folder: Path, name: str, num_micro_batches: int = 1) -> list[list[str]]:
    """The image ids of each step's batch, both processes and all micro-batches together."""
    by_rank = [json.loads((folder / f"batches-{name}-{rank}.json").read_text()) for rank in range(2)]
    collated = [first + second for first, second in zip(*by_rank, strict=True)]
    steps = range(0, len(collated), num_micro_batches)
    return [sum(collated[start : start + num_micro_batches], []) for start in steps]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("number", "setup"), [(number, setup) for number, setups in SETUPS.items() for setup in setups]
)
def test_gradients_and_running_means_are_those_of_the_whole_batch(results, number, setup, name):
    expected = single_process_results(name)
    assert expected["temperature.logit_scale"].abs() > 1e-3
    assert len([key for key in expected if "centering" in key]) == (4 if CASES[name][0] else 0)
    # The floor is for gradients that are zero but for rounding, because attention or centering cancels them out.
    floor = 1e-9 * torch.stack([tensor.norm() for tensor in expected.values()]).norm().item()
    for rank in range(number):
        found = load_file(results[number] / f"{setup}-{name}-{rank}.safetensors")
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            error = (found[key] - tensor).norm() / tensor.norm().clamp(min=floor)
            tolerance = 1e-10 if key in TERMS or "centering" in key else 1e-6
            assert error < tolerance, f"{key}: relative error {error:.1e}"


def test_the_cases_differ():
    scale_gradients = {round(single_process_results(name)["temperature.logit_scale"].item(), 6) for name in CASES}
    assert len(scale_gradients) == len(CASES)


@pytest.fixture(scope="module")
def single_process_trainer(tmp_path_factory) -> GapClosedClipTrainer:
    return make_trainer(tmp_path_factory.mktemp("single-process"), GLOBAL_BATCH)


def assert_same_training(found: dict[str, torch.Tensor], reference: GapClosedClipTrainer) -> None:
    """Compares weights and "losses" with those of a Trainer."""
    # in float32, whose rounding AdamW carries from step to step: without AVX-512 a loss differs by 1.1e-4
    torch.testing.assert_close(found.pop("losses"), losses(reference), rtol=3e-4, atol=0)
    expected = reference.model.state_dict()
    assert expected["training_progress"] == (STEPS - 1) / STEPS
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "num_micro_batches"), [("trainer", 1), ("micro-batches", 2)])
def test_the_trainer_in_two_processes_takes_the_steps_of_one(results, single_process_trainer, name, num_micro_batches):
    assert_same_training(load_file(results[2] / f"{name}.safetensors"), single_process_trainer)
    batches = global_batches(results[2], name, num_micro_batches)[:STEPS]
    expected = single_process_trainer.data_collator.batches[:STEPS]
    assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in expected]
    assert all(len(set(batch)) == GLOBAL_BATCH for batch in batches)


@pytest.mark.parametrize(("name", "num_micro_batches"), [("stream", 1), ("stream-micro-batches", 2)])
def test_a_stream_in_two_processes_makes_the_steps_of_one(results, tmp_path, name, num_micro_batches):
    """Passes of 26 pairs, of which each leaves out those that fill no batch of both processes."""
    expected = make_trainer(tmp_path, GLOBAL_BATCH, streaming=True)
    assert_same_training(load_file(results[2] / f"{name}.safetensors"), expected)
    batches = global_batches(results[2], name, num_micro_batches)[:STEPS]
    assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in expected.data_collator.batches[:STEPS]]
    assert all(len(batch) == GLOBAL_BATCH for batch in batches)
    passes = [sum(batches[start : start + 3], []) for start in range(0, STEPS - 2, 3)]
    known = Counter(row["image_id"] for row in make_phantoms(26, seed=2, image_size=32))
    assert all(Counter(ids) <= known for ids in passes) and len({tuple(ids) for ids in passes}) == len(passes)


def test_the_trainer_in_micro_batches_takes_the_steps_of_whole_batches(single_process_trainer, tmp_path):
    micro_batched = make_trainer(tmp_path, 2, contrastive_batch_size=GLOBAL_BATCH)
    found = micro_batched.model.state_dict() | {"losses": losses(micro_batched)}
    assert_same_training(found, single_process_trainer)


def test_resumed_processes_meet_the_same_batches(results):
    unbroken, resumed = (load_file(results[2] / f"{name}.safetensors") for name in ("trainer", "resumed"))
    torch.testing.assert_close(resumed["losses"], unbroken["losses"], rtol=1e-6, atol=0)
    expected = global_batches(results[2], "trainer")[SAVED:STEPS]
    assert global_batches(results[2], "resumed")[: STEPS - SAVED] == expected


def test_train_in_two_processes_leaves_one_model_folder(results):
    names = {path.name for path in (results[2] / "run").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "train_config.yaml"}
    assert [(results[2] / f"metrics-{rank}.txt").read_text() for rank in range(2)] == ["9.0", "None"]


def test_a_captioner_and_its_encoders_train_in_two_processes(results):
    names = {path.name for path in (results[2] / "captioner").iterdir()}
    assert names >= {"config.json", "model.safetensors", "captions.jsonl", "captions.png", "metrics.json"}
    assert [(results[2] / f"captions-{rank}.txt").read_text() for rank in range(2)] == ["9.0", "None"]
    before, after = (load_file(results[2] / name / "model.safetensors") for name in ("run", "captioner"))
    changed = [name for name in before if not torch.equal(before[name], after[f"gap_closed_clip.{name}"])]
    assert any("vision_model" in name for name in changed) and any("text_model" in name for name in changed)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
