"""No work is lost: killed at any moment, on a full disk or a read-only one, a run goes on to the same bits."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import vision
from nets import Block
from torch import nn

from hf_prune import cli, resume
from hf_prune.loop import Recipe, prune
from hf_prune.resume import NotSaved, Saved, differences

DEFAULT = Recipe(nm="2:4", target={"caution": 0.5})  # what earlier blocks were fitted to counts in later ones
fork = multiprocessing.get_context("fork") if os.name == "posix" else None


def network(blocks=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ModuleList([Block() for _ in range(blocks)])[0:blocks][0],
                         *[Block() for _ in range(blocks - 1)], nn.Linear(8, 5))  # fmt: skip


def images(n=3, size=4):
    return [torch.randn(size, 6, 12, generator=torch.Generator().manual_seed(k)) for k in range(n)]


def digest(model):
    state = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
    return hashlib.sha256(state).hexdigest()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def one_run(folder, moment, answer):
    """In a process of its own.  moment: None, ("event", n) or ("write", n, share of the bytes that get written)."""
    model, seen = network(), [0]
    pour, writes = resume._pour, [0]

    def tell(event):
        seen[0] += 1
        if moment and moment[0] == "event" and seen[0] == moment[1]:
            die()

    def leak(file, content):
        writes[0] += 1
        if moment and moment[0] == "write" and writes[0] == moment[1]:
            pour(file, content[: int(moment[2] * len(content))])
            die()
        pour(file, content)

    resume._pour = leak
    prune(model, images(), DEFAULT, progress=tell, checkpoint=folder)
    answer.put((digest(model), seen[0], writes[0]))


def child(folder, moment=None):
    """(hash, events, writes) of a run in another process; None where it was killed."""
    answer = fork.SimpleQueue()
    process = fork.Process(target=one_run, args=(folder, moment, answer))
    process.start()
    process.join(60)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0
    return answer.get()


@pytest.mark.skipif(fork is None, reason="signals and fork")
def test_killed_at_random_moments_also_inside_a_write_it_ends_in_the_same_bits(tmp_path):
    prune(network(), images(), DEFAULT)  # what torch imports on first use is then there in every child
    whole, events, writes = child(tmp_path / "whole")
    draw = random.Random(0)
    moments = [("event", draw.randint(2, events)) for _ in range(4)]
    moments += [("write", draw.randint(1, writes), draw.random()) for _ in range(4)]
    for k, moment in enumerate(moments):
        folder = tmp_path / str(k)
        assert child(folder, moment) is None, f"{moment}: was to be killed"
        again = child(folder, ("write", 2, 0.5)) or child(folder)  # and the resumed run is killed once more
        assert again[0] == whole, moment
        assert not list(folder.glob("*.part"))


def in_stages(folder, last, answer):
    """Five stages on gradients, in a process of its own, which dies when stage `last` begins (None: never)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                          nn.Flatten(), nn.Linear(128, 5)).eval()  # fmt: skip
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 3, 8, 8, generator=g), torch.randint(0, 5, (16,), generator=g)) for _ in range(3)]
    begun = []

    def tell(event):
        if event["event"] == "stage" and "stage" in event["text"].split(" of ")[0]:
            begun.append(event["text"])
            if last and event["text"].startswith(f"stage {last} "):
                die()

    fisher = {"minibatch": 2, "first_order": "loss", "dwell": 0.5, "average": 0.5, "ridges": [1e-3, 1e-2]}
    recipe = Recipe(mask={"method": "chita"}, solve=None, refine=None, sparsity=0.7, scope="model", stages=5,
                    batchnorm="renew", fisher=fisher)  # fmt: skip
    report = prune(model, batches, recipe, progress=tell, checkpoint=folder)
    told = [{k: v for k, v in stage.items() if "seconds" not in k} for stage in report.stages]
    answer.put((digest(model), begun, told, len(report.notes)))


@pytest.mark.skipif(fork is None, reason="signals and fork")
def test_a_run_in_stages_goes_on_after_the_last_one(tmp_path):
    def attempt(folder, last=None):
        answer = fork.SimpleQueue()
        process = fork.Process(target=in_stages, args=(folder, last, answer))
        process.start()
        process.join(60)
        return answer.get() if process.exitcode == 0 else process.exitcode

    whole = attempt(tmp_path / "whole")
    assert len(whole[1]) == 5 and whole[2][-1]["averaged"] == 2
    for last in (1, 3, 5):
        folder = tmp_path / str(last)
        assert attempt(folder, last) == -signal.SIGKILL
        bits, begun, told, notes = attempt(folder)
        assert bits == whole[0] and told == whole[2] and notes == whole[3], "what a run that lives ends in"
        assert len(begun) == 5 if last == 1 else begun[0] == f"going on after stage {last - 1} of 5", begun


def test_a_damaged_byte_is_found_by_its_checksum(tmp_path):
    prune(network(), images(), DEFAULT, checkpoint=tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit of one weight: still a readable file
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name}: .* checksum does not fit .* delete the file"):
        prune(network(), images(), DEFAULT, checkpoint=tmp_path)
    file.unlink()
    model, alone = network(), network()
    prune(model, images(), DEFAULT, checkpoint=tmp_path)
    prune(alone, images(), DEFAULT)
    assert digest(model) == digest(alone)


