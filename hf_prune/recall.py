"""A unit runs once per stage, and up to its first layer as it ran before: what its modules returned is recalled.

A module that has returned before the first layer of a stage is reached has only finished weights behind it, so that it
returns the same in all later stages, to the bit.  Not recalled are calls that do more than return: that write into
their arguments or set attributes of their module.  A tensor that was written into afterwards is known by its version
counter, and made again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .junction import Additions
from .sites import _tensors

Key = tuple[nn.Module, int]  # a module, and which of its calls in one forward
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass
class Call:
    """What one call of a module returned."""

    out: Any
    versions: list[int]  # of its tensors, when they were returned
    additions: int  # of the residual stream's tape, on the way
    inside: Counter[nn.Module]  # the calls of other modules on the way

    @property
    def intact(self) -> bool:
        return self.versions == _versions(self.out)


def held(calls: dict[Key, Call]) -> int:
    """Bytes of the tensors that are kept."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for c in calls.values() for t in _tensors(c.out)}
    return sum(s.nbytes() for s in storages.values())


class Recall:
    """Within a `with`, the modules below `unit` return what `calls` has of them, and enter what they return in it
    while `open`.  additions: the tape that counts additions meanwhile."""

    def __init__(self, unit: nn.Module, calls: dict[Key, Call], additions: Additions | None = None) -> None:
        self.calls, self.additions = calls, additions
        self.modules = [m for m in unit.modules() if m is not unit and _plain(m)]
        self.open = False
        self.seen: Counter[nn.Module] = Counter()  # calls of each module so far
        self.returned: list[Key] = []  # calls that ended, in their order
        self.impure = 0

    def __enter__(self) -> Recall:
        for module in self.modules:
            module.forward = self._around(module, module.forward)
        return self

    def __exit__(self, *error: Any) -> None:
        for module in self.modules:
            del module.forward

    def _around(self, module: nn.Module, real: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = module, self.seen[module]
            self.seen[module] += 1
            known = self.calls.get(key)
            if known is not None and known.intact:
                self.seen += known.inside
                if self.additions is not None:
                    self.additions.count += known.additions
                self.returned.append(key)
                return tree_map(lambda leaf: leaf, known.out)  # containers anew: what follows may change them
            self.calls.pop(key, None)
            if not self.open:
                return real(*args, **kwargs)
            given, own = tree_leaves((args, kwargs)), _own(module)
            before, impure = (_versions(given), _versions(own)), self.impure
            seen, added, first = self.seen.copy(), self._added(), len(self.returned)
            out = real(*args, **kwargs)
            known_kinds = all(torch.is_tensor(t) or isinstance(t, PLAIN) for t in (*given, *tree_leaves(out)))
            if not (known_kinds and _same(_own(module), own) and _versions(own) == before[1]):
                self.impure += 1  # and so are the calls around it
            wrote = _versions(tree_leaves((args, kwargs))) != before[0]  # for a call around it, perhaps its own tensor
            if self.open and self.impure == impure and not wrote and not any(t.requires_grad for t in _tensors(out)):
                for inner in self.returned[first:]:
                    self.calls.pop(inner, None)
                self.calls[key] = Call(out, _versions(out), self._added() - added, self.seen - seen)
                self.returned.append(key)
            return out

        return forward

    def _added(self) -> int:
        return self.additions.count if self.additions is not None else 0


def _plain(module: nn.Module) -> bool:
    """Whether its forward can be replaced: it is Python, and nobody else has done so."""
    return "forward" not in vars(module) and not isinstance(module, torch.jit.ScriptModule)


def _versions(tree: Any) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in _tensors(tree)]


def _own(module: nn.Module) -> dict[str, Any]:
    """Its attributes and buffers."""
    return vars(module) | module._buffers


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(v is b[k] for k, v in a.items())
