"""The tables of docs/train.md: LOMP, IMP, Rare Gems and Smart-Ratio side by side, mean and spread over seeds.

    python benchmarks/train_tables.py digits --seeds 3      # also mnist, cifar: images of ../shared/data
    python benchmarks/train_tables.py resnet18-cifar100     # a recipe of recipes/train, with the data and a GPU
    python benchmarks/train_tables.py --write               # the tables of benchmarks/results into docs/train.md

Every finished run is written at once, and a second call goes on where the first one stopped. All methods see the same
images, rates and epochs per training; the validation images choose λ, the test images are only measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_prune import assets, networks, phases, training, training_data, training_recipe

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
RESULTS, DOCS = HERE / "results", HERE.parent / "docs" / "train.md"
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
# Rates were chosen once, on the validation images of another seed, the same for every method but the scores' own.
SMALL: dict[str, dict[str, Any]] = {
    "mnist": {"network": "mlpnet", "dataset": str(DATA / "mnist_train_10000.parquet"),
              "eval_dataset": str(DATA / "mnist_test.parquet"), "epochs": 12, "lr": 0.1},
    "digits": {"network": "lenet300", "dataset": "digits", "epochs": 30, "batch_size": 64, "lr": 0.1},
    "cifar": {"network": "mlpnet", "dataset": str(DATA / "cifar10jpeg_train_5000.parquet"),
              "eval_dataset": str(DATA / "cifar10jpeg_test.parquet"), "epochs": 12, "lr": 0.05, "image_size": 16},
}  # fmt: skip
SETS = {"mnist": ["imp.share=0.36", "rare_gems.lr=1", "rare_gems.every=2"], "digits": ["rare_gems.lr=10"],
        "cifar": ["imp.share=0.36", "rare_gems.lr=1", "rare_gems.every=2"]}  # fmt: skip
WORDS = {
    "digits": "scikit-learn's digits (8x8), 1212 training images, 450 to test on; LeNet-300-100, 50 200 weights",
    "mnist": "MNIST, 9000 training images, 10 000 to test on; 784-40-20-10, 32 360 weights",
    "cifar": "CIFAR-10 as JPEG at 16x16 pixels, 4500 training images, 10 000 to test on; 768-40-20-10, 31 720 weights",
}


def settings(name: str, method: str, seed: int, sets: list[str], **more: Any) -> training_recipe.Training:
    flags = {"weight_decay": 1e-4, **SMALL[name]} if name in SMALL else {}
    source = None if name in SMALL else name
    return training_recipe.resolve(source, flags={**flags, "method": method, "seed": seed, **more}, sets=sets)


def run(name: str, method: str, seed: int, data: Any, sets: list[str], **more: Any) -> training.Result:
    chosen = settings(name, method, seed, sets, **more)
    network = networks.build(chosen.network, data.image, len(data.names), seed)
    return training.train(network, data, chosen, Accelerator())


def nearest(points: list[dict[str, Any]], sparsity: float) -> dict[str, Any]:
    found = min(points, key=lambda point: abs(point["sparsity"] - sparsity))
    assert abs(found["sparsity"] - sparsity) < 2e-3, (found["sparsity"], sparsity)
    return found


def lomp(name: str, seed: int, data: Any, sets: list[str]) -> dict[str, Any]:
    """Every λ of the grid once: from it come the rows of plain magnitude, of LOMP's two choices, and the dense one."""
    found = run(name, "lomp", seed, data, [*sets, "lomp.choose=pruned"], sparsity=SPARSITIES[0])
    options = settings(name, "lomp", seed, sets, sparsity=0.9).settings()
    tried = found.history[:-1]
    chosen = next((each for each in tried[1:] if phases.tolerated(options, tried[0], each)), tried[0])
    epochs = tried[0]["epochs"]
    rows: dict[str, Any] = {
        "dense": {"dense": tried[0]["test_accuracy"], "epochs": epochs},
        "magnitude": {"epochs": epochs},
        "LOMP": {"epochs": epochs * (1 + tried.index(chosen)), "l1": chosen["l1"], "dense": chosen["test_accuracy"]},
        "LOMP, λ by the result": {"epochs": epochs * len(tried), "l1": {}},
    }
    for sparsity in SPARSITIES:
        rows["magnitude"][str(sparsity)] = nearest(tried[0]["curve"], sparsity)["test_accuracy"]
        rows["LOMP"][str(sparsity)] = nearest(chosen["curve"], sparsity)["test_accuracy"]
        best = min(tried, key=lambda each: nearest(each["curve"], sparsity)["validation_loss"])
        rows["LOMP, λ by the result"][str(sparsity)] = nearest(best["curve"], sparsity)["test_accuracy"]
        rows["LOMP, λ by the result"]["l1"][str(sparsity)] = best["l1"]
    return rows


