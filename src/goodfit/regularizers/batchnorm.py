"""Batch normalization put into an existing model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hyper import hyper
from goodfit.phases import Build
from goodfit.surgery.insert import insert_after, refuse_wrappers
from goodfit.surgery.trace import Call, flow

__all__ = ["BatchNorm"]

_BY_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class BatchNorm(Build):
    """Batch normalization between each linear or convolution and its activation.

    Formula: y = γ · (x − mean) / √(var + eps) + β, with mean and variance of the batch in training and running ones in
        eval: running ← (1 − momentum) · running + momentum · batch.
    Phase: Build, true structure. The layer is torch's BatchNorm1d, 2d or 3d by the rank of what flows there: (N, C),
        (N, C, L), (N, C, H, W), (N, C, D, H, W). It is inserted where a layer's output goes straight into an activation.
    Numbers: momentum, share of the new batch, in [0, 1]; eps, variance units, > 0; affine, whether γ and β are learned;
        track_running_stats, else eval normalizes by its batch too. No off value: a norm is there or not.
    Errors: numbers outside their range; a model without a place for it; a bare leaf, a DDP or compiled wrapper. A linear
        layer on (N, L, C) has its features last and is left out, with a warning.
    Source: Ioffe and Szegedy 2015, Batch normalization, arXiv 1502.03167.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> norm = BatchNorm(momentum=0.2).build(model, torch.zeros(2, 4))[0].batchnorm
    >>> norm.num_features, norm.momentum
    (8, 0.2)
    """

    momentum: float = hyper(0.1, valid="[0, 1]", low=0.01, high=0.5, log=True, fixed=True)
    eps: float = hyper(1e-5, valid="(0, inf)", low=1e-6, high=1e-2, log=True, fixed=True)
    affine: bool = True
    track_running_stats: bool = True

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "BatchNorm")
        places = _places(flow(model, example))
        for call in places:
            assert call.module is not None
            insert_after(call.module, "batchnorm", self._layer(call))
        if not places:
            raise GoodfitError(
                f"BatchNorm found no linear or convolution in {type(model).__name__} whose output goes straight into an "
                "activation: it is normalized already, or has no such place; leave BatchNorm out of the cocktail."
            )
        return model

    def _layer(self, call: Call) -> nn.Module:
        weight = next(call.module.parameters()) if call.module is not None else call.output
        layer = _BY_RANK[call.output.ndim](
            call.output.shape[1],
            eps=self.eps,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
        )
        return layer.to(device=weight.device, dtype=weight.dtype)


def _places(calls: list[Call]) -> list[Call]:
    """One call per layer whose every use goes straight into an activation, with its channels on axis 1."""
    uses: dict[str, list[Call]] = {}
    for call in calls:
        if call.kind == "kernel":
            uses.setdefault(call.name, []).append(call)
    places = []
    for name, used in uses.items():
        if not all(_reaches_activation(c) for c in used):
            continue
        first = used[0]
        ranks = (2,) if isinstance(first.module, nn.Linear | nn.Bilinear) else tuple(_BY_RANK)
        if first.output.ndim not in ranks:
            warnings.warn(
                f"BatchNorm leaves out {name}: its output of shape {tuple(first.output.shape)} has no channels on axis 1.",
                GoodfitWarning,
                stacklevel=4,
            )
        else:
            places.append(first)
    return places


def _reaches_activation(call: Call) -> bool:
    behind = [c for c in call.feeds if c.kind != "dropout"]
    return bool(behind) and behind[0].kind == "activation"
