"""Time and peak memory of the objective alone, forward and backward: ours, plain torch, open_clip, memeff.

    python benchmarks/objective.py                # on a GPU if there is one; benchmarks/results/objective_*.md
    python benchmarks/objective.py --large        # on a CPU, N = 65536 as well: 5 minutes more
    python benchmarks/objective.py --device cuda --sizes 32768 --dtypes bfloat16 --repeats 20
    python benchmarks/objective.py --modalities 3 --groups --terms all

The peers (pip install -e ".[benchmark]") have the contrastive term only, and no groups. Before anything is timed,
every method's value and gradients are compared with a dense float64 reference; one that disagrees is not timed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from measure import (
    OUT_OF_MEMORY,
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
    medians,
    megabytes,
    memory_words,
    write_report,
)
from torch import Tensor

from gap_closed_clip import gap_closed_loss, tiled_gap_closed_clip
from gap_closed_clip.model.losses_gap_closed_clip import contrastive_loss
from gap_closed_clip.model.tiled_gap_closed_clip import GlobalBatch, tiled_contrastive_loss
from gap_closed_clip.model.tiles_gap_closed_clip import TORCH_TILES


TEMPERATURE = 0.07
PLAIN, OPEN_CLIP, MEMEFF = "plain torch autograd", "open_clip ClipLoss", "memeff"
DENSE, TORCH_TILED, TRITON_TILED = "ours dense", "ours tiled, torch", "ours tiled, Triton"
OTHERS = (PLAIN, OPEN_CLIP, MEMEFF, DENSE)
# N x N float32 matrices at the peak, at least; to tell beforehand what would not fit into main memory.
DENSE_MATRICES = {"contrastive": 4, "all": 7}
# Relative differences from the reference up to which a method counts as right; TF32 and bfloat16 need them.
TOLERANCES = {"float32": 0.02, "bfloat16": 0.1}


MOST_ROWS_CHECKED = 4096  # in float64, so that the reference fits
LARGE = 65536


@dataclass(frozen=True)
class Case:
    """One objective of one batch."""

    num_rows: int
    dim: int
    dtype: str
    terms: str
    modalities: int
    groups: bool
    device: str


@dataclass
class Inputs:
    """M tensors (N, D) and the scale, which get gradients; group_ids (N,) or None."""

    embeddings: list[Tensor]
    scale: Tensor
    group_ids: Tensor | None

    @classmethod
    def make(cls, case: Case) -> "Inputs":
        """Random unit vectors; those of one sample resemble one another. The same at every call."""
        generator = torch.Generator(case.device).manual_seed(0)
        shape, options = (case.num_rows, case.dim), {"device": case.device, "generator": generator}
        common = torch.randn(shape, **options)
        embeddings = [F.normalize(common + torch.randn(shape, **options), dim=1) for _ in range(case.modalities)]
        group_ids = torch.randint(case.num_rows, (case.num_rows,), **options) if case.groups else None
        scale = torch.tensor(1 / TEMPERATURE, device=case.device)
        return cls([z.to(getattr(torch, case.dtype)) for z in embeddings], scale, group_ids).with_gradients()

    def double(self) -> "Inputs":
        return Inputs([z.detach().double() for z in self.embeddings], self.scale.detach().double(), self.group_ids)

    def with_gradients(self) -> "Inputs":
        for x in (*self.embeddings, self.scale):
            x.requires_grad_()
        return self


def plain_loss(inputs: Inputs, terms: str) -> Tensor:
    """The objective as one writes it down: N x N matrices, and autograd for the rest."""
    anchor, *others = inputs.embeddings
    excluded = None
    if inputs.group_ids is not None:
        excluded = (inputs.group_ids[:, None] == inputs.group_ids).fill_diagonal_(False)
    target = torch.arange(len(anchor), device=anchor.device)
    loss = 0.0
    for other in others:
        logits = inputs.scale * anchor @ other.T
        if excluded is not None:
            logits = logits.masked_fill(excluded, -math.inf)
        loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if terms == "all":
        loss = loss + sum((other - anchor).square().sum(-1).mean() for other in others)
    loss = loss / len(others)
    if terms == "all":
        centroids = F.normalize(sum(inputs.embeddings) / len(inputs.embeddings), dim=-1)
        weights = (4 * centroids @ centroids.T - 4).exp()  # exp(-2 |a - b|^2) of unit vectors
        ignored = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
        ignored = ignored if excluded is None else ignored | excluded
        loss = loss + (weights.masked_fill(ignored, 0).sum() / (~ignored).sum()).log()
    return loss


def open_clip_loss(inputs: Inputs, terms: str) -> Tensor:
    from open_clip.loss import ClipLoss

    anchor, *others = inputs.embeddings
    return sum(ClipLoss()(anchor, other, inputs.scale) for other in others) / len(others)


def memeff_loss(inputs: Inputs, terms: str) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # By default (stable=True) its gradients have another scale than those of its loss.
    loss = MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)
    anchor, *others = inputs.embeddings
    return sum(loss(anchor, other) for other in others) / len(others)


def our_loss(inputs: Inputs, terms: str, tiled: bool) -> Tensor:
    if terms == "all":
        return gap_closed_loss(inputs.embeddings, inputs.scale, inputs.group_ids, tiled=tiled).loss
    anchor, *others = inputs.embeddings
    if tiled:
        batch = GlobalBatch.gather(inputs.embeddings, inputs.group_ids, across_processes=False)
        losses = [
            tiled_contrastive_loss(anchor, other, inputs.scale, batch, m) for m, other in enumerate(others, start=1)
        ]
    else:
        ids = inputs.group_ids
        excluded = None if ids is None else ids[:, None] == ids
        losses = [contrastive_loss(anchor.float(), other.float(), inputs.scale, excluded) for other in others]
    return torch.stack(losses).mean()


METHODS: dict[str, Callable[[Inputs, str], Tensor]] = {
    PLAIN: plain_loss,
    OPEN_CLIP: open_clip_loss,
    MEMEFF: memeff_loss,
    DENSE: partial(our_loss, tiled=False),
    TORCH_TILED: partial(our_loss, tiled=True),
    TRITON_TILED: partial(our_loss, tiled=True),
}


def methods_for(case: Case, chosen: list[str]) -> list[str]:
    """Those that have this case at all."""
    on_gpu, peers = case.device == "cuda", case.terms == "contrastive" and not case.groups
    has = {
        OPEN_CLIP: peers and is_installed("open_clip"),
        MEMEFF: peers and on_gpu and is_installed("memeff"),
        TRITON_TILED: on_gpu and is_installed("triton"),
    }
    return [name for name in METHODS if name in chosen and has.get(name, True)]


@contextmanager
def surroundings(name: str, case: Case) -> Iterator[None]:
    """Autocast for what is written for it, and the tiles that the method's name says."""
    autocast = name in (PLAIN, OPEN_CLIP) and case.dtype == "bfloat16"
    tiles = tiled_gap_closed_clip.tile_functions
    if name == TORCH_TILED:
        tiles = lambda _: TORCH_TILES  # noqa: E731
    with (
        torch.autocast(case.device, torch.bfloat16, enabled=autocast),
        mock.patch.object(tiled_gap_closed_clip, "tile_functions", tiles),
    ):
        yield


