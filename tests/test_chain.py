"""The chain of K members is what vmap over functional_call computes, and what each member computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import goodfit as gf
from goodfit.errors import GoodfitError
from goodfit.layers.dropout import SeededDropout
from goodfit.stack.chain import Chain
from goodfit.stack.chain_plan import chain_of

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "softplus": lambda: nn.Softplus(2.0),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
}


def mlp(*widths: int, activation: Any = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def cocktail(model: nn.Module, x: Tensor, *ingredients: Any) -> nn.Module:
    for one in ingredients:
        one.build(model, x)
    return model


def members(model: nn.Module, count: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Different weights, statistics, rates and seeds for each; the first drops nothing."""
    at = torch.Generator().manual_seed(seed)
    params = {
        n: (p.detach() + 0.3 * torch.randn(count, *p.shape, generator=at)).requires_grad_(p.requires_grad)
        for n, p in model.named_parameters()
    }
    buffers = {}
    for name, b in model.named_buffers():
        stacked = b.detach().expand(count, *b.shape).clone()
        if name.endswith("rate"):
            stacked = torch.linspace(0, 0.6, count, dtype=b.dtype)
        elif name.endswith("seed"):
            stacked = torch.arange(count) * 7 + 1
        elif name.endswith(("mean", "var")):
            stacked += torch.rand(stacked.shape, generator=at)
        buffers[name] = stacked
    return params, buffers


def by_vmap(model: nn.Module, params: Any, buffers: Any, x: Tensor, own: bool) -> Tensor:
    def one(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(model, (params, buffers), (x,))

    return torch.func.vmap(one, (0, 0, 0 if own else None))(params, buffers, x)


def by_loop(model: nn.Module, params: Any, buffers: Any, x: Tensor, own: bool) -> Tensor:
    outputs = []
    for k in range(len(next(iter(params.values())))):
        rewind(model)
        mine = {n: b[k] for n, b in buffers.items()}
        outputs.append(functional_call(model, ({n: p[k] for n, p in params.items()}, mine), (x[k] if own else x,)))
    return torch.stack(outputs)


def rewind(model: nn.Module) -> None:
    """Let the layers draw once more what they drew."""
    for layer in model.modules():
        if isinstance(layer, SeededDropout):
            layer.clock.rewind()


def result(way: Any, model: nn.Module, params: Any, buffers: Any, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    """Outputs, statistics and gradients of one way, of a loss that looks at every output."""
    rewind(model)
    buffers = {n: b.clone() for n, b in buffers.items()}
    x = x.clone().requires_grad_(x.requires_grad)
    y = way(params, buffers, x) if isinstance(way, Chain) else way(model, params, buffers, x, *rest)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = {n: p for n, p in (*params.items(), ("x", x)) if p.requires_grad}
    found = dict(zip(leaves, torch.autograd.grad((y.sin() * weights).sum(), list(leaves.values())), strict=True))
    return {"outputs": y.detach(), **{f"d {n}": g for n, g in found.items()}, **buffers}


def agree(model: nn.Module, x: Tensor, count: int, own: bool = False, tolerance: float = 1e-12, size: int = 0) -> None:
    chain = chain_of(model)
    assert chain is not None
    chain.part_bytes = size or chain.part_bytes
    params, buffers = members(model, count)
    ours = result(chain, model, params, buffers, x)
    for way in (by_vmap, by_loop):
        theirs = result(way, model, params, buffers, x, own)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


FULL = (gf.BatchNorm(), gf.Dropout(0.3))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", [0, 1])  # one part for all members, and one for each
def test_a_full_cocktail(own: bool, count: int, size: int) -> None:
    x = torch.randn(count, 13, 4) if own else torch.randn(13, 4)
    agree(cocktail(mlp(4, 6, 5, 3), torch.zeros(3, 4), *FULL), x, count, own, size=size)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, training: bool) -> None:
    for ingredients in ((), (gf.Dropout(0.3),), FULL):
        model = cocktail(mlp(4, 6, 5, 3, activation=ACTIVATIONS[name]), torch.zeros(3, 4), *ingredients)
        agree(model.train(training), torch.randn(9, 4, requires_grad=True), 3)
