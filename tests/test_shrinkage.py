"""Shrinkage does what torch's weight_decay does where they overlap, and leaves alone what it should."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import goodfit as gf

X, Y = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3), torch.linspace(0, 1, 8, dtype=torch.float64).view(8, 1)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 25) -> dict[str, torch.Tensor]:
    slower = optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = X.to(model[0].weight.dtype), Y.to(model[0].weight.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        slower.step()
    return model.state_dict()


def groups(model: nn.Module, decay: float) -> list[dict]:
    """What people write by hand: decay on matrices, none on the rest."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [(optim.SGD, {"lr": 0.1}), (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}), (optim.Adam, {"lr": 0.01})],
)
def test_l2_is_torchs_coupled_weight_decay_on_kernels(kind: type[optim.Optimizer], numbers: dict) -> None:
    ours, theirs = net(), net()
    optimizer = kind(ours.parameters(), **numbers)
    gf.Run(gf.L2(0.3), ours).attach(optimizer)
    by_hand = train(theirs, kind(groups(theirs, 0.3), **numbers))
    for name, value in train(ours, optimizer).items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [{"foreach": False}, {"foreach": True}], ids=str)
def test_weight_decay_is_adamw_bit_for_bit(dtype: torch.dtype, numbers: dict) -> None:
    ours, theirs = net(dtype), net(dtype)
    optimizer = optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0, **numbers)
    gf.Run(gf.WeightDecay(0.3), ours).attach(optimizer)
    by_hand = train(theirs, optim.AdamW(groups(theirs, 0.3), lr=0.01, **numbers))
    start = net(dtype).state_dict()
    for name, value in train(ours, optimizer).items():
        assert torch.equal(value, by_hand[name]), name
        assert not torch.equal(value, start[name]), name


def test_weight_decay_reads_the_lr_of_each_group() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in model:
        nn.init.ones_(layer.weight)
    optimizer = optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2}])
    gf.Run(gf.WeightDecay(0.5), model).attach(optimizer)
    (0 * model(torch.ones(1, 1))).sum().backward()
    optimizer.step()
    assert (model[0].weight.item(), model[1].weight.item()) == (1 - 0.1 * 0.5, 1 - 0.2 * 0.5)


def test_l1_makes_exact_zeros_and_shifts_the_rest_by_lam() -> None:
    """½(w − b)² + lam·|w| has its minimum at sign(b)·max(|b| − lam, 0)."""
    b = torch.tensor([[2.0, -0.75, 0.3, -0.1, 0.0]])
    model = nn.Linear(5, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    gf.Run(gf.L1(0.5), model).attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        ((model.weight - b).square().sum() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.5, -0.25, 0.0, 0.0, 0.0]]), rtol=0, atol=1e-12)
    assert (model.weight == 0).sum() == 3


class Everything(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.up = nn.Linear(4, 4), nn.Conv2d(2, 3, 3), nn.ConvTranspose1d(2, 2, 3)
        self.lstm, self.cell, self.pair = nn.LSTM(3, 4, bidirectional=True), nn.GRUCell(3, 4), nn.Bilinear(2, 3, 4)
        self.attention, self.cross = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.batch, self.layer, self.group, self.rms = (
            nn.BatchNorm2d(3),
            nn.LayerNorm((4, 4)),
            nn.GroupNorm(2, 4),
            nn.RMSNorm(4),
        )
        self.slope, self.embedding, self.bag = nn.PReLU(4), nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
        self.scale, self.token = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(1, 1, 4))


SHRUNK = {
    "linear.weight",
    "conv.weight",
    "up.weight",
    "cell.weight_ih",
    "cell.weight_hh",
    "pair.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    *(f"cross.{p}_proj_weight" for p in "qkv"),
    "cross.out_proj.weight",
    *(f"lstm.weight_{a}h_l0{b}" for a in "ih" for b in ("", "_reverse")),
}


@pytest.mark.parametrize("one", [gf.L1(0.5), gf.L2(0.5), gf.WeightDecay(0.5)], ids=str)
def test_by_default_only_kernels_shrink(one: gf.phases.Regularizer) -> None:
    model = Everything()
    before = {n: p.detach().clone().add_(0.01) for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
            p.grad = torch.zeros_like(p)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gf.Run(one, model).attach(optimizer)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == SHRUNK


def test_the_penalty_is_half_the_squared_length() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    assert gf.Run(gf.Cocktail(gf.L2(0.1), gf.L2(0.02)), model).penalty() == pytest.approx(0.12 / 2 * 25, abs=1e-15)
