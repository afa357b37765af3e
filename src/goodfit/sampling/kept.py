"""What sampling must give back: modes, buffers, the noise of inserted layers, and generators."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from goodfit.noise import Clock, Noisy

__all__ = ["buffers_kept", "elsewhere", "fresh", "modes_kept", "noise_kept", "seeded"]


def fresh(value: Any) -> Any:
    """A copy of an input batch, since a model may write into its input, or into a cache that it is given."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: fresh(one) for key, one in value.items()} if type(value) is dict else copy.copy(value)
    if type(value) in (list, tuple):
        return type(value)(fresh(one) for one in value)
    return copy.deepcopy(value)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode back; one that came meanwhile that of the model."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            module.training = before.get(module, before[model])


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, Tensor, Tensor]]]:
    """Every buffer is the tensor that it was, with the numbers that it had: (owner, name, buffer, copy of its numbers)."""
    before = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield before
    finally:
        with torch.no_grad():
            for module, name, buffer, numbers in before:
                module._buffers[name] = buffer
                if not torch.equal(buffer, numbers):
                    buffer.copy_(numbers)


@contextmanager
def noise_kept(model: nn.Module, seed: int) -> Iterator[None]:
    """Layers with noise of their own draw by `seed`, and then go on as if nothing had been drawn."""
    clock = Clock()
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, Noisy):
                stack.enter_context(layer.aside(name, seed, clock))
        yield


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """The generators of torch, Python and NumPy begin by `seed`, and are put back."""
    used = (*model.parameters(), *model.buffers()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    cuda = {t.device.index or 0 for t in used if t.device.type == "cuda"}
    outside, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(cuda)):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would go to devices that nobody uses, slowly
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(outside)
            np.random.set_state(numpy)


def elsewhere() -> tuple[Any, ...]:
    """Where Python's and NumPy's generators stand."""
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]
