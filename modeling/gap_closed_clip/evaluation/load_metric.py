"""The package's own metrics by name."""

from pathlib import Path

import evaluate

from ..disk import writing


METRICS_FOLDER = Path(__file__).parent.parent / "metrics"


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """One of this package's metrics: the name of a file in `metrics`, e.g. "modality_gap" or "caption_cider".

    Args:
        kwargs: of `evaluate.load`, e.g. num_process, process_id and experiment_id.

    Raises:
        OSError: the cache, to which `evaluate` copies the code of a metric whenever it loads one, can't be written.
    """
    remedy = "Or set HF_HOME, or HF_MODULES_CACHE, to another folder."
    with writing(evaluate.config.HF_MODULES_CACHE, f"The metric {name}, which `evaluate` caches,", None, remedy):
        return evaluate.load(str(METRICS_FOLDER / f"{name}.py"), **kwargs)


__all__ = ["load_metric"]
