"""A recipe is one named run: a short YAML file whose keys are the command's flags, with underscores, and the engine's.

    resolve("snows", flags={"nm": "2:4"}, sets=["solve.ridge=.05"]) -> Run

Order, the later wins: the recipe, `--set key=value`, the flags. Everything that is unknown, out of range or
contradictory is reported in one ValueError before anything is downloaded or loaded.

`resolve` gives the whole run of the command; `load` the engine's part alone, for `hf_prune.prune(model, batches)`.
`dump` writes a resolved run as the mapping that `resolve` reads back to an equal run.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import assets

if TYPE_CHECKING:
    from .loop import Recipe

DEFAULT = "snows"
# Public, ungated, photographs of 100 of the ImageNet-1k classes, with a validation split.
DATASET = "timm/mini-imagenet"
EVAL_SAMPLES = 1000  # an accuracy near one half is then known to 3 points, and minutes suffice on a CPU
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCOPES = ("layer", "row", "model")
PERMUTE = ("none", "magnitude", "activation", "obs")  # permute.SCORES, without its imports
ALLOCATIONS = ("magnitude", "lamp", "erk", "trace")

# Of one invocation, not of a run: a recipe that came from elsewhere must not decide about code, secrets or folders.
COMMAND_ONLY = (
    *("model", "recipe", "set", "revision", "token", "trust_remote_code", "output_dir"),
    *("dry_run", "resume", "overwrite", "quiet", "verbose", "version", "compressed", "compressed_only", "report"),
    *("push_to_hub", "push_revision", "private", "create_pr", "commit_message"),
    *("host_memory", "device_memory", "timeout"),
)
NESTED = ("target", "fisher", "distill")  # keys that hold a mapping of options
ROLES = ("mask", "solve", "refine")  # keys that name a method of hf_prune/methods and its options


@dataclass(frozen=True)
class Run:
    """A resolved run of the command: the engine's recipe, and where images come from and go to."""

    recipe: Recipe
    dataset: str = DATASET
    config: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    no_eval: bool = False
    eval_dataset: str | None = None
    eval_split: str | None = None
    eval_samples: int | None = None  # None: at most EVAL_SAMPLES
    device: str | None = None
    dtype: str | None = None


# ---------------------------------------------------------------------------------------------- what a value may be
def _whole(least: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if good else f"expected a whole number of at least {least}"

    return check


def _yes_no(value: Any) -> str | None:
    return None if isinstance(value, bool) else "expected true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "expected a text"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"choose one of {', '.join(choices)}"


def _nm(value: Any) -> str | None:
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
    if not found:
        return "expected N:M, for example 2:4"
    n, m = int(found[1]), int(found[2])
    return None if 0 < n < m else "N:M keeps N of every M weights, so 0 < N < M is needed"


def _sparsity(value: Any) -> str | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
    return None if good else "the share of zeros must lie between 0 and 1, for example 0.7"


def _patterns(value: Any) -> str | None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        return "expected a list of name patterns"
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                return f"{item!r} is not a regular expression ({error})"
    return None


def _device(value: Any) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"[a-z]+(:\d+)?", value)
    return None if good else "expected a device such as cpu, cuda or cuda:1"


def _method(value: Any) -> str | None:
    if value is None or (isinstance(value, Mapping) and isinstance(value.get("method"), str)):
        return None
    return "expected a method's name, or a mapping with a `method` and its options"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "expected a mapping of options"


KEYS: dict[str, Callable[[Any], str | None]] = {
    "name": _text,
    "description": _text,
    "mask": _method,
    "solve": _method,
    "refine": _method,
    "permute": _one_of(*PERMUTE),
    "target": _mapping,
    "stages": _whole(1),
    "schedule": _one_of("exponential", "linear", "cubic", "ratio"),
    "fisher": _mapping,
    "distill": _mapping,
    "batchnorm": _one_of("keep", "renew", "match", "auto"),
    "nm": _nm,
    "sparsity": _sparsity,
    "scope": _one_of(*SCOPES),
    "allocation": _one_of(*ALLOCATIONS),
    "only": _patterns,
    "skip": _patterns,
    "prune_stem": _yes_no,
    "prune_head": _yes_no,
    "seed": _whole(0),
    "samples": _whole(2),
    "batch_size": _whole(1),
    "dataset": _text,
    "config": _text,
    "split": _text,
    "image_column": _text,
    "label_column": _text,
    "no_eval": _yes_no,
    "eval_dataset": _text,
    "eval_split": _text,
    "eval_samples": _whole(1),
    "device": _device,
    "dtype": _one_of(*DTYPES),
}
EVAL_KEYS = ("eval_dataset", "eval_split", "eval_samples")
RUN_KEYS = tuple(field.name for field in fields(Run) if field.name != "recipe")


