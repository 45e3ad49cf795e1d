"""
Time and peak memory of the objective alone, forward and backward: ours, plain torch, open_clip, memeff.

    python benchmarks/objective.py                # on a GPU if there is one; benchmarks/results/objective_*.md
    python benchmarks/objective.py --large        # on a CPU, N = 65536 as well: 5 minutes more
    python benchmarks/objective.py --device cuda --sizes 32768 --dtypes bfloat16 --repeats 20
    python benchmarks/objective.py --modalities 3 --groups --terms all

The peers, open_clip and memeff (pip install -e ".[benchmark]"), have the contrastive term only, and no groups. Before
anything is timed, the value and the gradients of every method are compared with a dense reference in float64; a method
that disagrees is not timed.
"""

import argparse
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from measure import (
    OUT_OF_MEMORY,
    RESULTS,
    attempt,
    available_memory,
    device_slug,
    free_memory,
    header,
    in_fresh_process,
    in_turn,
    markdown_table,
    medians,
    megabytes,
    memory_words,
    write_report,
)
from objective_methods import (
    DENSE,
    MEMEFF,
    METHODS,
    OPEN_CLIP,
    PLAIN,
    TORCH_TILED,
    Case,
    Inputs,
    disagreement,
    measured_step,
    methods_for,
    timed_step,
)


# The fastest of these is what the other methods' times are compared with.
BASELINES = (PLAIN, OPEN_CLIP, MEMEFF, DENSE)
# How many N x N float32 matrices these hold at their peak, at least; it tells beforehand what main memory can't hold.
DENSE_MATRICES = {"contrastive": 4, "all": 7}
# Relative differences from the reference up to which a method counts as right; TF32 and bfloat16 need that much.
TOLERANCES = {"float32": 0.02, "bfloat16": 0.1}
MAX_ROWS_CHECKED = 4096  # so that the reference in float64 fits into memory
LARGE = 65536


@dataclass
class Row:
    """
    What was measured of one method in one case.

    Args:
        seconds: medians of the forward and of the backward pass.
        peak: peak memory in bytes, or why there is none.
        not_timed: why there are no seconds; empty if there is no reason.
    """

    name: str
    case: Case
    seconds: list[float] | None = None
    peak: int | str | None = None
    not_timed: str = ""

    def cells(self, baseline: float | None) -> list[str]:
        case = self.case
        first = [str(case.num_rows), case.dtype, case.terms, self.name]
        if self.seconds is None:
            return [*first, "-", "-", self.not_timed, "-", "-"]
        forward, backward = self.seconds
        times = [f"{1000 * x:.4g}" for x in (forward, backward, forward + backward)]
        relative = "-" if baseline is None else f"{(forward + backward) / baseline:.2f}"
        return [*first, *times, relative, megabytes(self.peak)]


