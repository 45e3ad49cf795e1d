"""Time and memory of the metrics of embeddings: from arrays, from lists, and the same in plain numpy.

    python benchmarks/metrics.py             # benchmarks/results/metrics_*.md; half an hour on two cores
    python benchmarks/metrics.py --large     # 100,000 x 100,000 retrieval as well
    python benchmarks/metrics.py --metrics modality_gap clip_score --sizes 5000

`arrays` is `metric.compute(image_embeds=<array>, ...)`; `lists` is the way through `evaluate`: Python lists given to
`add_batch`, then `compute()`; `plain` is what one writes by hand with numpy, and scikit-learn where the metric has it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from measure import (
    RESULTS,
    PeakMemory,
    device_slug,
    header,
    in_fresh_process,
    in_turn,
    markdown_table,
    medians,
    megabytes,
    memory_words,
    write_report,
)
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score, v_measure_score
from sklearn.model_selection import GroupKFold

from gap_closed_clip.evaluation import load_metric


ARRAYS, LISTS, PLAIN = "arrays", "lists", "plain"
ROUTES = (ARRAYS, LISTS, PLAIN)
NUM_LABELS = 10
LARGE = 100_000
SLOW = 5.0  # CPU-seconds of a run from which on it is not repeated

Inputs = dict[str, np.ndarray | list]
Values = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One metric of one set of pairs."""

    metric: str
    num_pairs: int
    dim: int

    def inputs(self) -> Inputs:
        """Pairs that resemble one another within ten groups, a gap apart; the same at every call."""
        random = np.random.default_rng(0)
        shape = (self.num_pairs, self.dim)
        groups = random.integers(0, NUM_LABELS, self.num_pairs)
        image = random.standard_normal((NUM_LABELS, self.dim), dtype=np.float32)[groups]
        image += 2 * random.standard_normal(shape, dtype=np.float32)
        text = image + 4 * random.standard_normal(shape, dtype=np.float32)
        image[:, 0] += 10
        if self.metric == "clip_score":
            return {"image_embeds": image, "caption_embeds": text, "reference_embeds": (image + text)[:, None]}
        of_labels = self.metric in ("cross_modal_grouping", "mixed_gallery_search")
        labels = {"labels": [f"group {group}" for group in groups]} if of_labels else {}
        return {"image_embeds": image, "text_embeds": text, **labels}


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def plain_gap(image_embeds: np.ndarray, text_embeds: np.ndarray) -> Values:
    """From sums, in float64."""
    x, y = unit(image_embeds.astype(np.float64)), unit(text_embeds.astype(np.float64))
    n, gap, true_pair = len(x), np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)), (x * y).sum(axis=1).mean()

    def off_diagonal(a: np.ndarray, b: np.ndarray) -> float:
        return (a.sum(axis=0) @ b.sum(axis=0) - (a * b).sum()) / (n * (n - 1))

    noise = (((x - y) ** 2).sum(axis=1).mean() - gap**2) / (n - 1)
    return {
        "modality_gap": gap,
        "debiased_modality_gap": np.sqrt(max(0.0, gap**2 - noise)),
        "true_pair_cosine": true_pair,
        "random_pair_cosine": off_diagonal(x, y),
        "margin": true_pair - off_diagonal(x, y),
        "mean_cosine_image": off_diagonal(x, x),
        "mean_cosine_text": off_diagonal(y, y),
    }


def plain_retrieval(image_embeds: np.ndarray, text_embeds: np.ndarray) -> Values:
    """From the whole matrix of cosines, in float32; a tie is what float32 makes one."""
    cosines = unit(image_embeds) @ unit(text_embeds).T
    values = {}
    for name, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        ranks = (scores >= scores.diagonal()[:, None]).sum(axis=1)
        values |= {f"{name}_recall@{k}": (ranks <= k).mean() for k in (1, 5, 10)}
        values |= {f"{name}_chance_recall@{k}": min(1.0, k / len(ranks)) for k in (1, 5, 10)}  # one item is correct
        values[f"{name}_median_rank"] = np.median(ranks)
    for name in (f"{what}@{k}" for what in ("recall", "chance_recall") for k in (1, 5, 10)):
        values[name] = (values[f"image_to_text_{name}"] + values[f"text_to_image_{name}"]) / 2
    return values


