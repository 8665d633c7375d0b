"""What comes from outside may be hostile: checkpoints, repositories, names, images, archives, recipes, reports.

The token and the names of a repository to write are in test_hub.py, damaged compressed files in test_compress.py, the
escaping of the card in test_card.py.
"""

import io
import json
import math
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import vision
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import hf_prune
from hf_prune import calibration, card, checkpoint, cli, compress, inspect, recipe, schema, source, verify

COUNT = int(os.environ.get("HF_PRUNE_FUZZ", "150"))  # examples per target; more by hand
ROUNDS = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), derandomize=COUNT == 150)


# ----------------------------------------------------------------------------------------------------- paths and code
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "", "x.bin",
                                  ".hidden.safetensors", "a\\b.safetensors", "x.safetensors\n"])  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = vision.hf_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for work in (source.resolve, hf_prune.load, lambda f: compress.convert(f, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"no safetensors file of this folder|is not compressed"):
            work(str(folder))
    assert not (tmp_path / "out").exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def test_pickles_are_never_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = vision.hf_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    for name in ("pytorch_model.bin", "model.pth", "model.safetensors.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    for words in (["--nm", "2:4"], ["verify"], ["inspect"], ["convert"]):
        command = [str(folder), *words] if words[0] == "--nm" else [words[0], str(folder)]
        assert cli.main([*command, str(tmp_path / "out")] if words[0] == "convert" else command) == 2
        assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="can run code when it is read"):
        hf_prune.load(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(marker)))  # under another name
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        hf_prune.load(folder)
    assert not marker.exists()


