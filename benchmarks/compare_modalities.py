"""What a third modality gives and takes: CLIP and ours with and without the record, over seeds.

    python benchmarks/compare_modalities.py configs/demo.yaml configs/records.yaml
    python benchmarks/compare_modalities.py configs/radiology_small.yaml configs/radiology_records.yaml \\
        --fields age,sex age,sex,location_category,modality,plane --budgets radiology_small.yaml

Each method and seed is trained on images and captions alone and with the record (data.modalities.record of the
configuration, or each of --fields). The report tells for every two modalities gap, margin and retrieval, queries of
two modalities, how well a caption finds the record's fields, and how often captions tell them. A run that has finished
is not repeated with the same settings. Further words are overrides, as for train.py.
"""

import argparse
import sys
from pathlib import Path

import yaml
from comparison import BUDGETS, METHODS, run_once, run_script, slug
from evidence_checks import check_seeds
from measure import RESULTS, header, write_report

from gap_closed_clip.evaluation import metrics_table
from gap_closed_clip.evaluation.modality_report import modality_report
from gap_closed_clip.training import load_config


ALONE = "image and text"
# What the table of image and text tells: enough to see whether the record helps or harms them.
ROWS = ("recall@10", "margin", "debiased_modality_gap", "true_pair_cosine", "random_pair_cosine", "v_measure")
Runs = dict[str, list[dict[str, float]]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml or KEY=VALUE")
    parser.add_argument("--fields", nargs="+", help="records to compare, each its fields with commas between them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["CLIP (LT)", "ours"])
    parser.add_argument("--budgets", help="a file in benchmarks/budgets/: {method: {field: value}}, over all else")
    parser.add_argument("--output", type=Path, help="default: outputs/compare-modalities-NAME")
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/modalities_NAME.md")
    return parser.parse_intermixed_args()


def compare() -> None:
    args = parse()
    check_seeds("the command line", args.seeds)
    files = [word for word in args.words if "=" not in word]
    words = [word for word in args.words if "=" in word]
    if not files:
        raise ValueError("No configuration is named: give its file, such as configs/demo.yaml configs/records.yaml.")
    name = Path(files[-1]).stem
    output = args.output or Path("outputs") / f"compare-modalities-{name}"
    budgets = {} if args.budgets is None else yaml.safe_load((BUDGETS / args.budgets).read_text(encoding="utf-8"))
    variants = {ALONE: ["data.modalities=null"], **records_of(load_config(files, words).data.modalities, args.fields)}
    runs: Runs = {f"{method}, {variant}": [] for variant in variants for method in args.methods}
    for seed in args.seeds:
        for variant, modality in variants.items():
            for method in args.methods:
                more_files, more_words = METHODS[method]
                budget = [f"{field}={value}" for field, value in budgets.get(method, {}).items()]
                overrides = [*words, f"training.seed={seed}", *modality, *more_words, *budget]
                folder = output / f"{slug(method)}-{slug(variant)}-seed{seed}"
                runs[f"{method}, {variant}"].append(run_once(load_config([*files, *more_files], overrides), folder))
        report = report_of(runs)  # after each seed, should the next one be interrupted
        path = args.report or RESULTS / f"modalities_{name}.md"
        write_report(path, header(f"Modalities: {name}", "cpu"), report)
    print(report)


def records_of(modalities: dict | None, fields: list[str] | None) -> dict[str, list[str]]:
    """{name of a variant: words}, of each list of fields; without lists that of the configuration.

    Raises:
        ValueError: the configuration has no record.
    """
    if not modalities or "record" not in modalities:
        raise ValueError("The configuration has no data.modalities.record: give configs/records.yaml as well.")
    lists = [text.split(",") for text in fields] if fields else [list(modalities["record"])]
    return {f"record of {', '.join(each)}": [f"data.modalities.record=[{', '.join(each)}]"] for each in lists}


def report_of(runs: Runs) -> str:
    """The Markdown report: image and text of all variants, then what only those with a record have."""
    image_and_text = {
        name: [{row: run[row] for row in ROWS if row in run} for run in found] for name, found in runs.items()
    }
    seeds = len(next(iter(runs.values())))
    parts = [
        f"{seeds} seeds, mean ± standard deviation." if seeds > 1 else "One seed.",
        "## Image and text",
        metrics_table(image_and_text),
    ]
    return "\n\n".join([*parts, modality_report(runs)])


if __name__ == "__main__":
    sys.exit(run_script(compare))
