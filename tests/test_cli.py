"""The command as a user meets it: flags, messages, exit codes, and the whole way on a tiny model and real files."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import vision
import yaml
from safetensors.torch import load_file

from hf_prune import checkpoint, cli, schema
from hf_prune.card import slug

ROOT = Path(__file__).resolve().parent.parent

FLAGS = """
--nm --sparsity --scope --allocation --skip --only --prune-stem --prune-head
--recipe --set --permute --seed --device --dtype --host-memory --device-memory --timeout
--dataset --config --split --image-column --label-column --samples --batch-size
--eval-dataset --eval-split --eval-samples --no-eval
--output-dir --overwrite --resume --dry-run --report --compressed --compressed-only
--revision --token --trust-remote-code
--push-to-hub --private --push-revision --create-pr --commit-message
--quiet --verbose --version --help
""".split()


def test_the_flags_are_frozen() -> None:
    found = [s for a in cli.parser()._actions for s in a.option_strings if s.startswith("--")]
    assert sorted(found) == sorted(FLAGS), "flags are what users' scripts hold: adding one is fine, enter it here"


def python(*words: str, **options) -> subprocess.CompletedProcess:
    """`python -m hf_prune WORDS` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "hf_prune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **options)


def test_help_is_short_grouped_and_fast() -> None:
    answer = python("--help")
    assert answer.returncode == 0 and answer.stderr == ""
    lines = answer.stdout.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 80
    assert [flag for flag in FLAGS if flag not in answer.stdout] == []
    assert answer.stdout.count("\n  hf-prune ") == 2, "two examples"
    code = "import sys, hf_prune.cli as c\nc.main(['--help'])\nprint('torch' in sys.modules, file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert answer.stderr.strip() == "False", "--help must not wait for torch"


def test_version() -> None:
    import hf_prune

    answer = python("--version")
    assert (answer.returncode, answer.stdout) == (0, f"hf-prune {hf_prune.__version__}\n")


def test_no_word_at_all_prints_the_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 2
    assert "usage: hf-prune MODEL" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- a model and images
@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vit/: a tiny classifier. bare/: a backbone. timm/. images/: train 24, validation 12, of its five classes."""
    place = tmp_path_factory.mktemp("home")
    vision.hf_folder(place / "vit")
    vision.hf_folder(place / "bare", head=False)
    vision.timm_folder(place / "timm")
    for model in ("vit", "timm"):
        label(place / model)
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 5), "train")
    vision.image_folder(place / "images", dict.fromkeys(NAMES, 3), "validation")
    return place


NAMES = ["ant", "bee", "cat", "dog", "elk"]


def label(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "model_type" in config:
        vision.edit_config(folder, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    else:
        vision.edit_config(folder, pretrained_cfg={**config["pretrained_cfg"], "label_names": NAMES})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what is written without --output-dir lands there


def words(home: Path, *more: object, model: str = "vit", nm: str | None = "2:4") -> list[str]:
    fixed = [home / model, "--dataset", home / "images", "--samples", 16, "--batch-size", 8, "--device", "cpu"]
    return [str(word) for word in [*fixed, *(["--nm", nm] if nm else []), *more]]


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The message of a command that must end with exit code 2, and say nothing else on stderr but asides."""
    assert cli.main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if not line.endswith(" ...") and not line.startswith("note: ")]
    assert said and said[0].startswith("hf-prune: "), err
    return "\n".join(said)


