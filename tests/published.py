"""Folders as hf-prune writes them, and a client process that pushes them to a Hub on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vision
from loopback import Fault, Hub

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["ant", "bee", "cat", "dog", "elk"]


def sources(place: Path) -> None:
    """vit/, timm/: tiny classifiers. images/: train 25, validation 15."""
    vision.hf_folder(place / "vit")
    vision.edit_config(place / "vit", id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    vision.timm_folder(place / "timm")
    config = json.loads((place / "timm" / "config.json").read_text())
    vision.edit_config(place / "timm", pretrained_cfg={**config["pretrained_cfg"], "label_names": NAMES})
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 5), "train")
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 3), "validation")


def prune(place: Path, model: str, output: str, *more: str) -> Path:
    """Run the command on a folder of `sources`; returns its output folder."""
    from hf_prune import cli

    words = [str(place / model), "--nm", "2:4", "--recipe", "magnitude", "--dataset", str(place / "images")]
    words += ["--samples", "8", "--batch-size", "8", "--device", "cpu", "--quiet", "--output-dir", str(place / output)]
    assert cli.main([*words, *more]) == 0
    return place / output


# Reads one JSON list of words per line, runs the command with them, answers with one JSON object.
WORKER = """
import contextlib, io, json, sys
from hf_prune import cli
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
        except BaseException as bug:
            import traceback
            traceback.print_exc()
            code = "traceback"
    sys.__stdout__.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\\n")
    sys.__stdout__.flush()
"""


class Client:
    """`hf-prune WORDS`, many times, in one process whose only Hub is the one on the loopback."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, *words: object) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def client(hub: Hub, home: Path, **env: str) -> Iterator[Client]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=hub.env(home, PYTHONPATH=str(ROOT), **env),
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


# ------------------------------------------------------------------------------------------- every fault at every step
STEPS = {  # what the client asks for, in order -> how the request looks
    "who is it": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "look": ("GET", r"/api/models/[^/]+/[^/]+/revision/"),
    "compare": ("GET", r"/api/models/[^/]+/[^/]+/tree/"),
    "announce": ("POST", r"/api/models/[^/]+/[^/]+/preupload/"),
    "batch": ("POST", r"/info/lfs/objects/batch"),
    "upload": ("PUT", r"/_lfs/"),
    "confirm": ("POST", r"/_lfs/verify"),
    "commit": ("POST", r"/api/models/[^/]+/[^/]+/commit/"),
}
FAULTS = (401, 403, 409, 413, 429, 500, 503, "cut", "lost")
PASSING = (429, 500, 503, "cut", "lost")


def push_with_fault(
    hub: Hub, run: Client, folder: Path, repo: str, step: str, status: int | str, *more: str
) -> dict[str, Any]:
    """One push into a new repository with one fault, then one without; what was said, and what the Hub held."""
    hub.objects.clear()  # of earlier pushes: every file has to be uploaded
    hub.faults[:] = [Fault(*STEPS[step], status)]
    said = run("push", folder, repo, *more)
    met = hub.faults[0].times == 0
    hub.faults[:] = []
    first = history(hub, repo)
    again = run("push", folder, repo, *more)
    return {
        "step": step, "status": status, "met": met, "code": said["code"], "out": said["out"], "err": said["err"],
        "commits": first, "again": again["code"], "commits_after": history(hub, repo),
        "complete": complete(hub, repo, folder),
    }  # fmt: skip


def history(hub: Hub, repo: str) -> int:
    """Commits on main after the first."""
    held = hub.repos.get(("model", repo))
    return len(held.refs["main"]) - 1 if held else 0


def complete(hub: Hub, repo: str, folder: Path, ref: str = "main") -> bool:
    """Whether the repository holds the folder, byte for byte, and no weights beside."""
    held = {name: content for name, content in hub.files(repo, ref=ref).items() if name != ".gitattributes"}
    return held == {path.name: path.read_bytes() for path in folder.iterdir()}
