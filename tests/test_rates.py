"""The proximal step finds the lasso under every optimizer whose rate is known, and refuses the others by name."""

from __future__ import annotations

import functools

import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor, nn, optim

import goodfit as gf

ALPHA = 0.15


@functools.cache
def lasso() -> tuple[Tensor, Tensor, Tensor]:
    """A regression on 60 columns of which 6 matter, and scikit-learn's weights for it: 54 exact zeros."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 60, generator=draw, dtype=torch.float64)
    y = x[:, :6] @ torch.tensor([3.0, -2.0, 1.5, -1.0, 2.5, -3.0], dtype=torch.float64)
    y = y + torch.randn(200, generator=draw, dtype=torch.float64) / 2
    solved = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    return x, y, torch.tensor(solved.coef_)


def objective(w: Tensor) -> Tensor:
    x, y, _ = lasso()
    return (y - x @ w).square().mean() / 2 + ALPHA * w.abs().sum()


OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.1}, 300, 1.0),
    "SGD momentum": (optim.SGD, {"lr": 0.02, "momentum": 0.9}, 600, 1.0),
    "SGD strong momentum": (optim.SGD, {"lr": 0.002, "momentum": 0.99}, 1200, 1.0),
    "SGD dampening": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}, 600, 1.0),
    "SGD nesterov": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}, 600, 1.0),
    "Adam": (optim.Adam, {"lr": 0.05}, 1000, 0.994),
    "AdamW": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}, 1000, 0.994),
    "AMSGrad": (optim.Adam, {"lr": 0.05, "amsgrad": True}, 1000, 0.994),
    "NAdam": (optim.NAdam, {"lr": 0.05}, 1000, 0.994),
    "RMSprop": (optim.RMSprop, {"lr": 0.03}, 1000, 0.995),
    "RMSprop centered": (optim.RMSprop, {"lr": 0.02, "centered": True}, 1000, 0.994),
    "RMSprop momentum": (optim.RMSprop, {"lr": 0.005, "momentum": 0.9}, 1000, 0.994),
    "RMSprop both": (optim.RMSprop, {"lr": 0.005, "momentum": 0.5, "centered": True, "eps": 0.1}, 1500, 0.997),
    "Adagrad": (optim.Adagrad, {"lr": 0.5}, 1200, 1.0),
    "Adagrad lr_decay": (optim.Adagrad, {"lr": 0.5, "lr_decay": 1e-3}, 1200, 1.0),
    "Adamax": (optim.Adamax, {"lr": 0.1}, 1000, 0.997),
    "RAdam": (optim.RAdam, {"lr": 0.1}, 1000, 0.997),
    "Adadelta": (optim.Adadelta, {"lr": 1.0}, 2000, 1.0),
}


@pytest.mark.parametrize(("kind", "numbers", "steps", "gamma"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_l1_reaches_the_zeros_and_the_objective_of_scikit_learn(
    kind: type[optim.Optimizer], numbers: dict, steps: int, gamma: float
) -> None:
    x, y, solved = lasso()
    assert (solved == 0).sum() == 54
    model = nn.Linear(60, 1, bias=False)
    optimizer = kind(model.parameters(), **numbers)
    gf.Run(gf.L1(ALPHA), model).attach(optimizer)
    slower = optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x)[:, 0] - y).square().mean() / 2).backward()
        optimizer.step()
        slower.step()
    found = model.weight.detach()[0]
    assert torch.equal(found == 0, solved == 0)
    assert objective(found) <= objective(solved) * (1 + 1e-4)


def test_a_strong_penalty_on_a_summed_loss_is_not_capped_under_sgd() -> None:
    """min over w of 50·(w − 1)² + 30·|w| lies at 1 − 30/100; the threshold 30·lr is beyond ten steps of lr."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.005)
    gf.Run(gf.L1(30.0), model).attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (50 * (model.weight - 1).square().sum()).backward()
        optimizer.step()
    assert model.weight.item() == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adamax, optim.Adagrad, optim.NAdam, optim.Adadelta])
def test_weights_without_a_gradient_yet_are_not_wiped_out(kind: type[optim.Optimizer]) -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = kind(model.parameters(), lr=0.01)
    gf.Run(gf.L1(0.01), model).attach(optimizer)
    model(torch.tensor([[1.0, 1.0, 0.0]])).sum().backward()  # the third column is a category that this batch lacks
    optimizer.step()
    assert 0.9 - 1e-12 <= model.weight[0, 2].item() < 1


def test_in_bfloat16_the_rate_survives_the_bias_correction() -> None:
    """After one Adam step with gradient g the rate is lr/|g|; 1 − 0.999 would be 0 in bfloat16, and the rate with it."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = optim.Adam(model.parameters(), lr=0.25)
    gf.Run(gf.L1(2.0), model).attach(optimizer)
    (2 * model.weight.sum()).backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(1 - 0.25 - 2.0 * 0.25 / 2)


class Home(optim.Adam):
    """An Adam with a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


class Named(optim.Adam):
    """An Adam that only has another name."""


@pytest.mark.parametrize("kind", [optim.LBFGS, optim.Rprop, optim.ASGD, optim.SparseAdam, optim.Adafactor, Home])
def test_an_optimizer_without_a_known_rate_is_refused_by_name(kind: type[optim.Optimizer]) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(gf.GoodfitError, match=kind.__name__):
        gf.Run(gf.L1(0.1), model).attach(kind(model.parameters()))


def test_a_subclass_that_inherits_its_step_counts_as_its_parent() -> None:
    made = []
    for kind in (optim.Adam, Named):
        torch.manual_seed(1)
        model = nn.Linear(2, 1)
        optimizer = kind(model.parameters(), lr=0.1)
        gf.Run(gf.L1(0.5), model).attach(optimizer)
        model(torch.tensor([[0.3, -0.2]])).sum().backward()
        optimizer.step()
        made.append(model.weight.detach())
    assert torch.equal(*made)


def test_penalties_and_decay_need_no_rate() -> None:
    model = nn.Linear(2, 1)
    optimizer = optim.Rprop(model.parameters())
    gf.Run(gf.Cocktail(gf.L2(0.1), gf.WeightDecay(0.1)), model).attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
