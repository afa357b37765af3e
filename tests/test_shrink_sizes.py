"""What one run shows as constant may hold for that run alone: numbers of rows, lengths, sizes, and branches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import goodfit as gf


class Scaled(nn.Module):
    """Three dead units that emit their bias, times something that the input decides."""

    def __init__(self, factor: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(6, 10), nn.Linear(10, 4), factor
        nn.init.zeros_(self.a.weight[:3].detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.factor(x))


FACTORS: dict[str, Callable[[Tensor], Any]] = {
    "length": lambda x: x.shape[1],
    "rows": lambda x: len(x),
    "root of the length": lambda x: x.shape[1] ** -0.5,
    "a tensor of the length": lambda x: x.new_tensor(x.shape[1]),
    "ones, summed": lambda x: torch.ones_like(x[:, :, :1]).sum(1, keepdim=True),
    "places, averaged": lambda x: torch.arange(x.shape[1]).double().mean(),
    "a branch": lambda x: 1.0 if x.sum() > 0 else 2.0,
    "a count": lambda x: len((x > 0).nonzero()),
    "a list": lambda x: sum(x.flatten().tolist()),
    "an array": lambda x: float(x.numpy().mean()),
}


def untouched_or_equal(model: nn.Module, example: Tensor, fresh: list[Tensor]) -> None:
    """Shrinking either refuses and leaves the model, or the model says the same on fresh inputs."""
    truth = [model(x).detach().clone() for x in [example, *fresh]]
    with suppress(gf.GoodfitError):
        gf.shrink(model, example)
    for x, before in zip([example, *fresh], truth, strict=True):
        torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_a_number_of_the_input_is_no_constant(factor: Callable[[Tensor], Any]) -> None:
    draw = torch.Generator().manual_seed(1)
    fresh = [torch.randn(shape, generator=draw) * s for shape in ((1, 9, 6), (3, 1, 6), (2, 4, 6)) for s in (0.5, -3.0)]
    untouched_or_equal(Scaled(factor).eval(), torch.randn(2, 4, 6, generator=draw), fresh)


class Gated(nn.Module):
    """A network that only decides which of two others runs."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        self.p, self.q, self.decide = nn.Linear(6, 4), nn.Linear(6, 4), decide

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) if self.decide(self.gate(x).mean()) else self.q(x)


DECIDE = {
    "bool": lambda g: g > 0,
    "item": lambda g: g.item() > 0,
    "tolist": lambda g: g.tolist() > 0,
    "numpy": lambda g: g.detach().numpy() > 0,
    "nonzero": lambda g: len((g > 0).nonzero()) > 0,
}


@pytest.mark.parametrize("decide", DECIDE.values(), ids=DECIDE)
def test_a_network_that_decides_a_branch_stays_whole(decide: Callable[[Tensor], bool]) -> None:
    model = Gated(decide)
    before = [p.detach().clone() for p in model.parameters()]
    assert gf.shrink(model, torch.randn(8, 6)).removed == ()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_borders_of_constants_at_another_image_size(side: int) -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 1
        model[1].weight[0] = -1
        model[1].weight[0, 0, 0] = 3
        model[1].weight[0, 0, 2] = -2.5
    fresh = [torch.randn(2, 3, *size) for size in ((1, 1), (2, 2), (5, 7), (9, 9), (16, 12))]
    untouched_or_equal(model, torch.randn(2, 3, side, side), fresh)


def test_a_buffer_that_counts_calls_is_as_before() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))
            nn.init.zeros_(self.a.weight[0].detach())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(torch.relu(self.a(x)))

    model = Counting()
    gf.shrink(model, torch.randn(2, 3))
    assert model.calls == 0
    assert model.a.out_features == 3


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(gf.GoodfitError, match="in this order"):
        gf.shrink(torch.relu, torch.ones(1))
