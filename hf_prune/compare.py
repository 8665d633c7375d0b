"""`hf-prune compare FOLDER...`: several prunings of the same model side by side, from their hf_prune.json.

Where two were judged on the same images, told by a hash of the pixels, they are compared image by image: the answers
are kept in hf_prune.json as one bit per image.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH = 24  # columns of a folder's name


def parser() -> argparse.ArgumentParser:
    from .cli import _Parser

    top = _Parser(
        prog="hf-prune compare",
        description="Several prunings of the same model side by side: what was zeroed, and what it cost. Folders that "
        "were judged on the same images are compared image by image with the first one.",
        allow_abbrev=False,
    )
    top.add_argument("folders", metavar="FOLDER", nargs="+", help="what hf-prune wrote")
    top.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    top.add_argument("--verbose", action="store_true", help="tracebacks")
    return top


def run(words: Sequence[str]) -> int:
    """`hf-prune compare`. Raises ValueError for folders that cannot be read or are of different models."""
    args = parser().parse_args(words)
    from . import checkpoint

    found = compare(args.folders)
    print(checkpoint.to_json(found) if args.json else "\n".join(text(found)) + "\n", end="")
    return 0


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """{"base", "dense", "folders", "pairs", "notes"}; see `text`. Raises ValueError where the bases differ."""
    from . import checkpoint

    reports = [checkpoint.read(folder) for folder in folders]
    bases = {_base(report) for report in reports}
    if len(bases) > 1:
        first = next(i for i, report in enumerate(reports) if _base(report) != _base(reports[0]))
        raise ValueError(
            f"{folders[0]} was pruned from {_said(reports[0])} and {folders[first]} from {_said(reports[first])}: only "
            f"prunings of the same model can be compared."
        )
    rows = [_row(folder, report) for folder, report in zip(folders, reports, strict=True)]
    judged = [row for row in rows if row["evaluation"]]
    places = {_images(row["evaluation"]) for row in judged}
    notes = [f"{row['folder']} was not evaluated: hf-prune eval {row['folder']}" for row in rows if row not in judged]
    if len(places) > 1:
        notes.append("not all were judged on the same images: hf-prune eval FOLDER --dataset ... mends it")
    pairs = [_pair(rows[0], row) for row in rows[1:] if _alike(rows[0], row)]
    dense = judged[0]["evaluation"]["dense"] if judged and len(places) == 1 else None
    return {"base": reports[0]["model"], "dense": dense, "folders": rows, "pairs": pairs, "notes": notes}


def _base(report: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells dense models apart; a folder by where it lies, if it is still there."""
    model = report["model"]
    source = model["source"] if model.get("hub") else os.path.realpath(model["source"])
    return source, model["revision"], model["parameters"], model["architecture"]


def _said(report: Mapping[str, Any]) -> str:
    model = report["model"]
    return f"{model['source']}" + (f" at {model['revision'][:10]}" if model["revision"] else "")


def zeros(report: Mapping[str, Any]) -> float:
    """The share of zeros among the entries of the pruned weights."""
    layers = [layer for layer in report["layers"] if layer["pattern"]]
    total = sum(layer["total"] for layer in layers)
    return 1 - sum(layer["kept"] for layer in layers) / total if total else 0.0


