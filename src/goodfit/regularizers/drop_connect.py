"""DropConnect: dropout of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.phases import Build, Regularizer
from goodfit.surgery.connect import mask_weight, reader
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.records import records, remember
from goodfit.where import Where, kernels

__all__ = ["DropConnect"]


@dataclass(frozen=True)
class DropConnect(Build):
    """DropConnect, or weight drop: in training each weight is zero with probability p, the others are scaled up.

    Formula: w · mask / (1 − p) with mask ~ Bernoulli(1 − p) in training, one mask per forward pass of the model, for all rows,
        time steps and uses; w in eval. The gradient comes to w through the mask.
    Phase: Build. A layer hangs at the module that reads the weight and masks it while that module runs; parameters stay the
        optimizer's, and state_dict keys stay. where picks weights: all kernels, or for the weight drop of Merity et al.
        named("*.weight_hh_l*") of nn.LSTM, nn.GRU and nn.RNN. Shapes of tensors stay.
    Numbers: p, the probability of a zero, in [0, 1), off at 0.
    Errors: p outside [0, 1); no weight that where picks; a weight that is parametrized, or that several modules read (tied, or
        used from outside); lazy layers; a bare leaf, a DDP or compiled wrapper; at training, a module that runs several times
        under activation checkpointing outside a pass of the whole model, and one that reads the weight in code that it
        checkpoints within itself, which runs again in backward with whole weights: checkpoint modules as a whole.
    Source: Wan et al. 2013, Regularization of neural networks using DropConnect; Merity et al. 2017, Regularizing and
        optimizing LSTM language models, arXiv 1708.02182. Masks come from (seed, layer, step) and not from torch's generator.

    >>> from goodfit.where import named
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> DropConnect(0.5, where=named("2.*") & kernels).build(model, torch.zeros(2, 4))[2].drop_weight
    SeededDropConnect(p=0.5, weight='weight')
    """

    p: float = hyper(0.2, valid="[0, 1)", off=0.0, low=0.0, high=0.8)
    where: Where = kernels

    def __post_init__(self) -> None:
        Regularizer.__post_init__(self)  # where picks weights, not places

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "DropConnect")
        chosen = self.where.select(model)
        if not chosen:
            shown = ", ".join(name for name, _ in list(model.named_parameters())[:8])
            raise GoodfitError(f"DropConnect matched no weights (where={self.where}); the model has: {shown or 'none'}.")
        found = reader(model, example, chosen)
        names = [mask_weight(model, path, weight) for path, weight in found.values()]
        remember(model, self._key, dict.fromkeys(names, 1.0))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        p = self.at(0).p
        for name, share in records(model).get(self._key, {}).items():
            layer: Any = model.get_submodule(name)
            layer.p = p * share

    @property
    def _key(self) -> str:
        return f"DropConnect(where={self.where!r})"
