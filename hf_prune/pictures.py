"""The pictures of a report, from what hf_prune.json holds: errors, sparsity, accuracy, similarity, weights, time.

Every picture comes with a sentence that says the same, and with its numbers as a table, for whoever cannot see it.
Colours are Okabe and Ito's, ordered so that every kind of colour vision tells the first four apart; markers and dashes
differ as well.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .compare import zeros

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Reports = Mapping[str, Mapping[str, Any]]  # name of a folder -> its hf_prune.json

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
GREY = "#6b6b6b"
WIDTH, HEIGHT = 7.5, 3.1  # inches
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib, so pictures are the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",  # no font is needed where the page is read
    "text.parse_math": False,  # a name with dollar signs is a name
}


@dataclass
class Picture:
    """One picture. `figure` is None where there was nothing to draw, and `words` then says why."""

    file: str  # without its ending
    title: str
    words: str
    figure: Figure | None = None
    head: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)


def draw(reports: Reports, weights: Sequence[Mapping[str, Any]] = (), unread: str = "") -> list[Picture]:
    """Every picture of one folder, or of several prunings of the same model.

    weights: histograms, as `page.histograms` makes them, and `unread` why there are none.
    Raises ValueError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib, which is not installed here: pip install matplotlib.") from error
    with matplotlib.rc_context(STYLE):
        return [
            errors(reports),
            depth(reports),
            accuracy(reports),
            sparsity(reports),
            histograms(next(iter(reports)), weights, unread),
            convergence(reports),
            times(reports),
        ]


def svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element, the same text at every call. salt: keeps ids of several in one page apart."""
    import matplotlib

    made = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that the font does not have are drawn as boxes
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    text = made.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)


def png(figure: Figure) -> bytes:
    import matplotlib

    made = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(made, format="png", dpi=160, metadata={"Software": None})
    return made.getvalue()


# ------------------------------------------------------------------------------------------------------ what is drawn
def errors(reports: Reports) -> Picture:
    """Error of the layers' outputs by block: once the mask is applied, and after the kept weights were refit."""
    made = Picture("error_by_block", "Error by block, before and after the solve", "")
    head, columns = ["block"], []
    lines = []
    names: list[str] = []
    without = []
    for i, (name, report) in enumerate(reports.items()):
        found = _by_block(report, "error_before"), _by_block(report, "error_after")
        if not found[1]:
            without.append(name)
            continue
        names = names or list(found[1])
        lines.append((i, name, found))
        head += [f"{name}: mask", f"{name}: refit"] if len(reports) > 1 else ["mask", "refit"]
        columns += [[part.get(block) for block in names] for part in found]
    if not lines:
        made.words = "Errors were not recorded: the recipe keeps or drops weights without looking at images."
        return made
    made.figure, axes = _figure()
    for i, name, (before, after) in lines:
        said = f"{name}: " if len(reports) > 1 else ""
        x = range(len(after))
        line = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]}
        first = [before.get(b) for b in after]
        axes.plot(x, first, linestyle=":", markerfacecolor="white", label=f"{said}mask", **line)
        axes.plot(x, list(after.values()), label=f"{said}after the solve", **line)
    _blocks(axes, names)
    values = [v for column in columns for v in column if v]
    if values and max(values) > 30 * min(values):
        _log(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("relative error of the outputs")
    _legend(axes)
    made.head, made.rows = head, [[b, *(c[i] for c in columns)] for i, b in enumerate(names)]
    means = ", ".join(
        f"{name} {_mean(before.values()):.3g} → {_mean(after.values()):.3g}" for _, name, (before, after) in lines
    )
    made.words = (
        "Squared distance of the outputs of the pruned weights to their targets on the calibration images, over the "
        "squared norm of the dense outputs; mean over the weights of a block, once the mask is applied and after the "
        f"kept weights were refit. Mean over the blocks: {means}."
        + (f" Not recorded for {', '.join(without)}." if without else "")
    )
    return made


def depth(reports: Reports) -> Picture:
    """Similarity of the blocks' outputs, dense against pruned."""
    made = Picture("similarity_by_depth", "Dense and pruned model inside, by depth", "")
    told = {name: (report["evaluation"] or {}).get("depth") for name, report in reports.items()}
    found = {name: part for name, part in told.items() if part and part["blocks"]}
    if not found:
        made.words = "Similarity by depth was not recorded: hf-prune eval FOLDER measures it."
        return made
    made.figure, (left, right) = _figure(2)
    names = [block["name"] for block in next(iter(found.values()))["blocks"]]
    for i, (name, part) in enumerate(found.items()):
        x = range(len(part["blocks"]))
        values = {key: [b[key] for b in part["blocks"]] for key in ("cka", "cosine", "relative_error")}
        said = f"{name}: " if len(reports) > 1 else ""
        line = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]}
        for key in values:  # None: nothing to tell, a gap
            values[key] = [float("nan") if value is None else value for value in values[key]]
        left.plot(x, values["cka"], label=f"{said}CKA", **line)
        left.plot(x, values["cosine"], linestyle=":", markerfacecolor="white", label=f"{said}cosine", **line)
        right.plot(x, values["relative_error"], label=f"{said}error", **line)
        made.rows += [[*([name] if len(found) > 1 else []), b["name"], b["cka"], b["cosine"], b["relative_error"],
                       b.get("largest")] for b in part["blocks"]]  # fmt: skip
    made.head = [*(["folder"] if len(found) > 1 else []), "block", "CKA", "cosine", "relative error", "largest value"]
    largest = [block.get("largest") for block in next(iter(found.values()))["blocks"]]
    if all(value is not None for value in largest):
        right.plot(range(len(names)), largest, color=GREY, linestyle="--", label="held by the largest value")
    for axes, words in ((left, "similarity of the outputs"), (right, "share of the squared norm")):
        _blocks(axes, names)
        axes.set_ylabel(words)
    left.set_ylim(min(0.0, *(v for row in made.rows for v in row[-4:-2] if v is not None)), 1.04)
    right.set_ylim(bottom=0)
    _legend(left)
    _legend(right)
    ends = ", ".join(
        f"{name} {part['blocks'][-1]['cosine']:.2f}" for name, part in found.items() if part["blocks"][-1]["cosine"]
    ) or "not known, because channels were reordered and their order not recorded"
    counts = " or ".join(map(str, sorted({part["images"] for part in found.values()})))
    made.words = (
        f"Outputs of every block of the pruned model against the dense one's, on {counts} "
        "images. CKA (debiased, linear): whether the same images are alike to both, whatever the rotation; cosine and "
        "relative error: value by value. Where the largest value of each dense output holds much of the norm (dashed), "
        f"as in the later blocks of some transformers, it decides all three. Cosine of the last outputs: {ends}."
    )
    return made