def test_the_importance_is_read_and_not_computed_again(tmp_path, monkeypatch):
    from hf_prune import loop

    first, again = network(), network()
    prune(first, images(), DEFAULT, checkpoint=tmp_path)
    monkeypatch.setattr(loop, "importance", lambda *a, **k: pytest.fail("computed again"))
    for file in sorted(tmp_path.glob("*.safetensors"))[:2]:
        file.unlink()
    prune(again, images(), DEFAULT, checkpoint=tmp_path)
    assert digest(first) == digest(again)


def test_random_numbers_go_on_where_they_were(tmp_path):
    saved = Saved(tmp_path, {"recipe": {}})
    torch.manual_seed(5)
    torch.rand(3)
    saved.add("a", {"w": torch.ones(2)}, {"entries": []})
    expected = torch.rand(4)
    torch.manual_seed(0)
    w = torch.zeros(2)
    assert saved.restore("a", {"w": w}) == {"entries": []} and w.tolist() == [1, 1]
    assert torch.equal(torch.rand(4), expected)
    assert saved.restore("b", {}) is None


def test_differences_are_named():
    before = {"hf_prune": "0.1", "images": "8 images", "recipe": {"nm": "2:4", "target": {"mix": 0.5}}}
    now = {"hf_prune": "0.2", "images": "8 images", "recipe": {"nm": "2:4", "target": {"mix": 0.1}, "seed": 1}}
    assert differences(before, now) == [
        "hf_prune was 0.1, is 0.2", "recipe.target.mix was 0.5, is 0.1", "recipe.seed was None, is 1",
    ]  # fmt: skip
    assert differences({"images": ["a", "b"]}, {"images": ["a", "c"]}) == ["images[1] was b, is c"]


def test_a_version_that_changed_is_refused(tmp_path, monkeypatch):
    import hf_prune

    prune(network(), images(), DEFAULT, checkpoint=tmp_path)
    monkeypatch.setattr(hf_prune, "__version__", "9.9")
    with pytest.raises(ValueError, match="another run: hf_prune was .*, is 9.9"):
        prune(network(), images(), DEFAULT, checkpoint=tmp_path)


def test_a_disk_that_fills_up_keeps_what_was_saved(tmp_path, monkeypatch):
    pour = resume._pour
    used = [0]

    def full(file, content):
        room = max(0, 42_000 - used[0])
        pour(file, content[:room])
        used[0] += len(content)
        if len(content) > room:
            raise OSError(28, "No space left on device")

    model = network()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_pour", full)
        with pytest.raises(NotSaved, match=r"could not be written in .*No space left on device.* are intact"):
            prune(model, images(), DEFAULT, checkpoint=tmp_path)
    kept = list(tmp_path.glob("*.safetensors"))
    assert 0 < len(kept) < 4 and not list(tmp_path.glob("*.part"))
    again, alone = network(), network()
    prune(again, images(), DEFAULT, checkpoint=tmp_path)
    prune(alone, images(), DEFAULT)
    assert digest(again) == digest(alone)


def test_a_folder_that_takes_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotSaved, match="cannot be created"):
        prune(network(), images(), DEFAULT, checkpoint=tmp_path / "file" / "blocks")


# --------------------------------------------------------------------------------------------------------- the command
def command(place, *more):
    return [str(place / "vit"), "--nm", "2:4", "--dataset", str(place / "images"), "--samples", "8", "--batch-size",
            "2", "--no-eval", *more]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    vision.hf_folder(folder / "vit")
    vision.image_folder(folder / "images", {"ant": 8, "bee": 8})
    return folder


def test_a_full_disk_between_blocks_is_one_line_and_exit_code_74(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pour, calls = resume._pour, [0]

    def full(file, content):
        calls[0] += ".safetensors" in file.name or str(file.name).endswith(".part")
        if calls[0] > 4 and b"block" in bytes(content[:4000]) and b"importance" not in bytes(content[:4000]):
            raise OSError(28, "No space left on device")
        pour(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "_pour", full)
        assert cli.main([*command(place), "--quiet"]) == 74
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said, said
    assert cli.main([*command(place), "--quiet", "--resume"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["vit-2of4"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_keeps_the_blocks_and_says_so(place, tmp_path):
    root = Path(__file__).resolve().parent.parent
    script = "import os, signal, sys, hf_prune.resume as r\nadd = r.Saved.add\n"
    script += "def then(self, *a):\n    add(self, *a)\n    os.kill(os.getpid(), signal.SIGTERM)\nr.Saved.add = then\n"
    script += f"from hf_prune.cli import main\nsys.exit(main({command(place)}))"
    env = {**os.environ, "PYTHONPATH": str(root)}
    began = time.time()
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert answer.returncode == 143, answer.stderr
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("hf-prune: stopped by SIGTERM; no output folder was written. 1 finished block is kept")
    assert "Traceback" not in answer.stderr and time.time() - began < 120


def test_streamed_calibration_gives_the_same_images_again(place):
    """A stopped run of streamed images draws them anew: seed and buffer decide, and the fingerprint checks."""
    from hf_prune.calibration import images as open_images

    drawn = []
    for seed in (0, 0, 1):
        found = open_images(str(place / "images"), samples=6, seed=seed, streaming=True)
        drawn.append([image.tobytes() for image, _ in found])
    assert drawn[0] == drawn[1] != drawn[2]
