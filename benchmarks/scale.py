"""Print and write the tables of docs/scale.md: memory against size, ranks beside one process, runs that are killed.

    python benchmarks/scale.py                     # all
    python benchmarks/scale.py --only kills        # one of growth, models, ranks, real-ranks, efficiency, kills
    python benchmarks/scale.py --vit L --blocks 1  # one large model with random weights; prints a line

Models have random weights: nothing is downloaded. Every measurement runs in a forked process, so that its
peak is its own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scale.md"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import (  # noqa: E402
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_prune import loop, memory, recipe, resume, streams  # noqa: E402

fork = multiprocessing.get_context("fork")
MIB = 2**20


def put(name: str, text: str, quiet: bool = False) -> None:
    """Replace what stands between the two markers `name` of the document."""
    if not quiet:
        print(text, flush=True)
    whole = DOCUMENT.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    assert mark.search(whole), f"{DOCUMENT} has no markers {name}"
    DOCUMENT.write_text(mark.sub(lambda found: found[1] + text + found[2], whole), encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def vit(width: int = 128, depth: int = 4, image: int = 64, patch: int = 8, heads: int = 4) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, num_labels=50,
                       intermediate_size=4 * width, image_size=image, patch_size=patch)  # fmt: skip
    return ViTForImageClassification(config).eval()


def images(count: int, size: int, pixels: int, first: int = 0) -> Any:
    """Batches of `size`, made when they are asked for; image k is the same whatever the batches."""
    for start in range(first, first + count, size):
        made = [
            torch.randn(3, pixels, pixels, generator=torch.Generator().manual_seed(k))
            for k in range(start, min(start + size, first + count))
        ]
        yield {"pixel_values": torch.stack(made)}


def apart(work: Callable[[], Any], seconds: float = 3000) -> Any:
    """`work()` in a forked process; None where it was killed."""
    ours, theirs = fork.Pipe(duplex=False)

    def run() -> None:
        theirs.send(work())

    process = fork.Process(target=run)
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(seconds) else None
    except EOFError:
        found = None
    process.join(60)
    return found


# -------------------------------------------------------------------------------------------------------------- memory
def measured(
    build: Callable[[], Any], pixels: int, samples: int, batch: int = 8, host: str | None = None, name: str = "snows",
    blocks: int | None = None, tell: Any = None, kept: str | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Prediction and measurement of one run, in a process of its own."""

    def work() -> dict[str, Any]:
        model = build()
        chosen_recipe = recipe.load(name, nm="2:4", batch_size=batch, samples=samples, **options)
        small = next(iter(images(2, 2, pixels)))
        chosen = loop.choose(model, small, chosen_recipe)
        peak, _ = memory.predict(model, chosen, chosen_recipe, samples, host=streams.size(host))
        base = memory.resident()
        if tell:
            tell({"event": "predicted", "peak": peak})
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            given = images(samples, batch, pixels)
            limits = {"host_memory": host, "spill": folder, "blocks": blocks}
            if blocks != 0:  # 0: the plan alone
                loop.prune(model, given, chosen_recipe, checkpoint=kept, progress=tell, **limits)
        return {
            "predicted": peak, "measured": memory.resident("VmHWM"), "base": base,
            "seconds": time.process_time() - began, "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip

    found = apart(work)
    assert found is not None, "the measurement was killed"
    return found


def mib(count: float) -> str:
    return f"{count / MIB:.0f}"


def exponent(xs: list[float], ys: list[float]) -> str:
    """Slope of log y over log x."""
    u, v = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return f"{sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u):.2f}"


def growth() -> None:
    rows = []
    plans: list[tuple[str, list[int], Callable[[int], dict[str, Any]]]] = [
        ("samples", [16, 32, 64, 128], lambda n: measured(vit, 64, n)),
        ("samples, `--host-memory` 160 MiB above the start", [16, 32, 64, 128], lambda n: tight(n)),
        ("depth", [2, 4, 8], lambda n: measured(lambda: vit(depth=n), 64, 16)),
        ("width", [64, 128, 256], lambda n: measured(lambda: vit(width=n, depth=2), 64, 16)),
    ]
    for what, values, run in plans:
        found = [run(v) for v in values]
        rise = [f["measured"] - f["base"] for f in found]
        rows.append([
            what, ", ".join(map(str, values)), ", ".join(mib(r) for r in rise), exponent(values, rise),
            ", ".join(f"{f['seconds']:.1f}" for f in found), exponent(values, [f["seconds"] for f in found]),
        ])  # fmt: skip
        print(rows[-1], flush=True)
        head = ["grows", "values", "MiB above the start", "exponent", "CPU seconds", "exponent"]
        put("growth", table(head, rows) + "\n\nViT of width 128, depth 4, 65 tokens, `snows` 2:4, batches of 8, 16 "
            "images where they do not grow; measured above what the process had when it was planned.")  # fmt: skip


def tight(samples: int) -> dict[str, Any]:
    start = apart(lambda: (vit(), memory.resident())[1])
    return measured(vit, 64, samples, host=f"{(start + 160 * MIB) // MIB}MiB")


SHORT = {"method": "least_squares", "ridge": 0.1, "tolerance": 0.1}  # ten steps, for what is no question of time


def models() -> None:
    def resnet() -> Any:
        config = ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1], num_labels=50)
        return ResNetForImageClassification(config).eval()

    def swin() -> Any:
        config = SwinConfig(image_size=64, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[2, 4], window_size=4,
                            num_labels=50)  # fmt: skip
        return SwinForImageClassification(config).eval()

    def convnext() -> Any:
        config = ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[1, 1, 2, 1], num_labels=50)
        return ConvNextForImageClassification(config).eval()

    rows = []
    for title, build, options in (
        ("ViT, width 512, depth 4", lambda: vit(width=512), {}),
        ("ViT, width 256, depth 8", lambda: vit(width=256, depth=8), {}),
        ("ViT, width 256, `sparsegpt`", lambda: vit(width=256), {"name": "sparsegpt"}),
        ("ResNet", resnet, {}),
        ("Swin", swin, {}),
        ("ConvNeXt", convnext, {}),
    ):
        solve = {} if options else {"solve": SHORT}
        f = measured(build, 64, 32, **solve, **options)
        rise = (f["predicted"] - f["base"]) / max(1, f["measured"] - f["base"])
        rows.append([title, f"{f['parameters'] / 1e6:.1f} M", mib(f["predicted"]), mib(f["measured"]),
                     f"{100 * (f['predicted'] / f['measured'] - 1):+.0f} %", f"{100 * (rise - 1):+.0f} %"])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["model", "parameters", "predicted MiB", "measured MiB", "difference", "of what the run adds"]
    put("models", table(head, rows) + "\n\n32 images of 64 pixels, batches of 8; resident memory of the process, its "
        "libraries included; the last column leaves out what was there before the run. Solves end at a tolerance of "
        f"{SHORT['tolerance']}, which spares time and no memory.")  # fmt: skip


