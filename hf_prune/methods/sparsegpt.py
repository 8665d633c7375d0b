"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774), Algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import cholesky, inverse_of
from ..pattern import Pattern
from . import Draft, Problem

EVIDENCE = "gram"


def select(problem: Problem, *, damp: float = 0.01, block: int = 128) -> Draft:
    """Columns from left to right; the error of each removed weight is pushed onto the columns still to come.

    damp: share of the mean diagonal added to H.  block: columns whose mask is chosen together (unstructured; N:M
    chooses group by group).  Differs from the authors' code in that inputs never seen (H_jj = 0) need no special case,
    and in that a factorisation that fails is an error here, never replaced.
    """
    h, b = problem.objective.normal(damp)
    inverse = inverse_of(h)
    # start from the minimiser of the target chosen by the recipe
    return sweep(b @ inverse if problem.objective.mix else problem.weight, inverse, problem.pattern, block)


def sweep(start: Tensor, inverse: Tensor, pattern: Pattern, block: int = 128) -> Draft:
    """The algorithm itself.  start: (groups, out, in); inverse: H⁻¹, (groups, in, in)."""
    w, n = start.clone(), start.shape[-1]
    upper = cholesky(inverse).mT  # U with H⁻¹ = Uᵀ U
    mask = torch.ones_like(w, dtype=torch.bool)
    if pattern.m:
        block = max(pattern.m, block // pattern.m * pattern.m)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    removed, total = 0, w.numel()
    keep = pattern.group(w)[1] if not pattern.m else 0
    for left in range(0, n, block):
        right = min(left + block, n)
        part = w[..., left:right].clone()
        errors = torch.zeros_like(part)
        u = upper[..., left:right, left:right]
        if not pattern.m:
            score = part.square() / diagonal[..., None, left:right].square()
            if pattern.scope == "row":
                k = max(1, round((right - left) * keep / n))
                top = score.topk(k, dim=-1).indices
                mask[..., left:right] = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True)
            else:
                # the last block takes what rounding left over, so that the layer keeps exactly `keep` weights
                gone = round((total - keep) * right / n) - removed
                flat = score.flatten()
                out = flat.topk(gone, largest=False).indices if gone else flat.new_zeros(0, dtype=torch.long)
                mask[..., left:right] = (
                    torch.ones_like(flat, dtype=torch.bool).index_fill_(0, out, False).view_as(score)
                )
                removed += gone
        for c in range(right - left):
            if pattern.m and c % pattern.m == 0:
                score = (
                    part[..., c : c + pattern.m].square()
                    / diagonal[..., None, left + c : left + c + pattern.m].square()
                )
                mask[..., left + c : left + c + pattern.m] = pattern.mask(score)
            column = part[..., c]
            error = column * ~mask[..., left + c] / u[..., c, c, None]
            part[..., c:] -= error[..., :, None] * u[..., None, c, c:]
            errors[..., c] = error
        w[..., left:right] = part * mask[..., left:right]
        w[..., right:] -= errors @ upper[..., left:right, right:]
    if not pattern.m and pattern.scope == "row" and keep != int(mask[0, 0].sum()):
        mask = pattern.mask(torch.where(mask, w.abs(), torch.zeros_like(w)))  # rounding per block kept a few too many
    return Draft(w * mask, mask)
