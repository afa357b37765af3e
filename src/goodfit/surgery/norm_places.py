"""Where a batch norm belongs in an existing model."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from goodfit.errors import GoodfitWarning
from goodfit.layers.skip import Branch
from goodfit.surgery.residuals import residuals
from goodfit.surgery.skips import skips
from goodfit.surgery.trace import Call, flow

__all__ = ["Place", "norm_places"]


class Place(NamedTuple):
    """A layer that a batch norm shall follow, its output, its channels on axis 1, and whether that is a residual branch."""

    host: nn.Module
    output: Tensor
    ends_branch: bool


def norm_places(model: nn.Module, example: Any, *, at_branch_ends: bool) -> list[Place]:
    """Layers whose every use goes straight into an activation, or through a shortcut of ours; if asked, also those whose every
    use ends a residual branch."""
    calls = flow(model, example)
    gating, uses = _gating(calls), dict[str, list[Call]]()
    for call in calls:
        if isinstance(call.module, nn.Linear | nn.Bilinear | _ConvNd):
            uses.setdefault(call.name, []).append(call)
    found = residuals(model, example) if at_branch_ends or skips(model) else []
    kept = [r for r in found if isinstance(r.module, Branch) or (at_branch_ends and r.module is not None)]
    ends = Counter(r.straight[0].removesuffix(".skip.branch") for r in kept)  # a shortcut may hang at the layer itself
    places = []
    for name, used in uses.items():
        module, shape = used[0].module, used[0].output.shape
        ends_branch = ends[name] == len(used) and not any(c.reached("norm") for c in used)
        activated = all(_reaches_activation(c) and c not in gating for c in used)
        if module is None or not (ends_branch or activated):
            continue
        rank = len(module.kernel_size) + 2 if isinstance(module, _ConvNd) else 2
        if any(c.output.ndim != rank for c in used):
            warnings.warn(
                f"BatchNorm leaves out {name}: its output of shape {tuple(shape)} is not a batch with channels on axis 1.",
                GoodfitWarning,
                stacklevel=4,
            )
        else:
            places.append(Place(module, used[0].output, ends_branch))
    return places


def _reaches_activation(call: Call) -> bool:
    """Whether the output goes straight into an activation that is not the last thing, and into no norm before or after."""
    activations = [c for c in call.feeds if c.kind == "activation"]
    normalized = any(c.kind == "norm" for a in activations for c in (*call.feeds, *a.feeds))
    return not normalized and any(a.goes_on() for a in activations)


def _gating(calls: list[Call]) -> set[Call]:
    """Calls that lead to nothing but the gate of a larger tensor, as in squeeze-excite: that gate must keep its scale."""
    found: set[Call] = set()
    for call in reversed(calls):
        behind = [c for c in call.reaches if c.kind != "dropout"]
        if call.scales or (behind and found.issuperset(behind)):
            found.add(call)
    return found
