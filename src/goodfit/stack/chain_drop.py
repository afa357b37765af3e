"""Dropout of K members by integers: a word that all share, times the factor of each, is compared with the threshold of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.layers.dropout import SeededDropout
from goodfit.noise import factors
from goodfit.stack.chain_pass import Part, Pass, Piece

__all__ = ["Drop"]

_LOW = -(2**31)


@dataclass(frozen=True)
class _Draw:
    """One draw for all members. words have their highest bit flipped: the order of signed numbers is that of unsigned ones then,
    also after a product with an odd factor."""

    words: Tensor
    factors: Tensor
    least: Tensor
    scale: Tensor

    def mask(self, part: Part, out: Tensor) -> Tensor:
        """1 where a number is kept, 0 where it is dropped."""
        torch.mul(self.words, self.factors[part.span], out=out)
        return out.ge_(self.least[part.span])


class Drop(Piece):
    """y = x · mask / (1 − p), with the mask that the layer draws for each member alone.

    folded: the piece before has multiplied by 1 / (1 − p). A NaN or inf that is dropped becomes 0.
    """

    def __init__(self, layer: SeededDropout, name: str) -> None:
        self.layer, self.rate, self.seed = layer, f"{name}.rate", f"{name}.seed"
        self.folded = False
        self._rates = _Known()
        self._seeds = _Known()

    def draw(self, whole: Pass, x: Tensor) -> _Draw | None:
        """Made once for all members; None where nothing is dropped."""
        if self not in whole.once:
            whole.once[self] = self._drawn(whole, x)
        found: _Draw | None = whole.once[self]
        return found

    def _drawn(self, whole: Pass, x: Tensor) -> _Draw | None:
        if not self.layer.training:
            return None
        with torch.set_grad_enabled(whole.keeps):  # a layer counts the draws that will have a backward
            words = self.layer.shared_words(torch.Size((whole.rows, x.shape[-2])), x.device)
        rates, seeds = whole.buffers[self.rate], whole.buffers[self.seed]
        known = self._rates.of(rates, lambda: _limits(rates, x))
        if known is None:
            return None
        multiples = self._seeds.of(seeds, lambda: factors(seeds).view(-1, 1, 1).to(x.device))
        return _Draw(words.mT.contiguous().bitwise_xor_(_LOW), multiples, *known)

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        draw = self.draw(part.whole, x)
        if draw is None:
            return x, free
        part.kept[self] = x.ndim == 2
        shape = (part.members, *x.shape[-2:])
        mask = draw.mask(part, part.room((self, "mask"), shape, x, torch.int32))
        y = x if free else part.room(self, shape, x)
        self.apply(part, draw, x, mask, y)
        return y, True

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        draw = part.whole.once[self]
        if draw is None or not wanted:
            return g, free
        out = g if free else torch.empty_like(g)
        self.apply(part, draw, g, part.room((self, "mask"), tuple(g.shape), g, torch.int32), out)
        return (out.sum(0) if part.kept[self] else out), True

    def apply(self, part: Part, draw: _Draw, x: Tensor, mask: Tensor, out: Tensor) -> None:
        """Where a product of bits is to be had, it is cheaper than to make numbers of the mask."""
        if x.dtype == torch.float32:
            torch.mul(x.view(torch.int32), mask, out=out.view(torch.int32))
        else:
            torch.mul(x, mask, out=out)
        if not self.folded:
            out.mul_(draw.scale[part.span])


class _Known:
    """What was made of a tensor, until the tensor changes."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.version = -1
        self.made: Any = None

    def of(self, source: Tensor, make: Any) -> Any:
        if self.source is not source or self.version != source._version:
            self.source, self.version, self.made = source, source._version, make()
        return self.made


def _limits(rates: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Below which word each member drops, and by what it scales. Rates are compared as float32, as in the layer."""
    if not bool((rates > 0).any()):
        return None
    rates = rates.view(-1, 1, 1).to(x.device)
    least = (rates.float().double() * 2**24).ceil() * 2**8 + _LOW
    return least.clamp(max=2**31 - 1).to(torch.int32), (1 / (1 - rates)).to(x.dtype)
