"""hf-prune eval and hf-prune compare on tiny models and real files."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import vision
from safetensors.torch import load_file, save_file

from hf_prune import checkpoint, cli, compare, compress, models, schema, verify
from hf_prune import eval as command
from hf_prune.calibration import images
from hf_prune.evaluation import evaluate, paired

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit/: a tiny classifier whose answers differ. images/: train 25, validation 30. half/, some/: prunings of it."""
    place = tmp_path_factory.mktemp("home")
    vision.hf_folder(place / "vit")
    vision.edit_config(place / "vit", id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    generator = torch.Generator().manual_seed(0)

    def louder(state: dict) -> None:
        for name, tensor in state.items():
            if tensor.dim() >= 2:
                state[name] = torch.randn(tensor.shape, generator=generator) * (3.0 if "classifier" in name else 0.6)

    vision.edit_weights(place / "vit", louder)
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 5), "train")
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 6), "validation")
    vision.image_folder(place / "others", dict.fromkeys(NAMES, 3))
    for name, keep in (("half", ["--nm", "2:4"]), ("some", ["--sparsity", "0.9"])):
        words = [place / "vit", *keep, "--recipe", "magnitude", "--dataset", place / "images", "--samples", 8,
                 "--output-dir", place / name, "--device", "cpu", "--no-eval", "--quiet"]  # fmt: skip
        assert cli.main([str(word) for word in words]) == 0
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def half(home: Path, tmp_path: Path) -> Path:
    return vision.copy(home / "half", tmp_path / "half")


def words(home: Path, folder: Path, *more: object) -> list[str]:
    return [str(word) for word in ("eval", folder, "--dataset", home / "images", "--batch-size", 4, "--device", "cpu",
                                   *more)]  # fmt: skip


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert cli.main([str(word) for word in argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-prune: ")]
    assert len(said) == 1
    return said[0]


def by_hand(home: Path, folder: Path, **options: object) -> dict:
    dense = models.load(str(home / "vit"))
    judged = images(str(home / "images"), split="validation", **options)
    return evaluate(dense, compress.load(folder), judged, batch_size=4)


def same(one: dict, other: dict) -> bool:
    """Equal but for what a clock or a summation order decides."""
    keys = ("dense", "pruned", "difference", "agreement", "samples", "labelled", "images", "classes")
    exact = [{key: part[key] for key in keys} for part in (one, other)]
    for part in exact:
        for side in ("dense", "pruned"):
            part[side] = {key: value for key, value in part[side].items() if key != "ece"}
    close = [part["pruned"]["ece"] for part in (one, other)], [part["logit_error"] for part in (one, other)]
    return exact[0] == exact[1] and all(a == pytest.approx(b, rel=1e-5) for a, b in close)


def test_what_it_measures_prints_and_writes(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, half)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines + err.splitlines())) <= 80 + len(str(half)) and not {"\r", "\x1b"} & set(out + err)
    assert lines[1] == "half, 2:4, beside vit"
    report = checkpoint.read(half)
    found = report["evaluation"]
    expected = by_hand(home, half)
    expected["difference"] |= {"top5": None, "top5_interval": None}
    for side in ("dense", "pruned"):
        expected[side] |= {"top5": None, "top5_interval": None}
    assert same(found, expected) and found["agreement"] < 0.9, "or nothing is tested"
    assert found["split"] == "validation" and found["samples"] == 30 and found["hub"] is False
    assert f"{100 * found['pruned']['top1']:.1f} %" in out and f"{100 * found['difference']['top1']:+.1f} [" in out
    assert [row["name"] for row in found["depth"]["blocks"]][-3:] == ["vit.layers.0", "vit.layers.1", "classifier"]
    assert found["throughput"]["dense"] > 0 and found["command"].startswith("hf-prune eval ")
    card = (half / "README.md").read_text()
    assert "with `hf-prune eval`, later" in card and "change in points, image by image" in card
    assert schema.problems(report) == [] and verify.verify(half).problems == []
    assert [p.name for p in half.parent.iterdir()] == ["half"], "nothing is left beside it"


