"""The loop: for each block of the model collect evidence, choose a mask, refit, verify, write, move on."""

from __future__ import annotations

import copy
import functools
import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import (
    allocation,
    distill,
    memory,
    methods,
    microbatch,
    offload,
    permute,
    ranks,
    resume,
    sites,
    staged,
    streams,
    walk,
)
from .collect import Pair, Target, find_junctions, grams, holding, look_ahead
from .importance import TOGETHER, Key, Metric, importance
from .linalg import dividing, exact_matmul, residuals
from .objective import Gram
from .pattern import Pattern, allocate
from .recall import Recall
from .stopwatch import Stopwatch, as_json, now
from .window import Window


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.  Engine keys first; the run keys below are read by the command only.

    mask, solve, refine: `{"method": name, **options}`, the options being keyword arguments of that method's function
    (`hf_prune/methods/<name>.py`); solve and refine may be None.
    """

    name: str = "snows"
    description: str = ""
    # engine
    nm: str | None = None
    sparsity: float | None = None
    scope: str = "layer"
    allocation: str = "magnitude"  # how the layers of scope `model` share the zeros: pattern.ALLOCATIONS
    mask: dict[str, Any] = field(default_factory=lambda: {"method": "obs"})
    solve: dict[str, Any] | None = field(default_factory=lambda: {"method": "least_squares"})
    refine: dict[str, Any] | None = None
    permute: str = "none"  # reorder channels first: what the order should keep, one of permute.SCORES
    target: dict[str, Any] = field(default_factory=dict)  # keyword arguments of collect.Target: mix, residual, bias
    prune_stem: bool = False
    prune_head: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    seed: int = 0
    stages: int = 1  # rising sparsities on the way to the pattern, each a run of its own from where the last one ended
    schedule: str = "exponential"
    fisher: dict[str, Any] = field(default_factory=dict)  # keyword arguments of staged.Options
    distill: dict[str, Any] = field(default_factory=dict)  # keyword arguments of distill.Options
    batchnorm: str = "keep"  # keep, renew, match or auto: statistics of the pruned network on the calibration images
    # run
    samples: int = 256
    batch_size: int = 16

    def pattern(self) -> Pattern:
        if (self.nm is None) == (self.sparsity is None):
            raise ValueError("give either --nm N:M or --sparsity S, and not both.")
        return Pattern.parse(self.nm) if self.nm else Pattern.unstructured(
            float(self.sparsity or 0), self.scope, self.allocation
        )


@dataclass(frozen=True)
class Row:
    """One weight in the plan.  `pattern` is None where it stays dense, and `reason` says why."""

    name: str
    shape: tuple[int, ...]
    unit: str
    numel: int
    pattern: str | None = None
    reason: str | None = None


@dataclass
class Plan:
    rows: list[Row]
    blocks: list[str]
    walk: str  # how activations travel from block to block: chain, lean, splice or prefix


@dataclass
class Report:
    """What was done, layer by layer: the `layers`, `resources` and `seed` of hf_prune.json."""

    layers: list[dict[str, Any]]
    resources: dict[str, Any]
    calibration: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    permutation: dict[str, Any] | None = None  # None: channels stand where they stood
    stages: list[dict[str, Any]] = field(default_factory=list)  # of a run in stages or on gradients, see staged.py
    distillation: dict[str, Any] | None = None  # what the last pass over the whole network did, see distill.py


@dataclass
class Selection:
    """Everything the loop needs to know about a model before it starts."""

    plan: Plan
    units: list[walk.Unit]
    patterns: dict[str, Pattern]  # site name -> pattern
    small: Any  # a small batch for checks


def plan(model: nn.Module, batch: Any, recipe: Recipe) -> Plan:
    """Every weight of the model with the pattern it will follow, or the reason why it stays dense.

    batch: one or two images, as the model's forward takes them.  Raises ValueError where nothing can be pruned.
    """
    with offload.onloaded(model):
        return choose(model, batch, recipe).plan


def choose(model: nn.Module, batch: Any, recipe: Recipe) -> Selection:
    pattern = recipe.pattern()
    named = sites.parameters(model)
    bad = [n for n, p in named.items() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"{bad[0]}: holds NaN or infinite values ({len(bad)} such weights); repair the checkpoint.")
    found = sites.find(model, batch)
    reasons = dict(found.dense)
    wanted = []
    for s in found.sites:
        misfit = pattern.misfit(s.channels)
        if recipe.only and not any(matches(p, s) for p in recipe.only):
            reasons[s.name] = "not in --only"
        elif any(matches(p, s) for p in recipe.skip):
            reasons[s.name] = "in --skip"
        elif s.parameter in found.stem and not recipe.prune_stem and not recipe.only:
            reasons[s.name] = "stem, kept dense by default (--prune-stem)"
        elif s.parameter in found.head and not recipe.prune_head and not recipe.only:
            reasons[s.name] = "classifier, kept dense by default (--prune-head)"
        elif misfit:
            reasons[s.name] = misfit
        else:
            wanted.append(s)
    made, lost = walk.units(model, found, wanted, batch)
    reasons |= lost
    pruned = [s for u in made for s in u.sites]
    if not pruned:
        why = "; ".join(sorted(set(reasons.values()))[:4])
        raise ValueError(f"no weight of this model can follow {pattern}: {why}.")
    if pattern.m or pattern.scope != "model":  # reading them all is a copy of the model
        budgets = [pattern] * len(pruned)
    else:
        budgets = allocate(pattern, [s.read(named[s.parameter]) for s in pruned], staged.kernels(pruned))
    patterns = {s.name: p for s, p in zip(pruned, budgets, strict=True)}
    unit_of = {s.name: u.name for u in made for s in u.sites}
    rows = []
    for s in found.sites:
        shape = tuple(named[s.parameter].shape) if s.rows is None else s.shape[1:]
        rows.append(Row(s.name, shape, unit_of.get(s.name, ""), s.numel,
                        str(patterns[s.name]) if s.name in patterns else None, reasons.get(s.name)))  # fmt: skip
    listed = {s.parameter for s in found.sites}
    rows += [
        Row(n, tuple(named[n].shape), "", named[n].numel(), None, r) for n, r in found.dense.items() if n not in listed
    ]
    return Selection(Plan(rows, [u.name for u in made], ""), made, patterns, batch)


def matches(pattern: str, site: sites.Site) -> bool:
    """Whether --skip/--only `pattern` names this weight: a parameter, a module or one of its parents, or a glob."""
    import fnmatch

    parts = site.parameter.split(".")
    prefixes = {".".join(parts[:i]) for i in range(1, len(parts) + 1)} | {site.name}
    return any(fnmatch.fnmatchcase(p, pattern) for p in prefixes)


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: str | Path | None = None,
    host_memory: int | str | None = None,
    device_memory: int | str | None = None,
    spill: str | Path | None = None,
    blocks: int | None = None,
) -> Report:
    """Prune `model` in place.

    model: any nn.Module, its weights in float32 (or float64).  batches: what its forward takes, a tensor or a mapping
    of keyword arguments; of a tuple the first entry is the input and the second its labels, which only `fisher.labels`
    reads.  For fresh images at every stage: a function of the stage's number that returns them.
    checkpoint: a folder; every finished block is kept there (of a run in stages, the last stage), and a later call with
    the same model, batches and recipe goes on after the last one, to the same result bit for bit.
    host_memory, device_memory: what the process may use at most (bytes, or "4GiB"); images and activations beyond it
    wait in a file in the folder `spill`, and fewer images are computed at once.  blocks: stop after that many.
    Raises ValueError, in one sentence, for everything a user can mend.
    """
    tell = Stopwatch(progress or (lambda event: None))
    began = now()
    torch.manual_seed(recipe.seed)
    ranks.check()
    draw = batches if callable(batches) else None
    store = streams.Store(folder=spill or checkpoint)
    budgets = streams.size(host_memory), streams.size(device_memory)
    given = iter(draw(0) if draw else batches)
    first = list(itertools.islice(given, 1))
    batch = first[0][0] if first and isinstance(first[0], (tuple, list)) else first[0] if first else None
    with offload.onloaded(model), exact_matmul(), sites.quiet(model):
        device = str(next(model.parameters()).device)
        tell({"event": "look"})
        small = small_batch(model, batch)
        chosen = choose(model, small, recipe)
        target = Target(**recipe.target)
        tell({"event": "start", "layers": len(chosen.patterns)})
        notes: list[str] = []
        micro = None
        if budgets[0] is None:
            memory.keep_freed()
        if any(budgets):
            limits = memory.limits(model, chosen, recipe, *budgets)
            store.budget, micro = limits.streams, limits.images
            notes += limits.notes
        batches, labels = streams.take(store, itertools.chain(first, given), micro)
        images = sum(len(sites._tensors(b)[0]) for b in batches)
        tell({"event": "images", "images": images})
        lesson, kept_out = distill.Options(**recipe.distill), []  # type: distill.Options, Sequence[Any]
        if lesson.epochs:
            batches, kept_out = distill.hold_out(batches, lesson.held_out)
            labels = labels[: len(batches)]
        if recipe.allocation in allocation.CONFIRMED:
            tell({"event": "stage", "text": f"trying the allocation {recipe.allocation}"})
            chosen.patterns = allocation.confirm(model, list(batches), labels, chosen, recipe, notes)
        permutation = None
        if recipe.permute != "none":
            if recipe.pattern().m:
                tell({"event": "stage", "text": "reordering channels"})
                wanted = [s for u in chosen.units[:blocks] for s in u.sites]
                found = permute.permute(model, batches, wanted, chosen.patterns, recipe.permute, chosen.small)
                permutation = permute.told(found, recipe.permute)
                notes += permute.said(found)
            else:
                notes.append(f"permute {recipe.permute} did nothing: only N:M patterns depend on the channels' order.")
        told: list[dict[str, Any]] = []
        folder = Path(checkpoint) if checkpoint else None
        teacher = copy.deepcopy(model) if lesson.epochs else None
        saved = resume.Saved(folder, resume.fingerprint(model, batches, recipe)) if folder else None
        if staged.wanted(recipe):

            def walked(recipe: Recipe, patterns: dict[str, Any]) -> list[dict]:
                return run(model, batches, recipe, replace(chosen, patterns=patterns), target, lambda event: None, None)

            every = list(batches)
            layers, told = staged.prune(model, every, labels, recipe, chosen.units, tell, walked, draw, notes, saved)
        else:
            layers = run(model, batches, recipe, chosen, target, tell, saved, store, blocks, micro)
        distillation = None
        if teacher is not None:
            distillation = taught(model, teacher, chosen, batches, kept_out, lesson, recipe, tell, saved, layers)
            notes.append(distill.concluded(distillation))
    tell.lap()
    took = now().plus(began, -1.0)
    done = {entry["name"]: entry for entry in layers}
    rows = [done.get(r.name) or dense_entry(r) for r in chosen.plan.rows]
    return Report(
        layers=rows,
        resources={
            "seconds": took.seconds,
            "cpu_seconds": took.cpu,
            "by_stage": as_json(tell.stages()),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "device": device,
            "world_size": ranks.world_size(),
        },
        calibration={"samples": images},
        notes=notes,
        permutation=permutation,
        stages=told,
        distillation=distillation,
    )


def taught(
    model: nn.Module, teacher: nn.Module, chosen: Selection, batches: Sequence[Any], kept_out: Sequence[Any],
    options: distill.Options, recipe: Recipe, tell: Any, saved: resume.Saved | None, layers: list[dict],
) -> dict[str, Any]:  # fmt: skip
    """The last pass, and what it changes in the report's entries."""
    every = [s for u in chosen.units for s in u.sites]
    made = distill.distill(model, teacher, every, chosen.units, batches, kept_out, options, recipe.seed, tell, saved)
    named, dense = sites.parameters(model), sites.parameters(teacher)
    entries = {entry["name"]: entry for entry in layers}
    for s in every:
        w, before = s.read(named[s.parameter]), s.read(dense[s.parameter])
        chosen.patterns[s.name].verify(w, s.name)
        entries[s.name] |= {"kept": int((w != 0).sum()),
                            "weight_norm_ratio": float(w.norm() / before.norm().clamp_min(1e-30))}  # fmt: skip
    count = sum(len(sites._tensors(b)[0]) for b in kept_out)
    return made | {"held_out": int(ranks.agree(float(count)))}


