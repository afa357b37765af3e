"""Dropout on an existing model: inserted, or the rate of what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededDropout
from goodfit.phases import Build
from goodfit.surgery.insert import insert_after, insert_before, refuse_wrappers
from goodfit.surgery.trace import Call, flow

__all__ = ["Dropout"]

Insert = Callable[[nn.Module, str, nn.Module], None]


@dataclass(frozen=True)
class Dropout(Build):
    """Dropout: in training each activation is zero with probability p, the others are scaled up.

    Formula: y = x · mask / (1 − p) with mask ~ Bernoulli(1 − p) in training; y = x in eval.
    Phase: Build. Where the model has dropout layers, their rate becomes p and nothing is inserted; else one is inserted
        after each activation whose output comes to a later linear or convolution (for an activation that is a function or
        gates something: before that layer), never on the way to a norm, never after the last layer. Shapes stay.
    Numbers: p, the probability of a zero, in [0, 1), off at 0: then nothing is inserted, and the model's
        own dropout layers keep their rates.
    Errors: p outside [0, 1); a model without a place for it, or one that drops by functions; a bare leaf, a DDP or
        compiled wrapper.
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
            for name, (host, insert) in _places(flow(model, example), type(model).__name__).items():
                child = "inserted_dropout" if hasattr(host, "dropout") else "dropout"  # an LSTM has a number of that name
                insert(host, child, SeededDropout(f"{name}.{child}"))
        self.tune(model)
        return model

    def tune(self, model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, _DropoutNd):
                layer.p = self.p


def _places(calls: list[Call], kind: str) -> dict[str, tuple[nn.Module, Insert]]:
    """Hosts by name: an activation module; for an activation that is a function or a gate, the layers that it reaches."""
    if any(c.kind == "dropout" for c in calls):
        raise GoodfitError(
            f"Dropout finds that {kind} drops by a function such as F.dropout, whose rate cannot be set from outside: "
            "use nn.Dropout layers there, Dropout(p) then sets their rate."
        )
    activations = [c for c in calls if c.kind == "activation"]
    usable = [c for c in activations if c.reached("kernel") and not c.reached("norm")]
    unfit = {id(c.module) for c in activations if c not in usable or c.gate}
    hosted = [c for c in usable if c.module is not None and id(c.module) not in unfit]
    places: dict[str, tuple[nn.Module, Insert]] = {c.name: (c.module, insert_after) for c in hosted if c.module is not None}
    covered = {id(k.module) for c in hosted for k in c.reached("kernel")}
    reached = [k for c in usable if c not in hosted for k in c.reached("kernel")]
    covered |= {id(c.module) for c in calls if c.kind == "kernel" and c not in reached}
    for layer in reached:
        attends = isinstance(layer.module, nn.MultiheadAttention)  # its query alone would be dropped
        if layer.module is not None and id(layer.module) not in covered and isinstance(layer.source, Tensor) and not attends:
            places[layer.name] = (layer.module, insert_before)
    if not places:
        raise GoodfitError(
            f"Dropout found no activation with a layer behind it in {kind}: "
            "put nn.Dropout where you want it, Dropout(p) then sets its rate."
        )
    return places
