"""Batch normalization put into an existing model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.hyper import hyper
from goodfit.phases import Build
from goodfit.surgery.insert import has_inserted, insert_after, refuse_wrappers
from goodfit.surgery.trace import Call, flow

__all__ = ["BatchNorm"]

_BY_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class BatchNorm(Build):
    """Batch normalization between each linear or convolution and its activation.

    Formula: y = γ · (x − mean) / √(var + eps) + β, with mean and variance of the batch in training and running ones in
        eval: running ← (1 − momentum) · running + momentum · batch.
    Phase: Build, true structure. The layer is torch's BatchNorm1d, 2d or 3d by the rank of what flows there: (N, C),
        (N, C, L), (N, C, H, W), (N, C, D, H, W). It is inserted where a layer's output goes straight into an activation,
        not where a norm stands before or behind that activation already, not after the last layer.
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
        if has_inserted(model, "batchnorm"):  # a model that is trained further
            return model
        layers = [(host, self._layer(host, output)) for host, output in _places(flow(model, example))]
        if not layers:
            raise GoodfitError(
                f"BatchNorm found no linear or convolution in {type(model).__name__} whose output goes straight into an "
                "activation, with another layer behind it and no norm; leave BatchNorm out of the cocktail."
            )
        for host, layer in layers:
            insert_after(host, "batchnorm", layer)
        return model

    def _layer(self, host: nn.Module, output: Tensor) -> nn.Module:
        weight = next(host.parameters())
        layer = _BY_RANK[output.ndim](
            output.shape[1],
            eps=self.eps,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
        )
        return layer.to(device=weight.device, dtype=weight.dtype)


def _places(calls: list[Call]) -> list[tuple[nn.Module, Tensor]]:
    """Layers whose every use goes straight into an activation, with their output, its channels on axis 1."""
    uses: dict[str, list[Call]] = {}
    for call in calls:
        if isinstance(call.module, nn.Linear | nn.Bilinear | _ConvNd):
            uses.setdefault(call.name, []).append(call)
    places = []
    for name, used in uses.items():
        module, shape = used[0].module, used[0].output.shape
        if module is None or not all(_reaches_activation(c) for c in used):
            continue
        rank = len(module.kernel_size) + 2 if isinstance(module, _ConvNd) else 2
        if any(c.output.ndim != rank for c in used):
            warnings.warn(
                f"BatchNorm leaves out {name}: its output of shape {tuple(shape)} is not a batch with channels on axis 1.",
                GoodfitWarning,
                stacklevel=4,
            )
        else:
            places.append((module, used[0].output))
    return places


def _reaches_activation(call: Call) -> bool:
    """Whether the output goes straight into an activation that is not the last thing, and into no norm before or after."""
    activations = [c for c in call.feeds if c.kind == "activation"]
    normalized = any(c.kind == "norm" for a in activations for c in (*call.feeds, *a.feeds))
    return not normalized and any(_goes_on(a, set()) for a in activations)


def _goes_on(call: Call, seen: set[int]) -> bool:
    """Whether a kernel layer comes behind."""
    seen.add(id(call))
    return any(c.kind == "kernel" or (id(c) not in seen and _goes_on(c, seen)) for c in call.reaches)
