"""Each objective's own best budget, by cross-validation over training cases, on features that were embedded once.

    python benchmarks/choose_budgets.py configs/radiology_small.yaml
    python benchmarks/choose_budgets.py configs/radiology_small.yaml --methods ours --folds 2

Every objective of compare_objectives.py (and other balances of ours) is trained with every budget of the grid: number
of epochs, learning rate, dropout of the projections. Training cases alone are used: the pairs of a case, or of an
image, stay in one fold, and no validation or test split is looked at. What is compared is R@10, the mean of both
directions, averaged over the sources and the folds. The best budget of each method is written to
benchmarks/budgets/NAME.yaml, which compare_objectives.py takes, and the table to benchmarks/results/. Trials that were
made are not made again: a grid that was stopped goes on where it was, and several processes can each take some of the
methods.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from comparison import BUDGETS, METHODS, cases, run_script
from measure import RESULTS, header, markdown_table, write_report
from torch.utils.data import DataLoader
from transformers import set_seed

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel
from gap_closed_clip.data.features import FeaturePairs
from gap_closed_clip.data.folds import assign_folds
from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings
from gap_closed_clip.evaluation.by_source import mean_over_sources, measure_sources
from gap_closed_clip.training import GapClosedClipTrainer, RecenterCallback, RunConfig, load_config
from gap_closed_clip.training.build import RunParts, build
from gap_closed_clip.training.preflight import preflight


GRID = {
    "num_train_epochs": [6, 12, 24],
    "learning_rate": [1e-3, 3e-3],
    "projection_dropout": [0.1, 0.3, 0.5],
}
CENTERED = ["center_projections=true"]
# Other balances than the default, to choose among: alignment alone, and with a third to a half of it in uniformity.
BALANCES = {
    f"ATP {align:g} + CU {uniformity:g}": [*CENTERED, f"align_weight={align}", f"uniformity_weight={uniformity}"]
    for align, uniformity in [(1, 1), (2, 1), (3, 0), (3, 1), (4, 2), (6, 2), (10, 4)]
}


@dataclass
class Trial:
    """
    What a budget gave.

    Args:
        method: name of the objective.
        objective: the fields of the model's configuration that were set for it.
        budget: values of the grid's fields.
        fold: that was held out.
        metrics: means over the sources.
    """

    method: str
    objective: dict[str, Any]
    budget: dict[str, float]
    fold: int
    metrics: dict[str, float]


def main() -> None:
    args = parse()
    methods = {**{name: METHODS[name] for name in METHODS}, **{name: [[], words] for name, words in BALANCES.items()}}
    config = load_config([args.config], [*args.overrides, "use_cpu=true"] if args.cpu else args.overrides)
    log = args.output / f"trials-{Path(args.config).stem}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parts, inputs = prepare(config, folder)
        folds = np.array(assign_folds(cases(parts.train_pairs.pairs), args.num_folds))
        budgets = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
        for budget, name, fold in itertools.product(budgets, args.methods, range(args.folds)):
            files, words = methods[name]
            objective = load_config([args.config, *files], [*args.overrides, *words])
            trial = Trial(name, objective.model.config, budget, fold, {})
            if any(same(trial, other) for other in read(log)):
                continue
            trial.metrics = try_budget(objective, parts, inputs, folds, trial, folder)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(trial)) + "\n")
            print(f"{name}, {describe(budget)}, fold {fold}: R@10 {trial.metrics['recall@10']:.1%}", flush=True)
    report(list(read(log)), args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration file of train.py with frozen towers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *BALANCES], default=[*METHODS])
    parser.add_argument("--num-folds", type=int, default=4, help="folds that the training cases are cut into")
    parser.add_argument("--folds", type=int, default=2, help="folds of those that are held out in turn")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the trials")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_intermixed_args()


def prepare(config: RunConfig, folder: str) -> tuple[RunParts, Any]:
    """The pairs with their features, and the towers."""
    config.training.update(output_dir=folder, eval_strategy="no", final_split="none", report_to="none")
    inputs = preflight(config)
    parts = build(config, inputs)
    if not parts.towers_have_run:
        raise ValueError("Budgets are chosen on features: set model.freeze_vision=true and model.freeze_text=true.")
    return parts, inputs


def try_budget(
    config: RunConfig, parts: RunParts, inputs: Any, folds: np.ndarray, trial: Trial, folder: str
) -> dict[str, float]:
    """Train new projections on all folds but one, and measure that one."""
    set_seed(trial.fold)
    dropout = {"projection_dropout": trial.budget["projection_dropout"]}
    model_config = GapClosedClipConfig.from_dict({**parts.encoder.config.to_dict(), **config.model.config, **dropout})
    towers = {"vision_model": parts.encoder.vision_model, "text_model": parts.encoder.text_model}
    model = GapClosedClipModel(model_config, **towers)
    model.freeze_towers(vision=True, text=True)
    budget = {name: value for name, value in trial.budget.items() if name != "projection_dropout"}
    config.training.update(
        **budget, output_dir=folder, seed=trial.fold, eval_strategy="no", save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = config.training_arguments()
    train_pairs = parts.train_pairs.select(np.flatnonzero(folds != trial.fold))
    held_out = parts.train_pairs.select(np.flatnonzero(folds == trial.fold)).plain()
    loader = DataLoader(train_pairs.plain(), args.eval_batch_size, collate_fn=parts.pair_collator)
    trainer = GapClosedClipTrainer(
        model=model, args=args, train_dataset=train_pairs, data_collator=parts.pair_collator,
        callbacks=[RecenterCallback(loader, at_evaluations=False)],
    )  # fmt: skip
    trainer.train()
    embeddings = embed(model, held_out, parts.pair_collator, args.eval_batch_size)
    found = evaluate_embeddings(embeddings, grouping=False)
    by_source = measure_sources(embeddings, found, lambda part: evaluate_embeddings(part, grouping=False))
    names = ("recall@10", "margin", "debiased_modality_gap", "true_pair_cosine", "random_pair_cosine")
    return mean_over_sources(found, by_source, names)


@torch.no_grad()
def embed(model: GapClosedClipModel, pairs: FeaturePairs, collator: Any, batch_size: int) -> PairEmbeddings:
    """The embeddings of pairs whose towers have run."""
    model.eval()
    outputs = [
        model(**{name: value.to(model.device) for name, value in batch.items()})
        for batch in DataLoader(pairs, batch_size, collate_fn=collator)  # type: ignore[arg-type]
    ]
    images, texts = (
        torch.cat([output[name] for output in outputs]).cpu().numpy() for name in ("image_embeds", "text_embeds")
    )
    sources = pairs["source"] if "source" in pairs.pairs.column_names else [""] * len(pairs)
    return PairEmbeddings(images, texts, pairs["image_id"], pairs["caption"], [""] * len(pairs), list(sources))


def read(log: Path) -> Iterator[Trial]:
    """The trials made so far."""
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            yield Trial(**json.loads(line))


def same(trial: Trial, other: Trial) -> bool:
    """Whether two trials differ in nothing but what they gave."""
    return replace(trial, metrics={}) == replace(other, metrics={})


def describe(budget: dict[str, float]) -> str:
    epochs, rate, dropout = (budget[name] for name in GRID)
    return f"{epochs} epochs, rate {rate:g}, dropout {dropout:g}"


def report(trials: list[Trial], args: argparse.Namespace) -> None:
    """Write the table of all budgets, and the best one of each method, as it is configured now."""
    latest = {trial.method: trial.objective for trial in trials}
    trials = [trial for trial in trials if trial.objective == latest[trial.method]]
    methods = list(dict.fromkeys(trial.method for trial in trials))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    budgets: dict[str, dict[str, float]] = {}
    for trial in trials:
        name = describe(trial.budget)
        budgets[name] = trial.budget
        found.setdefault(name, {}).setdefault(trial.method, []).append(trial.metrics)

    def mean(name: str, method: str, metric: str) -> float:
        values = [metrics[metric] for metrics in found[name].get(method, [])]
        return float(np.mean(values)) if values else float("nan")

    best = {method: max(found, key=lambda name: np.nan_to_num(mean(name, method, "recall@10"))) for method in methods}
    rows = [[name, *(f"{mean(name, method, 'recall@10'):.1%}" for method in methods)] for name in found]
    chosen = [
        [
            method,
            best[method],
            f"{mean(best[method], method, 'recall@10'):.1%}",
            f"{mean(best[method], method, 'margin'):.3f}",
            f"{mean(best[method], method, 'debiased_modality_gap'):.3f}",
            f"{mean(best[method], method, 'random_pair_cosine'):.3f}",
        ]
        for method in methods
    ]
    stem = Path(args.config).stem
    BUDGETS.mkdir(exist_ok=True)
    content = {method: dict(budgets[best[method]]) for method in methods}  # copies: YAML would name what is shared
    (BUDGETS / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    columns = ["method", "its best budget", "R@10", "margin", "debiased gap", "random pairs"]
    write_report(
        RESULTS / f"budgets_{stem}.md",
        header(f"The best budget of each objective, {stem}", "cpu" if args.cpu else accelerator()),
        markdown_table(columns, chosen, left=2),
        f"R@10 of every budget, mean of {args.folds} of {args.num_folds} folds:",
        markdown_table(["budget", *methods], rows),
    )


def accelerator() -> torch.device | str:
    return torch.accelerator.current_accelerator() or "cpu"


if __name__ == "__main__":
    sys.exit(run_script(main))
