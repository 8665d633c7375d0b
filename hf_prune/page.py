"""`hf-prune report FOLDER...`: report.html, one file without any network, and the two pictures of the model card.

With several prunings of the same model the page holds them side by side. Nothing is measured here: what is not in
hf_prune.json is said to be missing, with the command that measures it. The weights are read for their histograms.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import source as sources
from .intervals import percent

if TYPE_CHECKING:
    from .pictures import Picture

PAGE = "report.html"
IN_CARD = 2  # pictures that the card shows
CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 56rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { text-align: left; padding: .18rem .9rem .18rem 0; border-bottom: 1px solid #e8e8e8; vertical-align: top; }
td.n, th.n { text-align: right; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: #004f7c; font-size: .92rem; }
pre { background: #f5f5f5; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; }
code { overflow-wrap: anywhere; }
"""


def parser() -> argparse.ArgumentParser:
    from .cli import _Parser

    top = _Parser(
        prog="hf-prune report",
        description="Write report.html, which opens without a network, and the pictures of the model card.",
        allow_abbrev=False,
    )
    top.add_argument("folders", metavar="FOLDER", nargs="+", help="what hf-prune wrote; several: side by side")
    top.add_argument("--output", metavar="FILE", help="default: FOLDER/report.html; of several: ./report.html")
    top.add_argument("--png", metavar="DIR", help="write every picture as a PNG into DIR too")
    top.add_argument("--base", metavar="MODEL", help="the dense model, for its weights; default: as in hf_prune.json")
    top.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    top.add_argument("--quiet", action="store_true", help="errors only")
    top.add_argument("--verbose", action="store_true", help="tracebacks")
    return top


def run(words: Sequence[str]) -> int:
    """`hf-prune report`. Raises ValueError for folders that cannot be read or written, or are of different models."""
    args = parser().parse_args(words)
    from . import cli

    say = cli.Talk(quiet=args.quiet)
    path, notes = write(args.folders, output=args.output, png=args.png, base=args.base, token=args.token)
    say.notes(notes)
    say(str(path))
    return 0


def write(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    png: str | Path | None = None,
    base: str | None = None,
    token: str | None = None,
) -> tuple[Path, list[str]]:
    """Draw and write; returns the page's path, and notes on what was not recorded.

    For one folder without `output` the page lands in it, and the card gets its pictures. Raises ValueError.
    """
    from . import checkpoint, compare, pictures

    found = compare.compare(folders)  # reads them, and refuses different bases
    names = _names(folders)
    reports = {name: checkpoint.read(folder) for name, folder in zip(names, folders, strict=True)}
    weights, unread = histograms(Path(folders[0]), next(iter(reports.values())), base=base, token=token)
    drawn = pictures.draw(reports, weights, unread) + limits(folders)
    path = Path(output) if output else (Path(folders[0]) / PAGE if len(folders) == 1 else Path(PAGE))
    notes = [picture.words for picture in drawn if picture.figure is None]
    try:
        if png is not None:
            Path(png).mkdir(parents=True, exist_ok=True)
            for picture in drawn:
                if picture.figure is not None:
                    (Path(png) / f"{picture.file}.png").write_bytes(pictures.png(picture.figure))
        if len(folders) == 1 and output is None:
            notes += _into_card(Path(folders[0]), next(iter(reports.values())), drawn)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.put(path, render(reports, found, drawn))
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror or error}.") from error
    return path, notes


def limits(folders: Sequence[str | Path]) -> list[Picture]:
    """The figure of `hf-prune limit` where one of the folders holds its limit.json."""
    from . import limit_page

    found = [Path(folder) / "limit.json" for folder in folders if (Path(folder) / "limit.json").is_file()]
    try:
        return [limit_page.picture(json.loads(path.read_text(encoding="utf-8"))) for path in found[:1]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found[0]} is no study of hf-prune limit ({error!r}): remove it.") from error


