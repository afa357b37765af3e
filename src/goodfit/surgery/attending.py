"""Where a model attends, and what sets the dropout of attention that is a function.

`F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)` drops in eval too, unless its caller says otherwise (pytorch#124464):
while the code of the module runs that calls it, a function mode hands the rate over, 0 in eval. The same holds for
`F.dropout` on the output of a softmax.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.layers.attention import AttentionRate
from goodfit.surgery.droppers import settled
from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.surgery.trace import function_name, rate_of, trains
from goodfit.surgery.within import Around, Deciding, Mode, arounds, callers_in, put_around

__all__ = ["Attending", "attending", "hang_rate"]

_KEEPS = {"bfloat16", "clone", "contiguous", "double", "float", "half", "to", "type", "type_as", "view", "reshape"}
_PRODUCTS = {"baddbmm", "bmm", "einsum", "matmul", "rmatmul"}


@dataclass
class Attending:
    """What attends in one run: torch's attention modules, dropout layers behind a softmax, modules whose code calls the
    functions, and those that have a softmax without dropout on it."""

    numbers: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)


class _Softmaxes:
    """The outputs of softmax functions, as they are and in other types and shapes."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}

    def note(self, name: str, args: Any, output: Any) -> None:
        if name == "softmax" or (name in _KEEPS and self.has(args)):
            self.known |= {id(t): t for t in tensors_in(output)}

    def has(self, args: Any) -> bool:
        """Whether a function is called on one."""
        return bool(args) and id(args[0]) in self.known

    def among(self, args: Any) -> bool:
        """Whether a function gets one."""
        return any(id(t) in self.known for t in tensors_in(args))


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Attending()
        self.softmaxes, self.dropped = _Softmaxes(), _Softmaxes()
        self.within: list[tuple[str, nn.Module | None]] = [("", None)]
        self.heads: list[str] = []  # whose code has a softmax for each of several heads
        self.served: set[str] = set()  # whose code has dropout on a softmax

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name, where = func(*args, **(kwargs or {})), function_name(func), self.within[-1]
        given = args or tuple((kwargs or {}).values())
        if name == "scaled_dot_product_attention":
            self.found.callers.append(where[0])
        elif name == "dropout" and self.softmaxes.has(given):
            self.dropped.known |= {id(t): t for t in tensors_in(output)}
            if not isinstance(where[1], _DropoutNd):
                self.found.callers.append(where[0])
                self.served.add(where[0])
        elif name in _PRODUCTS and self.softmaxes.among(given) and not self.dropped.among(given):
            self.found.without.append(where[0])
        elif name == "softmax" and output.ndim >= 4:
            self.heads.append(self.within[-2 if isinstance(where[1], nn.Softmax) else -1][0])
        self.softmaxes.note(name, given, output)
        self.dropped.note(name if name in _KEEPS else "", given, output)
        return output

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.within.append((name, module))
            if isinstance(module, nn.MultiheadAttention):
                self.found.numbers.append(name)
            given = args or tuple(kwargs.values())
            if isinstance(module, _DropoutNd) and self.softmaxes.has(given):
                self.found.layers.append(name)
                self.served.add(self.within[-2][0])
                self.dropped.known[id(given[0])] = given[0]

        return hook

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.within.pop()


def attending(model: nn.Module, example: Any) -> Attending:
    """Run the example once in eval mode and see what attends; the model stays as it is."""
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.entering(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
        stack.enter_context(watch)
        try:
            call_model(model, example)
        except GoodfitError:
            raise
        except Exception as error:
            raise must_run(model, error) from error
    found = watch.found
    found.without += [name for name in watch.heads if name not in watch.served]
    return Attending(*(list(dict.fromkeys(names)) for names in (found.numbers, found.layers, found.callers, found.without)))


def hang_rate(model: nn.Module, path: str) -> str:
    """Hang a rate at a module whose code attends by functions; its name, which stays where it is there already."""
    host = model.get_submodule(path)
    for child, layer in host.named_children():
        if isinstance(layer, AttentionRate):
            return f"{path}.{child}".lstrip(".")
    child = "inserted_attention_dropout" if hasattr(host, "attention_dropout") else "attention_dropout"
    name = f"{path}.{child}".lstrip(".")
    host.add_module(child, AttentionRate(name).train(host.training))
    _attends(host).name = child
    for inside in callers_in(host):
        _attends(inside)  # it keeps its own rate within its owner's code
    return name


_deciding = Deciding()


class _Attends(Around):
    """The rate by which a module's code attends; without one, that of the code is kept."""

    name = ""

    def enter(self, module: nn.Module) -> AbstractContextManager[Any]:
        return _deciding.by(_Rate(module.get_submodule(self.name)) if self.name else None)


def _attends(module: nn.Module) -> _Attends:
    if not arounds(module, _Attends):
        put_around(module, _Attends())
    return arounds(module, _Attends)[0]


class _Rate(Mode):
    """Hands a rate to the functions that drop attention."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: AttentionRate = layer
        self.softmaxes = _Softmaxes()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function_name(func)
        given = args or tuple(kwargs.values())
        if _deciding.has(self) and name == "scaled_dot_product_attention":
            self._hand(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
            args, kwargs = _with(args, kwargs, 4, "dropout_p", self.layer.now)
        elif _deciding.has(self) and name == "dropout" and self.softmaxes.has(given):
            self._hand(rate_of(args, kwargs) if trains(args, kwargs) else 0.0)
            args, kwargs = _with(args, kwargs, 1, "p", self.layer.p)
            args, kwargs = _with(args, kwargs, 2, "train" if "train" in kwargs else "training", self.layer.training)
            with settled():
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        self.softmaxes.note(name, given, output)
        return output

    def _hand(self, own: float) -> None:
        if own != self.layer.now:
            self.refuse_part(self.layer.name)


def _with(args: Any, kwargs: dict[str, Any], place: int, name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    if len(args) > place:
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
