"""
A whole training step (forward, backward, AdamW) of ours and of open_clip with the same towers, in one piece and in
micro-batches: images per second, peak memory, and the share of what the machine can compute.

    python benchmarks/training.py                       # the default preset; benchmarks/results/training_*.md
    python benchmarks/training.py --memory-sweep        # and peak memory over the size of the contrastive batch
    python benchmarks/training.py --preset eva_giant --batch 256 --gradient-checkpointing
    python benchmarks/training.py --preset eva_giant --contrastive-batch 32768 --repeats 1 --steps 1 \\
        --methods ours "ours, micro-batches"

Weights, pixels and token ids are random; nothing is downloaded. Every round builds each method's model anew, so that
only one model at a time is in memory.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from measure import (
    RESULTS,
    PeakMemory,
    available_memory,
    clock,
    device_slug,
    free_memory,
    header,
    in_fresh_process,
    in_turn,
    markdown_table,
    megabytes,
    memory_words,
    write_report,
)
from random_towers import DIM, PRESETS, Batch, Settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_methods import (
    METHODS,
    OPEN_CLIP_ACCUMULATED,
    OURS_LARGE,
    OURS_MICRO_BATCHES,
    PLAIN_STEP,
    available_methods,
)
from transformers import BertConfig

from gap_closed_clip import gap_closed_loss


SWEEP_SIZES, SWEEP_MICRO_BATCH = (256, 1024, 4096), 64
# After this many different micro-batches the same come again: 32768 different images of 224 x 224 would take 20 GB.
DISTINCT_MICRO_BATCHES = 16
COLUMNS = ["method", "contrastive batch", "images/s", "s/step", "relative", "peak MB", "GFLOP/image", "of ceiling"]

Round = tuple[list[float], int | None]  # seconds of each step, peak bytes


class Training:
    """A method's model and optimizer, on the device."""

    def __init__(self, name: str, settings: Settings):
        self.method, self.settings = METHODS[name], settings
        torch.manual_seed(0)
        with torch.device(settings.device):  # a CPU needs minutes to initialise a billion weights
            model = self.method.build(settings)
        self.model = model.to(settings.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=settings.device == "cuda")

    def step(self, micro_batches: list[Batch]) -> float:
        """Trains one step on a batch, given in micro-batches; returns the seconds it took."""
        start = clock(self.settings.device)
        self.optimizer.zero_grad()
        self.method.step(self.model, self.settings, micro_batches)
        self.optimizer.step()
        return clock(self.settings.device) - start

    def warm_up(self, micro_batches: list[Batch]) -> None:
        """Allocates AdamW's moments and compiles kernels, for which two micro-batches of a large batch are enough."""
        self.step(micro_batches[:2])
        if len(micro_batches) > 2 and self.settings.device == "cuda":
            shape = (self.settings.contrastive_batch, DIM)
            embeddings = [nn.functional.normalize(torch.randn(shape, device="cuda"), dim=1) for _ in range(2)]
            embeddings = [x.requires_grad_() for x in embeddings]
            gap_closed_loss(embeddings, torch.tensor(10.0, device="cuda")).loss.backward()


def timed_round(name: str, settings: Settings, micro_batches: list[Batch], steps: int) -> Round:
    """Builds a method's model and times some steps, after one that is not counted."""
    free_memory()
    with PeakMemory(settings.device) as peak:
        training = Training(name, settings)
        training.warm_up(micro_batches)
        seconds = [training.step(micro_batches) for _ in range(steps)]
    return seconds, peak.bytes


def peak_of_step(name: str, settings: Settings, from_start: bool, distinct: int | None) -> tuple[int | None, int]:
    """
    Peak bytes of a step, and the bytes of its inputs, which are not part of the peak; to be run `in_fresh_process`.

    Args:
        from_start: measure weights, gradients and moments as well; otherwise what a step needs beside weights and
            moments.
        distinct: how many different micro-batches the batch has; None for all.
    """
    tiny = replace(settings, preset="eva02_nano", batch=2, contrastive_batch=4)
    Training(name, tiny).step(METHODS[name].micro_batches(tiny))  # libraries load, threads start
    micro_batches = METHODS[name].micro_batches(settings, distinct)
    inputs = sum(x.nbytes for batch in {id(batch): batch for batch in micro_batches}.values() for x in batch.values())
    if from_start:
        with PeakMemory(settings.device) as peak:
            training = Training(name, settings)
            training.warm_up(micro_batches)
            training.step(micro_batches)
        return peak.bytes, inputs
    training = Training(name, settings)
    training.step(METHODS[name].micro_batches(replace(settings, contrastive_batch=2 * settings.batch)))
    training.optimizer.zero_grad()
    with PeakMemory(settings.device) as peak:
        training.step(micro_batches)
    return peak.bytes, inputs


