"""`hf-prune plan MODEL --nm 2:4`, the same as --dry-run: what a run would do and cost, before any data is opened.

Per weight: the pattern or why it stays dense, the 2:4 kernels that can take it, its bytes as a dense and as a packed
tensor, and its operations per image; for the whole: bytes of the files to be written, exact to the last one,
operations, and the time, measured on two images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import backends, packing
from . import plan as plans
from .card import duration
from .checkpoint import size

if TYPE_CHECKING:
    from torch import Tensor

    from .loop import Recipe, Selection
    from .models import Loaded
    from .stopwatch import Spent

# safetensors sorts tensors by these, last first, then by name
DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64")
PHOTO = (500, 375)  # pixels; about the mean of ImageNet's
LETTERS = {"cuSPARSELt": "s", "CUTLASS": "c", "TensorRT": "t"}


@dataclass
class Weight:
    """One row of the plan.  packed: bytes without the zeros of the pattern; None where it cannot be packed."""

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    reason: str | None
    parameters: int
    dense_bytes: int
    packed_bytes: int | None
    operations: int  # multiplications and additions per image
    backends: dict[str, str | None] = field(default_factory=dict)  # name -> why not; None: it can take it


@dataclass
class Forecast:
    """dense_file, packed_file: bytes of the safetensors file; packed_file None where the pattern cannot be packed.
    sharded: the dense weights are written as several files, and dense_file leaves out their headers.
    stages: what each stage of the run takes (stopwatch.py); None where it was not asked for or cannot be told
    (timeless).
    memory: bytes of the process at its widest point; None where it was not asked for.
    """

    weights: list[Weight]
    summary: list[str]
    dense_file: int
    packed_file: int | None
    sharded: bool
    samples: int
    stages: dict[str, Spent] | None = None
    timeless: bool = False
    memory: int | None = None

    def seconds(self) -> float | None:
        return None if self.stages is None else sum(spent.seconds for spent in self.stages.values())

    def operations(self) -> tuple[int, int]:
        """Of all products with a weight, and of those under the pattern, per image."""
        return sum(w.operations for w in self.weights), sum(w.operations for w in self.weights if w.pattern)


def forecast(
    loaded: Loaded,
    chosen: Selection,
    recipe: Recipe,
    *,
    probe: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Forecast:
    """chosen: loop.choose(module, two images, recipe).  probe: measure the time, which prunes one block of a kind."""
    from . import cost, stopwatch

    pattern = recipe.pattern()
    counted = cost.operations(loaded.module, chosen.small)
    sites = {s.name: s for u in chosen.units for s in u.sites}
    stored = loaded.stored_state()
    dense, packed = files(loaded, chosen, pattern.n, pattern.m)
    weights = []
    for row in chosen.plan.rows:
        parameter = row.name.partition("[")[0]
        item = stored[parameter].element_size()
        site = sites.get(row.name)
        straight = site is not None and not site.transposed
        small = None
        if row.pattern and straight and 0 < pattern.m <= packing.MAX_M:
            small = packing.packed_bytes(row.shape, item, pattern.n, pattern.m)
        why = {
            name: backends.refusal(
                name, row.shape, row.pattern, convolution=site is not None and site.conv is not None,
                whole=straight and site is not None and site.rows is None,
            )
            for name in backends.NAMES
        }  # fmt: skip
        weights.append(
            Weight(row.name, row.shape, row.pattern, row.reason, row.numel, row.numel * item, small,
                   counted.get(row.name, 0), why)  # fmt: skip
        )
    data = sum(size for _, _, size in dense)
    sharded = loaded.library == "transformers" and data > 5_000_000_000  # max_shard_size of Loaded.save
    made = Forecast(
        weights=weights,
        summary=plans.summary(chosen.plan),
        dense_file=data if sharded else file_bytes(dense, {"format": "pt"}),
        packed_file=packed,
        sharded=sharded,
        samples=recipe.samples,
    )
    if probe:
        made.stages = cost.seconds(loaded.module, chosen.small, recipe, recipe.samples, tell)
        made.timeless = made.stages is None
    if made.stages is not None:
        made.stages = {stopwatch.READING: reading(loaded, recipe.samples), **made.stages}
    return made


def reading(loaded: Loaded, samples: int) -> Spent:
    """What decoding and preparing the images takes, if they are photographs of PHOTO pixels stored as JPEG."""
    import io

    import numpy as np
    from PIL import Image

    from . import calibration, stopwatch

    few = np.random.default_rng(0).integers(0, 256, (PHOTO[1] // 8, PHOTO[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(few).resize(PHOTO, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    def read(count: int) -> None:
        loaded.batch(loaded.processor([calibration.decode(file.getvalue()) for _ in range(count)]))

    read(1)  # pays for what is set up once
    return stopwatch.Spent().plus(stopwatch.clock(lambda: read(4)), samples / 4)


# ------------------------------------------------------------------------------------------------- bytes of the files
Entry = tuple[str, str, int]  # name and shape as the header holds them (JSON), dtype, bytes


def files(loaded: Loaded, chosen: Selection, n: int, m: int) -> tuple[list[Any], int | None]:
    """(entries of the dense file, bytes of the packed file).

    The state dict goes the way to the disk with an n:m pattern in place of the pruned weights, so that tensors that are
    split, merged or renamed on the way count as they will be written.
    """
    import torch

    state = loaded.stored_state()
    packs = 0 < m <= packing.MAX_M
    if packs:
        changed: dict[str, Tensor] = {}
        for unit in chosen.units:
            for site in unit.sites:
                p = changed.setdefault(site.parameter, state[site.parameter].detach().float().clone())
                some = torch.ones(site.shape)
                some.view(-1, m)[:, n:] = 0
                site.write(p, some)
        places = {name: tensor.data_ptr() for name, tensor in state.items() if tensor.numel()}
        for name, place in places.items():  # tied names stay one tensor
            source = next((c for c in changed if places[c] == place), None)
            if source is not None:
                state[name] = changed[source].to(state[name].dtype) if name == source else state[source]
    on_disk = _on_disk(loaded, state)
    entries = [_entry(name, t.shape, t.dtype, t.numel() * t.element_size()) for name, t in on_disk.items()]
    if not packs:
        return entries, None
    from .compress import FIELDS, FORMAT, KEY, VALUES, _dtype_name

    stored, tensors = [], {}
    for name, t in on_disk.items():
        small = _follows(t, n, m)
        tensors[name] = {"packed": small, "dtype": _dtype_name(t.dtype), "shape": list(t.shape), "sha256": "0" * 64}
        if small:
            shape = (t.shape[0], *t.shape[2:], t.shape[1] // m * n)
            values = torch.Size(shape).numel() * t.element_size()
            fields = packing.packed_bytes(tuple(t.shape), t.element_size(), n, m) - values
            stored.append(_entry(name + VALUES, shape, t.dtype, values))
            stored.append(_entry(name + FIELDS, (fields,), torch.uint8, fields))
        else:
            stored.append(_entry(name, t.shape, t.dtype, t.numel() * t.element_size()))
    header = json.dumps({"format": FORMAT, "pattern": f"{n}:{m}", "tensors": tensors}, ensure_ascii=False)
    return entries, file_bytes(stored, {"format": "pt", KEY: header})


def file_bytes(entries: Sequence[Any], metadata: Mapping[str, str]) -> int:
    """Bytes of a safetensors file: eight for the length of the header, the header, the tensors."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for (name, shape), dtype, count in sorted(entries, key=lambda e: (-DTYPES.index(e[1]), e[0][0])):
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    header = len(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-header // 8) * 8 + offset


def _entry(name: str, shape: Sequence[int], dtype: Any, count: int) -> Any:
    kind = str(dtype).removeprefix("torch.")
    letter = {"bfloat16": "BF16", "bool": "BOOL"}.get(kind) or kind[0].upper() + kind.lstrip("uintfloa")
    return (name, tuple(shape)), letter, count


def _follows(t: Tensor, n: int, m: int) -> bool:
    """Whether packing.pack will take it."""
    if not t.is_floating_point() or t.dim() < 2 or t.shape[1] % m or not t.numel():
        return False
    return int((t.detach().movedim(1, -1).reshape(-1, m) != 0).sum(1).max()) <= n


def _on_disk(loaded: Loaded, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if loaded.library == "timm":
        return state
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has one set of names
        converted = dict(state)
    else:
        converted = revert_weight_conversion(loaded.module, dict(state))
    once: dict[Any, str] = {}
    for name, t in converted.items():  # a tied tensor is stored once
        once.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else name, name)
    return {name: converted[name] for name in once.values()}


# ------------------------------------------------------------------------------------------------------------ in words
def text(found: Forecast, *, width: int = plans.WIDTH) -> str:
    """The table and the totals, at most 80 columns; a name that is longer has a line of its own."""
    head = ("weight", "shape", "pattern", "on", "kB", "packed", "MFLOP")
    rows = []
    for w in found.weights:
        letters = "".join(LETTERS[b] if why is None else "-" for b, why in w.backends.items())
        cells = ("x".join(map(str, w.shape)), w.pattern or "dense", letters, _kilo(w.dense_bytes),
                 "" if w.packed_bytes is None else _kilo(w.packed_bytes), f"{w.operations / 1e6:.1f}")  # fmt: skip
        rows.append((w, cells))
    sizes = [max(len(cells[i]) for cells in [head[1:], *(c for _, c in rows)]) for i in range(len(head) - 1)]
    first = min(max(len(w.name) for w in found.weights), width - sum(sizes) - len(sizes))
    first = max(first, len("weight"))

    def line(name: str, cells: Sequence[str]) -> str:
        left = [f"{cell:<{n}}" for cell, n in zip(cells[:3], sizes[:3], strict=True)]
        right = [f"{cell:>{n}}" for cell, n in zip(cells[3:], sizes[3:], strict=True)]
        return " ".join([f"{name:<{first}}", *left, *right]).rstrip()

    lines = [line("weight", head[1:])]
    for w, cells in rows:
        name = w.name
        if len(name) > first:  # a name is never cut: it is what --skip and --only take
            lines.append(name)
            name = ""
        lines.append(line(name, cells))
        if w.reason:
            lines += plans._wrapped(f"stays dense: {w.reason}", width, indent=2)
    return "\n".join([*lines, "", *said(found, width=width)])


def said(found: Forecast, *, width: int = plans.WIDTH) -> list[str]:
    """The totals."""
    total, under = found.operations()
    lines = list(found.summary)
    if any(None in w.backends.values() for w in found.weights):
        counts = {b: sum(w.backends[b] is None for w in found.weights) for b in backends.NAMES}
        takes = ", ".join(f"{b} ({LETTERS[b]}) {count}" for b, count in counts.items())
        lines += plans._wrapped(f"2:4 kernels could take of these weights, in half precision: {takes}. Whether that "
                                "is faster only a measurement on the GPU says (hf-prune bench).", width)  # fmt: skip
    share = 100 * under / total if total else 0.0
    lines += plans._wrapped(f"One image takes {_giga(total)} of multiplications and additions in these weights, "
                            f"{share:.1f} % of it under the pattern.", width)  # fmt: skip
    more = "" if not found.sharded else " and headers"
    lines += plans._wrapped(f"model.safetensors: {found.dense_file:,} bytes{more}; zeros are stored, so it is as large "
                            "as a dense one.", width)  # fmt: skip
    if found.packed_file is not None:
        ratio = 100 * found.packed_file / found.dense_file
        lines += plans._wrapped(f"With --compressed, packed: {found.packed_file:,} bytes ({ratio:.1f} %).", width)
    if found.memory is not None:
        lines += plans._wrapped(f"Memory: about {size(found.memory)} at its widest.", width)
    if found.stages is not None:
        whole, read = found.seconds() or 0.0, found.stages["reading images"].seconds
        lines += plans._wrapped(f"Time: about {duration(whole)} of pruning with {found.samples} images on this machine "
                                f"as busy as it is now, {duration(read)} of it for reading them as photographs of "
                                f"{PHOTO[0]} x {PHOTO[1]} pixels; loading and evaluation come on top.",
                                width)  # fmt: skip
    if found.timeless:
        lines += plans._wrapped("The time is not predicted: this recipe looks at the whole model at once, not at block "
                                "after block.", width)  # fmt: skip
    return lines


def as_json(found: Forecast, loaded: Loaded, recipe: Recipe) -> dict[str, Any]:
    """The same for machines; every number in bytes, operations, seconds."""
    from . import stopwatch

    disk = loaded.checkpoint_names()
    weights = []
    for w in found.weights:
        name, bracket, rows = w.name.partition("[")
        weights.append(
            {
                "name": w.name, "checkpoint_name": disk.get(name, name) + bracket + rows, "shape": list(w.shape),
                "pattern": w.pattern, "dense_reason": w.reason, "parameters": w.parameters,
                "dense_bytes": w.dense_bytes, "packed_bytes": w.packed_bytes, "operations": w.operations,
                "backends": {b: {"eligible": why is None, "reason": why} for b, why in w.backends.items()},
            }
        )  # fmt: skip
    total, under = found.operations()
    return {
        "model": loaded.source, "pattern": str(recipe.pattern()), "recipe": recipe.name, "samples": found.samples,
        "weights": weights,
        "totals": {
            "parameters": sum(w.parameters for w in found.weights),
            "under_pattern": sum(w.parameters for w in found.weights if w.pattern),
            "operations": total, "operations_under_pattern": under,
            "dense_file_bytes": found.dense_file, "packed_file_bytes": found.packed_file,
        },
        "predicted": {
            "seconds": found.seconds(),
            "cpu_seconds": None if found.stages is None else sum(spent.cpu for spent in found.stages.values()),
            "by_stage": None if found.stages is None else stopwatch.as_json(found.stages),
            "memory_bytes": found.memory,
        },
    }  # fmt: skip


def _kilo(count: int) -> str:
    return f"{count / 1000:.1f}" if count < 1e5 else f"{count / 1000:.0f}"


def _giga(count: float) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.2f} MFLOP"


def run(words: Sequence[str]) -> int:
    """`hf-prune plan MODEL --nm 2:4 [the flags of a run]`."""
    from . import cli

    parser = cli.parser()
    parser.prog, parser.usage = "hf-prune plan", "hf-prune plan MODEL (--nm N:M | --sparsity S) [options] [--json]"
    parser.description = "Say what a run would do and cost; the same as --dry-run. Opens no data, writes nothing."
    parser.epilog = None
    group = parser.add_argument_group("plan")
    group.add_argument("--json", action="store_true", help="for machines")
    group.add_argument("--no-probe", action="store_true", help="do not measure the time on two images")
    args = vars(parser.parse_args(list(words)))
    options = {key: bool(args.pop(key, False)) for key in ("json", "no_probe")}
    args.pop("dry_run", None)
    return cli.run({**args, "dry_run": True}, ["plan", *words], plan_only=options)

