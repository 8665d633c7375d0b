"""The run as data and as a few lines: what `hf_prune.json` holds, and the summary that ends the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compress, schema
from . import recipe as recipes
from .card import duration
from .checkpoint import size
from .intervals import percent

if TYPE_CHECKING:
    from .loop import Report
    from .models import Loaded

PACKAGES = (
    "hf-prune torch torchvision transformers timm datasets accelerate evaluate safetensors huggingface_hub".split()
)


def compose(
    loaded: Loaded,
    run: recipes.Run,
    result: Report,
    *,
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    command: str | None,
    compressed: str | None = None,
) -> dict[str, Any]:
    """The mapping of hf_prune.json (docs/hf_prune.json.md).

    calibration: `samples`, `skipped`, and where the images came from. evaluation: of evaluation.py, None if not run.
    command: as typed, without secrets (`spoken`), None when called from Python.
    compressed: "beside" the dense weights or "only", None for dense weights alone.
    """
    disk = loaded.checkpoint_names()
    shapes = {name: list(parameter.shape) for name, parameter in loaded.module.named_parameters()}
    layers = []
    for layer in result.layers:
        name, bracket, rows = layer["name"].partition("[")
        # rows of one parameter (a fused qkv) are layers of their own; the disk knows the parameter
        on_disk = disk.get(name, name) + bracket + rows
        layers.append({**layer, "checkpoint_name": on_disk, "shape": shapes.get(layer["name"], layer["shape"])})
    return {
        "schema_version": schema.VERSION,
        "recipe": recipes.dump(run),
        "model": {
            "source": loaded.source,
            "hub": not loaded.origin.local,
            "revision": loaded.revision,
            "library": loaded.library,
            "architecture": type(loaded.module).__name__,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "license": loaded.license,
            "classes": loaded.num_classes,
            "parameters": sum(p.numel() for p in loaded.module.parameters()),
        },
        "pattern": str(run.recipe.pattern()),
        "seed": run.recipe.seed,
        "versions": versions(),
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "layers": layers,
        "calibration": dict(calibration),
        "evaluation": None if evaluation is None else told(evaluation, loaded.num_classes),
        # where there is no device nothing was measured on it: null, and not 0 bytes
        "resources": {**result.resources, "peak_device_bytes": result.resources["peak_device_bytes"] or None},
        "compressed": _compressed(run, compressed),
        "permutation": result.permutation,
        **({"stages": result.stages} if result.stages else {}),
        **({"distillation": result.distillation} if result.distillation else {}),
    }


def told(evaluation: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    """The evaluation without the top-5 accuracy of a model that has no sixth class to be wrong with."""
    found = dict(evaluation)
    if classes is not None and classes <= 5:
        for side in ("dense", "pruned", "difference"):
            if found.get(side):
                found[side] = found[side] | {"top5": None, "top5_interval": None}
    return found


def _compressed(run: recipes.Run, wanted: str | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    pattern = run.recipe.pattern()
    return {"file": compress.file_name(pattern.n, pattern.m), "only": wanted == "only"}


def versions() -> dict[str, str]:
    """Versions of Python and of every package that has a hand in the numbers; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(report: Mapping[str, Any], folder: str | Path, stored: int, packed: int | None = None) -> str:
    """The end of the command, at most 80 columns wide.  stored: bytes of the weight files.  packed: of the packed one
    beside them."""
    layers = report["layers"]
    pruned = [layer for layer in layers if layer["pattern"]]
    total = sum(layer["total"] for layer in pruned)
    zeros = 100 * (1 - sum(layer["kept"] for layer in pruned) / total) if total else 0.0
    name = Path(report["model"]["source"].rstrip("/")).name
    lines = [
        f"{name}, {report['pattern']}",
        f"{len(pruned)} weights pruned, {len(layers) - len(pruned)} dense; {zeros:.1f} % of {total:,} entries are zero",
        "",
    ]
    lines += _scores(report["evaluation"])
    beside = "" if packed is None else f" ({size(packed)} packed)"
    lines.append(f"{folder}/  {size(stored)} of weights{beside}, {duration(report['resources']['seconds'])} of pruning")
    return "\n".join(lines)


def _scores(evaluation: Mapping[str, Any] | None) -> list[str]:
    """A table of what was measured; 80 columns at most."""
    if evaluation is None:
        return ["Not evaluated.", ""]
    lines = []
    dense, pruned = evaluation.get("dense"), evaluation.get("pruned")
    if dense and pruned:
        lines.append(_row("", "dense", "pruned"))
        for key, words in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
            if dense.get(key) is not None and pruned.get(key) is not None:
                lines.append(_row(words, percent(dense, key), percent(pruned, key)))
    if evaluation.get("agreement") is not None:
        lines.append(_row("same first answer", "", percent(evaluation, "agreement")))
    for key, words in (("logit_error", "relative logit error"), ("representation_error", "representation error")):
        if evaluation.get(key) is not None:
            interval = evaluation.get(f"{key}_interval")
            around = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
            lines.append(_row(words, "", f"{evaluation[key]:.3g}{around}"))
    lines += [f"on {evaluation['samples']} images; in brackets the 95 % interval", ""]
    return lines


def _row(words: str, dense: str, pruned: str) -> str:
    return f"{words:<22}{dense:>26}{pruned:>26}".rstrip()
