"""The one training loop, on accelerate: it does what the phases of a method say, and can be killed at any time.

    result = train(network, data, chosen, accelerator)       # the network is trained and pruned in place

After a kill, `train(..., checkpoint=folder, resume=True)` goes on at the end of the last epoch that was written, and
ends with the same weights to the bit: order of the images, augmentation and dropout are drawn from seed and epoch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks as masking
from . import phases, ranks, training_data
from .masks import Masks, Prunable, Scored
from .pattern import Pattern
from .phases import Phase

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .training_data import Data, Part
    from .training_recipe import Training

CURVE = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # sparsities at which a trained network is thresholded for the record
JOURNAL = "journal.json"
Tell = Callable[[Mapping[str, Any]], None]


@dataclass
class Result:
    """What a run did and measured; the network holds the weights."""

    history: list[dict[str, Any]]  # one record per phase
    test: dict[str, Any]  # loss, accuracy, hits, images
    validation: dict[str, Any]
    prunable: Prunable
    masks: Masks
    epochs: int  # passes over the training images in all
    seconds: float


class _Kept:
    """What must outlive a kill beside model and optimizer; accelerate saves and loads it."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.early: dict[str, Tensor] = {}  # weights and buffers to rewind to
        self.scores: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.epoch = 0  # finished epochs of the present phase
        self.loss = math.nan  # mean training loss of the last one
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "early": self.early, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(iter(self.masks.values())).device
        for key, value in state.items():
            setattr(self, key, {name: tensor.to(device) for name, tensor in value.items()})

    def journal(self) -> dict[str, Any]:
        names = ("history", "epoch", "loss", "seconds")
        return {name: getattr(self, name) for name in names}


def train(
    network: nn.Module,
    data: Data,
    chosen: Training,
    accelerator: Accelerator,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    interval: float = 60.0,
    tell: Tell | None = None,
) -> Result:
    """Train and prune `network` in place, as `chosen` says.

    checkpoint: a folder for the state of the run, written at ends of epochs at least `interval` seconds apart, and read
    with `resume`. tell: is called with a mapping at every step and phase. Raises ValueError where a loss stops being
    finite, a pattern fits no weight, or the ranks cannot share a batch evenly.
    """
    world = accelerator.num_processes
    if chosen.batch_size % world or chosen.batch_size > len(data.train):
        raise ValueError(
            f"--batch-size {chosen.batch_size} must be a multiple of the {world} processes, and at most the "
            f"{len(data.train)} training images."
        )
    tell = tell or (lambda event: None)
    began = time.perf_counter()
    network.to(accelerator.device)
    data = data.to(accelerator.device)
    pattern, options = chosen.pattern(), chosen.settings()
    weights = masking.prunable(network, data.scaled(data.train.pixels[:2]), pattern, chosen.skip)
    values = {name: p.detach() for name, p in network.named_parameters()}
    kept = _Kept(masking.full(weights, values))
    initial = _copy(network)
    accelerator.register_for_checkpointing(kept)
    folder = Path(checkpoint) if checkpoint is not None else None
    found = latest(folder) if resume and folder is not None else None
    if found is not None:
        told = json.loads((found / JOURNAL).read_text(encoding="utf-8"))
        for name, value in told.items():
            setattr(kept, name, value)
    before = kept.seconds
    planned = phases.longest(chosen.method, options, pattern, chosen.epochs)
    run = _Run(network, data, chosen, accelerator, weights, kept, folder, interval, tell, planned, initial)
    run.clock = lambda: before + time.perf_counter() - began
    while (phase := phases.METHODS[chosen.method](options, pattern, chosen.epochs, kept.history)) is not None:
        run.phase(phase, found)
        found = None
    if run.prepared is not None:
        accelerator.unwrap_model(run.prepared[0], keep_fp32_wrapper=False)
    masking.multiply(values, kept.masks)
    for name in weights.names:
        values[name].add_(0.0)  # -0.0 becomes +0.0
    _verify(weights, values, kept.masks, pattern)
    network.eval()
    return Result(
        history=kept.history,
        test=run.measure(network, data.test),
        validation=run.measure(network, data.validation),
        prunable=weights,
        masks=kept.masks,
        epochs=sum(record["epochs"] for record in kept.history),
        seconds=run.clock(),
    )


