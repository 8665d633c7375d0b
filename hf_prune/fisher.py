"""The loss around the present weights, from its gradients: what WoodFisher, M-FAC, CBS and CHITA share.

Q(w) = ½ ‖A (w - w̄) + e‖² + ½ n λ ‖w - w̄‖², with A (n, p) the gradients of n images (or minibatches) at w̄.  With
b = A w̄ - e the first term is the ½ ‖b - A w‖² of Benbaki et al. (arXiv 2302.14623, Eq. 4).  AᵀA / n is the empirical
Fisher matrix; it is never formed, only n x n systems are, in float64.

The rows of A may lie on several processes.  Then `rows` and `total` say how they come together: A v and the columns
of A are gathered, Aᵀ r is summed, and every process ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linalg import cholesky

TILE = 8192  # weights whose gradients are turned to float64 at a time


@dataclass
class Fisher:
    """All weights are flat vectors (p,): the canonical views of the layers one after another."""

    grads: Tensor  # A (n, p), or this process's share of its rows
    weight: Tensor  # w̄ (p,)
    sizes: list[int] = field(default_factory=list)  # weights per layer; empty: one layer
    first: float | Tensor = 0.0  # e, the same in every row or (n,); 0 leaves the first-order term out (OBS assumption)
    ridge: float = 1e-3  # λ
    rows: Callable[[Tensor], Tensor] = lambda part: part  # (share of n, ...) -> (n, ...), the shares of all processes
    total: Callable[[Tensor], Tensor] = lambda part: part  # the sum of a tensor over all processes
    start: int = 0  # where this process's share begins among the n rows
    n: int = 0  # rows on all processes; 0: all are here
    known: tuple[slice, Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # of `factor`

    def __post_init__(self) -> None:
        self.n = self.n or self.grads.shape[0]
        if not self.sizes:
            self.sizes = [self.weight.numel()]
        assert self.grads.shape[1] == self.weight.numel() == sum(self.sizes)

    def residual(self, w: Tensor) -> Tensor:
        """A (w - w̄) + e, (n,)."""
        return self.times(w - self.weight) + self.first

    def times(self, v: Tensor, where: slice | None = None) -> Tensor:
        """A v, (n,) or (n, columns of v); with `where`, over the weights of a block, which v (block, ...) holds."""
        return self.rows(self.columns(where) @ v.to(self.grads.dtype))

    def back(self, r: Tensor, where: slice | None = None) -> Tensor:
        """Aᵀ r, (p,) or (block,), from r (n,)."""
        mine = r[self.start : self.start + len(self.grads)]
        return self.total(mine.to(self.grads.dtype) @ self.columns(where))

    def columns(self, where: slice | None) -> Tensor:
        """This process's rows of the columns of a block."""
        return self.grads if where is None else self.grads[:, where]

    def tile(self, where: slice) -> Tensor:
        """Columns of A, all rows: (n, columns) float64."""
        return self.rows(self.grads[:, where]).double()

    def squares(self) -> Tensor:
        """Σ over the rows of each entry's square, (p,): n times the diagonal of the empirical Fisher matrix."""
        return self.total(self.grads.square().sum(0))

    def inner(self, where: slice, mask: Tensor | None = None) -> Tensor:
        """AᵀA of the columns of a block, or of those that its `mask` keeps: float64, summed over rows."""
        a = self.grads[:, where] if mask is None else self.grads[:, where][:, mask]
        a = a.double()
        return self.total(a.mT @ a)

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
            part = self.rows(self.grads[:, tile][:, mask[tile]]).double()
            k.addmm_(part, part.mT)
        k.diagonal().add_(self.n * self.ridge)
        return k

    def factor(self, mask: Tensor, where: slice) -> Tensor:
        """Cholesky factor of the kernel; the last one is remembered, since a refit and the costs after it share it."""
        if self.known is None or self.known[0] != where or not torch.equal(self.known[1], mask[where]):
            self.known = (where, mask[where].clone(), cholesky(self.kernel(mask, where), "the Fisher kernel"))
        return self.known[2]

    def refit(self, mask: Tensor, where: slice | None = None) -> Tensor:
        """The w that minimises Q with w = 0 off the mask, over one block and with the others at w̄: (block,).

        With P the removed weights, v = (n λ I + A_S A_Sᵀ)⁻¹ (A_P w̄_P - e) and w_S = w̄_S + A_Sᵀ v.  The form that the
        authors' code uses subtracts large numbers and needs a larger ridge in float32; this one does not.
        """
        where = where or slice(0, self.weight.numel())
        weight, mask_ = self.weight[where], mask[where]
        removed = weight * ~mask_
        kept = int(mask_.sum())
        if kept == 0 or not bool(removed.any() or torch.as_tensor(self.first).any()):
            return weight * mask_
        target = self.times(removed, where).double() - self.first
        if kept < self.n:  # fewer weights than rows: the primal system is smaller
            h = self.inner(where, mask_)
            h.diagonal().add_(self.n * self.ridge)
            mine = target[self.start : self.start + len(self.grads)]
            pull = self.total(self.grads[:, where][:, mask_].double().mT @ mine)
            step = torch.cholesky_solve(pull[:, None], cholesky(h, "the Fisher matrix"))[:, 0]
            new = torch.zeros_like(weight)
            new[mask_] = (weight[mask_].double() + step).to(weight.dtype)
            return new
        v = torch.cholesky_solve(target[:, None], self.factor(mask, where))[:, 0]
        return (weight + self.back(v, where).to(weight.dtype)) * mask_

    def leverage(self, mask: Tensor, where: slice | None = None, of: Tensor | None = None) -> Tensor:
        """q_i = a_iᵀ (n λ I + A_S A_Sᵀ)⁻¹ a_i, float64, for every weight of the block, or those in the mask `of` alone.

        They are the column norms of L⁻¹ A with L Lᵀ the kernel, and λ [F⁻¹]_ii = 1 - q_i for F = A_SᵀA_S / n + λ I.
        """
        where = where or slice(0, self.weight.numel())
        factor = self.factor(mask, where)
        # the small inverse times everything beats a triangular solve by a factor, and L is well conditioned in float64
        eye = torch.eye(self.n, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        found = []
        for tile in self.tiles(where):
            a = self.grads[:, tile] if of is None else self.grads[:, tile][:, of[tile]]
            found.append((inverse @ self.rows(a).double()).square().sum(0))
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