LARGE = {"L": (1024, 24, 16, 16), "H": (1280, 32, 16, 14)}  # width, depth, heads, patch at 224 pixels
RECORDS = ROOT / "benchmarks" / "results" / "scale_large.json"


def large(
    kind: str, samples: int, blocks: int | None, host: str | None, batch: int, kept: str | None, options: dict[str, Any]
) -> None:  # fmt: skip
    """ViT-L/16 or ViT-H/14: what each block held at its widest, written down after every one.

    kept: a folder of finished blocks, so that several calls make one run.
    """
    width, depth, heads, patch = LARGE[kind]
    began, spent, before, now = time.monotonic(), 0.0, "planning", [""]
    run: dict[str, Any] = {"samples": samples, "host": host, "options": options}
    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    same = kept and Path(kept).exists() and all(known.get(kind, {}).get(k) == v for k, v in run.items())
    told: dict[str, Any] = known[kind] if same else {**run, "steps": {}}

    def tell(event: dict[str, Any]) -> None:
        """Layers are told when they are done, everything else when it begins."""
        nonlocal spent, before
        layer = event["event"] == "layer"
        name = event["block"] if layer and before in ("", "block") else before or event.get("block", "")
        if layer and before not in ("", "block"):
            name += ", and the first layers behind it"
        if event["event"] == "predicted":
            told.update({"predicted": event["peak"], "base": memory.resident()})
        old = told["steps"].get(name, {"cpu": 0.0, "peak": 0}) if name == now[0] else {"cpu": 0.0, "peak": 0}
        step = {"cpu": old["cpu"] + time.process_time() - spent, "peak": max(old["peak"], memory.resident("VmHWM"))}
        now[0] = name
        if step["cpu"] >= told["steps"].get(name, step)["cpu"]:  # a block that is read back costs next to nothing
            told["steps"][name] = step
        spent, before = time.process_time(), "" if layer else event.get("text", event["event"])
        known = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        RECORDS.write_text(json.dumps(known | {kind: told}, indent=1) + "\n")
        print(f"{time.monotonic() - began:6.0f} s  {name}  peak {mib(step['peak'])} MiB", flush=True)
        put("large", large_table(json.loads(RECORDS.read_text())), quiet=True)
        Path("/proc/self/clear_refs").write_text("5")  # the next peak is its own (Linux)

    f = measured(lambda: vit(width, depth, 224, patch, heads), 224, samples, batch, host, blocks=blocks, tell=tell,
                 kept=kept, **options)  # fmt: skip
    print(json.dumps(f))