@cache
def flops_per_image(name: str, settings: Settings) -> float:
    """
    Floating-point operations of forward and backward pass of one pair through the towers.

    Args:
        name: a method that encodes the batch in one piece, so that nothing is computed twice.
    """
    # The objective of a batch of two adds nothing to speak of.
    settings = replace(settings, batch=2, gradient_checkpointing=False)
    training, micro_batches = Training(name, settings), METHODS[name].micro_batches(settings)
    # Attention as plain products, because the counter does not know all fused kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        METHODS[name].step(training.model, settings, micro_batches)
    del training
    free_memory()
    return counter.get_total_flops() / settings.batch


def matmul_rate(settings: Settings, seconds: float = 1.0) -> float:
    """Floating-point operations per second in products of large matrices, in the precision of the training."""
    size = 8192 if settings.device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=settings.device, dtype=getattr(torch, settings.precision))
    torch.mm(a, b)
    times = []
    while sum(times) < seconds:
        start = clock(settings.device)
        torch.mm(a, b)
        times.append(clock(settings.device) - start)
    return 2 * size**3 / statistics.median(times)


def measure_methods(args: argparse.Namespace, settings: Settings) -> str:
    """The table of all methods, and a line about the ceiling they are compared with."""
    micro_batches = {name: METHODS[name].micro_batches(settings, DISTINCT_MICRO_BATCHES) for name in args.methods}
    steps = {name: partial(timed_round, name, settings, micro_batches[name], args.steps) for name in args.methods}
    rounds = in_turn({"ceiling": partial(matmul_rate, settings), **steps}, args.repeats)
    del micro_batches, steps
    ceiling = statistics.median(rounds.pop("ceiling"))
    per_image = {
        name: statistics.median(x for times, _ in found for x in times) / METHODS[name].rows(settings)
        for name, found in rounds.items()
        if not isinstance(found, str)
    }
    rows = []
    for name, found in rounds.items():
        num_rows = METHODS[name].rows(settings)
        if isinstance(found, str):
            rows.append([name, str(num_rows), found, *["-"] * 5])
            continue
        seconds, plain = per_image[name], per_image.get(PLAIN_STEP.get(name, name))
        flops = flops_per_image(PLAIN_STEP.get(name, name), settings)
        relative = "-" if plain is None else f"{seconds / plain:.2f}"
        times = [f"{1 / seconds:.4g}", f"{seconds * num_rows:.4g}", relative]
        work = [f"{flops / 1e9:.4g}", f"{100 * flops / seconds / ceiling:.1f}%"]
        rows.append([name, str(num_rows), *times, megabytes(peak_of_method(name, settings, found)), *work])
    words = f"Ceiling: {ceiling / 1e9:.4g} GFLOP/s in `torch.mm` ({settings.precision}), measured in the same run."
    return f"{markdown_table(COLUMNS, rows)}\n\n{words}"


def peak_of_method(name: str, settings: Settings, rounds: list[Round]) -> int | str | None:
    if settings.device == "cuda":
        return max(peak for _, peak in rounds)
    found = in_fresh_process(peak_of_step, name, settings, True, DISTINCT_MICRO_BATCHES)
    return found if isinstance(found, str) else found[0]


def memory_sweep(args: argparse.Namespace, settings: Settings) -> str:
    """A section on peak memory for different sizes of the contrastive batch."""
    if settings.device == "cpu":
        settings = replace(settings, preset="eva02_nano")
    settings = replace(settings, batch=SWEEP_MICRO_BATCH)
    names = [name for name in (OURS_LARGE, OURS_MICRO_BATCHES, OPEN_CLIP_ACCUMULATED) if name in args.methods]
    last: dict[str, tuple[int, int]] = {}
    rows = []
    for size in args.sweep_sizes:
        cells, inputs = [], "-"
        for name in names:
            if name in last and settings.device == "cpu":
                before, peak = last[name]
                if peak * size / before > 0.8 * available_memory():
                    cells.append("too much")  # the system might kill any process
                    continue
            found = in_fresh_process(peak_of_step, name, replace(settings, contrastive_batch=size), False, None)
            if not isinstance(found, str) and found[0] is not None:
                last[name] = (size, found[0])
            cells.append(megabytes(found if isinstance(found, str) else found[0]))
            inputs = inputs if isinstance(found, str) else megabytes(found[1])
        rows.append([str(size), inputs, *cells])
    title = f"## Peak MB over the contrastive batch ({settings.preset}, micro-batches of {SWEEP_MICRO_BATCH})"
    note = (
        "What one step adds to the weights and AdamW's moments, gradients included, each in a fresh process. The "
        "inputs, in\nmain memory, are not in it."
    )
    return f"{title}\n\n{note}\n\n{markdown_table(['contrastive batch', 'inputs MB', *names], rows)}"


