"""The outputs and the losses of K models of one kind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map

from goodfit.chain.plan import chain_of
from goodfit.errors import GoodfitError
from goodfit.losses import loss_of
from goodfit.noise import Clock, Noisy
from goodfit.stack.members import Members

__all__ = ["Forward", "losses_of"]

_IGNORED = -100  # the class that torch leaves out
_SQUARED = (loss_of("numbers"), F.mse_loss)


class Forward:
    """A model that stands for all members, whose tensors take the place of its own: a chain by hand, any other by vmap."""

    def __init__(self, members: Members, clock: Clock) -> None:
        self.members = members
        self.template = deepcopy(members.models[0])
        for module in self.template.modules():
            if isinstance(module, Noisy):
                module.clock = clock
                module.forget()
        self._modes = [(one, one.training) for one in self.template.modules()]
        self._chains = {training: self._chain(training) for training in (True, False)}

    def __call__(self, x: Any, own: bool, training: bool) -> Any:
        """Outputs of all members, (K, ...); own: whether each member has its own x."""
        device = next(iter(self.members.weights.values())).device.type if self.members.weights else "cpu"
        if torch.is_autocast_enabled(device):
            raise GoodfitError(
                "A stack computes in the precision of its weights, got autocast: make models bfloat16, or say together=False."
            )
        self.template.train(training)
        chain = self._chains[training]
        if chain is not None and isinstance(x, Tensor):
            return chain(self.members.weights, self.members.buffers, x, own)
        tensors = {**self.members.weights, **self.members.buffers}
        return vmap(self._alone, in_dims=(0, 0 if own else None), randomness="different")(tensors, x)

    def __str__(self) -> str:
        chain = self._chains[True]
        return "by vmap" if chain is None else f"by hand ({', '.join(type(piece).__name__ for piece in chain.pieces)})"

    def _alone(self, tensors: dict[str, Tensor], x: Any) -> Any:
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        return functional_call(self.template, tensors, args, kwargs)

    def _chain(self, training: bool) -> Any:
        self.template.train(training)
        return chain_of(self.template)


def losses_of(loss: Callable[[Any, Tensor], Tensor], outputs: Any, y: Any, own: bool) -> Tensor:
    """The loss of each member, (K,): of a known loss at once, else by vmap, else one after the other."""
    leaf = tree_flatten(outputs)[0][0]
    members, each = leaf.shape[0], leaf.shape[1:]
    target = (y.shape[1:] if own else y.shape) if isinstance(y, Tensor) else None
    if isinstance(outputs, Tensor) and target is not None:
        if loss is loss_of("classes") and y.dtype == torch.int64 and len(each) == 2 and target == each[:1] and each[1] > 1:
            y = y if own else y.expand(members, *target)
            return F.cross_entropy(outputs.mT, y, reduction="none").sum(1) / (y != _IGNORED).sum(1)
        if loss is loss_of("classes") and y.is_floating_point() and len(each) == 2 and target == each and each[1] > 1:
            y = (y if own else y.expand(members, *target)).to(outputs.dtype)
            return F.cross_entropy(outputs.mT, y.mT, reduction="none").mean(1)
        if loss in _SQUARED and y.dtype == outputs.dtype and target == each:
            return (outputs - y).square().reshape(members, -1).mean(1)
    try:
        return vmap(loss, in_dims=(0, 0 if own else None), randomness="different")(outputs, y)
    except RuntimeError:
        alone = [tree_map(lambda t, i=i: t[i], outputs) for i in range(members)]
        return torch.stack([loss(one, y[i] if own else y) for i, one in enumerate(alone)])
