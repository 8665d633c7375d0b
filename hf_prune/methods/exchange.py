"""Masks by local search: SparseGPT's mask, then exchanges of weights, each round with all kept weights refit.

A score computed once sees every removal as if it were the only one.  SparseGPT's sweep sees those to its left; here
every kept weight has its cost and every removed one its gain beside all the others, again after each round.  The idea
is that of CHITA's and CBS's swaps (arXiv 2302.14623, 2203.04466) on the layer-wise objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import inverse_of, masked_solve
from ..pattern import Pattern
from . import Draft, Problem, sparsegpt

EVIDENCE = "gram"


ROUNDS, MORE = 4, 12  # N:M groups hold few exchanges each; a layer with one budget goes on improving


def select(
    problem: Problem, *, ridge: float = 0.1, rounds: int | None = None, share: float = 0.25, steps: int = 5
) -> Draft:
    """A mask under which the refit objective is never higher than under SparseGPT's, up to how far solves go.

    A kept weight w_j costs w_j² / [H⁻¹]_jj to remove, a removed one whose half gradient is g_j gains g_j² [H⁻¹]_jj (OBS
    with the inverse of the whole H in place of each row's own: too low a cost, too high a gain, so that only the best
    exchanges are tried together and a row, or the layer where it has one budget, keeps its mask unless it improves).

    ridge: share of the mean diagonal of the Gram matrix.  rounds: of exchanges, with one refit each; None: 4, or 12
    where the layer has one budget.  share: of the promising exchanges, how many a round makes; halved where it failed.
    steps: of conjugate gradients in between, always as many, so that no row's mask depends on the rows beside it.
    """
    h, b = problem.objective.normal(ridge)
    inverse = inverse_of(h)
    free = b @ inverse  # the optimum with nothing removed
    scale = inverse.diagonal(dim1=-2, dim2=-1)[..., None, :]
    pattern = problem.pattern

    def solved(mask: Tensor, start: Tensor) -> Tensor:
        return masked_solve(h, b, mask, start, 0.0, steps, inverse=inverse)

    def excess(w: Tensor) -> Tensor:
        step = w - free
        rows = (step @ h * step).sum(-1, keepdim=True)
        return rows if pattern.by_row else rows.sum().view(1, 1, 1)

    mask = sparsegpt.sweep(free, inverse, pattern).mask
    weight = solved(mask, free)
    now = excess(weight)
    shares = torch.full_like(now, share)
    if rounds is None:
        rounds = ROUNDS if pattern.by_row else MORE
    for _ in range(rounds):
        score = torch.where(mask, weight.square() / scale, (b - weight @ h).square() * scale)
        tried = exchanged(mask, score, pattern, shares.flatten())
        moved = solved(tried, weight)
        after = excess(moved)
        better = after < now
        mask, weight = torch.where(better, tried, mask), torch.where(better, moved, weight)
        now, shares = torch.where(better, after, now), torch.where(better, shares, shares / 2)
    return Draft(weight, mask)


def exchanged(mask: Tensor, score: Tensor, pattern: Pattern, shares: Tensor) -> Tensor:
    """The mask after some exchanges inside the pattern's groups: those that promise most.

    mask, score: (groups, out, in); score is what a weight is worth, kept or not.  shares: (problems,), how many of the
    exchanges that promise anything each problem, a row or the whole layer, makes; at least one.
    """
    size, keep = pattern.group(score)
    pairs = min(keep, size - keep)
    kept, values = (t.reshape(len(shares), -1, size) for t in (mask, score))
    leave = torch.where(kept, values, torch.inf).topk(pairs, largest=False)
    enter = torch.where(kept, -torch.inf, values).topk(pairs)
    gain = (enter.values - leave.values).flatten(1)  # the best that is out against the least that is in, and so on
    count = ((gain > 0).sum(1) * shares).ceil()
    rank = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    take = (rank < count[:, None]).view(leave.values.shape)
    new = kept.scatter(2, leave.indices, ~take)
    return new.scatter_(2, enter.indices, take).view_as(mask)
