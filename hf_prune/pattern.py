"""Which weights may stay: keep k of every g entries.  2:4, 1:4, a row, a layer and a whole model are one idea."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SCOPES = ("row", "layer", "model")


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
    budget: int | None = None  # entries kept in this layer, set by `allocate` when one threshold serves a whole model

    def __post_init__(self) -> None:
        if self.m:
            if not 0 < self.n < self.m:
                raise ValueError(f"--nm {self.n}:{self.m}: N:M keeps N of every M weights, so 0 < N < M is needed.")
        elif not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"--sparsity {self.sparsity:g}: the share of zeros must lie between 0 and 1.")
        if self.scope not in SCOPES:
            raise ValueError(f"--scope {self.scope}: choose one of {', '.join(SCOPES)}.")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`"2:4"` -> keep 2 of every 4.  Raises ValueError for anything else."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if not found:
            raise ValueError(f"--nm {text}: expected N:M, for example 2:4.")
        return cls(n=int(found[1]), m=int(found[2]))

    @classmethod
    def unstructured(cls, sparsity: float, scope: str = "layer") -> Pattern:
        return cls(sparsity=float(sparsity), scope=scope)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{100 * self.sparsity:g}% ({self.scope})"

    @property
    def density(self) -> float:
        """The share of weights that stays."""
        return self.n / self.m if self.m else 1.0 - self.sparsity

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


def allocate(pattern: Pattern, weights: list[Tensor]) -> list[Pattern]:
    """One pattern per layer.  For scope `model` one global magnitude threshold decides how much each layer keeps.

    weights: canonical views (groups, out, in) of the layers, in any order.
    """
    if pattern.m or pattern.scope != "model":
        return [pattern] * len(weights)
    magnitude = torch.cat([w.abs().flatten().float() for w in weights])
    keep = max(1, math.floor(pattern.density * magnitude.numel() + 1e-9))
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values if keep < magnitude.numel() else magnitude.min()
    budgets = [int((w.abs() > threshold).sum()) for w in weights]
    for i, w in enumerate(weights):  # entries equal to the threshold fill the budget in the order of the layers
        ties = int((w.abs() == threshold).sum())
        take = min(ties, keep - sum(budgets))
        budgets[i] += max(0, take)
    if keep < len(weights):
        raise ValueError(f"{pattern} leaves {keep} weights for {len(weights)} layers; every layer needs one.")
    for i, b in enumerate(budgets):  # no layer may lose all: the largest gives one up for it
        if b == 0:
            budgets[max(range(len(budgets)), key=budgets.__getitem__)] -= 1
            budgets[i] = 1
    return [replace(pattern, budget=b) for b in budgets]