@pytest.fixture(scope="module")
def done(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole run in its own process: the output folder, and what was printed."""
    place = tmp_path_factory.mktemp("run")
    answer = python(*words(home), cwd=place, env={"COLUMNS": "80"})
    assert answer.returncode == 0, answer.stderr
    assert [p.name for p in place.iterdir()] == ["vit-2of4"]
    (place / "stderr").write_text(answer.stderr)
    return place / "vit-2of4", answer.stdout


def sparse(tensor: torch.Tensor, n: int = 2, m: int = 4) -> bool:
    return bool(((tensor.reshape(-1, m) != 0).sum(1) <= n).all())


def test_the_whole_way(done: tuple[Path, str], home: Path) -> None:
    folder, _ = done
    report = checkpoint.read(folder)
    assert schema.problems(report) == []
    dense, pruned = load_file(home / "vit" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(dense) == set(pruned)
    followed = [layer for layer in report["layers"] if layer["pattern"]]
    assert len(followed) == 12, "q, k, v, out, fc1, fc2 of two blocks"
    for layer in report["layers"]:
        weight = pruned[layer["checkpoint_name"]]
        assert list(weight.shape) == layer["shape"]
        assert int((weight != 0).sum()) == layer["kept"] or not layer["pattern"]
        assert not torch.signbit(weight[weight == 0]).any(), "zeros are +0.0"
        if layer["pattern"]:
            assert sparse(weight) and layer["kept"] <= layer["total"] // 2
            assert not torch.equal(weight, dense[layer["checkpoint_name"]] * (weight != 0)), "kept weights were refit"
        else:
            assert torch.equal(weight, dense[layer["checkpoint_name"]]) and layer["dense_reason"]
    assert report["calibration"] == {
        "dataset": str(home / "images"), "hub": False, "config": None, "split": "train", "samples": 16, "skipped": 0,
    }  # fmt: skip
    evaluation = report["evaluation"]
    assert (evaluation["samples"], evaluation["split"], evaluation["hub"]) == (15, "validation", False)
    assert evaluation["dense"]["top5"] is None, "with five classes it is 1 for every model"
    assert 0 < evaluation["logit_error"] < 1
    assert evaluation["notes"] == [], "15 of at most 1000 images are no news"
    assert report["model"]["classes"] == 5 and report["model"]["library"] == "transformers"
    assert report["resources"]["peak_device_bytes"] is None or torch.cuda.is_available()
    assert report["resources"]["device"] == "cpu" and report["seed"] == 0
    assert {"hf-prune", "torch", "transformers", "python"} <= set(report["versions"]) or "torch" in report["versions"]


def test_what_is_printed_fits_80_columns_and_says_the_figures(done: tuple[Path, str]) -> None:
    folder, out = done
    evaluation = checkpoint.read(folder)["evaluation"]
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out and "\r" not in out
    for words_ in ("vit.layers.0.attention.q_proj.weight", "stays dense: ", "12 weights in 2 blocks get pruned"):
        assert words_ in out
    assert f"{100 * evaluation['pruned']['top1']:.1f} %" in out
    assert f"{evaluation['logit_error']:.3g}" in out
    assert out.rstrip().splitlines()[-1].startswith("vit-2of4/")
    err = (folder.parent / "stderr").read_text()
    assert re.search(r"^12/12  \S+ +error [\d.]+ -> [\d.]+ +0:00 left$", err, re.M), err
    assert "Traceback" not in err and "Warning" not in err and "\r" not in err, "plain lines where there is no terminal"


def test_the_card_tells_this_run(done: tuple[Path, str], home: Path) -> None:
    from huggingface_hub import ModelCard

    folder, _ = done
    read = ModelCard.load(folder / "README.md")
    assert read.data.tags == ["pruned", "sparse", "2:4", "hf-prune"]
    report = checkpoint.read(folder)
    assert read.data.eval_results[0].metric_value == report["evaluation"]["pruned"]["top1"]
    assert report["command"] in read.text and report["command"].startswith(f"hf-prune {home}/vit --dataset")
    assert read.data.base_model is None, "a local folder is no model id"


STRANGER = """
import sys, torch
assert not any("hf_prune" in p for p in sys.path)
for name in list(sys.modules): assert not name.startswith("hf_prune")
folder, kind, out = sys.argv[1:]
torch.manual_seed(0)
x = torch.rand(3, 3, int(kind[2:]), int(kind[2:]))
if kind.startswith("hf"):
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    y = model(pixel_values=x).logits
else:
    import timm
    y = timm.create_model("local-dir:" + folder, pretrained=True).eval()(x)
assert "hf_prune" not in sys.modules
torch.save({"y": y.detach(), "state": model.state_dict() if kind.startswith("hf") else {}}, out)
"""


@pytest.mark.parametrize("kind", ["hf", "ti"])
def test_a_stranger_loads_the_same_bits(kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that never heard of hf_prune, from_pretrained and timm give the outputs of the model in memory."""
    memory: dict = {}
    monkeypatch.setattr(checkpoint, "write", keeping(checkpoint.write, memory))
    model = "vit" if kind == "hf" else "timm"
    assert cli.main(words(home, "--output-dir", "out", "--no-eval", "--quiet", model=model)) == 0
    size = 16 if model == "vit" else memory["loaded"].module.pretrained_cfg["input_size"][-1]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out"), f"{kind}{size}", str(tmp_path / "y.pt")]
    answer = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert answer.returncode == 0, answer.stderr
    torch.manual_seed(0)
    x = torch.rand(3, 3, size, size)
    with torch.no_grad():
        mine = memory["loaded"].outputs(memory["loaded"].batch(x))
    theirs = torch.load(tmp_path / "y.pt")
    assert torch.equal(mine, theirs["y"])
    for name, tensor in theirs["state"].items():
        assert torch.equal(tensor, memory["loaded"].module.state_dict()[name])


def keeping(write, memory: dict):
    def call(folder, loaded, *args, **kwargs):
        memory["loaded"] = loaded
        return write(folder, loaded, *args, **kwargs)

    return call


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_saved_recipe_repeats_the_run_to_the_bit(done: tuple[Path, str], home: Path) -> None:
    folder, _ = done
    assert (
        cli.main([str(home / "vit"), "--recipe", str(folder / "recipe.yaml"), "--output-dir", "again", "--quiet"]) == 0
    )
    assert digest(Path("again")) == digest(folder)
    first, again = checkpoint.read(folder), checkpoint.read("again")
    assert again["recipe"] == first["recipe"] and again["evaluation"] == first["evaluation"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == first["recipe"]


@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [("--nm", "1:4"), ("--sparsity", "0.7")])
def test_other_recipes_and_patterns(recipe: str, pattern: tuple[str, str], home: Path) -> None:
    argv = words(home, *pattern, "--recipe", recipe, "--no-eval", "--quiet", nm=None)
    assert cli.main(argv) == 0
    folder = Path(f"vit-{'1of4' if pattern[0] == '--nm' else '70pct'}")
    report = checkpoint.read(folder)
    kept = sum(layer["kept"] for layer in report["layers"] if layer["pattern"])
    total = sum(layer["total"] for layer in report["layers"] if layer["pattern"])
    # Wanda keeps a share of each row, and of 16 weights 30 % are 4
    assert kept / total == pytest.approx(0.25 if pattern[0] == "--nm" else 0.3, abs=0.05)
    assert report["evaluation"] is None and "Not evaluated" in (folder / "README.md").read_text()


def test_quiet_says_nothing(home: Path, capfd: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, "--quiet")) == 0
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def on_a_terminal(argv: list[str], cwd: Path) -> str:
    """What the command draws on a terminal of 80 columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    command = [sys.executable, "-m", "hf_prune", *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env, cwd=cwd)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        seen += part
    assert child.wait() == 0, seen.decode()
    return seen.decode()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_on_a_terminal_there_is_one_bar(home: Path, tmp_path: Path) -> None:
    text = on_a_terminal(words(home), tmp_path)
    drawn = re.findall(r"layers\.1\.mlp\.fc2\.weight +\S* 12/12 [\d:]+, error [\d.]+ -> [\d.]+", text)
    assert drawn, text
    assert "evaluating" in text and "15/15" in text
    bars = [line for line in re.split(r"[\r\n]", text) if "12/12" in line or "15/15" in line]
    assert max(map(len, bars)) <= 80


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_distillation_draws_a_bar_of_its_own_and_the_card_tells_of_it(home: Path, tmp_path: Path) -> None:
    argv = words(home, "--recipe", "snows-distilled", "--set", "distill.epochs=3", "--no-eval", "--output-dir", "out")
    text = on_a_terminal(argv, tmp_path)
    assert re.search(r"distilling +\S* 3/3 [\d:]+, loss [\d.e-]+ \(was [\d.e-]+\)", text), text
    assert max(len(line) for line in re.split(r"[\r\n]", text) if "/3 " in line) <= 80
    told = checkpoint.read(tmp_path / "out")["distillation"]
    assert told["epochs"] == 3 and len(told["history"]) == 4 and told["held_out"] == 8
    assert "calibration images that took no part" in re.sub(r"\s+", " ", (tmp_path / "out" / "README.md").read_text())
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_dry_run_prints_the_plan_needs_no_data_and_writes_nothing(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([str(home / "vit"), "--nm", "2:4", "--dry-run", "--dataset", "/nowhere"]) == 0
    out = capsys.readouterr().out
    assert "12 weights in 2 blocks" in out and "Dry run: nothing was pruned and nothing was written." in out
    assert list(Path.cwd().iterdir()) == []


def test_a_closed_pipe_is_no_error(home: Path) -> None:
    code = f"{sys.executable} -m hf_prune {home}/vit --nm 2:4 --dry-run | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert answer.stdout.startswith("weight") and "Traceback" not in answer.stderr and "Exception" not in answer.stderr


def test_skip_and_only_take_names_of_memory_and_of_disk(home: Path) -> None:
    for skip, only in ((["layers.0"], []), (["encoder.layer.0"], []), ([], ["re:layers\\.1\\."])):
        more = [w for s in skip for w in ("--skip", s)] + [w for s in only for w in ("--only", s)]
        assert cli.main(words(home, *more, "--no-eval", "--quiet", "--overwrite")) == 0
        layers = checkpoint.read("vit-2of4")["layers"]
        assert {layer["name"].split(".")[2] for layer in layers if layer["pattern"]} == {"1"}
        assert checkpoint.read("vit-2of4")["recipe"]["skip"] == skip, "the recipe keeps what the user wrote"


def test_stem_and_head_on_request(home: Path) -> None:
    more = ("--prune-stem", "--prune-head", "--sparsity", "0.5", "--no-eval", "--quiet")
    assert cli.main(words(home, *more, nm=None)) == 0
    reasons = {layer["name"]: layer["dense_reason"] for layer in checkpoint.read("vit-50pct")["layers"]}
    assert reasons["classifier.weight"] is None
    assert reasons["vit.embeddings.patch_embeddings.projection.weight"] is None


def test_a_bare_backbone_is_judged_by_its_representation(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, model="bare")) == 0
    evaluation = checkpoint.read("bare-2of4")["evaluation"]
    assert evaluation["dense"] is None and evaluation["logit_error"] is None
    assert 0 < evaluation["representation_error"] < 1
    assert "representation error" in capsys.readouterr().out
    card = (Path("bare-2of4") / "README.md").read_text()
    assert "image-feature-extraction" in card and "AutoModel.from_pretrained" in card and "accuracy |" not in card


def test_stored_dtype(home: Path) -> None:
    assert cli.main(words(home, "--dtype", "bfloat16", "--no-eval", "--quiet")) == 0
    tensors = load_file("vit-2of4/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert checkpoint.read("vit-2of4")["model"]["dtype"] == "bfloat16"


def test_a_dataset_with_one_split_is_not_evaluated_and_says_so(home: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [str(home / "vit"), "--nm", "2:4", "--dataset", str(home / "images" / "train"), "--samples", "4"]
    assert cli.main(argv) == 0
    assert "not evaluated" in capsys.readouterr().err
    assert checkpoint.read("vit-2of4")["evaluation"] is None


def test_the_calibration_split_may_be_evaluated_on_but_not_unnoticed(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(home, "--eval-split", "train", "--eval-samples", "6")) == 0
    assert "evaluated on the split that calibrates" in capsys.readouterr().err
    assert checkpoint.read("vit-2of4")["evaluation"]["samples"] == 6


def test_broken_images_are_counted(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(home / "images", tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train").rglob("*.png"))[:3]:
        path.write_bytes(path.read_bytes()[:40])
    argv = words(home, "--no-eval")
    argv[argv.index("--dataset") + 1] = str(tmp_path / "images")
    argv[argv.index("--samples") + 1] = "25"
    assert cli.main(argv) == 0
    assert checkpoint.read("vit-2of4")["calibration"]["skipped"] == 3
    assert checkpoint.read("vit-2of4")["calibration"]["samples"] == 22
    assert "3 images were skipped" in capsys.readouterr().err


def test_the_token_is_kept_nowhere(home: Path) -> None:
    assert cli.main(words(home, "--token", "hf_sEcReT", "--no-eval", "--quiet")) == 0
    assert cli.main(words(home, "--token=hf_sEcReT", "--no-eval", "--quiet", "--overwrite")) == 0
    for path in Path("vit-2of4").iterdir():
        assert b"hf_sEcReT" not in path.read_bytes(), path
    assert cli.spoken(["m", "--token", "x", "--nm", "2:4"]) == "hf-prune m --nm 2:4"


# -------------------------------------------------------------------------------------------------- every mistake
def test_flags_and_recipe_mistakes_come_together_and_first(capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, "no/model", "--nm", "4:4", "--sparsity", "2", "--overwrite", "--resume", "--set",
                 "solve.rigde=1", "--no-eval", "--eval-split", "x", "--samples", "x")  # fmt: skip
    for part in (
        "--nm and --sparsity contradict each other",
        "0 < N < M is needed",
        "must lie between 0 and 1",
        "--overwrite and --resume contradict each other",
        "Did you mean ridge?",
        "--no-eval and --eval-split contradict each other",
        "--samples: expected a whole number of at least 2, found x",
    ):
        assert part in said


def test_a_mistake_is_answered_before_anything_is_loaded() -> None:
    code = (
        "import sys\nfrom hf_prune.cli import main\nprint(main(['no/such', '--nm', '3:2']))\n"
        "print(sorted({'transformers', 'timm', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert answer.stdout == "2\n[]\n"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["m", "--nmm", "2:4"], "unrecognized arguments: --nmm 2:4. Did you mean --nm?"),
        (["m", "--sampl", "3"], "Did you mean --samples?"),  # no abbreviations: they break when flags are added
        (["--nm", "2:4"], "MODEL"),
        (["m", "--nm"], "expected one argument"),
    ],
)
def test_the_parser_speaks_in_one_line(argv: list[str], part: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert part in err and "Try hf-prune --help" in err and len(err.splitlines()) == 2


def test_unknown_models(capsys: pytest.CaptureFixture) -> None:
    assert "this folder does not exist" in fails(capsys, "./no-such-folder", "--nm", "2:4")
    assert "Hub could not be reached" in fails(capsys, "owner/no-such-model", "--nm", "2:4")


def test_an_output_folder_that_exists_is_refused_before_any_work(home: Path, capsys: pytest.CaptureFixture) -> None:
    Path("vit-2of4").mkdir()
    Path("vit-2of4/notes.txt").write_text("mine")
    assert "vit-2of4 exists already" in fails(capsys, *words(home))
    assert "exists already" in fails(capsys, "vit", "--nm", "2:4"), "before the model is even looked for"
    assert "was not written by hf-prune" in fails(capsys, *words(home, "--overwrite"))
    assert Path("vit-2of4/notes.txt").read_text() == "mine"
    own = fails(capsys, *words(home, "--output-dir", home / "vit", "--overwrite"))
    assert "is the model's own folder" in own


def test_too_little_disk_is_said_before_the_work(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 95, 5))
    assert "the run needs" in fails(capsys, *words(home))
    assert "pruning" not in capsys.readouterr().err and list(Path.cwd().iterdir()) == []


def test_a_disk_that_fills_up_while_writing(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", full)
        assert cli.main(words(home, "--no-eval")) == 74
    assert "vit-2of4 could not be written: No space left on device. No work is lost" in capsys.readouterr().err
    assert [p.name for p in Path.cwd().iterdir()] == [".vit-2of4.unfinished"]
    assert cli.main(words(home, "--no-eval", "--resume", "--quiet")) == 0
    assert [p.name for p in Path.cwd().iterdir()] == ["vit-2of4"]


def data(home: Path, folder: Path, *more: object) -> list[str]:
    argv = words(home, *more)
    argv[argv.index("--dataset") + 1] = str(folder)
    return argv


def test_the_default_dataset_out_of_reach(home: Path, capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, home / "vit", "--nm", "2:4", "--device", "cpu")
    assert "timm/mini-imagenet" in said and "It is the default; name images of your own with --dataset." in said


def test_datasets_that_cannot_be_used(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import datasets

    (tmp_path / "empty").mkdir()
    assert "--dataset" in fails(capsys, *data(home, tmp_path / "empty"))
    assert "there is no such file or folder" in fails(capsys, *data(home, tmp_path / "missing"))
    assert "has no split 'valid'; it has train, validation" in fails(capsys, *words(home, "--split", "valid"))
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "text.parquet")
    capsys.readouterr()  # the progress bar of datasets
    said = fails(capsys, *data(home, tmp_path / "text.parquet"))
    assert "has no image column; it has text (string), label (int64)" in said
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": []}, features=features).to_parquet(tmp_path / "none.parquet")
    capsys.readouterr()
    assert "is empty" in fails(capsys, *data(home, tmp_path / "none.parquet"))
    broken = [{"bytes": b"no image", "path": None}] * 4
    datasets.Dataset.from_dict({"image": broken}, features=features).to_parquet(tmp_path / "broken.parquet")
    capsys.readouterr()  # the progress bars of datasets
    said = fails(capsys, *data(home, tmp_path / "broken.parquet", "--no-eval"))
    assert "none of the 4 images in column 'image' could be decoded (4 x not an image)" in said


def test_one_sample(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "expected a whole number of at least 2, found 1" in fails(capsys, *words(home, "--samples", "1"))
    vision.image_folder(tmp_path / "one", {"ant": 1})
    assert "gave one usable image; calibration needs at least 2" in fails(capsys, *data(home, tmp_path / "one"))


def test_a_pattern_that_fits_no_weight(home: Path, capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, *words(home, nm="3:7"))
    assert "3:7" in said and "needs input channels divisible by 7, found" in said


def test_a_name_pattern_that_matches_nothing(home: Path, capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, *words(home, "--skip", "clasifier", "--skip", "layers.7"))
    assert "--skip 'clasifier' matches no weight of this model. Nearest names: classifier" in said
    assert "--skip 'layers.7' matches no weight" in said
    assert "--skip leaves nothing of what --only chose" in fails(
        capsys, *words(home, "--skip", "layers", "--only", "layers.0")
    )


def test_weights_that_are_not_finite(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = vision.copy(home / "vit", tmp_path / "nan")
    vision.edit_weights(folder, lambda state: state["classifier.weight"].view(-1)[:1].fill_(float("nan")))
    argv = words(home)
    argv[0] = str(folder)
    said = fails(capsys, *argv)
    assert "classifier.weight" in said and ("NaN" in said or "not finite" in said)


def test_labels_that_cannot_be_mapped_stop_the_run_before_the_work(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for split in ("train", "validation"):
        vision.image_folder(tmp_path / "fish", {"cod": 3, "eel": 3, "pike": 3}, split)
    assert cli.main(data(home, tmp_path / "fish")) == 2
    err = capsys.readouterr().err
    assert "cod" in err and "ant" in err and "left" not in err, "no layer was pruned"
    assert not Path("vit-2of4").exists()
    assert cli.main(data(home, tmp_path / "fish", "--no-eval", "--quiet")) == 0, "labels are not needed to prune"


def test_a_device_that_is_not_there(home: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    argv = words(home)
    argv[argv.index("--device") + 1] = "cuda:3"
    assert "--device cuda:3 is not available here; this machine has cpu only" in fails(capsys, *argv)


def test_quiet_and_verbose_contradict_each_other(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["m", "--nm", "2:4", "--quiet", "--verbose"]) == 2
    assert "--quiet and --verbose contradict each other" in capsys.readouterr().err


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["./none", "--nm", "2:4", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().splitlines()[-1].startswith("hf-prune: ./none")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "settle", lambda args: [].pop())
    with pytest.raises(IndexError):
        cli.main(["m", "--nm", "2:4"])


def stopped(home: Path, place: Path, kind: int, until: str, *more: object) -> tuple[int, str]:
    """Start a run in `place`, send it a signal once its stderr matches `until`; (exit code, stderr)."""
    command = [sys.executable, "-m", "hf_prune", *words(home, "--no-eval", *more)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = place / "log"
    with open(log, "w") as handle:
        child = subprocess.Popen(command, stderr=handle, stdout=subprocess.DEVNULL, env=env, cwd=place)
        deadline = time.time() + 120
        while not re.search(until, log.read_text(), re.M):
            assert child.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.005)
        child.send_signal(kind)
        return child.wait(60), log.read_text()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and images whose pruning takes a few seconds: time to stop it in the middle."""
    place = tmp_path_factory.mktemp("slow")
    vision.hf_folder(place / "vit")
    shutil.rmtree(place / "vit")
    from transformers import AutoModelForImageClassification

    config = vision.hf_config("vit")
    config.num_hidden_layers = 8
    module = vision.shake(AutoModelForImageClassification.from_config(config))
    module.save_pretrained(place / "vit")
    vision.write_processor(place / "vit")
    vision.image_folder(place / "images", {"ant": 40, "bee": 40})
    return place