def value_and_gradients(name: str, case: Case, inputs: Inputs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    with surroundings(name, case):
        loss = METHODS[name](inputs, case.terms)
        # The temperature of memeff is a number and gets no gradient.
        return loss, torch.autograd.grad(loss, [*inputs.embeddings, inputs.scale], allow_unused=True)


def timed_step(name: str, case: Case, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    with surroundings(name, case):
        start = clock(case.device)
        loss = METHODS[name](inputs, case.terms)
        middle = clock(case.device)
        torch.autograd.grad(loss, [*inputs.embeddings, inputs.scale], allow_unused=True)
        return middle - start, clock(case.device) - middle


def measured_step(name: str, case: Case) -> tuple[float, float, int | None]:
    """Seconds forward, seconds backward, peak bytes beside the embeddings; in `in_fresh_process` on CPUs."""
    small = replace(case, num_rows=64)
    timed_step(name, small, Inputs.make(small))  # libraries load, threads start
    inputs = Inputs.make(case)
    with PeakMemory(case.device) as peak:
        forward, backward = timed_step(name, case, inputs)
    return forward, backward, peak.bytes


def disagreement(name: str, case: Case) -> tuple[float, float]:
    """Relative differences, of the value and the largest of the gradients, from a dense reference in float64."""
    inputs = Inputs.make(case)
    reference = inputs.double().with_gradients()
    expected_value, expected = value_and_gradients(PLAIN, replace(case, dtype="float64"), reference)
    value, found = value_and_gradients(name, case, inputs)
    of_gradients = [
        ((x.double() - y).abs().max() / y.abs().max()).item()
        for x, y in zip(found, expected, strict=True)
        if x is not None
    ]
    return ((value.double() - expected_value) / expected_value).abs().item(), max(of_gradients)


@dataclass
class Row:
    """What was measured of a method in a case: medians, or words why not."""

    name: str
    case: Case
    seconds: list[float] | None = None
    peak: int | str | None = None
    words: str = ""

    def cells(self, baseline: float | None) -> list[str]:
        case = self.case
        first = [str(case.num_rows), case.dtype, case.terms, self.name]
        if self.seconds is None:
            return [*first, "-", "-", self.words, "-", "-"]
        forward, backward = self.seconds
        times = [f"{1000 * x:.4g}" for x in (forward, backward, forward + backward)]
        relative = "-" if baseline is None else f"{(forward + backward) / baseline:.2f}"
        return [*first, *times, relative, megabytes(self.peak)]


@dataclass
class Sweep:
    """All cases in turn; what is known so far is written after each."""

    args: argparse.Namespace
    path: Path
    rows: list[list[Row]] = field(default_factory=list)
    agreement: list[list[str]] = field(default_factory=list)
    checked_rows: int = 0
    wrong: set[tuple[str, str, str]] = field(default_factory=set)
    # (method, dtype, terms): rows and seconds of the largest batch so far
    longest: dict[tuple[str, str, str], tuple[int, float]] = field(default_factory=dict)

    def check(self, case: Case) -> None:
        """Compares every method with the reference."""
        self.checked_rows = case.num_rows
        for name in methods_for(case, self.args.methods):
            if not self._fits(name, case):
                continue
            (found,) = in_turn({name: lambda name=name: disagreement(name, case)}, 1).values()
            if isinstance(found, str):
                cells = [found, "-"]
            else:
                cells = [f"{x:.1e}" for x in found[0]]
            if isinstance(found, str) or not max(found[0]) <= TOLERANCES[case.dtype]:  # NaN isn't, either
                self.wrong.add((name, case.dtype, case.terms))
            self.agreement.append([case.dtype, case.terms, name, *cells])
            free_memory()

    def _fits(self, name: str, case: Case) -> bool:
        """Whether main memory can hold a dense method's matrices; a GPU is simply asked."""
        needed = DENSE_MATRICES[case.terms] * 4 * case.num_rows**2
        return case.device == "cuda" or name not in OTHERS or needed < available_memory()

    def _why_not(self, name: str, case: Case) -> str:
        """Why not to start at all, or nothing."""
        if (name, case.dtype, case.terms) in self.wrong:
            return "disagrees"
        if not self._fits(name, case):
            return OUT_OF_MEMORY
        rows, seconds = self.longest.get((name, case.dtype, case.terms), (case.num_rows, 0.0))
        # Work grows with the square of N, time by less where the smaller batch was all overhead.
        return self._over_time(seconds * (case.num_rows / rows) ** 2 / 4)

    def _over_time(self, seconds: float) -> str:
        return f"over {self.args.time_limit:g} s" if seconds > self.args.time_limit else ""

    def run(self, case: Case) -> None:
        rows = {name: Row(name, case) for name in methods_for(case, self.args.methods)}
        for name, row in rows.items():
            row.words = self._why_not(name, case)
        inputs = Inputs.make(case)
        # The first round is not counted: kernels are compiled, buffers are found.
        for repeats in (1, self.args.repeats):
            steps = {name: partial(timed_step, name, case, inputs) for name, row in rows.items() if not row.words}
            for name, times in in_turn(steps, repeats).items():
                self._note(rows[name], times)
        del inputs, steps
        for name, row in rows.items():
            if not row.words:
                row.peak = self._peak(name, case)
        self.rows.append(list(rows.values()))
        self.write()

    def _note(self, row: Row, times: list[tuple[float, float]] | str) -> None:
        if isinstance(times, str):
            row.words = times
            return
        row.seconds = medians(times)
        case, total = row.case, sum(row.seconds)
        self.longest[row.name, case.dtype, case.terms] = (case.num_rows, total)
        row.words = self._over_time(total)
        if row.words:
            row.seconds = None

    def _peak(self, name: str, case: Case) -> int | str | None:
        if case.device == "cuda":
            (found,) = in_turn({name: partial(measured_step, name, case)}, 1).values()
            found = found if isinstance(found, str) else found[0]
        else:
            found = in_fresh_process(measured_step, name, case)
        return found if isinstance(found, str) else found[2]

    def run_large(self, case: Case) -> None:
        """The tiled form alone, one step, for its time and its memory at once."""
        found = in_fresh_process(measured_step, TORCH_TILED, case)
        row = Row(TORCH_TILED, case, words=found if isinstance(found, str) else "")
        if not row.words:
            row.seconds, row.peak = list(found[:2]), found[2]
        self.rows.append([row])
        self.write()

    def write(self) -> None:
        columns = ["N", "dtype", "terms", "method", "forward ms", "backward ms", "total ms", "relative", "peak MB"]
        cells = []
        for rows in self.rows:
            totals = [sum(row.seconds) for row in rows if row.seconds and row.name in OTHERS]
            cells += [row.cells(min(totals, default=None)) for row in rows]
        title = f"The objective: D = {self.args.dim}, {self.args.modalities} modalities"
        if self.args.groups:
            title += ", groups"
        write_report(
            self.path,
            header(title, self.args.device),
            notes(self.args),
            markdown_table(columns, cells, left=4),
            f"Relative differences from a dense float64 reference at N = {self.checked_rows}; of the gradients' "
            "entries the largest\ndifference, as a share of the largest entry:\n",
            markdown_table(["dtype", "terms", "method", "value", "gradients"], self.agreement, left=3),
        )


def notes(args: argparse.Namespace) -> str:
    """What the table says and what it doesn't."""
    on_gpu = args.device == "cuda"
    lines = [
        f"Medians of {args.repeats} steps after one that isn't counted; the methods take turns.",
        "`relative`: total time as a multiple of the fastest of plain torch, open_clip, memeff and ours dense.",
        f"`peak MB` (10^6 bytes): {memory_words(args.device)} during one step. The embeddings are not in it, "
        "their gradients are.",
        "`contrastive`: that term's function alone, as the peers have it; `gap_closed_loss` itself also evaluates "
        "terms whose weight is 0, for the log.",
        "`all`: `gap_closed_loss` with weights 1, 1, 1, and the same in plain torch; peers have no such terms.",
    ]
    if on_gpu:
        lines += [
            f"float32: torch and our kernels multiply {'in' if args.tf32 else 'without'} TF32, memeff in TF32, "
            "its default.",
            "memeff's temperature is a number: unlike the others, it computes no gradient for it.",
        ]
    else:
        counts = " or ".join(f"{count} (`{terms}`)" for terms, count in DENSE_MATRICES.items())
        lines.append(f"`{OUT_OF_MEMORY}`: {counts} matrices of N x N float32 exceed the free memory; not tried.")
    if "bfloat16" in args.dtypes:
        lines.append(
            "bfloat16: plain torch and open_clip run under autocast, as in training; ours dense and ours tiled "
            "by torch compute in float32."
        )
    if args.large:
        lines.append(f"N = {LARGE}: one step, in the process that also measured its memory.")
    return "\n".join(f"- {line}" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="rows; default: by device")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, help="default: by device")
    parser.add_argument("--terms", nargs="+", choices=DENSE_MATRICES, default=list(DENSE_MATRICES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--groups", action="store_true", help="random groups are kept out of the negatives")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=120, help="seconds a step may take")
    parser.add_argument("--tf32", action="store_true", help="GPU: torch multiplies float32 in TF32")
    parser.add_argument("--large", action="store_true", help=f"CPU: N = {LARGE} as well, the tiled form alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.sizes = sorted(args.sizes or ([4096, 32768, 131072, 262144] if on_gpu else [1024, 4096, 8192]))
    args.dtypes = args.dtypes or (["bfloat16", "float32"] if on_gpu else ["float32"])
    return args


def main() -> int:
    args = parse()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    words = [f"{args.modalities}-modalities"] * (args.modalities != 2) + ["groups"] * args.groups
    sweep = Sweep(args, args.output / f"{'_'.join(['objective', device_slug(args.device), *words])}.md")
    smallest = Case(args.sizes[0], args.dim, "float32", "all", args.modalities, args.groups, args.device)
    kinds = [replace(smallest, dtype=dtype, terms=terms) for dtype in args.dtypes for terms in args.terms]
    for case in kinds:
        sweep.check(replace(case, num_rows=min(case.num_rows, MOST_ROWS_CHECKED)))
    for case in kinds:
        for num_rows in args.sizes:
            sweep.run(replace(case, num_rows=num_rows))
    if args.large and args.device == "cpu":
        sweep.run_large(replace(smallest, num_rows=LARGE))
    print(sweep.path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
