"""How the layers share the zeros of a whole model, by what removing their weights does to the model's output.

With z = f(y) the model's output, y = W x a layer's, and one weight removed and the others of its row refit, the output
moves by about ||J||² w² / [H⁻¹]_jj in square (the OBS saliency, weighed by the layer's influence).  One threshold on
this, over all layers, says how many weights each keeps; which ones is decided later, when the layer's turn comes and
the layers before it are pruned.

`lamp` and `trace` (pattern.allocate) help on some networks and hurt on others: `confirm` tries their budgets by
zeroing, before anything is pruned, and uses them only where they leave a lower calibration loss than one threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import ranks, staged
from .curvature import Task, measure, prepare
from .importance import Influence
from .linalg import cholesky
from .pattern import Pattern, allocate, over_threshold
from .sites import Site, Tape, Use, feed, parameters, quiet

CONFIRMED = ("lamp", "trace")  # rules that are used only where they lower the loss
PROBES = 4  # random output directions per image behind the trace of each layer


def influence(
    model: nn.Module, sites: list[Site], batches: list[Any], patterns: dict[str, Pattern], found: Influence,
    ridge: float = 0.1, most: float = 0.95,
) -> dict[str, Pattern]:  # fmt: skip
    """The patterns with a budget each, by site name.

    batches: calibration images; found: what importance.py measured on them.  ridge: as in the OBS method.  most:
    sparsity that no layer exceeds.  Raises ValueError where a layer's influence is not known.
    """
    unknown = [s.name for s in sites if s.name not in found.rows]
    if unknown:
        raise ValueError(
            f"--allocation influence: the influence of {unknown[0]} on the output cannot be measured ({len(unknown)} "
            "such weights); skip them, or choose another allocation."
        )
    named = parameters(model)
    at = {(s.parameter, s.rows): s for s in sites}
    sums = {s.name: torch.zeros_like(s.read(named[s.parameter])[:, :1].expand(-1, s.shape[2], -1)) for s in sites}
    count = dict.fromkeys(sums, 0.0)
    weights: dict[Any, Tensor] = {}
    device = next(model.parameters()).device

    def use(u: Use) -> None:
        s = at.get((u.parameter, u.rows))
        if s is not None:
            x = s.columns(u.x.detach()).to(sums[s.name].dtype)
            x = x * weights[s.source, s.conv].sqrt()[:, None]
            sums[s.name] += x.mT @ x
            count[s.name] += x.shape[1]

    with quiet(model), torch.no_grad(), Tape(named, use):
        for batch, those in zip(batches, found.weights, strict=False):
            weights.update(those)
            feed(model, tree_map(lambda t: t.to(device) if torch.is_tensor(t) else t, batch))
    ranks.sum_(sums.values())
    scores = []
    for s in sites:
        xx = sums[s.name] / ranks.agree(count[s.name])
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(xx.dtype).tiny)
        eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
        inverse = torch.cholesky_inverse(cholesky(xx + ridge * scale[:, None, None] * eye))
        cost = s.read(named[s.parameter]).square() / inverse.diagonal(dim1=-2, dim2=-1)[:, None, :]
        scores.append(cost * found.rows[s.name].view(s.shape[0], s.shape[1], 1))
    total = sum(s.numel for s in sites)
    pattern = patterns[sites[0].name]
    # a floor under every layer: its largest scores count as the largest of all
    for score in scores:
        least = max(1, round((1 - most) * score.numel()))
        score.view(-1)[score.flatten().topk(least).indices] = float("inf")
    budgets = over_threshold(max(1, int(pattern.density * total + 1e-9)), scores)
    return {s.name: replace(patterns[s.name], budget=b) for s, b in zip(sites, budgets, strict=True)}



def confirm(
    model: nn.Module, batches: list[Any], labels: Sequence[Tensor | None], chosen: Any, recipe: Any, notes: list[str]
) -> dict[str, Pattern]:
    """The pattern of every site, by the recipe's rule or by magnitude; what was measured is added to `notes`.

    batches, labels: calibration images as curvature.prepare takes them.  chosen: a loop.Selection.  The model is left
    as it was.  A run in stages, or on gradients, shares the zeros anew at every stage: there `lamp` is taken as it is,
    and `trace` raises ValueError.
    """
    rule = recipe.allocation
    if staged.wanted(recipe):
        if rule == "trace":
            raise ValueError(f"--allocation trace goes with layer-wise recipes in one stage, and {recipe.name} is not "
                             "one. Use lamp, erk or magnitude.")  # fmt: skip
        return chosen.patterns
    found = [s for u in chosen.units for s in u.sites]
    task = Task(model, found, prepare(model, batches, labels), 0)
    weights = [part.view(s.shape) for part, s in zip(task.split(task.weights), found, strict=True)]
    scales = None
    if rule == "trace":
        total = torch.stack([task.traces(recipe.seed + number) for number in range(PROBES)]).mean(0)
        scales = [float(t) / size for t, size in zip(total, task.sizes, strict=True)]
    dense = measure(model, task.images)["loss"] or 0.0
    made, rises = {}, {}
    for each in ("magnitude", rule):
        made[each] = allocate(replace(recipe.pattern(), allocation=each), weights, scales=scales)
        kept = torch.cat([(w * p.mask(w.abs())).flatten() for w, p in zip(weights, made[each], strict=True)])
        with task.at(kept):
            rises[each] = (measure(model, task.images)["loss"] or 0.0) - dense
    taken = rule if rises[rule] < rises["magnitude"] else "magnitude"
    notes.append(
        f"allocation {rule} is {'used' if taken == rule else 'not used'}: zeroing by it raises the calibration loss by "
        f"{rises[rule]:.4g}, by one threshold on |w| it is {rises['magnitude']:.4g}."
    )
    return {s.name: p for s, p in zip(found, made[taken], strict=True)}