def accuracy(reports: Reports) -> Picture:
    """Accuracy against sparsity; for one folder, accuracy dense and pruned."""
    made = Picture("accuracy", "Accuracy" if len(reports) == 1 else "Accuracy against sparsity", "")
    judged = {name: r["evaluation"] for name, r in reports.items() if r["evaluation"] and r["evaluation"].get("pruned")}
    if not judged:
        made.words = "Accuracy was not recorded: hf-prune eval FOLDER --dataset ... measures it on labelled images."
        return made
    (draw_one if len(reports) == 1 else draw_several)(made, reports, judged)
    return made


def draw_one(made: Picture, reports: Reports, judged: Mapping[str, Any]) -> None:
    told = next(iter(judged.values()))
    made.figure, axes = _figure(height=1.9)
    keys = (("top5", "top-5"), ("top1", "top-1"))
    rows = [(key, words) for key, words in keys if told["pruned"].get(key) is not None]
    for i, side in enumerate(("dense", "pruned")):
        for y, (key, words) in enumerate(rows):
            value, (low, high) = told[side][key], told[side][f"{key}_interval"]
            axes.errorbar([100 * value], [y + 0.13 - 0.26 * i], xerr=[[100 * (value - low)], [100 * (high - value)]],
                          color=COLOURS[i], marker=MARKERS[i], capsize=4, linestyle="none",
                          label=side if y == 0 else None)  # fmt: skip
            made.rows.append([words, side, 100 * value, 100 * low, 100 * high])
    axes.set_yticks(range(len(rows)), [words for _, words in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 101)
    axes.set_xlabel("accuracy, %")
    _legend(axes)
    made.head = ["", "model", "%", "95 % from", "to"]
    change = told.get("difference") or {}
    moved = ""
    if change.get("top1") is not None:
        low, high = (100 * end for end in change["top1_interval"])
        points = f"{100 * change['top1']:+.1f} points [{low:+.1f}, {high:+.1f}]"
        moved = f" Image by image the top-1 accuracy changes by {points}."
    made.words = f"Dense and pruned on the same {told['labelled']} labelled images, with 95 % intervals.{moved}"


def draw_several(made: Picture, reports: Reports, judged: Mapping[str, Any]) -> None:
    made.figure, axes = _figure(height=3.4)
    dense = {tuple(part["dense"]["top1_interval"]) + (part["dense"]["top1"],) for part in judged.values()}
    if len(dense) == 1:
        low, high, value = (100 * each for each in next(iter(dense)))
        axes.axhspan(low, high, color=GREY, alpha=0.18, linewidth=0)
        axes.axhline(value, color=GREY, linestyle="--", label="dense")
        made.rows.append(["dense", 0.0, value, low, high])
    shares = {name: 100 * zeros(reports[name]) for name in judged}
    spread = max(shares.values()) - min(shares.values())
    for i, (name, part) in enumerate(judged.items()):
        value, low, high = (100 * each for each in (part["pruned"]["top1"], *part["pruned"]["top1_interval"]))
        twins = [n for n in shares if abs(shares[n] - shares[name]) < 0.3]
        apart = (twins.index(name) - (len(twins) - 1) / 2) * max(spread, 10) / 60  # of the same sparsity: side by side
        axes.errorbar([shares[name] + apart], [value], yerr=[[value - low], [high - value]], color=COLOURS[i % 7],
                      marker=MARKERS[i % 7], capsize=4, linestyle="none", label=name)  # fmt: skip
        made.rows.append([name, shares[name], value, low, high])
    middle = (max(shares.values()) + min(shares.values())) / 2
    reach = max(spread * 0.62, 5)
    axes.set_xlim(middle - reach, middle + reach)
    axes.set_ylim(0, 101)
    axes.set_xlabel("zeros among the pruned weights, %")
    axes.set_ylabel("top-1 accuracy, %")
    _legend(axes)
    made.head = ["folder", "zeros, %", "top-1, %", "95 % from", "to"]
    counts = " or ".join(map(str, sorted({part["labelled"] for part in judged.values()})))
    made.words = f"Top-1 accuracy on {counts} labelled images with 95 % intervals, against the share of zeros."


def sparsity(reports: Reports) -> Picture:
    made = Picture("sparsity_by_layer", "Sparsity by layer", "")
    made.figure, axes = _figure(height=2.6)
    several = len(reports) > 1
    for i, (name, report) in enumerate(reports.items()):
        layers = report["layers"]
        share = [100 * (1 - layer["kept"] / layer["total"]) if layer["total"] else 0.0 for layer in layers]
        for pruned in (True, False) if not several else (True,):
            x = [j for j, layer in enumerate(layers) if bool(layer["pattern"]) is pruned]
            # several may lie on one another: the later ones are smaller
            axes.plot(x, [share[j] for j in x], linestyle="none", marker=MARKERS[i % 7] if pruned else "x",
                      color=COLOURS[i % 7] if pruned else GREY, markersize=max(2.5, 8 - 2.5 * i) if several else 5,
                      label=name if several else ("pruned" if pruned else "left dense"))  # fmt: skip
        made.rows += [[*([name] if several else []), layer["checkpoint_name"], share[j], layer["total"]]
                      for j, layer in enumerate(layers)]  # fmt: skip
    made.head = [*(["folder"] if several else []), "weight", "zeros, %", "entries"]
    axes.set_ylim(-4, 104)
    axes.set_xlabel("weight, in execution order")
    axes.set_ylabel("zeros, %")
    _legend(axes)
    shares = ", ".join(f"{name} {100 * zeros(report):.1f} %" for name, report in reports.items())
    made.words = f"Share of zeros in every weight tensor of two or more dimensions. Over the pruned weights: {shares}."
    return made


def histograms(whose: str, weights: Sequence[Mapping[str, Any]], unread: str) -> Picture:
    """whose: name of the folder. weights: {"name", "edges", "dense", "pruned", ...}, counts per bin.

    "dense" is None where unknown; "pruned" is without the zeros.
    """
    made = Picture("weights", "Weights before and after", unread or "No weight was pruned.")
    if not weights:
        return made
    made.figure, grid = _figure(len(weights), height=2.7)
    cells = [grid] if len(weights) == 1 else list(grid)
    for axes, told in zip(cells, weights, strict=True):
        if told["dense"] is not None:
            axes.stairs(told["dense"], told["edges"], color=GREY, linewidth=1.2, label="dense")
        axes.stairs(told["pruned"], told["edges"], color=COLOURS[0], fill=True, alpha=0.75, label="kept, refit")
        axes.set_title(f"{_tail(block(told['name']))}: {_kind(told['name'])}", fontsize=8)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize=7)
    handles, labels = cells[0].get_legend_handles_labels()
    made.figure.legend(handles, labels, loc="outside lower center", ncols=2)
    made.head = ["weight", "not zero", "of", "standard deviation, kept", "dense"]
    made.rows = [[t["name"], t["kept"], t["total"], t["deviation"], t["dense_deviation"]] for t in weights]
    known = all(told["dense"] is not None for told in weights)
    made.words = (
        f"Values of some weights of {whose}: the first, the last, one in the middle, and the one with the largest "
        "error where errors were recorded. Filled: what is not zero in the pruned model. "
        + ("Outline: the dense model." if known else unread)
    )
    return made


