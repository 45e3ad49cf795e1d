"""Turns rows of pairs into the batch that a captioner is trained on."""

from typing import Any

import torch
from torch import Tensor

from .collator import PairCollator
from .image_ids import check_columns


# Label of a position without a target. Every loss of torch and transformers leaves it out unless told otherwise.
IGNORED = torch.nn.CrossEntropyLoss().ignore_index  # -100


class CaptionCollator:
    """Images as `PairCollator` makes them, or embeddings if the rows have them, and the captions as labels.

    Args:
        collator: decodes the images and tokenizes the captions.
    """

    def __init__(self, collator: PairCollator):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of B rows.

        Args:
            rows: `caption`, and either `image` (and `image_id`, if there is one) or the embedding `shared_embeds`
                (D,) of each pair.

        Returns:
            `labels` (B, L) int64, the captions' tokens with -100 where they are padded. Beside them `pixel_values`
            (B, 3, H, W) and `group_ids` (B, 2) as `PairCollator` makes them, or, if the rows have embeddings,
            `shared_embeds` (B, D) float32; then no image is decoded.

        Raises:
            ValueError: an image cannot be read, or a column is missing.
        """
        check_columns(rows[0], ("caption",))
        text = self.collator.tokenize([row["caption"] for row in rows])
        labels = {"labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, IGNORED)}
        if "shared_embeds" in rows[0]:
            return {"shared_embeds": torch.tensor([row["shared_embeds"] for row in rows])} | labels
        return self.collator.images(rows) | labels
