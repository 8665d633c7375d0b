"""Push and pull with the real huggingface_hub client, in processes of its own, against a Hub on the loopback."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import published
import pytest
import vision
from loopback import TOKEN, Fault, Hub
from published import Client, complete, history

from hf_prune import checkpoint, hub

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out/: a pruned model. packed/: the same, compressed only. both/. timm-out/. And what they were made of."""
    folder = tmp_path_factory.mktemp("hub")
    published.sources(folder)
    published.prune(folder, "vit", "out")
    published.prune(folder, "vit", "packed", "--compressed-only")
    published.prune(folder, "vit", "both", "--compressed")
    published.prune(folder, "timm", "timm-out")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def run(server: Hub, place: Path) -> Iterator[Client]:
    with published.client(server, place / "home") as ready:
        yield ready


@pytest.fixture(autouse=True)
def no_faults(server: Hub) -> Iterator[None]:
    yield
    server.faults[:] = []


def clean(said: dict) -> None:
    """What was said holds no token and no traceback."""
    words = said["out"] + said["err"]
    assert TOKEN not in words and "Traceback" not in words, words


def test_create_push_and_push_again(server: Hub, run: Client, place: Path) -> None:
    said = run("push", place / "out", "tester/plain")
    assert said["code"] == 0 and said["out"] == f"{server.url}/tester/plain\n"
    assert complete(server, "tester/plain", place / "out") and history(server, "tester/plain") == 1
    said = run("push", place / "out", "tester/plain")
    assert said["code"] == 0 and "nothing was changed" in said["err"]
    assert history(server, "tester/plain") == 1, "a push without change makes no commit"
    clean(said)


def test_weights_that_are_gone_go_in_the_same_commit(server: Hub, run: Client, place: Path) -> None:
    assert run("push", place / "both", "tester/turns")["code"] == 0
    assert run("push", place / "packed", "tester/turns")["code"] == 0
    assert history(server, "tester/turns") == 2
    assert complete(server, "tester/turns", place / "packed"), "dense weights must not stay beside a packed config"


def test_pull_request(server: Hub, run: Client, place: Path) -> None:
    server.add("tester/asked")
    said = run("push", place / "out", "tester/asked", "--create-pr", "--commit-message", "Half of it")
    assert said["code"] == 0 and said["out"].strip().endswith("/discussions/1")
    assert history(server, "tester/asked") == 0 and complete(server, "tester/asked", place / "out", "refs/pr/1")
    assert server.repos["model", "tester/asked"].pulls[0]["title"] == "Half of it"
    server.faults[:] = [Fault(*published.STEPS["commit"], "lost")]
    assert run("push", place / "timm-out", "tester/asked", "--create-pr")["code"] == 0
    assert len(server.repos["model", "tester/asked"].pulls) == 2, "an answer that was lost makes no second request"


def test_private(server: Hub, run: Client, place: Path) -> None:
    assert run("push", place / "out", "tester/secret", "--private")["code"] == 0
    assert server.repos["model", "tester/secret"].private
    server.add("tester/open")
    said = run("push", place / "out", "tester/open", "--private")
    assert said["code"] == 2 and "is public" in said["err"] and history(server, "tester/open") == 0


def test_branch(server: Hub, run: Client, place: Path) -> None:
    assert run("push", place / "out", "tester/branched", "--push-revision", "v2")["code"] == 0
    assert complete(server, "tester/branched", place / "out", "v2") and history(server, "tester/branched") == 0


@pytest.mark.parametrize("step", list(published.STEPS))
def test_every_fault(server: Hub, run: Client, place: Path, step: str) -> None:
    for status in (403, 503, "lost"):  # benchmarks/hub_tables.py goes through all of published.FAULTS
        if status == 503 and step in ("compare", "announce", "batch", "upload"):
            continue  # where the client itself waits a second
        found = published.push_with_fault(server, run, place / "out", f"tester/{step.replace(' ', '-')}-{status}",
                                          step, status)  # fmt: skip
        assert found["met"], f"{step}: the request never came"
        clean(found)
        if status in published.PASSING:
            assert (found["code"], found["commits"]) == (0, 1), f"{step} {status}: {found['err']}"
        else:
            assert (found["code"], found["commits"]) == (2, 0), f"{step} {status}: {found['err']}"
            assert found["err"].splitlines()[-1].startswith("hf-prune: ")
        assert (found["again"], found["commits_after"], found["complete"]) == (0, 1, True)


