"""Batch normalization put into an existing model."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.batchnorms.moments import Moments
from goodfit.batchnorms.resting import rest_bias
from goodfit.errors import GoodfitError, GoodfitWarning, nearest
from goodfit.hyper import hyper
from goodfit.layers.synchronized import synchronized
from goodfit.phases import Build
from goodfit.surgery.insert import has_inserted, insert_after, inserted_into, refuse_wrappers
from goodfit.surgery.norm_places import Place, norm_places
from goodfit.surgery.running import call_model, quiet

__all__ = ["BatchNorm"]

_BY_RANK: dict[int, type[_BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class BatchNorm(Build):
    """Batch normalization between each linear or convolution and its activation.

    Formula: y = γ · (x − mean) / √(var + eps) + β, with mean and variance of the batch in training and running ones in
        eval: running ← (1 − momentum) · running + momentum · batch.
    Phase: Build, true structure. The layer is torch's BatchNorm1d, 2d or 3d by the rank of what flows there: (N, C),
        (N, C, L), (N, C, H, W), (N, C, D, H, W). It is inserted where a layer's output goes straight into an activation,
        not where a norm stands before or behind that activation already, not in a squeeze-excite gate, not after the last
        layer.
    Numbers: momentum, share of the new batch, in [0, 1]; eps, variance units, > 0; gamma >= 0 and beta, where γ and β start;
        affine, whether they are learned; track_running_stats, else eval normalizes by its batch too. calibrate="identity"
        takes running statistics, γ and β from the example, of several rows, so that eval mode says what it said before.
        zero_residual also puts a norm at the end of each residual branch, with γ = 0 there. sync takes the batch's mean and
        variance over all processes that train together. No off value.
    Errors: numbers outside their range, and starts of γ that contradict each other; a model without a place for it; a bare
        leaf, a DDP or compiled wrapper. A linear layer on (N, L, C) has its features last and is left out, with a warning.
    Source: Ioffe and Szegedy 2015, Batch normalization, arXiv 1502.03167; zero_residual: Goyal et al. 2017, Accurate, large
        minibatch SGD, arXiv 1706.02677.

    The bias of a layer before a norm is redundant, since training subtracts it again: it keeps its value, so that weights load
    both ways, and is no longer trained (requires_grad). It trains again when `fold_batchnorm`, `freeze_batchnorm` or
    `convert_batchnorm` to "group" ends that; make the optimizer anew. A model that has norms of BatchNorm keeps them as they
    are, with a warning if it was asked for others.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> norm = BatchNorm(momentum=0.2).build(model, torch.zeros(2, 4))[0].batchnorm
    >>> norm.num_features, norm.momentum
    (8, 0.2)
    """

    momentum: float = hyper(0.1, valid="[0, 1]", low=0.01, high=0.5, log=True, fixed=True)
    eps: float = hyper(1e-5, valid="(0, inf)", low=1e-6, high=1e-2, log=True, fixed=True)
    affine: bool = True
    track_running_stats: bool = True
    gamma: float = hyper(1.0, valid="[0, inf)", low=0.1, high=2.0, log=True, fixed=True)
    beta: float = hyper(0.0, valid="(-inf, inf)", low=-1.0, high=1.0, fixed=True)
    calibrate: str = ""
    zero_residual: bool = False
    sync: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrate not in ("", "identity"):
            hint = nearest(str(self.calibrate), ["identity"])
            raise GoodfitError(f"BatchNorm.calibrate must be 'identity' or '', got calibrate={self.calibrate!r}; {hint}")
        starts = self.gamma != 1 or self.beta != 0 or self.zero_residual
        if not self.affine and (starts or self.calibrate):
            raise GoodfitError(f"{self} says how γ and β start, but affine=False leaves them out: say affine=True.")
        if self.calibrate and (starts or not self.track_running_stats):
            raise GoodfitError(
                f"{self} cannot keep the function of a model: calibrate='identity' chooses γ, β and statistics itself; leave "
                "gamma, beta, zero_residual and track_running_stats out."
            )

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "BatchNorm")
        if has_inserted(model, "batchnorm"):  # a model that is trained further
            self._warn_of_others(model)
            return model
        places = norm_places(model, example, at_branch_ends=self.zero_residual)
        kind = type(model).__name__
        if not places:
            raise GoodfitError(
                f"BatchNorm found no linear or convolution in {kind} whose output goes straight into an "
                "activation, with another layer behind it and no norm; leave BatchNorm out of the cocktail."
            )
        if self.zero_residual and not any(place.ends_branch for place in places):
            raise GoodfitError(f"BatchNorm found no residual branch in {kind} that ends in a layer: leave zero_residual out.")
        layers = [self._layer(place) for place in places]
        if self.calibrate:
            _calibrate(model, [place.host for place in places], layers, example)
        for place, layer in zip(places, layers, strict=True):
            insert_after(place.host, "batchnorm", layer)
            rest_bias(model, place.host)
        return model

    def _warn_of_others(self, model: nn.Module) -> None:
        """What was inserted before is not built again, and numbers that a norm has learned by are not changed under it."""
        norms = [m.get_submodule("batchnorm") for m in model.modules() if "batchnorm" in inserted_into(m)]
        for name in ("momentum", "eps", "affine", "track_running_stats"):
            asked = getattr(self, name)
            other = next((getattr(m, name) for m in norms if isinstance(m, _BatchNorm) and getattr(m, name) != asked), asked)
            if other != asked:
                warnings.warn(
                    f"BatchNorm leaves the norms that it put in before as they are, with {name}={other!r} and not {asked!r}: "
                    "set it there, or build a fresh model.",
                    GoodfitWarning,
                    stacklevel=3,
                )

    def _layer(self, place: Place) -> _BatchNorm:
        weight = next(place.host.parameters())
        kind = synchronized(weight.device) if self.sync else _BY_RANK[place.output.ndim]
        layer = kind(
            place.output.shape[1],
            eps=self.eps,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track_running_stats,
        )
        if self.affine:
            nn.init.constant_(layer.weight, 0.0 if self.zero_residual and place.ends_branch else self.gamma)
            nn.init.constant_(layer.bias, self.beta)
        return layer.to(device=weight.device, dtype=weight.dtype)


@torch.no_grad()
def _calibrate(model: nn.Module, hosts: list[nn.Module], layers: list[_BatchNorm], example: Any) -> None:
    """Statistics of what the hosts return for the example, and the γ and β that undo them."""
    found = [Moments(layer.running_mean) for layer in layers]  # type: ignore[arg-type]
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for host, moments in zip(hosts, found, strict=True):
            hook = host.register_forward_hook(
                lambda host, args, output, moments=moments: moments.see(output) and None,
                prepend=True,  # ahead of a skip connection that ends there
            )
            stack.callback(hook.remove)
        call_model(model, example)
    if any(moments.count < 2 for moments in found):
        raise GoodfitError(
            f"BatchNorm(calibrate='identity') takes variances from the example, got one value per channel in "
            f"{type(model).__name__}: the example must have several rows."
        )
    for layer, moments in zip(layers, found, strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(moments.mean)
        layer.running_var.copy_(moments.var)
        layer.weight.copy_((layer.running_var.double() + layer.eps).sqrt())
        layer.bias.copy_(layer.running_mean)
        if not all(bool(t.isfinite().all()) for t in (layer.running_mean, layer.running_var)):
            raise GoodfitError(
                f"BatchNorm cannot calibrate on what {type(model).__name__} makes of the example: NaN, inf or numbers "
                f"too large for {layer.weight.dtype}; give another example."
            )
