"""The rows of a training, written down while it runs."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import goodfit as gf

X = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(32, 2)
Y = X[:, :1].sin()


class Killed(Exception):
    pass


class Rows:
    """A logger of a user."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: Any) -> None:
        self.rows.append(row)


def fit(logs: Any, *, after: int = 10**9, epochs: int = 5, **settings: Any) -> gf.Fit:
    calls = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(calls) == after:
            raise Killed
        return F.mse_loss(outputs, y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    given = {"optimizer": lambda p: SGD(p, lr=0.1), "scheduler": lambda o: StepLR(o, 2, 0.5), "loss": loss}
    return gf.fit(
        model, (X, Y), (X, Y), "L2(1e-3), EarlyStopping(9)", epochs=epochs, batch_size=8, logs=logs, **given, **settings
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_logger_gets_the_row_of_every_check() -> None:
    mine, other = Rows(), Rows()
    found = fit([mine, other])
    assert mine.rows == other.rows == found.history
    assert [row["lr"] for row in mine.rows] == [0.1, 0.05, 0.05, 0.025, 0.025]  # behind each epoch's step of the schedule


def test_csv_has_the_numbers_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    found = fit(gf.logs.CSV(path))
    rows = read(path)
    assert list(rows[0]) == list(found.history[0])
    for text, row in zip(rows, found.history, strict=True):
        assert {name: float(value) for name, value in text.items()} == row


def test_a_csv_of_a_training_that_was_killed_goes_on_without_a_row_twice(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "log.csv"
    fit(gf.logs.CSV(whole))
    saves = gf.Checkpoints(tmp_path / "saved", every=7)  # behind steps 7 and 14: the check at 16 is told once more
    with pytest.raises(Killed):
        fit(gf.logs.CSV(path), after=18, checkpoints=saves)
    assert [row["step"] for row in read(path)] == ["4", "8", "12", "16"]
    with path.open("a") as file:
        file.write("5,20,0.1")  # the kill came within a line
    assert fit(gf.logs.CSV(path), checkpoints=saves).resumed == 14
    assert [{**row, "seconds": ""} for row in read(path)] == [{**row, "seconds": ""} for row in read(whole)]


def test_the_log_of_another_training_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    fit(gf.logs.CSV(path))
    text = path.read_text()
    for change in ({"seed": 1, "epochs": 7}, {"check_every": 3}):
        with pytest.raises(gf.GoodfitError, match=r"has the rows of another training, at step [34]; give a free path"):
            fit(gf.logs.CSV(path), **change)
        assert path.read_text() == text
    path.write_text("my notes\n")
    with pytest.raises(gf.GoodfitError, match="is not a log of these rows; give a free path"):
        fit(gf.logs.CSV(path))
    assert path.read_text() == "my notes\n"


def test_a_logger_that_fails_is_left_out_and_the_training_goes_on() -> None:
    class Failing(Rows):
        def log(self, row: Any) -> None:
            super().log(row)
            if len(self.rows) == 2:
                raise ConnectionError("no network\nat all")

    failing, mine = Failing(), Rows()
    with pytest.warns(
        gf.GoodfitWarning, match=r"^Failing\.log failed at step 8 \(no network\), and gets no row from there on\.$"
    ):
        fit([failing, mine])
    assert (len(failing.rows), len(mine.rows)) == (2, 5)


def test_a_place_where_no_log_can_be_is_refused_at_once(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "log.csv", Path("/dev/full")):
        with pytest.raises(gf.GoodfitError, match="give a file in a folder that exists"):
            gf.logs.CSV(place)


@pytest.mark.parametrize("wrong", [3, "log.csv", gf.logs.CSV, [Rows(), None]], ids=repr)
def test_what_is_no_logger_is_refused_before_training(wrong: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=r"logs must be loggers, with a method log\(row\), such as gf.logs.CSV"):
        fit(wrong)


def test_tensorboard_has_the_scalars_by_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    saves = gf.Checkpoints(tmp_path / "saved", every=7)
    with pytest.raises(Killed):
        fit(gf.logs.TensorBoard(tmp_path / "board"), after=18, checkpoints=saves)
    found = fit(gf.logs.TensorBoard(tmp_path / "board"), checkpoints=saves)
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("train_loss", "valid_loss", "lr", "epoch"):
        told = [(one.step, pytest.approx(one.value, rel=1e-6)) for one in events.Scalars(name)]
        assert [(row["step"], row[name]) for row in found.history] == told


def test_a_missing_tensorboard_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(gf.GoodfitError) as refused:
        gf.logs.TensorBoard("board")
    assert str(refused.value) == 'gf.logs.TensorBoard needs tensorboard; pip install "goodfit[tensorboard]".'
    assert not os.path.exists("board")
