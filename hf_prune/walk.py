"""Blocks of any architecture, and how activations travel from one to the next.

No code here knows an architecture.  Blocks are the repeated composite modules; their order comes from one recorded
forward.  From block to block the cheapest form of replay is used that reproduced the recorded forward to the bit:

* chain   the next block's input is the previous block's output (and tensors both were handed);
* lean    the model's own forward runs with earlier modules replaced by stubs that return zeros, and stops at the block:
          all modules that are done by then, or, where something later does look back at one, blocks alone;
* splice  the same with stubs of blocks that return the outputs they had;
* prefix  the whole model up to the block runs again: the last resort, its cost grows with the square of the depth.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .sites import Found, Site, Stop, feed, quiet
from .streams import Spilled, Store, load


@dataclass
class Unit:
    """A block, or a single layer that lies in none.  Runs once per forward."""

    name: str
    module: nn.Module
    sites: list[Site] = field(default_factory=list)

    @property
    def stages(self) -> list[list[Site]]:
        """Sites in execution order; those that read the same input stand together, since none waits for another."""
        stages: dict[int, list[Site]] = {}
        for s in self.sites:
            stages.setdefault(s.source, []).append(s)
        return list(stages.values())


def _members(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated children of a list-like container; [] where `module` is none."""
    children = [(n, c) for n, c in module.named_children() if next(c.parameters(), None) is not None]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return children
    composite = [c for _, c in children if next(c.children(), None) is not None]
    alike = len(children) >= 2 and len(composite) == len(children) and len({type(c) for c in composite}) == 1
    return children if alike else []


def block_names(model: nn.Module, sites: list[Site], once: set[str]) -> list[str]:
    """Names of the blocks: members of list-like containers that hold at least two sites and are no stage of blocks.

    once: the modules that ran exactly once in a forward; only such a module can be replayed.
    """

    def under(name: str) -> int:
        return sum(1 for s in sites if s.parameter.startswith(name + ".")) if name else len(sites)

    def inner(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Every candidate block directly or indirectly below, not descending into candidates."""
        out = []
        members = _members(module)
        for n, child in module.named_children():
            full = f"{name}.{n}" if name else n
            member = any(child is c for _, c in members) and type(child) is not nn.Sequential
            if member and under(full) >= 2 and full in once:
                out.append((full, child))
            else:
                out += inner(full, child)
        return out

    def resolve(name: str, module: nn.Module) -> list[str]:
        below = inner(name, module)
        kinds = [type(c) for _, c in below]
        repeated = len(below) >= 2 or len(set(kinds)) < len(kinds)
        if repeated and sum(under(n) for n, _ in below) * 2 >= under(name):
            return [b for n, c in below for b in resolve(n, c)]
        return [name]

    return [b for n, c in inner("", model) for b in resolve(n, c)]


def units(model: nn.Module, found: Found, wanted: list[Site], batch: Any) -> tuple[list[Unit], dict[str, str]]:
    """Units that hold a wanted site, in execution order; and {parameter: reason} for sites no unit can replay."""
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    running: list[str] = []
    around: dict[str, list[str]] = {}  # a module and those that were running when it was called

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            around[name] = list(running)
            running.append(name)

        return hook

    def ended(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    hooks = [m.register_forward_pre_hook(seen(n)) for n, m in modules.items()]
    hooks += [m.register_forward_hook(ended) for m in modules.values()]
    with _hooks(*hooks), quiet(model), torch.no_grad():
        feed(model, batch)
    once = {n for n, count in calls.items() if count == 1 and n}
    blocks = block_names(model, found.sites, once)
    home = [
        next((b for b in blocks if s.parameter.startswith(b + ".")), None) or _called(s.module, calls) for s in wanted
    ]
    # a module may stand outside the block that calls it, which was handed it
    home = [h if h in blocks else next((b for b in around.get(h, []) if b in blocks), h) for h in home]
    order = [n for n in calls if n in set(home)]  # dicts keep the order of the first call
    # a unit cannot hold another: where a module with blocks in it also owns a weight, the blocks go first
    outer = {n for n in order if any(m.startswith(n + ".") for m in order)}
    reasons = {}
    made = {n: Unit(n, modules[n]) for n in order if n in once and n not in outer}
    for s, name in zip(wanted, home, strict=True):
        if name in made:
            made[name].sites.append(s)
        elif name in outer:
            reasons[s.name] = f"its module {name} holds whole blocks"
        elif calls.get(name, 0) > 1:
            reasons[s.name] = f"its module {name} runs {calls[name]} times per forward"
        else:
            reasons[s.name] = f"its module {s.module or '(the model itself)'} is never called as a module"
    result = [u for u in made.values() if u.sites]
    for i, u in enumerate(result):
        for s in u.sites:
            s.unit = i
    return result, reasons


def shared(model: nn.Module, units: list[Unit]) -> set[str]:
    """Names of the units' weights and biases that something outside their unit uses too, because they are tied."""
    names: dict[int, list[str]] = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(n)
    return {
        own
        for unit in units
        for s in unit.sites
        for own in (s.parameter, s.bias)
        if own and any(not n.startswith(unit.name + ".") for n in names[id(model.get_parameter(own))])
    }


def _called(name: str, calls: dict[str, int]) -> str:
    """The module of that name, or the nearest around it that is called: attention may not call its out_proj."""
    while name and name not in calls:
        name = name.rpartition(".")[0]
    return name


PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, nn.Module)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """`change` every tensor.  A tensor handed over twice stays one, because `key is value` selects another path in
    nn.MultiheadAttention; objects a forward may write into, such as key-value caches, are copied."""
    made: dict[int, Any] = {}

    def one(leaf: Any) -> Any:
        if id(leaf) not in made:
            if torch.is_tensor(leaf) or isinstance(leaf, Spilled):
                made[id(leaf)] = change(leaf)
            else:
                made[id(leaf)] = leaf if isinstance(leaf, PLAIN) or callable(leaf) else copy.deepcopy(leaf)
        return made[id(leaf)]

    return tree_map(one, tree)


