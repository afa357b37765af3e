"""`goodfit fit --resume RUN`: the fit of a table that was killed, ended or interrupted goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from test_cli import Outcome, goodfit as goodfit, rows, write

COCKTAIL = "L2(1e-4), Dropout(0.3), EarlyStopping(900)"


def words(out: str) -> list[str]:
    return ["fit", "t.csv", "--target", "churn", "--cocktail", COCKTAIL, "--epochs", "900", "--out", out]


def ended_by(number: int, out: str) -> tuple[int, str]:
    """The command in a process of its own, sent a signal once it has saved: its code and its last line."""
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from goodfit.cli import main; main()"
    command = [sys.executable, "-c", start, *words(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    while not list(Path(out, "training", "regularized").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told.strip().splitlines()[-1]


@pytest.fixture
def whole(goodfit: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """The command, in a folder where the same fit has ended by itself in `whole`."""
    write("t.csv", rows())
    assert goodfit(*words("whole"))[0] == 0
    assert not Path("whole", "training").exists()
    return goodfit


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_run(whole: Callable[..., Outcome]) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        out = f"run{number}"
        assert ended_by(number, out)[0] == -number
        for command in (("predict", out, "t.csv", "-o", "p.csv"), ("report", out), tuple(words(out))):
            code, _, told = whole(*command)
            assert code == 2
            assert f"goodfit fit --resume {out}" in told
        code, _, told = whole("fit", "--resume", out)
        assert code == 0
        assert "went on from step" in told
        for name in ("weights.safetensors", "test_predictions.csv", "preprocessing.json"):
            assert Path(out, name).read_bytes() == Path("whole", name).read_bytes()
        code, _, told = whole("fit", "--resume", out)
        assert (code, told) == (
            2,
            f"goodfit: The training of '{out}' has ended, and there is nothing to resume; fit into another --out.\n",
        )


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_to_use_and_to_resume(whole: Callable[..., Outcome]) -> None:
    code, told = ended_by(signal.SIGINT, "run")
    assert (code, told) == (0, "kept: the best weights, of epoch " + told.rsplit(" ", 1)[1])
    assert json.loads(Path("run", "report.json").read_text())["stopped"].startswith("interrupted in epoch")
    assert whole("predict", "run", "t.csv", "-o", "p.csv")[0] == 0
    assert whole("fit", "--resume", "run")[0] == 0
    assert Path("run", "weights.safetensors").read_bytes() == Path("whole", "weights.safetensors").read_bytes()
    assert not Path("run", "training").exists()


@pytest.mark.slow
def test_what_cannot_be_resumed_is_one_line(goodfit: Callable[..., Outcome]) -> None:
    write("t.csv", rows())
    ended_by(signal.SIGKILL, "run")
    said = Path("run", "training", "asked.json")
    asked, table = said.read_text(), Path("t.csv").read_bytes()
    for break_it, message in (
        (
            lambda: Path("t.csv").write_bytes(table.replace(b"Rome", b"Roma")),
            "is no longer the table of 'run' (SHA-256 differs)",
        ),
        (lambda: Path("t.csv").unlink(), "which is not there; put it back"),
        (lambda: said.write_text("{"), "cannot be read as JSON"),
        (
            lambda: said.write_text(asked.replace('"epochs": 900', '"epochs": "many"')),
            "was not written by goodfit (its settings)",
        ),
        (lambda: said.write_text("[]"), "must hold a JSON object"),
    ):
        break_it()
        code, _, told = goodfit("fit", "--resume", "run")
        assert code == 2
        assert message in told
        assert told.count("\n") == 1
        said.write_text(asked)
        Path("t.csv").write_bytes(table)
    for beside in (["t.csv"], ["--epochs", "3"], ["--out", "x"]):
        assert "--resume takes all settings from its run folder" in goodfit("fit", *beside, "--resume", "run")[2]
    assert (
        goodfit("fit", "--resume", "nowhere")[2] == "goodfit: There is no run folder 'nowhere' to resume; fit a table first.\n"
    )
    Path("bare").mkdir()
    assert goodfit("fit", "--resume", "bare")[2] == "goodfit: 'bare' is no run folder; fit a table first.\n"
    assert goodfit("fit", "--resume", "run")[0] == 0


def test_a_fit_needs_a_table_and_a_target(goodfit: Callable[..., Outcome]) -> None:
    assert goodfit("fit")[2] == "goodfit: fit needs a table, or --resume RUN.\n"
    assert goodfit("fit", "t.csv")[2] == "goodfit: fit needs --target, the column to predict, or --resume RUN.\n"


def test_the_rows_of_a_fit_are_logged_while_it_runs(goodfit: Callable[..., Outcome]) -> None:
    write("t.csv", rows())
    command = ("fit", "t.csv", "--target", "churn", "--epochs", "5", "--out", "run", "--log-to", "log.csv")
    assert goodfit(*command)[0] == 0
    lines = Path("log.csv").read_text().splitlines()
    history = json.loads(Path("run", "history.json").read_text())["regularized"]
    assert lines[0] == ",".join(history[0])
    assert len(lines) == 6
    assert "has the rows of another training" in goodfit(*command[:-3], "run2", "--seed", "1", "--log-to", "log.csv")[2]
    assert not Path("run2").exists()
