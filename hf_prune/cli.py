"""`hf-prune MODEL --nm 2:4`: arguments in, a pruned, measured and described folder out.

Slow libraries are imported when their turn comes: `--help`, a typo and a contradiction answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import importlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from .calibration import ImageSet
    from .loop import Recipe
    from .models import Loaded
    from .recipe import Run

# First words that are commands of their own, and the module whose `run(arguments)` they call. A model folder of the
# same name is reached as ./demo.
COMMANDS = {
    "demo": "hf_prune.demo",
    "push": "hf_prune.hub",
    "verify": "hf_prune.verify",
    "inspect": "hf_prune.inspect",
    "convert": "hf_prune.compress",
    "limit": "hf_prune.limit_command",
    "train": "hf_prune.train",
    "plan": "hf_prune.forecast",
    "eval": "hf_prune.eval",
    "compare": "hf_prune.compare",
    "report": "hf_prune.page",
    "bench": "hf_prune.bench",
}

EXAMPLES = """\
examples:
  hf-prune google/vit-base-patch16-224 --nm 2:4
  hf-prune ./my-model --sparsity 0.7 --dataset ./images --output-dir out

commands (hf-prune COMMAND --help):
  demo, plan, bench, eval, compare, report, push, verify, inspect, convert,
  limit, train
