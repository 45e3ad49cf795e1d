"""bfloat16: whether the CPU has instructions for it, and what to compute in where it is asked for."""

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


def cpu_has_bfloat16() -> bool:
    """
    Whether the CPU has instructions for bfloat16.

    One without them (with AVX2 alone, as many desktops) computes in it all the same, but a matrix product takes tens
    of times as long as in float32.
    """
    # What torch's own compiler asks. Without oneDNN there is no fast way in torch.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast_dtype(bf16: bool, device: torch.device | str | None) -> torch.dtype | None:
    """
    What `embed_pairs` is to compute in: bfloat16, or None for the model's own dtype. A CPU that has no instructions
    for bfloat16 is warned of.

    Args:
        bf16: bfloat16 is asked for.
        device: that computes; None: the CPU.
    """
    if bf16 and torch.device(device or "cpu").type == "cpu" and not cpu_has_bfloat16():
        logger.warning_once(
            "bf16 is true on a CPU that has no instructions for bfloat16: this may take tens of times as long as with "
            "bf16=false."
        )
    return torch.bfloat16 if bf16 else None


__all__ = ["autocast_dtype", "cpu_has_bfloat16"]