# ------------------------------------------------------------------------------------------------------ reading YAML
class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `2:4` is a text (YAML 1.1 reads the number 124), `1e-3` a number, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping behind a shipped recipe's name, a YAML or JSON file, or a mapping, with a `name` added.

    Raises ValueError for a name that does not ship, a file that is absent, is not YAML, or holds no mapping.
    """
    if isinstance(source, Mapping):
        return {"name": "custom", **source}
    text = str(source)
    if text in assets.names("recipes"):
        path = assets.path("recipes", text)
    elif Path(text).is_file():
        path = Path(text)
    else:
        shipped = assets.names("recipes")
        near = _nearest(text, shipped)
        raise ValueError(
            f"--recipe {text}: there is no such file, and the recipes that ship are {', '.join(shipped)}.{near}"
        )
    try:
        found = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or "it is not text in UTF-8"
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"--recipe {text}{line}: {problem}. A recipe is a YAML mapping.") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"--recipe {text}: expected a YAML mapping of keys to values, found {_short(found)}.")
    return {"name": path.stem, **found}


# ------------------------------------------------------------------------------------------------------- resolving
def resolve(
    source: str | Path | Mapping[str, Any] = DEFAULT,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    also: Iterable[str] = (),
) -> Run:
    """The run that a recipe, `--set` pairs and flags decide together.

    flags: keys of the recipe with the values typed by the user; a key that was not typed must be absent.
    sets: texts `key=value`, dotted keys reach into a mapping, values are YAML.
    also: what the caller found wrong already, to be said together with the rest.
    Raises one ValueError that lists every problem, each with the nearest valid names.
    """
    from .loop import Recipe

    problems = list(also)
    try:
        base = read(source)
    except ValueError as error:
        problems.append(str(error))
        base = {}
    label = f"recipe {base.get('name', source)}"
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    _contradictions(base, {key: f"{key} ({label})" for key in base}, problems)
    for key, value in base.items():
        if _known(key, label, problems):
            _put(merged, key, value)
            origin[key] = f"{key} ({label})"

    typed, typed_origin = _typed(flags or {}, sets, problems)
    _contradictions(typed, typed_origin, problems)
    _make_room(merged, typed)
    for key, value in typed.items():
        _put(merged, key, value)
        origin[key] = typed_origin[key]

    if "scope" in merged and "sparsity" not in merged:
        problems.append(f"{origin['scope']}: a scope belongs to --sparsity; N:M has none. Remove it.")
    if merged.get("allocation", "magnitude") != "magnitude" and merged.get("scope") != "model":
        problems.append(f"{origin['allocation']}: shares the zeros of a whole model among its layers. "
                        "Add --sparsity S and --scope model, or remove it.")  # fmt: skip
    if "nm" not in merged and "sparsity" not in merged:
        problems.append("what to keep is not said: give --nm N:M (for example --nm 2:4) or --sparsity S.")
    for key, value in list(merged.items()):
        wrong = KEYS[key](value)
        if wrong:
            problems.append(f"{origin[key]}: {wrong}, found {_short(value)}.")
            del merged[key]
    for role in ROLES:
        if merged.get(role) is not None:
            problems += _options(role, merged[role], origin[role])
    if "target" in merged:
        problems += _target(merged["target"], origin["target"])
    for key in ("fisher", "distill"):
        if key in merged:
            problems += _nested(key, merged[key], origin[key])
    if merged.get("mask", ...) is None:
        problems.append(f"{origin['mask']}: a mask method is needed, found none.")
    both = [name for name in merged.get("only", ()) if name in merged.get("skip", ())]
    if both:
        problems.append(f"{', '.join(map(repr, both))} stands in both only and skip: remove it from one.")
    if problems:
        raise ValueError(_listed(problems))

    engine = {key: value for key, value in merged.items() if key not in RUN_KEYS}
    for key in ("only", "skip"):
        if key in engine:
            engine[key] = tuple(engine[key])
    if "nm" in engine:
        engine["nm"] = engine["nm"].replace(" ", "")
    return Run(recipe=Recipe(**engine), **{key: value for key, value in merged.items() if key in RUN_KEYS})


def load(source: str | Path | Mapping[str, Any] | Recipe = DEFAULT, **overrides: Any) -> Recipe:
    """The engine's recipe behind a name, a path, a mapping or a Recipe; overrides win, mappings merge into mappings.

    Raises one ValueError that lists every problem. Keys that only the command reads (`dataset`, ...) do nothing here,
    so an override of one is an error; in a recipe file they are passed over.
    """
    from .loop import Recipe

    useless = [key for key in overrides if key in RUN_KEYS]
    if useless:
        raise ValueError(f"{', '.join(useless)}: only the hf-prune command reads this; pass the images as `batches`.")
    if isinstance(source, Recipe):
        source = _engine_mapping(source)
    return resolve(source, flags=overrides).recipe


def dump(run: Run) -> dict[str, Any]:
    """A resolved run as plain values; `resolve(dump(run)) == run`. Keys that were not given are left out."""
    out = _engine_mapping(run.recipe)
    for key in RUN_KEYS:
        value = getattr(run, key)
        if value is not None and value is not False:
            out[key] = value
    return out


def to_yaml(run: Run) -> str:
    """The resolved run as the text of a recipe file."""
    return yaml.safe_dump(dump(run), sort_keys=False, allow_unicode=True, width=110)


def _engine_mapping(recipe: Recipe) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in ("nm", "sparsity") and value is None:
            continue
        if field.name == "scope" and recipe.sparsity is None:
            continue
        if field.name == "allocation" and value == "magnitude":
            continue
        if field.name == "description" and not value:
            continue
        out[field.name] = (
            list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        )
    return out


# --------------------------------------------------------------------------------------------------------- the steps
def _typed(flags: Mapping[str, Any], sets: Iterable[str], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Flags and --set pairs as one mapping (nested for dotted keys), and how the user wrote each key."""
    typed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for pair in sets:
        path, equals, text = pair.partition("=")
        key, *inner = path.strip().split(".")
        if not equals or not key or not all(inner):
            problems.append(f"--set {pair}: expected key=value, for example --set solve.ridge=.05.")
            continue
        if not _known(key, "--set", problems):
            continue
        if inner and key not in ROLES and key not in NESTED:
            problems.append(f"--set {path}: {key} has no inner keys.")
            continue
        try:
            value = _parse(text)
        except yaml.YAMLError:
            problems.append(f"--set {pair}: {text!r} is not a YAML value.")
            continue
        for part in reversed(inner):
            value = {part: value}
        if isinstance(typed.get(key), dict) and isinstance(value, Mapping):
            typed[key].update(value)
        else:
            typed[key] = value
        origin[key] = f"--set {key}"
    for key, value in flags.items():
        if not _known(key, "flags", problems):
            continue
        flag = "--" + key.replace("_", "-")
        if key in typed and typed[key] != value and key not in ROLES and key not in NESTED:
            problems.append(f"{flag} {_short(value)} and --set {key}={_short(typed[key])} contradict each other.")
        typed[key] = value
        origin[key] = flag
    return typed, origin