def small_batch(model: nn.Module, batch: Any) -> Any:
    """Two images to look at the model with: on every rank the same ones, the first that a rank has.

    batch: this rank's first, or None where there are fewer images than ranks.  Raises ValueError where no rank has any.
    """
    small = None if batch is None else sites.cut(batch, 0, 2)
    have = ranks.gather(small is not None)
    if not any(have):
        raise ValueError("no calibration batch was given; at least one image is needed.")
    if len(have) == 1:
        return small
    told = ranks.told(sites.placed(small, "cpu"), have.index(True))
    return sites.placed(told, next(model.parameters()).device)


def dense_entry(row: Row) -> dict[str, Any]:
    return {"name": row.name, "shape": list(row.shape), "pattern": None, "kept": row.numel, "total": row.numel,
            "error_before": None, "error_after": None, "weight_norm_ratio": 1.0, "seconds": 0.0,
            "dense_reason": row.reason}  # fmt: skip


def run(
    model: nn.Module, batches: Sequence[Any], recipe: Recipe, chosen: Selection, target: Target, tell: Any,
    saved: resume.Saved | None, store: streams.Store | None = None, blocks: int | None = None, micro: int | None = None,
    weighed: tuple[list[dict[Key, Tensor]], dict[Key, Metric]] | None = None,
) -> list[dict]:  # fmt: skip
    """Every unit in turn, or the first `blocks`: prune it, remember it, advance both streams through it.

    weighed: what `weigh` returns for these batches, where it is known already.
    """
    named = sites.parameters(model)
    tensors = {**named, **dict(model.named_buffers())}
    way = walk.Walk(model, chosen.units, chosen.small, store)
    chosen.plan.walk = way.mode
    pairs = [Pair(e, e) for e in way.enter(batches)]
    metrics: dict[Key, Metric] = {}
    every = [s for u in chosen.units for s in u.sites]
    if "gram" in evidence(recipe) and (target.importance > 0 or target.metric > 0):
        tell({"event": "stage", "text": "weighing samples by their influence on the output"})
        weights, metrics = weighed or weigh(
            model, every, batches, target, recipe.seed, saved, min(micro or TOGETHER, TOGETHER), way.store
        )
        for pair, w in zip(pairs, weights, strict=True):
            pair.weights = streams.Lazy(way.store.keep(w))
    small = way.enter([chosen.small])[0]
    last = {(s.source, s.conv): s.unit for s in every}  # the last unit that reads an input
    del batches
    whole = len(pairs)
    dense: dict[str, Tensor] = {}
    lasting = walk.shared(model, chosen.units)
    report: list[dict] = []
    fitted = 0.0

    def done(unit: walk.Unit, entry: dict) -> None:
        report.append(entry)
        tell({"event": "layer", "block": unit.name, "index": len(report), "layers": len(chosen.patterns), **entry})

    for i, unit in enumerate(chosen.units[:blocks]):
        tell({"event": "block", "block": unit.name})
        if way.mode != "prefix":
            dense = {n: t for n, t in dense.items() if n in lasting}
        names = [n for s in unit.sites for n in (s.parameter, s.bias, s.norm) if n]
        dense |= {n: tensors[n].detach().clone() for n in names}
        facts = saved.restore(unit.name, {n: tensors[n] for n in names}) if saved else None
        if facts is None:
            block = Block(way, i, unit, pairs, small, dense, recipe, target, chosen.patterns, metrics,
                          chosen.small, tell, fitted)  # fmt: skip
            entries = microbatch.again(block.prune, block, tensors, names, report, functools.partial(done, unit))
            if saved:
                sizes = ranks.gather(microbatch.sizes(way, i, pairs, chosen.small) if len(pairs) != whole else None)
                facts = {"entries": entries, "sizes": sizes, "fitted": block.fitted}
                saved.add(unit.name, {n: tensors[n] for n in names}, facts)
            fitted = block.fitted
        else:
            fitted = facts["fitted"]
            microbatch.like(way, i, pairs, facts["sizes"][ranks.rank()], chosen.small)
            for entry in facts["entries"]:
                done(unit, entry)
        small = way.advance(i, small)
        for key in [k for k, unit_ in last.items() if unit_ == i]:  # nothing asks for them again
            metrics.pop(key, None)
        if i + 1 < len(chosen.units[:blocks]) and uses_activations(recipe):
            tell({"event": "advance", "block": unit.name})
            two = recipe.refine is not None or target.mix > 0

            def step(pair: Pair, i: int = i, two: bool = two, dense: dict[str, Tensor] = dense) -> None:
                after = None
                if two:
                    with holding(model, dense):
                        after = way.advance(i, pair.dense, pair.ahead and pair.ahead.out)
                with Recall(way.units[i].module, pair.calls):
                    pruned = way.advance(i, pair.pruned)
                pair.dense, pair.pruned = pruned if after is None else after, pruned
                pair.ahead, pair.calls = None, {}

            pairs = microbatch.advance(way, i, pairs, step, chosen.small, tell)
    return report


