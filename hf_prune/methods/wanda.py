"""Wanda (Sun et al., arXiv 2306.11695): keep the largest |w_ij| * ||x_j||, no update of the kept weights."""

from __future__ import annotations

from . import Draft, Problem

EVIDENCE = "gram"


def select(problem: Problem) -> Draft:
    """Scores of one row are comparable with each other; unstructured recipes therefore use `scope: row`."""
    norms = problem.objective.xx.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (groups, in)
    mask = problem.pattern.mask(problem.weight.abs() * norms[..., None, :])
    return Draft(problem.weight * mask, mask)
