"""CLIP (LT), CLIP (FT), the papers' form and ours from the same start, over seeds: one table, mean ± sd.

    python benchmarks/compare_objectives.py configs/demo.yaml
    python benchmarks/compare_objectives.py configs/radiology_small.yaml num_train_epochs=24 learning_rate=1e-3
    python benchmarks/compare_objectives.py configs/radiology_small.yaml --budgets radiology_small.yaml
    python benchmarks/compare_objectives.py configs/demo.yaml --folds 3 --seeds 0

All objectives have the same budget, that of the configuration and the further words, or each its own with --budgets, a
file that choose_budgets.py left in benchmarks/budgets/. With --folds the training split is cross-validated (by
data.fold_column), and no other split is looked at. A run that has finished is not repeated with the same settings: a
comparison that was stopped goes on where it was, and several processes can each take some of the seeds. Further words
are overrides, as for train.py.
"""

import argparse
import sys
from pathlib import Path

import yaml
from comparison import BUDGETS, METHODS, draw, read_sources, report_of_runs, run_once, run_script, slug

from gap_closed_clip.training import load_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration file of train.py")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--budgets", help="a file in benchmarks/budgets/: {method: {field: value}}, over all else")
    parser.add_argument("--folds", type=int, help="cross-validate over the training split")
    parser.add_argument("--output", type=Path, help="default: outputs/compare-NAME")
    return parser.parse_intermixed_args()


def compare() -> None:
    args = parse()
    output = args.output or Path("outputs") / f"compare-{Path(args.config).stem}"
    budgets = {} if args.budgets is None else yaml.safe_load((BUDGETS / args.budgets).read_text(encoding="utf-8"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.methods}
    by_source: dict[str, dict[str, list[dict[str, float]]]] = {}
    folders: dict[str, Path] = {}
    for seed in args.seeds:
        for fold in range(args.folds or 1):
            overrides = [*args.overrides, f"training.seed={seed}"]
            if args.folds:
                overrides += [f"data.folds={args.folds}", f"data.fold={fold}", "final_split=validation"]
            for name in args.methods:
                folder = output / f"{slug(name)}-seed{seed}-fold{fold}"
                folders.setdefault(name, folder)
                files, words = METHODS[name]
                budget = [f"{field}={value}" for field, value in budgets.get(name, {}).items()]
                runs[name].append(run_once(load_config([args.config, *files], [*overrides, *words, *budget]), folder))
                for source, metrics in read_sources(folder).items():
                    by_source.setdefault(source, {}).setdefault(name, []).append(metrics)
    report = report_of_runs(runs, by_source)
    (output / "table.md").write_text(report + "\n", encoding="utf-8")
    draw(folders, {name: metrics[0] for name, metrics in runs.items()}, output)
    print(f"\n{args.config}, {len(runs[args.methods[0]])} runs each, mean ± standard deviation\n\n{report}")


if __name__ == "__main__":
    sys.exit(run_script(compare))