MOMENT = "moment"  # beside the names of sites, which end in .weight or alike


def weigh(
    model: nn.Module, every: list[sites.Site], batches: Any, target: Target, seed: int, saved: resume.Saved | None,
    micro: int = TOGETHER, store: streams.Store | None = None,
) -> tuple[list[dict[Key, Tensor]], dict[Key, Metric]]:  # fmt: skip
    """The importance of samples and directions, from the folder of a stopped run where that has got so far."""
    compute = functools.partial(
        importance, model, every, batches, target.importance, target.metric, seed=seed, micro=micro, store=store
    )
    if saved is None or ranks.world_size() > 1:  # each rank has its own; they are computed again
        return compute()
    store, keys = store or streams.Store(), list(dict.fromkeys((s.source, s.conv) for s in every))
    coupled = keys if target.metric > 0 else []
    kept, known = saved.kept("importance", len(batches)), saved.kept("metric", len(coupled))
    if kept is None or known is None:
        weights, metrics = compute()

        def parts() -> Iterator[dict[str, Tensor]]:
            for key in coupled:
                metric = metrics.get(key)
                rows = {n: torch.tensor([r.start, r.stop]) for n, r in metric.rows.items()} if metric else {}
                yield {**rows, **({MOMENT: streams.load(metric.moment)} if metric else {})}

        saved.keep("importance", ({str(keys.index(k)): w for k, w in part.items()} for part in weights), len(weights))
        saved.keep("metric", parts(), len(coupled))
        return weights, metrics
    metrics, device = {}, next(model.parameters()).device
    for key, part in zip(coupled, known, strict=True):
        if MOMENT in part:
            moment = store.keep(part.pop(MOMENT).to(store.home(device)))
            metrics[key] = Metric({n: slice(*rows.tolist()) for n, rows in part.items()}, moment, device)
    return [{keys[int(k)]: w for k, w in part.items()} for part in kept], metrics


