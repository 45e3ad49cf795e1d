"""Embeds a data set once, runs the metrics, draws the figures, compares models, writes the report."""

from .by_source import MAIN_METRICS, mean_over_sources
from .caption_figure import plot_captions
from .captions import (
    Captions,
    build_caption_metrics,
    check_references,
    evaluate_captioner,
    evaluate_captions,
    generate_captions,
    nearest_captions,
    score_captions,
)
from .compare import Comparison, ComparisonSettings
from .embed import PairEmbeddings, embed_pairs
from .evaluate_model import Evaluation, evaluate_model
from .evaluate_pairs import (
    build_compute_metrics,
    evaluate_embeddings,
    load_metric,
    metric_names,
    modality_means,
)
from .figures import plot_cosine_histograms, plot_projection
from .report import metrics_report, metrics_table, read_metrics, write_metrics, write_report


__all__ = [
    "Captions",
    "Comparison",
    "ComparisonSettings",
    "Evaluation",
    "MAIN_METRICS",
    "PairEmbeddings",
    "build_caption_metrics",
    "build_compute_metrics",
    "check_references",
    "embed_pairs",
    "evaluate_captioner",
    "evaluate_captions",
    "evaluate_embeddings",
    "evaluate_model",
    "generate_captions",
    "load_metric",
    "metric_names",
    "mean_over_sources",
    "metrics_report",
    "metrics_table",
    "modality_means",
    "nearest_captions",
    "plot_captions",
    "plot_cosine_histograms",
    "plot_projection",
    "read_metrics",
    "score_captions",
    "write_metrics",
    "write_report",
]
