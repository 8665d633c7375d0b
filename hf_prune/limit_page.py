"""What `hf-prune limit` says: the page, the JSON file and the figure of a study."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limit import SETTLED, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .pictures import Picture

WIDTH = 80
LISTED = 10  # layers on the page; the JSON file has them all
FILES = ("limit.json", "limit.txt", "limit.png", "limit.svg")

COLUMNS = {
    "eps": "by how much the mean loss may rise; auto is its spread over batches of 128 images",
    "zeroing": "MEASURED: with this share of the weights set to zero, smallest first, the loss has risen by eps",
    "held-out": "MEASURED: {held} there, on images that chose nothing; {dense} dense",
    "quadratic": "estimate of the column zeroing, from the loss's slope and curvature along that step",
    "trace": "estimate of the column zeroing, from the mean curvature alone",
    "spectral |H|": "estimate where the kept weights MAY BE UPDATED, from the Hessian's curvature in every direction; "
                    "± is what the numbers of probes and Lanczos steps leave open",
    "Gauss-Newton": "the same from a simpler matrix that is never negative, as an interval; usually the most hopeful",
}  # fmt: skip


def page(study: Study, name: str, judge: str | None = None) -> str:
    """The whole page, at most 80 columns wide.  name: of the model.  judge: the recipe that was measured, if any."""
    parts = [_head(study, name), _short(study, judge), _limits(study)]
    if judge is not None:
        parts.append(_refits(study, judge))
    if study.nm is not None:
        parts.append(_pattern(study, judge))
    parts += [_layers(study), _work(study)]
    return "\n\n".join(part for part in parts if part)


def _head(study: Study, name: str) -> str:
    m, d = study.model, study.dense
    what = {
        "labels": "cross-entropy with the images' labels",
        "predicted classes": "cross-entropy with the classes the dense model predicts (no labels here)",
        "representation": "squared distance to the dense outputs, over their mean square (no classes here)",
    }[m["loss"]]
    accuracy = "" if d.get("accuracy") is None else f", accuracy {_percent(d['accuracy'])}"
    if m["loss"] == "predicted classes":
        accuracy = ""
    return "\n".join(
        [
            f"How sparse can {name} go?",
            f"{m['weights']:,} prunable weights in {m['layers']} layers; {m['images']:,} calibration images",
            *_wrap(f"loss: {what}; dense {d['loss']:.4f}{accuracy}"),
            *_wrap("Sparsity is the share of zeros. (The paper's \"pruning ratio\" is the share kept: .30 there is "
                   "sparsity .70 here.)"),
        ]
    )  # fmt: skip


def _short(study: Study, judge: str | None) -> str:
    """The middle row in words, measured things first."""
    row = study.rows[len(study.rows) // 2]
    text = (
        f"In short, where the mean loss may rise by {row['value']:.3g}: zeroing the smallest weights reaches sparsity "
        f"{_share(row['measured'])} (measured)."
    )
    if row["spectral"] is not None and row["spectral_settled"]:
        text += (f" A method that also updates the kept weights might reach about {_share(row['spectral'])} "
                 "(an estimate, no guarantee).")  # fmt: skip
        if row.get("refit"):
            rise = row["refit"].get("held_out_rise", row["refit"]["rise"])
            where = "held-out" if "held_out_rise" in row["refit"] else "calibration"
            text += f" There, {judge} raises the {where} loss by {_rise(rise).lstrip('+')} (measured)."
    elif row["spectral"] is not None:
        text += " How far a method gets that also updates the kept weights is not settled by so few Lanczos steps."
    else:
        text += " How far a method gets that also updates the kept weights was not estimated."
    return "\n".join(_wrap(text))


def _limits(study: Study) -> str:
    heads = ("eps", "zeroing", "held-out", "quadratic", "trace", "spectral |H|", "Gauss-Newton")
    wide = (12, 8, 10, 11, 7, 14, 16)
    lines = ["Sparsity that a tolerated loss allows:", "", _cells(heads, wide)]
    for row in study.rows:
        value = f"{row['value']:.3g}"
        label = f"auto {value}" if row["eps"] == "auto" else value
        uncertain = row["spectral_uncertainty"]
        sure = "" if uncertain is None else f" ± {_share(uncertain)}" if uncertain <= 0.1 else " ± >.1"
        sure = " few" if row["spectral_settled"] is False else sure
        spectral = _share(row["spectral"]) + sure
        newton = row["gauss_newton"]
        mark = " v" if study.model["vacuous"] else "  "
        interval = "-" if newton is None else f"[{_share(newton[0])}, {_share(newton[1])}]{mark}"
        cells = (label, _share(row["measured"]), _held(study, row["measured_at"]), _share(row["quadratic"]),
                 _share(row["trace"]), spectral, interval)  # fmt: skip
        lines.append(_cells(cells, wide))
    lines.append("")
    held = {"labels": "accuracy", "predicted classes": "share of images with the dense model's answer",
            "representation": "loss"}[study.model["loss"]]  # fmt: skip
    for column, text in COLUMNS.items():
        if column == "held-out":
            if not _has_held(study):
                text = "not measured: there were no other images"
            else:
                text = text.format(held=held, dense=_held(study, study.dense))
        lines += _wrap(text, f"  {column:<13} ")
    if any(row["spectral"] is None or row["gauss_newton"] is None for row in study.rows):
        lines += _wrap("not computed; the last lines of the page say why", "  -             ")
    if any(row["spectral_settled"] is False for row in study.rows):
        lines += _wrap(
            f"too few Lanczos steps (fewer than {SETTLED}, or half of them say something else): the eigenvalues near "
            "zero are not told apart, and the figure is too low as a rule (the trace is then that of the Gauss-Newton "
            "matrix). Give more --steps or --time-limit.",
            "  few           ",
        )
    if study.model["vacuous"]:
        cap = study.model["rank_cap"]
        lines += _wrap(
            f"VACUOUS. {study.model['images']:,} images can bend at most {_percent(cap)} of the directions, so this "
            f"column is at least {_share(1 - cap)} whatever the model. More --samples would say more.",
            "  v             ",
        )
    lines.append("")
    text = "Estimates trust a quadratic model of the loss; none is a guarantee. What zeroing reaches is measured"
    if all(row["spectral_settled"] for row in study.rows):
        text += "; the gap up to the spectral column is what a method that updates weights may win"
    lines += _wrap(f"{text}.")
    return "\n".join(lines)


def _refits(study: Study, judge: str) -> str:
    rows = [row for row in study.rows if row.get("refit")]
    if not rows:
        return ""
    wide = (12, 10, 20, 20, 14)
    lines = [f"MEASURED with {judge} at the spectral estimate:", "",
             _cells(("eps", "sparsity", "calib. loss rises", "held-out loss rises", "held-out"), wide)]  # fmt: skip
    for row in rows:
        refit = row["refit"]
        label = f"auto {row['value']:.3g}" if row["eps"] == "auto" else f"{row['value']:.3g}"
        cells = (label, _share(refit["sparsity"]), _rise(refit["rise"]), _rise(refit.get("held_out_rise")),
                 _held(study, refit))  # fmt: skip
        lines.append(_cells(cells, wide))
    lines.append("")
    lines += _wrap(
        "A recipe fits its weights to the calibration images, so that only the held-out figures judge it. Where they "
        "are far apart, give more --samples."
    )
    return "\n".join(lines)


def _pattern(study: Study, judge: str | None) -> str:
    nm = study.nm
    assert nm is not None
    lines = [f"Is {nm['pattern']} safe for this model?"]
    lines += _wrap(
        f"It removes {_percent(nm['energy_removed'])} of the squared weights, as much as unstructured pruning to "
        f"sparsity {_share(nm['equivalent_sparsity'])}.",
        "  ",
    )
    if nm["misfits"]:
        m = nm["pattern"].partition(":")[2]
        lines += _wrap(f"{len(nm['misfits'])} layers stay dense: their input channels are no multiple of {m}.", "  ")
    if not nm["sparsity"]:
        return "\n".join([*lines, "  It fits no layer, so nothing was measured."])
    wide = (27, 20, 21, 12)
    lines += ["", _cells(("  ", "calib. loss rises", "held-out loss rises", "held-out"), wide)]
    lines.append(_cells(("  predicted, isotropic", _rise(nm["predicted_isotropic"]), "", ""), wide))
    lines.append(_cells(("  predicted, quadratic", _rise(nm["predicted_quadratic"]), "", ""), wide))
    for title, found in (("zeroing alone", nm["measured"]), (judge, nm["refit"])):
        if found:
            cells = (f"  MEASURED, {title}", _rise(found["rise"]), _rise(found.get("held_out_rise")),
                     _held(study, found))  # fmt: skip
            lines.append(_cells(cells, wide))
    lines.append("")
    for column, text in {
        "isotropic": "estimate, as if every direction were as stiff as the average one (the column trace)",
        "quadratic": "estimate from slope and curvature along the step that zeroing makes (the column quadratic)",
        "calib.": "on the calibration images, to which a recipe fits its weights",
        "held-out": "on images that chose nothing: only these decide",
    }.items():
        if column != "held-out" or _has_held(study):
            lines += _wrap(text, f"  {column:<11}")
    lines += ["", *_wrap(verdict(study, judge), "  ")]
    return "\n".join(lines)


def verdict(study: Study, judge: str | None) -> str:
    """One sentence per measurement; a prediction never decides, nor images that the weights were fitted to."""
    nm = study.nm
    assert nm is not None
    pattern = nm["pattern"]

    def said(found: dict[str, Any]) -> tuple[str, bool]:
        rise = found.get("held_out_rise", found["rise"])
        within = [row for row in study.rows if rise <= row["value"]]
        if not within:
            return f"more than every tolerance above (largest {max(row['value'] for row in study.rows):g})", False
        least = min(within, key=lambda row: row["value"])
        return f"within eps {least['value']:.3g}", True

    text, good = said(nm["measured"])
    what = "the held-out loss" if _has_held(study) else "the calibration loss (no other images judged it)"
    start = f"{pattern} by zeroing alone: {'safe, ' if good else 'NOT safe, '}{what} rises {text}."
    if nm["refit"]:
        text, good = said(nm["refit"])
        return f"{start} With {judge}: {'safe, ' if good else 'NOT safe, '}it rises {text}."
    return f"{start} Whether a method that updates weights makes it safe was not measured: give --recipe snows."


def _layers(study: Study) -> str:
    layers = study.layers
    sparsity = layers[0]["sparsity"]
    wide = (37, 8, 8, 11, 8, 8)
    lines = [f"The layers, most sensitive first (each alone at sparsity {_share(sparsity)}):", "",
             _cells(("  layer", "weights", "trace", "rise", "global", "LAMP"), wide)]  # fmt: skip
    ordered = sorted(layers, key=lambda layer: -layer["rise"])
    for layer in ordered[:LISTED]:
        name = layer["name"].removesuffix(".weight")
        name = name if len(name) <= 34 else "..." + name[-31:]
        trace = "-" if layer["trace_share"] is None else f"{100 * layer['trace_share']:.1f} %"
        cells = (f"  {name}", f"{100 * layer['share']:.1f} %", trace, _rise(layer["rise"]),
                 _share(layer["global_sparsity"]), _share(layer["lamp_sparsity"]))  # fmt: skip
        lines.append(_cells(cells, wide))
    if len(ordered) > LISTED:
        lines.append(f"  {len(ordered) - LISTED} more in limit.json (--output-dir)")
    lines.append("")
    for column, text in {
        "weights": "share of the prunable weights",
        "trace": "share of the curvature's trace (Gauss-Newton): where an average change of a weight costs most",
        "rise": "MEASURED: of the loss when this layer alone is pruned",
        "global": "sparsity that one threshold on |w| for the whole model would give this layer",
        "LAMP": "sparsity that LAMP scores would give it (--allocation lamp), at the same total",
    }.items():
        lines += _wrap(text, f"  {column:<9}")
    if study.skip:
        names = " ".join(f"--skip {name}" for name in study.skip["layers"])
        count, share, damage = len(study.skip["layers"]), study.skip["share"], study.skip["damage"]
        these = f"these {count} layers dense" if count > 1 else "this layer dense"
        text = f"Keeping {these} ({_percent(share)} of the weights) would avoid {_percent(damage)} of the sum of all "
        lines += ["", *_wrap(f"{text}these rises: {names}", "  ")]
    return "\n".join(lines)


ENDED = {
    "narrow": "its interval was narrow enough",
    "probes": "all probes were used (--probes, --steps for a narrower one)",
    "time": "the time limit was reached",
}


def _work(study: Study) -> str:
    lines = []
    for name, run in study.runs.items():
        title = {"gauss-newton": "Gauss-Newton", "hessian": "exact Hessian"}[name]
        if not run["steps"]:
            lines += _wrap(f"{title}: not computed, {ENDED[run['ended_by']]} before its first product (--time-limit).")
            continue
        steps = max(run["steps"])
        lines += _wrap(
            f"{title}: {run['probes']} probes of up to {steps} Lanczos steps, {run['products']} products of "
            f"{run['seconds_per_product']:.2g} s; stopped because {ENDED[run['ended_by']]}."
        )
    for note in study.notes:
        lines += _wrap(f"note: {note}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- words
def _share(value: float | None) -> str:
    """.412, as papers write sparsities."""
    if value is None:
        return "-"
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else f"{100 * value:.2g} %"


def _rise(value: float | None) -> str:
    return "-" if value is None else "not finite" if not math.isfinite(value) else f"{value:+.3g}"


def _has_held(study: Study) -> bool:
    return any(key.startswith("held_out") for key in study.dense)


def _held(study: Study, found: dict[str, Any]) -> str:
    """The held-out figure that matters: accuracy where there are classes, else the loss."""
    if found.get("held_out_accuracy") is not None:
        return _percent(found["held_out_accuracy"])
    return "-" if found.get("held_out_loss") is None else f"{found['held_out_loss']:.3g}"


def _cells(cells: tuple[str, ...], wide: tuple[int, ...]) -> str:
    first = f"{cells[0]:<{wide[0]}}"
    return (first + "".join(f"{c:>{w}}" for c, w in zip(cells[1:], wide[1:], strict=True))).rstrip()


def _wrap(text: str, lead: str = "") -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- files
def data(study: Study, **more: Any) -> dict[str, Any]:
    """The study as plain values; what is not finite is None."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return clean({"schema_version": 1, **more, **dataclasses.asdict(study)})


