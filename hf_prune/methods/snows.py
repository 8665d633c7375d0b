"""SNOWS (Lucas and Mazumder, arXiv 2411.18376): K-step reconstruction by Newton-CG on the kept weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Draft, Problem

EVIDENCE = "window"


def solve(
    problem: Problem,
    draft: Draft,
    *,
    k: int | None = 3,
    curvature: str = "gauss-newton",
    relative: bool = True,
    mix: float | None = None,
    images: int = 128,
    passes: int = 1,
    cg: int = 10,
    damping: float = 1e-3,
    tolerance: float = 1e-2,
    armijo: float = 1e-5,
    shrink: float = 0.5,
) -> Tensor:
    """Algorithm 1 of the paper on the window `problem.objective`: one truncated Newton step per minibatch.

    k: operations after the layer that are matched, None for the output of the block (Eq. 3).  curvature: the exact
    `hessian` or `gauss-newton`.  relative: terms divided by the energy of their target, damping and tolerance relative
    to the curvature along the gradient and to its norm; otherwise all three are absolute, as in the authors' code.
    images: size of a minibatch.  passes: over all minibatches.  cg: most products per step.  armijo, shrink: a step is
    shortened until images that are not in it confirm the decrease; a step that never does is dropped.

    Differs from the authors' code: products are not split over chunks of the weights (which drops the curvature
    between them), and a direction of negative curvature ends the inner iteration.
    """
    objective: Any = problem.objective
    shape = draft.weight.shape
    mask = draft.mask.flatten().to(draft.weight.dtype)
    w = draft.weight.flatten().clone()
    parts, judges = objective.split(images)
    for _ in range(passes):
        for part, judge in zip(parts, judges, strict=True):
            _, gradient = objective.gradient(w, part)
            gradient = gradient * mask
            step = newton_direction(objective, w, gradient, mask, part, cg, damping, tolerance, relative)
            slope = float((gradient * step).sum())
            if slope >= 0:
                continue
            now, length = objective.value(w, judge), 1.0
            while length > 1e-3:
                if objective.value(w + length * step, judge) <= now + armijo * length * slope:
                    w = w + length * step
                    break
                length *= shrink
    return w.view(shape)


def newton_direction(
    objective: Any, w: Tensor, gradient: Tensor, mask: Tensor, part: Any, cg: int, damping: float, tolerance: float,
    relative: bool,
) -> Tensor:  # fmt: skip
    """Conjugate gradients on (H + damping) p = -gradient over the kept weights, stopped at negative curvature."""
    p = torch.zeros_like(w)
    r = -gradient
    d = r.clone()
    rr = r.dot(r)
    goal = tolerance * float(rr.sqrt()) if relative else tolerance
    for _ in range(cg):
        if float(rr.sqrt()) <= goal or float(rr) == 0:
            break
        hd = objective.product(w, d, part) * mask
        if relative and not p.any():
            damping = damping * float(d.dot(hd) / rr)
            relative = False
        hd = hd + damping * d
        bend = d.dot(hd)
        if float(bend) <= 0:
            return p if p.any() else r
        alpha = rr / bend
        p = p + alpha * d
        r = r - alpha * hd
        after = r.dot(r)
        d = r + after / rr * d
        rr = after
    return p
