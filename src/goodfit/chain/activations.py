"""Activations by hand: y from x, and the gradient of x from that of y, each written where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Function", "function_of"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Function:
    """value(x, out) and slope(g, z, out), where z is x, or y where it goes `by_output`.

    positive: f(s·x) = s·f(x) for s > 0. gates: an output that is not above 0 passes no gradient, and others pass it as it is.
    """

    value: Callable[[Tensor, Tensor], Any]
    slope: Callable[[Tensor, Tensor, Tensor], Any]
    by_output: bool = False
    positive: bool = False
    gates: bool = False


def _relu(module: Any) -> Function:
    return Function(
        lambda x, out: x.relu_() if x is out else torch.clamp_min(x, 0, out=out),
        lambda g, z, out: _aten.threshold_backward.grad_input(g, z, 0, grad_input=out),
        by_output=True,
        positive=True,
        gates=True,
    )


def _leaky_relu(module: Any) -> Function:
    slope = module.negative_slope
    return Function(
        lambda x, out: _aten.leaky_relu.out(x, slope, out=out),
        lambda g, z, out: _aten.leaky_relu_backward.grad_input(g, z, slope, False, grad_input=out),
        positive=True,
    )


def _gelu(module: Any) -> Function:
    kind = module.approximate
    return Function(
        lambda x, out: _aten.gelu.out(x, approximate=kind, out=out),
        lambda g, z, out: _aten.gelu_backward.grad_input(g, z, approximate=kind, grad_input=out),
    )


def _silu(module: Any) -> Function:
    return Function(
        lambda x, out: _aten.silu.out(x, out=out),
        lambda g, z, out: _aten.silu_backward.grad_input(g, z, grad_input=out),
    )


def _tanh(module: Any) -> Function:
    return Function(
        lambda x, out: torch.tanh(x, out=out),
        lambda g, z, out: _aten.tanh_backward.grad_input(g, z, grad_input=out),
        by_output=True,
    )


def _sigmoid(module: Any) -> Function:
    return Function(
        lambda x, out: torch.sigmoid(x, out=out),
        lambda g, z, out: _aten.sigmoid_backward.grad_input(g, z, grad_input=out),
        by_output=True,
    )


def _exponential(alpha: float, scale: float, inner: float) -> Function:
    return Function(
        lambda x, out: _aten.elu.out(x, alpha, scale, inner, out=out),
        lambda g, z, out: _aten.elu_backward.grad_input(g, alpha, scale, inner, False, z, grad_input=out),
    )


def _selu(module: Any) -> Function:
    return _exponential(1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)


def _softplus(module: Any) -> Function:
    beta, threshold = module.beta, module.threshold
    return Function(
        lambda x, out: _aten.softplus.out(x, beta, threshold, out=out),
        lambda g, z, out: _aten.softplus_backward.grad_input(g, z, beta, threshold, grad_input=out),
    )


def _clipped(low: float, high: float) -> Function:
    return Function(
        lambda x, out: torch.clamp(x, low, high, out=out),
        lambda g, z, out: _aten.hardtanh_backward.grad_input(g, z, low, high, grad_input=out),
    )


_FUNCTIONS: dict[type[nn.Module], Callable[[Any], Function]] = {
    nn.ReLU: _relu,
    nn.ReLU6: lambda module: _clipped(0.0, 6.0),
    nn.Hardtanh: lambda module: _clipped(module.min_val, module.max_val),
    nn.LeakyReLU: _leaky_relu,
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.ELU: lambda module: _exponential(module.alpha, 1.0, 1.0),
    nn.SELU: _selu,
    nn.Softplus: _softplus,
}


def function_of(module: nn.Module) -> Function | None:
    """What a layer computes, None where it is no activation of ours."""
    made = _FUNCTIONS.get(type(module))
    return made(module) if made else None
