"""`hf-prune train --method lomp|imp|rare-gems|smart-ratio|dense`: sparse networks by training, to compare with.

Unlike the main command it needs training data, labels and time: it trains a network from random weights. The folder it
writes holds model.safetensors, training.json with everything that was measured, recipe.yaml and a model card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .cli import Talk
    from .training import Result
    from .training_data import Data
    from .training_recipe import Training

REPORT = "training.json"
VERSION = 1
EXAMPLES = """\
examples:
  hf-prune train --network lenet300 --dataset digits --method lomp --sparsity .95
  hf-prune train --recipe resnet18-cifar100 --method imp --sparsity 0.98

digits needs no file and no network: it comes with scikit-learn.
"""


def parser() -> argparse.ArgumentParser:
    """Flags that were not typed are absent from the namespace: a recipe may decide."""
    from .cli import _number, _Parser, _whole

    top = _Parser(
        prog="hf-prune train",
        usage="hf-prune train --method METHOD (--sparsity S | --nm N:M) [options]",
        description="Train a sparse network from random weights, to compare pruning with.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    group = top.add_argument_group("what to train")
    group.add_argument("--recipe", metavar="NAME|FILE", help="network, dataset and rates: resnet18-cifar100, ...")
    group.add_argument("--method", metavar="METHOD", help="lomp, imp, rare-gems, smart-ratio, dense")
    group.add_argument("--network", metavar="NAME", help="lenet300, fc5, fc12, alexnet, vgg16, resnet18, ...")
    group.add_argument("--sparsity", metavar="S", type=_number, help="zero a share S of the weights, anywhere")
    group.add_argument("--nm", metavar="N:M", help="keep N of every M consecutive weights")
    group.add_argument("--l1", metavar="L", type=_number, help="lomp: weight of the penalty; default: auto")

    group = top.add_argument_group("how")
    group.add_argument("--epochs", metavar="N", type=_whole, help="passes over the images per training")
    group.add_argument("--batch-size", metavar="N", type=_whole, help="images per step, over all processes")
    group.add_argument("--lr", metavar="RATE", type=_number, help="highest learning rate")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", help="a key of the recipe: imp.rewind=2")
    group.add_argument("--seed", metavar="N", type=_whole, help="default 0")
    group.add_argument("--precision", metavar="WHAT", help="no (float32), bf16, fp16")
    group.add_argument("--device", metavar="DEV", help="cpu, cuda, mps; default: what is there")

    group = top.add_argument_group("images")
    group.add_argument("--dataset", metavar="DATA", help="Hub id, image folder, parquet file, or digits")
    group.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    group.add_argument("--split", metavar="NAME", help="default: train")
    group.add_argument("--eval-dataset", metavar="DATA", help="test images; default: the dataset's test split")
    group.add_argument("--eval-split", metavar="NAME", help="default: test, else validation")
    group.add_argument("--image-column", metavar="NAME", help="default: found by its type")
    group.add_argument("--label-column", metavar="NAME", help="default: found")
    group.add_argument("--samples", metavar="N", type=_whole, help="at most this many training images")
    group.add_argument("--image-size", metavar="N", type=_whole, help="resize to N x N pixels")

    group = top.add_argument_group("output")
    group.add_argument("--output-dir", metavar="DIR", help="default: NETWORK-DATASET-METHOD-95pct in this folder")
    group.add_argument("--overwrite", action="store_true", help="replace a folder that hf-prune train wrote")
    group.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    group.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    group.add_argument("--quiet", action="store_true", help="errors only")
    group.add_argument("--verbose", action="store_true", help="tracebacks, warnings of the libraries")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    return top


def run(words: Sequence[str]) -> int:
    """Train, measure, write; the exit code. words: what was typed after `hf-prune train`.

    Raises ValueError for the user's mistakes, all that concern the run itself in one.
    """
    from . import checkpoint, training_recipe
    from .cli import Talk, _hush, on_main, process_state

    args = vars(parser().parse_args(list(words)))
    flags = {key: value for key, value in args.items() if key not in training_recipe.COMMAND_ONLY}
    chosen = training_recipe.resolve(args.get("recipe"), flags=flags, sets=args.get("set", ()), l1=args.get("l1"))
    for one, other in (("overwrite", "resume"), ("quiet", "verbose")):
        if args.get(one) and args.get(other):
            raise ValueError(f"--{one} and --{other} contradict each other: give one of them.")
    folder = Path(args.get("output_dir") or default_folder(chosen))
    place, resume, overwrite = checkpoint.unfinished(folder), bool(args.get("resume")), bool(args.get("overwrite"))
    _hush(verbose=bool(args.get("verbose")))
    state = process_state(chosen.device)

    def prepare() -> None:
        checkpoint.refuse_existing(folder, overwrite=overwrite or resume, mark=REPORT)
        _settle(place, chosen, folder, resume=resume, overwrite=overwrite)
        checkpoint.refuse_unwritable(folder)
        place.mkdir(exist_ok=True)
        (place / "recipe.yaml").write_text(training_recipe.to_yaml(chosen), encoding="utf-8")

    on_main(state, prepare)
    say = Talk(quiet=bool(args.get("quiet")) or not state.is_main_process)
    try:
        return _work(chosen, args, words, folder, place, say)
    except KeyboardInterrupt as stop:
        from .training import latest

        more = " The same command with --resume goes on." if latest(place) is not None else ""
        raise KeyboardInterrupt(more) from stop


def _work(chosen: Training, args: Mapping[str, Any], words: Sequence[str], folder: Path, place: Path, say: Talk) -> int:
    import torch
    from accelerate import Accelerator, PartialState

    from . import checkpoint, networks, training, training_data, training_recipe
    from .cli import on_main, spoken

    state = PartialState()
    if chosen.device and torch.device(chosen.device).type != state.device.type:
        raise ValueError(f"--device {chosen.device} is not available here; accelerate found {state.device}.")
    if chosen.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("--precision fp16 needs an accelerator; on a CPU take bf16 or no.")
    accelerator = Accelerator(cpu=state.device.type == "cpu", mixed_precision=chosen.precision)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    say.stage(f"opening {chosen.dataset}")
    data = training_data.load(chosen, args.get("token"))
    say.notes(data.notes)
    network = networks.build(chosen.network, data.image, len(data.names), chosen.seed)
    say(beginning(chosen, data, network))
    resume = bool(args.get("resume"))
    try:
        with Progress(say) as progress:
            found = training.train(network, data, chosen, accelerator, checkpoint=place, resume=resume, tell=progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory with --batch-size {chosen.batch_size}: halve it, or use --device cpu."
        ) from error

    def write() -> None:
        from safetensors.torch import save_file

        from . import training_card

        told = compose(chosen, data, network, found, spoken(["train", *words]), str(accelerator.device))
        with checkpoint.new_folder(folder) as partial:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            save_file(weights, partial / networks.WEIGHTS, metadata={"format": "pt"})
            (partial / REPORT).write_text(checkpoint.to_json(told), encoding="utf-8")
            (partial / "recipe.yaml").write_text(training_recipe.to_yaml(chosen), encoding="utf-8")
            (partial / "README.md").write_text(training_card.render(told, folder.resolve().name), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        say("\n" + summary(told, folder))

    on_main(state, write)
    return 0


def default_folder(chosen: Training) -> str:
    """lenet300 on digits, lomp, 95 % -> lenet300-digits-lomp-95pct, in the working directory."""
    from .card import slug

    data = Path(chosen.dataset.rstrip("/")).stem if Path(chosen.dataset).exists() else chosen.dataset.rpartition("/")[2]
    level = f"-{slug(str(chosen.pattern()))}" if chosen.pattern() is not None else ""
    return f"{chosen.network}-{data or 'data'}-{chosen.method}{level}"


def _settle(place: Path, chosen: Training, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """What an earlier run left in `place`: `resume` goes on with it, `overwrite` drops it, otherwise ValueError."""
    import yaml

    from . import training, training_recipe

    state = training.latest(place) if place.is_dir() else None
    if resume and state is None:
        raise ValueError(f"--resume: no stopped run for {folder} has written a state yet; leave it out.")
    if resume:
        then, now = yaml.safe_load((place / "recipe.yaml").read_text()), training_recipe.dump(chosen)
        differing = [k for k in {**then, **now} if then.get(k) != now.get(k) and k not in ("device",)]
        if differing:
            raise ValueError(
                f"--resume: the stopped run was started with another {', '.join(differing)} "
                f"({', '.join(f'{k} {then.get(k)}, now {now.get(k)}' for k in differing)}); give the same command, or "
                f"start anew with --overwrite."
            )
        return
    if state is not None and not overwrite:
        raise ValueError(
            f"an earlier run for --output-dir {folder} was stopped: go on with --resume, or drop its work with "
            f"--overwrite."
        )
    shutil.rmtree(place, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- the record
def compose(
    chosen: Training, data: Data, network: nn.Module, found: Result, command: str, device: str
) -> dict[str, Any]:
    """training.json."""
    from . import report, training_recipe
    from .evaluation import wilson

    values = dict(network.named_parameters())
    layers = [
        {"name": site.parameter, "shape": list(values[site.parameter].shape), "total": site.numel,
         "kept": int(found.masks[site.parameter].sum()), "nonzero": int((values[site.parameter] != 0).sum()),
         "dense_reason": None}
        for site in found.prunable.sites
    ]  # fmt: skip
    for name, reason in found.prunable.dense.items():
        count = values[name].numel()
        layers.append({"name": name, "shape": list(values[name].shape), "total": count, "kept": count,
                       "nonzero": int((values[name] != 0).sum()), "dense_reason": reason})  # fmt: skip
    pattern = chosen.pattern()
    l1 = float(found.history[-1]["l1"]) if chosen.method == "lomp" else None
    test = {key: found.test[key] for key in ("accuracy", "loss", "images")}
    return {
        "training_version": VERSION,
        "method": chosen.method,
        "pattern": str(pattern) if pattern is not None else None,
        "seed": chosen.seed,
        "network": {"name": chosen.network, "image": list(data.image), "classes": len(data.names),
                    "labels": data.names, "mean": data.mean, "std": data.std,
                    "parameters": sum(p.numel() for p in network.parameters())},
        "test": test | {"accuracy_interval": wilson(found.test["hits"], found.test["images"])},
        "validation": {key: found.validation[key] for key in ("accuracy", "loss", "images")},
        "curve": _curve(found, l1),
        "l1": l1,
        "phases": found.history,
        "epochs": found.epochs,
        "layers": layers,
        "images": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
        "data": data.where,
        "recipe": training_recipe.dump(chosen),
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "seconds": found.seconds,
        "versions": report.versions(),
    }  # fmt: skip


def _curve(found: Result, l1: float | None) -> list[dict[str, Any]]:
    """The chosen network under one threshold at several sparsities; empty for methods that train under a mask."""
    return next((p["curve"] for p in found.history if "curve" in p and p["l1"] == (l1 or 0.0)), [])


# ------------------------------------------------------------------------------------------------------ what is said
def beginning(chosen: Training, data: Data, network: nn.Module) -> str:
    """What is about to happen, in three lines."""
    from . import phases

    pattern = chosen.pattern()
    planned = phases.longest(chosen.method, chosen.settings(), pattern, chosen.epochs)
    shape = "x".join(map(str, data.image))
    count = sum(p.numel() for p in network.parameters())
    most = "at most " if chosen.method == "lomp" and chosen.options["l1"] == "auto" else ""
    return (
        f"{chosen.network}, {count:,} parameters, {len(data.names)} classes\n"
        f"{shape} images: {len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test\n"
        f"{chosen.method}{f', {pattern}' if pattern is not None else ''}: {most}"
        f"{sum(phase.epochs for phase in planned)} epochs in {len([p for p in planned if p.epochs])} trainings"
    )


def summary(told: Mapping[str, Any], folder: Path) -> str:
    """The last words: what was measured, and where it is. At most 80 columns."""
    from .card import duration
    from .checkpoint import size, weight_bytes

    pruned = [layer for layer in told["layers"] if layer["dense_reason"] is None]
    total, zero = sum(e["total"] for e in pruned), sum(e["total"] - e["nonzero"] for e in pruned)
    test, (low, high) = told["test"], told["test"]["accuracy_interval"]
    lines = [
        ", ".join(part for part in (told["network"]["name"], told["method"], told["pattern"]) if part),
        f"{100 * zero / total:.2f} % of {total:,} entries in {len(pruned)} weights are zero; "
        f"{len(told['layers']) - len(pruned)} weights dense",
        "",
        f"test accuracy    {100 * test['accuracy']:6.2f} % [{100 * low:.1f}, {100 * high:.1f}]   loss "
        f"{test['loss']:.4f}   {test['images']} images",
    ]
    if told["l1"] is not None:
        lines.append(f"L1 penalty       {told['l1']:g}")
    if told["curve"]:
        lines += ["", "the trained network under one magnitude threshold, nothing trained after it"]
        lines.append("sparsity     " + "".join(f"{p['sparsity']:>8.3g}" for p in told["curve"]))
        lines.append("accuracy, %  " + "".join(f"{100 * p['test_accuracy']:>8.2f}" for p in told["curve"]))
    kept = [layer for layer in told["layers"] if layer["dense_reason"] not in (None, "skip")]
    lines += [f"dense: {layer['name']}: {layer['dense_reason']}" for layer in kept]
    where = f"{folder}/  {size(weight_bytes(folder))} of weights, {told['epochs']} epochs, {duration(told['seconds'])}"
    return "\n".join([*lines, "", where])


class Progress:
    """A bar with loss, accuracy and time left on a terminal; a line per training where there is none."""

    def __init__(self, say: Talk) -> None:
        self.say = say
        self.bar: Any = None
        self.terminal = sys.stderr.isatty() and not say.quiet
        self.began = self.last = time.monotonic()
        self.accuracy = ""
        self.first: int | None = None  # the phase that was begun or taken up first

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self._close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self.say.quiet:
            return
        if self.first is None:
            self.first = event["index"]
        if event["event"] == "step":
            self._step(event)
        elif event["event"] == "done":
            self._done(event)

    def _step(self, event: Mapping[str, Any]) -> None:
        first = event["epoch"] == 0 and event["step"] == 0
        if self.terminal:
            from tqdm import tqdm

            if self.bar is None or first:
                self._close()
                name = f"{event['index'] + 1}/{event['phases']} {event['name']}"
                form = "{desc:<26} {bar} {n_fmt}/{total_fmt} {remaining} left{postfix}"
                self.bar = tqdm(total=event["epochs"] * event["steps"], desc=name, bar_format=form, dynamic_ncols=True,
                                file=sys.stderr, leave=False)  # fmt: skip
            self.bar.n = event["epoch"] * event["steps"] + event["step"] + 1
            if time.monotonic() - self.last > 0.2:  # reading the loss waits for the device
                self.last = time.monotonic()
                self.bar.set_postfix_str(f"loss {float(event['loss']):.3f}{self.accuracy}")
        elif time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            self.say.aside(
                f"{event['index'] + 1:>2}/{event['phases']}  {event['name']:<16} loss {float(event['loss']):.4f}  "
                f"epoch {event['epoch'] + 1} of {event['epochs']}"
            )

    def _done(self, event: Mapping[str, Any]) -> None:
        self._close()
        self.last = time.monotonic()
        if event.get("validation_accuracy") is not None:
            self.accuracy = f" last {100 * event['validation_accuracy']:.1f} %"
            figures = (
                f"loss {event['train_loss']:.4f}  validation {event['validation_loss']:.4f}  "
                f"{100 * event['validation_accuracy']:.1f} %"
            )
        else:
            figures = f"{event['kept']:,} weights kept"
        over = event["index"] + 1 - (self.first or 0)
        left = (self.last - self.began) / over * (event["phases"] - event["index"] - 1)
        number = f"{event['index'] + 1}/{event['phases']}"
        self.say.aside(f"{number:>5}  {event['name']:<16} {figures:<42} {int(left) // 60:>3}:{int(left) % 60:02d} left")

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def read(folder: str | Path) -> dict[str, Any]:
    """training.json of an output folder. Raises ValueError when hf-prune train did not write it."""
    path = Path(folder) / REPORT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {REPORT}: it is not a folder that hf-prune train wrote.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
