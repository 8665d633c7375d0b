"""Reorder channels before pruning, so that an n:m mask loses less; the dense model computes what it did.

Hidden units of an MLP, the channels of v and o inside a head, and the channels between two convolutions stand in an
arbitrary order, yet that order decides which weights share a group of m.  channels.py finds what can be reordered
together, regroup.py the order.  Every reordered model is run on a batch and compared with the one before: what does not
give the same outputs up to rounding is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import channels, ranks, regroup
from .channels import Axis, Channels, Member
from .linalg import inverse_of, single, symmetric
from .pattern import Pattern
from .sites import Site, Tape, Use, _tensors, feed, marks, parameters, placed, quiet

# What an order should keep: |w|, |w| times the norm of its input, or the OBS saliency |w| / sqrt([H⁻¹]_jj).
SCORES = ("none", "magnitude", "activation", "obs")
TOLERANCE = 2e-3  # of the outputs' spread in float32: reordering the terms of sums rounds differently


@dataclass(frozen=True)
class Options:
    """rounds: of exchanges (regroup.py).  images: that the scores are taken from.  readers: channels that more pruned
    weights than this read, such as a residual stream, keep their order, which users may know.
    power: of the score, before it is summed.  ridge: as in the OBS method.
    """

    rounds: int = 30
    images: int = 64
    readers: int = 4
    power: float = 1.0
    ridge: float = 0.1


@dataclass
class Group:
    """Channels that can be reordered, and the pruned weights that read them along their groups of m."""

    channels: Channels
    readers: list[tuple[str, int]]  # (parameter, its dimension)
    kept: tuple[float, float] = (0.0, 0.0)  # share of the score under the mask: before, after
    reason: str | None = None  # why the order stayed
    order: Tensor | None = None  # (*along, channels), as `apply` takes it


def groups(model: nn.Module, batch: Any, sites: list[Site], patterns: dict[str, Pattern]) -> list[Group]:
    """The channels whose order matters to a pruned weight.  batch: one or two images."""
    m = next(iter(patterns.values())).m
    inputs = {}
    for s in sites:
        if s.name in patterns:
            inputs[s.parameter] = 1 if s.conv is not None else 0 if s.transposed else -1
    found = []
    for c in channels.find(model, batch):
        readers = []
        for member in c.members:
            dim = inputs.get(member.name)
            if dim is None:
                continue
            dim = dim % (member.dimension[-1] + 1) if dim < 0 else dim
            inside = [a for a, d in zip(member.axes, member.dimension, strict=True) if d == dim]
            if inside and inside[-1] is c.axis and c.size % m == 0 and c.size > m:
                readers.append((member.name, dim))
        simple = all(_count(member, c.axis) == 1 or not c.along for member in c.members) and all(
            _count(member, a) == 1 for member in c.members for a in c.along
        )
        if readers and simple:
            found.append(Group(c, readers))
    return found


def _count(member: Member, axis: Axis) -> int:
    return sum(a is axis for a in member.axes)


# ------------------------------------------------------------------------------------------------ moving the channels
def reorder(tensor: Tensor, member: Member, c: Channels, order: Tensor) -> Tensor:
    """The tensor with entry order[..., j] in place j of the channels.  order: (*along, channels)."""
    sizes = [a.size for a in member.axes]
    t = tensor.reshape(sizes)
    for k, axis in enumerate(member.axes):
        if axis is not c.axis:
            continue
        at = {id(a): i for i, a in enumerate(c.along)}
        places = [(at[id(a)], p) for p, a in enumerate(member.axes) if id(a) in at]
        places.append((len(c.along), k))
        places.sort(key=lambda pair: pair[1])
        index = order.permute([i for i, _ in places])
        shape = [1] * len(sizes)
        for size, (_, p) in zip(index.shape, places, strict=True):
            shape[p] = size
        t = t.gather(k, index.reshape(shape).expand(sizes))
    return t.reshape(tensor.shape)


def apply(tensors: dict[str, Tensor], c: Channels, order: Tensor) -> None:
    """Reorder every member in place.  order: (*along, channels)."""
    with torch.no_grad():
        for member in c.members:
            t = tensors[member.name]
            t.copy_(reorder(t.detach().clone(), member, c, order.to(t.device)))


def problem(score: Tensor, member: Member, c: Channels) -> Tensor:
    """A parameter's scores as (along, rows, channels): for each entry along, all that shares the order."""
    t = score.reshape([a.size for a in member.axes])
    k = next(i for i in range(len(member.axes) - 1, -1, -1) if member.axes[i] is c.axis)
    along = [next(i for i, a in enumerate(member.axes) if a is x) for x in c.along]
    rest = [i for i in range(len(member.axes)) if i != k and i not in along]
    t = t.permute([*along, *rest, k])
    return t.reshape(max(1, t.shape[: len(along)].numel()), -1, c.size)


