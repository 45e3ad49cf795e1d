"""The model card: README.md of a trained model folder, rendered from what the folder and the run's configuration say.

Every figure of this model is read from its metrics.json: what was not measured is not on the card.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..configuration_gap_closed_clip import GapClosedClipConfig, Weight
from ..data import DataArguments
from ..evaluation import metrics_table, read_metrics
from ..evaluation.report import ROWS
from ..training import RunConfig


TAGS = ["gap-closed-clip", "clip", "custom_code", "modality-gap", "image-text-retrieval", "feature-extraction"]
FIGURES = ("projection.png", "cosines.png")
# What the metadata tells of the evaluation; the table on the card has all of it.
GAP = ("modality_gap", "debiased_modality_gap", "true_pair_cosine", "margin")
HEADLINES = (*GAP, "text_to_image_recall@10", "image_to_text_recall@10", "v_measure")
TERMS = {"contrastive": "InfoNCE", "align": "Align True Pairs", "uniformity": "Centroid Uniformity"}


def write_card(
    folder: str | Path,
    template: str | Path,
    config: RunConfig,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    num_train_pairs: int | None = None,
    device: str | None = None,
    num_processes: int = 1,
) -> ModelCard:
    """
    Writes README.md into a trained model folder, whole or not at all, over an older one.

    Call it where the training ran: a tower or data source that is no folder or file there is taken for a Hub id.

    Args:
        folder: holds config.json and weights; metrics.json, projection.png and cosines.png go on the card if present.
        template: Jinja template of the card, model_card/template.md.
        config: the configuration that the model was trained with; secrets in it are left out.
        repo_id: what the examples load; by default the folder's name. Its last part is the title.
        license: identifier of the weights' licence, e.g. "apache-2.0"; left out unless given.
        num_train_pairs: pairs that were trained on, after what was skipped; left out unless given.
        device: what each process trained on, e.g. "NVIDIA A100"; left out unless given.
        num_processes: of the training, for the command that repeats it.

    Raises:
        FileNotFoundError: `folder` is no model folder, or there is no template.
        ValueError: metrics.json is not one of this package, or holds several models and none of the folder's name.
    """
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder: config.json is missing. Train or save the model first.")
    evaluation = _read_evaluation(folder)
    name = (repo_id or folder.name).rpartition("/")[2]
    card = ModelCard.from_template(
        _metadata(name, license, config, evaluation),
        template_path=str(template),
        model_name=name,
        repo_id=repo_id or name,
        num_train_pairs=num_train_pairs,
        device=device,
        num_processes=num_processes,
        **_facts(folder, config, evaluation),
    )
    draft = folder / "README.md.tmp"
    draft.write_text(f"{str(card).rstrip()}\n", encoding="utf-8", newline="\n")
    os.replace(draft, folder / "README.md")
    return card


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    """metrics.json without nan: `results`, `name` of this model in them, `data`, `split` and `versions`."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    results = {
        model: {metric: value for metric, value in metrics.items() if not math.isnan(value)}
        for model, metrics in read_metrics(path).items()
    }
    content = json.loads(path.read_text(encoding="utf-8"))
    if absent := {"data", "split", "versions"} - set(content):
        raise ValueError(f"{path} has no {', '.join(sorted(absent))}: write it anew with eval.py.")
    if folder.name not in results and len(results) != 1:
        raise ValueError(f"{path} holds {list(results)}, not {folder.name!r}, the folder's name: run eval.py again.")
    name = folder.name if folder.name in results else next(iter(results))
    return content | {"results": results, "name": name, "data": DataArguments(**content["data"])}


def _metadata(name: str, license: str | None, config: RunConfig, evaluation: dict[str, Any] | None) -> ModelCardData:
    towers = (config.model.checkpoint, config.model.vision, config.model.text)
    measured = [metric for metric in HEADLINES if evaluation and metric in evaluation["results"][evaluation["name"]]]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=TAGS,
        license=license,
        base_model=[tower for tower in towers if _is_hub_id(tower)] or None,
        datasets=[config.data.source] if _is_hub_id(config.data.source) else None,
        metrics=measured or None,
        model_name=name,
        eval_results=[_eval_result(metric, evaluation) for metric in measured] or None,
    )


def _eval_result(metric: str, evaluation: dict[str, Any]) -> EvalResult:
    data = evaluation["data"]
    return EvalResult(
        task_type="image-text-retrieval",
        task_name="Image-text retrieval and alignment",
        dataset_type=_public_name(data.source),
        dataset_name="phantoms (drawn, not medical)" if data.source == "phantoms" else _public_name(data.source),
        dataset_config=data.subset,
        dataset_split=_public_split(data, evaluation["split"]),
        metric_type=metric,
        metric_name=ROWS[metric][0].rstrip(" ↑↓"),
        metric_value=evaluation["results"][evaluation["name"]][metric],
    )


def _facts(folder: Path, config: RunConfig, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """What the template speaks of, beside the metadata."""
    model_config = GapClosedClipConfig.from_pretrained(folder)
    sections = config.to_dict()
    sections["training"] = {name: value for name, value in sections["training"].items() if name != "hub_token"}
    weights = {term: describe_weight(getattr(model_config, f"{term}_weight")) for term in TERMS}
    return {
        "config": model_config,
        "start": config.model,
        "data": config.data,
        "weights": weights,
        "added_terms": [TERMS[term] for term in ("align", "uniformity") if weights[term] != "0"],
        "initial_scale": math.exp(model_config.logit_scale_init_value),
        "final_scale": _final_scale(folder),
        "config_yaml": yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip(),
        "evaluation": evaluation,
        "table": evaluation and metrics_table(evaluation["results"]),
        "figures": [name for name in FIGURES if (folder / name).is_file()],
        "public_name": _public_name,
        "public_split": _public_split,
    }


def describe_weight(weight: Weight) -> str:
    """A weight of the objective in words: "2", or "1 until 20%, linearly to 0 at 70% of training"."""
    if isinstance(weight, int | float):
        return f"{weight:g}"
    (start, first), *rest = weight
    if all(value == first for _, value in rest):
        return f"{first:g}"
    words = [f"{first:g} until {100 * start:g}%" if start else f"{first:g} at the start"]
    words += [f"linearly to {value:g} at {100 * fraction:g}%" for fraction, value in rest]
    return f"{', '.join(words)} of training"


def _final_scale(folder: Path) -> float | None:
    """The scale (1 / temperature) in the weights; None where they are not here."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            if "logit_scale" in weights.keys():
                return weights.get_tensor("logit_scale").double().exp().item()
    return None


def _is_hub_id(name: str | dict | None) -> bool:
    """Whether this loads from the Hub. A folder wins, as it does where models and data are loaded."""
    if not isinstance(name, str) or name == "phantoms":
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _public_name(name: str) -> str:
    """A Hub id or a folder of a Python package as it is, a local path by its last part."""
    return name if _is_hub_id(name) or name.startswith("package:") else Path(name).name


def _public_split(data: DataArguments, split: str) -> str:
    """The source's own name of a split, where it is the source's own split."""
    own = data.source != "phantoms" and not (data.folds and split == "validation")
    return data.split_name(split) if own else split
