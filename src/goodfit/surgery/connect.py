"""Mask weights of an existing model for the time of a forward pass: which module reads them, and what is done around it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.layers.connect import SeededDropConnect
from goodfit.surgery.refusals import refuse_lazy
from goodfit.surgery.running import call_model, must_run, quiet
from goodfit.surgery.within import Around, Mode, arounds, put_around
from goodfit.where import owners

__all__ = ["mask_weight", "reader"]


def reader(model: nn.Module, example: Any, names: list[str]) -> dict[str, tuple[str, str]]:
    """For each weight the one module whose code reads it, and its name in there; refused where there is no such module."""
    reads, owned = _reads(model, example, names), owners(model)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases[id(p)].append(name)
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for name in names:
        owner, _ = owned[name]
        hooked = any(type(h).__module__.startswith("torch.nn.utils") for h in owner._forward_pre_hooks.values())
        if ".parametrizations." in f".{name}" or hooked:
            raise GoodfitError(f"DropConnect masks plain weights, but {name} is parametrized: leave it out of where.")
        at = sorted(reads[name]) or [paths[owner]]
        local = [a.removeprefix(f"{at[0]}.") for a in aliases[id(model.get_parameter(name))] if a.startswith(f"{at[0]}.")]
        if len(at) > 1 or not (local or at[0] == ""):
            raise GoodfitError(
                f"DropConnect masks a weight while its module runs, but {name} is read by {' and '.join(map(repr, at))}: "
                "leave it out of where."
            )
        found[name] = (at[0], local[0] if local else name)
    return found


def mask_weight(model: nn.Module, path: str, weight: str) -> str:
    """Hang a layer at a module that masks a weight while the module runs; its name, which stays where it is there already."""
    host, child = model.get_submodule(path), f"drop_{weight.replace('.', '_')}"
    if not isinstance(getattr(host, child, None), SeededDropConnect):
        child = f"inserted_{child}" if hasattr(host, child) else child
        layer = SeededDropConnect(f"{path}.{child}".lstrip("."), weight=weight)
        host.add_module(child, layer)
        layer.train(host.training)
        put_around(host, _Masked(child))
    if not arounds(model, _Pass):
        put_around(model, _Pass(), first=True)
    return f"{path}.{child}".lstrip(".")


class _Masked(Around):
    """A weight is masked while its module runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    @contextmanager
    def enter(self, module: nn.Module) -> Iterator[None]:
        layer = module.get_submodule(self.name)
        assert isinstance(layer, SeededDropConnect)
        with layer.around(module) as masked, nullcontext() if masked is None else _Reads(masked, layer.name):
            yield


class _Reads(Mode):
    """Refuses that the masked weight is read where it will not be masked in backward."""

    def __init__(self, masked: Tensor, name: str) -> None:
        super().__init__()
        self.masked, self.name = masked, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is self.masked for t in tensors_in([args, kwargs])):
            self.refuse_part(self.name)
        return func(*args, **(kwargs or {}))


class _Pass(Around):
    """A forward pass of the whole model, in which all uses of a weight share a mask."""

    @contextmanager
    def enter(self, module: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in module.modules():
                if isinstance(layer, SeededDropConnect):
                    stack.enter_context(layer.passing())
            yield


class _Watch(TorchFunctionMode):
    """Notes in which module's code a weight comes to a function that makes a tensor of it."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.within = [""]
        self.reads: dict[str, set[str]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(output)):
            for t in tensors_in([args, kwargs]):
                if id(t) in self.weights:
                    self.reads[self.weights[id(t)]].add(self.within[-1])
        return output

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.within.append(name)

        return hook

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.within.pop()


def _reads(model: nn.Module, example: Any, names: list[str]) -> dict[str, set[str]]:
    refuse_lazy(model, "DropConnect")
    watch = _Watch({id(model.get_parameter(name)): name for name in names})
    with ExitStack() as stack:
        stack.enter_context(quiet(model))
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.entering(name), prepend=True).remove)
            stack.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
        stack.enter_context(watch)
        try:
            call_model(model, example)
        except Exception as error:
            raise must_run(model, error) from error
    return watch.reads