def _names(folders: Sequence[str | Path]) -> list[str]:
    """Names of the folders that tell them apart."""
    short = [Path(os.path.realpath(folder)).name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _into_card(folder: Path, report: Mapping[str, Any], drawn: Sequence[Picture]) -> list[str]:
    """The most telling pictures as PNG files beside the card, which shows them."""
    from . import checkpoint, pictures

    chosen = [picture for picture in drawn if picture.figure is not None][:IN_CARD]
    for picture in chosen:
        assert picture.figure is not None
        (folder / f"{picture.file}.png").write_bytes(pictures.png(picture.figure))
    listed = [{"file": f"{each.file}.png", "title": each.title, "words": each.words} for each in chosen]
    for old in report.get("pictures") or ():
        if old["file"] not in {each["file"] for each in listed} and re.fullmatch(r"\w+\.png", old["file"]):
            (folder / old["file"]).unlink(missing_ok=True)
    return checkpoint.update(folder, report, {**report, "pictures": listed})


# -------------------------------------------------------------------------------------------------------- the weights
def histograms(
    folder: Path, report: Mapping[str, Any], *, base: str | None = None, token: str | None = None
) -> tuple[list[dict[str, Any]], str]:
    """(histograms of up to four pruned weights, why the dense ones are unknown or "")."""
    from . import compress

    chosen = [layer["checkpoint_name"] for layer in _telling(report)]
    packed = compress.find(folder)
    stored = compress.read(packed) if packed else compress.read_dense(sources.weight_files(str(folder), folder))
    after = _tensors(stored, chosen)
    unread = ""
    before: dict[str, Any] = {}
    try:
        revision = report["model"]["revision"] if report["model"].get("hub") and not base else None
        origin = sources.resolve(base or report["model"]["source"], revision=revision, token=token)
        before = _tensors(compress.read_dense(origin.weights), chosen)
    except ValueError as error:
        unread = f"The dense weights are not at hand ({str(error).rstrip('.')}): name them with --base."
    if not unread and any(name in before and before[name].shape != after[name].shape for name in chosen):
        unread, before = "The dense weights have other shapes: --base is not the model that was pruned.", {}
    return [_histogram(name, after[name], before.get(name)) for name in chosen if name in after], unread


def _telling(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first, the middle and the last pruned weight, and the one with the largest error; in execution order."""
    pruned = [layer for layer in report["layers"] if layer["pattern"]]
    if not pruned:
        return []
    worst = max(range(len(pruned)), key=lambda i: pruned[i]["error_after"] or 0.0)
    places = {0, len(pruned) // 2, len(pruned) - 1, worst}
    return [pruned[i] for i in sorted(places)]


def _tensors(stored: Iterable[tuple[str, Any]], wanted: Sequence[str]) -> dict[str, Any]:
    """name, or name[first:last] for some rows -> tensor in float32."""
    found = {}
    for name, tensor in stored:
        for full in wanted:
            whole, _, rows = full.partition("[")
            if whole == name:
                first, _, last = rows.rstrip("]").partition(":")
                found[full] = (tensor[int(first) : int(last)] if rows else tensor).float()
    return found


def _histogram(name: str, after: Any, before: Any) -> dict[str, Any]:
    import numpy as np

    kept = after[after != 0].flatten().numpy()
    dense = None if before is None else before.flatten().numpy()
    deviation = float((kept if dense is None else dense).std()) if len(kept) else 0.0
    edges = np.linspace(-4.5 * deviation or -1.0, 4.5 * deviation or 1.0, 62)

    def counts(values: Any) -> list[float]:
        return np.histogram(values, edges)[0].tolist()

    return {
        "name": name,
        "edges": edges.tolist(),
        "pruned": counts(kept),
        "dense": None if dense is None else counts(dense),
        "kept": len(kept),
        "total": int(after.numel()),
        "deviation": float(kept.std()) if len(kept) else None,
        "dense_deviation": None if dense is None else float(dense.std()),
    }


# ----------------------------------------------------------------------------------------------------------- the page
def render(reports: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any], drawn: Sequence[Picture]) -> str:
    """The whole page as text. Everything that came from outside is escaped; the page may load nothing."""
    from . import pictures
    from .compare import text as comparison

    model = found["base"]
    title = ", ".join(reports) if len(reports) > 1 else next(iter(reports))
    base = sources_name(model["source"])
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=note>{_text(_lead(reports, base, model))}</p>",
        *(_single(next(iter(reports.values()))) if len(reports) == 1 else _several(comparison(found))),
    ]
    for picture in drawn:
        if picture.figure is not None:
            image = pictures.svg(picture.figure, picture.file).replace(
                "<svg ", f'<svg role="img" aria-label="{_text(picture.title + ". " + picture.words)}" ', 1
            )
            body += [
                f'<h2 id="{picture.file}">{_text(picture.title)}</h2>',
                f"<figure>{image}<figcaption>{_text(picture.words)}</figcaption></figure>",
                f"<details><summary>The numbers</summary>{_table(picture.head, picture.rows)}</details>",
            ]
    missing = [picture for picture in drawn if picture.figure is None]
    if missing:
        body.append("<h2>Not recorded</h2><ul>")
        body += [f"<li>{_text(picture.title)}: {_text(picture.words)}</li>" for picture in missing]
        body.append("</ul>")
    for name, report in reports.items():
        body += _made(name, report)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def sources_name(source: str) -> str:
    """The last part of a path or id."""
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1]


def _lead(reports: Mapping[str, Mapping[str, Any]], base: str, model: Mapping[str, Any]) -> str:
    first = next(iter(reports.values()))
    said = f"{base}, {model['architecture']} of {model['parameters']:,} parameters, "
    if len(reports) > 1:
        return said + f"pruned {len(reports)} ways by hf-prune."
    return said + f"pruned to {first['pattern']} by hf-prune with the recipe {first['recipe'].get('name', 'custom')}."


def _single(report: Mapping[str, Any]) -> list[str]:
    from .card import duration, reordered
    from .checkpoint import size
    from .compare import zeros

    pruned = [layer for layer in report["layers"] if layer["pattern"]]
    calibration, resources = report["calibration"], report["resources"]
    host, data = resources.get("peak_host_bytes"), calibration.get("dataset")
    took = f"{duration(resources['seconds'])} on {resources['device']}"
    rows = [
        ["weights pruned", f"{len(pruned)} of {len(report['layers'])} tensors, {100 * zeros(report):.1f} % zeros"],
        ["calibration", f"{calibration['samples']} images" + (f" of {sources_name(data)}" if data else "")],
        ["pruning", took + (f", at most {size(host)} of memory" if host else "")],
    ]
    if moved := reordered(report):
        rows.insert(1, ["channels reordered", f"{moved} sets; the dense model computes what it did"])
    told = report["evaluation"]
    if not told:
        return [_table((), rows), "<p class=note>Not evaluated: nothing is known about its accuracy.</p>"]
    return [_table((), rows), f"<h2>Measured on {told['samples']} images</h2>", _table(*_scores(told)), *_classes(told)]


def _scores(told: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[Any]]]:
    rows: list[Sequence[Any]] = []
    dense, pruned, change = (told.get(key) or {} for key in ("dense", "pruned", "difference"))
    for key, words in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        if pruned.get(key) is not None:
            rows.append([words, percent(dense, key), percent(pruned, key), _points(change, key)])
    if pruned.get("ece") is not None:
        rows.append(["expected calibration error", *(f"{100 * part['ece']:.1f} %" for part in (dense, pruned)),
                     f"{100 * (pruned['ece'] - dense['ece']):+.1f}"])  # fmt: skip
    if told.get("agreement") is not None:
        rows.append(["same first answer", "", percent(told, "agreement"), ""])
    for key, words in (("logit_error", "relative logit error"), ("representation_error", "representation error")):
        if told.get(key) is not None:
            low, high = told.get(f"{key}_interval") or (None, None)
            around = f" [{low:.3g}, {high:.3g}]" if low is not None else ""
            rows.append([words, "", f"{told[key]:.3g}{around}", ""])
    if change:
        said = f"{change['lost']} lost, {change['won']} won, p {change['mcnemar_p']:.2g}" if "lost" in change else ""
        rows.append(["images (McNemar)", "", "", said])
    return ("", "dense", "pruned", "difference, points"), rows


def _classes(told: Mapping[str, Any]) -> list[str]:
    found = told.get("classes")
    if not found:
        return []
    if not found["judged"]:
        return [f"<p class=note>No class has {found['fewest']} images: which ones lost most cannot be told.</p>"]
    rows = [[r["name"], f"{r['dense']} of {r['images']}", f"{r['pruned']} of {r['images']}", f"{r['p']:.2g}"]
            for r in found["worst"]]  # fmt: skip
    said = f"Classes that lost most, of {found['judged']} with at least {found['fewest']} images"
    return [f"<p class=note>{said}; p for the worst of that many.</p>", _table(("class", "dense", "pruned", "p"), rows)]


def _points(change: Mapping[str, Any], key: str) -> str:
    if change.get(key) is None:
        return ""
    low, high = (100 * end for end in change[f"{key}_interval"])
    return f"{100 * change[key]:+.1f} [{low:+.1f}, {high:+.1f}]"


def _several(lines: Sequence[str]) -> list[str]:
    return ["<pre>" + _text("\n".join(lines)) + "</pre>"]


def _made(name: str, report: Mapping[str, Any]) -> list[str]:
    """How one folder was made: command, versions, every weight."""
    head = ("weight (name on disk)", "shape", "pattern", "kept, %", "error, mask", "error, refit", "norm", "seconds")
    rows = []
    for layer in report["layers"]:
        kept = 100 * layer["kept"] / layer["total"] if layer["total"] else None
        figures = [layer[key] for key in ("error_before", "error_after", "weight_norm_ratio", "seconds")]
        pattern = layer["pattern"] or f"dense: {layer['dense_reason']}"
        rows.append([layer["checkpoint_name"], "x".join(map(str, layer["shape"])), pattern, kept,
                     *(figures if layer["pattern"] else [None] * 4)])  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return [
        f"<h2>How {_text(name)} was made</h2>",
        f"<pre>{_text(report['command'] or 'hf_prune.prune(model, batches, recipe) in Python')}</pre>",
        f"<p class=note>{_text(report['created'])}; seed {report['seed']}; {_text(versions)}</p>",
        f"<details><summary>Every weight</summary>{_table(head, rows)}</details>",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str = "td") -> str:
        if isinstance(value, float):
            return f'<{tag} class="n">{value:.4g}</{tag}>'
        number = ' class="n"' if isinstance(value, int) else ""
        return f"<{tag}{number}>{'' if value is None else _text(value)}</{tag}>"

    top = "<thead><tr>" + "".join(cell(each, "th") for each in head) + "</tr></thead>" if head else ""
    lines = "".join("<tr>" + "".join(cell(each) for each in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{lines}</tbody></table></div>'


def _text(value: Any) -> str:
    """Text from outside as text: markup in it is shown, control and direction characters go."""
    from .card import _visible

    return html.escape(_visible(str(value), keep_lines=True), quote=True)
