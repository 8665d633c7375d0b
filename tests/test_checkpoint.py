"""The output folder: whole or absent, also when the process dies at the worst moment."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_prune import checkpoint, schema


class Stored:
    """What `write` needs of a loaded model: something that saves itself. The real one is used in test_cli.py."""

    def __init__(self, content: bytes = b"new", fail: BaseException | None = None) -> None:
        self.content, self.fail = content, fail

    def save(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({"w": torch.tensor(list(self.content), dtype=torch.uint8)}, file)
        file.chmod(0o600)  # as safetensors leaves it
        if self.fail is not None:
            raise self.fail


def content(folder: Path) -> bytes:
    return bytes(load_file(folder / "model.safetensors")["w"].tolist())


def report() -> dict:
    layer = {
        "name": "fc.weight", "checkpoint_name": "fc.weight", "shape": [4, 8], "pattern": "2:4", "kept": 16, "total": 32,
        "error_before": 0.5, "error_after": 0.25, "weight_norm_ratio": 0.9, "seconds": 0.1, "dense_reason": None,
    }  # fmt: skip
    return {
        "schema_version": 1,
        "recipe": {"name": "snows", "nm": "2:4", "samples": 8},
        "model": {"source": "me/m", "hub": True, "revision": None, "library": "transformers", "architecture": "M",
                  "dtype": "float32", "license": None, "classes": 5, "parameters": 40},
        "pattern": "2:4", "seed": 0, "versions": {"torch": "2"}, "command": None,
        "created": "2026-01-01T00:00:00+00:00",
        "layers": [layer, {**layer, "name": "b", "pattern": None, "kept": 32, "dense_reason": "y"}],
        "calibration": {"samples": 8, "skipped": 0},
        "evaluation": {
            "dense": {"top1": 0.9, "top1_interval": [0.8, 0.95], "top5": None},
            "pruned": {"top1": 0.5, "top1_interval": [0.4, 0.6], "top5": None},
            "agreement": 0.6, "logit_error": 0.3, "samples": 20,
        },
        "resources": {"seconds": 1.0, "peak_host_bytes": 10, "peak_device_bytes": None, "device": "cpu",
                      "world_size": 1},
    }  # fmt: skip


def write(folder: Path, stored: Stored | None = None, **options) -> None:
    checkpoint.write(folder, stored or Stored(), report(), "# card\n", recipe="nm: '2:4'\n", **options)


def test_the_folder_holds_everything_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]
    found = sorted(p.name for p in (tmp_path / "deep" / "out").iterdir())
    assert found == ["README.md", "hf_prune.json", "model.safetensors", "recipe.yaml"]
    digest = hashlib.sha256(b"new").hexdigest()
    assert checkpoint.read(tmp_path / "deep" / "out") == report() | {"sha256": {"w": digest}}
    assert checkpoint.read_recipe(tmp_path / "deep" / "out") == report()["recipe"]


def test_permissions_are_those_of_an_ordinary_folder(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        write(tmp_path / "out", Stored(fail=failure))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "out", Stored(b"old"))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out", Stored(fail=OSError("No space")), overwrite=True)
    assert content(tmp_path / "out") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", Stored(b"old"))
    real = os.rename

    def rename(a, b):
        if ".partial-" in str(a):
            raise OSError("the disk went away")
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="went away"):
        write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


KILLED = """
import sys, os, time
sys.path[:0] = {path!r}
import test_checkpoint as t
from pathlib import Path
from hf_prune import checkpoint
class Slow(t.Stored):
    def save(self, folder):
        super().save(folder)
        (folder / "config.json").write_text("{{}}")
        if {where!r} == "save":
            stop()
def stop():
    Path({flag!r}).write_text("now")
    time.sleep(60)
if {where!r} == "swap":
    real = os.rename
    def rename(a, b):
        if ".partial-" in str(a):
            stop()
        real(a, b)
    os.rename = rename