def notes(args: argparse.Namespace, settings: Settings) -> str:
    towers = settings.towers
    image_args = "".join(f", {name}={value}" for name, value in towers.model_args.items())
    text = BertConfig(**towers.text)
    lines = [
        f"Towers of all methods: timm's {towers.architecture}{image_args}, and a BERT of {text.num_hidden_layers} "
        f"layers, width {text.hidden_size}, vocabulary {text.vocab_size}, {towers.length} tokens a text.",
        f"Batch {settings.batch}, {settings.precision}{' autocast' if settings.precision == 'bfloat16' else ''}, "
        f"gradient checkpointing {'on' if settings.gradient_checkpointing else 'off'}, AdamW; pixels and ids are "
        "random and come from main memory in every step; no data loading.",
        f"Medians; rounds: {args.repeats}, in which the methods take turns, timed steps a round: {args.steps}. A "
        "round builds the model anew and begins with a step that isn't counted.",
        "`ours`: `GapClosedClipModel` with its default objective; `ours as CLIP`: weights 1, 0, 0 and no centering, "
        "which is what open_clip trains.",
        f"`ours, micro-batches`: `MicroBatches` of {settings.batch}, encoded again in the backward pass.",
        "`open_clip, accumulation`: the loop of its `--accum-freq`, repeated here; it encodes again as well, but with "
        "other dropout masks (its gradients are not exact), and computes the whole N x N loss for every micro-batch.",
        "`relative`: time per image as a multiple of the same model's step of one batch.",
        "`peak MB` (10^6 bytes): weights, gradients, moments and activations together, without the inputs in main "
        f"memory: {memory_words(settings.device)}.",
        "`GFLOP/image`: matrix products of one forward and backward pass, counted once whatever is recomputed. "
        "`of ceiling`: model FLOP utilisation, that is GFLOP/image times images/s over the ceiling below.",
    ]
    if settings.contrastive_batch // settings.batch > DISTINCT_MICRO_BATCHES:
        lines.append(f"Of the micro-batches {DISTINCT_MICRO_BATCHES} are different; the others are the same again.")
    return "\n".join(f"- {line}" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: eva_giant on a GPU, else eva02_tiny")
    parser.add_argument("--batch", type=int, help="also the size of a micro-batch; default: by preset")
    parser.add_argument("--contrastive-batch", type=int, help="a multiple of the batch; default: 4 times it")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round that are timed")
    parser.add_argument("--memory-sweep", action="store_true")
    parser.add_argument(
        "--sweep-sizes", type=int, nargs="+", default=SWEEP_SIZES, help=f"multiples of {SWEEP_MICRO_BATCH}"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args()
    if any(size % SWEEP_MICRO_BATCH for size in args.sweep_sizes):
        parser.error(f"--sweep-sizes takes multiples of {SWEEP_MICRO_BATCH}.")
    args.methods = available_methods(args.methods)
    return args


def main() -> int:
    args = parse()
    on_gpu = args.device == "cuda"
    default_preset = "eva_giant" if on_gpu else "eva02_tiny"
    preset = args.preset or default_preset
    batch = args.batch or PRESETS[preset].batch
    settings = Settings(
        preset,
        args.device,
        batch,
        args.contrastive_batch or 4 * batch,
        args.precision or ("bfloat16" if on_gpu else "float32"),
        args.gradient_checkpointing,
    )
    if settings.contrastive_batch % batch:
        raise SystemExit(f"--contrastive-batch {settings.contrastive_batch} is no multiple of the batch, {batch}.")
    words = [device_slug(args.device)] + [preset] * (preset != default_preset)
    path = args.output / f"{'_'.join(['training', *words])}.md"
    title = header(f"A training step: {preset}", args.device)
    sections = [title, notes(args, settings), measure_methods(args, settings)]
    write_report(path, *sections)
    if args.memory_sweep:
        free_memory()
        write_report(path, *sections, memory_sweep(args, settings))
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