def write(folder: Path, text: str, told: dict[str, Any]) -> None:
    """limit.txt, limit.json and the figure as limit.png and limit.svg."""
    from . import pictures

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "limit.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "limit.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    drawn = figure(told)
    (folder / "limit.png").write_bytes(pictures.png(drawn))
    (folder / "limit.svg").write_text(pictures.svg(drawn, "limit") + "\n", encoding="utf-8")


def picture(told: dict[str, Any]) -> Picture:
    """The figure for the page of `hf-prune report`, from limit.json."""
    from .pictures import Picture

    rows: list[Sequence[Any]] = []
    for row in told["rows"]:
        newton = row["gauss_newton"] or [None, None]
        rows.append((f"{row['value']:.3g}", _share(row["measured"]), _share(row["quadratic"]), _share(row["trace"]),
                     _share(row["spectral"]), f"{_share(newton[0])} to {_share(newton[1])}"))  # fmt: skip
    row = told["rows"][len(told["rows"]) // 2]
    words = (
        f"How sparse the dense model can go: zeroing its smallest weights raises the mean loss by {row['value']:.3g} "
        f"at sparsity {_share(row['measured'])} (measured); where kept weights may be updated, the spectrum of "
        f"the loss puts it at {_share(row['spectral'])} (an estimate, no guarantee)."
    )
    head = ("tolerated rise", "zeroing, measured", "quadratic", "trace", "spectral |H|", "Gauss-Newton")
    return Picture("limit", "How sparse the model can go", words, figure(told), head, rows)


def figure(told: dict[str, Any]) -> Figure:
    """Three panels, from the JSON alone."""
    import matplotlib
    from matplotlib.figure import Figure

    from .pictures import STYLE

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(13, 4))
        one, two, three = made.subplots(1, 3)
        _spectrum(one, told)
        _crossing(two, told)
        _curve(three, told)
    return made


BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"  # pictures.COLOURS


def _spectrum(axes: Any, told: dict[str, Any]) -> None:
    import numpy as np

    drawn = told["spectrum"]
    if not drawn:
        axes.set_title("Spectrum: not computed")
        return
    nodes = {name: np.concatenate([run["nodes"] for run in runs]) for name, runs in drawn.items()}
    largest = max(float(np.abs(x).max()) for x in nodes.values()) or 1.0
    inner = largest * 1e-6
    edges = np.geomspace(inner, largest * 1.2, 25)
    edges = np.concatenate([-edges[::-1], edges])
    for name, color, label in (("gauss-newton", GREY, "Gauss-Newton"), ("hessian", BLUE, "exact Hessian")):
        if name in nodes:
            weight = np.concatenate([run["weights"] for run in drawn[name]]) / len(drawn[name])
            share, _ = np.histogram(nodes[name], edges, weights=weight)
            axes.stairs(share, edges, color=color, fill=name == "gauss-newton", alpha=0.6 if name != "hessian" else 1,
                        label=label, linewidth=1.4)  # fmt: skip
    axes.set_xscale("symlog", linthresh=inner)
    axes.set_yscale("log")
    ticks = [10.0**e for e in range(math.ceil(math.log10(inner)), math.floor(math.log10(largest)) + 1, 2)]
    axes.set_xticks([-t for t in reversed(ticks)] + [0] + ticks)
    axes.set_xlim(-edges[-1], edges[-1])
    axes.set_title("Curvature of the loss")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of directions")
    axes.legend(frameon=False, fontsize=8)


