"""How the layers share the zeros of a whole model, by what removing their weights does to the model's output.

With z = f(y) the model's output, y = W x a layer's, and one weight removed and the others of its row refit, the output
moves by about ||J||² w² / [H⁻¹]_jj in square (the OBS saliency, weighed by the layer's influence).  One threshold on
this, over all layers, says how many weights each keeps; which ones is decided later, when the layer's turn comes and
the layers before it are pruned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import ranks
from .importance import Influence
from .linalg import cholesky
from .pattern import Pattern, over_threshold
from .sites import Site, Tape, Use, feed, parameters, quiet


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
