"""Put a layer into an existing model, in place, without renaming what is there.

An inserted layer hangs as a child of its host and runs by a hook of the host, so the old `state_dict` keys stay (wrapping
in a Sequential would rename `0.weight` to `0.0.weight`).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from goodfit.errors import GoodfitError
from goodfit.layers.skip import Skip
from goodfit.surgery.within import Guard

__all__ = [
    "Aside",
    "hang",
    "hung",
    "has_inserted",
    "insert_after",
    "insert_before",
    "inserted_into",
    "refuse_wrappers",
    "runs_after",
    "runs_before",
    "take_out",
    "user_hooks",
]

_WRAPPERS = (DataParallel, DistributedDataParallel, ScriptModule)


def refuse_wrappers(model: nn.Module, who: str) -> None:
    """Refuse what cannot be edited in place: a bare leaf, and wrappers that have already looked at the model."""
    kind = type(model).__name__
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if compiled or isinstance(model, _WRAPPERS) or hasattr(model, "_fsdp_wrapped_module"):
        shown = f"compiled {kind}" if compiled else kind
        raise GoodfitError(
            f"{who} edits the model in place, got a {shown}: give the model first, wrap or compile it afterwards."
        )
    for name, module in model.named_modules():
        if isinstance(module, ScriptModule):
            raise GoodfitError(f"{who} edits plain layers, got the scripted {name!r}: {who} first, script afterwards.")
    if not any(True for _ in model.children()):
        raise GoodfitError(f"{who} edits the layers inside a model, got a single {kind}; wrap it in nn.Sequential.")


def insert_after(host: nn.Module, name: str, layer: nn.Module) -> str:
    """Let `layer` act on what `host` returns; by which name the host knows it.

    A skip connection that ends there stays the last, so a norm is in its branch.
    """
    known = hang(host, name, layer)
    host.register_forward_hook(_After(name))
    for key, hook in list(host._forward_hooks.items()):
        if isinstance(hook, _After) and isinstance(hung(host, hook.name), Skip):
            host._forward_hooks[key] = host._forward_hooks.pop(key)
    return known


def insert_before(host: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` act on the first argument of `host`."""
    hang(host, name, layer)
    host.register_forward_pre_hook(_Before(name), with_kwargs=True)


def has_inserted(model: nn.Module, name: str) -> bool:
    """Whether a layer of this name was inserted into the model before."""
    return any(isinstance(h, _After) and h.name == name for m in model.modules() for h in m._forward_hooks.values())


def inserted_into(host: nn.Module) -> set[str]:
    """Names of the children of `host` that its hooks run."""
    hooks = (*host._forward_hooks.values(), *host._forward_pre_hooks.values())
    return {hook.name for hook in hooks if isinstance(hook, _After | _Before)}


def runs_before(hook: object) -> str | None:
    """The child that a hook of ours runs before its host, None for any other hook."""
    return hook.name if isinstance(hook, _Before) else None


def runs_after(hook: object) -> str | None:
    """The same, after it."""
    return hook.name if isinstance(hook, _After) else None


def take_out(host: nn.Module, name: str) -> bool:
    """Take an inserted layer out again; False where the child of this name was not inserted."""
    every = (host._forward_hooks, host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs)
    keys = [k for hooks in every[:2] for k, h in hooks.items() if isinstance(h, _After | _Before) and h.name == name]
    for key in keys:
        for hooks in every:
            hooks.pop(key, None)
    if keys:
        delattr(host, name)
    return bool(keys)


def user_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that are not ours."""
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    return any(not isinstance(hook, _After | _Before | Guard) for hook in hooks)


def hang(host: nn.Module, name: str, layer: nn.Module) -> str:
    """Make `layer` a child of `host`, in the host's mode; by which name the host knows it.

    A host with layers of its own may run all that it holds, as nn.Sequential does: there the layer stands aside.
    """
    if hasattr(host, name):
        raise GoodfitError(f"{type(host).__name__} already has a {name!r}: the model was built before, build a fresh one.")
    quiet = inserted_into(host) | {"parametrizations"}
    runs = any(child not in quiet for child, _ in host.named_children())
    host.add_module(name, Aside(layer) if runs else layer)
    layer.train(host.training)
    return f"{name}.layer" if runs else name


def hung(host: nn.Module, name: str) -> nn.Module:
    """The layer that was hung into `host` by this name."""
    child = host.get_submodule(name)
    return child.layer if isinstance(child, Aside) else child


class Aside(nn.Module):
    """It holds an inserted layer, and does nothing where it is run as a layer of its host."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return x


class _After:
    """A hook that knows its layer by name only: a copied or unpickled host then runs its own copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return hung(host, self.name)(output)


class _Before:
    """The same, on the first argument, however it is handed over."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = hung(host, self.name)
        if args:
            return (layer(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: layer(kwargs[first])}
