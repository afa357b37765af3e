"""A fit that is saved goes on, wherever it was ended, with the bits of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import goodfit as gf

COCKTAIL = "L2(1e-3), L1(1e-4), Dropout(0.3), MaxNorm(3.0), WeightDecay(0.01), EarlyStopping(4)"


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, :1] + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64))


TRAIN, VALID = rows(41, 0), rows(20, 1)


class Augmented(Dataset[Any]):
    """Rows with noise from every global generator there is."""

    def __len__(self) -> int:
        return len(TRAIN[1])

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(4, dtype=torch.float64) + float(np.random.rand()) + random.random()
        return TRAIN[0][i] + 0.1 * noise, TRAIN[1][i]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def seeded() -> None:
    random.seed(5)
    np.random.seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TRAIN,
    "dataset": lambda: TensorDataset(TRAIN[0], TRAIN[1][:, 0].unsqueeze(1)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(TensorDataset(*TRAIN), 8, shuffle=True, generator=torch.Generator().manual_seed(7)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW, cosine": {
        "optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
        "scheduler": lambda o: CosineAnnealingLR(o, 6),
    },
    "SGD, one cycle": {
        "optimizer": lambda p: SGD(p, lr=1e-2, momentum=0.9),
        "scheduler": lambda o: OneCycleLR(o, 0.05, total_steps=40),
        "scheduler_unit": "steps",
        "check_every": 4,
    },
    "plateau": {"scheduler": lambda o: ReduceLROnPlateau(o, patience=0)},
}
STOPPING: dict[str, Any] = {"epochs": 60, "optimizer": lambda p: SGD(p, lr=0.2)}


class Killed(Exception):
    """What a test ends a training by, in place of the machine."""


def ended(after: int) -> Callable[[Any, Tensor], Tensor]:
    """A loss function that fails at one training step."""
    steps = itertools.count(1)

    def loss(outputs: Any, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) > after:
            raise Killed
        return F.mse_loss(outputs, y)

    return loss


def trained(folder: Any, data: Any, after: int = 10**9, model: nn.Module | None = None, **settings: Any) -> gf.Fit:
    seeded()
    saves = None if folder is None else gf.Checkpoints(folder, every=1)
    given = {"epochs": 6, "batch_size": 8, "cocktail": COCKTAIL} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "train has 41 rows", gf.GoodfitWarning)
        return gf.fit(model or net(), data, VALID, checkpoints=saves, **({"loss": ended(after)} | given))


def told(found: gf.Fit) -> tuple[Any, ...]:
    """All of a fit but its times."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in found.history]
    return history, found.stopped, found.score, found.best_epoch, found.reason, found.refit