def large_table(known: dict[str, Any]) -> str:
    rows = []
    for kind, told in sorted(known.items(), reverse=True):
        title = {"L": "ViT-L/16, 304 M", "H": "ViT-H/14, 632 M"}[kind]
        for name, step in told["steps"].items():
            if name not in ("predicted", "start", "images", "look", "block", "advance", ""):
                rows.append([title, f"{told['samples']}", told["host"] or "", name, mib(step["peak"]),
                             f"{step['cpu']:.0f}"])  # fmt: skip
                title = ""
        rows.append([title, "", "", "*predicted peak*", mib(told["predicted"]), ""])
    head = ["model", "images", "`--host-memory`", "step", "peak MiB in it", "CPU s"]
    less = "; channels keep their order and solves end at a tolerance of 0.1, which spares time and no memory"
    return table(head, rows) + "\n\nRandom weights, images of 224 pixels, `snows` 2:4, one thread" + (
        less if any("solve" in told["options"] for told in known.values()) else "") + "."  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- ranks
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_ranks(size: int, work: Callable[[int, int], Any]) -> list[Any]:
    answer, port = fork.Queue(), free_port()

    def start(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(minutes=10))
        answer.put((rank, work(rank, size)))
        torch.distributed.destroy_process_group()

    processes = [fork.Process(target=start, args=(r,)) for r in range(size)]
    for p in processes:
        p.start()
    found = dict(answer.get(timeout=1200) for _ in processes)
    for p in processes:
        p.join()
    return [found[r] for r in range(size)]


def pruned(batches: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Any, float]:
    model = vit(width=64, depth=3, image=32)
    began = time.process_time()
    report = loop.prune(model, batches, recipe.load("snows", nm="2:4", permute="none", **options))
    return {k: v.numpy() for k, v in model.state_dict().items()}, report.layers, time.process_time() - began


HEAD = ["recipe `snows`", "processes", "mask entries that differ", "largest weight difference (relative)",
        "all ranks alike", "KiB sent per rank", "CPU s of the busiest rank"]  # fmt: skip


def ranks_row(title: str, name: str, found: list[Any], one: dict[str, Any], alone: float) -> list[str]:
    """One line: what the ranks made, beside the weights `one` of a single process that took `alone` seconds."""
    other = found[0][0]
    masks = sum(int(((one[n] != 0) != (w != 0)).sum()) for n, w in other.items())
    weights = max(float(abs(one[n] - w).max() / abs(one[n]).max().clip(1e-9)) for n, w in other.items())
    same = all(all((other[n] == f[0][n]).all() for n in f[0]) for f in found)
    sent = sum(entry.get("sent_bytes", 0) for entry in found[0][1])
    busiest = f"{max(f[2] for f in found):.1f}" + (f" (alone {alone:.1f})" if len(found) > 1 else "")
    row = [title, name, str(masks), f"{weights:.1e}", "yes" if same else "no", f"{sent / 1024:.0f}", busiest]
    print(row, flush=True)
    return row


def ranks_table() -> None:
    count, rows = 22, []
    for title, options in (("rows apart", {"target": {"metric": 0.0}}), ("output metric (default)", {})):
        one, _, alone = pruned(list(images(count, 1, 32)), options)
        order = list(images(count, 1, 32))
        random.Random(0).shuffle(order)
        lines = [("1, samples in another order (control)", [pruned(order, options)])]
        lines.append(("1, batches of 4 (control)", [pruned(list(images(count, 4, 32)), options)]))
        for size in (2, 3, 4):
            lines.append((f"{size}", on_ranks(size, lambda r, s, o=options: pruned(_share(count, r, s), o))))
        lines.append(("3, one holds 2 of 22 images", on_ranks(3, lambda r, s, o=options: pruned(_uneven(r), o))))
        rows += [ranks_row(title, name, found, one, alone) for name, found in lines]
    few, _, alone = pruned(list(images(3, 1, 32)), {})
    found = on_ranks(4, lambda r, s: pruned(_share(3, r, s), {}))
    rows.append(ranks_row("output metric (default)", "4, of 3 images", found, few, alone))
    put("ranks", table(HEAD, rows) + "\n\nViT of width 64, depth 3, 17 tokens, 22 images, gloo on one machine; where "
        "nothing else is said, one image a batch.")  # fmt: skip


