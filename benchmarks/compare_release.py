"""The second stage: what releasing the towers adds to heads on frozen ones, CLIP's and ours, in points and minutes.

    python benchmarks/compare_release.py
    python benchmarks/compare_release.py num_train_epochs=1 --ways "image tower" --seeds 0 --methods ours
    python benchmarks/compare_release.py --workers 2 --seeds 0 --methods ours   # beside it other seeds and methods,
    python benchmarks/compare_release.py --workers 2                            # and then, for the report, all of them

For each objective and seed, heads are trained as configs/radiology_small.yaml says (with the objective's own budget,
benchmarks/budgets/), and the towers are released from there as configs/radiology_release.yaml says: both towers,
the image tower, the last four blocks of it, or adapters in it. All are evaluated on the same pairs.
A run that has finished is not repeated with the same settings. Further words are overrides of the second stage. All
run on a GPU if there is one. --finished trains nothing, and reports the runs that are there. A report of some of the
runs goes to --output, so that it does not replace that of all of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from comparison import BUDGETS, CONFIGS, METHODS, is_done, read_sources, run_once, run_script, slug
from evidence_checks import check_seeds
from measure import RESULTS, header, markdown_table, write_report

from gap_closed_clip.evaluation import read_metrics
from gap_closed_clip.evaluation.by_source import mean_over_sources
from gap_closed_clip.training import RunConfig, load_config


FIRST, SECOND = CONFIGS / "radiology_small.yaml", CONFIGS / "radiology_release.yaml"
HEADS = "heads alone"
WAYS: dict[str, list[str]] = {
    "image tower": ["freeze_text=true"],
    "last blocks": ["freeze_text=true", "freeze_vision=true", "train_vision_blocks=4"],
    "both towers": [],
    "adapters": [
        "freeze_text=true",
        "lora.towers=[vision]",
        "lora.rank=8",
        "lora.layers=all",
        "lora.merge=true",
        "tower_learning_rate=null",
    ],
}
COLUMNS = {
    "recall@10": ("R@10", "{:.1%}"),
    "margin": ("margin", "{:.3f}"),
    "debiased_modality_gap": ("debiased gap", "{:.3f}"),
    "true_pair_cosine": ("true pairs", "{:.3f}"),
    "random_pair_cosine": ("random pairs", "{:.3f}"),
}


def main() -> None:
    args = parse()
    check_seeds("the command line", args.seeds)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    devices: set[str] = set()
    for method, way, seed, config, folder in runs(args):
        if args.finished and not is_finished(config, folder):
            continue
        figures = measured(config, folder)
        found.setdefault((method, way), []).append(figures)
        devices.add(device_of(folder))
        print(f"{method}, seed {seed}, {way}: {figures}", flush=True)
    if not found:
        raise ValueError(f"No run has finished in {args.output} with these settings.")
    order = [HEADS, *WAYS]
    found = dict(sorted(found.items(), key=lambda item: (args.methods.index(item[0][0]), order.index(item[0][1]))))
    every = len(found) == 2 * len(order) and all(len(figures) == 3 for figures in found.values())
    report(found, devices, args.report or (RESULTS if every else args.output) / "release_radiology.md")


def runs(args: argparse.Namespace) -> Iterator[tuple[str, str, int, RunConfig, Path]]:
    """Method, way, seed, configuration and folder of each run, heads before what starts from them."""
    budgets = yaml.safe_load((BUDGETS / f"{FIRST.stem}.yaml").read_text(encoding="utf-8"))
    workers = [f"training.dataloader_num_workers={args.workers}"]
    for seed in args.seeds:
        for method in args.methods:
            files, words = METHODS[method]
            budget = [f"{field}={value}" for field, value in budgets[method].items()]
            heads = args.output / f"{slug(method)}-seed{seed}-heads"
            first = load_config([FIRST, *files], [*words, *budget, *workers, f"training.seed={seed}"])
            yield method, HEADS, seed, first, heads
            for way in args.ways:
                given = [*words, f"checkpoint={heads}", *workers, f"training.seed={seed}", *WAYS[way]]
                second = load_config([FIRST, SECOND, *files], [*given, *args.overrides])
                yield method, way, seed, second, args.output / f"{slug(method)}-seed{seed}-{slug(way)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["CLIP (LT)", "ours"])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[*WAYS])
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images, of each run")
    parser.add_argument("--finished", action="store_true", help="report the runs that have finished; train nothing")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare-release"))
    parser.add_argument(
        "--report", type=Path, help="default: in benchmarks/results where all runs are there, else in OUTPUT"
    )
    return parser.parse_intermixed_args()


def measured(config: RunConfig, folder: Path) -> dict[str, float]:
    """The means over the sources of a run, and the minutes that it took, evaluation included."""
    clock = folder / "minutes.json"
    if not is_finished(config, folder):
        start = time.perf_counter()
        run_once(config, folder)
        clock.write_text(json.dumps((time.perf_counter() - start) / 60), encoding="utf-8")
    (metrics,) = read_metrics(folder / "metrics.json").values()
    minutes = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else float("nan")
    return {**mean_over_sources(metrics, read_sources(folder), tuple(COLUMNS)), "minutes": minutes}


def is_finished(config: RunConfig, folder: Path) -> bool:
    settings = {**config.training, "output_dir": str(folder), "overwrite_output_dir": True}
    return is_done(replace(config, training=settings), folder)


def device_of(folder: Path) -> str:
    """The device that a finished run trained on."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["device"]


def report(found: dict[tuple[str, str], list[dict[str, float]]], devices: set[str], path: Path) -> None:
    rows = []
    for (method, way), runs in found.items():
        cells = [_cell([run[name] for run in runs], form) for name, (_, form) in COLUMNS.items()]
        minutes = float(np.median([run["minutes"] for run in runs]))
        rows.append([f"{method}, {way}", str(len(runs)), *cells, f"{minutes:.1f}"])
    columns = ["mean of the sources", "seeds", *(title for title, _ in COLUMNS.values()), "minutes"]
    table = markdown_table(columns, rows)
    note = (
        f"Trained on {', '.join(sorted(devices))}, in float32 (on a GPU convolutions multiply in TF32).\n"
        "Minutes are the clock's, medians, evaluation included: other work on the machine, and runs side by side, show"
        " in them."
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_report(path, header("Releasing the towers", device), note, table)
    print(table)


def _cell(values: list[float], form: str) -> str:
    spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + spread


if __name__ == "__main__":
    sys.exit(run_script(main))
