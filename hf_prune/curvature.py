"""The calibration loss as a function of all prunable weights: its value, gradient and curvature products.

The weights travel as one flat vector, the canonical views of the sites behind each other.  Two matrices are offered:
the exact Hessian by double backward, and the Gauss-Newton matrix (positive semi-definite, rank at most images times
(classes - 1)).  Both keep the graph of a batch between products where memory allows: the weights stay where they are,
and a product is then one pass instead of two or three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from . import ranks
from .gradients import has_logits, logits_of
from .importance import _directions
from .linearised import Graphs, linear
from .sites import Site, feed, parameters, quiet
from .window import grad_on

KINDS = ("hessian", "gauss-newton")


@dataclass(frozen=True)
class Images:
    """Batches with what the loss compares the outputs with.

    loss: `labels` and `predicted classes` are the cross-entropy with the images' own labels, or with the class that the
    dense model predicts; `representation`, for a model without logits, is the squared distance to the dense model's
    outputs over their mean squared norm.
    """

    batches: list[Any]
    targets: list[Tensor]  # (images,) classes, or the dense outputs
    loss: str
    scale: float = 1.0  # mean squared norm of the dense outputs
    outputs: int = 0  # entries of one image's output

    @property
    def count(self) -> int:
        """Images of this rank."""
        return sum(len(t) for t in self.targets)

    def each(self, z: Tensor, i: int) -> Tensor:
        """Loss of every image of batch i, (images,), from its outputs z."""
        if self.loss == "representation":
            return (z - self.targets[i]).flatten(1).square().sum(1) / self.scale
        return F.cross_entropy(z, self.targets[i], reduction="none")

    def bend(self, z: Tensor, u: Tensor) -> Tensor:
        """Second derivative of the summed loss with respect to the outputs z, times u; both like z."""
        if self.loss == "representation":
            return 2 * u / self.scale
        p = z.softmax(-1)
        return p * u - p * (p * u).sum(-1, keepdim=True)

    def right(self, z: Tensor, i: int) -> Tensor | None:
        """Whether the first answer is the target's class, (images,); None without classes."""
        return None if self.loss == "representation" else z.argmax(-1) == self.targets[i]


def prepare(model: nn.Module, batches: list[Any], labels: Sequence[Tensor | None]) -> Images:
    """`batches` with their targets; the dense model supplies them where labels or logits are missing."""
    with quiet(model), torch.no_grad(), kernel():
        outs = [feed(model, b) for b in batches]
        z = [logits_of(out) for out in outs]
    mine = None
    if outs:
        answers = has_logits(outs[0])
        mine = answers, z[0].shape[-1] if answers else z[0][0].numel()
    # a rank may have no images: what the others see is true of it too, since sums follow
    answers, outputs = next(filter(None, ranks.gather(mine)), (False, 0))
    if answers:
        known = [t for t in labels if t is not None]
        if all(ranks.gather(len(known) == len(batches))):
            targets, loss = [t.to(out.device) for t, out in zip(known, z, strict=True)], "labels"
        else:
            targets, loss = [out.argmax(-1) for out in z], "predicted classes"
        return Images(batches, targets, loss, outputs=outputs)
    norm = ranks.agree(sum(float(t.double().square().sum()) for t in z)) / ranks.agree(float(sum(map(len, z))))
    return Images(batches, [t.clone() for t in z], "representation", norm, outputs)


