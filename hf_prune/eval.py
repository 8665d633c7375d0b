"""`hf-prune eval FOLDER|ID --dataset ...`: the pruned model and the dense one it came from, on the same images.

The dense model is the one that hf_prune.json names, or --base. What was measured is printed and written into the
folder's hf_prune.json and card. Every batch is kept on disk until the end: the same command, given again after a kill,
goes on where it stopped. `accelerate launch -m hf_prune eval ...` shares the images among processes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import source as sources
from .intervals import percent

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import nn

    from .calibration import ImageSet
    from .cli import Talk
    from .evaluation import PerImage
    from .models import Loaded

DEPTH_IMAGES = 64  # of the comparison inside the models, which needs every block's output at once
PLACE = ("dataset", "config", "split")  # evaluations that agree in these replace each other


def parser() -> argparse.ArgumentParser:
    from .cli import _Parser, _whole

    top = _Parser(
        prog="hf-prune eval",
        description="Measure a pruned model and the dense one it came from on the same images: accuracy with 95 % "
        "intervals, the paired difference, agreement, error of the logits, calibration, similarity by depth.",
        epilog="A call that was stopped goes on where it was, when the same command is given again.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=80),
        allow_abbrev=False,
    )
    top.add_argument("name", metavar="FOLDER|ID", help="what hf-prune wrote, or its repository on the Hub")
    top.add_argument("--dataset", metavar="DATA", help="Hub id, image folder or file; default: that of the last time")
    top.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    top.add_argument("--split", metavar="NAME", help="default: validation or test")
    top.add_argument("--image-column", metavar="NAME", help="default: found by its type")
    top.add_argument("--label-column", metavar="NAME", help="default: found; without labels no accuracy")
    top.add_argument("--samples", metavar="N", type=_whole, help="at most this many images; default: all")
    top.add_argument("--seed", metavar="N", type=_whole, default=0, help="of the order of the images; default 0")
    top.add_argument("--batch-size", metavar="N", type=_whole, default=16, help="images per step; default 16")
    top.add_argument("--device", metavar="DEV", help="cpu, cuda, cuda:1, mps; default: what is there")
    top.add_argument("--base", metavar="MODEL", help="the dense model; default: the one hf_prune.json names")
    top.add_argument("--base-revision", metavar="REV", help="its branch, tag or commit")
    top.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub ID")
    top.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    top.add_argument("--trust-remote-code", action="store_true", help="run code from the models' repositories")
    top.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    top.add_argument("--no-save", action="store_true", help="leave the folder as it is")
    top.add_argument("--restart", action="store_true", help="forget what a stopped call measured")
    top.add_argument("--eval-results", metavar="TASK", help="write .eval_results/ too, for this task of the benchmark")
    top.add_argument("--quiet", action="store_true", help="errors only")
    top.add_argument("--verbose", action="store_true", help="tracebacks, warnings of the libraries")
    return top


def run(words: Sequence[str]) -> int:
    """`hf-prune eval`: 0, or 130 after Ctrl-C. Raises ValueError for the user's mistakes."""
    args = parser().parse_args(words)
    from . import checkpoint, cli
    from . import report as reports

    if wrong := [f"--{key.replace('_', '-')} {value}: give a whole number of at least {least}."
                 for key, least in (("samples", 1), ("batch_size", 1), ("seed", 0))
                 if (value := getattr(args, key)) is not None and (not isinstance(value, int) or value < least)]:
        raise ValueError(" ".join(wrong))  # fmt: skip
    folder = Path(args.name).expanduser()
    local = folder.is_dir()
    if not local:
        folder = sources.fetch(args.name, revision=args.revision, token=args.token, compressed=True,
                               remote_code=args.trust_remote_code)  # fmt: skip
    elif args.revision is not None:
        raise ValueError(f"--revision {args.revision}: {args.name} is a local folder, which has no revisions.")
    report = checkpoint.read(folder)
    asked = _asked(args, report)
    if args.eval_results and not local:
        raise ValueError(f"--eval-results is written into a folder, and {args.name} is on the Hub: download it first.")
    cli._hush(verbose=args.verbose)
    state = cli.process_state(args.device)
    say = cli.Talk(quiet=args.quiet or not state.is_main_process)
    dense, pruned = _models(args, report, folder, cli.pick_device(args.device, state), say)
    image_set = _images(asked, args, state)
    if args.eval_results and not _on_hub(asked["dataset"]):
        raise ValueError(f"--eval-results: {asked['dataset']} is not on the Hub, where the benchmarks are.")
    cli._refuse_labels(image_set, dense)
    if _calibrated_on(report, image_set):
        say.notes([f"split {image_set.split} also calibrated it: the figures flatter the pruned model."])
    kept = Kept(_place(args.name, folder if local else None), _key(asked, report, dense, state), state.process_index)
    try:
        found = _measure(args, report, dense, pruned, image_set, kept, state, say)
    except KeyboardInterrupt:
        if state.is_main_process:
            print(f"hf-prune: stopped; {kept.count} measured images are kept: the same command goes on after them.",
                  file=sys.stderr)  # fmt: skip
        return 130
    found = reports.told(found, dense.num_classes)
    found |= {**asked, "split": image_set.split, "hub": _on_hub(asked["dataset"]),
              "command": cli.spoken(["eval", *words]), "created": _time()}  # fmt: skip

    def write() -> None:
        shutil.rmtree(kept.folder, ignore_errors=True)
        notes = save(folder, report, found) if local and not args.no_save else []
        if args.eval_results:
            notes.append(f"wrote {_eval_results(folder, found, args.eval_results)}")
        say.notes([*found["notes"], *notes])
        if args.json:
            print(checkpoint.to_json(found), end="")
        else:
            say("\n".join(["", *text(args.name, report, found)]))

    cli.on_main(state, write)
    return 0