A recipe (--recipe FILE) holds the same keys as these flags; flags win.
"""


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag; no usage text above it."""

    def error(self, message: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        typed = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [found for word in typed for found in difflib.get_close_matches(word, known, n=1)]
        hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
        self.exit(2, f"hf-prune: {message}.{hint}\nTry {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """The flags of the main command. Flags that were not typed are absent from the namespace: a recipe may decide."""
    top = _Parser(
        prog="hf-prune",
        usage="hf-prune MODEL (--nm N:M | --sparsity S) [options]",
        description="Prune a pretrained vision model in one shot: no retraining, no labels.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    top.add_argument("model", metavar="MODEL", help="Hub id (timm/... too), or a local folder")

    group = top.add_argument_group("what to keep")
    group.add_argument("--nm", metavar="N:M", help="keep N of every M consecutive weights")
    group.add_argument("--sparsity", metavar="S", type=_number, help="zero a share S of the weights, anywhere")
    group.add_argument("--scope", metavar="SCOPE", help="share per layer (default), row, or whole model")
    group.add_argument("--allocation", metavar="RULE", help="magnitude, lamp, erk or trace (of scope model)")
    group.add_argument("--skip", metavar="NAME", action="append", help="keep matching weights dense (repeatable)")
    group.add_argument("--only", metavar="NAME", action="append", help="prune matching weights only (repeatable)")
    group.add_argument("--prune-stem", action="store_true", help="prune the patch embedding or stem too")
    group.add_argument("--prune-head", action="store_true", help="prune the classifier too")

    group = top.add_argument_group("how")
    group.add_argument("--recipe", metavar="NAME|FILE", help="snows (default), snows-paper, magnitude, ...")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", help="a key of the recipe: solve.ridge=.05")
    group.add_argument("--permute", metavar="SCORE", help="reorder channels first: none, magnitude, activation, obs")
    group.add_argument("--seed", metavar="N", type=_whole, help="default 0")
    group.add_argument("--device", metavar="DEV", help="cpu, cuda, cuda:1, mps; default: what is there")
    group.add_argument("--dtype", metavar="DTYPE", help="of the written weights; default: as they were")

    group.add_argument("--host-memory", metavar="SIZE", help="use at most so much (4GiB); the rest on disk")
    group.add_argument("--device-memory", metavar="SIZE", help="the same of the GPU: fewer images at once")
    group.add_argument("--timeout", metavar="MIN", type=_number, help="wait for a silent process (30)")

    group = top.add_argument_group("images")
    group.add_argument("--dataset", metavar="DATA", help="Hub id, image folder or parquet file to calibrate on")
    group.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    group.add_argument("--split", metavar="NAME", help="default: train")
    group.add_argument("--image-column", metavar="NAME", help="default: found by its type")
    group.add_argument("--label-column", metavar="NAME", help="default: found; needed to evaluate only")
    group.add_argument("--samples", metavar="N", type=_whole, help="calibration images")
    group.add_argument("--batch-size", metavar="N", type=_whole, help="images per step")

    group = top.add_argument_group("evaluation")
    group.add_argument("--eval-dataset", metavar="DATA", help="default: the calibration dataset")
    group.add_argument("--eval-split", metavar="NAME", help="default: validation or test")
    group.add_argument("--eval-samples", metavar="N", type=_whole, help="at most this many images")
    group.add_argument("--no-eval", action="store_true", help="measure nothing")

    group = top.add_argument_group("output and Hub")
    group.add_argument("--output-dir", metavar="DIR", help="default: MODEL-2of4 in this folder")
    group.add_argument("--overwrite", action="store_true", help="replace a folder that hf-prune wrote")
    group.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    group.add_argument("--report", action="store_true", help="draw report.html and pictures for the card")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    group.add_argument("--compressed", action="store_true", help="write the N:M weights packed too")
    group.add_argument("--compressed-only", action="store_true", help="... and no dense weights")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model")
    group.add_argument("--push-to-hub", metavar="ID", help="publish the result as this repository")
    group.add_argument("--private", action="store_true", help="... which only its owner sees")
    group.add_argument("--push-revision", metavar="REV", help="... on this branch")
    group.add_argument("--create-pr", action="store_true", help="... as a pull request")
    group.add_argument("--commit-message", metavar="TEXT", help="... with this first line")
    group.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    group.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")

    group = top.add_argument_group("words")
    group.add_argument("--quiet", action="store_true", help="errors only")
    group.add_argument("--verbose", action="store_true", help="tracebacks, warnings of the libraries")
    group.add_argument("--version", action="version", version=_version(), help="print the version and stop")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    return top


def _version() -> str:
    from . import __version__

    return f"hf-prune {__version__}"


def _number(text: str) -> float | str:
    """A number, or the text itself: recipe.py says what is wrong with it, together with everything else."""
    try:
        return float(text)
    except ValueError:
        return text


def _whole(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


# ------------------------------------------------------------------------------------------------------------- main
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 2 a mistake of the user, 74 something could not be written (disk full, read-only), 75 another process was
    lost, 130 after Ctrl-C, 143 after SIGTERM; after the last four `--resume` goes on.
    argv: the words after `hf-prune`; None takes them from the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in words
    if words and words[0] in COMMANDS:
        return _guard(lambda: importlib.import_module(COMMANDS[words[0]]).run(words[1:]), verbose)
    if not words:
        parser().print_help()
        return 2
    return _guard(lambda: run(vars(parser().parse_args(words)), words), verbose)


def _guard(work: Callable[[], int], verbose: bool) -> int:
    """Turn the exceptions that a user can mend into one message and an exit code; let bugs have their traceback."""
    try:
        with _terminable():
            return work()
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    except ValueError as error:
        if verbose:
            traceback.print_exc()
        _complain(error)
        return 2
    except KeyboardInterrupt as stop:
        if verbose:
            traceback.print_exc()
        by = "stopped by SIGTERM" if isinstance(stop, Terminated) else "stopped"
        _complain(f"{by}; no output folder was written.{stop}")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:  # `hf-prune ... | head`: the reader has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at exit
        return 141
    except (OSError, RuntimeError) as error:
        code = _outside(error)
        if code is None:
            raise
        if verbose:
            traceback.print_exc()
        _complain(error)
        return code


def _outside(error: Exception) -> int | None:
    """The exit code where what stopped the run lies outside it, as in sysexits.h; None for a bug."""
    streams, ranks = sys.modules.get("hf_prune.streams"), sys.modules.get("hf_prune.ranks")
    if streams is not None and isinstance(error, streams.NotSaved):
        return 74  # EX_IOERR
    return 75 if ranks is not None and isinstance(error, ranks.Lost) else None  # EX_TEMPFAIL


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: a scheduler's time limit, or a launcher that ends all processes because one has failed."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with the last checkpoint intact and a word about it."""

    def stop(number: int, frame: object) -> None:
        _asked.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise _asked[-1]

    try:
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs it there decides about signals
        yield
        return
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


_asked: list[type[KeyboardInterrupt]] = []


def _heed() -> None:
    """Stop if asked to: what a signal raises is lost where it lands in a finalizer or a callback of a C library."""
    if _asked:
        raise _asked[-1]


def _complain(error: object) -> None:
    rank = int(os.environ.get("RANK", "0"))
    grouped = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    told = getattr(sys.modules.get("hf_prune.ranks"), "Told", ())
    if rank == 0:
        print(f"hf-prune: {error}", file=sys.stderr)
    elif grouped and not isinstance(error, told):  # before there is a group, all ranks make the same mistake
        print(f"hf-prune (rank {rank}): {error}", file=sys.stderr)


def run(args: Mapping[str, Any], words: Sequence[str], plan_only: Mapping[str, bool] | None = None) -> int:
    """The main command. args: what was typed. words: the command line, for the card. plan_only: flags of `plan`."""
    from . import card, checkpoint, plan, report
    from .recipe import to_yaml

    chosen = settle(args)
    timeout = _limits(args)
    folder = Path(args.get("output_dir") or default_folder(args["model"], str(chosen.recipe.pattern())))
    resume, source = bool(args.get("resume")), args["model"]
    blocks = checkpoint.unfinished(folder)
    # a stopped run that is taken up again had the leave to overwrite, or there was nothing to overwrite
    overwrite = bool(args.get("overwrite")) or (resume and blocks.is_dir())

    def check_folder() -> None:
        checkpoint.refuse_existing(folder, overwrite=overwrite, source=source)
        checkpoint.refuse_unfinished(folder, resume=resume, overwrite=overwrite)
        checkpoint.refuse_unwritable(folder)

    if args.get("push_to_hub"):
        from . import hub

        hub.check(args["push_to_hub"], args.get("token"))  # now, and not after the work
    _hush(verbose=bool(args.get("verbose")))
    state = process_state(chosen.device, timeout)
    say = Talk(quiet=bool(args.get("quiet")) or not state.is_main_process)
    if not args.get("dry_run"):
        on_main(state, check_folder)
    from . import streams
    from .loop import choose
    from .loop import prune as prune_model

    say.stage(f"loading {source}")
    loaded = _load(args, chosen, pick_device(chosen.device, state))
    say.notes(loaded.notes)
    engine = _with_names(chosen, loaded)
    budgets = {"host_memory": args.get("host_memory"), "device_memory": args.get("device_memory")}
    if args.get("dry_run"):
        return _forecast(loaded, engine, say, plan_only or {}, functools.partial(_predicted, chosen=chosen,
                         budgets=budgets, state=state))  # fmt: skip
    selection = choose(loaded.module, _probe(loaded), engine)
    planned = selection.plan
    say(plan.text(planned))
    stored = output_bytes(loaded)
    say(plan.output(stored))
    say(_predicted(loaded, selection, chosen, budgets, state)[1])
    kept = 4 * plan.totals(planned)["prunable"]  # finished blocks, in float32
    on_main(state, lambda: checkpoint.refuse_full_disk(folder, stored + kept))

    say.stage(f"opening {chosen.dataset}")
    calibration = _images(chosen, args, state)
    judged = _eval_images(chosen, args, calibration, state, say)
    if judged is not None:
        _refuse_labels(judged, loaded)  # now, and not after the work
    dense = dataclasses.replace(loaded, module=copy.deepcopy(loaded.module)) if judged is not None else None
    images = _batches(calibration, loaded, chosen)
    with _keeping(blocks, resume), _memory(chosen), Progress(say) as progress:
        told = _enough(progress, calibration, chosen)
        result = prune_model(loaded.module, images, engine, progress=told, checkpoint=blocks, **budgets)
    say.notes([*calibration.notes, *result.notes])
    evaluation = None
    if judged is not None and dense is not None:
        with _memory(chosen), Progress(say) as progress:
            evaluation = _evaluate(dense, loaded, judged, chosen, progress.images)
        say.notes(evaluation["notes"])
        if args.get("report") and state.is_main_process:
            from . import eval as evaluating

            size = chosen.recipe.batch_size
            evaluation["depth"] = evaluating.depth(dense, loaded.module, judged, size, result.permutation)

    def write() -> None:
        made = report.compose(
            loaded,
            chosen,
            result,
            calibration=_where(calibration, chosen) | {"samples": samples, "skipped": skipped},
            evaluation=evaluation and evaluation | _where(judged, chosen),
            command=spoken(words),
            compressed="only" if args.get("compressed_only") else "beside" if args.get("compressed") else None,
        )
        text = card.render(made, name=folder.resolve().name)
        try:
            checkpoint.write(folder, loaded, made, text, recipe=to_yaml(chosen), overwrite=overwrite)
        except OSError as error:
            why = f"{folder} could not be written: {error.strerror or error}."
            raise streams.NotSaved(
                f"{why} No work is lost: mend it, then give the same command with --resume."
            ) from error
        shutil.rmtree(blocks, ignore_errors=True)
        if args.get("report"):
            from . import page

            say.notes(page.write([folder])[1])
        stored = checkpoint.weight_bytes(folder)
        say("\n" + report.summary(made, folder, stored, checkpoint.packed_bytes(folder)))

    samples, skipped = _counts(calibration)
    on_main(state, write)
    if args.get("push_to_hub"):
        on_main(state, lambda: _publish(args, folder, say))
    return 0


def _forecast(
    loaded: Loaded, engine: Recipe, say: Talk, flags: Mapping[str, bool], memory: Callable[..., tuple[int, str]]
) -> int:
    """`--dry-run` and `hf-prune plan`."""
    import json

    from . import forecast
    from .loop import choose

    probe = not flags.get("no_probe")
    picked = choose(loaded.module, _probe(loaded), engine)
    held = memory(loaded, picked)[0] if probe else None  # before the probe, whose leftovers it would count
    found = forecast.forecast(loaded, picked, engine, probe=probe, tell=say.stage)
    found = dataclasses.replace(found, memory=held)
    if flags.get("json"):
        say(json.dumps(forecast.as_json(found, loaded, engine), indent=1, ensure_ascii=False))
        return 0
    say(forecast.text(found))
    say("Dry run: nothing was pruned and nothing was written.")
    return 0


def _publish(args: Mapping[str, Any], folder: Path, say: Talk) -> None:
    """Push the finished folder; when that fails, the folder is there and can be pushed later."""
    from . import hub

    try:
        link = hub.push(
            folder,
            args["push_to_hub"],
            private=bool(args.get("private")),
            revision=args.get("push_revision"),
            create_pr=bool(args.get("create_pr")),
            message=args.get("commit_message"),
            token=args.get("token"),
            tell=say.aside,
            bars=sys.stderr.isatty() and not say.quiet,
        )
    except ValueError as error:
        raise ValueError(f"{error} The result is complete in {folder}; later: hf-prune push {folder} "
                         f"{args['push_to_hub']}") from error  # fmt: skip
    say(link)


# ------------------------------------------------------------------------------------------------- what was asked for
def settle(args: Mapping[str, Any]) -> Run:
    """The run that recipe and flags decide. Raises one ValueError with everything that is wrong with them."""
    from . import recipe

    of_the_command = set(recipe.COMMAND_ONLY)
    flags = {key: value for key, value in args.items() if key not in of_the_command}
    wrong = []
    for one, other in (("overwrite", "resume"), ("quiet", "verbose"), ("dry_run", "resume"), ("dry_run", "overwrite")):
        if args.get(one) and args.get(other):
            pair = [f"--{key.replace('_', '-')}" for key in (one, other)]
            wrong.append(f"{pair[0]} and {pair[1]} contradict each other: give one of them.")
    for flag in ("private", "push_revision", "create_pr", "commit_message"):
        if args.get(flag) and not args.get("push_to_hub"):
            wrong.append(f"--{flag.replace('_', '-')} says how to publish: give --push-to-hub ID too.")
    if args.get("push_to_hub"):
        from .hub import id_problem

        wrong += id_problem(args["push_to_hub"])
        if args.get("dry_run"):
            wrong.append("--dry-run and --push-to-hub contradict each other: give one of them.")
    chosen = recipe.resolve(args.get("recipe", recipe.DEFAULT), flags=flags, sets=args.get("set", ()), also=wrong)
    if args.get("compressed") or args.get("compressed_only"):
        from .packing import MAX_M

        if not 0 < chosen.recipe.pattern().m <= MAX_M:
            raise ValueError(
                f"--compressed packs N:M with M up to {MAX_M}, and the pattern is {chosen.recipe.pattern()}: leave it "
                f"out, or give --nm."
            )
    return chosen


def default_folder(model: str, pattern: str) -> str:
    """google/vit-base with 2:4 -> vit-base-2of4, in the working directory."""
    from .card import slug

    name = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.') or 'model'}-{slug(pattern)}"


def spoken(words: Sequence[str]) -> str:
    """The command line to print and to keep: as typed, without the token."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--token":
            skip = True
        elif not word.startswith("--token="):
            kept.append(word)
    return shlex.join(["hf-prune", *kept])


# -------------------------------------------------------------------------------------------- processes and devices
def process_state(device: str | None, timeout: float = 30.0) -> PartialState:
    """accelerate's view of this process: rank, device, process group (gloo on a CPU).

    timeout: minutes after which a process that does not answer counts as lost.

    Raises ValueError when the launcher started several processes and they do not see each other: each would prune
    the whole model for itself and all would write the same folder.
    """
    import torch
    from accelerate import PartialState

    from . import ranks  # noqa: F401 - before a group begins: what it imports must not take hold of the group

    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = wanted or device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(minutes=timeout))
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != state.num_processes:
        raise ValueError(
            f"the launcher announces {announced} processes (WORLD_SIZE), but accelerate sees {state.num_processes}: "
            f"they would work side by side without knowing of each other. Start them with "
            f"`torchrun --nproc_per_node {announced} -m hf_prune ...` or "
            f"`accelerate launch --multi_gpu --num_processes {announced} -m hf_prune ...`."
        )
    return state


def pick_device(device: str | None, state: PartialState) -> torch.device:
    """The device to work on: the one asked for, else the one accelerate gives this rank.

    Raises ValueError when it is not there.
    """
    import torch

    if device is None:
        return state.device
    chosen = torch.device(device)
    if state.num_processes > 1 and chosen.type == state.device.type:
        if chosen.index is not None:
            raise ValueError(
                f"--device {device}: {state.num_processes} processes need a device each; leave out the number."
            )
        return state.device
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three, by build and backend
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found = f"{there} ({torch.accelerator.device_count()}) and cpu" if there else "cpu only"
        raise ValueError(f"--device {device} is not available here; this machine has {found}.") from error
    return chosen


def on_main(state: PartialState, work: Callable[[], None]) -> None:
    """Do something on rank 0 alone; if it raises ValueError there, every rank does, so that none is left waiting."""
    if state.num_processes == 1:
        work()
        return
    from . import ranks

    ranks.together(work)


@contextlib.contextmanager
def _keeping(blocks: Path, resumed: bool) -> Iterator[None]:
    """Finished blocks outlive Ctrl-C and a kill; not a ValueError, which the same command would meet again.

    resumed: the blocks are an earlier run's, and the error may be that they do not belong to this one: they stay.
    """
    from . import ranks, streams

    def kept() -> str:
        count = len(list(blocks.glob("*.safetensors"))) if blocks.is_dir() else 0
        what = "1 finished block is" if count == 1 else f"{count} finished blocks are"
        return f"{what} kept: the same command with --resume goes on from there." if count else ""

    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(f" {kept()}".rstrip()) from stop
    except (streams.NotSaved, ranks.Lost) as error:
        raise type(error)(f"{error} {kept()}".rstrip()) from error
    except ValueError:
        if not resumed and os.environ.get("RANK", "0") == "0":
            shutil.rmtree(blocks, ignore_errors=True)
        raise


@contextlib.contextmanager
def _memory(chosen: Run) -> Iterator[None]:
    """Say what to do when the device is full."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory with --batch-size {chosen.recipe.batch_size}: halve it, or use --device cpu."
        ) from error


# ------------------------------------------------------------------------------------------------- model and images
def _load(args: Mapping[str, Any], chosen: Run, device: torch.device) -> Loaded:
    from . import models

    return models.load(
        args["model"],
        revision=args.get("revision"),
        token=args.get("token"),
        trust_remote_code=bool(args.get("trust_remote_code")),
        dtype=chosen.dtype,
        device=device,
    )


def _with_names(chosen: Run, loaded: Loaded) -> Recipe:
    """The engine's recipe with the user's name patterns turned into the parameter names they mean."""
    from .plan import expand

    if not chosen.recipe.skip and not chosen.recipe.only:
        return chosen.recipe
    disk = loaded.checkpoint_names()
    # biases and norms are never pruned: a pattern that matches nothing else is a mistake
    names = {name: disk[name] for name, p in loaded.module.named_parameters() if p.dim() >= 2}
    only = expand(chosen.recipe.only, names, flag="--only")
    skip = expand(chosen.recipe.skip, names, flag="--skip")
    if only and not set(only) - set(skip):
        raise ValueError("--skip leaves nothing of what --only chose; remove one of them.")
    return dataclasses.replace(chosen.recipe, only=only, skip=skip)


def _probe(loaded: Loaded) -> Any:
    """Two images of noise through the model's own preprocessing: enough to watch a forward before data is opened."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    return loaded.batch(loaded.processor([Image.fromarray(each) for each in noise]))


def output_bytes(loaded: Loaded) -> int:
    """Bytes of the weights that `loaded.save` writes, up to the file header."""
    names = loaded.checkpoint_names()
    tensors = {(t.data_ptr() or n): (n, t) for n, t in loaded.module.state_dict().items()}  # tied: stored once

    def size(name: str, tensor: torch.Tensor) -> int:
        kind = loaded.stored_dtypes.get(names[name], loaded.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.numel() * kind.itemsize

    return sum(size(name, tensor) for name, tensor in tensors.values())


def _images(chosen: Run, args: Mapping[str, Any], state: PartialState) -> ImageSet:
    from .calibration import images
    from .loop import by_batches
    from .recipe import DATASET

    try:
        return images(
            chosen.dataset,
            config=chosen.config,
            split=chosen.split,
            image_column=chosen.image_column,
            label_column=chosen.label_column,
            samples=chosen.recipe.samples,
            seed=chosen.recipe.seed,
            token=args.get("token"),
            rank=state.process_index,
            world_size=state.num_processes,
            # the same batches whatever the number of processes: then the result is the same, to the bit
            deal=chosen.recipe.batch_size if by_batches(chosen.recipe) else 1,
        )
    except ValueError as error:
        if chosen.dataset == DATASET and "dataset" not in args:
            raise ValueError(f"{error} It is the default; name images of your own with --dataset.") from error
        raise


def _eval_images(
    chosen: Run, args: Mapping[str, Any], calibration: ImageSet, state: PartialState, say: Talk
) -> ImageSet | None:
    """The images to measure on; None with --no-eval, and where the calibration dataset has no second split."""
    from .calibration import images
    from .recipe import EVAL_SAMPLES

    if chosen.no_eval:
        return None
    same = chosen.eval_dataset is None or chosen.eval_dataset == chosen.dataset
    split = chosen.eval_split or (calibration.default_eval_split if same else None)
    if same and split is None:
        say.notes(
            [
                f"not evaluated: {chosen.dataset} has only the split {calibration.split}, which calibrates; "
                f"give --eval-dataset, or --eval-split to name one."
            ]
        )
        return None
    found = images(
        chosen.eval_dataset or chosen.dataset,
        config=chosen.config if same else None,
        split=split,
        image_column=chosen.image_column if same else None,
        label_column=chosen.label_column if same else None,
        samples=chosen.eval_samples or EVAL_SAMPLES,
        seed=chosen.recipe.seed,
        token=args.get("token"),
        rank=state.process_index,
        world_size=state.num_processes,
    )
    if chosen.eval_samples is None and (found.expected or EVAL_SAMPLES) * found.world_size < EVAL_SAMPLES:
        found.samples = None  # all of them; nobody asked for more
    if same and found.split == calibration.split:
        say.notes([f"evaluated on the split that calibrates ({found.split}): the figures flatter the pruned model."])
    return found


def _refuse_labels(judged: ImageSet, loaded: Loaded) -> None:
    from .labels import match

    if judged.label_column is not None and loaded.has_logits:
        match(judged.label_names, loaded.labels, loaded.num_classes)


def _classes(calibration: ImageSet, loaded: Loaded, chosen: Run) -> Any:
    """The model's class of each of the dataset's where gradients of the loss are needed and labels allow it, else None.

    Raises ValueError where the recipe insists on labels and they do not match the model's classes.
    """
    from . import staged
    from .labels import match

    kind = chosen.recipe.fisher.get("labels", "auto")
    if "fisher" not in staged.roles(chosen.recipe) or kind not in ("auto", "true"):
        return None
    if calibration.label_column is None or not loaded.has_logits:
        return None
    try:
        return match(calibration.label_names, loaded.labels, loaded.num_classes).classes
    except ValueError:
        if kind == "true":
            raise
        return None  # `auto` then samples labels from the model, and the report says so


def _batches(calibration: ImageSet, loaded: Loaded, chosen: Run) -> Iterator[Any]:
    """The calibration batches, decoded when they are asked for."""
    from .calibration import batches

    return batches(calibration, loaded, chosen.recipe.batch_size, _classes(calibration, loaded, chosen))


def _enough(progress: Progress, calibration: ImageSet, chosen: Run) -> Callable[[Mapping[str, Any]], None]:
    """`progress`, and a ValueError where all ranks together have too few images to learn from."""
    from . import ranks

    def told(event: Mapping[str, Any]) -> None:
        if event["event"] == "images" and ranks.agree(calibration.yielded) < 2:
            raise ValueError(f"--dataset {chosen.dataset} gave one usable image; calibration needs at least 2.")
        progress(event)

    return told


def _limits(args: Mapping[str, Any]) -> float:
    """Minutes to wait for a silent process. Raises ValueError for it, or a budget of memory, that is no amount."""
    from .streams import size

    for flag in ("host_memory", "device_memory"):
        try:
            size(args.get(flag))
        except ValueError as error:
            raise ValueError(f"--{flag.replace('_', '-')} {error}") from error
    minutes = args.get("timeout", 30.0)
    if not isinstance(minutes, float) or not minutes > 0:
        raise ValueError(f"--timeout {minutes}: expected minutes, a number above 0.")
    return minutes


def _predicted(
    loaded: Loaded, selection: Any, chosen: Run, budgets: Mapping[str, Any], state: PartialState
) -> tuple[int, str]:
    """Bytes of memory at the widest point, and the plan's line about them."""
    import datasets  # noqa: F401 - a run holds it, and what it imports, in memory

    from . import memory
    from .streams import size

    samples = -(-chosen.recipe.samples // state.num_processes)
    held = 0 if chosen.no_eval else memory.model_bytes(loaded.module)  # the dense model, to compare with
    host, device = size(budgets["host_memory"]), size(budgets["device_memory"])
    peak, found = memory.predict(loaded.module, selection, chosen.recipe, samples, host=host, device=device,
                                 beside=held)  # fmt: skip
    return peak, memory.line(peak, found, samples, host)


def _counts(calibration: ImageSet) -> tuple[int, int]:
    """(images used, images skipped) over all ranks."""
    from . import ranks

    return int(ranks.agree(calibration.yielded)), int(ranks.agree(calibration.skipped))


def _evaluate(
    dense: Loaded, pruned: Loaded, judged: ImageSet, chosen: Run, progress: Callable[[int, int | None], None]
) -> dict[str, Any]:
    from . import ranks
    from .evaluation import evaluate

    return evaluate(dense, pruned, judged, batch_size=chosen.recipe.batch_size, progress=progress, gather=ranks.gather)


def _where(images: ImageSet | None, chosen: Run) -> dict[str, Any]:
    """Where images came from, as hf_prune.json says it."""
    if images is None:
        return {}
    config = chosen.config if images.dataset == chosen.dataset else None
    return {
        "dataset": images.dataset,
        "hub": not Path(images.dataset).expanduser().exists(),
        "config": config,
        "split": images.split,
    }


# ------------------------------------------------------------------------------------------------------ what is said
def _hush(verbose: bool) -> None:
    """Keep the libraries' own chatter off the terminal; --verbose shows it."""
    if verbose:
        return
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("transformers", "timm", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Talk:
    """What the command says: results on stdout, what passes by on stderr; nothing at all when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def notes(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.aside(f"note: {note}")

    def stage(self, text: str) -> None:
        self.aside(f"{text} ...")

    def aside(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


class Progress:
    """Draws what the engine tells (dict events) and the count of evaluated images: a bar on a terminal, else lines."""

    def __init__(self, say: Talk) -> None:
        self.say = say
        self.bar: Any = None
        self.terminal = sys.stderr.isatty()
        self.began = time.monotonic()
        self.last = self.began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        _heed()
        if self.say.quiet:
            return
        kind = event["event"]
        if kind == "start":
            self._open(event["layers"], "pruning")
        elif kind == "layer":
            self._layer(event)
        elif kind == "warn":
            self._line(f"warning: {event['text']}")
        elif kind == "distill":
            self._distill(event)
        elif kind == "stage":
            if self.bar is not None:
                self.bar.set_description_str(_ended(event["text"], 34))
            else:
                self.say.stage(event["text"])

    def images(self, done: int, expected: int | None) -> None:
        """Called by the evaluation: images done, images expected if that is known."""
        if self.say.quiet:
            return
        if self.terminal:
            if self.bar is None:
                self._open(expected, "evaluating")
            self.bar.update(done - self.bar.n)
        elif done == expected or time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            self.say.aside(f"evaluated {done} images" if expected is None else f"evaluated {done} of {expected} images")

    def _open(self, total: int | None, what: str) -> None:
        self.began = time.monotonic()
        if self.terminal:
            from tqdm import tqdm

            form = "{desc:<34} {bar} {n_fmt}/{total_fmt} {remaining}{postfix}" if total else None
            self.bar = tqdm(total=total, desc=what, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def _distill(self, event: Mapping[str, Any]) -> None:
        """The epochs of the last pass over the whole network: a bar of their own, or a line each."""
        loss = f"{event['loss']:.3g} (was {event['before']:.3g})"
        if not self.terminal:
            said = f"distilled {event['done']} of {event['epochs']} epochs: loss on images kept out {loss}"
            self.say.stage(said)
            return
        if event["done"] == 0 or self.bar is None or self.bar.total != event["epochs"]:
            self.__exit__()
            self._open(event["epochs"], "distilling")
        self.bar.update(event["done"] - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss}")

    def _layer(self, event: Mapping[str, Any]) -> None:
        before, after = event.get("error_before"), event.get("error_after")
        error = f"error {before:.3f} -> {after:.3f}" if before is not None and after is not None else ""
        if self.bar is not None:
            self.bar.set_description_str(_ended(event["name"], 34), refresh=False)
            self.bar.set_postfix_str(error, refresh=False)
            self.bar.update()
            return
        index, total = event["index"], event["layers"]
        left = (time.monotonic() - self.began) / index * (total - index)
        width = len(str(total))
        self._line(f"{index:>{width}}/{total}  {_ended(event['name'], 38):<38} {error:<22} {_clock(left):>6} left")

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            self.say.aside(text.rstrip())


def _ended(text: str, width: int) -> str:
    """The end of a name is what tells it apart."""
    return text if len(text) <= width else "..." + text[3 - width :]


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