def plain_mixed_search(image_embeds: np.ndarray, text_embeds: np.ndarray, labels: list[str]) -> Values:
    """From the whole matrix of cosines of all 2 N items, in float32."""
    items, n = unit(np.concatenate([image_embeds, text_embeds])), len(labels)
    is_text, groups, rows = np.repeat([False, True], n), np.tile(labels, 2), np.arange(2 * n)
    cosines = items @ items.T
    cosines[rows, rows] = cosines[rows, np.roll(rows, n)] = -np.inf
    nearest = np.argpartition(cosines, -10, axis=1)[:, -10:]
    other, fits = is_text[nearest] != is_text[:, None], groups[nearest] == groups[:, None]
    with np.errstate(invalid="ignore"):
        across = (other & fits).sum(axis=1) / other.sum(axis=1)
    label, counts = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    return {
        "other_kind_share@10": other.mean(),
        "chance_other_kind_share@10": 0.5,
        "mixed_label_precision@10": fits.mean(),
        "chance_mixed_label_precision@10": ((counts[label] - 2) / (2 * n - 2)).mean(),
        "other_kind_label_precision@10": np.nanmean(across),
    }


def plain_grouping(image_embeds: np.ndarray, text_embeds: np.ndarray, labels: list[str]) -> Values:
    """scikit-learn on float32; for the neighbours the whole matrix of cosines without the pairs themselves."""
    x, y = unit(image_embeds), unit(text_embeds)
    names, groups = np.unique(labels, return_inverse=True)
    clusters = KMeans(len(names), n_init=10, random_state=0).fit_predict(np.concatenate([x, y]))
    truth, rows = np.concatenate([groups, groups]), np.arange(len(groups))
    v_measure = v_measure_score(truth, clusters)
    values = {"v_measure": v_measure, "nmi": v_measure, "ari": adjusted_rand_score(truth, clusters)}
    values["chance_balanced_accuracy"] = 1 / len(names)
    cosines = x @ y.T
    np.fill_diagonal(cosines, -np.inf)
    for name, fitted, tested, scores in (("image_to_text", x, y, cosines.T), ("text_to_image", y, x, cosines)):
        nearest = np.argpartition(scores, -5, axis=1)[:, -5:]
        votes = np.zeros((len(rows), len(names)))
        np.add.at(votes, (rows[:, None], groups[nearest]), 1 + np.take_along_axis(scores, nearest, axis=1) / 100)
        predicted = {
            "knn": votes.argmax(axis=1),
            "linear_probe": np.zeros_like(groups),
            "majority": np.zeros_like(groups),
        }
        for train, test in GroupKFold(5).split(rows, groups=rows):
            mean = fitted[train].mean(axis=0)
            scale = np.sqrt(((fitted[train] - mean) ** 2).sum(axis=1).mean())
            probe = LogisticRegression(C=32.0, max_iter=1000).fit((fitted[train] - mean) / scale, groups[train])
            predicted["linear_probe"][test] = probe.predict((tested[test] - mean) / scale)
            predicted["majority"][test] = np.bincount(groups[train]).argmax()
        values |= {f"{what}_accuracy_{name}": (found == groups).mean() for what, found in predicted.items()}
        for what in ("knn", "linear_probe"):
            values[f"{what}_balanced_accuracy_{name}"] = balanced_accuracy_score(groups, predicted[what])
    return values


def plain_clip_score(image_embeds: np.ndarray, caption_embeds: np.ndarray, reference_embeds: np.ndarray) -> Values:
    """In float64; as many references for every image."""
    image, caption, references = (unit(z.astype(np.float64)) for z in (image_embeds, caption_embeds, reference_embeds))
    cosine, best = (image * caption).sum(axis=1), (references * caption[:, None]).sum(axis=2).max(axis=1)
    score, positive = 2.5 * np.maximum(cosine, 0), np.maximum(best, 0)
    with np.errstate(invalid="ignore"):
        harmonic = np.nan_to_num(2 * score * positive / (score + positive))
    return {
        "clip_score": score.mean(),
        "image_caption_cosine": cosine.mean(),
        "ref_clip_score": harmonic.mean(),
        "caption_reference_cosine": best.mean(),
    }


PEERS: dict[str, Callable[..., Values]] = {
    "modality_gap": plain_gap,
    "clip_score": plain_clip_score,
    "cross_modal_retrieval": plain_retrieval,
    "cross_modal_grouping": plain_grouping,
    "mixed_gallery_search": plain_mixed_search,
}


def prepared(case: Case, route: str) -> Callable[[], Values]:
    """The step to be measured; inputs and metric are there before."""
    inputs = case.inputs()
    if route == PLAIN:
        return partial(PEERS[case.metric], **inputs)
    metric = load_metric(case.metric, keep_in_memory=True)
    if route == ARRAYS:
        return partial(metric.compute, **inputs)
    lists = {name: column if isinstance(column, list) else column.tolist() for name, column in inputs.items()}

    def through_evaluate() -> Values:
        metric.add_batch(**lists)
        return metric.compute()

    return through_evaluate


