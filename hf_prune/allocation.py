"""How the zeros of a whole model are shared among its layers, by rules that a measurement has to confirm.

`lamp` and `trace` (pattern.allocate) help on some networks and hurt on others: `confirm` tries their budgets by
zeroing, before anything is pruned, and uses them only where they leave a lower calibration loss than one threshold.
Zeroing without a refit destroys more than pruning does.  Where nothing is left by either rule the losses compare two
ruins, so the zeros are halved until one of the two knows more than an answer that ignores the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import staged
from .curvature import Task, measure, prepare
from .pattern import Pattern, allocate
from .permute import some

CONFIRMED = ("lamp", "trace")  # rules that are used only where they lower the loss
HALVINGS = 4  # of the sparsity at which the rules are compared
JUDGES = 128  # images that the rules are compared on
PROBES = 4  # random output directions per image behind the trace of each layer


def confirm(
    model: nn.Module, batches: Sequence[Any], labels: Sequence[Tensor | None], chosen: Any, recipe: Any,
    notes: list[str],
) -> dict[str, Pattern]:  # fmt: skip
    """The pattern of every site, by the recipe's rule or by magnitude; what was measured is added to `notes`.

    batches, labels: calibration images as curvature.prepare takes them; `JUDGES` of them are enough.  chosen: a
    loop.Selection.  The model is left as it was.  A run in stages, or on gradients, shares the zeros anew at every
    stage: there `lamp` is taken as it is, and `trace` raises ValueError.
    """
    rule = recipe.allocation
    if staged.wanted(recipe):
        if rule == "trace":
            raise ValueError(f"--allocation trace goes with layer-wise recipes in one stage, and {recipe.name} is not "
                             "one. Use lamp, erk or magnitude.")  # fmt: skip
        return chosen.patterns
    found = [s for u in chosen.units for s in u.sites]
    judges = list(some(list(zip(batches, labels, strict=True)), JUDGES))
    images = prepare(model, [batch for batch, _ in judges], [known for _, known in judges])
    task = Task(model, found, images, 0)
    weights = [part.view(s.shape) for part, s in zip(task.split(task.weights), found, strict=True)]
    scales = None
    if rule == "trace":
        total = torch.stack([task.traces(recipe.seed + number) for number in range(PROBES)]).mean(0)
        scales = [float(t) / size for t, size in zip(total, task.sizes, strict=True)]
    dense = measure(model, task.images)["loss"] or 0.0
    pattern = recipe.pattern()

    def shared(by: str, sparsity: float) -> list[Pattern]:
        return allocate(replace(pattern, sparsity=sparsity, allocation=by), weights, scales=scales)

    rises: dict[str, float] = {}
    for halving in range(HALVINGS + 1):
        tried = pattern.sparsity / 2**halving
        for by in ("magnitude", rule):
            budgets = shared(by, tried)
            kept = torch.cat([(w * p.mask(w.abs())).flatten() for w, p in zip(weights, budgets, strict=True)])
            with task.at(kept):
                rises[by] = (measure(model, task.images)["loss"] or 0.0) - dense
        if min(rises.values()) + dense < ignorant(task.images):
            break
    taken = rule if rises[rule] < rises["magnitude"] else "magnitude"
    where = f" {100 * tried:.3g} % of the weights" if halving else ""
    notes.append(
        f"allocation {rule} is {'used' if taken == rule else 'not used'}: zeroing{where} by it raises the calibration "
        f"loss by {rises[rule]:.4g}, by one threshold on |w| it is {rises['magnitude']:.4g}."
    )
    made = shared(taken, pattern.sparsity)
    return {s.name: p for s, p in zip(found, made, strict=True)}


def ignorant(images: Any) -> float:
    """The loss of an answer that is the same for every image: all classes alike, or a representation of zeros."""
    return 1.0 if images.loss == "representation" else math.log(images.outputs)
