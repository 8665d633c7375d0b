"""`hf-prune MODEL --nm 2:4`: arguments in, a pruned, measured and described folder out.

Slow libraries are imported when their turn comes: `--help`, a typo and a contradiction answer at once.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from .calibration import ImageSet
    from .models import Loaded
    from .prune import Plan
    from .recipe import Run

# First words that are commands of their own, and the module whose `run(arguments)` they call. A model folder of the
# same name is reached as ./demo.
COMMANDS = {"demo": "hf_prune.demo"}

EXAMPLES = """\
examples:
  hf-prune google/vit-base-patch16-224 --nm 2:4
  hf-prune ./my-model --sparsity 0.7 --dataset ./images --output-dir out

hf-prune demo      prune a small model that ships with hf-prune, offline
A recipe (--recipe FILE) holds the same keys as these flags; flags win.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hf-prune: {message}\nTry hf-prune --help.\n")


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
    group.add_argument("--skip", metavar="NAME", action="append", help="keep matching weights dense (repeatable)")
    group.add_argument("--only", metavar="NAME", action="append", help="prune matching weights only (repeatable)")
    group.add_argument("--prune-stem", action="store_true", help="prune the patch embedding or stem too")
    group.add_argument("--prune-head", action="store_true", help="prune the classifier too")

    group = top.add_argument_group("how")
    group.add_argument("--recipe", metavar="NAME|FILE", help="snows (default), snows-paper, magnitude, ...")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", help="a key of the recipe: solve.ridge=.05")
    group.add_argument("--seed", metavar="N", type=_whole, help="default 0")
    group.add_argument("--device", metavar="DEV", help="cpu, cuda, cuda:1, mps; default: what is there")
    group.add_argument("--dtype", metavar="DTYPE", help="of the written weights; default: as they were")

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
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model")
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
    """Run one command and return its exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C.

    argv: the words after `hf-prune`; None takes them from the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in words
    if words and words[0] in COMMANDS:
        return _guard(lambda: importlib.import_module(COMMANDS[words[0]]).run(words[1:]), verbose)
    if not words:
        parser().print_help()
        return 2
    try:
        args = parser().parse_args(words)
    except SystemExit as stop:  # argparse has printed what it had to say
        return int(stop.code or 0)
    return _guard(lambda: run(vars(args), words), verbose)


def _guard(work: Callable[[], int], verbose: bool) -> int:
    """Turn the exceptions that a user can mend into one message and an exit code."""
    try:
        return work()
    except ValueError as error:
        if verbose:
            traceback.print_exc()
        if str(error) and _speaks():
            print(f"hf-prune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if verbose:
            traceback.print_exc()
        print("\nhf-prune: stopped. Nothing was written to the output folder.", file=sys.stderr)
        return 130


def _speaks() -> bool:
    """Whether this process is the one that prints: rank 0, also before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def run(args: Mapping[str, Any], words: Sequence[str]) -> int:
    """The main command. args: what was typed. words: the command line, for the card."""
    from . import checkpoint, plan, recipe, report

    run = settle(args)
    say = print if _speaks() and not args.get("quiet") else _silent
    state = _state(run.device)
    device = _device(run.device, state)
    folder = Path(args.get("output_dir") or default_folder(args["model"], run))

    def check_folder() -> None:
        checkpoint.clean(folder)
        checkpoint.refuse_existing(folder, overwrite=bool(args.get("overwrite")), source=args["model"])
        checkpoint.refuse_unwritable(folder)

    if not args.get("dry_run"):
        _on_main(state, check_folder)
    _hush(args)
    loaded = _load(args, run, device)
    engine = _with_names(run, loaded)
    from . import prune

    planned = prune.plan(loaded.module, _probe(loaded), engine)
    say(plan.text(planned))
    say(plan.output(loaded.bytes()))
    plan.refuse_empty(planned)
    _on_main(state, lambda: checkpoint.refuse_full_disk(folder, loaded.bytes()))
    if args.get("dry_run"):
        say("Dry run: nothing was pruned and nothing was written.")
        return 0
    return 0
