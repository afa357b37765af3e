"""What a stack gains by members that stop: milliseconds per step while more and more leave: stack_stops.csv.

    OMP_NUM_THREADS=1 python benchmarks/stack_stops.py

256 perceptrons of two hidden layers with batch norms, dropout, decay and early stopping; every so often half of those that go
on stop. share is the time of a step beside that of all members, floor the share of members that go on; leaving is the time of
the stop itself, in steps of all members.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from table import show, write
from torch import nn

import goodfit as gf

MEMBERS, WIDTH, ROWS = 256, 64, 128
COCKTAIL = "BatchNorm(), Dropout(0.2), WeightDecay(1e-2), EarlyStopping(5)"


def best(step: Callable[[], Any], seconds: float = 2.0) -> float:
    end, shortest = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def main() -> None:
    torch.set_num_threads(1)
    x, y = torch.randn(ROWS, 32), torch.randint(0, 10, (ROWS,))
    models, seeds = [network() for _ in range(MEMBERS)], list(range(MEMBERS))
    stack = gf.Stack([COCKTAIL] * MEMBERS, models, task="classes", example=x, seeds=seeds)
    rows: list[dict[str, Any]] = []
    whole, leaving = 0.0, 0.0
    while stack.members:
        spent = best(lambda: stack.learn(x, y))
        whole = whole or spent
        row: dict[str, Any] = {"members": len(stack.members), "ms": round(1e3 * spent, 2), "share": f"{spent / whole:.3f}"}
        rows.append(row | {"floor": f"{len(stack.members) / MEMBERS:.3f}", "leaving": f"{leaving / whole:.2f}"})
        start = time.perf_counter()
        stack.stop(stack.members[: max(1, len(stack.members) // 2)])
        leaving = time.perf_counter() - start
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
