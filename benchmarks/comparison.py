"""What comparisons of trainings share: a training that is run only once, figures of several runs, errors in a line."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from filelock import FileLock, Timeout

from gap_closed_clip.checkpoint import METRICS_FILE, RUN_FILE
from gap_closed_clip.commands import keep_freed_memory
from gap_closed_clip.data import DataArguments
from gap_closed_clip.data.columns import is_missing, text_of
from gap_closed_clip.data.images import stored_bytes
from gap_closed_clip.data.modalities import has_image
from gap_closed_clip.evaluation import read_metrics
from gap_closed_clip.evaluation.pair_embeddings import columns_of
from gap_closed_clip.training import RunConfig, load_config, train


CONFIGS = Path(__file__).parent.parent / "configs"
BUDGETS = Path(__file__).parent / "budgets"
PAIRS_FILE = "pairs.txt"  # in a model folder: the digest of the pairs that it was trained on
START_FILE = "start.txt"  # and that of the model that it was trained from, `model.checkpoint`
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer.json", "vocab.*", "merges.txt")  # what embeddings depend on
BLOCK = 100  # numbers of images
# The objectives: for each the configuration files that it needs over the first, and words.
METHODS: dict[str, tuple[list[Path], list[str]]] = {
    "CLIP (LT)": ([CONFIGS / "clip_lt.yaml"], []),
    "CLIP (FT)": ([CONFIGS / "clip_ft.yaml"], []),
    "CLIP, centered": ([CONFIGS / "clip_lt.yaml"], ["center_projections=true"]),
    "papers' form": ([CONFIGS / "paper_objective.yaml"], []),
    "ours": ([], []),
}


def run_script(script: Callable[[], None]) -> int:
    """Run a script, and give its exit code: 0, 1 after an error in a line, or 130 if it was interrupted."""
    name = Path(sys.argv[0]).name
    keep_freed_memory()  # as the command does
    try:
        script()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted. The same command goes on where it was.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def slug(name: str) -> str:
    """The name in small letters, digits and underscores, as a folder's name."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def run_once(config: RunConfig, folder: Path, pairs: str = "") -> dict[str, float]:
    """
    Train in `folder` and give the metrics, none with `final_split=none`. A run that has finished there with the same
    settings, from the same model where it starts from one, is not repeated; while another process trains there, this
    one waits.

    Args:
        pairs: their digest, if that is known: a run on others is repeated.
    Runs of an earlier version, which left no notes of pairs or start, are taken as they are.
    """
    settings = {**config.training, "output_dir": str(folder), "overwrite_output_dir": True}
    config = replace(config, training=settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Another process is training {folder}: waiting for it.", flush=True)
        lock.acquire()
    try:
        digests = {folder / PAIRS_FILE: pairs, folder / START_FILE: digest_of_start(config)}
        notes = {note: digest for note, digest in digests.items() if digest}
        others = [note for note, digest in notes.items() if note.is_file() and note.read_text("utf-8") != digest]
        if not is_done(config, folder) or others:
            train(config)
        for note, digest in notes.items():
            note.write_text(digest, encoding="utf-8")
    finally:
        lock.release()
    if not is_evaluated(config):
        return {}
    (metrics,) = read_metrics(folder / METRICS_FILE).values()
    return metrics


def is_evaluated(config: RunConfig) -> bool:
    """Whether a run evaluates the model that it has trained."""
    return config.training.get("final_split") != "none"


def read_sources(folder: Path) -> dict[str, dict[str, float]]:
    """{source: metrics of its own pairs} of a finished run; empty where the pairs come from one source."""
    sources = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["sources"]
    return {
        source: {metric: math.nan if value is None else value for metric, value in metrics.items()}
        for source, results in sources.items()
        for metrics in results.values()
    }


def digest_of_pairs(*several: Dataset) -> str:
    """Of all that is known of sets of pairs, and of their images' files, each of which is read."""
    hashed = hashlib.blake2b(digest_size=8)
    for pairs in several:
        hashed.update(repr(columns_of(pairs)[:4]).encode())
        of_file: dict[str, bytes] = {}  # an image may have many captions
        for row in filter(has_image, pairs.select_columns(["image"])):  # with a record, a pair may lack it
            path = row["image"].get("path") if row["image"].get("bytes") is None else None
            found = of_file.get(path or "") or hashlib.blake2b(stored_bytes(row["image"])).digest()
            if path:
                of_file[path] = found
            hashed.update(found)
    return hashed.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Of a model's weights and of the settings beside them."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern)):
        hashed.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()


def digest_of_start(config: RunConfig) -> str:
    """Of the model folder that a training starts from; empty where it starts from none, or from the Hub."""
    start = config.model.checkpoint
    return digest_of_folder(Path(start)) if start and Path(start).is_dir() else ""


def cases(pairs: Dataset, data: DataArguments) -> list[str]:
    """
    What has to stay in one fold, and counts once in statistics: the rows of a case as the fold column of their source
    has it (without one, `case_id`), or those of an image, or else of a caption. Images of MedPix outside of MedPix 2.0
    (ids that end in synpic and a number) name no case where their source has no fold column, but those of a case are
    numbered one after the other: blocks of `BLOCK` numbers stay together.
    """
    fold_columns = {name: own.fold_column for name, own in data.sources().items()}
    of_source = [*fold_columns][0]
    names = pairs.column_names
    kept = {name: pairs[name] for name in {*fold_columns.values(), "case_id"} if name in names}
    sources = pairs["source"] if "source" in names else [of_source] * len(pairs)
    groups = []
    for row, (source, image_id, caption) in enumerate(zip(sources, pairs["image_id"], pairs["caption"], strict=True)):
        fold_column = fold_columns[source]
        values = kept.get(fold_column or "case_id")
        number = None if fold_column else re.search(r"synpic(\d+)\D*$", image_id)
        if values is not None and not is_missing(values[row]):
            groups.append(f"case {text_of(values[row]).strip()}")
        elif number is not None:
            groups.append(f"block {int(number[1]) // BLOCK}")
        elif image_id:
            groups.append(f"image {image_id}")
        else:
            groups.append(f"caption {caption}" if caption else f"row {row}")
    return groups


def is_done(config: RunConfig, folder: Path) -> bool:
    """Whether a run with these settings has finished in the folder."""
    if not (folder / (METRICS_FILE if is_evaluated(config) else RUN_FILE)).is_file():  # what a run writes last
        return False
    settings = config.to_dict()
    settings["data"].pop("feature_cache", None)  # which is not written into the folder, and changes nothing
    return load_config([folder / "train_config.yaml"]).to_dict() == settings
