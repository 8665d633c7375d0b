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
[benchmarks/results/plan.json](../benchmarks/results/plan.json). `hf-prune plan` and the run itself, each in a process
of its own, one right after the other; one thread, on a machine that did other work too, so time is in CPU seconds of
pruning, images read included (`hf-prune plan` prints seconds by the clock; `--json` gives both). Memory is the peak of
what is resident. Bytes are those of the safetensors files, dense-stored and packed. Ratios are predicted over measured.

The time is measured before the run: the loop itself prunes one block of every kind and the one behind it on one and on
three batches of synthetic images that are about as correlated as photographs, and every block is taken as a + b *
batches; the influence of samples and the order of channels are timed apart. Reading is timed on a
photograph of 500 x 375 pixels; the images of these runs are 227 x 227.
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
                             **{k: report["resources"][k] for k in ("seconds", "cpu_seconds", "by_stage")},
                             "memory_bytes": report["resources"]["peak_host_bytes"]},
            }  # fmt: skip
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            key = ("model", "nm", "recipe", "samples")
            others = [each for each in read() if any(each[k] != run[k] for k in key)]
            RESULTS.write_text(json.dumps([*others, run], indent=1) + "\n")
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
    memory = f"{said['memory_bytes'] / 1e6:.0f} / {was['memory_bytes'] / 1e6:.0f}"
    cells = (run["model"], f"`{run['recipe']}` {run['nm']}", str(run["samples"]),
             f"{said['cpu_seconds']:.1f} / {was['cpu_seconds']:.1f}",
             f"{said['cpu_seconds'] / was['cpu_seconds']:.2f}",
             memory, f"{said['memory_bytes'] / was['memory_bytes']:.2f}",
             same(said["dense"], was["dense"]), same(said["packed"], was["packed"]))  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def same(said: int, was: int) -> str:
    return f"{was:,}" if said == was else f"{said:,} / {was:,}"


def stages(runs: list[dict[str, Any]]) -> str:
    """Predicted over measured CPU seconds, stage by stage."""
    names = list(dict.fromkeys(name for run in runs for name in run["measured"]["by_stage"]))
    lines = ["| model | recipe | images | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for run in runs:
        cells = [run["model"], f"`{run['recipe']}` {run['nm']}", str(run["samples"])]
        for name in names:
            pair = [run[k]["by_stage"].get(name) for k in ("predicted", "measured")]
            cells.append(" / ".join("-" if p is None else f"{p['cpu_seconds']:.1f}" for p in pair) if any(pair) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(runs: list[dict[str, Any]]) -> str:
    order = ["magnitude", "sparsegpt", "snows", "snows-refined"]
    runs = sorted(runs, key=lambda r: (r["model"], r["nm"], r["samples"], order.index(r["recipe"])))
    times = [r["predicted"]["cpu_seconds"] / r["measured"]["cpu_seconds"] for r in runs]
    memory = [r["predicted"]["memory_bytes"] / r["measured"]["memory_bytes"] for r in runs]
    exact = sum(all(r["predicted"][k] == r["measured"][k] for k in ("dense", "packed")) for r in runs)
    told = (
        f"\nOf {len(runs)} runs, time lies within a factor of 1.5 in {sum(1 / 1.5 <= t <= 1.5 for t in times)} "
        f"({min(times):.2f} to {max(times):.2f}), memory within 15 % in {sum(0.85 <= m <= 1.15 for m in memory)} "
        f"({min(memory):.2f} to {max(memory):.2f}), and bytes are exact in {exact}.\n"
    )
    head = (
        "\n| model | recipe | images | CPU s, predicted / measured | ratio | memory, MB | ratio | bytes | packed |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return HEAD + told + head + "\n".join(row(r) for r in runs) + (
        "\n\n## By stage\n\nCPU seconds, predicted / measured.\n\n"
    ) + stages(runs)


if __name__ == "__main__":
    main()
