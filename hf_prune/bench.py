"""`hf-prune bench FOLDER`: is 2:4 faster on this GPU?  Measured layer by layer and as a whole, and written to the card.

Without sparse tensor cores there is nothing to measure, and the command says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import WIDTH, _wrapped


def run(words: Sequence[str]) -> int:
    """`hf-prune bench FOLDER [--batch-size N ...]`."""
    parser = argparse.ArgumentParser(
        prog="hf-prune bench",
        description="Time each 2:4 linear layer and the whole model, dense and on the GPU's sparse tensor cores; say "
        "which layers win, and write it to hf_prune.json and the card. Without such a GPU nothing is timed.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="that hf-prune wrote")
    parser.add_argument("--batch-size", metavar="N", type=int, action="append", help="images (repeatable; 1 and 64)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="default: float16")
    parser.add_argument("--device", metavar="DEV", default="cuda", help="cuda (default), cuda:1")
    parser.add_argument("--no-write", action="store_true", help="leave hf_prune.json and the card as they are")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    args = parser.parse_args(words)
    from . import checkpoint, semi_structured

    report = checkpoint.read(args.folder)
    sizes = args.batch_size or [1, 64]
    if min(sizes) < 1:
        raise ValueError(f"--batch-size {min(sizes)}: at least one image is needed.")
    if report["pattern"] != "2:4":
        raise ValueError(f"{args.folder} is pruned {report['pattern']}; the sparse tensor cores take 2:4 only.")
    why = semi_structured.missing(args.device)
    if why is not None:
        if args.json:
            print(json.dumps({"measured": False, "reason": why}))
        else:
            print("\n".join(_wrapped(f"Nothing was timed: {why}. {nothing_gained()}", WIDTH)))
        return 0
    speed = measured(args.folder, sizes, args.dtype, args.device)
    print(json.dumps(speed, indent=1) if args.json else table(speed))
    if not args.no_write:
        notes = write(args.folder, report, speed)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if not args.json:
            files = "hf_prune.json holds" if notes else "hf_prune.json and README.md hold"
            print(f"{args.folder}/  {files} this measurement now")
    return 0


def nothing_gained() -> str:
    from .semi_structured import NO_GAIN

    return NO_GAIN[0].upper() + NO_GAIN[1:].replace("there", "here") + "."


def measured(folder: str, sizes: Sequence[int], dtype: str, device: str) -> dict[str, Any]:
    """The measurement as hf_prune.json holds it."""
    import torch

    from . import models, semi_structured

    loaded = models.load(folder, device=device)
    loaded.module.to(getattr(torch, dtype))
    batches = {}
    for size in sizes:
        images = loaded.batch(loaded.processor(noise(size)))
        batches[size] = torch.utils._pytree.tree_map(lambda t: t.to(getattr(torch, dtype)), images)

    def tell(text: str) -> None:
        print(f"{text} ...", file=sys.stderr, flush=True)

    return semi_structured.measure(loaded.module, batches, tell=tell).as_json()


def noise(count: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def write(folder: str | Path, report: Mapping[str, Any], speed: Mapping[str, Any]) -> list[str]:
    """Put the measurement into hf_prune.json, and into the card unless it was edited by hand; notes on that."""
    from . import checkpoint

    return checkpoint.update(folder, report, {**report, "speed": dict(speed)})


def table(speed: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """At most 80 columns; a name that is longer has a line of its own."""
    head = ("layer", "batch", "dense us", "2:4 us", "ratio")
    first = min(max([len(layer["name"]) for layer in speed["layers"]] + [len("layer")]), width - 36)
    lines = [f"{speed['device']}, {speed['dtype']}, torch {speed['torch']}", "",
             f"{head[0]:<{first}} {head[1]:>6} {head[2]:>9} {head[3]:>9} {head[4]:>6}"]  # fmt: skip
    for layer in speed["layers"]:
        name = layer["name"]
        if len(name) > first:
            lines.append(name)
            name = ""
        sparse = "-" if layer["sparse"] is None else f"{1e6 * layer['sparse']:.1f}"
        ratio = "-" if layer["sparse"] is None else f"{layer['dense'] / layer['sparse']:.2f}"
        dense = f"{1e6 * layer['dense']:.1f}"
        lines.append(f"{name:<{first}} {layer['batch']:>6} {dense:>9} {sparse:>9} {ratio:>6}")
    return "\n".join([*lines, "", *(line for said in words_of(speed) for line in _wrapped(said, width))])


def words_of(speed: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    names = list(dict.fromkeys(layer["name"] for layer in speed["layers"]))
    said = []
    for whole in speed["whole"]:
        said.append(
            f"Whole model, batches of {whole['batch']}: {1e3 * whole['dense']:.2f} ms dense, "
            f"{1e3 * whole['sparse']:.2f} ms with 2:4 layers ({whole['dense'] / whole['sparse']:.2f}x)."
        )
    if speed["chosen"]:
        said.append(
            f"{len(speed['chosen'])} of {len(names)} linear layers are faster as 2:4: "
            "hf_prune.to_semi_structured(model, plan=report['speed']) takes these and leaves the others dense."
        )
    elif names:
        said.append("No gain: on this GPU the model is faster with all its layers dense.")
    else:
        said.append("No linear layer of this model follows 2:4 in a shape that the kernels take.")
    return said
