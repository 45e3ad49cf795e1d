"""CLIP (LT), CLIP (FT) and ours from the same start with the same budget, over seeds: one table, mean ± sd.

    python benchmarks/compare_objectives.py configs/demo.yaml
    python benchmarks/compare_objectives.py configs/radiology_small.yaml --seeds 0 1 2
    python benchmarks/compare_objectives.py configs/radiology_small.yaml --folds 3 --seeds 0

With --folds the training split is cross-validated (by data.fold_column), and no other split is looked at. A run that
has finished is not repeated with the same settings: a comparison that was stopped goes on where it was, and several
processes can each take some of the seeds. Further words are overrides, as for train.py.
"""

import argparse
import sys
from pathlib import Path

from comparison import CONFIGS, draw, run_once, run_script, slug

from gap_closed_clip.evaluation import metrics_table
from gap_closed_clip.training import load_config


# For each method the configuration files that it needs beside the first.
METHODS = {
    "CLIP (LT)": [CONFIGS / "clip_lt.yaml"],
    "CLIP (FT)": [CONFIGS / "clip_ft.yaml"],
    "paper 1:1": [CONFIGS / "paper_objective.yaml"],
    "ours": [],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration file of train.py")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["CLIP (LT)", "CLIP (FT)", "ours"])
    parser.add_argument("--folds", type=int, help="cross-validate over the training split")
    parser.add_argument("--output", type=Path, help="default: outputs/compare-NAME")
    return parser.parse_intermixed_args()


def compare() -> None:
    args = parse()
    output = args.output or Path("outputs") / f"compare-{Path(args.config).stem}"
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.methods}
    folders: dict[str, Path] = {}
    for seed in args.seeds:
        for fold in range(args.folds or 1):
            overrides = [*args.overrides, f"training.seed={seed}"]
            if args.folds:
                overrides += [f"data.folds={args.folds}", f"data.fold={fold}", "final_split=validation"]
            for name in args.methods:
                folder = output / f"{slug(name)}-seed{seed}-fold{fold}"
                folders.setdefault(name, folder)
                runs[name].append(run_once(load_config([args.config, *METHODS[name]], overrides), folder))
    table = metrics_table(runs)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(folders, {name: metrics[0] for name, metrics in runs.items()}, output)
    print(f"\n{args.config}, {len(runs[args.methods[0]])} runs each, mean ± standard deviation\n\n{table}")


if __name__ == "__main__":
    sys.exit(run_script(compare))
