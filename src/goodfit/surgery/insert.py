"""Put a layer into an existing model, in place, without renaming what is there.

An inserted layer hangs as a child of its host and runs by a hook of the host, so the old `state_dict` keys stay (wrapping
in a Sequential would rename `0.weight` to `0.0.weight`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from goodfit.errors import GoodfitError

__all__ = ["insert_after", "insert_before", "refuse_wrappers"]


def refuse_wrappers(model: nn.Module, who: str) -> None:
    """Refuse what cannot be edited in place: a bare leaf, and wrappers that have already looked at the model."""
    kind = type(model).__name__
    if isinstance(model, DataParallel | DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise GoodfitError(f"{who} edits the model in place, got a {kind}: give the model first, wrap it afterwards.")
    if not any(True for _ in model.children()):
        raise GoodfitError(f"{who} inserts layers between layers, got a single {kind}; wrap it in nn.Sequential.")


def insert_after(host: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` act on what `host` returns."""
    _hang(host, name, layer)
    host.register_forward_hook(_After(name))


def insert_before(host: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` act on the first argument of `host`."""
    _hang(host, name, layer)
    host.register_forward_pre_hook(_Before(name))


def _hang(host: nn.Module, name: str, layer: nn.Module) -> None:
    if hasattr(host, name):
        raise GoodfitError(f"{type(host).__name__} already has a {name!r}: the model was built before, build a fresh one.")
    host.add_module(name, layer)
    layer.train(host.training)


class _After:
    """A hook that knows its layer by name only: a copied or unpickled host then runs its own copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return host.get_submodule(self.name)(output)


class _Before:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, host: nn.Module, args: tuple[Any, ...]) -> Any:
        return (host.get_submodule(self.name)(args[0]), *args[1:])
