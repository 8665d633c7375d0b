"""Nothing computed is lost: every finished block is kept on disk, and a later run goes on after the last one.

Only written weights are kept.  The activation streams are computed again through them, which costs one forward per
block and is exact, so a resumed run ends in the same weights bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import ranks
from .sites import _tensors

FORMAT = "1"


def fingerprint(model: nn.Module, batches: list[Any], recipe: Any) -> dict[str, str]:
    """What a run is decided by: hashes of weights, images and recipe.  Taken before anything is written."""
    weights = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        weights.update(name.encode() + str(t.dtype).encode() + _bytes(t))
    images = hashlib.sha256()
    for batch in batches:
        for t in _tensors(batch):
            images.update(str(tuple(t.shape)).encode() + _bytes(t))
    settings = json.dumps(asdict(recipe), sort_keys=True, default=str)
    return {
        "weights": weights.hexdigest(),
        "images": images.hexdigest(),
        "recipe": settings,
        "torch": torch.__version__,
    }


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


class Saved:
    """One file per finished block, written under another name, flushed and renamed, so that a block is there or not."""

    def __init__(self, folder: Path, run: dict[str, str]) -> None:
        """Raises ValueError where the folder belongs to another run, naming what differs."""
        self.folder, self.run = folder, run
        identity = folder / f"run-{ranks.rank()}.json"
        folder.mkdir(parents=True, exist_ok=True)
        if identity.exists():
            before = json.loads(identity.read_text())
            differs = [k for k in run if before.get(k) != run[k]]
            if differs:
                raise ValueError(
                    f"{folder}: its saved blocks come from another run ({', '.join(differs)} differ). "
                    "Resume with the same command, or delete the folder to start again."
                )
        else:
            _write(identity, json.dumps(run).encode())

    def _file(self, block: str) -> Path:
        return self.folder / (hashlib.sha256(block.encode()).hexdigest()[:16] + ".safetensors")

    def restore(self, block: str, tensors: dict[str, Tensor]) -> list[dict] | None:
        """Put a saved block's weights into `tensors`; its entries of the report, or None if it was not finished."""
        path = self._file(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                with torch.no_grad():
                    for name, t in tensors.items():
                        t.copy_(f.get_tensor(name))
                return json.loads(f.metadata()["entries"])
        except (SafetensorError, KeyError) as e:
            raise ValueError(
                f"{path}: this saved block cannot be read ({e}); delete the file to compute it again."
            ) from e

    def add(self, block: str, tensors: dict[str, Tensor], entries: list[dict]) -> None:
        path = self._file(block)
        part = path.with_suffix(".part")
        values = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(values, part, metadata={"format": FORMAT, "block": block, "entries": json.dumps(entries)})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
