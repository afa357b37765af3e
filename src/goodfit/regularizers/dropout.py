"""Dropout on an existing model: inserted, or the rate of what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededDropout, SeededLayer
from goodfit.regularizers.insertion import Insertion
from goodfit.surgery.places import Place
from goodfit.surgery.trace import DROPPERS, Call
from goodfit.where import Where, everything

__all__ = ["Dropout"]


@dataclass(frozen=True)
class Dropout(Insertion):
    """Dropout: in training each activation is zero with probability p, the others are scaled up.

    Formula: y = x · mask / (1 − p) with mask ~ Bernoulli(1 − p) in training; y = x in eval.
    Phase: Build. Where the model drops by itself, in layers of any kind or by functions such as F.dropout, these get the rate
        p and nothing is inserted; else one is inserted after each activation whose output comes to a later linear or
        convolution (for an activation that is a function or gates something: before that layer), never after the last
        layer, and never on the way to a norm unless before_norm=True, which warns. The number inside a recurrent layer of
        several layers becomes p in either case. where picks by name, of the activation, of the layer that takes it, or of the
        dropout that is there: named("encoder.*"). shape spreads the rates over these in the order of the forward run: "brick"
        (all p), "funnel" (from p down), "long_funnel" (p, then down), "triangle" (up to p), "diamond" (up and down),
        "hexagon" (up, p, down), "stairs" (down every second). Shapes of tensors stay. Inserted layers are the model's from then
        on: a later run without Dropout leaves them there and at their rates. To be rid of them, make the model anew and load
        the old state_dict, whose keys are the same.
    Numbers: p, the largest probability of a zero, in [0, 1), off at 0: then nothing is inserted, and the model's
        own dropout layers keep their rates.
    Errors: p outside [0, 1); an unknown shape; a model without a place for it, or none that where picks; a bare leaf, a DDP
        or compiled wrapper.
    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting. Inserted layers draw
        from (seed, layer, step) and not from torch's generator, so masks are the same after a resume.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> Dropout(0.5).build(model, torch.zeros(2, 4))[1]
    ReLU(
      (dropout): SeededDropout(p=0.5)
    )
    """

    made: ClassVar[type[SeededLayer]] = SeededDropout
    adjusts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Dropout, _DropoutNd, nn.RNNBase)
    functions: ClassVar[frozenset[str]] = frozenset(DROPPERS)

    p: float = hyper(0.2, valid="[0, 1)", off=0.0, low=0.0, high=0.8)
    where: Where = everything
    shape: str = "brick"
    before_norm: bool = False

    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer:
        return SeededDropout()
