"""Patterns of several weights as one vector, patterns that are a given mask, and the steps on the way to a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pattern import Pattern

SCHEDULES = ("exponential", "linear", "cubic", "ratio")


def schedule(
    kind: str, stages: int, goal: float, first: float = 0.1, halvings: float | None = None, dwell: float = 0.0
) -> list[float]:
    """The sparsity of each stage, the last being `goal`: how CHITA++ gets there (arXiv 2302.14623, Section 3.4).

    exponential: each step half of the one before; linear; cubic (Zhu and Gupta); ratio: the same share of what is left.
    first: the sparsity of the first stage (of `ratio`: before it).  halvings: how often the distance to the goal is
    halved on the way (exponential only; None: at every step, as in the paper).  dwell: share of the stages, at the end,
    that stay at the goal.  Raises ValueError for a kind that is not known.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind}: choose one of {', '.join(SCHEDULES)}.")
    if stages == 1:
        return [goal]
    ramp = max(1, round(stages * (1 - dwell)))
    rest = [goal] * (stages - ramp)
    if ramp == 1:
        return [goal, *rest]
    first = min(first, goal)
    last = ramp - 1
    if kind == "exponential":
        rate = 1.0 if halvings is None else halvings / last
        steps = [first + (goal - first) * (1 - 2.0 ** (-i * rate)) / (1 - 2.0 ** (-last * rate)) for i in range(ramp)]
    elif kind == "linear":
        steps = [first + (goal - first) * i / last for i in range(ramp)]
    elif kind == "cubic":
        steps = [goal + (first - goal) * (1 - i / last) ** 3 for i in range(ramp)]
    else:
        steps = [1 - (1 - first) * ((1 - goal) / (1 - first)) ** ((i + 1) / ramp) for i in range(ramp)]
    return [*(min(s, goal) for s in steps[:-1]), goal, *rest]


@dataclass(frozen=True)
class Joined:
    """`pattern` on weights laid one after another as a vector (p,).

    shapes: the canonical (groups, out, in) of each.  sparsity: of this stage; for N:M, below the pattern's own, only
    the cheapest of the removals that the pattern asks for are made.
    """

    pattern: Pattern
    shapes: tuple[tuple[int, ...], ...]
    sparsity: float
    budgets: tuple[int, ...] = ()  # weights kept in each layer, where scope `model` shares them by a rule of its own

    @classmethod
    def of(
        cls, pattern: Pattern, shapes: Sequence[tuple[int, ...]], sparsity: float | None = None,
        budgets: Sequence[int] = (),
    ) -> Joined:  # fmt: skip
        return cls(pattern, tuple(shapes), 1 - pattern.density if sparsity is None else sparsity, tuple(budgets))

    def sizes(self) -> list[int]:
        return [int(torch.tensor(s).prod()) for s in self.shapes]

    def mask(self, score: Tensor) -> Tensor:
        """score (p,); True = kept."""
        if self.pattern.m:
            full = self.pattern.mask(score)
            drop = round(self.sparsity * score.numel())
            if drop >= int((~full).sum()):
                return full
            order = torch.where(full, torch.inf, score)
            mask = torch.ones_like(full)
            mask[order.topk(drop, largest=False).indices] = False
            return mask
        pattern = replace(self.pattern, sparsity=self.sparsity)
        if pattern.scope == "model" and not self.budgets:
            return pattern.mask(score)
        patterns = [replace(pattern, budget=b) for b in self.budgets] or [pattern] * len(self.shapes)
        parts = [
            each.mask(part.view(shape)).flatten()
            for each, part, shape in zip(patterns, score.split(self.sizes()), self.shapes, strict=True)
        ]
        return torch.cat(parts)

    def cells(self) -> Tensor:
        """(p,) the number of the group whose count the pattern fixes; weights may swap places within one only."""
        total = sum(self.sizes())
        if self.pattern.m:
            return torch.arange(total) // self.pattern.m
        if self.pattern.scope == "model" and not self.budgets:
            return torch.zeros(total, dtype=torch.long)
        counts = [(shape[0] * shape[1], shape[2]) if self.pattern.scope == "row" else (1, size)
                  for shape, size in zip(self.shapes, self.sizes(), strict=True)]  # fmt: skip
        lengths = torch.tensor([length for rows, length in counts for _ in range(rows)])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


@dataclass(frozen=True)
class Given:
    """The pattern of a mask that is already chosen: whatever the score, it stands."""

    kept: Tensor  # (groups, out, in) bool
    text: str
    m: int = 0

    def __str__(self) -> str:
        return self.text

    def mask(self, score: Tensor) -> Tensor:
        return self.kept.view_as(score).clone()

    def verify(self, weight: Tensor, name: str = "weight") -> None:
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: holds {int((~torch.isfinite(weight)).sum())} values that are not finite.")
        if bool((weight[~self.kept.view_as(weight)] != 0).any()):
            raise ValueError(f"{name}: a removed weight is not zero.")
