"""Batches -> evidence.  The only place where sums over samples and ranks happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    """

    mix: float = 0.5
    residual: bool = True
    bias: bool = True


@dataclass
class Pair:
    """One batch on its way through the model: through the dense weights, and through what has been written so far."""

    dense: Any
    pruned: Any

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
    watched = {s.parameter: named[s.parameter] for s in stage}
    modules = dict(model.named_modules())
    keys = {(s.parameter, s.rows): k for k, s in enumerate(stage)}
    weights = [s.read(named[s.parameter]) for s in stage]
    sums = [[Gram.zeros(w) for w in weights] for _ in range(max(folds, default=0) + 1)]
    joined = [k for k, s in enumerate(stage) if target.residual and s.junction is not None]
    last = max((stage[k].junction or 0 for k in joined), default=-1)
    expected = sum(s.uses for s in stage)

    for pair, fold in zip(pairs, folds, strict=True):
        compare = target.mix > 0 and (pair.drifted or touched)
        goal_y: dict[int, list[Tensor]] = {}
        goal_z: dict[int, Tensor] = {}
        if compare:
            with holding(model, dense), quiet(model), torch.no_grad():
                watch_dense = {n: named[n] for n in watched}
                seen = 0

                def keep(use: Use, stop: bool = not joined) -> None:
                    nonlocal seen
                    k = keys.get((use.parameter, use.rows))
                    if k is None:
                        return
                    seen += 1
                    if k not in joined:
                        goal_y.setdefault(k, []).append(use.y.clone())
                    if stop and seen == expected:
                        raise Stop

                with Tape(watch_dense, keep):
                    if joined:
                        with junction.Additions(last, {stage[k].junction for k in joined}) as sums_dense:
                            _run(walk, i, pair.dense)
                        goal_z = {k: sums_dense.results[stage[k].junction] for k in joined}
                    else:
                        _run(walk, i, pair.dense)

        seen_now: dict[int, list[tuple[Tensor, Tensor]]] = {}
        count = 0

        def note(use: Use, stop: bool = not (joined and compare)) -> None:
            nonlocal count
            k = keys.get((use.parameter, use.rows))
            if k is None:
                return
            count += 1
            seen_now.setdefault(k, []).append((use.x.detach().clone(), use.y.detach().clone()))
            if stop and count == expected:
                raise Stop

        pull: dict[int, Tensor] = {}
        with quiet(model), Tape(watched, note):
            if joined and compare:
                leaves = {k: junction.Leaf() for k in joined}
                hooks = [modules[stage[k].module].register_forward_hook(leaves[k]) for k in joined]
                with _hooks(*hooks), torch.enable_grad(), junction.Additions(last, {stage[k].junction for k in joined}) as now:
                    _run(walk, i, pair.pruned)
            else:
                with torch.no_grad():
                    _run(walk, i, pair.pruned)
        if joined and compare:
            for k in joined:
                z, y = now.results[stage[k].junction], leaves[k].y
                (back,) = torch.autograd.grad(z, y, (goal_z[k] - z.detach()).to(z.dtype), retain_graph=True)
                rows = junction.channel_last(stage[k], back).flatten(0, -2) / stage[k].scale.square().to(back)
                groups = stage[k].shape[0]
                pull[k] = rows.view(rows.shape[0], groups, -1).movedim(1, 0)

        columns: dict[tuple, Tensor] = {}
        for k, site in enumerate(stage):
            for j, (x, y) in enumerate(seen_now.get(k, ())):
                key = (j, site.source, site.conv)
                if key not in columns:
                    columns[key] = site.columns(x).to(weights[k].dtype)
                d = None
                if k in pull:
                    d = pull[k]
                elif compare:
                    d = site.outputs(goal_y[k][j]) - site.outputs(y)
                sums[fold][k].add(columns[key], None if d is None else d.to(weights[k].dtype))
    for fold_sums in sums:
        for g in fold_sums:
            count_all = torch.tensor([g.count], dtype=torch.float64)
            ranks.sum_([g.xx, g.xd, g.dd, g.sx, g.sd, count_all])
            g.count = float(count_all)
    return sums
