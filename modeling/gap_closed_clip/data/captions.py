"""Turns rows of pairs into the batch that a captioner is trained on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .collator import PairCollator
from .epoch import Epoch
from .image_ids import check_columns


# Label of a position without a target. Every loss of torch and transformers leaves it out unless told otherwise.
IGNORED = torch.nn.CrossEntropyLoss().ignore_index  # -100


class CaptionCollator:
    """Images as `PairCollator` makes them, or what was made of them before, and the captions as labels.

    Args:
        collator: decodes the images and tokenizes the captions.
        widths: of what represents an image (H) and of one of its tokens (C), for rows whose images have been through
            their tower before.
    """

    def __init__(self, collator: PairCollator, widths: tuple[int, int] | None = None):
        self.collator, self.widths = collator, widths

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of B rows.

        Args:
            rows: `caption`, and either `image` (and `image_id`, if there is one) or the embedding `shared_embeds`
                (D,) of each pair, or `encoded_image` (H + P * C,): what represents its image, and the image's tokens
                if they are wanted.

        Returns:
            `labels` (B, L) int64, the captions' tokens with -100 where they are padded. Beside them `pixel_values`
            (B, 3, H, W) and `group_ids` (B, 2) as `PairCollator` makes them, or, if the rows have embeddings,
            `shared_embeds` (B, D), or `pooled_image` (B, H) and, where they are, `image_tokens` (B, P, C), float32;
            then no image is decoded.

        Raises:
            ValueError: an image cannot be read, or a column is missing.
        """
        check_columns(rows[0], ("caption",))
        text = self.collator.tokenize([row["caption"] for row in rows])
        labels = {"labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED)}
        if "shared_embeds" in rows[0]:
            return {"shared_embeds": torch.tensor([row["shared_embeds"] for row in rows])} | labels
        if "encoded_image" in rows[0]:
            return self._parted(torch.from_numpy(np.stack([row["encoded_image"] for row in rows]))) | labels
        return self.collator.images(rows) | labels

    @property
    def epoch(self) -> Epoch:
        """That of the `PairCollator`."""
        return self.collator.epoch

    def set_epoch(self, epoch: int) -> None:
        """As that of `PairCollator`."""
        self.collator.set_epoch(epoch)

    def _parted(self, encoded: Tensor) -> dict[str, Tensor]:
        """`pooled_image` and `image_tokens` of what is kept of B images, (B, H + P * C)."""
        assert self.widths is not None
        image_width, token_width = self.widths
        parts = {"pooled_image": encoded[:, :image_width]}
        if encoded.shape[1] > image_width:
            parts["image_tokens"] = encoded[:, image_width:].unflatten(1, (-1, token_width))
        return parts
