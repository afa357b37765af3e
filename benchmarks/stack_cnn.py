"""K small convolutional networks at once on Fashion-MNIST, against the same in turn: stack_cnn.csv.

    OMP_NUM_THREADS=1 python benchmarks/stack_cnn.py DATA [--threads 1]

DATA is the folder of the four idx files. A member has two convolutions of 3×3, each with ReLU and pooling, and a linear layer;
its cocktail inserts batch norms and drops channels. "stack" is `gf.Stack(together=True)`, by vmap; "alone" is `gf.Run` in the
loop of the README, one member after the other; "bare" is a plain loop with nn.BatchNorm2d and nn.Dropout2d. Times are the best
of some steps, in turns. far: the largest difference of any number between members of the stack and their like alone, after 20
steps in float64.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import show, write
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf

COCKTAIL = "BatchNorm(), ChannelDropout(0.1), L2(1e-4)"
Step = Callable[[int], Any]


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Training images, scaled to mean 0 and variance 1, and their classes."""
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    x = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    return (x - x.mean()) / x.std(), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def network(channels: int, bare: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in ((1, channels), (channels, 2 * channels)):
        layers += [nn.Conv2d(i, o, 3, padding=1)]
        layers += [nn.BatchNorm2d(o), nn.ReLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2)] if bare else [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * channels * 49, 10))


def stacked(models: list[nn.Sequential], x: Tensor, y: Tensor, batch: int) -> tuple[Step, gf.Stack]:
    seeds = list(range(len(models)))
    stack = gf.Stack([COCKTAIL] * len(models), models, task="classes", example=x[:batch], seeds=seeds, together=True)
    return lambda i: stack.learn(x[i : i + batch], y[i : i + batch]), stack


def alone(models: list[nn.Sequential], x: Tensor, y: Tensor, batch: int) -> Step:
    made = []
    for seed, model in enumerate(models):
        run = gf.Run(COCKTAIL, model, task="classes", example=x[:batch], seed=seed)
        made.append((run, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)))

    def step(i: int) -> None:
        for run, optimizer in made:
            optimizer.zero_grad()
            torch.autograd.backward(run.loss(*run.batch(x[i : i + batch], y[i : i + batch])))
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)

    return step


def bare(models: list[nn.Sequential], x: Tensor, y: Tensor, batch: int) -> Step:
    made = [(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)) for model in models]

    def step(i: int) -> None:
        for model, optimizer in made:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[i : i + batch]), y[i : i + batch]))
            optimizer.step()

    return step


def best(step: Step, seconds: float) -> float:
    end, shortest = time.perf_counter() + seconds, float("inf")
    step(0)
    while time.perf_counter() < end:
        start = time.perf_counter()
        step(0)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def far(x: Tensor, y: Tensor) -> float:
    """How far a stack of three is from its members alone."""
    models = [network(4).double() for _ in range(3)]
    others = copy.deepcopy(models)
    together, stack = stacked(models, x.double(), y, 32)
    single = alone(others, x.double(), y, 32)
    for i in range(0, 640, 32):
        together(i)
        single(i)
    pairs = zip(stack.finish(), others, strict=True)
    both = (zip(m.state_dict().values(), o.state_dict().values(), strict=True) for m, o in pairs)
    return max(float((a - b).abs().max()) for tensors in both for a, b in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    x, y = images(asked.data)
    difference, rows = far(x[:640], y[:640]), list[dict[str, Any]]()
    for channels, members, batch in ((4, 4, 64), (4, 16, 64), (4, 64, 64), (8, 16, 64), (16, 16, 64), (8, 16, 128)):
        few = min(members, 8)
        ways: dict[str, tuple[Step, int]] = {
            "stack": (stacked([network(channels) for _ in range(members)], x, y, batch)[0], members),
            "alone": (alone([network(channels) for _ in range(few)], x, y, batch), few),
            "bare": (bare([network(channels, bare=True) for _ in range(few)], x, y, batch), few),
        }
        times = dict.fromkeys(ways, float("inf"))
        for _ in range(2):
            for way, (step, count) in ways.items():
                times[way] = min(times[way], best(step, asked.seconds / 2) / count)
        row: dict[str, Any] = {"channels": channels, "K": members, "batch": batch}
        row |= {f"{way}/s": round(1 / spent) for way, spent in times.items()}
        row |= {f"{way} : stack": round(times[way] / times["stack"], 2) for way in ("alone", "bare")}
        rows.append(row | {"far": f"{difference:.0e}"})
        show(rows[-1:], titles=len(rows) == 1)
    write(rows, __file__)


if __name__ == "__main__":
    main()