def _row(folder: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    from . import checkpoint

    every = sum(layer["total"] for layer in report["layers"])
    errors = [layer["error_after"] for layer in report["layers"] if layer["error_after"] is not None]
    return {
        "folder": str(folder),
        "recipe": report["recipe"].get("name", "custom"),
        "pattern": report["pattern"],
        "zeros": zeros(report),
        "zeros_of_model": sum(layer["total"] - layer["kept"] for layer in report["layers"]) / every if every else 0.0,
        "bytes": checkpoint.weight_bytes(folder),
        "seconds": report["resources"]["seconds"],
        "samples": report["calibration"]["samples"],
        "seed": report["seed"],
        "layer_error": sum(errors) / len(errors) if errors else None,
        "evaluation": report["evaluation"],
    }


def _images(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same for two evaluations on the same images in the same order."""
    seen = (evaluation.get("images") or {}).get("sha256")
    return (seen,) if seen else tuple(evaluation.get(key) for key in ("dataset", "config", "split", "samples"))


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, second = one["evaluation"] or {}, other["evaluation"] or {}
    bits = [(part.get("images") or {}).get("pruned") for part in (first, second)]
    return all(bits) and _images(first) == _images(second)


def _pair(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other` minus `first`, on the same images."""
    import numpy as np

    from .evaluation import paired

    count = first["evaluation"]["labelled"]
    was, now = (
        np.unpackbits(np.frombuffer(bytes.fromhex(row["evaluation"]["images"]["pruned"]), dtype=np.uint8))[:count] > 0
        for row in (first, other)
    )
    return {"folder": other["folder"], "against": first["folder"], **paired(was, now)}


# ------------------------------------------------------------------------------------------------------ what is printed
def text(found: Mapping[str, Any]) -> list[str]:
    """The comparison in at most 80 columns."""
    from .card import duration
    from .checkpoint import size

    base, rows = found["base"], found["folders"]
    lines = [f"prunings of {base['source'].rstrip('/').rpartition('/')[2]} ({base['parameters']:,} parameters)", ""]
    lines.append(f"{'':<{WIDTH}}{'recipe':<16}{'pattern':<12}{'zeros':>7}{'weights':>9}{'took':>12}")
    for row in rows:
        share = f"{100 * row['zeros']:.1f} %"
        lines.append(
            f"{_name(row):<{WIDTH}}{row['recipe'][:15]:<16}{row['pattern'][:11]:<12}{share:>7}"
            f"{size(row['bytes']):>9}{duration(row['seconds']):>12}"
        )
    judged = [row for row in rows if row["evaluation"]]
    if judged:
        lines += ["", f"{'':<{WIDTH}}{'top-1 %':>20}{'top-5 %':>20}{'same':>6}{'logit err':>10}"]
    if found["dense"]:
        shares = [_share(found["dense"], key) for key in ("top1", "top5")]
        lines.append(f"{'dense':<{WIDTH}}{shares[0]:>20}{shares[1]:>20}".rstrip())
    for row in judged:
        told = row["evaluation"]
        pruned = told.get("pruned") or {}
        same = f"{100 * told['agreement']:.0f} %" if told.get("agreement") is not None else ""
        error = told["logit_error"] if told["logit_error"] is not None else told.get("representation_error")
        lines.append(
            f"{_name(row):<{WIDTH}}{_share(pruned, 'top1'):>20}{_share(pruned, 'top5'):>20}{same:>6}"
            + (f"{error:>10.3g}" if error is not None else "")
        )
    if judged:
        counts = sorted({row["evaluation"]["samples"] for row in judged})
        lines += ["", f"on {' or '.join(map(str, counts))} images; in brackets the 95 % interval"]
    if found["pairs"]:
        lines += ["", f"top-1 against {_name(rows[0])}, image by image, in points"]
        for pair in found["pairs"]:
            low, high = (100 * end for end in pair["interval"])
            change = f"{100 * pair['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            moved = f"{pair['lost']} lost, {pair['won']} won"
            lines.append(f"{_name(pair):<{WIDTH}}{change:>22}{moved:>20}{_p(pair['p']):>14}")
    lines += [line for note in found["notes"] for line in ("", f"note: {note}")]
    return lines


def _name(row: Mapping[str, Any]) -> str:
    """The end of a folder's name is what tells it apart."""
    name = Path(row["folder"]).name or row["folder"]
    return name if len(name) < WIDTH else "..." + name[4 - WIDTH :]


def _share(scores: Mapping[str, Any], key: str) -> str:
    if scores.get(key) is None:
        return ""
    low, high = (100 * end for end in scores[f"{key}_interval"])
    return f"{100 * scores[key]:.1f} [{low:.1f}, {high:.1f}]"


def _p(value: float) -> str:
    return f"p {value:.2g}" if value >= 1e-4 else "p < 0.0001"
