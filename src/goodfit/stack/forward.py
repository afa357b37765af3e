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
from goodfit.losses import loss_of, rowwise
from goodfit.noise import Clock, Noisy
from goodfit.stack.members import Members

__all__ = ["Forward", "losses_of"]


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

    @torch.no_grad()
    def refuses(self, x: Any) -> str:
        """Why these models cannot be computed as one on inputs like x, "" where they can."""
        kept = {name: t.clone() for name, t in self.members.buffers.items()}
        try:
            together = self(x, False, False)
            for i in range(min(2, self.members.count)):
                alone = self._alone({n: t[i] for n, t in {**self.members.weights, **self.members.buffers}.items()}, x)
                for one, other in zip(tree_flatten(together)[0], tree_flatten(alone)[0], strict=True):
                    torch.testing.assert_close(one[i], other, equal_nan=True)
            self(x, False, True)
        except Exception as wrong:
            return (str(wrong).strip().splitlines() or [type(wrong).__name__])[0]
        finally:
            for name, before in kept.items():
                self.members.buffers[name].copy_(before)
            for module in self.template.modules():
                if isinstance(module, Noisy):
                    module.forget()
        return ""


def losses_of(loss: Callable[[Any, Tensor], Tensor], outputs: Any, y: Any, own: bool) -> Tensor:
    """The loss of each member, (K,): of a known loss at once, else by vmap, else one after the other."""
    each = rowwise(loss) if loss in (loss_of("classes"), loss_of("numbers"), F.mse_loss, F.l1_loss) else None
    members = tree_flatten(outputs)[0][0].shape[0]
    if each is not None and isinstance(outputs, Tensor) and isinstance(y, Tensor):
        y = y if own else y.expand(members, *y.shape)
        if loss is loss_of("classes") and outputs.ndim == 3 and outputs.shape[2] > 1:
            return F.cross_entropy(outputs.mT, y.mT if y.is_floating_point() else y, reduction="none").mean(1)
        return each(outputs.flatten(0, 1), y.flatten(0, 1)).view(members, -1).mean(1)
    try:
        return vmap(loss, in_dims=(0, 0 if own else None), randomness="different")(outputs, y)
    except RuntimeError:
        alone = [tree_map(lambda t, i=i: t[i], outputs) for i in range(members)]
        return torch.stack([loss(one, y[i] if own else y) for i, one in enumerate(alone)])
