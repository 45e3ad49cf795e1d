"""Reads what the card tells of a model folder: its training, its evaluation, its size, its adapter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open

from ..base_weights import digest_of_weights
from ..checkpoint import CONFIG_FILE, FITTED_FILE, METRICS_FILE, RUN_FILE, base_of_adapter, is_adapter
from ..data import DataArguments
from ..evaluation import read_metrics
from ..training.config import load_saved_config
from ..training.yaml_files import read_yaml


def read_run(folder: Path) -> dict[str, Any] | None:
    """
    The `config` of the training, and what run.json tells of it: `num_train_pairs`, `device`, `num_processes`, and
    `kept_step` and `num_steps` where evaluations chose the weights. None for a folder that `gap-closed-clip train` did
    not make.

    Raises:
        ValueError: one of the two is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    facts: dict[str, Any] = {"num_train_pairs": None, "device": None, "num_processes": 1, "kept_step": None}
    path = folder / RUN_FILE
    try:
        if path.is_file():
            facts |= json.loads(path.read_text(encoding="utf-8"))
        facts["num_processes"] = int(facts["num_processes"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the card is written without.") from error
    try:
        return facts | {"config": load_saved_config(folder / CONFIG_FILE)}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged ({error}): delete it or put it right.") from error


def read_fitted(folder: Path) -> dict[str, Any] | None:
    """
    The `data` and the `split` of the pairs that `gap-closed-clip center` closed the gap by; None where it did not.

    Raises:
        ValueError: fitted_on.yaml is damaged.
    """
    path = folder / FITTED_FILE
    if not path.is_file():
        return None
    try:
        note = read_yaml(path)
        return {"data": DataArguments(**note["data"]), "split": str(note["split"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the card is written without.") from error


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """
    The content of metrics.json without nan: `results`, the same of each of the `sources`, the `name` of this model in
    them, `data`, `split`, `versions`, and whether it is `stale`: measured on other weights than are in the folder now.
    None where there is no such file.

    Raises:
        ValueError: it is no metrics file of this package, or holds several models and none of the folder's name.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        results = _finite(read_metrics(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        if absent := {"data", "split", "versions"} - set(content):
            raise ValueError(f"{path} has no {', '.join(sorted(absent))}: write it anew with `gap-closed-clip eval`.")
        data, versions, weights = _data(content["data"], path), dict(content["versions"]), content.get("weights")
        sources = {source: _finite(found) for source, found in (content.get("sources") or {}).items()}
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a metrics file of this package ({error}); write it anew with `gap-closed-clip eval`."
        ) from error
    if folder.name not in results and len(results) != 1:
        raise ValueError(
            f"{path} holds {list(results)}, not {folder.name!r}, the folder's name: run `gap-closed-clip eval` again."
        )
    name = folder.name if folder.name in results else next(iter(results))
    measured_on = (weights or {}).get(name)
    stale = measured_on is not None and measured_on != digest_of_weights(folder)
    settings = content.get("settings") or content.get("how") or {}  # `how` in older files
    found = {
        "results": results,
        "sources": sources,
        "name": name,
        "data": data,
        "versions": versions,
        "settings": settings,
    }
    return content | found | {"stale": stale}


def _data(section: dict[str, Any], path: Path) -> DataArguments:
    try:
        return DataArguments(**section)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Write it anew with `gap-closed-clip eval`.") from error


def _finite(results: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        model: {metric: value for metric, value in metrics.items() if value is not None and math.isfinite(value)}
        for model, metrics in results.items()
    }


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """`base` and `revision`, `method` ("LORA", ...) and `rank` of an adapter; None for a whole model."""
    if not is_adapter(folder):
        return None
    config = PeftConfig.from_pretrained(str(folder))
    base, revision = base_of_adapter(folder)
    rank = config.to_dict().get("r")
    return {"base": base, "revision": revision, "method": config.peft_type.value, "rank": rank}


def read_size(folder: Path) -> dict[str, Any]:
    """`num_parameters`, `image_size` (height, width) and `max_tokens`; None for what the folder does not tell."""
    number = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            number += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    image_processor = _read(folder / "processor_config.json").get("image_processor", {})
    crop = image_processor.get("crop_size") or image_processor.get("size") or {}
    max_tokens = _read(folder / "tokenizer_config.json").get("model_max_length")
    return {
        "num_parameters": number or None,
        "image_size": (crop["height"], crop["width"]) if {"height", "width"} <= set(crop) else None,
        "max_tokens": max_tokens if isinstance(max_tokens, int) and max_tokens < 10**6 else None,
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_final_scale(folder: Path) -> float | None:
    """The scale (1 / temperature) in the weights; None where they are not here."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                if name.endswith("temperature.logit_scale"):  # an adapter's has a prefix
                    return weights.get_tensor(name).double().exp().item()
    return None
