"""Spectral norm: no weight matrix stretches what comes to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from goodfit.errors import GoodfitError, listed
from goodfit.hyper import hyper
from goodfit.layers.connect import SeededDropConnect
from goodfit.layers.spectral import SpectralNormed
from goodfit.phases import Build, Regularizer
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.refusals import refuse_lazy
from goodfit.surgery.running import evaluating
from goodfit.where import Where, kernels

__all__ = ["SpectralNorm"]


@dataclass(frozen=True)
class SpectralNorm(Build):
    """Spectral normalization: each weight is divided by its largest singular value.

    Formula: w / σ(w), with w as the matrix of output units by all else; σ = uᵀ w v, where u ← w v / ‖w v‖ and then
        v ← wᵀ u / ‖wᵀ u‖, so many times whenever the weight is read in train mode; in eval u and v rest.
    Phase: Build, true structure, by torch's parametrization. What is trained is w, whose name becomes
        parametrizations.weight.original (0.weight is 0.parametrizations.weight.original), and so do the keys of the
        state_dict, which torch's spectral_norm reads; u and v are buffers beside it. Weights of a plain model are loaded
        before building; torch.nn.utils.parametrize.remove_parametrizations gives a plain model back. where picks weights. What
        acts on kernels acts on w: since w / σ(w) does not change with the length of w, L2 and WeightDecay on it do not shrink
        the function, they keep w short and so raise the effective learning rate. L1 is refused there. A batch norm behind the
        layer undoes it. Activation checkpointing reads weights twice, and so iterates twice, as torch's does.
    Numbers: iterations, power iterations per reading in train mode, an integer >= 1; 15 at the start. No off value.
    Errors: iterations < 1; no weight that where picks; a weight of one axis, one that is zero, tied, inside a recurrent
        layer, parametrized otherwise or masked by DropConnect; lazy layers; a bare leaf, a DDP or compiled wrapper. What is
        normed already stays as it is. Such a model is saved by its state_dict, since torch pickles no parametrized modules.
    Source: Miyato et al. 2018, Spectral normalization for generative adversarial networks, arXiv 1802.05957.

    >>> from goodfit.where import named
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> model = SpectralNorm(where=named("0.*") & kernels).build(model, torch.zeros(2, 4))
    >>> [name for name, _ in model.named_parameters()]
    ['0.bias', '0.parametrizations.weight.original', '2.weight', '2.bias']
    """

    where: Where = kernels
    iterations: int = hyper(1, valid="[1, inf)", low=1, high=5, fixed=True)

    def __post_init__(self) -> None:
        Regularizer.__post_init__(self)  # where picks weights, not places

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "SpectralNorm")
        refuse_lazy(model, "SpectralNorm")
        chosen = self.where.select(model)
        if not chosen:
            shown = listed([name for name, _ in model.named_parameters()]) or "none"
            raise GoodfitError(f"SpectralNorm matched no weights (where={self.where}); the model has: {shown}.")
        paths = {name: name.rpartition(".")[::2] for name in chosen}
        new = {n: (model.get_submodule(path), local) for n, (path, local) in paths.items() if not _normed(model, path)}
        for name, (owner, local) in new.items():
            reason = _unfit(model, name, owner, local)
            if reason:
                raise GoodfitError(f"SpectralNorm cannot norm {name}, {reason}: leave it out of where.")
        for owner, local in new.values():
            self._norm(owner, local)
        return model

    def _norm(self, owner: nn.Module, local: str) -> None:
        weight = getattr(owner, local)
        dim = 1 if isinstance(owner, _ConvTransposeNd) else 0
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # where u and v start
            norm = SpectralNormed(weight.detach(), self.iterations, dim)
        with evaluating(owner):  # torch reads the weight, which in train mode would iterate
            register_parametrization(owner, local, norm)
        norm.train(owner.training)


@torch.no_grad()
def settle(model: nn.Module, iterations: int = 15) -> None:
    """Let the norms of weights that have changed at once, as averaged ones, find their largest singular values again."""
    for module in model.modules():
        for around in getattr(module, "parametrizations", {}).values() if is_parametrized(module) else ():
            for norm in (m for m in around if isinstance(m, _SpectralNorm)):
                norm._power_method(norm._reshape_weight_to_matrix(around.original), iterations)


def _normed(model: nn.Module, path: str) -> bool:
    around = model.get_submodule(path)
    return isinstance(around, ParametrizationList) and any(isinstance(m, _SpectralNorm) for m in around)


def _unfit(model: nn.Module, name: str, owner: nn.Module, local: str) -> str:
    """Why a weight cannot be normed; "" where it can."""
    weight = model.get_parameter(name)
    holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    masked = [m.weight for m in owner.children() if isinstance(m, SeededDropConnect)]
    hooked = any(type(h).__module__.startswith("torch.nn.utils") for h in owner._forward_pre_hooks.values())
    if isinstance(owner, ParametrizationList) or hooked:
        return "which is parametrized otherwise"
    if isinstance(owner, nn.RNNBase):
        return "which a recurrent layer reads past its name"
    if holders[id(weight)] > 1:
        return "which is tied to another"
    if weight.ndim < 2:
        return "which has one axis"
    if local in masked:
        return "which DropConnect masks"
    return "" if bool(weight.any()) else "which is zero"
