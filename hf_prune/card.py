"""The model card of a pruned model: README.md, rendered from `hf_prune.json` alone, without network.

Every number in it was measured in the run; what was not measured is said to be so. Everything that came from outside
(names of models, datasets and labels, licences, the command) is shown as code or quoted by YAML, so that a name cannot
smuggle in markdown, HTML, YAML or a template expression.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from . import assets
from .checkpoint import size
from .intervals import percent

URL = "https://pypi.org/project/hf-prune"
# owner/name or the old bare name, as the Hub allows them; anything else is a local path
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def render(report: Mapping[str, Any], *, name: str | None = None) -> str:
    """The card's text. report: as hf_prune/schema.py says. name: of the pruned model, for the title and the snippet."""
    from huggingface_hub import ModelCard

    title = _line(name or f"{_basename(report['model']['source'])}-{slug(report['pattern'])}")
    command = _visible(report["command"] or "hf_prune.prune(model, batches, recipe) in Python")
    recipe = yaml.safe_dump(dict(report["recipe"]), sort_keys=False, allow_unicode=True).strip()
    card = ModelCard.from_template(
        metadata(report, title),
        template_str=assets.path("model_cards", "template").read_text(encoding="utf-8"),
        title=code(title),
        intro=_intro(report),
        pattern_words=_pattern_words(report["pattern"]),
        weights_words=_weights_words(report["layers"]) + _order_words(report),
        stored_words=_stored_words(report),
        snippet=_snippet(report, title),
        results=_results(report),
        pictures=_pictures(report),
        speed_words=_speed_words(report),
        speed=_speed(report),
        fence=_fence(command + "\n" + recipe),
        command=command,
        recipe_words=_recipe_words(report["recipe"]),
        recipe=_visible(recipe, keep_lines=True),
        calibration=_calibration(report),
        resources=_resources(report["resources"]),
        layer_words=_layer_words(report["layers"]),
        layer_table=_layer_table(report["layers"]),
        limits="\n".join(f"- {limit}" for limit in _limits(report)),
        versions=_table(("package", "version"), [(code(k), code(v)) for k, v in report["versions"].items()]),
    )
    return str(card).rstrip() + "\n"


def metadata(report: Mapping[str, Any], title: str) -> Any:
    """The YAML head as huggingface_hub's ModelCardData; keys whose value is unknown are left out."""
    from huggingface_hub import EvalResult, ModelCardData

    model = report["model"]
    nm = [report["pattern"]] if re.fullmatch(r"\d+:\d+", report["pattern"]) else []
    results = []
    for part in evaluations(report):
        if not part.get("pruned"):
            continue
        data, hub = part.get("dataset") or "unknown", _on_hub(part)
        for key, words, kind in (("top1", "top-1 accuracy", "accuracy"), ("top5", "top-5 accuracy", "top_5_accuracy")):
            if part["pruned"].get(key) is not None:
                results.append(
                    EvalResult(
                        task_type="image-classification",
                        dataset_type=_line(data) if hub else "local",
                        dataset_name=_line(data) if hub else _basename(data),
                        dataset_config=_optional(part.get("config")),
                        dataset_split=_optional(part.get("split")),
                        metric_type=kind,
                        metric_value=part["pruned"][key],
                        metric_name=words,
                        metric_args={"images": part["samples"]},
                    )
                )
    used = list(dict.fromkeys(p["dataset"] for p in (report["calibration"], *evaluations(report)) if _on_hub(p)))
    more: dict[str, Any] = {"model_name": title, "eval_results": results} if results else {}
    return ModelCardData(
        base_model=model["source"] if _on_hub(model, "source") else None,
        library_name=model["library"] if model["library"] in ("transformers", "timm") else "pytorch",
        pipeline_tag="image-classification" if model.get("classes") else "image-feature-extraction",
        license=_optional(model["license"]),
        datasets=used or None,
        tags=["pruned", "sparse", *nm, "hf-prune"],
        **more,
    )


