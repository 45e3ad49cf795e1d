"""
Texts of different lengths without most of their padding: a batch is encoded in chunks of similar length.

Padded to its longest text, a batch of captions can be three quarters padding, which a tower computes all the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


CHUNK = 32  # rows at least: fewer would not fill the processor's cores
WORTH = 0.75  # of the tokens, or more, are left after cutting: not worth the trouble


def chunks_by_length(attention_mask: Tensor) -> list[tuple[Tensor, int]]:
    """
    The rows of each chunk, and the tokens that the longest of them has. One chunk of all rows where more would not
    save much, or where texts are not padded on the right.

    Args:
        attention_mask: (B, length).
    """
    rows, length = attention_mask.shape
    whole = [(torch.arange(rows, device=attention_mask.device), length)]
    if rows < 2 * CHUNK or length < 2 or not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        return whole
    lengths, order = attention_mask.sum(1).sort(stable=True)
    chunks = [
        (part, max(int(longest[-1]), 1))
        for part, longest in zip(order.split(CHUNK), lengths.split(CHUNK), strict=True)
    ]
    tokens = sum(len(part) * longest for part, longest in chunks)
    return chunks if tokens < WORTH * rows * length else whole


def encode_by_length(
    encode: Callable[..., tuple[Tensor, Tensor]], attention_mask: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """
    What `encode` gives for a batch: tokens (B, length, hidden), zeros where a text is padded beyond its chunk, and
    pooled texts (B, hidden).

    Args:
        encode: takes `attention_mask` and `inputs` of some rows, and gives tokens (b, l, hidden) and pooled ones.
        attention_mask: (B, length).
        inputs: tensors of (B, length), or None; others go to `encode` as they are.
    """
    length = attention_mask.shape[1]
    tokens, pooled, rows = [], [], []
    for part, longest in chunks_by_length(attention_mask):
        cut = {
            name: value[part, :longest] if isinstance(value, Tensor) and value.shape == attention_mask.shape else value
            for name, value in inputs.items()
        }
        hidden, representation = encode(attention_mask=attention_mask[part, :longest], **cut)
        tokens.append(F.pad(hidden, (0, 0, 0, length - hidden.shape[1])))
        pooled.append(representation)
        rows.append(part)
    if len(rows) == 1:
        return tokens[0], pooled[0]
    place = torch.cat(rows).argsort()
    return torch.cat(tokens)[place], torch.cat(pooled)[place]


__all__ = ["chunks_by_length", "encode_by_length"]
