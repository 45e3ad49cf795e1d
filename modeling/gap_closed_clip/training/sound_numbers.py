"""Stops, or passes over, a step whose loss or gradient is NaN or infinite, before it reaches the weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from ..data import group_ids_of
from ..model.micro_batches_gap_closed_clip import MicroBatches


logger = logging.get_logger(__name__)


class SoundNumbers:
    """
    Looks at each step between its backward pass and the optimizer.

    Args:
        may_skip: so many steps are passed over, each with a warning, before the run is stopped.
        dataset: the training pairs, in which a broken sample is looked up.
    """

    def __init__(self, may_skip: int, dataset: Any):
        self.may_skip, self.dataset = may_skip, dataset
        self.skipped = 0

    def check(
        self, loss: Tensor, model: nn.Module, inputs: Mapping[str, Any], step: int, scaled: bool = False
    ) -> bool:
        """
        Whether the step may go on; if not, the gradients are gone, so that the optimizer changes nothing.

        Args:
            loss: of this process, detached.
            model: with its gradients.
            inputs: of the step.
            step: its number, from 1.
            scaled: gradients are those of a loss scaled for float16, where infinite ones are passed over anyhow.

        Raises:
            ValueError: it may not, and no more steps may be skipped; the message names the step and, where the inputs
                are to blame, the sample.
        """
        gradients = [] if scaled else [p.grad for p in model.parameters() if p.grad is not None]
        sound = loss.isfinite().all()
        if gradients:
            norms = torch._foreach_norm([gradient.detach() for gradient in gradients])
            sound = sound & torch.stack([norm.to(sound.device) for norm in norms]).isfinite().all()
        if dist.is_available() and dist.is_initialized():  # all processes go on, or none does
            flag = sound.to(torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            sound = flag > 0
        if sound:
            return True
        what = "the gradient is NaN or infinite" if loss.isfinite().all() else f"the loss is {float(loss.mean()):g}"
        message = f"Step {step}: {what}. {self._blame(inputs)}"
        if self.skipped >= self.may_skip:
            already = f" ({self.skipped} steps were skipped before.)" if self.skipped else ""
            raise ValueError(
                f"{message} Training stops here, before the weights are changed; earlier checkpoints are as "
                "they were, and resume_from_checkpoint=auto goes on from the last. To pass over such steps set "
                f"training.skip_broken_steps.{already}"
            )
        self.skipped += 1
        logger.warning(f"{message} The step is skipped ({self.skipped} of {self.may_skip}).")
        model.zero_grad(set_to_none=True)
        return False

    def _blame(self, inputs: Mapping[str, Any]) -> str:
        for name, rows, group_ids in broken_inputs(inputs):
            found = "; ".join(self._name(row, group_ids) for row in rows[:3])
            return f"NaN or infinity came in with {name} of {found}."
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return (
                f"The inputs of process {dist.get_rank()} are finite: if another one names a sample, that is it; if "
                "none does, see learning_rate, warmup_steps and max_grad_norm."
            )
        return (
            "The inputs are finite, so it is the numbers inside the model: a lower learning_rate, longer warmup_steps "
            "or max_grad_norm keep them small, and bf16 holds larger ones than fp16."
        )

    def _name(self, row: int, group_ids: Tensor | None) -> str:
        where = f"sample {row} of the batch (from 0)"
        if group_ids is None or group_ids.ndim != 2:
            return where
        try:
            wanted = tuple(group_ids[row].tolist())
            index = next(i for i, ids in enumerate(group_ids_of(self.dataset)) if tuple(ids) == wanted)
            return f"training pair {index} (from 0), image '{self.dataset['image_id'][index]}'"
        except (StopIteration, ValueError, TypeError, KeyError, AttributeError):
            return where


def broken_inputs(inputs: Mapping[str, Any]) -> Iterable[tuple[str, list[int], Tensor | None]]:
    """Yields inputs that are not finite: the name, the rows, and the group ids of the batch or micro-batch."""
    batches = inputs["micro_batches"] if isinstance(inputs.get("micro_batches"), MicroBatches) else [inputs]
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0:
                sound = value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()
                if not sound.all():
                    yield name, (~sound).nonzero().flatten().tolist(), batch.get("group_ids")


__all__ = ["SoundNumbers", "broken_inputs"]
