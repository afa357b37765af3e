"""Dropout on an existing model: inserted, or the rate of what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.noise import Clock, Noisy
from goodfit.phases import Build
from goodfit.surgery.insert import insert_after, insert_before, refuse_wrappers
from goodfit.surgery.trace import NORMS, Call, flow

__all__ = ["Dropout", "SeededDropout"]


@dataclass(frozen=True)
class Dropout(Build):
    """Dropout: in training each activation is zero with probability p, the others are scaled up.

    Formula: y = x · mask / (1 − p) with mask ~ Bernoulli(1 − p) in training; y = x in eval.
    Phase: Build. Where the model has dropout layers, their rate becomes p and nothing is inserted; else one is inserted
        after each activation that a later linear or convolution follows, never straight before a norm, never after the
        last layer. Shapes stay.
    Numbers: p, the probability of a zero, in [0, 1), off at 0 (for inserted layers).
    Errors: p outside [0, 1); a model without a place for it; a bare leaf, a DDP or compiled wrapper.
    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting. Inserted layers draw
        from (seed, layer, step) and not from torch's generator, so masks are the same after a resume.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> Dropout(0.5).build(model, torch.zeros(2, 4))[1]
    ReLU(
      (dropout): SeededDropout(p=0.5)
    )
    """

    p: float = hyper(0.2, valid="[0, 1)", off=0.0, low=0.0, high=0.8)

    def build(self, model: nn.Module, example: Any) -> nn.Module:
        refuse_wrappers(model, "Dropout")
        if not any(isinstance(m, _DropoutNd) for m in model.modules()):
            hosts = _places(flow(model, example))
            if not hosts:
                raise GoodfitError(
                    f"Dropout found no activation with a layer behind it in {type(model).__name__}: "
                    "put nn.Dropout where you want it, Dropout(p) then sets its rate."
                )
            for name, (host, insert) in hosts.items():
                insert(host, "dropout", SeededDropout(f"{name}.dropout"))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, _DropoutNd):
                layer.p = self.p


def _places(calls: list[Call]) -> dict[str, tuple[nn.Module, Callable[[nn.Module, str, nn.Module], None]]]:
    """Hosts by name: an activation module; for an activation that is a function, the layer that runs next."""
    places: dict[str, tuple[nn.Module, Callable[[nn.Module, str, nn.Module], None]]] = {}
    following = [next((c for c in calls[i:] if c.kind == "kernel"), None) for i in range(1, len(calls) + 1)]
    open_ended = {id(c.module) for c, later in zip(calls, following, strict=True) if later is None}
    for call, later in zip(calls, following, strict=True):
        if call.kind != "activation" or later is None or later.module is None:
            continue
        if call.feeds and isinstance(call.feeds[0].module, NORMS):
            continue
        if call.module is not None and id(call.module) not in open_ended:
            places[call.name] = (call.module, insert_after)
        else:
            places[later.name] = (later.module, insert_before)
    return places


class SeededDropout(Noisy, nn.Dropout):
    """Element dropout whose masks are a pure function of (seed, layer, step, call).

    The rate and the seed are non-persistent buffers, so the model's `state_dict` does not change; they stay on the CPU in
    full precision wherever the model goes, since they are read as scalars.
    """

    rate: Tensor

    def __init__(self, name: str = "dropout", p: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        self.register_buffer("rate", torch.tensor(p, dtype=torch.float64), persistent=False)
        self.register_buffer("seed", torch.tensor(0), persistent=False)
        self.bind(name, 0, Clock())

    @property
    def p(self) -> float:
        return float(self.rate)

    @p.setter
    def p(self, value: float) -> None:
        self.rate.fill_(value)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = self.draw(x.shape, x.device) >= self.rate
        return torch.where(keep, x * (1 / (1 - self.rate)).to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeededDropout:
        return self
