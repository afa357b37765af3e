"""What a model costs: parameters, floating-point operations, and time."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from goodfit.dataflow.dependence import plain_operations
from goodfit.surgery.running import call_model, quiet

__all__ = ["flops", "milliseconds", "size"]


def size(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, example: Any) -> int:
    """Floating-point operations of products and convolutions in one run, by torch's formulas."""
    counter = _Flops()
    with quiet(model), plain_operations(), counter:
        call_model(model, example)
    return counter.total


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's own counter also tracks modules by gradient hooks, which fails on models whose parameters are inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count: Any = flop_registry.get(func.overloadpacket)
        self.total += int(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0
        return out


def milliseconds(model: nn.Module, example: Any) -> float:
    """One run: the median of as many as fit into 20 ms, at most 20, after one that warms up."""
    cuda = any(p.device.type == "cuda" for p in model.parameters())
    times: list[float] = []
    with quiet(model):
        while len(times) < 2 or (sum(times[1:]) < 0.02 and len(times) < 21):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call_model(model, example)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return median(times[1:]) * 1e3
