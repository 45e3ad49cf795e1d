"""The section `data` of a configuration: one dataclass, whose values are checked when it is made."""

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from .images import Augmentation
from .modalities import Modalities, check_modalities, join_modalities
from .source_list import SOURCE_FIELDS, last_part, name_sources


MOST_VIEWS = 64  # of an image; they go through the tower together
RANGES = {"max_caption_tokens": (3, math.inf), "phantom_size": (32, 4096)}  # others are from 1; two tokens are special


def expand_path(path: str, field_name: str) -> str:
    """Replace `$VARIABLE`, `${VARIABLE}` and `~` in a path by what they stand for.

    Args:
        path: as it is written in the configuration.
        field_name: the field that holds it, with its section; error messages name it.

    Raises:
        ValueError: an environment variable is not set (`os.path.expandvars` would leave it in silently).
    """
    for variable in re.findall(r"\$\{?(\w+)\}?", path):
        if not os.environ.get(variable):
            raise ValueError(
                f"{field_name} is '{path}', but the environment variable {variable} is not set. "
                f"Set it (export {variable}=/path/to/the/folder) or write the path out."
            )
    return os.path.expanduser(os.path.expandvars(path))


@dataclass
class DataArguments:
    """The source of image-caption pairs, its columns and splits, and how the training images are augmented.

    The `help` of each field describes it. With a list of sources, `sources` gives each one's own arguments.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    source: str | list[dict[str, Any]] = field(
        default="phantoms",
        metadata={
            "help": "'phantoms' (drawn on the fly, no download); a folder in ROCO's layout "
            "({split}/radiology/images + captions.txt); a csv, tsv, jsonl or parquet file; a folder of those or of "
            "images with a metadata file; or a Hugging Face Hub id such as 'eltorio/ROCOv2-radiology'. "
            "Environment variables are filled in: '$RADIOLOGY_DATA/medpix2'. Or a list of sources, which are trained "
            "on together: mappings with a source, a name (default: its last part) and those fields of this section "
            "that are its own (license, subset, splits, columns, modalities, image_root, max_pairs, on_missing, "
            "on_bad_image, fold_column, window, phantoms)."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the pairs, in the source's words. Only the model card uses it."}
    )
    subset: str | None = field(
        default=None, metadata={"help": "Configuration to load of a Hub data set that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "What the source calls its training split."})
    validation_split: str | None = field(
        default="validation",
        metadata={
            "help": "What the source calls its validation split; null: it has none, and is left out where others have."
        },
    )
    test_split: str | None = field(
        default="test", metadata={"help": "What the source calls its test split; null: it has none."}
    )
    split_column: str | None = field(
        default="split",
        metadata={
            "help": "A source that is one table: column that says which split a row belongs to, train, val (valid, "
            "validation, dev) or test. The default is passed over where there is no such column or it says other "
            "things; null: no column does."
        },
    )

    image_column: str | None = field(
        default="image",
        metadata={
            "help": "Column that holds images, image bytes or file paths; null, with modalities: there is none."
        },
    )
    caption_column: str | None = field(
        default="caption", metadata={"help": "Column that holds the captions; null, with modalities: there is none."}
    )
    image_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that identifies an image; rows with the same id are one image with several captions. "
            "Default: the column 'image_id' if there is one, else the file's path, else a hash of the image's bytes."
        },
    )
    label_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns whose values, joined with ' / ', are the label that grouping metrics use. A row that "
            "lacks one of them has no label. Default: the column 'label' if there is one."
        },
    )
    modalities: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Further modalities by name: a list of columns is a record ({record: [age, sex]}), one column "
            "holds arrays, images or their files ({audio: spectrogram}). With them samples may lack some: an empty "
            "caption, no image, a record without any value. In the entry of a source: those that it has."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that relative image paths start from. Default: the source's own folder."},
    )

    allow_urls: bool = field(
        default=False,
        metadata={
            "help": "Open http and https addresses that a data set has in place of images, on public servers alone. "
            "(Those of the Hub that streaming makes are always opened.)"
        },
    )

    streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are needed, for data sets that do not fit on the disk."}
    )
    shuffle_buffer: int = field(
        default=2000,
        metadata={"help": "Streaming: size of the buffer that the next training row is drawn from. 0: no shuffling."},
    )
    shuffle_seed: int = field(default=0, metadata={"help": "Streaming: seed of the shuffling."})
    max_pairs: int | None = field(
        default=None, metadata={"help": "Use only the first so many pairs of a split (of each source)."}
    )
    on_missing: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "Half a pair (an image without caption, a caption without image, an empty caption), with "
            "data.modalities a sample that has one modality alone: 'error' stops, 'skip' leaves it out and logs it."
        },
    )
    on_bad_image: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "An unreadable or truncated image: 'error' stops, 'skip' leaves it out and logs it."},
    )

    folds: int | None = field(
        default=None,
        metadata={
            "help": "Cross-validation: the training split is cut into this many folds; 'validation' is one of them, "
            "'train' is the others, and the source's own validation split is not used."
        },
    )
    fold: int = field(default=0, metadata={"help": "Cross-validation: number of the fold that is held out, from 0."})
    fold_column: str | None = field(
        default=None,
        metadata={
            "help": "Cross-validation: rows with the same value in this column (a case, a patient) share a fold, "
            "and so do rows of the same image (in a stream only where the column says nothing)."
        },
    )

    phantom_train_pairs: int = field(default=768, metadata={"help": "Phantoms: number of training pairs."})
    phantom_validation_pairs: int = field(default=256, metadata={"help": "Phantoms: number of validation pairs."})
    phantom_test_pairs: int = field(default=512, metadata={"help": "Phantoms: number of test pairs."})
    phantom_size: int = field(default=128, metadata={"help": "Phantoms: side of the square images in pixels."})
    phantom_seed: int = field(
        default=0, metadata={"help": "Phantoms: seed; the seed of each split is derived from it."}
    )

    augment: bool = field(default=True, metadata={"help": "Vary the training images, as the next four fields say."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.7, 1.0],
        metadata={"help": "Smallest and largest share of the image's area that a random crop keeps."},
    )
    brightness: float = field(
        default=0.2, metadata={"help": "Brightness is multiplied by a factor from 1 - b to 1 + b."}
    )
    contrast: float = field(default=0.2, metadata={"help": "Contrast is multiplied by a factor from 1 - c to 1 + c."})
    horizontal_flip: bool = field(
        default=False,
        metadata={"help": "Mirror half of the images. Off by default: radiology captions name left and right."},
    )

    feature_views: int = field(
        default=3,
        metadata={
            "help": "A frozen image tower (model.freeze_vision, a captioner's) runs once over so many views of each "
            "training image, the plain one and augmented ones, of which each batch draws one; a frozen text tower "
            "over each caption. 0: frozen towers run in every step."
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where the features of frozen towers are kept for the next run. Default: "
            "gap_closed_clip/features in HF_HOME (~/.cache/huggingface)."
        },
    )

    max_caption_tokens: int | None = field(
        default=None, metadata={"help": "Longer captions are truncated. Default: the longest input of the text tower."}
    )
    window_center: float | None = field(
        default=None,
        metadata={
            "help": "Centre of the intensity window for DICOM, 16-bit and float images, in their units (Hounsfield "
            "for CT). Default: the DICOM file's own window, else the image's own range."
        },
    )
    window_width: float | None = field(
        default=None, metadata={"help": "Width of that window; set it together with window_center."}
    )
    cache_images: int | None = field(
        default=None,
        metadata={
            "help": "Decode every image once, reduce its shorter side to this many pixels, and keep the pixels in "
            "memory (3 bytes each). Saves decoding small data sets anew in every epoch."
        },
    )

    def __post_init__(self):
        if isinstance(self.label_columns, str):
            self.label_columns = [self.label_columns]
        for name in ("on_missing", "on_bad_image"):
            if getattr(self, name) not in ("error", "skip"):
                raise ValueError(f"data.{name} is '{getattr(self, name)}'; it must be 'error' or 'skip'.")
        phantoms = ("phantom_train_pairs", "phantom_validation_pairs", "phantom_test_pairs")
        for name in ("max_pairs", "cache_images", *phantoms, *RANGES):
            value, (least, most) = getattr(self, name), RANGES.get(name, (1, math.inf))
            if value is not None and not least <= value <= most:
                bound = f"least {least}" if value < least else f"most {most}"
                raise ValueError(f"data.{name} is {value}; it must be at {bound}.")
        if not 0 <= self.feature_views <= MOST_VIEWS:
            raise ValueError(
                f"data.feature_views is {self.feature_views}; it must be from 0 (frozen towers run in every step) to "
                f"{MOST_VIEWS}."
            )
        for name in ("phantom_seed", "shuffle_seed", "shuffle_buffer"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"data.folds is {self.folds}; cross-validation needs at least 2 folds.")
        if self.folds is not None and not 0 <= self.fold < self.folds:
            raise ValueError(f"data.fold is {self.fold}; with data.folds={self.folds} it is 0 to {self.folds - 1}.")
        if (self.window_center is None) != (self.window_width is None):
            raise ValueError("data.window_center and data.window_width go together: set both or neither.")
        if not all(map(math.isfinite, self.window or ())):
            raise ValueError(f"data.window_center and data.window_width are {self.window}: use finite numbers.")
        if self.window_width is not None and self.window_width < 1:
            raise ValueError(f"data.window_width is {self.window_width}; it must be at least 1.")
        self.augmentation()  # checks its values now, before anything is loaded
        if self.modalities is not None:
            check_modalities(self.modalities)
        if not isinstance(self.source, str):
            self.source = name_sources(self.source, [each.name for each in fields(self)])
            self.sources()  # checks each one's values
            if self.all_modalities:
                check_modalities(self.all_modalities)
        if self.fold_column in self.all_modalities and self.folds:
            raise ValueError(
                f"data.modalities: '{self.fold_column}' is data.fold_column, too. Give the modality another name."
            )

    @property
    def window(self) -> tuple[float, float] | None:
        """Centre and width of the intensity window that replaces the images' own, or None."""
        if self.window_center is None or self.window_width is None:
            return None
        return self.window_center, self.window_width

    def sources(self) -> dict[str, "DataArguments"]:
        """The arguments of each source by its name, each with a plain `source`. Without a list, there is one.

        Raises:
            ValueError: a value is out of its range; the message names the source.
        """
        if isinstance(self.source, str):
            return {last_part(self.source): self}
        found = {}
        for entry in self.source:
            own = {key: value for key, value in entry.items() if key != "name"}
            try:
                found[entry["name"]] = replace(self, **own)
            except ValueError as error:
                raise ValueError(f"data.source, '{entry['name']}': {error}") from error
        return found

    @property
    def all_modalities(self) -> Modalities:
        """The modalities beyond image and text in order, those of all sources; {} if there are none.

        Raises:
            ValueError: sources differ in what a modality is.
        """
        if isinstance(self.source, str):
            return self.modalities or {}
        parts = {name: own.modalities or {} for name, own in self.sources().items()}
        return join_modalities({"data.modalities": self.modalities or {}, **parts})

    def has_split(self, split: str) -> bool:
        """Whether the source has the split "train", "validation" or "test", as far as the arguments say."""
        if self.folds and split == "validation":
            return True  # it is cut from the training split
        return {"validation": self.validation_split, "test": self.test_split}.get(split, split) is not None

    @property
    def title(self) -> str:
        """What messages call all the pairs: the source in quotes, or the names of several."""
        names = [self.source] if isinstance(self.source, str) else list(self.sources())
        return ", ".join(f"'{name}'" for name in names)

    @property
    def only_phantoms(self) -> bool:
        """Whether all pairs are drawn ones, which are nobody's images."""
        return all(own.source == "phantoms" for own in self.sources().values())

    def split_names(self) -> list[str]:
        """What the source calls the splits that it has."""
        return [name for name in (self.train_split, self.validation_split, self.test_split) if name is not None]

    def split_name(self, split: str) -> str:
        """What the source calls the split "train", "validation" or "test".

        Raises:
            ValueError: `split` is none of the three, or the source has no such split.
        """
        names = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        if split not in names:
            raise ValueError(f"There is no split '{split}'; it must be one of {', '.join(names)}.")
        name = names[split]
        if name is None:
            raise ValueError(f"{self.title} has no {split} split: data.{split}_split is null.")
        return name

    def augmentation(self) -> Augmentation | None:
        """The augmentation of the training images; None if `augment` is off."""
        if not self.augment:
            return None
        try:
            return Augmentation(tuple(self.crop_scale), self.brightness, self.contrast, self.horizontal_flip)
        except ValueError as error:
            raise ValueError(f"data.{error}") from error


__all__ = ["MOST_VIEWS", "SOURCE_FIELDS", "DataArguments", "expand_path"]