def _make_room(merged: dict[str, Any], typed: Mapping[str, Any]) -> None:
    """What the user typed replaces the recipe's word on the same question, not only the key of the same name."""
    if "nm" in typed:
        merged.pop("sparsity", None)
        merged.pop("scope", None)
        merged.pop("allocation", None)
    if "sparsity" in typed:
        merged.pop("nm", None)
    if typed.get("no_eval") is True:
        for key in EVAL_KEYS:
            merged.pop(key, None)
    if any(key in typed for key in EVAL_KEYS):
        merged.pop("no_eval", None)


def _contradictions(values: Mapping[str, Any], origin: Mapping[str, str], problems: list[str]) -> None:
    if "nm" in values and "sparsity" in values:
        problems.append(f"{origin['nm']} and {origin['sparsity']} contradict each other: give one of them.")
    if values.get("no_eval") is True:
        for key in EVAL_KEYS:
            if key in values:
                problems.append(f"{origin['no_eval']} and {origin[key]} contradict each other: give one of them.")


def _put(merged: dict[str, Any], key: str, value: Any) -> None:
    """Write one key; options of the same method merge, another method starts from its own defaults."""
    if key in ROLES:
        if isinstance(value, str):
            value = None if value == "none" else {"method": value}
        old = merged.get(key, _default(key))
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("method", old["method"]) == old["method"]
        ):
            value = {**old, **value}
        merged[key] = dict(value) if isinstance(value, Mapping) else value
    elif key in NESTED and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
        merged[key] = {**merged[key], **value}
    elif key in ("only", "skip") and isinstance(value, str):
        merged[key] = [value]
    elif value is None and key not in ROLES:
        merged.pop(key, None)  # `key: null` gives the default back
    else:
        merged[key] = value


