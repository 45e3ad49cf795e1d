"""Measure fine-tuning steps of all parameters, of LoRA and of the projections: what trains, peak memory, pairs/s.

    python benchmarks/finetuning_memory.py                      # benchmarks/results/finetuning_*.md
    python benchmarks/finetuning_memory.py --device cuda --vision eva_giant_patch14_clip_224 --text bert-base \\
        --limits 16 24 80                                       # and the largest batch that fits in so many GB

Towers start at random, pixels and token ids are random, nothing is downloaded. LoRA is that of configs/lora.yaml.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from comparison import CONFIGS
from measure import (
    RESULTS,
    PeakMemory,
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
from random_towers import TEXTS, Batch, Settings, build_ours, random_batch, to_device
from torch import nn
from transformers import BertConfig

from gap_closed_clip import MicroBatches
from gap_closed_clip.training import add_adapters, load_config


# Bytes beside what torch's tensors take: the CUDA context, and gaps that the allocator cannot use.
OVERHEAD = 10**9
NUM_PARTS = 4  # micro-batches of a batch
WARM_UP = "nano"  # the text tower of a step that loads libraries and starts threads


@dataclass(frozen=True)
class Method:
    """
    What is trained. Projections, temperature and centering always are.

    Args:
        adapters: towers that get adapters, while the rest of them is frozen; None for no adapters.
        frozen: towers that stay as they are.
        pooled_text: the frozen text tower has run once before (`pool_captions_once`) and is not part of the step.
    """

    adapters: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    pooled_text: bool = False


METHODS = {
    "full": Method(),
    "LoRA": Method(adapters=("vision", "text")),
    "LoRA, image tower": Method(adapters=("vision",), pooled_text=True),
    "projections": Method(frozen=("vision", "text")),
    "projections, texts cached": Method(frozen=("vision", "text"), pooled_text=True),
}
VARIANTS = ("plain", "checkpointing", "bfloat16", "micro-batches", "all three")
SEARCHED = ("plain", "bfloat16", "checkpointing and bfloat16")


def apply_variant(settings: Settings, variant: str) -> tuple[Settings, int]:
    """The settings of a variant, and the number of micro-batches."""
    everything = variant == "all three"
    if everything or "checkpointing" in variant:
        settings = replace(settings, gradient_checkpointing=True)
    if everything or "bfloat16" in variant:
        settings = replace(settings, precision="bfloat16")
    return settings, NUM_PARTS if everything or variant == "micro-batches" else 1


def build(method: Method, settings: Settings) -> nn.Module:
    """Build the model on the device, in training mode, with what the method does not train frozen."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = build_ours(settings)
    if method.adapters is not None:
        lora = load_config([CONFIGS / "lora.yaml"]).lora
        return add_adapters(model, replace(lora, towers=list(method.adapters)), None, None).to(settings.device).train()
    model.freeze_towers(**{tower: True for tower in method.frozen})
    return model.to(settings.device).train()


def make_batch(method: Method, settings: Settings) -> Batch:
    batch = random_batch(settings, settings.batch)
    if method.pooled_text:
        width = BertConfig(**settings.towers.text).hidden_size
        batch = {"pixel_values": batch["pixel_values"], "pooled_text": torch.randn(settings.batch, width)}
    return batch


