"""`hf-prune limit MODEL`: how sparse can this model go, measured and estimated, before anything is pruned."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli, recipe

if TYPE_CHECKING:
    from .calibration import ImageSet
    from .models import Loaded

HELD_OUT = 256  # images of another split that judge; without one, a quarter of the calibration images
OWN = ("eps", "probes", "steps", "width", "time_limit", "memory", "json", "nm")  # flags that are no keys of a recipe


def parser() -> argparse.ArgumentParser:
    top = cli._Parser(
        prog="hf-prune limit",
        usage="hf-prune limit MODEL [options]",
        description="How sparse can this model go? Measures what zeroing does, estimates what\n"
        "updating the kept weights may reach, says which layers matter. Prunes nothing.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    top.add_argument("model", metavar="MODEL", help="Hub id (timm/... too), or a local folder")
    group = top.add_argument_group("what to ask")
    group.add_argument("--eps", metavar="E", nargs="+", type=cli._number,
                       help="tolerated rises of the loss; default: auto .01 .05 .1 .2 .5")  # fmt: skip
    group.add_argument("--nm", metavar="N:M", help="is this pattern safe? default: 2:4")
    group.add_argument("--recipe", metavar="NAME|FILE", help="also prune with it, and measure that")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", help="a key of the recipe: solve.ridge=.05")
    group.add_argument("--skip", metavar="NAME", action="append", help="leave matching weights out (repeatable)")
    group.add_argument("--only", metavar="NAME", action="append", help="matching weights only (repeatable)")
    group.add_argument("--prune-stem", action="store_true", help="count the patch embedding or stem too")
    group.add_argument("--prune-head", action="store_true", help="count the classifier too")
    group = top.add_argument_group("how hard to try")
    group.add_argument("--probes", metavar="N", type=cli._whole, help="random vectors, default 16")
    group.add_argument("--steps", metavar="N", type=cli._whole, help="Lanczos steps each, default 32")
    group.add_argument("--width", metavar="W", type=float, help="stop once intervals are this narrow, default .01")
    group.add_argument("--time-limit", metavar="MIN", type=float, help="at most MIN minutes of products")
    group.add_argument("--memory", metavar="GIB", type=float, help="for vectors and graphs, default 2")
    group.add_argument("--seed", metavar="N", type=cli._whole, help="default 0")
    group.add_argument("--device", metavar="DEV", help="cpu, cuda, cuda:1, mps; default: what is there")
    group = top.add_argument_group("images")
    group.add_argument("--dataset", metavar="DATA", help="Hub id, image folder or parquet file")
    group.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    group.add_argument("--split", metavar="NAME", help="default: train")
    group.add_argument("--image-column", metavar="NAME", help="default: found by its type")
    group.add_argument("--label-column", metavar="NAME", help="default: found; none: the model's own answers")
    group.add_argument("--samples", metavar="N", type=cli._whole, help="calibration images, default 256")
    group.add_argument("--batch-size", metavar="N", type=cli._whole, help="images per step")
    group.add_argument("--eval-dataset", metavar="DATA", help="held-out images; default: the same dataset")
    group.add_argument("--eval-split", metavar="NAME", help="default: validation or test")
    group.add_argument("--eval-samples", metavar="N", type=cli._whole, help=f"default {HELD_OUT}")
    group.add_argument("--no-eval", action="store_true", help="no held-out images")
    group = top.add_argument_group("output and words")
    group.add_argument("--output-dir", metavar="DIR", help="write limit.txt, limit.json and the figure there")
    group.add_argument("--json", action="store_true", help="print JSON instead of the page")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model")
    group.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    group.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
    group.add_argument("--quiet", action="store_true", help="the page only")
    group.add_argument("--verbose", action="store_true", help="tracebacks, warnings of the libraries")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    return top


def run(words: Sequence[str]) -> int:
    """The command.  words: what was typed after `hf-prune limit`."""
    args = vars(parser().parse_args(words))
    judge = args.get("recipe")
    flags = {k: v for k, v in args.items() if k not in recipe.COMMAND_ONLY and k not in OWN}
    flags |= {"sparsity": 0.5, "scope": "model"}
    flags.setdefault("eval_samples", HELD_OUT) if not args.get("no_eval") else None
    chosen = recipe.resolve(judge or "magnitude", flags=flags, sets=args.get("set", ()), also=_mistakes(args))
    folder = Path(args["output_dir"]) if "output_dir" in args else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file; name a folder.")
    cli._hush(verbose=bool(args.get("verbose")))
    state = cli.process_state(chosen.device)
    say = cli.Talk(quiet=bool(args.get("quiet")) or not state.is_main_process)

    from . import limit, limit_page

    options = limit.Options(
        eps=tuple(args.get("eps", limit.EPS)),
        probes=args.get("probes", 16),
        steps=args.get("steps", 32),
        seed=chosen.recipe.seed,
        width=args.get("width", 0.01),
        seconds=60 * args["time_limit"] if "time_limit" in args else None,
        memory=args.get("memory", 2.0),
        nm=args.get("nm", "2:4"),
    )
    say.stage(f"loading {args['model']}")
    loaded = cli._load(args, chosen, cli.pick_device(chosen.device, state))
    say.notes(loaded.notes)
    engine = cli._with_names(chosen, loaded)
    say.stage(f"opening {chosen.dataset}")
    calibration = cli._images(chosen, args, state)
    judged = None if args.get("no_eval") else cli._eval_images(chosen, args, calibration, state, cli.Talk(quiet=True))
    batches, held, notes = _batches(loaded, chosen, calibration, judged, bool(args.get("no_eval")))
    say.notes([*calibration.notes, *notes])
    with cli._memory(chosen), _Progress(say) as progress:
        study = limit.limit(
            loaded.module, batches, held, recipe=engine, refit=engine if judge else None, options=options, tell=progress
        )
    study.notes += notes
    name = Path(args["model"]).resolve().name if Path(args["model"]).exists() else args["model"]
    told = limit_page.data(
        study, command=cli.spoken(["limit", *words]), source=loaded.source, revision=loaded.revision,
        recipe=chosen.recipe.name if judge else None, dataset=chosen.dataset,
    )  # fmt: skip
    text = limit_page.page(study, name, chosen.recipe.name if judge else None)

    def write() -> None:
        print(json.dumps(told, indent=1) if args.get("json") else text, flush=True)
        if folder is not None:
            try:
                limit_page.write(folder, text, told)
            except OSError as error:
                raise ValueError(f"--output-dir {folder} could not be written: {error.strerror or error}.") from error
            say.aside(f"\n{folder}/: {', '.join(limit_page.FILES)}")

    cli.on_main(state, write)
    return 0


def _mistakes(args: Mapping[str, Any]) -> list[str]:
    wrong = []
    for flag in ("width", "time_limit", "memory"):
        if flag in args and not args[flag] >= 0:
            wrong.append(f"--{flag.replace('_', '-')} {args[flag]}: must not be negative.")
    if args.get("set") and not args.get("recipe"):
        wrong.append("--set changes a recipe: give --recipe NAME too.")
    if "nm" in args and recipe.KEYS["nm"](args["nm"]):
        wrong.append(f"--nm {args['nm']}: {recipe.KEYS['nm'](args['nm'])}.")
    for flag in ("probes", "steps"):
        if flag in args and recipe._whole(1)(args[flag]):
            wrong.append(f"--{flag} {args[flag]}: {recipe._whole(1)(args[flag])}.")
    for eps in args.get("eps", ()):
        if eps != "auto" and not (isinstance(eps, float) and eps > 0):
            wrong.append(f"--eps {eps}: expected auto or numbers greater than 0, for example --eps auto .05 .2.")
    return wrong


def _batches(
    loaded: Loaded, chosen: recipe.Run, calibration: ImageSet, judged: ImageSet | None, alone: bool
) -> tuple[list[Any], list[Any], list[str]]:
    """(calibration batches, held-out batches, notes), with labels where both sets have the model's classes."""
    from . import ranks, staged
    from .calibration import batches
    from .labels import match

    notes: list[str] = []
    maps: list[list[int] | None] = []
    for each in (calibration, judged):
        found = None
        if each is not None and each.label_column is not None and loaded.has_logits:
            try:
                found = match(each.label_names, loaded.labels, loaded.num_classes).classes
            except ValueError as error:
                notes.append(f"the labels of {each.dataset} are not used: {error}")
        maps.append(found)
    if maps[0] is None or (judged is not None and maps[1] is None):
        maps = [None, None]
        if loaded.has_logits:
            notes.append("no labels: the classes that the dense model predicts stand in for them.")
    size = chosen.recipe.batch_size
    made = list(batches(calibration, loaded, size, maps[0]))
    if ranks.agree(calibration.yielded) < 2:
        raise ValueError(f"--dataset {chosen.dataset} gave one usable image; 2 are the least.")
    if alone:
        return made, [], notes
    if judged is not None:
        return made, list(batches(judged, loaded, size, maps[1])), notes
    inputs = [b[0] if isinstance(b, tuple) else b for b in made]
    train, rest = staged.hold_out(inputs, staged.labels_of(made), 0.25, chosen.recipe.seed)
    notes.append(f"{chosen.dataset} has one split: a quarter of its images is held out. --eval-dataset names others.")
    return _joined(*train), _joined(*rest), notes


