"""Layer-wise least squares on a given mask: SNOWS (arXiv 2411.18376, Eq. 3) with K = 0, solved exactly."""

from __future__ import annotations

from torch import Tensor

from ..linalg import masked_solve
from . import Draft, Problem

EVIDENCE = "gram"


def solve(problem: Problem, draft: Draft, *, ridge: float = 0.1, tolerance: float = 1e-3) -> Tensor:
    """The kept weights that bring the layer's output closest to its target, (groups, out, in).

    ridge: pull towards the dense weights, as a share of the mean diagonal of the Gram matrix.  With a few hundred
    images it decides the result: an exact fit to them generalises worse.
    """
    h, b = problem.objective.normal(ridge)
    metric = problem.objective.metric
    return masked_solve(h, b, draft.mask, draft.weight, tolerance, metric=None if metric is None else metric[None])
