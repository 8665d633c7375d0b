"""What `hf-prune plan` predicts beside what the run then measured: bytes of the files, memory, time.

    python benchmarks/plan_table.py vit-tiny-patch16-224-hf --recipes magnitude sparsegpt snows --samples 256
    python benchmarks/plan_table.py --write          docs/plan.md from every result there is

Both commands run as a user would type them, each in a process of its own, one right after the other: a prediction of
time is for a machine as busy as it is now.  A run is added to benchmarks/results/plan.json when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
PAGE = ROOT / "docs" / "plan.md"
HEAD = """# Predicted and measured

Written by `python benchmarks/plan_table.py --write`; the runs are in
[benchmarks/results/plan.json](../benchmarks/results/plan.json). `hf-prune plan` and the run itself, one after the
other; bytes of the safetensors files, dense-stored and packed; peak resident memory of the process (where it is
predicted); seconds of pruning by the clock. The runs here shared two cores with some fifteen other processes, whose
number changed between prediction and run. Load does not explain the misses, though: in CPU seconds `sparsegpt` was
predicted at .3 of what it took. The aim of a factor of 1.5 was not met for `sparsegpt` and `snows` by the version that
made these rows; the time between blocks has been measured since, and the rows not made again.

| model | recipe | images | dense file, predicted / measured | packed file | memory, MB | seconds | ratio |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--nm", default="2:4")
    parser.add_argument("--recipes", nargs="+", default=["magnitude", "sparsegpt", "snows"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--write", action="store_true", help="write docs/plan.md and stop")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(read()))
        return
    for model in args.models:
        for recipe in args.recipes:
            words = [str(DATA / model), "--nm", args.nm, "--recipe", recipe, "--samples", str(args.samples)]
            plan = json.loads(command("plan", *words, "--json"))
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                command(*words, "--dataset", str(DATA / "imagenet_sample1000_256.parquet"), "--no-eval", "--quiet",
                        "--compressed", "--output-dir", str(out))  # fmt: skip
                report = json.loads((out / "hf_prune.json").read_text())
                files = {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
            packed = next(size for name, size in files.items() if name != "model.safetensors")
            run = {
                "model": model, "nm": args.nm, "recipe": recipe, "samples": args.samples,
                "predicted": {"dense": plan["totals"]["dense_file_bytes"],
                              "packed": plan["totals"]["packed_file_bytes"], **plan["predicted"]},
                "measured": {"dense": files["model.safetensors"], "packed": packed,
                             "seconds": report["resources"]["seconds"],
                             "memory_bytes": report["resources"]["peak_host_bytes"]},
            }  # fmt: skip
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps([*read(), run], indent=1) + "\n")
            print(row(run), flush=True)


def command(*words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "hf_prune", *words]
    done = subprocess.run(line, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"hf-prune {' '.join(words)}\n{done.stderr}")
    return done.stdout


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def row(run: dict[str, Any]) -> str:
    said, was = run["predicted"], run["measured"]
    memory = f"{was['memory_bytes'] / 1e6:.0f}"
    memory = memory if said["memory_bytes"] is None else f"{said['memory_bytes'] / 1e6:.0f} / {memory}"
    ratio = said["seconds"] / was["seconds"]
    cells = (run["model"], f"`{run['recipe']}` {run['nm']}", str(run["samples"]),
             f"{said['dense']:,} / {was['dense']:,}", f"{said['packed']:,} / {was['packed']:,}", memory,
             f"{said['seconds']:.1f} / {was['seconds']:.1f}", f"{ratio:.2f}")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def page(runs: list[dict[str, Any]]) -> str:
    return HEAD + "\n".join(row(run) for run in runs) + "\n"


if __name__ == "__main__":
    main()
