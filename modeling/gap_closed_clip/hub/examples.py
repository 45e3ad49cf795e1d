"""Images that are published with a model, to try it with on its page."""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..data import DataArguments, load_pairs
from ..disk import replacing
from .card import EXAMPLES


def write_examples(folder: str | Path, data: DataArguments) -> None:
    """
    Writes a held-out image of each modality into `examples/` of a model folder, named by what it shows.

    Only phantoms are written: whether images of another source may be shown to everybody is not for a program to
    decide. Put your own there, `pleural_effusion.png`, `normal_chest.png`: the names become the labels of the model
    page.

    Args:
        folder: a model folder.
        data: what the model was trained on.
    """
    if not data.only_phantoms:
        return
    own = replace(next(iter(data.sources().values())), test_split="test")
    folder = Path(folder) / EXAMPLES
    folder.mkdir(exist_ok=True)
    for row in load_pairs(own, "test"):
        path = folder / f"{row['modality'].replace(' ', '_')}.png"
        if not path.exists():
            with replacing(path) as draft:  # half an image would stay for good
                Image.open(io.BytesIO(row["image"]["bytes"])).save(draft)
