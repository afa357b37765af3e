"""`torchrun --nproc-per-node 2 -m goodfit fit ...`: one command in several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from goodfit.cli import app
from test_cli import rows, write

COCKTAIL = "L2(1e-4), Dropout(0.3), BatchNorm(sync=True), EarlyStopping(60)"


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("t.csv", rows())


def launched(count: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "goodfit"]
    ways = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, **ways)


def fit(out: str) -> tuple[str, ...]:
    return ("fit", "t.csv", "--target", "churn", "--cocktail", COCKTAIL, "--epochs", "60", "--out", out)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, told = process.communicate(timeout=120)
    return process.returncode, out, told


def members(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def lives(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def history(out: str) -> list[dict[str, float]]:
    rows = json.loads(Path(out, "history.json").read_text())
    return [row | {"seconds": 0} for name in rows for row in rows[name]]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the list of processes of Linux")
def test_a_killed_process_ends_all_and_the_training_goes_on() -> None:
    code, out, told = ended(launched(2, *fit("whole")))
    assert code == 0, told
    assert (out.count("run folder"), told.count("split: train")) == (1, 1)  # one process speaks
    assert not Path("whole", "training").exists()
    for which in (0, 1):
        out = f"run{which}"
        process = launched(2, *fit(out))
        while not list(Path(out, "training", "regularized").glob("step-*")):
            assert process.poll() is None
            time.sleep(0.02)
        victim, other = (members(process)[i] for i in (which, 1 - which))
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        while lives(other):
            time.sleep(0.01)
        assert time.monotonic() - began < 5
        code, _, told = ended(process)
        lines = [line for line in told.splitlines() if line.startswith("goodfit:")]
        assert code != 0
        assert len(lines) == 1
        assert "Another of the 2 processes" in lines[0]
        assert lines[0].endswith(f"goodfit fit --resume {out} goes on.")
        code, _, told = ended(launched(2, "fit", "--resume", out))
        assert code == 0, told
        for name in ("weights.safetensors", "test_predictions.csv"):
            assert Path(out, name).read_bytes() == Path("whole", name).read_bytes()
        assert history(out) == history("whole")


def test_bad_input_is_one_line_of_all() -> None:
    for words, text in (
        ((*fit("out")[:3], "chrun", *fit("out")[4:]), "chrun"),
        (("path", "t.csv", "--target", "churn"), "path runs in one process"),
    ):
        code, _, told = ended(launched(3, *words))
        lines = [line for line in told.splitlines() if line.startswith("goodfit:")]
        assert code != 0
        assert len(lines) == 1
        assert text in lines[0]
    assert not Path("out").exists()


def test_no_option_of_the_command_is_one_of_torchrun() -> None:
    """Which takes any word that its own options begin with for itself, also behind the command."""
    theirs = {word for action in get_args_parser()._actions for word in action.option_strings}
    ours = {word for option in get_command(app).commands["fit"].params for word in option.opts}
    assert "--target" in ours
    assert not {(one, other) for one in ours for other in theirs if other.startswith(one)}