class FineTuning:
    """A model with its batch, and AdamW on what is trained, for one method and variant."""

    def __init__(self, method: Method, settings: Settings, variant: str):
        self.method = method
        self.settings, self.num_parts = apply_variant(settings, variant)
        self.model = build(method, self.settings)
        self.batch = make_batch(method, self.settings)

    def start(self) -> None:
        """Make the optimizer; its moments are allocated in the first step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.settings.device == "cuda")

    def step(self) -> tuple[float, float]:
        """Take a step; gives its seconds, and its seconds of CPU time of all threads."""
        start = clock(self.settings.device), time.process_time()
        self.optimizer.zero_grad()
        with self.settings.autocast():
            if self.num_parts == 1:
                loss = self.model(**to_device(self.batch, self.settings)).loss
            else:
                parts = MicroBatches.split(self.batch, max(self.settings.batch // self.num_parts, 1))
                loss = self.model(micro_batches=parts).loss
        loss.backward()
        self.optimizer.step()
        return clock(self.settings.device) - start[0], time.process_time() - start[1]


def time_steps(method: Method, settings: Settings, variant: str, steps: int) -> list[tuple[float, float]]:
    free_memory()
    training = FineTuning(method, settings, variant)
    training.start()
    training.step()  # not timed: the optimizer allocates its moments
    return [training.step() for _ in range(steps)]


def peak_beside_weights(method: Method, settings: Settings, variant: str) -> int | None:
    """The peak of bytes in two steps beside the weights: inputs, activations, gradients and moments."""
    warm = FineTuning(method, replace(settings, preset=f"eva02_tiny_patch14_224+{WARM_UP}", batch=4), variant)
    warm.start()
    warm.step()  # libraries load, threads start
    del warm
    training = FineTuning(method, settings, variant)
    with PeakMemory(settings.device) as peak:
        training.start()
        training.step()
        training.step()
    return peak.bytes


def measured_peak(method: Method, settings: Settings, variant: str) -> int | str | None:
    """`peak_beside_weights`, in a process of its own on the CPU; a text if the step failed."""
    if settings.device == "cpu":
        return in_fresh_process(peak_beside_weights, method, settings, variant)
    found = in_turn({"peak": partial(peak_beside_weights, method, settings, variant)}, 1)["peak"]
    return found if isinstance(found, str) else found[0]


def count(method: Method, settings: Settings) -> tuple[int, int, int]:
    """The number of trained parameters, that of all without adapters, and the bytes of all weights."""
    settings = replace(settings, device="meta")  # a billion weights take no memory and no time
    num_parameters = sum(p.numel() for p in build(Method(), settings).parameters())
    model = build(method, settings)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), num_parameters, weights


def largest_batches(memory_of: Callable[[int], float], limits: list[float], smallest: int, largest: int) -> list[int]:
    """
    Search, for each limit, the largest batch whose memory is within it; 0 if not even the smallest one's is.

    Args:
        memory_of: gives the memory of a batch, which grows with its size; infinite if it does not fit the device.
        limits: in the units of `memory_of`.
        smallest: batches are multiples of this; the largest is found to about 1/16.
        largest: the largest batch that is tried.
    """
    known = cache(memory_of)
    sizes = [smallest]
    while known(sizes[-1]) <= max(limits) and sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    found = []
    for limit in limits:
        low = max((size for size in sizes if known(size) <= limit), default=0)
        high = min((size for size in sizes if known(size) > limit), default=low)
        while high - low > max(smallest, low // 16):
            middle = (low + high) // 2 // smallest * smallest
            if middle == low:
                break
            low, high = (middle, high) if known(middle) <= limit else (low, middle)
        found.append(low)
    return found


def table_of_batches(settings: Settings, args: argparse.Namespace) -> str:
    rows = []
    for name in args.methods:
        weights = count(METHODS[name], settings)[2]
        for variant in SEARCHED:

            def memory_of(batch: int, name=name, variant=variant, weights=weights) -> float:
                peak = measured_peak(METHODS[name], replace(settings, batch=batch, contrastive_batch=batch), variant)
                return weights + peak + OVERHEAD if isinstance(peak, int) else math.inf

            limits = [1e9 * limit for limit in args.limits]
            found = largest_batches(memory_of, limits, smallest=args.smallest_batch, largest=args.largest_batch)
            rows.append(
                [name, variant, *(f"{size}" if size < args.largest_batch else f"{size} or more" for size in found)]
            )
    title = "## The largest batch that fits, in one piece"
    note = (
        f"Weights in float32 and the measured peak of growing batches, with {OVERHEAD / 1e9:g} GB left for the "
        f"device's context and its allocator. Multiples of {args.smallest_batch}, to about 1/16. In micro-batches of "
        "such a size any number of pairs is compared."
    )
    columns = ["trained", "step", *(f"{limit:g} GB" for limit in args.limits)]
    return f"{title}\n\n{note}\n\n{markdown_table(columns, rows, left=2)}"


def table_of_steps(settings: Settings, args: argparse.Namespace) -> str:
    """A table of trained parameters, peak memory and pairs per second of each method and variant."""
    cases = [(name, variant) for name in args.methods for variant in args.variants]
    peaks = {case: measured_peak(METHODS[case[0]], settings, case[1]) for case in cases}
    steps = {" / ".join(case): partial(time_steps, METHODS[case[0]], settings, case[1], args.steps) for case in cases}
    rounds = in_turn(steps, args.repeats)
    rows = []
    for name in args.methods:
        num_trained, num_parameters, _ = count(METHODS[name], settings)
        for variant in args.variants:
            found = rounds[f"{name} / {variant}"]
            rate = found if isinstance(found, str) else pairs_per_second(found, settings.batch, args.cpu_time)
            share = f"{num_trained / num_parameters:.2%}"
            rows.append([name, variant, f"{num_trained:,}", share, megabytes(peaks[name, variant]), rate])
    rate = f"pairs/s{' of CPU time' * args.cpu_time}"
    columns = ["trained", "step", "trainable", "of the model's", "peak MB", rate]
    return markdown_table(columns, rows, left=2)


def pairs_per_second(rounds: list[list[tuple[float, float]]], batch: int, cpu_time: bool) -> str:
    """Pairs per second of the median step, or with `cpu_time` per second of CPU time, in words."""
    return f"{batch / statistics.median(step[cpu_time] for found in rounds for step in found):.4g}"


def notes(args: argparse.Namespace, settings: Settings) -> str:
    _, num_parameters, weights = count(Method(), settings)
    lines = [
        f"timm's {args.vision}, and a BERT ({args.text}), {settings.towers.length} tokens a text: {num_parameters:,} "
        f"parameters, {weights / 1e6:.4g} MB in float32. Batch {settings.batch}, AdamW on what trains; pixels and "
        "ids are random; no data loading.",
        "`full`: all parameters. `LoRA`: adapters as in configs/lora.yaml, on both towers or on one. `projections`: "
        "both towers frozen. Projections, temperature and centering train in all. `LoRA, image tower` and `texts "
        "cached`: the frozen text tower's output was computed once before, as train.py does, and is not part of the "
        "step.",
        f"`plain`: float32. `bfloat16`: autocast, weights in float32. `micro-batches`: {NUM_PARTS} parts, encoded "
        "again in the backward pass, the same gradients. `all three`: checkpointing, bfloat16, micro-batches.",
        f"`peak MB` (10^6 bytes), beside the weights: gradients, moments and activations in two steps: "
        f"{memory_words(settings.device)}.",
        f"`pairs/s`: medians over {args.repeats} rounds of {args.steps} steps, in which the cases take turns; a round "
        "builds the model anew and begins with a step that isn't counted."
        f"{' Seconds of CPU time: the machine did other work as well.' * args.cpu_time}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vision", default="eva02_tiny_patch14_224", help="a timm architecture")
    parser.add_argument("--text", choices=TEXTS, default="minilm")
    parser.add_argument("--batch", type=int, default=32, help=f"a multiple of {NUM_PARTS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round that are timed")
    parser.add_argument(
        "--cpu-time", action="store_true", help="pairs/s of CPU time, which other work on the machine disturbs less"
    )
    parser.add_argument("--limits", type=float, nargs="+", default=[], help="GB for which to search the largest batch")
    parser.add_argument("--smallest-batch", type=int, default=8, help="smallest batch of the search")
    parser.add_argument("--largest-batch", type=int, default=4096, help="largest batch of the search")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args()
    if args.batch % NUM_PARTS:
        parser.error(f"--batch takes multiples of {NUM_PARTS}.")
    return args


def main() -> int:
    args = parse()
    preset = f"{args.vision}+{args.text}"
    settings = Settings(preset, args.device, args.batch, args.batch, "float32", gradient_checkpointing=False)
    path = args.output / f"finetuning_{device_slug(args.device)}.md"
    parts = [header("A fine-tuning step", args.device), notes(args, settings), table_of_steps(settings, args)]
    write_report(path, *parts)
    if args.limits:
        write_report(path, *parts, table_of_batches(settings, args))
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
