"""What will be pruned, said before it happens: which names a `--skip` or `--only` means, and the plan as text.

The plan itself (one dry run of the model) comes from loop.py; this file puts it into words of at most 80 columns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .checkpoint import size

if TYPE_CHECKING:
    from .loop import Plan, Row

WIDTH = 80


# ---------------------------------------------------------------------------------------------- --skip and --only
def expand(patterns: Iterable[str], names: Mapping[str, str], *, flag: str) -> tuple[str, ...]:
    """The parameter names that name patterns mean, in the order of `names`.

    patterns: a name or a part of it between dots (`classifier`, `layers.0`, `mlp.fc1`: `layers.1` does not mean
        `layers.10`), a shell pattern (`*.attention.*`), or `re:` and a regular expression, searched for anywhere.
    names: parameter name in memory -> its name on disk; both are matched, with and without `.weight` at the end.
    flag: "--skip" or "--only", for messages.
    Raises ValueError that lists, for each pattern without a match, the nearest names.
    """
    chosen: set[str] = set()
    lost: list[str] = []
    for pattern in patterns:
        hits = {name for name, disk in names.items() if any(_matches(pattern, each) for each in (name, disk))}
        if not hits:
            lost.append(f"{flag} {pattern!r} matches no weight of this model.{_nearest(pattern, names)}")
        chosen |= hits
    if lost:
        raise ValueError("\n".join(lost))
    return tuple(name for name in names if name in chosen)


def _matches(pattern: str, name: str) -> bool:
    module = name.removesuffix(".weight")
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if pattern in (name, module):
        return True
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)
    return f".{pattern}." in f".{name}."


def _nearest(pattern: str, names: Mapping[str, str]) -> str:
    modules = sorted({name.removesuffix(".weight") for pair in names.items() for name in pair})
    bare = re.sub(r"^re:|[*?\[\]^$\\]", "", pattern).strip(".")
    parts = sorted({part for name in modules for part in name.split(".") if not part.isdigit()})
    near = [name for name in modules if bare and bare in name][:3]  # `proj` is inside `q_proj`, which has another name
    near += difflib.get_close_matches(bare, parts + modules, n=3, cutoff=0.6)
    if not near:
        near = modules[:3]
    return f" Nearest names: {', '.join(dict.fromkeys(near))}."


# ------------------------------------------------------------------------------------------------- the plan as text
def totals(plan: Plan) -> dict[str, int]:
    """Weights and parameters of the plan: `pruned`, `dense` (weights), `parameters` and `prunable` (their entries)."""
    pruned = [row for row in plan.rows if row.pattern]
    return {
        "pruned": len(pruned),
        "dense": len(plan.rows) - len(pruned),
        "parameters": sum(row.numel for row in plan.rows),
        "prunable": sum(row.numel for row in pruned),
    }


def text(plan: Plan, *, width: int = WIDTH) -> str:
    """Every weight with its shape and pattern, or the reason why it stays dense, and the totals.

    Blocks that look alike are written out all the same: the plan is also what is read by a grep.
    """
    cells = [(row.name, _shape(row), row.pattern or "dense") for row in plan.rows]
    last = max([len(cell[2]) for cell in cells] + [len("pattern")])
    middle = max([len(cell[1]) for cell in cells] + [len("shape")])
    first = max(20, min(max([len(cell[0]) for cell in cells] + [len("weight")]), width - middle - last - 4))
    lines = [f"{'weight':<{first}}  {'shape':<{middle}}  pattern"]
    for row, (name, shape, pattern) in zip(plan.rows, cells, strict=True):
        if len(name) > first:  # a name is never cut: it is what --skip and --only take
            lines.append(name)
            name = ""
        lines.append(f"{name:<{first}}  {shape:<{middle}}  {pattern}".rstrip())
        if row.reason:
            lines += _wrapped(f"stays dense: {row.reason}", width, indent=2)
    lines += ["", *summary(plan, width=width)]
    return "\n".join(lines)


def summary(plan: Plan, *, width: int = WIDTH) -> list[str]:
    """The totals in one or two lines."""
    count = totals(plan)
    share = 100 * count["prunable"] / count["parameters"] if count["parameters"] else 0.0
    blocks = f"{len(plan.blocks)} blocks" if len(plan.blocks) != 1 else "1 block"
    said = (
        f"{count['pruned']} weights in {blocks} get pruned, {count['dense']} stay dense: "
        f"{_millions(count['prunable'])} of {_millions(count['parameters'])} weight entries ({share:.1f} %) "
        f"are under the pattern."
    )
    return _wrapped(said, width)


def output(count: int) -> str:
    """About the bytes of the output: every pattern is stored dense, so pruning changes no size."""
    said = (
        f"The folder will hold {size(count)} of weights: zeros are stored, so a pruned file is as large as a dense one."
    )
    return "\n".join(_wrapped(said, WIDTH))


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape))


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _wrapped(said: str, width: int, indent: int = 0) -> list[str]:
    import textwrap

    space = " " * indent
    return textwrap.wrap(said, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip
