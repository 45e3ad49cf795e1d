"""
Rows of one batch that lie on several processes.

The scale of gradients: what runs backward on a process is `world size` times the gradient of its own rows, which the
averaging of DistributedDataParallel and FSDP turns into the exact gradient of the global batch. Without a process
group, everything here is the identity.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_of_processes(num_rows: int, device: torch.device) -> list[int]:
    """How many rows each process holds, in the order of their ranks."""
    if world_size() == 1:
        return [num_rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([num_rows], device=device))
    return torch.cat(counts).tolist()


@torch.no_grad()
def gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    """
    (own rows, ...) -> (rows of all processes, ...), in the order of their ranks; without gradient.

    Args:
        x: as many rows as `counts` says for this process; every process calls this with its own.
        counts: from `rows_of_processes`.
    """
    if len(counts) == 1:
        return x.detach()
    padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives want the same shape on every process
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def sum_across_processes(x: Tensor) -> Tensor:
    """The sum of every process' x, with its gradient."""
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


__all__ = ["gather_rows", "rows_of_processes", "sum_across_processes", "world_size"]
