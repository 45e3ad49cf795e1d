"""What a model folder is: names of its files, its kinds (encoder, adapter, captioner), loading, checks."""

import tempfile
import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from .base_weights import check_base
from .conversion import from_clip, is_foreign
from .folder_errors import (
    ADAPTER_WEIGHTS,
    AGAIN,
    PROCESSOR_FILES,
    WEIGHTS,
    BaseNotLoaded,
    check_files,
    check_finite,
    check_vocabulary,
    explained_errors,
    no_weights,
    read_json,
    try_processor,
)
from .messages import nearest
from .model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from .model.configuration_gap_closed_clip import GapClosedClipConfig
from .model.modality_processing_gap_closed_clip import check_fit
from .model.modeling_gap_closed_clip import GapClosedClipModel
from .model.processing_gap_closed_clip import GapClosedClipProcessor
from .model.towers_gap_closed_clip import loading_in_one_line


MODEL_TYPE = "gap_closed_clip"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# What a finished run leaves beside the weights: its configuration, and what else its card tells.
CONFIG_FILE, RUN_FILE = "train_config.yaml", "run.json"
FITTED_FILE = "fitted_on.yaml"  # the pairs that `gap-closed-clip center` closed a model's gap by
# What an evaluation leaves: its metrics, figures of embeddings, and captions. The latter show the data's own images
# and captions, which may not be everybody's to see.
METRICS_FILE = "metrics.json"
PROJECTION_FIGURE, COSINES_FIGURE = FIGURES = ("projection.png", "cosines.png")
CAPTIONS_FIGURE, CAPTIONS_FILE = CAPTION_FILES = ("captions.png", "captions.jsonl")
# How the names of an adapter's weights begin where it was made on a captioner.
OF_CAPTIONERS = tuple(f"base_model.model.{part}." for part in ("gap_closed_clip", "decoder", "memory"))
# Folder beside an adapter, with the model that the adapter belongs to.
BASE = "base"


def check_model_name(name_or_path: str | Path) -> None:
    """Checks a folder as `check_checkpoint` does; a Hub id, whether it is not the name of a folder with a typo in it.

    The folder of a CLIP of transformers or open_clip will do, too: `load_checkpoint` takes it over.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`; also for `outputs/demoo` beside a folder `outputs/demo`.
    """
    path = Path(name_or_path)
    if is_local(name_or_path):
        if not is_foreign(path):
            check_checkpoint(path)
    elif len(path.parts) > 1 and (hint := _similar_folder(path)):
        raise FileNotFoundError(f"There is no folder {path}.{hint}")


