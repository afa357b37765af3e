"""What it costs to be safe: checkpoints at their default pace, and the look for numbers that are not finite: overnight.csv.

    python benchmarks/overnight.py

Each network is trained for about --seconds in turns, with and without; the column is the share of time that is added, as the
median over the turns with the quartiles. Floors: a checkpoint writes the bytes named, once, to the disk; the look reads the
gradients once. The saves are those of the training itself and the one at its end, which a longer training has once too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from table import show, write
from torch import nn

import goodfit as gf
from goodfit.fitting.guard import Guard
from goodfit.fitting.stepping import Stepping
from goodfit.run import Run

NETWORKS: dict[str, tuple[int, int, int]] = {"small": (20, 64, 256), "middle": (64, 1024, 256), "large": (256, 4096, 128)}


def parts(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    inputs, width, rows = NETWORKS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    return model, torch.randn(rows, inputs), torch.randn(rows, 1)


def saving(name: str, seconds: float, folder: Path) -> tuple[float, float, int]:
    """The share of a training's time that its saves took, of the whole, with and without the one at its end; and megabytes."""
    model, x, y = parts(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    run = Run("L2(1e-4), EarlyStopping(9)", model, loss=nn.functional.mse_loss, example=x)
    step = Stepping(run, optimizer)
    saves = gf.Checkpoints(folder).watch(model=model, optimizer=optimizer, run=run)
    began, spent, count = time.monotonic(), 0.0, 0
    while time.monotonic() - began < seconds:
        step.epoch([(x, y)])
        count += 1
        before = time.monotonic()
        saves(count)
        spent += time.monotonic() - before
    size = sum(path.stat().st_size for path in max(folder.glob("step-*")).iterdir()) if count and saves.step else 0
    return spent / (time.monotonic() - began), saves._cost, round(size / 1e6)


def looking(name: str, seconds: float) -> list[float]:
    """The shares of time that the look adds to a step, turn by turn."""
    model, x, y = parts(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    run = Run("L2(1e-4), EarlyStopping(9)", model, loss=nn.functional.mse_loss, example=x)
    guard = Guard(model, "stop", lambda: False)
    ways = [Stepping(run, optimizer), Stepping(run, optimizer, guard=guard)]
    shares, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        took = []
        for way in ways:
            began = time.perf_counter()
            way.epoch([(x, y)] * 20)
            took.append(time.perf_counter() - began)
        shares.append(took[1] / took[0] - 1)
    return shares


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            share, cost, size = saving(name, given.seconds, Path(folder))
        shares = looking(name, given.seconds / 4)
        low, middle, high = statistics.quantiles(shares, n=4)
        weights = sum(p.numel() for p in parts(name)[0].parameters())
        row: dict[str, Any] = {"network": name, "weights": weights, "checkpoint_mb": size, "last_save_s": round(cost, 3)}
        row |= {"saving": f"{share:.2%}", "looking": f"{middle:.1%}", "quartiles": f"{low:.1%} to {high:.1%}"}
        rows.append(row)
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
