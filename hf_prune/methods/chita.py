"""CHITA (Benbaki et al., "Fast as CHITA", arXiv 2302.14623): l0-constrained regression on per-sample gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..fisher import Fisher
from ..pattern import Pattern
from . import Draft, Problem

EVIDENCE = "fisher"
SUPPORTS = ("magnitude", "iht", "cost", "splice")


def select(
    problem: Problem,
    *,
    ridge: float = 1e-3,
    support: str = "magnitude",
    block: int | str | None = None,
    rounds: int = 2,
    active: float = 1.5,
    iterations: int = 50,
    tolerance: float = 1e-7,
    pairs: int = 16,
) -> Draft:
    """Choose the support, then solve for the weights on it exactly (the paper's "back-solve", Section 3.3).

    ridge: λ.  block: what the quadratic model couples, see `Fisher.blocks`; the support is chosen over all weights.
    support: `magnitude` (CHITA-BSO of the authors' larger runs), `iht` (Algorithm 1: hard thresholding with line search
    on an active set of `active` times the weights kept, at most `iterations` steps), `cost` (`rounds` rounds of
    removing what costs least once the others are refit), `splice` (cost, then swaps while the objective falls,
    many at once and in the end `pairs` of them one by one).

    Differs from the authors' code: the back-solve follows every support search, in a form that is stable at small
    ridges; the line search evaluates several step lengths at once, because with n:m groups the first breakpoint lies
    next to zero; costs and swaps are ours, from one n x n factor.
    """
    if support not in SUPPORTS:
        raise ValueError(f"chita.support {support}: choose one of {', '.join(SUPPORTS)}.")
    fisher: Fisher = replace(problem.objective, ridge=ridge)  # type: ignore[type-var]
    pattern, weight = problem.pattern, problem.weight
    if support == "magnitude":
        mask = pattern.mask(weight.abs())
    elif support == "iht":
        mask = thresholding(fisher, pattern, active, iterations, tolerance)
    else:
        mask = removal(fisher, pattern, block, rounds)
        if support == "splice":
            return splice(fisher, pattern, mask, block, iterations, pairs)
    return Draft(fisher.refit_blocks(mask, block), mask)


def solve(problem: Problem, draft: Draft, *, ridge: float = 1e-3, block: int | str | None = None) -> Tensor:
    """The back-solve alone, on any mask."""
    fisher: Fisher = replace(problem.objective, ridge=ridge)  # type: ignore[type-var]
    return fisher.refit_blocks(draft.mask, block)


def line_search(fisher: Fisher, pattern: Pattern, w: Tensor, g: Tensor, pieces: int = 16) -> tuple[Tensor, float]:
    """The best w⁺ = P(w - τ g) over τ, and its objective.

    Q(P(w - τ g)) is piecewise quadratic in τ.  On the piece that starts at 0 the support stands still and the minimiser
    is exact (the Cauchy step); beyond it the supports change, and pieces at τ spread around that step are entered, each
    minimised exactly along the line from w to the projected point while its support is the pattern's.
    """
    mask = w != 0 if bool((w != 0).any()) else pattern.mask(g.abs())
    on = g * mask
    bend = fisher.times(on).double().square().sum() + fisher.n * fisher.ridge * on.double().square().sum()
    cauchy = float(on.double().square().sum() / bend.clamp_min(torch.finfo(torch.float64).tiny))
    new, value, tau = w, float(fisher.value(w)), 0.0
    for round_ in range(2):  # steps a factor 2 apart, then between the neighbours of the best
        steps = [cauchy * 2.0**k for k in range(7 - pieces, 7)] if round_ == 0 else [
            tau * 2.0 ** (k / (pieces // 2)) for k in range(-pieces // 2 + 1, pieces // 2) if k]  # fmt: skip
        trial = torch.stack([z * pattern.mask(z.abs()) for z in (w - t * g for t in steps)])  # (pieces, p)
        d = trial - fisher.weight
        r = fisher.times(d.mT).mT + fisher.first
        q = 0.5 * r.double().square().sum(1) + 0.5 * fisher.n * fisher.ridge * d.double().square().sum(1)
        best = int(q.argmin())
        if float(q[best]) < value:
            new, value, tau = trial[best], float(q[best]), steps[best]
        if tau == 0.0:
            return new, value
    # within the piece of the winner the objective is one parabola: go to its bottom if the support allows
    s = new != 0
    gs = g * s
    base = new + tau * gs  # the point of the piece's line at τ = 0
    slope_r, at = fisher.times(gs).double(), (fisher.times(base - fisher.weight) + fisher.first).double()
    shift = (base - fisher.weight).double()
    nl = fisher.n * fisher.ridge
    bend = slope_r.dot(slope_r) + nl * gs.double().square().sum()
    bottom = float((at.dot(slope_r) + nl * shift.dot(gs.double())) / bend) if float(bend) > 0 else 0.0
    if bottom > 0:
        z = w - bottom * g
        exact = z * pattern.mask(z.abs())
        exact_value = float(fisher.value(exact))
        if exact_value < value:
            new, value = exact, exact_value
    return new, value


def thresholding(fisher: Fisher, pattern: Pattern, active: float, iterations: int, tolerance: float) -> Tensor:
    """Iterative hard thresholding on an active set, Algorithms 1 and 2: the mask it ends in."""
    w = fisher.weight * pattern.mask(fisher.weight.abs())
    value = float(fisher.value(w))
    for _ in range(10):
        # coordinates outside the active set hold still at zero until the full gradient calls them in
        g = fisher.gradient(w)
        scale = float(fisher.weight.abs().max() / g.abs().max().clamp_min(1e-30))
        score = torch.where(w != 0, torch.inf, (g * scale).abs())
        size = min(w.numel(), int(active * int((w != 0).sum())))
        room = torch.zeros_like(w, dtype=torch.bool)
        room[score.nan_to_num(posinf=3e38).topk(size).indices] = True
        if size == w.numel():
            room[:] = True
        start = value
        for _ in range(iterations):
            g = fisher.gradient(w) * room
            new, after = line_search(fisher, pattern, w, g)
            if not after < value * (1 - tolerance):
                break
            w, value = new, after
        if not value < start * (1 - tolerance):
            break
    return pattern.mask(torch.where(w != 0, 1 + w.abs() / w.abs().max().clamp_min(1e-30), torch.zeros_like(w)))


def removal(fisher: Fisher, pattern: Pattern, block: int | str | None, rounds: int) -> Tensor:
    """Remove, in `rounds` steps of equal ratio, what costs least when all others are refit: (nλ/2) w² / (1 - q)."""
    mask = fisher.weight != 0  # what an earlier stage removed stays removed
    goal = pattern.mask(fisher.weight.abs())
    share = float(goal.sum() / mask.sum().clamp_min(1))
    kept = int(mask.sum())
    for t in range(1, rounds + 1):
        w = fisher.refit_blocks(mask, block)
        cost = costs(fisher, w, mask, block)
        if t == rounds:
            break
        allowed = torch.zeros_like(mask)
        allowed[cost.topk(max(1, int(share ** (t / rounds) * kept))).indices] = True
        mask = (allowed | pattern.mask(cost)) & mask  # never below what the pattern keeps of each group
    return pattern.mask(cost)


def costs(fisher: Fisher, w: Tensor, mask: Tensor, block: int | str | None) -> Tensor:
    """What removing each kept weight adds to the objective with the others refit, up to nλ/2; 0 for removed ones."""
    q = torch.zeros(w.numel(), dtype=torch.float64, device=w.device)
    for where in fisher.blocks(block):
        q[where][mask[where]] = fisher.leverage(mask, where, mask)
    return torch.where(mask, w.double().square() / (1 - q).clamp_min(1e-12), 0.0).to(w.dtype)


def gains(fisher: Fisher, w: Tensor, mask: Tensor, block: int | str | None) -> Tensor:
    """What letting each removed weight back in takes off the objective, up to nλ/2; 0 for kept ones."""
    nl = fisher.n * fisher.ridge
    out = []
    for where in fisher.blocks(block):
        q = fisher.leverage(mask, where)
        d = w[where] - fisher.weight[where]
        r = fisher.times(d, where) + fisher.first
        g = fisher.back(r, where).double() + nl * d.double()
        out.append(g.square() / (nl * nl * (1 + q)))
    return torch.where(mask, 0.0, torch.cat(out)).to(w.dtype)


def splice(
    fisher: Fisher, pattern: Pattern, mask: Tensor, block: int | str | None, iterations: int, pairs: int
) -> Draft:
    """Swap the cheapest kept weights for the most gainful removed ones while the objective falls, then fewer."""
    starts = []
    for each in (mask, pattern.mask(fisher.weight.abs())):  # never worse than magnitude
        w = fisher.refit_blocks(each, block)
        starts.append((blocked_value(fisher, w, block), w, each))
    value, w, mask = min(starts, key=lambda start: start[0])
    count = max(1, int(mask.sum()) // 20)
    for _ in range(iterations):
        cost, gain = costs(fisher, w, mask, block), gains(fisher, w, mask, block)
        out_ = torch.where(mask, cost, torch.inf).topk(count, largest=False).indices
        in_ = torch.where(mask, -torch.inf, gain).topk(min(count, int((~mask).sum()))).indices
        score = mask.to(w.dtype) * 2  # the pattern settles conflicts: kept 2, newcomers up to 2, leavers below 1
        score[out_] = 1 + cost[out_] / (cost[out_] + gain[in_].max() + 1e-30)
        score[in_] = 1 + gain[in_] / (gain[in_] + cost[out_].max() + 1e-30)
        new_mask = pattern.mask(score)
        new = fisher.refit_blocks(new_mask, block)
        after = blocked_value(fisher, new, block)
        if after < value * (1 - 1e-9):
            w, mask, value = new, new_mask, after
        elif count > 1:
            count = max(1, count // 4)
        else:
            better = one_swap(fisher, pattern, w, mask, value, cost, gain, block, pairs)
            if better is None:
                break
            w, mask, value = better
    return Draft(w, mask)


def one_swap(
    fisher: Fisher, pattern: Pattern, w: Tensor, mask: Tensor, value: float, cost: Tensor, gain: Tensor,
    block: int | str | None, pairs: int,
) -> tuple[Tensor, Tensor, float] | None:  # fmt: skip
    """The first of the `pairs` most promising single swaps that lowers the objective: (w, mask, value)."""
    few = max(2, int(pairs**0.5) * 2)
    newcomers = torch.where(mask, -torch.inf, gain).topk(min(few, int((~mask).sum()))).indices
    trials = []
    for i in newcomers.tolist():
        score = torch.where(mask, cost.max() + cost, torch.full_like(cost, -1.0))
        score[i] = 3 * cost.max() + 1
        forced = pattern.mask(score)  # i enters, the cheapest of its group leaves
        out = (mask & ~forced).nonzero().flatten()
        if len(out) != 1:
            continue
        trials.append((float(gain[i] - cost[out[0]]), forced))
        again = score.clone()
        again[out[0]] = score.max()  # and the second cheapest
        second = pattern.mask(again)
        if int((second != mask).sum()) == 2:
            trials.append((float(gain[i] - cost[(mask & ~second).nonzero()[0, 0]]), second))
    trials.sort(key=lambda trial: -trial[0])
    for _, other in trials[:pairs]:
        new = fisher.refit_blocks(other, block)
        after = blocked_value(fisher, new, block)
        if after < value * (1 - 1e-9):
            return new, other, after
    return None


def blocked_value(fisher: Fisher, w: Tensor, block: int | str | None) -> float:
    """The objective that refit_blocks minimises: the sum over blocks of the quadratic model of each."""
    nl, total = fisher.n * fisher.ridge, 0.0
    for where in fisher.blocks(block):
        d = w[where] - fisher.weight[where]
        r = fisher.times(d, where).double() + fisher.first
        total += float(0.5 * r.square().sum() + 0.5 * nl * d.double().square().sum())
    return total
