"""The dropout that a model has already: its layers, the numbers of its recurrent layers, and the functions that its code calls.

Each has a name: "encoder.drop" for a layer, "encoder.dropout()" for `F.dropout` called in the code of `encoder`. A function's
rate is set around the module whose code calls it: while that code runs, a function mode hands the rate over.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.surgery.trace import DROPPERS, function_name, rate_of, trains
from goodfit.surgery.within import Around, Deciding, Mode, arounds, callers_in, put_around

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
    _rated(owner).rates[function.removesuffix("()")] = p
    for inside in callers_in(owner, _DropoutNd):
        _rated(inside)  # it keeps its own rates within its owner's code


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
        kwargs, function = kwargs or {}, function_name(func)
        if function in DROPPERS and rate_of(args, kwargs) > 0 and self.within:
            name, module = self.within[-1]
            if not _drops(module):
                self.names.append(f"{name}.{function}()".lstrip("."))
        return func(*args, **kwargs)


_deciding = Deciding()


class _Settled(threading.local):
    """Whether another mode of this thread has decided on the rate of a function."""

    yes = False


_settled = _Settled()


class _Rated(Around):
    """The rates of functions that a module's code calls; without any, those of the code are kept."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def enter(self, module: nn.Module) -> AbstractContextManager[Any]:
        return _deciding.by(_Rates(self.rates, type(module).__name__) if self.rates else None)


def _rated(module: nn.Module) -> _Rated:
    if not arounds(module, _Rated):
        put_around(module, _Rated())
    return arounds(module, _Rated)[0]


class _Rates(Mode):
    """Hands the rates to dropout functions. A rate of 0 is the code's own way to be off."""

    def __init__(self, rates: dict[str, float], kind: str) -> None:
        super().__init__()
        self.rates, self.kind = rates, kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, function = dict(kwargs or {}), function_name(func)
        mine = function in self.rates and _deciding.has(self) and not _settled.yes
        if mine and rate_of(args, kwargs) > 0:
            if trains(args, kwargs) and rate_of(args, kwargs) != self.rates[function]:
                self.refuse_part(f"Dropout by {function} in {self.kind}")
            if len(args) > 1:
                args = (args[0], self.rates[function], *args[2:])
            else:
                kwargs["p"] = self.rates[function]
        return func(*args, **kwargs)


@contextmanager
def settled() -> Iterator[None]:
    """While another mode has decided on the rate of a function."""
    before, _settled.yes = _settled.yes, True
    try:
        yield
    finally:
        _settled.yes = before
