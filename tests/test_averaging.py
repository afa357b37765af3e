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


def test_several_optimizers_count_their_own_steps() -> None:
    def trained(cocktail: str, each: Any = None) -> nn.Sequential:
        model = net()
        run = gf.Run(cocktail, model, task="numbers", example=X)
        a, b = (torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 2))
        run.attach(a, b)
        for i in range(4):
            model.zero_grad()
            run.loss(X[6 * i : 6 * i + 6], Y[6 * i : 6 * i + 6]).backward()
            a.step()
            b.step()
            if each is not None:
                each(model)
        return run.finish()

    seen: list[dict[str, Tensor]] = []
    averaged = trained("SWA()", lambda model: seen.append({n: t.clone() for n, t in model.state_dict().items()}))
    for name, t in averaged.state_dict().items():
        torch.testing.assert_close(t, torch.stack([one[name] for one in seen]).mean(0))
    still, start = trained("Lookahead(0.0, k=2)"), net()
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), start.parameters(), strict=True))


def test_weights_that_rest_in_a_step_are_averaged_too() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    model = Heads().double()
    run = gf.Run("SWA()", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    seen = []
    for i in range(8):
        optimizer.zero_grad()
        (model.a if i % 2 else model.b)(X).square().mean().backward()
        optimizer.step()
        seen.append((model.a.weight.detach().clone(), model.b.weight.detach().clone()))
    run.finish()
    for got, iterates in zip((model.a, model.b), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(got.weight.detach(), torch.stack(iterates).mean(0))


def test_two_averages_of_one_weight_are_refused() -> None:
    with pytest.raises(GoodfitError, match=r"EMA and SWA would both give an average of 0\.weight, and one of them be lost"):
        gf.Run("EMA(0.9), SWA()", net())
    gf.Run("EMA(0.9, where=kernels), SWA(where=biases)", net())


def test_averages_follow_whatever_stands_behind_them() -> None:
    found = []
    for cocktail in ("SWA(), MaxNorm(0.3)", "MaxNorm(0.3), SWA()"):
        model, run, optimizer = start(cocktail)
        steps(run, optimizer, 9)
        found.append(run.finish().state_dict())
        assert float(model[0].weight.detach().norm(dim=1).max()) <= 0.3 + 1e-12
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_an_average_is_of_what_slow_weights_leave() -> None:
    model, run, optimizer = start("SWA(), Lookahead(0.5, k=2)")
    seen: list[Tensor] = []
    steps(run, optimizer, 6, lambda: seen.append(model[0].weight.detach().clone()))
    torch.testing.assert_close(run.finish()[0].weight.detach(), torch.stack(seen).mean(0))


@pytest.mark.parametrize("cocktail", ["EMA(0.9)", "SWA()", "Lookahead(0.5, k=4)"])
def test_what_follows_the_weights_goes_back_with_them(cocktail: str) -> None:
    model, run, optimizer = start(f"{cocktail}, EarlyStopping(9, nonfinite='rollback')")
    steps(run, optimizer, 4)
    with run.view():
        run.epoch(1.0)
    best = [p.detach().clone() for p in run.model.parameters()] if "Look" in cocktail else None
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    steps(run, optimizer, 1)
    with run.view():
        run.epoch(float("nan"))
    for name, t in run.state_dict().items():
        if "mean." in name or "slow." in name:
            assert float(t.abs().max()) < 10, name
    assert best is None or all(torch.equal(a, b) for a, b in zip(best, model.parameters(), strict=True))


def test_an_average_that_has_not_begun_is_told() -> None:
    _, run, optimizer = start("SWA(late(1.0, steps=100))")
    steps(run, optimizer, 4)
    with pytest.warns(gf.GoodfitWarning, match=r"SWA\(late\(1.0, steps=100\)\) has averaged nothing in 4 steps"):
        run.finish()


def test_averaged_weights_keep_the_norm_that_spectral_norm_gives() -> None:
    model, run, optimizer = start("SpectralNorm(), EMA(0.5)")
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    steps(run, optimizer, 12)
    run.finish().eval()
    for layer in (model[0], model[2]):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, abs=1e-3)
