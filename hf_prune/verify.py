"""`hf-prune verify FOLDER|ID`: is this still what hf-prune wrote, and does its card say what the weights say?

Recomputed from the weights: the sha256 of every tensor, every layer's pattern, shape and number of non-zeros, zeros
stored as +0.0, finiteness. Compared with each other: hf_prune.json, recipe.yaml, config.json and the card, whose every
line with a figure must be the one that hf_prune.json renders to. Accuracies cannot be recomputed without the images,
and are not.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import source as sources

if TYPE_CHECKING:
    from torch import Tensor

    from .pattern import Pattern


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(folder: str | Path) -> Findings:
    """Check an output folder. Raises ValueError where it cannot be read as one at all."""
    from . import checkpoint, compress

    folder = Path(folder)
    report = checkpoint.read(folder)
    found = Findings(checked=["hf_prune.json follows its schema"])
    config = sources._json(folder / "config.json")
    packed = compress.find(folder)
    dense = [path for path in (folder / sources.WEIGHTS, folder / sources.INDEX) if path.is_file()]
    listed = report.get("sha256") or {}
    if packed is None and not dense:
        raise ValueError(f"{folder} holds no weights.")
    if dense:
        weights = sources.weight_files(str(folder), folder)
        _weights(found, compress.read_dense(weights), report, listed, " and ".join(path.name for path in weights[:2]))
    if packed is not None:
        _weights(found, compress.read(packed), report, listed, packed.name)
    if not listed:
        found.notes.append("hf_prune.json has no sha256 of the tensors: an early version wrote it")
    _statements(found, folder, report, config, packed, bool(dense))
    _card(found, folder, report)
    return found


def _weights(found: Findings, tensors: Any, report: Mapping[str, Any], listed: Mapping[str, str], where: str) -> None:
    """One file's tensors against hashes and layers; one tensor in memory at a time."""
    from .compress import digest

    layers: dict[str, list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        layers.setdefault(layer["checkpoint_name"].partition("[")[0], []).append(layer)
    seen: set[str] = set()
    kept: dict[str, int] = {}
    before = len(found.problems)
    try:
        for name, tensor in tensors:
            seen.add(name)
            if listed and name not in listed:
                found.problems.append(f"{where}: {name} is not in the list of hf_prune.json")
            elif listed and digest(tensor) != listed[name]:
                found.problems.append(f"{where}: the content of {name} does not match its sha256")
            for layer in layers.get(name, ()):
                found.problems += [f"{where}: {problem}" for problem in _layer(layer, tensor, kept)]
    except ValueError as error:
        found.problems.append(str(error).rstrip("."))
        return
    tied = {name for name in layers if name not in seen}
    found.problems += [f"{where}: {name} is missing" for name in sorted((set(listed) | tied) - seen)]
    found.problems += [f"{where}: {problem}" for problem in _model_scope(report, kept)]
    if len(found.problems) == before:
        pruned = sum(bool(layer["pattern"]) for layer in report["layers"])
        hashes = f"{len(listed)} hashes, " if listed else ""
        found.checked.append(f"{where}: {hashes}{pruned} patterns, {len(report['layers'])} shapes and counts")


def _layer(layer: Mapping[str, Any], tensor: Tensor, kept: dict[str, int]) -> list[str]:
    """What is wrong with one weight, or with the rows of it that are a layer."""
    import torch

    from .pattern import Pattern

    name, shape = layer["checkpoint_name"], list(layer["shape"])
    rows = re.search(r"\[(\d+):(\d+)\]$", name)
    if rows:
        tensor = tensor[int(rows[1]) : int(rows[2])]
    if tensor.numel() != layer["total"] or (not rows and list(tensor.shape) != shape):
        return [f"{name} has the shape {list(tensor.shape)}, hf_prune.json says {shape} with {layer['total']} entries"]
    wrong = []
    nonzero = int((tensor != 0).sum())
    kept[name] = nonzero
    if nonzero != layer["kept"]:
        wrong.append(f"{name} has {nonzero} entries that are not zero, hf_prune.json says {layer['kept']}")
    if not layer["pattern"]:
        return wrong
    if bool((torch.signbit(tensor.float()) & (tensor == 0)).any()):
        wrong.append(f"{name} holds zeros stored as -0.0")
    nm = re.fullmatch(r"\d+:\d+", layer["pattern"])
    share = re.fullmatch(r"([\d.]+)% \((layer|row|model)\)", layer["pattern"])
    try:
        weight = tensor.float().movedim(1, -1).reshape(1, tensor.shape[0], -1)
        if nm:
            _verify_nm(Pattern.parse(layer["pattern"]), weight, name)
        elif share and share[2] != "model":
            Pattern.unstructured(float(share[1]) / 100, share[2]).verify(weight, name)
        elif not share:
            wrong.append(f"{name}: the pattern {layer['pattern']!r} is not understood")
    except (ValueError, RuntimeError) as error:
        wrong.append(str(error).rstrip("."))
    return wrong


def _verify_nm(pattern: Pattern, weight: Tensor, name: str) -> None:
    """Raise ValueError unless the groups lie along the input channels, which a few modules store first."""
    if weight.shape[-1] % pattern.m == 0:
        try:
            return pattern.verify(weight, name)
        except ValueError:
            if weight.shape[-2] % pattern.m:
                raise
            try:
                return pattern.verify(weight.mT.contiguous(), name)
            except ValueError:
                pass
    pattern.verify(weight, name)


def _model_scope(report: Mapping[str, Any], kept: Mapping[str, int]) -> list[str]:
    """One share of all pruned weights together."""
    share = re.fullmatch(r"([\d.]+)% \(model\)", report["pattern"])
    layers = [layer for layer in report["layers"] if layer["pattern"]]
    if not share or not layers:
        return []
    allowed = math.floor((1 - float(share[1]) / 100) * sum(layer["total"] for layer in layers) + 1e-6) + len(layers)
    there = sum(kept.get(layer["checkpoint_name"], 0) for layer in layers)
    return [f"{there} entries are not zero, {report['pattern']} allows {allowed}"] if there > allowed else []


def _statements(
    found: Findings,
    folder: Path,
    report: Mapping[str, Any],
    config: Mapping[str, Any],
    packed: Path | None,
    dense: bool,
) -> None:
    """recipe.yaml, config.json and the list of files against hf_prune.json."""
    import yaml

    from . import checkpoint, compress

    before = len(found.problems)
    recipe = folder / checkpoint.RECIPE
    try:
        same = yaml.safe_load(recipe.read_text(encoding="utf-8")) == report["recipe"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        found.problems.append(f"recipe.yaml cannot be read: {str(error).splitlines()[0]}")
    else:
        if not same:
            found.problems.append("recipe.yaml is not the recipe of hf_prune.json")
    stated = config.get("quantization_config")
    is_ours = isinstance(stated, Mapping) and stated.get("quant_method") == compress.KEY
    if dense and stated:
        found.problems.append("config.json states a quantization_config beside dense weights")
    if not dense and not is_ours:
        found.problems.append("config.json does not say that the weights are compressed")
    said = report.get("compressed")
    if (said["file"] if said else None) != (packed.name if packed else None) or bool(said and said["only"]) == dense:
        found.problems.append(
            f"hf_prune.json says compressed: {said}, the folder holds {packed.name if packed else 'none'}"
        )
    if packed is not None and report["pattern"] != ":".join(map(str, compress.pattern(packed))):
        found.problems.append(f"{packed.name} is packed for another pattern than {report['pattern']}")
    for picture in report.get("pictures") or ():
        if not (folder / Path(picture["file"]).name).is_file():
            found.problems.append(f"{picture['file']}, which the card shows, is missing")
    if len(found.problems) == before:
        found.checked.append("config.json, recipe.yaml and the list of files agree with hf_prune.json")


def _card(found: Findings, folder: Path, report: Mapping[str, Any]) -> None:
    """Every line with a figure that hf_prune.json renders to stands in the card."""
    from . import __version__, card, checkpoint

    path = folder / checkpoint.CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found.problems.append(f"README.md cannot be read: {error}")
        return
    title = re.search(r"^# (`+) ?(.+?) ?\1$", text, re.MULTILINE)
    rendered = card.render(report, name=title[2] if title else None)
    lines = {line.strip() for line in text.splitlines()}
    figures = [line.strip() for line in rendered.splitlines() if re.search(r"\d", line)]
    missing = [line for line in figures if line not in lines]
    if not missing:
        found.checked.append(f"README.md holds all {len(figures)} lines with figures that hf_prune.json renders to")
    elif report["versions"].get("hf-prune") == __version__:
        found.problems.append(f"README.md: {len(missing)} lines with figures are not what hf_prune.json says, first: "
                              f"{missing[0][:100]}")  # fmt: skip
    else:
        found.notes.append(f"README.md was written by hf-prune {report['versions'].get('hf-prune')}; not compared")


def run(words: Sequence[str], say: Callable[[str], None] = print) -> int:
    """`hf-prune verify FOLDER|ID`: 0 when everything holds, 1 when something does not, 2 when it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="hf-prune verify",
        description="Recompute the hashes, patterns and counts of a model that hf-prune wrote, and compare its files "
        "with each other. Ends with 0 when everything holds, 1 when something does not, 2 when it cannot be read.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="FOLDER|ID", help="an output folder, or its repository on the Hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    parser.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    parser.add_argument("--quiet", action="store_true", help="problems only")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    args = parser.parse_args(words)
    folder = Path(args.name).expanduser()
    if not folder.is_dir():
        folder = sources.fetch(args.name, revision=args.revision, token=args.token, everything=True)
    elif args.revision is not None:
        raise ValueError(f"--revision {args.revision}: {args.name} is a local folder, which has no revisions.")
    found = verify(folder)
    if not args.quiet:
        for line in found.checked:
            say(f"ok       {line}")
        for line in found.notes:
            say(f"note     {line}")
    for line in found.problems:
        say(f"PROBLEM  {line}")
    if not args.quiet or found.problems:
        say(f"{args.name}: {len(found.problems)} problems" if found.problems else f"{args.name}: verified")
    return 1 if found.problems else 0
