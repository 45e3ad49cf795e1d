"""Which weights a model folder holds, and which ones an adapter was trained on."""

import hashlib
import json
from pathlib import Path

from .disk import replacing
from .folder_errors import read_json


# Beside an adapter whose base is a folder. (On the Hub a base has a commit, and publications leave this file out.)
BASE_WEIGHTS_FILE = "base_weights.json"
DIGEST = "sha256"


def digest_of_weights(folder: str | Path) -> str:
    """SHA-256 of a model folder's safetensors, which tells whether a file made from a model belongs to its weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def note_base(adapter: str | Path, base: str | Path) -> None:
    """Notes in an adapter's folder which weights its base has, a folder, too."""
    path = Path(adapter) / BASE_WEIGHTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(json.dumps({DIGEST: digest_of_weights(base)}, indent=2) + "\n", encoding="utf-8")


def check_base(adapter: str | Path, base: str | Path) -> None:
    """
    Checks that an adapter's base is the one it was trained on. Without a note of that, and of a base on the Hub,
    nothing is known.

    Raises:
        ValueError: its weights are others, or the note is damaged.
    """
    path = Path(adapter) / BASE_WEIGHTS_FILE
    if not path.is_file() or not Path(base).is_dir():
        return
    if read_json(path).get(DIGEST) != digest_of_weights(base):
        raise ValueError(
            f"{adapter} is an adapter, and its base model {base} has other weights than when the adapter was trained: "
            "it was trained again or replaced, and with the adapter gives other embeddings. Put the old weights back, "
            f"or train the adapter again; if they are the same in other files, delete {path}."
        )


__all__ = ["BASE_WEIGHTS_FILE", "check_base", "digest_of_weights", "note_base"]