def test_code_of_a_repository_does_not_run_unasked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = vision.hf_folder(tmp_path / "m")
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model", "AutoModel": "evil.Model"}
    vision.edit_config(folder, auto_map=auto, model_type="evil", architectures=["EvilForImageClassification"])
    assert cli.main([str(folder), "--nm", "2:4", "--dataset", str(tmp_path)]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--trust-remote-code"):
        hf_prune.load(folder)
    assert not marker.exists()


def test_a_recipe_is_data(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"nm: !!python/object/apply:os.system ['touch {marker}']\n")
    for work in (lambda: recipe.read(evil), lambda: recipe.resolve("magnitude", sets=[f"nm={evil.read_text()[4:]}"])):
        with pytest.raises(ValueError):
            work()
    for key in ("token", "trust_remote_code", "output_dir", "push_to_hub", "private", "overwrite"):
        with pytest.raises(ValueError, match="command line only"):
            recipe.resolve({"nm": "2:4", key: "x"}, flags={})
    assert not marker.exists()


# -------------------------------------------------------------------------------------------------- bombs and archives
def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_image_bombs_are_refused_before_they_unfold(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = png(60_000, 60_000, zlib.compress(bytes(50_000_000), 9))
    assert len(bomb) < 60_000
    with pytest.raises(calibration.BrokenImage, match="decompression bomb"):
        calibration.decode(bomb)
    folder = vision.image_folder(tmp_path / "images", {"a": 3, "b": 3})
    (folder / "a" / "bomb.png").write_bytes(bomb)
    given_images = calibration.images(str(folder), samples=7, seed=0)
    assert len(list(given_images)) == 6 and given_images.skipped == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


def test_archives_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets unpacks zip archives into its cache; entries that lead out of it must not arrive there."""
    inner = vision.encoded(vision.photo(1))
    shards = tmp_path / "data" / "tar"
    shards.mkdir(parents=True)
    with tarfile.open(shards / "train.tar", "w") as tar:
        for name in ("0.png", "../../../evil.png", str(tmp_path / "evil.png")):
            entry = tarfile.TarInfo(name)
            entry.size = len(inner)
            tar.addfile(entry, io.BytesIO(inner))
    zipped = tmp_path / "data" / "zip"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "train.zip", "w") as archive:
        for name in ("a/0.png", "b/1.png", "../../../../evil.png", str(tmp_path / "evil.png")):
            archive.writestr(name, inner)
    for folder in (shards, zipped):
        try:
            list(calibration.images(str(folder), samples=4, seed=0))
        except ValueError:
            pass  # refusing the archive is an answer too
    assert not list(tmp_path.rglob("evil.png")) and not (tmp_path.parent / "evil.png").exists()
    assert not Path("/evil.png").exists()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "not understood"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "not understood"),
        ({"a": None}, "no mapping"),
        ([], "no mapping"),
    ],
)
def test_headers_that_lie(head: Any, words: str, tmp_path: Path) -> None:
    text = json.dumps(head).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=words):
        list(inspect.file(path))
    path.write_bytes(struct.pack("<Q", 2**63) + text)
    with pytest.raises(ValueError, match="claims"):
        list(inspect.file(path))


def test_a_pattern_cannot_be_a_bomb(tmp_path: Path) -> None:
    told = {"format": 1, "pattern": "1:999", "tensors": {}}
    save_file({"a": torch.zeros(2)}, tmp_path / "model.sparse24.safetensors", metadata={"hf_prune": json.dumps(told)})
    with pytest.raises(ValueError, match="cannot be packed"):
        list(compress.read(tmp_path / "model.sparse24.safetensors"))


# --------------------------------------------------------------------------------------------------------------- fuzz
VALUES = ["2:4", "obs", {"method": "obs"}, "0.5"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
KEYS = st.sampled_from([*recipe.KEYS, "nm", "mask", "solve", "nonsense", "token"]) | st.text(max_size=6)


@ROUNDS
@given(values=st.dictionaries(KEYS, JSON | st.sampled_from(VALUES), max_size=5))
def test_fuzz_recipes(values: dict[str, Any]) -> None:
    """A recipe of anything is a run that can be written and read again, or one ValueError."""
    try:
        run = recipe.resolve(values, flags={"nm": "2:4"} if "sparsity" not in values else {})
    except ValueError:
        return
    again = yaml.safe_load(yaml.safe_dump(recipe.dump(run)))
    assert recipe.dump(recipe.resolve(again)) == recipe.dump(run)


@ROUNDS
@given(text=st.text(alphabet=st.sampled_from("abn:m24 -[]{},'\"!&*#|>%@`\n\t\x00é\u202e0."), max_size=60))
def test_fuzz_recipe_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        recipe.resolve(str(path), flags={"nm": "2:4"})
    except ValueError:
        pass


def good() -> dict[str, Any]:
    from test_checkpoint import report

    return report() | {"sha256": {"fc.weight": "0" * 64}, "compressed": None}


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


@ROUNDS
@given(data=st.data())
def test_fuzz_reports(data: Any, tmp_path: Path) -> None:
    """hf_prune.json with anything anywhere: refused by the schema, or good enough for the card and the check."""
    report = good()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([p for p in places(report) if p]))
        inner: Any = report
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = data.draw(JSON)
    (tmp_path / "hf_prune.json").write_text(json.dumps(report))
    (tmp_path / "config.json").write_text("{}")
    try:
        found = checkpoint.read(tmp_path)
    except ValueError:
        return
    assert schema.problems(found) == []
    text = card.render(found)
    head = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(head, dict) and "<script" not in text
    save_file({"fc.weight": torch.zeros(4, 8), "b": torch.ones(4, 8)}, tmp_path / "model.safetensors")
    verify.verify(tmp_path)


@ROUNDS
@given(data=st.data())
def test_fuzz_images(data: Any) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    content = bytearray(vision.encoded(vision.photo(data.draw(st.integers(0, 3))), kind))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        image = calibration.decode(bytes(content))
    except calibration.BrokenImage:
        return
    assert image.mode == "RGB" and math.prod(image.size) < 2 * 10**8


@ROUNDS
@given(data=st.data())
def test_fuzz_safetensors_headers(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4, 8), "b": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        list(inspect.file(path))
    except ValueError:
        pass
