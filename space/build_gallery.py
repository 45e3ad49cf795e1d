"""Write the gallery that the Space searches: images and captions.jsonl in space/gallery.

    python space/build_gallery.py                                        # held-out phantoms of configs/demo.yaml
    python space/build_gallery.py data.source=/data/my_pairs --size 224  # your own pairs
    python space/build_gallery.py configs/roco.yaml --split validation

A source is whatever `gap-closed-clip train` takes. Needs the package (`pip install -e .`); the Space itself does not.

WHATEVER IS IN THE GALLERY BECOMES PUBLIC WITH THE SPACE. Use only pairs whose licence allows that, and that hold no
patient's data: look at burned-in names and dates, and at the captions.
"""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from gap_closed_clip.data import decode_image, load_pairs, window_of
from gap_closed_clip.training import RunConfig, load_config


HERE = Path(__file__).parent
DEMO = HERE.parent / "configs" / "demo.yaml"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml or data.FIELD=VALUE", help="default: configs/demo.yaml"
    )
    parser.add_argument("--split", default="test", help="train, validation or test (default: test)")
    parser.add_argument("--pairs", type=int, default=160, help="how many pairs, drawn at random (default: 160)")
    parser.add_argument("--size", type=int, default=112, help="shorter side of the images in pixels (default: 112)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice of pairs (default: 0)")
    parser.add_argument("--output", type=Path, default=HERE / "gallery", help="default: space/gallery")
    return parser.parse_intermixed_args(words)


def read_config(words: list[str]) -> RunConfig:
    """The configuration of the files and overrides among the words; without a file that of the demo."""
    files = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    return load_config(files or [DEMO], [word for word in words if word not in files])


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Reduce the shorter side to `size` pixels if it has more; an image without colours becomes gray to save bytes."""
    scale = size / min(image.size)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    gray = (pixels == pixels[..., :1]).all()
    return image.convert("L") if gray else image


def draw(pairs: Dataset, config: RunConfig, size: int) -> tuple[dict[str, bytes], list[str]]:
    """The files of the images by their names, and the lines of captions.jsonl."""
    names: dict[str, str] = {}
    images: dict[str, bytes] = {}
    lines = []
    for row in pairs:
        if row["image_id"] not in names:
            name = names[row["image_id"]] = f"{len(names):04d}.png"
            image = decode_image(row["image"], window=window_of(row, config.data.window), name=row["image_id"])
            buffer = io.BytesIO()
            shrink(image, size).save(buffer, "PNG", optimize=True)
            images[name] = buffer.getvalue()
        lines.append(json.dumps({"image": names[row["image_id"]], "caption": row["caption"]}, ensure_ascii=False))
    return images, lines


def build(config: RunConfig, arguments: argparse.Namespace) -> int:
    """
    Write about.json, the images and captions.jsonl. An older gallery in the folder is replaced, once all images of the
    new one are read; anything else is not.

    Returns:
        The number of pairs.

    Raises:
        ValueError: the folder holds something else, a value is out of its range, or as `load_pairs`.
    """
    if arguments.pairs < 2 or arguments.size < 16:
        raise ValueError("--pairs has to be at least 2 and --size at least 16.")
    output = arguments.output
    known = [(output / name).is_file() for name in ("captions.jsonl", "about.json")]
    if output.is_dir() and any(output.iterdir()) and not any(known):
        raise ValueError(f"{output} is not empty and is not a gallery: give another folder with --output.")
    pairs = load_pairs(config.data, arguments.split)
    number = min(arguments.pairs, len(pairs))
    chosen = np.sort(np.random.default_rng(arguments.seed).choice(len(pairs), number, replace=False))
    images, lines = draw(pairs.select(chosen), config, arguments.size)  # before the older one goes
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    about = {"source": ", ".join(config.data.sources()), "split": arguments.split}  # never a path of this machine
    (output / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    for name, data in images.items():
        (output / name).write_bytes(data)
    (output / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return number


def main() -> int:
    arguments = parse()
    try:
        config = read_config(arguments.words)
        number = build(config, arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"build_gallery.py: {error}", file=sys.stderr)
        return 1
    files = list(arguments.output.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{number} pairs in {len(files)} files, {size / 1e6:.1f} MB: {arguments.output}")
    if not config.data.only_phantoms:
        print(
            "WARNING: uploading this folder publishes these images and captions. Do it only if their licence allows "
            "that and they hold no patient's data (burned-in text and captions, too).",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
