"""The tables of docs/limit.md: what the pruning limit predicts, beside what was measured.

    python benchmarks/limit_tables.py digits        # small networks trained here, with and without L1: a few minutes
    python benchmarks/limit_tables.py mlpnet        # MLPNet on MNIST
    python benchmarks/limit_tables.py vit           # ViT-Tiny on ImageNet images, with 2:4
    python benchmarks/limit_tables.py large         # its Gauss-Newton matrix with 64 images, 16 probes x 32 steps
    python benchmarks/limit_tables.py cost          # what a curvature product costs
    python benchmarks/limit_tables.py growth        # how the cost grows with images, steps and probes on ViT-Tiny
    python benchmarks/limit_tables.py docs          # write the results into docs/limit.md

Each but the last writes benchmarks/results/limit_<name>.json.  MLPNet, ViT-Tiny and their images are looked for in
../shared/data and are no part of the project.  The digits are scikit-learn's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_prune
from hf_prune import limit, loop, recipe
from hf_prune.curvature import measure

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs" / "limit.md"
WHOLE = loop.Recipe(prune_stem=True, prune_head=True)
MAGNITUDE = {0.5: 93.93, 0.6: 93.78, 0.7: 93.62, 0.8: 92.88, 0.9: 90.28, 0.95: 83.64, 0.98: 32.25}  # MLPNet, published


def need_data() -> None:
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} does not exist: its checkpoints and images are no part of the project.")
    sys.path.insert(0, str(DATA))


def paired(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def rows_of(study: limit.Study) -> list[dict[str, Any]]:
    keys = ("eps", "value", "measured", "quadratic", "trace", "spectral", "spectral_uncertainty", "spectral_settled",
            "gauss_newton")  # fmt: skip
    return [
        {k: row[k] for k in keys} | {"held_out": row["measured_at"].get("held_out_accuracy"), "refit": row.get("refit")}
        for row in study.rows
    ]


def save(name: str, told: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"limit_{name}.json").write_text(json.dumps(told, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------- digits
def dense_net(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i + 2 < len(widths) else [])
    return nn.Sequential(nn.Flatten(), *layers)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )  # fmt: skip


NETS = {
    "FC 64-32-10": lambda: dense_net(64, 32, 10),
    "FC 64-48-32-24-10": lambda: dense_net(64, 48, 32, 24, 10),
    "conv 8-16, linear": conv_net,
}


def train(net: nn.Module, x: Tensor, y: Tensor, l1: float, epochs: int, seed: int) -> nn.Module:
    """Adam with a cosine schedule on cross-entropy + l1 * sum of |w| over the weights that will be pruned.

    l1 rises from 0 over the first half: given at once, it kills deep networks before they learn anything.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in net.parameters() if p.dim() > 1]
    best = torch.optim.Adam(net.parameters(), lr=5e-3)
    rounds = math.ceil(len(x) / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(best, epochs * rounds)
    for epoch in range(epochs):
        now = l1 * min(1.0, 2 * epoch / epochs)
        for part in torch.randperm(len(x), generator=generator).split(128):
            loss = F.cross_entropy(net(x[part]), y[part]) + now * sum(w.abs().sum() for w in weights)
            best.zero_grad()
            loss.backward()
            best.step()
            schedule.step()
    return net.eval()


def digits(args: argparse.Namespace) -> None:
    """The study of every net, then what each recipe reaches at its spectral estimates."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(data.target)[order]
    train_set, test = (x[:1297], y[:1297]), (x[1297:], y[1297:])
    done = RESULTS / "limit_digits.json"
    out = json.loads(done.read_text()) if done.exists() else []  # a net that was done is not done again
    for name, make in NETS.items():
        for l1 in args.l1:
            for seed in range(args.seeds):
                if not name.startswith(args.net) or [name, l1, seed] in [[o["net"], o["l1"], o["seed"]] for o in out]:
                    continue
                torch.manual_seed(seed)
                began = time.process_time()
                epochs = args.epochs if name.startswith("FC") else args.epochs // 3
                net = train(make(), *train_set, l1, epochs, seed)
                options = limit.Options(probes=16, steps=32, seed=seed, nm=None)
                study = limit.limit(net, paired(*train_set, 500), paired(*test, 500), recipe=WHOLE, options=options)
                rows = rows_of(study)
                gap = max(abs(row["spectral"] - row["measured"]) for row in rows)
                seconds = time.process_time() - began
                print(f"{name}, L1 {l1:g}, seed {seed}: gap {gap:.3f}, {seconds:.0f} CPU s", flush=True)
                for row in rows:
                    print("   ", {k: v for k, v in row.items() if k != "refit"}, flush=True)
                out.append({"net": name, "l1": l1, "seed": seed, "weights": study.model["weights"], "rows": rows,
                            "accuracy": study.dense["held_out_accuracy"], "loss": study.dense["loss"],
                            "cpu_seconds": seconds})  # fmt: skip
                save("digits", out)
    for told in out:
        missing = [name for name in args.recipes if name not in told.setdefault("refits", {})]
        if not missing or not told["net"].startswith(args.net):
            continue
        torch.manual_seed(told["seed"])
        epochs = args.epochs if told["net"].startswith("FC") else args.epochs // 3
        net = train(NETS[told["net"]](), *train_set, told["l1"], epochs, told["seed"])
        judged = limit.targets(net, paired(*test, 500))
        accuracy = float(measure(net, judged)["accuracy"] or 0)
        if accuracy != told["accuracy"]:
            raise SystemExit(f"{told['net']} came out otherwise ({accuracy}): remove limit_digits.json, measure anew.")
        print(told["net"], told["l1"], told["seed"], flush=True)
        refit(told, net, paired(*train_set, 500), judged, missing, lambda: save("digits", out))


# ------------------------------------------------------------------------------------------------------------- MLPNet
def zeroed(model: nn.Module, names: list[str], sparsity: float) -> nn.Module:
    """A copy whose smallest weights are zero, one threshold for all; without hf_prune's own code."""
    out = copy.deepcopy(model)
    weights = [p for n, p in out.named_parameters() if n in names]
    every = torch.cat([w.detach().abs().flatten() for w in weights])
    keep = torch.ones_like(every, dtype=torch.bool)
    keep[every.argsort()[: round(sparsity * len(every))]] = False
    with torch.no_grad():
        for w, part in zip(weights, keep.split([w.numel() for w in weights]), strict=True):
            w.mul_(part.view_as(w))
    return out


def mlpnet(args: argparse.Namespace) -> None:
    need_data()
    import loaders
    from chita_tables import images

    train_set, test = images("mnist_train_10000.parquet", 0.1307, 0.3081), images("mnist_test.parquet", 0.1307, 0.3081)
    model = loaders.mnist_mlpnet()
    batches, held = paired(train_set[0][:1024], train_set[1][:1024], 256), paired(*test, 1000)
    judged = limit.targets(model, held)
    if args.refit_only:
        told = json.loads((RESULTS / "limit_mlpnet.json").read_text())
        return refit(told, model, batches, judged, args.recipes, lambda: save("mlpnet", told))
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    row = {s: 100 * float(measure(zeroed(model, names, s), judged)["accuracy"] or 0) for s in MAGNITUDE}
    print("magnitude", row, flush=True)
    began = time.process_time()
    options = limit.Options(probes=args.probes, steps=args.steps, nm=None, memory=4.0)
    study = limit.limit(model, batches, held, recipe=WHOLE, options=options, tell=_tell)
    seconds = time.process_time() - began
    told = {"images": 1024, "weights": study.model["weights"], "dense": study.dense, "magnitude": row,
            "runs": study.runs, "rows": rows_of(study), "cpu_seconds": seconds, "refits": {}}  # fmt: skip
    print(json.dumps(told["rows"], indent=None), flush=True)
    save("mlpnet", told)
    refit(told, model, batches, judged, args.recipes, lambda: save("mlpnet", told))


def refit(
    told: dict[str, Any], model: nn.Module, batches: Any, judged: Any, names: list[str], keep: Callable[[], None]
) -> None:
    """Each recipe at the spectral estimate of each row."""
    here = limit.targets(model, batches)
    dense = measure(model, here)["loss"]
    for which in names:
        told["refits"][which] = []
        for at in told["rows"]:
            sparsity = round(at["spectral"], 3)
            chosen = recipe.load(which, sparsity=sparsity, scope="model", prune_head=True, prune_stem=True)
            module = copy.deepcopy(model)
            hf_prune.prune(module, batches, chosen)
            loss, there = measure(module, here)["loss"], measure(module, judged)
            found = {"sparsity": chosen.sparsity, "rise": loss - dense, "held_out": there["accuracy"]}
            told["refits"][which].append(found)
            print(which, at["eps"], found, flush=True)
        keep()


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == "stage" or event.get("step", 1) % 16 == 0:
        print(event, flush=True)


# ----------------------------------------------------------------------------------------------------------- ViT-Tiny
def vit(args: argparse.Namespace) -> None:
    need_data()
    from hf_prune import cli

    folder = RESULTS / "limit_vit"
    words = ["limit", str(DATA / "vit-tiny-patch16-224-hf"), "--dataset", str(DATA / "imagenet_sample1000_256.parquet"),
             "--eval-dataset", str(DATA / "imagenet_val_800.parquet"), "--samples", str(args.samples), "--batch-size",
             "4", "--eval-samples", "200", "--probes", str(args.probes), "--steps", str(args.steps), "--device", "cpu",
             "--eps", "auto", ".1", ".5", "--time-limit", str(args.minutes), "--memory", "4",
             "--output-dir", str(folder)]  # fmt: skip
    if not args.refit_only:
        began = time.process_time()
        if cli.main(words):
            raise SystemExit(1)
        study = json.loads((folder / "limit.json").read_text())
        told = {k: study[k] for k in ("rows", "nm", "model", "dense", "runs", "skip", "notes")}
        save("vit", told | {"cpu_seconds": time.process_time() - began})
    told = json.loads((RESULTS / "limit_vit.json").read_text())
    told.setdefault("refits", {})
    told.setdefault("at_estimate", {})
    for samples in (args.samples, 128):  # snows on the images of the study and on enough of them
        if str(samples) not in told["refits"]:
            told["refits"][str(samples)] = vit_refit(samples, args.samples, nm="2:4")
            print(samples, told["refits"][str(samples)], flush=True)
            save("vit", told)
        for row in told["rows"]:
            done = told["at_estimate"].setdefault(str(samples), {})
            if row["spectral"] is not None and row["eps"] not in done:
                sparsity = round(row["spectral"], 3)
                found = vit_refit(samples, args.samples, sparsity=sparsity, scope="model")
                done[row["eps"]] = {"sparsity": sparsity, **found}
                print(samples, row["eps"], done[row["eps"]], flush=True)
                save("vit", told)


def vit_refit(samples: int, judged_on: int, **how: Any) -> dict[str, float | None]:
    """snows on `samples` images: the rise of the study's calibration loss, and held-out loss and accuracy."""
    from hf_prune import models
    from hf_prune.calibration import batches, images
    from hf_prune.labels import match

    loaded = models.load(str(DATA / "vit-tiny-patch16-224-hf"))

    def read(file: str, count: int, size: int) -> list[Any]:
        found = images(str(DATA / file), samples=count)
        classes = match(found.label_names, loaded.labels, loaded.num_classes).classes
        return list(batches(found, loaded, size, classes))

    here = limit.targets(loaded.module, read("imagenet_sample1000_256.parquet", judged_on, 4))
    there = limit.targets(loaded.module, read("imagenet_val_800.parquet", 200, 20))
    before, far = measure(loaded.module, here)["loss"] or 0.0, measure(loaded.module, there)["loss"] or 0.0
    hf_prune.prune(loaded.module, read("imagenet_sample1000_256.parquet", samples, 16), recipe.load("snows", **how))
    rise, judged = (measure(loaded.module, here)["loss"] or 0.0) - before, measure(loaded.module, there)
    return {"rise": rise, "held_out_rise": (judged["loss"] or 0.0) - far, "held_out_accuracy": judged["accuracy"]}


# ---------------------------------------------------------------------------------------------- ViT-Tiny, the full cell
def large(args: argparse.Namespace) -> None:
    """The Gauss-Newton matrix of ViT-Tiny on 64 images, 16 probes x 32 steps, however narrow the interval already is.

    Every finished probe is written at once, and a call goes on after the last; --minutes ends it after a probe.
    """
    need_data()
    import resource

    from hf_prune import models
    from hf_prune.calibration import batches, images
    from hf_prune.labels import match
    from hf_prune.spectrum import Lanczos, Removal, probe

    began = time.monotonic()
    done = RESULTS / "limit_large.json"
    told = json.loads(done.read_text()) if done.exists() else {"images": 64, "runs": []}
    loaded = models.load(str(DATA / "vit-tiny-patch16-224-hf"))
    found = images(str(DATA / "imagenet_sample1000_256.parquet"), samples=64)
    classes = match(found.label_names, loaded.labels, loaded.num_classes).classes
    task = limit.task_of(loaded.module, list(batches(found, loaded, args.batch, classes)), loop.Recipe(),
                         args.memory * 2**30)  # fmt: skip
    told["weights"] = len(task.weights)
    for number in range(len(told["runs"]), args.probes):
        if time.monotonic() - began > 60 * args.minutes:
            break
        start, wall = time.process_time(), time.perf_counter()
        run = Lanczos(lambda v: task.product(v, "gauss-newton"), probe(len(task.weights), 0, number,
                      task.weights.dtype, "cpu"), basis=False)  # fmt: skip
        for _ in range(args.steps):
            run.step()
        told["runs"].append({"alphas": run.alphas, "betas": run.betas, "cpu_seconds": time.process_time() - start,
                             "seconds": time.perf_counter() - wall, "batch": args.batch,
                             "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})  # fmt: skip
        print({k: v for k, v in told["runs"][-1].items() if k not in ("alphas", "betas")}, flush=True)
        save("large", told)
    told["cap"] = min(1.0, 64 * (task.images.outputs - 1) / len(task.weights))
    told["estimates"] = {n: estimate(told, n, Removal(task.weights)) for n in steps_to(len(told["runs"]))}
    save("large", told)


def steps_to(count: int) -> list[int]:
    return sorted({n for n in (1, 4, 8) if n < count} | {count})


def estimate(told: dict[str, Any], count: int, removal: Any) -> dict[str, Any]:
    """The interval of the sparsity from the first `count` probes, and the mean curvature."""
    from hf_prune.spectrum import Lanczos, bounds, fixed_point, mean_curvature, spread

    runs = []
    for found in told["runs"][:count]:
        run = Lanczos(lambda v: v, torch.ones(2), basis=False).free()
        run.alphas, run.betas = found["alphas"], found["betas"]
        runs.append(run)
    between = bounds(runs)
    intervals = {
        f"{eps:g}": (
            fixed_point(lambda mu: min(told["cap"], between(mu)[1]), removal, eps),
            fixed_point(lambda mu: between(mu)[0], removal, eps),
        )
        for eps in (0.01, 0.05, 0.1, 0.2, 0.5)
    }
    means = [mean_curvature([run.gauss()]) for run in runs]
    return {"intervals": intervals, "mean_curvature": sum(means) / count, "spread": spread(means)}


# --------------------------------------------------------------------------------------------------------------- cost
def machine() -> float:
    """Floating-point operations a second of one float32 matrix product of ViT-Tiny's shape; CPU time, one thread."""
    a, b = torch.randn(197 * 4, 192), torch.randn(192, 768)
    best = math.inf
    for _ in range(30):
        began = time.process_time()
        for _ in range(4):
            a @ b
        best = min(best, (time.process_time() - began) / 4)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best


def cost(args: argparse.Namespace) -> None:
    """CPU seconds of a product, its operations, and how many times the operations' own time it takes."""
    need_data()
    import loaders
    from chita_tables import images
    from torch.utils import flop_counter

    def added(_: Any, one: Any, other: Any, *rest: Any, **more: Any) -> int:
        return 2 * math.prod(one) * int(other[-1])

    more = {torch.ops.aten.addmm_: added, torch.ops.aten.baddbmm_: added}  # torch counts them only out of place

    def counted() -> Any:
        return flop_counter.FlopCounterMode(display=False, custom_mapping=more)

    x, y = images("mnist_train_10000.parquet", 0.1307, 0.3081)
    cx, cy = images("cifar10_lossless_train_4000.parquet", 0.5, 0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 3, 224, 224, generator=generator)
    tasks = {
        "MLPNet, 1024 images": (loaders.mnist_mlpnet(), paired(x[:1024], y[:1024], 1024)),
        "ResNet20, 64 images": (loaders.chita_resnet20(), paired(cx[:64], cy[:64], 64)),
        "ViT-Tiny, 4 images": (loaders.vit_tiny_timm(), [noise[:4]]),
    }
    tasks = {name: task for name, task in tasks.items() if name.startswith(args.net)}
    known = json.loads((RESULTS / "limit_cost.json").read_text()) if args.net else []
    out: list[dict[str, Any]] = [row for row in known if row["net"] not in tasks]
    for name, (model, batches) in tasks.items():
        for memory in (8.0, 0.0):
            task = limit.task_of(model, batches, loop.Recipe(), memory * 2**30)
            v = torch.randn(len(task.weights), generator=generator)
            for kind in ("gauss-newton", "hessian"):
                with counted() as first:
                    task.product(v, kind)
                with counted() as counter:
                    task.product(v, kind)
                best, speed = math.inf, 0.0
                for _ in range(args.repeats):
                    speed = max(speed, machine())
                    began = time.process_time()
                    task.product(v, kind)
                    best = min(best, time.process_time() - began)
                shares = parts(lambda v=v, k=kind, t=task: t.product(v, k), best)
                alone = shares.pop("alone")
                row = {"net": name, "matrix": kind, "graph": "kept" if memory else "rebuilt", "seconds": best,
                       "operations": counter.get_total_flops(), "first": first.get_total_flops(), "speed": speed,
                       "ratio": best * speed / counter.get_total_flops(),
                       "shares": shares,
                       "alone": alone and alone * speed / counter.get_total_flops()}  # fmt: skip
                print(row, flush=True)
                out.append(row)
            task.forget()
        save("cost", out)


PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mkldnn_convolution", "convolution_backward",
            "mkldnn_linear")  # fmt: skip
COPIES = ("copy_", "fill_", "zero_", "cat", "_to_copy")


def parts(work: Any, seconds: float) -> dict[str, float | None]:
    """Shares of the time of `work` by what torch does in it, and what its matrix products take alone, as seconds.

    seconds: what one call takes.  Alone: the same shapes again and again on the same data; None with convolutions.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # the first one carries the start of the profiler
    count = max(1, round(1 / seconds))  # its clock also runs while others have the processor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(count):
            work()
    spent = {"products": 0.0, "copies": 0.0, "entries": 0.0, "rest": 0.0}
    for e in profile.key_averages():
        name = e.key.removeprefix("aten::")
        kind = "products" if name in PRODUCTS else "copies" if name in COPIES else "rest"
        if kind == "rest" and e.key.startswith("aten::") and name not in VIEWS:
            kind = "entries"
        spent[kind] += e.self_cpu_time_total
    shares: dict[str, float | None] = {k: v / sum(spent.values()) for k, v in spent.items()}
    alone, convolutions = 0.0, False
    for e in profile.key_averages(group_by_input_shape=True):
        name = e.key.removeprefix("aten::")
        if name in PRODUCTS:
            given = [torch.randn(shape) for shape in e.input_shapes if len(shape) > 1]
            convolutions |= name not in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
            if not convolutions:
                alone += e.count / count * once(lambda name=name, given=given: getattr(torch.Tensor, name)(*given))
    return shares | {"alone": None if convolutions else alone}


VIEWS = ("view", "reshape", "t", "transpose", "permute", "as_strided", "expand", "slice", "select", "unbind", "flatten",
         "unflatten", "matmul", "linear", "detach", "alias", "empty", "empty_like", "empty_strided", "unsqueeze",
         "squeeze", "_unsafe_view", "_reshape_alias", "split", "split_with_sizes", "resolve_conj", "resolve_neg",
         "conv2d", "convolution", "_convolution", "result_type", "zeros_like", "zeros", "to", "contiguous", "numpy_T",
         "clone", "adjoint", "is_floating_point", "convolution_backward_overrideable", "narrow", "chunk")  # fmt: skip


def once(work: Any) -> float:
    """CPU seconds of one call, the best of several rounds."""
    work()
    best = math.inf
    for _ in range(5):
        began = time.process_time()
        for _ in range(5):
            work()
        best = min(best, (time.process_time() - began) / 5)
    return best


def growth(args: argparse.Namespace) -> None:
    """CPU seconds of Lanczos runs with the Gauss-Newton matrix of ViT-Tiny, and the exponents of their growth."""
    need_data()
    import loaders

    from hf_prune.spectrum import Lanczos, probe

    model = loaders.vit_tiny_timm()
    noise = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    told: list[dict[str, Any]] = []

    def run(images: int, steps: int, probes: int, task: Any) -> None:
        best = math.inf
        for _ in range(2):
            began = time.process_time()
            for number in range(probes):
                lanczos = Lanczos(lambda v: task.product(v, "gauss-newton"), probe(len(task.weights), 0, number,
                                  task.weights.dtype, "cpu"), basis=False)  # fmt: skip
                for _ in range(steps):
                    lanczos.step()
            best = min(best, time.process_time() - began)
        told.append({"images": images, "steps": steps, "probes": probes, "seconds": best})
        print(told[-1], flush=True)

    for images in (4, 8, 16):
        task = limit.task_of(model, list(noise[:images].split(4)), loop.Recipe(), 8 * 2**30)
        task.product(torch.ones_like(task.weights), "gauss-newton")  # the graphs are built and kept
        run(images, 2, 1, task)
        if images == 4:
            for steps, probes in ((4, 1), (8, 1), (2, 2), (2, 4)):
                run(images, steps, probes, task)
        task.forget()
    save("growth", told)


# --------------------------------------------------------------------------------------------------------------- docs
def growth_table(told: list[dict[str, Any]]) -> list[str]:
    """The three exponents by least squares in logarithms, and what they give for the large cell."""
    keys = ("images", "steps", "probes")
    a = torch.tensor([[1.0, *(math.log(row[k]) for k in keys)] for row in told], dtype=torch.float64)
    b = torch.tensor([[math.log(row["seconds"])] for row in told], dtype=torch.float64)
    fit = torch.linalg.lstsq(a, b).solution[:, 0].tolist()
    out = head("images", "Lanczos steps", "probes", "CPU s", "CPU s per image and product")
    for row in told:
        each = row["seconds"] / (row["images"] * row["steps"] * row["probes"])
        out.append(line(*(row[k] for k in keys), f"{row['seconds']:.2f}", f"{each:.3f}"))
    large = math.exp(fit[0] + sum(e * math.log(n) for e, n in zip(fit[1:], (64, 32, 16), strict=True)))
    most = max(row["seconds"] / (row["images"] * row["steps"] * row["probes"]) for row in told) * 64 * 32 * 16
    powers = ", ".join(f"{k}^{e:.2f}" for k, e in zip(keys, fit[1:], strict=True))
    said = (f"64 images at 16 probes x 32 steps would take {large / 60:.0f} minutes by the fit, {most / 60:.0f} by the "
            "dearest row times the counts; one thread, the Gauss-Newton matrix alone.")  # fmt: skip
    return [*out, "", f"Fitted: {powers}. **Extrapolated** (what was run is in the table further up): {said}"]


def large_table(told: dict[str, Any]) -> list[str]:
    out = head("probes", "products", "CPU minutes", "memory, GiB", "mean curvature", "Gauss-Newton, eps .05")
    for count, found in told["estimates"].items():
        took = told["runs"][: int(count)]
        low, high = found["intervals"]["0.05"]
        out.append(line(count, sum(len(t["alphas"]) for t in took), f"{sum(t['cpu_seconds'] for t in took) / 60:.1f}",
                        f"{max(t['memory'] for t in took) / 2**30:.1f}",
                        f"{found['mean_curvature']:.5f} ± {found['spread']:.5f}" if int(count) > 1 else
                        f"{found['mean_curvature']:.5f}", f"{low:.4f} to {high:.4f} (vacuous)"))  # fmt: skip
    return [*out, "", f"{told['weights']:,} weights, 64 images; the rank alone says at least {1 - told['cap']:.4f}."]


def line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def interval(row: dict[str, Any]) -> str:
    found = row["gauss_newton"]
    return "" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"


def eps_of(row: dict[str, Any]) -> str:
    return f"auto {row['value']:.3f}" if row["eps"] == "auto" else row["eps"]


def head(*cells: str) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def digits_table(told: list[dict[str, Any]]) -> list[str]:
    out = head("network", "L1", "seeds", "accuracy %", "zeroing, measured", "quadratic", "trace", "spectral \\|H\\|",
               "Gauss-Newton", "largest gap, 6 rows", *(f"{n} at the spectral estimate" for n in REFITS))  # fmt: skip
    for name, l1 in dict.fromkeys((o["net"], o["l1"]) for o in told):
        nets = [o for o in told if (o["net"], o["l1"]) == (name, l1)]
        at = [next(row for row in o["rows"] if row["eps"] == "0.05") for o in nets]

        def mean(key: str, at: list[Any] = at) -> str:
            return share(sum(row[key] for row in at) / len(at))

        newton = {"gauss_newton": [sum(row["gauss_newton"][i] for row in at) / len(at) for i in (0, 1)]}
        gap = max(abs(row["spectral"] - row["measured"]) for o in nets for row in o["rows"])
        accuracy = 100 * sum(o["accuracy"] for o in nets) / len(nets)
        out.append(line(f"{name} ({nets[0]['weights']:,} weights)", f"{l1:g}", len(nets), f"{accuracy:.1f}",
                        mean("measured"), mean("quadratic"), mean("trace"), mean("spectral"), interval(newton),
                        f"{gap:.3f}", *(refitted(nets, name) for name in REFITS)))  # fmt: skip
    return out


REFITS = ("magnitude", "snows", "chita")


def refitted(nets: list[dict[str, Any]], name: str) -> str:
    """Mean rise of the loss at eps .05, and how many of all rows stay within their eps."""
    found = [(row, there) for o in nets for row, there in zip(o["rows"], o["refits"][name], strict=True)]
    at = [there["rise"] for row, there in found if row["eps"] == "0.05"]
    return f"{sum(at) / len(at):+.3f}; {sum(there['rise'] <= row['value'] for row, there in found)} of {len(found)}"


def mlpnet_tables(told: dict[str, Any]) -> list[str]:
    out = head("sparsity", *(f"{float(s):g}" for s in told["magnitude"]))
    out.append(line("published", *(f"{v:.2f}" for v in MAGNITUDE.values())))
    out.append(line("here", *(f"{v:.2f}" for v in told["magnitude"].values())))
    out += ["", *head("eps", "zeroing, measured", "held-out accuracy %", "quadratic", "trace", "spectral \\|H\\|",
                      "Gauss-Newton")]  # fmt: skip
    for row in told["rows"]:
        out.append(line(eps_of(row), share(row["measured"]), f"{100 * row['held_out']:.2f}", share(row["quadratic"]),
                        share(row["trace"]), f"{row['spectral']:.3f} ± {row['spectral_uncertainty']:.3f}",
                        interval(row)))  # fmt: skip
    refits = told["refits"]
    out += ["", *head("eps", "sparsity (spectral estimate)",
                      *(f"{name}: rise of the calibration loss, held-out accuracy %" for name in refits))]  # fmt: skip
    for i, row in enumerate(told["rows"]):
        cells = [f"{found[i]['rise']:+.3f}, {100 * found[i]['held_out']:.2f}" for found in refits.values()]
        out.append(line(eps_of(row), share(row["spectral"]), *cells))
    return out


def vit_tables(told: dict[str, Any]) -> list[str]:
    out = head("eps", "zeroing, measured", "held-out accuracy %", "quadratic", "trace", "spectral \\|H\\|",
               "Gauss-Newton")  # fmt: skip
    few = max(told["runs"].get("hessian", {}).get("steps") or [0])
    for row in told["rows"]:
        spectral = "" if row["spectral"] is None else f"{row['spectral']:.3f}"
        spectral += f" ({few} steps, too few)" if spectral and not row["spectral_settled"] else ""
        out.append(line(eps_of(row), share(row["measured"]), f"{100 * row['measured_at']['held_out_accuracy']:.1f}",
                        share(row["quadratic"]), share(row["trace"]), spectral,
                        interval(row) + (" (vacuous)" if told["model"]["vacuous"] else "")))  # fmt: skip
    nm = told["nm"]
    out += ["", *head(f"{nm['pattern']} of every layer", "rise of the calibration loss", "held-out accuracy %")]
    out.append(line("predicted, isotropic", f"{nm['predicted_isotropic']:+.3f}", ""))
    out.append(line("predicted, quadratic", f"{nm['predicted_quadratic']:+.3f}", ""))
    rows = [("**measured, zeroing alone**", nm["measured"])]
    rows += [(f"**measured, snows on {n} images**", found) for n, found in told.get("refits", {}).items()]
    for text, found in rows:
        out.append(line(text, f"{found['rise']:+.3f}", f"{100 * found['held_out_accuracy']:.1f}"))
    if any(told.get("at_estimate", {}).values()):
        out += ["", *head("eps", "sparsity (spectral estimate)", "snows on", "rise of the calibration loss",
                          "rise of the held-out loss", "held-out accuracy %")]  # fmt: skip
        for row in told["rows"]:
            for n, found in told["at_estimate"].items():
                if there := found.get(row["eps"]):
                    out.append(line(eps_of(row), share(there["sparsity"]), f"{n} images", f"{there['rise']:+.3f}",
                                    f"{there['held_out_rise']:+.3f}",
                                    f"{100 * there['held_out_accuracy']:.1f}"))  # fmt: skip
    runs = "; ".join(
        f"{name}: {run['probes']} probes of up to {max(run['steps'])} steps, ended by {run['ended_by']}"
        for name, run in told["runs"].items()
        if run["steps"]
    )
    dense = 100 * told["dense"]["held_out_accuracy"]
    out += ["", f"{told['model']['images']} calibration images, 200 held-out ones (dense {dense:.1f} %). {runs}. "
            f"{told['cpu_seconds']:.0f} CPU seconds, one thread. 2:4 removes {100 * nm['energy_removed']:.1f} % of the "
            f"squared weights, as much as unstructured {nm['equivalent_sparsity']:.3f}."]  # fmt: skip
    return out


def cost_table(told: list[dict[str, Any]]) -> list[str]:
    told = sorted(told, key=lambda row: row["net"])
    out = head("network and images", "matrix", "graph", "Gflop", "CPU s", "Gflop/s of a matmul",
               "times the operations' own time", "products alone", "products", "entry by entry", "copies",
               "the rest")  # fmt: skip
    for row in told:
        alone = "" if row["alone"] is None else f"{row['alone']:.2f}"
        shares = [f"{100 * row['shares'][k]:.0f} %" for k in ("products", "entries", "copies", "rest")]
        out.append(line(row["net"], row["matrix"], row["graph"], f"{row['operations'] / 1e9:.3g}",
                        f"{row['seconds']:.3g}", f"{row['speed'] / 1e9:.0f}", f"**{row['ratio']:.2f}**", alone,
                        *shares))  # fmt: skip
    return out


def docs(args: argparse.Namespace) -> None:
    """Replace what stands between the markers of docs/limit.md by the tables of the results that are there."""
    text = DOCS.read_text()
    for name, make in (("digits", digits_table), ("mlpnet", mlpnet_tables), ("vit", vit_tables), ("large", large_table),
                       ("cost", cost_table), ("growth", growth_table)):  # fmt: skip
        path = RESULTS / f"limit_{name}.json"
        start, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        body = "\n".join(make(json.loads(path.read_text()))) if path.exists() else "*Not measured yet.*"
        text = before + start + body + "\n" + end + after
    DOCS.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("digits", "mlpnet", "vit", "cost", "growth", "large", "docs"))
    parser.add_argument("--l1", type=float, nargs="*", default=[0.0, 3e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--net", default="", help="only nets whose name starts so (digits, cost)")
    parser.add_argument("--epochs", type=int, default=300, help="a third of it for convolutions")
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16, help="images of ViT-Tiny")
    parser.add_argument("--refit-only", action="store_true", help="of mlpnet, vit: keep the study, prune again")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of ViT-Tiny")
    parser.add_argument("--batch", type=int, default=4, help="images a batch (large)")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for kept graphs (large)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", default=["magnitude", "snows", "chita"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    globals()[args.what](args)
