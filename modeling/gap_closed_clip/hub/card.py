"""The model card: README.md of a trained model folder, rendered from what the folder and the run's configuration tell.

Every figure of this model is read from its metrics.json: what was not measured is not on the card.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    hf_hub_url,
)
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..checkpoint import CAPTION_FILES, FIGURES, METRICS_FILE, is_adapter
from ..data import DataArguments
from ..disk import replacing
from ..evaluation import metrics_report
from ..evaluation.report import ROWS
from ..model.configuration_checks_gap_closed_clip import Weight
from ..model.configuration_gap_closed_clip import MODULES_FILE, GapClosedClipConfig
from ..training import RunConfig
from . import escaping, requirements
from .card_modalities import read_modalities, told_in_captions
from .escaping import one_line, safe_names
from .facts import read_adapter, read_evaluation, read_final_scale, read_fitted, read_run, read_size


logger = logging.get_logger(__name__)

CARD_TEMPLATE = Path(__file__).parent / "card_template.md"

TAGS = ["gap-closed-clip", "clip", "custom_code", "modality-gap", "image-text-retrieval", "feature-extraction"]
CAPTIONER_TAGS = ["zero-shot-image-classification", "image-captioning"]
SENTENCE_TRANSFORMERS = "sentence-transformers"
EXAMPLES = "examples"
EVAL_RESULTS = ".eval_results"
# Those metrics that the metadata names; the table on the card has all of them.
GAP = ("modality_gap", "debiased_modality_gap", "true_pair_cosine", "margin")
CAPTION_HEADLINES = ("coco_bleu_4", "rouge_l", "meteor", "cider_d", "clip_score")
OF_EVERY_PAIR = ("mean_over_pairs_debiased_modality_gap", "mean_over_pairs_margin", "mean_over_pairs_recall@10")
RECALLS = ("text_to_image_recall@10", "image_to_text_recall@10")
HEADLINES = (*GAP, *RECALLS, "v_measure", *OF_EVERY_PAIR, *CAPTION_HEADLINES)
TERMS = {"contrastive": "InfoNCE", "align": "Align True Pairs", "uniformity": "Centroid Uniformity"}
TERMS |= {"modality_uniformity": "Uniformity of each modality", "cross_uniformity": "Cross-modal Uniformity"}


def write_card(
    folder: str | Path,
    *,
    template: str | Path = CARD_TEMPLATE,
    repo_id: str | None = None,
    license: str | None = None,
    license_terms: Mapping[str, str] | None = None,
    base_folder: str | Path | None = None,
) -> ModelCard:
    """
    Writes README.md into a model folder, whole or not at all, over an older one; and, where the model was measured on
    a data set of the Hub, `.eval_results/` for that data set's leaderboard.

    The card tells what the folder tells: config.json and weights; train_config.yaml and run.json, which training
    leaves, and fitted_on.yaml, which centering does; metrics.json with its figures, if it was measured on these
    weights; examples/, images named by what they show. What is missing is left out. Call it where the training ran: a
    tower or data source that is no folder or file there is taken for a Hub id.

    Args:
        folder: a model folder.
        template: Jinja template of the card; by default this package's own.
        repo_id: what the code on the card loads; by default the folder's name. Its last part is the title.
        base_folder: of an adapter, where its base model's config.json is; by default what the adapter names.
        license: identifier of the weights' licence, e.g. "apache-2.0"; by default `training.card_license`.
        license_terms: `license_name` and `license_link` of the licence "other".

    Raises:
        FileNotFoundError: `folder` is no model folder, or there is no template.
        ValueError: config.json, metrics.json, train_config.yaml, run.json or fitted_on.yaml is damaged, or
            metrics.json holds several models and none of the folder's name.
    """
    folder = Path(folder).absolute()
    adapter = read_adapter(folder) if folder.is_dir() else None
    if adapter is None and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder: config.json is missing. Train or save the model first.")
    evaluation, run = read_evaluation(folder), read_run(folder)
    if evaluation and evaluation["stale"]:
        logger.warning(
            f"{folder / METRICS_FILE} was measured on other weights, so it is not on the card: run `gap-closed-clip "
            "eval`."
        )
        evaluation = None
    repo_id = repo_id or folder.name
    license = license or (run["config"].training.get("card_license") if run else None)
    language = (run["config"].training.get("card_language") if run else None) or "en"
    facts = _facts(folder, run, evaluation, base_folder or (adapter["base"] if adapter else folder))
    metadata = _metadata(
        folder, repo_id, license, language, run["config"] if run else None, evaluation, adapter, facts["config"]
    )
    for field, text in (license_terms or {}).items():
        setattr(metadata, field, one_line(text))
    card = ModelCard.from_template(
        metadata,
        template_path=str(template),
        model_name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        text_kind="English texts" if language == "en" else "texts",
        adapter=adapter,
        requirements=requirements.ADAPTER if adapter else requirements.MODEL,
        sentence_transformers=requirements.SEARCH if (folder / MODULES_FILE).is_file() else None,
        **facts,
    )
    with replacing(folder / "README.md") as draft:
        draft.write_text(f"{str(card).rstrip()}\n", encoding="utf-8", newline="\n")
    _write_eval_results(folder, evaluation)
    return card


def _metadata(
    folder: Path,
    repo_id: str,
    license: str | None,
    language: str,
    config: RunConfig | None,
    evaluation: dict[str, Any] | None,
    adapter: dict[str, Any] | None,
    model_config: GapClosedClipConfig,
) -> ModelCardData:
    towers: tuple[Any, ...] = ()
    if config:
        towers = (config.model.checkpoint, config.model.vision, config.model.text)
    is_captioner = model_config.decoder_config is not None and adapter is None
    if config and config.captioning:
        towers += (config.captioning.decoder,)
    kind: dict[str, Any] = {"library_name": "transformers", "tags": [*TAGS, *CAPTIONER_TAGS] if is_captioner else TAGS}
    if (folder / MODULES_FILE).is_file():
        kind["tags"] = [*kind["tags"], SENTENCE_TRANSFORMERS]  # the Hub lists it under that library, too
    if adapter:
        towers = (adapter["base"],)
        kind = {"library_name": "peft", "tags": [*TAGS, adapter["method"].lower()]}
        if _is_hub_id(adapter["base"]):
            kind["base_model_relation"] = "adapter"
    return ModelCardData(
        **kind,
        language=one_line(language),
        pipeline_tag=None if adapter else "image-text-to-text" if is_captioner else "zero-shot-image-classification",
        license=one_line(license) if license else license,
        base_model=[tower for tower in towers if _is_hub_id(tower)] or None,
        datasets=_hub_sources(config.data) or None if config else None,
        metrics=list(_headlines(evaluation["results"][evaluation["name"]])) or None if evaluation else None,
        model_name=one_line(repo_id.rpartition("/")[2]),
        eval_results=_eval_results(evaluation) or None,
        widget=None if adapter else _widget(folder, repo_id, is_captioner),
    )


def _hub_sources(data: DataArguments) -> list[str]:
    """The sources that are data sets of the Hub."""
    names = (str(own.source) for own in data.sources().values())
    return list(dict.fromkeys(name for name in names if _is_hub_id(name)))


def _public_sources(data: DataArguments, split: str) -> list[tuple[str, DataArguments]]:
    """What the card calls each source that has the split, and its arguments."""
    if isinstance(data.source, str):
        return [(_public_name(data.source), data)]
    return [(_label(name, own), own) for name, own in data.sources().items() if own.has_split(split)]


def _label(name: str, own: DataArguments) -> str:
    """A source of a list by its Hub id, or by its name: a path is nobody else's business."""
    return str(own.source) if _is_hub_id(own.source) else name


