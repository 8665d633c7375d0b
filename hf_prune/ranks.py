"""Several processes: the sums over samples, and nothing else, cross from one to another.  The identity when alone."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sent = 0  # bytes that this rank has handed to the others, since the process began


def _leave_the_group_free() -> None:
    """Import torch.distributed.nn while no process group can be seen, so that destroy_process_group ends the group.

    torch.distributed.nn.functional has the default group of the moment of its import as default arguments, and torch
    imports it in the midst of a run (with torch._dynamo, at a convolution under a dispatch mode). The group then
    outlives its destruction, and gloo's threads run on into the exit of the interpreter: one that drops the tensors of
    the last operation just then waits for the GIL in a destructor, where Python ends the thread: the process aborts.
    """
    begun = dist.group.WORLD
    dist.group.WORLD = None
    try:
        importlib.import_module("torch.distributed.nn")
    finally:
        dist.group.WORLD = begun


if dist.is_available():
    _leave_the_group_free()


class Lost(RuntimeError):
    """Another process has ended, or has not answered within the time limit: the run cannot go on."""


class Told(ValueError):
    """Raised on the other ranks for what rank 0 says."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def own(seed: int) -> int:
    """A seed for what each rank draws for itself: the given one on rank 0, and far from those of later stages.

    torch's generator reads the lower 32 bits alone, so that is where they differ.
    """
    return seed + 1_000_003 * rank()


def is_main() -> bool:
    return rank() == 0


def check() -> None:
    """Raises ValueError where a launcher started several processes that do not know of each other."""
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced > 1 and announced != world_size():
        raise ValueError(
            f"the launcher announces {announced} processes (WORLD_SIZE), but the process group has {world_size()}: "
            "they would work side by side without knowing of each other. Call "
            "torch.distributed.init_process_group first, or unset WORLD_SIZE."
        )


def _across(what: Callable[[], Any], sends: int) -> None:
    """One collective operation.  Raises Lost where another process does not take part in it."""
    global sent
    try:
        what()
    except RuntimeError as e:  # gloo: connection closed, timed out; NCCL: DistBackendError, of the same class
        raise Lost(
            f"rank {rank()} of {world_size()} lost the others: a process has ended, or has not answered in time "
            f"({str(e).strip().splitlines()[0][:200]})."
        ) from e
    sent += sends


def wide(like: Tensor) -> torch.dtype:
    """What sums over batches and ranks of tensors like this one are kept in, so that their order does not matter."""
    return like.dtype if like.device.type == "mps" else torch.float64  # which has no float64


def sum_(tensors: Iterable[Tensor]) -> int:
    """Add each tensor over all ranks, in place.  Returns the bytes this rank contributed."""
    total = 0
    if world_size() > 1:
        for t in tensors:
            # NCCL carries device memory only
            there = t.cuda() if dist.get_backend() == "nccl" and not t.is_cuda else t.contiguous()
            size = t.numel() * t.element_size()
            _across(functools.partial(dist.all_reduce, there), size)
            if there is not t:
                t.copy_(there)
            total += size
    return total


def gather(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    _across(lambda: dist.all_gather_object(out, value), 0)
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
    _across(lambda: dist.all_gather(out, mine), mine.numel() * mine.element_size())
    return torch.cat([t[:n] for t, n in zip(out, sizes, strict=True)]).to(part.device)


def shares(count: int) -> list[int]:
    """How many of `count` independent problems each rank takes: as equal as can be, the first ranks one more."""
    each, more = divmod(count, world_size())
    return [each + (r < more) for r in range(world_size())]


# Multiplications.  Less is done sooner by every rank than it is handed around, and a product of few rows rounds
# otherwise than one of all, which would leave a trace of the number of ranks.
WORTH = 2**30


def columns(some: Callable[[slice], Tensor], cost: int, count: int) -> Tensor:
    """A matrix (..., count) of which each rank makes some columns.  cost: multiplications for all of it."""
    if world_size() == 1 or cost < WORTH or count < world_size():
        return some(slice(0, count))
    sizes = shares(count)
    first = sum(sizes[: rank()])
    part = some(slice(first, first + sizes[rank()]))
    return gather_rows(part.movedim(-1, 0), sizes).movedim(0, -1).contiguous()


def broadcast(t: Tensor, source: int = 0) -> None:
    """Rank `source`'s values into every rank's `t`, in place."""
    if world_size() == 1:
        return
    there = t.detach().cuda() if dist.get_backend() == "nccl" and not t.is_cuda else t.detach().contiguous()
    size = t.numel() * t.element_size() if rank() == source else 0
    _across(lambda: dist.broadcast(there, source), size)
    if there.data_ptr() != t.data_ptr():
        with torch.no_grad():
            t.copy_(there)


def told(value: Any, source: int = 0) -> Any:
    """Rank `source`'s picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    _across(lambda: dist.broadcast_object_list(box, source), 0)
    return box[0]


def together(work: Callable[[], None]) -> None:
    """Do something on rank 0 alone; where it raises ValueError or OSError, every rank does, so that none is left
    waiting."""
    if world_size() == 1:
        work()
        return
    failure: Exception | None = None
    if is_main():
        try:
            work()
        except (ValueError, OSError) as e:
            failure = e
    said = told(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if said is not None:
        raise Told(said)


def agree(value: float) -> float:
    """The sum of a number over all ranks."""
    if world_size() == 1:
        return value
    t = torch.tensor([value], dtype=torch.float64)
    sum_([t])
    return float(t)
