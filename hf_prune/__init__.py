"""One-shot pruning of Hugging Face and timm vision models.

    import hf_prune
    report = hf_prune.prune(model, batches, "snows", nm="2:4")   # any nn.Module, in place

`model` is any `torch.nn.Module`; `batches` any iterable of what its forward takes: tensors, mappings of keyword
arguments, or (input, label) pairs of which the input is used. The command `hf-prune` does the same to a checkpoint,
measures the result and describes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .compress import load
    from .loop import Recipe, Report
    from .pattern import Pattern
    from .semi_structured import to_semi_structured

__version__ = "0.1.0"
__all__ = ["Pattern", "Recipe", "Report", "load", "prune", "to_semi_structured", "__version__"]

_HOME = {"Pattern": "pattern", "Recipe": "loop", "Report": "loop", "load": "compress",
         "to_semi_structured": "semi_structured"}  # fmt: skip


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: str | Path | Mapping[str, Any] | Recipe = "snows",
    *,
    progress: Callable[..., None] | None = None,
    **overrides: Any,
) -> Report:
    """Prune `model` in place and return what was done, layer by layer.

    batches: calibration data, on any device; read once or several times, so give a list rather than a generator.
    recipe: a name that ships with hf_prune, a YAML file, a mapping, or a Recipe.
    overrides: keys of the recipe that replace its own, for example `nm="2:4"` or `solve={"ridge": 0.05}`.
    Raises ValueError, in one message, for every unknown or contradictory key before anything is computed, and for
    batches or weights that cannot be used.
    """
    from . import recipe as recipes
    from .loop import prune as run

    return run(model, batches, recipes.load(recipe, **overrides), progress=progress)


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for: `hf-prune --help` does not need it."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
