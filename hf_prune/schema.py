"""What `hf_prune.json` holds, as a check: `problems(report)` says in words where a mapping departs from it.

The same contents in prose: docs/hf_prune.json.md. One version number for the whole file; a reader that finds a larger
one than it knows stops instead of guessing.
"""

from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _shape(value: Any) -> bool:
    return _list(value) and all(_count(size) for size in value)


def _interval(value: Any) -> bool:
    return _list(value) and len(value) == 2 and all(_number(end) for end in value) and value[0] <= value[1]


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


Keys = dict[str, tuple[Callable[[Any], bool], str]]  # key -> (check, what it must be, in words)

TOP: Keys = {
    "schema_version": (lambda value: value == VERSION, str(VERSION)),
    "recipe": (_mapping, "the resolved recipe, a mapping"),
    "model": (_mapping, "a mapping"),
    "pattern": (_text, 'the pattern in words, for example "2:4"'),
    "seed": (_count, "a whole number"),
    "versions": (
        lambda value: _mapping(value) and all(_text(v) for v in value.values()),
        "a mapping of name to version",
    ),
    "command": (_or_none(_text), "the command line as text, or null"),
    "created": (_text, "a time as text (ISO 8601, UTC)"),
    "layers": (_list, "a list"),
    "calibration": (_mapping, "a mapping"),
    "evaluation": (_or_none(_mapping), "a mapping, or null where nothing was evaluated"),
    "resources": (_mapping, "a mapping"),
}
# Keys that came later within version 1: a reader must do without them, but what is there must be right.
LATER: Keys = {
    "sha256": (
        lambda value: _mapping(value) and all(_text(v) and len(v) == 64 for v in value.values()),
        "a mapping of tensor name on disk to the sha256 of its bytes",
    ),
    "stages": (
        lambda value: _list(value) and all(_mapping(v) and _number(v.get("sparsity")) for v in value),
        'a list of mappings with at least "sparsity"',
    ),
    "distillation": (
        lambda value: _mapping(value) and _count(value.get("epochs")) and _list(value.get("history")),
        'a mapping with at least "epochs" and "history"',
    ),
    "compressed": (
        lambda value: (
            value is None or (_mapping(value) and _text(value.get("file")) and value.get("only") in (True, False))
        ),
        'null, or {"file": name, "only": true or false}',
    ),
    "speed": (
        lambda value: (
            value is None
            or (_mapping(value) and all(_text(value.get(k)) for k in ("device", "torch", "dtype"))
                and all(_list(value.get(k)) for k in ("layers", "chosen", "whole")))
        ),
        'null, or {"device", "torch", "dtype", "layers", "chosen", "whole"}',
    ),
    "permutation": (
        lambda value: value is None or (_mapping(value) and _text(value.get("score")) and _list(value.get("groups"))),
        'null, or {"score": name, "groups": list}',
    ),
    "other_evaluations": (
        lambda value: _list(value) and all(_mapping(each) for each in value),
        "a list of evaluations on other images",
    ),
    "pictures": (
        lambda value: (
            _list(value)
            and all(_mapping(v) and all(_text(v.get(key)) for key in ("file", "title", "words")) for v in value)
        ),
        "a list of {file, title, words}",
    ),
}
MODEL: Keys = {
    "source": (_text, "the model as the user named it"),
    "revision": (_or_none(_text), "a commit, or null for a local folder"),
    "library": (lambda value: value in ("transformers", "timm", "torch"), '"transformers", "timm" or "torch"'),
    "architecture": (_text, "the class of the module"),
    "dtype": (_text, "the dtype of the stored weights"),
    "license": (_or_none(_text), "a licence identifier, or null where none was stated"),
    "parameters": (_count, "a whole number"),
}
LAYER: Keys = {
    "name": (_text, "the name of the weight in memory"),
    "checkpoint_name": (_text, "the name of the weight on disk"),
    "shape": (_shape, "a list of sizes"),
    "pattern": (_or_none(_text), "the pattern, or null for a weight that stays dense"),
    "kept": (_count, "a whole number"),
    "total": (_count, "a whole number"),
    "error_before": (_or_none(_number), "a number, or null"),
    "error_after": (_or_none(_number), "a number, or null"),
    "weight_norm_ratio": (_or_none(_number), "a number, or null"),
    "seconds": (_or_none(_number), "a number, or null"),
    "dense_reason": (_or_none(_text), "a sentence, or null for a pruned weight"),
}
CALIBRATION: Keys = {
    "samples": (_count, "a whole number"),
    "skipped": (_count, "a whole number"),
}
EVALUATION: Keys = {
    "samples": (_count, "a whole number"),
    "logit_error": (_or_none(_number), "a number, or null for a bare backbone"),
}
RESOURCES: Keys = {
    "seconds": (_number, "a number"),
    "peak_host_bytes": (_or_none(_count), "a whole number, or null where the system does not say"),
    "peak_device_bytes": (_or_none(_count), "a whole number, or null on a CPU"),
    "device": (_text, "a device"),
    "world_size": (lambda value: _count(value) and value >= 1, "at least 1"),
}
RESOURCES_LATER: Keys = {
    "cpu_seconds": (_number, "a number"),
    "by_stage": (
        lambda value: _mapping(value) and all(
            _mapping(v) and _number(v.get("seconds")) and _number(v.get("cpu_seconds")) for v in value.values()
        ),
        'a mapping of stage to {"seconds", "cpu_seconds"}',
    ),
}


