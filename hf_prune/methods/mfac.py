"""M-FAC (Frantar, Kurtic and Alistarh, arXiv 2107.03356): products with the inverse Fisher matrix, never the matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..linalg import cholesky
from . import Draft, Problem

EVIDENCE = "fisher"


def select(problem: Problem, *, ridge: float = 1e-4, block: int | str | None = None, update: float = 1.0) -> Draft:
    """The score and the update of WoodFisher; memory O(np), time O(n²p), whatever the size of a block.

    ridge: λ.  block: what is coupled, null for everything.  With K = nλI + AAᵀ = L Lᵀ the inverse is
    F⁻¹x = (x - Aᵀ K⁻¹ A x) / λ and its diagonal (1 - ‖L⁻¹a_i‖²) / λ: the authors' recursion over gradients
    (Algorithm 1) computes the same factor row by row.
    """
    fisher, weight = replace(problem.objective, ridge=ridge), problem.weight
    blocks = fisher.blocks(block)
    everything = torch.ones_like(weight, dtype=torch.bool)
    diagonal = torch.cat([(1 - fisher.leverage(everything, where)).clamp_min(1e-12) / ridge for where in blocks])
    mask = problem.pattern.mask((weight.double().square() / diagonal).to(weight.dtype))
    push = torch.where(mask, 0.0, weight.double() / diagonal)
    moved = []
    for where in blocks:
        factor = cholesky(fisher.kernel(everything, where), "the Fisher kernel")
        tiles = list(fisher.tiles(where))  # in float64 throughout: the difference below is small beside its terms
        product = torch.stack([fisher.tile(t) @ push[t] for t in tiles]).sum(0)
        v = torch.cholesky_solve(product[:, None], factor)[:, 0]
        moved.append((push[where] - torch.cat([v @ fisher.tile(t) for t in tiles])) / ridge)
    return Draft((weight - update * torch.cat(moved).to(weight.dtype)) * mask, mask)
