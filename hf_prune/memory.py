"""What a run will hold in memory at its widest: measured on one image and on small problems, not guessed.

The tensors of a run are of few kinds, and each grows in a known way: weights not at all, images and activation streams
with the samples, what a forward leaves alive with the images computed at once, Gram matrices with the layer alone, and
what a solve needs with the square of the layer's width.  Each is counted once while the code that makes it runs, and
`Needs.peak` adds up the phases.  Not counted: what lies inside a single kernel, and what the allocator keeps back.
"""

from __future__ import annotations

import ctypes
import inspect
import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import distill, importance, methods
from .collect import AHEAD, KEPT, Pair, Stage, Target, find_junctions
from .objective import Gram
from .recall import held
from .sites import Site, _tensors, cut, feed, quiet
from .streams import Store
from .walk import Unit, Walk
from .window import Window

PROBE = 192  # width of the problem on which a method's memory is measured
MIB = 2**20


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on and still in use: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self._count(t.untyped_storage(), given)
        return out

    def _count(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in given:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def live(work: Callable[[], Any]) -> int:
    """The most bytes of new tensors that are alive at once while `work` runs."""
    with Live() as counted:
        work()
    return counted.peak


@dataclass(frozen=True)
class Block:
    """One unit of the walk.  In bytes; `image` per image that is computed at once."""

    name: str
    dense: int  # the copy of its dense weights
    image: int  # columns, corrections and the forward itself
    stages: tuple[int, ...]  # the Gram sums of each stage while they grow
    solves: tuple[int, ...]  # the same, rounded, and what choosing and refitting one layer of each stage needs
    stream: int  # one image at the unit's entry, in one stream
    ahead: int = 0  # the dense network's activations of one image, where they are kept for all stages
    calls: int = 0  # what of the pruned network's is kept likewise
    metrics: tuple[int, ...] = ()  # the output metrics that the unit is the last to use, one per input
    graph: int = 0  # of one image in a K-step objective, kept from product to product; 0 where there is none


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes."""

    present: int  # resident before the run: interpreter, libraries, and the weights
    weights: int  # the model's weights and buffers (within `present`)
    image: int  # one image as the model takes it
    influence: int  # the importance weights of one image
    weighing: int  # what differentiating one image through the model holds; 0 where nothing is weighed
    streams: int  # 1 or 2 activation streams
    blocks: tuple[Block, ...] = field(repr=False, default=())
    learning: int = 0  # of the last pass over the whole network: what differentiating one image holds; 0: there is none
    step: int = 0  # images of one Newton step

    @property
    def metric(self) -> int:
        """Output metrics of all layers, where the recipe asks for them: each waits until its unit has been pruned."""
        return sum(sum(b.metrics) for b in self.blocks)

    def fixed(self) -> int:
        """What no budget can make smaller: everything but activations, at one image at a time."""
        widest = [b.dense + max(b.metrics, default=0) + max(*b.stages, *b.solves, 0) for b in self.blocks]
        return self.present + max(max(widest, default=0), self.copies)

    @property
    def copies(self) -> int:
        """Of the weights, while the whole network learns: the teacher, and of what moves six more (see distill.py)."""
        return COPIES * self.weights if self.learning else 0

    def working(self, images: int) -> int:
        """What computing `images` at once adds, at the widest point."""
        whole = [self.weighing * min(images, MICRO), self.learning * images]
        return max(whole + [b.image * images for b in self.blocks])

    def waiting(self, samples: int) -> int:
        """Images, importance and streams of all samples, and output metrics."""
        wide = max((b.stream for b in self.blocks), default=0)
        return samples * (self.image + self.influence + self.streams * wide) + self.metric

    def peak(self, samples: int, images: int, host: int | None = None) -> int:
        """Resident bytes at the widest point.  samples: of this process.  images: computed at once.

        host: at most this much is used for what waits (see `limits`); None where everything waits in memory.
        """

        def held(wanted: int) -> int:
            return wanted if host is None else min(wanted, host)

        left = self.metric
        entered = samples * (self.image + self.influence + (self.blocks[0].stream if self.blocks else 0)) + WIDE * left
        loose = SLACK if host is None else 1.0  # a run within a budget gives freed memory back at once
        found = [self.present + held(entered) + int(loose * self.weighing * min(images, MICRO))]
        for b in self.blocks:
            kept = held(samples * (self.image + self.influence + self.streams * b.stream) + left)
            read = max(b.metrics, default=0)
            if host is None:
                graphs = min(min(samples, self.step) * b.graph, KEPT)
                read = min(samples * b.ahead, AHEAD) + max(min(samples * b.calls, KEPT), graphs)
            base = self.present + kept + b.dense + read
            left -= sum(b.metrics)
            for sums, solved in zip(b.stages, b.solves, strict=True):
                found.append(base + max(sums + int(loose * b.image * images), solved))
        if self.learning:
            kept = held(samples * self.image)
            found.append(self.present + kept + self.copies + int(loose * self.learning * images))
        return max(found)


_DEFAULTS = inspect.signature(importance.importance).parameters
COPIES = 7  # the teacher; units, scales, best weights, gradients, Adam's two moments
WIDE = 2  # sums are float64 while they grow
SLACK = 1.2  # measured: resident over live bytes of activations, with glibc's own threshold
MICRO, PROBES = _DEFAULTS["micro"].default, _DEFAULTS["probes"].default  # images differentiated at once; how often


def resident(field_: str = "VmRSS") -> int:
    """Bytes of memory this process has now (VmRSS), or has had at most (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field_ + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # no Linux: the peak so far


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(tree)}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the weights and buffers; tied ones count once."""
    return _bytes(list({t.data_ptr(): t for t in model.state_dict().values()}.values()))


def needs(model: nn.Module, chosen: Any, recipe: Any) -> Needs:
    """Measure.  chosen: loop.Selection; its small batch is used.  Costs about five forwards of one image."""
    one = cut(chosen.small, 0, 1)
    target = Target(**recipe.target)
    found = {methods.evidence(r["method"]) for r in (recipe.mask, recipe.solve, recipe.refine) if r}
    windows = [r for r in (recipe.solve, recipe.refine) if r and methods.evidence(r["method"]) == "window"]
    gram, window = "gram" in found, bool(windows)
    every = [s for u in chosen.units for s in u.sites]
    weighed = gram and (target.importance > 0 or target.metric > 0)
    influence = weighing = 0
    if weighed:
        kept: dict[Any, Tensor] = {}
        modules = dict(model.named_modules())
        strong: dict[Any, Any] | None = {} if target.metric > 0 else None
        weighing = live(
            lambda: kept.update(importance._influence(model, modules, every, one, PROBES, 0, strong, Store()))
        )
        influence = _bytes(kept)
    learning = 0
    if distill.Options(**recipe.distill).epochs:
        learning = live(lambda: distill.rehearse(model, chosen.units, one))
    way = Walk.unchecked(model, chosen.units)
    with quiet(model), torch.no_grad():
        inputs, _ = way._record(one)
        forward = live(lambda: feed(model, one))  # what lies between two blocks may be the model's own forward
    widths: dict[Any, int] = {}  # of the metrics: one for all layers that read the same input
    for s in every:
        if weighed and target.metric > 0 and s.shape[0] == 1:
            widths[s.source, s.conv] = widths.get((s.source, s.conv), 0) + s.shape[1]
    last = {(s.source, s.conv): s.unit for s in every}
    blocks: list[Block] = []
    alike: dict[Any, Block] = {}
    for i, unit in enumerate(chosen.units):
        call = inputs[i][1]
        key = (type(unit.module), tuple((s.shape, s.conv, s.uses) for s in unit.sites), str(_shapes(call)))
        if key not in alike:
            with quiet(model):
                alike[key] = _block(way, i, unit, call, recipe, target, gram, window)
        own = tuple(4 * w * w for k, w in widths.items() if last[k] == i)
        image = max(alike[key].image, forward)
        blocks.append(replace(alike[key], name=unit.name, metrics=own, image=image))
    return Needs(
        present=resident(),  # now: what a run calls has been loaded by what was measured above
        weights=model_bytes(model),
        image=_bytes(one),
        influence=influence,
        weighing=weighing,
        streams=2 if recipe.refine is not None or target.mix > 0 else 1,
        blocks=tuple(blocks),
        learning=learning,
        step=max((methods.options("solve", r["method"]) | r)["images"] for r in windows) if windows else 0,
    )


def give_back() -> None:
    """Let the C library return large blocks as soon as they are freed.  glibc keeps pieces of up to 32 MiB, which
    costs about a fifth of the activations; elsewhere nothing is done."""
    _mallopt(MMAP_THRESHOLD, 2**18)
    _mallopt(TRIM_THRESHOLD, 2**17)


def keep_freed() -> None:
    """Let the C library keep what is freed.  Activations come and go in blocks of a few MiB, and having the system
    clear new pages for each took a seventh of a run; elsewhere than with glibc nothing is done."""
    _mallopt(MMAP_THRESHOLD, 2**25)  # the most that glibc accepts
    _mallopt(TRIM_THRESHOLD, 2**31 - 1)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h


def _mallopt(option: int, value: int) -> None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(option, value)


def _shapes(call: Any) -> list[Any]:
    return [tuple(t.shape) for t in _tensors(call)]


def _block(
    way: Walk, i: int, unit: Unit, call: Any, recipe: Any, target: Target, gram: bool, window: bool
) -> Block:  # fmt: skip
    named = dict(way.model.named_parameters()) | dict(way.model.named_buffers())
    names = {n for s in unit.sites for n in (s.parameter, s.bias, s.norm) if n}
    dense = {n: named[n].detach() for n in names}
    entry = {"call": call}
    pair = Pair(dict(entry), dict(entry))  # two objects: as if the streams had parted
    kept_for = Pair(pair.dense, pair.pruned)
    sums, solves, image = [], [], 0
    places = [(s.junction, s.scale) for s in unit.sites]
    if gram and target.residual:
        find_junctions(way, unit, entry)
    ahead = 0
    if gram and target.mix > 0 and way.keeps:
        with torch.no_grad():
            ahead = Stage(way, i, unit.sites, dense, target).ahead(pair).size()
    for stage in target.stages(unit):
        fixed = rounded = 0
        if gram:
            made = Stage(way, i, stage, dense, target)
            kept = {id(t): t for g in made.sums for t in (g.xx, g.sx, g.xd, g.dd, g.sd, g.weight)}
            fixed = _bytes(list(kept.values()))
            rounded = sum(t.numel() * made.sums[0].weight.element_size() for t in kept.values())
            image = max(image, live(lambda made=made: made.add(pair, compare=target.mix > 0)))  # type: ignore[misc]
            if way.keeps:
                made.add(kept_for, compare=target.mix > 0, keep=True)
        sums.append(fixed)
        solves.append(rounded + max(solve_bytes(s, recipe, target) for s in _joined(stage, target)))
    graph = _window(way, i, unit, pair, dense, recipe, target) if window else 0
    image = max(image, graph)
    for s, (junction, scale) in zip(unit.sites, places, strict=True):
        s.junction, s.scale = junction, scale
    own, calls = _bytes(list(dense.values())), held(kept_for.calls)
    return Block(unit.name, own, image, tuple(sums), tuple(solves), _bytes(call), ahead, calls, graph=graph)


def _window(
    way: Walk, i: int, unit: Unit, pair: Pair, dense: dict[str, Tensor], recipe: Any, target: Target
) -> int:  # fmt: skip
    """One image through the objective of the next operations, as far as this unit goes."""
    alone = Walk.unchecked(way.model, [unit])

    def work() -> None:
        # the unit's own output: a window of K operations that reaches further is not followed
        objective = Window(alone, 0, unit.sites, [pair], dense, None, target.mix, True, "gauss-newton")
        w = objective.read()
        objective.gradient(w)
        objective.product(w, torch.ones_like(w))
        objective.write(w)

    return live(work)


def _joined(stage: list[Site], target: Target) -> list[Site]:
    """The layers of a stage as they are solved: those that an output metric couples as one."""
    if target.metric <= 0:
        return stage
    made: dict[Any, Site] = {}
    for s in stage:
        key = (s.source, s.conv) if s.shape[0] == 1 else s.name
        rows = made[key].shape[1] if key in made else 0
        made[key] = replace(s, shape=(s.shape[0], rows + s.shape[1], s.shape[2]))
    return list(made.values())


def solve_bytes(site: Site, recipe: Any, target: Target) -> int:
    """What choosing and refitting one layer needs: measured on a narrower problem, times the square of the ratio."""
    groups, rows, columns = site.shape
    pattern = recipe.pattern()
    step = pattern.m or 1
    ratio = max(1.0, max(rows, columns) / PROBE)
    few = min(groups, 2)
    rows, columns = max(1, round(rows / ratio)), max(step, round(columns / ratio / step) * step)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(few, rows, columns, generator=generator)
    x = torch.randn(few, columns + 8, columns, generator=generator)
    gram = Gram.zeros(weight)
    gram.add_inputs(x)
    gram.add_corrections(x, x @ weight.mT)
    metric = torch.eye(rows) if target.metric > 0 and groups == 1 else None
    gram = replace(gram, bias=target.bias, mix=target.mix, metric=metric)

    def work() -> None:
        problem = methods.Problem(weight, pattern, gram)
        new = weight
        for kind, role in (("select", recipe.mask), ("solve", recipe.solve)):
            if not role or methods.evidence(role["method"]) not in (None, "gram"):
                continue
            options = {k: v for k, v in role.items() if k != "method"}
            function = methods.function(kind, role["method"])
            if kind == "select":
                draft = function(problem, **options)
                new = draft.weight
            else:
                mask = new != 0
                new = function(problem, methods.Draft(new, mask), **options)
        gram.value(new)

    exact = site.shape[0] * site.shape[1] * site.shape[2] / (few * rows * columns)
    square = site.shape[0] * site.shape[2] ** 2 / (few * columns**2)
    outputs = (site.shape[1] / rows) ** 2 if metric is not None else 0.0
    return int(live(work) * max(exact, square, outputs))


# ----------------------------------------------------------------------------------------------------------- budgets
@dataclass(frozen=True)
class Limits:
    """streams: bytes of images and activations that wait in memory, None for all.  images: computed at once, None for
    whole batches."""

    streams: int | None
    images: int | None
    notes: list[str]


def limits(model: nn.Module, chosen: Any, recipe: Any, host: int | None, device: int | None) -> Limits:
    """How a run keeps to its budgets, in bytes.

    Raises ValueError where the model does not fit even one image at a time, naming what is needed.
    """
    if host is not None:
        give_back()
    found = needs(model, chosen, recipe)
    on_host = next(model.parameters()).device.type == "cpu"
    images = recipe.batch_size
    notes = []
    if device is not None and on_host:
        notes.append("--device-memory has no effect on a CPU, whose memory --host-memory limits.")
    room, given = None, 0
    if on_host and host is not None:
        room, given = host - found.fixed(), host
    if device is not None and not on_host:
        given = device
        room = device - (found.fixed() - found.present + found.weights)
    if room is not None:
        flag = "--host-memory" if on_host else "--device-memory"
        if room < found.working(1):
            least = given - room + found.working(1)
            raise ValueError(
                f"{flag} {_gib(given)}: this model needs at least {_gib(least)} with one image at a time "
                f"({_gib(found.weights)} of weights); give more, or a recipe that needs less."
            )
        # on a CPU activations in use and activations waiting share what is left
        share = room // 2 if on_host else room
        while images > 1 and found.working(images) > max(share, found.working(1)):
            images //= 2
        if images < recipe.batch_size:
            notes.append(f"{images} of {recipe.batch_size} images are computed at once, to keep to {flag}.")
    streams = None
    if host is not None:
        used = found.fixed() + found.working(images) if on_host else found.present
        streams = max(0, host - used)
    return Limits(streams, images if images < recipe.batch_size else None, notes)


def _gib(count: int | None) -> str:
    return f"{(count or 0) / 2**30:.2f} GiB" if (count or 0) >= 2**28 else f"{(count or 0) / MIB:.0f} MiB"


def predict(
    model: nn.Module, chosen: Any, recipe: Any, samples: int, *, host: int | None = None, device: int | None = None,
    beside: int = 0,
) -> tuple[int, Needs]:  # fmt: skip
    """(resident bytes of this process at the widest point, what they are made of).

    chosen: loop.choose(model, two images, recipe).  samples: calibration images of this process.  host, device: budgets
    in bytes.  beside: what the caller will hold as well.
    """
    found = needs(model, chosen, recipe)
    images, streams = min(samples, recipe.batch_size), None
    if host is not None or device is not None:
        kept = limits(model, chosen, recipe, host, device)
        images, streams = min(images, kept.images or images), kept.streams
    return max(found.peak(samples, images, streams) + beside, resident("VmHWM")), found


def line(peak: int, found: Needs, samples: int, host: int | None = None) -> str:
    """One sentence for the plan."""
    waiting = found.waiting(samples)
    if host is not None and waiting > max(0, host - found.fixed()):
        return f"Memory: about {_gib(peak)} at its widest; part of {_gib(waiting)} of images and activations on disk."
    return f"Memory: about {_gib(peak)} at its widest, {_gib(waiting)} of it images and activations."
