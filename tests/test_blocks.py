"""Acting block by block gives the bits of acting on whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import goodfit as gf
from goodfit import blocks

COCKTAIL = gf.Cocktail(
    gf.L2(0.1),
    gf.L2SP(0.2),
    gf.WeightDecay(0.1),
    gf.L1(0.05, factors=gf.factors.adaptive()),
    gf.ElasticNet(0.02),
    gf.GroupLasso(0.01),
)


def train(optimizer: str, layout: torch.memory_format, numbers: dict) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(memory_format=layout)
    made = getattr(optim, optimizer)(model.parameters(), lr=0.01, **numbers)
    gf.Run(COCKTAIL, model).attach(made)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(5):
        made.zero_grad()
        model(x).square().sum().backward()
        made.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("RMSprop", {"centered": True}),
        ("Adagrad", {}),
        ("Adadelta", {}),
    ],
    ids=str,
)
def test_blocks_are_the_whole(
    optimizer: str, numbers: dict, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(optimizer, layout, numbers)
    monkeypatch.setattr(blocks, "NUMBERS", 7)
    assert len(blocks.blocks(torch.zeros(5, 8 * 36))) == 206
    for one, other in zip(whole, train(optimizer, layout, numbers), strict=True):
        assert torch.equal(one, other)


def test_what_lies_in_no_row_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "NUMBERS", 2)
    matrix = torch.arange(12.0).view(3, 4)
    assert blocks.blocks(matrix.T) == blocks.blocks(matrix, matrix.T.contiguous().T) == [None]
    assert [blocks.block_of({"a": matrix, "b": 3}, b, matrix)["a"].tolist() for b in blocks.blocks(matrix)][-1] == [10.0, 11.0]
