"""Dropout of whole channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.hyper import hyper
from goodfit.layers.dropout import SeededChannelDropout, SeededLayer
from goodfit.regularizers.insertion import Insertion
from goodfit.surgery.places import Place, channel_axis
from goodfit.surgery.trace import Call
from goodfit.where import Where, everything

__all__ = ["ChannelDropout"]


@dataclass(frozen=True)
class ChannelDropout(Insertion):
    """Dropout of whole channels: neighbours in a map or a series know one another too well to be dropped one by one.

    Formula: y = x · mask / (1 − p) with one Bernoulli(1 − p) per row and channel in training; y = x in eval.
    Phase: Build. Where the model has nn.Dropout1d, 2d or 3d or calls their functions, these get the rate p; else layers are
        inserted at the places of Dropout, but for those where the model drops already. The channels are on axis 1 beside
        convolutions and batch or group norms, (N, C, ...), and last beside linear and recurrent layers, (N, ..., C); in
        (N, C) each unit is one. A place where the layers around do not say it is left out, with a warning. where, shape and
        before_norm as for Dropout. Shapes of tensors stay.
    Numbers: p, the largest probability that a channel is zero, in [0, 1), off at 0.
    Errors: p outside [0, 1); an unknown shape; a model without a place for it, or none that where picks; a bare leaf, a DDP
        or compiled wrapper.
    Source: Tompson et al. 2015, Efficient object localization using convolutional networks, arXiv 1411.4280.

    >>> model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 1, 3))
    >>> ChannelDropout(0.5).build(model, torch.zeros(2, 4, 9))[1].channeldropout
    SeededChannelDropout(p=0.5, axis=1)
    """

    made: ClassVar[type[SeededLayer]] = SeededChannelDropout
    adjusts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    functions: ClassVar[frozenset[str]] = frozenset({"dropout1d", "dropout2d", "dropout3d", "feature_dropout"})

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything
    shape: str = "brick"
    before_norm: bool = False

    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer | str:
        axis = channel_axis(place, calls)
        if isinstance(axis, str):
            return axis
        times_first = any(getattr(m, "batch_first", True) is False for m in model.modules())
        if axis == -1 and place.value.ndim > 2 and times_first:
            return "the batch may be on axis 1, since the model has a layer with batch_first=False"
        return SeededChannelDropout(axis=axis, ndim=place.value.ndim if axis == 1 else None)
