"""Nothing computed is lost: every finished block is kept on disk, and a later run goes on after the last one.

Only written weights are kept, with the state of torch's random numbers behind them and the lines of the report so far.
The activation streams are computed again through them, which costs one forward per block and is exact, so a resumed run
ends in the same weights bit for bit; the folder holds at most the pruned weights and the importance of the samples.

A file is there whole or not at all: it is written under another name, flushed to the disk, and renamed, and the folder
is flushed too.  Each carries a checksum of its contents.  Rank 0 alone reads and writes; the others are told.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import ranks
from .sites import _tensors
from .streams import NotSaved

FORMAT = "2"
RNG = "rng"  # torch's own state, between the tensors of a file; no parameter has a name without a dot before a suffix
PIECE = 2**20  # bytes handed to the system at once


def fingerprint(model: nn.Module, batches: Any, recipe: Any) -> dict[str, Any]:
    """What a run is decided by: versions, recipe, hashes of weights and images.  Taken before anything is written."""
    weights = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        weights.update(name.encode() + str(t.dtype).encode())
        weights.update(_bytes(t))
    images, count, largest = hashlib.sha256(), 0, 0
    for batch in batches:
        tensors = _tensors(batch)
        count, largest = count + len(tensors[0]), max(largest, len(tensors[0]))
        for t in tensors:
            images.update(str(tuple(t.shape[1:])).encode())
            images.update(_bytes(t))
    shares = ranks.gather(f"{count} images, sha256 {images.hexdigest()}")
    return {
        "hf_prune": getattr(sys.modules[__package__], "__version__", None),  # importing it would point back to EDGE
        "torch": torch.__version__,
        "processes": ranks.world_size(),
        "weights": weights.hexdigest(),
        "images at once": max(ranks.gather(largest)),  # what is summed in one product decides the last bits
        "images": shares if len(shares) > 1 else shares[0],
        "recipe": json.loads(json.dumps(asdict(recipe), default=str)),
    }


def _bytes(t: Tensor) -> memoryview | bytes:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if t.numel() else b""


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What changed between two fingerprints, in words: `recipe.nm was 2:4, is 1:4`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{name}.{k}".lstrip("."))]
    if before == now:
        return []
    if isinstance(before, list) and isinstance(now, list) and name == "images" and len(before) == len(now):
        return [d for r, (a, b) in enumerate(zip(before, now, strict=True)) for d in differences(a, b, f"images[{r}]")]
    return [f"{name} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:40].rstrip() + "..."


class Saved:
    """The finished blocks of one run in a folder."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        """Raises ValueError where the folder belongs to another run, naming what differs."""
        self.folder, self.run = folder, run
        ranks.together(self._open)

    def _open(self) -> None:
        identity = self.folder / "run.json"
        self._make()
        if not identity.exists():
            self.write(identity, json.dumps(self.run, indent=1).encode())
            return
        try:
            before = json.loads(identity.read_text())
        except ValueError as e:
            raise ValueError(f"{identity}: is damaged ({e}); delete the folder to start again.") from e
        found = differences(before, self.run)
        if found:
            raise ValueError(
                f"{self.folder}: its saved blocks come from another run: {'; '.join(found)}. "
                "Resume with the same command, or delete the folder to start again."
            )

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise NotSaved(f"{self.folder}: cannot be created ({e.strerror or e}).") from e

    def _file(self, block: str) -> Path:
        return self.folder / (hashlib.sha256(block.encode()).hexdigest()[:16] + ".safetensors")

    # -- blocks

    def restore(self, block: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Put a saved block's weights into `tensors`, on every rank, and torch's random numbers where they were.

        Returns what was given to `add` as `facts`, or None if the block was not finished.
        """
        found: list[Any] = [None]

        def read() -> None:
            path = self._file(block)
            if path.exists():
                found[0] = self.read(path, block)

        ranks.together(read)
        values: dict[str, Tensor] = found[0][0] if found[0] else {}
        facts: dict[str, Any] | None = found[0][1] if found[0] else None
        facts = ranks.told(facts)
        if facts is None:
            return None
        with torch.no_grad():
            for name, t in tensors.items():
                if ranks.is_main():
                    if name not in values or values[name].shape != t.shape:
                        raise ValueError(f"{self._file(block)}: holds no {name} of shape {tuple(t.shape)}.")
                    t.copy_(values[name])
                ranks.broadcast(t)
        if RNG in values:
            torch.set_rng_state(values[RNG])
        return facts

    def add(self, block: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep a finished block.  facts: anything JSON holds.  Raises NotSaved on every rank."""
        ranks.together(lambda: self.put(self._file(block), tensors, {"block": block, "facts": facts}))

    # -- files

    def put(self, path: Path, tensors: Mapping[str, Tensor], told: dict[str, Any]) -> None:
        values = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        values[RNG] = torch.get_rng_state()
        text = json.dumps(told)
        self.write(path, save(values, {"format": FORMAT, "told": text, "sha256": _checksum(values, text)}))

    def read(self, path: Path, block: str | None = None) -> tuple[dict[str, Tensor], Any]:
        """(tensors, facts).  Raises ValueError for a file that is damaged or holds something else."""
        try:
            with safe_open(path, "pt") as f:
                values = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
                known = f.metadata() or {}
                told = json.loads(known["told"])
            if known["sha256"] != _checksum(values, known["told"]):
                raise ValueError("its checksum does not fit its contents")
            if told.get("block") != block:
                raise ValueError(f"it holds {told.get('block')}, not {block}")
        except (SafetensorError, KeyError, ValueError, OSError) as e:
            raise ValueError(
                f"{path}: this saved block cannot be read ({e}); delete the file to compute it again."
            ) from e
        return values, told["facts"]

    def write(self, path: Path, content: bytes) -> None:
        part = path.with_suffix(".part")
        try:
            with open(part, "wb", buffering=0) as f:
                _pour(f, memoryview(content))
                os.fsync(f.fileno())
            os.replace(part, path)
            _flush(path.parent)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise NotSaved(
                f"{path.name} could not be written in {self.folder} ({e.strerror or e}); the blocks saved there before "
                "it are intact."
            ) from e

    # -- what is known before the first block

    def keep(self, name: str, parts: Iterable[Mapping[str, Tensor]], count: int) -> None:
        """Keep `count` mappings of tensors, one file each, so that none needs them all in memory."""
        for k, part in enumerate(parts):
            self.put(self._part(name, k, count), part, {"block": f"{name} {k}", "facts": {}})

    def kept(self, name: str, count: int) -> Iterator[dict[str, Tensor]] | None:
        """What `keep` was given under that name, one after the other; None unless all `count` parts are there."""
        paths = [self._part(name, k, count) for k in range(count)]
        if not all(p.exists() for p in paths):
            return None
        read = (self.read(p, f"{name} {k}")[0] for k, p in enumerate(paths))
        return ({n: t for n, t in part.items() if n != RNG} for part in read)

    def _part(self, name: str, k: int, count: int) -> Path:
        return self.folder / f"{name}-{k + 1}-of-{count}.kept"


def _pour(file: Any, content: memoryview) -> None:
    while content:  # a raw write may take less than it is given
        content = content[file.write(content[:PIECE]) :]


def _checksum(values: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(values):
        digest.update(name.encode() + str(values[name].dtype).encode() + str(tuple(values[name].shape)).encode())
        digest.update(_bytes(values[name]))
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    """The rename itself on the disk; not every system lets a folder be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
