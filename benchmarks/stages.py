"""Where the time of a run goes, against the machine's matrix-product peak measured in the same run.

    python benchmarks/stages.py --model ../shared/data/vit-tiny-patch16-224-hf --samples 64 \
        --calibration ../shared/data/imagenet_sample1000_256.parquet
    python benchmarks/stages.py --config base --samples 32 --threads 2

A model of your own, or a vision transformer with random weights and images of the given size, is pruned 2:4.
Operations are counted by
torch's flop counter where a stage runs matrix products of unknown number (solves, forwards), and from the shapes for
the sums.  A share of the peak is operations / seconds / peak: what is left is memory traffic, element-wise work and
small products.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_prune import calibration, collect, linalg, loop, models, objective, permute, recipe, sites, walk

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
seconds: dict[str, float] = defaultdict(float)
operations: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
inner: list[float] = []  # time spent in stages inside the running one, which counts there


@contextlib.contextmanager
def stage(name: str, flops: float = 0.0) -> Iterator[None]:
    began = time.process_time()
    inner.append(0.0)
    try:
        yield
    finally:
        spent = time.process_time() - began
        seconds[name] += spent - inner.pop()
        if inner:
            inner[-1] += spent
        operations[name] += flops
        calls[name] += 1


def timed(owner: Any, attribute: str, names: str | dict[str, str], count: Any = None) -> None:
    """Replace a function by one that reports to `stage`; count: its operations from its arguments, or "counter".

    names: the stage's, or those for each first argument.
    """
    function = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        name = names if isinstance(names, str) else names[args[0]]
        if count == "counter":
            with stage(name):
                out = function(*args, **kwargs)
            with stage("counting"), FlopCounterMode(display=False) as counter:  # again, since counting takes time
                function(*args, **kwargs)
            operations[name] += counter.get_total_flops()
            return out
        with stage(name, count(*args, **kwargs) if count else 0.0):
            return function(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def peak() -> float:
    """Operations per second of a large float32 product, by the kernel that the run takes."""
    a = torch.randn(1536, 1536)
    best = 0.0
    with linalg.exact_matmul():
        for _ in range(6):
            began = time.process_time()
            a @ a
            best = max(best, 2 * 1536**3 / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder; needs --calibration")
    parser.add_argument("--calibration")
    parser.add_argument("--config", choices=SIZES, default="tiny")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--recipe", default="snows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a page with markers to put the table into: docs/speed.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model: torch.nn.Module
    if args.model:
        loaded = models.load(args.model)
        found = calibration.images(args.calibration, samples=args.samples, seed=0)
        model, batches, name = loaded.module, list(calibration.batches(found, loaded, 16)), Path(args.model).name
    else:
        width, depth, heads = SIZES[args.config]
        config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                           intermediate_size=4 * width, num_labels=1000)  # fmt: skip
        model, name = ViTForImageClassification(config).eval(), f"ViT-{args.config}, random weights"
        count = -(-args.samples // 16)
        batches = [{"pixel_values": torch.randn(min(16, args.samples), 3, 224, 224)} for _ in range(count)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sites.feed(model, sites.cut(batches[0], 0, 1))
    forward = counter.get_total_flops()  # of one image
    images = args.samples

    samples = lambda x: x.shape[0] * x.shape[1]  # noqa: E731

    def triangle(n: int) -> float:
        """Entries that a symmetric product computes (linalg.symmetric)."""
        return n * n * (linalg.bands(n) + 1) / (2 * linalg.bands(n))

    timed(objective.Gram, "add_inputs", "sums: x xT", lambda self, x, w=None: 2 * samples(x) * triangle(x.shape[2]))
    timed(objective.Gram, "add_corrections", "sums: x dT",
          lambda self, x, d, w=None: 2 * samples(x) * x.shape[2] * d.shape[2])  # fmt: skip
    # counted on ViT-Tiny: 3.3 forwards' worth for one forward and two backwards, .7 for the second moments
    timed(loop, "importance", "influence of samples", lambda *a, **k: 4 * forward * images)
    timed(permute, "permute", "order of channels")
    timed(loop, "call", {"select": "masks", "solve": "solves"}, "counter")
    timed(collect.Stage, "watch", "forwards for the sums")
    timed(walk.Walk, "advance", "streams advance", lambda *a: 0.0)
    best = peak()
    began = time.process_time()
    loop.prune(model, batches, recipe.load(args.recipe, nm="2:4", samples=args.samples))
    whole = time.process_time() - began - seconds.pop("counting")
    seconds["everything else"] = whole - sum(seconds.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"{name}, {args.samples} images, recipe `{args.recipe}`, {args.threads} thread(s): {whole:.0f} s, "
        f"peak of memory {memory:.2f} GiB; matrix-product peak {best / 1e9:.0f} GFLOP/s.", "",
        "| stage | calls | GFLOP | s | % of the time | % of the peak |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in sorted(seconds, key=lambda n: -seconds[n]):
        share = operations[name] / seconds[name] / best if operations[name] else None
        counted, reached = ("", "") if share is None else (f"{operations[name] / 1e9:.0f}", f"{100 * share:.0f}")
        lines.append(f"| {name} | {calls[name] or ''} | {counted} | {seconds[name]:.1f} | "
                     f"{100 * seconds[name] / whole:.0f} | {reached} |")  # fmt: skip
    print("\n".join(lines))
    if args.output:  # the table replaces the one between the page's markers
        text = args.output.read_text()
        begin, end = "<!-- stages: begin -->\n", "<!-- stages: end -->"
        head, rest = text.split(begin)
        args.output.write_text(head + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
