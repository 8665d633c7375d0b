"""`hf-prune plan`: bytes to the last one, kernels by torch's own rules, operations by the closed form, 80 columns."""

import json
import re
from pathlib import Path

import pytest
import torch
import vision

from hf_prune import backends, cli, cost, forecast, models, recipe, stopwatch
from hf_prune.loop import choose, prune


def planned(folder: Path, **flags):
    loaded = models.load(str(folder))
    chosen = recipe.load("magnitude", **flags)
    return loaded, forecast.forecast(loaded, choose(loaded.module, cli._probe(loaded), chosen), chosen, probe=False)


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda f: vision.hf_folder(f, "vit"), []),
        (lambda f: vision.hf_folder(f, "vit", dtype=torch.bfloat16), ["--prune-head"]),
        (lambda f: vision.hf_folder(f, "resnet"), []),
        (lambda f: vision.hf_folder(f, "swin"), ["--skip", "re:layers\\.0"]),
        (lambda f: vision.timm_folder(f), ["--prune-stem"]),
        (lambda f: vision.timm_folder(f, "test_convnext"), []),
    ],
    ids=["vit", "vit bf16", "resnet", "swin", "timm vit", "timm convnext"],
)
@pytest.mark.parametrize("nm", ["2:4", "1:2"])
def test_bytes_are_those_of_the_files_that_are_written(make, more, nm, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model")
    vision.image_folder(tmp_path / "images", {"a": 2, "b": 2})
    words = ["./model", "--nm", nm, "--recipe", "magnitude", "--dataset", "images", *more]
    assert cli.main(["plan", *words, "--json", "--no-probe"]) == 0
    told = json.loads(capsys.readouterr().out)["totals"]
    assert cli.main([*words, "--no-eval", "--samples", "4", "--compressed", "--output-dir", "out", "--quiet"]) == 0
    files = {p.name: p.stat().st_size for p in Path("out").glob("*.safetensors")}
    packed = next(size for name, size in files.items() if name != "model.safetensors")
    assert (told["dense_file_bytes"], told["packed_file_bytes"]) == (files["model.safetensors"], packed)


def test_limits_are_those_of_torch() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    for name, kernel in (
        ("cuSPARSELt", SparseSemiStructuredTensorCUSPARSELT),
        ("CUTLASS", SparseSemiStructuredTensorCUTLASS),
    ):
        for dtype in (torch.float16, torch.bfloat16):
            limits = kernel._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == backends.LIMITS[name]


@pytest.mark.parametrize(
    ("shape", "pattern", "convolution", "whole", "takes"),
    [
        ((768, 192), "2:4", False, True, "cuSPARSELt CUTLASS TensorRT"),
        ((96, 96), "2:4", False, True, "cuSPARSELt TensorRT"),  # Swin-T's narrow layers
        ((1152, 4304), "2:4", False, True, "cuSPARSELt TensorRT"),  # SigLIP-so400m
        ((1000, 192), "2:4", False, True, "TensorRT"),  # a classifier of 1000 classes
        ((64, 64, 3, 3), "2:4", True, True, "TensorRT"),
        ((64, 3, 7, 7), "2:4", True, True, ""),
        ((768, 192), "2:4", False, False, ""),
        ((768, 192), "1:4", False, True, ""),
        ((768, 192), None, False, True, ""),
    ],
)
def test_which_kernel_takes_what(shape, pattern, convolution, whole, takes) -> None:
    reasons = {b: backends.refusal(b, shape, pattern, convolution=convolution, whole=whole) for b in backends.NAMES}
    assert [b for b, why in reasons.items() if why is None] == takes.split()
    assert all(why for b, why in reasons.items() if b not in takes.split())


def test_operations() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.Conv2d(6, 6, 3, groups=3),
        torch.nn.Flatten(1),
        torch.nn.Linear(54, 5),
    )
    found = cost.operations(model, torch.randn(2, 4, 5, 5))
    assert found == {
        "0.weight": 2 * 25 * 6 * 4 * 9,
        "1.weight": 2 * 9 * 6 * 2 * 9,
        "3.weight": 2 * 5 * 54,
    }


def test_text_fits_and_agrees_with_the_rows(tmp_path, capsys) -> None:
    vision.hf_folder(tmp_path / "vit")
    loaded, found = planned(tmp_path / "vit", nm="2:4")
    text = forecast.text(found)
    names = {w.name for w in found.weights}
    assert all(len(line) <= 80 or line in names for line in text.splitlines())
    assert all(line == line.rstrip() for line in text.splitlines())
    assert all(w.name in text for w in found.weights)
    assert f"{found.dense_file:,} bytes" in text and f"{found.packed_file:,} bytes" in text
    under = sum(w.parameters for w in found.weights if w.pattern)
    told = forecast.as_json(found, loaded, recipe.load("magnitude", nm="2:4"))
    assert told["totals"]["under_pattern"] == under > 0
    assert json.loads(json.dumps(told)) == told