def test_json_is_all_there_is_on_stdout(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    assert cli.main(words(home, half, "--json", "--no-save", "--samples", 7)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 7 and 0 <= found["pruned"]["ece"] <= 1
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before, "--no-save"


def test_a_stopped_call_goes_on_to_the_same_figures(
    home: Path, half: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, ran = command.Kept.add, []

    def stop_at_the_third(self: command.Kept, part: dict) -> None:
        if self.count == 8:
            raise KeyboardInterrupt
        add(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(command.Kept, "add", stop_at_the_third)
        assert cli.main(words(home, half)) == 130
    assert "8 measured images are kept" in capsys.readouterr().err
    (kept,) = [path for path in half.parent.iterdir() if path.name.startswith(".half.eval-")]
    with (kept / "rank0.jsonl").open("a") as handle:
        handle.write('{"position": [8, 9')  # what a kill in the middle of a write leaves
    monkeypatch.setattr(command.Kept, "add", lambda self, part: (ran.extend(part["position"]), add(self, part)))
    assert cli.main(words(home, half, "--batch-size", 4)) == 0
    assert "going on after 8 images" in capsys.readouterr().err
    assert ran == list(range(8, 30)), "no image twice, none left out"
    found = checkpoint.read(half)["evaluation"]
    shutil.rmtree(half)
    vision.copy(home / "half", half)
    assert cli.main(words(home, half)) == 0
    assert same(found, checkpoint.read(half)["evaluation"])
    assert [p.name for p in half.parent.iterdir()] == ["half"]


def test_other_options_do_not_take_up_an_old_call(home: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command.Kept, "add", lambda self, part: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(words(home, half)) == 130
        assert cli.main(words(home, half, "--samples", 9)) == 130
    assert len([path for path in half.parent.iterdir() if path.name.startswith(".half.eval-")]) == 2


def test_other_images_stay_and_the_same_are_replaced(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, half)) == 0
    assert cli.main(["eval", str(half), "--dataset", str(home / "others"), "--device", "cpu"]) == 0
    report = checkpoint.read(half)
    assert report["evaluation"]["samples"] == 15 and [e["samples"] for e in report["other_evaluations"]] == [30]
    card = (half / "README.md").read_text()
    assert card.count("Dense and pruned on the same") == 2 and verify.verify(half).problems == []
    capsys.readouterr()
    assert cli.main(["eval", str(half), "--samples", "5", "--device", "cpu"]) == 0, "the images of the last time"
    report = checkpoint.read(half)
    assert report["evaluation"]["samples"] == 5 and [e["samples"] for e in report["other_evaluations"]] == [30]
    assert "replaces the evaluation on 15 images" in capsys.readouterr().err


def test_a_card_that_somebody_wrote_in_is_left_alone(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    card = half / "README.md"
    card.write_text(card.read_text() + "\nOur own words.\n")
    assert cli.main(words(home, half)) == 0
    assert "Our own words." in card.read_text() and "left as it is" in capsys.readouterr().err
    card.unlink()
    assert cli.main(words(home, half)) == 0 and "with `hf-prune eval`, later" in card.read_text()


def test_mistakes(home: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "name the images to judge it on with --dataset" in fails(capsys, "eval", half)
    assert "not a folder that hf-prune wrote" in fails(capsys, "eval", home / "vit", "--dataset", home / "images")
    assert "--samples 0: give a whole number" in fails(capsys, *words(home, half, "--samples", 0))
    other = vision.hf_folder(tmp_path / "other", "resnet")
    assert "is not the model that was pruned" in fails(capsys, *words(home, half, "--base", other))
    wrong = vision.image_folder(tmp_path / "wrong", {"x": 2, "y": 2})
    assert "2 of the dataset" in fails(capsys, "eval", half, "--dataset", wrong, "--device", "cpu")
    assert "where the benchmarks are" in fails(capsys, *words(home, half, "--eval-results", "default"))
    report = json.loads((half / "hf_prune.json").read_text())
    report["model"]["source"] = "./gone"
    (half / "hf_prune.json").write_text(json.dumps(report))
    assert "say where it is with --base" in fails(capsys, *words(home, half))
    assert cli.main(["eval", "--nonsense"]) == 2
    assert "Try hf-prune eval --help" in capsys.readouterr().err


def test_another_base_of_the_same_shape_is_noticed(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    other = vision.copy(home / "vit", half.parent / "other")
    vision.edit_weights(other, lambda state: [tensor.mul_(1.5) for tensor in state.values()])
    assert cli.main(words(home, half, "--base", other, "--no-save", "--samples", 4)) == 0
    assert "is it really what was pruned?" in capsys.readouterr().err


def test_eval_results_in_the_format_of_the_hub(tmp_path: Path) -> None:
    import yaml
    from huggingface_hub import parse_eval_result_entries

    found = {"dataset": "owner/bench", "split": "test", "labelled": 30, "created": "2026-01-01T00:00:00+00:00",
             "pruned": {"top1": 0.5, "top1_interval": [0.33, 0.67]}}  # fmt: skip
    path = command._eval_results(tmp_path, found, "top1")
    assert path == tmp_path / ".eval_results" / "owner_bench.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/bench", "top1", 0.5)
    with pytest.raises(ValueError, match="no accuracy to write"):
        command._eval_results(tmp_path, found | {"pruned": None}, "top1")


def test_two_processes_measure_every_image_once(home: Path, half: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "-m"]
    line = [*launch, "hf_prune", *words(home, half, "--samples", 21)]
    done = subprocess.run(line, capture_output=True, text=True, env=env, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    told = checkpoint.read(half)["evaluation"]
    assert same(told, json.loads(json.dumps(drop_top5(by_hand(home, half, samples=21)))))
    assert done.stdout.count("same first answer") == 1, "one process speaks"


def drop_top5(found: dict) -> dict:
    for side in ("dense", "pruned", "difference"):
        found[side] |= {"top5": None, "top5_interval": None}
    return found


# --- compare


@pytest.fixture
def two(home: Path, tmp_path: Path) -> list[Path]:
    folders = [vision.copy(home / name, tmp_path / name) for name in ("half", "some")]
    for folder in folders:
        assert cli.main(words(home, folder, "--quiet")) == 0
    return folders


def test_compare(two: list[Path], home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["compare", *map(str, two)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "50.0 %" in out and " 90." in out and out.count("dense") == 1
    found = compare.compare(two)
    label, answers = [], []
    for folder in two:
        loaded = models.load(str(folder))
        pairs = list(images(str(home / "images"), split="validation"))
        label = [x for _, x in pairs]
        with torch.no_grad():
            batch = loaded.batch(loaded.processor([image for image, _ in pairs]))
            answers.append(loaded.outputs(batch).argmax(1).numpy() == np.array(label))
    (pair,) = found["pairs"]
    assert {key: pair[key] for key in ("difference", "lost", "won", "p", "interval")} == paired(*answers)
    assert pair["lost"] + pair["won"] > 0, "or nothing is tested"
    assert found["notes"] == [] and found["dense"]["top1"] == checkpoint.read(two[0])["evaluation"]["dense"]["top1"]
    assert cli.main(["compare", *map(str, two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folders"][1]["zeros"] == pytest.approx(0.9, abs=0.01)


def test_compare_says_what_cannot_be_compared(two: list[Path], home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, two[1], "--samples", 9, "--quiet")) == 0
    found = compare.compare(two)
    assert found["pairs"] == [] and found["dense"] is None
    assert "not all were judged on the same images" in found["notes"][0]
    found = compare.compare([two[0], home / "some"])
    assert any("was not evaluated" in note for note in found["notes"])
    capsys.readouterr()
    report = json.loads((two[1] / "hf_prune.json").read_text())
    report["model"]["source"] = "elsewhere"
    (two[1] / "hf_prune.json").write_text(json.dumps(report))
    assert "only prunings of the same model" in fails(capsys, "compare", *two)


def test_pictures_of_numbers_are_not_needed(two: list[Path]) -> None:
    """An evaluation by an earlier version has no bits: it is shown, and not compared image by image."""
    report = json.loads((two[1] / "hf_prune.json").read_text())
    del report["evaluation"]["images"]
    (two[1] / "hf_prune.json").write_text(json.dumps(report))
    assert compare.compare(two)["pairs"] == []


def test_changed_weights_are_refused(home: Path, half: Path, capsys: pytest.CaptureFixture) -> None:
    state = load_file(half / "model.safetensors")
    state["classifier.bias"] += 1
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    assert "sha256" in fails(capsys, *words(home, half))
