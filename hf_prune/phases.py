"""LOMP, IMP, Rare Gems and Smart-Ratio: each is a list of trainings, told one after the other.

A method is a function `(options, pattern, epochs, past) -> Phase | None`: from the results of the phases that are over
to the next one, None at the end. It decides and does nothing else; training.py does what a phase says. So a killed run
goes on by asking again with the past that was on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .pattern import Pattern

Past = Sequence[Mapping[str, Any]]  # one record per finished phase, as training.py measures it


@dataclass(frozen=True)
class Phase:
    """One training, and what is pruned after it."""

    name: str
    epochs: int  # passes over the training images; 0: no training
    first: int = 0  # epochs of the learning rate's schedule that count as over
    of: int = 0  # length of the schedule in epochs; 0: first + epochs
    start: str = "here"  # weights to begin with: here (as they are), initial, early (what was remembered), signed
    learn: str = "weights"  # "scores": the weights are frozen, and a score per weight is learned
    l1: float = 0.0  # λ of the penalty λ Σ|w| over the prunable weights
    proximal: bool = False  # the penalty as a soft threshold after each step instead of a gradient
    remember: bool = False  # keep the weights at the end as "early"
    spread: bool = False  # measure how much the training loss of batches of 128 varies
    curve: bool = False  # before pruning, measure magnitude pruning at a range of sparsities
    trial: Pattern | None = None  # measure what this would leave; remember the weights if it is the best so far
    prune: Pattern | None = None  # after the training
    by: str = "magnitude"  # what decides: magnitude, scores, ratio (Smart-Ratio's random draw)

    @property
    def schedule(self) -> int:
        return self.of or self.first + self.epochs


@dataclass(frozen=True)
class Lomp:
    """l1: λ, or "auto". grid: the λ of "auto". eps: tolerated rise of the loss in nats, or "auto" for the standard
    deviation over batches of 128 of the dense training loss (the paper's choice, tiny for overfitted networks).
    choose: what "auto" goes by: "dense", the loss before the threshold, or "pruned", the loss after it."""

    l1: float | str = "auto"
    choose: str = "dense"
    grid: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    eps: float | str = 0.1
    proximal: bool = False


@dataclass(frozen=True)
class Imp:
    """rewind: epochs after which the weights to rewind to are taken. share: pruned of what is left, each round.
    through: sparsities that a round must meet exactly on the way, and that are then measured too."""

    rewind: int = 1
    share: float = 0.2
    through: tuple[float, ...] = ()


@dataclass(frozen=True)
class RareGems:
    """epochs: of learning the scores (0: as many as the weights get after). every: epochs between prunings.
    lr: of the scores, by SGD. decay: factor of the squared norm of the scores in the loss."""

    epochs: int = 0
    every: int = 5
    lr: float = 0.1
    decay: float = 1e-4


@dataclass(frozen=True)
class SmartRatio:
    """linear: share kept of the last layer, if it is linear; 0 puts it under the formula with the others. The paper
    speaks of linear layers, of which its networks have one, the classifier."""

    linear: float = 0.3


# ------------------------------------------------------------------------------------------------------- the methods
def dense(options: None, pattern: Pattern | None, epochs: int, past: Past) -> Phase | None:
    """Train, prune nothing; the curve shows what one magnitude threshold would leave without any penalty."""
    return None if past else Phase("dense", epochs, curve=True)


def lomp(options: Lomp, pattern: Pattern, epochs: int, past: Past) -> Phase | None:
    """Train with λ Σ|w|, then one global magnitude threshold, and no training after it (arXiv 2306.05857).

    The paper chooses λ by hand. "auto": train without penalty, then with the λ of the grid from the largest down, each
    from the same initial weights. choose "dense": the first whose validation loss is at most eps/2 above that of the
    network without penalty is taken, λ = 0 if none is. choose "pruned": all are tried, and the one with the least
    validation loss under the threshold is taken.
    """
    if past and past[-1]["pruned"]:
        return None
    if options.l1 != "auto":
        l1 = float(options.l1)
        if past:
            return Phase("threshold", 0, l1=l1, prune=pattern)
        return Phase(f"L1 {l1:g}", epochs, l1=l1, proximal=options.proximal, curve=True)
    by_result = options.choose == "pruned"
    trial = pattern if by_result else None
    if not past:
        return Phase("no L1", epochs, remember=not by_result, trial=trial, spread=True, curve=True)
    if not by_result and len(past) > 1 and tolerated(options, past[0], past[-1]):
        return Phase("threshold", 0, l1=past[-1]["l1"], prune=pattern)
    grid = sorted(options.grid, reverse=True)
    if len(past) <= len(grid):
        l1 = grid[len(past) - 1]
        return Phase(f"L1 {l1:g}", epochs, start="initial", l1=l1, proximal=options.proximal, trial=trial, curve=True)
    best = min(past, key=lambda record: record["trial_loss"])["l1"] if by_result else 0.0
    return Phase("threshold", 0, l1=best, start="early", prune=pattern)


def tolerated(options: Lomp, reference: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a penalised network's validation loss stays within eps/2 of the one without penalty."""
    eps = reference["train_loss_spread"] if options.eps == "auto" else float(options.eps)
    return bool(found["validation_loss"] <= reference["validation_loss"] + eps / 2)


def imp(options: Imp, pattern: Pattern, epochs: int, past: Past) -> Phase | None:
    """Train, prune the smallest share of what is left over the whole network, rewind, repeat (arXiv 1912.05671).

    Every round ends with a fully trained network at its sparsity, so its figures are results of their own.
    """
    if not past:
        return Phase("early weights", options.rewind, of=epochs, remember=True)
    levels = rounds(options, pattern)
    done = len(past) - 1
    if done > len(levels):
        return None
    return Phase(
        f"round {done + 1} of {len(levels) + 1}",
        epochs - options.rewind,
        first=options.rewind,
        start="early",
        prune=levels[done] if done < len(levels) else None,
    )


def rounds(options: Imp, pattern: Pattern) -> list[Pattern]:
    """The patterns of the rounds, each within the one before, the last one the goal. n:m: one less of m each round."""
    if pattern.m:
        return [Pattern(n=n, m=pattern.m) for n in range(pattern.m - 1, pattern.n - 1, -1)]
    goal = pattern.sparsity
    stops = sorted({*(s for s in options.through if s < goal), goal})
    found: list[float] = []
    kept = 1.0
    while not found or found[-1] < goal:
        kept *= 1 - options.share
        stop = next(s for s in stops if not found or s > found[-1])
        # a last small step beyond a stop is not worth a round: 1e-9 forgives rounding only
        found.append(stop if 1 - kept >= stop - 1e-9 else 1 - kept)
        kept = 1 - found[-1]
    return [Pattern(sparsity=s, scope=pattern.scope) for s in found]


def rare_gems(options: RareGems, pattern: Pattern, epochs: int, past: Past) -> Phase | None:
    """Gem-Miner: find the subnetwork by scores on frozen weights, prune as it is found, then train it (2202.12002).

    The density after round t of T is density^(t/T). The subnetwork at the end is every weight that was not pruned; the
    authors' rounding at one half guides the search, and here does not remove more than was asked for.
    """
    mining = options.epochs or epochs
    count = max(1, math.ceil(mining / options.every))
    done = len(past)
    if done > count:
        return None
    if done == count:
        return Phase("train the gem", epochs)
    density = pattern.density ** ((done + 1) / count)
    level: Pattern | None = Pattern(sparsity=1 - density, scope=pattern.scope) if not pattern.m else None
    if pattern.m:
        n = max(pattern.n, round(pattern.m * density))
        level = Pattern(n=n, m=pattern.m) if n < pattern.m else None
    elif done + 1 == count:
        level = pattern  # without the rounding of the power
    first = done * options.every
    return Phase(
        f"mining {done + 1} of {count}",
        min(options.every, mining - first),
        first=first,
        of=mining,
        start="here" if done else "signed",
        learn="scores",
        prune=level,
        by="scores",
    )


def smart_ratio(options: SmartRatio, pattern: Pattern, epochs: int, past: Past) -> Phase | None:
    """Draw a mask at random with a share per layer that the depth alone decides, then train it (arXiv 2009.11094)."""
    told = [Phase("draw", 0, prune=pattern, by="ratio"), Phase("train", epochs)]
    return told[len(past)] if len(past) < len(told) else None


METHODS: dict[str, Callable[[Any, Any, int, Past], Phase | None]] = {
    "lomp": lomp,
    "imp": imp,
    "rare-gems": rare_gems,
    "smart-ratio": smart_ratio,
    "dense": dense,
}
OPTIONS: dict[str, type] = {"lomp": Lomp, "imp": Imp, "rare-gems": RareGems, "smart-ratio": SmartRatio}


def longest(method: str, options: Any, pattern: Pattern | None, epochs: int) -> list[Phase]:
    """Every phase that can come, in order: what `auto` would do if only the last λ were tolerated."""
    found: list[Phase] = []
    past: list[dict[str, Any]] = []
    while (phase := METHODS[method](options, pattern, epochs, past)) is not None:
        found.append(phase)
        loss = 0.0 if len(found) == 1 else math.inf
        past.append({"validation_loss": loss, "train_loss_spread": 0.0, "trial_loss": 0.0, "l1": phase.l1,
                     "pruned": phase.prune is not None})  # fmt: skip
    return found


def smart_ratio_counts(sizes: Sequence[int], linear: Sequence[bool], keep: int, share: float) -> list[int]:
    """Weights that each of L layers keeps: layer l gets the share c((L-l+1)² + (L-l+1)), `keep` in all.

    sizes: weights per layer, in the order of the forward. linear: which layers get the fixed `share` instead (0: none).
    A layer whose share would exceed one keeps all, and what it cannot take is divided among the others in the same
    proportions. Raises ValueError where the linear layers alone exceed `keep`, or all layers together cannot fill it.
    """
    total = len(sizes)
    ratio = [float((total - i) ** 2 + (total - i)) for i in range(total)]
    fixed = {i for i in range(total) if share > 0 and linear[i]}
    counts: dict[int, float] = {i: share * sizes[i] for i in fixed}
    open_ = [i for i in range(total) if i not in fixed]
    left = keep - sum(counts.values())
    room = sum(sizes[i] for i in open_)
    if room < left:
        raise ValueError(
            f"smart_ratio.linear {share:g} leaves {round(left):,} weights to the other layers, and the other layers "
            f"have only {room:,}: raise it, or set it to 0 to put all layers under the formula."
        )
    if left < len(open_):
        raise ValueError(
            f"smart_ratio.linear {share:g} keeps {round(sum(counts.values())):,} weights in the linear layers alone, "
            f"and {keep:,} are to stay in all: lower it, or set it to 0 to put them under the formula."
        )
    while open_:
        factor = left / sum(ratio[i] * sizes[i] for i in open_)
        full = [i for i in open_ if factor * ratio[i] > 1]
        if not full:
            counts.update({i: factor * ratio[i] * sizes[i] for i in open_})
            break
        for i in full:
            counts[i] = float(sizes[i])
            left -= sizes[i]
        open_ = [i for i in open_ if i not in full]
    whole = [int(counts[i] + 1e-9) for i in range(total)]
    by_rest = sorted(range(total), key=lambda i: whole[i] - counts[i])  # the largest remainders get the missing ones
    for i in [i for i in by_rest if whole[i] < sizes[i]][: keep - sum(whole)]:
        whole[i] += 1
    for i in [i for i in range(total) if whole[i] == 0]:  # no layer may lose all: the largest gives one up for it
        whole[max(range(total), key=whole.__getitem__)] -= 1
        whole[i] = 1
    return whole
