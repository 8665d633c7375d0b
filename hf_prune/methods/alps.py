"""ALPS (Meng, Behdin, Wang and Mazumder, arXiv 2406.07831): the layer-wise problem with its constraint, by ADMM."""

from __future__ import annotations

import torch

from ..linalg import masked_solve
from . import Draft, Problem

EVIDENCE = "gram"


def select(problem: Problem, *, ridge: float = 0.01, penalty: float = 0.1, steps: int = 300, every: int = 3) -> Draft:
    """Algorithm 1: a dense copy fits the output, a sparse one follows the pattern, a growing penalty joins them.

    ridge: share of the mean diagonal added to H.  penalty: of the first step, in units of the normalised H.  steps: at
    most.  every: how often the support is compared and the penalty raised, by how much of it changed.  The weights are
    refit on the final support (the paper's preconditioned conjugate gradients).
    """
    h, b = problem.objective.normal(ridge)
    scale = h.diagonal(dim1=-2, dim2=-1).sqrt()  # inputs brought to one size, as in the paper
    values, vectors = torch.linalg.eigh((h / scale[..., :, None] / scale[..., None, :]).double())
    target = (b / scale[..., None, :]).double()
    pattern, size = problem.pattern, scale[..., None, :].double()
    sparse = problem.weight.double() * size
    dual = torch.zeros_like(sparse)
    rho = penalty
    kept = int(pattern.mask(problem.weight.abs()).sum())
    mask = pattern.mask(problem.weight.abs())
    support = mask
    for step in range(1, steps + 1):
        dense = ((target - dual + rho * sparse) @ vectors) / (values + rho)[..., None, :] @ vectors.mT
        moved = (dense + dual / rho) / size
        mask = pattern.mask(moved.abs())
        sparse = moved * mask * size
        dual = dual + rho * (dense - sparse)
        if step % every == 0:
            changed = float((mask != support).sum()) / max(1, kept)
            if changed == 0:
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            support = mask
    return Draft(masked_solve(h, b, mask, (sparse / size).to(b.dtype)), mask)
