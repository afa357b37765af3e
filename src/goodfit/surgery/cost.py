"""What a model costs: parameters, floating-point operations, and time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from goodfit.surgery.dependence import plain_attention
from goodfit.surgery.proof import quiet
from goodfit.surgery.trace import call_model

__all__ = ["flops", "milliseconds", "size"]


def size(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, example: Any) -> int:
    """Floating-point operations of products and convolutions in one run."""
    with quiet(model), plain_attention(), FlopCounterMode(display=False) as counter:
        call_model(model, example)
    return int(counter.get_total_flops())


def milliseconds(model: nn.Module, example: Any) -> float:
    """One run, measured after one that warms up."""
    cuda = any(p.device.type == "cuda" for p in model.parameters())
    with quiet(model):
        for _ in range(2):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call_model(model, example)
            if cuda:
                torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
