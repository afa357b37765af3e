"""Linear layers and activations of K members."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goodfit.stack.chain_activations import Function
from goodfit.stack.chain_drop import Drop
from goodfit.stack.chain_norm import Norm
from goodfit.stack.chain_pass import Part, Piece

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
        part.kept[self] = x, centered
        left, right, out = (weight, x, y) if x.ndim == 3 else (weight.flatten(0, 1), x, y.view(-1, x.shape[-1]))
        if self.bias is None or centered:
            torch.matmul(left, right, out=out)
        elif x.ndim == 3:
            torch.baddbmm(part.params[self.bias].unsqueeze(-1), left, right, out=out)
        else:
            torch.addmm(part.params[self.bias].view(-1, 1), left, right, out=out)
        return y, True

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        x, centered = part.kept[self]
        weight = part.params[self.weight]
        if x.ndim == 2:
            g, weight = g.reshape(-1, g.shape[-1]), weight.flatten(0, 1)
        if (gradient := part.gradients.get(self.weight)) is not None:
            torch.matmul(g, x.mT, out=gradient if x.ndim == 3 else gradient.view(weight.shape))
        if self.bias is not None and (gradient := part.gradients.get(self.bias)) is not None:
            if centered:
                gradient.zero_()
            else:
                torch.sum(g, -1, out=gradient if x.ndim == 3 else gradient.view(-1))
        return (torch.matmul(weight.mT, g) if wanted else g), wanted


class Activation(Piece):
    """y = f(x). drop: a dropout behind an f whose zeros pass no gradient either, so that one look at y serves both."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.drop: Drop | None = None

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        y = x if free and self.function.by_output else part.room(self, tuple(x.shape), x)
        self.function.value(x, y)
        draw = self.drop.draw(part, x) if self.drop else None
        if self.drop and draw:
            shape = tuple(x.shape)
            self.drop.apply(part, draw, y, draw.mask(part, part.scratch(("mask", shape), shape, x, torch.int32)), y)
        part.kept[self] = y if self.function.by_output else x
        return y, not self.function.by_output

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        if not wanted:
            return g, free
        out = g if free else torch.empty_like(g)
        self.function.slope(g, part.kept[self], out)
        draw = part.whole.draws[self.drop] if self.drop else None
        if self.drop and draw and not self.drop.folded:
            out.mul_(draw.scale[part.span])
        return out, True
