"""Activations on their way through the model, within a budget of host memory; what exceeds it goes to a file.

A stream is a list with one entry per batch (walk.py).  Its tensors are kept by a `Store`: in memory while the budget
lasts, else in a temporary file that is written with ordinary writes, so that a full disk is an error and not a crash,
and read back through a memory map that is closed at once, so that nothing of it stays resident.  The file has no name:
it is gone with the process, however that ends.  Room in it is used again as soon as a tensor is dropped, so it holds no
more than the streams at their widest.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .sites import _tensors, cut

PAGE = max(4096, mmap.ALLOCATIONGRANULARITY)
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size(text: str | int | None) -> int | None:
    """`4GiB`, `4G`, `512MiB` or a number of bytes, in bytes.  Raises ValueError for anything else, and for none."""
    if text is None or (isinstance(text, int) and not isinstance(text, bool) and text > 0):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", str(text).lower())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{text}: expected an amount of memory such as 4GiB, 512MiB or a number of bytes.")
    return int(float(found[1]) * UNITS[found[2]])


class NotSaved(OSError):
    """A file could not be written: disk full, read-only folder, quota.  What was saved before is intact."""


class Spilled:
    """A tensor that lies in a store's file."""

    def __init__(self, store: Store, offset: int, like: Tensor) -> None:
        self.store, self.offset = store, offset
        self.shape, self.dtype = like.shape, like.dtype
        self.room = _room(like)

    def __len__(self) -> int:
        return self.shape[0]

    def __del__(self) -> None:
        self.store.free.setdefault(self.room, []).append(self.offset)

    def load(self) -> Tensor:
        """A copy of the tensor, in host memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        count = out.numel() * out.element_size()
        if count:
            with mmap.mmap(self.store.handle(), self.room, access=mmap.ACCESS_READ, offset=self.offset) as view:
                memoryview(out.view(-1).view(torch.uint8).numpy().data)[:] = memoryview(view)[:count]
        return out


def _room(t: Tensor) -> int:
    return -(-max(1, t.numel() * t.element_size()) // PAGE) * PAGE


class Store:
    """Keeps tensors in host memory up to `budget` bytes, beyond it in a nameless file in `folder`.

    budget None: everything stays in memory.  folder None: the system's folder for temporary files, which on some
    machines is itself memory.
    """

    def __init__(self, budget: int | None = None, folder: str | Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.resident = 0  # bytes of what was kept in memory and is still in use
        self.free: dict[int, list[int]] = {}  # size of a gap in the file -> offsets
        self.end = 0
        self.file: Any = None

    def handle(self) -> int:
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="hf_prune-", dir=self.folder, buffering=0)
        return self.file.fileno()

    def home(self, device: Any) -> Any:
        """Where what is used on `device` waits: there, or on the host where memory is budgeted."""
        return device if self.budget is None else "cpu"

    def keep(self, tree: Any) -> Any:
        """The same tree with every tensor on the host: as it is, or spilled.  A tensor that occurs twice stays one."""
        made: dict[int, Any] = {}

        def one(leaf: Any) -> Any:
            if not torch.is_tensor(leaf):
                return leaf
            if id(leaf) not in made:
                made[id(leaf)] = self._one(leaf)
            return made[id(leaf)]

        return tree_map(one, tree)

    def _one(self, t: Tensor) -> Any:
        count = t.numel() * t.element_size()
        if self.budget is None:
            return t
        if self.resident + count <= self.budget or not t.dim():
            self.resident += count
            weakref.finalize(t, self._gone, count).atexit = False
            return t
        return self._spill(t)

    def _gone(self, count: int) -> None:
        self.resident -= count

    def _spill(self, t: Tensor) -> Spilled:
        room = _room(t)
        gaps = self.free.get(room)
        offset = gaps.pop() if gaps else self.end
        if offset == self.end:
            os.ftruncate(self.handle(), self.end + room)
            self.end += room
        self.write(offset, t)
        return Spilled(self, offset, t)

    def update(self, kept: Any, value: Tensor) -> None:
        """Put `value` in the place of a kept tensor of the same shape and type."""
        if isinstance(kept, Spilled):
            assert (kept.shape, kept.dtype) == (value.shape, value.dtype)
            self.write(kept.offset, value)
        elif kept is not value:
            kept.copy_(value)

    def write(self, offset: int, t: Tensor) -> None:
        t = t.detach().cpu().contiguous()
        where = self.folder or tempfile.gettempdir()
        data = t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else memoryview(b"")
        done = 0
        try:
            while done < len(data):  # a write may take less than it is given
                done += os.pwrite(self.handle(), data[done:], offset + done)
        except OSError as e:
            raise NotSaved(
                f"activations beyond the memory budget could not be written to {where} ({e.strerror or e}); make "
                "room there, or give a larger --host-memory."
            ) from e


def load(leaf: Any) -> Any:
    """A kept leaf as it was: spilled tensors are read, everything else passes."""
    return leaf.load() if isinstance(leaf, Spilled) else leaf


class Batches(Sequence[Any]):
    """Calibration batches, kept by a store and read back one at a time; a list like any other to those who use it."""

    def __init__(self, store: Store, given: Iterable[Any]) -> None:
        self.kept = [store.keep(batch) for batch in given]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [tree_map(load, b) for b in self.kept[k]]
        return tree_map(load, self.kept[k])

    def __iter__(self) -> Iterator[Any]:
        return (tree_map(load, b) for b in self.kept)


def take(store: Store, given: Iterable[Any], micro: int | None = None) -> tuple[Sequence[Any], list[Tensor | None]]:
    """(inputs, labels) of batches, one at a time; of (input, label) the label is split off, None where there is none.

    micro: batches of more images are cut, so that as many are computed at once.
    """
    labels: list[Tensor | None] = []

    def inputs() -> Iterator[Any]:
        for batch in given:
            whole, label = batch, None
            if isinstance(batch, (tuple, list)):
                whole = batch[0]
                label = batch[1] if len(batch) > 1 and torch.is_tensor(batch[1]) else None
            count = len(_tensors(whole)[0])
            for start in range(0, count, micro or count):
                stop = start + (micro or count)
                labels.append(None if label is None else label[start:stop])
                # a part that is kept must not keep the whole
                yield whole if stop - start >= count else tree_map(_clone, cut(whole, start, stop))

    if store.budget is None:
        return list(inputs()), labels
    return Batches(store, inputs()), labels


def _clone(leaf: Any) -> Any:
    return leaf.clone() if torch.is_tensor(leaf) else leaf


class Lazy(dict[Any, Any]):
    """A mapping of kept tensors that are read when they are asked for."""

    def get(self, key: Any, default: Any = None) -> Any:
        return load(super().get(key, default))

    def __getitem__(self, key: Any) -> Any:
        return load(super().__getitem__(key))
