"""How sparse can this model go?  What zeroing reaches, measured, beside what the curvature of the loss predicts.

The estimates (spectrum.py) rest on a quadratic model of the loss around the present weights.  Read them as the paper's
title says, a perspective: the trace and quadratic figures speak of zeroing alone, the spectral ones of weights that may
also be updated, and none of them is a guarantee.  What was measured is named measured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg, loop, ranks, sites
from .curvature import Images, NoSecondDerivative, Task, measure, prepare
from .pattern import Pattern, allocate
from .spectrum import Lanczos, Removal, bounds, fixed_point, from_trace, mean_curvature, probe, share, spread

AUTO = "auto"
EPS: tuple[float | str, ...] = (AUTO, 0.01, 0.05, 0.1, 0.2, 0.5)
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)  # where loss curves are evaluated
HALVINGS = 6  # of the step of the grid that holds a knee
BATCH = 128  # images of the mini-batches whose spread `auto` is
SETTLED = 64  # Lanczos steps below which the figure of |H| is marked: it is too low, and half of them say the same
LOOSE = 0.1  # sparsity by which half of the steps may differ before it is marked too
VACUOUS = 0.5  # a rank below this share of the weights decides the Gauss-Newton figure by itself
SKIP_SHARE = 0.1  # layers suggested to stay dense hold at most this share of the weights
DAMAGE = 0.5  # ... and are listed until they make up this share of the damage


@dataclass(frozen=True)
class Options:
    """eps: tolerated rises of the mean loss; `auto` is the standard deviation of the mean loss of 128 images.

    probes, steps: random vectors and products per vector for the Gauss-Newton matrix; the exact Hessian gets a quarter
    of the vectors, 2 at least, with four times the steps, since |H| is no smooth function of H.  width: intervals of
    sparsity narrower than this end the work early.  seconds: after them, counted from the first product, no other is
    started; None for no limit.  memory: GiB for Lanczos vectors and kept graphs.  nm: the pattern whose safety is
    asked.
    """

    eps: tuple[float | str, ...] = EPS
    probes: int = 16
    steps: int = 32
    seed: int = 0
    width: float = 0.01
    seconds: float | None = None
    memory: float = 2.0
    nm: str | None = "2:4"

    def __post_init__(self) -> None:
        if self.probes < 1 or self.steps < 1:
            raise ValueError(f"--probes {self.probes} --steps {self.steps}: at least 1 of each is needed.")
        for eps in self.eps:
            if eps != AUTO and not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
                raise ValueError(f"--eps {eps}: expected `auto` or tolerated rises of the loss greater than 0.")


@dataclass
class Study:
    """What `limit` found.  Every sparsity is the share of zeros among the prunable weights; losses are means."""

    model: dict[str, Any]  # weights, layers, images
    dense: dict[str, Any]  # calibration and held-out loss and accuracy
    rows: list[dict[str, Any]]  # one per eps
    curve: dict[str, list[float]]  # sparsity, measured rise of the loss, quadratic prediction
    spectrum: dict[str, Any]  # nodes and weights of each matrix
    fixed: dict[str, list[float]]  # the two sides of the fixed point
    nm: dict[str, Any] | None
    layers: list[dict[str, Any]]
    skip: dict[str, Any] | None
    runs: dict[str, Any]  # per matrix: probes, steps, products, what ended it, seconds
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass
class Curve:
    """A function of the sparsity, evaluated where it is needed and remembered."""

    function: Callable[[float], float]
    points: dict[float, float] = field(default_factory=lambda: {0.0: 0.0})

    def __call__(self, sparsity: float) -> float:
        if sparsity not in self.points:
            value = self.function(sparsity)
            self.points[sparsity] = value if value == value else math.inf
        return self.points[sparsity]

    def knee(self, eps: float) -> float:
        """Just before the first crossing of eps on the grid: what comes after a bump is not promised."""
        low = 0.0
        for high in GRID:
            if self(high) > eps:
                break
            low = high
        else:
            return 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self(middle) <= eps else (low, middle)
        return low

    def listed(self) -> tuple[list[float], list[float]]:
        at = sorted(self.points)
        return at, [self.points[s] for s in at]


class Clock:
    """Whether the time is up, the same answer on every rank."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def part(self, factor: float) -> Clock:
        """A clock that stops after a part of what is left."""
        left = None if self.end is None else max(0.0, self.end - time.monotonic())
        return Clock(None if left is None else factor * left)

    def up(self) -> bool:
        if self.end is None:
            return False
        return ranks.agree(float(ranks.is_main() and time.monotonic() > self.end)) > 0


