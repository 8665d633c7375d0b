"""What a run will cost, measured on two images before it starts: operations of every weight, and time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import distill, loop, permute, staged, walk
from .collect import Target
from .linalg import exact_matmul
from .loop import Recipe, Selection, choose, evidence, uses_activations
from .sites import Tape, Use, _tensors, cut, feed, parameters, quiet
from .stopwatch import BETWEEN, BLOCKS, DISTILLING, LOOKING, REORDERING, WEIGHING, Spent, Stopwatch, clock, now

MANY = 3  # batches of the larger of the two probes


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
) -> dict[str, Spent] | None:
    """What pruning will take on this machine, as busy as it is now, by stage; reading the images is not in it.

    batch: two images.  On a copy of the model the loop itself prunes a part of the blocks, one of every kind and the
    one behind it, with one batch of images of their form and with three: a block costs a + b * batches, blocks of a
    kind the same.  What comes before the blocks is measured apart.  None for recipes that see the whole model at once.
    """
    if staged.wanted(recipe):
        return None
    model = copy.deepcopy(model)
    torch.manual_seed(recipe.seed)
    with exact_matmul():
        began = now()
        chosen = choose(model, batch, recipe)
        way = walk.Walk(model, chosen.units, batch)
        total = {LOOKING: now().plus(began, -1.0)}
        seen = uses_activations(recipe)
        size = min(recipe.batch_size, samples) if seen else len(_tensors(batch)[0])
        batches = samples / size if seen else 1.0
        given = [_images(batch, size, k) for k in range(MANY if batches > 1 else 1)] if seen else [batch]
        target = Target(**recipe.target)
        kinds = _kinds(way, batch)
        spots = _spots(kinds, deep=way.mode != "chain")
        part = _part(chosen, spots)

        weighed: Any = None

        def run(count: int, blocks: int | None = None) -> dict[tuple[str, str | None], Spent]:
            watch = Stopwatch(lambda event: None)
            known = (weighed[0] * count, dict(weighed[1])) if weighed else None  # a run empties it
            with _put_back(model):
                loop.run(model, given[:count], recipe, part, target, watch, None, None, blocks, None, known)
            watch.lap()
            return {(lap.stage, lap.block): lap.spent for lap in watch.laps}

        if "gram" in evidence(recipe) and (target.importance > 0 or target.metric > 0):
            tell("timing the influence of samples")
            total[WEIGHING], weighed = _weighing(model, given[0], chosen, recipe, target, samples)
        if recipe.permute != "none" and recipe.pattern().m:
            tell("timing the order of channels")
            total[REORDERING] = _permuting(model, batch, given, chosen, recipe, batches)
        epochs = distill.Options(**recipe.distill).epochs
        if epochs:
            tell("timing the distillation")
            few = given[0] if seen else _images(batch, min(recipe.batch_size, samples), 0)
            distill.rehearse(model, chosen.units, few)  # pays for what is set up once
            ahead = clock(lambda: distill.rehearse(model, chosen.units, few, 0))
            step = clock(lambda: distill.rehearse(model, chosen.units, few)).plus(ahead, -1.0)
            distilling = Spent().plus(step, epochs * samples / len(_tensors(few)[0]))
        tell("timing the first block")
        run(1, 1)  # pays for what is loaded and set up once
        if seen:
            total[LOOKING] = total[LOOKING].plus(clock(lambda: way.enter(given[:1])), batches)
        tell(f"timing {len(spots)} of {len(kinds)} blocks" if len(kinds) > 1 else "timing the block")
        one = run(1)
        three = run(MANY) if batches > 1 else one
    more = (batches - 1) / (MANY - 1)
    laps = {key: spent.plus(_risen(spent, three[key]), more) for key, spent in one.items()}
    total[BLOCKS] = _summed(kinds, {i: laps[BLOCKS, chosen.units[i].name] for i in spots})
    if seen and len(kinds) > 1:
        total[BETWEEN] = _summed(
            kinds[:-1], {i: laps[BETWEEN, chosen.units[i].name] for i in spots if i + 1 in spots}
        )
    if epochs:
        total[DISTILLING] = distilling
    return total


def _summed(kinds: list[str], known: dict[int, Spent]) -> Spent:
    """Over all units; those not measured lie on a line between the measured ones of their kind."""
    found = []
    for which in (0, 1):
        total = 0.0
        for i, kind in enumerate(kinds):
            alike = [j for j in sorted(known) if kinds[j] == kind] or sorted(known)
            total += float(np.interp(i, alike, [known[j][which] for j in alike]))
        found.append(total)
    return Spent(*found)


def _kinds(way: walk.Walk, batch: Any) -> list[str]:
    """What tells units apart as far as their cost goes: their layers, and the shapes that they are called with."""
    with quiet(way.model), torch.no_grad():
        inputs, _ = way._record(batch)
    return [
        repr((type(u.module), [(s.shape, s.conv, s.uses) for s in u.sites], _shapes(call)))
        for u, (_, call) in zip(way.units, inputs, strict=True)
    ]


def _spots(kinds: list[str], deep: bool) -> list[int]:
    """The first unit of every kind, and the one behind it.

    deep: where a part of the model's own forward runs for every unit, the cost rises with the depth: the last as well.
    """
    ends = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    wanted = {j for i in ends.values() for j in (i, i + 1)}
    if deep:
        wanted |= set({kind: i for i, kind in enumerate(kinds)}.values())
    return sorted(j for j in wanted if j < len(kinds))


def _part(chosen: Selection, spots: list[int]) -> Selection:
    """The selection with these units alone."""
    units = []
    for place, i in enumerate(spots):
        unit = chosen.units[i]
        units.append(replace(unit, sites=[replace(s, unit=place) for s in unit.sites]))
    names = {s.name for u in units for s in u.sites}
    return replace(chosen, units=units, patterns={n: p for n, p in chosen.patterns.items() if n in names})


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    tensors = {**parameters(model), **dict(model.named_buffers())}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, t in before.items():
                tensors[name].copy_(t)


def _risen(few: Spent, many: Spent) -> Spent:
    return Spent(max(0.0, many.seconds - few.seconds), max(0.0, many.cpu - few.cpu))


def _permuting(
    model: nn.Module, batch: Any, given: list[Any], chosen: Selection, recipe: Recipe, batches: float
) -> Spent:  # fmt: skip
    """The order of channels: what is done once, so many rounds of exchanges, and what every batch adds."""
    every = [s for u in chosen.units for s in u.sites]

    def order(count: int, rounds: int) -> Spent:
        work, options = copy.deepcopy(model), permute.Options(rounds=rounds)
        return clock(
            lambda: permute.permute(work, given[:count], every, chosen.patterns, recipe.permute, batch, options)
        )

    once, rounds = order(1, 1), permute.Options().rounds
    batches = min(batches, permute.Options().images / len(_tensors(given[0])[0]))  # it looks at no more
    more = _risen(once, order(MANY, 1)) if batches > 1 else Spent()
    ten = _risen(once, order(1, 11))
    return once.plus(more, (batches - 1) / (MANY - 1)).plus(ten, (rounds - 1) / 10)


def _weighing(
    model: nn.Module, many: Any, chosen: Selection, recipe: Recipe, target: Target, samples: int
) -> tuple[Spent, Any]:  # fmt: skip
    """The influence of samples on the output, linear in the images beyond half a batch; and that of this batch."""
    every = [s for u in chosen.units for s in u.sites]
    size = len(_tensors(many)[0])
    half = max(1, size // 2)
    found: list[Any] = []

    def weigh(count: int) -> Spent:
        some = [cut(many, 0, count)]
        return clock(lambda: found.append(loop.weigh(model, every, some, target, recipe.seed, None)))

    weigh(1)  # pays for what is set up once
    few, whole = weigh(half), weigh(size)
    return whole.plus(_risen(few, whole), (samples - size) / max(1, size - half)), found[-1]


def _images(batch: Any, count: int, seed: int) -> Any:
    """A batch of so many images, in the form of one of a few: pixels from `_leaves`, anything else repeated."""

    def one(t: Any) -> Any:
        if not torch.is_tensor(t) or not t.dim():
            return t
        if t.is_floating_point() and t.dim() >= 4 and min(t.shape[-2:]) >= 8:
            return _leaves(t, count, seed)
        out = t.repeat(-(-count // len(t)), *[1] * (t.dim() - 1))[:count]
        if not t.is_floating_point():
            return out
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
        return out + 0.1 * t.std() * noise

    return torch.utils._pytree.tree_map(one, batch)


def _leaves(t: Tensor, count: int, seed: int, discs: int = 100) -> Tensor:
    """Images that make activations about as correlated as photographs do: iterative solvers take as many steps.

    Discs of one colour that cover each other, areas as in "dead leaves" (Lee, Mumford and Huang 2001), and noise of
    spectrum 1/f over them, in the range of values of t (images, ..., height, width).
    """
    draw = torch.Generator().manual_seed(seed)
    height, width = t.shape[-2:]
    planes = t[0, ..., 0, 0].numel()
    down, across = torch.arange(height)[:, None] / height, torch.arange(width) / width
    general, tint = torch.randn(count, 1, generator=draw), torch.randn(count, planes, generator=draw)
    ground = (0.5 * (general + 0.4 * tint))[..., None, None]
    out = ground.expand(-1, -1, height, width)
    for share in torch.rand(discs, count, generator=draw):
        squared = 1 / (share / 0.5**2 + (1 - share) / 0.02**2)  # radii between 2 and 50 % of the image
        y, x = torch.rand(2, count, 1, 1, generator=draw)
        inside = (down - y).square() + (across - x).square() < squared[:, None, None]
        colour = torch.randn(count, 1, generator=draw) + 0.4 * torch.randn(count, planes, generator=draw)
        out = torch.where(inside[:, None], 0.6 * colour[..., None, None] + ground, out)
    frequency = torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()
    frequency[0, 0] = 1 / max(height, width) ** 2
    white = torch.randn(count, planes, height, width, generator=draw)
    grain = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.sqrt(), s=(height, width))
    shade = (0.45 + 0.27 * (out / out.std() + 0.2 * grain / grain.std())).clamp(0, 1)
    given = t.detach().float().cpu().reshape(len(t), planes, -1)
    low, high = given.amin((0, 2))[:, None, None], given.amax((0, 2))[:, None, None]
    return (low + shade * (high - low)).view(count, *t.shape[1:]).to(t)


def _shapes(tree: Any) -> list[Any]:
    return [tuple(t.shape[1:]) for t in _tensors(tree)]