def test_a_pattern_that_no_kernel_takes_is_not_said_to_be_taken(tmp_path) -> None:
    vision.hf_folder(tmp_path / "vit")
    _, found = planned(tmp_path / "vit", sparsity=0.5)
    assert found.packed_file is None and all(w.packed_bytes is None for w in found.weights)
    assert "kernels" not in forecast.text(found) and "--compressed" not in forecast.text(found)


@pytest.mark.parametrize("name", ["snows", "magnitude", "snows-paper", "sparsegpt"])
def test_seconds_are_measured_without_touching_the_model(name, tmp_path) -> None:
    vision.hf_folder(tmp_path / "vit")
    loaded = models.load(str(tmp_path / "vit"))
    before = {n: p.detach().clone() for n, p in loaded.module.state_dict().items()}
    chosen = recipe.load(name, nm="2:4", permute="magnitude")
    batch = cli._probe(loaded)
    few, many = (cost.seconds(loaded.module, batch, chosen, n) for n in (2, 20000))
    assert few.keys() == many.keys() and (few.keys() >= {stopwatch.LOOKING, stopwatch.BLOCKS})
    spent = [sum(stage.cpu for stage in found.values()) for found in (few, many)]
    assert spent[0] > 0 and (name == "magnitude" or spent[1] > 3 * spent[0]), "images cost time"
    assert all(torch.equal(before[n], p) for n, p in loaded.module.state_dict().items())
    staged = recipe.load("chita", sparsity=0.5)
    assert cost.seconds(loaded.module, batch, staged, 20) is None


def test_one_block_of_every_kind_is_timed_and_stands_for_the_others() -> None:
    kinds = ["a"] * 6 + ["b"] * 3 + ["c"]
    assert cost._spots(kinds, deep=False) == [0, 1, 6, 7, 9]
    assert cost._spots(kinds, deep=True) == [0, 1, 5, 6, 7, 8, 9]
    one = stopwatch.Spent(1.0, 1.0)
    flat = {0: one.plus(one), 1: one, 6: one, 7: one, 9: one}
    assert cost._summed(kinds, flat) == (11.0, 11.0)
    rising = {0: one, 1: one.plus(one), 5: one.plus(one, 5), 6: one, 8: one, 9: one}
    assert cost._summed(kinds, rising) == (21.0 + 4, 21.0 + 4), "1 + ... + 6 on a line, then 3 and 1"


def test_images_of_the_probe_have_the_range_and_the_smoothness_of_photographs() -> None:
    given = {"pixel_values": torch.rand(2, 3, 48, 64) * 4 - 2, "flag": torch.tensor([1, 2])}
    made = cost._images(given, 5, seed=0)
    pixels = made["pixel_values"]
    assert pixels.shape == (5, 3, 48, 64) and made["flag"].tolist() == [1, 2, 1, 2, 1]
    assert -2 <= float(pixels.min()) < -1 and 1 < float(pixels.max()) <= 2
    beside = torch.corrcoef(torch.stack([pixels[..., :-1].flatten(), pixels[..., 1:].flatten()]))[0, 1]
    assert 0.8 < float(beside) < 0.99, "noise has 0"
    assert not torch.equal(pixels, cost._images(given, 5, seed=1)["pixel_values"])


def test_stages_of_a_run_add_up_and_are_those_of_the_plan(tmp_path) -> None:
    vision.hf_folder(tmp_path / "vit")
    loaded = models.load(str(tmp_path / "vit"))
    chosen = recipe.load("snows", nm="2:4", samples=8, batch_size=4)
    small = cli._probe(loaded)
    said = cost.seconds(loaded.module, small, chosen, 8)
    seen = []
    took = prune(loaded.module, [cost._images(small, 4, k) for k in range(2)], chosen, progress=seen.append).resources
    assert took["by_stage"].keys() == {stopwatch.READING, *said}
    assert took["seconds"] == pytest.approx(sum(s["seconds"] for s in took["by_stage"].values()), rel=0.05)
    blocks, layers = ([e["block"] for e in seen if e["event"] == kind] for kind in ("block", "layer"))
    assert blocks == list(dict.fromkeys(layers)) and len(blocks) > 1


def test_plan_and_dry_run_say_the_same(tmp_path, capsys) -> None:
    vision.hf_folder(tmp_path / "vit")
    said = []
    for words in (["plan", str(tmp_path / "vit"), "--nm", "2:4"], [str(tmp_path / "vit"), "--nm", "2:4", "--dry-run"]):
        assert cli.main(words) == 0
        said.append(re.sub(r"^Memory: .*?(?=^Dry run)", "", capsys.readouterr().out, flags=re.MULTILINE | re.DOTALL))
    assert said[0] == said[1] and "Dry run: nothing was pruned and nothing was written." in said[0]
    assert cli.main(["plan", str(tmp_path / "vit"), "--sparsity", ".5", "--recipe", "obd"]) == 0
    assert "time is not predicted: this recipe looks at the whole model" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", str(tmp_path / "vit"), "--nm", "2:4", "--jsn"]) == 2
    assert cli.main(["plan", str(tmp_path / "vit")]) == 2
