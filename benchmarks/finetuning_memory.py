"""A fine-tuning step of all parameters, of LoRA and of projections only: what trains, peak memory, pairs/s.

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


# Beside what torch allocates: the CUDA context, and what the allocator can't use for its pieces.
OVERHEAD = 10**9
NUM_PARTS = 4
WARM_UP = "nano"


@dataclass(frozen=True)
class Way:
    """
    What trains; projections, temperature and centering always do.

    Args:
        adapters: towers with adapters; all else of them is frozen. None: no adapters.
        frozen: towers that stay as they are.
        pooled_text: the frozen text tower has run before (`pool_captions_once`) and does not in the step.
    """

    adapters: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    pooled_text: bool = False


WAYS = {
    "full": Way(),
    "LoRA": Way(adapters=("vision", "text")),
    "LoRA, image tower": Way(adapters=("vision",), pooled_text=True),
    "projections": Way(frozen=("vision", "text")),
    "projections, texts cached": Way(frozen=("vision", "text"), pooled_text=True),
}
VARIANTS = ("plain", "checkpointing", "bfloat16", "micro-batches", "all three")
SEARCHED = ("plain", "bfloat16", "checkpointing and bfloat16")


def apply_variant(settings: Settings, variant: str) -> tuple[Settings, int]:
    """Settings, and the number of parts of the batch."""
    everything = variant == "all three"
    if everything or "checkpointing" in variant:
        settings = replace(settings, gradient_checkpointing=True)
    if everything or "bfloat16" in variant:
        settings = replace(settings, precision="bfloat16")
    return settings, NUM_PARTS if everything or variant == "micro-batches" else 1


def build(way: Way, settings: Settings) -> nn.Module:
    """The model on the device, with what the way trains, in training mode."""
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = build_ours(settings)
    if way.adapters is not None:
        lora = load_config([CONFIGS / "lora.yaml"]).lora
        return add_adapters(model, replace(lora, towers=list(way.adapters)), None, None).to(settings.device).train()
    model.freeze_towers(**{tower: True for tower in way.frozen})
    return model.to(settings.device).train()


def make_batch(way: Way, settings: Settings) -> Batch:
    batch = random_batch(settings, settings.batch)
    if way.pooled_text:
        width = BertConfig(**settings.towers.text).hidden_size
        batch = {"pixel_values": batch["pixel_values"], "pooled_text": torch.randn(settings.batch, width)}
    return batch


class FineTuning:
    """Model and AdamW on what trains, of one way and variant."""

    def __init__(self, way: Way, settings: Settings, variant: str):
        self.way = way
        self.settings, self.num_parts = apply_variant(settings, variant)
        self.model = build(way, self.settings)
        self.batch = make_batch(way, self.settings)

    def start(self) -> None:
        """Makes the optimizer, whose moments come with the first step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.settings.device == "cuda")

    def step(self) -> tuple[float, float]:
        """Seconds, and seconds of CPU time of all threads."""
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


def timed_round(way: Way, settings: Settings, variant: str, steps: int) -> list[tuple[float, float]]:
    free_memory()
    training = FineTuning(way, settings, variant)
    training.start()
    training.step()  # moments are allocated
    return [training.step() for _ in range(steps)]


def peak_beside_weights(way: Way, settings: Settings, variant: str) -> int | None:
    """Bytes of gradients, moments and activations in two steps: the most there are at a time, inputs included."""
    warm = FineTuning(way, replace(settings, preset=f"eva02_tiny_patch14_224+{WARM_UP}", batch=4), variant)
    warm.start()
    warm.step()  # libraries load, threads start
    del warm
    training = FineTuning(way, settings, variant)
    with PeakMemory(settings.device) as peak:
        training.start()
        training.step()
        training.step()
    return peak.bytes


def measured_peak(way: Way, settings: Settings, variant: str) -> int | str | None:
    if settings.device == "cpu":
        return in_fresh_process(peak_beside_weights, way, settings, variant)
    found = in_turn({"peak": partial(peak_beside_weights, way, settings, variant)}, 1)["peak"]
    return found if isinstance(found, str) else found[0]


