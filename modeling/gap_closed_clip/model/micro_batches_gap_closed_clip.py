"""
A contrastive batch larger than the memory: encoded in micro-batches, each of which is encoded again in the backward
pass.

1. Each micro-batch is encoded and only its features (b, D) are kept, with the state of the random generators.
2. Centering, unit vectors and the loss see the features of the whole batch.
3. In the backward pass each micro-batch is encoded again, from the noted random state: the dropout and drop-path masks
   are the same, so the gradient of the features it meets is that of these very features.

The gradients are those of the whole batch in one piece, for a forward pass more of the towers. What is kept at a time
is the activations of one micro-batch. (As in GradCache: Gao et al., arXiv 2101.06983; here in one autograd graph, by
`torch.utils.checkpoint`, so that DistributedDataParallel, FSDP and autocast need to know nothing of it.)

Batch statistics inside a tower (BatchNorm; EVA and BERT have none) are those of a micro-batch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class MicroBatches:
    """
    The inputs of one large batch in parts, for `GapClosedClipModel.forward(micro_batches=...)`.

    An object of its own and not a list: DistributedDataParallel would copy all tensors of a list to the GPU at once,
    where each part is to go when its turn comes.

    Args:
        batches: dicts of forward's inputs (`pixel_values`, `input_ids`, ..., `group_ids`), on any device.

    Raises:
        ValueError: no parts, or parts of different inputs.
    """

    def __init__(self, batches: list[dict[str, Tensor]]):
        names = {frozenset(batch) for batch in batches}
        if len(names) != 1:
            found = "; ".join(sorted(", ".join(sorted(part)) for part in names)) or "none"
            raise ValueError(f"MicroBatches needs one part or more, all of the same inputs; the inputs are: {found}.")
        self.batches = batches

    @classmethod
    def split(cls, inputs: dict[str, Tensor], size: int) -> "MicroBatches":
        """A batch in parts of at most `size` rows, as views."""
        parts = {name: value.split(size) for name, value in inputs.items()}
        return cls([dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)])

    def __len__(self) -> int:
        """Number of parts."""
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def pop_group_ids(self) -> tuple["MicroBatches", Tensor | None]:
        """The parts without `group_ids`, and those of all rows together, (B,) or (B, G), if there are any."""
        if "group_ids" not in self.batches[0]:
            return self, None
        rest = [{name: value for name, value in batch.items() if name != "group_ids"} for batch in self]
        return MicroBatches(rest), torch.cat([batch["group_ids"] for batch in self])


def encode_in_micro_batches(
    encode: Callable[..., tuple[Tensor, ...]], micro_batches: MicroBatches, device: torch.device
) -> tuple[Tensor, ...]:
    """
    `encode(**batch)` of every micro-batch, each result concatenated over them: a tuple of (B, ...) tensors.

    Args:
        encode: a micro-batch's inputs to a tuple of tensors with as many rows.
        device: where the inputs go, a micro-batch at a time.
    """
    # torch.utils.checkpoint notes the random state of the devices it finds tensors of among the arguments.
    witness = torch.empty(0, device=device)

    def run(batch: dict[str, Tensor], _: Tensor) -> tuple[Tensor, ...]:
        return encode(**{name: value.to(device, non_blocking=True) for name, value in batch.items()})

    if not torch.is_grad_enabled():
        features = [run(batch, witness) for batch in micro_batches]
    else:
        features = [checkpoint(run, batch, witness, use_reentrant=False) for batch in micro_batches]
    return tuple(map(torch.cat, zip(*features, strict=True)))


__all__ = ["MicroBatches", "encode_in_micro_batches"]
