"""`hf-prune inspect FOLDER|FILE|ID`: how sparse is a safetensors checkpoint, and does it follow n:m?

Reads headers first and weights in blocks of a few megabytes, so memory does not grow with the model; of a repository on
the Hub it reads ranges over HTTP and stores nothing. Any safetensors checkpoint will do, whoever wrote it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from . import source as sources

BLOCK = 8 << 20  # bytes read at a time
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
         "F8_E5M2FNUZ": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
         "C64": 8}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WHOLE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bytes per entry -> what shows its bits
GROUPS = (4, 8, 16)  # M of the patterns that are looked for
Read = Callable[[int, int], bytes]  # (first byte, count) -> exactly these bytes


@dataclass
class Entry:
    """One tensor: what its header says, and what was counted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int
    zeros: int = 0
    negative_zeros: int = 0
    not_finite: int = 0
    most: dict[int, int] = field(default_factory=dict)  # M -> most non-zeros in a group of M input channels

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def pattern(self) -> str | None:
        """The sparsest N:M, by share, that every group keeps to; of equal ones the one with the smallest groups."""
        kept = [(n / m, m, n) for m, n in self.most.items() if 0 < n < m]
        return f"{min(kept)[2]}:{min(kept)[1]}" if kept else None


def header(read: Read, size: int) -> tuple[list[Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file of `size` bytes. Raises ValueError where the header is not sound."""
    if size < 8:
        raise ValueError("it is shorter than a safetensors header")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(size - 8, HEADER_LIMIT):
        raise ValueError(f"its header claims {length} bytes of {size}; it is no safetensors file, or cut off")
    try:
        content = json.loads(read(8, length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not readable ({str(error)[:80]})") from error
    if not isinstance(content, dict):
        raise ValueError("its header is no mapping")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no mapping")
    found = []
    for name, told in content.items():
        if not isinstance(told, dict):
            raise ValueError(f"the header's entry of {name!r} is no mapping")
        dtype, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
        if dtype not in SIZES or not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
            raise ValueError(f"the header's entry of {name!r} is not understood")
        start, stop = (8 + length + each for each in offsets)
        if stop > size or stop - start != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name!r} does not fit the file: it is damaged or cut off")
        found.append(Entry(str(name), dtype, tuple(shape), start, stop))
    return found, {str(key): str(value) for key, value in metadata.items()}


def _whole(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(each) is int and each >= 0 for each in values)


def count(entry: Entry, read: Read) -> None:
    """Fill in zeros, values that are not finite, and the most non-zeros per group, block by block."""
    size = SIZES[entry.dtype]
    whole = WHOLE[size]
    nothing, sign = whole(0), whole(1 << (8 * size - 1))
    fits = [m for m in GROUPS if len(entry.shape) >= 2 and entry.shape[1] and entry.shape[1] % m == 0]
    inner = math.prod(entry.shape[2:])
    row = math.prod(entry.shape[1:]) * size if entry.shape else size  # a row holds whole groups
    most = dict.fromkeys(fits, 0)
    step = max(1, BLOCK // max(row, 1)) * row
    if row > 4 * BLOCK:  # a single huge row: groups along input channels cannot be cut out of it cheaply
        fits, most, step = [], {}, BLOCK - BLOCK % size
    for first in range(entry.start, entry.stop, max(step, 1)):
        values = np.frombuffer(read(first, min(step, entry.stop - first)), dtype=np.dtype(whole).newbyteorder("<"))
        zero = values == nothing
        negative = values == sign
        entry.zeros += int(zero.sum()) + int(negative.sum())
        entry.negative_zeros += int(negative.sum())
        entry.not_finite += _not_finite(values, entry.dtype)
        there = ~(zero | negative)
        for m in fits:
            rows = there.reshape(-1, entry.shape[1] // m, m, inner)
            most[m] = max(most[m], int(rows.sum(2, dtype=np.int64).max(initial=0)))
    entry.most = most


def _not_finite(values: np.ndarray, dtype: str) -> int:
    exponent = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7, "F8_E5M2": 0x1F << 2}
    if dtype == "F8_E4M3":  # no infinity; NaN is all ones
        return int(((values & 0x7F) == 0x7F).sum())
    mask = values.dtype.type(exponent[dtype])
    return int(((values & mask) == mask).sum())


def file(path: Path) -> Iterator[Entry]:
    """The counted float tensors of a safetensors file on disk."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:

            def read(first: int, length: int) -> bytes:
                handle.seek(first)
                given = handle.read(length)
                if len(given) != length:
                    raise ValueError("it is cut off")
                return given

            yield from _entries(read, size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _entries(read: Read, size: int) -> Iterator[Entry]:
    for entry in header(read, size)[0]:
        if entry.dtype in FLOATS:
            count(entry, read)
            yield entry


def remote(
    repo: str, *, revision: str | None = None, token: str | None = None
) -> Iterator[tuple[str, Iterator[Entry]]]:
    """(file name, counted tensors) of every safetensors file of a repository, read by ranges."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        system = HfFileSystem(token=token)
        root = f"{repo}@{revision}" if revision else repo
        names = sorted(path for path in system.ls(root, detail=False) if str(path).endswith(".safetensors"))
        if not names:
            raise ValueError(f"{repo} holds no safetensors file at its top.")
        for name in names:
            size = int(system.info(name)["size"])
            with system.open(name, "rb", block_size=BLOCK) as handle:

                def read(first: int, length: int, handle: object = handle) -> bytes:
                    handle.seek(first)  # type: ignore[attr-defined]
                    return bytes(handle.read(length))  # type: ignore[attr-defined]

                yield str(name).rpartition("/")[2], _entries(read, size)
    except FileNotFoundError as error:
        raise ValueError(f"{repo} is neither here nor on the Hub (or it is private: log in).") from error
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{repo}: the Hub could not be read ({sources._line(error)}).") from error


def places(name: str, *, revision: str | None, token: str | None) -> Iterator[tuple[str, Iterator[Entry]]]:
    """(file name, counted tensors) of whatever the user named."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{name} is no safetensors file; other formats can run code when they are read.")
        yield path.name, file(path)
    elif path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".ckpt"))
            more = f", only {pickles[0]}, a format that can run code when it is read" if pickles else ""
            raise ValueError(f"{name} holds no safetensors file{more}.")
        for each in found:
            yield each.name, file(each)
    elif sources._looks_local(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        raise ValueError(f"{name}: there is no such file or folder.")
    else:
        yield from remote(name, revision=revision, token=token)


def table(entries: Sequence[Entry]) -> str:
    """One line per tensor, and a total over those with two dimensions or more."""
    from .card import _line

    wide = max([len(_line(e.name)) for e in entries] + [6])
    lines = [f"{'tensor':<{wide}}  {'shape':>18}  {'dtype':<5} {'zeros':>7}  pattern"]
    for e in entries:
        shape = "x".join(map(str, e.shape)) or "-"
        notes = [e.pattern or ""]
        notes += [f"{e.negative_zeros} zeros are -0.0"] if e.negative_zeros and e.pattern else []
        notes += [f"{e.not_finite} not finite"] if e.not_finite else []
        share = f"{100 * e.zeros / e.numel:.1f} %" if e.numel else "-"
        lines.append(f"{_line(e.name):<{wide}}  {shape:>18}  {e.dtype:<5} {share:>7}  {'; '.join(filter(None, notes))}")
    matrices = [e for e in entries if len(e.shape) >= 2]
    total, zeros = sum(e.numel for e in matrices), sum(e.zeros for e in matrices)
    patterns = sorted({e.pattern for e in matrices if e.pattern})
    following = ", ".join(f"{sum(e.pattern == p for e in matrices)} follow {p}" for p in patterns)
    share = f"{100 * zeros / total:.1f} %" if total else "none"
    lines.append(
        f"{len(matrices)} weights with {total:,} entries: {share} zero" + (f"; {following}" if following else "")
    )
    return "\n".join(line.rstrip() for line in lines)


def run(words: Sequence[str]) -> int:
    """`hf-prune inspect FOLDER|FILE|ID`."""
    parser = argparse.ArgumentParser(
        prog="hf-prune inspect",
        description="Count the zeros of a safetensors checkpoint and find its N:M patterns, without loading it whole.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="FOLDER|FILE|ID", help="of the Hub only ranges are read")
    parser.add_argument("--only", metavar="NAME", action="append", help="tensors that match (repeatable, * and ?)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    parser.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    args = parser.parse_args(words)
    told = []
    for name, entries in places(args.name, revision=args.revision, token=args.token):
        kept = [e for e in entries if not args.only or any(fnmatchcase(e.name, each) for each in args.only)]
        if args.json:
            told += [{"file": name, "name": e.name, "dtype": e.dtype, "shape": list(e.shape), "zeros": e.zeros,
                      "entries": e.numel, "pattern": e.pattern, "negative_zeros": e.negative_zeros,
                      "not_finite": e.not_finite} for e in kept]  # fmt: skip
        else:
            print(f"{name}\n{table(kept)}")
    if args.json:
        print(json.dumps(told, indent=1))
    return 0
