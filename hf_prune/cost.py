"""What a run will cost, measured on two images before it starts: operations of every weight, and seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import permute, staged, walk
from .collect import Pair, Target
from .importance import Key, Metric, importance
from .linalg import exact_matmul
from .loop import Block, Recipe, choose, evidence, uses_activations
from .pattern import Pattern
from .sites import Tape, Use, _tensors, feed, parameters, quiet

MANY = 16  # images of the larger of the two probes


def operations(model: nn.Module, batch: Any) -> dict[str, int]:
    """Multiplications and additions per image of every product with a parameter, by site name."""
    images = len(_tensors(batch)[0])
    found: dict[str, int] = {}

    def use(u: Use) -> None:
        rows = "" if u.rows is None else f"[{u.rows[0]}:{u.rows[1]}]"
        p = named[u.parameter]
        inputs = p[0].numel() if not u.transposed else p.shape[0]
        name = u.parameter + rows
        found[name] = found.get(name, 0) + 2 * u.y.numel() * inputs // images

    named = parameters(model)
    with quiet(model), torch.no_grad(), Tape(named, use):
        feed(model, batch)
    return found


def seconds(
    model: nn.Module, batch: Any, recipe: Recipe, samples: int, tell: Callable[[str], None] = lambda text: None
) -> float | None:
    """Seconds that pruning will take on this machine, as busy as it is now.

    batch: two images.  One block of every kind is really pruned, on a copy, with the two images and with 16 made of
    them: what a block costs is taken as a + b * images.  None for recipes that look at the whole model at once.
    """
    if staged.wanted(recipe):
        return None
    model = copy.deepcopy(model)
    torch.manual_seed(recipe.seed)
    with exact_matmul():
        began = time.perf_counter()
        chosen = choose(model, batch, recipe)
        way = walk.Walk(model, chosen.units, batch)
        fixed = time.perf_counter() - began
        if uses_activations(recipe):
            few, many = batch, _more(batch, MANY)
            images = [len(_tensors(b)[0]) for b in (few, many)]
            forward = _clock(lambda: _run(model, many)) / images[1]
        else:
            few = many = batch
            images, forward = [2, 2], 0.0
        target = Target(**recipe.target)
        every = [s for u in chosen.units for s in u.sites]
        weights: list[Any] = [{}, {}]
        metrics: dict[Key, Metric] = {}
        per_image, streams = forward, 2 if recipe.refine is not None or target.mix > 0 else 1
        if "gram" in evidence(recipe) and (target.importance > 0 or target.metric > 0):
            tell("timing the influence of samples")
            importance(model, every, [few], target.importance, target.metric, seed=recipe.seed)
            started = time.perf_counter()
            found, metrics = importance(model, every, [many], target.importance, target.metric, seed=recipe.seed)
            per_image += (time.perf_counter() - started) / images[1]
            weights = [importance(model, every, [few], target.importance, 0.0, seed=recipe.seed)[0][0], found[0]]
        if recipe.permute != "none" and recipe.pattern().m:
            tell("timing the order of channels")
            fixed += _permuting(model, batch, every, chosen.patterns, recipe, forward, samples)
        entries = [way.enter([b])[0] for b in (few, many)]
        known: dict[Any, tuple[float, float]] = {}
        total = fixed + samples * per_image
        for i, unit in enumerate(chosen.units):
            kind = (type(unit.module), [(s.shape, s.conv, s.uses) for s in unit.sites], _shapes(entries[0]))
            key = repr(kind)
            if key not in known:
                tell(f"timing {unit.name}")
                block = _Timed(way, i, entries, weights, recipe, target, chosen.patterns, metrics)
                if not known:
                    block.once(0)  # the first run pays for what is loaded and set up once
                first, second = block.once(0), block.once(1)
                slope = max(0.0, (second - first) / max(1, images[1] - images[0]))
                known[key] = (max(0.0, second - slope * images[1]), slope)
            a, b = known[key]
            total += a + b * samples
            if i + 1 < len(chosen.units) and uses_activations(recipe):
                few_next = way.advance(i, entries[0])
                began = time.perf_counter()
                entries = [few_next, way.advance(i, entries[1])]
                # measured, not taken from a forward: between some blocks the model's own forward runs again
                total += streams * samples * (time.perf_counter() - began) / images[1]
    return total


@dataclass
class _Timed:
    """One block, pruned for its time and put back."""

    way: walk.Walk
    index: int
    entries: list[Any]
    weights: list[Any]
    recipe: Recipe
    target: Target
    patterns: dict[str, Pattern]
    metrics: dict[Key, Metric]

    def once(self, k: int) -> float:
        """Seconds with entry k."""
        unit = self.way.units[self.index]
        tensors = {**parameters(self.way.model), **dict(self.way.model.named_buffers())}
        dense = {n: tensors[n].detach().clone() for s in unit.sites for n in (s.parameter, s.bias, s.norm) if n}
        # two objects in the pair: the streams count as parted, as they are behind the first block
        pair = Pair(self.entries[k], dict(self.entries[k]), self.weights[k])
        rest = (dense, self.recipe, self.target, self.patterns, self.metrics)
        block = Block(self.way, self.index, unit, [pair], self.entries[0], *rest)
        took = _clock(lambda: block.prune(tensors, lambda entry: None))
        with torch.no_grad():
            for n, t in dense.items():
                tensors[n].copy_(t)
        return took


def _permuting(
    model: nn.Module, batch: Any, every: list[Any], patterns: dict[str, Pattern], recipe: Recipe, forward: float,
    samples: int,
) -> float:  # fmt: skip
    """Seconds of the order of channels: what is done once, so many rounds, and a forward of so many images."""
    options = permute.Options(rounds=1)
    spent = []
    for rounds in (1, 1, 5):  # the first run pays for what is set up once
        work = copy.deepcopy(model)
        some = replace(options, rounds=rounds)
        args = (work, [batch], every, patterns, recipe.permute, batch, some)
        spent.append(_clock(lambda: permute.permute(*args)))  # noqa: B023
    default = permute.Options()
    a_round = max(0.0, spent[2] - spent[1]) / 4
    return spent[1] + a_round * (default.rounds - 1) + 2 * forward * samples


def _more(batch: Any, images: int) -> Any:
    """So many images from a few: repeated, with noise of a tenth of their spread."""
    generator = torch.Generator().manual_seed(0)

    def repeat(t: Any) -> Any:
        if not torch.is_tensor(t) or not t.dim():
            return t
        out = t.repeat(-(-images // len(t)), *[1] * (t.dim() - 1))[:images]
        if not t.is_floating_point():
            return out
        noise = torch.randn(out.shape, generator=generator).to(out)
        return out + 0.1 * t.std() * noise

    return torch.utils._pytree.tree_map(repeat, batch)


def _run(model: nn.Module, batch: Any) -> None:
    with quiet(model), torch.no_grad():
        feed(model, batch)


def _shapes(tree: Any) -> list[Any]:
    return [tuple(t.shape[1:]) for t in _tensors(tree)]


def _clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