def _headlines(measured: dict[str, float]) -> dict[str, float]:
    """Those of HEADLINES that were measured, with their values."""
    return {metric: measured[metric] for metric in HEADLINES if metric in measured and metric in ROWS}


def _measured_sources(evaluation: dict[str, Any]) -> list[tuple[str, str, DataArguments, dict[str, float]]]:
    """Name, label and arguments of each source, and this model's headlines on its own pairs."""
    data, model, apart = evaluation["data"], evaluation["name"], evaluation["sources"]
    if isinstance(data.source, str):
        headlines = _headlines(evaluation["results"][model])
        return [(name, _public_name(data.source), own, headlines) for name, own in data.sources().items()]
    return [
        (name, _label(name, own), own, _headlines(apart[name].get(model, {})))
        for name, own in data.sources().items()
        if name in apart
    ]


def _eval_results(evaluation: dict[str, Any] | None) -> list[EvalResult]:
    """The headlines of each source in the form of the card's metadata."""
    if evaluation is None:
        return []
    return [
        _eval_result(metric, value, own, label, evaluation["split"])
        for _, label, own, headlines in _measured_sources(evaluation)
        for metric, value in headlines.items()
    ]


def _eval_result(metric: str, value: float, data: DataArguments, label: str, split: str) -> EvalResult:
    of_captions = metric in CAPTION_HEADLINES
    return EvalResult(
        task_type="image-text-to-text" if of_captions else "image-text-retrieval",
        task_name="Image captioning" if of_captions else "Image-text retrieval and alignment",
        dataset_type=one_line(label),
        dataset_name=f"{label} (drawn, not medical)" if data.source == "phantoms" else one_line(label),
        dataset_config=data.subset and one_line(data.subset),
        dataset_split=one_line(_public_split(data, split)),
        metric_type=metric,
        metric_name=ROWS[metric][0].rstrip(" ↑↓"),
        metric_value=value,
    )