def real_ranks(samples: int = 24, size: int = 4) -> None:
    """The real ViT-Tiny and real images, batches dealt to the processes as the command does; written row by row."""
    from hf_prune import calibration
    from hf_prune import models as model_files

    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        print(f"{data} is not there: the table stays as it is.")
        return
    chosen = recipe.load("snows", nm="2:4", batch_size=size, samples=samples)
    loaded = model_files.load(str(data / "vit-tiny-patch16-224-hf"))
    drawn = calibration.images(str(data / "imagenet_sample1000_256.parquet"), samples=samples, seed=0)
    batches = list(calibration.batches(drawn, loaded, size))

    def run(mine: list[Any]) -> tuple[dict[str, Any], Any, float]:
        model = copy.deepcopy(loaded.module)
        began = time.process_time()
        report = loop.prune(model, mine, chosen)
        return {k: v.numpy() for k, v in model.state_dict().items()}, report.layers, time.process_time() - began

    one, _, alone = apart(lambda: run(batches))
    rows: list[list[str]] = []
    for name, work in (
        ("2", lambda: on_ranks(2, lambda r, s: run(batches[r::s]))),
        ("3", lambda: on_ranks(3, lambda r, s: run(batches[r::s]))),
        ("4", lambda: on_ranks(4, lambda r, s: run(batches[r::s]))),
        ("1, batches in another order (control)", lambda: [apart(lambda: run(batches[::-1]))]),
    ):
        rows.append(ranks_row("ViT-Tiny/16", name, work(), one, alone))
        put("real-ranks", table(HEAD, rows) + f"\n\nThe default recipe, channels reordered, {samples} images of "
            f"ImageNet in batches of {size}; compared with one process.", quiet=True)  # fmt: skip


def _share(count: int, rank: int, size: int) -> list[Any]:
    return list(images(count, 1, 32))[rank::size]


def _uneven(rank: int) -> list[Any]:
    every = list(images(22, 1, 32))
    return [every[:10], every[10:20], every[20:]][rank]


def efficiency() -> None:
    """What 2 to 64 GPUs would do: work that divides, work that does not, and bytes over a stated bandwidth."""
    bandwidth, wait = 100e9, 30e-6  # bytes a second and seconds per operation: NVLink within a node, in round figures
    flops = 30e12  # what a current GPU reaches in float32 without TF32, in round figures
    width, hidden, tokens, samples, steps = 1024, 4096, 197, 256, 50
    layers = [(width, width)] * 4 + [(hidden, width), (width, hidden)]
    coupled = [(3 * width, width), *layers[3:]]  # q, k and v read one input: solved as one with an output metric
    forward = 2 * tokens * (sum(o * i for o, i in layers) + 2 * tokens * width)
    per_image = 9 * forward + sum(2 * tokens * (i * i + 2 * o * i) for o, i in layers)  # both streams, Gram sums
    factors = sum(2 * i**3 for _, i in layers)  # every rank alike
    sums = 8 * sum(i * i + o * i + 2 * (i + o) for o, i in layers)  # float64
    ways = {
        "rows apart": (factors, steps * sum(2 * 2 * o * i * i for o, i in layers), sums, 5 * len(layers)),
        "output metric": (
            factors + sum(2 * o**3 for o, _ in coupled),
            steps * sum(2 * 2 * o * i * (o + i) for o, i in coupled),
            # and the columns of two products a step, gathered, which crosses half as often as a sum
            sums + steps * sum(2 * 4 * o * i for o, i in coupled) / 2,
            5 * len(layers) + 2 * steps * len(coupled),
        ),
    }
    lines = []
    alone: dict[str, float] = {}
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        line = [str(gpus)]
        for name, (fixed, solve, sent, calls) in ways.items():
            away = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * sent / bandwidth + calls * wait
            seconds = (samples / gpus * per_image + fixed + solve / gpus) / flops + away
            alone.setdefault(name, seconds)
            line += [f"{1e3 * seconds:.0f}", f"{100 * alone[name] / seconds / gpus:.0f} %", f"{1e3 * away:.0f}"]
        lines.append(line)
    head = ["GPUs"]
    for name in ways:
        head += [f"ms per block, {name}", "efficiency", "ms of it communication"]
    put("efficiency", table(head, lines) + f"\n\nPredicted, not measured: a block of ViT-L/16, {samples} images, "
        f"{steps} steps of each solve, counted operations at {flops / 1e12:.0f} TFLOP/s in float32, {sums / MIB:.0f} "
        f"MiB of sums per block and with an output metric {ways['output metric'][2] / MIB:.0f} MiB with the products "
        f"of its solves (a gather counts half of a sum), at {bandwidth / 1e9:.0f} GB/s in a ring.")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- kills
