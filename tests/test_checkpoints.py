"""Checkpoints in anybody's loop: what goes in comes back to the bit, or is refused with everything as it was."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import goodfit as gf
from bits import bits
from goodfit.checkpoints import checkpoints as module

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)).double()


NAMES = ("RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD", "Adafactor", "LBFGS")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW of tensors": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), capturable=False, foreach=False),
    **{name: getattr(torch.optim, name) for name in NAMES},
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) ** 2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_goes_on_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    model = net()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    gf.Checkpoints(tmp_path).watch(model=model, optimizer=optimizer).save(3)
    for _ in range(3):
        step(model, optimizer)
    other = net()
    again = make(other.parameters())
    assert gf.Checkpoints(tmp_path).watch(model=other, optimizer=again).restore() == 3
    for _ in range(3):
        step(other, again)
    assert bits(other.state_dict()) == bits(model.state_dict())


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3, 3]),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 1 / (n + 1)),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "Cosine": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "Plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "Sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "Chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)], o),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_goes_on_where_it_was(make: Any, tmp_path: Path) -> None:
    def course(optimizer: Any, scheduler: Any, times: int) -> list[Any]:
        lrs = []
        for _ in range(times):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
            lrs.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return lrs

    made = []
    for _ in range(2):
        optimizer = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)
        made.append((optimizer, make(optimizer)))
    course(*made[0], 4)
    gf.Checkpoints(tmp_path).watch(optimizer=made[0][0], scheduler=made[0][1]).save(4)
    rest = course(*made[0], 8)
    gf.Checkpoints(tmp_path).watch(optimizer=made[1][0], scheduler=made[1][1]).restore()
    assert course(*made[1], 8) == rest


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(3)

    def draws() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(2).tolist(), torch.rand(2, generator=own).tolist()]

    draws()
    gf.Checkpoints(tmp_path).watch(generator=own).save(1)
    rest = draws()
    draws()
    gf.Checkpoints(tmp_path).watch(generator=own).restore()
    assert draws() == rest


def test_what_is_no_weight_comes_back_too(tmp_path: Path) -> None:
    """Buffers that are not persistent, one of them a cache that has grown; tied weights; a scaler; lists and dicts."""

    def parts() -> dict[str, Any]:
        model = net()
        model.register_buffer("seen", torch.zeros(1), persistent=False)
        model.register_buffer("cache", torch.zeros(2), persistent=False)
        model.tied = nn.Linear(6, 2, bias=False).double()
        model.tied.weight = model[3].weight
        return {"model": model, "scaler": torch.amp.GradScaler("cpu"), "history": [], "best": {"step": 0}}

    saved = parts()
    with torch.no_grad():
        saved["model"].seen.add_(3)
        saved["model"].cache = torch.arange(5.0)
        saved["model"].tied.weight.fill_(0.25)
    saved["scaler"].scale(torch.ones(1))
    saved["scaler"].update(512.0)
    saved["history"].append({"loss": 0.1})
    saved["best"]["step"] = 7
    gf.Checkpoints(tmp_path).watch(**saved).save(1)
    saved["history"].clear()  # what is saved is a copy
    saved["model"].seen.zero_()
    found = parts()
    gf.Checkpoints(tmp_path).watch(**found).restore()
    assert (float(found["model"].seen), found["model"].cache.tolist()) == (3.0, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert found["model"].tied.weight is found["model"][3].weight
    assert found["model"][3].weight.mean().item() == 0.25
    assert found["scaler"].get_scale() == 512.0
    assert (found["history"], found["best"]) == ([{"loss": 0.1}], {"step": 7})


def others() -> dict[str, tuple[dict[str, Any], str]]:
    wide, narrow = nn.Linear(4, 7).double(), net().float()
    return {
        "a part more": ({"more": []}, "was saved of model, optimizer, randomness, and is restored into model, more"),
        "another model": ({"model": wide}, "is of another model: 'weight' is what the saved one had not"),
        "another type": (
            {"model": narrow},
            "is of another model: '0.weight' was (6, 4) of torch.float64, and is (6, 4) of torch.float32",
        ),
        "another optimizer": ({"optimizer": torch.optim.SGD(net().parameters(), 0.1)}, "another optimizer: a AdamW, not a SGD"),
        "fewer weights": (
            {"optimizer": torch.optim.AdamW([nn.Parameter(X)])},
            "is of another training: optimizer does not take",
        ),
    }


@pytest.mark.parametrize("case", others())
def test_another_training_is_refused_with_all_parts_as_they_were(case: str, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    gf.Checkpoints(tmp_path).watch(model=model, optimizer=optimizer).save(1)
    change, message = others()[case]
    mine = net()
    parts = {"model": mine, "optimizer": torch.optim.AdamW(mine.parameters())} | change
    before = bits([copy.deepcopy(part.state_dict()) if hasattr(part, "state_dict") else part for part in parts.values()])
    with pytest.raises(gf.GoodfitError, match=re.escape(message)) as refused:
        gf.Checkpoints(tmp_path).watch(**parts).restore()
    assert "\n" not in str(refused.value)
    assert bits([part.state_dict() if hasattr(part, "state_dict") else part for part in parts.values()]) == before


def test_a_folder_is_used_by_one_training_at_a_time(tmp_path: Path) -> None:
    gf.Checkpoints(tmp_path).watch(a=[1]).save(5)
    fresh = gf.Checkpoints(tmp_path).watch(a=[2])
    with pytest.raises(gf.GoodfitError, match=r"has checkpoints; call restore\(\) first, or give another folder"):
        fresh.save(1)
    process = os.fork()
    if not process:  # another process, with a child of its own that outlives it, as loader workers may
        held = gf.Checkpoints(tmp_path / "held").watch(a=[1])
        if not os.fork():
            time.sleep(3)
            os._exit(0)
        (tmp_path / "ready").touch()
        time.sleep(60)
        del held
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(gf.GoodfitError, match=r"Another process writes checkpoints into .*held"):
        gf.Checkpoints(tmp_path / "held").watch(a=[1])
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    gf.Checkpoints(tmp_path / "held").watch(a=[1]).close()


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"folder": 3}, "Checkpoints.folder must be a path, got a int"),
        ({"folder": "x", "every": 0}, "Checkpoints.every must be an integer >= 1, got every=0"),
        ({"folder": "x", "every": True}, "Checkpoints.every must be an integer >= 1, got every=True"),
        ({"folder": "x", "last": None}, "Checkpoints.last must be an integer >= 1, got last=None"),
    ],
)
def test_settings_that_cannot_be_are_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(gf.GoodfitError, match=re.escape(message)):
        gf.Checkpoints(**given_)


def test_parts_without_a_state_and_places_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gf.GoodfitError, match="lists or dicts; step is a int; put it into a dict"):
        gf.Checkpoints(tmp_path).watch(step=3)
    with pytest.raises(gf.GoodfitError, match="set"):
        gf.Checkpoints(tmp_path).watch(seen={"ids": {1, 2}})
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
        with pytest.raises(gf.GoodfitError, match="The checkpoint cannot be written into"):
            gf.Checkpoints(place).watch(a=[])


def test_other_threads_or_another_torch_are_told(tmp_path: Path) -> None:
    gf.Checkpoints(tmp_path).watch(a=[1]).save(1)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.warns(
            gf.GoodfitWarning, match=f"saved with threads {before}, and goes on with {before + 1}: bits may differ"
        ):
            gf.Checkpoints(tmp_path).watch(a=[1]).restore()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("weights", "cost"), [(10, 0.02), (10**6, 0.5), (10, 3.0)])
def test_saving_takes_two_per_cent_of_the_time_at_most(
    weights: int, cost: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, spent = [0.0], [0.0]

    def write(*_: Any) -> None:
        now[0] += cost
        spent[0] += cost

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    saving = gf.Checkpoints(tmp_path).watch(model=nn.Linear(weights, 1))
    times = []
    for n in range(1, 10**5):
        now[0] += 0.01
        if saving(n):
            times.append(now[0])
    assert spent[0] <= 0.02 * now[0] + cost  # of the first, which nothing could foresee
    assert len(times) > 0.7 * now[0] * 0.02 / cost - 1
    assert times[0] > 0.1