def _widget(folder: Path, repo_id: str, is_captioner: bool) -> list[dict[str, str]] | None:
    """Examples for the model's page: the images that are published with it, each named by what it shows."""
    images = sorted(path for path in (folder / EXAMPLES).glob("*") if path.suffix in (".png", ".jpg"))
    titles = [path.stem.replace("_", " ").replace(",", "") for path in images]
    if len(titles) < 2 or "/" not in repo_id:
        return None  # a single label tells nothing apart; and a folder at home has no page
    labels = one_line(", ".join(titles))
    return [
        {
            "src": hf_hub_url(repo_id, f"{EXAMPLES}/{path.name}"),
            **({} if is_captioner else {"candidate_labels": labels}),
            "example_title": one_line(title),
        }
        for path, title in zip(images, titles, strict=True)
    ]


def _write_eval_results(folder: Path, evaluation: dict[str, Any] | None) -> None:
    """The newer form of the card's model-index: one file for each data set, and only for those of the Hub."""
    shutil.rmtree(folder / EVAL_RESULTS, ignore_errors=True)
    if evaluation is None:
        return
    for name, _, own, headlines in _measured_sources(evaluation):
        if not headlines or not _is_hub_id(own.source):
            continue
        entries = [
            EvalResultEntry(
                dataset_id=own.source,
                task_id=metric.replace("@", "_at_"),
                value=value,
                notes=f"split {one_line(_public_split(own, evaluation['split']))}; {ROWS[metric][0].rstrip(' ↑↓')}",
            )
            for metric, value in headlines.items()
        ]
        path = folder / EVAL_RESULTS / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def _facts(
    folder: Path, run: dict[str, Any] | None, evaluation: dict[str, Any] | None, model_folder: str | Path
) -> dict[str, Any]:
    """The variables of the template, beside the metadata."""
    try:
        model_config = GapClosedClipConfig.from_pretrained(model_folder)
    except (TypeError, AttributeError, OverflowError, StrictDataclassError) as error:
        raise ValueError(f"{model_folder}/config.json is damaged: {' '.join(str(error).split())}") from error
    if run and is_adapter(folder):  # an adapter's objective is in its run, the base's may have been another
        for name, value in run["config"].model.config.items():
            setattr(model_config, name, value)
        model_config.fusion_weights = run.get("fusion_weights", model_config.fusion_weights)
    weights = {term: describe_weight(getattr(model_config, f"{term}_weight")) for term in TERMS}
    return {
        "config": model_config,
        "hypothesis_template": " ".join(model_config.hypothesis_template.split()),
        "run": run,
        **read_size(folder),
        "weights": weights,
        "added_terms": [name for term, name in TERMS.items() if term != "contrastive" and weights[term] != "0"],
        "initial_scale": math.exp(model_config.logit_scale_init_value),
        "final_scale": read_final_scale(folder),
        "config_yaml": run and public_config(run["config"]).rstrip(),
        "evaluation": evaluation,
        "fitted": read_fitted(folder),
        "table": evaluation and metrics_report(*safe_names(evaluation)),
        "figures": [name for name in (*FIGURES, *_public_captions(evaluation)) if (folder / name).is_file()],
        "captioning": run and run["config"].captioning,
        "modalities": read_modalities(folder, model_config),
        "told": told_in_captions(evaluation["results"][evaluation["name"]]) if evaluation else {},
        **{name: getattr(escaping, name) for name in ("as_code", "as_string", "as_text", "fence_of")},
        "public_name": _public_name,
        "public_sources": _public_sources,
        "public_split": _public_split,
    }


def _public_captions(evaluation: dict[str, Any] | None) -> tuple[str, ...]:
    """The figure of captions, where it shows phantoms alone, which are nobody's images."""
    return CAPTION_FILES[:1] if evaluation and evaluation["data"].only_phantoms else ()


def public_config(config: RunConfig) -> str:
    """A run's configuration as YAML, without its secrets and without the folders that it wrote to."""
    sections = config.to_dict()
    private = ("hub_token", "output_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir")
    sections["training"] = {name: value for name, value in sections["training"].items() if name not in private}
    sections["data"].pop("feature_cache", None)
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    # YAML writes down characters that turn the direction of writing, unless it writes down ASCII alone.
    return text if one_line(text) == " ".join(text.split()) else yaml.safe_dump(sections, sort_keys=False)


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


def _is_hub_id(name: str | dict | list | None) -> bool:
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
    """The source's name of a split; ours where we made the split: the phantoms', and a fold."""
    is_of_source = data.source != "phantoms" and not (data.folds and split == "validation")
    return data.split_name(split) if is_of_source else split
