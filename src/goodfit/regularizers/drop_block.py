"""DropBlock: dropout of regions of feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.hyper import hyper
from goodfit.layers.dropblock import SeededDropBlock
from goodfit.layers.dropout import SeededLayer
from goodfit.regularizers.insertion import Insertion
from goodfit.surgery.places import Place, channel_axis
from goodfit.surgery.trace import Call
from goodfit.where import Where, everything

__all__ = ["DropBlock"]


@dataclass(frozen=True)
class DropBlock(Insertion):
    """DropBlock: square regions of each feature map are zero in training.

    Formula: y = x · mask · |mask| / Σ mask, where blocks of size^d start with probability γ at every corner that fits,
        γ = p / size^d · Π L / (L − size + 1) over the d lengths L of a map; y = x in eval.
    Phase: Build. Inserted at the places of Dropout where a batch of maps flows beside a convolution or a norm, (N, C, L),
        (N, C, H, W) or (N, C, D, H, W), but for those where the model drops already. where, shape and before_norm as for
        Dropout. Shapes of tensors stay.
    Numbers: p, about the share of zeros (blocks that overlap make it less), the largest, in [0, 1), off at 0; size, the side of
        a block in pixels, >= 1, cut to the map where the map is smaller.
    Errors: numbers outside their range; an unknown shape; a model without a place for it, or none that where picks; a bare
        leaf, a DDP or compiled wrapper.
    Source: Ghiasi, Lin and Le 2018, DropBlock, arXiv 1810.12890, with the scale over the whole batch as there. p usually
        grows from 0: DropBlock(linear(0, 0.1, epochs=...)).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    >>> DropBlock(0.1, 5).build(model, torch.zeros(2, 3, 9, 9))[1].dropblock
    SeededDropBlock(p=0.1, size=5)
    """

    made: ClassVar[type[SeededLayer]] = SeededDropBlock
    sought: ClassVar[str] = "activation of a batch of feature maps with a layer behind it"

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    size: int = hyper(7, valid="[1, inf)", low=1, high=15, unit="pixels", fixed=True)
    where: Where = everything
    shape: str = "brick"
    before_norm: bool = False

    def layer(self, model: nn.Module, place: Place, calls: list[Call]) -> SeededLayer | str | None:
        axis, rank = channel_axis(place, calls), place.value.ndim
        if isinstance(axis, str):
            return axis
        return SeededDropBlock(size=self.size, ndim=rank) if axis == 1 and rank in (3, 4, 5) else None