def check_checkpoint(folder: str | Path) -> None:
    """Looks for what is missing or half-written in a model folder, without loading the weights.

    Raises:
        FileNotFoundError: the folder, or a file of it, is missing.
        ValueError: a file is damaged, or it is another kind of model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.{_similar_folder(folder)}")
    if is_adapter(folder):
        _check_adapter(folder)
    else:
        _check_model(folder)
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise FileNotFoundError(f"{folder} has no processor: processor_config.json is missing. {AGAIN}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json is missing. {AGAIN}")
    check_files(folder)


def load_checkpoint(
    name_or_path: str | Path, revision: str | None = None, allow_pickle: bool = False
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """Loads model and processor of a folder or of a Hub id. An adapter is loaded on its base model and merged into it;
    a CLIP of transformers or open_clip is taken over as `conversion.from_clip` does.

    Args:
        revision: of a Hub id.
        allow_pickle: as of `conversion.from_clip`; our own models have no pickled weights.

    Raises:
        FileNotFoundError, ValueError: as `check_model_name`; also if weights are missing, not finite or of other
            shapes, or an adapter does not belong to its base model, or that has other weights than when the adapter
            was trained, or it belongs to a captioner; or the processor's modalities are not the model's, or its
            tokenizer has more tokens than the model embeds.
        OSError: neither a folder nor within reach on the Hub; an adapter whose base model is neither.
    """
    name_or_path = str(name_or_path)
    check_model_name(name_or_path)
    if is_foreign(name_or_path, revision):
        model, processor = from_clip(name_or_path, revision, allow_pickle)
        check_vocabulary(name_or_path, processor.tokenizer, model)
        return model, processor
    with explained_errors(name_or_path, revision):
        if is_adapter(name_or_path, revision):
            model = _load_adapter(name_or_path, revision)
            check_finite(name_or_path, model)
            return model, _load_processor(name_or_path, revision, model)
    return _load_whole(GapClosedClipModel, name_or_path, revision)


def load_captioner(
    name_or_path: str | Path, revision: str | None = None
) -> tuple[GapClosedClipForConditionalGeneration, GapClosedClipProcessor]:
    """Loads captioner and processor of a folder or of a Hub id; `load_checkpoint` loads the encoder of the same.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_checkpoint`; also where there is no decoder.
    """
    if not is_captioner(name_or_path, revision):
        raise ValueError(
            f"{name_or_path} has no decoder, so it writes no captions. Train one on it: gap-closed-clip train "
            f"configs/captioning.yaml checkpoint={name_or_path}"
        )
    return _load_whole(GapClosedClipForConditionalGeneration, str(name_or_path), revision)


def is_captioner(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id holds a model with a decoder.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_checkpoint`; also of an adapter on a captioner.
    """
    check_model_name(name_or_path)
    if is_foreign(name_or_path, revision):
        return False
    with explained_errors(str(name_or_path), revision):
        if is_adapter(name_or_path, revision):
            _check_adapter_of_encoder(str(name_or_path), revision)
            return False
        return GapClosedClipConfig.from_pretrained(name_or_path, revision=revision).decoder_config is not None


def further_modalities(name_or_path: str | Path, revision: str | None = None) -> dict[str, dict]:
    """The modalities beyond image and text of a folder's or a Hub id's model, as its configuration has them.

    Raises:
        FileNotFoundError, ValueError, OSError: as `load_checkpoint`.
    """
    if is_foreign(name_or_path, revision):
        return {}
    with explained_errors(str(name_or_path), revision):
        if is_adapter(name_or_path, revision):
            base, base_revision = base_of_adapter(name_or_path, revision)
            return {} if base is None else further_modalities(base, base_revision)
        return GapClosedClipConfig.from_pretrained(name_or_path, revision=revision).modalities or {}


def is_adapter(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id holds a peft adapter and no whole model."""
    folder = Path(name_or_path)
    if is_local(name_or_path):
        return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    return find_adapter_config_file(str(name_or_path), revision=revision) is not None


def base_of_adapter(name_or_path: str | Path, revision: str | None = None) -> tuple[str | None, str | None]:
    """The model that an adapter belongs to, and its revision: the one beside it in `base`, else the one it names."""
    beside = Path(name_or_path) / BASE
    if is_local(name_or_path) and (beside / "config.json").is_file():
        return str(beside), None
    config = PeftConfig.from_pretrained(str(name_or_path), revision=revision)
    return config.base_model_name_or_path, config.revision


def is_local(name_or_path: str | Path) -> bool:
    """Whether this is, or is written like, a folder rather than a Hub id `name` or `owner/name`."""
    text = str(name_or_path)
    return Path(text).is_dir() or text.startswith((".", "/", "~")) or text.count("/") > 1


def check_writable(folder: str | Path, field: str) -> None:
    """Checks that files can be written into a folder, which need not be there yet; nothing stays behind.

    Raises:
        OSError: they can't, with the name of the field that asks for the folder.
    """
    path = Path(folder).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):  # permissions alone don't tell of a read-only file system
            pass
    except OSError as error:
        raise OSError(f"{field} {folder} can't be written ({error.strerror}): name a folder that can.") from error


def _similar_folder(path: Path) -> str:
    """ " Did you mean outputs/demo?" of a folder that isn't there; empty where none beside it has a similar name."""
    names = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    return "" if near is None else f" Did you mean {path.parent / near}?"


def _load_whole(
    model_class: type[PreTrainedModel], name_or_path: str, revision: str | None
) -> tuple[PreTrainedModel, GapClosedClipProcessor]:
    """Loads a model and its processor; all weights have to be there."""
    check_model_name(name_or_path)
    with explained_errors(name_or_path, revision), loading_in_one_line():
        model, info = model_class.from_pretrained(
            name_or_path, revision=revision, use_safetensors=True, output_loading_info=True
        )
    processor = _load_processor(name_or_path, revision, model)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights, the first: {missing[0]}. {AGAIN}")
    if unexpected := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{name_or_path}: config.json has no place for {len(unexpected)} of its weights, the first: "
            f"{unexpected[0]}. {AGAIN}"
        )
    check_finite(name_or_path, model)
    return model, processor


