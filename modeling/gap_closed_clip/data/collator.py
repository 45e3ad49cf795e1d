"""Rows of pairs to the batch that the model takes. Images are decoded here, that is in the DataLoader's workers."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .hashing import group_ids, stable_hash
from .images import Augmentation, decode_image


# transformers' mark of a tokenizer that knows no longest input is 10^30.
NO_LIMIT = 10**9


class PairCollator:
    """Decode, vary, resize and normalise the images, tokenize the captions, and say which pairs belong together.

    Args:
        processor: has `image_processor` and `tokenizer`.
        augmentation: for training; None leaves the images alone. A row whose `augment` is False, as `load_pairs` marks
            those of validation and test, is left alone too: a Trainer has one collator for both.
        max_length: captions are cut after so many tokens; default the tokenizer's own limit, if it has one.
        window: (centre, width) for DICOM, 16-bit and float images; default their own.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        max_length: int | None = None,
        window: tuple[float, float] | None = None,
    ):
        limit = processor.tokenizer.model_max_length
        self.max_length = max_length or (limit if limit < NO_LIMIT else None)
        self.processor = processor
        self.augmentation = augmentation
        self.window = window
        self.min_size = None if augmentation is None else augmentation.shorter_side(_target_side(processor))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """B rows with `image` (undecoded), `caption` and `image_id` -> batch.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids`, `attention_mask`, `token_type_ids` (B, L) int64;
            `group_ids` (B, 2) int64, hashes of the image's id and of the caption regardless of case and white space:
            pairs that share either are not negatives of one another.

        Raises:
            ValueError: an image cannot be read.
        """
        batch = self.images(rows)
        if "pooled_text" in rows[0]:  # of a frozen text tower, see `training.frozen`
            return batch | {"pooled_text": torch.tensor([row["pooled_text"] for row in rows])}
        return batch | self.tokenize([row["caption"] for row in rows])

    def images(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` and `group_ids` of the batch.

        Raises:
            ValueError: an image cannot be read.
        """
        images = [decode_image(row["image"], self._min_size(row), self.window, name=_name(row)) for row in rows]
        ids = torch.tensor([group_ids(row["image_id"], row["caption"]) for row in rows], dtype=torch.int64)
        if self.augmentation is not None:
            images = self._augment(images, rows, ids)
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "group_ids": ids}

    def tokenize(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `token_type_ids` (B, L) int64 of B captions."""
        text = self.processor.tokenizer(
            captions,
            padding="longest",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_token_type_ids=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {name: text[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

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

    def _varies(self, row: dict[str, Any]) -> bool:
        return self.augmentation is not None and row.get("augment", True)

    def _min_size(self, row: dict[str, Any]) -> int | None:
        return self.min_size if self._varies(row) else None

    def _augment(self, images: list, rows: list[dict[str, Any]], ids: torch.Tensor) -> list:
        """Seeded by the rows of the batch and their order, not by a worker's history.

        A run that was killed and resumed meets the same batches, and so varies their images as the unbroken run would.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(str(ids.tolist())))
            return [
                self.augmentation(image) if self._varies(row) else image
                for image, row in zip(images, rows, strict=True)
            ]


def _name(row: dict[str, Any]) -> str:
    """The image's path in errors if it has one, else its id."""
    image = row["image"]
    return (image.get("path") if isinstance(image, dict) else None) or row["image_id"]


def _target_side(processor: ProcessorMixin) -> int:
    """Pixels that the processor reduces the shorter side to, at most."""
    size = dict(processor.image_processor.size)
    return max(size[name] for name in ("shortest_edge", "height", "width") if size.get(name))


def count_truncated(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int = 1000
) -> int:
    """How many pairs have a caption of more than `max_length` tokens, special ones included, and so lose its end."""
    captions = pairs["caption"]
    truncated = 0
    for start in range(0, len(pairs), batch_size):
        ids = tokenizer(captions[start : start + batch_size], verbose=False, return_attention_mask=False)["input_ids"]
        truncated += sum(len(tokens) > max_length for tokens in ids)
    return truncated
