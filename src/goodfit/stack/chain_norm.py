"""Batch normalization of K members."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from goodfit.stack.chain_drop import Drop
from goodfit.stack.chain_pass import Part, Piece

__all__ = ["Norm"]


class Norm(Piece):
    """y = γ · (x − mean) / √(var + eps) + β, each feature of each member by itself.

    bias: of the linear layer before, which has not added it. drop: what multiplies by 1 / (1 − p) further on, which γ and β do.
    """

    def __init__(self, layer: nn.BatchNorm1d, name: str) -> None:
        self.layer, self.name = layer, name
        self.affine = layer.affine
        self.bias: str | None = None
        self.drop: Drop | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.name}.weight", f"{self.name}.bias") if self.affine else ()

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{name}" for name, buffer in self.layer.named_buffers(recurse=False) if buffer is not None)

    @property
    def by_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.layer.training or self.layer.running_mean is None

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        shared = x.ndim == 2
        if shared:
            x, free = x.expand(part.members, *x.shape), False
        draw = self.drop.draw(part, x) if self.drop else None
        scale = None if draw is None else draw.scale[part.span]
        if self.by_batch:
            centered, inverse = self._by_batch(part, x, free)
        else:
            mean, var = (part.buffers[f"{self.name}.running_{what}"].unsqueeze(-1) for what in ("mean", "var"))
            centered = torch.sub(x, mean, out=x if free else part.room((self, "centered"), tuple(x.shape), x))
            inverse = (var + self.layer.eps).rsqrt_()
        factor = self._scaled(part, "weight", scale)
        y = torch.mul(centered, inverse if factor is None else inverse * factor, out=part.room(self, tuple(x.shape), x))
        if self.affine:
            y.add_(self._scaled(part, "bias", scale))
        part.kept[self] = centered, inverse, factor, scale, self.by_batch, shared
        return y, True

    def _by_batch(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, Tensor]:
        rows = x.shape[-1]
        if rows == 1 and self.layer.training:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {(1, x.shape[-2])}")
        mean = x.mean(-1, keepdim=True)
        centered = torch.sub(x, mean, out=x if free else part.room((self, "centered"), tuple(x.shape), x))
        var = torch.linalg.vector_norm(centered, 2, -1, keepdim=True).square_().div_(rows)
        if self.layer.training and self.layer.running_mean is not None:
            self._move(part, mean.squeeze(-1), var.squeeze(-1) * (rows / (rows - 1)))
        return centered, (var + self.layer.eps).rsqrt_()

    def _move(self, part: Part, mean: Tensor, var: Tensor) -> None:
        """The running statistics, by the unbiased variance and with the bias that was left out."""
        batches = part.buffers[f"{self.name}.num_batches_tracked"].add_(1)
        momentum = self.layer.momentum
        share = 1 / batches.view(-1, 1).to(mean.dtype) if momentum is None else momentum
        if self.bias is not None:
            mean = mean + part.params[self.bias].detach()
        part.buffers[f"{self.name}.running_mean"].lerp_(mean, share)
        part.buffers[f"{self.name}.running_var"].lerp_(var, share)

    def _scaled(self, part: Part, what: str, scale: Tensor | None) -> Tensor | None:
        """γ or β, times what dropout scales by; None for 1."""
        if not self.affine:
            return scale
        number = part.params[f"{self.name}.{what}"].unsqueeze(-1)
        return number if scale is None else number * scale

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        centered, inverse, factor, scale, by_batch, shared = part.kept[self]
        weight, bias = (part.gradients.get(f"{self.name}.{what}") for what in ("weight", "bias"))
        asked = [wanted, weight is not None, bias is not None]
        if by_batch:
            found = _group_norm_backward(g, centered, inverse, factor, asked)
        else:
            found = _fixed_backward(g, centered, inverse, factor, asked)
        for gradient, one in ((weight, found[1]), (bias, found[2])):
            if gradient is not None and one is not None:
                torch.mul(one.view(gradient.shape), 1 if scale is None else scale.squeeze(-1), out=gradient)
        if found[0] is None:
            return g, free
        return (found[0].sum(0) if shared else found[0]), True


def _group_norm_backward(
    g: Tensor, centered: Tensor, inverse: Tensor, factor: Tensor | None, asked: list[bool]
) -> tuple[Tensor | None, ...]:
    """Rows last, each feature of each member is a group of its own of one sample: torch's fastest kernel for such rows."""
    members, features, rows = g.shape
    groups = members * features
    flat = (1, groups, rows)
    factors = torch.ones_like(inverse) if factor is None else factor.expand(inverse.shape)
    x, weight, bias = torch.ops.aten.native_group_norm_backward(
        g.reshape(flat),
        centered.view(flat),
        torch.zeros_like(inverse).view(1, groups),
        inverse.view(1, groups),
        factors.reshape(groups),
        1,
        groups,
        rows,
        groups,
        asked,
    )
    return (x.view(g.shape) if asked[0] else None), weight, bias


def _fixed_backward(
    g: Tensor, centered: Tensor, inverse: Tensor, factor: Tensor | None, asked: list[bool]
) -> tuple[Tensor | None, ...]:
    return (
        g * (inverse if factor is None else inverse * factor) if asked[0] else None,
        (g * centered).sum(-1, keepdim=True).mul_(inverse) if asked[1] else None,
        g.sum(-1) if asked[2] else None,
    )
