"""A whole training step (forward, backward, AdamW) of ours and of open_clip around the same towers: images/s, peak
memory and the share of the machine's arithmetic, in one piece and in micro-batches.

    python benchmarks/training.py                       # the default preset; benchmarks/results/training_*.md
    python benchmarks/training.py --memory-sweep        # and peak memory over the size of the contrastive batch
    python benchmarks/training.py --preset eva_giant --batch 256 --gradient-checkpointing
    python benchmarks/training.py --preset eva_giant --contrastive-batch 32768 --repeats 1 --steps 1 \\
        --methods ours "ours, micro-batches"

Towers start at random, pixels and token ids are random, nothing is downloaded. Every round builds each method's
model anew, so that only one at a time takes up memory.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import timm
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
    is_installed,
    markdown_table,
    megabytes,
    memory_words,
    write_report,
)
from random_towers import DIM, PRESETS, Batch, Settings, build_ours, random_batch, random_parts, to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from gap_closed_clip import gap_closed_loss
from gap_closed_clip.model.micro_batches_gap_closed_clip import MicroBatches


SWEEP_SIZES, SWEEP_MICRO_BATCH = (256, 1024, 4096), 64
# So many different micro-batches, and then the same again: 32768 images of 224 x 224 would take 20 GB.
DISTINCT_PARTS = 16


Round = tuple[list[float], int | None]  # seconds of each step; peak bytes


def build_open_clip(settings: Settings) -> nn.Module:
    """open_clip's model from a config of its own form, with the same image tower and the same BERT."""
    from open_clip.model import CustomTextCLIP

    towers = settings.towers
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads a text tower's config by its name
        BertConfig(**towers.text).save_pretrained(folder)
        model = CustomTextCLIP(
            embed_dim=DIM,
            vision_cfg={
                "timm_model_name": towers.architecture,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
                "image_size": towers.image_size,
            },
            text_cfg={
                "hf_model_name": folder,
                "hf_model_pretrained": False,
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "hf_proj_type": "linear",
            },
            output_dict=True,
        )
    if towers.model_args:  # which its configs have no place for
        trunk_args = {"global_pool": "token", **towers.model_args}
        model.visual.trunk = timm.create_model(towers.architecture, num_classes=DIM, **trunk_args)
    if settings.gradient_checkpointing:
        model.set_grad_checkpointing()
    return model


def our_step(model: nn.Module, settings: Settings, parts: list[Batch]) -> None:
    """One piece: the only part."""
    (batch,) = parts
    with settings.autocast():
        loss = model(**to_device(batch, settings)).loss
    loss.backward()


def our_micro_batched_step(model: nn.Module, settings: Settings, parts: list[Batch]) -> None:
    with settings.autocast():
        loss = model(micro_batches=MicroBatches(parts)).loss
    loss.backward()


def open_clip_step(model: nn.Module, settings: Settings, parts: list[Batch]) -> None:
    from open_clip.loss import ClipLoss

    (batch,) = parts
    batch = to_device(batch, settings)
    with settings.autocast():
        loss = ClipLoss()(**model(batch["pixel_values"], batch["input_ids"]))
    loss.backward()


def open_clip_accumulated_step(model: nn.Module, settings: Settings, parts: list[Batch]) -> None:
    """As `open_clip_train/train.py` (3.3.0) with --accum-freq: the whole loss anew for every micro-batch."""
    from open_clip.loss import ClipLoss

    kept: dict[str, list[Tensor]] = {"image_features": [], "text_features": []}
    batches = []
    for part in parts:
        batch = to_device(part, settings)
        with torch.no_grad(), settings.autocast():
            outputs = model(batch["pixel_values"], batch["input_ids"])
        for name, features in kept.items():
            features.append(outputs[name])
        batches.append(batch)
    for j, batch in enumerate(batches):
        with settings.autocast():
            outputs = model(batch["pixel_values"], batch["input_ids"])
            inputs = {name: torch.cat([*x[:j], outputs[name], *x[j + 1 :]]) for name, x in kept.items()}
            loss = ClipLoss()(**inputs, logit_scale=outputs["logit_scale"])
            del inputs
        loss.backward()


@dataclass(frozen=True)
class Method:
    """
    Args:
        build: the model.
        step: forward and backward.
        micro_batched: in micro-batches.
        large: of the contrastive batch, and not of one batch.
    """

    build: Callable[[Settings], nn.Module]
    step: Callable[[nn.Module, Settings, list[Batch]], None]
    micro_batched: bool = False
    large: bool = False

    def rows(self, settings: Settings) -> int:
        return settings.contrastive_batch if self.large else settings.batch

    def parts(self, settings: Settings, distinct: int | None = None) -> list[Batch]:
        if self.micro_batched:
            return random_parts(settings, distinct)
        return [random_batch(settings, self.rows(settings))]


OURS, AS_CLIP, OPEN_CLIP = "ours", "ours as CLIP", "open_clip"
OURS_LARGE, OURS_MICRO_BATCHES = "ours, one piece", "ours, micro-batches"
OPEN_CLIP_ACCUMULATED = "open_clip, accumulation"
build_as_clip = partial(build_ours, align_weight=0.0, uniformity_weight=0.0, center_projections=False)
METHODS = {
    OURS: Method(build_ours, our_step),
    AS_CLIP: Method(build_as_clip, our_step),
    OPEN_CLIP: Method(build_open_clip, open_clip_step),
    OURS_LARGE: Method(build_ours, our_step, large=True),
    OURS_MICRO_BATCHES: Method(build_ours, our_micro_batched_step, micro_batched=True, large=True),
    OPEN_CLIP_ACCUMULATED: Method(build_open_clip, open_clip_accumulated_step, micro_batched=True, large=True),
}
# What a method's time per image is compared with.
PLAIN_STEP = {OURS_LARGE: OURS, OURS_MICRO_BATCHES: OURS, OPEN_CLIP_ACCUMULATED: OPEN_CLIP}


