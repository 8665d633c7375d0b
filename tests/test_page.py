"""Pictures and report.html: the right numbers, nothing loaded, nothing from outside that acts, nothing blank."""

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as tree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import report as plain

from hf_prune import card, checkpoint, cli, hub, page, pictures, schema

EVIL = '<script>alert(1)</script><img src="http://tracker/p.png">"\'&$x^2$ \u202e\x1b[31m'


def full(name: str = "snows", drop: float = 0.0) -> dict:
    """A report of a model with three blocks of two weights, a head that stays dense, and an evaluation with depth."""
    found = plain()
    found["model"] |= {"source": "gone/nowhere", "hub": False, "parameters": 1000}
    found["recipe"]["name"] = name
    weights = [(f"net.layers.{i}.mlp.{kind}.weight", i, j) for i in range(3) for j, kind in enumerate(("fc1", "fc2"))]
    layer = found["layers"][0]
    found["layers"] = [
        {**layer, "name": w, "checkpoint_name": w, "error_before": 0.2 + i / 10 + j, "error_after": 0.1 + i / 10 + j,
         "seconds": 1.0 + j}
        for w, i, j in weights
    ]  # fmt: skip
    head = {"name": "head.weight", "checkpoint_name": "head.weight", "pattern": None, "kept": 32, "dense_reason": EVIL}
    found["layers"].append({**layer, **head, "error_before": None, "error_after": None})
    found["resources"]["seconds"] = 12.0
    scores = {"top1_interval": [0.8, 0.95], "top5": 0.97, "top5_interval": [0.9, 0.99], "ece": 0.02}
    found["evaluation"] |= {
        "dense": {"top1": 0.9, **scores},
        "pruned": {**scores, "top1": 0.5 - drop, "top1_interval": [0.4 - drop, 0.6 - drop], "ece": 0.05},
        "difference": {"top1": -0.4, "top1_interval": [-0.5, -0.3], "top5": 0.0, "top5_interval": [0.0, 0.0], "lost": 9,
                       "won": 1, "mcnemar_p": 0.02},
        "labelled": 20, "dataset": "/home/me/data/" + EVIL, "split": "test",
        "classes": {"judged": 2, "seen": 2, "fewest": 5,
                    "worst": [{"name": EVIL, "images": 9, "dense": 8, "pruned": 2, "p": 0.1}]},
        "depth": {"images": 8, "blocks": [
            {"name": f"net.layers.{i}", "cka": None if i == 1 else 0.9 - i / 10, "cosine": 0.8, "relative_error": i / 5,
             "largest": 0.1} for i in range(3)]},
    }  # fmt: skip
    return found


def stored(folder: Path, told: dict) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in told["layers"]:
        weight = torch.randn(4, 8, generator=generator)
        if layer["pattern"]:
            weight[:, ::2] = 0
        state[layer["checkpoint_name"]] = weight
    save_file(state, folder / "model.safetensors")
    (folder / "hf_prune.json").write_text(checkpoint.to_json(told))
    (folder / "README.md").write_text(card.render(json.loads(checkpoint.to_json(told)), name=folder.name))
    return folder


@pytest.fixture(scope="module")
def drawn() -> dict[str, pictures.Picture]:
    return {each.file: each for each in pictures.draw({"a$b$": full()}, unread="no weights.")}


