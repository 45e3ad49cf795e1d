"""The captioning loss: each token of a caption predicted from those before it."""

import torch.nn.functional as F
from torch import Tensor


IGNORED = -100  # the label of a position without a target, as everywhere in transformers


def tokens_of_labels(labels: Tensor, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (B, L) each, of labels (B, L)."""
    mask = labels != IGNORED
    return labels.masked_fill(~mask, pad_token_id or 0), mask.long()


def caption_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """
    Cross-entropy in nats, a scalar: the mean over all tokens of the batch but each caption's first.

    Args:
        logits: (B, L, vocabulary), of the next token at each position.
        labels: (B, L), the whole captions; `IGNORED` where they are padded.
        label_smoothing: the share of each target that is spread evenly over the vocabulary.
    """
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=label_smoothing)


__all__ = ["IGNORED", "caption_loss", "tokens_of_labels"]
