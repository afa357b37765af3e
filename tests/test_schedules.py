"""Schedules: against torch's, their texts, and as learning rates of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, StepLR

import goodfit as gf
from goodfit.errors import GoodfitError
from goodfit.schedules import cosine, linear, step, warmup


def rates(make: Any, count: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        (cosine(1.0, 0.1, steps=20), lambda o: CosineAnnealingLR(o, 20, eta_min=0.1), 20),
        (cosine(1.0, 0.1, restart=1, steps=7), lambda o: CosineAnnealingWarmRestarts(o, 7, 1, 0.1), 40),
        (cosine(1.0, 0.0, restart=2, steps=15), lambda o: CosineAnnealingWarmRestarts(o, 15, 2, 0.0), 105),
        (step(1.0, factor=0.5, steps=4), lambda o: StepLR(o, 4, 0.5), 30),
        (warmup(1.0, start=0.25, steps=6), lambda o: LinearLR(o, 0.25, 1.0, 6), 12),
        (linear(1.0, 0.5, steps=8), lambda o: LinearLR(o, 1.0, 0.5, 8), 12),
    ],
)
def test_they_are_those_of_torch(ours: Any, theirs: Any, count: int) -> None:
    assert [ours.at(t) for t in range(count)] == pytest.approx(rates(theirs, count), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "cosine(0.5, 0.0, epochs=15)",
        "cosine(0.5, 0.0, restart=2.0, steps=15)",
        "step(0.5, 0.1, factor=0.5, epochs=3)",
        "warmup(0.5, steps=4)",
        "warmup(cosine(0.5, 0.0, epochs=9), start=0.1, epochs=1)",
    ],
)
def test_texts_read_back(text: str) -> None:
    one = gf.parse(f"Dropout({text})")
    assert repr(one[0].p) == text
    assert gf.parse(repr(one)) == one


def test_epochs_become_steps_within_and_without() -> None:
    inner = warmup(cosine(1.0, 0.0, epochs=2), epochs=1).in_steps(5)
    assert inner == warmup(cosine(1.0, 0.0, steps=10), steps=5)
    assert [round(inner.at(t), 3) for t in (0, 5, 10, 15, 99)] == [0.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: cosine(1.0, 0.0, restart=0.5, steps=3), "cosine.restart must be None, or how many times as long"),
        (lambda: step(1.0, factor=1.5, steps=3), "step.factor must lie between 0 and 1"),
        (lambda: step(1.0, 2.0, steps=3), "step goes down from a number > stop"),
        (lambda: warmup("fast", steps=3), "warmup goes between numbers"),
        (lambda: cosine(1.0, 0.0), "cosine needs one of steps= and epochs="),
        (lambda: gf.Dropout(cosine(1.5, 0.0, steps=3)), r"Dropout.p must be in \[0, 1\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, line: str) -> None:
    with pytest.raises(GoodfitError, match=line):
        make()


def noting(seen: list[float]) -> Any:
    """Makes an optimizer that notes the learning rate of each step."""

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.3)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        return optimizer

    return sgd


def fitted(folder: Path | None, epochs: int) -> tuple[gf.Fit, list[float]]:
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    seen: list[float] = []

    schedule = gf.schedules.warmup(gf.schedules.cosine(0.1, 0.0, epochs=3), epochs=1)
    data = ((x[:30], x[:30, 0]), (x[30:], x[30:, 0]))
    options: dict[str, Any] = {"optimizer": noting(seen), "scheduler": schedule, "epochs": epochs}
    options |= {"batch_size": 10, "progress": False}
    if folder is not None:
        options["checkpoints"] = gf.Checkpoints(folder, every=1)
    return gf.fit(nn.Linear(3, 1), *data, "L2(0.01)", **options), seen


def test_a_fit_follows_a_schedule_and_goes_on_with_it(tmp_path: Path) -> None:
    whole, seen = fitted(None, 4)
    schedule = warmup(cosine(0.1, 0.0, steps=9), steps=3)
    assert seen == pytest.approx([schedule.at(t) for t in range(12)])
    fitted(tmp_path, 2)
    again, rest = fitted(tmp_path, 4)
    assert again.resumed == 6
    assert rest == seen[6:]
    assert torch.equal(again.model.weight, whole.model.weight)


def test_schedules_in_epochs_count_steps_of_several_batches() -> None:
    x = torch.randn(40, 3)
    seen: list[float] = []

    data = ((x[:30], x[:30, 0]), (x[30:], x[30:, 0]))
    schedule = gf.schedules.linear(0.3, 0.0, epochs=2)
    options: dict[str, Any] = {"compute": gf.Compute(accumulate=2), "batch_size": 10, "progress": False, "epochs": 2}
    gf.fit(nn.Linear(3, 1), *data, "L2(0.01)", optimizer=noting(seen), scheduler=schedule, **options)
    assert seen == pytest.approx([0.3, 0.225, 0.15, 0.075])


def test_a_learning_rate_below_zero_is_refused() -> None:
    data = (torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(GoodfitError, match="A learning rate must be >= 0"):
        gf.fit(nn.Linear(1, 1), data, data, "L2(0.1)", scheduler=gf.schedules.linear(0.1, -0.1, steps=3), progress=False)


@pytest.mark.parametrize("lrs", [(0.1, 0.001), (0.0,)])
def test_a_schedule_is_of_one_learning_rate(lrs: tuple[float, ...]) -> None:
    data = (torch.zeros(4, 2), torch.zeros(4))
    model = nn.Linear(2, 1)

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs * 2, strict=False)], lr=0.1)

    with pytest.raises(GoodfitError, match="A schedule is the one learning rate of all weights, and the optimizer has lr="):
        gf.fit(model, data, data, "L2(0.1)", optimizer=make, scheduler=cosine(0.1, 0.0, epochs=2), progress=False)
