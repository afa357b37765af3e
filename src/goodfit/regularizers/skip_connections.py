"""Skip connections around the layers of a plain network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hyper import hyper
from goodfit.phases import Build
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.residuals import residuals
from goodfit.surgery.skips import connect, plain_blocks, skips
from goodfit.surgery.trace import flow

__all__ = ["SkipConnections"]


@dataclass(frozen=True)
class SkipConnections(Build):
    """Skip connections: a plain perceptron or convolutional network becomes a residual one.

    Formula: y = act(x + f(x)), where f is what was there between x and the activation: with layers=2, layer, norm, activation,
        layer, norm. In train mode and in eval mode.
    Phase: Build, true structure without weights; state_dict keys stay. Blocks are found in the order of the forward run: so
        many linear or convolution layers in a row, each on the very output of the one before, whose input and output have one
        shape; never from the model's input, never around its last layer, never at a gate. The sum stands behind the norm of the
        last layer and before its activation; a BatchNorm of the cocktail comes into the branch, before or behind
        SkipConnections. Each sum has a module, `skip.branch`, that hands the branch over: DropPath, ShakeDrop and ShakeShake
        find it.
    Numbers: layers, linear or convolution layers of a branch, an integer >= 1; with 1 the paper saw no gain. No off value.
    Errors: layers < 1; a model without such a block, or that adds residually already; a bare leaf, a DDP or compiled wrapper;
        at training, a checkpoint that begins or ends within a block. A model that has been built before keeps its skip
        connections, with a warning if others were asked for.
    Source: He et al. 2016, Deep residual learning for image recognition, arXiv 1512.03385.

    >>> layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    >>> model = SkipConnections().build(nn.Sequential(*layers, nn.Linear(8, 1)), torch.zeros(2, 8))
    >>> model[5]
    ReLU(
      (skip): Skip(
        layers=2
        (branch): Branch()
      )
    )
    """

    layers: int = hyper(2, valid="[1, inf)", low=1, high=4, fixed=True)

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "SkipConnections")
        there = skips(model)
        if there:  # a model that is trained further
            other = next((m.layers for m in there.values() if m.layers != self.layers), self.layers)
            if other != self.layers:
                warnings.warn(
                    f"SkipConnections leaves those that it put in before as they are, around {other} layers and not "
                    f"{self.layers}: build a fresh model.",
                    GoodfitWarning,
                    stacklevel=2,
                )
            return model
        kind = type(model).__name__
        if residuals(model, example):
            raise GoodfitError(f"SkipConnections are for plain networks, but {kind} adds x + f(x) already; leave them out.")
        calls = flow(model, example)
        blocks = plain_blocks(calls, self.layers)
        if not blocks:
            fewer = next((n for n in range(self.layers - 1, 0, -1) if plain_blocks(calls, n)), None)
            raise GoodfitError(
                f"SkipConnections found no {self.layers} linear or convolution layers in a row in {kind} whose input and "
                "output have one shape, with a layer before them and an activation behind them; "
                + (f"say layers={fewer}." if fewer else "leave them out of the cocktail.")
            )
        for block in blocks:
            connect(block, self.layers)
        return model
