"""
Contrastive batches larger than the memory: they are encoded in micro-batches, each of which is encoded again in the
backward pass.

1. Each micro-batch is encoded, and only its features (b, D) are kept, with the state of the random number generators.
2. Centering, scaling to unit vectors and the loss see the features of the whole batch.
3. In the backward pass each micro-batch is encoded again from the saved random state. The dropout and drop-path masks
   are the same as before, so the gradient of the loss meets the very features it was computed for.

The gradients are those of the whole batch encoded at once, at the price of one more forward pass of the towers. Only
the activations of one micro-batch are in memory at a time. This is the method of GradCache (Gao et al., arXiv
2101.06983), here in a single autograd graph by means of `torch.utils.checkpoint`: DistributedDataParallel, FSDP and
autocast need not know of it.

Batch statistics inside a tower would be those of a micro-batch: BatchNorm, which EVA and BERT don't have. Where it
keeps its statistics (`freeze_batch_norm`, the default for published towers) the gradients are exact as well.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class MicroBatches:
    """
    The inputs of one large batch in micro-batches, for `GapClosedClipModel.forward(micro_batches=...)`.

    This is a class and not a list because DistributedDataParallel would copy all tensors of a list to the GPU at once;
    each micro-batch is to go there when its turn comes.

    Args:
        batches: for each micro-batch a dict of forward's inputs (`pixel_values`, `input_ids`, ..., `group_ids`). The
            tensors may be on any device.

    Raises:
        ValueError: there is no micro-batch, or they have different inputs.
    """

    def __init__(self, batches: list[dict[str, Tensor]]):
        input_names = {frozenset(batch) for batch in batches}
        if len(input_names) != 1:
            found = "; ".join(sorted(", ".join(sorted(names)) for names in input_names)) or "none"
            raise ValueError(
                f"MicroBatches needs one micro-batch or more, all with the same inputs; the inputs are: {found}."
            )
        self.batches = batches

    @classmethod
    def split(cls, inputs: dict[str, Tensor], size: int) -> "MicroBatches":
        """The inputs of a batch cut into micro-batches of at most `size` rows, which are views of them."""
        pieces = {name: value.split(size) for name, value in inputs.items()}
        return cls([dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)])

    def __len__(self) -> int:
        """The number of micro-batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def pop(self, *names: str) -> tuple["MicroBatches", dict[str, Tensor]]:
        """The micro-batches without these inputs, and those of them that there are, of the whole batch, (B, ...)."""
        found = [name for name in names if name in self.batches[0]]
        if not found:
            return self, {}
        rest = [{name: value for name, value in batch.items() if name not in found} for batch in self]
        return MicroBatches(rest), {name: torch.cat([batch[name] for batch in self]) for name in found}


def encode_in_micro_batches(
    encode: Callable[..., tuple[Tensor, ...]], micro_batches: MicroBatches, device: torch.device
) -> tuple[Tensor, ...]:
    """
    The features of the whole batch, (B, ...) each, encoded in micro-batches.

    Args:
        encode: takes the inputs of a micro-batch as keyword arguments and returns a tuple of tensors, each with a row
            for every row of the inputs.
        device: the device of the model, to which the inputs of one micro-batch at a time are copied.
    """
    # torch.utils.checkpoint saves the random state of those devices of which it finds a tensor among the arguments.
    device_marker = torch.empty(0, device=device)

    def run(batch: dict[str, Tensor], _: Tensor) -> tuple[Tensor, ...]:
        return encode(**{name: value.to(device, non_blocking=True) for name, value in batch.items()})

    if not torch.is_grad_enabled():
        features = [run(batch, device_marker) for batch in micro_batches]
    else:
        features = [checkpoint(run, batch, device_marker, use_reentrant=False) for batch in micro_batches]
    return tuple(map(torch.cat, zip(*features, strict=True)))


__all__ = ["MicroBatches", "encode_in_micro_batches"]
