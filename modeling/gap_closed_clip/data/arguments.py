"""What the pairs are, where they come from and how training varies them: one dataclass, checked when it is made."""

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from .images import Augmentation


def expand_path(text: str, name: str) -> str:
    """Fill in `$VARIABLE`, `${VARIABLE}` and `~` of a path; `name` is the field to speak of.

    Raises:
        ValueError: an environment variable is not set (`os.path.expandvars` would leave it in silently).
    """
    for variable in re.findall(r"\$\{?(\w+)\}?", text):
        if not os.environ.get(variable):
            raise ValueError(
                f"data.{name} is '{text}', but the environment variable {variable} is not set. "
                f"Set it (export {variable}=/path/to/the/data) or write the path out."
            )
    return os.path.expanduser(os.path.expandvars(text))


@dataclass
class DataArguments:
    """One source of image-caption pairs, its splits, and the augmentation of the training images.

    Raises:
        ValueError: a value out of its range, named with its field.
    """

    source: str = field(
        default="phantoms",
        metadata={
            "help": "'phantoms' (drawn on the fly, no download); a folder in ROCO's layout "
            "({split}/radiology/images + captions.txt); a csv, tsv, jsonl or parquet file; a folder of those or of "
            "images with a metadata file; or a Hugging Face Hub id such as 'eltorio/ROCOv2-radiology'. "
            "Environment variables are filled in: '$RADIOLOGY_DATA/medpix2'."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the pairs, in the source's words; for the model card only."}
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set with several."})
    train_split: str = field(default="train", metadata={"help": "The source's name of the training split."})
    validation_split: str = field(
        default="validation", metadata={"help": "The source's name of the validation split."}
    )
    test_split: str = field(default="test", metadata={"help": "The source's name of the test split."})

    image_column: str = field(default="image", metadata={"help": "Column of images, image bytes or file paths."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions."})
    image_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that identifies an image; rows with one id are one image with several captions. "
            "Default: 'image_id' where there is one, else the file's path, else a hash of its bytes."
        },
    )
    label_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that make the label for grouping metrics, joined with ' / '. A row that lacks one has no "
            "label. Default: 'label' where there is one."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that relative image paths start from. Default: the folder of the file or source."},
    )

    streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are needed, for sets that do not fit on the disk."}
    )
    shuffle_buffer: int = field(
        default=2000, metadata={"help": "Streaming: rows from which the next training row is drawn. 0: no shuffling."}
    )
    shuffle_seed: int = field(default=0, metadata={"help": "Streaming: seed of that drawing."})
    max_pairs: int | None = field(default=None, metadata={"help": "Use only the first so many pairs of a split."})
    on_missing: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "Half a pair (image without caption, caption without image, empty caption): stop, or skip."},
    )
    on_bad_image: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Unreadable or truncated image: stop, or skip. Skipped ones are counted."}
    )

    folds: int | None = field(
        default=None,
        metadata={
            "help": "Cross-validate over the training split: it is cut into so many folds, 'validation' is one of "
            "them and 'train' the others; the source's own validation split is not touched."
        },
    )
    fold: int = field(default=0, metadata={"help": "The fold held out, from 0."})
    fold_column: str | None = field(
        default=None,
        metadata={"help": "Rows with one value of this column (a case, a patient) never cross folds. Default: image."},
    )

    phantom_train_pairs: int = field(default=768, metadata={"help": "Phantoms: number of training pairs."})
    phantom_validation_pairs: int = field(default=256, metadata={"help": "Phantoms: number of validation pairs."})
    phantom_test_pairs: int = field(default=512, metadata={"help": "Phantoms: number of test pairs."})
    phantom_size: int = field(default=128, metadata={"help": "Phantoms: side of the square images in pixels."})
    phantom_seed: int = field(default=0, metadata={"help": "Phantoms: seed; each split draws from a seed of its own."})

    augment: bool = field(default=True, metadata={"help": "Vary the training images (the fields below)."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.7, 1.0],
        metadata={"help": "Share of the image's area that a random crop keeps, from - to."},
    )
    brightness: float = field(default=0.2, metadata={"help": "Brightness is multiplied by 1 - b ... 1 + b."})
    contrast: float = field(default=0.2, metadata={"help": "Contrast is multiplied by 1 - c ... 1 + c."})
    horizontal_flip: bool = field(
        default=False,
        metadata={"help": "Mirror half of the images. Off: left and right mean something in a radiology caption."},
    )

    max_caption_tokens: int | None = field(
        default=None, metadata={"help": "Longer captions are cut. Default: what the text tower takes."}
    )
    window_center: float | None = field(
        default=None,
        metadata={
            "help": "Window centre for DICOM, 16-bit and float images, in their units (Hounsfield for CT). "
            "Default: the DICOM file's own window, else the image's own range."
        },
    )
    window_width: float | None = field(default=None, metadata={"help": "Window width, with window_center."})
    cache_images: int | None = field(
        default=None,
        metadata={
            "help": "Decode every image once, reduced to this shorter side in pixels, and keep the pixels: saves "
            "decoding in every epoch of small sets (3 bytes a pixel)."
        },
    )

    def __post_init__(self):
        if isinstance(self.label_columns, str):
            self.label_columns = [self.label_columns]
        for name in ("on_missing", "on_bad_image"):
            if getattr(self, name) not in ("error", "skip"):
                raise ValueError(f"data.{name} is '{getattr(self, name)}'; it must be 'error' or 'skip'.")
        phantoms = ("phantom_train_pairs", "phantom_validation_pairs", "phantom_test_pairs", "phantom_size")
        for name in ("max_pairs", "max_caption_tokens", "cache_images", *phantoms):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1.")
        if self.shuffle_buffer < 0:
            raise ValueError(f"data.shuffle_buffer is {self.shuffle_buffer}; it must be 0 (no shuffling) or more.")
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"data.folds is {self.folds}; cross-validation needs at least 2 folds.")
        if self.folds is not None and not 0 <= self.fold < self.folds:
            raise ValueError(
                f"data.fold is {self.fold}; with data.folds={self.folds} it runs from 0 to {self.folds - 1}."
            )
        if (self.window_center is None) != (self.window_width is None):
            raise ValueError("data.window_center and data.window_width go together: set both or neither.")
        if self.window_width is not None and self.window_width < 1:
            raise ValueError(f"data.window_width is {self.window_width}; it must be at least 1.")
        self.augmentation()  # its own checks, before anything is loaded

    @property
    def window(self) -> tuple[float, float] | None:
        """(centre, width) that replaces the images' own window, or None."""
        return None if self.window_center is None else (self.window_center, self.window_width)

    def split_name(self, split: str) -> str:
        """The source's name of "train", "validation" or "test".

        Raises:
            ValueError: another split.
        """
        names = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        if split not in names:
            raise ValueError(f"There is no split '{split}'; it must be one of {', '.join(names)}.")
        return names[split]

    def augmentation(self) -> Augmentation | None:
        """The augmentation of training images, or None with `augment=False`."""
        if not self.augment:
            return None
        return Augmentation(tuple(self.crop_scale), self.brightness, self.contrast, self.horizontal_flip)