def test_a_hub_that_stays_broken(server: Hub, run: Client, place: Path) -> None:
    server.faults[:] = [Fault(*published.STEPS["commit"], 503, times=99)]
    said = run("push", place / "out", "tester/broken")
    assert said["code"] == 2 and "failed 6 times, last with: HTTP 503" in said["err"]
    assert said["err"].count("attempt") == 5 and history(server, "tester/broken") == 0
    clean(said)


def test_somebody_else_commits_meanwhile(server: Hub, run: Client, place: Path) -> None:
    server.faults[:] = [Fault(*published.STEPS["commit"], 412)]
    said = run("push", place / "out", "tester/raced")
    assert said["code"] == 2 and "changed by somebody else" in said["err"]


def test_the_main_command_publishes(server: Hub, run: Client, place: Path) -> None:
    words = [place / "vit", "--nm", "2:4", "--recipe", "magnitude", "--dataset", place / "images", "--samples", 8]
    words += ["--batch-size", 8, "--device", "cpu", "--quiet", "--output-dir", place / "mine", "--compressed"]
    words += ["--push-to-hub", "tester/mine", "--private", "--commit-message", "First", "--token", TOKEN]
    said = run(*words)
    assert said["code"] == 0, said["err"]
    clean(said)
    assert complete(server, "tester/mine", place / "mine") and server.repos["model", "tester/mine"].private
    assert history(server, "tester/mine") == 1
    assert not [p for p in (place / "mine").iterdir() if TOKEN.encode() in p.read_bytes()], "a token in a file"
    for config in (place / "home").rglob("*"):
        assert not config.is_file() or TOKEN.encode() not in config.read_bytes()


def test_a_bad_token_is_known_before_the_work(server: Hub, run: Client, place: Path, tmp_path: Path) -> None:
    words = [place / "vit", "--nm", "2:4", "--dataset", place / "images", "--output-dir", tmp_path / "never"]
    wrong = "hf_wrongTOKENwrong"
    for more in ([], ["--verbose"]):
        said = run(*words, "--push-to-hub", "tester/x", "--token", wrong, *more)
        assert said["code"] == 2 and "hf auth login" in said["err"] and wrong not in said["err"] + said["out"]
    with published.client(server, tmp_path, HF_TOKEN="") as other:
        said = other("push", place / "out", "tester/x")
        assert said["code"] == 2 and "nobody is logged in" in said["err"]
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "name",
    ["x", "a/b/c", "../x", "a/..", "a/b.git", "a/b--c", "a/b\n", "a/ b", "a/" + "b" * 96, "a/-b", "https://x/y", ""]
)  # fmt: skip
def test_ids_that_are_none(name: str) -> None:
    assert hub.id_problem(name)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub.check(name)


def test_what_is_not_published(place: Path, tmp_path: Path) -> None:
    folder = vision.copy(place / "out", tmp_path / "copy")
    (folder / ".env").write_text("HF_TOKEN=x")
    assert ".env" not in hub.listing(folder)
    (folder / "id_rsa").write_text("key")
    with pytest.raises(ValueError, match="no file that hf-prune writes"):
        hub.listing(folder)
    (folder / "id_rsa").rename(tmp_path / "key.json")
    (folder / "extra.json").symlink_to(tmp_path / "key.json")
    with pytest.raises(ValueError, match="link"):
        hub.listing(folder)


def test_redact() -> None:
    assert hub.redact("Bearer abc.def and hf_abcDEF123456 here", None) == "Bearer (token) and (token) here"
    assert hub.redact("it is s3cret", "s3cret") == "it is (token)"


