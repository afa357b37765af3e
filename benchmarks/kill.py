"""A fit is killed at random moments, again and again, and goes on each time in a new process: kill.csv.

    python benchmarks/kill.py --kills 1000

Full cocktail, loader workers, a learning-rate schedule, a checkpoint behind every step. A run is right where its weights and
history are, bit by bit, those of the same training that nobody killed. Every second kill is of the process alone, as a
machine without memory kills; the others take its workers along.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import show, write
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

import goodfit as gf

COCKTAIL = "L2(1e-3), L1(1e-4), Dropout(0.3), DropConnect(0.1), MaxNorm(3.0), WeightDecay(0.01), EarlyStopping(4)"
ROWS, EPOCHS, BATCH = 60, 8, 10


class Rows(Dataset[Any]):
    """Rows that every worker augments with noise of its own."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Any:
        x = torch.linspace(-1, 1, 6).roll(i) * (1 + i % 7)
        return x + 0.1 * torch.randn(6) + 0.1 * random.random(), x[:1].sin()


def train(folder: Path, seed: int, every: int | None) -> str:
    """One training, or what is left of it; the digest of what came of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    valid = torch.linspace(-1, 1, 120).reshape(20, 6)
    found = gf.fit(
        model,
        DataLoader(Rows(), BATCH, shuffle=True, num_workers=2),
        (valid, valid[:, :1].sin()),
        COCKTAIL,
        optimizer=lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.0),
        scheduler=lambda optimizer: OneCycleLR(optimizer, 0.02, total_steps=ROWS // BATCH * EPOCHS),
        scheduler_unit="steps",
        epochs=EPOCHS,
        seed=seed,
        checkpoints=None if every is None else gf.Checkpoints(folder, every=every),
    )
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in found.history]
    digest = hashlib.sha256(repr((history, found.stopped, found.score)).encode())
    for name, tensor in found.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def child(result: Path, folder: Path, seed: int, every: int | None) -> int:
    """The same in a process of its own, which leaves its digest, or its error, in a file."""
    process = os.fork()
    os.setpgid(process, process)  # in both, as either may be the first; of a zero it is the own one
    if process:
        return process
    for stream in (1, 2):  # workers that outlive it complain, and hold what they have open
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", gf.GoodfitWarning)  # no checkpoint is ever found damaged
            told = train(folder, seed, every)
    except BaseException:
        told = traceback.format_exc()
    draft = result.with_suffix(".draft")
    draft.write_text(told)
    draft.rename(result)
    os._exit(0)


def ended(process: int, seconds: float) -> bool:
    """Whether a process ends by itself within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(process, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def killed(process: int, whole: bool) -> None:
    """Kill it, with or without its workers."""
    (os.killpg if whole else os.kill)(process, signal.SIGKILL)
    os.waitpid(process, 0)


def run(folder: Path, seed: int, kills: int, draws: random.Random) -> dict[str, Any]:
    """One training with at most so many kills."""
    expected, result = folder / "expected", folder / "result"
    os.waitpid(child(expected, folder, seed, None), 0)
    row: dict[str, Any] = {"seed": seed, "kills": 0, "seconds": time.monotonic()}
    steps, alone = set(), []
    while True:
        process = child(result, folder / "saved", seed, 1)
        patience = draws.expovariate(1 / 0.15) if row["kills"] < min(kills, 40) else 600.0
        if ended(process, patience):
            break
        whole = row["kills"] % 2 == 0
        killed(process, whole)
        alone += [] if whole else [process]
        row["kills"] += 1
        steps.add(max((path.name for path in (folder / "saved").glob("step-*")), default="none"))
    for process in alone:  # a worker of a killed process may wait for ever for a lock that went with it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    told = result.read_text()
    row["seconds"] = round(time.monotonic() - row["seconds"], 1)
    right = told == expected.read_text()
    row["at_steps"] = len(steps)
    return row | {"outcome": "same bits" if right else "other bits" if len(told) == 64 else told.strip().splitlines()[-1]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = options.parse_args()
    torch.set_num_threads(1)  # a fork of a process with busy threads would wait for them for ever
    np.random.seed(0)
    train(Path(), 0, None)  # what is imported only then would take most of the time that a process lives
    rows: list[dict[str, Any]] = []
    draws, left = random.Random(given.seed), given.kills
    while left > 0:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(Path(folder), len(rows), left, draws))
        left -= rows[-1]["kills"]
    show(rows)
    write(rows, str(given.out))
    wrong = [row for row in rows if row["outcome"] != "same bits"]
    print(f"{sum(row['kills'] for row in rows)} kills in {len(rows)} runs, {len(wrong)} of them not right")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
