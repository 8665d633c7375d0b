"""A last pass over the whole network: all kept weights together, towards the dense model's outputs.

Blocks are fitted one after the other, each to its own output, and what their errors do together nobody has looked at.
Here the pruned model is a student of the dense one (Hinton et al., arXiv 1503.02531) on the calibration images, with
random flips, crops and mixtures of two images, without labels: Adam on the distance of the outputs, the divergence of
the answers, and the distance of the output of every block.  Masks stand still.  Some calibration images are kept out of
the whole run, and the weights of the epoch with the least loss on them are kept, those from before the first included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ranks, resume
from .gradients import has_logits, logits_of
from .linalg import matmul_precision, single
from .sites import Site, _tensors, feed, parameters, placed, quiet
from .staged import held_loss, outputs
from .walk import Unit, _hooks

NAME = "distill"  # of the file of a run that may be killed
BETAS = 0.9, 0.99  # Adam's; the second forgets in a hundred steps, and a pass has a few hundred
WARM = 0.08  # share of the steps in which the rate rises
SMALLEST = 1e-3  # root mean square that a bias or scale is taken to have at least: Adafactor's floor (arXiv 1804.04235)
DIVERGENCE = 0.1  # weight of the divergence of the answers beside the relative distance of the outputs
CROP, ASPECT = 0.5, 4 / 3  # least share of an image that is cropped, and how far from square
MIXED = 0.5  # share of the images that are mixed with another of their batch
PRECISION = "medium"  # of products where steps are not made in bfloat16: TF32 where the hardware has units for it
COARSE = 0.02  # relative distance of outputs made in bfloat16 from which on a model takes its steps in float32


@dataclass(frozen=True)
class Options:
    """What `distill:` in a recipe may say.

    epochs: passes over the calibration images; 0: no distillation.  lr: the largest step of an entry, as a share of the
    root mean square of its row, so that the scale of a layer or channel does not matter.  images: per step, over all
    processes, in whole batches.  held_out: share of the batches that take no part in the run.
    """

    epochs: int = 0
    lr: float = 1e-3
    images: int = 32
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.images < 1 or not self.lr > 0 or not 0 < self.held_out < 1:
            raise ValueError("epochs must be at least 0, images at least 1, lr above 0 and held_out between 0 and 1.")


def hold_out(batches: Sequence[Any], share: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """(batches of the run, batches kept out): the last ones of every process.

    Raises ValueError, on every process alike, where one has a single batch.
    """
    count = max(1, round(share * len(batches)))
    if min(ranks.gather(len(batches))) < 2:
        raise ValueError(
            f"distill keeps whole batches out, and a process has {min(ranks.gather(len(batches)))}: give more images, "
            "or a smaller --batch-size."
        )
    return batches[:-count], batches[-count:]


def trained(model: nn.Module, sites: Sequence[Site], units: Sequence[Unit]) -> dict[str, Tensor]:
    """By name of a parameter, what one unit of the optimizer is in each of its entries; 0 where it stands still.

    Kept entries of pruned weights move, by their row's root mean square, and the biases and scales of the pruned
    blocks.  Weights that stay dense stay as they are.
    """
    named = parameters(model)
    found: dict[str, Tensor] = {}
    for s in sites:
        p = named[s.parameter].detach()
        w = s.canonical(p)
        kept = (w != 0).to(w.dtype)
        rms = (w.square().sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)).sqrt()
        s.place(found.setdefault(s.parameter, torch.zeros_like(p)), (rms * kept).to(p.dtype))
    behind = {s.norm.rpartition(".")[0] for s in sites if s.norm}  # batch norms, which may lie outside the blocks
    modules = [*(u.module for u in units), *(model.get_submodule(name) for name in behind)]
    inside = {id(p) for m in modules for p in m.parameters()}
    for name, p in named.items():
        if p.dim() == 1 and id(p) in inside and p.is_floating_point() and name not in found:
            rms = p.detach().square().mean().sqrt().clamp_min(SMALLEST)
            found[name] = torch.ones_like(p) * rms
    return found


def vary(batch: Any, generator: torch.Generator) -> Any:
    """The images of a batch flipped, cropped and mixed; a batch with more than its images is left as it is."""
    tensors = _tensors(batch)
    if len(tensors) != 1 or tensors[0].dim() != 4 or not tensors[0].is_floating_point():
        return batch
    x = tensors[0]
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    area, ratio = draw(CROP, 1).sqrt(), torch.exp(draw(-1, 1) * math.log(ASPECT) / 2)
    wide, high = (area * ratio).clamp(max=1), (area / ratio).clamp(max=1)
    where = torch.zeros(n, 2, 3)
    where[:, 0, 0] = wide * torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    where[:, 1, 1] = high
    where[:, 0, 2], where[:, 1, 2] = draw(-1, 1) * (1 - wide), draw(-1, 1) * (1 - high)
    grid = F.affine_grid(where.to(x), list(x.shape), align_corners=False)
    made = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    share = torch.where(draw(0, 1) < MIXED, draw(0.5, 1), torch.ones(n)).to(x).view(-1, 1, 1, 1)
    made = share * made + (1 - share) * made[torch.randperm(n, generator=generator).to(x.device)]
    return torch.utils._pytree.tree_map(lambda t: made if t is x else t, batch)


class Lesson:
    """The loss of a student beside its teacher.  Distances are over the teacher's mean energy on `batches`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, units: Sequence[Unit], batches: Sequence[Any]) -> None:
        self.student, self.teacher = student, teacher
        self.names = [u.name for u in units]
        self.answers = False  # whether the outputs are logits
        found = []  # energy of every block, of the outputs; images
        for batch in batches:
            with torch.no_grad():
                z, blocks = self.look(teacher, batch)
            found.append([float(t.double().square().sum()) for t in (*blocks, z)] + [len(_tensors(batch)[0])])
        sums = torch.tensor(found, dtype=torch.float64).sum(0)
        ranks.sum_([sums])
        self.energy = (sums[:-1] / sums[-1]).clamp_min(1e-30).tolist()
        self.half = min(ranks.gather(self.stands_bfloat16(batch, z)))

    def stands_bfloat16(self, batch: Any, exact: Tensor) -> bool:
        """Whether there are units for it, and the teacher answers a batch as it does in float32: `exact`.

        Model code that mixes types of its own fails under autocast, and so do operations without a bfloat16 kernel.
        """
        device = _tensors(batch)[0].device
        if not bfloat16_units(device) or exact.dtype == torch.float64:  # which autocast leaves as it is
            return False
        try:
            with torch.no_grad(), halved(device):
                rounded, _ = self.look(self.teacher, batch)
        except (RuntimeError, TypeError):
            return False
        return bool((rounded - exact).norm() < COARSE * exact.norm())

    def look(self, model: nn.Module, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """(outputs, the output of every block)."""
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                found = [t for t in _tensors(out) if t.is_floating_point()]
                if found:
                    seen[name] = found[0]

            return hook

        with _hooks(*(model.get_submodule(name).register_forward_hook(note(name)) for name in self.names)):
            out = feed(model, batch)
        self.answers = has_logits(out)
        self.names = [name for name in self.names if name in seen]
        return single(logits_of(out)), [single(seen[name]) for name in self.names]

    def loss(self, batch: Any) -> Tensor:
        """The loss summed over the images of a batch."""
        with torch.no_grad():
            zd, dense = self.look(self.teacher, batch)
        z, blocks = self.look(self.student, batch)
        each = [(a - b).square().sum() / e for a, b, e in zip(blocks, dense, self.energy, strict=False)]
        loss = torch.stack(each).mean() + (z - zd).square().sum() / self.energy[-1]
        if self.answers:
            p, q = z.log_softmax(-1), zd.log_softmax(-1)
            loss = loss + DIVERGENCE * F.kl_div(p, q, log_target=True, reduction="sum")
        return loss

    def learn(self, batch: Any) -> int:
        """Add the gradient of the summed loss to the student's; returns the number of images."""
        with halved(_tensors(batch)[0].device) if self.half else contextlib.nullcontext():
            loss = self.loss(batch)
        loss.backward()
        return len(_tensors(batch)[0])


def bfloat16_units(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; where it is emulated, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def halved(device: torch.device) -> torch.autocast:
    """Products in bfloat16.  Casts are not cached: teacher and student may be one model, once without gradient."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def rehearse(model: nn.Module, units: Sequence[Unit], batch: Any, times: int = 1) -> None:
    """The work of a step, the model beside itself, for those who want to know what it takes; nothing changes."""
    moving = [p for u in units for p in u.module.parameters() if p.is_floating_point()]
    with quiet(model):
        lesson = Lesson(model, model, units, [batch])
        for k in range(times):
            with learning(moving):
                lesson.learn(vary(batch, torch.Generator().manual_seed(k)))


@contextlib.contextmanager
def learning(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of these parameters, and of nothing else; none are left behind."""
    for p in parameters:
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), matmul_precision(PRECISION):
            yield
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None


def rate(step: int, steps: int) -> float:
    """Share of the peak rate at a step: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / max(1, WARM * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Steps:
    """Adam on what moves.

    Its step is of one size whatever the gradient's, so entries are counted in units of their scale; a pruned entry,
    whose unit is 0, has no gradient and stays 0.
    """

    def __init__(self, model: nn.Module, scales: dict[str, Tensor], lr: float) -> None:
        named = parameters(model)
        self.scales, self.lr = scales, lr
        self.moving = {name: named[name] for name in scales}
        self.units = {n: torch.where(s > 0, self.moving[n].detach() / s, 0.0) for n, s in scales.items()}
        self.adam = torch.optim.Adam(self.units.values(), betas=BETAS)
        for u in self.units.values():  # from the start, so that a file of a killed run can be read into it
            moments = {"exp_avg": torch.zeros_like(u), "exp_avg_sq": torch.zeros_like(u)}
            self.adam.state[u] = {"step": torch.zeros(()), **moments}

    def state(self) -> dict[str, Tensor]:
        """All that a later step depends on."""
        found = {f"unit {n}": u for n, u in self.units.items()}
        for n, u in self.units.items():
            found |= {f"{key} {n}": self.adam.state[u][key] for key in ("exp_avg", "exp_avg_sq")}
        return found

    def take(self, lesson: Lesson, batches: Iterable[Any], done: int, steps: int) -> None:
        """One step of `steps`, after `done` of them, on the mean loss over the batches of all processes.

        batches: of this process; one at a time is asked for, and let go.
        """
        with learning([*self.moving.values()]):
            total = ranks.agree(float(sum(map(lesson.learn, batches))))
            for n, u in self.units.items():
                grad = self.moving[n].grad
                u.grad = torch.zeros_like(u) if grad is None else grad * self.scales[n] / total
        ranks.sum_([u.grad for u in self.units.values() if u.grad is not None])
        for group in self.adam.param_groups:
            group["lr"] = self.lr * rate(done, steps)
        for u in self.units.values():
            self.adam.state[u]["step"].fill_(float(done))
        self.adam.step()
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        for n, p in self.moving.items():
            p.copy_(torch.where(self.scales[n] > 0, self.units[n] * self.scales[n], p))


def distill(
    model: nn.Module, teacher: nn.Module, sites: Sequence[Site], units: Sequence[Unit], batches: Sequence[Any],
    kept_out: Sequence[Any], options: Options, seed: int, tell: Callable[[dict[str, Any]], None],
    saved: resume.Saved | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the kept weights in place; returns what was done, for the report.

    batches: of this process.  kept_out: images that took no part in the run.  saved: keeps the state after every epoch,
    and gives it back to a run that was killed.
    """
    with quiet(model), quiet(teacher):
        device = next(model.parameters()).device
        kept_out = [placed(b, device) for b in kept_out]
        dense = outputs(teacher, kept_out)
        nothing: list[Tensor | None] = [None] * len(dense)
        judge = lambda: held_loss(model, (kept_out, nothing), dense)  # noqa: E731
        history = [judge()]
        adam = Steps(model, trained(model, sites, units), options.lr)
        best = {name: p.detach().clone() for name, p in adam.moving.items()}
        state = adam.state() | {f"best {n}": b for n, b in best.items()}
        facts = saved.restore(NAME, state) if saved else None
        if facts:
            history = facts["history"]
            adam.write()
        lesson = Lesson(model, teacher, units, kept_out)
        per = max(1, options.images // (ranks.world_size() * len(_tensors(batches[0])[0])))  # batches of one step
        steps = int(min(ranks.gather(-(-len(batches) // per))))

        def progress(done: int, loss: float) -> None:
            tell({"event": "distill", "done": done, "epochs": options.epochs, "before": history[0], "loss": loss})

        for epoch in range(len(history) - 1, options.epochs):
            if not math.isfinite(history[-1]):  # what follows would be no better
                break
            progress(epoch, history[-1])
            g = torch.Generator().manual_seed(ranks.own(seed) + 104729 * (epoch + 1))
            order = torch.randperm(len(batches), generator=g).tolist()
            for step in range(steps):
                given = (vary(placed(batches[k], device), g) for k in order[step * per : (step + 1) * per])
                adam.take(lesson, given, epoch * steps + step, steps * options.epochs)
            value = judge()
            if value < min(history):
                for name, b in best.items():
                    b.copy_(adam.moving[name].detach())
            history.append(value)
            if saved:
                saved.add(NAME, state, {"history": history})
        progress(options.epochs, min(history))
        with torch.no_grad():
            for name, b in best.items():
                adam.moving[name].copy_(b)
    kept = min(range(len(history)), key=history.__getitem__)
    found = {"epochs": options.epochs, "kept": kept, "before": history[0], "after": history[kept], "history": history}
    exact = str(next(model.parameters()).dtype).removeprefix("torch.")
    return found | {"precision": "bfloat16" if lesson.half else exact}


def concluded(told: dict[str, Any]) -> str:
    """One sentence for the report."""
    way = f"the loss on {told['held_out']} images kept out"
    if not told["kept"]:
        return f"distillation over {told['epochs']} epochs did not lower {way} ({told['before']:.4g}); nothing changed."
    epoch = f"epoch {told['kept']} of {told['epochs']}"
    return f"distillation: {way} fell from {told['before']:.4g} to {told['after']:.4g} ({epoch})."