# ------------------------------------------------------------------------------------------------------------ scores
def some(batches: Sequence[Any], count: int) -> Iterator[Any]:
    """`count` images of those of all ranks, drawn by their content, so that ranks and batches do not change them."""
    found = [marks(batch) for batch in batches]
    every = sorted(m for part in ranks.gather([m for ms in found for m in ms]) for m in part)
    last = every[min(count, len(every)) - 1]
    for batch, each in zip(batches, found, strict=True):
        index = [k for k, m in enumerate(each) if m <= last]
        if index:
            yield tree_map(lambda t, index=index: t[index] if torch.is_tensor(t) and t.dim() else t, batch)


def moments(
    model: nn.Module, sites: list[Site], batches: Sequence[Any], diagonal: bool, images: int
) -> dict[str, Tensor]:
    """sum x xᵀ of the inputs of each site (groups, in, in), or its diagonal (groups, in), in the dense network.

    images: how many are enough.
    """
    at = {(s.parameter, s.rows): s for s in sites}
    named = parameters(model)
    # on a rank without images too; wide sums of narrow products, so that the order of the batches leaves no trace
    sums = {}
    for s in sites:
        like, shape = named[s.parameter], (s.shape[0], s.shape[2]) if diagonal else (s.shape[0], s.shape[2], s.shape[2])
        sums[s.name] = torch.zeros(shape, dtype=ranks.wide(like), device=like.device)

    def use(u: Use) -> None:
        s = at.get((u.parameter, u.rows))
        if s is None:
            return
        x = single(s.columns(u.x.detach()))
        step = x.square().sum(1) if diagonal else symmetric(x, x)
        sums[s.name] += step

    device = next(model.parameters()).device
    with quiet(model), torch.no_grad(), Tape(named, use):
        for batch in some(batches, images):
            feed(model, placed(batch, device))
    ranks.sum_(sums.values())
    exact = any(p.dtype == torch.float64 for p in named.values())
    return {name: total if exact else total.float() for name, total in sums.items()}


def scores(
    model: nn.Module, sites: list[Site], batches: Sequence[Any], kind: str, options: Options
) -> dict[str, Tensor]:  # fmt: skip
    """What each weight is worth, by parameter, in the parameter's own layout; not negative."""
    named = parameters(model)
    data = moments(model, sites, batches, kind == "activation", options.images) if kind != "magnitude" else {}
    found = {s.parameter: torch.zeros_like(named[s.parameter]) for s in sites}
    for s in sites:
        w = s.read(named[s.parameter])
        if kind == "magnitude":
            value = w.abs()
        elif kind == "activation":
            value = w.abs() * data[s.name].sqrt()[..., None, :]
        else:
            xx = data[s.name]
            eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
            scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
            inverse = inverse_of(xx + options.ridge * scale[..., None, None] * eye)
            value = w.abs() / inverse.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
        s.write(found[s.parameter], value.pow(options.power))
    return found


