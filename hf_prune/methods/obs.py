"""The Optimal Brain Surgeon score on refit weights: keep the largest w² / [H⁻¹]_jj of each group."""

from __future__ import annotations

from ..linalg import inverse_of
from . import Draft, Problem

EVIDENCE = "gram"


def select(problem: Problem, *, ridge: float = 0.1) -> Draft:
    """Hassibi and Stork (1992), Eq. 5, for the layer-wise objective.

    The weights that are scored are not the dense ones but those that minimise the objective before anything is
    removed: where the input has drifted from the dense network's, they have moved, and scoring the old ones chooses
    worse masks.  ridge: share of the mean diagonal of the Gram matrix.
    """
    h, b = problem.objective.normal(ridge)
    inverse = inverse_of(h)
    weight = b @ inverse
    score = weight.square() / inverse.diagonal(dim1=-2, dim2=-1)[..., None, :]
    mask = problem.pattern.mask(score)
    return Draft(weight * mask, mask)