def _load_processor(name_or_path: str, revision: str | None, model: PreTrainedModel) -> GapClosedClipProcessor:
    encoder = getattr(model, "gap_closed_clip", model)  # of a captioner
    with explained_errors(name_or_path, revision, PROCESSOR_FILES):
        processor = GapClosedClipProcessor.from_pretrained(name_or_path, revision=revision)
        try_processor(processor, encoder.image_size)
    try:
        check_fit(model.config.modalities, processor.modality_processors)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from error
    check_vocabulary(name_or_path, processor.tokenizer, model)
    return processor


def _load_adapter(name_or_path: str, revision: str | None) -> GapClosedClipModel:
    _check_adapter_of_encoder(name_or_path, revision)
    base, base_revision = base_of_adapter(name_or_path, revision)
    beside = Path(name_or_path) / BASE
    try:
        if not base:
            raise OSError("base_model_name_or_path is empty")
        model, _ = load_checkpoint(base, base_revision)
    except (OSError, ValueError) as error:
        raise BaseNotLoaded(
            f"{name_or_path} is an adapter, and its base model {base} could not be loaded: {error} Put the base model "
            f"there, or into {beside}, or correct base_model_name_or_path in {ADAPTER_CONFIG}."
        ) from error
    _check_modalities_of_adapter(name_or_path, revision, base, model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(model, name_or_path, revision=revision)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(f"The adapter {name_or_path} does not belong to its base model {base}: {error}") from error
    check_base(name_or_path, base)
    model = model.merge_and_unload().eval()
    run = cached_file(name_or_path, RUN_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if run is not None:  # what config.json of a whole model says
        model.config.fusion_weights = read_json(Path(run)).get("fusion_weights", model.config.fusion_weights)
    return model


def _check_adapter_of_encoder(name: str, revision: str | None) -> None:
    """Refuses an adapter on a captioner, and with an OSError one without safetensors: peft would read a pickle."""
    path = cached_file(name, ADAPTER_WEIGHTS, revision=revision)
    with safe_open(path, "pt") as weights:
        if any(key.startswith(OF_CAPTIONERS) for key in weights.keys()):  # noqa: SIM118
            raise ValueError(
                f"{name} is an adapter on a captioner, and adapters are loaded on encoders alone. Merge it first: "
                "PeftModel.from_pretrained(GapClosedClipForConditionalGeneration.from_pretrained(base), "
                f"{name!r}).merge_and_unload().save_pretrained(folder), and the processor beside it."
            )


def _check_modalities_of_adapter(name: str, revision: str | None, base: str, model: GapClosedClipModel) -> None:
    saved = PeftConfig.from_pretrained(name, revision=revision).modules_to_save or []
    wanted = dict.fromkeys(path.split(".")[1] for path in saved if path.startswith("modality_towers."))
    if lacking := [modality for modality in wanted if modality not in model.config.modality_names]:
        raise ValueError(
            f"The adapter {name} was trained with the modality {' and '.join(lacking)}, and its base model {base} has "
            f"none: put the base that was saved beside it into {Path(name) / BASE}, or name it in {ADAPTER_CONFIG}."
        )


def _check_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" Did you mean {folder / inner[-1]}?" if inner else f" {AGAIN}"
        if any(folder.glob("open_clip_*")):
            hint = " Of open_clip's files open_clip_config.json is missing: take it from where the weights are from."
        raise FileNotFoundError(f"{folder} is no model folder: config.json is missing.{hint}")
    found = read_json(folder / "config.json").get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, not {MODEL_TYPE!r}: give the folder of a GapClosedClipModel, "
            "or of a CLIP with an image and a text tower."
        )
    for name in _weight_files(folder):
        _check_weights(folder / name)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds a whole model and an adapter beside it, which transformers would load instead of it, on "
            f"the base of that: move {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} away, or save the model elsewhere."
        )


def _check_adapter(folder: Path) -> None:
    read_json(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no weights: {ADAPTER_WEIGHTS} is missing. {AGAIN}")
    _check_weights(folder / ADAPTER_WEIGHTS)


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder} is damaged: {INDEX} has no weight_map. {AGAIN}")
        return sorted(set(weight_map.values()))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise FileNotFoundError(no_weights(folder, WEIGHTS, pickled[0] if pickled else None))


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is incomplete: {path.name} is missing. {AGAIN}")
    try:
        with safe_open(path, framework="pt"):  # reads the header, which tells how long the file has to be
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.parent} is damaged: {path.name} is truncated or no safetensors file ({error}). "
                         f"{AGAIN}") from error  # fmt: skip
