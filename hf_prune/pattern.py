"""Which weights may stay: keep k of every g entries.  2:4, 1:4, a row, a layer and a whole model are one idea."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SCOPES = ("row", "layer", "model")
ALLOCATIONS = ("magnitude", "lamp", "erk", "trace")  # how the layers of scope `model` share the zeros


@dataclass(frozen=True)
class Pattern:
    """Keep `n` of every `m` consecutive input channels, or a share `1 - sparsity` of each row, layer or model.

    Weights come in the canonical view (groups, out, in): `in` runs over kernel positions with the input channels last,
    so that N:M groups lie along input channels as sparse tensor cores want them.
    """

    n: int = 0
    m: int = 0
    sparsity: float = 0.0
    scope: str = "layer"
    allocation: str = "magnitude"  # of scope `model`: how the layers share the zeros
    budget: int | None = None  # entries kept in this layer, set by `allocate` when one threshold serves a whole model

    def __post_init__(self) -> None:
        if self.m:
            if not 0 < self.n < self.m:
                raise ValueError(f"--nm {self.n}:{self.m}: N:M keeps N of every M weights, so 0 < N < M is needed.")
        elif not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"--sparsity {self.sparsity:g}: the share of zeros must lie between 0 and 1.")
        if self.scope not in SCOPES:
            raise ValueError(f"--scope {self.scope}: choose one of {', '.join(SCOPES)}.")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"--allocation {self.allocation}: choose one of {', '.join(ALLOCATIONS)}.")
        if self.allocation != "magnitude" and (self.m or self.scope != "model"):
            raise ValueError(
                f"--allocation {self.allocation}: shares the zeros of a whole model among its layers. "
                "Add --sparsity S and --scope model."
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`"2:4"` -> keep 2 of every 4.  Raises ValueError for anything else."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if not found:
            raise ValueError(f"--nm {text}: expected N:M, for example 2:4.")
        return cls(n=int(found[1]), m=int(found[2]))

    @classmethod
    def unstructured(cls, sparsity: float, scope: str = "layer", allocation: str = "magnitude") -> Pattern:
        return cls(sparsity=float(sparsity), scope=scope, allocation=allocation)

    def __str__(self) -> str:
        shared = self.scope if self.allocation == "magnitude" else f"{self.scope}, {self.allocation}"
        return f"{self.n}:{self.m}" if self.m else f"{100 * self.sparsity:g}% ({shared})"

    @property
    def density(self) -> float:
        """The share of weights that stays."""
        return self.n / self.m if self.m else 1.0 - self.sparsity

    @property
    def by_row(self) -> bool:
        """Whether each row of a weight follows the pattern by itself, so that rows are problems of their own."""
        return bool(self.m) or self.scope == "row"

    def misfit(self, channels: int) -> str | None:
        """Why this pattern cannot apply to a weight with `channels` consecutive input channels; None if it can."""
        if self.m and channels % self.m:
            return f"{self} needs input channels divisible by {self.m}, found {channels}"
        return None

    def group(self, weight: Tensor) -> tuple[int, int]:
        """(g, k): of every g consecutive entries of the flattened weight, k stay."""
        if self.m:
            return self.m, self.n
        size = weight.shape[-1] if self.scope == "row" else weight.numel()
        if self.budget is not None:
            return size, self.budget
        return size, max(1, math.floor((1.0 - self.sparsity) * size + 1e-9))

    def mask(self, score: Tensor) -> Tensor:
        """Keep the highest scores of each group.  score: any shape; returns bool like score, True = kept."""
        if not torch.isfinite(score).all():
            raise ValueError("a pruning score is not finite; check the weights and the calibration images for NaN.")
        g, k = self.group(score)
        flat = score.reshape(-1, g)
        if k >= g:
            return torch.ones_like(score, dtype=torch.bool)
        top = flat.topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True).view_as(score)

    def verify(self, weight: Tensor, name: str = "weight") -> None:
        """Raise ValueError unless every group of `weight` (canonical view) holds at most k non-zeros, all finite."""
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: holds {int((~torch.isfinite(weight)).sum())} values that are not finite.")
        g, k = self.group(weight)
        kept = (weight != 0).reshape(-1, g).sum(1)
        if bool((kept > k).any()):
            raise ValueError(f"{name}: {int((kept > k).sum())} of {kept.numel()} groups break the pattern {self}.")


def allocate(
    pattern: Pattern, weights: list[Tensor], kernels: Sequence[tuple[int, ...]] | None = None,
    scales: Sequence[float] | None = None,
) -> list[Pattern]:  # fmt: skip
    """One pattern per layer.  For scope `model` the pattern's allocation decides how much each layer keeps.

    magnitude: one threshold on |w| for all layers.  lamp: one threshold on w² over the sum of the squares in its layer
    that are not smaller (Lee et al., arXiv 2010.07611), so that no layer empties first.  erk: densities proportional to
    (in + out + kernel sides) / (in · out · kernel), the Erdős-Rényi-kernel rule of Evci et al. (arXiv 1911.11134);
    layers that would exceed 1 stay dense and the others share the rest.  trace: one threshold on w² times the mean
    curvature of its layer; without `scales`, as in a plan made before any image was seen, it is magnitude.

    weights: canonical views (groups, out, in) of the layers, in any order.  kernels: the sides of each layer's kernel,
    () where there is none; only erk reads them.  scales: each layer's mean curvature (allocation.py), for trace.
    """
    if pattern.m or pattern.scope != "model":
        return [pattern] * len(weights)
    total = sum(w.numel() for w in weights)
    keep = max(1, math.floor(pattern.density * total + 1e-9))
    if keep < len(weights):
        raise ValueError(f"{pattern} leaves {keep} weights for {len(weights)} layers; every layer needs one.")
    if pattern.allocation == "erk":
        budgets = erdos_renyi(keep, weights, kernels or [()] * len(weights))
    elif pattern.allocation == "trace" and scales is not None:
        budgets = over_threshold(keep, [w.double().square() * c for w, c in zip(weights, scales, strict=True)])
    else:
        budgets = over_threshold(keep, [lamp(w) if pattern.allocation == "lamp" else w.abs().float() for w in weights])
    for i, b in enumerate(budgets):  # no layer may lose all: the largest gives one up for it
        if b == 0:
            budgets[max(range(len(budgets)), key=budgets.__getitem__)] -= 1
            budgets[i] = 1
    return [replace(pattern, budget=b) for b in budgets]


def over_threshold(keep: int, scores: list[Tensor]) -> list[int]:
    """How many of the `keep` largest scores lie in each layer."""
    every = torch.cat([s.flatten() for s in scores])
    threshold = every.kthvalue(every.numel() - keep + 1).values if keep < every.numel() else every.min()
    budgets = [int((s > threshold).sum()) for s in scores]
    for i, s in enumerate(scores):  # entries equal to the threshold fill the budget in the order of the layers
        ties = int((s == threshold).sum())
        budgets[i] += max(0, min(ties, keep - sum(budgets)))
    return budgets


def lamp(weight: Tensor) -> Tensor:
    """w² / Σ of the squares of the layer that are not smaller, like weight; the largest scores 1, zeros 0."""
    squares, order = weight.flatten().double().square().sort()
    rest = squares.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(squares).scatter_(0, order, squares / rest).view_as(weight)


def erdos_renyi(keep: int, weights: list[Tensor], kernels: Sequence[tuple[int, ...]]) -> list[int]:
    """Weights kept in each layer, `keep` in all."""
    sizes = [w.numel() for w in weights]
    raw = []
    for w, kernel in zip(weights, kernels, strict=True):
        out, channels = w.shape[0] * w.shape[1], w.shape[2] // math.prod(kernel)
        raw.append((channels + out + sum(kernel)) / (channels * out * math.prod(kernel)))
    dense: set[int] = set()
    while True:
        left = keep - sum(sizes[i] for i in dense)
        share = left / sum(r * s for i, (r, s) in enumerate(zip(raw, sizes, strict=True)) if i not in dense)
        full = {i for i, r in enumerate(raw) if i not in dense and share * r >= 1}
        if not full or len(dense | full) == len(sizes):
            break
        dense |= full
    wish = [float(s) if i in dense else min(float(s), share * r * s)
            for i, (r, s) in enumerate(zip(raw, sizes, strict=True))]  # fmt: skip
    budgets = [math.floor(b) for b in wish]
    # the largest fractions round up
    for i in sorted(range(len(wish)), key=lambda i: budgets[i] - wish[i])[: keep - sum(budgets)]:
        budgets[i] += 1
    return budgets
