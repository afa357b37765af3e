"""Lasso, elastic net and group lasso reach their optimum under every optimizer, in whatever way its step is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso
from torch import Tensor, nn, optim

import goodfit as gf
from goodfit.rates import formula_of
from test_rates import OPTIMIZERS

ALPHA, RATIO = 0.15, 0.6
GROUP = 0.35  # λ of each group of 5 columns, before √5


@functools.cache
def problem(seed: int = 0, rows: int = 200, columns: int = 60) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    y = x[:, :6] @ torch.tensor([3.0, -2.0, 1.5, -1.0, 2.5, -3.0], dtype=torch.float64)
    return x, y + torch.randn(rows, generator=draw, dtype=torch.float64) / 2


def half_mse(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (y - x @ w).square().mean() / 2


def descend(
    cocktail: Any, make: Callable[[Any], optim.Optimizer], steps: int, gamma: float, x: Tensor, y: Tensor, batches: int = 1
) -> Tensor:
    """The weights that a plain loop with an attached run and a falling learning rate finds."""
    model = nn.Linear(x.shape[1], 1, bias=False)
    optimizer = make(model.parameters())
    gf.Run(cocktail, model).attach(optimizer)
    slower = optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    parts = [(x[i::batches], y[i::batches]) for i in range(batches)]
    for step in range(steps):
        part = parts[step % batches]
        optimizer.zero_grad()
        half_mse(model.weight[0], *part).backward()
        optimizer.step()
        slower.step()
    return model.weight.detach()[0]


every_optimizer = pytest.mark.parametrize(("kind", "numbers", "steps", "gamma"), OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
def test_the_elastic_net_is_scikit_learns(kind: Any, numbers: dict, steps: int, gamma: float) -> None:
    x, y = problem()
    solved = ElasticNet(alpha=ALPHA, l1_ratio=RATIO, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    w = torch.tensor(solved.coef_)

    def objective(w: Tensor) -> Tensor:
        return half_mse(w, x, y) + ALPHA * (RATIO * w.abs().sum() + (1 - RATIO) / 2 * w.square().sum())

    found = descend(gf.ElasticNet(ALPHA, ratio=RATIO), lambda p: kind(p, **numbers), steps, gamma, x, y)
    assert torch.equal(found == 0, w == 0)
    assert objective(found) <= objective(w) * (1 + 1e-4)


@functools.cache
def group_reference() -> Tensor:
    """The group lasso by block coordinate descent, each block solved by the secular equation in its eigenbasis."""
    x, y = problem()
    w, lam = torch.zeros(60, dtype=torch.float64), GROUP * 5**0.5
    for _ in range(500):
        for start in range(0, 60, 5):
            block = slice(start, start + 5)
            a = x[:, block]
            rest = y - x @ w + a @ w[block]
            curvature, basis = torch.linalg.eigh(a.T @ a / len(y))
            pull = basis.T @ (a.T @ rest / len(y))
            if pull.norm() <= lam:
                w[block] = 0
                continue
            low, high = 0.0, 1e3
            for _ in range(200):
                length = (low + high) / 2
                longer = (pull / (curvature * length + lam)).norm() > 1
                low, high = (length, high) if longer else (low, length)
            w[block] = basis @ (pull * length / (curvature * length + lam))
    return w


@every_optimizer
def test_the_group_lasso_is_the_reference_solution(kind: Any, numbers: dict, steps: int, gamma: float) -> None:
    x, y = problem()
    w = group_reference()
    assert (w.view(12, 5) == 0).all(1).sum() == 10

    def objective(w: Tensor) -> Tensor:
        return half_mse(w, x, y) + GROUP * 5**0.5 * w.view(12, 5).norm(dim=1).sum()

    columns = gf.groups.custom({"weight": [i // 5 for i in range(60)]})
    found = descend(gf.GroupLasso(GROUP, groups=columns), lambda p: kind(p, **numbers), steps, gamma, x, y)
    assert torch.equal(found == 0, w == 0)
    assert objective(found) <= objective(w) * (1 + 1e-4)


@functools.cache
def lasso(seed: int = 0, rows: int = 200, columns: int = 60) -> Tensor:
    x, y = problem(seed, rows, columns)
    solved = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    return torch.tensor(solved.coef_)


def check_lasso(found: Tensor, seed: int = 0, rows: int = 200, columns: int = 60) -> None:
    x, y = problem(seed, rows, columns)
    w = lasso(seed, rows, columns)
    assert torch.equal(found == 0, w == 0)
    ours, best = (half_mse(v, x, y) + ALPHA * v.abs().sum() for v in (found, w))
    assert ours <= best * (1 + 1e-4)


AVERAGING = {
    name: known for name, known in OPTIMIZERS.items() if "m" in name.lower() and name not in ("RMSprop", "RMSprop centered")
}


def falling(steps: int) -> float:
    return 1e-5 ** (1 / steps)


@pytest.mark.parametrize(("kind", "numbers"), [v[:2] for v in AVERAGING.values()], ids=AVERAGING)
def test_minibatches_with_a_falling_lr_find_the_same(kind: Any, numbers: dict) -> None:
    check_lasso(descend(gf.L1(ALPHA), lambda p: kind(p, **numbers), 4000, falling(4000), *problem(), batches=4))


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "RMSprop centered", "Adagrad", "Adagrad lr_decay"])
def test_where_no_gradients_are_averaged_minibatches_let_a_few_zeros_flicker(name: str) -> None:
    """A weight at zero leaves it whenever the gradient of one batch alone exceeds lam; it stays within the noise of a step."""
    kind, numbers, _, _ = OPTIMIZERS[name]
    found, w = descend(gf.L1(ALPHA), lambda p: kind(p, **numbers), 4000, falling(4000), *problem(), batches=4), lasso()
    ours, best = (half_mse(v, *problem()) + ALPHA * v.abs().sum() for v in (found, w))
    assert ours <= best * (1 + 1e-4)
    assert not (found[w != 0] == 0).any()
    assert found[w == 0].abs().max() < 1e-4
    assert (found[w == 0] != 0).sum() <= 6


ONE_STEP_EACH_WAY = [
    (optim.SGD, {"lr": 0.02, "momentum": 0.9}, 600, 1.0),
    (optim.Adam, {"lr": 0.05}, 1000, 0.994),
    (optim.AdamW, {"lr": 0.05, "weight_decay": 0.0, "amsgrad": True}, 1000, 0.994),
    (optim.Adagrad, {"lr": 0.5}, 1200, 1.0),
]


@pytest.mark.parametrize("way", ["foreach", "fused"])
@pytest.mark.parametrize(("kind", "numbers", "steps", "gamma"), ONE_STEP_EACH_WAY, ids=lambda v: getattr(v, "__name__", None))
def test_foreach_and_fused_steps_keep_states_that_the_rate_can_read(
    kind: Any, numbers: dict, steps: int, gamma: float, way: str
) -> None:
    check_lasso(descend(gf.L1(ALPHA), lambda p: kind(p, **numbers, **{way: True}), steps, gamma, *problem()))


@pytest.mark.parametrize(
    "kind", [optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Adadelta, optim.Adagrad]
)
def test_rates_read_steps_and_learning_rates_that_are_tensors(kind: Any) -> None:
    """As capturable states and tensor learning rates are."""
    model = nn.Linear(3, 1)
    plain, tensors = (kind(model.parameters(), lr=0.1) for _ in range(2))
    model(torch.ones(2, 3)).sum().backward()
    for optimizer in (plain, tensors):
        optimizer.step()
    tensors.param_groups[0]["lr"] = torch.tensor(0.1)
    for state in tensors.state.values():
        state["step"] = torch.as_tensor(state["step"]).float()
    for p in model.parameters():
        for one, other in zip(*(formula_of(o)(o.param_groups[0], o.state[p]) for o in (plain, tensors)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("seed", "rows", "columns"), [(1, 100, 20), (2, 150, 100), (3, 400, 30)])
@pytest.mark.parametrize("kind", [optim.Adam, optim.SGD])
def test_other_sizes_and_seeds(kind: Any, seed: int, rows: int, columns: int) -> None:
    numbers = {"lr": 0.05} if kind is optim.Adam else {"lr": 0.02, "momentum": 0.9}
    found = descend(gf.L1(ALPHA), lambda p: kind(p, **numbers), 2000, 0.997, *problem(seed, rows, columns))
    check_lasso(found, seed, rows, columns)


def test_ascent_of_the_negated_objective_finds_the_same() -> None:
    x, y = problem()
    model = nn.Linear(60, 1, bias=False)
    optimizer = optim.Adam(model.parameters(), lr=0.05, maximize=True)
    gf.Run(gf.Cocktail(gf.L1(ALPHA * RATIO), gf.L2(ALPHA * (1 - RATIO))), model).attach(optimizer)
    slower = optim.lr_scheduler.ExponentialLR(optimizer, 0.994)
    for _ in range(1000):
        optimizer.zero_grad()
        (-half_mse(model.weight[0], x, y)).backward()
        optimizer.step()
        slower.step()
    solved = ElasticNet(alpha=ALPHA, l1_ratio=RATIO, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    found, best = model.weight.detach()[0], torch.tensor(solved.coef_)

    def objective(w: Tensor) -> Tensor:
        return half_mse(w, x, y) + ALPHA * (RATIO * w.abs().sum() + (1 - RATIO) / 2 * w.square().sum())

    assert torch.equal(found == 0, best == 0)
    assert objective(found) <= objective(best) * (1 + 1e-4)


def test_groups_of_other_learning_rates_each_have_their_own_threshold() -> None:
    x, y = problem()
    left, right = nn.Linear(30, 1, bias=False), nn.Linear(30, 1, bias=False)
    model = nn.ModuleList([left, right])
    groups = [{"params": left.parameters(), "lr": 0.02}, {"params": right.parameters(), "lr": 0.05, "momentum": 0.5}]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.9)
    gf.Run(gf.L1(ALPHA), model).attach(optimizer)
    for _ in range(800):
        optimizer.zero_grad()
        half_mse(torch.cat([left.weight[0], right.weight[0]]), x, y).backward()
        optimizer.step()
    check_lasso(torch.cat([left.weight[0], right.weight[0]]).detach())


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.SGD])
@pytest.mark.parametrize("one", [gf.L1(0.02), gf.ElasticNet(0.02), gf.GroupLasso(0.02, groups=gf.groups.inputs)], ids=str)
def test_a_category_first_seen_in_step_50_still_learns(one: Any, kind: Any) -> None:
    """A penalty on weights without a gradient may shrink them; once their category comes, they must go where they belong."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = kind(model.parameters(), lr=0.05)
    gf.Run(one, model).attach(optimizer)
    for step in range(600):
        row = torch.eye(4)[[step % 3 if step < 50 else step % 4]]
        optimizer.zero_grad()
        (model(row) - 1).square().sum().backward()
        optimizer.step()
    assert model.weight[0, 3] > 0.6
    assert (model.weight[0] - model.weight[0, 0]).abs().max() < 0.2


@pytest.mark.parametrize("one", [gf.L1(0.1), gf.GroupLasso(0.1), gf.ElasticNet(0.1), gf.MaxNorm(1e-3)], ids=str)
def test_a_branch_that_is_not_used_is_left_alone(one: Any) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    before = model["unused"].weight.detach().clone()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    gf.Run(one, model).attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        model["used"](torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model["unused"].weight, before)


def test_lam_above_its_largest_makes_all_zero_and_they_stay() -> None:
    x, y = problem()
    top = float((x.T @ y / len(y)).abs().max())
    for lam, zeros in ((top * 1.001, 60), (top * 0.98, 59)):
        found = descend(gf.L1(lam), lambda p: optim.SGD(p, lr=0.2), 2000, 1.0, x, y)
        assert (found == 0).sum() == zeros


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """The optimizer makes such a weight nan; the proximal step must not turn it into a zero that looks like sparsity."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    gf.Run(gf.Cocktail(gf.L1(0.5), gf.GroupLasso(0.1, groups=gf.groups.inputs)), model).attach(optimizer)
    model.weight.grad = torch.tensor([[torch.nan, 1.0]])
    optimizer.step()
    assert model.weight[0, 0].isnan()
    assert model.weight[0, 1].isfinite()
