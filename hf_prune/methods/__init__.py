"""One file per paper.  A method is a pure function over tensors.

`select(problem, **options) -> Draft` chooses which weights stay; `solve(problem, draft, **options) -> Tensor` refits
them.  Any mask goes with any solve.  `EVIDENCE` in each file says what `problem.objective` must
be: None, "gram" or "window".
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..pattern import Pattern


class Problem(NamedTuple):
    """Weights, the pattern they must follow, and the evidence.

    One layer: weight (groups, out, in), dense.  A window over several layers: weight (entries,), and no one pattern.
    objective: what EVIDENCE names (objective.Gram or window.Window); None where nothing is needed.
    """

    weight: Tensor
    pattern: Pattern
    objective: Any


class Draft(NamedTuple):
    """A support and weights on it: weight is zero where mask (bool, True = kept) is False."""

    weight: Tensor
    mask: Tensor


MASKS = (
    "magnitude", "wanda", "obs", "sparsegpt", "chita", "obd", "woodfisher", "mfac", "cbs", "alps", "obc", "exchange",
)  # fmt: skip
# each row of a layer is a problem of its own, so that processes may divide them
ROWS_APART = {"magnitude", "wanda", "obs", "sparsegpt", "obc", "least_squares"}
SOLVES = ("least_squares", "snows", "chita")


def function(kind: str, name: str) -> Callable[..., Any]:
    """kind: "select" or "solve".  Raises ValueError for a name that has none."""
    names = MASKS if kind == "select" else SOLVES
    if name not in names:
        raise ValueError(f"no such method: {name}. Choose one of {', '.join(names)}.")
    return getattr(importlib.import_module(f"{__name__}.{name}"), kind)


def options(kind: str, name: str) -> dict[str, Any]:
    """The options of a method with their defaults: the keyword arguments of its function."""
    parameters = inspect.signature(function(kind, name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def evidence(name: str) -> str | None:
    return importlib.import_module(f"{__name__}.{name}").EVIDENCE