@dataclass
class _Run:
    """What every phase of one run works with."""

    network: nn.Module
    data: Data
    chosen: Training
    accelerator: Accelerator
    weights: Prunable
    kept: _Kept
    folder: Path | None
    interval: float
    tell: Tell
    planned: list[Phase]
    initial: dict[str, Tensor]
    clock: Callable[[], float] = time.perf_counter
    written: float = -math.inf
    learner: nn.Module | None = None  # the network, or Scored around it, as accelerate knows it
    prepared: tuple[Any, Any] | None = None  # (learner, optimizer) wrapped by accelerate

    def values(self) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        return {name: named[name].detach() for name in self.weights.names}

    def phase(self, phase: Phase, resumed: Path | None) -> None:
        """One phase from start to record; from the state in `resumed` on, if that is given."""
        kept, began = self.kept, self.clock()
        index = len(kept.history)
        if resumed is None:
            kept.epoch = 0
            self._begin(phase)
        self.tell({"event": "phase", "name": phase.name, "index": index, "phases": len(self.planned)})
        train_loss = self._fit(phase, resumed) if phase.epochs else None
        record: dict[str, Any] = {
            "name": phase.name, "epochs": phase.epochs, "l1": phase.l1, "train_loss": train_loss,
            "sparsity": 1 - masking.kept(kept.masks) / self.weights.numel, "pruned": phase.prune is not None,
        }  # fmt: skip
        subject = self.learner if phase.learn == "scores" and self.learner is not None else self.network
        if phase.epochs:
            for name, part in (("validation", self.data.validation), ("test", self.data.test)):
                measured = self.measure(subject, part)
                record[f"{name}_loss"], record[f"{name}_accuracy"] = measured["loss"], measured["accuracy"]
        if phase.spread:
            record["train_loss_spread"] = self.measure(subject, self.data.train)["spread"]
        if phase.curve:
            record["curve"] = [self._under(Pattern.unstructured(sparsity, "model")) for sparsity in CURVE]
        remember = phase.remember
        if phase.trial is not None:
            record["trial_loss"] = self._under(phase.trial)["validation_loss"]
            remember = all(record["trial_loss"] < past["trial_loss"] for past in kept.history)
        if remember:
            kept.early = _copy(self.network)
        if phase.prune is not None:
            self._prune(phase)
        record["kept"], record["seconds"] = masking.kept(kept.masks), self.clock() - began
        kept.history.append(record)
        kept.epoch = 0
        self.tell({"event": "done", "index": index, "phases": len(self.planned), **record})

    def _begin(self, phase: Phase) -> None:
        """Put the weights where the phase starts."""
        if phase.start in ("initial", "early"):
            self.network.load_state_dict(self.initial if phase.start == "initial" else self.kept.early)
        elif phase.start == "signed":
            masking.signed_constants(self.network, self.weights)
            self.kept.scores = masking.random_scores(self.weights, self.values(), self.chosen.seed)
        masking.multiply(self.values(), self.kept.masks)

    def _prune(self, phase: Phase) -> None:
        assert phase.prune is not None
        kept, values = self.kept, self.values()
        if phase.by == "ratio":
            linear = self.chosen.options["linear"]
            kept.masks = masking.at_random(self.weights, kept.masks, phase.prune, linear, self.chosen.seed)
        else:
            judged = kept.scores if phase.by == "scores" else values
            kept.masks = masking.by_size(self.weights, judged, kept.masks, phase.prune)
        masking.multiply(values, kept.masks)
        if kept.scores:
            masking.multiply(kept.scores, kept.masks)

    def _under(self, level: Pattern) -> dict[str, Any]:
        """One magnitude threshold over the weights as they are; they are as before after."""
        values, saved = self.values(), _copy(self.network)
        found = masking.by_size(self.weights, values, masking.full(self.weights, values), level)
        masking.multiply(values, found)
        test, validation = self.measure(self.network, self.data.test), self.measure(self.network, self.data.validation)
        self.network.load_state_dict(saved)
        return {
            "sparsity": 1 - masking.kept(found) / self.weights.numel, "test_loss": test["loss"],
            "test_accuracy": test["accuracy"], "validation_loss": validation["loss"],
            "validation_accuracy": validation["accuracy"],
        }  # fmt: skip

    def measure(self, subject: nn.Module, part: Part) -> dict[str, Any]:
        """Loss and accuracy in float32 over all ranks; spread: standard deviation of the loss of batches of 128."""
        training = subject.training
        subject.eval()
        wrapped = subject.__dict__.pop("forward", None)  # accelerate's, which computes in the mixed precision
        sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, images
        parts: list[float] = []
        with torch.no_grad():
            for i, start in enumerate(range(0, len(part), 128)):
                if i % self.accelerator.num_processes != self.accelerator.process_index:
                    continue
                label = part.labels[start : start + 128]
                logits = subject(self.data.scaled(part.pixels[start : start + 128])).float()
                loss = float(F.cross_entropy(logits, label, reduction="sum"))
                sums += torch.tensor([loss, float((logits.argmax(1) == label).sum()), len(label)], dtype=torch.float64)
                parts.append(loss / len(label))
        ranks.sum_([sums])
        spread = [loss for each in ranks.gather(parts) for loss in each]
        subject.train(training)
        if wrapped is not None:
            subject.forward = wrapped  # type: ignore[method-assign]
        loss, hits, count = sums.tolist()
        return {
            "loss": loss / count, "accuracy": hits / count, "hits": int(hits), "images": int(count),
            "spread": float(np.std(spread)),
        }  # fmt: skip

    def _fit(self, phase: Phase, resumed: Path | None) -> float:
        """Train for the epochs of a phase; returns the mean loss of its last epoch, penalty not included."""
        chosen, kept, accelerator = self.chosen, self.kept, self.accelerator
        learner, prepared, optimizer = self._ready(phase)
        if resumed is not None:
            accelerator.load_state(str(resumed))
        if isinstance(learner, Scored):
            learner.masks = kept.masks
        learned = learner.named_scores() if isinstance(learner, Scored) else self.values()
        named = [p for name, p in self.network.named_parameters() if name in kept.masks]
        steps = training_data.steps(len(self.data.train), chosen.batch_size)
        peak = chosen.options["lr"] if phase.learn == "scores" else chosen.lr
        for epoch in range(kept.epoch, phase.epochs):
            past = phase.first + epoch
            torch.manual_seed(int(np.random.SeedSequence([chosen.seed, past, 1]).generate_state(1)[0]))  # dropout
            total = torch.zeros((), device=accelerator.device)
            images = training_data.batches(
                self.data, chosen.batch_size, chosen.augment, chosen.seed, past,
                accelerator.process_index, accelerator.num_processes,
            )  # fmt: skip
            for step, (pixels, labels) in enumerate(images):
                rate = peak * factor(chosen, past + step / steps, phase.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                logits = prepared(pixels)
                loss = F.cross_entropy(logits.float(), labels)
                if phase.l1 and not phase.proximal:
                    accelerator.backward(loss + phase.l1 * masking.penalty(named))
                elif phase.learn == "scores" and chosen.options["decay"]:
                    squares = torch.stack([score.square().sum() for score in learned.values()]).sum()
                    accelerator.backward(loss + chosen.options["decay"] * squares)
                else:
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if phase.learn == "scores":
                    with torch.no_grad():
                        for score in learned.values():
                            score.clamp_(0, 1)
                elif phase.proximal:
                    masking.soften(named, rate * phase.l1)
                if len(kept.history) or phase.learn == "scores":
                    masking.multiply({name: value.detach() for name, value in learned.items()}, kept.masks)
                total += loss.detach()
                self.tell(
                    {"event": "step", "index": len(kept.history), "phases": len(self.planned), "name": phase.name,
                     "epoch": epoch, "epochs": phase.epochs, "step": step, "steps": steps, "loss": loss.detach()}
                )  # fmt: skip
            mean = float(total) / steps
            if not math.isfinite(mean):
                raise ValueError(
                    f"{phase.name}, epoch {epoch + 1}: the loss is {mean}; the training diverged. Lower --lr "
                    f"(now {peak:g}), or give a warm-up with --set warmup=1."
                )
            kept.epoch, kept.loss = epoch + 1, mean
            self._save()
        if isinstance(learner, Scored):
            kept.scores = {name: score.detach().clone() for name, score in learner.named_scores().items()}
        return kept.loss

    def _ready(self, phase: Phase) -> tuple[nn.Module, Any, Any]:
        """What learns, the same wrapped by accelerate, and its optimizer without memory of an earlier phase."""
        if self.learner is not None and isinstance(self.learner, Scored) != (phase.learn == "scores"):
            assert self.prepared is not None
            self.accelerator.unwrap_model(self.prepared[0], keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            self.learner = self.prepared = None
        for parameter in self.network.parameters():
            parameter.requires_grad_(phase.learn != "scores")
        if self.learner is None or self.prepared is None:
            self.learner = self.network
            if phase.learn == "scores":
                if not self.kept.scores:  # about to be loaded: the state of a killed run holds them
                    self.kept.scores = {name: torch.zeros_like(value) for name, value in self.values().items()}
                self.learner = Scored(self.network, self.kept.scores, self.kept.masks)
            optimizer = _optimizer(phase, self.chosen, self.learner)
            self.prepared = self.accelerator.prepare(self.learner, optimizer)
        model, optimizer = self.prepared
        if self.accelerator.scaler is None:
            # accelerate's step looks for an optional package on the disk each time; only fp16's scaling needs it
            optimizer = optimizer.optimizer
        optimizer.state.clear()
        if isinstance(self.learner, Scored):
            with torch.no_grad():
                for name, score in self.learner.named_scores().items():
                    score.copy_(self.kept.scores[name])
        self.learner.train()
        return self.learner, model, optimizer

    def _save(self) -> None:
        """Write the state beside the last one, then let the last one go: at any moment there is a whole one."""
        if self.folder is None or self.clock() - self.written < self.interval:
            return
        self.kept.seconds = self.clock()
        number = int(found.name.rpartition("-")[2]) + 1 if (found := latest(self.folder)) is not None else 0
        partial, final = self.folder / "partial", self.folder / f"state-{number}"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if main:
            (partial / JOURNAL).write_text(json.dumps(self.kept.journal()), encoding="utf-8")
            os.rename(partial, final)
            if found is not None:
                shutil.rmtree(found)
        self.accelerator.wait_for_everyone()
        self.written = self.clock()


def latest(folder: str | Path) -> Path | None:
    """The newest whole state that a run left in its folder."""
    found = [p for p in Path(folder).glob("state-*") if (p / JOURNAL).is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def factor(chosen: Training, epoch: float, of: int) -> float:
    """The learning rate after `epoch` of `of` epochs, as a share of --lr."""
    if epoch < chosen.warmup:
        return (epoch + 1e-2) / chosen.warmup
    if chosen.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - chosen.warmup) / max(1e-9, of - chosen.warmup))))
    if chosen.schedule == "steps":
        return 0.1 ** sum(epoch >= milestone * of for milestone in chosen.milestones)
    return 1.0


def _optimizer(phase: Phase, chosen: Training, learner: nn.Module) -> torch.optim.Optimizer:
    learned = [p for p in learner.parameters() if p.requires_grad]
    if phase.learn == "scores":
        return torch.optim.SGD(learned, lr=chosen.options["lr"], momentum=0.9)
    if chosen.optimizer == "adam":
        return torch.optim.AdamW(learned, lr=chosen.lr, weight_decay=chosen.weight_decay)
    return torch.optim.SGD(learned, lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _verify(weights: Prunable, values: Mapping[str, Tensor], masks: Masks, pattern: Pattern | None) -> None:
    """What is about to be written is finite, zero where it is pruned, and as sparse as was asked."""
    for site in weights.sites:
        value = values[site.parameter]
        assert bool(torch.isfinite(value).all()), f"{site.parameter} is not finite"
        assert not bool((value[~masks[site.parameter]] != 0).any()), f"{site.parameter}: a pruned weight is not zero"
        if pattern is not None and pattern.m:
            pattern.verify(site.read(value), site.parameter)
    if pattern is not None and not pattern.m and pattern.scope == "model":
        assert masking.kept(masks) == max(1, math.floor(pattern.density * weights.numel + 1e-9))
