"""Folds for cross-validation: each case in one of them."""

from collections import Counter
from functools import partial

from datasets import Dataset, IterableDataset

from ..metrics._embeddings import families_of, numbered
from .arguments import DataArguments
from .columns import is_missing, text_of
from .hashing import stable_hash


def take_fold(pairs: Dataset | IterableDataset, args: DataArguments, held_out: bool) -> Dataset | IterableDataset:
    """The pairs of the held-out fold, or those of all others.

    In a stream each group's hash chooses its fold, so that the sizes of the folds are only roughly equal, and an image
    of two groups may be in two folds.
    """
    roles = {args.image_column: "image", args.caption_column: "caption", None: "image_id"}
    column = roles.get(args.fold_column, args.fold_column)
    assert column is not None  # roles has None
    if isinstance(pairs, IterableDataset):
        return pairs.filter(partial(_in_fold, column=column, args=args, held_out=held_out), with_indices=True)
    rows = zip(pairs[column], pairs["image_id"], pairs["caption"], strict=True)
    groups = join_groups([_group(*row, index) for index, row in enumerate(rows)], pairs["image_id"])
    assert args.folds is not None  # folds were asked for
    folds = assign_folds(groups, args.folds)
    return pairs.select([index for index, fold in enumerate(folds) if (fold == args.fold) == held_out])


def _group(value: str | int | float | None, image_id: str, caption: str, index: int) -> str:
    """The group that stays in one fold: all rows with this value (a case, a patient), or else those of the image, or,
    if there is none, of the caption."""
    if not is_missing(value):
        return text_of(value).strip()
    if image_id:
        return f"image {image_id}"
    return f"caption {caption}" if caption else f"row {index}"


def join_groups(groups: list[str], image_ids: list[str]) -> list[str]:
    """
    The group of each row, where groups that share an image, directly or through others, are one: by the name of that
    one of them that comes first in the alphabet. An image_id of "" is none.
    """
    shown = [image_id or f"\0 row {row}" for row, image_id in enumerate(image_ids)]
    parts = families_of(numbered(groups), numbered(shown)).tolist()
    first: dict[int, str] = {}
    for group, part in sorted(zip(groups, parts, strict=True)):
        first.setdefault(part, group)
    return [first[part] for part in parts]


def _in_fold(row: dict, index: int, column: str, args: DataArguments, held_out: bool) -> bool:
    """Whether a streamed row is in the held-out fold, or, if `held_out` is False, in one of the others."""
    assert args.folds is not None  # folds were asked for
    fold = stable_hash(_group(row[column], row["image_id"], row["caption"], index)) % args.folds
    return (fold == args.fold) == held_out


def assign_folds(groups: list[str], folds: int) -> list[int]:
    """Assign rows to folds of nearly equal size so that all rows of a group are in one fold.

    From the largest group to the smallest, each goes to the fold that has the fewest rows. Groups of equal size come
    in the order of their hashes, so that neighbouring cases are spread. The result is the same in every run.

    Args:
        groups: of each row.
        folds: how many there are to be.

    Returns:
        The fold of each row, from 0.

    Raises:
        ValueError: there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < folds:
        raise ValueError(
            f"data.folds is {folds}, but the training split has only {len(sizes)} groups (cases; "
            "those that share an image are one)."
        )
    filled = [0] * folds
    fold_of = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], stable_hash(group))):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return [fold_of[group] for group in groups]


__all__ = ["assign_folds", "join_groups", "take_fold"]
