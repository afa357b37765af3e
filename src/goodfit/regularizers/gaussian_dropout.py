"""Multiplicative Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededGaussianDropout, SeededLayer
from goodfit.regularizers.insertion import Insertion
from goodfit.surgery.places import Place
from goodfit.surgery.trace import Call
from goodfit.where import Where, everything

__all__ = ["GaussianDropout"]


@dataclass(frozen=True)
class GaussianDropout(Insertion):
    """Gaussian dropout: activations are multiplied by noise with the mean and the variance of dropout's, and none is zero.

    Formula: y = x · z with z ~ N(1, p / (1 − p)) in training; y = x in eval.
    Phase: Build. Inserted at the places of Dropout, but for those where the model drops already: torch has no layer of this
        kind to adjust. where, shape and before_norm as for Dropout. Shapes of tensors stay.
    Numbers: p, the largest probability of the dropout that it stands for, in [0, 1), off at 0.
    Errors: p outside [0, 1); an unknown shape; a model without a place for it, or none that where picks; a bare leaf, a DDP
        or compiled wrapper.
    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting, section 10.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> GaussianDropout(0.5).build(model, torch.zeros(2, 4))[1].gaussiandropout
    SeededGaussianDropout(p=0.5)
    """

    made: ClassVar[type[SeededLayer]] = SeededGaussianDropout

    p: float = hyper(0.2, valid="[0, 1)", off=0.0, low=0.0, high=0.8)
    where: Where = everything
    shape: str = "brick"
    before_norm: bool = False

    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer:
        return SeededGaussianDropout()
