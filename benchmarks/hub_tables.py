"""Print and write the tables of docs/hub.md: what loads where, what a push survives, sizes and speed of packing.

    python benchmarks/hub_tables.py                       # all; makes an environment with transformers 4.57 (2 GB)
    python benchmarks/hub_tables.py --old PYTHON          # ... or takes one that is there
    python benchmarks/hub_tables.py --only faults

Everything runs against folders that it prunes itself and a Hub on the loopback. Each table replaces the text between
its two markers in docs/hub.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "hub.md"
OLD = ("torch", "torchvision", "timm", "transformers==4.57.6", "compressed-tensors==0.13.0", "accelerate", "pillow")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Run by the Python of each stack: loads folders one way, prints what came out as multisets of tensor hashes.
PROBE = """
import hashlib, json, logging, sys, warnings
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
how, *folders = sys.argv[1:]
def told(state):
    import torch
    return sorted(hashlib.sha256(repr((tuple(t.shape), str(t.dtype))).encode()
                  + t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
                  for name, t in state.items() if not name.endswith("position_ids"))
def load(folder):
    if how in ("transformers", "quantizer"):
        if how == "quantizer":
            import hf_prune.quantizer
        from transformers import AutoModelForImageClassification as Auto
        return Auto.from_pretrained(folder, dtype="auto").state_dict()  # version 4 would widen to float32
    if how == "load":
        import hf_prune
        return hf_prune.load(folder).state_dict()
    if how == "timm":
        import timm
        return timm.create_model("local-dir:" + folder, pretrained=True).state_dict()
    from pathlib import Path
    from safetensors.torch import load_file
    state = load_file(sorted(Path(folder).glob("model*.safetensors"))[0])
    missing = set(json.loads(Path(folder, "names.json").read_text())) - set(state)
    if missing:  # what load_state_dict(strict=True) says
        raise RuntimeError(f"Missing key(s) in state_dict: {len(missing)}")
    return state
for folder in folders:
    try:
        print("PROBE" + json.dumps({"found": told(load(folder))}), flush=True)
    except BaseException as error:
        text = " ".join(str(error).split())
        print("PROBE" + json.dumps({"error": type(error).__name__, "text": text[:160]}), flush=True)
"""
STACKS = [  # (column, Python, how, whether hf_prune can be imported)
    ("transformers 5", "new", "transformers", False),
    ("... with `import hf_prune.quantizer`", "new", "quantizer", True),
    ("transformers 4.57", "old", "transformers", False),
    ("4.57 with `import hf_prune.quantizer`", "old", "quantizer", True),
    ("timm", "new", "timm", False),
    ("safetensors, strict", "new", "safetensors", False),
    ("`hf_prune.load`", "new", "load", True),
    ("`hf_prune.load`, transformers 4.57", "old", "load", True),
]


# ------------------------------------------------------------------------------------------------------------- loading
def folders(place: Path) -> dict[str, tuple[Path, list[str]]]:
    """Kind of file -> folder, and the hashes that loading it must give."""
    import published

    from hf_prune import compress

    published.sources(place)
    made = {
        "transformers, dense-stored": published.prune(place, "vit", "vit-dense"),
        "transformers, `--compressed`": published.prune(place, "vit", "vit-both", "--compressed"),
        "transformers, `--compressed-only`": published.prune(place, "vit", "vit-packed", "--compressed-only"),
        "timm, dense-stored": published.prune(place, "timm", "timm-dense"),
        "timm, `--compressed`": published.prune(place, "timm", "timm-both", "--compressed"),
        "timm, `--compressed-only`": published.prune(place, "timm", "timm-packed", "--compressed-only"),
    }
    old = ROOT / "tests" / "data" / "compressed_tensors"
    dense = {name: made[f"{name}, dense-stored"] for name in ("transformers", "timm")}
    found = {kind: (folder, hashes(dense[kind.partition(",")[0]])) for kind, folder in made.items()}
    for kind in compress.OLD:
        found[f"`{kind}` of compressed-tensors"] = (copy(old / kind, place / kind), hashes(old / "dense"))
        compress.convert(old / kind, place / f"{kind}-converted")
        found[f"... after `hf-prune convert` ({kind})"] = (place / f"{kind}-converted", hashes(old / "dense"))
    for kind, (folder, _) in found.items():
        base = old / "dense" if "bitmask" in kind else dense[kind.partition(",")[0]]
        names = [each for each, _ in compress.read_dense([base / "model.safetensors"])]
        (folder / "names.json").write_text(json.dumps(names))
    return found


def copy(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def hashes(folder: Path) -> list[str]:
    from hf_prune import compress

    def one(tensor: Any) -> str:
        import torch

        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype))).encode() + content).hexdigest()

    return sorted(one(tensor) for _, tensor in compress.read_dense([folder / "model.safetensors"]))


def loading(place: Path, pythons: dict[str, str]) -> tuple[list[list[str]], list[str]]:
    """Rows of the loading table, and every combination that gave other weights without an error."""
    kinds = folders(place)
    rows, wrong = [[kind] for kind in kinds], []
    for column, python, how, ours in STACKS:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if ours else ""}
        command = [pythons[python], "-c", PROBE, how, *(str(folder) for folder, _ in kinds.values())]
        answer = subprocess.run(command, capture_output=True, text=True, env=env, cwd=place, check=False)
        lines = [json.loads(line[5:]) for line in answer.stdout.splitlines() if line.startswith("PROBE")]
        assert len(lines) == len(kinds), answer.stderr[-2000:]
        for row, told, (kind, (_, wanted)) in zip(rows, lines, kinds.items(), strict=True):
            if "error" in told:
                print(f"{kind} | {column}: {told}", file=sys.stderr, flush=True)
                row.append(told["error"])
            elif told["found"] == wanted:
                row.append("bit-exact")
            else:
                row.append("**other weights**")
                wrong.append(f"{kind} | {column}")
    return rows, wrong


def old_python(place: Path) -> str:
    """An environment with transformers 4.57, made from nothing."""
    subprocess.run([sys.executable, "-m", "venv", str(place / "old")], check=True)
    python = str(place / "old" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *OLD], check=True)
    return python


# -------------------------------------------------------------------------------------------------------------- faults
def faults(place: Path) -> list[list[str]]:
    """Rows of the fault table: every step, every fault."""
    import published
    from loopback import TOKEN, Hub

    published.sources(place)
    folder = published.prune(place, "vit", "out")
    rows = []
    with Hub() as hub, published.client(hub, place / "home") as run:
        for step, (method, path) in published.STEPS.items():
            for status in published.FAULTS:
                name = f"tester/{step.replace(' ', '-')}-{status}"
                found = published.push_with_fault(hub, run, folder, name, step, status)
                said = found["err"].strip().splitlines()
                assert found["met"] and TOKEN not in found["err"] + found["out"] and "Traceback" not in found["err"]
                assert found["again"] == 0 and found["commits_after"] == 1 and found["complete"]
                assert found["commits"] == (1 if found["code"] == 0 else 0)
                words = [line for line in said if not re.match(r"uploading \d", line)]
                saw = words[-1].replace(hub.url, "HUB") if words else "nothing; the client tried again"
                what = {"cut": "connection cut", "lost": "done, answer lost"}.get(str(status), str(status))
                request = f"`{method} {path}`".replace("[^/]+/[^/]+", "ID") if status == published.FAULTS[0] else ""
                saw = saw.replace("|", "\\|").replace(name, "ID")
                rows.append([step, request, what, str(found["code"]), saw, str(found["commits"]), "yes"])
    return rows


# ------------------------------------------------------------------------------------------------------ sizes and speed
def packing_rows() -> tuple[list[list[str]], list[list[str]]]:
    """Speed on one thread beside a copy in the same run; sizes of the real ViT-Tiny where it is there."""
    import torch
    from safetensors.torch import load_file, save_file
    from test_compress import follow, random_bits

    from hf_prune import compress, packing

    torch.set_num_threads(1)

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    speed = []
    for dtype in (torch.float32, torch.bfloat16):
        for n, m in ((2, 4), (1, 4), (4, 8)):
            dense = random_bits((4096, 4096), dtype, n, m)
            packed, size = packing.pack(dense, n, m), dense.numel() * dense.element_size() / 1e9
            assert packed is not None
            works = (
                dense.clone,
                partial(packing.pack, dense, n, m),
                partial(packing.unpack, *packed, n, m),
                partial(compress.digest, dense),
            )
            rates = [size / best(work) for work in works]
            kind = f"{n}:{m}", str(dtype).removeprefix("torch.")
            speed.append([*kind, *(f"{rate:.2f}" for rate in rates), f"{rates[0] / rates[1]:.1f}"])
    sizes = []
    real = ROOT.parent / "shared" / "data" / "vit-tiny-patch16-224-hf" / "model.safetensors"
    if real.is_file():
        with tempfile.TemporaryDirectory() as place:
            for n, m in ((2, 4), (1, 4)):
                state = load_file(real)
                follow(state, n, m)
                for dtype in (torch.float32, torch.bfloat16):
                    file = Path(place) / "model.safetensors"
                    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, file)
                    before, after = file.stat().st_size, compress.write([file], place, n, m).stat().st_size
                    sizes.append([f"{n}:{m}", str(dtype).removeprefix("torch."), f"{before:,}", f"{after:,}",
                                  f"{after / before:.3f}"])  # fmt: skip
    return speed, sizes


# ------------------------------------------------------------------------------------------------------------ document
def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def put(name: str, text: str) -> None:
    """Replace what stands between the two markers `name` of the document."""
    print(text, flush=True)
    whole = DOCUMENT.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    assert mark.search(whole), f"{DOCUMENT} has no markers {name}"
    DOCUMENT.write_text(mark.sub(lambda found: found[1] + text + found[2], whole), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("loading", "faults", "packing"))
    parser.add_argument("--old", metavar="PYTHON", help="of an environment with transformers 4.57")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part in ("loading", "faults", "packing") if args.only is None else (args.only,):
            (place / part).mkdir()
            if part == "loading":
                pythons = {"new": sys.executable, "old": args.old or old_python(place)}
                rows, wrong = loading(place / part, pythons)
                put("loading", table(["file", *(column for column, *_ in STACKS)], rows))
            elif part == "faults":
                head = ["step", "request", "fault", "exit code", "what the user saw last", "commits then",
                        "same command again: complete, one commit"]  # fmt: skip
                put("faults", table(head, faults(place / part)))
            else:
                speed, sizes = packing_rows()
                head = ["pattern", "dtype", "copy, GB/s", "pack, GB/s", "unpack, GB/s", "sha256, GB/s", "copy / pack"]
                put("speed", table(head, speed))
                if sizes:
                    put("sizes", table(["pattern", "dtype", "dense, bytes", "packed, bytes", "share"], sizes))
    ours = [each for each in wrong if "compressed-tensors" not in each]
    if ours:
        print("loaded other weights without an error: " + "; ".join(ours), file=sys.stderr)
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