# ----------------------------------------------------------------------------------------------------- and back again
PULL = """
import json, sys, torch
place, found = sys.argv[1], {}
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification as Auto
def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
dense = Auto.from_pretrained(place + "/out").state_dict()
model, info = Auto.from_pretrained("tester/dense", output_loading_info=True)
found["from_pretrained"] = same(model.state_dict(), dense) and not any(info.values())
import timm
found["timm"] = same(timm.create_model("hf-hub:tester/timm", pretrained=True).state_dict(),
                     load_file(place + "/timm-out/model.safetensors"))
try:
    Auto.from_pretrained("tester/packed")
except OSError as error:
    found["stranger"] = "model.safetensors" in str(error)
import hf_prune
found["load"] = same(hf_prune.load("tester/packed").state_dict(), dense)
found["load both"] = same(hf_prune.load("tester/both").state_dict(), dense)
import hf_prune.quantizer
model, info = Auto.from_pretrained("tester/packed", output_loading_info=True)
found["quantizer"] = same(model.state_dict(), dense) and not any(info.values())
from huggingface_hub import scan_cache_dir
files = {r.repo_id: {f.file_name for v in r.revisions for f in v.files} for r in scan_cache_dir().repos}
found["smaller file"] = "model.safetensors" not in files["tester/both"]
from hf_prune.calibration import images
given = list(images("tester/pictures", samples=6, seed=0, streaming=True))
found["images"] = len(given) == 6
import evaluate
found["evaluate"] = evaluate.load("accuracy").compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]
from hf_prune import cli
found["verify"] = [cli.main(["verify", name, "--quiet"]) for name in ("tester/dense", "tester/packed", "tester/timm")]
print("\\n" + json.dumps(found))
"""

ACCURACY = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_from_that_hub_in_a_clean_process(server: Hub, run: Client, place: Path, tmp_path: Path) -> None:
    for folder, name in (("out", "dense"), ("packed", "packed"), ("both", "both"), ("timm-out", "timm")):
        assert run("push", place / folder, f"tester/{name}")["code"] == 0
    server.add("tester/pictures", place / "images", kind="dataset")
    (tmp_path / "metric").mkdir()
    (tmp_path / "metric" / "accuracy.py").write_text(ACCURACY)
    server.add("evaluate-metric/accuracy", tmp_path / "metric", kind="space")
    server.repos["space", "evaluate-metric/accuracy"].refs["v0.4.6"] = server.repos[
        "space", "evaluate-metric/accuracy"
    ].refs["main"]
    answer = subprocess.run(
        [sys.executable, "-c", PULL, str(place)], capture_output=True, text=True, check=False,
        env=server.env(tmp_path / "clean", PYTHONPATH=str(ROOT)), cwd=tmp_path,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads(answer.stdout.splitlines()[-1]) == {
        "from_pretrained": True, "timm": True, "stranger": True, "load": True, "load both": True, "quantizer": True,
        "smaller file": True, "images": True, "evaluate": 2 / 3, "verify": [0, 0, 0],
    }  # fmt: skip


def test_inspect_reads_ranges(server: Hub, run: Client, place: Path) -> None:
    assert run("push", place / "out", "tester/ranged")["code"] == 0
    server.log.clear()
    said = run("inspect", "tester/ranged", "--json")
    assert said["code"] == 0, said["err"]
    followed = {each["name"] for each in json.loads(said["out"]) if each["pattern"] == "2:4"}
    report = checkpoint.read(place / "out")
    assert followed >= {layer["checkpoint_name"] for layer in report["layers"] if layer["pattern"]}
    asked = [status for method, path, status in server.log if method == "GET" and "/resolve/" in path]
    assert asked and set(asked) == {206}, "ranges only"
    said = run("inspect", "tester/absent")
    assert said["code"] == 2 and "neither here nor on the Hub" in said["err"]