# ------------------------------------------------------------------------------------------------- what was asked for
def _asked(args: argparse.Namespace, report: Mapping[str, Any]) -> dict[str, Any]:
    """Which images, in full: what was typed, else what the folder was last judged on."""
    last = report["evaluation"] or {}
    again = args.dataset is None
    dataset = last.get("dataset") if again else args.dataset
    if not dataset:
        raise ValueError(f"{args.name} was not evaluated before: name the images to judge it on with --dataset.")
    known = last if again else {}
    return {
        "dataset": dataset,
        "config": args.config or known.get("config"),
        "split": args.split or known.get("split"),
        "asked_samples": args.samples,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }


def _models(
    args: argparse.Namespace, report: Mapping[str, Any], folder: Path, device: Any, say: Talk
) -> tuple[Loaded, nn.Module]:
    """The dense model with its processor, and the pruned module, both in float32 on `device`."""
    import torch

    from . import compress, models

    named = report["model"]
    base, revision = args.base or named["source"], args.base_revision
    if revision is None and not args.base and named.get("hub"):
        revision = named["revision"]
    say.stage(f"loading {base} and {args.name}")
    options: dict[str, Any] = {"token": args.token, "trust_remote_code": args.trust_remote_code, "device": device}
    try:
        dense = models.load(base, revision=revision, **options)
    except ValueError as error:
        if args.base:
            raise
        raise ValueError(f"{error} hf_prune.json names it as the dense model; say where it is with --base.") from error
    pruned = compress.load(folder, trust_remote_code=args.trust_remote_code, dtype=torch.float32, device=device)
    say.notes(dense.notes)
    say.notes(_kinship(base, dense.module, pruned, report))
    return dense, pruned


def _kinship(base: str, dense: nn.Module, pruned: nn.Module, report: Mapping[str, Any]) -> list[str]:
    """Raise ValueError where the two are not the same architecture; a note where they share not one tensor."""
    import torch

    one, other = dense.state_dict(), pruned.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (one, other)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ValueError(f"{base} is not the model that was pruned: {odd} differs, or is in one of them only.")
    stored = getattr(torch, report["model"]["dtype"], torch.float32)
    for name, tensor in one.items():
        trivial = not tensor.is_floating_point() or tensor.unique().numel() < 2
        if not trivial and torch.equal(tensor.to(stored), other[name].to(stored)):
            return []
    return [f"not one tensor of {base} is the same in the pruned model: is it really what was pruned?"]


def _images(asked: Mapping[str, Any], args: argparse.Namespace, state: PartialState) -> ImageSet:
    from .calibration import images

    def opened(split: str | None) -> ImageSet:
        return images(
            asked["dataset"],
            config=asked["config"],
            split=split,
            image_column=args.image_column,
            label_column=args.label_column,
            samples=args.samples,
            seed=args.seed,
            token=args.token,
            rank=state.process_index,
            world_size=state.num_processes,
        )

    found = opened(asked["split"])
    other = found.default_eval_split if asked["split"] is None else None
    return opened(other) if other else found


