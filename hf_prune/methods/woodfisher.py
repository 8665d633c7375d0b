"""WoodFisher (Singh and Alistarh, arXiv 2004.14340): the OBS score from blocks of the inverse Fisher matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import inverse_of
from . import Draft, Problem

EVIDENCE = "fisher"


def select(problem: Problem, *, ridge: float = 1e-4, block: int | str | None = 500, update: float = 1.0) -> Draft:
    """Score w² / [F⁻¹]_ii, ranked over all blocks ("joint"); then the sum of the single-weight moves, Eqs. 7 and 13.

    ridge: λ in F = AᵀA/n + λI.  block: weights coupled, at most a few thousand, since each block is inverted; see
    `Fisher.blocks`.  update: share of the moves that is made (the authors use 0.9 on MobileNet).  The inverse of a
    block comes from one Cholesky factor, where the authors add one sample after the other.
    """
    fisher = problem.objective
    diagonal = torch.empty_like(problem.weight, dtype=torch.float64)
    inverses: list[Tensor] = []
    blocks = fisher.blocks(block)
    total = sum((b.stop - b.start) ** 2 for b in blocks)
    if total > 2e9:
        raise ValueError(
            f"woodfisher.block {block}: the inverses would hold {total:.3g} numbers. Use smaller blocks, or mfac."
        )
    for where in blocks:
        h = fisher.inner(where) / fisher.n
        h.diagonal().add_(ridge)
        inverse = inverse_of(h, "a Fisher block")
        diagonal[where] = inverse.diagonal()
        inverses.append(inverse.to(problem.weight.dtype))
    mask = problem.pattern.mask((problem.weight.double().square() / diagonal).to(problem.weight.dtype))
    push = torch.where(mask, 0.0, problem.weight.double() / diagonal).to(problem.weight.dtype)
    moved = torch.cat([inverse @ push[where] for inverse, where in zip(inverses, blocks, strict=True)])
    return Draft((problem.weight - update * moved) * mask, mask)
