"""Batches -> evidence.  The only place where sums over samples and ranks happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import junction, ranks
from .objective import Gram
from .sites import Site, Stop, Tape, Use, parameters, quiet
from .walk import Unit, Walk, _hooks


@dataclass(frozen=True)
class Target:
    """What a layer's output is fitted to.

    mix: 0 is the dense layer applied to the pruned network's inputs (cascade), 1 the dense network's own output.
    residual: a layer that adds to the residual stream aims at the stream, so that it makes good for earlier errors.
    bias: refit biases too (or the running mean of the batch norm that follows).
    importance: how far samples weigh by their influence on the model's output (importance.py) rather than alike.
    """

    mix: float = 0.5
    residual: bool = True
    bias: bool = True
    importance: float = 0.9


@dataclass
class Pair:
    """One batch on its way through the model: through the dense weights, and through what has been written so far."""

    dense: Any
    pruned: Any
    weights: dict[tuple, Tensor] = field(default_factory=dict)  # (source, conv) -> importance of each sample

    @property
    def drifted(self) -> bool:
        return self.dense is not self.pruned


@contextlib.contextmanager
def holding(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The model with `values` in place of the parameters and buffers of those names, for the length of a `with`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: tensors[n].data for n in values}
    for n, v in values.items():
        tensors[n].data = v
    try:
        yield
    finally:
        for n, v in before.items():
            tensors[n].data = v


def find_junctions(walk: Walk, unit: Unit, entry: Any) -> None:
    """Fill in `junction` and `scale` of the unit's sites, by one trial run each on a small batch."""
    modules = dict(walk.model.named_modules())
    with quiet(walk.model):
        for site in unit.sites:
            found = None
            if site.rows is None and site.uses == 1:
                found = junction.find(lambda: walk.call(unit_index(walk, unit), entry), modules[site.module], site)
            if found is not None:
                site.junction, site.scale = found


def unit_index(walk: Walk, unit: Unit) -> int:
    return next(i for i, u in enumerate(walk.units) if u is unit)


def _run(walk: Walk, i: int, entry: Any) -> None:
    with contextlib.suppress(Stop):
        walk.call(i, entry)


def grams(
    walk: Walk, i: int, stage: list[Site], pairs: list[Pair], dense: dict[str, Tensor], target: Target,
    touched: bool, folds: list[int],
) -> list[list[Gram]]:  # fmt: skip
    """Gram sums of the sites of one stage: per fold, per site.

    dense: original tensors of everything already changed.  touched: an earlier stage of this unit has been written.
    folds: which fold each pair belongs to; every image counts in exactly one.
    """
    model = walk.model
    named = parameters(model)
    modules = dict(model.named_modules())
    watched = {s.parameter: named[s.parameter] for s in stage}
    place = {(s.parameter, s.rows): k for k, s in enumerate(stage)}
    sums = [[Gram.zeros(s.read(named[s.parameter])) for s in stage] for _ in range(max(folds, default=0) + 1)]
    for fold in sums:  # sites with the same input share its moments
        for g, s in zip(fold, stage, strict=True):
            first = next(f for f, t in zip(fold, stage, strict=True) if (t.source, t.conv) == (s.source, s.conv))
            g.xx, g.sx = first.xx, first.sx
    joined = [k for k, s in enumerate(stage) if target.residual and s.junction is not None]
    wanted = {stage[k].junction for k in joined}
    last = max(wanted, default=None)
    expected = sum(s.uses for s in stage)

    for pair, fold in zip(pairs, folds, strict=True):
        compare = target.mix > 0 and (pair.drifted or touched)
        goals: dict[int, list[Tensor]] = {}  # outputs of the dense network at the sites that join no stream
        goal_sums: dict[int, Tensor] = {}
        if compare:

            def keep(k: int, use: Use) -> None:
                if k not in joined:
                    goals.setdefault(k, []).append(use.y.clone())  # noqa: B023  consumed within this iteration

            with holding(model, dense), quiet(model), torch.no_grad():
                goal_sums = _watch(walk, i, pair.dense, watched, place, keep, wanted, last, expected)

        counts = dict.fromkeys(range(len(stage)), 0)
        inputs: dict[int, Tensor] = {}
        columns: dict[tuple, Tensor] = {}

        def note(k: int, use: Use) -> None:
            site, gram, nth = stage[k], sums[fold][k], counts[k]  # noqa: B023
            counts[k] += 1  # noqa: B023
            key = (nth, site.source, site.conv)
            if key not in columns:  # noqa: B023
                columns[key] = site.columns(use.x.detach()).to(gram.xx.dtype)  # noqa: B023
                gram.add_inputs(columns[key], pair.weights.get((site.source, site.conv)))  # noqa: B023
            if gram is not next(g for g in sums[fold] if g.xx is gram.xx):  # noqa: B023
                w = pair.weights.get((site.source, site.conv))
                gram.count += columns[key].shape[1] if w is None else float(w.sum())  # noqa: B023
            if compare and k in joined:  # noqa: B023
                inputs[k] = columns[key].clone()  # noqa: B023  the forward goes on and may write into its input
            elif compare:  # noqa: B023
                d = site.outputs(goals[k][nth]) - site.outputs(use.y.detach())  # noqa: B023
                gram.add_corrections(columns[key], d.to(gram.xx.dtype), pair.weights.get((site.source, site.conv)))  # noqa: B023

        with quiet(model):
            if not (joined and compare):
                with torch.no_grad():
                    _watch(walk, i, pair.pruned, watched, place, note, set(), None, expected)
                continue
            leaves = {k: junction.Leaf() for k in joined}
            hooks = [modules[stage[k].module].register_forward_hook(leaves[k]) for k in joined]
            with _hooks(*hooks), torch.enable_grad():
                now = _watch(walk, i, pair.pruned, watched, place, note, wanted, last, expected)
        for k in joined:
            site, z = stage[k], now[stage[k].junction]
            (back,) = torch.autograd.grad(z, leaves[k].y, (goal_sums[site.junction] - z.detach()).to(z.dtype), retain_graph=True)
            rows = junction.channel_last(site, back).flatten(0, -2) / site.scale.square().to(back)
            d = rows.view(rows.shape[0], site.shape[0], -1).movedim(1, 0).contiguous()
            sums[fold][k].add_corrections(inputs[k], d.to(inputs[k].dtype), pair.weights.get((site.source, site.conv)))
    for fold_sums in sums:
        shared: dict[int, Tensor] = {}
        for g in fold_sums:
            count = torch.tensor([g.count], dtype=torch.float64)
            shared |= {id(t): t for t in (g.xx, g.sx)}
            ranks.sum_([g.xd, g.dd, g.sd, count])
            g.count = float(count)
        ranks.sum_(shared.values())
    return sums


def _watch(
    walk: Walk, i: int, entry: Any, watched: dict[str, Tensor], place: dict, on_use: Any, wanted: set, last: int | None,
    expected: int,
) -> dict[int, Tensor]:  # fmt: skip
    """Run unit i on one entry, only as far as needed; returns the wanted additions of the residual stream."""
    seen = 0

    def on(use: Use) -> None:
        nonlocal seen
        k = place.get((use.parameter, use.rows))
        if k is not None:
            on_use(k, use)
            seen += 1
            if last is None and seen == expected:
                raise Stop

    # the tape looks weights up by where they are stored now
    live = {n: walk.model.get_parameter(n) for n in watched}
    with junction.Additions(last, wanted) as additions, Tape(live, on):
        _run(walk, i, entry)
    return additions.results
