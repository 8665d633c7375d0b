"""Prune a small random member of every architecture 2:4, three ways, and write docs/architectures.md.

    python scripts/architecture_matrix.py                 all of them, about half an hour on two cores; `make matrix`
    python scripts/architecture_matrix.py 'test_*' Vit*   those whose name matches, nothing is written

For each: plan; prune by magnitude, by the default recipe (snows) and by K-step Newton-CG on copies of the same model;
check by independent arithmetic that each group of four consecutive input channels of each planned weight holds at most
two non-zeros, that everything is finite, that the outputs moved, and that a saved and reloaded model holds the same
bits and gives the same outputs.  A failure that EXPECTED does not name, or one that it names and that no longer
happens, ends with exit code 1.
"""

from __future__ import annotations

import copy
import fnmatch
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from architectures import NOT_BUILT, Case, cases
from torch import Tensor, nn

from hf_prune import recipe
from hf_prune.loop import Recipe, choose, prune
from hf_prune.sites import feed, parameters
from hf_prune.walk import Walk

DOCS = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
IMAGES, BATCH = 8, 4
JOBS = int(os.environ.get("JOBS", "2"))
# The two calibrated ways leave out weights with more entries than this, whose solves would take hours together.
ENTRIES = 65_536

# What fails, with a part of its message, and why.  Nothing else may fail.
STANDARDISED = (
    "no weight of this model can follow 2:4",
    "all its convolutions standardise their weights, which fills zeros",
)
EXPECTED: dict[str, tuple[str, str]] = {
    "BitForImageClassification": STANDARDISED,
    "resnetv2_bit": STANDARDISED,
    "nf_resnet26": STANDARDISED,
}


def recipes() -> dict[str, Recipe]:
    newton = {"method": "snows", "k": 2, "cg": 3, "images": 4}
    return {
        "magnitude": recipe.load("magnitude", nm="2:4"),
        "snows": recipe.load("snows", nm="2:4"),
        "K-step": Recipe(nm="2:4", mask={"method": "magnitude"}, solve=newton, target={"mix": 0.0}),
    }


@dataclass
class Row:
    name: str
    library: str
    weights: int = 0
    walk: str = ""
    units: int = 0
    largest: int = 0  # most pruned weights in one unit
    pruned: int = 0
    large: int = 0
    share: float = 0.0  # of the entries of all weights of two dimensions and more
    dense: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""


def groups_of_four(name: str, model: nn.Module) -> Tensor:
    """The groups of four input channels of a weight named as in the report, `parameter` or `parameter[first:last]`."""
    parameter, _, rows = name.partition("[")
    w = model.get_parameter(parameter).detach()
    if type(model.get_submodule(parameter.rpartition(".")[0])).__name__ == "Conv1D":
        w = w.mT
    if rows:
        first, last = rows.rstrip("]").split(":")
        w = w[int(first) : int(last)]
    if w.dim() == 2 or w[0, 0].numel() == 1:
        return w.reshape(-1, 4)
    return w.movedim(1, -1).reshape(-1, 4)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(t)]


def reloaded(case: Case, model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        if case.library == "transformers":
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder).eval()
        from safetensors.torch import load_model, save_model

        save_model(model, f"{folder}/model.safetensors")
        again = case.build()
        load_model(again, f"{folder}/model.safetensors")
        return again


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors(feed(model, batch))]


