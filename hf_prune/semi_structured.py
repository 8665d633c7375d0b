"""2:4 linear layers on the sparse tensor cores of a GPU, where that is faster: measured, layer by layer.

    model = hf_prune.to_semi_structured(hf_prune.load("folder", dtype=torch.float16, device="cuda"))

A weight becomes what `torch.sparse.to_sparse_semi_structured` makes of it.  2:4 halves the multiplications, not the
time: with few rows, or narrow layers, the dense kernel wins.  `measure` times both and keeps the sparse one only where
it won, and only if the whole model got faster too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .sites import _tensors, feed, quiet

NO_GAIN = "2:4 brings a smaller download there and no speed-up"
LEAST = 1.02  # a layer must be this many times as fast to become sparse: timings spread by a percent or two
REPEATS = 20
CLOSE = 2e-2  # sparse and dense half-precision outputs, relative: both round, in another order

Convert = Callable[[Tensor], Tensor]
Clock = Callable[[Callable[[], Any]], float]


@dataclass
class Layer:
    """One linear layer at one batch size.  Seconds; sparse is None where the kernel cannot take it."""

    name: str
    shape: tuple[int, int]
    batch: int
    rows: int
    dense: float
    sparse: float | None
    error: float | None = None  # relative distance of the two outputs
    reason: str | None = None

    @property
    def ratio(self) -> float | None:
        return self.dense / self.sparse if self.sparse else None


@dataclass
class Speed:
    """What was measured.  chosen: parameters that are faster as 2:4, over all batch sizes together."""

    device: str
    torch: str
    dtype: str
    layers: list[Layer]
    chosen: list[str]
    whole: list[dict[str, Any]] = field(default_factory=list)  # by batch size: seconds dense and sparse, error

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def missing(device: torch.device | str | None = None) -> str | None:
    """Why 2:4 is not faster on this machine, in words; None where it has sparse tensor cores."""
    if not torch.cuda.is_available():
        return "this machine has no NVIDIA GPU"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < backends.CAPABILITY:
        return f"{name} has no sparse tensor cores (compute capability 8.0 and up has)"
    return None


def eligible(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weight follows 2:4 and has a shape that a kernel takes, by parameter name."""
    found = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        w = module.weight.detach()
        shape = tuple(w.shape)
        takes = [b for b in ("cuSPARSELt", "CUTLASS")
                 if backends.refusal(b, shape, "2:4", convolution=False, whole=True) is None]  # fmt: skip
        if takes and bool(((w != 0).view(w.shape[0], -1, 4).sum(2) <= 2).all()):
            found[f"{name}.weight" if name else "weight"] = module
    return found


def to_semi_structured(model: nn.Module, plan: Iterable[str] | Mapping[str, Any] | None = None) -> nn.Module:
    """Store 2:4 weights for the sparse tensor cores, in place; returns the model, which is for inference from then on.

    plan: parameter names, or what `hf-prune bench` measured (`speed` of hf_prune.json), of which the layers that won
    are taken; None takes every weight that a kernel takes.
    Raises ValueError on hardware without sparse tensor cores, for a model that is not in half precision on the GPU, and
    for names that are no 2:4 linear layer.
    """
    why = missing()
    if why is not None:
        raise ValueError(f"{why}: {NO_GAIN}; leave the model dense.")
    found = eligible(model)
    names = list(found) if plan is None else list(plan["chosen"] if isinstance(plan, Mapping) else plan)
    for name in names:
        if name not in found:
            raise ValueError(f"{name}: is no linear layer whose weight follows 2:4 in a shape that a kernel takes.")
        w = found[name].weight
        if not w.is_cuda or w.dtype not in (torch.float16, torch.bfloat16):
            where = f"is {w.dtype} on {w.device}"
            raise ValueError(f"{name}: {where}; move the model first: model.to('cuda', torch.float16).")
    for name in names:
        found[name].weight = nn.Parameter(_convert(found[name].weight.detach()), requires_grad=False)
    return model


