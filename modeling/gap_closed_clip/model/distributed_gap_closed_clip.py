"""
Batches whose rows lie on several processes.

Every process holds some rows of the global batch, its local rows, and computes the loss of the global batch. In the
backward pass it gets `world size` times the gradient with respect to its local rows. DistributedDataParallel and FSDP
then average over the processes, and this average is the exact gradient of the global batch.

Without a process group the local rows are the global batch, and every function here leaves its input as it is.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_row_counts(num_rows: int, device: torch.device) -> list[int]:
    """
    How many rows of the global batch each process holds, in the order of the ranks.

    Args:
        num_rows: the number of this process's rows.
        device: where the process group communicates.
    """
    if world_size() == 1:
        return [num_rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([num_rows], device=device))
    return torch.cat(counts).tolist()


@torch.no_grad()
def gather_rows(x: Tensor, row_counts: list[int]) -> Tensor:
    """
    (local rows, ...) -> (rows of all processes, ...), in the order of the ranks; without gradient.

    Args:
        x: this process's rows; every process has to call this function.
        row_counts: how many rows each process has, see [`gather_row_counts`].
    """
    if len(row_counts) == 1:
        return x.detach()
    padded = x.new_zeros(max(row_counts), *x.shape[1:])  # collectives want the same shape on every process
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in row_counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, row_counts, strict=True)])


def sum_across_processes(x: Tensor) -> Tensor:
    """The sum of the x of all processes. Its backward pass sums the gradients of all processes, too."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _all_reduced(grad)


def _all_reduced(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


__all__ = ["gather_row_counts", "gather_rows", "sum_across_processes", "world_size"]
