"""Ways to fine-tune one trained model on other pairs, with the same budget, over seeds: one table, mean ± sd.

    python train.py configs/radiology_small.yaml data.source=phantoms data.label_columns=null data.fold_column=null \\
        phantom_train_pairs=1536 phantom_size=116 output_dir=outputs/phantom_base
    python benchmarks/compare_finetuning.py outputs/phantom_base num_train_epochs=4 max_caption_tokens=48 \\
        use_cpu=true bf16=auto

All runs are those of configs/lora.yaml; they differ in what trains and in the learning rate alone. Each method first
chooses its rate among a few, by one fold cut from the training cases (data.fold_column). The validation pairs are
looked at once, after the last epoch. A run that has finished is not repeated with the same settings: a comparison
that was stopped goes on where it was. Further words are overrides, as for train.py.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from comparison import CONFIGS, run_once, run_script, slug
from evidence_checks import check_seeds
from measure import RESULTS, header, markdown_table, write_report
from torch.utils.data import DataLoader

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import PairCollator, load_checked_pairs
from gap_closed_clip.evaluation import evaluate_model, metrics_table
from gap_closed_clip.training import RunConfig, add_adapters, build_model_and_processor, load_config, recenter


Metrics = dict[str, float]
NONE, RECENTERED = "none", "centered anew"
FOLDS = 3


@dataclass(frozen=True)
class Method:
    """
    A way of fine-tuning.

    Args:
        change: makes this method's configuration from one with adapters on both towers.
        rates: learning rates to choose from.
    """

    change: Callable[[RunConfig], RunConfig]
    rates: tuple[float, ...]


def full(config: RunConfig) -> RunConfig:
    """Train all parameters."""
    return replace(config, lora=None)


def full_image(config: RunConfig) -> RunConfig:
    """Train all parameters but those of the text tower."""
    return replace(config, lora=None, model=replace(config.model, freeze_text=True))


def lora(config: RunConfig) -> RunConfig:
    """Train adapters on both towers."""
    return config


def lora_image(config: RunConfig) -> RunConfig:
    """Train adapters on the image tower."""
    return replace(config, lora=replace(config.lora, towers=["vision"]))


def projections(config: RunConfig) -> RunConfig:
    """Train nothing of the towers."""
    return replace(config, lora=None, model=replace(config.model, freeze_vision=True, freeze_text=True))


METHODS = {
    "full": Method(full, (3e-5, 1e-4, 3e-4, 1e-3)),
    "LoRA": Method(lora, (3e-4, 1e-3, 3e-3, 1e-2)),
    "projections": Method(projections, (1e-3, 3e-3, 1e-2, 3e-2)),
    "full, image tower": Method(full_image, (3e-5, 1e-4, 3e-4, 1e-3)),
    "LoRA, image tower": Method(lora_image, (3e-4, 1e-3, 3e-3, 1e-2)),
}


def with_training(config: RunConfig, **settings) -> RunConfig:
    return replace(config, training={**config.training, **settings})


def mean_recall(metrics: Metrics) -> float:
    """The mean of R@1, R@5 and R@10 in both directions, by which the learning rates are chosen."""
    return float(np.mean([value for name, value in metrics.items() if "_recall@" in name]))


def try_rates(method: str, config: RunConfig, epochs: float, output: Path) -> dict[float, Metrics]:
    """Train with each learning rate of a method; gives the metrics on the first fold of the training cases."""
    config = replace(config, data=replace(config.data, folds=FOLDS, fold=0))
    config = with_training(METHODS[method].change(config), num_train_epochs=epochs, final_split="validation", seed=0)
    return {
        rate: run_once(with_training(config, learning_rate=rate), output / f"{slug(method)}-rate{rate:g}")
        for rate in METHODS[method].rates
    }


def best_rate(tried: dict[float, Metrics]) -> float:
    """The learning rate with the highest mean recall."""
    return max(tried, key=lambda rate: mean_recall(tried[rate]))


def evaluate_base(config: RunConfig) -> dict[str, list[Metrics]]:
    """Evaluate the base model as it is, and with only the means of its centering replaced by the new pairs' own."""
    data, args = config.data, config.training_arguments()
    held_out = load_checked_pairs(data, args.final_split)
    model, processor = load_checkpoint(config.model.checkpoint)
    settings = {"batch_size": args.eval_batch_size, "max_length": data.max_caption_tokens, "window": data.window}
    found = {NONE: [evaluate_model(model, processor, held_out, **settings).metrics]}
    if model.config.center_projections:
        collator = PairCollator(processor, None, data.max_caption_tokens, data.window)
        recenter(model, DataLoader(load_checked_pairs(data, "train"), args.eval_batch_size, collate_fn=collator))
        found[RECENTERED] = [evaluate_model(model, processor, held_out, **settings).metrics]
    return found


