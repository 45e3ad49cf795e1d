"""What comparisons of trainings share: a run that is done once, its folder's name, figures of several runs."""

from dataclasses import replace
from pathlib import Path

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.evaluation import evaluate_model, plot_cosine_histograms, plot_projection, read_metrics
from gap_closed_clip.training import RunConfig, load_config, train


CONFIGS = Path(__file__).parent.parent / "configs"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def run_once(config: RunConfig, folder: Path) -> dict[str, float]:
    """The metrics of one training in `folder`; from the folder, if it has been done before by the same settings."""
    settings = {**config.training, "output_dir": str(folder), "overwrite_output_dir": True}
    config = replace(config, training=settings)
    if not is_done(config, folder):
        train(config)
    (metrics,) = read_metrics(folder / "metrics.json").values()
    return metrics


def is_done(config: RunConfig, folder: Path) -> bool:
    if not (folder / "metrics.json").is_file():
        return False
    return load_config([folder / "train_config.yaml"]).to_dict() == config.to_dict()


def draw(folders: dict[str, Path], results: dict[str, dict[str, float]], output: Path) -> None:
    """Both figures for one run of each method."""
    config = load_config([next(iter(folders.values())) / "train_config.yaml"])
    pairs = load_checked_pairs(config.data, config.training["final_split"])  # as the metrics saw them
    embeddings = {}
    for name, folder in folders.items():
        model, processor = load_checkpoint(folder)
        _, embeddings[name] = evaluate_model(model, processor, pairs, max_length=config.data.max_caption_tokens)
    plot_projection(embeddings, results, output / "projection.png")
    plot_cosine_histograms(embeddings, results, output / "cosines.png")