def past_rows(name: str, key: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"train_{name}.json").read_text())["runs"][key]["rows"]  # type: ignore[no-any-return]


def lomp_longer(name: str, seed: int, data: Any, sets: list[str]) -> dict[str, Any]:
    """LOMP, λ by the result, with as many epochs as IMP takes: every training of the grid is longer."""
    trainings = 1 + len(phases.Lomp().grid)
    long = round(past_rows(name, f"imp {seed}")["IMP"]["epochs"] / trainings)
    found = run(name, "lomp", seed, data, [*sets, "lomp.choose=pruned"], sparsity=SPARSITIES[0], epochs=long)
    tried = found.history[:-1]
    row: dict[str, Any] = {"epochs": long * trainings}
    for sparsity in SPARSITIES:
        best = min(tried, key=lambda each: nearest(each["curve"], sparsity)["validation_loss"])
        row[str(sparsity)] = nearest(best["curve"], sparsity)["test_accuracy"]
    return {LONGER: row}


def lomp_tuned(name: str, seed: int, data: Any, sets: list[str]) -> dict[str, Any]:
    """No LOMP any more: its networks (λ by the result) trained once more under the mask, to see what that is worth."""
    chosen = past_rows(name, f"lomp {seed}")["LOMP, λ by the result"]
    row: dict[str, Any] = {}

    def more(options: Any, pattern: Any, epochs: int, past: phases.Past) -> phases.Phase | None:
        if past and past[-1]["pruned"]:
            return phases.Phase("under the mask", epochs)
        return None if any(each["pruned"] for each in past) else phases.lomp(options, pattern, epochs, past)

    phases.METHODS["lomp"], before = more, phases.METHODS["lomp"]
    try:
        for sparsity in SPARSITIES:
            l1 = f"lomp.l1={chosen['l1'][str(sparsity)]:g}"
            found = run(name, "lomp", seed, data, [*sets, l1], sparsity=sparsity)
            row[str(sparsity)] = found.test["accuracy"]
            row["epochs"] = chosen["epochs"] + found.history[-1]["epochs"]
    finally:
        phases.METHODS["lomp"] = before
    return {TUNED: row}


def imp(name: str, seed: int, data: Any, sets: list[str]) -> dict[str, Any]:
    """One run to the highest sparsity; the rounds at the others are results of their own."""
    through = ",".join(map(str, SPARSITIES[:-1]))
    found = run(name, "imp", seed, data, [*sets, f"imp.through=[{through}]"], sparsity=SPARSITIES[-1])
    row: dict[str, Any] = {"epochs": found.epochs}
    for sparsity in SPARSITIES:
        row[str(sparsity)] = nearest(found.history, sparsity)["test_accuracy"]
    return {"IMP": row}


def single(label: str, method: str) -> Any:
    def measure(name: str, seed: int, data: Any, sets: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"epochs": 0}
        for sparsity in SPARSITIES:
            found = run(name, method, seed, data, sets, sparsity=sparsity)
            row[str(sparsity)] = found.test["accuracy"]
            row["epochs"] = found.epochs
        return {label: row}

    return measure


LONGER, TUNED = "LOMP, λ by the result, as long as IMP", "LOMP, λ by the result, then trained under the mask"
ORDER = ("dense", "magnitude", "LOMP", "LOMP, λ by the result", LONGER, TUNED, "IMP", "Rare Gems", "Smart-Ratio")
JOBS = {"lomp": lomp, "imp": imp, "rare-gems": single("Rare Gems", "rare-gems"),
        "smart-ratio": single("Smart-Ratio", "smart-ratio"), "lomp-longer": lomp_longer,
        "lomp-tuned": lomp_tuned}  # fmt: skip  # the last two read what lomp and imp found


