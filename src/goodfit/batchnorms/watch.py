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

from goodfit.batchnorms.moments import Moments
from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.processes import world

__all__ = ["Norm", "Watch"]

_BUILT_IN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_FUNCTION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class _Enough(BaseException):
    """All that this batch can tell is known; no `except Exception` of a model stops it."""


class Norm:
    """One pair of running statistics, called once or several times in a forward pass.

    known: the statistics that it will have. waits: the norms without known statistics that what it gets depends on.
    affines: the (γ, β) of its calls.
    """

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var, self.eps = mean, var, 0.0
        self.known: tuple[Tensor, Tensor] | None = None
        self.affines: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}
        self.forget()

    def forget(self) -> None:
        """Before a pass over the data; what is known stays."""
        if self.known is not None:
            return
        self.moments, self.waits, self.calls = Moments(self.mean), frozenset[Norm](), 0

    def settle(self, name: str) -> None:
        """Take what was seen, in all processes, as the statistics."""
        if world() > 1:
            self.moments.over_processes()
        mean, var = self.moments.mean.to(self.mean.dtype), self.moments.var.to(self.var.dtype)
        if not bool((mean.isfinite() & var.isfinite()).all()):
            raise GoodfitError(
                f"recalibrate met NaN, inf or numbers beyond {self.mean.dtype} in what {name} gets; all statistics are as they "
                "were. Look for such rows in the data, or such weights before it."
            )
        self.known = mean, var

    def write(self) -> float:
        """Put the statistics in; how far they moved, in standard deviations."""
        assert self.known is not None
        (mean, var), (new_mean, new_var) = [(m.double(), v.double()) for m, v in ((self.mean, self.var), self.known)]
        spread = (new_var + self.eps).sqrt()
        moved = ((new_mean - mean).abs() / spread).maximum(((var + self.eps).sqrt() / spread - 1).abs())
        self.mean.copy_(self.known[0])
        self.var.copy_(self.known[1])
        return float(moved.max())


class Watch(TorchFunctionMode):
    """Sees the calls of batch norms of a model in eval mode, in order; nothing is written into them.

    left: ids of running means that stay as they are. owned: ids of the model's buffers. still: a norm without known statistics
    normalizes by those that it has, so that the model says what it said; else by its batch, as in training.
    """

    def __init__(self, left: set[int], owned: set[int], still: bool) -> None:
        super().__init__()
        self.left, self.owned, self.still = left, owned, still
        self.norms: dict[int, Norm] = {}
        self.order: list[Norm] = []  # of the calls in this batch
        self.enough = 0  # how many calls tell all
        self.depends = _Depends()

    def run(self, forward: Callable[[], Any]) -> None:
        """One batch."""
        self.order.clear()
        self.depends = _Depends()
        with self.depends, self, suppress(_Enough):
            forward()

    def next(self) -> tuple[list[Norm], int]:
        """By the batch just seen, the norms that wait for no other, and the call behind which nothing more is needed of them.

        Where norms wait for each other, since they are called in turns, the first is the next. Of norms that are called
        several times another batch may hold more calls: nothing is cut short then.
        """
        pending = [norm for norm in dict.fromkeys(self.order) if norm.known is None]
        chosen = [norm for norm in pending if norm.waits <= {norm}] or pending[:1]
        last = max((i for i, norm in enumerate(self.order, 1) if norm in chosen), default=0)
        return chosen, last if all(norm.calls == 1 for norm in chosen) else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(**dict(zip(_FUNCTION, args, strict=False)), **kwargs or {})
        if func is torch.batch_norm:
            given = dict(zip(_BUILT_IN, args, strict=False)) | (kwargs or {})
            return self._batch_norm(**{name: value for name, value in given.items() if name != "cudnn_enabled"})
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
        norm = self.norms.setdefault(id(running_mean), Norm(running_mean, running_var))
        norm.eps = eps
        norm.affines[id(weight), id(bias)] = weight, bias
        self.order.append(norm)
        mean, var = norm.known or self._seen(norm, input)
        output = F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
        if norm.known is None and not self.still:
            self.depends.note(output, norm)
        if len(self.order) == self.enough:
            raise _Enough
        return output

    def _seen(self, norm: Norm, input: Tensor) -> tuple[Tensor, Tensor]:
        norm.waits |= self.depends.on(input)
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