Tell = Callable[[dict[str, Any]], None]


def limit(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any] = (),
    *,
    recipe: loop.Recipe | None = None,
    refit: loop.Recipe | None = None,
    options: Options | None = None,
    tell: Tell | None = None,
) -> Study:
    """Study `model`, which is left as it was.

    batches: calibration images as `hf_prune.prune` takes them, or (input, labels).  held_out: others, likewise; none
    leaves their figures out.  recipe: which weights count (only, skip, prune_stem, prune_head).  refit: a recipe that
    is run at every predicted sparsity, and on the n:m pattern, to measure what it reaches.
    Raises ValueError for what a user can mend.
    """
    options, told = options or Options(), tell or (lambda event: None)
    batches, held = list(batches), list(held_out)
    if not batches:
        raise ValueError("no calibration batch was given; at least one image is needed.")
    with linalg.exact_matmul():
        base = replace(recipe or loop.Recipe(), nm=None, sparsity=0.5, scope="model")
        task = task_of(model, batches, base, options.memory * 2**30)
        judged = targets(model, held) if ranks.agree(float(len(held))) else None
        return _Work(model, task, judged, options, told, base, refit, batches).study()


def task_of(model: nn.Module, batches: list[Any], recipe: loop.Recipe, memory: float) -> Task:
    """The loss on `batches` over the weights that `recipe` would prune without a pattern.  memory: bytes for graphs."""
    images = targets(model, batches)
    chosen = loop.choose(model, sites.cut(images.batches[0], 0, 2), replace(recipe, nm=None, sparsity=0.5))
    return Task(model, [s for u in chosen.units for s in u.sites], images, memory)


def targets(model: nn.Module, batches: list[Any]) -> Images:
    """Batches, or (input, labels) pairs, with what the loss compares the outputs with."""
    inputs = [b[0] if isinstance(b, (tuple, list)) else b for b in batches]
    labels = [b[1] if isinstance(b, (tuple, list)) and len(b) > 1 else None for b in batches]
    return prepare(model, inputs, labels)


