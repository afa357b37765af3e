"""Dropout of K members by integers: a word that all share, times the factor of each, is compared with the threshold of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.chain.passes import Part, Pass, Piece
from goodfit.layers.dropout import SeededDropout
from goodfit.layers.path import SeededDropPath
from goodfit.noise import factors

__all__ = ["Drop"]

_LOW = -(2**31)


@dataclass(frozen=True)
class _Draw:
    """One draw for all members.

    words have their highest bit flipped: signed numbers then have the order of unsigned ones, also times an odd factor.
    """

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

    whole_rows: a row is kept or dropped with all its features. folded: the piece before has multiplied by 1 / (1 − p). A NaN or
    inf that is dropped becomes 0.
    """

    def __init__(self, layer: SeededDropout | SeededDropPath, name: str) -> None:
        self.layer, self.rate, self.seed = layer, f"{name}.rate", f"{name}.seed"
        self.whole_rows = isinstance(layer, SeededDropPath)
        self.folded = False
        self._limits, self._factors = _Known(_limits), _Known(_factors)

    def features(self, x: Tensor) -> int:
        """Of the mask."""
        return 1 if self.whole_rows else x.shape[-2]

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
            words = self.layer.shared_words(torch.Size((whole.rows, self.features(x))), x.device)
        limits = self._limits.of(whole.buffers[self.rate], x)
        if limits is None:
            return None
        multiples = self._factors.of(whole.buffers[self.seed], x)
        return _Draw(words.mT.contiguous().bitwise_xor_(_LOW), multiples, *limits)

    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        draw = self.draw(part.whole, x)
        if draw is None:
            return x, free
        mask = draw.mask(part, part.room((self, "mask"), (part.members, self.features(x), x.shape[-1]), x, torch.int32))
        part.kept[self] = mask, x.ndim == 2
        y = x if free and x.ndim == 3 else part.room(self, (part.members, *x.shape[-2:]), x)
        self.apply(part, draw, x, mask, y)
        return y, True

    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        draw = part.whole.once[self]
        if draw is None or not wanted:
            return g, free
        mask, shared = part.kept[self]
        out = g if free else torch.empty_like(g)
        self.apply(part, draw, g, mask, out)
        return (out.sum(0) if shared else out), True

    def apply(self, part: Part, draw: _Draw, x: Tensor, mask: Tensor, out: Tensor) -> None:
        """Where a product of bits is to be had, it is cheaper than to make numbers of the mask."""
        if x.dtype == torch.float32:
            torch.mul(x.view(torch.int32), mask, out=out.view(torch.int32))
        else:
            torch.mul(x, mask, out=out)
        if not self.folded:
            out.mul_(draw.scale[part.span])


class _Known:
    """What was made of the numbers of a tensor, until they change."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self.make = make
        self.numbers: Tensor | None = None
        self.like: tuple[Any, ...] = ()
        self.made: Any = None

    def of(self, numbers: Tensor, x: Tensor) -> Any:
        like = (x.dtype, x.device)
        if self.numbers is None or self.like != like or not torch.equal(self.numbers, numbers):
            self.numbers, self.like, self.made = numbers.clone(), like, self.make(numbers, x)
        return self.made


def _factors(seeds: Tensor, x: Tensor) -> Tensor:
    return factors(seeds).view(-1, 1, 1).to(x.device)


def _limits(rates: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Below which word each member drops, and by what it scales. Rates are compared as float32, as in the layer."""
    if not bool((rates > 0).any()):
        return None
    rates = rates.view(-1, 1, 1).to(x.device)
    least = (rates.float().double() * 2**24).ceil() * 2**8 + _LOW
    return least.clamp(max=2**31 - 1).to(torch.int32), (1 / (1 - rates)).to(x.dtype)