class Page(HTMLParser):
    """Tags with attributes, text by tag, and what is left open."""

    VOID = ("meta", "br", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def harmless(text: str) -> Page:
    """Parse a page and check that it can load and run nothing."""
    found = Page(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "foreignobject", "image"}
    for _, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("href", "xlink:href", "src"):
            assert attributes.get(key, "#").startswith("#"), "only references within the page"
    loaded = re.findall(r"url\(([^)]*)\)|@import", text)
    assert all(each.strip("'\"").startswith("#") for each in loaded)
    policy = [a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    return found


def test_a_page_of_one_folder(tmp_path: Path) -> None:
    folder = stored(tmp_path / "out", full())
    path, notes = page.write([folder])
    assert path == folder / "report.html"
    text = path.read_text()
    found = harmless(text)
    words = "".join(found.words)
    assert "<script>alert(1)</script>" in words, "shown as text" and "\x1b" not in words and "\u202e" not in words
    assert "/home/me" not in text, "names, not places"
    assert "90.0 % [80.0, 95.0]" in words and "-40.0 [-50.0, -30.0]" in words and "9 lost, 1 won" in words
    shown = [a for t, a in found.tags if t == "svg"]
    assert len(shown) == 6 and all(len(a["aria-label"]) > 40 and a["role"] == "img" for a in shown)
    assert sum(t == "summary" for t, _ in found.tags) == 6 + 1, "the numbers of each picture, and every weight"
    assert [note for note in notes if "residuals" in note] and "Not recorded" in words
    assert not list(folder.glob(".*")), "nothing is left behind"
    before = path.read_bytes()
    page.write([folder])
    assert path.read_bytes() == before, "the same report draws the same page"


def test_the_card_shows_two_pictures(tmp_path: Path) -> None:
    folder = stored(tmp_path / "out", full())
    page.write([folder])
    report = checkpoint.read(folder)
    assert [each["file"] for each in report["pictures"]] == ["error_by_block.png", "similarity_by_depth.png"]
    text = (folder / "README.md").read_text()
    assert "![Error by block, before and after the solve](error_by_block.png)" in text
    for each in report["pictures"]:
        pixels = np.asarray(Image.open(folder / each["file"]).convert("L"))
        assert pixels.shape[1] >= 1000 and pixels.std() > 10, "not blank"
    assert {"report.html", "error_by_block.png"} <= set(hub.listing(folder)), "they are published"
    assert schema.problems(report) == []
    told = {**report, "pictures": [{"file": "../../x.png", "title": "t", "words": "w"}]}
    assert "x.png" not in card.render(told)


def test_several_folders_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [stored(tmp_path / "one", full("snows")), stored(tmp_path / "two", full("wanda", drop=0.2))]
    cards = [(folder / "README.md").read_text() for folder in folders]
    path, _ = page.write(folders, png=tmp_path / "png")
    assert path == Path("report.html") and [(f / "README.md").read_text() for f in folders] == cards
    words = "".join(harmless(path.read_text()).words)
    assert "Accuracy against sparsity" in words and "prunings of nowhere" in words
    assert {p.name for p in (tmp_path / "png").iterdir()} == {
        f"{name}.png" for name in ("accuracy", "error_by_block", "similarity_by_depth", "sparsity_by_layer", "time",
                                   "weights")
    }  # fmt: skip


def test_numbers_behind_the_pictures(drawn: dict[str, pictures.Picture]) -> None:
    errors = drawn["error_by_block"]
    assert list(errors.head) == ["block", "mask", "refit"]
    assert errors.rows[1] == ["net.layers.1", pytest.approx((0.3 + 1.3) / 2), pytest.approx((0.2 + 1.2) / 2)]
    assert [row[0] for row in errors.rows] == [f"net.layers.{i}" for i in range(3)]
    assert "a$b$ 0.8 → 0.7" in errors.words
    assert ["top-1", "pruned", 50.0, 40.0, 60.0] in drawn["accuracy"].rows
    assert drawn["sparsity_by_layer"].rows[-1] == ["head.weight", 0.0, 32]
    assert dict(drawn["time"].rows) == {"mlp.fc2": 6.0, "mlp.fc1": 3.0, "between the weights": 3.0}
    assert drawn["similarity_by_depth"].rows[1] == ["net.layers.1", None, 0.8, 0.2, 0.1]
    assert drawn["convergence"].figure is None and drawn["weights"].words == "no weights."


def test_time_is_drawn_by_stage_where_stages_were_recorded() -> None:
    told = full()
    stages = {"reading images": 0.5, "pruning blocks": 10.0, "weighing samples": 1.0, "a later stage": 0.5}
    told["resources"]["by_stage"] = {k: {"seconds": v, "cpu_seconds": v} for k, v in stages.items()}
    (found,) = [each for each in pictures.draw({"a": told}) if each.file == "time"]
    assert found.rows == [["mlp.fc2", 6.0], ["mlp.fc1", 3.0], ["reading images", 0.5], ["weighing samples", 1.0],
                          [pictures.WITHIN, 1.0], ["other", 0.5]]  # fmt: skip
    assert sum(seconds for _, seconds in found.rows) == told["resources"]["seconds"]


def test_convergence_is_drawn_where_it_was_recorded() -> None:
    told = full()
    told["layers"][2]["convergence"] = {"every": 2, "residuals": [1.0, 0.1, 1e-3]}
    (found,) = [each for each in pictures.draw({"a": told}) if each.file == "convergence"]
    assert found.figure is not None and found.rows == [["net.layers.1.mlp.fc1.weight", 4, 1.0, 1e-3]]


def test_a_logarithmic_axis_is_labelled_with_numbers() -> None:
    told = full()
    told["layers"][0]["error_before"] = told["layers"][1]["error_before"] = 1e-4
    told["layers"][0]["convergence"] = {"every": 1, "residuals": [1.0, 0.1, 1e-6]}
    for each in pictures.draw({"a": told}):
        if each.file in ("error_by_block", "convergence"):
            assert each.figure is not None
            pictures.png(each.figure)
            (axes,) = each.figure.axes
            labels = [label.get_text() for label in axes.get_yticklabels() + axes.get_yticklabels(minor=True)]
            assert axes.get_yscale() == "log" and "0.1" in labels and not any("$" in label for label in labels)


def test_svg_is_xml_and_names_are_no_formulas(drawn: dict[str, pictures.Picture]) -> None:
    for each in drawn.values():
        if each.figure is not None:
            text = pictures.svg(each.figure, each.file)
            root = tree.fromstring(text)
            assert root.tag.endswith("svg") and "metadata" not in text


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    told = full()
    told["evaluation"] = None
    for layer in told["layers"]:
        layer["error_before"] = layer["error_after"] = None
    folder = stored(tmp_path / "out", told)
    _, notes = page.write([folder])
    said = " ".join(notes)
    assert "hf-prune eval FOLDER" in said and "Errors were not recorded" in said
    assert [e["file"] for e in checkpoint.read(folder)["pictures"]] == ["sparsity_by_layer.png", "weights.png"]


def test_blocks_and_kinds_from_names() -> None:
    for name, block, tail, kind in (
        ("vit.layers.11.mlp.fc1.weight", "vit.layers.11", "11", "mlp.fc1"),
        ("swin.layers.2.blocks.1.attn.qkv.weight[0:96]", "swin.layers.2.blocks.1", "2.1", "attn.qkv"),
        ("mobilenet.layer.3.convolution.weight", "mobilenet.layer.3", "3", "convolution"),
        ("classifier.weight", "classifier", "classifier", "classifier"),
    ):
        assert (pictures.block(name), pictures._tail(pictures.block(name)), pictures._kind(name)) == (block, tail, kind)


def test_histograms_count_the_weights(tmp_path: Path) -> None:
    folder = stored(tmp_path / "out", full())
    base = stored(tmp_path / "base", full())
    (base / "config.json").write_text('{"architecture": "x", "num_classes": 1, "pretrained_cfg": {}}')
    found, unread = page.histograms(folder, checkpoint.read(folder), base=str(base))
    assert unread == "" and [each["kept"] for each in found] == [16] * 3
    assert sum(found[0]["pruned"]) == 16 and sum(found[0]["dense"]) == 32, "4.5 deviations hold all of so few"
    found, unread = page.histograms(folder, checkpoint.read(folder))
    assert "name them with --base" in unread and found[0]["dense"] is None


def test_colours_stay_apart_for_every_eye() -> None:
    """Machado et al. 2009, severity 1: protan, deutan, tritan; distances of the simulated colours, 0 to about 1.7."""
    eyes = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    colours = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in pictures.COLOURS])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for name, eye in eyes.items():
        seen = np.clip(linear @ np.array(eye).T, 0, 1)
        seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
        least = min(np.linalg.norm(seen[i] - seen[j]) for i, j in itertools.combinations(range(4), 2))
        assert least > 0.15, f"{name}: the first four, which most pictures use"
    assert len(set(pictures.MARKERS)) == len(pictures.COLOURS), "and markers differ for all seven"


def test_without_matplotlib_one_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = stored(tmp_path / "out", full())
    assert cli.main(["report", str(folder)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = stored(tmp_path / "out", full())
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "deep" / "r.html")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/deep/r.html\n" and "note: " in err
    assert not (folder / "report.html").exists() and "pictures" not in checkpoint.read(folder)
    assert cli.main(["report", str(tmp_path)]) == 2


def test_in_a_real_browser(tmp_path: Path) -> None:
    """A headless browser shows the page from disk: every picture has a size, and nothing was asked for."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on this machine")
    folder = stored(tmp_path / "out", full())
    path, _ = page.write([folder])
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,3000", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    done = subprocess.run([browser, *options, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("L"))
    assert pixels.shape == (3000, 900)
    inked = [(band < 200).mean() for band in np.array_split(pixels, 12)]
    assert sum(share > 0.002 for share in inked) >= 8, "text and pictures down the page"