@dataclass
class Sweep:
    """
    The measurement of all cases. The report is written after each of them.

    Args:
        rows: what was measured, for each case so far.
        agreement: the cells of the second table, each method's differences from the reference.
        checked_rows: N of that comparison.
        wrong: (method, dtype, terms) of methods that disagree with the reference.
        longest: (method, dtype, terms) to N and seconds of a step of the largest batch so far.
    """

    args: argparse.Namespace
    path: Path
    rows: list[list[Row]] = field(default_factory=list)
    agreement: list[list[str]] = field(default_factory=list)
    checked_rows: int = 0
    wrong: set[tuple[str, str, str]] = field(default_factory=set)
    longest: dict[tuple[str, str, str], tuple[int, float]] = field(default_factory=dict)

    def check(self, case: Case) -> None:
        """Compares every method with the reference."""
        self.checked_rows = case.num_rows
        for name in methods_for(case, self.args.methods):
            if not self._fits(name, case):
                continue
            found = attempt(partial(disagreement, name, case))
            if isinstance(found, str) or not max(found) <= TOLERANCES[case.dtype]:  # `not <=` holds for NaN too
                self.wrong.add((name, case.dtype, case.terms))
            cells = [found, "-"] if isinstance(found, str) else [f"{difference:.1e}" for difference in found]
            self.agreement.append([case.dtype, case.terms, name, *cells])
            free_memory()

    def run(self, case: Case) -> None:
        """Measures time and memory of every method."""
        rows = {name: Row(name, case) for name in methods_for(case, self.args.methods)}
        for name, row in rows.items():
            row.not_timed = self._reason_not_to_start(name, case)
        inputs = Inputs.make(case)
        # The first round is not counted: in it kernels are compiled and buffers allocated.
        for repeats in (1, self.args.repeats):
            steps = {name: partial(timed_step, name, case, inputs) for name, row in rows.items() if not row.not_timed}
            for name, times in in_turn(steps, repeats).items():
                self._record(rows[name], times)
        del inputs, steps
        for name, row in rows.items():
            if not row.not_timed:
                row.peak = self._peak(name, case)
        self.rows.append(list(rows.values()))
        self.write()

    def run_large(self, case: Case) -> None:
        """Measures the tiled form alone, its time and its memory in the same step."""
        found = in_fresh_process(measured_step, TORCH_TILED, case)
        if isinstance(found, str):
            row = Row(TORCH_TILED, case, not_timed=found)
        else:
            row = Row(TORCH_TILED, case, seconds=list(found[:2]), peak=found[2])
        self.rows.append([row])
        self.write()

    def _fits(self, name: str, case: Case) -> bool:
        """Whether main memory can hold the matrices of a dense method; on a GPU one has to try."""
        needed = DENSE_MATRICES[case.terms] * 4 * case.num_rows**2
        return case.device == "cuda" or name not in BASELINES or needed < available_memory()

    def _reason_not_to_start(self, name: str, case: Case) -> str:
        if (name, case.dtype, case.terms) in self.wrong:
            return "disagrees"
        if not self._fits(name, case):
            return OUT_OF_MEMORY
        num_rows, seconds = self.longest.get((name, case.dtype, case.terms), (case.num_rows, 0.0))
        # Work grows with the square of N. Time grows by less where the smaller batch was mostly overhead: a quarter of
        # that is what is expected here.
        return self._over_time(seconds * (case.num_rows / num_rows) ** 2 / 4)

    def _over_time(self, seconds: float) -> str:
        return f"over {self.args.time_limit:g} s" if seconds > self.args.time_limit else ""

    def _record(self, row: Row, times: list[tuple[float, float]] | str) -> None:
        if isinstance(times, str):
            row.not_timed = times
            return
        seconds, case = medians(times), row.case
        self.longest[row.name, case.dtype, case.terms] = (case.num_rows, sum(seconds))
        row.not_timed = self._over_time(sum(seconds))
        row.seconds = None if row.not_timed else seconds

    def _peak(self, name: str, case: Case) -> int | str | None:
        if case.device == "cuda":
            found = attempt(partial(measured_step, name, case))
        else:
            found = in_fresh_process(measured_step, name, case)
        return found if isinstance(found, str) else found[2]

    def write(self) -> None:
        columns = ["N", "dtype", "terms", "method", "forward ms", "backward ms", "total ms", "relative", "peak MB"]
        cells = []
        for rows in self.rows:
            totals = [sum(row.seconds) for row in rows if row.seconds and row.name in BASELINES]
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
    """What the figures of the report mean."""
    on_gpu = args.device == "cuda"
    lines = [
        f"Medians of {args.repeats} steps after one that isn't counted; the methods take turns.",
        "`relative`: total time as a multiple of the fastest of plain torch, open_clip, memeff and ours dense.",
        f"`peak MB` (10^6 bytes): {memory_words(args.device)} during one step. The embeddings are not in it, "
        "their gradients are.",
        "`contrastive`: that term alone, as the peers have it; `gap_closed_loss` itself also evaluates "
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
    on_gpu = args.device == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    name_parts = ["objective", device_slug(args.device)]
    name_parts += [f"{args.modalities}-modalities"] * (args.modalities != 2) + ["groups"] * args.groups
    name_parts += args.dtypes if len(args.dtypes) == 1 and on_gpu else []
    sweep = Sweep(args, args.output / f"{'_'.join(name_parts)}.md")
    smallest = Case(args.sizes[0], args.dim, "float32", "all", args.modalities, args.groups, args.device)
    kinds = [replace(smallest, dtype=dtype, terms=terms) for dtype in args.dtypes for terms in args.terms]
    for case in kinds:
        sweep.check(replace(case, num_rows=min(case.num_rows, MAX_ROWS_CHECKED)))
    for case in kinds:
        for num_rows in args.sizes:
            sweep.run(replace(case, num_rows=num_rows))
    if args.large and args.device == "cpu":
        sweep.run_large(replace(smallest, num_rows=LARGE))
    print(sweep.path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