def _on_hub(dataset: str) -> bool:
    return not Path(dataset).expanduser().exists()


def _calibrated_on(report: Mapping[str, Any], image_set: ImageSet) -> bool:
    calibration = report["calibration"]
    return (calibration.get("dataset"), calibration.get("split")) == (image_set.dataset, image_set.split)


def _time() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------------ measured
def _measure(
    args: argparse.Namespace,
    report: Mapping[str, Any],
    dense: Loaded,
    pruned: nn.Module,
    image_set: ImageSet,
    kept: Kept,
    state: PartialState,
    say: Talk,
) -> dict[str, Any]:
    from . import cli, ranks
    from .evaluation import evaluate

    if args.restart:
        cli.on_main(state, lambda: shutil.rmtree(kept.folder, ignore_errors=True))
    say.notes(kept.open())
    with _memory(args.batch_size), cli.Progress(say) as progress:
        found = evaluate(dense, pruned, image_set, batch_size=args.batch_size, progress=progress.images,
                         gather=ranks.gather, done=kept.done, keep=kept.add)  # fmt: skip
    if state.is_main_process:
        say.stage("comparing the two models block by block")
        with _memory(args.batch_size):
            found["depth"] = depth(dense, pruned, image_set, args.batch_size, report.get("permutation"))
    return found


