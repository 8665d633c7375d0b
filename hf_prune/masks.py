"""Masks over all prunable weights of a network that is being trained, and what a training step does with them.

A mask has the shape of its parameter, True = kept. Which weights there are and how they lie along input channels comes
from sites.py, so n:m means here what it means everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import phases, sites
from .pattern import Pattern, allocate

Masks = dict[str, Tensor]  # parameter name -> bool, like the parameter


@dataclass(frozen=True)
class Prunable:
    """The weights that a pattern applies to, in the order of the forward, and why the others stay dense."""

    sites: list[sites.Site]
    dense: dict[str, str]  # parameter -> reason

    @property
    def names(self) -> list[str]:
        return [site.parameter for site in self.sites]

    @property
    def numel(self) -> int:
        return sum(site.numel for site in self.sites)


def prunable(network: nn.Module, images: Tensor, pattern: Pattern | None, skip: Iterable[str] = ()) -> Prunable:
    """Every weight of a linear layer or convolution, first and last included, unless `skip` names it.

    images: (2, channels, height, width), to watch one forward. Raises ValueError when nothing is left to prune, or
    `skip` names what is not there.
    """
    found = sites.find(network, images)
    known = [site.parameter for site in found.sites]
    strange = [name for name in skip if name not in known]
    if strange:
        raise ValueError(f"skip {strange[0]}: the network has no such weight; it has {', '.join(known)}.")
    dense = dict(found.dense)
    kept = []
    for site in found.sites:
        assert site.rows is None, "the networks of networks.py use every weight whole"
        misfit = pattern.misfit(site.channels) if pattern is not None else None
        reason = "skip" if site.parameter in set(skip) else misfit
        if reason:
            dense[site.parameter] = reason
        else:
            kept.append(site)
    if not kept:
        why = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
        raise ValueError(f"nothing is left to prune ({why}).")
    return Prunable(kept, dense)


def full(weights: Prunable, values: Mapping[str, Tensor]) -> Masks:
    return {name: torch.ones_like(values[name], dtype=torch.bool) for name in weights.names}


def by_size(weights: Prunable, values: Mapping[str, Tensor], masks: Masks, pattern: Pattern) -> Masks:
    """Keep the largest |values| of what `masks` keep; never bring back what is gone.

    values: by parameter, in its shape: the weights, or scores of them.
    """
    tiny = torch.finfo(torch.float32).tiny  # what is kept and happens to be zero still stands before what is gone
    score = []
    for site in weights.sites:
        value = site.read(values[site.parameter]).abs().clamp_min(tiny)
        score.append(value * site.read(masks[site.parameter].to(value.dtype)))
    found: Masks = {}
    for site, each, value in zip(weights.sites, allocate(pattern, score), score, strict=True):
        mask = each.mask(value) & (value > 0)
        found[site.parameter] = _stored(site, mask, masks[site.parameter])
    return found


def at_random(weights: Prunable, masks: Masks, pattern: Pattern, linear: float, seed: int) -> Masks:
    """Smart-Ratio: a random mask in each layer, with the layer's share of phases.smart_ratio_counts."""
    keep = max(1, math.floor(pattern.density * weights.numel + 1e-9))
    sizes = [site.numel for site in weights.sites]
    classifier = [False] * (len(sizes) - 1) + [weights.sites[-1].conv is None]
    counts = phases.smart_ratio_counts(sizes, classifier, keep, linear)
    generator = torch.Generator().manual_seed(seed)
    found: Masks = {}
    for site, count in zip(weights.sites, counts, strict=True):
        chosen = torch.zeros(site.numel, dtype=torch.bool)
        chosen[torch.randperm(site.numel, generator=generator)[:count]] = True
        found[site.parameter] = _stored(site, chosen.view(site.shape), masks[site.parameter])
    return found


def _stored(site: sites.Site, mask: Tensor, like: Tensor) -> Tensor:
    """A canonical mask (groups, out, in) in the shape of the parameter."""
    stored = torch.empty_like(like)
    site.write(stored, mask.to(like.device))
    return stored


def kept(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def multiply(values: Mapping[str, Tensor], masks: Masks) -> None:
    """Zero what is pruned, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            values[name].masked_fill_(~mask, 0.0)


def soften(values: Iterable[Tensor], amount: float) -> None:
    """The proximal step of amount·Σ|w|: w becomes sign(w)·max(|w| - amount, 0), in place, with exact zeros."""
    with torch.no_grad():
        for value in values:
            value.copy_(torch.nn.functional.softshrink(value, amount))


def penalty(values: Iterable[Tensor]) -> Tensor:
    """Σ|w|, a scalar with a gradient (0 at w = 0)."""
    return torch.stack([value.abs().sum() for value in values]).sum()


# ------------------------------------------------------------------------------------------------------- Rare Gems
class Scored(nn.Module):
    """The network with frozen weights, of which those with a score above one half count; the scores are parameters.

    The rounding passes its gradient straight through to the score. Only the scores are learned: biases and norms stay
    as they are too.
    """

    def __init__(self, network: nn.Module, scores: Mapping[str, Tensor], masks: Masks) -> None:
        super().__init__()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.network, self.names, self.masks = network, list(scores), masks
        self.scores = nn.ParameterList(nn.Parameter(score.clone()) for score in scores.values())

    def forward(self, images: Tensor) -> Tensor:
        weights = dict(self.network.named_parameters())
        used = {}
        for name, score in zip(self.names, self.scores, strict=True):
            hard = (score > 0.5).to(score.dtype)
            used[name] = weights[name] * (hard + (score - score.detach())) * self.masks[name]
        return functional_call(self.network, used, (images,))

    def named_scores(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.scores, strict=True))


def signed_constants(network: nn.Module, weights: Prunable) -> None:
    """Every weight becomes ± the standard deviation of He's initialisation of its layer, biases zero, in place."""
    named = dict(network.named_parameters())
    with torch.no_grad():
        for site in weights.sites:
            value = named[site.parameter]
            value.copy_(torch.where(value < 0, -1.0, 1.0) * math.sqrt(2 / site.shape[2]))
            if site.bias is not None:
                named[site.bias].zero_()


def random_scores(weights: Prunable, values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Uniform in 0..1: at the start every other weight counts."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(values[name].shape, generator=generator).to(values[name].device) for name in weights.names}
