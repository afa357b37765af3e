"""Watching a model run: what each batch norm gets, and which others that depends on.

Every batch norm with running statistics, a module or not, ends in torch's one function `batch_norm`; it is intercepted there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from goodfit.batchnorms.norm import Norm, agree
from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.processes import world

__all__ = ["Watch"]

_BUILT_IN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_READS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)  # behind torch's back
_FUNCTION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class _Enough(BaseException):
    """All that this batch can tell is known; no `except Exception` of a model stops it."""


class Watch(TorchFunctionMode):
    """Sees the calls of batch norms of a model in eval mode, in order; nothing is written into them.

    left: ids of running means that stay as they are. owned: the model's buffers by id. still: a norm without known statistics
    normalizes by those that it has, so that the model says what it said; else by its batch, as in training. plan: the calls of
    norms where all batches are known to make the same ones.
    """

    def __init__(self, left: set[int], owned: dict[int, Tensor], still: bool) -> None:
        super().__init__()
        self.left, self.owned, self.still = left, owned, still
        self.norms: dict[int, Norm] = {}
        self.order: list[Norm] = []  # of the calls in this batch
        self.orders: set[tuple[Norm, ...]] = set()  # of the batches in this pass
        self.acted = False  # whether Python has read what other statistics would change, and may then call otherwise
        self.plan, self.enough = tuple[Norm, ...](), 0  # how many calls of the plan this pass needs; 0: all there is
        self.chosen: list[Norm] = []
        self.depends = _Depends()

    def begin(self) -> None:
        """Before a pass over the data: run batches only as deep as the next norms need, where it is known how deep."""
        self.chosen = self._next()
        self.enough = max((i for i, norm in enumerate(self.plan, 1) if norm in self.chosen), default=0)
        self.orders, self.acted = set(), False
        for norm in self.norms.values():
            norm.forget()

    def run(self, forward: Callable[[], Any]) -> None:
        """One batch."""
        self.order.clear()
        self.depends = _Depends()
        with self.depends, self, suppress(_Enough):
            forward()
        self.orders.add(tuple(self.order))
        self.acted = self.acted or bool(self.depends.read)

    def end(self) -> list[Norm]:
        """After a pass: the norms whose statistics it told. None, if batches called otherwise than the plan said."""
        cut = self.enough > 0
        called = {key for key, norm in self.norms.items() if norm.calls}
        if world() > 1 and self.owned:
            self.norms, called, cut = agree(self.norms, called, cut, self.owned)
        if cut:
            told = self.chosen if self._next() == self.chosen else []
            self.plan = self.plan if told else ()
            return told
        self.norms = {key: norm for key, norm in self.norms.items() if norm.known is not None or key in called}
        orders = self.orders - {()}
        self.plan = orders.pop() if len(orders) == 1 and not self.acted else ()
        return self._next()

    def _next(self) -> list[Norm]:
        """The norms that wait for no other; where norms wait for each other, since they are called in turns, the first."""
        pending = self.pending()
        return [norm for norm in pending if norm.waits <= {norm}] or sorted(pending, key=lambda norm: len(norm.waits))[:1]

    def pending(self) -> list[Norm]:
        """The norms without known statistics."""
        return [norm for norm in self.norms.values() if norm.known is None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(**dict(zip(_FUNCTION, args, strict=False)), **kwargs or {})
        if func is torch.batch_norm:
            given = dict(zip(_BUILT_IN, args, strict=False)) | (kwargs or {})
            return self._batch_norm(**{name: value for name, value in given.items() if name != "cudnn_enabled"})
        if func in _READS:
            self.depends.read |= self.depends.on(args[0])
        return func(*args, **kwargs or {})

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training or running_mean is None or running_var is None:  # its batch speaks in eval mode too
            return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        if id(running_mean) in self.left or input.numel() == 0:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        if id(running_mean) not in self.owned or id(running_var) not in self.owned:
            raise GoodfitError(
                f"recalibrate sets buffers of the model, got a batch norm of {input.shape[1]} channels "
                "whose statistics are computed or kept elsewhere: register them as buffers and hand over these."
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(input):
            raise GoodfitError(
                f"recalibrate cannot see the values of a batch norm of {input.shape[1]} channels, which runs inside a "
                "transform of torch.func (vmap, grad): take it out of there, or freeze it and recalibrate the others."
            )
        norm = self.norms.setdefault(id(running_mean), Norm(running_mean, running_var))
        norm.eps = eps
        norm.affines[id(weight), id(bias)] = weight, bias
        self.order.append(norm)
        mean, var = norm.known or self._seen(norm, input)
        output = F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
        if norm.known is None and not self.still:
            self.depends.note(output, norm)
        if len(self.order) == self.enough and tuple(self.order) == self.plan[: self.enough]:
            raise _Enough
        return output

    def _seen(self, norm: Norm, input: Tensor) -> tuple[Tensor, Tensor]:
        norm.depends |= self.depends.on(input)
        norm.calls += 1
        mean, var = norm.moments.see(input)
        return (norm.mean, norm.var) if self.still else (mean.to(norm.mean.dtype), var.to(norm.var.dtype))


class _Depends(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows by their memory which norms without known statistics tensors were computed from, views and all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, frozenset[Norm]] = {}
        self.read: frozenset[Norm] = frozenset()  # what Python has read as numbers, and may have acted upon

    def on(self, tensor: Tensor) -> frozenset[Norm]:
        return self.known.get(_memory(tensor), frozenset()) | self.read

    def note(self, tensor: Tensor, norm: Norm) -> None:
        self.known[_memory(tensor)] = self.on(tensor) | {norm}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(tensors_in([args, kwargs]))
        output = func(*args, **kwargs or {})
        outputs = list(tensors_in(output))
        before = self.read.union(*map(self.on, inputs))
        if not outputs:
            self.read = before
        for t in outputs:
            self.known[_memory(t)] = before | (self.known.get(0, frozenset()) if _memory(t) == 0 else frozenset())
        return output


def _memory(tensor: Tensor) -> int:
    """Which storage a tensor lies in; 0 is shared by all that have none, such as sparse ones."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0
