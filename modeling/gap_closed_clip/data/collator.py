"""Turns rows of pairs into the batch that the model takes. Images are decoded here, in the DataLoader's workers."""

from collections.abc import Iterable, Iterator
from logging import getLogger
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils import tqdm
from PIL import Image
from transformers import ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin

from ..model.modality_processing_gap_closed_clip import encode_modality
from ..model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor
from .epoch import Epoch
from .hashing import digest_of, group_ids, stable_hash
from .image_ids import check_columns, image_id_of
from .images import Augmentation, decode_image, name_of, window_of
from .modalities import has_caption, has_image, has_modality, read_array
from .modality_ids import id_of


logger = getLogger(__name__)

# A tokenizer that knows no longest input has a `model_max_length` of 10^30; any real one is below this.
NO_LIMIT = 10**9


class PairCollator:
    """Decode, augment, resize and normalise images, tokenize captions, and say which pairs belong together.

    Args:
        processor: has an `image_processor` and a `tokenizer`.
        augmentation: varies the training images; None leaves all images as they are. Rows whose `augment` is False, as
            `load_pairs` marks those of validation and test, are never varied: a Trainer has one collator for both.
        max_length: captions are truncated to this many tokens, or to the tokenizer's own limit, if that is less.
        window: centre and width of the intensity window for DICOM, 16-bit and float images. Default: their own.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        max_length: int | None = None,
        window: tuple[float, float] | None = None,
    ):
        # Of models side by side, one may take shorter texts than another.
        limit = min(max_length or NO_LIMIT, processor.tokenizer.model_max_length)
        self.max_length = limit if limit < NO_LIMIT else None
        self.processor = processor
        self.augmentation = augmentation
        self.window = window
        self.further: dict[str, Any] = getattr(processor, "modality_processors", None) or {}
        self._warned: set[str] = set()
        self.epoch = Epoch()
        self.min_size = None if augmentation is None else augmentation.shorter_side(_target_side(processor))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of B rows.

        Args:
            rows: `image` and `caption` of each pair, and `image_id` if there is one; `window` where sources have
                different ones. An image is of any kind that `decode_image` takes; without an id it is known by its
                path or its content. From `FeaturePairs`, where frozen towers have run before, `pooled_image`
                (hidden,) or `pooled_text` (hidden,) or both, with `group_ids` (2,).

        Returns:
            `pixel_values` (B, 3, H, W) float32. `group_ids` (B, 2) int64, hashes of the image's id and of the caption
            regardless of case and white space: pairs that share either are not negatives of one another. `input_ids`,
            `attention_mask` and `token_type_ids` (B, L) int64. Where a tower has run before, `pooled_image` or
            `pooled_text` (B, hidden) float32 in the place of what it takes.
            With further modalities, whose rows' columns are called as they are: `{modality}_{input of its tower}`
            (B, ...), and `modality_mask` (B, M) bool, in the order image, text, further ones: False where a sample
            lacks one (None or an empty image, a caption that is None or "", a record without any field). What it lacks
            are zeros and an empty caption, and its `group_ids` are shared with no other. `modality_ids` (B, M) int64,
            in the same order: hashes of what each sample has; samples of equal records are not negatives of one
            another where records are compared.

        Raises:
            ValueError: an image cannot be read, a column is missing, a caption is no text, or a further modality is
                nothing that its processor takes.
        """
        if "pooled_text" not in rows[0]:
            check_columns(rows[0], ("caption",))
        if "pooled_image" in rows[0]:
            batch = {name: _stack(rows, name) for name in ("pooled_image", "group_ids")}
        else:
            batch = self.images(rows)
        if "pooled_text" in rows[0]:
            batch |= {"pooled_text": _stack(rows, "pooled_text")}
        elif self.further:
            batch |= self.tokenize([row["caption"] if has_caption(row) else "" for row in rows])
        else:
            batch |= self.tokenize([row["caption"] for row in rows])
        return batch | self._further_modalities(rows, batch["group_ids"]) if self.further else batch

    def set_epoch(self, epoch: int) -> None:
        """Has images varied in another way than in other epochs, also those of a batch that comes in each of them."""
        self.epoch.set(epoch)

    def modality(self, rows: list[dict[str, Any]], name: str) -> dict[str, torch.Tensor]:
        """The part of the batch that is one further modality, not varied: `{name}_{input of its tower}` (B, ...).

        Raises:
            ValueError: a value is nothing that the modality's processor takes.
        """
        plain = PairCollator(self.processor, window=self.window)
        values = plain._values(rows, name, self.further[name], torch.empty(0))
        return encode_modality(name, self.further[name], values)

    def _further_modalities(self, rows: list[dict[str, Any]], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the towers of further modalities, `modality_mask` and `modality_ids` (B, M).

        Args:
            ids: the group ids of the rows.

        Raises:
            ValueError: a value is nothing that the modality's processor takes.
        """
        present = [row.get("present", (has_image(row), has_caption(row))) for row in rows]
        columns = [torch.tensor([bool(each[place]) for each in present]) for place in (0, 1)]
        batch: dict[str, torch.Tensor] = {}
        all_ids = [*ids.T]
        for name, processor in self.further.items():
            self._warn_if_absent(rows, name)
            values = self._values(rows, name, processor, ids)
            batch |= encode_modality(name, processor, values)
            there = [value is not None for value in values]
            columns.append(torch.tensor(there))
            own = [stable_hash(id_of(row[name])) if has else 0 for row, has in zip(rows, there, strict=True)]
            all_ids.append(torch.tensor(own, dtype=torch.int64))
        return batch | {"modality_mask": torch.stack(columns, 1), "modality_ids": torch.stack(all_ids, 1)}

    def _values(self, rows: list[dict[str, Any]], name: str, processor: Any, ids: torch.Tensor) -> list[Any]:
        """What a modality's processor takes of each row, None where it lacks it. Files are read, images varied."""
        values: list[Any] = [row[name] if has_modality(row, name) else None for row in rows]
        there = [index for index, value in enumerate(values) if value is not None]
        titles = [f"{name} of {row.get('image_id') or row.get('caption') or 'a row'}" for row in rows]
        if isinstance(processor, ImageProcessingMixin):
            some = [rows[index] for index in there]
            images = [
                decode_image(values[index], None, window_of(rows[index], self.window), name=titles[index])
                for index in there
            ]
            if self.augmentation is not None:
                images = self._augment(self.augmentation, images, some, ids)
            for index, image in zip(there, images, strict=True):
                values[index] = image
        elif isinstance(processor, ArrayProcessor):
            for index in there:
                values[index] = read_array(values[index], titles[index])
        elif isinstance(processor, RecordProcessor):
            for index in there:
                values[index] = None if processor.is_lacking(values[index]) else values[index]
        return values

    def _warn_if_absent(self, rows: list[dict[str, Any]], name: str) -> None:
        if name not in self._warned and not any(name in row for row in rows):
            self._warned.add(name)
            logger.warning(
                f"The rows have no column '{name}', of which the model has a tower: all samples lack it. Name its "
                f"columns with data.modalities, or add the column; a plain Trainer needs remove_unused_columns=False."
            )

    def images(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The parts of the batch that need no tokens: `pixel_values` (B, 3, H, W) and `group_ids` (B, 2).

        Raises:
            ValueError: an image cannot be read, or a column is missing.
        """
        check_columns(rows[0], ("image", "caption"))
        lacking = [bool(self.further) and not has_image(row) for row in rows]
        images = [
            Image.new("RGB", (32, 32))
            if lacks
            else decode_image(row["image"], self._min_size(row), window_of(row, self.window), name=name_of(row))
            for row, lacks in zip(rows, lacking, strict=True)
        ]
        ids = torch.tensor([self._group_ids(row) for row in rows], dtype=torch.int64)
        if self.augmentation is not None:
            images = self._augment(self.augmentation, images, rows, ids)
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        if any(lacking):
            pixel_values[torch.tensor(lacking)] = 0
        return {"pixel_values": pixel_values, "group_ids": ids}

    def _group_ids(self, row: dict[str, Any]) -> tuple[int, int]:
        """As `group_ids`; what a row lacks is told from that of others by all that the row has."""
        if not self.further or (has_image(row) and has_caption(row)):
            return group_ids(image_id_of(row), row["caption"])
        image_id = image_id_of(row) if has_image(row) else ""
        caption = row["caption"] if has_caption(row) else ""
        return group_ids(image_id, caption, digest_of([image_id, caption, *(row.get(name) for name in self.further)]))

    def tokenize(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `token_type_ids`, (B, L) int64, of B captions padded to the longest."""
        tokens = self.processor.tokenizer(
            captions,
            padding="longest",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_token_type_ids=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def distinct_caption_batches(
        self, captions: Iterable[str], batch_size: int, device: torch.device, description: str
    ) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
        """Each distinct caption once, in batches of similar length, so that little is padded and nothing done twice.

        Args:
            captions: may repeat; their order does not matter.
            batch_size: captions of a batch; the last one may have fewer.
            device: where the tokens are put.
            description: title of the progress bar.

        Yields:
            A batch's captions, and their tokens as `tokenize` gives them.
        """
        distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
        for start in tqdm(range(0, len(distinct), batch_size), desc=description, leave=False):
            batch = distinct[start : start + batch_size]
            yield batch, {name: values.to(device) for name, values in self.tokenize(batch).items()}

    def _is_augmented(self, row: dict[str, Any]) -> bool:
        return self.augmentation is not None and row.get("augment", True)

    def _min_size(self, row: dict[str, Any]) -> int | None:
        """Pixels of the shorter side that decoding must leave; None asks for the full size."""
        return self.min_size if self._is_augmented(row) else None

    def _augment(
        self, augmentation: Augmentation, images: list, rows: list[dict[str, Any]], ids: torch.Tensor
    ) -> list:
        """Augment a batch with a seed made of its rows, their order and, where it comes again, the epoch.

        With a worker's own random state the result would depend on all batches before. This way a run that was killed
        and resumed, which meets the same batches, varies their images as an unbroken run does.
        """
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed GPUs, too, and with them the dropout of the model.
            seed = stable_hash(f"{ids.tolist()}{self.epoch.of_batch(len(rows)) or ''}")
            torch.default_generator.manual_seed(seed)
            return [
                augmentation(image) if self._is_augmented(row) else image
                for image, row in zip(images, rows, strict=True)
            ]


def _stack(rows: list[dict[str, Any]], name: str) -> torch.Tensor:
    """(B, ...): one field of the rows."""
    return torch.from_numpy(np.stack([row[name] for row in rows]))


def _target_side(processor: ProcessorMixin) -> int:
    """The most pixels that an image's shorter side can have after the processor has resized it."""
    size = dict(processor.image_processor.size)
    return max(size[name] for name in ("shortest_edge", "height", "width") if size.get(name))


def count_truncated(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int = 1000
) -> int:
    """Count the pairs whose caption has more than `max_length` tokens, special ones included, and so loses its end."""
    captions = pairs["caption"]
    truncated = 0
    for start in range(0, len(pairs), batch_size):
        ids = tokenizer(captions[start : start + batch_size], verbose=False, return_attention_mask=False)["input_ids"]
        truncated += sum(len(tokens) > max_length for tokens in ids)
    return truncated
