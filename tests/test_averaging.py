"""Averages of weights: against torch's, by hand, with batch norms, and in fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import goodfit as gf
from goodfit.errors import GoodfitError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = draw(24, 4), draw(24, 1, seed=1)


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.ReLU(), nn.Linear(6, 1)).double()


def steps(run: gf.Run, optimizer: Any, count: int, each: Any = None) -> None:
    for i in range(count):
        rows = slice(6 * (i % 4), 6 * (i % 4) + 6)
        optimizer.zero_grad()
        run.loss(X[rows], Y[rows]).backward()
        optimizer.step()
        if each is not None:
            each()


def start(cocktail: str, norm: bool = False) -> tuple[nn.Sequential, gf.Run, torch.optim.Optimizer]:
    model = net(norm)
    run = gf.Run(cocktail, model, task="numbers", example=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.attach(optimizer)
    return model, run, optimizer


@pytest.mark.parametrize(
    ("cocktail", "average"),
    [("EMA(0.9, warmup=False)", {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}), ("SWA()", {})],
)
def test_averages_are_those_of_torch(cocktail: str, average: dict[str, Any]) -> None:
    model, run, optimizer = start(cocktail)
    theirs = AveragedModel(model, **average)
    if "EMA" in cocktail:
        theirs.update_parameters(model)  # its first update is a copy
    steps(run, optimizer, 9, lambda: theirs.update_parameters(model))
    live = [p.detach().clone() for p in model.parameters()]
    with run.view():
        for mine, other in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(live, model.parameters(), strict=True))


def test_the_warm_up_forgets_the_start() -> None:
    ema, state = gf.EMA(0.999), {"count.w": torch.zeros((), dtype=torch.float64), "mean.w": torch.full((1,), 100.0).double()}
    weights = [1 / 10, 2 / 11, 3 / 12]
    expected = 100.0
    for d, w in zip(weights, (1.0, 2.0, 3.0), strict=True):
        _, state = ema.step({"w": torch.tensor([w]).double()}, {}, {}, state)
        expected = d * expected + (1 - d) * w
    torch.testing.assert_close(state["mean.w"], torch.tensor([expected]).double())


def test_swa_waits_for_its_schedule_and_takes_every_so_many_steps() -> None:
    model, run, optimizer = start("SWA(late(1.0, steps=4), every=2)")
    seen: list[Tensor] = []
    steps(run, optimizer, 4, lambda: seen.append(model[0].weight.detach().clone()))
    with run.view():
        assert torch.equal(model[0].weight, seen[-1])
    steps(run, optimizer, 5, lambda: seen.append(model[0].weight.detach().clone()))
    run.finish()
    torch.testing.assert_close(model[0].weight.detach(), (seen[5] + seen[7]) / 2)


def test_lookahead_by_hand() -> None:
    model, run, optimizer = start("Lookahead(0.5, k=3)")
    plain, _, other = start("L2(0.0)")
    slow = [p.detach().clone() for p in plain.parameters()]
    alone = gf.Run("L2(0.0)", plain, task="numbers")
    for n in range(3):
        rows = slice(6 * n, 6 * n + 6)
        for r, o in ((run, optimizer), (alone, other)):
            o.zero_grad()
            r.loss(X[rows], Y[rows]).backward()
            o.step()
    for mine, fast, s in zip(model.parameters(), plain.parameters(), slow, strict=True):
        torch.testing.assert_close(mine, (s + fast) / 2)


def test_averaged_weights_get_the_statistics_of_the_training_data() -> None:
    model, run, optimizer = start("EMA(0.9)", norm=True)
    steps(run, optimizer, 8)
    loader = [(X[:12], Y[:12]), (X[12:], Y[12:])]
    with pytest.raises(GoodfitError, match=r"EMA\(0.9\) averages weights, for which batch norms need other statistics"):
        run.finish()
    run.finish(loader)
    means = model[1].running_mean.clone()
    torch.testing.assert_close(means, model[0](X).mean(0))
    theirs = AveragedModel(model)
    update_bn([X], theirs)
    torch.testing.assert_close(theirs.module[1].running_mean, means)


@pytest.mark.parametrize("cocktail", ["EMA(0.9)", "SWA(late(1.0, epochs=3))", "Lookahead(0.5)"])
def test_fit_scores_and_gives_the_average(cocktail: str) -> None:
    model = net(norm=True).float()
    found = gf.fit(
        model,
        (X[:18].float(), Y[:18].float()),
        (X[18:].float(), Y[18:].float()),
        f"{cocktail}, EarlyStopping(4)",
        epochs=8,
        batch_size=6,
        progress=False,
    )
    with torch.no_grad():
        assert float(nn.functional.mse_loss(model.eval()(X[18:].float()), Y[18:].float())) == pytest.approx(found.score)


def test_means_of_short_numbers_are_kept_in_float32() -> None:
    one = gf.EMA(0.999, warmup=False)
    state = one.init({"w": torch.ones(1, dtype=torch.bfloat16)}, {})
    assert state["mean.w"].dtype == torch.float32
    for _ in range(1000):
        _, state = one.step({"w": torch.full((1,), 1.5, dtype=torch.bfloat16)}, {}, {}, state)
    weights, _ = one.finish({"w": torch.ones(1, dtype=torch.bfloat16)}, {}, state)
    assert weights["w"].dtype == torch.bfloat16
    assert float(state["mean.w"]) == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-4)