# ----------------------------------------------------------------------------------------------------- what is said
def _intro(report: Mapping[str, Any]) -> str:
    model = report["model"]
    source = model["source"]
    if _on_hub(model, "source"):
        # the id was checked character by character, so it can stand in a link
        base = f"[{code(source)}](https://huggingface.co/{source})"
    else:
        base = f"the local model {code(_basename(source))}"
    at = f" (revision {code(model['revision'])})" if model["revision"] else ""
    then = "then distilled on its calibration images" if _taught(report) else "without retraining"
    return (
        f"This is {base}{at}, pruned once, {then}, by [hf-prune]({URL}) "
        f"with the recipe {code(report['recipe'].get('name', 'custom'))}."
    )


def _taught(report: Mapping[str, Any]) -> bool:
    """Whether the weights are those of an epoch of distillation."""
    return bool((report.get("distillation") or {}).get("kept"))


def _pattern_words(pattern: str) -> str:
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found:
        return f"Pattern {pattern}: of every {found[2]} consecutive input weights at most {found[1]} are not zero."
    return f"Pattern: {code(pattern)} of the pruned weights are zero, at free positions."


def _weights_words(layers: Sequence[Mapping[str, Any]]) -> str:
    pruned = [layer for layer in layers if layer["pattern"]]
    total = sum(layer["total"] for layer in pruned)
    kept = sum(layer["kept"] for layer in pruned)
    zeros = 100 * (1 - kept / total) if total else 0.0
    return (
        f"{len(pruned)} of {len(layers)} weight tensors follow it; {zeros:.1f} % of their {total:,} entries are zero, "
        f"each tensor was checked against the pattern before it was written."
    )


def reordered(report: Mapping[str, Any]) -> int:
    """How many sets of channels were put in another order."""
    groups = (report.get("permutation") or {"groups": []})["groups"]
    return sum(group["reason"] is None for group in groups)


def _order_words(report: Mapping[str, Any]) -> str:
    """That weights do not stand where the dense model has them, where channels were reordered."""
    moved = reordered(report)
    if not moved:
        return ""
    sets = "One set of channels was" if moved == 1 else f"{moved} sets of channels were"
    return (
        f" {sets} put in another order before that, which leaves what the dense model computes as it was; their "
        "weights do not stand where the dense model has them."
    )


def _speed_words(report: Mapping[str, Any]) -> str:
    speed = report.get("speed")
    if not speed:
        return "No inference speed was measured."
    if not speed["chosen"]:
        return f"Timed on {_prose(speed['device'])}: no gain from 2:4 there."
    return f"Timed on {_prose(speed['device'])}: see below."


def _speed(report: Mapping[str, Any]) -> str:
    """The section of `hf-prune bench`; empty where nothing was timed."""
    speed = report.get("speed")
    if not speed:
        return ""
    rows = [
        (str(w["batch"]), f"{1e3 * w['dense']:.2f}", f"{1e3 * w['sparse']:.2f}", f"{w['dense'] / w['sparse']:.2f}")
        for w in speed["whole"]
    ]
    timed = len({layer["name"] for layer in speed["layers"]})
    said = (
        f"On {_prose(speed['device'])}, {_prose(speed['dtype'])}, torch {_prose(speed['torch'])}: of {timed} linear "
        f"layers {len(speed['chosen'])} are faster as 2:4 (`torch.sparse.to_sparse_semi_structured`)"
    )
    if not speed["chosen"]:
        return f"### Speed\n\n{said}; the model is best left dense there."
    table = _table(("batch", "dense, ms", "2:4 layers, ms", "ratio"), rows)
    return f"### Speed\n\n{said}; with these sparse and the others dense the whole model took\n\n{table}"


def _stored_words(report: Mapping[str, Any]) -> str:
    compressed = report.get("compressed")
    if not compressed:
        return "The zeros are stored: the file is as large as a dense one, and it loads everywhere a dense one does."
    file = code(compressed["file"])
    if compressed["only"]:
        return (
            f"The weights are stored without their zeros in {file}, which only [hf-prune]({URL}) reads; to the same "
            f"bits, or not at all. `hf-prune convert` writes them dense."
        )
    return (
        f"The zeros are stored in the dense file, which loads everywhere; {file} holds the same weights without them, "
        f"for [hf-prune]({URL}) alone."
    )


