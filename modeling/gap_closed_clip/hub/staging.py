"""Puts together what is published of a model folder, in a folder of its own."""

import glob
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from PIL import Image

from ..base_weights import digest_of_weights
from ..checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CAPTION_FILES,
    CONFIG_FILE,
    FIGURES,
    INDEX,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS,
    is_adapter,
)
from ..model.configuration_gap_closed_clip import MODULES_FILE
from ..training import RunConfig
from . import onnx, onnx_preprocessing, requirements
from .card import EVAL_RESULTS, EXAMPLES, public_config
from .facts import read_evaluation, read_run
from .onnx_further import further_files
from .reload import HANDLER, HUB


ONNX_FOLDER = "onnx"
# What stages on this machine begin with; the process follows, which must not be looked for on another.
_OWN = f"gap-closed-clip-publish-{socket.gethostname()}-"
# Patterns of the paths that a model repository is made of; a star stands for no slash. Everything else in the folder
# stays at home: checkpoints with their pickled optimizer, logs, whatever else lies there.
PUBLISHED = (
    "config.json",
    "generation_config.json",
    MODULES_FILE,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WEIGHTS,
    "model-*-of-*.safetensors",
    INDEX,
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "*_gap_closed_clip.py",
    *HANDLER,
    "requirements.txt",
    "README.md",
    METRICS_FILE,
    CONFIG_FILE,
    RUN_FILE,
    *FIGURES,
    *CAPTION_FILES,
    f"{EXAMPLES}/*.png",
    f"{EXAMPLES}/*.jpg",
    *(f"{ONNX_FOLDER}/{name}" for name in onnx.FILES),  # and those of further modalities, see `_patterns`
)
# Those of them that publishing writes anew.
WRITTEN = (*HANDLER, "requirements.txt", "README.md", CONFIG_FILE, ADAPTER_CONFIG)


@contextmanager
def staged(folder: Path, base: tuple[str, str] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """
    A folder of what is published, links to the files at home except for what is written anew; and remarks on what was
    left out although it looks as if it belonged to the model, or will be read by everybody.

    Args:
        base: of an adapter, Hub id and commit of its base model, which its configurations then name.

    Raises:
        ValueError: metrics.json, train_config.yaml or run.json is damaged, or an example is no image.
    """
    run = read_run(folder)
    if run and base:
        run["config"] = replace(run["config"], model=replace(run["config"].model, checkpoint=base[0]))
    files, remarks = _publishable(published(folder), folder)
    _check_examples(files)
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"{_OWN}{os.getpid()}-") as parent:
        stage = Path(parent) / folder.name  # the card finds the model's own metrics by the folder's name
        stage.mkdir()
        _fill(stage, files)
        if base is None:
            _add_endpoint(stage)
        else:
            _name_base(stage / ADAPTER_CONFIG, *base)
        if run:
            (stage / CONFIG_FILE).write_text(public_config(run["config"]), encoding="utf-8")
        yield stage, [*(_local_paths(run["config"]) if run else []), *remarks]


def _remove_abandoned() -> None:
    """Removes what publications of this machine left in the folder for temporary files when they were killed."""
    if os.name == "nt":  # where os.kill ends a process, whatever it is to send
        return
    for path in Path(tempfile.gettempdir()).glob(f"{glob.escape(_OWN)}*"):
        process = path.name.removeprefix(_OWN).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, OverflowError, ValueError):  # somebody else's process, or no name of ours
            continue