def kills(count: int = 20) -> None:
    draw = random.Random(0)

    def run(folder: Path, cut: tuple[int, float] | None = None) -> tuple[str, int]:
        pour, written = resume._pour, [0]

        def leak(file: Any, content: memoryview) -> None:
            written[0] += 1
            if cut and written[0] == cut[0]:
                pour(file, content[: int(cut[1] * len(content))])
                os.kill(os.getpid(), signal.SIGKILL)
            pour(file, content)

        resume._pour = leak
        model = vit(width=64, depth=6, image=32)
        loop.prune(model, images(32, 4, 32), recipe.load("snows", nm="2:4", permute="none"), checkpoint=folder)
        state = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        return hashlib.sha256(state).hexdigest(), written[0]

    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(place / "warm")
        began = time.monotonic()
        whole, writes = apart(lambda: run(place / "whole"))
        lasted = time.monotonic() - began
        for k in range(count):
            folder = place / str(k)
            if k % 4 == 3:
                cut = (draw.randint(1, writes), draw.random())
                moment = f"write {cut[0]} of {writes}, after {100 * cut[1]:.0f} % of its bytes"
                first = apart(lambda folder=folder, cut=cut: run(folder, cut))
            else:
                after = draw.random() * lasted
                moment = f"{100 * after / lasted:.0f} % of the run's time"
                process = fork.Process(target=run, args=(folder,))
                process.start()
                time.sleep(after)
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                first = None
            there = len(list(folder.glob("*.safetensors"))) if folder.exists() else 0
            again = apart(lambda folder=folder: run(folder))
            rows.append([str(k + 1), moment, "" if first is None else "not killed", str(there),
                         "the same" if again and again[0] == whole else "DIFFERENT"])  # fmt: skip
            print(rows[-1], flush=True)
            put("kills", kills_table(rows, count), quiet=k + 1 < count)  # each run as it ends: this takes a while


def kills_table(rows: list[list[str]], count: int) -> str:
    head = ["run", "SIGKILL at", "", "blocks kept", "sha256 of the weights after `--resume`"]
    same = sum(r[-1] == "the same" for r in rows)
    short = f" (stopped after {len(rows)} of {count})" if len(rows) < count else ""
    return table(head, rows) + (
        f"\n\n{same} of {len(rows)} resumed runs{short} end in the bits of the uninterrupted one. ViT of width 64, "
        "depth 6, 32 images."
    )


PARTS = {"growth": growth, "models": models, "ranks": ranks_table, "real-ranks": real_ranks, "efficiency": efficiency,
         "kills": kills}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(PARTS))
    parser.add_argument("--vit", choices=("L", "H"))
    parser.add_argument("--blocks", type=int, help="stop after so many; 0: the plan alone")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--host-memory")
    parser.add_argument("--checkpoint", help="a folder: a later call goes on, up to its own --blocks")
    parser.add_argument("--short", action="store_true", help="ten steps of each solve: less time, the same memory")
    parser.add_argument("--no-permute", action="store_true", help="leave the order of channels, which takes long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.vit:
        options: dict[str, Any] = {"permute": "none"} if args.no_permute else {}
        options |= {"solve": SHORT} if args.short else {}
        large(args.vit, args.samples, args.blocks, args.host_memory, args.batch, args.checkpoint, options)
        return 0
    # what torch imports on first use is then there in every forked process, and in none's measurement
    loop.prune(vit(width=32, depth=2, image=16), images(4, 2, 16), recipe.load("snows", nm="2:4"))
    for name, part in PARTS.items():
        if args.only in (None, name):
            part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
