"""Recipes of `hf-prune train`: YAML files whose keys are its flags, with underscores, and the methods' options.

    resolve("lenet300-mnist", flags={"method": "imp", "sparsity": 0.95}, sets=["imp.rewind=2"]) -> Training

A recipe names a network and a dataset and holds options for every method, so one file serves a whole table. Order, the
later wins: the recipe, `--set key=value`, the flags. Everything that is wrong is said in one ValueError, before any
data is opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from . import assets, phases, recipe
from .pattern import Pattern

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("cosine", "steps", "constant")
AUGMENT = ("none", "crop", "crop-flip")
PRECISIONS = ("no", "bf16", "fp16")
NESTED = {"lomp": "lomp", "imp": "imp", "rare_gems": "rare-gems", "smart_ratio": "smart-ratio"}  # key -> method


@dataclass(frozen=True)
class Training:
    """A resolved run of `hf-prune train`."""

    method: str
    network: str
    dataset: str
    nm: str | None = None
    sparsity: float | None = None
    scope: str = "model"
    skip: tuple[str, ...] = ()
    config: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    samples: int | None = None  # training images at most; None: all
    eval_dataset: str | None = None
    eval_split: str | None = None
    validation: float = 0.1  # share of the training images that is kept out, to choose λ by
    image_size: int | None = None
    augment: str = "none"
    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)  # of "steps": shares of the schedule after which lr falls tenfold
    warmup: int = 0  # epochs
    precision: str = "no"
    device: str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, resolved
    name: str = "custom"
    description: str = ""

    def pattern(self) -> Pattern | None:
        if self.method == "dense":
            return None
        if self.nm:
            return Pattern.parse(self.nm)
        assert self.sparsity is not None
        return Pattern.unstructured(self.sparsity, self.scope)

    def settings(self) -> Any:
        """The method's options as its dataclass of phases.py; None for dense."""
        return phases.OPTIONS[self.method](**self.options) if self.method in phases.OPTIONS else None


# ---------------------------------------------------------------------------------------------- what a value may be
def _above(least: float, most: float = float("inf")) -> Callable[[Any], str | None]:
    words = f"expected a number above {least:g}" + (f" and below {most:g}" if most < float("inf") else "")

    def check(value: Any) -> str | None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and least < value < most
        return None if good else words

    return check


