"""Magnitude pruning: keep the largest |w| of each group."""

from __future__ import annotations

from . import Draft, Problem

EVIDENCE = None


def select(problem: Problem) -> Draft:
    mask = problem.pattern.mask(problem.weight.abs())
    return Draft(problem.weight * mask, mask)