def measure(name: str, seeds: list[int], methods: list[str], sets: list[str]) -> None:
    file = RESULTS / f"train_{name}.json"
    held = json.loads(file.read_text()) if file.is_file() else {"name": name, "sets": sets, "runs": {}}
    if held["sets"] != sets:
        raise SystemExit(f"{file} was measured with other --set {held['sets']}: remove it to measure anew.")
    data = training_data.load(settings(name, "dense", 0, []))
    sets = [*SETS.get(name, []), *sets]
    for seed in seeds:
        for method in methods:
            key = f"{method} {seed}"
            if key in held["runs"]:
                continue
            began = time.process_time()
            own = [
                each
                for each in sets
                if each.partition(".")[0].replace("_", "-") == method or "." not in each.partition("=")[0]
            ]
            found = JOBS[method](name, seed, data, own)
            held["runs"][key] = {"seconds": time.process_time() - began, "rows": found}
            file.write_text(json.dumps(held, indent=1) + "\n")
            said = {label: {k: v for k, v in row.items() if k != "l1"} for label, row in found.items()}
            print(f"{name} {key}: {held['runs'][key]['seconds']:.0f} CPU s {said}", flush=True)
    print(table(held))


def table(held: Mapping[str, Any]) -> str:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    done = {method: {key.split()[1] for key in held["runs"] if key.split()[0] == method} for method in JOBS}
    whole = set.intersection(*(seeds for seeds in done.values() if seeds))  # the same seeds for every row
    for key, each in held["runs"].items():
        if key.split()[1] not in whole:
            continue
        for label, row in each["rows"].items():
            rows.setdefault(label, []).append(row)
    dense = [row["dense"] for row in rows.get("dense", [])]
    lines = ["| | " + " | ".join(f"{s:g}" for s in SPARSITIES) + " | epochs |", "|---" * (len(SPARSITIES) + 2) + "|"]
    best = {
        s: max(statistics.mean(row[str(s)] for row in found) for label, found in rows.items() if label != "dense")
        for s in SPARSITIES
    }
    for label, found in sorted(rows.items(), key=lambda row: ORDER.index(row[0])):
        if label == "dense":
            continue
        cells = []
        for s in SPARSITIES:
            values = [100 * row[str(s)] for row in found]
            said = f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
            cells.append(f"**{said}**" if abs(statistics.mean(values) / 100 - best[s]) < 1e-9 else said)
        epochs = statistics.mean(row["epochs"] for row in found)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {epochs:.0f} |")
    count = len(next(iter(rows.values())))
    spread = f" ± {100 * statistics.stdev(dense):.1f}" if len(dense) > 1 else ""
    seeds = "one seed" if count == 1 else f"{count} seeds"
    head = f"Dense {100 * statistics.mean(dense):.1f}{spread}; {seeds}." if dense else ""
    chosen = sorted(row["l1"] for row in rows.get("LOMP", []))
    if chosen:
        by = {s: sorted(row["l1"][str(s)] for row in rows["LOMP, λ by the result"]) for s in SPARSITIES}
        said = "; ".join(f"at {s:g} {', '.join(f'{v:g}' for v in values)}" for s, values in by.items())
        head += f" λ of LOMP per seed: {', '.join(f'{v:g}' for v in chosen)}; by the result: {said}."
    return head + "\n\n" + "\n".join(lines)


def write() -> None:
    """Put every table of benchmarks/results between its markers in docs/train.md."""
    text = DOCS.read_text()
    for name in SMALL:
        file = RESULTS / f"train_{name}.json"
        if file.is_file():
            begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
            body = f"{begin}\n{WORDS[name]}. {table(json.loads(file.read_text()))}\n{end}"
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, body=body: body, text, flags=re.S)
    DOCS.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=[*SMALL, *assets.names("recipes/train")])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of hf-prune train")
    parser.add_argument("--write", action="store_true", help="tables into docs/train.md")
    args = parser.parse_args()
    if args.name:
        if args.name in ("mnist", "cifar") and not DATA.is_dir():
            raise SystemExit(f"{DATA} does not exist: its images are no part of the project; take digits or a recipe.")
        torch.set_num_threads(1) if not torch.accelerator.is_available() else None
        measure(args.name, list(range(args.seeds)), args.methods, args.set)
    if args.write:
        write()


if __name__ == "__main__":
    main()