def _crossing(axes: Any, told: dict[str, Any]) -> None:
    import numpy as np

    fixed = told["fixed"]
    if not fixed:
        axes.set_title("Fixed point: not computed")
        return
    at, needed = np.array(fixed["sparsity"]), np.array(fixed["needed"])
    axes.plot(at, 1 - at, color=GREY, label="share that is kept, 1 - s")
    axes.plot(at, needed, color=BLUE, label="share that must stay")
    place = int(np.argmax(needed >= 1 - at))
    axes.plot(at[place], needed[place], "o", color=ORANGE, label=f"estimate: s = {at[place]:.2f}")
    row = next(row for row in told["rows"] if row["eps"] == fixed["eps"])
    axes.set_title(f"The spectral estimate at eps = {row['value']:.3g}")
    axes.set_xlabel("sparsity s")
    axes.set_ylabel("share of the weights")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)


def _curve(axes: Any, told: dict[str, Any]) -> None:
    curve = told["curve"]
    floor = min(row["value"] for row in told["rows"]) / 3

    def line(at: list[float], values: list[float | None], **style: Any) -> None:
        pairs = [(s, max(v, floor)) for s, v in zip(at, values, strict=True) if v is not None]
        axes.plot([s for s, _ in pairs], [v for _, v in pairs], **style)

    line(curve["sparsity"], curve["rise"], color=ORANGE, marker=".", label="zeroing, measured")
    line(curve["quadratic_sparsity"], curve["quadratic_rise"], color=GREY, linestyle="--", label="quadratic")
    styles = {"trace": ("trace", "v", GREY), "spectral": ("spectral |H|", "o", BLUE)}
    for key, (label, marker, color) in styles.items():
        points = [(row[key], row["value"]) for row in told["rows"] if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, label=label, markersize=5)
    found = [(row["refit"]["sparsity"], row["refit"]["rise"]) for row in told["rows"] if row.get("refit")]
    if found:
        axes.plot(*zip(*[(s, max(v, floor)) for s, v in found], strict=True), "*", color=GREEN, markersize=9,
                  label=f"{told.get('recipe') or 'recipe'}, measured")  # fmt: skip
    for row in told["rows"]:
        axes.axhline(row["value"], color="#dddddd", linewidth=0.7, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(floor, None)
    axes.set_xlim(0, 1)
    axes.set_title("What pruning does to the loss")
    axes.set_xlabel("sparsity s")
    axes.set_ylabel("rise of the mean loss")
    axes.legend(frameon=False, fontsize=8)
