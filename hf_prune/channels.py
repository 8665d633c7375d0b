"""Which channels of which weights are one and the same: found by watching one forward, operator by operator.

Every dimension of every tensor of a forward is a list of *axes*, outermost first; an attention output has (heads,
head width) as its last dimension.  An operator either joins axes (a product joins the two it sums over, an addition
those it lines up), or passes them on, or reads them in an order of its own, which freezes them.  What remains after the
forward is a set of axes along which the weights, biases and running statistics can be permuted together without a
change of the model's output.  Operators that are not known freeze all they touch, so nothing is claimed that was not
seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .axes import Axis, Dimension, Label, freeze, fresh, leaves
from .operators import RULES, pointwise
from .sites import feed, quiet


@dataclass
class Member:
    """A parameter or buffer that has the channels: `axes` are those of its dimensions, laid out one after another."""

    name: str
    axes: list[Axis]
    dimension: list[int]  # the dimension that each of `axes` lies in


@dataclass
class Channels:
    """One axis that can be permuted, and everything that is permuted with it.

    along: axes that are there wherever the axis is, such as the heads that a head's channels belong to; for each of
    their entries the permutation may be another.
    """

    axis: Axis
    along: list[Axis]
    members: list[Member] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.axis.size


def find(model: nn.Module, batch: Any) -> list[Channels]:
    """Everything that can be permuted, from one forward in eval mode.  batch: one or two images.

    The axes of the model's inputs and outputs are frozen.
    """
    watch = Watch(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused kernels hide what they do; the ordinary path does the same
    try:
        with quiet(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watch:
            result = feed(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for tensor in tree_leaves(result):
        if torch.is_tensor(tensor):
            for dimension in watch.label(tensor):
                freeze(dimension, "reaches the model's output")
    return watch.channels()


class Watch(TorchDispatchMode):
    """Labels every tensor of a forward.  Tensors are known by identity and kept alive, so that no id is used twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels: dict[int, tuple[Tensor, Label]] = {}
        self.stored: dict[tuple, Label] = {}
        self.named: dict[str, Label] = {}
        self.mixed: list[tuple[list[Axis], list[Axis]]] = []  # (axes that were mixed, the other axes of that tensor)
        self.seen: list[Label] = []
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, t in tensors.items():
            if t.numel() < 2:
                continue
            why = None if t.is_floating_point() else "indices"
            label = tuple((Axis(n, why),) if n > 1 else () for n in t.shape)
            self.named[name] = self.put(t, label)
            self.stored[_place(t)] = label

    # -- labels

    def put(self, tensor: Tensor, label: Label) -> Label:
        assert len(label) == tensor.dim()
        self.labels[id(tensor)] = (tensor, label)
        self.seen.append(label)
        return label

    def label(self, tensor: Tensor) -> Label:
        known = self.labels.get(id(tensor))
        if known is not None:
            return known[1]
        same = self.stored.get(_place(tensor)) if tensor.numel() > 1 else None
        return self.put(tensor, same if same is not None else fresh(tensor.shape, "comes from outside"))

    def mix(self, dimensions: Iterable[Dimension], of: Label) -> None:
        """Note that the entries along `dimensions` were mixed, each alike, at fixed places of the other dimensions."""
        axes = leaves(axis for dimension in dimensions for axis in dimension)
        self.mixed.append((axes, leaves(axis for dimension in of for axis in dimension)))

    # -- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        rule = RULES.get(func.overloadpacket)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        made = rule(self, func, args, kwargs, out) if rule is not None else None
        if made is None:  # not known, or used in a way that is not
            for t in tree_leaves((args, kwargs)):
                if torch.is_tensor(t):
                    for dimension in self.label(t):
                        freeze(dimension, f"read by {func.overloadpacket.__name__}")
            for t in tree_leaves(out):
                if torch.is_tensor(t):
                    self.put(t, fresh(t.shape, f"made by {func.overloadpacket.__name__}"))
            return out
        for t, label in zip([t for t in tree_leaves(out) if torch.is_tensor(t)], made, strict=True):
            self.put(t, label)
        return out

    # -- the result

    def channels(self) -> list[Channels]:
        found: dict[int, Channels] = {}
        for name, label in self.named.items():
            axes = [(leaf, d) for d, dimension in enumerate(label) for leaf in leaves(dimension)]
            member = Member(name, [leaf for leaf, _ in axes], [d for _, d in axes])
            for leaf in dict.fromkeys(member.axes):
                if leaf.frozen is None:
                    found.setdefault(id(leaf), Channels(leaf, [])).members.append(member)
        company: dict[int, set[int]] = {}
        for label in {id(label): label for label in self.seen}.values():
            present = {id(leaf) for dimension in label for leaf in leaves(dimension)}
            for key in present & found.keys():
                company[key] = company[key] & present if key in company else set(present)
        for mixed, all_axes in self.mixed:
            inside = {id(leaf) for leaf in leaves(mixed)}
            for leaf in leaves(all_axes):
                if id(leaf) in company and id(leaf) not in inside:
                    company[id(leaf)] -= inside
        for key, channels in found.items():
            order = {id(leaf): leaf for member in channels.members for leaf in member.axes}
            channels.along = [leaf for k, leaf in order.items() if k in company[key] and k != key]
        return list(found.values())


def _place(t: Tensor) -> tuple:
    return (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride())