def check(case: Case, model: nn.Module, name: str, chosen: Recipe, planned: set[str]) -> float:
    """Prune, and assert everything the table promises.  Returns seconds."""
    batches = [case.batch(BATCH, seed) for seed in range(IMAGES // BATCH)]
    before = outputs(model, batches[0])
    began = time.perf_counter()
    report = prune(model, batches, chosen)
    seconds = time.perf_counter() - began
    done = {layer["name"] for layer in report.layers if layer["pattern"]}
    assert done == planned, f"{name}: planned and pruned weights differ: {sorted(done ^ planned)[:3]}"
    for layer in sorted(done):
        kept = (groups_of_four(layer, model) != 0).sum(1)
        assert int(kept.max()) <= 2, f"{name}: {layer} has a group of four with {int(kept.max())} non-zeros"
        assert bool((kept == 2).any()), f"{name}: {layer} has lost all its weights"
    bad = [
        n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point() and t.isnan().any()
    ]
    assert not bad, f"{name}: {bad[0]} holds NaN"
    after = outputs(model, batches[0])
    assert all(torch.isfinite(t).all() for t in after if t.is_floating_point()), f"{name}: the output is not finite"
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), f"{name}: the output has not moved"
    again = reloaded(case, model)
    stored, read = model.state_dict(), again.state_dict()
    differ = [n for n in stored if n not in read or not torch.equal(stored[n], read[n])]
    assert not differ and len(stored) == len(read), f"{name}: saved and reloaded, {differ[:3]} hold other bits"
    # not to the bit: some CPU kernels round by where in memory their operands happen to lie
    for a, b in zip(after, outputs(again, batches[0]), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"{name}: saved and reloaded, the model gives another output"
    return seconds


def reason(text: str) -> str:
    """A dense weight's reason without what is particular to that weight."""
    return re.sub(r"its module .* (runs|is never)", r"its module \1", re.sub(r", found \d+", "", text))


def examine(case: Case) -> Row:
    row = Row(case.name, case.library)
    model = case.build()
    row.weights = sum(p.numel() for p in model.parameters())
    ways = recipes()
    small = case.batch(2, 0)
    selection = choose(model, small, ways["magnitude"])
    row.units = len(selection.units)
    row.largest = max(len(u.sites) for u in selection.units)
    row.walk = Walk(model, selection.units, small).mode
    planned = {r.name for r in selection.plan.rows if r.pattern}
    row.pruned = len(planned)
    row.dense = Counter(reason(str(r.reason)) for r in selection.plan.rows if not r.pattern)
    matrices = sum(p.numel() for p in parameters(model).values() if p.dim() > 1)
    row.share = sum(r.numel for r in selection.plan.rows if r.pattern) / matrices
    large = tuple(s.parameter for u in selection.units for s in u.sites if s.numel > ENTRIES)
    row.large = len(large)
    for name, chosen in ways.items():
        skip = () if name == "magnitude" else large
        expected = {n for n in planned if n.partition("[")[0] not in skip}
        row.seconds[name] = check(case, copy.deepcopy(model), name, replace(chosen, skip=skip), expected)
    return row


def one(name: str) -> Row:
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = next(c for c in cases() if c.name == name)
    try:
        return examine(case)
    except Exception as e:  # every failure goes into the table, by name, with its own message
        return Row(case.name, case.library, failure=f"{type(e).__name__}: {e}".split("\n")[0][:300])


def main() -> int:
    wanted = sys.argv[1:]
    chosen = [c.name for c in cases() if not wanted or any(fnmatch.fnmatch(c.name, w) for w in wanted)]
    rows = []
    # processes of their own, so that what one architecture leaves behind never reaches the next by accident
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(one, chosen):
            rows.append(row)
            times = " ".join(f"{name} {s:.1f}s" for name, s in row.seconds.items())
            print(
                f"{row.name:42} {row.failure or f'{row.walk} {row.units} units, {row.pruned} pruned, {times}'}",
                flush=True,
            )
    unexpected = [r.name for r in rows if r.failure and EXPECTED.get(r.name, ("\0", ""))[0] not in r.failure]
    cured = [r.name for r in rows if not r.failure and r.name in EXPECTED]
    if not wanted:
        DOCS.write_text(document(rows))
    print(f"{sum(not r.failure for r in rows)} of {len(rows)} architectures; failed: {unexpected}; cured: {cured}")
    return 1 if unexpected or cured else 0


def document(rows: list[Row]) -> str:
    import timm
    import transformers

    lines = [
        "# Architectures",
        "",
        "Generated by `make matrix` (scripts/architecture_matrix.py). Do not edit.",
        "",
        "Every class in transformers' image-classification mapping that can be built from a configuration, vision",
        "towers and backbones, and a member of each timm family that is listed: small, with random weights, nothing",
        f"downloaded. Each is planned and pruned 2:4 on {IMAGES} images three ways: by magnitude, by the default",
        "recipe, and by K-step Newton-CG (K = 2). For each the exact pattern of every planned weight, finite values",
        "and a changed output are checked, and that a saved and reloaded model holds the same bits and gives the same",
        "output.",
        "",
        f"- **{sum(not r.failure for r in rows)} of {len(rows)}** architectures pass everything.",
        f"- transformers {transformers.__version__}, timm {timm.__version__}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, one thread.",
        "- *walk*: how activations travel from unit to unit (chain, lean, splice, prefix; see hf_prune/walk.py).",
        "- *units*: blocks and single layers; in brackets the most weights in one.",
        "- *pruned*: weights, and their share of all matrix entries.",
        f"- *large*: weights of more than {ENTRIES} entries, pruned by magnitude only here, which keeps the whole",
        "  table within half an hour; nothing in the package limits them.",
        "",
    ]
    for library in ("transformers", "timm"):
        lines += [
            f"## {library}",
            "",
            "| model | parameters | walk | units | pruned | large | magnitude | snows | K-step | dense, and why |",
            "|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for r in (r for r in rows if r.library == library):
            if r.failure:
                why = EXPECTED[r.name][1] if r.name in EXPECTED else "**not expected**"
                lines.append(f"| {r.name} | | | | | | | | | **fails**, {why}: {r.failure.replace('|', '/')} |")
                continue
            dense = "; ".join(f"{n} {why}" for why, n in r.dense.most_common())
            times = " | ".join(f"{s:.1f} s" for s in r.seconds.values())
            lines.append(
                f"| {r.name} | {r.weights / 1e6:.2f} M | {r.walk} | {r.units} ({r.largest}) | "
                f"{r.pruned} ({100 * r.share:.0f} %) | {r.large} | {times} | {dense} |"
            )
        lines.append("")
    lines += ["## Not built", "", *(f"- {name}: {why}" for name, why in NOT_BUILT.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