t.write(Path({folder!r}), Slow(b"new"), overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("where", ["save", "swap"])
@pytest.mark.parametrize("old", [False, True])
def test_kill_9(tmp_path: Path, where: str, old: bool) -> None:
    folder, flag = tmp_path / "out", tmp_path / "flag"
    if old:
        write(folder, Stored(b"old"))
    root = Path(__file__).resolve().parent
    code = KILLED.format(path=[str(root), str(root.parent)], where=where, flag=str(flag), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 60
    while not flag.exists():
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.02)
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".out.")]
    assert left and checkpoint.clean(folder) == [], "the leftovers of a living process are not touched"
    child.send_signal(signal.SIGKILL)
    child.wait()
    flag.unlink()

    # between the two renames of a swap the name is free for a moment; otherwise the old folder stands
    assert folder.exists() == (old and where == "save")
    assert checkpoint.clean(folder)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if old else [])
    if old:
        assert content(folder) == b"old"
    write(folder, overwrite=True)
    assert content(folder) == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_clean_leaves_strangers_alone(tmp_path: Path) -> None:
    names = [
        ".out.partial",
        "out.partial-h-1-00000000",
        ".other.partial-h-1-00000000",
        ".out.partial-elsewhere-1-00000000",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    assert checkpoint.clean(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


# -------------------------------------------------------------------------------------------- what is refused, and when
def refused(folder: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        checkpoint.refuse_existing(folder, **options)
    return str(caught.value)


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert "exists already: choose another one, or replace it with --overwrite" in refused(tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "out")
    checkpoint.refuse_existing(tmp_path / "out", overwrite=True)


def test_overwrite_never_deletes_what_hf_prune_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    assert "was not written by hf-prune (it holds no hf_prune.json)" in refused(tmp_path / "home", overwrite=True)
    with pytest.raises(ValueError, match="was not written"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    checkpoint.refuse_existing(tmp_path / "out")
    write(tmp_path / "out")
    assert checkpoint.read(tmp_path / "out")


def test_a_file_and_the_models_own_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "models" / "vit").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "vit")
    for own in (tmp_path / "models" / "vit", tmp_path / "models" / "vit" / "..", tmp_path / "link"):
        said = refused(own, overwrite=True, source=tmp_path / "models" / "vit")
        assert "own folder" in said or "holds the model" in said
    checkpoint.refuse_existing(tmp_path / "models" / "vit" / "pruned", source=tmp_path / "models" / "vit")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", Stored(b"old"))
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk" / "real") == b"new"


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: usage(10**9, 9 * 10**8, 10**8))
    checkpoint.refuse_full_disk(tmp_path / "not" / "yet", 5 * 10**7)
    with pytest.raises(ValueError, match="the run needs 116.8 MB, but only 100.0 MB are free in"):
        checkpoint.refuse_full_disk(tmp_path / "not" / "yet", 10**8)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot create it"):
        checkpoint.refuse_unwritable(tmp_path / "locked" / "out")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot create it"):
        checkpoint.refuse_unwritable(tmp_path / "file" / "out")
    checkpoint.refuse_unwritable(tmp_path / "a" / "b" / "out")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# -------------------------------------------------------------------------------------------------- reading, the schema
def test_read_refuses_what_it_cannot_trust(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no hf_prune.json"):
        checkpoint.read(tmp_path)
    file = tmp_path / "hf_prune.json"
    file.write_text('{"schema_version": 1,')
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(tmp_path)
    file.write_text(json.dumps({**report(), "schema_version": 2}))
    with pytest.raises(ValueError, match="schema_version is 2, this hf_prune reads up to 1: install a newer"):
        checkpoint.read(tmp_path)
    file.write_text(json.dumps({**report(), "seed": "x"}))
    with pytest.raises(ValueError, match="seed must be a whole number, found 'x'"):
        checkpoint.read(tmp_path)


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    odd = report()
    odd["layers"][0]["error_before"] = float("nan")
    odd["layers"][0]["weight_norm_ratio"] = float("inf")
    text = checkpoint.to_json(odd)
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["layers"][0]["error_before"] is None


def change(path: str, value: object) -> dict:
    changed = json.loads(json.dumps(report()))
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = changed
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


def test_a_valid_report_has_no_problems() -> None:
    assert schema.problems(report()) == []
    assert schema.problems(change("evaluation", None)) == []
    assert schema.problems(change("evaluation.dense", None)) == []
    assert schema.problems(change("something_new", 3)) == [], "new keys may appear within a version"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema_version", ..., "schema_version is missing"),
        ("recipe", [], "recipe must be"),
        ("model.library", "keras", "model.library must be"),
        ("model.revision", ..., "model.revision is missing"),
        ("versions", {"torch": 2}, "versions must be"),
        ("layers", {}, "layers must be a list"),
        ("layers.0", 3, "layers[0] must be a mapping"),
        ("layers.0.kept", 33, "layers[0].kept is 33, more than the total of 32"),
        ("layers.0.kept", True, "layers[0].kept must be a whole number"),
        ("layers.0.dense_reason", "both", "layers[0].pattern and dense_reason: exactly one"),
        ("layers.0.pattern", None, "layers[0].pattern and dense_reason: exactly one"),
        ("layers.1.shape", "4x8", "layers[1].shape must be a list of sizes"),
        ("layers.0.error_after", "low", "layers[0].error_after must be a number, or null"),
        ("calibration.samples", ..., "calibration.samples is missing"),
        ("evaluation.dense.top1", 90.0, "evaluation.dense.top1 must be between 0 and 1"),
        ("evaluation.pruned.top1_interval", [0.6, 0.4], "evaluation.pruned.top1_interval must be [low, high]"),
        ("evaluation.agreement", 60, "evaluation.agreement must be between 0 and 1"),
        ("evaluation.samples", -1, "evaluation.samples must be a whole number"),
        ("resources.world_size", 0, "resources.world_size must be at least 1"),
        ("resources.device", None, "resources.device must be a device"),
    ],
)
def test_each_departure_from_the_schema_is_named(path: str, value: object, said: str) -> None:
    found = schema.problems(change(path, value))
    assert any(said in problem for problem in found), found


def test_a_report_that_breaks_the_schema_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="breaks its own schema"):
        checkpoint.write(tmp_path / "out", Stored(), change("seed", None), "", recipe="")
    assert list(tmp_path.iterdir()) == []


def test_the_documentation_names_every_key_of_the_schema(repo_root: Path) -> None:
    text = (repo_root / "docs" / "hf_prune.json.md").read_text()
    keys = [*schema.TOP, *schema.MODEL, *schema.LAYER, *schema.CALIBRATION, *schema.EVALUATION, *schema.RESOURCES]
    assert [key for key in keys if f"`{key}`" not in text] == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (22_900_000, "22.9 MB"), (1_500_000_000, "1.5 GB"), (3e12, "3.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert checkpoint.size(count) == text


def test_weights_that_are_stored_twice_are_counted_once(tmp_path: Path) -> None:
    for name, count in (("model-00001-of-00002.safetensors", 10), ("model-00002-of-00002.safetensors", 5),
                        ("model.sparse24.safetensors", 8)):  # fmt: skip
        (tmp_path / name).write_bytes(b"x" * count)
    assert (checkpoint.weight_bytes(tmp_path), checkpoint.packed_bytes(tmp_path)) == (15, 8)
    for path in tmp_path.glob("model-*"):
        path.unlink()
    assert (checkpoint.weight_bytes(tmp_path), checkpoint.packed_bytes(tmp_path)) == (8, None), "--compressed-only"
