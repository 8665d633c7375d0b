"""Where a layer's output joins the residual stream, found by perturbing it; and the way back from there.

A residual block computes z = L y + r: the layer's output y, carried by a map L that at most scales channels and moves
entries (batch norm, layer scale, window reversal), plus r that does not depend on y.  What the next layers see is z, so
a refit that lets y make good for the error already in r keeps the stream closer to the dense one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .sites import Site, Stop

ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__,
             torch.Tensor.__radd__}  # fmt: skip


class Additions(TorchFunctionMode):
    """Keeps the results of the additions of two tensors in a forward; stops it after number `last`."""

    def __init__(self, last: int | None = None, wanted: set[int] | None = None) -> None:
        super().__init__()
        self.last, self.wanted = last, wanted
        self.count = 0
        self.results: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ADDITIONS and len(args) > 1 and torch.is_tensor(args[1]) and torch.is_tensor(out) and out.dim() > 1:
            index, self.count = self.count, self.count + 1
            if self.wanted is None or index in self.wanted:
                self.results[index] = out if self.last is not None else out.clone()
            if index == self.last:
                raise Stop
        return out


class Leaf:
    """A forward hook that makes a module's output the start of the graph, or moves it by `delta`."""

    def __init__(self, delta: Tensor | None = None) -> None:
        self.y: Tensor | None = None
        self.delta = delta

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        if not torch.is_tensor(out):
            return None
        self.y = out.detach()
        if self.delta is not None:
            return out - self.delta.neg()  # a subtraction, so that the tape of additions does not count it
        self.y.requires_grad_(True)
        return self.y.clone()  # a clone, so that an in-place addition on it is legal


def channel_last(site: Site, t: Tensor) -> Tensor:
    return t.movedim(1, -1) if site.conv is not None else t


def find(call: Any, module: nn.Module, site: Site) -> tuple[int, Tensor] | None:
    """The first addition z = L y + r behind the site, with the channel scale of L: (index, (out,)); None if none.

    call: runs the unit on a small batch.  module: the module whose output is the site's product.
    """
    leaf = Leaf()
    handle = module.register_forward_hook(leaf)
    try:
        with torch.enable_grad(), Additions() as plain:
            call()
        y = leaf.y
        out = site.shape[0] * site.shape[1]
        if y is None or y.dim() < 2 or channel_last(site, y).shape[-1] != out:
            return None
        generator = torch.Generator().manual_seed(0)
        delta = torch.randn(y.shape, generator=generator).to(y) * y.detach().std()
        handle.remove()
        handle = module.register_forward_hook(Leaf(delta))
        with torch.no_grad(), Additions() as moved:
            call()
    finally:
        handle.remove()
    for index, z in plain.results.items():
        if z.grad_fn is None or z.numel() != y.numel():
            continue
        step = moved.results[index] - z.detach()
        (back,) = torch.autograd.grad(z, y, step, retain_graph=True, allow_unused=True)
        if back is None:
            continue
        rows = channel_last(site, back).reshape(-1, out)
        moves = channel_last(site, delta).reshape(-1, out)
        square = (rows * moves).sum(0) / moves.square().sum(0)  # LᵀL = diag(s²) if the addition is of that form
        if bool((square > 0).all()) and float((rows - square * moves).norm() / rows.norm()) < 1e-3:
            return index, square.sqrt()
    return None
