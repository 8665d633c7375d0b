"""The run as data and as a few lines: what `hf_prune.json` holds, and the summary that ends the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recipe as recipes
from . import schema
from .card import duration
from .checkpoint import size

if TYPE_CHECKING:
    from .models import Loaded
    from .prune import Report

PACKAGES = "hf-prune torch torchvision transformers timm datasets accelerate evaluate safetensors huggingface_hub".split()
BAR = 80


def compose(
    loaded: Loaded,
    run: recipes.Run,
    result: Report,
    *,
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    command: str | None,
) -> dict[str, Any]:
    """The mapping of hf_prune.json (docs/hf_prune.json.md).

    calibration: `samples`, `skipped`, and where the images came from. evaluation: of evaluation.py, None if not run.
    command: as typed, without secrets (`spoken`), None when called from Python.
    """
    disk = loaded.checkpoint_names()
    layers = []
    for layer in result.layers:
        name, bracket, rows = layer["name"].partition("[")
        # rows of one parameter (a fused qkv) are layers of their own; the disk knows the parameter
        layers.append({**layer, "checkpoint_name": disk.get(name, name) + bracket + rows})
    return {
        "schema_version": schema.VERSION,
        "recipe": recipes.dump(run),
        "model": {
            "source": loaded.source,
            "hub": not Path(loaded.source).exists(),
            "revision": loaded.revision,
            "library": loaded.library,
            "architecture": type(loaded.module).__name__,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "license": loaded.license,
            "classes": len(loaded.labels) if loaded.labels else None,
            "parameters": sum(p.numel() for p in loaded.module.parameters()),
        },
        "pattern": str(run.recipe.pattern()),
        "seed": run.recipe.seed,
        "versions": versions(),
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "layers": layers,
        "calibration": dict(calibration),
        "evaluation": None if evaluation is None else dict(evaluation),
        "resources": dict(result.resources),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of every package that has a hand in the numbers; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(report: Mapping[str, Any], folder: str | Path, stored: int) -> str:
    """The end of the command, at most 80 columns wide.  stored: bytes of the weight files."""
    layers = report["layers"]
    pruned = [layer for layer in layers if layer["pattern"]]
    total = sum(layer["total"] for layer in pruned)
    zeros = 100 * (1 - sum(layer["kept"] for layer in pruned) / total) if total else 0.0
    name = Path(report["model"]["source"].rstrip("/")).name
    lines = [
        f"{name}, {report['pattern']}: {len(pruned)} weights pruned, {len(layers) - len(pruned)} dense; "
        f"{zeros:.1f} % of {total:,} entries are zero",
        "",
    ]
    lines += _scores(report["evaluation"])
    lines += [f"{folder}  ({size(stored)}, {duration(report['resources']['seconds'])} of pruning)"]
    return "\n".join(lines)


def _scores(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["not evaluated (--no-eval)", ""]
    lines = []
    dense, pruned = evaluation.get("dense"), evaluation.get("pruned")
    if dense and pruned:
        lines.append(f"{'':<24}{'dense':>22}{'pruned':>22}")
        for key, words in (("top1", "top-1"), ("top5", "top-5")):
            if dense.get(key) is not None and pruned.get(key) is not None:
                lines.append(f"{words:<24}{_score(dense, key):>22}{_score(pruned, key):>22}")
    if evaluation.get("agreement") is not None:
        lines.append(f"{'agrees with dense':<24}{'':>22}{_score(evaluation, 'agreement'):>22}")
    if evaluation.get("logit_error") is not None:
        what = "relative logit error" if dense else "representation error"
        lines.append(f"{what:<24}{'':>22}{evaluation['logit_error']:>22.4f}")
    lines += [f"on {evaluation['samples']} images; in brackets the 95 % interval", ""]
    return lines


def _score(scores: Mapping[str, Any], key: str) -> str:
    interval = scores.get(f"{key}_interval")
    around = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * scores[key]:.1f} %{around}"