def _from(least: float, most: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < most
        return None if good else f"expected a number from {least:g} to below {most:g}"

    return check


def _shares(value: Any) -> str | None:
    good = isinstance(value, (list, tuple)) and all(_above(0, 1)(each) is None for each in value)
    return None if good else "expected a list of numbers between 0 and 1"


def _numbers(value: Any) -> str | None:
    good = isinstance(value, (list, tuple)) and len(value) > 0 and all(_above(0)(each) is None for each in value)
    return None if good else "expected a list of numbers above 0"


def _auto_or(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def either(value: Any) -> str | None:
        wrong = None if value == "auto" else check(value)
        return wrong and f"{wrong}, or auto"

    return either


def _strings(value: Any) -> str | None:
    good = isinstance(value, (list, tuple)) and all(isinstance(each, str) and each for each in value)
    return None if good else "expected a list of weight names"


KEYS: dict[str, Callable[[Any], str | None]] = {
    "name": recipe._text,
    "description": recipe._text,
    "method": recipe._one_of(*phases.METHODS),
    "network": recipe._text,
    "nm": recipe._nm,
    "sparsity": recipe._sparsity,
    "scope": recipe._one_of("model", "layer"),
    "skip": _strings,
    "dataset": recipe._text,
    "config": recipe._text,
    "split": recipe._text,
    "image_column": recipe._text,
    "label_column": recipe._text,
    "samples": recipe._whole(2),
    "eval_dataset": recipe._text,
    "eval_split": recipe._text,
    "validation": _above(0, 1),
    "image_size": recipe._whole(4),
    "augment": recipe._one_of(*AUGMENT),
    "epochs": recipe._whole(1),
    "batch_size": recipe._whole(2),
    "optimizer": recipe._one_of(*OPTIMIZERS),
    "lr": _above(0),
    "momentum": _from(0, 1),
    "weight_decay": _from(0, 1),
    "schedule": recipe._one_of(*SCHEDULES),
    "milestones": _shares,
    "warmup": recipe._whole(0),
    "precision": recipe._one_of(*PRECISIONS),
    "device": recipe._device,
    "seed": recipe._whole(0),
    **dict.fromkeys(NESTED, recipe._mapping),
}
OPTIONS: dict[str, dict[str, Callable[[Any], str | None]]] = {
    "lomp": {
        "l1": _auto_or(_from(0, 10)),
        "grid": _numbers,
        "eps": _auto_or(_above(0)),
        "proximal": recipe._yes_no,
        "choose": recipe._one_of("dense", "pruned"),
    },
    "imp": {"rewind": recipe._whole(0), "share": _above(0, 1), "through": _shares},
    "rare_gems": {"epochs": recipe._whole(0), "every": recipe._whole(1), "lr": _above(0), "decay": _from(0, 1)},
    "smart_ratio": {"linear": _from(0, 1)},
}
# Of one invocation: a recipe that came from elsewhere must not decide about secrets or folders.
COMMAND_ONLY = ("recipe", "set", "token", "output_dir", "overwrite", "resume", "dry_run", "quiet", "verbose", "l1")


def read(source: str | Path) -> dict[str, Any]:
    """The mapping behind a shipped recipe's name or a file. Raises ValueError as hf_prune.recipe.read does."""
    text, shipped = str(source), assets.names("recipes/train")
    if text not in shipped and not Path(text).is_file():
        raise ValueError(
            f"--recipe {text}: there is no such file, and the training recipes that ship are {', '.join(shipped)}."
            f"{recipe._nearest(text, shipped)}"
        )
    return recipe.read(assets.path("recipes/train", text) if text in shipped else Path(text))


def resolve(
    source: str | Path | None, *, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = (), l1: Any = None
) -> Training:
    """The run that a recipe (None: none), `--set` pairs and flags decide together; l1: the flag --l1.

    Raises one ValueError that lists every problem, each with the nearest valid names.
    """
    problems: list[str] = []
    base: dict[str, Any] = {}
    if source is not None:
        try:
            base = read(source)
        except ValueError as error:
            problems.append(str(error))
    unread = bool(problems)
    label = f"recipe {base.get('name', source)}"
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def put(key: str, value: Any, said: str) -> None:
        if key not in KEYS:
            why = (
                "this is said on the command line only, never in a recipe."
                if key in COMMAND_ONLY
                else f"there is no such key.{recipe._nearest(key, KEYS)}"
            )
            problems.append(f"{key} ({said}): {why}")
            return
        if key in NESTED and isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            value = {**values[key], **value}
        if key in ("skip",) and isinstance(value, str):
            value = [value]
        values[key] = value
        origin[key] = said

    for key, value in base.items():
        put(str(key), value, f"{key} ({label})")
    if "nm" in values and "sparsity" in values:
        problems.append(f"nm and sparsity ({label}) contradict each other: give one of them.")
    typed: dict[str, str] = {}  # nested keys of the user, as written
    for pair in sets:
        path, equals, text = pair.partition("=")
        key, *inner = path.strip().split(".")
        if not equals or len(inner) > 1 or (inner and key not in NESTED):
            problems.append(f"--set {pair}: expected key=value, for example --set epochs=50 or --set imp.rewind=2.")
            continue
        try:
            value = recipe._parse(text)
        except yaml.YAMLError:
            problems.append(f"--set {pair}: {text!r} is not a YAML value.")
            continue
        put(key, {inner[0]: value} if inner else value, f"--set {path}")
        if key in NESTED:
            typed[key] = f"--set {path}"
    if l1 is not None:
        put("lomp", {"l1": l1}, "--l1")
        typed["lomp"] = "--l1"
    flags = dict(flags or {})
    if "nm" in flags and "sparsity" in flags:
        problems.append("--nm and --sparsity contradict each other: give one of them.")
    elif "nm" in flags:
        values.pop("sparsity", None)
    elif "sparsity" in flags:
        values.pop("nm", None)
    for key, value in flags.items():
        put(key, value, "--" + key.replace("_", "-"))
    return _checked(values, origin, typed, problems, unread)


def _checked(
    values: dict[str, Any], origin: Mapping[str, str], typed: Mapping[str, str], problems: list[str], unread: bool
) -> Training:
    """unread: the recipe could not be read, so what is missing may be in it."""
    from .networks import NETWORKS

    given_keys = set(values)
    for key, value in list(values.items()):
        if (wrong := KEYS[key](value)) is not None:
            problems.append(f"{origin[key]}: {wrong}, found {recipe._short(value)}.")
            del values[key]
    for key, given in ((key, values[key]) for key in NESTED if key in values):
        for name, value in given.items():
            if name not in OPTIONS[key]:
                known = ", ".join(OPTIONS[key])
                near = recipe._nearest(name, OPTIONS[key])
                problems.append(f"{origin[key]}: {key} has no option {name!r}; it has {known}.{near}")
            elif (wrong := OPTIONS[key][name](value)) is not None:
                problems.append(f"{origin[key]}: {key}.{name}: {wrong}, found {recipe._short(value)}.")
    for key, what in (("method", f"choose one of {', '.join(phases.METHODS)}"), ("dataset", "Hub id, folder or file"),
                      ("network", f"choose one of {', '.join(NETWORKS)}")):  # fmt: skip
        if key not in given_keys and (key == "method" or not unread):
            problems.append(f"--{key} is not said, and no recipe says it: {what}.")
    network = values.get("network")
    if network is not None and network not in NETWORKS:
        near = recipe._nearest(network, NETWORKS)
        problems.append(f"{origin['network']}: there is no network {network!r}; known: {', '.join(NETWORKS)}.{near}")
    method = values.get("method")
    if method is not None:
        problems += _of_the_method(method, values, origin, typed)
    if values.get("device") and values.get("precision") == "fp16" and str(values["device"]).startswith("cpu"):
        problems.append(f"{origin['precision']}: fp16 needs an accelerator; on a CPU take bf16 or no.")
    if problems:
        raise ValueError(recipe._listed(list(dict.fromkeys(problems))))

    options = values.get(next((key for key, name in NESTED.items() if name == method), ""), {})
    settings = phases.OPTIONS[method](**_tuples(options)) if method in phases.OPTIONS else None
    names = {each.name for each in fields(Training)}
    plain = {key: value for key, value in _tuples(values).items() if key in names}
    if method == "dense":
        plain.pop("nm", None), plain.pop("sparsity", None)
    return Training(**plain, options=asdict(settings) if settings is not None else {})


def _of_the_method(
    method: str, values: Mapping[str, Any], origin: Mapping[str, str], typed: Mapping[str, str]
) -> list[str]:
    """What does not go together with the method."""
    found = []
    for key, said in typed.items():
        if NESTED[key] != method:
            found.append(f"{said} has no effect with --method {method}: it is an option of {NESTED[key]}.")
    level = next((key for key in ("nm", "sparsity") if key in values), None)
    if method == "dense":
        if level and origin[level].startswith("--"):
            found.append(f"{origin[level]}: dense prunes nothing; leave it out, or choose another method.")
    elif level is None:
        found.append("what to keep is not said: give --sparsity S (for example --sparsity 0.95) or --nm N:M.")
    if method == "smart-ratio" and "nm" in values:
        found.append(
            f"{origin['nm']}: smart-ratio gives every layer a share of its own, and n:m gives all the same; "
            f"take --sparsity, or another method."
        )
    if "scope" in values and "nm" in values:
        found.append(f"{origin['scope']}: a scope belongs to --sparsity; n:m has none. Remove it.")
    if method == "smart-ratio" and values.get("scope") == "layer":
        found.append(f"{origin['scope']}: smart-ratio decides the layers' shares itself; remove it.")
    epochs, rewind = values.get("epochs", 20), values.get("imp", {}).get("rewind", phases.Imp.rewind)
    if method == "imp" and isinstance(epochs, int) and isinstance(rewind, int) and rewind >= epochs:
        found.append(f"imp.rewind {rewind}: it must be less than the {epochs} epochs of a round.")
    if values.get("warmup", 0) and values["warmup"] >= epochs:
        found.append(f"{origin['warmup']}: the warm-up must be shorter than the {epochs} epochs.")
    return found


def dump(chosen: Training) -> dict[str, Any]:
    """A resolved run as plain values, under the keys of a recipe; defaults included, so that they are on record."""
    out: dict[str, Any] = {}
    for each in fields(chosen):
        value = getattr(chosen, each.name)
        if each.name == "options":
            if value:
                key = next(key for key, name in NESTED.items() if name == chosen.method)
                out[key] = {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}
        elif value is not None and value != "":
            out[each.name] = list(value) if isinstance(value, tuple) else value
    return out


def to_yaml(chosen: Training) -> str:
    return yaml.safe_dump(dump(chosen), sort_keys=False, allow_unicode=True, width=110)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


assert all(set(inspect.signature(phases.OPTIONS[name]).parameters) == set(OPTIONS[key]) for key, name in NESTED.items())