# ----------------------------------------------------------------------------------------------------------- the whole
def permute(
    model: nn.Module,
    batches: Sequence[Any],
    sites: list[Site],
    patterns: dict[str, Pattern],
    score: str,
    small: Any,
    options: Options = Options(),
) -> list[Group]:
    """Reorder the channels of `model` in place; what was done, group by group.

    batches: calibration images; sites, patterns: what will be pruned, n:m.  score: one of SCORES but none.  small: one
    or two images, the same ones on every rank; the model's outputs on them are the same up to rounding afterwards.
    """
    pattern = next(iter(patterns.values()))
    n, m = pattern.n, pattern.m
    found = groups(model, small, sites, patterns)
    found = [g for g in found if len(g.readers) <= options.readers]
    if not found:
        return []
    tensors = {**parameters(model), **dict(model.named_buffers())}
    before = _run(model, small)
    read = {name for g in found for name, _ in g.readers}
    worth = scores(model, [s for s in sites if s.parameter in read and s.name in patterns], batches, score, options)
    for g in found:
        c = g.channels
        members = {member.name: member for member in c.members}
        stacked = torch.cat([problem(worth[name], members[name], c) for name, _ in g.readers], 1)
        order = regroup.order(stacked, n, m, rounds=options.rounds)
        new = stacked.gather(2, order[:, None, :].expand_as(stacked))
        g.kept = _kept(stacked, n, m), _kept(new, n, m)
        order = order.view(*[a.size for a in c.along], c.size)
        old = {member.name: tensors[member.name].detach().clone() for member in c.members}
        apply(tensors, c, order)
        worst = _apart(before, _run(model, small))
        if ranks.agree(float(not worst < TOLERANCE)):  # what one process refuses, none does
            with torch.no_grad():
                for name, t in old.items():
                    tensors[name].copy_(t)
            g.reason = f"the reordered model's outputs moved by {worst:.1g} of their spread"
            continue
        g.order = order
        for name in read & members.keys():
            worth[name] = reorder(worth[name], members[name], c, order)
    return found


def again(model: nn.Module, batch: Any, permutation: Mapping[str, Any]) -> bool:
    """Reorder the channels of a dense model in place as a run did, so that its activations can be held against the
    pruned model's value by value.  batch: one or two images.  permutation: what `told` made of the run; False, and
    nothing done, where it does not hold the orders, or they do not belong to this model.
    """
    left = channels.find(model, batch)
    tensors = {**parameters(model), **dict(model.named_buffers())}
    moves = []
    for each in permutation["groups"]:
        if each["reason"] is not None:
            continue
        names, order = set(each["weights"]), [int(k) for k in each.get("order", "").split()]
        like = [c for c in left if {member.name for member in c.members} == names and c.size == each["channels"]]
        if not like or len(order) != math.prod([like[0].size, *(a.size for a in like[0].along)]):
            return False
        left = [c for c in left if c is not like[0]]
        moves.append((like[0], torch.tensor(order).view(*[a.size for a in like[0].along], like[0].size)))
    for c, order_ in moves:
        apply(tensors, c, order_)
    return True


def said(found: list[Group]) -> list[str]:
    """What was done, as notes for the user."""
    moved = [g for g in found if g.reason is None]
    notes = []
    if moved:
        before, after = (100 * sum(g.kept[i] for g in moved) / len(moved) for i in (0, 1))
        notes.append(f"{len(moved)} sets of channels were reordered: the mask keeps {after:.1f} % of the score in the "
                     f"weights that read them, and would have kept {before:.1f} %.")  # fmt: skip
    for g in found:
        if g.reason is not None:
            notes.append(f"{g.readers[0][0]}: the order of its channels stays, since {g.reason}.")
    if not found:
        notes.append("no channels of this model can be reordered: permute changed nothing.")
    return notes


def told(found: list[Group], score: str) -> dict[str, Any]:
    """The reordering as hf_prune.json holds it."""
    listed = []
    for g in found:
        listed.append(
            {
                "channels": g.channels.size,
                "weights": [member.name for member in g.channels.members],
                "readers": [name for name, _ in g.readers],
                "kept_before": g.kept[0],
                "kept_after": g.kept[0] if g.reason else g.kept[1],
                "reason": g.reason,
                # text, because a list would be a line per channel
                **({} if g.order is None else {"order": " ".join(map(str, g.order.flatten().tolist()))}),
            }
        )
    return {"score": score, "groups": listed}


def _kept(score: Tensor, n: int, m: int) -> float:
    top = score.unflatten(-1, (-1, m)).topk(n, dim=-1).values.sum()
    return float(top / score.sum().clamp_min(torch.finfo(score.dtype).tiny))


def _run(model: nn.Module, batch: Any) -> list[Tensor]:
    device = next(model.parameters()).device
    with quiet(model), torch.no_grad():
        out = feed(model, placed(batch, device))
    return [t.detach().double() for t in _tensors(out) if t.is_floating_point()]


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two outputs, in units of the first one's standard deviation; inf where not finite."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            apart = float((a - b).abs().max() / a.std(unbiased=False).clamp_min(1e-30))
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst
