"""K members of one multilayer perceptron, forward and backward by hand.

The results are those of `torch.func.vmap` over `functional_call`, in a fraction of the time: a handful of operations per layer
for all members, memory that is used again, parts of members that stay in the cache, and one node for autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.chain.memory import Lease, Pool
from goodfit.chain.passes import Part, Pass, Piece, Tensors
from goodfit.errors import GoodfitError

__all__ = ["Chain"]

_PART = 2**20


class Chain:
    """Pieces one after another. Call it with the numbers of all members, of shape (K, ...) each.

    x is (rows, features), the same for all members, or (K, rows, features), where each has its own; what a chain that
    `flattens` gets may have more axes behind the rows, and own says which of both it is where one row for each could be meant.
    The outputs, (K, rows, outputs), lie in memory as (K, outputs, rows), in which a loss is several times as fast:
    `F.cross_entropy(outputs.mT, ...)` takes them as they lie. Gradients of gradients are not to be had.
    """

    def __init__(
        self, pieces: Sequence[Piece], features: int, widest: int, flattens: bool, silent: Sequence[nn.Module]
    ) -> None:
        self.pieces, self.features, self.widest, self.flattens = tuple(pieces), features, widest, flattens
        self.silent = tuple(silent)
        self.names = tuple(name for piece in pieces for name in piece.names)
        self.part_bytes = _PART
        self._pool = Pool()

    def __call__(self, params: Tensors, buffers: Tensors, x: Tensor, own: bool | None = None) -> Tensor:
        if any(module.training for module in self.silent):
            raise GoodfitError("A chain with torch's own Dropout is for eval mode, got train mode: ask chain_of(model) again.")
        leaves = [params[name] for name in self.names]
        members = len(leaves[0])
        keeps = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in leaves))
        x = self._rows_last(x, members, own)
        lease = self._pool.lease((members, x.shape, x.dtype, x.device, self.part_bytes, keeps))
        whole = Pass(members, x.shape[-1], dict(zip(self.names, leaves, strict=True)), buffers, lease.memory, keeps)
        if keeps:
            y: Tensor = _Passed.apply(self, whole, lease, x, *leaves)  # type: ignore[no-untyped-call]
        else:
            y = self._forward(whole, x)[0]
            lease.give_back()
        return y.mT

    def _rows_last(self, x: Tensor, members: int, own: bool | None) -> Tensor:
        """(features, rows), or (K, features, rows)."""
        if own is None:
            own = x[0].numel() != self.features if self.flattens else x.ndim == 3
        if self.flattens:
            x = x.flatten(1 + own)
        if x.ndim != 2 + own or x.shape[-1] != self.features or (own and len(x) != members):
            raise GoodfitError(
                f"A chain of {members} members takes ({members}, rows, {self.features}) or (rows, {self.features}), got "
                f"{tuple(x.shape)}: give such a batch."
            )
        return x.mT

    def at_once(self, rows: int, dtype: torch.dtype = torch.float32) -> int:
        """How many members go through together, of all that are given."""
        return max(1, self.part_bytes // (rows * self.widest * dtype.itemsize))

    def _forward(self, whole: Pass, x: Tensor) -> tuple[Tensor, list[Part]]:
        if x.ndim == 2:
            x = x.contiguous()
        parts = whole.parts(self.at_once(x.shape[-1], x.dtype))
        out = x.new_empty(0)
        for part in parts:
            y, free = (x if x.ndim == 2 else x[part.span]), False
            for piece in self.pieces:
                y, free = piece.forward(part, y, free)
            if part.span.start == 0:
                out = y.new_empty((whole.members, *y.shape[1:]))
            out[part.span] = y
        for piece in self.pieces:
            piece.after_forward(whole)
        return out, parts

    def _backward(self, parts: list[Part], g: Tensor, gradients: Tensors, wanted: list[bool], x: Tensor | None) -> None:
        """wanted: whether the gradient of what goes into each piece is; that of x is added where it is given."""
        for part in parts:
            part.gradients = gradients if len(parts) == 1 else {name: t[part.span] for name, t in gradients.items()}
            flowing, free = g[part.span], False
            for piece, wants in zip(reversed(self.pieces), reversed(wanted), strict=True):
                flowing, free = piece.backward(part, flowing, free, wants)
            if x is not None:
                (x if x.ndim == 2 else x[part.span]).add_(flowing)
            part.gradients = {}  # a tensor that has views would be copied into .grad, any other is taken


class _Passed(torch.autograd.Function):
    """The pass as one node."""

    @staticmethod
    def forward(context: Any, chain: Chain, whole: Pass, lease: Lease, x: Tensor, *leaves: Tensor) -> Tensor:
        y, context.parts = chain._forward(whole, x)
        context.chain, context.lease = chain, lease
        context.save_for_backward(x, *leaves)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        chain, (x, *leaves) = context.chain, context.saved_tensors
        of_x, *needed = context.needs_input_grad[3:]
        gradients = {n: t.new_empty(t.shape) for n, t, need in zip(chain.names, leaves, needed, strict=True) if need}
        wanted, earlier = [], of_x
        for piece in chain.pieces:
            wanted.append(earlier)
            earlier = earlier or any(name in gradients for name in piece.names)
        into = torch.zeros_like(x) if of_x else None
        chain._backward(context.parts, g, gradients, wanted, into)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            context.lease.give_back()
        return None, None, None, into, *(gradients.get(name) for name in chain.names)