def timed(step: Callable[[], Values]) -> tuple[float, float, Values]:
    """CPU-seconds of all threads, seconds, values."""
    cpu, wall = time.process_time(), time.perf_counter()
    values = step()
    return time.process_time() - cpu, time.perf_counter() - wall, values


@dataclass
class Run:
    """What was measured in a process of its own: peak bytes beside the inputs, and bytes of the process with them."""

    cpu: float
    wall: float
    values: Values
    peak: int | None
    process: int | None


def measured(case: Case, route: str) -> Run:
    """For `in_fresh_process`."""
    prepared(Case(case.metric, 100, case.dim), route)()  # libraries load, threads start
    step = prepared(case, route)
    with PeakMemory("cpu") as peak:
        resident = resident_bytes()
        cpu, wall, values = timed(step)
    process = None if None in (resident, peak.bytes) else resident + peak.bytes
    return Run(cpu, wall, {name: float(value) for name, value in values.items()}, peak.bytes, process)


def resident_bytes() -> int | None:
    """What this process occupies; None where there is no /proc."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.is_file() else None


def largest_difference(run: Run, other: Run) -> str:
    largest = max(abs(value - other.values[name]) for name, value in run.values.items())
    return f"{largest:.1e}" if largest else "0"


@dataclass
class Table:
    """All cases in turn; what is known so far is written after each."""

    args: argparse.Namespace
    path: Path
    rows: list[list[str]] = field(default_factory=list)

    def run(self, case: Case, routes: Sequence[str]) -> None:
        runs = {route: in_fresh_process(measured, case, route) for route in routes}
        quick = [route for route, run in runs.items() if isinstance(run, Run) and run.cpu < SLOW]
        steps = {route: partial(timed, prepared(case, route)) for route in quick}
        in_turn(steps, 1)
        times = in_turn(steps, self.args.repeats)
        arrays = runs.get(ARRAYS)
        for route, run in runs.items():
            if isinstance(run, str):
                cells = [run, "-", "-", "-", "-"]
            else:
                cpu, wall = medians([time[:2] for time in times[route]]) if route in quick else (run.cpu, run.wall)
                difference = largest_difference(run, arrays) if isinstance(arrays, Run) and route != ARRAYS else "-"
                cells = [f"{cpu:.3g}", f"{wall:.3g}", megabytes(run.peak), megabytes(run.process), difference]
            self.rows.append([case.metric, str(case.num_pairs), route, *cells])
        self.write()

    def write(self) -> None:
        columns = ["metric", "N", "route", "CPU s", "s", "peak MB", "process MB", "difference"]
        write_report(
            self.path,
            header(f"The metrics of embeddings: N pairs, D = {self.args.dim}", "cpu"),
            notes(self.args),
            markdown_table(columns, self.rows, left=3),
        )


def notes(args: argparse.Namespace) -> str:
    """What the table says and what it doesn't."""
    lines = [
        f"Medians of {args.repeats} runs after one that isn't counted, the routes take turns; what takes {SLOW:g} "
        "CPU-seconds and more runs once, in the process that also measures its memory.",
        "`CPU s`: of all threads. Where other programs share the machine, `s` says little, and `CPU s` is a little "
        "high too: threads wait for one another.",
        "`arrays`: `compute` of float32 arrays. `lists`: Python lists, there before, given to `add_batch`, then "
        "`compute()`.",
        "`plain`: the same by hand on arrays, with numpy, and scikit-learn for the grouping; retrieval and the "
        "grouping's neighbours by a matrix of N x N float32 cosines, the mixed gallery by one of 2N x 2N.",
        f"`peak MB` (10^6 bytes): {memory_words('cpu')}. The inputs are not in it. "
        "`process MB`: with the inputs, Python and its libraries.",
        "`difference`: the largest of a value from that of `arrays`.",
        "No ids are given: every row is an image and a caption of its own. `clip_score` has one reference an image.",
    ]
    if args.note:
        lines.append(args.note)
    return "\n".join(f"- {line}" for line in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", default=[5000, 20_000], help="pairs")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--metrics", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true", help=f"retrieval of {LARGE} pairs as well")
    parser.add_argument("--note", help="a line for the report, e.g. what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    return parser.parse_args()


def main() -> int:
    args = parse()
    table = Table(args, args.output / f"metrics_{device_slug('cpu')}.md")
    for metric in args.metrics:
        for num_pairs in args.sizes:
            table.run(Case(metric, num_pairs, args.dim), args.routes)
    if args.large:
        table.run(Case("cross_modal_retrieval", LARGE, args.dim), [ARRAYS])
    print(table.path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