def problems(report: Any) -> list[str]:
    """Every departure of `report` from the schema, one sentence each; empty when it is valid."""
    if not isinstance(report, Mapping):
        return [f"the report must be a mapping, found {type(report).__name__}."]
    version = report.get("schema_version")
    if isinstance(version, int) and version > VERSION:
        return [f"schema_version is {version}, this hf_prune reads up to {VERSION}: install a newer hf_prune."]
    found = _against(report, TOP, "")
    found += _against(report, {key: check for key, check in LATER.items() if key in report}, "")
    for key, keys in (("model", MODEL), ("calibration", CALIBRATION), ("resources", RESOURCES)):
        if isinstance(report.get(key), Mapping):
            found += _against(report[key], keys, f"{key}.")
    if isinstance(report.get("resources"), Mapping):
        there = {key: check for key, check in RESOURCES_LATER.items() if key in report["resources"]}
        found += _against(report["resources"], there, "resources.")
    for index, layer in enumerate(report["layers"] if isinstance(report.get("layers"), list) else []):
        found += _layer(layer, f"layers[{index}].")
    if isinstance(report.get("evaluation"), Mapping):
        found += _evaluation(report["evaluation"])
    for other in report.get("other_evaluations") or () if not found else ():
        found += _evaluation(other)
    return found


def _against(values: Mapping[str, Any], keys: Keys, where: str) -> list[str]:
    found = []
    for key, (check, words) in keys.items():
        if key not in values:
            found.append(f"{where}{key} is missing: {words}.")
        elif not check(values[key]):
            found.append(f"{where}{key} must be {words}, found {values[key]!r}.")
    return found


def _layer(layer: Any, where: str) -> list[str]:
    if not isinstance(layer, Mapping):
        return [f"{where[:-1]} must be a mapping, found {layer!r}."]
    found = _against(layer, LAYER, where)
    if found:
        return found
    if layer["kept"] > layer["total"]:
        found.append(f"{where}kept is {layer['kept']}, more than the total of {layer['total']}.")
    if (layer["pattern"] is None) == (layer["dense_reason"] is None):
        found.append(f"{where}pattern and dense_reason: exactly one of the two must be null.")
    return found


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    found = _against(evaluation, EVALUATION, "evaluation.")
    for side in ("dense", "pruned"):
        scores = evaluation.get(side)
        if scores is None:  # a bare backbone has no classes, hence no accuracy
            continue
        if not isinstance(scores, Mapping):
            found.append(f"evaluation.{side} must be a mapping or null, found {scores!r}.")
            continue
        for metric in ("top1", "top5"):
            if not _or_none(_share)(scores.get(metric)):
                found.append(f"evaluation.{side}.{metric} must be between 0 and 1, found {scores.get(metric)!r}.")
            interval = scores.get(f"{metric}_interval")
            if not _or_none(_interval)(interval):
                found.append(f"evaluation.{side}.{metric}_interval must be [low, high], found {interval!r}.")
    if not _or_none(_share)(evaluation.get("agreement")):
        found.append(f"evaluation.agreement must be between 0 and 1, found {evaluation.get('agreement')!r}.")
    return found
