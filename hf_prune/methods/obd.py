"""Optimal Brain Damage (LeCun, Denker and Solla, 1989): keep the largest w² h of each group, change none."""

from __future__ import annotations

from . import Draft, Problem

EVIDENCE = "fisher"


def select(problem: Problem) -> Draft:
    """h_ii is the diagonal of the empirical Fisher matrix instead of the Hessian's, so that it is never negative."""
    fisher = problem.objective
    curvature = fisher.squares() / fisher.n
    mask = problem.pattern.mask(problem.weight.square() * curvature.to(problem.weight.dtype))
    return Draft(problem.weight * mask, mask)
