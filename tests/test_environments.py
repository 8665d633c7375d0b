"""What older stacks make of our files. Slow, and needs to install them: `pytest -m environments`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import published
import pytest
import vision
from loopback import Hub

from hf_prune import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def tables() -> Any:
    """benchmarks/hub_tables.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("hub_tables", ROOT / "benchmarks" / "hub_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.environments
def test_everything_loads_bit_exactly_or_not_at_all(tmp_path: Path) -> None:
    """HF_PRUNE_OLD_PYTHON: of an environment with transformers 4.57; made with pip where it is not given."""
    script = tables()
    pythons = {"new": sys.executable, "old": os.environ.get("HF_PRUNE_OLD_PYTHON") or script.old_python(tmp_path)}
    rows, wrong = script.loading(tmp_path, pythons)
    ours = [row for row in rows if "compressed-tensors" not in row[0]]
    assert len(ours) == 8 and not [each for each in wrong if "compressed-tensors" not in each]
    columns = [column for column, *_ in script.STACKS]
    for row in ours:
        cells = dict(zip(columns, row[1:], strict=True))
        if "only" not in row[0]:
            assert cells["transformers 5"] == cells["transformers 4.57"] == "bit-exact" or row[0].startswith("timm")
        assert cells["`hf_prune.load`"] == "bit-exact"


# What a stranger's Python, without hf_prune, gets from the Hub: the hash of every tensor.
STRANGER = """
import hashlib, json, sys
library, name = sys.argv[1:]
if library == "timm":
    import timm
    state = timm.create_model("hf-hub:" + name, pretrained=True).state_dict()
else:
    from transformers import AutoModelForImageClassification
    state = AutoModelForImageClassification.from_pretrained(name, dtype="auto").state_dict()
print(json.dumps(sorted(hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in state.values())))
"""


@pytest.mark.environments
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_the_real_vit_there_and_back(library: str, shared_data: Path, tmp_path: Path) -> None:
    """As a new user would: prune and push; pull in a clean environment, to the same bits; verify from the Hub."""
    model = shared_data / "vit-tiny-patch16-224-hf"
    if library == "timm":
        model = vision.real_timm_vit(tmp_path / "timm-vit", shared_data)
    output = tmp_path / "out"
    with Hub() as hub, published.client(hub, tmp_path / "home") as run:
        said = run(model, "--nm", "2:4", "--recipe", "magnitude", "--dataset", shared_data / "imagenet_val_800.parquet",
                   "--samples", 8, "--batch-size", 4, "--no-eval", "--device", "cpu", "--output-dir", output,
                   "--compressed", "--push-to-hub", "tester/vit-2of4")  # fmt: skip
        assert said["code"] == 0, said["err"]
        assert published.complete(hub, "tester/vit-2of4", output)
        for python in {sys.executable, os.environ.get("HF_PRUNE_OLD_PYTHON", sys.executable)}:
            answer = subprocess.run(
                [python, "-c", STRANGER, library, "tester/vit-2of4"],
                capture_output=True,
                text=True,
                env=hub.env(tmp_path / "clean", PYTHONPATH=""),
                cwd=tmp_path,
                check=False,
            )
            assert answer.returncode == 0, answer.stderr[-2000:]
            assert json.loads(answer.stdout.splitlines()[-1]) == sorted(checkpoint.read(output)["sha256"].values())
        assert run("verify", "tester/vit-2of4")["code"] == 0
        assert "2:4" in run("inspect", "tester/vit-2of4")["out"]
