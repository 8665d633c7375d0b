"""Batches -> evidence.  The only place where sums over samples and ranks happen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import junction, ranks
from .objective import Gram
from .recall import Call, Key, Recall, held
from .sites import Site, Stop, Tape, Use, _tensors, quiet
from .streams import load
from .walk import Unit, Walk, _hooks


@dataclass(frozen=True)
class Target:
    """What a layer's output is fitted to.

    mix: 0 is the dense layer applied to the pruned network's inputs (cascade), 1 the dense network's own output.
    residual: a layer that adds to the residual stream aims at the stream, so that it makes good for earlier errors.
    bias: refit biases too (or the running mean of the batch norm that follows).
    importance: how far samples weigh by their influence on the model's output (importance.py) rather than alike.
    metric: the same for the directions of a layer's output; couples the rows of a weight.
    caution: targets and ridges trust the images less behind many weights that were fitted to few samples.  With c the
    inputs per effective sample (objective.py), summed over the layers up to this one, mix is divided and ridges are
    multiplied by 1 + caution * c.
    group: `layer`, a layer's inputs are those of the block with the layers before it pruned, or `block`, one forward
    for all layers of a block.
    """

    mix: float = 0.5
    residual: bool = True
    bias: bool = True
    importance: float = 0.9
    metric: float = 0.0
    caution: float = 0.0
    group: str = "layer"

    def __post_init__(self) -> None:
        if self.group not in ("layer", "block"):
            raise ValueError(f"target.group {self.group}: choose layer or block.")
        if self.caution < 0:
            raise ValueError(f"target.caution {self.caution:g}: is 0 or more.")

    def stages(self, unit: Unit) -> list[list[Site]]:
        """The sites of a unit, those together whose inputs come from one forward."""
        return [unit.sites] if self.group == "block" else unit.stages


@dataclass
class Ahead:
    """What the dense network does with one batch in the unit that is being pruned."""

    goals: dict[str, list[Tensor]]  # site name -> the outputs of its uses
    joined: dict[int, Tensor]  # the residual stream after its additions
    out: Any  # what the unit returns

    def size(self) -> int:
        """Bytes."""
        kept = [*self.joined.values(), *(t for ts in self.goals.values() for t in ts), *_tensors(self.out)]
        return sum(t.numel() * t.element_size() for t in kept)


@dataclass
class Pair:
    """One batch on its way through the model: through the dense weights, and through what has been written so far."""

    dense: Any
    pruned: Any
    weights: dict[tuple, Tensor] = field(default_factory=dict)  # (source, conv) -> importance of each sample
    ahead: Ahead | None = None  # of all sites of the unit that is being pruned, where it is kept for all its stages
    calls: dict[Key, Call] = field(default_factory=dict)  # what its modules made of the pruned stream, where finished

    @property
    def drifted(self) -> bool:
        return self.dense is not self.pruned


@contextlib.contextmanager
def holding(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The model with `values` in place of the parameters and buffers of those names, for the length of a `with`."""
    tensors: dict[str, Any] = {n: functools.reduce(getattr, n.split("."), model) for n in values}
    before = {n: t.data for n, t in tensors.items()}
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
                found = junction.find(lambda: walk.call(unit.sites[0].unit, entry), modules[site.module], site)
            if found is not None:
                site.junction, site.scale = found


def grams(
    walk: Walk, i: int, sites: list[Site], pairs: list[Pair], dense: dict[str, Tensor], target: Target, touched: bool
) -> list[Gram]:
    """Gram sums of the sites of one stage of unit i, over all pairs and ranks.

    dense: original tensors of everything already changed.  touched: an earlier stage of this unit has been written.
    Products of a batch are in float32, their sums over batches and ranks in float64 and rounded at the end: so the
    order of the batches, and the ranks that hold them, leave no trace in the bits.
    """
    stage = Stage(walk, i, sites, dense, target)
    room = KEPT - sum(held(pair.calls) for pair in pairs) if walk.keeps else 0
    with quiet(walk.model):
        for pair in pairs:
            before = held(pair.calls)
            stage.add(pair, compare=target.mix > 0 and (pair.drifted or touched), keep=room > 0)
            room -= held(pair.calls) - before
    shared = {id(t): t for g in stage.sums for t in (g.xx, g.sx)}
    ranks.sum_(shared.values())
    for g in stage.sums:
        counts = torch.tensor([g.count, g.squares], dtype=torch.float64)
        ranks.sum_([g.xd, g.dd, g.sd, counts])
        g.count, g.squares = counts.tolist()
    made = {id(t): t.to(g.weight.dtype) for g in stage.sums for t in (g.xx, g.sx, g.xd, g.dd, g.sd)}
    for g in stage.sums:
        g.xx, g.sx, g.xd, g.dd, g.sd = (made[id(t)] for t in (g.xx, g.sx, g.xd, g.dd, g.sd))
    return stage.sums


# bytes of activations in one unit that may be kept where the walk keeps any; beyond, they are made again
AHEAD = 2**30  # of the dense network, for all stages
KEPT = 2**30  # of the pruned network, for the stages to come


def look_ahead(
    walk: Walk, i: int, sites: list[Site], pairs: list[Pair], dense: dict[str, Tensor], target: Target,
    room: int = AHEAD,
) -> None:  # fmt: skip
    """Fill in `ahead` of as many pairs as there is room for, in bytes; of none where the walk keeps nothing."""
    stage = Stage(walk, i, sites, dense, target)
    with quiet(walk.model):
        for pair in pairs if walk.keeps else ():
            pair.ahead = stage.ahead(pair)
            room -= pair.ahead.size()
            if room < 0:
                pair.ahead = None
                break