class Training:
    """A method's model and optimizer on the device."""

    def __init__(self, name: str, settings: Settings):
        self.method, self.settings = METHODS[name], settings
        torch.manual_seed(0)
        with torch.device(settings.device):  # initialising a billion weights takes a CPU minutes
            model = self.method.build(settings)
        self.model = model.to(settings.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=settings.device == "cuda")

    def step(self, parts: list[Batch]) -> float:
        """Seconds."""
        start = clock(self.settings.device)
        self.optimizer.zero_grad()
        self.method.step(self.model, self.settings, parts)
        self.optimizer.step()
        return clock(self.settings.device) - start

    def warm_up(self, parts: list[Batch]) -> None:
        """Moments are allocated, kernels compiled; of a large batch two parts do."""
        self.step(parts[:2])
        if len(parts) > 2 and self.settings.device == "cuda":
            shape = (self.settings.contrastive_batch, DIM)
            embeddings = [nn.functional.normalize(torch.randn(shape, device="cuda"), dim=1) for _ in range(2)]
            embeddings = [x.requires_grad_() for x in embeddings]
            gap_closed_loss(embeddings, torch.tensor(10.0, device="cuda")).loss.backward()


def timed_round(name: str, settings: Settings, parts: list[Batch], steps: int) -> Round:
    free_memory()
    with PeakMemory(settings.device) as peak:
        training = Training(name, settings)
        training.warm_up(parts)
        seconds = [training.step(parts) for _ in range(steps)]
    return seconds, peak.bytes


def peak_of_step(name: str, settings: Settings, from_start: bool, distinct: int | None) -> tuple[int | None, int]:
    """
    Peak bytes, and bytes of the inputs, which the peak leaves out; in `in_fresh_process`.

    Args:
        from_start: weights, gradients and moments as well; otherwise what one step adds to weights and moments.
    """
    tiny = replace(settings, preset="eva02_nano", batch=2, contrastive_batch=4)
    Training(name, tiny).step(METHODS[name].parts(tiny))  # libraries load, threads start
    parts = METHODS[name].parts(settings, distinct)
    inputs = sum(x.nbytes for part in {id(part): part for part in parts}.values() for x in part.values())
    if from_start:
        with PeakMemory(settings.device) as peak:
            training = Training(name, settings)
            training.warm_up(parts)
            training.step(parts)
        return peak.bytes, inputs
    training = Training(name, settings)
    training.step(METHODS[name].parts(replace(settings, contrastive_batch=2 * settings.batch)))
    training.optimizer.zero_grad()
    with PeakMemory(settings.device) as peak:
        training.step(parts)
    return peak.bytes, inputs


@cache
def flops_per_image(name: str, settings: Settings) -> float:
    """
    Forward and backward through the towers of one pair; products that are computed again count once.

    Args:
        name: a method of one piece.
    """
    # The objective of two rows is nothing beside the towers.
    settings = replace(settings, batch=2, gradient_checkpointing=False)
    training, parts = Training(name, settings), METHODS[name].parts(settings)
    # As plain products, whichever fused kernels the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        METHODS[name].step(training.model, settings, parts)
    del training
    free_memory()
    return counter.get_total_flops() / settings.batch


def matmul_rate(settings: Settings, seconds: float = 1.0) -> float:
    """FLOP/s of large square products in the precision of the training."""
    size = 8192 if settings.device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=settings.device, dtype=getattr(torch, settings.precision))
    torch.mm(a, b)
    times = []
    while sum(times) < seconds:
        start = clock(settings.device)
        torch.mm(a, b)
        times.append(clock(settings.device) - start)
    return 2 * size**3 / statistics.median(times)


COLUMNS = ["method", "contrastive batch", "images/s", "s/step", "relative", "peak MB", "GFLOP/image", "of ceiling"]


def measure_methods(args: argparse.Namespace, settings: Settings) -> str:
    """The table, and the ceiling."""
    parts = {name: METHODS[name].parts(settings, DISTINCT_PARTS) for name in args.methods}
    steps = {name: partial(timed_round, name, settings, parts[name], args.steps) for name in args.methods}
    rounds = in_turn({"ceiling": partial(matmul_rate, settings), **steps}, args.repeats)
    del parts, steps
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
    found = in_fresh_process(peak_of_step, name, settings, True, DISTINCT_PARTS)
    return found if isinstance(found, str) else found[0]


def memory_sweep(args: argparse.Namespace, settings: Settings) -> str:
    """Peak memory over the size of the contrastive batch."""
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
                    cells.append("too much")  # the system would end some process or other
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
    if settings.contrastive_batch // settings.batch > DISTINCT_PARTS:
        lines.append(f"Of the micro-batches {DISTINCT_PARTS} are different; the others are the same again.")
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
    if not is_installed("open_clip"):
        args.methods = [name for name in args.methods if METHODS[name].build is not build_open_clip]
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
    parts = [title, notes(args, settings), measure_methods(args, settings)]
    write_report(path, *parts)
    if args.memory_sweep:
        free_memory()
        write_report(path, *parts, memory_sweep(args, settings))
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
