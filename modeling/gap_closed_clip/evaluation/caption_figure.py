"""A figure of images with their own captions and those that models write for them."""

import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data import decode_image, stable_hash
from ..disk import replacing
from .captions import Captions


COLUMNS, MAX_IMAGES = 2, 12
# inches: of an image and the text beside it, of a line
IMAGE_WIDTH, TEXT_WIDTH, LINE_HEIGHT = 1.6, 5.2, 0.135
CHARACTERS, FONT_SIZE, MAX_LINES = 78, 7.0, 4  # of capitals, too, so many fit beside an image
# The reference's, and, again and again, the models' (Okabe and Ito's, told apart by everyone).
INK, COLORS = "#222222", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#3A7CA5")
SIDE = 256  # pixels that an image is reduced to, about


def plot_captions(
    captions: Mapping[str, Captions], pairs: Dataset, path: str | Path, number: int = MAX_IMAGES
) -> None:
    """
    Draws images with their captions. The images are the first in the order of a hash of their ids, so that nobody
    has picked them.

    Args:
        captions: {model name: captions}, of one set of images.
        pairs: where the images are.
        path: of the PNG.
        number: of images, at most.
    """
    first = next(iter(captions.values()))
    shown = sorted(range(len(first)), key=lambda index: stable_hash(first.image_ids[index]))[:number]
    rows = {image_id: row for row, image_id in reversed(list(enumerate(pairs["image_id"])))}
    written = {name: dict(zip(of.image_ids, of.captions, strict=True)) for name, of in captions.items()}
    blocks = []
    for index in shown:
        image_id = first.image_ids[index]
        lines = _lines("reference", first.references[index][0], INK)
        for (name, of), color in zip(written.items(), itertools.cycle(COLORS), strict=False):
            lines += _lines(name, of[image_id], color)
        blocks.append((image_id, lines))
    per_column = -(-len(blocks) // COLUMNS)
    height = max(IMAGE_WIDTH, max(len(lines) for _, lines in blocks) * LINE_HEIGHT) + 0.15
    figure = Figure(figsize=(COLUMNS * (IMAGE_WIDTH + TEXT_WIDTH + 0.2), per_column * height), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        per_column, 2 * COLUMNS, width_ratios=[IMAGE_WIDTH, TEXT_WIDTH] * COLUMNS, wspace=0.02, hspace=0.04,
        left=0.005, right=0.995, top=0.995, bottom=0.005,
    )  # fmt: skip
    for place, (image_id, lines) in enumerate(blocks):
        column, row = divmod(place, per_column)
        image_axes = figure.add_subplot(grid[row, 2 * column])
        image_axes.imshow(decode_image(pairs[rows[image_id]]["image"], SIDE, name=image_id))
        image_axes.set_anchor("N")
        image_axes.axis("off")
        _write(figure.add_subplot(grid[row, 2 * column + 1]), lines, height)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        figure.savefig(draft, metadata={"Software": None})


def _lines(name: str, text: str, color: str) -> list[tuple[str, str]]:
    """The lines of a caption, the first with the name of its writer, each with its color."""
    lines = textwrap.wrap(f"{name}: {text.strip() or '(nothing)'}", CHARACTERS)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: CHARACTERS - 2] + " ..."]
    return [(line, color) for line in lines]


def _write(axes, lines: list[tuple[str, str]], height: float) -> None:
    axes.axis("off")
    for number, (line, color) in enumerate(lines):
        axes.text(
            0, 1 - (number + 0.1) * LINE_HEIGHT / height, line, transform=axes.transAxes, va="top",
            fontsize=FONT_SIZE, color=color, weight="bold" if color == INK else "normal", parse_math=False,
        )  # fmt: skip