class _Work:
    """One study on its way: each method fills in a part of it."""

    def __init__(
        self, model: nn.Module, task: Task, judged: Images | None, options: Options, tell: Tell, base: loop.Recipe,
        refit: loop.Recipe | None, batches: list[Any],
    ) -> None:  # fmt: skip
        self.model, self.task, self.images, self.judged = model, task, task.images, judged
        self.options, self.tell, self.base, self.refit, self.batches = options, tell, base, refit, batches
        self.clock = Clock(None)  # started by the first product
        self.weights = task.weights
        self.removal = Removal(self.weights)
        self.order = self.weights.abs().argsort()
        self.notes: list[str] = []
        self.runs: dict[str, Any] = {}
        self.dense = measure(model, task.images)
        self.dense_there = {} if judged is None else measure(model, judged)
        self.eps = self.tolerances()
        self.measured = Curve(lambda s: self.rise(self.zeroed(s)))
        self.gradient: Tensor | None = None
        self.quadratic = Curve(self.predicted)

    # -- what zeroing does

    def tolerances(self) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        for eps in self.options.eps:
            if eps == AUTO:
                value = float(self.dense["deviation"] or 0) / math.sqrt(BATCH)
                if value <= 1e-12:
                    self.notes.append("eps auto is left out: the dense loss is the same for every image.")
                    continue
                found.append((AUTO, value))
            else:
                found.append((f"{eps:g}", float(eps)))
        if not found:
            raise ValueError("--eps auto has no value here; give tolerated rises of the loss, for example --eps .05.")
        return found

    def zeroed(self, sparsity: float) -> Tensor:
        """All weights with the smallest share set to zero, (D,)."""
        out = self.weights.clone()
        out[self.order[: round(sparsity * len(out))]] = 0
        return out

    def rise(self, weights: Tensor) -> float:
        """Of the mean calibration loss, at other weights."""
        with self.task.at(weights) as model:
            return float(measure(model, self.images)["loss"] or 0) - float(self.dense["loss"] or 0)

    def predicted(self, sparsity: float) -> float:
        return self.model_of(self.zeroed(sparsity) - self.weights)

    def model_of(self, step: Tensor) -> float:
        """g·d + ½ dᵀGd: the rise of the loss that the quadratic model sees in a step d, (D,)."""
        if self.gradient is None:
            self.gradient = self.task.gradient()
        return float((self.gradient * step).sum(dtype=torch.float64)) + 0.5 * self.task.form(step)

    def judge(self, module: nn.Module) -> dict[str, Any]:
        """Calibration and held-out figures of a module."""
        here = measure(module, self.images)
        out = {"rise": float(here["loss"] or 0) - float(self.dense["loss"] or 0), "accuracy": here["accuracy"]}
        if self.judged is not None:
            there = measure(module, self.judged)
            rise = float(there["loss"] or 0) - float(self.dense_there["loss"] or 0)
            out |= {"held_out_loss": there["loss"], "held_out_accuracy": there["accuracy"], "held_out_rise": rise}
        return out

    def judge_zeroed(self, weights: Tensor) -> dict[str, Any]:
        with self.task.at(weights) as module:
            return self.judge(module)

    # -- the spectra

    def gauss_newton(self) -> list[Lanczos]:
        """One run per probe, without a basis, until every row's interval is narrow."""
        began, clock, runs = time.perf_counter(), self.clock.part(0.5), []  # type: float, Clock, list[Lanczos]
        ended, least = "probes", min(4, self.options.probes)
        before = self.task.products
        for number in range(self.options.probes):
            run = Lanczos(lambda v: self.task.product(v, "gauss-newton"), self.probe(number), basis=False)
            for _ in range(self.options.steps):
                if clock.up():
                    ended = "time"
                    break
                run.step()
                if run.ended or (run.steps % 4 == 0 and self.narrow([run], 0.25)):
                    break
                self.say("Gauss-Newton", number, self.options.probes, run.steps, runs or [run])
            if run.steps:
                runs.append(run.free())
            if ended == "time":
                break
            if len(runs) >= least and self.narrow(runs):
                ended = "narrow"
                break
        self.note_run("gauss-newton", runs, before, ended, began)
        return runs

    def narrow(self, runs: list[Lanczos], factor: float = 1.0) -> bool:
        interval = bounds(runs)
        low, high = lambda mu: interval(mu)[0], lambda mu: min(interval(mu)[1], self.cap)
        return all(
            fixed_point(low, self.removal, eps) - fixed_point(high, self.removal, eps) <= factor * self.options.width
            for _, eps in self.eps
        )

    @property
    def cap(self) -> float:
        """The largest share of directions that the Gauss-Newton matrix can bend."""
        outputs = self.images.outputs - (self.images.loss != "representation")
        return min(1.0, self.task.total * outputs / len(self.weights))

    def hessian(self) -> list[Lanczos]:
        """A quarter of the probes with four times the steps, every vector kept: |H| is no smooth function of H."""
        probes, steps = max(2, -(-self.options.probes // 4)), 4 * self.options.steps
        began, runs, ended, before = time.perf_counter(), [], "probes", self.task.products  # type: float, list[Lanczos], str, int
        size = len(self.weights) * self.weights.element_size()  # bytes of a Lanczos vector
        room = int(self.options.memory * 2**30 // size)
        if room < 8:
            self.notes.append(
                f"the exact Hessian is left out: {steps} Lanczos vectors of {len(self.weights):,} weights need "
                f"{steps * size / 2**30:.1f} GiB, found --memory {self.options.memory:g}. The Gauss-Newton interval "
                "needs no such basis."
            )
            return []
        steps = min(steps, room)
        self.task.graphs.memory = max(0.0, self.options.memory * 2**30 - steps * size)
        for number in range(probes):
            run = Lanczos(lambda v: self.task.product(v, "hessian"), self.probe(1000 + number), basis=True)
            for _ in range(steps):
                if self.clock.up():
                    ended = "time"
                    break
                run.step()
                if run.ended or (run.steps >= SETTLED and run.steps % 16 == 0 and self.settled(run)):
                    break
                self.say("exact Hessian", number, probes, run.steps, [])
            if run.steps:
                runs.append(run.free())
            if ended == "time":
                break
            if len(runs) > 1 and all(self.hessian_at(runs, eps)[1] <= self.options.width for _, eps in self.eps):
                ended = "narrow"
                break
        self.note_run("hessian", runs, before, ended, began)
        return runs

    def settled(self, run: Lanczos) -> bool:
        """Whether half of the steps gave the same answer."""
        return all(
            abs(self.absolute([run.gauss()], eps) - self.absolute([run.gauss(run.steps // 2)], eps))
            <= self.options.width / 4
            for _, eps in self.eps
        )

    def absolute(self, rules: list[Any], eps: float) -> float:
        return fixed_point(share(rules), self.removal, eps)

    def hessian_at(self, runs: list[Lanczos], eps: float) -> tuple[float, float]:
        """(sparsity, uncertainty): the change against half of the steps, plus the spread of the probes."""
        full = [self.absolute([r.gauss()], eps) for r in runs]
        change = 0.0 if all(r.ended for r in runs) else self.halved(runs, eps)
        return self.absolute([r.gauss() for r in runs], eps), change + spread(full)

    def halved(self, runs: list[Lanczos], eps: float) -> float:
        """How far the sparsity moves when half of the steps are left out."""
        half = self.absolute([r.gauss(max(1, r.steps // 2)) for r in runs], eps)
        return abs(self.absolute([r.gauss() for r in runs], eps) - half)

    def probe(self, number: int) -> Tensor:
        return probe(len(self.weights), self.options.seed, number, self.weights.dtype, self.weights.device)

    def say(self, what: str, number: int, probes: int, step: int, runs: list[Lanczos]) -> None:
        event = {"event": "product", "matrix": what, "probe": number + 1, "probes": probes, "step": step,
                 "products": self.task.products}  # fmt: skip
        if runs and step % 4 == 0:
            name, eps = self.eps[len(self.eps) // 2]
            event |= {"eps": name, "interval": self.between(bounds(runs), eps)}
        self.tell(event)

    def between(self, interval: Callable[[float], tuple[float, float]], eps: float) -> tuple[float, float]:
        """Interval of the sparsity from that of the kept share and the rank."""
        low = fixed_point(lambda mu: min(self.cap, interval(mu)[1]), self.removal, eps)
        return low, fixed_point(lambda mu: interval(mu)[0], self.removal, eps)

    def note_run(self, name: str, runs: list[Lanczos], before: int, ended: str, began: float) -> None:
        products = self.task.products - before
        seconds = time.perf_counter() - began
        self.runs[name] = {
            "probes": len(runs), "steps": [r.steps for r in runs], "products": products, "ended_by": ended,
            "seconds": seconds, "seconds_per_product": seconds / max(1, products), "seed": self.options.seed,
            "mean_curvature": mean_curvature([r.gauss() for r in runs]) if runs else None,
        }  # fmt: skip

    # -- the parts of the study

    def study(self) -> Study:
        self.tell({"event": "stage", "text": "measuring the loss while weights are zeroed"})
        knees = {name: self.measured.knee(eps) for name, eps in self.eps}
        judged = {name: self.judge_zeroed(self.zeroed(s)) for name, s in knees.items()}
        nm = self.pattern_verdict() if self.options.nm else None
        self.tell({"event": "stage", "text": "measuring each layer alone"})
        full = 1 - 2 * len(self.task.sites) / len(self.weights)  # every layer keeps a weight
        reference = min(max(0.05, knees[self.eps[len(self.eps) // 2][0]]), full)
        layers = self.layer_table(reference)
        self.tell({"event": "stage", "text": "predicting from the quadratic model"})
        seeds = range(self.options.seed, self.options.seed + self.options.probes)
        traces = torch.stack([self.task.traces(seed) for seed in seeds]).sum(0)
        self.newton_mean = float(traces.sum()) / len(seeds) / len(self.weights)
        for layer, found in zip(layers, (traces / traces.sum().clamp_min(1e-300)).tolist(), strict=True):
            layer["trace_share"] = found
        quadratic = {name: self.quadratic.knee(eps) for name, eps in self.eps}
        if nm is not None:
            self.predict_pattern(nm)
        self.clock = Clock(self.options.seconds)
        newton = self.gauss_newton()
        exact: list[Lanczos] = []
        if self.images.loss == "representation":
            self.notes.append("the loss is a squared distance: its Hessian here is the Gauss-Newton matrix itself.")
        else:
            try:
                exact = self.hessian()
            except NoSecondDerivative as error:
                self.notes.append(f"the exact Hessian is left out: {error}.")
        self.readable = bool(exact) and self.enough(exact)
        self.task.forget()
        rows = [self.row(name, eps, knees[name], judged[name], quadratic[name], newton, exact)
                for name, eps in self.eps]  # fmt: skip
        if nm is not None:
            nm["predicted_isotropic"] = 0.5 * self.mean(exact) * nm["squared"]
        if self.refit is not None:
            self.measure_refits(rows, nm)
        at, values = self.measured.listed()
        at2, values2 = self.quadratic.listed()
        return Study(
            model={"weights": len(self.weights), "layers": len(self.task.sites), "images": int(self.task.total),
                   "loss": self.images.loss, "rank_cap": self.cap, "vacuous": self.cap < VACUOUS},
            dense=self.dense | {f"held_out_{k}": v for k, v in self.dense_there.items()},
            rows=rows,
            curve={"sparsity": at, "rise": values, "quadratic_sparsity": at2, "quadratic_rise": values2},
            spectrum={name: [{"nodes": r.gauss()[0].tolist(), "weights": r.gauss()[1].tolist()} for r in found]
                      for name, found in (("gauss-newton", newton), ("hessian", exact)) if found},
            fixed=self.sides(exact or newton),
            nm=nm,
            layers=layers,
            skip=suggested(layers),
            runs=self.runs,
            options=asdict(self.options),
            notes=self.notes,
        )  # fmt: skip

    def row(
        self, name: str, eps: float, knee: float, judged: dict[str, Any], quadratic: float, newton: list[Lanczos],
        exact: list[Lanczos],
    ) -> dict[str, Any]:  # fmt: skip
        out: dict[str, Any] = {"eps": name, "value": eps, "measured": knee, "measured_at": judged,
                               "quadratic": quadratic, "trace": None, "spectral": None, "spectral_uncertainty": None,
                               "spectral_settled": None, "gauss_newton": None}  # fmt: skip
        out["trace"] = fixed_point(from_trace(self.mean(exact)), self.removal, eps)
        if exact:
            out["spectral"], out["spectral_uncertainty"] = self.hessian_at(exact, eps)
            out["spectral_settled"] = self.readable
        if newton:
            out["gauss_newton"] = list(self.between(bounds(newton), eps))
        return out

    def mean(self, exact: list[Lanczos]) -> float:
        """tr |H| / D; from the Gauss-Newton matrix where there is no |H| or too few steps of it."""
        return mean_curvature([r.gauss() for r in exact]) if self.readable else self.newton_mean

    def enough(self, exact: list[Lanczos]) -> bool:
        """Whether the rows of |H| are worth reading: enough steps, and half of them say about the same."""
        if all(run.ended for run in exact):
            return True
        return all(run.ended or run.steps >= SETTLED for run in exact) and all(
            self.halved(exact, eps) <= LOOSE for _, eps in self.eps
        )

    def sides(self, runs: list[Lanczos]) -> dict[str, Any]:
        """1 - s and the share that must stay, over s, for the middle row: they cross at the estimate."""
        if not runs:
            return {}
        name, eps = self.eps[len(self.eps) // 2]
        needed = share([r.gauss() for r in runs])
        at = [i / 200 for i in range(201)]
        squares = [self.removal(s) for s in at]
        return {"eps": name, "sparsity": at, "needed": [needed(2 * eps / q) if q > 0 else 0.0 for q in squares]}

    def pattern_verdict(self) -> dict[str, Any]:
        """The n:m pattern by magnitude: what it removes, and what that does, measured."""
        pattern = Pattern.parse(str(self.options.nm))
        parts, misfits = [], []
        for s, w in zip(self.task.sites, self.task.split(self.weights), strict=True):
            if pattern.misfit(s.channels):
                misfits.append(s.name)
                parts.append(w)
            else:
                parts.append(w * pattern.mask(w.view(s.shape).abs()).flatten())
        new = torch.cat(parts)
        squared = float((new - self.weights).double().square().sum())
        self.pattern_weights = new
        return {
            "pattern": str(pattern), "misfits": misfits, "sparsity": float((new == 0).double().mean()),
            "squared": squared, "energy_removed": squared / float(self.weights.double().square().sum()),
            "equivalent_sparsity": self.removal.inverse(squared), "measured": self.judge_zeroed(new),
            "predicted_quadratic": None, "predicted_isotropic": None, "refit": None,
        }  # fmt: skip

    def predict_pattern(self, nm: dict[str, Any]) -> None:
        nm["predicted_quadratic"] = self.model_of(self.pattern_weights - self.weights)

    def layer_table(self, sparsity: float) -> list[dict[str, Any]]:
        """Each layer pruned alone, by magnitude, to the same sparsity; and what one threshold or LAMP would give it."""
        parts = self.task.split(self.weights)
        everywhere = self.task.split(self.zeroed(sparsity))
        lamp = allocate(Pattern.unstructured(sparsity, "model", "lamp"), parts)
        out = []
        for i, (s, w) in enumerate(zip(self.task.sites, parts, strict=True)):
            alone = list(parts)
            alone[i] = w.clone()
            alone[i][w.abs().argsort()[: round(sparsity * len(w))]] = 0
            out.append({
                "name": s.name, "weights": s.numel, "share": s.numel / len(self.weights), "trace_share": None,
                "sparsity": sparsity, "rise": self.rise(torch.cat(alone)),
                "global_sparsity": float((everywhere[i] == 0).double().mean()),
                "lamp_sparsity": 1 - (lamp[i].budget or 0) / s.numel,
            })  # fmt: skip
            self.tell({"event": "count", "text": "measuring each layer alone", "done": i + 1, "of": len(parts)})
        return out

    def measure_refits(self, rows: list[dict[str, Any]], nm: dict[str, Any] | None) -> None:
        """The recipe at each row's spectral estimate, and on the n:m pattern."""
        assert self.refit is not None
        done: dict[float, dict[str, Any]] = {}
        for row in rows:
            found = row["spectral"] if row["spectral"] is not None else (row["gauss_newton"] or [None])[0]
            if found is None:
                continue
            sparsity = round(min(found, 1 - len(self.task.sites) / len(self.weights)), 3)  # every layer keeps one
            if sparsity not in done:
                text = f"pruning with {self.refit.name} to {100 * sparsity:.1f} %"
                self.tell({"event": "stage", "text": text})
                done[sparsity] = self.refitted(replace(self.refit, nm=None, sparsity=sparsity, scope="model"))
            row["refit"] = {"sparsity": sparsity, **done[sparsity]}
        if nm is not None:
            self.tell({"event": "stage", "text": f"pruning with {self.refit.name} to {nm['pattern']}"})
            alike = replace(self.refit, scope="layer", allocation="magnitude")  # n:m shares no budget
            nm["refit"] = self.refitted(replace(alike, nm=nm["pattern"], sparsity=None))

    def refitted(self, recipe: loop.Recipe) -> dict[str, Any]:
        recipe = replace(recipe, only=self.base.only, skip=self.base.skip, prune_stem=self.base.prune_stem,
                         prune_head=self.base.prune_head, seed=self.options.seed)  # fmt: skip
        module = copy.deepcopy(self.model)
        loop.prune(module, self.batches, recipe)
        return self.judge(module)


def suggested(layers: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The few layers that make up most of the damage while holding little of the weights; None where there are none."""
    total = sum(max(0.0, layer["rise"]) for layer in layers)
    if total <= 0:
        return None
    names: list[str] = []
    held = damage = 0.0
    for layer in sorted(layers, key=lambda layer: -layer["rise"] / layer["share"]):
        if damage >= DAMAGE or layer["rise"] <= 0:
            break
        if held + layer["share"] > SKIP_SHARE:
            continue
        names.append(layer["name"])
        held += layer["share"]
        damage += layer["rise"] / total
    return {"layers": names, "share": held, "damage": damage} if names else None
