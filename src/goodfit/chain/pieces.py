"""Linear layers and activations of K members."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goodfit.chain.activations import Function
from goodfit.chain.drop import Drop
from goodfit.chain.norm import Norm
from goodfit.chain.passes import Part, Piece

__all__ = ["Activation", "Linear"]


class Linear(Piece):
    """y = W x + b. norm: that which reads y alone; where it takes away the mean it is not given the bias."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        self.weight = f"{name}.weight"
        self.bias = None if layer.bias is None else f"{name}.bias"
        self.norm: Norm | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        weight = part.params[self.weight]
        members, outputs, _ = weight.shape
        y = part.room(self, (members, outputs, x.shape[-1]), x)
        centered = self.norm is not None and self.norm.by_batch
        bias = None if self.bias is None or centered else part.params[self.bias].unsqueeze(-1)
        part.kept[self] = x, centered
        if x.ndim == 3:
            torch.bmm(weight, x, out=y) if bias is None else torch.baddbmm(bias, weight, x, out=y)
        else:  # one product for all members
            weight, flat = weight.flatten(0, 1), y.flatten(0, 1)
            torch.mm(weight, x, out=flat) if bias is None else torch.addmm(bias.flatten(0, 1), weight, x, out=flat)
        return y, True

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        x, centered = part.kept[self]
        own = x.ndim == 3
        weight, product = part.params[self.weight], torch.bmm if own else torch.mm
        if not own:
            weight, g = weight.flatten(0, 1), g.flatten(0, 1)
        if (gradient := part.gradients.get(self.weight)) is not None:
            product(g, x.mT, out=gradient if own else gradient.flatten(0, 1))
        if self.bias is not None and (gradient := part.gradients.get(self.bias)) is not None:
            if centered:
                gradient.zero_()
            else:
                torch.sum(g, -1, out=gradient if own else gradient.flatten())
        return (product(weight.mT, g) if wanted else g), wanted


class Activation(Piece):
    """y = f(x). drop: a dropout behind an f whose zeros pass no gradient either, so that one look at y serves both."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.drop: Drop | None = None

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        y = x if free and self.function.by_output else part.room(self, tuple(x.shape), x)
        self.function.value(x, y)
        draw = self.drop.draw(part.whole, x) if self.drop else None
        if self.drop and draw:
            shape = tuple(x.shape)
            self.drop.apply(part, draw, y, draw.mask(part, part.whole.room(("mask", shape), shape, x, torch.int32)), y)
        part.kept[self] = y if self.function.by_output else x
        return y, not self.function.by_output

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        if not wanted:
            return g, free
        out = g if free else torch.empty_like(g)
        self.function.slope(g, part.kept[self], out)
        draw = part.whole.once[self.drop] if self.drop else None
        if self.drop and draw and not self.drop.folded:
            out.mul_(draw.scale[part.span])
        return out, True