def _snippet(report: Mapping[str, Any], title: str) -> str:
    folder = re.sub(r"[^\w./-]", "_", title)
    compressed = report.get("compressed")
    if compressed and compressed["only"]:
        return f'import hf_prune  # pip install hf-prune\n\nmodel = hf_prune.load("{folder}")'
    if report["model"]["library"] == "timm":
        return f'import timm\n\nmodel = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    if report["model"]["library"] == "transformers":
        auto = "AutoModelForImageClassification" if report["model"].get("classes") else "AutoModel"
        return (
            f"from transformers import AutoImageProcessor, {auto}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{folder}")\n'
            f'model = {auto}.from_pretrained("{folder}")'
        )
    return f'from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file("{folder}/model.safetensors"))'


def _results(report: Mapping[str, Any]) -> str:
    if not report["evaluation"]:
        return "**Not evaluated.** Nothing is known about this model's accuracy."
    return "\n\n".join(_evaluation(part) for part in evaluations(report))


def evaluations(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The last evaluation, then those on other images."""
    return [part for part in (report["evaluation"], *(report.get("other_evaluations") or ())) if part]


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    rows = []
    dense, pruned, change = evaluation.get("dense"), evaluation.get("pruned"), evaluation.get("difference")
    for key, words in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        if dense and pruned and dense.get(key) is not None and pruned.get(key) is not None:
            rows.append((words, percent(dense, key), percent(pruned, key)))
            if change and change.get(key) is not None:
                low, high = (100 * end for end in change[f"{key}_interval"])
                points = f"{100 * change[key]:+.1f} [{low:+.1f}, {high:+.1f}]"
                rows.append(("... its change in points, image by image", "", points))
    if dense and pruned and dense.get("ece") is not None and pruned.get("ece") is not None:
        rows.append(("expected calibration error", f"{100 * dense['ece']:.1f} %", f"{100 * pruned['ece']:.1f} %"))
    if evaluation.get("agreement") is not None:
        rows.append(("same top-1 answer as the dense model", "", percent(evaluation, "agreement")))
    for key, what in (("logit_error", "logits"), ("representation_error", "representations")):
        if evaluation.get(key) is not None:
            interval = evaluation.get(f"{key}_interval")
            around = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
            rows.append((f"relative squared error of the {what}", "0", f"{evaluation[key]:.4g}{around}"))
    data = evaluation.get("dataset")
    where = f" of {_dataset(evaluation)}" if data else ""
    skipped = (
        f" {evaluation['skipped']} images could not be decoded and were left out." if evaluation.get("skipped") else ""
    )
    by = "with `hf-prune eval`, later" if evaluation.get("command") else "by the run that made this model"
    said = f"Dense and pruned on the same {evaluation['samples']} images{where}, {by}.{skipped}"
    intervals = (
        " In brackets: 95 % intervals over the choice of images."
        if any("[" in cell for r in rows for cell in r)
        else ""
    )
    notes = "".join(f"\n- {_prose(note)}" for note in evaluation.get("notes") or ())
    table = _table(("", "dense", "pruned"), rows)
    return said + intervals + "\n\n" + table + _worst(evaluation) + (notes and "\n" + notes)


def _pictures(report: Mapping[str, Any]) -> str:
    """The pictures beside the card, each with the sentence that says the same."""
    shown = []
    for picture in report.get("pictures") or ():
        if re.fullmatch(r"\w+\.png", picture["file"], re.ASCII):
            shown.append(f"![{_prose(picture['title'])}]({picture['file']})\n\n{_prose(picture['words'])}")
    return "\n\n".join(shown)


def _worst(evaluation: Mapping[str, Any]) -> str:
    """The classes that lost most, as a table; nothing where none had enough images."""
    found = evaluation.get("classes") or {}
    if not found.get("worst"):
        return ""
    said = (
        f"Classes that lost most, of the {found['judged']} with at least {found['fewest']} images; p is McNemar's, for "
        f"the worst of that many classes:"
    )
    rows = [
        (code(row["name"]), *(f"{row[side]} of {row['images']}" for side in ("dense", "pruned")), f"{row['p']:.2g}")
        for row in found["worst"]
    ]
    return f"\n\n{said}\n\n" + _table(("class", "dense", "pruned", "p"), rows)


def _recipe_words(recipe: Mapping[str, Any]) -> str:
    said = recipe.get("description")
    about = f" {code(said)}." if said else ""
    return f"The resolved recipe, also in `recipe.yaml`.{about}"


def _dataset(part: Mapping[str, Any]) -> str:
    words = code(part["dataset"] if _on_hub(part) else _basename(part["dataset"]))
    config = f", configuration {code(part['config'])}" if part.get("config") else ""
    split = f", split {code(part['split'])}" if part.get("split") else ""
    return words + config + split


def _calibration(report: Mapping[str, Any]) -> str:
    part = report["calibration"]
    where = f" of {_dataset(part)}" if part.get("dataset") else ""
    skipped = f" {part['skipped']} images could not be decoded and were left out." if part["skipped"] else ""
    drawn = f"drawn with seed {report['seed']}"
    stages = report.get("stages") or ()
    used = any(stage.get("labels") == "true" for stage in stages)
    labels = "Their labels were used." if used else "Their labels were not used."
    said = f"Calibration: {part['samples']} images{where}, {drawn}. {labels}{skipped}"
    more = [_gradients(stages), _statistics(stages), _distillation(report.get("distillation"))]
    return said + "".join(f"\n\n{words}" for words in more if words)


LABELS = {
    "true": "the images' own labels",
    "sampled": "labels drawn from the model's own prediction",
    "projected": "random projections of the outputs",
    "dense": "random projections of the distance to the dense model's outputs",
}


def _gradients(stages: Sequence[Mapping[str, Any]]) -> str:
    made = [stage for stage in stages if "rows" in stage]
    if not made:
        return f"In {len(stages)} stages of rising sparsity." if len(stages) > 1 else ""
    last = made[-1]
    of = f" of {last['minibatch']} images each" if last["minibatch"] > 1 else ""
    said = f"Gradients of the loss: {last['rows']} rows{of}, {LABELS[last['labels']]}"
    said += f", anew at each of {len(stages)} stages" if len(stages) > 1 else ""
    way = "towards the dense model's outputs" if last["labels"] == "dense" else "down the loss"
    said += f", with the first-order term: each stage also took a step {way}" if last["first_order"] else ""
    ridges = list(dict.fromkeys(f"{s['ridge']:g}" for s in made if s.get("ridge") is not None))
    chosen = ", chosen by the loss on images kept out" if "ridges" in last else ""
    return said + (f". Ridge {', '.join(ridges)}{chosen}." if ridges else ".")


def _statistics(stages: Sequence[Mapping[str, Any]]) -> str:
    renewed = sum("re-estimated" in stage["batchnorm"] and "kept" not in stage["batchnorm"] for stage in stages)
    if not renewed:
        return ""
    often = "" if len(stages) == 1 else f" after {renewed} of the {len(stages)} stages"
    return f"The statistics of the batch norms were re-estimated on the calibration images{often}."


def _distillation(told: Mapping[str, Any] | None) -> str:
    if not told:
        return ""
    what = f"the loss on {told['held_out']} calibration images that took no part in the run"
    if not told["kept"]:
        return f"Distillation over {told['epochs']} epochs did not lower {what}, and its weights were not kept."
    return (
        f"After pruning, the kept weights of the whole network were trained together towards the dense model's outputs "
        f"(distillation, without labels): after {told['kept']} of {told['epochs']} epochs {what} was "
        f"{told['after']:.4g}, and {told['before']:.4g} before them."
    )


def _resources(part: Mapping[str, Any]) -> str:
    ranks = f" on {part['world_size']} processes" if part["world_size"] > 1 else ""
    said = f"Pruning took {duration(part['seconds'])} on {code(part['device'])}{ranks}"
    if part.get("peak_host_bytes"):
        said += f", at most {size(part['peak_host_bytes'])} of host memory"
    if part.get("peak_device_bytes"):
        said += f" and {size(part['peak_device_bytes'])} of device memory"
    return said + "."


def _layer_words(layers: Sequence[Mapping[str, Any]]) -> str:
    dense = [layer for layer in layers if not layer["pattern"]]
    said = (
        "Error: squared distance of the layer's output to its target on the calibration images, over the squared norm "
        "of the dense layer's output; once the mask is applied, and after the kept weights were refit. Norm: the norm "
        "of the weight over that of the dense weight."
    )
    if dense:
        said += f" {len(dense)} weights stay dense; the table says why."
    return said


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for layer in layers:
        name, shape = code(layer["checkpoint_name"]), "x".join(map(str, layer["shape"]))
        if layer["pattern"]:
            kept = f"{100 * layer['kept'] / layer['total']:.1f} %" if layer["total"] else ""
            figures = [_figure(layer[key]) for key in ("error_before", "error_after", "weight_norm_ratio")]
            rows.append((name, shape, code(layer["pattern"]), kept, *figures))
        else:
            rows.append((name, shape, f"dense: {_prose(layer['dense_reason'])}", "100 %", "", "", ""))
    return _table(("weight (name on disk)", "shape", "pattern", "kept", "error, mask", "error, refit", "norm"), rows)


def _limits(report: Mapping[str, Any]) -> list[str]:
    found = []
    if re.fullmatch(r"\d+:\d+", report["pattern"]):
        how = "packed, dense in memory" if (report.get("compressed") or {}).get("only") else "dense"
        speed = report.get("speed")
        timed = f"speed was measured on {_prose(speed['device'])} alone" if speed else "no inference speed was measured"
        found.append(
            f"{report['pattern']} stored {how}; {timed}. On a CPU there is none to gain; on a "
            "GPU it needs kernels for the pattern, and whether they pay depends on the shapes and the batch."
        )
    else:
        found.append("Unstructured zeros, stored dense; no inference speed was measured, and dense kernels gain none.")
    evaluation = report["evaluation"]
    if not evaluation:
        found.append("Not evaluated: measure it on your own images before you use it.")
    else:
        found.append(
            f"Measured on {evaluation['samples']} images of one dataset; other images, classes that are rare there, "
            "and robustness were not measured."
        )
    way = "Trained after pruning, on its few calibration images" if _taught(report) else "Pruned without retraining"
    found.append(f"{way}. It has the biases and the limits of the dense model, and its licence.")
    return found


# ------------------------------------------------------------------------------------------ text from outside, safely
def code(value: Any) -> str:
    """`value` as a markdown code span: one line, no control characters, and nothing in it closes the span."""
    text = _line(value)
    if not text:
        return "(none)"
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _prose(value: Any) -> str:
    """Text of ours that may carry a name from outside, as plain words: every sign that markdown reads is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!~&@:])", r"\\\1", _line(value))