class _Smooth(TorchFunctionMode):
    """hardsigmoid by its definition: torch has no second derivative for the fused one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (F.hardsigmoid, torch.nn.functional.hardsigmoid):
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernel() -> Iterator[None]:
    """Math attention: the fused kernels have no second derivative, and the loss must be one function everywhere."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _Smooth():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measure(model: nn.Module, images: Images) -> dict[str, float | None]:
    """Mean loss, its standard deviation over images, and the share of right first answers, over all ranks."""
    sums = torch.zeros(4, dtype=torch.float64)
    with quiet(model), torch.no_grad(), kernel():
        for i, batch in enumerate(images.batches):
            z = logits_of(feed(model, batch)).double()
            each = images.each(z, i)
            right = images.right(z, i)
            hits = 0.0 if right is None else float(right.sum())
            sums += torch.tensor([float(each.sum()), float(each.square().sum()), hits, float(len(each))]).double()
    ranks.sum_([sums])
    loss, square, hits, count = sums.tolist()
    mean = loss / count
    deviation = max(0.0, square / count - mean * mean) ** 0.5
    accuracy = None if images.loss == "representation" else hits / count
    return {"loss": mean, "deviation": deviation, "accuracy": accuracy}


class Task:
    """The loss over `images` around the model's present weights.

    memory: bytes that graphs kept between products may take; the first batch's graph is weighed, and as many batches
    as fit keep theirs.  The model is left as it was found.
    """

    def __init__(self, model: nn.Module, sites: list[Site], images: Images, memory: float) -> None:
        self.model, self.sites, self.images = model, sites, images
        named = parameters(model)
        self.stored = {s.parameter: named[s.parameter] for s in sites}
        self.sizes = [s.numel for s in sites]
        self.total = ranks.agree(float(images.count))
        self.weights = self.read()  # (D,) the dense ones
        self.products = 0
        self.graphs = Graphs(memory, self.stored.values())
        self._places: dict[str, Tensor] = {}

    def read(self) -> Tensor:
        return torch.cat([s.read(self.stored[s.parameter]).flatten() for s in self.sites])

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat vector, one per site."""
        return list(flat.split(self.sizes))

    @contextlib.contextmanager
    def at(self, weights: Tensor) -> Iterator[nn.Module]:
        """The model with other weights, (D,), for the length of a `with`."""
        self.forget()
        dense = {name: p.detach().clone() for name, p in self.stored.items()}
        try:
            for s, part in zip(self.sites, self.split(weights), strict=True):
                s.write(self.stored[s.parameter], part.view(s.shape))
            yield self.model
        finally:
            with torch.no_grad():
                for name, p in self.stored.items():
                    p.copy_(dense[name])

    def forget(self) -> None:
        """Drop the kept graphs."""
        self.graphs.clear()

    # -- derivatives, all of the mean loss over all ranks' images

    def gradient(self) -> Tensor:
        """(D,)"""
        total = torch.zeros_like(self.weights)
        with self._on() as ps:
            for i in range(len(self.images.batches)):
                self._add(total, torch.autograd.grad(self._sum(i), ps, allow_unused=True))
        return self._mean(total)

    def product(self, v: Tensor, kind: str) -> Tensor:
        """The curvature matrix `kind` (see KINDS) times v, both (D,)."""
        assert kind in KINDS, kind
        self.products += 1
        vs = self._scatter(v)
        total = torch.zeros_like(v)
        with self._on():
            for i in range(len(self.images.batches)):
                self._add(total, self._graph(kind, i)(vs))
        return self._mean(total)

    def form(self, v: Tensor) -> float:
        """vᵀ G v with the Gauss-Newton matrix G: half the work of a product."""
        vs = self._scatter(v)
        total = 0.0
        with self._on():
            for i in range(len(self.images.batches)):
                total += self._graph("gauss-newton", i)(vs, form=True)
        return ranks.agree(total) / self.total

    def traces(self, seed: int) -> Tensor:
        """One sample of the trace of every site's block of the Gauss-Newton matrix, (sites,) float64, not negative.

        A gradient whose output direction has the covariance of the loss's second derivative has the trace as its
        expected squared norm; the directions are a function of each image and the seed alone.
        """
        total = torch.zeros(len(self.sites), dtype=torch.float64)
        with self._on() as ps:
            for i, batch in enumerate(self.images.batches):
                z = self._outputs(i)
                xi = _directions(z.detach(), batch, seed)
                if self.images.loss == "representation":
                    root = xi * (2 / self.images.scale) ** 0.5
                else:
                    half = z.detach().softmax(-1).sqrt()
                    root = half * xi - half.square() * (half * xi).sum(-1, keepdim=True)
                flat = self._flat(torch.autograd.grad(z, ps, root, allow_unused=True))
                total += torch.stack([part.square().sum(dtype=torch.float64) for part in self.split(flat)]).cpu()
        ranks.sum_([total])
        return total / self.total

    @contextlib.contextmanager
    def _on(self) -> Iterator[list[Tensor]]:
        ps = list(self.stored.values())
        with quiet(self.model), grad_on(ps), kernel():
            yield ps

    def _outputs(self, i: int) -> Tensor:
        return logits_of(feed(self.model, self.images.batches[i]))

    def _sum(self, i: int) -> Tensor:
        return self.images.each(self._outputs(i), i).sum()

    def _graph(self, kind: str, i: int) -> Callable[..., Any]:
        """What multiplies with batch i's part of the matrix; kept where there is room."""
        return self.graphs.get(kind, i, self._hessian if kind == "hessian" else self._gauss_newton)

    def _hessian(self, i: int) -> Callable[..., Any]:
        ps = list(self.stored.values())
        try:
            first = torch.autograd.grad(self._sum(i), ps, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise NoSecondDerivative(_short(error)) from error

        def product(vs: list[Tensor]) -> Sequence[Tensor | None]:
            live = [(g, v) for g, v in zip(first, vs, strict=True) if g is not None and g.requires_grad]
            if not live:
                return [None] * len(ps)
            try:
                return torch.autograd.grad(
                    [g for g, _ in live], ps, [v for _, v in live], retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                raise NoSecondDerivative(_short(error)) from error

        return product

    def _gauss_newton(self, i: int) -> Callable[..., Any]:
        ps = list(self.stored.values())
        with linear():
            z = self._outputs(i)
        seed = torch.zeros_like(z, requires_grad=True)
        # Jᵀ seed is linear in the seed: its derivative with respect to the seed, applied to v, is J v
        pulled = torch.autograd.grad(z, ps, seed, create_graph=True, allow_unused=True)
        bend = z.detach()

        def product(vs: list[Tensor], form: bool = False) -> Any:
            live = [(g, v) for g, v in zip(pulled, vs, strict=True) if g is not None and g.requires_grad]
            if not live:
                return 0.0 if form else [None] * len(ps)
            (pushed,) = torch.autograd.grad([g for g, _ in live], seed, [v for _, v in live], retain_graph=True)
            bent = self.images.bend(bend, pushed)
            if form:
                return float((pushed.double() * bent.double()).sum())
            return torch.autograd.grad(z, ps, bent, retain_graph=True, allow_unused=True)

        return product

    def _mean(self, total: Tensor) -> Tensor:
        ranks.sum_([total])
        return total.div_(self.total)

    def _add(self, total: Tensor, grads: Sequence[Tensor | None]) -> None:
        """`_flat` added to `total`, without a vector (D,) in between."""
        by_name = dict(zip(self.stored, grads, strict=True))
        for s, part in zip(self.sites, self.split(total), strict=True):
            g = by_name[s.parameter]
            if g is not None:
                part.view(s.shape).add_(s.canonical(g))

    def _flat(self, grads: Sequence[Tensor | None]) -> Tensor:
        by_name = dict(zip(self.stored, grads, strict=True))
        parts = []
        for s in self.sites:
            g = by_name[s.parameter]
            parts.append(s.read(torch.zeros_like(self.stored[s.parameter]) if g is None else g).flatten())
        return torch.cat(parts)

    def _scatter(self, v: Tensor) -> list[Tensor]:
        """A flat vector shaped like the stored parameters, zero where no site is; good until the next call."""
        if not self._places:
            self._places = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.stored.items()}
        for s, part in zip(self.sites, self.split(v), strict=True):
            s.place(self._places[s.parameter], part.view(s.shape))
        return list(self._places.values())


class NoSecondDerivative(Exception):
    """torch cannot differentiate an operator of this model twice; the message names it."""


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")
