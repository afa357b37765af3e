"""Shake-Drop: the branch of a residual block is shaken, block by block the likelier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.hyper import hyper
from goodfit.layers.path import SeededShakeDrop
from goodfit.regularizers.branching import Branching
from goodfit.where import Where, everything

__all__ = ["ShakeDrop"]


@dataclass(frozen=True)
class ShakeDrop(Branching):
    """Shake-Drop: in training the branch of a residual block is, with probability p, shrunk or turned over at random.

    Formula: y = x + (b + α − b · α) · f(x) with b ~ Bernoulli(1 − p_l) and α ~ U(−1, 1) in the forward pass of training, each
        one per row; in backward β ~ U(0, 1) stands in the place of α. y = x + (1 − p_l) · f(x) in eval, which is the mean. With
        linear, p_l = p · l / L for the l-th of L residual additions in the order of the forward run, as in the paper; else p.
    Phase: Build. A layer is inserted behind the module that hands over the branch f(x), found as for DropPath, those of
        SkipConnections included. where picks branches by the name of that module; l and L count all. Shapes of tensors and
        state_dict keys stay; but since eval has 1 − p_l in it, weights that were trained with it go into a model that was built
        with it and the same p. The paper asks for a branch that ends in a batch norm or a layer, not in an activation. Batch
        norms behind the sum meet another variance in training than in eval: gf.recalibrate sets their statistics.
    Numbers: p, the probability that the last block shakes a row, in [0, 1], off at 0; no schedule, since eval depends on it.
    Errors: p outside [0, 1]; a model without residual additions, or where no branch comes from a module or shows its rows;
        none that where picks; one that stochastic depth drops already; with linear, a module that runs in blocks apart; lazy
        layers; a bare leaf, a DDP or compiled wrapper. Branches where it cannot stand are left out, with a warning.
    Source: Yamada et al. 2018, ShakeDrop regularization for deep residual learning, arXiv 1802.02375.

    >>> from goodfit.regularizers.skip_connections import SkipConnections
    >>> layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    >>> model = SkipConnections().build(nn.Sequential(*layers, nn.Linear(8, 1)), torch.zeros(2, 8))
    >>> ShakeDrop(0.5).build(model, torch.zeros(2, 8))[5].skip.branch.shake_drop
    SeededShakeDrop(p=0.5)
    """

    made: ClassVar[type[SeededShakeDrop]] = SeededShakeDrop
    child: ClassVar[str] = "shake_drop"

    p: float = hyper(0.5, valid="[0, 1]", off=0.0, low=0.0, high=1.0, fixed=True)
    where: Where = everything
    linear: bool = True

    def knows(self, layer: nn.Module) -> bool:
        return isinstance(layer, SeededShakeDrop)
