"""On which axis of a module's output the rows of a batch lie."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.dataflow.flows import tensors_in
from goodfit.surgery.proof import along, answers, mapped
from goodfit.surgery.running import call_model, quiet

__all__ = ["row_axes"]

_NEAR = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


def row_axes(model: nn.Module, example: Any, hosts: dict[str, nn.Module]) -> dict[str, int]:
    """The axis of the rows in the first output of each host; those that do not show it are left out.

    The first entry along an axis of the example is repeated, once more than there are entries. Where that makes an axis of an
    output longer by one, and all along it equal to its first entry of before, this axis may hold the rows: along a series or
    the tokens of a text no entry stays what it was, where entries differ and act on each other. Rows are sought on the first
    axis of the example and on the second. Where they may be on both, the outputs of the model say it, which are moved as the
    rows are; then the other hosts.
    """
    example = _telling(model, example)
    before, fits = _outputs(model, example, hosts), defaultdict[str, dict[int, int]](dict)
    for axis in (0, 1):
        size = _size(example, axis)
        repeated, after = _taken(example, axis, [0] * (size + 1)), {}
        with suppress(Exception):  # the model may not take so many
            after = _outputs(model, repeated, hosts)
        for name in hosts:
            found = _axis(before[name], after.get(name, []), size)
            if found is not None:
                fits[name][axis] = found
    moving = {axis for axis in (0, 1) if _moves(model, example, axis)}
    sure = {axis for found in fits.values() if len(found) == 1 for axis in found}
    rows = moving if len(moving) == 1 else sure
    return {name: found[axis] for axis in rows for name, found in fits.items() if axis in found} if len(rows) == 1 else {}


def _size(example: Any, axis: int) -> int:
    return next((t.shape[axis] for t in tensors_in(example) if t.ndim > axis), 0)


def _taken(example: Any, axis: int, index: list[int]) -> Any:
    return mapped(example, partial(along, axis=axis, size=_size(example, axis), index=index))


def _telling(model: nn.Module, example: Any) -> Any:
    """The example with several entries on both axes, which differ, as far as the model takes them."""
    for axis in (0, 1):
        if _size(example, axis) == 1:
            example = _accepted(model, _taken(example, axis, [0, 0, 0]), example)
    return _accepted(model, mapped(example, partial(_differing, generator=torch.Generator().manual_seed(0))), example)


def _accepted(model: nn.Module, other: Any, example: Any) -> Any:
    try:
        answers(model, other)
    except Exception:
        return example
    return other


def _differing(t: Tensor, generator: torch.Generator) -> Tensor:
    """With noise where all is the same along an axis; of whole numbers, those that are all zero get some ones."""
    if not any(t.ndim > axis and bool((t == t.narrow(axis, 0, 1)).all()) for axis in (0, 1) if t.numel()):
        return t
    if t.is_floating_point() and bool(t.isfinite().all()):
        return t + (torch.rand(t.shape, generator=generator) * max(1.0, float(t.abs().max()))).to(t)
    whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    return torch.randint(2, t.shape, generator=generator).to(t) if whole and not bool(t.any()) else t


def _moves(model: nn.Module, example: Any, axis: int) -> bool:
    """Whether the outputs are moved along an axis as the example is along this one, and not changed otherwise."""
    size = _size(example, axis)
    if size < 2:
        return False
    moved = False
    for a, b in zip(answers(model, example), answers(model, _taken(example, axis, [*range(1, size), 0])), strict=True):
        axes = [i for i, length in enumerate(a.shape) if length == size] if a.is_floating_point() else []
        if not axes or _alike(a, b):
            continue
        if not any(_alike(a.roll(-1, i), b) for i in axes):
            return False
        moved = True
    return moved


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, as large as numbers are."""
    same = (a == b) | (a.isnan() & b.isnan())
    near = _NEAR.get(a.dtype, 1e-3) * (float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0)
    return bool((same | ((a - b).abs() <= near)).all())


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
    return other[0] if _alike(first.expand_as(rows), rows) else None
