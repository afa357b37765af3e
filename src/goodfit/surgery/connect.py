"""Mask weights of an existing model for the time of a forward pass: which module reads them, and the hooks around it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.flows import tensors_in
from goodfit.errors import GoodfitError
from goodfit.layers.connect import SeededDropConnect
from goodfit.surgery.running import call_model, must_run, quiet
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
        host.register_forward_pre_hook(_Put(child))
        host.register_forward_hook(_Take(child), always_call=True)
    if not any(isinstance(h, _Begin) for h in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_Begin(), prepend=True)
        model.register_forward_hook(_End(), always_call=True)
    return f"{path}.{child}".lstrip(".")


class _Put:
    """A hook that knows its layer by name only: a copied or unpickled host then runs its own copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: Any) -> None:
        _layer(host, self.name).put(host)


class _Take:
    """The same, behind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: Any, output: Any) -> None:
        _layer(host, self.name).take(host)


class _Begin:
    """The hook before the whole model."""

    def __call__(self, model: nn.Module, args: Any) -> None:
        for module in model.modules():
            if isinstance(module, SeededDropConnect):
                module.begin()


class _End:
    """The hook behind it."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        for module in model.modules():
            if isinstance(module, SeededDropConnect):
                module.end()


def _layer(host: nn.Module, name: str) -> SeededDropConnect:
    layer = host.get_submodule(name)
    assert isinstance(layer, SeededDropConnect)
    return layer


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
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise GoodfitError(f"DropConnect needs weights that are there, but {lazy} is lazy: run the model on a batch once.")
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