def evidence(recipe: Recipe) -> set[str | None]:
    roles = (recipe.mask, recipe.solve, recipe.refine)
    return {methods.evidence(role["method"]) for role in roles if role}


def by_batches(recipe: Recipe) -> bool:
    """Whether a run reads its images batch by batch, so that ranks that share out whole batches give the same bits."""
    return not staged.wanted(recipe)


def uses_activations(recipe: Recipe) -> bool:
    return evidence(recipe) != {None}


Layer = tuple[sites.Site, Gram | None]


@dataclass
class Block:
    """One unit of the walk while it is being pruned."""

    way: walk.Walk
    index: int
    unit: walk.Unit
    pairs: list[Pair]
    small: Any
    dense: dict[str, Tensor]
    recipe: Recipe
    target: Target
    patterns: dict[str, Pattern]
    metrics: dict[Key, Metric]
    batch: Any = None  # two images, of which `small` is the entry
    tell: Any = None
    before: float = 0.0  # inputs per effective sample of the layers of earlier blocks, see Target.caution
    fitted: float = 0.0  # the same with this block's layers, as far as it has got

    @property
    def caution(self) -> float:
        return 1 + self.target.caution * self.fitted

    def prune(self, tensors: dict[str, Tensor], done: Callable[[dict], None]) -> list[dict]:
        gram = "gram" in evidence(self.recipe)
        self.fitted = self.before
        masks: dict[str, Tensor] = {}
        entries: list[dict] = []
        if gram and self.target.residual:
            find_junctions(self.way, self.unit, self.small)
        if gram and self.target.mix > 0:
            where = self.way, self.index
            ahead = functools.partial(look_ahead, *where, self.unit.sites, self.pairs, self.dense, self.target)
            microbatch.with_less(ahead, *where, self.pairs, self.batch, self.tell)
        for n, stage in enumerate(self.target.stages(self.unit)):
            began, sent = time.perf_counter(), ranks.sent
            found: Sequence[Gram | None] = [None] * len(stage)
            if gram:
                found = microbatch.with_less(
                    functools.partial(grams, self.way, self.index, stage, self.pairs, self.dense, self.target, n > 0),
                    self.way, self.index, self.pairs, self.batch, self.tell,
                )  # fmt: skip
            # layers that read one input are fitted to the same samples
            seen = {(s.source, s.conv): g for s, g in zip(stage, found, strict=True) if g}
            self.fitted += sum(g.per_sample() for g in seen.values())
            for group in self.together(stage, found):
                for site, entry, mask in self.layers(group, tensors):
                    masks[site.name] = mask
                    entry["seconds"] = time.perf_counter() - began
                    if ranks.world_size() > 1:  # a stage's sums are counted with its first layer
                        entry["sent_bytes"] = ranks.sent - sent
                    began, sent = time.perf_counter(), ranks.sent
                    entries.append(entry)
                    done(entry)
        if self.recipe.refine:
            for pair in self.pairs:
                pair.calls = {}  # all weights change once more
            self.refine(masks, entries)
        return entries

    def window(self, sites_: list[sites.Site], options: dict[str, Any]) -> Window:
        mix = self.target.mix / self.caution if options.get("mix") is None else options["mix"]
        last = self.unit.sites[-1]
        metric = self.metrics.get((last.source, last.conv)) if options["k"] is None and options["relative"] else None
        joint = metric.of([last.name]) if metric else None
        how = (options["k"], mix, options["relative"], options["curvature"], joint)
        shift = self.shift() if options["k"] is None else None
        return Window(self.way, self.index, sites_, self.pairs, self.dense, *how, shift)

    def shift(self) -> Tensor | None:
        """What a refit batch norm behind the unit adds to its output, to be broadcast over it; None where none is."""
        inside = {b.data_ptr() for b in self.unit.module.buffers()}
        for site in self.unit.sites:
            if site.norm is not None and site.bias is None and site.conv is not None:
                mean = self.way.model.get_buffer(site.norm)
                if mean.data_ptr() not in inside:
                    return (self.dense[site.norm].to(mean) - mean).view(-1, *[1] * len(site.conv.kernel))
        return None

    def refine(self, masks: dict[str, Tensor], entries: list[dict]) -> None:
        """All weights of the unit together, towards the unit's output."""
        role = self.recipe.refine or {}
        name = role["method"]
        options = methods.options("solve", name) | {"k": None} | {k: v for k, v in role.items() if k != "method"}
        window = self.window(self.unit.sites, options)
        before = window.read()
        mask = torch.cat([masks[s.name].flatten() for s in self.unit.sites])
        loss = window.value(before)
        pattern = self.patterns[self.unit.sites[0].name]
        problem, draft = methods.Problem(before, pattern, window), methods.Draft(before * mask, mask)
        new = methods.function("solve", name)(problem, draft, **options)
        better = window.value(new)
        if not better < loss:
            new, better = before, loss
        window.write(new)
        for site, entry, w in zip(self.unit.sites, entries, new.split([s.numel for s in self.unit.sites]), strict=True):
            w = w.view(site.shape)
            self.patterns[site.name].verify(w, site.name)
            entry["refined"] = {"loss_before": loss, "loss_after": better}
            entry["weight_norm_ratio"] = float(w.norm() / site.read(self.dense[site.parameter]).norm())
            entry["kept"] = int((w != 0).sum())

    def together(self, stage: list[sites.Site], grams: Sequence[Gram | None]) -> list[list[Layer]]:
        """The layers of a stage, those in one list whose solutions depend on each other through an output metric."""
        groups: dict[Any, list[Layer]] = {}
        for site, gram in zip(stage, grams, strict=True):
            key: Any = site.name
            if gram is not None:
                bias = self.target.bias and (site.bias is not None or site.norm is not None)
                gram = replace(gram, mix=self.target.mix / self.caution, caution=self.caution, bias=bias)
                metric = self.metrics.get((site.source, site.conv))
                if metric is not None and site.name in metric.rows:
                    key = (site.source, site.conv, bias)  # with a bias moments are centred, without they are not
            groups.setdefault(key, []).append((site, gram))
        return list(groups.values())

    def layers(self, group: list[Layer], tensors: dict[str, Tensor]) -> list[tuple[sites.Site, dict, Tensor]]:
        """Select, solve, verify and write some layers; returns for each its entry of the report, and its mask."""
        site, gram = group[0]
        metric = self.metrics.get((site.source, site.conv)) if gram is not None else None
        joint = metric.of([s.name for s, _ in group]) if metric else None
        try:
            drafts = [self.select(s, tensors, g) for s, g in group]
            if joint is not None and self.recipe.solve and methods.evidence(self.recipe.solve["method"]) == "gram":
                together = Gram.join([g for _, g in group if g is not None], joint)
                draft = methods.Draft(*(torch.cat(parts, 1) for parts in zip(*drafts, strict=True)))
                problem = methods.Problem(together.weight, self.patterns[site.name], together)
                with residuals() as seen, dividing(ranks.columns):
                    new = call("solve", self.recipe.solve, problem, draft).split([s.shape[1] for s, _ in group], 1)
                return [self.write(s, tensors, g, d, w, seen) for (s, g), d, w in zip(group, drafts, new, strict=True)]
        except ValueError as e:
            names = ", ".join(s.name for s, _ in group)
            raise ValueError(str(e) if any(s.name in str(e) for s, _ in group) else f"{names}: {e}") from e
        return [self.layer(s, tensors, g, d) for (s, g), d in zip(group, drafts, strict=True)]

    def select(self, site: sites.Site, tensors: dict[str, Tensor], gram: Gram | None) -> methods.Draft:
        problem = methods.Problem(site.read(tensors[site.parameter]), self.patterns[site.name], gram)
        return divided("select", self.recipe.mask, problem)

    def layer(
        self, site: sites.Site, tensors: dict[str, Tensor], gram: Gram | None, draft: methods.Draft
    ) -> tuple[sites.Site, dict, Tensor]:
        """Solve one layer by itself, and write it."""
        new, weight, window, seen = draft.weight, site.read(tensors[site.parameter]), None, []  # type: Any, Any, Any, Any
        try:
            if self.recipe.solve:
                name, objective = self.recipe.solve["method"], gram  # type: Any, Any
                if methods.evidence(name) == "window":
                    site.write(tensors[site.parameter], draft.weight)
                    window = objective = self.window([site], methods.options("solve", name) | self.recipe.solve)
                problem = methods.Problem(weight, self.patterns[site.name], objective)
                with residuals() as seen:
                    new = divided("solve", self.recipe.solve, problem, draft)
        except ValueError as e:
            raise ValueError(str(e) if site.name in str(e) else f"{site.name}: {e}") from e
        return self.write(site, tensors, gram, draft, new, seen, window)

    def write(
        self, site: sites.Site, tensors: dict[str, Tensor], gram: Gram | None, draft: methods.Draft, new: Tensor,
        seen: Sequence[Tensor] = (), window: Window | None = None,
    ) -> tuple[sites.Site, dict, Tensor]:  # fmt: skip
        """Verify a layer's new weights and write them and the bias that goes with them."""
        recipe, pattern = self.recipe, self.patterns[site.name]
        weight = site.read(self.dense[site.parameter])
        new = new * draft.mask
        pattern.verify(new, site.name)
        entry = {
            "name": site.name, "shape": list(site.shape[site.shape[0] == 1 :]), "pattern": str(pattern),
            "kept": int((new != 0).sum()), "total": site.numel, "error_before": None, "error_after": None,
            "weight_norm_ratio": float(new.norm() / weight.norm().clamp_min(1e-30)), "seconds": 0.0,
            "dense_reason": None,
        }  # fmt: skip
        if seen:  # of an iterative solve; at most about a hundred of them
            every = -(-len(seen) // 100)
            entry["convergence"] = {"every": every, "residuals": [float(f"{float(r):.3g}") for r in seen[::every]]}
        if gram is not None:
            energy = gram.energy().clamp_min(1e-30)
            entry["error_before"] = float(gram.value(weight * draft.mask) / energy)
            entry["error_after"] = float(gram.value(new) / energy)
            if self.target.caution:
                entry["caution"] = gram.caution
        elif window is not None:
            entry["error_before"] = window.value((weight * draft.mask).flatten())
            entry["error_after"] = window.value(new.flatten())
        site.write(tensors[site.parameter], new)
        if gram is not None and gram.bias and recipe.solve:
            shift = gram.best_bias(new).reshape(-1)
            name = site.bias or site.norm
            if name is not None:  # a running mean is subtracted, so it moves the other way
                with torch.no_grad():
                    tensors[name].add_((shift if site.bias else -shift).to(tensors[name]))
        return site, entry, draft.mask


def rows_apart(role: dict[str, Any], pattern: Pattern, objective: Any) -> bool:
    """Whether the rows of a layer are problems of their own, so that the ranks may divide them."""
    alone = isinstance(objective, Gram) and objective.metric is None and objective.weight.shape[0] == 1
    return alone and pattern.by_row and role["method"] in methods.ROWS_APART


def divided(kind: str, role: dict[str, Any], problem: methods.Problem, *draft: methods.Draft) -> Any:
    """`call`, each rank working on its rows where they are apart; every rank then holds the result of all."""
    cost = problem.weight.numel() * problem.weight.shape[-1]
    if ranks.world_size() == 1 or cost < ranks.WORTH or not rows_apart(role, problem.pattern, problem.objective):
        return call(kind, role, problem, *draft)
    rows = ranks.shares(problem.weight.shape[1])
    first = sum(rows[: ranks.rank()])
    mine = slice(first, first + rows[ranks.rank()])
    g = problem.objective
    part = replace(g, weight=g.weight[:, mine], xd=g.xd[..., mine], dd=g.dd[:, mine], sd=g.sd[:, mine])
    weight = problem.weight[:, mine]
    own = methods.Problem(weight, problem.pattern, part)
    if kind == "solve":
        new = torch.zeros_like(weight)
        if rows[ranks.rank()]:
            new = call(kind, role, own, *(methods.Draft(d.weight[:, mine], d.mask[:, mine]) for d in draft))
        return ranks.gather_rows(new[0], rows)[None]
    made = methods.Draft(torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool))
    if rows[ranks.rank()]:
        made = call(kind, role, own)
    masks = ranks.gather_rows(made.mask[0].to(torch.uint8), rows)[None].bool()
    return methods.Draft(ranks.gather_rows(made.weight[0], rows)[None], masks)


def call(kind: str, role: dict[str, Any], *problem: Any) -> Any:
    return methods.function(kind, role["method"])(*problem, **{k: v for k, v in role.items() if k != "method"})