def _clone(tree: Any) -> Any:
    return _map(lambda t: t.detach().clone(), tree)


def _copy(tree: Any) -> Any:
    return _map(lambda t: t.clone(), tree)


def _same(a: Any, b: Any) -> bool:
    la, sa = tree_flatten(a)
    lb, sb = tree_flatten(b)
    if sa != sb:
        return False
    for x, y in zip(la, lb, strict=True):
        if torch.is_tensor(x) != torch.is_tensor(y) or (torch.is_tensor(x) and not torch.equal(x, y)):
            return False
    return True


class Reached(Stop):
    """Carries what a hook saw when it ended the forward."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Averages(TorchFunctionMode):
    """Remembers what was averaged over positions and what came of it: a classifier's features, before and after."""

    TAKE: frozenset[Any] = frozenset({
        torch.mean, Tensor.mean, nn.functional.adaptive_avg_pool1d, nn.functional.adaptive_avg_pool2d,
        nn.functional.adaptive_avg_pool3d, nn.functional.avg_pool1d, nn.functional.avg_pool2d, torch.avg_pool1d,
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.TAKE and args and torch.is_tensor(args[0]) and args[0].dim() > 2:
            self.seen.append((args[0], out))
        return out

    def positions(self, call: Any) -> Tensor | None:
        """(images, positions, features) whose average is the call's only tensor, (images, features); else None."""
        given = [t for t in tree_leaves(call) if torch.is_tensor(t)]
        if len(given) != 1 or given[0].dim() != 2:
            return None
        x = given[0]
        for t, out in reversed(self.seen):
            if out.numel() == x.numel() and t.numel() > x.numel() and torch.equal(out.reshape(x.shape), x):
                for rows in (t.flatten(2).transpose(1, 2), t.flatten(1, -2)):
                    if rows.shape[::2] == x.shape and torch.allclose(rows.mean(1), x, rtol=1e-3, atol=1e-4):
                        return rows.detach()
        return None


@contextlib.contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for h in handles:
            h.remove()


class Walk:
    """Runs one unit at a time.  `batch`: a small batch on which every form of replay is checked before it is used.

    store: where activations wait between units; by default in host memory, however much there are.
    """

    def __init__(self, model: nn.Module, units: list[Unit], batch: Any, store: Store | None = None) -> None:
        self.model, self.units, self.store = model, units, store or Store()
        self.device = next(model.parameters()).device
        self.specs: dict[tuple, dict[str, Any]] = {}
        self.ended: list[list[str]] = []
        self.links: list[dict[str, Any]] = []
        self.behind = False  # the forward that runs has not come back to where it was taken up
        with quiet(model), torch.no_grad():
            with Averages() as averages:
                inputs, outputs = self._record(batch)
            self.mode = "chain"
            self._check(batch, inputs, outputs)
            self.averaged = [averages.positions(call) is not None for _, call in inputs]

    @property
    def keeps(self) -> bool:
        """Whether activations within a unit may be kept rather than made again: on a CPU without a budget of memory."""
        return self.device.type == "cpu" and self.store.budget is None

    @classmethod
    def unchecked(cls, model: nn.Module, units: list[Unit]) -> Walk:
        """Units that are run by themselves, on arguments recorded from a forward; nothing is carried on to the next."""
        way = cls.__new__(cls)
        way.model, way.units, way.store = model, units, Store()
        way.device = next(model.parameters()).device
        way.specs, way.ended, way.links, way.behind, way.mode = {}, [], [], False, "chain"
        way.averaged = [False] * len(units)
        return way

    # -- choosing the form

    def _record(self, batch: Any) -> tuple[list[Any], list[Any]]:
        """Inputs and outputs of every unit in one forward: the live objects, and clones of their values."""
        inputs: list[Any] = [None] * len(self.units)
        outputs: list[Any] = [None] * len(self.units)

        def before(i: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                inputs[i] = ((args, kwargs), _clone((args, kwargs)))

            return hook

        def after(i: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                outputs[i] = (out, _clone(out))

            return hook

        handles = [u.module.register_forward_pre_hook(before(i), with_kwargs=True) for i, u in enumerate(self.units)]
        handles += [u.module.register_forward_hook(after(i), with_kwargs=True) for i, u in enumerate(self.units)]
        with _hooks(*handles):
            self._specify(batch)
        return inputs, outputs

    def _specify(self, batch: Any) -> None:
        """The form of what every module returns for batches like this one, and which have ended before each unit."""
        found: dict[str, list[Any]] = {}  # of a module, what each of its calls returned
        began: list[list[str]] = [[] for _ in self.units]
        at = {u.name: i for i, u in enumerate(self.units)}

        def before(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                began[at[name]] = list(found)

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                found.setdefault(name, []).append(tree_map(lambda t: _Spec(t) if torch.is_tensor(t) else t, out))

            return hook

        named = [(n, m) for n, m in self.model.named_modules() if n]
        handles = [m.register_forward_hook(after(n)) for n, m in named]
        handles += [u.module.register_forward_pre_hook(before(u.name)) for u in self.units]
        with _hooks(*handles):
            feed(self.model, batch)
        once = {n: outs[0] for n, outs in found.items() if len(outs) == 1 and _plain(outs[0])}
        self.specs[_signature(batch)] = once | {u.name: found[u.name][0] for u in self.units if u.name in found}
        ended = [set(once).intersection(names) for names in began]
        self.ended = [[n for n in names if not any(m in names for m in _around(n))] for names in ended]

    def _check(self, batch: Any, inputs: list[Any], outputs: list[Any]) -> None:
        for i, unit in enumerate(self.units):
            args, kwargs = _clone(inputs[i][1])
            if not _same(unit.module(*args, **kwargs), outputs[i][1]):
                self.mode = "prefix"  # the block depends on more than its arguments
                return
        history = [o[1] for o in outputs]
        for i in range(len(self.units) - 1):
            link = self._chain(inputs[i], outputs[i], inputs[i + 1])
            if link is not None:
                self.links.append(link)
                continue
            units = [u.name for u in self.units[:i]]
            beside = [n for n in self.ended[i] if n != self.units[i].name]
            for form, stubs in (("lean", beside), ("lean", units), ("splice", units)):
                link = {"form": form, "stubs": stubs}
                if _same(self._glue(batch, i, history[: i + 1], link), inputs[i + 1][1]):
                    self.links.append(link)
                    break
            else:
                self.mode = "prefix"
                return
        forms = {link["form"] for link in self.links}
        self.mode = next((f for f in ("splice", "lean") if f in forms), "chain")

    @staticmethod
    def _chain(now: Any, out: Any, following: Any) -> dict[str, Any] | None:
        """Where each leaf of the next unit's arguments comes from, if all come from this unit's output or arguments."""
        outs, ins = tree_leaves(out[0]), tree_leaves(now[0])
        outs_then, ins_then = tree_leaves(out[1]), tree_leaves(now[1])
        leaves, spec = tree_flatten(following[0])
        values = tree_leaves(following[1])
        plan: list[tuple[str, Any]] = []
        if (len(outs), len(ins), len(leaves)) != (len(outs_then), len(ins_then), len(values)):
            return None  # a container among the arguments grew on the way
        for leaf, value in zip(leaves, values, strict=True):
            if not torch.is_tensor(leaf):
                if not isinstance(leaf, PLAIN) and not callable(leaf):
                    return None  # it may carry what earlier units left in it
                plan.append(("value", leaf))
                continue
            found = next((("out", j) for j, t in enumerate(outs) if t is leaf or _alias(t, leaf)), None)
            found = found or next((("in", j) for j, t in enumerate(ins) if t is leaf or _alias(t, leaf)), None)
            if found is None:
                return None
            kind, j = found
            if not torch.equal((outs_then if kind == "out" else ins_then)[j], value):
                return None  # changed in place on the way
            plan.append(found)
        if not any(kind == "out" for kind, _ in plan):
            return None
        return {"form": "chain", "plan": plan, "spec": spec}

    # -- running

    def enter(self, batches: Iterable[Any]) -> list[dict[str, Any]]:
        """Stream at the first unit: one entry per batch, in host memory."""
        entries = []
        with quiet(self.model), torch.no_grad():
            for batch in batches:
                entry: dict[str, Any] = {}
                if self.mode != "chain":
                    entry["batch"] = self._keep(batch)
                if self.mode == "splice":
                    entry["outputs"] = []
                if self.mode != "prefix":
                    entry |= self._arrived(0, functools.partial(self._reach, self._place(batch), 0, {}))
                entries.append(entry)
        return entries

    def _arrived(self, i: int, run: Callable[[], Any]) -> dict[str, Any]:
        """What an entry holds at unit i: its arguments, which `run` returns, and what they are an average over."""
        if not self.averaged[i]:
            return {"call": self._keep(run())}
        with Averages() as averages:
            call = run()
        return {"call": self._keep(call), "positions": self._keep(averages.positions(call))}

    def call(self, i: int, entry: dict[str, Any]) -> Any:
        """Unit i's output for one entry.  Differentiable with respect to the unit's weights."""
        if self.mode == "prefix":
            def done(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                raise Reached(out)

            with _hooks(self.units[i].module.register_forward_hook(done, with_kwargs=True)):
                try:
                    feed(self.model, self._place(entry["batch"]))
                except Reached as reached:
                    return reached.value
            raise AssertionError(f"{self.units[i].name} was not reached")
        args, kwargs = self._place(entry["call"])
        return self.units[i].module(*args, **kwargs)

    def through(self, i: int, last: int, entry: dict[str, Any]) -> Any:
        """Unit `last`'s output when unit i runs on its entry and the units between follow.  Differentiable."""
        if i == last:
            return self.call(i, entry)
        if self.mode == "prefix":
            return self.call(last, entry)
        out = self.call(i, entry)
        args = self._place(entry["call"])
        history = self._place(entry.get("outputs", [None] * i)[:i])
        for j in range(i, last):
            link = self.links[j]
            history = [*history, out]
            if link["form"] != "chain":
                return self._glue(self._place(entry["batch"]), j, history, link, last)
            args = self._chained(link, out, args)
            out = self.units[j + 1].module(*args[0], **args[1])
        return out

    @staticmethod
    def _chained(link: dict[str, Any], out: Any, call: Any) -> Any:
        outs, ins = tree_leaves(out), tree_leaves(call)
        leaves = [v if kind == "value" else (outs if kind == "out" else ins)[v] for kind, v in link["plan"]]
        return tree_unflatten(leaves, link["spec"])

    def advance(self, i: int, entry: dict[str, Any], out: Any = None) -> dict[str, Any]:
        """The entry for unit i + 1 from unit i's entry, through unit i with its present weights.

        out: what the unit made of the entry, where that is known.
        """
        if self.mode == "prefix" or i + 1 >= len(self.units):
            return dict(entry)  # another object: what it leads to depends on the weights it is run with
        with quiet(self.model), torch.no_grad():
            out = self.call(i, entry) if out is None else out
            link = self.links[i]
            following = {k: v for k, v in entry.items() if k in ("batch", "outputs")}
            if self.mode == "splice":
                following["outputs"] = [*entry["outputs"], self._keep(out)]
            if link["form"] == "chain":
                following["call"] = self._chained(link, self._keep(out), entry["call"])
            else:
                history = [*self._place(entry.get("outputs", [None] * i)[:i]), out]
                following |= self._arrived(i + 1, lambda: self._glue(self._place(entry["batch"]), i, history, link))
        return following

    def _glue(self, batch: Any, i: int, history: list[Any], link: dict[str, Any], last: int | None = None) -> Any:
        """The model's own forward while unit i returns its entry of `history`, and stubs before it theirs, or zeros.

        Returns what unit i + 1 is called with, or with `last` that unit's output.
        """
        if link["form"] == "lean" and _signature(batch) not in self.specs:
            self._specify(batch)
        specs = self.specs.get(_signature(batch), {})
        outs = {u.name: out for u, out in zip(self.units, history, strict=False)}

        def zeros(name: str) -> Any:
            return tree_map(lambda t: t.zeros(self.device) if isinstance(t, _Spec) else t, specs[name])

        def held(name: str) -> Any:  # a clone each time: what follows may write into it
            return _copy(outs[name])

        make = zeros if link["form"] == "lean" else held
        stubs = {name: functools.partial(make, name) for name in link["stubs"]}
        own = self.units[i].name
        return self._reach(batch, i + 1, {**stubs, own: functools.partial(held, own)}, last)

    def _reach(self, batch: Any, i: int, stubs: dict[str, Callable[[], Any]], last: int | None = None) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise Reached((args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            raise Reached(out)

        def stub(name: str) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.behind = self.behind and name != self.units[i - 1].name
                return stubs[name]()

            return forward

        self.behind = bool(stubs)
        replaced = [(m, m.__dict__.get("forward")) for m in map(self.model.get_submodule, stubs)]
        for name, (module, _) in zip(stubs, replaced, strict=True):
            module.forward = stub(name)
        if last is None:
            hook = self.units[i].module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = self.units[last].module.register_forward_hook(after, with_kwargs=True)
        try:
            with _hooks(hook):
                feed(self.model, batch)
        except Reached as reached:
            return reached.value
        finally:
            self.behind = False
            for module, own in replaced:
                del module.forward
                if own is not None:
                    module.forward = own
        raise AssertionError("the forward ended before the unit was reached")

    def _keep(self, tree: Any) -> Any:
        return self.store.keep(_map(lambda t: t.detach().to("cpu", copy=True), tree))

    def _place(self, tree: Any) -> Any:
        # a copy even where the device is the host: a block may write into its arguments
        return _map(lambda t: load(t).to(self.device, copy=torch.is_tensor(t)).detach(), tree)


class _Spec:
    """A tensor's form without its values."""

    def __init__(self, t: Tensor) -> None:
        self.shape, self.dtype = t.shape, t.dtype

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def _plain(tree: Any) -> bool:
    """Whether an output says nothing but its tensors' forms: objects may carry values, such as a key-value cache."""
    return all(isinstance(leaf, (_Spec, *PLAIN)) for leaf in tree_leaves(tree))


def _around(name: str) -> list[str]:
    """Names of the modules around a module, the model itself left out."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _alias(a: Any, b: Tensor) -> bool:
    return bool(
        torch.is_tensor(a) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    )


def _signature(batch: Any) -> tuple:
    return tuple(tuple(t.shape) for t in tree_leaves(batch) if torch.is_tensor(t))
