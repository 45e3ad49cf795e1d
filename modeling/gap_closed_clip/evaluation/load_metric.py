"""The package's own metrics by name."""

from pathlib import Path

import evaluate


METRICS_FOLDER = Path(__file__).parent.parent / "metrics"


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """One of this package's metrics: the name of a file in `metrics`, e.g. "modality_gap" or "caption_cider".

    Args:
        kwargs: of `evaluate.load`, e.g. num_process, process_id and experiment_id.
    """
    return evaluate.load(str(METRICS_FOLDER / f"{name}.py"), **kwargs)


__all__ = ["load_metric"]
