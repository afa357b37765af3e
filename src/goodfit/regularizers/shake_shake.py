"""Shake-Shake: two branches in place of one, mixed anew for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError, listed
from goodfit.layers.path import SeededShake
from goodfit.phases import Build
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.rows import row_axes
from goodfit.surgery.skips import skips
from goodfit.surgery.twins import double
from goodfit.where import Where, everything

__all__ = ["ShakeShake"]


@dataclass(frozen=True)
class ShakeShake(Build):
    """Shake-Shake: each skip connection gets a second branch, and each row another mixture of the two.

    Formula: y = x + α · f(x) + (1 − α) · g(x), with one α ~ U(0, 1) per row in the forward pass of training and another one in
        backward; α = 1/2 in eval.
    Phase: Build, true structure. The branches are those that SkipConnections made, so write it before. g is a copy of f whose
        linear and convolution layers start anew, as torch draws them, by the seed of the run; norms start as those of f do, and
        what drops in f drops in g. The weights of g are new parameters at `skip.twin` and new keys of the state_dict; old
        keys stay. Make the optimizer after it. where picks branches by name: named("3.skip.branch"). Batch norms within f and
        g see no noise of their own block. Those behind the sum do, so that in training they meet another variance than in eval:
        gf.recalibrate sets their statistics.
    Numbers: none, and no off value. The paper's Shake-Shake-Image: noise by rows, in both directions.
    Errors: a model without SkipConnections; no branch that where picks; a branch with a function or a parametrized layer in it;
        rows that no axis of the branch shows; a bare leaf, a DDP or compiled wrapper. Branches that are doubled already stay.
    Source: Gastaldi 2017, Shake-Shake regularization, arXiv 1705.07485.

    >>> from goodfit.regularizers.skip_connections import SkipConnections
    >>> layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    >>> model = SkipConnections().build(nn.Sequential(*layers, nn.Linear(8, 1)), torch.zeros(2, 8))
    >>> ShakeShake().build(model, torch.zeros(2, 8))[5].skip.twin
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
      (1): ReLU()
      (2): Linear(in_features=8, out_features=8, bias=True)
    )
    """

    where: Where = everything

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "ShakeShake")
        kind, there = type(model).__name__, skips(model)
        if not there:
            raise GoodfitError(
                f"ShakeShake doubles the branches of SkipConnections, and {kind} has none: write SkipConnections() before it."
            )
        places = {name: f"{name}.branch" for name in there}
        chosen = {name: m for name, m in there.items() if self.where.holds(places[name], "place")}
        if not chosen:
            raise GoodfitError(f"ShakeShake matched no branch (where={self.where}); {kind} has: {listed(places.values())}.")
        single: dict[str, nn.Module] = {name: m.branch for name, m in chosen.items() if not m.doubled}
        axes = row_axes(model, example, single)
        for name in single:
            if name not in axes:
                raise GoodfitError(
                    f"ShakeShake cannot tell the rows of {places[name]} in {kind}: no axis of its output follows the number of "
                    "rows alone, or two do; give an example of numbers that differ, with the batch first, or second."
                )
        double(model, example, {name: SeededShake(f"{name}.shake", axes[name]) for name in single})
        return model