def _line(value: Any) -> str:
    """One line: white space of any kind becomes a blank; control, format and direction characters go."""
    text = re.sub(r"\s+", " ", str(value))
    return "".join(
        sign for sign in text if unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    ).strip()


def _visible(value: str, keep_lines: bool = False) -> str:
    """For a fenced block: as `_line`, or line by line."""
    return "\n".join(_kept(line) for line in value.split("\n")) if keep_lines else _line(value)


def _kept(line: str) -> str:
    return "".join(s for s in line.rstrip() if unicodedata.category(s) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def _optional(value: Any) -> str | None:
    return _line(value) or None if value is not None else None


def _fence(inside: str) -> str:
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", inside)), default=0))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # a bar ends the cell even inside a code span, and a backslash before it would undo the escape
    return "\n".join("| " + " | ".join(re.sub(r"\\*\|", r"\\|", cell) for cell in cells) + " |" for cells in lines)


def _on_hub(part: Mapping[str, Any], key: str = "dataset") -> bool:
    """Whether the run loaded this from the Hub, and its name is a Hub id to the last character."""
    name = part.get(key)
    return bool(part.get("hub")) and isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def _basename(source: Any) -> str:
    return _line(str(source).rstrip("/\\").replace("\\", "/").rpartition("/")[2] or source)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def slug(pattern: str) -> str:
    """The pattern in a folder's name: 2:4 -> 2of4, 70% (layer) -> 70pct."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return f"{found[1]}of{found[2]}" if found else re.sub(r"%.*", "pct", pattern)


def duration(seconds: float) -> str:
    """Seconds as people read them: 43 s, 2 min 13 s, 1 h 05 min."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