def parameters(config: RunConfig) -> tuple[int, int]:
    """The number of parameters that a method trains, and that of all parameters of the base model."""
    model, _ = build_model_and_processor(config.model, ())
    num_parameters = sum(p.numel() for p in model.parameters())
    trained: GapClosedClipModel = model
    if config.lora is not None:
        trained = add_adapters(model, config.lora, None, None)
    return sum(p.numel() for p in trained.parameters() if p.requires_grad), num_parameters


def size_on_disk(folder: Path) -> str:
    """The size of the weights that a run has saved, in words."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.2f} MB"


def table_of_methods(config: RunConfig, tried: dict[str, dict[float, Metrics]], folders: dict[str, Path]) -> str:
    """A table of what each method trains and saves, with its learning rate."""
    rows = []
    for name, folder in folders.items():
        num_trained, num_parameters = parameters(METHODS[name].change(config))
        share = f"{num_trained / num_parameters:.2%}"
        rows.append([name, f"{num_trained:,}", share, size_on_disk(folder), f"{best_rate(tried[name]):g}"])
    return markdown_table(["method", "trainable", "of the base's", "weights saved", "learning rate"], rows)


def table_of_rates(tried: dict[str, dict[float, Metrics]]) -> str:
    """A table of all learning rates that were tried."""
    rows = []
    for name, found in tried.items():
        for rate, metrics in found.items():
            chosen = "chosen" if rate == best_rate(found) else ""
            rows.append([name, f"{rate:g}", f"{mean_recall(metrics):.1%}", f"{metrics['margin']:.3f}", chosen])
    return markdown_table(["method", "learning rate", "mean recall", "margin", ""], rows)


def notes(config: RunConfig, seeds: list[int], choice_epochs: float) -> str:
    training = config.training
    precision = "bfloat16 autocast" if config.training_arguments().bf16 else "float32"
    lines = [
        f"One base model, {config.model.checkpoint}, fine-tuned on the training pairs of {config.data.title} and "
        f"evaluated on its {training['final_split']} pairs, once, after the last epoch. `none`: the base as it is; "
        "`centered anew`: nothing but the running means of its projections replaced by those of the training pairs, "
        "as every fine-tuning does at its end.",
        f"The same for all: {training['num_train_epochs']} epochs, batch {training['per_device_train_batch_size']}, "
        f"augmentation, order of pairs, schedule, {precision}, "
        f"captions cut after {config.data.max_caption_tokens} tokens; seeds {', '.join(map(str, seeds))}; "
        "mean ± standard deviation (N - 1).",
        "`full`: all parameters; `LoRA`: adapters as in configs/lora.yaml, on both towers; `image tower`: the text "
        "tower stays as it is and runs once for each caption; `projections`: both towers do. Projections, temperature "
        "and centering train in all of them.",
        f"The learning rate of each method was chosen by the mean of R@1, R@5 and R@10 both ways on one fold of "
        f"{FOLDS} cut from the training *cases* (one seed, {choice_epochs:g} epochs); no validation pair took part.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def report(
    path: Path, config: RunConfig, args: argparse.Namespace, tried: dict, runs: dict[str, list[Metrics]], folders: dict
) -> None:
    write_report(
        path,
        header("Fine-tuning compared", config.training_arguments().device),
        notes(config, args.seeds[: max(map(len, runs.values()))], args.choice_epochs),
        metrics_table(runs),
        "## What trains\n\n" + table_of_methods(config, tried, folders),
        "## Learning rates, on held-out training cases\n\n" + table_of_rates(tried),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of a trained model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--choice-epochs", type=float, default=4, help="epochs of the runs that choose a rate")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare-finetuning"))
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/finetuning_SOURCE.md")
    return parser.parse_intermixed_args()


def compare() -> None:
    args = parse()
    check_seeds("the command line", args.seeds)
    config = load_config([CONFIGS / "lora.yaml"], [f"model.checkpoint={args.base}", *args.overrides])
    path = args.report or RESULTS / f"finetuning_{'_'.join(config.data.sources())}.md"
    tried = {name: try_rates(name, config, args.choice_epochs, args.output) for name in args.methods}
    print(table_of_rates(tried), flush=True)
    runs = evaluate_base(config)
    print(metrics_table(runs), flush=True)
    folders = {name: args.output / f"{slug(name)}-seed{args.seeds[0]}" for name in args.methods}
    for seed in args.seeds:
        for name in args.methods:
            run = with_training(METHODS[name].change(config), seed=seed, learning_rate=best_rate(tried[name]))
            runs.setdefault(name, []).append(run_once(run, args.output / f"{slug(name)}-seed{seed}"))
        report(path, config, args, tried, runs, folders)  # after each seed, should the next one be interrupted
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_script(compare))
