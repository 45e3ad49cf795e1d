"""The captioning loss: each token of a caption predicted from those before it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


IGNORED = -100  # the label of a position without a target, as everywhere in transformers


def tokens_of_labels(labels: Tensor, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (B, L) each, of labels (B, L)."""
    mask = labels != IGNORED
    return labels.masked_fill(~mask, pad_token_id or 0), mask.long()


def without_first_tokens(labels: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """
    Labels (B, L) with `IGNORED` in the place of tokens that stand behind padding alone: there is nothing to predict
    them from. The mask (B, L or more) is of all tokens so far.
    """
    if labels is None or attention_mask is None or attention_mask.ndim != 2:
        return labels
    is_first = attention_mask.cumsum(1)[:, -labels.shape[1] : -1] == 0  # (B, L - 1): no token before this one
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(is_first.to(labels.device), IGNORED)], dim=1)


def caption_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """
    Cross-entropy in nats, a scalar: the mean over all labels of the batch but those of the first column.

    Args:
        logits: (B, L, vocabulary), of the next token at each position.
        labels: (B, L), the whole captions; `IGNORED` where they are padded, and as `without_first_tokens` leaves them
            where they are padded on the left.
        label_smoothing: the share of each target that is spread evenly over the vocabulary.
    """
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, label_smoothing=label_smoothing)


def caption_loss_of_states(
    states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], label_smoothing: float = 0.0
) -> Tensor:
    """
    `caption_loss` of a decoder's last hidden states (B, L, hidden). Its head, from states to logits, sees those alone
    that have something to predict: the head is most of a small decoder's work, and much of a batch may be padding.
    """
    targets = labels[:, 1:].to(states.device)
    has_target = targets != IGNORED
    logits = head(states[:, :-1][has_target])  # (number of labels, vocabulary)
    return F.cross_entropy(logits.float(), targets[has_target], label_smoothing=label_smoothing)


__all__ = ["IGNORED", "caption_loss", "caption_loss_of_states", "tokens_of_labels", "without_first_tokens"]
