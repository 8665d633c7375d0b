"""Several processes: the sums over samples, and nothing else, cross from one to another.  The identity when alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def sum_(tensors: Iterable[Tensor]) -> int:
    """Add each tensor over all ranks, in place.  Returns the bytes this rank contributed."""
    sent = 0
    if world_size() > 1:
        for t in tensors:
            # NCCL carries device memory only
            there = t.cuda() if dist.get_backend() == "nccl" and not t.is_cuda else t
            dist.all_reduce(there)
            if there is not t:
                t.copy_(there)
            sent += t.numel() * t.element_size()
    return sent


def gather(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def gather_rows(part: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all ranks behind each other: rank r gives `part` (sizes[r], ...), which may be none."""
    if world_size() == 1:
        return part
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    widest = max(sizes)  # collectives want equal shapes
    mine = part.new_zeros(widest, *part.shape[1:], device=device)
    mine[: len(part)] = part.to(device)
    out = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(out, mine)
    return torch.cat([t[:n] for t, n in zip(out, sizes, strict=True)]).to(part.device)


def agree(value: float) -> float:
    """The sum of a number over all ranks."""
    if world_size() == 1:
        return value
    t = torch.tensor([value], dtype=torch.float64)
    sum_([t])
    return float(t)
