"""What a run hears of validations: the view that is scored, files, time, rollback, and why it stops."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import goodfit as gf
from goodfit import EarlyStopping, GoodfitError, Run
from goodfit.stop import Budget, Evidence, Patience, Reason

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
Y = X.sum(1, keepdim=True)


def net(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1))


def step(run: Run, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    run.loss(X, Y).backward()
    run.gradient(optimizer)
    optimizer.step()
    run.step(optimizer)


def started(*cocktail: Any, layers: tuple[nn.Module, ...] = (), **options: Any) -> tuple[Run, torch.optim.Optimizer]:
    run = Run(gf.Cocktail(*cocktail), net(*layers), task="numbers", **options)
    return run, torch.optim.Adam(run.model.parameters(), lr=0.1)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_without_averages_the_view_is_the_model_itself() -> None:
    run, optimizer = started(EarlyStopping(3), layers=(nn.BatchNorm1d(4),))
    step(run, optimizer)
    before = state(run.model)
    with run.view():
        assert same(before, state(run.model))
        assert run.epoch(1.0)


def test_the_view_holds_the_averages_and_the_training_goes_on_behind_it() -> None:
    run, optimizer = started(gf.EMA(0.5, warmup=False), EarlyStopping(3))
    first = state(run.model)
    step(run, optimizer)
    second = state(run.model)
    with run.view():
        inside = state(run.model)
        with run.view():
            assert same(inside, state(run.model))
    torch.testing.assert_close(inside["0.weight"], (first["0.weight"] + second["0.weight"]) / 2)
    assert same(second, state(run.model))


def test_the_training_weights_come_back_when_a_validation_fails() -> None:
    run, optimizer = started(gf.EMA(0.5, warmup=False), EarlyStopping(3), layers=(nn.BatchNorm1d(4),))
    step(run, optimizer)
    before = state(run.model)
    inside = {}

    def failing() -> None:
        with run.view([X]):
            inside.update(state(run.model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not same(before, inside)
    assert same(before, state(run.model))
    with pytest.raises(GoodfitError, match=r"batch norms need other statistics: with run\.view\(train_loader\)"), run.view():
        pass
    assert same(before, state(run.model))
    with run.view([X]):
        run.epoch(1.0)


def test_it_stops_with_a_reason_in_one_word_and_keeps_it_over_a_resume() -> None:
    run, _ = started(EarlyStopping(2))
    assert run.reason is None
    assert [run.epoch(score) for score in (1.0, 1.0, 1.0)] == [True, True, False]
    assert run.reason is Reason.PATIENCE
    again, _ = started(EarlyStopping(2))
    again.load_state_dict(run.state_dict())
    assert (again.reason, again.stopped) == (Reason.PATIENCE, run.stopped)
    patient, _ = started(EarlyStopping(4))
    patient.load_state_dict(run.state_dict())
    assert (patient.reason, patient.stopped) == (None, "")
    assert [patient.epoch(1.0), patient.epoch(1.0)] == [True, False]
    again.go_on()
    assert (again.reason, again.stopped) == (None, "")
    assert again.epoch(0.5)


def test_steps_and_seconds_are_those_of_the_run() -> None:
    run, optimizer = started(EarlyStopping(Patience(3) | Budget(3600), unit="steps"))
    step(run, optimizer)
    assert run.epoch(1.0)
    step(run, optimizer), step(run, optimizer)
    assert run.epoch(1.0)
    step(run, optimizer)
    assert not run.epoch(1.0)
    assert "3 steps" in run.stopped


def test_the_seconds_of_before_count_after_a_resume() -> None:
    run, _ = started(EarlyStopping(Budget(0.2)))
    run.epoch(1.0)
    time.sleep(0.3)
    again, _ = started(EarlyStopping(Budget(0.2)))
    again.load_state_dict(run.state_dict())
    assert not again.epoch(0.5)
    assert again.reason is Reason.BUDGET


def test_what_a_criterion_lacks_is_named_and_the_check_is_not_counted() -> None:
    run, _ = started(EarlyStopping(Evidence()))
    with pytest.raises(GoodfitError, match=r"Evidence needs .*run\.epoch\(score, evidence="):
        run.epoch(1.0)
    assert run.epoch(1.0, evidence=-3.0)
    assert not run.epoch(1.0, evidence=0.1)
    assert run.reason is Reason.EVIDENCE


def test_a_rollback_goes_on_from_the_best_with_moments_anew() -> None:
    run, optimizer = started(EarlyStopping(5, nonfinite="rollback"))
    step(run, optimizer)
    run.epoch(1.0)
    best = state(run.model)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    step(run, optimizer)
    assert run.epoch(math.nan)
    assert same(best, state(run.model))
    step(run, optimizer)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_rollback_behind_a_view_reaches_the_training_and_its_average() -> None:
    run, optimizer = started(gf.EMA(0.5, warmup=False), EarlyStopping(5, nonfinite="rollback"))
    step(run, optimizer)
    with run.view():
        run.epoch(1.0)
        best = state(run.model)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    step(run, optimizer)
    with run.view():
        run.epoch(math.nan)
    assert same(best, state(run.model))
    with run.view():
        assert same(best, state(run.model))


@pytest.mark.parametrize(
    "cocktail", [(EarlyStopping(3),), (gf.EMA(0.5, warmup=False), EarlyStopping(3))], ids=["plain", "averaged"]
)
def test_the_best_in_a_file_is_the_best_in_memory(tmp_path: Path, cocktail: Any) -> None:
    kept = []
    for options in ({}, {"keep": tmp_path / "best.safetensors"}):
        run, optimizer = started(*cocktail, layers=(nn.BatchNorm1d(4),), **options)
        for score in (1.0, 0.5, 0.7, 0.6):
            step(run, optimizer)
            with run.view([X]):
                run.epoch(score)
        stopping = run.states(EarlyStopping)[0][1]
        assert any(name.startswith("weights.") for name in stopping) is not bool(options)
        kept.append(state(run.finish()))
    assert same(*kept)


def test_a_file_is_for_one_early_stopping(tmp_path: Path) -> None:
    for cocktail, count in (((EarlyStopping(3), EarlyStopping(5)), 2), ((gf.L2(0.1),), 0)):
        with pytest.raises(GoodfitError, match=rf"keep= is the file of one EarlyStopping, got {count}"):
            started(*cocktail, keep=tmp_path / "best")


def test_two_early_stoppings_on_one_score_do_not_meet() -> None:
    run, _ = started(EarlyStopping(2), EarlyStopping(Patience(4, min_delta=0.5)))
    went = [run.epoch(score) for score in (1.0, 0.9, 0.8, 0.7, 0.7, 0.7)]
    assert went == [True, True, True, True, False, False]
    assert "by more than 0.5 in 4 checks" in run.stopped
