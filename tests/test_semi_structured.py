"""2:4 on sparse tensor cores: what is decided from timings, what is said without such a GPU, and a GPU's own answer."""

import json
from pathlib import Path

import pytest
import torch
import vision
from torch import nn

import hf_prune
from hf_prune import bench, card, checkpoint, cli, schema, semi_structured, verify
from hf_prune.semi_structured import Layer

GPU = semi_structured.missing() is None
needs_gpu = pytest.mark.skipif(not GPU, reason=f"2:4 kernels need sparse tensor cores, and {semi_structured.missing()}")


def layer(name, dense, sparse, batch=1, error=1e-4):
    return Layer(name, (64, 64), batch, 8, dense, sparse, error)


def test_a_layer_is_chosen_for_what_it_wins_over_all_batch_sizes():
    won = [layer("a", 1.0, 1.2, 1), layer("a", 10.0, 7.0, 64)]
    lost = [layer("b", 1.0, 0.9, 1), layer("b", 10.0, 12.0, 64)]
    tied = [layer("c", 1.0, 0.99)]
    wrong = [layer("d", 1.0, 0.5, error=0.5)]
    refused = [layer("e", 1.0, 0.5, 1), layer("e", 1.0, None, 64)]
    assert semi_structured.choose([*won, *lost, *tied, *wrong, *refused]) == ["a"]


class Half(nn.Module):
    """Three 2:4 layers, one that is not, and one whose shape no kernel takes."""

    def __init__(self):
        super().__init__()
        self.wide, self.back, self.free = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)
        self.odd = nn.Linear(64, 10)
        with torch.no_grad():
            for m in (self.wide, self.back, self.odd):
                m.weight.view(-1, 4)[:, 2:] = 0

    def forward(self, x):
        return self.odd(self.free(self.back(self.wide(x).relu())))


def clock_of(rates):
    """A clock that gives the dense time, then the sparse one, for each layer, and the same for the whole model."""
    times = iter(rates)
    return lambda work: (work(), next(times))[1]


def test_only_what_follows_the_pattern_in_a_fitting_shape_is_eligible():
    assert list(semi_structured.eligible(Half())) == ["wide.weight", "back.weight"]


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([1.0, 0.6, 1.0, 1.5, 3.0, 2.5], ["wide.weight"]),
        ([1.0, 0.6, 1.0, 0.7, 3.0, 2.0], ["wide.weight", "back.weight"]),
        ([1.0, 1.6, 1.0, 1.7], []),
        ([1.0, 0.6, 1.0, 0.7, 3.0, 3.1], []),  # layers that win one by one, and a model that does not
    ],
)
def test_measure_with_a_clock_of_our_own(times, chosen):
    model = Half()
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    x = torch.randn(4, 64)
    speed = semi_structured.measure(model, {4: x}, convert=torch.clone, clock=clock_of(times))
    assert speed.chosen == chosen
    assert [entry.name for entry in speed.layers] == ["wide.weight", "back.weight"]
    assert [entry.rows for entry in speed.layers] == [4, 4]
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]), "the model is as before"
    told = json.loads(json.dumps(speed.as_json()))
    assert bench.words_of(told)[-1].startswith("No gain") == (not chosen)
    assert all(len(line) <= 80 for line in bench.table(told).splitlines())


def test_outputs_that_differ_are_not_chosen():
    speed = semi_structured.measure(
        Half(), {4: torch.randn(4, 64)}, convert=lambda w: w * 1.5, clock=clock_of([1.0, 0.1] * 4)
    )
    assert speed.chosen == [] and all(entry.error > 0.1 for entry in speed.layers)


@pytest.mark.skipif(GPU, reason="this machine has sparse tensor cores")
def test_without_such_a_gpu_nothing_is_timed_and_nothing_claimed(tmp_path, capsys):
    with pytest.raises(ValueError, match="smaller download there and no speed-up; leave the model dense"):
        hf_prune.to_semi_structured(Half())
    folder = pruned(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli.main(["bench", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nothing was timed: this machine has no NVIDIA GPU." in out
    assert "2:4 brings a smaller download here and no speed-up." in out
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert cli.main(["bench", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] is False
    assert cli.main(["bench", str(folder), "--batch-size", "0"]) == 2


def pruned(place: Path, pattern: str = "2:4") -> Path:
    vision.hf_folder(place / "model")
    vision.image_folder(place / "images", {"a": 2, "b": 2})
    words = [str(place / "model"), "--nm", pattern, "--recipe", "magnitude", "--dataset", str(place / "images")]
    out = place / "out"
    assert cli.main([*words, "--no-eval", "--samples", "4", "--output-dir", str(out), "--quiet"]) == 0
    return out


@pytest.mark.parametrize("chosen", [["a.weight"], []])
def test_a_measurement_goes_into_the_report_and_the_card(chosen, tmp_path):
    folder = pruned(tmp_path)
    report = checkpoint.read(folder)
    assert "No inference speed was measured" in (folder / "README.md").read_text()
    speed = semi_structured.Speed(
        "NVIDIA X_1", "2.9", "float16", [layer("a.weight", 1e-3, 5e-4, 64)], chosen,
        [{"batch": 64, "dense": 0.002, "sparse": 0.0016, "error": 1e-3}] if chosen else [],
    )  # fmt: skip
    bench.write(folder, report, json.loads(json.dumps(speed.as_json())))
    new = checkpoint.read(folder)
    assert schema.problems(new) == [] and new["speed"]["chosen"] == chosen
    text = (folder / "README.md").read_text()
    assert "No inference speed was measured" not in text and "NVIDIA X\\_1" in text
    assert ("| 64 | 2.00 | 1.60 | 1.25 |" in text) == bool(chosen) and ("no gain from 2:4" in text) == (not chosen)
    assert text == card.render(new, name="out")
    assert verify.verify(folder).problems == [], "the card still says what hf_prune.json says"


def test_a_card_written_in_by_hand_stays(tmp_path, monkeypatch, capsys):
    folder = pruned(tmp_path)
    mine = (folder / "README.md").read_text() + "\nMy own words.\n"
    (folder / "README.md").write_text(mine)
    speed = semi_structured.Speed("X", "2.9", "float16", [layer("a.weight", 1e-3, 5e-4, 64)], ["a.weight"], [])
    monkeypatch.setattr(semi_structured, "missing", lambda device: None)
    monkeypatch.setattr(bench, "measured", lambda *args: json.loads(json.dumps(speed.as_json())))
    assert cli.main(["bench", str(folder)]) == 0
    told = capsys.readouterr()
    assert "changed by hand" in told.err and "hf_prune.json holds this measurement now" in told.out
    assert (folder / "README.md").read_text() == mine and checkpoint.read(folder)["speed"]["chosen"] == ["a.weight"]


def test_other_patterns_are_refused(tmp_path, capsys):
    assert cli.main(["bench", str(pruned(tmp_path, "1:4"))]) == 2
    assert "pruned 1:4; the sparse tensor cores take 2:4 only" in capsys.readouterr().err


@needs_gpu
def test_on_a_gpu_outputs_agree_and_the_choice_holds():
    model = Half().cuda().half()
    x = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    wanted = model(x)
    speed = semi_structured.measure(model, {64: x})
    assert all(entry.error is not None and entry.error < semi_structured.CLOSE for entry in speed.layers)
    assert torch.equal(model(x), wanted)
    hf_prune.to_semi_structured(model)
    assert float((model(x) - wanted).norm() / wanted.norm()) < 5 * semi_structured.CLOSE