def count(way: Way, settings: Settings) -> tuple[int, int, int]:
    """Parameters that train, those of the model without adapters, and bytes of all weights."""
    settings = replace(settings, device="meta")  # a billion weights take no memory and no time
    everything = sum(p.numel() for p in build(Way(), settings).parameters())
    model = build(way, settings)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), everything, weights


def largest_batches(memory_of: Callable[[int], float], limits: list[float], smallest: int, most: int) -> list[int]:
    """
    For each limit the largest batch whose memory is within it; 0 where not even the smallest is.

    Args:
        memory_of: of a batch; grows with it; infinite where it does not fit the device.
        smallest: batches are multiples of it, found to about 1/16.
        most: the search ends there.
    """
    known = cache(memory_of)
    sizes = [smallest]
    while known(sizes[-1]) <= max(limits) and sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
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


def batch_table(settings: Settings, args: argparse.Namespace) -> str:
    rows = []
    for name in args.ways:
        weights = count(WAYS[name], settings)[2]
        for variant in SEARCHED:

            def memory_of(batch: int, name=name, variant=variant, weights=weights) -> float:
                peak = measured_peak(WAYS[name], replace(settings, batch=batch, contrastive_batch=batch), variant)
                return weights + peak + OVERHEAD if isinstance(peak, int) else math.inf

            limits = [1e9 * limit for limit in args.limits]
            found = largest_batches(memory_of, limits, smallest=args.smallest_batch, most=args.most)
            rows.append([name, variant, *(f"{size}" if size < args.most else f"{size} or more" for size in found)])
    title = "## The largest batch that fits, in one piece"
    note = (
        f"Weights in float32 and the measured peak of growing batches, with {OVERHEAD / 1e9:g} GB left for the "
        f"device's context and its allocator. Multiples of {args.smallest_batch}, to about 1/16. In micro-batches of "
        "such a size any number of pairs is compared."
    )
    columns = ["trained", "step", *(f"{limit:g} GB" for limit in args.limits)]
    return f"{title}\n\n{note}\n\n{markdown_table(columns, rows, left=2)}"


def step_table(settings: Settings, args: argparse.Namespace) -> str:
    cases = [(name, variant) for name in args.ways for variant in args.variants]
    peaks = {case: measured_peak(WAYS[case[0]], settings, case[1]) for case in cases}
    steps = {" / ".join(case): partial(timed_round, WAYS[case[0]], settings, case[1], args.steps) for case in cases}
    rounds = in_turn(steps, args.repeats)
    rows = []
    for name in args.ways:
        trained, everything, _ = count(WAYS[name], settings)
        for variant in args.variants:
            found = rounds[f"{name} / {variant}"]
            rate = found if isinstance(found, str) else pairs_per_second(found, settings.batch, args.cpu_time)
            share = f"{trained / everything:.2%}"
            rows.append([name, variant, f"{trained:,}", share, megabytes(peaks[name, variant]), rate])
    rate = f"pairs/s{' of CPU time' * args.cpu_time}"
    columns = ["trained", "step", "trainable", "of the model's", "peak MB", rate]
    return markdown_table(columns, rows, left=2)


def pairs_per_second(rounds: list[list[tuple[float, float]]], batch: int, cpu_time: bool) -> str:
    return f"{batch / statistics.median(step[cpu_time] for found in rounds for step in found):.4g}"


def notes(args: argparse.Namespace, settings: Settings) -> str:
    everything, weights = count(Way(), settings)[1:]
    lines = [
        f"timm's {args.vision}, and a BERT ({args.text}), {settings.towers.length} tokens a text: {everything:,} "
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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round that are timed")
    parser.add_argument(
        "--cpu-time", action="store_true", help="pairs/s of CPU time, which other work on the machine disturbs less"
    )
    parser.add_argument("--limits", type=float, nargs="+", default=[], help="GB, to search the largest batch for")
    parser.add_argument("--smallest-batch", type=int, default=8, help="of the search")
    parser.add_argument("--most", type=int, default=4096, help="of the search")
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
    parts = [header("A fine-tuning step", args.device), notes(args, settings), step_table(settings, args)]
    write_report(path, *parts)
    if args.limits:
        write_report(path, *parts, batch_table(settings, args))
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
