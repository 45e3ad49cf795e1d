"""Embed a data set once, run the metrics, draw the figures, write the report."""

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
from .checkpoint import (
    base_of_adapter,
    check_checkpoint,
    check_model_name,
    is_adapter,
    is_captioner,
    is_local,
    load_captioner,
    load_checkpoint,
)
from .embed import PairEmbeddings, embed_pairs
from .evaluate_pairs import (
    build_compute_metrics,
    evaluate_embeddings,
    evaluate_model,
    load_metric,
    modality_means,
    post_hoc_centring,
)
from .figures import plot_cosine_histograms, plot_projection
from .report import check_writable, digest_of_weights, metrics_table, read_metrics, write_metrics, write_report


__all__ = [
    "check_references",
    "plot_captions",
    "evaluate_captioner",
    "load_captioner",
    "is_captioner",
    "score_captions",
    "nearest_captions",
    "generate_captions",
    "evaluate_captions",
    "build_caption_metrics",
    "Captions",
    "PairEmbeddings",
    "base_of_adapter",
    "build_compute_metrics",
    "check_checkpoint",
    "check_model_name",
    "check_writable",
    "digest_of_weights",
    "embed_pairs",
    "evaluate_embeddings",
    "evaluate_model",
    "is_adapter",
    "is_local",
    "load_checkpoint",
    "load_metric",
    "metrics_table",
    "modality_means",
    "plot_cosine_histograms",
    "plot_projection",
    "post_hoc_centring",
    "read_metrics",
    "write_metrics",
    "write_report",
]
