"""The dropout that a model has already: its layers, the numbers of its recurrent layers, and the functions that its code calls.

Each has a name: "encoder.drop" for a layer, "encoder.dropout()" for `F.dropout` called in the code of `encoder`. A function's
rate is set by hooks around the module whose code calls it: while that code runs, a function mode hands the rate over.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.surgery.trace import DROPPERS, rate_of

__all__ = ["droppers", "set_rate", "settled"]


def droppers(model: nn.Module, example: Any) -> list[str]:
    """Names of all that drops, in the order of the forward run; what does not run is last, in the model's order.

    The model runs in train mode, where alone some code drops, else in eval mode; it stays as it is.
    """
    try:
        seen = _seen(model, example, train=True)
    except Exception:  # a batch norm refuses one row in train mode
        seen = _seen(model, example, train=False)
    return list(dict.fromkeys([*seen, *(name for name, m in model.named_modules() if _drops(m))]))


def set_rate(model: nn.Module, name: str, p: float) -> None:
    """Give one of `droppers` the rate p."""
    if not name.endswith("()"):
        module: Any = model.get_submodule(name)
        setattr(module, "dropout" if isinstance(module, nn.RNNBase) else "p", p)
        return
    path, _, function = name.rpartition(".")
    owner = model.get_submodule(path)
    hooks = [h for h in owner._forward_pre_hooks.values() if isinstance(h, _Enter)]
    rates = hooks[0].rates if hooks else _hook(owner, {})
    rates[function.removesuffix("()")] = p
    for child in owner.modules():
        if isinstance(child, _DropoutNd) and not any(isinstance(h, _Enter) for h in child._forward_pre_hooks.values()):
            _hook(child, {})  # it keeps its own rate within its owner's code


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or (isinstance(module, nn.RNNBase) and module.num_layers > 1)


def _seen(model: nn.Module, example: Any, train: bool) -> list[str]:
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        model.train(train)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.entering(name)).remove)
            stack.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
        stack.enter_context(watch)
        try:
            call_model(model, example)
        except Exception as error:
            raise must_run(model, error) from error
    return watch.names


class _Watch(TorchFunctionMode):
    """Notes what drops, and in whose code."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.within: list[tuple[str, nn.Module]] = []

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.within.append((name, module))
            if _drops(module):
                self.names.append(name)

        return hook

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.within.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, function = kwargs or {}, getattr(func, "__name__", "?").strip("_")
        if function in DROPPERS and rate_of(args, kwargs) > 0 and self.within:
            name, module = self.within[-1]
            if not _drops(module):
                self.names.append(f"{name}.{function}()".lstrip("."))
        return func(*args, **kwargs)


def _hook(module: nn.Module, rates: dict[str, float]) -> dict[str, float]:
    module.register_forward_pre_hook(_Enter(rates))
    module.register_forward_hook(_Leave(rates), always_call=True)
    return rates


class _Running(threading.local):
    """What hooks have entered in one thread: the rates, and what leaves their function mode."""

    def __init__(self) -> None:
        self.entered: list[tuple[dict[str, float], ExitStack]] = []
        self.settled = False


_running = _Running()


class _Enter:
    """The hook at the start of a module's code. A copied or pickled module has its own copy."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = rates

    def __call__(self, module: nn.Module, args: Any) -> None:
        stack = ExitStack()
        stack.enter_context(_Rates(self.rates))
        _running.entered.append((self.rates, stack))


class _Leave:
    """The hook at its end, also where it fails."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates = rates

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if _running.entered and _running.entered[-1][0] is self.rates:  # else the module failed before it was entered
            _running.entered.pop()[1].close()


class _Rates(TorchFunctionMode):
    """Hands the rates to dropout functions. The innermost module decides; a rate of 0 is the code's own way to be off."""

    def __init__(self, rates: dict[str, float]) -> None:
        super().__init__()
        self.rates = rates

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, function = dict(kwargs or {}), getattr(func, "__name__", "?").strip("_")
        if function not in DROPPERS or _running.settled:
            return func(*args, **kwargs)
        if function in self.rates and rate_of(args, kwargs) > 0:
            if len(args) > 1:
                args = (args[0], self.rates[function], *args[2:])
            else:
                kwargs["p"] = self.rates[function]
        _running.settled = True
        try:
            return func(*args, **kwargs)
        finally:
            _running.settled = False


@contextmanager
def settled() -> Iterator[None]:
    """While another mode has decided on the rate of a function."""
    before, _running.settled = _running.settled, True
    try:
        yield
    finally:
        _running.settled = before
