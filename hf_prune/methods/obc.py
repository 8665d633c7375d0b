"""Optimal Brain Compression / ExactOBS (Frantar, Singh and Alistarh, arXiv 2208.11580), Algorithm 1 and Section 4."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import inverse_of, masked_solve
from . import Draft, Problem

EVIDENCE = "gram"


def select(problem: Problem, *, ridge: float = 0.01, rows: int = 64) -> Draft:
    """Remove one weight at a time from each row, always the one that costs least, the others making good for it.

    ridge: share of the mean diagonal added to H.  rows: how many rows run together; memory is rows · in².
    Unstructured: every row is taken to its end, the increments of the loss are ranked over the layer, and each row
    keeps what its share of the ranking leaves.  N:M: a group that has lost M - N weights is closed.

    Differs from the authors' code: the weights of the final mask come from one exact solve per row, which gives what
    following the recursion gives, without keeping its traces.
    """
    w, pattern = problem.weight, problem.pattern
    h, b = problem.objective.normal(ridge)
    inverse = inverse_of(h.double())  # (groups, in, in)
    best = b.double() @ inverse  # the minimiser before anything is removed; w itself where the target is the cascade
    groups, out, n = w.shape
    per_row = n - pattern.group(w)[1] if not pattern.m and pattern.scope == "row" else n
    steps = n // pattern.m * (pattern.m - pattern.n) if pattern.m else per_row
    order = torch.empty(groups, out, steps, dtype=torch.long, device=w.device)
    loss = torch.empty(groups, out, steps, dtype=torch.float64, device=w.device)
    for g in range(groups):
        for left in range(0, out, rows):
            part = slice(left, min(left + rows, out))
            order[g, part], loss[g, part] = sweep(best[g, part], inverse[g], steps, pattern.m, pattern.n)
    mask = torch.ones_like(w, dtype=torch.bool)
    if pattern.by_row:
        mask.scatter_(-1, order, False)
    else:
        # a row's k-th removal comes after its first k - 1: the running maximum keeps that order in the ranking, and
        # ties go to the earlier step
        steps_ = torch.arange(n, device=w.device).expand_as(order)
        step_of = torch.zeros_like(order).scatter_(-1, order, steps_).flatten()
        score = torch.zeros_like(loss).scatter_(-1, order, loss.cummax(-1).values).flatten()
        by_step = step_of.argsort(stable=True)
        ranked = by_step[score[by_step].argsort(stable=True)]
        mask = pattern.mask(ranked.argsort().double().view_as(w))
    return Draft(masked_solve(h, b, mask), mask)


def sweep(w: Tensor, inverse: Tensor, steps: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """(order, loss), each (rows, steps): which column each row removes at each step and what that adds to its loss.

    w (rows, in), inverse (in, in) the inverse of H, shared by the rows at the start.
    """
    rows, size = w.shape
    w, hinv = w.clone(), inverse.expand(rows, size, size).clone()
    alive = torch.ones(rows, size, dtype=torch.bool, device=w.device)
    order = torch.empty(rows, steps, dtype=torch.long, device=w.device)
    loss = torch.empty(rows, steps, dtype=w.dtype, device=w.device)
    every = torch.arange(rows, device=w.device)
    for step in range(steps):
        open_ = alive
        if m:
            lost = (~alive).view(rows, -1, m).sum(-1) < m - n
            open_ = alive & lost.repeat_interleave(m, dim=1)
        diagonal = hinv.diagonal(dim1=-2, dim2=-1)
        score = torch.where(open_, w.square() / diagonal.clamp_min(1e-300), torch.inf)
        loss[:, step], at = score.min(-1)
        order[:, step] = at
        column = hinv[every, :, at]  # (rows, in)
        pivot = column.gather(1, at[:, None])
        w -= column * (w.gather(1, at[:, None]) / pivot)
        hinv.baddbmm_((column / pivot)[:, :, None], column[:, None, :], alpha=-1)
        alive[every, at] = False
        w[~alive] = 0
    return order, loss