def same(one: gf.Fit, other: gf.Fit) -> None:
    assert told(one) == told(other)
    for pair in zip((one.model, one.validated), (other.model, other.validated), strict=True):
        here, there = ({} if m is None else m.state_dict() for m in pair)
        assert here.keys() == there.keys()
        assert [name for name, t in here.items() if not torch.equal(t, there[name])] == []


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_training_that_ended_at_any_step_goes_on_with_the_same_bits(
    loader: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = trained(None, LOADERS[loader](), **settings)
    steps = whole.history[-1]["step"]
    for after in [*range(1, 8), steps - 1]:
        with pytest.raises(Killed):
            trained(tmp_path / str(after), LOADERS[loader](), after, **settings)
        found = trained(tmp_path / str(after), LOADERS[loader](), **settings)
        same(found, whole)
        assert found.resumed == after


def test_workers_that_augment_go_on_too(tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(Augmented(), batch_size=8, shuffle=True, drop_last=True, num_workers=2)

    settings = SETTINGS["SGD, one cycle"] | {"epochs": 3}
    whole = trained(None, loader(), **settings)
    with pytest.raises(Killed):
        trained(tmp_path, loader(), 7, **settings)
    same(trained(tmp_path, loader(), **settings), whole)


def test_saving_changes_no_bit(tmp_path: Path) -> None:
    same(trained(tmp_path, TRAIN), trained(None, TRAIN))


def test_a_training_that_ended_gives_the_same_again(tmp_path: Path) -> None:
    first = trained(tmp_path, TRAIN, **STOPPING)
    assert first.reason is gf.stop.Reason.PATIENCE
    again = trained(tmp_path, TRAIN, 0, **STOPPING)  # no step is left
    same(again, first)
    assert again.resumed == first.history[-1]["step"]


def test_more_epochs_and_more_patience_go_on(tmp_path: Path) -> None:
    trained(tmp_path / "epochs", TRAIN, epochs=2)
    same(trained(tmp_path / "epochs", TRAIN, epochs=6), trained(None, TRAIN, epochs=6))
    stopped = trained(tmp_path / "patience", TRAIN, **STOPPING)
    patient = STOPPING | {"cocktail": COCKTAIL.replace("EarlyStopping(4)", "EarlyStopping(9)")}
    found, whole = trained(tmp_path / "patience", TRAIN, **patient), trained(None, TRAIN, **patient)
    assert found.resumed == stopped.history[-1]["step"] < whole.history[-1]["step"]
    left = len(stopped.history)  # before, the rows tell of less patience
    assert [row["valid_loss"] for row in found.history] == [row["valid_loss"] for row in whole.history]
    same(replace(found, history=found.history[left:]), replace(whole, history=whole.history[left:]))


@pytest.mark.parametrize("after", [5, 20, 41, 44])  # two in the training, two in the refit
@pytest.mark.parametrize("how", ["steps", "epochs"])
def test_a_refit_goes_on_from_the_same_beginning(how: str, after: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"refit": how, "epochs": 8}
    whole = trained(None, TRAIN, **settings)
    assert whole.history[-1]["step"] == 40
    with pytest.raises(Killed):
        trained(tmp_path, TRAIN, after, **settings)
    torch.manual_seed(4)  # another process begins with other numbers
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    same(trained(tmp_path, TRAIN, model=other, **settings), whole)


def signalled(number: int, after: int) -> Callable[[Any, Tensor], Tensor]:
    steps = itertools.count(1)

    def loss(outputs: Any, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) == after:
            signal.raise_signal(number)
        return F.mse_loss(outputs, y)

    return loss


def interrupted(folder: Path, after: int) -> gf.Fit:
    return trained(folder, TRAIN, loss=signalled(signal.SIGINT, after))


def test_ctrl_c_saves_behind_its_step_gives_the_best_and_the_training_goes_on(tmp_path: Path) -> None:
    found = interrupted(tmp_path, 13)
    assert found.stopped == "interrupted in epoch 3"
    assert found.kept == min(found.history, key=lambda row: row["valid_loss"])
    assert [path.name for path in sorted(tmp_path.glob("step-*"), reverse=True)] == ["step-000000013", "step-000000012"]
    same(trained(tmp_path, TRAIN), trained(None, TRAIN))


def test_ctrl_c_before_the_first_check_is_saved_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="interrupted before the first check"):
        interrupted(tmp_path, 2)
    same(trained(tmp_path, TRAIN), trained(None, TRAIN))


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    def loss(outputs: Any, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(steps) == 13:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not at once")
        return F.mse_loss(outputs, y)

    steps = itertools.count(1)
    found = trained(tmp_path, TRAIN, loss=loss)
    assert found.stopped == "interrupted in epoch 3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_user_and_another_thread_are_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        found = trained(None, TRAIN, loss=signalled(signal.SIGINT, 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    assert found.stopped == ""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trained, None, TRAIN).result().stopped == ""


class Shuffled(Sampler[int]):
    """An order that no generator tells."""

    def __init__(self) -> None:
        self.secret = random.Random()

    def __len__(self) -> int:
        return len(TRAIN[1])

    def __iter__(self) -> Iterator[int]:
        return iter(self.secret.sample(range(len(self)), len(self)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": (TRAIN[0][:30], TRAIN[1][:30])},
            "on [5, 3] batches of train and valid, and here are [4, 3]",
        ),
        ({"data": (TRAIN[0], TRAIN[1] + 1)}, "saved behind batch 1 of epoch 2, and train gives another one there"),
        ({"seed": 1}, "make the run with seed=0"),
        ({"optimizer": lambda p: SGD(p, lr=0.1)}, "saved with another optimizer: a AdamW, not a SGD"),
        ({"cocktail": "L2(1e-3), EarlyStopping(4)"}, "The state of another cocktail or model"),
        ({"scheduler": lambda o: CosineAnnealingLR(o, 6)}, "name the same parts"),
    ],
)
def test_another_training_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, TRAIN, 6)
    with pytest.raises(gf.GoodfitError, match=re.escape(message)) as refused:
        trained(tmp_path, **({"data": TRAIN} | change))
    assert "\n" not in str(refused.value)
    same(trained(tmp_path, TRAIN), trained(None, TRAIN))


def test_an_order_that_no_generator_tells_is_refused(tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(TensorDataset(*TRAIN), 8, sampler=Shuffled(), drop_last=True)

    with pytest.raises(Killed):
        trained(tmp_path, loader(), 8)
    with pytest.raises(gf.GoodfitError, match="an order that comes from a generator"):
        trained(tmp_path, loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoints": 3}, "checkpoints must be a folder or gf.Checkpoints(folder, ...), got a int"),
        ({"checkpoints": "x", "keep": "y"}, "leave keep out"),
        ({"scheduler": 3}, "or a function from the optimizer to a scheduler of torch, got a int"),
        ({"scheduler": lambda o: 3}, "scheduler must give a scheduler of torch for the optimizer that trains, got a int"),
        ({"scheduler_unit": "batches"}, "scheduler_unit must be 'epochs' or 'steps', got scheduler_unit='batches'"),
        (
            {"scheduler": CosineAnnealingLR(SGD([nn.Parameter(torch.zeros(1))], 0.1), 3)},
            "for the optimizer that trains, got one of another optimizer",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gf.GoodfitError, match=re.escape(message)):
        gf.fit(net(), TRAIN, VALID, COCKTAIL, **settings)


def test_workers_that_persist_cannot_be_found_again(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*TRAIN), 8, drop_last=True, num_workers=1, persistent_workers=True)
    with pytest.raises(gf.GoodfitError, match="persistent_workers=False, or leave checkpoints out"):
        trained(tmp_path, loader)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "kill.py"
    command = [sys.executable, str(script), "--kills", "100", "--out", str(tmp_path / "kill.csv")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 kills" in done.stdout
