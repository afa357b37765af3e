"""One pass of K members through a chain: the numbers of each, what its backward needs, and where its gradients go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from goodfit.chain.memory import Memory

__all__ = ["Part", "Pass", "Piece", "Tensors"]

Tensors = Mapping[str, Tensor]


@dataclass
class Pass:
    """What all members have in common.

    keeps: whether a backward may follow. once: what each piece has made for all members together.
    """

    members: int
    rows: int
    params: Tensors
    buffers: Tensors
    memory: Memory
    keeps: bool
    once: dict[Any, Any] = field(default_factory=dict)

    def room(self, key: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for all members, kept until the backward."""
        return self.memory.take(key, shape, dtype or like.dtype, like.device)

    def parts(self, size: int) -> list[Part]:
        """All members, some at a time; where nothing is kept for a backward all but a short one use the same memory."""
        if size >= self.members:
            return [Part(self, 0, slice(0, self.members), self.params)]
        spans = [slice(start, min(start + size, self.members)) for start in range(0, self.members, size)]
        cut = {name: torch.split(t, size) for name, t in self.params.items()}
        return [
            Part(
                self, i if self.keeps else int(span.stop - span.start < size), span, {n: pieces[i] for n, pieces in cut.items()}
            )
            for i, span in enumerate(spans)
        ]


@dataclass
class Part:
    """Some members whose numbers fit into the cache together.

    What flows has the shape (members, features, rows), rows last: so a sum over the batch runs along memory, and what a feature
    is multiplied by is one number for many in a row. What members share has no first axis.
    """

    whole: Pass
    index: int
    span: slice
    params: Tensors
    kept: dict[Any, Any] = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)

    @property
    def members(self) -> int:
        return self.span.stop - self.span.start

    def room(self, key: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this part alone, kept until the backward."""
        return self.whole.memory.take((self.index, key), shape, dtype or like.dtype, like.device)


class Piece(ABC):
    """Takes what flows one step further, and a gradient one step back.

    free says of a tensor that a piece may write on it; each tells the same of what it returns. What is small and can wait for
    all members is done after the last part.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return ()

    @abstractmethod
    def forward(self, part: Part, x: Tensor, free: bool) -> tuple[Tensor, bool]:
        """y, from x."""

    def after_forward(self, whole: Pass) -> None:
        """What is done for all members at once."""
        return

    @abstractmethod
    def backward(self, part: Part, g: Tensor, free: bool, wanted: bool) -> tuple[Tensor, bool]:
        """The gradient of x from that of y, and those of the parameters; that of x has no meaning where it is not wanted."""