def _joined(batches: list[Any], labels: list[Any]) -> list[Any]:
    return [b if t is None else (b, t) for b, t in zip(batches, labels, strict=True)]


class _Progress:
    """A bar with the current interval on a terminal, a line now and then elsewhere."""

    def __init__(self, say: cli.Talk) -> None:
        self.say, self.bar, self.interval = say, None, ""  # type: cli.Talk, Any, str
        self.terminal = sys.stderr.isatty()
        self.last = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self.say.quiet:
            return
        if event["event"] == "stage":
            self.open(event["text"], None)
            if not self.terminal:
                self.say.stage(event["text"])
        elif event["event"] == "count":
            self.move(event["text"], event["done"], event["of"])
        elif event["event"] == "product":
            if "interval" in event:
                low, high = event["interval"]
                self.interval = f"eps {event['eps']}: sparsity {low:.3f} to {high:.3f}"
            text = f"{event['matrix']}, probe {event['probe']}/{event['probes']}"
            self.move(text, event["step"], None)

    def open(self, text: str, total: int | None) -> None:
        self.interval = ""
        if self.terminal:
            from tqdm import tqdm

            if self.bar is None:
                form = "{desc:<48} {n_fmt} {elapsed} {postfix}"
                self.bar = tqdm(bar_format=form, dynamic_ncols=True, file=sys.stderr, leave=False)
            self.bar.n = 0
            self.bar.set_description_str(text[:48])

    def move(self, text: str, done: int, total: int | None) -> None:
        of = f" of {total}" if total else ""
        if self.terminal and self.bar is not None:
            self.bar.n = done
            self.bar.set_description_str(text[:48], refresh=False)
            self.bar.set_postfix_str(self.interval)
        elif time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            more = f"; {self.interval}" if self.interval else ""
            self.say.aside(f"{text}: {done}{of}{more}")