def _default(role: str) -> Any:
    """The method that the engine takes for a role when the recipe names none."""
    from .loop import Recipe

    made = next(field.default_factory for field in fields(Recipe) if field.name == role)
    return made() if callable(made) else None


def _options(role: str, value: Mapping[str, Any], origin: str) -> list[str]:
    """What is wrong with a method's name or options. Their defaults, and so their kinds, live in the method's file."""
    from . import methods

    known = methods.MASKS if role == "mask" else methods.SOLVES
    name = value["method"]
    if name not in known:
        return [f"{origin}: there is no method {name!r}; known: {', '.join(known)}.{_nearest(name, known)}"]
    given = {key: option for key, option in value.items() if key != "method"}
    return _arguments(methods.options("select" if role == "mask" else "solve", name), given, origin, name)


def _target(value: Mapping[str, Any], origin: str) -> list[str]:
    from .collect import Target

    parameters = inspect.signature(Target).parameters.values()
    return _arguments({p.name: p.default for p in parameters}, value, origin, "target")


def _nested(key: str, value: Mapping[str, Any], origin: str) -> list[str]:
    from . import distill, staged

    options = {"fisher": staged.Options, "distill": distill.Options}[key]
    parameters = inspect.signature(options).parameters.values()
    found = _arguments({p.name: p.default for p in parameters}, value, origin, key)
    if not found:
        try:
            options(**value)
        except ValueError as error:
            found.append(f"{origin}: {error}")
    return found


def _arguments(valid: Mapping[str, Any], given: Mapping[str, Any], origin: str, name: str) -> list[str]:
    """What is wrong with `given` beside the defaults `valid`: unknown names, values of another kind."""
    found = []
    for key, value in given.items():
        if key not in valid:
            known = f"it has {', '.join(valid)}" if valid else "it has no options"
            found.append(f"{origin}: {name} has no option {key!r}; {known}.{_nearest(key, valid)}")
        elif (wrong := _kind(value, valid[key])) is not None:
            found.append(f"{origin}: {name}.{key} {wrong}, found {_short(value)}.")
    return found


def _kind(value: Any, default: Any) -> str | None:
    """None when `value` is of the kind of `default`; a default of None says nothing about the kind."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "is true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "is a whole number"
    if isinstance(default, float):
        return None if isinstance(value, (int, float)) and not isinstance(value, bool) else "is a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "is a text"
    return None


def _known(key: Any, where: str, problems: list[str]) -> bool:
    if key in KEYS:
        return True
    if key in COMMAND_ONLY:
        flag = "--" + str(key).replace("_", "-")
        problems.append(f"{key} ({where}): this is said on the command line only ({flag}), never in a recipe.")
    else:
        problems.append(f"{key} ({where}): there is no such key.{_nearest(key, KEYS)}")
    return False


def _nearest(name: Any, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(valid), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems with this run:\n" + "\n".join(f"  - {problem}" for problem in problems)
