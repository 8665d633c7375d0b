"""Weights that accelerate keeps elsewhere (cpu_offload, disk_offload, device_map), in reach while a model is pruned.

accelerate leaves empty tensors in the modules and loads the real ones before each forward of a module, so what is
written into them is lost.  Here the real ones are put in their place for the length of a `with`: those in host memory
as they are, those in accelerate's files through a shared memory map, so that a file is resident only as far as it is
touched and every edit is in it.  Known by what its hooks hold, without importing accelerate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that keep its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    every = getattr(hook, "hooks", [hook])
    return [h for h in every if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None]


def _source(weights: Any, name: str) -> tuple[Any, str]:
    """The innermost mapping, and the name there."""
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return weights, name


def _fetch(weights: Any, name: str) -> tuple[Tensor, bool]:
    """(tensor, whether an edit of it stays)."""
    weights, name = _source(weights, name)
    info = getattr(weights, "index", {}).get(name) if name not in getattr(weights, "state_dict", {}) else None
    if info is None:
        return weights[name], True
    if info.get("safetensors_file") is not None:
        return weights[name], False
    dtype = getattr(torch, info["dtype"])
    shape = torch.Size(info["shape"])
    file = Path(weights.save_folder) / f"{name}.dat"
    return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype).view(shape), True


@contextlib.contextmanager
def onloaded(model: nn.Module) -> Iterator[None]:
    """Every offloaded weight of `model` on the host; put back afterwards, edits included.  Nothing where none is.

    Raises ValueError where other weights lie on a device: the forward would mix the two.
    """
    replaced: list[tuple[dict, str, Any]] = []  # (parameters or buffers of a module, name, what was there)
    lent: list[tuple[Any, str, Tensor]] = []
    hooks: list[tuple[Any, Any]] = []
    known: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        for hook in _hooks(module):
            hooks.append((hook, hook.execution_device))
            scope = module.named_modules() if hook.place_submodules else [("", module)]
            for prefix, part in scope:
                for table in (part._parameters, part._buffers):
                    for name, old in list(table.items()):
                        if old is None or not old.is_meta:
                            continue
                        full = f"{prefix}.{name}" if prefix else name
                        value, stays = _fetch(hook.weights_map, full)
                        new: Any = value
                        if table is part._parameters:  # tied weights stay one
                            key = (value.data_ptr(), value.shape)
                            new = known.setdefault(key, nn.Parameter(value, requires_grad=old.requires_grad))
                        replaced.append((table, name, old))
                        table[name] = new
                        if not stays:
                            lent.append((*_source(hook.weights_map, full), value))
    if hooks:
        away = [n for n, p in model.named_parameters() if p.device.type not in ("cpu", "meta")]
        if away:
            for table, name, old in replaced:
                table[name] = old
            raise ValueError(
                f"{away[0]}: lies on a device while other weights are offloaded; load the model on the host alone "
                "(device_map='cpu'), or all of it on the device."
            )
    for hook, _ in hooks:
        hook.offload, hook.execution_device = False, torch.device("cpu")
    try:
        yield
    finally:
        for hook, device in hooks:
            hook.offload, hook.execution_device = True, device
        for table, name, old in replaced:
            table[name] = old
        for weights, name, value in lent:
            weights.state_dict[name] = value  # accelerate looks here before it opens the checkpoint
