"""On which axis of a module's output the rows of a batch lie."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import tensors_in
from goodfit.surgery.proof import along, mapped
from goodfit.surgery.running import call_model, quiet

__all__ = ["row_axes"]

_NEAR = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


def row_axes(model: nn.Module, example: Any, hosts: dict[str, nn.Module]) -> dict[str, int]:
    """The axis of the rows in the first output of each host; those that do not show it are left out.

    The first row is repeated, once more than there are rows. Where that makes an axis of an output longer by one, and all
    along it equal to its first entry of before, this axis holds the rows: along a series or the tokens of a text no entry
    stays what it was. Rows are sought on the first axis of the example, then on the second.
    """
    before = _outputs(model, example, hosts)
    shapes = [t.shape for t in tensors_in(example)]
    for axis in (0, 1):
        size = next((shape[axis] for shape in shapes if len(shape) > axis), 0)
        repeated = mapped(example, partial(along, axis=axis, size=size, index=[0] * (size + 1)))
        after: dict[str, list[Tensor]] = {}
        with suppress(Exception):  # the model may not take so many
            after = _outputs(model, repeated, hosts)
        told = {name: _axis(before[name], after.get(name, []), size) for name in hosts}
        found = {name: axis for name, axis in told.items() if axis is not None}
        if found:
            return found
    return {}


def _outputs(model: nn.Module, example: Any, hosts: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def note(module: nn.Module, args: Any, output: Any, name: str) -> None:
        seen[name].append(next(iter(tensors_in(output))).clone())  # what follows may change it in place

    with quiet(model), ExitStack() as hooks:
        for name, host in hosts.items():
            hooks.callback(host.register_forward_hook(partial(note, name=name)).remove)
        call_model(model, example)
    return seen


def _axis(before: list[Tensor], after: list[Tensor], size: int) -> int | None:
    found = {_longer(a, b, size) for a, b in zip(before, after, strict=False)}
    return found.pop() if len(found) == 1 and len(before) == len(after) else None


def _longer(before: Tensor, after: Tensor, size: int) -> int | None:
    if before.ndim != after.ndim:
        return None
    other = [axis for axis, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if a != b]
    if len(other) != 1 or (before.shape[other[0]], after.shape[other[0]]) != (size, size + 1):
        return None
    first, rows = before.select(other[0], 0), after.movedim(other[0], 0)
    near = _NEAR.get(before.dtype, 1e-3) * float(first.abs().max()) if first.numel() else 0.0
    return other[0] if bool(((rows - first).abs() <= near).all()) else None
