"""Combinatorial Brain Surgeon (Yu, Serra, Ramalingam and Zhe, arXiv 2203.04466): which weights to remove together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..fisher import Fisher
from ..joined import Joined
from . import Draft, Problem

EVIDENCE = "fisher"


def select(
    problem: Problem,
    *,
    ridge: float = 1e-4,
    block: int | str | None = None,
    swaps: int = 50,
    batch: int = 64,
    update: bool = True,
) -> Draft:
    """CBS-S, then CBS-U.

    Selection: the removed set Q that minimises ½ w_Qᵀ F w_Q (nothing else moves), from magnitude pruning by at most
    `swaps` rounds of exchanging up to `batch` weights at once, each round accepted only if the objective falls, so that
    the result is never worse than its start.  update: then the other weights make good for all of Q together, which
    is the back-solve of CHITA; ridge and block are its.

    Differs from the authors' code, which tries pairs one by one: here the gains of all single moves come from two
    products with A, the best of each group are exchanged together, and fewer after a rejection.
    """
    fisher: Fisher = replace(problem.objective, ridge=ridge, first=0.0)
    pattern, weight = problem.pattern, problem.weight
    mask = pattern.mask(weight.abs())
    assert isinstance(pattern, Joined)
    cells = pattern.cells().to(weight.device)
    squares = (fisher.squares().double() / fisher.n + ridge) * weight.double().square()
    value = damage(fisher, mask)
    count = batch
    for _ in range(swaps):
        pulled = fisher.back(fisher.times(weight * ~mask)).double() / fisher.n  # (F w_Q) without the ridge
        cross = weight.double() * (pulled + ridge * (weight * ~mask).double())
        leave = torch.where(mask, cross + 0.5 * squares, torch.inf)  # rise if a kept weight joins Q
        enter = torch.where(mask, -torch.inf, cross - 0.5 * squares)  # fall if a removed one comes back
        out_, in_ = pairs(leave, enter, cells, count)
        if not len(out_):
            break
        trial = mask.clone()
        trial[out_], trial[in_] = False, True
        after = damage(fisher, trial)
        if after < value:
            mask, value = trial, after
        elif count == 1:
            break
        else:
            count = max(1, count // 4)
    return Draft(fisher.refit_blocks(mask, block) if update else weight * mask, mask)


def damage(fisher: Fisher, mask: Tensor) -> float:
    """½ w_Qᵀ (AᵀA/n + λI) w_Q for the removed set Q, with the ridge in `fisher`."""
    gone = fisher.weight * ~mask
    moved = fisher.times(gone).double().square().sum() / fisher.n
    return float(0.5 * moved + 0.5 * fisher.ridge * gone.double().square().sum())


def pairs(leave: Tensor, enter: Tensor, cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` exchanges within groups that promise a fall: indices that leave and that enter.

    leave, enter: (p,) cost of removing, gain of restoring; cells: (p,) group of each weight.  Groups that are alone
    exchange several pairs in the order of promise; of many small groups each exchanges its best pair.
    """
    groups = int(cells[-1]) + 1
    if groups == 1:
        k = min(count, int(leave.isfinite().sum()), int(enter.isfinite().sum()))
        low, out_ = leave.topk(k, largest=False)
        high, in_ = enter.topk(k)
        good = high > low
        return out_[good], in_[good]
    low = leave.new_full((groups,), torch.inf).scatter_reduce(0, cells, leave, "amin")
    high = enter.new_full((groups,), -torch.inf).scatter_reduce(0, cells, enter, "amax")
    promise = torch.where(low.isfinite() & high.isfinite(), high - low, -torch.inf)
    best = promise.topk(min(count, groups)).indices
    best = best[promise[best] > 0]
    index = torch.arange(len(cells), device=cells.device)
    none = index.new_full((groups,), len(cells))
    first_out = none.scatter_reduce(0, cells, torch.where(leave == low[cells], index, len(cells)), "amin")
    first_in = none.scatter_reduce(0, cells, torch.where(enter == high[cells], index, len(cells)), "amin")
    return first_out[best], first_in[best]
