"""The K-step objective: outputs of the operations that follow a set of weights, as a function of those weights.

SNOWS (arXiv 2411.18376), Eq. 3:  minimise  sum_k || f_k(X; W) - t_k ||²  over the weights that stay, where f_k is the
k-th operation after the layer, X the activations of the pruned network and t_k the target.  Everything before the
layer is fixed, so each term is run from the unit's cached input.

Weights travel as one flat vector, the canonical views of the sites behind each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from . import ranks
from .collect import KEPT, Pair, holding
from .linalg import cholesky
from .linearised import Graphs, linear
from .sites import Site, Stop, parameters
from .walk import Walk

F = torch.nn.functional
LAYERS: set[Any] = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.addmm}
ACTIVATIONS: set[Any] = {F.relu, torch.relu, torch.relu_, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu,
               F.hardsigmoid,
               F.relu6, F.sigmoid, torch.sigmoid, torch.tanh, F.tanh, F.mish,
               torch.Tensor.relu, torch.Tensor.relu_, torch.Tensor.sigmoid, torch.Tensor.tanh}  # fmt: skip
ATTENTION: set[Any] = {F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax}


class Operations(TorchFunctionMode):
    """Keeps the outputs of the operations from the first of `weights` on; ends the forward after raw call `stop`.

    An operation is a linear layer, a convolution or an activation.  Query, key and value projections belong to the
    attention operation, whose output is that of its projection: the outputs of layers that feed an attention are
    dropped when the attention is seen, as in the authors' code.
    """

    def __init__(self, walk: Walk, weights: set[int], stop: int | None = None) -> None:
        super().__init__()
        self.walk, self.weights, self.stop = walk, weights, stop
        self.started = False
        self.calls = 0
        self.kept: list[tuple[int, bool, Tensor]] = []  # (raw call, is an activation, output)
        self.inputs: list[Tensor | None] = []  # what each of them read; held, so that no storage is used anew

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.hardsigmoid:  # torch has no second derivative for it; this is its definition
            out = F.relu6(args[0] + 3) / 6
        else:
            out = func(*args, **(kwargs or {}))
        if not self.started:
            given = (*args, *(kwargs or {}).values())
            self.started = any(torch.is_tensor(t) and t.untyped_storage().data_ptr() in self.weights for t in given)
        if not self.started or self.walk.behind:  # what replay runs again on the way to the next unit does not count
            return out
        self.calls += 1
        if func in ATTENTION:
            # the layers that feed it: those that read what the last layer read, and those whose output it is given
            self.inputs = self.inputs[: len(self.kept)]
            reads = {_place(t) for t in (*args, *(kwargs or {}).values()) if torch.is_tensor(t)}
            source = self.inputs[-1] if self.kept and not self.kept[-1][1] else None
            while (
                self.kept
                and not self.kept[-1][1]
                and (_same_input(self.inputs[-1], source) or _place(self.kept[-1][2]) in reads)
            ):
                self.kept.pop()
                self.inputs.pop()
        elif func in LAYERS or func in ACTIVATIONS:
            if func in ACTIVATIONS and self.kept and _shares(self.kept[-1][2], out):
                self.kept.pop()  # in place: the output before it is gone
            operands = [t for t in (*args, *(kwargs or {}).values()) if torch.is_tensor(t)]
            if func is torch.addmm:  # bias, input, weight
                operands.pop(0)
            self.inputs[len(self.kept) :] = [operands[0]]
            self.kept.append((self.calls, func in ACTIVATIONS, out))
        elif func is F.multi_head_attention_forward:  # a whole attention operation in one call
            self.inputs[len(self.kept) :] = [None]
            self.kept.append((self.calls, False, out[0]))
        if self.calls == self.stop:
            raise Stop
        return out


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True) if x is not None]).sum()


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _same_input(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or bool(
        a is not None and b is not None and _shares(a, b) and a.storage_offset() == b.storage_offset()
    )


def _shares(a: Tensor, b: Tensor) -> bool:
    return _place(a) == _place(b)


CURVATURES = ("gauss-newton", "difference", "hessian")


@dataclass
class Window:
    """value, gradient and curvature products of the K-step loss, over any part of the calibration batches.

    sites: whose weights vary, all in unit `index`.  steps: K, or None for the output of unit `last` alone.
    mix: 0 targets the dense weights on the pruned network's inputs, 1 the dense network.
    relative: divide each term by the energy of its target instead of by its number of entries (mean-squared error).
    metric: (out, out), what an error in each direction of the unit's output weighs; None weighs all alike.
    shift: (out, 1, ...), what is added to the unit's output behind it: by a batch norm whose running mean was refit.
    """

    walk: Walk
    index: int
    sites: list[Site]
    pairs: list[Pair]
    dense: dict[str, Tensor]
    steps: int | None = None
    mix: float = 0.0
    relative: bool = True
    curvature: str = "gauss-newton"
    metric: Tensor | None = None
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature {self.curvature}: choose one of {', '.join(CURVATURES)}.")
        self.named = parameters(self.walk.model)
        self.sizes = [s.numel for s in self.sites]
        self.products = 0
        own = [self.named[s.parameter] for s in self.sites]
        self.graphs = Graphs(KEPT if self.walk.keeps else 0, own)
        self._at: Tensor | None = None  # the weights that they are of, and
        self._version = 0
        self.last = self.index
        self.stop: int | None = None
        if self.steps is not None and self.pairs:
            self._reach(self.pairs[0].pruned)
        self.targets: list[list[Tensor]] = []
        for pair in self.pairs:
            with holding(self.walk.model, self.dense), torch.no_grad():
                here = self._terms(pair.pruned)
                if self.mix and pair.drifted:
                    there = self._terms(pair.dense)
                    here = [a + self.mix * (b - a) for a, b in zip(here, there, strict=True)]
            self.targets.append([self._lowered(t.detach()) for t in here])
        self.weights = [self._weights(pair) for pair in self.pairs]
        self.root = None if self.metric is None else cholesky(self.metric, "the output metric")
        # a rank without images takes part in the sums, which are wide so that their order leaves no trace
        terms = max(ranks.gather(len(self.targets[0]) if self.targets else 0))
        energy, entries = torch.zeros(2, terms, dtype=torch.float64)
        for ts, w in zip(self.targets, self.weights, strict=True):
            energy += self._squares(ts, w).double().cpu()
            entries += torch.tensor([float(t.numel()) for t in ts], dtype=torch.float64)
        ranks.sum_([energy, entries])
        batches = ranks.agree(float(len(self.pairs)))
        self.scale = ((energy if self.relative else entries) / batches).clamp_min(1e-30).tolist()

    def _lowered(self, target: Tensor) -> Tensor:
        """The target of what is left to the weights, where a norm behind the unit adds to this output."""
        if self.shift is None or target.shape[1:2] != self.shift.shape[:1]:
            return target
        return target - self.shift

    def _reach(self, entry: Any) -> None:
        """How far K + 1 operations go: the unit that holds the last of them, and the call in it to stop after."""
        while True:
            with torch.no_grad(), self._taping() as operations:
                self.walk.through(self.index, self.last, entry)
            assert self.steps is not None
            if len(operations.kept) > self.steps:
                self.stop = operations.kept[self.steps][0]
                return
            if self.last + 1 >= len(self.walk.units) or self.walk.mode == "prefix":
                if not operations.kept:
                    raise ValueError("no operation known to snows follows this weight; use solve.k=null.")
                return  # fewer than K operations follow: the window ends with the model's last unit
            self.last += 1

    @contextlib.contextmanager
    def _taping(self) -> Any:
        weights = {self.walk.model.get_parameter(s.parameter).untyped_storage().data_ptr() for s in self.sites}
        with contextlib.suppress(Stop), self._kernel(), Operations(self.walk, weights, self.stop) as operations:
            yield operations

    def _kernel(self) -> Any:
        # fused attention has no second derivative; a difference needs none
        return contextlib.nullcontext() if self.curvature == "difference" else sdpa_kernel(SDPBackend.MATH)

    def _terms(self, entry: Any) -> list[Tensor]:
        """The window's outputs for one entry, with the present weights."""
        if self.steps is None:
            with self._kernel():
                out = self.walk.through(self.index, self.last, entry)
            return [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t) and t.is_floating_point()]
        with self._taping() as operations:
            self.walk.through(self.index, self.last, entry)
        return [t for _, _, t in operations.kept[: self.steps + 1]]

    def split(self, images: int) -> tuple[list[list[int]], list[list[int]]]:
        """Minibatches of about `images` images, and for each the batch that judges its step: one it does not hold.

        Of all ranks together, as one that held the batches of all in turn would make them; what this rank has of each.
        """
        own = max(len(t) for t in self.targets[0]) if self.targets else 0
        held, sizes = zip(*ranks.gather((len(self.pairs), own)), strict=True)
        per = max(1, round(images / max(1, next(filter(None, sizes), 1))))
        order = [(k, r) for k in range(max(held)) for r, count in enumerate(held) if k < count]
        parts = [order[i : i + per] for i in range(0, len(order), per)]
        judges = [[parts[(i + 1) % len(parts)][0]] if len(parts) > 1 else order[-1:] for i in range(len(parts))]
        if len(parts) == 1 and len(order) > 1:
            parts = [order[:-1]]
        mine = [[[k for k, r in part if r == ranks.rank()] for part in found] for found in (parts, judges)]
        return mine[0], mine[1]

    # -- the flat vector

    def read(self) -> Tensor:
        return torch.cat([s.read(self.named[s.parameter]).flatten() for s in self.sites])

    def write(self, w: Tensor) -> None:
        self.graphs.clear()  # they are of other weights
        self._at = None
        for s, part in zip(self.sites, w.split(self.sizes), strict=True):
            s.write(self.named[s.parameter], part.view(s.shape))

    def _flat(self, grads: Sequence[Tensor | None]) -> Tensor:
        parts = []
        for s, g in zip(self.sites, grads, strict=True):
            g = torch.zeros_like(self.named[s.parameter]) if g is None else g
            parts.append(s.read(g).flatten())
        return torch.cat(parts)

    def _weights(self, pair: Pair) -> Tensor | None:
        """Importance of each position of the unit's output: that of the unit's last layer, which is added to it."""
        last = self.walk.units[self.last].sites[-1]
        return pair.weights.get((last.source, last.conv)) if self.relative and self.steps is None else None

    def _squares(self, differences: list[Tensor], weights: Tensor | None) -> Tensor:
        """Sum of squares of each term, (terms,), positions weighted where their number is that of the weights."""
        sums = []
        for d in differences:
            if weights is not None and d.dim() > 2:
                rows = d.movedim(1, -1) if d.dim() == 4 and d.shape[0] * d.shape[2] * d.shape[3] == len(weights) else d
                if rows.numel() == len(weights) * rows.shape[-1]:
                    if self.root is not None and len(self.root) == rows.shape[-1]:
                        rows = rows @ self.root
                    sums.append((rows.reshape(len(weights), -1).square().sum(1) * weights.to(d)).sum())
                    continue
            sums.append(d.square().sum())
        return torch.stack(sums)

    def _loss(self, terms: list[Tensor], i: int) -> Tensor:
        differences = [f - t for f, t in zip(terms, self.targets[i], strict=True)]
        return (self._squares(differences, self.weights[i]) / terms[0].new_tensor(self.scale)).sum()

    # -- Objective

    def value(self, w: Tensor, part: Sequence[int] | None = None) -> float:
        """The loss over the batches in `part` (all by default), averaged over batches and ranks."""
        self.write(w)
        part = range(len(self.pairs)) if part is None else part
        with torch.no_grad():
            total = sum(float(self._loss(self._terms(self.pairs[i].pruned), i)) for i in part)
        return ranks.agree(total) / ranks.agree(float(len(part)))

    def gradient(self, w: Tensor, part: Sequence[int] | None = None) -> tuple[float, Tensor]:
        """(value, gradient)."""
        self.write(w)
        part = range(len(self.pairs)) if part is None else part
        ps = [self.named[s.parameter] for s in self.sites]
        total, flat = 0.0, torch.zeros_like(w, dtype=ranks.wide(w))
        with grad_on(ps):
            for i in part:
                loss = self._loss(self._terms(self.pairs[i].pruned), i)
                flat += self._flat(torch.autograd.grad(loss, ps, allow_unused=True))
                total += float(loss.detach())
        count = ranks.agree(float(len(part)))
        ranks.sum_([flat])
        return ranks.agree(total) / count, (flat / count).to(w.dtype)

    def _loss_of(self, directions: list[Tensor], i: int) -> list[Tensor]:
        """The gradient of the loss at term differences `directions`: what its second derivative makes of them."""
        leaves = [d.detach().requires_grad_(True) for d in directions]
        loss = (self._squares(leaves, self.weights[i]) / leaves[0].new_tensor(self.scale)).sum()
        return list(torch.autograd.grad(loss, leaves))

    def product(self, w: Tensor, v: Tensor, part: Sequence[int] | None = None) -> Tensor:
        """Curvature times v: the Gauss-Newton matrix (positive semi-definite) or the exact Hessian.

        `difference` takes J v from a forward difference of relative step 3e-3, with one forward instead of two
        backward passes; its error is a few thousandths in float32.  Graphs are kept from product to product at the
        same w, while they take less than `KEPT`.
        """
        part = range(len(self.pairs)) if part is None else part
        self.products += 1
        if self._at is not w or self._version != w._version:
            self.write(w)
            self._at, self._version = w, w._version
        flat = torch.zeros_like(w, dtype=ranks.wide(w))
        along = self._moved(w, v) if self.curvature == "difference" else self._scattered(v)
        with grad_on([self.named[s.parameter] for s in self.sites]):
            for i in part:
                flat += self._flat(self._graph(i)(along))
        ranks.sum_([flat])
        return (flat / ranks.agree(float(len(part)))).to(w.dtype)

    def _graph(self, i: int) -> Callable[[Any], Sequence[Tensor | None]]:
        """What multiplies with batch i's part of the curvature; kept where there is room.

        It takes v as `_moved` gives it where the curvature is `difference`, else as `_scattered` does.
        """
        build = {"hessian": self._hessian, "gauss-newton": self._gauss_newton, "difference": self._difference}
        return self.graphs.get(self.curvature, i, build[self.curvature])

    def _hessian(self, i: int) -> Callable[[Any], Sequence[Tensor | None]]:
        ps = [self.named[s.parameter] for s in self.sites]
        loss = self._loss(self._terms(self.pairs[i].pruned), i)
        first = torch.autograd.grad(loss, ps, create_graph=True, allow_unused=True)

        def product(vs: list[Tensor]) -> Sequence[Tensor | None]:
            return torch.autograd.grad(_dot(first, vs), ps, retain_graph=True, allow_unused=True)

        return product

    def _gauss_newton(self, i: int) -> Callable[[Any], Sequence[Tensor | None]]:
        """J v by differentiating the vector-Jacobian product, which is linear in its seed."""
        ps = [self.named[s.parameter] for s in self.sites]
        with linear():
            terms = self._terms(self.pairs[i].pruned)
        live = [k for k, t in enumerate(terms) if t.requires_grad]  # a parallel branch does not depend on ps
        outs, seeds = [terms[k] for k in live], [torch.zeros_like(terms[k], requires_grad=True) for k in live]
        pulled = torch.autograd.grad(outs, ps, seeds, create_graph=True, allow_unused=True)

        def product(vs: list[Tensor]) -> Sequence[Tensor | None]:
            found = torch.autograd.grad(_dot(pulled, vs), seeds, retain_graph=True, allow_unused=True)
            pushed = [torch.zeros_like(t) for t in terms]
            for k, j in zip(live, found, strict=True):
                pushed[k] = pushed[k] if j is None else j
            return self._pulled(outs, live, pushed, i)

        return product

    def _difference(self, i: int) -> Callable[[Any], Sequence[Tensor | None]]:
        with linear():
            terms = self._terms(self.pairs[i].pruned)
        live = [k for k, t in enumerate(terms) if t.requires_grad]
        outs = [terms[k] for k in live]

        def product(along: tuple[float, dict[str, Tensor]]) -> Sequence[Tensor | None]:
            step, moved = along
            # in the place of the weights and not into them, on which the graph depends
            with holding(self.walk.model, moved), torch.no_grad():
                there = self._terms(self.pairs[i].pruned)
            return self._pulled(outs, live, [(m - t.detach()) / step for m, t in zip(there, terms, strict=True)], i)

        return product

    def _pulled(self, outs: list[Tensor], live: list[int], pushed: list[Tensor], i: int) -> Sequence[Tensor | None]:
        """Jᵀ M J v from J v, with the weights and scales of the loss in M."""
        ps = [self.named[s.parameter] for s in self.sites]
        form = self._loss_of(pushed, i)
        return torch.autograd.grad(outs, ps, [form[k] for k in live], retain_graph=True, allow_unused=True)

    def _moved(self, w: Tensor, v: Tensor) -> tuple[float, dict[str, Tensor]]:
        """(the step of the difference, the stored weights at w + step v)."""
        step = 3e-3 * float(w.norm() / v.norm().clamp_min(1e-30))
        moved = {s.parameter: self.named[s.parameter].detach().clone() for s in self.sites}
        for s, x in zip(self.sites, (w + step * v).split(self.sizes), strict=True):
            s.write(moved[s.parameter], x.view(s.shape))
        return step, moved

    def _scattered(self, v: Tensor) -> list[Tensor]:
        return [self._scatter(s, x) for s, x in zip(self.sites, v.split(self.sizes), strict=True)]

    def _scatter(self, site: Site, part: Tensor) -> Tensor:
        """A canonical vector as a tensor shaped like the stored parameter, zero outside the site's rows."""
        out = torch.zeros_like(self.named[site.parameter])
        site.write(out, part.view(site.shape))
        return out


@contextlib.contextmanager
def grad_on(ps: Sequence[Tensor]) -> Any:
    """Gradients with respect to `ps` alone."""
    for p in ps:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in ps:
            p.requires_grad_(False)
