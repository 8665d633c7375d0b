"""`hf-prune demo`: its data, the model that ships, and the whole command on them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_prune import assets, demo, models

MODEL = assets.path("data", "demo")


def fingerprint(images: demo.Labelled) -> str:
    return hashlib.sha256(b"".join(image.tobytes() + bytes([label]) for image, label in images)).hexdigest()[:16]


def test_the_split_is_disjoint_complete_and_frozen() -> None:
    """Another order would put images the model was trained on among those that judge it."""
    data = demo.digits()
    parts = [{image.tobytes() for image, _ in part} for part in data]
    assert [len(part) for part in data] == [1147, 200, 450]
    assert len(set.union(*parts)) == 1797, "no image twice, none in two parts"
    assert [fingerprint(part) for part in data] == SPLIT
    for part in data:
        assert {label for _, label in part} == set(range(10))


def test_the_model_that_ships() -> None:
    size = sum(f.stat().st_size for f in MODEL.iterdir() if f.is_file())
    assert size <= 1.5e6, "the demo's folder must stay small, it is part of every installation"

    loaded = models.load(str(MODEL))
    assert loaded.labels == demo.NAMES
    assert loaded.license == "apache-2.0"
    assert all(p.dtype == torch.float32 for p in loaded.module.parameters())
    assert all(p.shape[-1] % 4 == 0 for n, p in loaded.module.named_parameters() if p.dim() == 2), "2:4 and 1:4 apply"

    held_out = demo.digits().test
    pixels = loaded.processor([image.convert("RGB") for image, _ in held_out])
    with torch.no_grad():
        answers = loaded.outputs(loaded.batch(pixels)).argmax(1)
    right = int((answers == torch.tensor([label for _, label in held_out])).sum())
    assert right / len(held_out) >= 0.97
    assert f"({right} of {len(held_out)})" in (MODEL / "README.md").read_text(), "the card states what is measured"


def test_transformers_reads_greyscale_digits() -> None:
    """The folder is an ordinary one: the usual two lines work, on the images as they are."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(MODEL, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(MODEL)
    images = demo.digits().test[:20]
    logits = model(**processor([image for image, _ in images], return_tensors="pt")).logits
    named = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
    assert sum(name == demo.NAMES[label] for name, (_, label) in zip(named, images, strict=True)) >= 18


def test_image_set_hands_over_the_same_pixels() -> None:
    images = demo.digits().calibration[:5]
    found = list(demo.image_set(images, "calibration", labelled=False))
    assert [image.convert("L").tobytes() for image, _ in found] == [image.tobytes() for image, _ in images]
    assert {label for _, label in found} == {None}, "calibration sees no labels"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The command as a user runs it, in an empty folder and with sockets out of reach; (working folder, output)."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    paths = os.pathsep.join([str(folder), str(Path(demo.__file__).parent.parent)])
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-m", "hf_prune", "demo"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def table(output: str) -> dict[str, list[str]]:
    rows = [line.replace("%", "").split() for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("dense", *demo.RECIPES)}


def test_demo_prints_the_table(finished: tuple[Path, str]) -> None:
    rows = table(finished[1])
    assert list(rows) == ["dense", "magnitude", "sparsegpt", "snows"]
    accuracy = {name: float(row[0]) for name, row in rows.items()}
    error = {name: float(row[3]) for name, row in rows.items() if name != "dense"}
    assert accuracy["dense"] >= 97
    assert accuracy["magnitude"] < accuracy["sparsegpt"] < accuracy["snows"], "the demo shows the difference"
    assert error["magnitude"] > error["sparsegpt"] > error["snows"]


def test_demo_says_what_to_try_next(finished: tuple[Path, str]) -> None:
    output = finished[1]
    assert "Next, your own model:" in output and "hf-prune google/" in output
    assert max(map(len, output.splitlines())) <= 110


def test_demo_writes_a_folder_that_loads(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForImageClassification

    folder = finished[0] / demo.FOLDER
    report = json.loads((folder / "hf_prune.json").read_text())
    assert report["recipe"]["name"] == "snows" and report["pattern"] == demo.PATTERN
    assert report["calibration"]["samples"] == 200 and report["evaluation"]["samples"] == 450
    stated = 100 * report["evaluation"]["pruned"]["top1"]
    assert f"{stated:.1f}" == table(finished[1])["snows"][0], "the table and the report state the same"

    state = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    pruned = [layer for layer in report["layers"] if layer["pattern"]]
    assert len(pruned) >= 16
    for layer in pruned:
        groups = state[layer["name"]].reshape(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 1, layer["name"]


def test_demo_can_be_repeated_but_spares_a_strangers_folder(finished: tuple[Path, str], tmp_path: Path) -> None:
    from hf_prune import checkpoint

    checkpoint.refuse_existing(finished[0] / demo.FOLDER, overwrite=True)  # what the default folder is asked
    with pytest.raises(ValueError, match="exists already"):
        demo.run(["--output-dir", str(finished[0] / demo.FOLDER)])
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="was not written by hf-prune"):
        demo.run(["--output-dir", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "precious"


NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise OSError("the demo tried to reach the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""
SPLIT = ["edf59acc04ef6dd5", "6864562cf316c249", "3a4e5cf01c02d53e"]
