"""The table of several models side by side, and metrics.json."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from .. import __version__
from ..base_weights import digest_of_weights
from ..checkpoint import (
    CAPTION_FILES,
    CAPTIONS_FIGURE,
    CAPTIONS_FILE,
    COSINES_FIGURE,
    FIGURES,
    METRICS_FILE,
    PROJECTION_FIGURE,
)
from ..disk import replacing, writing
from .by_source import mean_over_sources
from .caption_figure import plot_captions
from .captions import Captions
from .evaluate_model import Evaluation
from .figures import plot_cosine_histograms, plot_projection
from .modality_report import modality_report
from .tables import Metrics, cell_of, runs_of, table


LIBRARIES = ("torch", "transformers", "timm", "datasets", "evaluate", "scikit-learn", "numpy")
# Of the metrics of zero-shot classification, with one template and with several: as in ROWS.
_ZERO_SHOT = {
    "accuracy": ("zero-shot accuracy{} ↑", "{:.1%}"),
    "balanced_accuracy": ("zero-shot balanced accuracy{} ↑", "{:.1%}"),
    "ece": ("zero-shot calibration error (ECE){} ↓", "{:.3f}"),
    "brier": ("zero-shot Brier score{} ↓", "{:.3f}"),
    "nll": ("zero-shot negative log-likelihood{} ↓", "{:.3f}"),
}
# Metric: (what the table calls it and which way is better, format of its value). `nmi` equals the V-measure, and of
# the recalls that chance has the table shows the one that belongs to the mean of both directions.
ROWS = {
    "modality_gap": ("modality gap ↓", "{:.3f}"),
    "debiased_modality_gap": ("debiased modality gap ↓", "{:.3f}"),
    "true_pair_cosine": ("true-pair cosine ↑", "{:.3f}"),
    "random_pair_cosine": ("random-pair cosine", "{:.3f}"),
    "margin": ("margin (true - random) ↑", "{:.3f}"),
    "mean_cosine_image": ("mean cosine inside images", "{:.3f}"),
    "mean_cosine_text": ("mean cosine inside captions", "{:.3f}"),
    "relative_gap": ("relative gap ↓", "{:.3f}"),
    "modality_separability": ("linear separability of the modalities, 50% is none ↓", "{:.1%}"),
    "uniformity_image": ("uniformity of images ↓", "{:.3f}"),
    "uniformity_text": ("uniformity of captions ↓", "{:.3f}"),
    "uniformity_cross": ("uniformity across", "{:.3f}"),
    "effective_rank_image": ("effective rank of images ↑", "{:.1f}"),
    "effective_rank_text": ("effective rank of captions ↑", "{:.1f}"),
    "text_to_image_recall@1": ("text to image R@1 ↑", "{:.1%}"),
    "text_to_image_recall@5": ("text to image R@5 ↑", "{:.1%}"),
    "text_to_image_recall@10": ("text to image R@10 ↑", "{:.1%}"),
    "text_to_image_median_rank": ("text to image median rank ↓", "{:.1f}"),
    "image_to_text_recall@1": ("image to text R@1 ↑", "{:.1%}"),
    "image_to_text_recall@5": ("image to text R@5 ↑", "{:.1%}"),
    "image_to_text_recall@10": ("image to text R@10 ↑", "{:.1%}"),
    "image_to_text_median_rank": ("image to text median rank ↓", "{:.1f}"),
    "recall@10": ("R@10, mean of both directions ↑", "{:.1%}"),
    "chance_recall@10": ("chance: R@10, mean of both directions", "{:.1%}"),
    "other_kind_share@10": ("mixed gallery: other kind in nearest 10", "{:.1%}"),
    "chance_other_kind_share@10": ("chance: other kind in nearest 10", "{:.1%}"),
    "mixed_label_precision@10": ("mixed gallery: label precision ↑", "{:.1%}"),
    "chance_mixed_label_precision@10": ("chance: label precision", "{:.1%}"),
    "other_kind_label_precision@10": ("mixed gallery: label precision, other kind ↑", "{:.1%}"),
    "v_measure": ("V-measure ↑", "{:.1%}"),
    "ari": ("adjusted Rand index ↑", "{:.3f}"),
    "knn_accuracy_image_to_text": ("kNN, images to captions ↑", "{:.1%}"),
    "knn_accuracy_text_to_image": ("kNN, captions to images ↑", "{:.1%}"),
    "linear_probe_accuracy_image_to_text": ("linear probe, images to captions ↑", "{:.1%}"),
    "linear_probe_accuracy_text_to_image": ("linear probe, captions to images ↑", "{:.1%}"),
    "majority_accuracy_image_to_text": ("majority label, images to captions", "{:.1%}"),
    "majority_accuracy_text_to_image": ("majority label, captions to images", "{:.1%}"),
    "knn_balanced_accuracy_image_to_text": ("balanced kNN, images to captions ↑", "{:.1%}"),
    "knn_balanced_accuracy_text_to_image": ("balanced kNN, captions to images ↑", "{:.1%}"),
    "linear_probe_balanced_accuracy_image_to_text": ("balanced linear probe, images to captions ↑", "{:.1%}"),
    "linear_probe_balanced_accuracy_text_to_image": ("balanced linear probe, captions to images ↑", "{:.1%}"),
    "chance_balanced_accuracy": ("chance: balanced accuracy", "{:.1%}"),
    **{
        f"zero_shot_{name}{suffix}": (label.format(words), form)
        for suffix, words in (("", ""), ("_ensemble", ", several templates"))
        for name, (label, form) in _ZERO_SHOT.items()
    },
    "zero_shot_chance_accuracy": ("chance: zero-shot accuracy", "{:.1%}"),
    "zero_shot_majority_accuracy": ("majority label: zero-shot accuracy", "{:.1%}"),
    "mean_over_pairs_modality_gap": ("every two modalities: modality gap ↓", "{:.3f}"),
    "mean_over_pairs_debiased_modality_gap": ("every two modalities: debiased gap ↓", "{:.3f}"),
    "mean_over_pairs_true_pair_cosine": ("every two modalities: true-pair cosine ↑", "{:.3f}"),
    "mean_over_pairs_random_pair_cosine": ("every two modalities: random-pair cosine", "{:.3f}"),
    "mean_over_pairs_margin": ("every two modalities: margin ↑", "{:.3f}"),
    "mean_over_pairs_recall@10": ("every two modalities: R@10 ↑", "{:.1%}"),
    "mean_over_pairs_chance_recall@10": ("every two modalities: chance, R@10", "{:.1%}"),
    "mean_over_pairs_v_measure": ("every two modalities: V-measure ↑", "{:.1%}"),
    "mean_over_pairs_ari": ("every two modalities: adjusted Rand index ↑", "{:.3f}"),
    "centroid_spread": ("all modalities: spread of the means ↓", "{:.3f}"),
    "debiased_centroid_spread": ("all modalities: debiased spread ↓", "{:.3f}"),
    "all_v_measure": ("all modalities stacked: V-measure ↑", "{:.1%}"),
    "all_ari": ("all modalities stacked: adjusted Rand index ↑", "{:.3f}"),
    "coco_bleu_1": ("BLEU-1 ↑", "{:.1%}"),
    "coco_bleu_2": ("BLEU-2 ↑", "{:.1%}"),
    "coco_bleu_3": ("BLEU-3 ↑", "{:.1%}"),
    "coco_bleu_4": ("BLEU-4 ↑", "{:.1%}"),
    "sacrebleu_4": ("sacreBLEU, lower case ↑", "{:.1%}"),
    "rouge_l": ("ROUGE-L ↑", "{:.1%}"),
    "meteor": ("METEOR ↑", "{:.1%}"),
    "cider_d": ("CIDEr-D ↑", "{:.3f}"),
    "clip_score": ("CLIPScore ↑", "{:.3f}"),
    "ref_clip_score": ("RefCLIPScore ↑", "{:.3f}"),
    "image_caption_cosine": ("image to caption, cosine ↑", "{:.3f}"),
    "distinct_captions": ("distinct captions", "{:.1%}"),
    "caption_words": ("words a caption", "{:.1f}"),
    "num_images": ("images", "{:.0f}"),
    "num_pairs": ("pairs", "{:.0f}"),
    "num_samples": ("samples, with what they have", "{:.0f}"),
}


def metrics_table(results: Mapping[str, Metrics | Sequence[Metrics]]) -> str:
    """A Markdown table with a row for each metric and a column for each model, aligned for terminals too.

    Args:
        results: {model name: its metrics, or those of several runs of it (seeds): shown as mean ± standard deviation
            with N - 1}. Metrics that no model has are left out, nan and missing ones are shown as "-".
    """
    runs = {name: runs_of(found) for name, found in results.items()}
    rows = [["metric", *runs]]
    for metric, (label, form) in ROWS.items():
        if any(metric in run for found in runs.values() for run in found):
            rows.append([label, *(cell_of(found, metric, form) for found in runs.values())])
    return table(rows)


def metrics_report(results: Mapping[str, Metrics], sources: Mapping[str, Mapping[str, Metrics]]) -> str:
    """The table of all pairs; of several sources also each one's own and the means over them.

    Of one model these are columns beside the first one, of several models they are tables with headings. The tables of
    `modality_report` follow where a model has more than two modalities.

    Args:
        results: {model name: its metrics of all pairs}.
        sources: {source: {model name: its metrics of the source's own pairs}}.
    """
    return "\n\n".join(filter(None, [_report_of_all(results, sources), modality_report(results, sources)]))


def _report_of_all(results: Mapping[str, Metrics], sources: Mapping[str, Mapping[str, Metrics]]) -> str:
    if len(sources) < 2:
        return metrics_table(results)
    means = {
        model: mean_over_sources(metrics, {source: found[model] for source, found in sources.items()})
        for model, metrics in results.items()
    }
    tables = {"all in one gallery": results, **sources, "mean of the sources": means}
    if len(results) == 1:
        (model,) = results
        return metrics_table({title: found[model] for title, found in tables.items()})
    return "\n\n".join(f"### {title}\n\n{metrics_table(found)}" for title, found in tables.items())


def write_metrics(
    path: str | Path,
    results: Mapping[str, Metrics],
    data: Mapping[str, Any],
    split: str,
    folders: Mapping[str, str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    sources: Mapping[str, Mapping[str, Metrics]] | None = None,
) -> None:
    """
    Writes metrics.json whole or not at all: `results`, the same of each of the `sources` ({source: {model name:
    metrics}}), the `data` and `split` they were measured on, the `settings` of the evaluation where they are not the
    models' own, `versions`, and the digests of the `weights` of those models that are in `folders`. nan is written as
    null.
    """
    versions = {"gap_closed_clip": __version__, "python": platform.python_version()}
    content = {
        "results": _without_nan(results),
        "sources": {source: _without_nan(found) for source, found in (sources or {}).items()},
        "data": dict(data),
        "split": split,
        "settings": dict(settings or {}),
        "weights": {name: digest_of_weights(folder) for name, folder in (folders or {}).items()},
        "versions": versions | {library: version(library) for library in LIBRARIES},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _without_nan(results: Mapping[str, Metrics]) -> dict[str, dict[str, float | None]]:
    return {
        name: {metric: None if math.isnan(value) else value for metric, value in metrics.items()}
        for name, metrics in results.items()
    }


def read_metrics(path: str | Path) -> dict[str, dict[str, float]]:
    """Reads a metrics.json: {model name: metrics}.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of `write_metrics`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        results = content["results"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {path}; `gap-closed-clip eval` writes one.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a metrics file of this package ({error}); write it anew with `gap-closed-clip eval`."
        ) from error
    return {
        name: {metric: math.nan if value is None else value for metric, value in metrics.items()}
        for name, metrics in results.items()
    }


def write_report(
    folder: str | Path,
    evaluations: Mapping[str, Evaluation],
    data: Mapping[str, Any],
    split: str,
    folders: Mapping[str, str | Path] | None = None,
    pairs: Dataset | IterableDataset | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """
    Writes metrics.json and metrics.md into the folder, projection.png and cosines.png of what embeddings there are,
    captions.jsonl and captions.png of what captions; returns the table, or the tables where there are several sources.

    Args:
        evaluations: {model name: what was found of it}, all on one set of pairs.
        data: what the pairs are, e.g. the `data:` section of the configuration.
        split: which split of it.
        folders: {model name: its folder}, of those that are in one.
        pairs: where the images of the captions are; a stream is not drawn.
        settings: of the evaluation, where they are not the models' own, e.g. num_beams.

    Raises:
        DiskFull: there is no room; each file is whole, and metrics.json with what is beside it of one evaluation.
    """
    folder = Path(folder)
    for name in CAPTION_FILES:  # of other pairs, which may not be everybody's to see
        (folder / name).unlink(missing_ok=True)
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    embeddings = {name: e.embeddings for name, e in evaluations.items() if e.embeddings is not None}
    captions = {name: e.captions for name, e in evaluations.items() if e.captions is not None}
    names = dict.fromkeys(source for evaluation in evaluations.values() for source in evaluation.by_source)
    sources = {source: {name: e.by_source.get(source, {}) for name, e in evaluations.items()} for source in names}
    report = metrics_report(metrics, sources)
    with writing(folder, "Metrics and figures", None, "`gap-closed-clip eval` measures again."):
        write_metrics(folder / METRICS_FILE, metrics, data, split, folders, settings, sources)
        for name in FIGURES:  # of an earlier evaluation: beside these metrics a card would show them as theirs
            (folder / name).unlink(missing_ok=True)
        with replacing(folder / "metrics.md") as draft:
            draft.write_text(report + "\n", encoding="utf-8")
        if embeddings:
            plot_projection(embeddings, metrics, folder / PROJECTION_FIGURE)
            plot_cosine_histograms(embeddings, metrics, folder / COSINES_FIGURE)
        if captions:
            write_captions(folder / CAPTIONS_FILE, captions)
            if isinstance(pairs, Dataset):
                plot_captions(captions, pairs, folder / CAPTIONS_FIGURE)
    return report


def write_captions(path: str | Path, captions: Mapping[str, Captions]) -> None:
    """Writes a line of JSON for each image: `image_id`, its `references`, and `captions` by model name."""
    first = next(iter(captions.values()))
    by_model = {name: dict(zip(found.image_ids, found.captions, strict=True)) for name, found in captions.items()}
    with replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
        for image_id, references in zip(first.image_ids, first.references, strict=True):
            captions_of_image = {name: found[image_id] for name, found in by_model.items()}
            row = {"image_id": image_id, "references": references, "captions": captions_of_image}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
