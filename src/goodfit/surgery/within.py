"""Act around the code of a module: its `forward` runs within context managers, which no exception leaves open.

torch skips its own hooks for `KeyboardInterrupt`, also those with `always_call`; a `with` statement skips nothing.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from goodfit.errors import GoodfitError
from goodfit.noise import Noisy

__all__ = ["Around", "Deciding", "Guard", "Mode", "arounds", "callers_in", "put_around"]


class Around(ABC):
    """What is done around a module's code. It knows layers by name only: a copied or unpickled module meets its own."""

    @abstractmethod
    def enter(self, module: nn.Module) -> AbstractContextManager[Any]:
        """The context of one call."""


_Kind = TypeVar("_Kind", bound=Around)


class Guard:
    """The hook by which a module knows what stands in for its `forward`, and that refuses a copy which shares it."""

    def __init__(self, within: _Within) -> None:
        self.within = within

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.within.module is not module:
            raise GoodfitError(
                f"{type(module).__name__} shares its code with the module that it is a shallow copy of, and would run with its "
                "weights: train on several devices with DistributedDataParallel instead of DataParallel, and copy by deepcopy."
            )


class _Within:
    """Stands in for `forward` of one module: a copied or unpickled module gets its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.arounds = module, list[Around]()
        self.inner: Callable[..., Any] | None = vars(module).get("forward")  # the user's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for around in self.arounds:
                stack.enter_context(around.enter(self.module))
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))


def arounds(module: nn.Module, kind: type[_Kind]) -> list[_Kind]:
    """What of one kind is done around a module's code."""
    within = _within(module)
    return [one for one in within.arounds if isinstance(one, kind)] if within else []


def put_around(module: nn.Module, around: Around, first: bool = False) -> None:
    """Do this too, inside of what is done already, or `first`."""
    within = _within(module)
    if within is None:
        within = _Within(module)
        module.register_forward_pre_hook(Guard(within))
        vars(module)["forward"] = within
    within.arounds.insert(0 if first else len(within.arounds), around)


def _within(module: nn.Module) -> _Within | None:
    """By the hook, since others may have put a `forward` around ours."""
    return next((h.within for h in module._forward_pre_hooks.values() if isinstance(h, Guard)), None)


def callers_in(owner: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """The modules inside of `owner` whose code may call functions: those that torch does not define, and these kinds."""
    inside = [m for m in owner.modules() if m is not owner and not isinstance(m, Noisy)]
    return [m for m in inside if isinstance(m, kinds) or not type(m).__module__.startswith("torch.")]


class Mode(TorchFunctionMode):
    """Sees the functions that the code of a module calls, and knows where that code has started."""

    def __init__(self) -> None:
        super().__init__()
        self.region = _region()

    def refuse_part(self, who: str) -> None:
        """Code that is run again in backward, without the module around it, would run as if nothing had been done."""
        now = _region()
        if now is not None and self.region not in (None, now):
            raise GoodfitError(
                f"{who} acts while its module runs, but the module checkpoints a part of its own code, which runs again in "
                "backward without it: checkpoint the module as a whole."
            )


def _region() -> Any:
    """What tells code under activation checkpointing from the code around it."""
    if torch.compiler.is_compiling():
        return None
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


class Deciding(threading.local):
    """The modes of one kind in one thread, the innermost last; it alone decides. None leaves functions as the code has them."""

    def __init__(self) -> None:
        self.modes: list[Mode | None] = []

    @contextmanager
    def by(self, mode: Mode | None) -> Iterator[None]:
        """While a mode decides."""
        with ExitStack() as stack:
            if mode is not None:
                stack.enter_context(mode)
            self.modes.append(mode)
            try:
                yield
            finally:
                self.modes.pop()

    def has(self, mode: Mode) -> bool:
        """Whether this one does."""
        return self.modes[-1] is mode
