"""The model card of a network that `hf-prune train` made: README.md, rendered from training.json alone.

Names from outside are shown as code or escaped, by the functions of card.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from . import assets
from .card import _fence, _line, _pattern_words, _prose, _table, _visible, code, duration

WORDS = {
    "lomp": "trained with an L1 penalty and thresholded once by magnitude, without training after it (LOMP)",
    "imp": "trained, pruned and rewound round by round (iterative magnitude pruning with rewinding)",
    "rare-gems": "found as a subnetwork of frozen random weights and then trained (Rare Gems, Gem-Miner)",
    "smart-ratio": "trained from a random mask with shares per layer by depth (Smart-Ratio)",
    "dense": "trained densely",
}


def render(told: Mapping[str, Any], name: str) -> str:
    """The card's text. told: training.json. name: of the folder, for the title and the snippet."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title, net, test = _line(name), told["network"], told["test"]
    data = told["data"]
    result = EvalResult(
        task_type="image-classification",
        dataset_type="local",
        dataset_name=_line(str(data["eval_dataset"]).rstrip("/").rpartition("/")[2] or data["eval_dataset"]),
        dataset_split=_line(data["eval_split"]),
        metric_type="accuracy",
        metric_value=test["accuracy"],
        metric_name="top-1 accuracy",
        metric_args={"images": test["images"]},
    )
    recipe = yaml.safe_dump(dict(told["recipe"]), sort_keys=False, allow_unicode=True).strip()
    command = _visible(told["command"])
    pruned = [layer for layer in told["layers"] if layer["dense_reason"] is None]
    total, kept = (sum(layer[key] for layer in pruned) for key in ("total", "kept"))
    low, high = test["accuracy_interval"]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="pytorch",
            pipeline_tag="image-classification",
            tags=["sparse", told["method"], "hf-prune"],
            model_name=title,
            eval_results=[result],
        ),
        template_str=assets.path("model_cards", "train").read_text(encoding="utf-8"),
        title=code(title),
        intro=f"{code(net['name'])} for images of {'x'.join(map(str, net['image']))}, {WORDS[told['method']]}.",
        pattern_words=_pattern_words(told["pattern"]) if told["pattern"] else "Dense: no weight was pruned.",
        weights_words=f"{100 * (1 - kept / total):.2f} % of the {total:,} entries of {len(pruned)} weight tensors are "
        f"zero; {len(told['layers']) - len(pruned)} weight tensors were left dense.",
        snippet=f'from hf_prune import networks  # pip install hf-prune\n\nmodel = networks.load("{_safe(title)}")\n'
        f"# input: (pixels in 0..1 - mean) / std, mean {net['mean']}, std {net['std']}",
        results=f"{100 * test['accuracy']:.2f} % of {test['images']} test images [{100 * low:.1f}, {100 * high:.1f}], "
        f"loss {test['loss']:.4f}. In brackets: the 95 % interval over the choice of images.",
        curve=_curve(told["curve"]),
        fence=_fence(command + "\n" + recipe),
        command=command,
        recipe=_visible(recipe, keep_lines=True),
        data=f"{told['images']['train']} training and {told['images']['validation']} validation images of "
        f"{code(data['dataset'])}, split {code(data['split'])}; tested on {code(data['eval_dataset'])}, split "
        f"{code(data['eval_split'])}. Seed {told['seed']}.",
        resources=f"{told['epochs']} passes over the training images in {duration(told['seconds'])} on "
        f"{code(told['device'])}.",
        phases=_phases(told["phases"]),
        layer_table=_layers(told["layers"]),
        limits="- Measured on one test set; other images and robustness were not measured.\n- Unstructured zeros, and "
        "n:m zeros on a CPU, gain no speed in dense kernels.",
        versions=_table(("package", "version"), [(code(k), code(v)) for k, v in told["versions"].items()]),
    )
    return str(card).rstrip() + "\n"


def _safe(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "._-/" else "_" for sign in name)


def _curve(points: Any) -> str:
    if not points:
        return ""
    rows = [(f"{p['sparsity']:.3g}", f"{100 * p['test_accuracy']:.2f} %", f"{p['test_loss']:.4f}") for p in points]
    return "The trained network under one magnitude threshold, without training after it:\n\n" + _table(
        ("sparsity", "accuracy", "loss"), rows
    )


def _phases(phases: Any) -> str:
    rows = []
    for p in phases:
        figures = [
            "" if p.get(key) is None else f"{p[key]:.4f}" for key in ("train_loss", "validation_loss", "test_loss")
        ]
        accuracy = "" if p.get("test_accuracy") is None else f"{100 * p['test_accuracy']:.2f} %"
        rows.append((_prose(p["name"]), str(p["epochs"]), f"{100 * p['sparsity']:.2f} %", *figures, accuracy))
    head = ("training", "epochs", "sparsity", "training loss", "validation loss", "test loss", "test accuracy")
    return _table(head, rows)


def _layers(layers: Any) -> str:
    rows = []
    for each in layers:
        how = f"{100 * each['kept'] / each['total']:.2f} %" if each["dense_reason"] is None else "100 %"
        rows.append((code(each["name"]), "x".join(map(str, each["shape"])), how, _prose(each["dense_reason"] or "")))
    return _table(("weight", "shape", "kept", "dense because"), rows)