def depth(
    dense: Loaded, pruned: nn.Module, image_set: ImageSet, batch_size: int, permutation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The `depth` of an evaluation: both models inside, on the first images of this rank's share.

    permutation: of the pruning run; the dense model's channels are put in the same order, on a copy.
    """
    import copy

    from . import cli, permute, similarity
    from .calibration import batches

    limit = image_set.samples
    image_set.samples = min(limit or DEPTH_IMAGES, DEPTH_IMAGES * image_set.world_size)
    try:
        module, ordered = dense.module, True
        if permutation and permutation["groups"]:
            module = copy.deepcopy(module)
            ordered = permute.again(module, cli._probe(dense), permutation)
        blocks = similarity.by_depth(module, pruned, batches(image_set, dense, batch_size), ordered=ordered)
        return {"images": image_set.yielded, "blocks": blocks}
    finally:
        image_set.samples = limit


@contextlib.contextmanager
def _memory(batch_size: int) -> Any:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory with --batch-size {batch_size}: halve it, or use --device cpu."
        ) from error


class Kept:
    """The batches of one rank's share on disk, one JSON line each, until the evaluation has ended."""

    def __init__(self, place: Path, key: str, rank: int) -> None:
        self.folder = place.parent / f".{place.name}.eval-{key}"
        self.file = self.folder / f"rank{rank}.jsonl"
        self.done: PerImage | None = None
        self.count = 0
        self.writable = True

    def open(self) -> list[str]:
        """Read what a stopped call left, and get ready to add to it. Returns notes."""
        from .evaluation import join

        parts = []
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    parts.append(json.loads(line))
                except ValueError:  # the line that was being written when the process was killed
                    break
        if parts:
            self.done = join(parts)
            self.count = len(self.done["position"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(json.dumps(part) + "\n" for part in parts), encoding="utf-8")
        except OSError as error:
            self.writable = False
            return [f"{self.folder.parent} cannot be written to ({error.strerror}): a stopped call starts anew."]
        return [f"going on after {self.count} images that a stopped call measured."] if parts else []

    def add(self, part: PerImage) -> None:
        self.count += len(part["position"])
        if self.writable:
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(part) + "\n")


def _place(name: str, folder: Path | None) -> Path:
    """Beside a folder; of a Hub id in the cache of the Hub."""
    if folder is not None:
        return Path(os.path.realpath(folder))
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_prune" / re.sub(r"\W+", "--", name)


def _key(asked: Mapping[str, Any], report: Mapping[str, Any], dense: Loaded, state: PartialState) -> str:
    """Another model, other images or other shares: another key, and nothing old is taken up."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in dense.origin.weights]
    what = [dict(asked), report.get("sha256"), report["created"], dense.source, dense.revision, files,
            state.num_processes]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------- written down
def save(folder: Path, report: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Put an evaluation into hf_prune.json and the card. Returns notes.

    One on the same dataset, configuration and split is replaced; one on other images stays, in `other_evaluations`.
    A card that somebody wrote in is left alone.
    """
    from . import checkpoint

    notes = []
    others = list(report.get("other_evaluations") or ())
    if last := report["evaluation"]:
        others.insert(0, last)
    replaced = [each for each in others if all(each.get(key) == found.get(key) for key in PLACE)]
    if replaced and replaced[0]["samples"] > found["samples"]:
        notes.append(f"this replaces the evaluation on {replaced[0]['samples']} images of the same dataset.")
    new = {**report, "evaluation": dict(found), "other_evaluations": [e for e in others if e not in replaced]}
    return notes + checkpoint.update(folder, report, new)


def _eval_results(folder: Path, found: Mapping[str, Any], task: str) -> Path:
    """The top-1 accuracy in the Hub's format of benchmark results; counted for registered benchmarks only."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if not found["pruned"]:
        raise ValueError("--eval-results: there is no accuracy to write, because the images have no labels.")
    low, high = found["pruned"]["top1_interval"]
    entry = EvalResultEntry(
        dataset_id=found["dataset"],
        task_id=task,
        value=found["pruned"]["top1"],
        date=found["created"],
        notes=f"top-1 accuracy on {found['labelled']} images of split {found['split']}, 95 % interval "
        f"[{low:.4f}, {high:.4f}]",
    )
    path = folder / ".eval_results" / (re.sub(r"[^\w.-]+", "_", found["dataset"]).lstrip(".") + ".yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------ what is printed
def text(name: str, report: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of at most 80 columns."""
    data = re.split(r"[/\\]", found["dataset"].rstrip("/\\"))[-1]
    base = report["model"]["source"].rstrip("/").rpartition("/")[2]
    lines = [
        f"{Path(name).name}, {report['pattern']}, beside {base}"[:80],
        f"{found['samples']} images of {data[:30]}, split {found['split'][:12]}; [95 % intervals]",
        "",
    ]
    dense, pruned, change = found["dense"], found["pruned"], found["difference"]
    lines.append(_row("", "dense", "pruned", "difference" if change else ""))
    if dense and pruned and change:
        for key, words in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
            if change[key] is not None:
                points = _points(change[key], change[f"{key}_interval"])
                lines.append(_row(words, percent(dense, key), percent(pruned, key), points))
        errors = [f"{100 * scores['ece']:.1f} %" for scores in (dense, pruned)]
        lines.append(_row("calibration error", errors[0], errors[1], _points(pruned["ece"] - dense["ece"])))
    if rate := found.get("throughput"):
        lines.append(_row("images per second", f"{rate['dense']:.1f}", f"{rate['pruned']:.1f}", ""))
    if found["agreement"] is not None:
        lines.append(_row("same first answer", "", percent(found, "agreement"), ""))
    for key, words in (("logit_error", "relative logit error"), ("representation_error", "representation error")):
        if found.get(key) is not None:
            low, high = found[f"{key}_interval"]
            lines.append(_row(words, "", f"{found[key]:.3g} [{low:.3g}, {high:.3g}]", ""))
    if change:
        lines += ["", f"{change['lost']} images lost, {change['won']} won (McNemar p {_p(change['mcnemar_p'])})"]
        lines += _worst(found["classes"])
    return lines


def _row(words: str, dense: str, pruned: str, change: str) -> str:
    return (words + dense.rjust(36 - len(words)) + pruned.rjust(22) + change.rjust(22)).rstrip()


def _points(value: float, interval: Sequence[float] | None = None) -> str:
    around = f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else ""
    return f"{100 * value:+.1f}{around}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _worst(classes: Mapping[str, Any]) -> list[str]:
    if not classes["judged"]:
        return [f"No class has {classes['fewest']} images: which ones lost most cannot be told."]
    if not classes["worst"]:
        return [f"None of the {classes['judged']} classes with {classes['fewest']} images or more lost an image net."]
    lines = ["", f"Classes that lost most, of {classes['judged']} with {classes['fewest']} images or more "
                 f"(p: over all of them)"]  # fmt: skip
    for row in classes["worst"][:5]:
        name = row["name"] if len(row["name"]) <= 40 else row["name"][:37] + "..."
        lines.append(f"  {name:<40} {row['dense']:>4} -> {row['pruned']:>3} of {row['images']:>3}   p {_p(row['p'])}")
    return lines
