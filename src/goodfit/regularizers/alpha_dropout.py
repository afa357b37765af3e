"""Dropout that keeps the mean and the variance of self-normalizing networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.errors import listed
from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededAlphaDropout, SeededLayer
from goodfit.regularizers.insertion import Insertion
from goodfit.surgery.places import Place
from goodfit.surgery.trace import Call
from goodfit.where import Where, everything

__all__ = ["AlphaDropout"]


@dataclass(frozen=True)
class AlphaDropout(Insertion):
    """Alpha dropout: activations are set to SELU's lower end, and mean 0 and variance 1 stay.

    Formula: y = a · (x · mask + α' · (1 − mask)) + b with α' = −1.7581, a = ((1 − p)(1 + p α'²))^(−1/2), b = −a p α' in
        training; y = x in eval.
    Phase: Build. Where the model has nn.AlphaDropout or nn.FeatureAlphaDropout or calls their functions, these get the rate p;
        else layers are inserted at the places of Dropout, but for those where the model drops already. Behind another
        activation than SELU it warns. where, shape and before_norm as for Dropout. Shapes of tensors stay.
    Numbers: p, the largest probability of the lower end, in [0, 1), off at 0.
    Errors: p outside [0, 1); an unknown shape; a model without a place for it, or none that where picks; a bare leaf, a DDP
        or compiled wrapper.
    Source: Klambauer et al. 2017, Self-normalizing neural networks, arXiv 1706.02515.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.SELU(), nn.Linear(8, 1))
    >>> AlphaDropout(0.05).build(model, torch.zeros(2, 4))[1].alphadropout
    SeededAlphaDropout(p=0.05)
    """

    made: ClassVar[type[SeededLayer]] = SeededAlphaDropout
    adjusts: ClassVar[tuple[type[nn.Module], ...]] = (nn.AlphaDropout, nn.FeatureAlphaDropout)
    functions: ClassVar[frozenset[str]] = frozenset({"alpha_dropout", "feature_alpha_dropout"})

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything
    shape: str = "brick"
    before_norm: bool = False

    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer:
        return SeededAlphaDropout()

    def odd(self, chosen: list[Place]) -> list[str]:
        others = [f"{p.name} ({', '.join(sorted(p.functions))})" for p in chosen if p.functions != {"selu"}]
        text = "AlphaDropout keeps mean and variance behind SELU only, which does not stand at"
        return [f"{text} {listed(others)}: take Dropout there."] if others else []
