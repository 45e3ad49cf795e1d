"""
Does closing the gap help? Every way to close it, side by side on the same pairs, with intervals and tests.

    python benchmarks/evidence.py radiology                        # a plan in benchmarks/evidence/
    python benchmarks/evidence.py my_plan.yaml
    python benchmarks/evidence.py configs/demo.yaml                # a configuration of train.py
    python benchmarks/evidence.py pairs.csv label_columns=organ    # your own pairs, on published towers
    python benchmarks/evidence.py pairs.csv --report outputs/report
    python benchmarks/evidence.py radiology --workers 8            # as many trainings side by side

Each method of benchmarks/evidence/methods.yaml is trained over seeds, once at a budget that all share and once at its
own, chosen by cross-validation over training cases; post-hoc methods are fitted on the baseline's training embeddings.
Models that are there already are measured as they are where a plan names their `folders`.
What is measured: search of instances, search in a gallery of both kinds, groups, zero-shot labels with their
calibration, the geometry of the space and, where the plan asks for them (`captions`), captions by decoders that learn
from images, and from text alone; those take longer than all else, and a report without them is written first, to the
folder of the trainings. Trainings that are there with the same settings and the same code are not repeated: a
run that was stopped goes on where it was. The report, its figures and all numbers are written to
benchmarks/results/evidence_NAME.* where a plan of benchmarks/evidence is run as it is; else to the folder of --report,
or that of the trainings.
"""

import argparse
import json
import sys
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from comparison import run_script
from evidence_captions import CaptionStudy
from evidence_figures import draw
from evidence_plan import plan_of_ours, read_plan
from evidence_report import report
from evidence_runs import open_runs
from evidence_store import Store, made_on
from evidence_study import Evidence
from evidence_workers import helpers, share
from measure import RESULTS, command_line

from gap_closed_clip.disk import replacing
from gap_closed_clip.evaluation import load_metric, plot_cosine_histograms, plot_projection


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a plan, a configuration of train.py, or a source of pairs as data.source")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all methods, as for train.py")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--methods", nargs="+", help="instead of the plan's; names in methods.yaml")
    parser.add_argument("--output", type=Path, help="of trainings; default: outputs/evidence-NAME")
    parser.add_argument("--report", type=Path, help="folder of the report; see above for its default")
    parser.add_argument("--any-code", action="store_true", help="take trainings of another state of the code as well")
    parser.add_argument("--workers", type=int, default=1, help="processes that train side by side; default: 1")
    parser.add_argument("--helper-of", type=int, help=argparse.SUPPRESS)  # the process that started this one
    args = parser.parse_intermixed_args()
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: give 1 or more.")
    return args


def main() -> None:
    args = parse()
    plan = read_plan(args.what, args.overrides, seeds=args.seeds, methods=args.methods)
    output = args.output or Path("outputs") / f"evidence-{plan.name}"
    as_it_is = plan_of_ours(args.what) and not (args.overrides or args.seeds or args.methods)
    folder = args.report or (RESULTS if as_it_is else output)
    folder.mkdir(parents=True, exist_ok=True)
    runs = open_runs(plan, output / "models")
    device = runs.inputs.args.device
    store = Store(output / "trainings", args.any_code, workers=args.workers, device=device)
    evidence = Evidence(plan, runs, store)
    if args.helper_of is not None:
        return help_train(evidence, output, args)
    described = runs.describe()
    print("\n".join(described), flush=True)
    if plan.captions is not None and (missing := load_metric("caption_meteor").missing()):
        print(f"METEOR is left out: {missing}", flush=True)
    head = {"name": plan.name, "title": plan.title, "found": described, "command": command_line()}
    with helpers(args.workers - 1, output):
        train_spaces(evidence)
        found = evidence.found()
        minutes = round(evidence.seconds / 60, 1)
        content = {**head, **made_on(store), "date": str(date.today()), "minutes": minutes, **found}
        if plan.captions is not None:
            early = write(evidence, content, output)
            print(f"Captions take longer. The report without them is {early}.", flush=True)
            captions = caption_study(evidence, found["budgets"], output, args)
            train_decoders(captions)
            content["captions"] = captions.found()
            content |= made_on(store, captions.results)
            content["minutes"] = round((evidence.seconds + captions.seconds) / 60, 1)
            captions.draw(output / "captions.png")  # of images that may be nobody's to show: not beside the report
    print(f"The report is {write(evidence, content, folder)}.")


def write(evidence: Evidence, content: dict[str, Any], folder: Path) -> Path:
    """Writes the results, the figures and the report, whose path it gives, into a folder."""
    content = {**content, "figures": draw_all(evidence, content, folder)}
    path = folder / f"evidence_{evidence.plan.name}.json"
    with replacing(path) as draft:
        draft.write_text(to_json(content), encoding="utf-8")
    with replacing(path.with_suffix(".md")) as draft:
        draft.write_text(report(content), encoding="utf-8")
    return path.with_suffix(".md")


def help_train(evidence: Evidence, output: Path, args: argparse.Namespace) -> None:
    """Makes what the report needs, and no other process is making; what was found is in the stores."""
    train_spaces(evidence, args.helper_of)
    if evidence.plan.captions is not None:
        budgets = evidence.chosen(evidence.grid())
        train_decoders(caption_study(evidence, budgets, output, args), args.helper_of)


def train_spaces(evidence: Evidence, parent: int | None = None) -> None:
    """Makes all trainings of spaces that no other process is making, and waits for the others."""
    for calls in evidence.steps():
        share(calls, evidence.results, parent)
    evidence.seconds = 0.0  # counted again, once each, when the results are collected


def train_decoders(captions: CaptionStudy, parent: int | None = None) -> None:
    """The same of the decoders that write captions."""
    encoders = product(captions.methods, captions.seeds)
    share([partial(captions.of_encoder, *each) for each in encoders], captions.results, parent)
    captions.seconds = 0.0


def caption_study(evidence: Evidence, budgets: dict[str, Any], output: Path, args: argparse.Namespace) -> CaptionStudy:
    """The decoders of the plan, on encoders of these budgets."""
    scripts = ("captions", "measure", "runs")
    store = Store(output / "captions", args.any_code, scripts, args.workers, evidence.runs.inputs.args.device)
    return CaptionStudy(evidence.plan, evidence.runs, store, budgets)


def draw_all(evidence: Evidence, content: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draws the figures into a folder; {figure: file}."""
    figures = draw(content, folder)
    spaces, metrics = evidence.spaces()
    files = {name: f"evidence_{evidence.plan.name}_{name}.png" for name in ("projection", "cosines")}
    plot_projection(spaces, metrics, folder / files["projection"])
    plot_cosine_histograms(spaces, metrics, folder / files["cosines"])
    return {**files, **figures}


def to_json(content: dict[str, Any]) -> str:
    """JSON with a line for each field, and for each run, so that changes can be read."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in value)
            lines.append(f"{json.dumps(name)}: [\n{rows}\n]")
        elif name == "captions":
            lines.append(f"{json.dumps(name)}: {to_json(value)}".rstrip())
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(run_script(main))