def convergence(reports: Reports) -> Picture:
    made = Picture("convergence", "Convergence of the solve", "")
    traces = [
        (f"{name}: " if len(reports) > 1 else "", layer["name"], layer["convergence"])
        for name, report in reports.items()
        for layer in report["layers"]
        if layer.get("convergence")
    ]
    if not traces:
        made.words = "No residuals of conjugate-gradient steps were recorded: the recipe takes none, or is Newton-CG."
        return made
    step = max(1, len(traces) // 6)
    made.figure, axes = _figure()
    for i, (said, name, told) in enumerate(traces[::step][:7]):
        residuals = told["residuals"]
        axes.plot([told["every"] * j for j in range(len(residuals))], residuals, color=COLOURS[i % 7],
                  marker=MARKERS[i % 7], markevery=max(1, len(residuals) // 8),
                  label=f"{said}{_tail(block(name))}: {_kind(name)}")  # fmt: skip
        made.rows.append([said + name, told["every"] * (len(residuals) - 1), residuals[0], residuals[-1]])
    _log(axes)
    if min(min(told["residuals"]) for _, _, told in traces) < 1e-8:
        axes.set_ylim(bottom=1e-8)  # below it float32 has nothing left to tell
    axes.set_xlabel("conjugate-gradient step")
    axes.set_ylabel("relative residual")
    _legend(axes)
    made.head = ["weight", "steps", "first residual", "last residual"]
    made.words = f"Norm of the residual over that of the right-hand side, {len(made.rows)} of {len(traces)} weights."
    return made


def times(reports: Reports) -> Picture:
    """Seconds by kind of weight, and of what is not of any weight by stage of the run."""
    made = Picture("time", "Where the time went", "")
    spent: dict[str, dict[str, float]] = {}
    for name, report in reports.items():
        kinds: dict[str, float] = {}
        for layer in report["layers"]:
            if layer["pattern"] and layer["seconds"] is not None:
                kind = _kind(layer["name"])
                kinds[kind] = kinds.get(kind, 0.0) + layer["seconds"]
        ranked = sorted(kinds, key=lambda kind: -kinds[kind])
        few = {kind: kinds[kind] for kind in ranked[:8]}
        if len(ranked) > 8:
            few["other weights"] = sum(kinds[kind] for kind in ranked[8:])
        spent[name] = few | _apart(report, sum(kinds.values()))
    apart = dict.fromkeys(kind for few in spent.values() for kind in few if kind in STAGES)
    kinds_ = [k for k in dict.fromkeys(kind for few in spent.values() for kind in few) if k not in apart]
    kinds_ += sorted(apart, key=STAGES.index)
    made.figure, axes = _figure(height=0.9 + 0.25 * len(kinds_) * min(2, len(spent)))
    thick = 0.8 / len(spent)
    for i, (name, few) in enumerate(spent.items()):
        places = [y + (i - (len(spent) - 1) / 2) * thick for y in range(len(kinds_))]
        axes.barh(places, [few.get(kind, 0.0) for kind in kinds_], thick * 0.9, color=COLOURS[i % 7], label=name)
        made.rows += [[*([name] if len(spent) > 1 else []), kind, few.get(kind, 0.0)] for kind in kinds_]
    axes.set_yticks(range(len(kinds_)), kinds_)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    if len(spent) > 1:
        _legend(axes)
    made.head = [*(["folder"] if len(spent) > 1 else []), "kind of weight, or stage", "seconds"]
    totals = ", ".join(f"{name} {report['resources']['seconds']:.1f} s" for name, report in reports.items())
    made.words = (
        "Seconds by kind of weight (mask, solve, and statistics, which count with the first weight that needs them); "
        f"below them what belongs to no single weight. In all: {totals}."
    )
    return made


WITHIN, REST = "blocks, beside the weights", "between the weights"
STAGES = [
    "reading images", "looking at the model", "reordering channels", "weighing samples", WITHIN, "between blocks",
    "other", REST,
]  # fmt: skip


def _apart(report: Mapping[str, Any], weights: float) -> dict[str, float]:
    """Seconds of the stages of a run (stopwatch.py) beside those of its weights; early files hold no stages."""
    stages = report["resources"].get("by_stage")
    if not stages:
        return {REST: max(0.0, report["resources"]["seconds"] - weights)}
    seconds = {stage: told["seconds"] for stage, told in stages.items()}
    blocks = seconds.pop("pruning blocks", None)
    if blocks is None:  # of a run that sees the whole model at once
        seconds["other"] = max(0.0, seconds.get("other", 0.0) - weights)
    else:
        seconds[WITHIN] = max(0.0, blocks - weights)
    return {stage if stage in STAGES else "other": took for stage, took in seconds.items()}


# --------------------------------------------------------------------------------------------------------- small parts
def _figure(columns: int = 1, height: float = HEIGHT) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(1, columns)


def _log(axes: Axes) -> None:
    """A logarithmic axis labelled with plain numbers: its usual powers of ten are formulas, which are off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, place: "")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, handlelength=2.6)


def block(name: str) -> str:
    """The block a weight lies in, told from its name: up to the last number. vit.layers.11.mlp.fc1.weight: the 11th."""
    found = re.match(r"(.*\.\d+)\.", name)
    return found[1] if found else name.rpartition(".")[0] or name


def _by_block(report: Mapping[str, Any], key: str) -> dict[str, float]:
    """Mean of a figure over the pruned weights of each block."""
    found: dict[str, list[float]] = {}
    for layer in report["layers"]:
        if layer["pattern"] and layer[key] is not None:
            found.setdefault(block(layer["name"]), []).append(layer[key])
    return {name: _mean(values) for name, values in found.items()}


def _mean(values: Any) -> float:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else float("nan")


def _blocks(axes: Axes, names: Sequence[str]) -> None:
    """Ticks for blocks: what tells their names apart, as many as fit."""
    labels = [_tail(name) for name in names]
    step = max(1, -(-len(names) // 16))
    wide = max(map(len, labels), default=0) > 3
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "fontsize": 7} if wide else {}
    axes.set_xticks(range(0, len(names), step), labels[::step], **turned)
    axes.set_xlabel("block")


def _tail(name: str) -> str:
    """vit.layers.11 -> 11, layers.2.blocks.1 -> 2.1, classifier -> classifier."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", name)
    return ".".join(numbers) or _short(name.rpartition(".")[2], 12)


def _kind(name: str) -> str:
    """vit.layers.11.mlp.fc1.weight -> mlp.fc1"""
    words = [part for part in name.partition("[")[0].split(".") if part != "weight"]
    last = max((i for i, part in enumerate(words) if part.isdigit()), default=-1)
    return ".".join(words[last + 1 :][-2:]) or ".".join(words[-2:])


def _short(text: str, width: int) -> str:
    """The end of a name is what tells it apart."""
    return text if len(text) <= width else "…" + text[1 - width :]
