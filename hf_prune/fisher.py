"""The loss around the present weights, from its gradients: what WoodFisher, M-FAC, CBS and CHITA share.

Q(w) = ½ ‖A (w - w̄) + e‖² + ½ n λ ‖w - w̄‖², with A (n, p) the gradients of n images (or minibatches) at w̄.  With
b = A w̄ - e the first term is the ½ ‖b - A w‖² of Benbaki et al. (arXiv 2302.14623, Eq. 4).  AᵀA / n is the empirical
Fisher matrix; it is never formed, only n x n systems are, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linalg import cholesky

TILE = 8192  # weights whose gradients are turned to float64 at a time


@dataclass
class Fisher:
    """All weights are flat vectors (p,): the canonical views of the layers one after another."""

    grads: Tensor  # A (n, p)
    weight: Tensor  # w̄ (p,)
    sizes: list[int] = field(default_factory=list)  # weights per layer; empty: one layer
    first: float = 0.0  # e = first in every row; 0 leaves the first-order term out (the OBS assumption)
    ridge: float = 1e-3  # λ

    @property
    def n(self) -> int:
        return self.grads.shape[0]

    def __post_init__(self) -> None:
        if not self.sizes:
            self.sizes = [self.weight.numel()]
        assert self.grads.shape[1] == self.weight.numel() == sum(self.sizes)

    def residual(self, w: Tensor) -> Tensor:
        """A (w - w̄) + e, (n,)."""
        return self.times(w - self.weight) + self.first

    def times(self, v: Tensor) -> Tensor:
        """A v, (n,)."""
        return self.grads @ v.to(self.grads.dtype)

    def back(self, r: Tensor) -> Tensor:
        """Aᵀ r, (p,)."""
        return r.to(self.grads.dtype) @ self.grads

    def value(self, w: Tensor) -> Tensor:
        d = w - self.weight
        return 0.5 * self.residual(w).double().square().sum() + 0.5 * self.n * self.ridge * d.double().square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        return self.back(self.residual(w)) + self.n * self.ridge * (w - self.weight)

    def product(self, w: Tensor, v: Tensor) -> Tensor:
        return self.back(self.times(v)) + self.n * self.ridge * v

    def tiles(self, where: slice) -> Iterator[slice]:
        for left in range(where.start, where.stop, TILE):
            yield slice(left, min(left + TILE, where.stop))

    def kernel(self, mask: Tensor, where: slice | None = None) -> Tensor:
        """n λ I + A_S A_Sᵀ over the kept weights S of a block, (n, n) float64."""
        where = where or slice(0, self.weight.numel())
        k = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.grads.device)
        for tile in self.tiles(where):
            part = self.grads[:, tile][:, mask[tile]].double()
            k.addmm_(part, part.mT)
        k.diagonal().add_(self.n * self.ridge)
        return k

    def refit(self, mask: Tensor, where: slice | None = None) -> Tensor:
        """The w that minimises Q with w = 0 off the mask, over one block and with the others at w̄: (block,).

        With P the removed weights, v = (n λ I + A_S A_Sᵀ)⁻¹ (A_P w̄_P - e) and w_S = w̄_S + A_Sᵀ v.  The form that the
        authors' code uses subtracts large numbers and needs a larger ridge in float32; this one does not.
        """
        where = where or slice(0, self.weight.numel())
        weight, mask_, grads = self.weight[where], mask[where], self.grads[:, where]
        removed = (weight * ~mask_).to(grads.dtype)
        kept = int(mask_.sum())
        if kept == 0 or not bool(removed.any() or self.first):
            return weight * mask_
        target = (grads @ removed).double() - self.first
        if kept < self.n:  # fewer weights than rows: the primal system is smaller
            a = grads[:, mask_].double()
            h = a.mT @ a
            h.diagonal().add_(self.n * self.ridge)
            step = torch.cholesky_solve((a.mT @ target)[:, None], cholesky(h, "the Fisher matrix"))[:, 0]
            new = torch.zeros_like(weight)
            new[mask_] = (weight[mask_].double() + step).to(weight.dtype)
            return new
        v = torch.cholesky_solve(target[:, None], cholesky(self.kernel(mask, where), "the Fisher kernel"))[:, 0]
        return (weight + (v.to(grads.dtype) @ grads).to(weight.dtype)) * mask_

    def leverage(self, mask: Tensor, where: slice | None = None, of: Tensor | None = None) -> Tensor:
        """q_i = a_iᵀ (n λ I + A_S A_Sᵀ)⁻¹ a_i, float64, for every weight of the block, or those in the mask `of` alone.

        They are the column norms of L⁻¹ A with L Lᵀ the kernel, and λ [F⁻¹]_ii = 1 - q_i for F = A_SᵀA_S / n + λ I.
        """
        where = where or slice(0, self.weight.numel())
        factor = cholesky(self.kernel(mask, where), "the Fisher kernel")
        # the small inverse times everything beats a triangular solve by a factor, and L is well conditioned in float64
        eye = torch.eye(self.n, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        found = []
        for tile in self.tiles(where):
            a = self.grads[:, tile] if of is None else self.grads[:, tile][:, of[tile]]
            found.append((inverse @ a.double()).square().sum(0))
        return torch.cat(found)

    def blocks(self, block: int | str | None) -> list[slice]:
        """What is coupled with what: None everything, "layer" the weights of a layer, a number about so many of them.

        Blocks never cross layers; the last one of a layer takes what is left over, as in the authors' code.
        Raises ValueError for anything else.
        """
        total = self.weight.numel()
        if block is None:
            return [slice(0, total)]
        if block != "layer" and (not isinstance(block, int) or block < 1):
            raise ValueError(f"block {block}: expected a number of weights, `layer`, or null for the whole model.")
        found, start = [], 0
        for size in self.sizes:
            count = 1 if block == "layer" else max(1, size // int(block))
            stride = size // count
            edges = [start + i * stride for i in range(count)] + [start + size]
            found += [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
            start += size
        return found

    def refit_blocks(self, mask: Tensor, block: int | str | None) -> Tensor:
        return torch.cat([self.refit(mask, where) for where in self.blocks(block)])
