"""Runs that see the whole model at once: Fisher evidence, and any method in several stages of rising sparsity.

The block walk of loop.py gathers evidence layer by layer.  The gradients of the loss belong to all layers together, so
here every weight to be pruned is one vector.  The two compose: a mask from gradients goes with a layer-wise solve and
the other way round.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import batchnorm, gradients, methods, ranks, resume
from .fisher import Fisher
from .joined import SCHEDULES, Given, Joined, schedule
from .pattern import Pattern, allocate
from .sites import Site, _tensors, feed, parameters, quiet

STAGES, TOTAL = "stages", "sum of the averaged weights"  # names in the file of a run that may be killed


@dataclass(frozen=True)
class Options(gradients.Rows):
    """What `fisher:` in a recipe may say: which gradients (see gradients.Rows), and how a ridge is chosen.

    ridges: tried one after the other in every stage; the one with the least loss on images kept out of the gradients
    wins.  Empty: the ridge of the method.  held_out: share of the calibration images kept out for that and for
    `batchnorm: auto`.  first_stage, halvings, dwell: of the way through several stages, see joined.schedule.
    average: share of the stages, at the end, whose weights are averaged once the support stands still; with the
    first-order term each stage is a noisy step, and the mean of many is a better point than the last.

    first_order: with a row's gradient a_i and e_i = 1 / minibatch (true), a stage asks every row for the same fall of
    its loss, which a network that fits its images does not have; ever larger steps follow.  With e_i the row's own mean
    loss (loss), a_i · (w - w̄) + e_i is that loss, linearised, and a stage is one Gauss-Newton step on the sum of the
    rows' squared losses: it asks for no more than there is.  With labels dense the same is a Gauss-Newton step on the
    squared distance to the dense model's outputs: distillation, which needs no label and always has something to say.
    """

    ridges: tuple[float, ...] | list[float] = ()
    held_out: float = 0.2
    first_stage: float = 0.1
    halvings: float | None = None
    dwell: float = 0.0
    average: float = 0.0

    def way(self) -> tuple[float, float | None, float]:
        return self.first_stage, self.halvings, self.dwell


@dataclass
class Run:
    model: nn.Module
    sites: list[Site]
    recipe: Any
    options: Options
    tell: Callable[[dict[str, Any]], None]
    walk: Callable[[Any, dict[str, Any]], list[dict]]  # (recipe, pattern of each site) -> entries of the report
    notes: list[str] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)  # what each stage did, for the report

    def weights(self) -> Tensor:
        named = parameters(self.model)
        return torch.cat([s.read(named[s.parameter]).flatten() for s in self.sites])

    def split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([s.numel for s in self.sites])
        return [part.view(s.shape) for part, s in zip(parts, self.sites, strict=True)]

    def write(self, flat: Tensor) -> None:
        named = parameters(self.model)
        for s, w in zip(self.sites, self.split(flat), strict=True):
            s.write(named[s.parameter], w)


    def budgets(self, pattern: Pattern, sparsity: float) -> list[int]:
        """Weights kept per layer where the allocation is not simply the largest scores of the whole vector."""
        if pattern.m or pattern.allocation == "magnitude":
            return []
        made = allocate(replace(pattern, sparsity=sparsity), self.split(self.weights()), kernels(self.sites))
        return [p.budget or 0 for p in made]


def kernels(found: list[Site]) -> list[tuple[int, ...]]:
    return [s.conv.kernel if s.conv else () for s in found]


class Mean:
    """The mean of weight vectors that share their support; it starts anew where the support changes."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, w: Tensor) -> None:
        if self.total is not None and torch.equal(self.total != 0, w != 0):
            self.total, self.count = self.total + w.double(), self.count + 1
        else:
            self.total, self.count = w.double(), 1

    def filled(self, run: Run) -> Tensor:
        """The sum so far, (p,) float64; zeros before the first."""
        return torch.zeros_like(run.weights(), dtype=torch.float64) if self.total is None else self.total

    def value(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


def roles(recipe: Any) -> tuple[str | None, str | None, str | None]:
    """The evidence of mask, solve and refine; "none" where there is no such role."""
    return tuple(methods.evidence(r["method"]) if r else "none" for r in (recipe.mask, recipe.solve, recipe.refine))  # type: ignore[return-value]


def wanted(recipe: Any) -> bool:
    """Whether a run needs this file."""
    return recipe.stages > 1 or recipe.batchnorm != "keep" or "fisher" in roles(recipe)


def labels_of(batches: list[Any]) -> list[Tensor | None]:
    """The labels of (input, label) batches; None for a batch that has none."""
    return [b[1] if isinstance(b, (tuple, list)) and len(b) > 1 and torch.is_tensor(b[1]) else None for b in batches]


def prune(
    model: nn.Module, batches: list[Any], labels: list[Tensor | None], recipe: Any, units: list[Any],
    tell: Callable[[dict[str, Any]], None], walk: Callable[[Any, dict[str, Any]], list[dict]],
    fresh: Callable[[int], Any] | None, notes: list[str], saved: resume.Saved | None = None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """All stages of a recipe, in place; returns one entry of the report per site, and one per stage; adds to `notes`.

    walk(recipe, patterns): one run of the block walk.  fresh(t): batches of stage t, where the caller has new ones, a
    function of t alone.  saved: keeps the weights after every stage, and gives them back to a run that was killed.
    """
    check(recipe)
    options = Options(**recipe.fisher)
    run = Run(model, [s for u in units for s in u.sites], recipe, options, tell, walk, notes)

    def draw(t: int) -> tuple[list[Any], list[Tensor | None]]:
        if t == 0 or fresh is None:
            return batches, labels
        given = list(fresh(t))
        return [b[0] if isinstance(b, (tuple, list)) else b for b in given], labels_of(given)

    return stages(run, draw, recipe.seed, saved), run.told


def check(recipe: Any) -> None:
    """Raises ValueError for settings that contradict each other, before anything is computed."""
    if recipe.batchnorm not in batchnorm.CHOICES:
        raise ValueError(f"batchnorm {recipe.batchnorm}: choose one of {', '.join(batchnorm.CHOICES)}.")
    if recipe.schedule not in SCHEDULES:
        raise ValueError(f"schedule {recipe.schedule}: choose one of {', '.join(SCHEDULES)}.")
    if "fisher" in roles(recipe)[:2] and recipe.refine:
        raise ValueError("refine works on layer-wise solves; with masks or solves from gradients set it to none.")


def stages(
    run: Run, draw: Callable[[int], tuple[list[Any], list[Tensor | None]]], seed: int, saved: resume.Saved | None
) -> list[dict]:
    recipe, began = run.recipe, time.perf_counter()
    pattern: Pattern = recipe.pattern()
    shapes = [s.shape for s in run.sites]
    steps = schedule(recipe.schedule, recipe.stages, 1 - pattern.density, *run.options.way())
    original = run.weights()
    if recipe.batchnorm == "match" or (recipe.batchnorm == "auto" and batchnorm.scaled(run.model)):
        kept = run.options.held_out if judged(recipe, run.options) else 0.0
        batchnorm.anchor(run.model, hold_out(*draw(0), kept, seed)[0][0])
    entries: list[dict] = []
    dense_outputs: list[Tensor] | None = None
    teacher = copy.deepcopy(run.model) if "fisher" in roles(recipe) and run.options.labels == "dense" else None
    axes: list[int] | None = None
    mean, done_before = Mean(), 0
    for t, sparsity in enumerate(steps):
        if 0 < t < done_before:
            continue
        batches, labels = draw(t)
        train, kept_out = hold_out(batches, labels, run.options.held_out if judged(recipe, run.options) else 0.0, seed)
        if kept_out[0] and kept_out[1][0] is None and dense_outputs is None:
            dense_outputs = outputs(run.model, kept_out[0])
        if t == 0 and saved:
            done_before, entries = restore(run, saved, mean)
            if done_before:
                run.tell({"event": "stage", "text": f"going on after stage {done_before} of {len(steps)}"})
                continue
        run.tell({"event": "stage", "text": f"stage {t + 1} of {len(steps)}: {100 * sparsity:.4g} % zeros"})
        joined = Joined.of(pattern, shapes, sparsity, run.budgets(pattern, sparsity))
        note = f"stage {t + 1} of {len(steps)}: {100 * sparsity:.4g} % zeros"
        fisher = None
        told: dict[str, Any] = {"sparsity": sparsity}
        if "fisher" in roles(recipe):
            clock, busy = time.perf_counter(), time.process_time()
            axes = axes or gradients.image_axis(run.model, run.sites, train[0][0])
            sizes = shares(train[0], run.options)
            mine = replace(run.options, rows=sizes[ranks.rank()])
            order = shuffle(train, mine, seed + t)
            if teacher is not None:
                order = order[0], [*outputs(teacher, order[0])]
            losses = torch.zeros(sizes[ranks.rank()], dtype=torch.float64)
            grads, kind = gradients.per_row(
                run.model, run.sites, *order, mine, seed=ranks.own(seed + t), axes=axes, losses=losses
            )
            first = run.options.first_order
            if first and kind not in ("true", "dense"):
                raise ValueError(f"fisher.first_order: {kind} labels have none; it needs labelled images.")
            if first is None:
                first = "loss" if kind == "dense" else kind == "true" and run.options.minibatch > 1
            scale: float | Tensor = 1 / run.options.minibatch if first else 0.0
            if first == "loss":
                scale = ranks.gather_rows(losses, sizes).to(grads.device)
            fisher = Fisher(
                grads, run.weights(), [s.numel for s in run.sites], scale, total=_summed, n=sum(sizes),
                rows=partial(ranks.gather_rows, sizes=sizes), start=sum(sizes[: ranks.rank()]),
            )  # fmt: skip
            del grads  # the largest thing there is: gone with fisher, before the next stage makes its own
            spent = time.perf_counter() - clock
            note += f", {fisher.n} gradients of {run.options.minibatch} images, {kind} labels, {spent:.1f} s"
            told |= {"rows": fisher.n, "minibatch": run.options.minibatch, "labels": kind,
                     "first_order": first or False, "gradient_seconds": spent,
                     "gradient_cpu_seconds": time.process_time() - busy, "ridge": ridge_of(recipe)}  # fmt: skip
        clock, busy = time.perf_counter(), time.process_time()
        current = run.weights()
        ridges: list[float | None] = list(run.options.ridges) or [None]
        tried: list[tuple[float, float | None, Tensor]] = []
        for ridge in ridges:
            run.write(current)
            entries = stage(run, joined, fisher, ridge, current)
            if len(ridges) > 1:
                tried.append((held_loss(run.model, kept_out, dense_outputs), ridge, run.weights()))
        if tried:
            shown = ", ".join(f"{r:g}: {v:.4f}" for v, r, _ in tried)
            best = min((x for x in tried if x[0] == x[0]), key=lambda x: x[0])
            run.write(best[2])
            note += f", ridge {best[1]:g} by held-out loss ({shown})"
            told |= {"ridge": best[1], "held_out_loss": best[0], "ridges": {f"{r:g}": v for v, r, _ in tried}}
        told["solve_seconds"] = time.perf_counter() - clock
        told["solve_cpu_seconds"] = time.process_time() - busy
        note += f", solved in {told['solve_seconds']:.1f} s"
        if len(steps) - t <= run.options.average * len(steps):
            mean.add(run.weights())
            if t + 1 == len(steps) and mean.count > 1:
                run.write(mean.value().to(current.dtype))
                note += f", weights averaged over the last {mean.count} stages"
                told["averaged"] = mean.count
        # at the goal every solve is against the statistics that there are: new ones would undo what it did
        still = t > 0 and sparsity == steps[t - 1]
        done = "" if still else settle_norms(run.model, recipe.batchnorm, train[0], kept_out, dense_outputs)
        told["batchnorm"] = done.removeprefix(", ") or "kept"
        run.notes.append(note + done)
        run.told.append(told)
        del fisher
        if saved:
            keep(run, saved, mean, t + 1, entries)
    return finish(run, entries, original, str(pattern), time.perf_counter() - began)


# ------------------------------------------------------------------------------------------ a run that was killed
def state(run: Run) -> dict[str, Tensor]:
    """What a stage may change: weights, the biases refit with them, the statistics of batch norms."""
    return dict(run.model.state_dict())


def keep(run: Run, saved: resume.Saved, mean: Mean, done: int, entries: list[dict]) -> None:
    """One file, written anew after every stage; `done` of them are finished."""
    facts = {"done": done, "count": mean.count, "entries": entries, "told": run.told, "notes": run.notes}
    saved.add(STAGES, state(run) | {TOTAL: mean.filled(run)}, facts)


def restore(run: Run, saved: resume.Saved, mean: Mean) -> tuple[int, list[dict]]:
    """(stages that an earlier run has finished, its entries); the model, the mean and the report are as they were."""
    total = mean.filled(run)
    facts = saved.restore(STAGES, state(run) | {TOTAL: total})
    if facts is None:
        return 0, []
    mean.count, mean.total = facts["count"], total if facts["count"] else None
    run.told[:], run.notes[:] = facts["told"], facts["notes"]
    return facts["done"], facts["entries"]


def judged(recipe: Any, options: Options) -> bool:
    return len(options.ridges) > 1 or recipe.batchnorm == "auto"


def stage(run: Run, joined: Joined, fisher: Fisher | None, ridge: float | None, current: Tensor) -> list[dict]:
    """One stage from the weights `current`, written into the model; entries where the block walk made some."""
    recipe = run.recipe
    mask_by, solve_by, _ = roles(recipe)
    if "fisher" not in (mask_by, solve_by):
        return run.walk(recipe, layer_patterns(run, joined, current))
    if mask_by == "fisher":
        draft = call("select", recipe.mask, methods.Problem(current, joined, fisher), ridge=ridge)  # type: ignore[arg-type]
    else:
        run.walk(replace(recipe, solve=None), layer_patterns(run, joined, current))
        chosen = run.weights()
        run.write(current)
        mask = chosen != 0
        draft = methods.Draft(current * mask, mask)
    new = draft.weight
    if solve_by == "fisher":
        new = call("solve", recipe.solve, methods.Problem(current, joined, fisher), draft, ridge=ridge)  # type: ignore[arg-type]
    elif solve_by != "none":
        given = {s.name: Given(m, str(joined.pattern)) for s, m in zip(run.sites, run.split(draft.mask), strict=True)}
        return run.walk(replace(recipe, mask={"method": "magnitude"}), given)
    # what every process computed from the same sums may still differ in the last bit: rank 0 decides
    new = _summed(new * draft.mask if ranks.is_main() else torch.zeros_like(new))
    if not bool(torch.isfinite(new).all()):
        raise ValueError("the solve gave weights that are not finite; raise the ridge or the number of gradients.")
    run.write(new)
    return []


def layer_patterns(run: Run, joined: Joined, current: Tensor) -> dict[str, Any]:
    """The pattern of each site for the block walk at this stage's sparsity."""
    pattern = joined.pattern
    if pattern.m:  # the coarse steps that N:M has: 3:4 on the way to 2:4
        keep = max(pattern.n, min(pattern.m - 1, int(-(-(1 - joined.sparsity) * pattern.m // 1))))
        made = [replace(pattern, n=keep)] * len(run.sites)
    else:
        made = allocate(replace(pattern, sparsity=joined.sparsity), run.split(current), kernels(run.sites))
    return {s.name: p for s, p in zip(run.sites, made, strict=True)}


def ridge_of(recipe: Any) -> float | None:
    """The ridge of the method that works on the gradients, its default included; None for one that has none."""
    for kind, role in (("solve", recipe.solve), ("select", recipe.mask)):
        if role and methods.evidence(role["method"]) == "fisher":
            known = methods.options(kind, role["method"]) | role
            if known.get("ridge") is not None:
                return float(known["ridge"])
    return None


def call(kind: str, role: dict[str, Any], *problem: Any, ridge: float | None) -> Any:
    given = {k: v for k, v in role.items() if k != "method"}
    if ridge is not None and "ridge" in methods.options(kind, role["method"]):
        given["ridge"] = ridge
    return methods.function(kind, role["method"])(*problem, **given)


def finish(run: Run, entries: list[dict], original: Tensor, pattern: str, seconds: float) -> list[dict]:
    made = {e["name"]: e for e in entries}
    final = run.weights()
    out: list[dict] = []
    for s, w, w0 in zip(run.sites, run.split(final), run.split(original), strict=True):
        entry = {
            "name": s.name, "shape": list(s.shape if s.shape[0] > 1 else s.shape[1:]), "pattern": pattern,
            "kept": int((w != 0).sum()), "total": s.numel, "error_before": None, "error_after": None,
            "weight_norm_ratio": float(w.norm() / w0.norm().clamp_min(1e-30)),
            "seconds": seconds * s.numel / final.numel(), "dense_reason": None,
        }  # fmt: skip
        if s.name in made:
            entry |= {k: made[s.name][k] for k in ("error_before", "error_after")}
        run.tell({"event": "layer", "block": "", "index": len(out) + 1, "layers": len(run.sites), **entry})
        out.append(entry)
    return out


# ------------------------------------------------------------------------------------------------ images kept out
def hold_out(
    batches: list[Any], labels: list[Tensor | None], share: float, seed: int
) -> tuple[tuple[list[Any], list[Tensor | None]], tuple[list[Any], list[Tensor | None]]]:
    """(train, held out), each (batches, labels); which are held out depends on how many there are and the seed only."""
    if not share:
        return (batches, labels), ([], [])
    total = sum(len(_tensors(b)[0]) for b in batches)
    out = max(1, round(share * total))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    inner, outer = order[out:].sort().values, order[:out].sort().values
    return pick(batches, labels, inner), pick(batches, labels, outer)


def pick(batches: list[Any], labels: list[Tensor | None], which: Tensor) -> tuple[list[Any], list[Tensor | None]]:
    """The images numbered `which`, in batches of the size they came in."""
    (whole, known), *_ = gradients.chunks(batches, labels, sum(len(_tensors(b)[0]) for b in batches))
    total, size = len(_tensors(whole)[0]), len(_tensors(batches[0])[0])
    new, marks = [], []
    for part in which.split(size):
        cut = lambda t, part=part: t[part.to(t.device)] if torch.is_tensor(t) and t.dim() and len(t) == total else t  # noqa: E731
        new.append(torch.utils._pytree.tree_map(cut, whole))
        marks.append(None if known is None else known[part])
    return new, marks


def shuffle(
    data: tuple[list[Any], list[Tensor | None]], options: Options, seed: int
) -> tuple[list[Any], list[Tensor | None]]:
    """Other images, in another order, for each stage."""
    total = sum(len(_tensors(b)[0]) for b in data[0])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return pick(*data, order[: options.rows * options.minibatch] if options.rows else order)


def shares(batches: list[Any], options: Options) -> list[int]:
    """Rows that each process contributes, from the images it has: together `options.rows`, as evenly as they allow.

    Raises ValueError, on every process alike, where there are too few images.
    """
    images = sum(len(_tensors(b)[0]) for b in batches)
    most = [int(k) // options.minibatch for k in ranks.gather(images)]
    wanted = sum(most) if options.rows is None else options.rows
    taken = [0] * len(most)
    for r in sorted(range(len(most)), key=lambda r: most[r]):  # those with the fewest images first
        open_ = sum(1 for r_ in range(len(most)) if (most[r_], r_) >= (most[r], r))
        taken[r] = min(most[r], -(-(wanted - sum(taken)) // open_))
    if sum(taken) < wanted or min(taken) < 2:
        raise ValueError(
            f"fisher: {options.rows or 'any'} rows of {options.minibatch} images need at least "
            f"{(options.rows or 2 * len(most)) * options.minibatch} images, found "
            f"{' + '.join(str(k) for k in ranks.gather(images))}. Raise samples or lower fisher.rows."
        )
    return taken


def _summed(t: Tensor) -> Tensor:
    t = t.clone()
    ranks.sum_([t])
    return t


def outputs(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    with quiet(model), torch.no_grad():
        return [gradients.logits_of(feed(model, b)).clone() for b in batches]


def held_loss(model: nn.Module, kept_out: tuple[list[Any], list[Tensor | None]], dense: list[Tensor] | None) -> float:
    """Loss on the images kept out: cross-entropy of their labels, else the divergence from the dense model's answer.

    Infinite where the outputs are not finite, so that such a ridge never wins.
    """
    total, count = 0.0, 0
    for i, z in enumerate(outputs(model, kept_out[0])):
        label = kept_out[1][i]
        if label is not None:
            one = F.cross_entropy(z.double(), label.to(z.device), reduction="sum")
        elif z.dim() == 2:
            assert dense is not None
            p, q = (t.double().log_softmax(-1) for t in (z, dense[i]))
            one = F.kl_div(p, q, log_target=True, reduction="sum")
        else:
            assert dense is not None
            one = (z - dense[i]).double().square().sum() / dense[i].double().square().mean()
        total += float(one)
        count += len(z)
    value = ranks.agree(total) / max(1.0, ranks.agree(float(count)))
    return value if value == value else float("inf")


def settle_norms(
    model: nn.Module, choice: str, batches: list[Any], kept_out: tuple[list[Any], list[Tensor | None]],
    dense: list[Tensor] | None,
) -> str:  # fmt: skip
    """Re-estimate batch-norm statistics if `choice` says so; returns what to report."""
    found = batchnorm.norms(model)
    if choice == "keep" or not found:
        return ""
    saved = batchnorm.snapshot(found)
    before = held_loss(model, kept_out, dense) if choice == "auto" else 0.0
    batchnorm.renew(model, batches)
    if choice in ("renew", "match"):
        return f", statistics of {len(found)} batch norms re-estimated"
    after = held_loss(model, kept_out, dense)
    if after < before:
        return f", statistics of {len(found)} batch norms re-estimated (held-out loss {before:.4f} -> {after:.4f})"
    with torch.no_grad():
        batchnorm.restore(found, saved)
    return f", batch-norm statistics kept (held-out loss {before:.4f}, re-estimated {after:.4f})"