SLOW = ("--samples", 64, "--batch-size", 2)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, cli.Terminated)])
def test_a_signal_that_a_finalizer_swallowed_stops_the_run_at_the_next_layer(number: int, kind: type) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    import gc

    with cli._terminable():
        held = Swallows()
        del held
        gc.collect()
        with pytest.raises(kind):
            cli._heed()
    cli._heed()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_folder_and_resumes_to_the_same_bits(kind: int, slow: Path, tmp_path: Path) -> None:
    code, said = stopped(slow, tmp_path, kind, r"^ *15/48 ", *SLOW)
    assert code == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "vit-2of4").exists() and "Traceback" not in said
    blocks = len(list((tmp_path / ".vit-2of4.unfinished").glob("*.safetensors")))
    assert 2 <= blocks < 8
    if kind == signal.SIGINT:
        kept = re.search(r"hf-prune: stopped; no output folder was written. (\d+) finished blocks? (is|are) kept", said)
        assert kept and int(kept[1]) == blocks and "the same command with --resume goes on" in said
    os.utime(tmp_path / ".vit-2of4.unfinished", (0, 0))
    kept_files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".vit-2of4.unfinished").glob("*.safetensors")}

    os.chdir(tmp_path)
    argv = words(slow, "--no-eval", "--quiet", *SLOW)
    assert cli.main(argv) == 2, "without a word the kept blocks are neither used nor dropped"
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".vit-2of4.unfinished").glob("*.safetensors")}
    assert now == kept_files
    other = [w if w != "64" else "60" for w in argv]
    assert cli.main([*other, "--resume"]) == 2, "another run's blocks are refused, and stay"
    assert {p.name for p in (tmp_path / ".vit-2of4.unfinished").glob("*.safetensors")} == set(kept_files)
    assert cli.main([*argv, "--resume"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "vit-2of4"]
    assert cli.main([*argv, "--output-dir", "whole"]) == 0
    assert digest(Path("vit-2of4")) == digest(Path("whole"))
    drop = ("seconds",)
    layers = [
        [{k: v for k, v in layer.items() if k not in drop} for layer in checkpoint.read(folder)["layers"]]
        for folder in ("vit-2of4", "whole")
    ]
    assert layers[0] == layers[1]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_overwrite_drops_a_stopped_run(slow: Path, tmp_path: Path) -> None:
    stopped(slow, tmp_path, signal.SIGKILL, r"^ *10/48 ", *SLOW)
    assert list((tmp_path / ".vit-2of4.unfinished").glob("*.safetensors"))
    assert cli.main(words(slow, "--no-eval", "--quiet", "--overwrite", "--samples", 4, "--batch-size", 2)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "vit-2of4"]


def test_resume_without_a_stopped_run(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--resume: there is no stopped run to go on with" in fails(capsys, *words(home, "--resume"))


def test_a_run_that_fails_keeps_nothing(home: Path, capsys: pytest.CaptureFixture) -> None:
    said = fails(capsys, *words(home, "--no-eval", "--set", "solve.ridge=-5"))
    assert ".vit-2of4.unfinished" not in [p.name for p in Path.cwd().iterdir()], said


# ------------------------------------------------------------------------------------------ commands, names, processes
def test_a_first_word_may_be_a_command_and_a_folder_of_that_name_is_reached_by_its_path(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import types

    called = []
    monkeypatch.setitem(cli.COMMANDS, "demo", "a_demo")
    module = types.ModuleType("a_demo")
    module.run = lambda rest: called.append(rest) or 7
    monkeypatch.setitem(sys.modules, "a_demo", module)
    assert cli.main(["demo", "--quiet"]) == 7 and called == [["--quiet"]]
    shutil.copytree(home / "vit", "demo")
    assert cli.main(["./demo", "--nm", "2:4", "--dry-run"]) == 0
    assert "12 weights" in capsys.readouterr().out and len(called) == 1


def test_every_command_has_its_module() -> None:
    import importlib

    for module in cli.COMMANDS.values():
        assert callable(importlib.import_module(module).run)


@pytest.mark.parametrize(
    ("model", "pattern", "folder"),
    [
        ("google/vit-base-patch16-224", "2:4", "vit-base-patch16-224-2of4"),
        ("timm/resnet50.a1_in1k", "1:4", "resnet50.a1_in1k-1of4"),
        ("timm:resnet50", "2:4", "timm-resnet50-2of4"),
        ("./some/folder/", "70% (layer)", "folder-70pct"),
        ("/models/my net", "12.5% (model)", "my-net-12.5pct"),
    ],
)
def test_default_output_folder(model: str, pattern: str, folder: str) -> None:
    assert cli.default_folder(model, pattern) == folder
    assert slug(pattern) in folder


def test_the_working_directory_as_a_model_gets_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    assert cli.default_folder(".", "2:4") == "net-2of4"


def test_a_launcher_whose_processes_do_not_see_each_other_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from accelerate import PartialState

    assert PartialState(cpu=True).num_processes == 1  # this process is alone, whatever a launcher says of it
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "announces 2 processes (WORLD_SIZE), but accelerate sees 1" in fails(capsys, *words(home))
    assert list(Path.cwd().iterdir()) == []


def launch(home: Path, *more: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "hf_prune", *words(home, *more)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=240)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_group_that_a_launcher_asks_for_is_gone_when_the_command_ends(home: Path) -> None:
    code = """if True:
        import sys, weakref
        from hf_prune import __main__
        work, seen = __main__.main, []

        def main():
            done = work()
            import torch
            seen.append(weakref.ref(torch.distributed.group.WORLD))
            return done

        __main__.main = main
        assert __main__.command() == 0 and seen[0]() is None
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [sys.executable, "-c", code, *words(home, "--quiet", "--no-eval")]
    done = subprocess.run(line, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_write_one_folder_and_say_everything_once(home: Path) -> None:
    answer = launch(home)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("12 weights in 2 blocks get pruned") == 1
    assert [p.name for p in Path.cwd().iterdir()] == ["vit-2of4"]
    assert cli.main(words(home, "--quiet", "--output-dir", "alone")) == 0
    report, alone = checkpoint.read("vit-2of4"), checkpoint.read("alone")
    assert report["resources"]["world_size"] == 2
    assert report["calibration"] == alone["calibration"]
    assert report["evaluation"]["samples"] == alone["evaluation"]["samples"]
    for name, tensor in load_file("vit-2of4/model.safetensors").items():
        other = load_file("alone/model.safetensors")[name]
        assert torch.equal(tensor != 0, other != 0), "the same masks as one process"
        assert torch.allclose(tensor, other, atol=1e-4)


def test_a_mistake_found_by_rank_0_stops_both_and_is_said_once(home: Path) -> None:
    Path("vit-2of4").mkdir()
    Path("vit-2of4/x").write_text("x")
    answer = launch(home)
    assert answer.returncode != 0
    assert answer.stderr.count("exists already") == 1


# ------------------------------------------------------------------------------------------------------- from Python
def test_the_top_level_api() -> None:
    import hf_prune

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
    )
    batches = [torch.randn(16, 8) for _ in range(4)]
    before = model[2].weight.detach().clone()
    report = hf_prune.prune(model, batches, "snows", nm="2:4")
    assert isinstance(report, hf_prune.Report)
    assert sparse(model[2].weight) and not torch.equal(model[2].weight, before)
    assert [layer["name"] for layer in report.layers if layer["pattern"]]
    assert callable(hf_prune.prune), "no file may take the place of the function"
    again = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
    )
    hf_prune.prune(again, batches, hf_prune.Recipe(sparsity=0.5, mask={"method": "magnitude"}, solve=None))
    with pytest.raises(ValueError, match="Did you mean samples"):
        hf_prune.prune(model, batches, "snows", nm="2:4", sample=3)
    assert str(hf_prune.Pattern.parse("2:4")) == "2:4"
    with pytest.raises(AttributeError):
        hf_prune.nothing  # noqa: B018


# -------------------------------------------------------------------------------------------------------- a real model
def test_a_real_depthwise_network(shared_data: Path, capsys: pytest.CaptureFixture) -> None:
    model, images = shared_data / "mobilenet_v1_0.25_128-hf", shared_data / "imagenet_val_800.parquet"
    argv = [model, "--nm", "2:4", "--recipe", "magnitude", "--dataset", images, "--samples", 4, "--no-eval"]
    assert cli.main([str(word) for word in argv]) == 0
    out = capsys.readouterr().out
    assert "needs input channels divisible by 4, found 1" in out, "depthwise weights stay dense, and the plan says why"
    report = checkpoint.read("mobilenet_v1_0.25_128-hf-2of4")
    assert sum(layer["pattern"] is not None for layer in report["layers"]) == 13
    weights = load_file("mobilenet_v1_0.25_128-hf-2of4/model.safetensors")
    for layer in report["layers"]:
        if layer["pattern"]:
            assert sparse(weights[layer["checkpoint_name"]].movedim(1, -1))