def published(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, of all in a folder that a publication is made of."""
    patterns = (*_patterns(folder), f"{EVAL_RESULTS}/*.yaml")
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): path for path in sorted(found) if path.is_file()}


def _patterns(folder: Path, before: Collection[str] = ()) -> tuple[str, ...]:
    """PUBLISHED, and the ONNX files of the model's further modalities, and of those that it had `before`."""
    modalities = [] if is_adapter(folder) else further_modalities(folder / "config.json")
    further = (f"{ONNX_FOLDER}/{file}" for name in {*modalities, *before} for file in further_files(name))
    return (*PUBLISHED, *further)


def further_modalities(config: Path) -> list[str]:
    """Those that a model's config.json names; none where it is damaged."""
    try:
        listed = json.loads(config.read_text(encoding="utf-8")).get("modalities") or []
        return [name for name in (entry["name"] for entry in listed) if re.fullmatch(r"[a-z][a-z0-9_]*", name)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def replaced(name: str, folder: Path, before: Collection[str] = ()) -> bool:
    """
    Whether a publication of the folder is responsible for this path of a repository: deletes it where the folder has
    it no more.

    It is not for other people's results of a data set, nor for what lies deeper than the files that it sends.

    Args:
        before: further modalities of the model that is there.
    """
    depth = len(PurePosixPath(name).parts)
    patterns = _patterns(folder, before)
    return any(len(PurePosixPath(pattern).parts) == depth and fnmatch(name, pattern) for pattern in patterns)


def left_out(folder: Path, names: list[str]) -> list[str]:
    """What else the folder holds; of an inner folder that goes in part, the files in it that don't."""
    sent = {name.partition("/")[0] for name in names}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name not in sent:
            found.append(path.name + "/" * path.is_dir())
        elif path.is_dir():
            inside = (entry.relative_to(folder).as_posix() for entry in sorted(path.iterdir()))
            found += [name for name in inside if name not in names]
    return found


def _publishable(files: dict[str, Path], folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Those of the files that are of the folder's weights and that everybody may see; remarks on the others."""
    remarks = []
    if WEIGHTS in files:
        files = _without(files, INDEX)  # of shards from before
    evaluation = read_evaluation(folder)
    if evaluation and evaluation["stale"]:
        files = _without(files, METRICS_FILE, *FIGURES, *CAPTION_FILES)
        remarks.append(
            f"{METRICS_FILE} and its figures were measured on other weights, and stay out: run `gap-closed-clip eval`."
        )
    if set(CAPTION_FILES) & set(files) and not (evaluation and evaluation["data"].only_phantoms):
        files = _without(files, *CAPTION_FILES)
        remarks.append(
            f"{' and '.join(CAPTION_FILES)} show images and captions of the data, and stay out: whether everybody may "
            "see those is not for a program to decide."
        )
    exported = [name for name in files if name.startswith(f"{ONNX_FOLDER}/")]
    if exported and _stale_onnx(folder):
        files = _without(files, *exported)
        remarks.append(
            f"{ONNX_FOLDER}/ is not of these weights, and stays out: run `gap-closed-clip export-onnx --overwrite`."
        )
    return files, remarks


def _without(files: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name not in names}


def _fill(stage: Path, files: dict[str, Path]) -> None:
    """Links to the files; copies of those that are written anew, which must not be written into the folder at home."""
    for name, path in files.items():
        target = stage / name
        target.parent.mkdir(exist_ok=True)
        if name in WRITTEN or not _linked(path.resolve(), target):
            shutil.copyfile(path, target)


def _add_endpoint(stage: Path) -> None:
    """What an Inference Endpoint runs and installs."""
    for name in HANDLER:
        shutil.copyfile(HUB / name, stage / name)
    (stage / "requirements.txt").write_text("\n".join([*requirements.ENDPOINT, ""]), encoding="utf-8")


def _name_base(path: Path, name: str, revision: str) -> None:
    """The base model on the Hub into an adapter's configuration, which names a folder."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _stale_onnx(folder: Path) -> bool:
    try:
        content = json.loads((folder / ONNX_FOLDER / onnx_preprocessing.PREPROCESSING).read_text(encoding="utf-8"))
        return content["weights"] != digest_of_weights(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _check_examples(files: dict[str, Path]) -> None:
    for name, path in files.items():
        if name.startswith(f"{EXAMPLES}/"):
            try:
                with Image.open(path) as image:
                    image.verify()
            except Exception as error:  # a damaged file makes Pillow raise a dozen different types
                raise ValueError(f"{path} is no image, or a damaged one: replace or remove it.") from error


def _local_paths(config: RunConfig) -> list[str]:
    """A remark on each path of this machine that the published configuration and the card name."""
    named = {"model.checkpoint": config.model.checkpoint, "model.vision": config.model.vision}
    named |= {"model.text": config.model.text}
    for name, entry in (config.model.modalities or {}).items():
        named[f"model.modalities.{name}.tower"] = entry.get("tower")
    sources = config.data.sources().items()
    for name, own in sources:
        of_source = "" if len(sources) == 1 else f" of '{name}'"
        named |= {f"data.source{of_source}": str(own.source), f"data.image_root{of_source}": own.image_root}
    if config.captioning:
        named["captioning.decoder"] = config.captioning.decoder
    return [
        f"Everybody will read the path {path}: it is {name} in {CONFIG_FILE} and on the card."
        for name, path in named.items()
        if isinstance(path, str) and Path(path).is_absolute()
    ]


def _linked(path: Path, target: Path) -> bool:
    try:
        os.symlink(path, target)
    except OSError:  # Windows, without the right to
        return False
    return True