class Stage:
    """The sites of one stage, and their sums while they grow.  The model is to be quiet (sites.py)."""

    def __init__(self, walk: Walk, i: int, sites: list[Site], dense: dict[str, Tensor], target: Target) -> None:
        self.walk, self.index, self.sites, self.dense = walk, i, sites, dense
        self.modules = dict(walk.model.named_modules())
        self.place = {(s.parameter, s.rows): k for k, s in enumerate(sites)}
        self.uses = sum(s.uses for s in sites)
        self.first: list[int] = []  # the first site with the same input: it holds the moments that they share
        for s in sites:
            self.first.append(next(j for j, t in enumerate(sites) if (t.source, t.conv) == (s.source, s.conv)))
        # sites whose output joins the residual stream, and the addition where it does
        self.joined = {k: s.junction for k, s in enumerate(sites) if target.residual and s.junction is not None}

    @functools.cached_property
    def sums(self) -> list[Gram]:
        weights = [s.read(self.walk.model.get_parameter(s.parameter)) for s in self.sites]
        made = [Gram.zeros(w, ranks.wide(w)) for w in weights]
        for gram, first in zip(made, self.first, strict=True):
            gram.xx, gram.sx = made[first].xx, made[first].sx
        return made

    def add(self, pair: Pair, compare: bool, keep: bool = False) -> None:
        """Count one batch in.  compare: the dense network's activations may differ, so corrections are wanted.

        keep: enter in the pair what need not be computed again for the next stages.
        """
        ahead = (pair.ahead or self.ahead(pair, whole=False)) if compare else Ahead({}, {}, None)
        columns: dict[tuple[int, int], Tensor] = {}
        nth = dict.fromkeys(range(len(self.sites)), 0)
        kept: dict[int, Tensor] = {}
        positions = load(pair.pruned.get("positions"))

        def note(k: int, use: Use) -> None:
            site, gram, first = self.sites[k], self.sums[k], self.first[k]
            weights = pair.weights.get((site.source, site.conv))
            key = (first, nth[k])
            if key not in columns:
                columns[key] = site.columns(use.x.detach()).to(gram.weight.dtype)
                self.sums[first].add_inputs(columns[key], weights)
                if positions is not None and positions.shape[::2] == columns[key].shape[1:]:
                    self.sums[first].add_positions(positions.to(columns[key]), weights)
            if k != first:
                gram.count_in(columns[key].shape[1], weights)
            if compare and k in self.joined:
                kept[k] = columns[key].clone()  # the forward goes on and may write into its input
            elif compare:
                d = site.outputs(ahead.goals[site.name][nth[k]]) - site.outputs(use.y.detach())
                gram.add_corrections(columns[key], d.to(gram.weight.dtype), weights)
            nth[k] += 1

        if not (compare and self.joined):
            with torch.no_grad():
                self.watch(pair.pruned, note, joining=False, calls=pair.calls, keep=keep)
            return
        leaves = {k: junction.Leaf() for k in self.joined}
        hooks = [self.modules[self.sites[k].module].register_forward_hook(leaf) for k, leaf in leaves.items()]
        with _hooks(*hooks), torch.enable_grad():
            sums, _ = self.watch(pair.pruned, note, joining=True, calls=pair.calls, keep=keep)
        for k, index in self.joined.items():
            site, y, z, scale = self.sites[k], leaves[k].y, sums[index], self.sites[k].scale
            assert y is not None and scale is not None
            (back,) = torch.autograd.grad(z, y, (ahead.joined[index] - z.detach()).to(z.dtype), retain_graph=True)
            rows = junction.channel_last(site, back).flatten(0, -2) / scale.square().to(back)
            d = rows.view(rows.shape[0], site.shape[0], -1).movedim(1, 0).contiguous()
            self.sums[k].add_corrections(kept[k], d.to(kept[k].dtype), pair.weights.get((site.source, site.conv)))

    def ahead(self, pair: Pair, whole: bool = True) -> Ahead:
        """The dense network's outputs at the sites, and its residual stream where they join it.

        whole: run the unit to its end, also where less would do.
        """
        goals: dict[str, list[Tensor]] = {}

        def keep(k: int, use: Use) -> None:
            if k not in self.joined:
                goals.setdefault(self.sites[k].name, []).append(use.y.clone())

        with holding(self.walk.model, self.dense), torch.no_grad():
            joined, out = self.watch(pair.dense, keep, joining=whole or bool(self.joined), whole=whole)
        return Ahead(goals, joined, out)

    def watch(
        self, entry: Any, on_use: Callable[[int, Use], None], joining: bool, whole: bool = False,
        calls: dict[Key, Call] | None = None, keep: bool = False,
    ) -> tuple[dict[int, Tensor], Any]:  # fmt: skip
        """Run the unit on one entry, only as far as needed unless `whole`: (the additions of the residual stream that
        are wanted, the unit's output if it got there).  calls: what is known of it; keep: and what may be added."""
        seen, out = 0, None

        def on(use: Use) -> None:
            nonlocal seen
            k = self.place.get((use.parameter, use.rows))
            if k is not None:
                recall.open = False  # from here on weights will change
                on_use(k, use)
                seen += 1
                if not joining and seen == self.uses:
                    raise Stop

        wanted = set(self.joined.values()) if joining else set()
        # the tape knows weights by where they are stored now
        live: dict[str, Tensor] = {s.parameter: self.walk.model.get_parameter(s.parameter) for s in self.sites}
        last = None if whole else max(wanted, default=None)
        additions = junction.Additions(last, wanted)
        recall = Recall(self.walk.units[self.index].module, {} if calls is None else calls, additions)
        recall.open = keep
        with additions, Tape(live, on), recall if calls is not None else contextlib.nullcontext():
            with contextlib.suppress(Stop):
                out = self.walk.call(self.index, entry)
        return additions.results, out
