"""Stochastic depth in a model: the layers that it has, and the residual branches that have none, with their depth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.layers.path import SeededDropPath
from goodfit.surgery.ancestry import ancestry
from goodfit.surgery.residuals import residual_additions

__all__ = ["Branch", "branches", "rate_name"]

_NUMBERS = {"droppath": ("drop_prob", "p"), "stochasticdepth": ("p", "drop_prob")}


@dataclass(frozen=True)
class Branch:
    """A branch of a residual block. Where it has stochastic depth, `name` is that layer and `number` its attribute that holds
    the rate; else `name` is the module to put it behind, and `module` is None where there is none, for a `reason`."""

    name: str
    module: nn.Module | None
    depths: tuple[int, ...]  # the blocks in which it runs, from 1
    number: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        """The name by which a selector knows it."""
        return self.name.rpartition(".")[0] if isinstance(self.module, SeededDropPath) else self.name


def branches(model: nn.Module, example: Any) -> tuple[list[Branch], int]:
    """The branches in the order of one run in eval mode, and how many blocks there are; the model stays as it is."""
    run = ancestry(model, example)
    modules = dict(model.named_modules())
    there = {name: number for name, m in modules.items() if (number := rate_name(m)) and name in run.calls}
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for r in residual_additions(run):
        own = [name for name in r.straight if name in there]
        for name in own:
            times[name, ""].append(r.time)
        if not own and not r.inside & there.keys():
            times[r.branch if r.module else "", r.reason].append(r.time)
    for name in there:
        if (name, "") not in times:  # not straight before an addition
            times[name, ""] = run.calls[name]
    depth = {time: i for i, time in enumerate(sorted({t for several in times.values() for t in several}), 1)}
    found = [
        Branch(name, modules[name] if name else None, tuple(depth[t] for t in several), there.get(name, ""), reason)
        for (name, reason), several in times.items()
    ]
    return sorted(found, key=lambda b: b.depths), len(depth)


def rate_name(module: nn.Module) -> str:
    """The attribute in which a module that drops paths has its rate, "" for any other module; known by its class name."""
    if isinstance(module, SeededDropPath):
        return "p"
    kind = type(module).__name__.lower()
    names = [name for part, able in _NUMBERS.items() if part in kind for name in able if _is_rate(getattr(module, name, ""))]
    return names[0] if names else ""


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
