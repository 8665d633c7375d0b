"""Linear algebra of the methods: batched over the rows of a layer, no loop over rows or groups."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(h: Tensor, what: str = "the Gram matrix") -> Tensor:
    """Lower factor of h (..., n, n).  Raises ValueError, naming rank and remedy, where h is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(h)
    if bool((info != 0).any()):
        rank = int(torch.linalg.matrix_rank(h.double(), hermitian=True).min())
        raise ValueError(
            f"{what} is singular (rank {rank} of {h.shape[-1]}); give more calibration images or a larger ridge."
        )
    return factor


def inverse_diagonal(h: Tensor) -> Tensor:
    """diag(h⁻¹), (..., n), for positive definite h (..., n, n)."""
    return torch.cholesky_inverse(cholesky(h)).diagonal(dim1=-2, dim2=-1)


def masked_solve(
    h: Tensor,  # (..., n, n) positive definite
    b: Tensor,  # (..., rows, n)
    mask: Tensor,  # (..., rows, n) bool
    start: Tensor | None = None,  # (..., rows, n)
    tolerance: float = 1e-5,
    steps: int = 500,
) -> Tensor:
    """w with w_S = h_SS⁻¹ b_S on each row's support S and zero elsewhere: conjugate gradients on all rows at once.

    One step is one matrix product whatever the supports are.  Preconditioned with the row-masked inverse of h, which
    is h_SS⁻¹ up to a Schur complement and needs about a third of the steps of plain conjugate gradients.  Rows stop
    moving once their residual is below `tolerance` times their right-hand side.
    """
    m = mask.to(b.dtype)
    inverse = torch.cholesky_inverse(cholesky(h))
    target = b * m
    w = torch.zeros_like(b) if start is None else start * m
    r = target - (w @ h) * m
    z = (r @ inverse) * m
    p = z.clone()
    rz = (r * z).sum(-1, keepdim=True)
    limit = (tolerance**2) * target.square().sum(-1, keepdim=True)
    for step in range(steps):
        hp = (p @ h) * m
        curvature = (p * hp).sum(-1, keepdim=True)
        alpha = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        w += alpha * p
        r -= alpha * hp
        if step % 10 == 9 and bool((r.square().sum(-1, keepdim=True) <= limit).all()):
            break
        z = (r @ inverse) * m
        after = (r * z).sum(-1, keepdim=True)
        p = z + torch.where(rz > 0, after / rz, torch.zeros_like(rz)) * p
        rz = after
    return w