def _convert(weight: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(weight.contiguous())


def measure(
    model: nn.Module,
    batches: Mapping[int, Any],
    *,
    convert: Convert = _convert,
    clock: Clock | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Time every 2:4 linear layer and the whole model, dense and sparse; the model is as before afterwards.

    batches: batch size -> a batch on the model's device.  convert, clock: what makes a weight sparse and what times a
    call, in seconds; for tests.
    """
    clock = clock or _clock
    found = eligible(model)
    layers: list[Layer] = []
    with quiet(model), torch.no_grad():
        for size, batch in batches.items():
            tell(f"timing {len(found)} layers with batches of {size}")
            inputs = _inputs(model, found, batch)
            for name, module in found.items():
                if name in inputs:
                    layers.append(_layer(name, module, size, inputs[name], convert, clock))
        speed = Speed(
            device=_device_name(model), torch=torch.__version__,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."), layers=layers, chosen=choose(layers),
        )  # fmt: skip
        if speed.chosen:
            held = {name: found[name].weight for name in speed.chosen}
            dense = {size: _forward(model, b, clock) for size, b in batches.items()}
            try:
                for name, weight in held.items():
                    found[name].weight = nn.Parameter(convert(weight.detach()), requires_grad=False)
                for size, b in batches.items():
                    seconds, out = _forward(model, b, clock)
                    speed.whole.append({"batch": size, "dense": dense[size][0], "sparse": seconds,
                                        "error": _error(out, dense[size][1])})  # fmt: skip
            finally:
                for name, weight in held.items():
                    found[name].weight = weight  # type: ignore[assignment]
            slower = sum(w["sparse"] for w in speed.whole) >= sum(w["dense"] for w in speed.whole)
            if slower or any(not w["error"] < 5 * CLOSE for w in speed.whole):
                speed.chosen = []
    return speed


def _forward(model: nn.Module, batch: Any, clock: Clock) -> tuple[float, Tensor]:
    return clock(lambda: feed(model, batch)), _first(feed(model, batch))


def choose(layers: Iterable[Layer]) -> list[str]:
    """The layers that are faster as 2:4, over all batch sizes together, and whose outputs agree at each."""
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    won = []
    for name, some in by_name.items():
        times = [(s.dense, s.sparse) for s in some if s.sparse is not None and (s.error or 0.0) < CLOSE]
        if len(times) == len(some) and sum(d for d, _ in times) >= LEAST * sum(s for _, s in times):
            won.append(name)
    return won


def _layer(name: str, module: nn.Linear, size: int, x: Tensor, convert: Convert, clock: Clock) -> Layer:
    weight, bias = module.weight.detach(), module.bias
    rows = x.numel() // x.shape[-1]
    made = Layer(name, (weight.shape[0], weight.shape[1]), size, rows, clock(lambda: F.linear(x, weight, bias)), None)
    try:
        sparse = convert(weight)
        made.error = _error(F.linear(x, sparse, bias), F.linear(x, weight, bias))
        made.sparse = clock(lambda: F.linear(x, sparse, bias))
    except (RuntimeError, NotImplementedError) as error:  # the kernel's own refusal, kept for the table
        made.reason = str(error).splitlines()[0]
    return made


def _inputs(model: nn.Module, layers: Mapping[str, nn.Linear], batch: Any) -> dict[str, Tensor]:
    """What each layer multiplies in one forward; a layer that is used several times gives its first input."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen.setdefault(name, args[0].detach())

        return hook

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    try:
        feed(model, batch)
    finally:
        for h in hooks:
            h.remove()
    return seen


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def _first(out: Any) -> Tensor:
    return next(t for t in _tensors(out) if t.is_floating_point())


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _clock(work: Callable[[], Any]) -> float:
    """Median seconds of a call, after a few that do not count."""
    for _ in range(3):
        work()
    spent = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            spent.append(time.perf_counter() - began)
    return statistics.median(spent)
