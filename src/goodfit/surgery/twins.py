"""Give a shortcut a second branch: which modules its branch is made of, and a copy of them with weights of its own."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from goodfit.errors import GoodfitError
from goodfit.layers.skip import Skip, SkipStart
from goodfit.noise import Noisy
from goodfit.surgery.insert import inserted_into, take_out
from goodfit.surgery.records import remember_copy
from goodfit.surgery.running import call_model, quiet

__all__ = ["double"]


def double(model: nn.Module, example: Any, shakes: dict[str, nn.Module]) -> None:
    """Give each of these shortcuts a twin of its branch, and the layer that makes one of both."""
    ran = _units(model, example)
    branches = {name: _branch(ran, name, model.get_submodule(name)) for name in shakes}
    twins = {name: nn.Sequential(*map(_fresh, units)) for name, units in branches.items()}
    for name, twin in twins.items():
        skip = model.get_submodule(name)
        skip.add_module("twin", twin)
        skip.add_module("shake", shakes[name])
        twin.training = shakes[name].training = skip.training
        for i, unit in enumerate(branches[name]):
            remember_copy(model, unit.name, f"{name}.twin.{i}")
        for path, layer in twin.named_modules(prefix=f"{name}.twin"):
            if isinstance(layer, Noisy):
                layer.name = path


@dataclass(frozen=True)
class _Unit:
    """One call of a module that has no modules of its own; those that were hung there count as part of it."""

    name: str
    module: nn.Module
    source: Any
    output: Any


def _units(model: nn.Module, example: Any) -> list[_Unit]:
    """The calls of one run in eval mode, in order."""
    ran: list[_Unit] = []
    within: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        within.append(next(iter((*args, *kwargs.values())), None))

    def leaving(name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            source = within.pop()
            if not within:
                ran.append(_Unit(name, module, source, output))

        return leave

    with quiet(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            own = {child for child, m in module.named_children() if not isinstance(m, Noisy)}
            if own <= inserted_into(module) | {"parametrizations"}:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leaving(name)).remove)
        call_model(model, example)
    return ran


def _branch(ran: list[_Unit], name: str, skip: nn.Module) -> list[_Unit]:
    """What a shortcut goes around, refused where something that is no module stands between."""
    assert isinstance(skip, Skip)
    held = [[m for m in unit.module.children() if isinstance(m, Skip | SkipStart)] for unit in ran]
    first = next(i for i, ms in enumerate(held) if any(isinstance(m, SkipStart) and m.carried is skip.carried for m in ms))
    last = next(i for i, ms in enumerate(held) if any(m is skip for m in ms))
    chain = ran[first : last + 1]
    if any(before.output is not behind.source for before, behind in pairwise(chain)):
        raise GoodfitError(
            f"ShakeShake copies branches of modules alone, but on the way to {name} a function acts: write it as a module, "
            "such as nn.ReLU()."
        )
    return chain if skip.after else chain[:-1]


def _fresh(unit: _Unit) -> nn.Module:
    """A copy with new weights, drawn as torch draws those of a new layer, and without the shortcut that hangs there."""
    twin = copy.deepcopy(unit.module)
    for child in [child for child, m in twin.named_children() if isinstance(m, Skip | SkipStart)]:
        take_out(twin, child)
    for layer in twin.modules():
        if is_parametrized(layer):
            raise GoodfitError(f"ShakeShake copies plain layers, but {unit.name} is parametrized: put that behind ShakeShake.")
        if isinstance(layer, nn.Linear | _ConvNd):
            layer.reset_parameters()
            layer.weight.requires_grad_()
    return twin
