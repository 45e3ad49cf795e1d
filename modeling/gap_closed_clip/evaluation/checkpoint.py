"""Load a model folder, or say in one line what is wrong with it."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..modeling_gap_closed_clip import GapClosedClipModel
from ..processing_gap_closed_clip import GapClosedClipProcessor


MODEL_TYPE = "gap_closed_clip"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "Save it again (train.py, or model.save_pretrained and processor.save_pretrained)."


def check_checkpoint(folder: str | Path) -> None:
    """Look for what is missing or half-written in a model folder, without loading the weights.

    Raises:
        FileNotFoundError: the folder, or a file of it, is missing.
        ValueError: a file is damaged, or it is another kind of model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" Did you mean {folder / inner[-1]}?" if inner else f" {AGAIN}"
        raise FileNotFoundError(f"{folder} is no model folder: config.json is missing.{hint}")
    found = _read_json(folder / "config.json").get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(f"{folder} holds a model of type {found!r}, not {MODEL_TYPE!r}: give a GapClosedClipModel's.")
    for name in _weight_files(folder):
        _check_weights(folder / name)
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise FileNotFoundError(f"{folder} has no processor: processor_config.json is missing. {AGAIN}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json is missing. {AGAIN}")


def load_checkpoint(name_or_path: str | Path) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """Model and processor of a folder or of a Hub id.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`; also if weights are missing or have other shapes.
        OSError: neither a folder nor within reach on the Hub.
    """
    name_or_path = str(name_or_path)
    if is_local(name_or_path):
        check_checkpoint(name_or_path)
    try:
        model, info = GapClosedClipModel.from_pretrained(name_or_path, output_loading_info=True)
        processor = GapClosedClipProcessor.from_pretrained(name_or_path)
    except OSError as error:
        raise OSError(
            f"{name_or_path} is neither a folder with a model nor a Hub id within reach (network? HF_TOKEN for a "
            f"private one? HF_HUB_OFFLINE?): {str(error).splitlines()[0]}"
        ) from error
    except RuntimeError as error:  # shapes
        raise ValueError(f"{name_or_path}: the weights do not fit config.json. {AGAIN} {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights, the first: {missing[0]}. {AGAIN}")
    return model, processor


def is_local(name_or_path: str | Path) -> bool:
    """Whether this is, or is written like, a folder rather than a Hub id `name` or `owner/name`."""
    text = str(name_or_path)
    return Path(text).is_dir() or text.startswith((".", "/", "~")) or text.count("/") > 1


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"{pickled[0]} is pickled and not read" if pickled else "it may be half-written"
    raise FileNotFoundError(f"{folder} has no weights: {WEIGHTS} is missing, {hint}. {AGAIN}")


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is incomplete: {path.name} is missing. {AGAIN}")
    try:
        with safe_open(path, framework="pt"):  # reads the header, which tells how long the file has to be
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.parent} is damaged: {path.name} is truncated or no safetensors file ({error}). "
                         f"{AGAIN}") from error  # fmt: skip


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.parent} is damaged: {path.name} is half-written ({error}). {AGAIN}") from error
