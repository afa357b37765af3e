"""K networks at once against K networks in turn: member-steps per second, beside the floor that the machine sets.

    OMP_NUM_THREADS=1 python benchmarks/stack.py [--all] [--turns 3] [--seconds 0.3]

A member is a multilayer perceptron of 32 features and 10 classes, each hidden layer Linear, BatchNorm, ReLU, Dropout(0.2), in
float32, trained by AdamW on batches that all members share. Ways, each with one thread but where it says two:

stack       `gf.Stack` with Dropout(0.2), a seed for each member, and its AdamW; `learn` is all of a step
loop        a plain loop over members: nn.Dropout, nn.BatchNorm1d, fused AdamW, nothing else
2 loops     the same in two processes at the same time
vmap        `torch.func.stack_module_state` and `vmap` as in PyTorch's tutorial on ensembles, with fused AdamW

The loops have up to 16 members, more cost as much each. The floor is what no order of operations goes below that multiplies
matrices and touches each number as seldom as possible: operations of the products over the rate of a large product, and bytes
over bandwidth, one after the other. For each hidden number these are 11 passes in cache (written by the product, read and
written by norm, activation and dropout in one, read by the next product; a gradient likewise, with both kept numbers, read by
two products), for each weight 8 in memory (weight, gradient and two moments read and written). In each row the ways take turns;
each has the best of its steps. Prints one table and writes it as CSV, with the machine as JSON, beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from table import show, write
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf

FEATURES, CLASSES, P = 32, 10, 0.2
IN_LOOP = 16
HIDDEN_PASSES, WEIGHT_PASSES = 11, 8
MOST_BYTES = 6e9


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    width: int
    hidden: int
    members: int
    batch: int

    def products(self) -> list[int]:
        """Multiplications of one row with each weight matrix."""
        return [FEATURES * self.width, *[self.width**2] * (self.hidden - 1), self.width * CLASSES]

    def floor(self, machine: dict[str, float]) -> float:
        """Seconds for one step of one member."""
        operations = 2 * self.batch * (3 * sum(self.products()) - self.products()[0])  # no gradient of the features
        numbers = HIDDEN_PASSES * self.batch * self.width * self.hidden
        weights = WEIGHT_PASSES * (sum(self.products()) + 3 * self.width * self.hidden)
        return operations / machine["operations/s"] + 4 * (numbers / machine["bytes/s in cache"] + weights / machine["bytes/s"])

    def data(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, FEATURES), torch.randint(0, CLASSES, (self.batch,))


Step = Callable[[], Any]


def network(shape: Shape, *dropout: nn.Module) -> nn.Sequential:
    layers, width = list[nn.Module](), FEATURES
    for _ in range(shape.hidden):
        layers += [nn.Linear(width, shape.width), nn.BatchNorm1d(shape.width), nn.ReLU(), *dropout]
        width = shape.width
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def stack(shape: Shape) -> Step:
    bare = [network(shape) for _ in range(shape.members)]
    x, y = shape.data()
    cocktails, seeds = [f"Dropout({P})"] * shape.members, list(range(shape.members))
    together = gf.Stack(cocktails, bare, task="classes", example=x, seeds=seeds)

    def step() -> None:
        together.learn(x, y)

    return step


def loop(shape: Shape) -> Step:
    models = [network(shape, nn.Dropout(P)) for _ in range(min(shape.members, IN_LOOP))]
    members, (x, y) = [(model, torch.optim.AdamW(model.parameters(), fused=True)) for model in models], shape.data()

    def step() -> None:
        for model, optimizer in members:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x), y))
            optimizer.step()

    return step


def vmap(shape: Shape) -> Step:
    models = [network(shape, nn.Dropout(P)) for _ in range(shape.members)]
    params, buffers = torch.func.stack_module_state(models)
    base, (x, y) = models[0].to("meta"), shape.data()
    optimizer = torch.optim.AdamW(params.values(), fused=True)

    def loss(params: Any, buffers: Any) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(base, (params, buffers), (x,)), y)

    losses = torch.func.vmap(loss, randomness="different")

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(losses(params, buffers).sum())
        optimizer.step()

    return step


def best(step: Step, seconds: float) -> float:
    """The shortest step of those that fit into some seconds, the first left out where more than one fits."""
    end, shortest = time.perf_counter() + seconds, float("inf")
    step()
    while True:
        start = time.perf_counter()
        step()
        now = time.perf_counter()
        shortest = min(shortest, now - start)
        if now > end:
            return shortest


def worker(pipe: Connection) -> None:
    """A process that loops over members of a shape for some seconds, whenever it is told to."""
    torch.set_num_threads(1)
    known: dict[Shape, Step] = {}
    while (asked := pipe.recv()) is not None:
        shape, seconds = asked
        if shape not in known:
            known = {shape: loop(shape)}
            known[shape]()
        pipe.send("ready")
        pipe.recv()
        pipe.send(best(known[shape], seconds) / min(shape.members, IN_LOOP))


def by_two(pipes: list[Connection], shape: Shape, seconds: float) -> float:
    """Seconds per member-step of two processes together; both measure while both run."""
    for pipe in pipes:
        pipe.send((shape, seconds))
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    return 1 / sum(1 / pipe.recv() for pipe in pipes)


def measured() -> dict[str, float]:
    """What this machine does with one thread: a large product, and copies in cache and in memory, reads and writes counted."""
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    rates = {"operations/s": 2 * 1024**3 / best(lambda: torch.mm(a, b, out=c), 1)}
    for name, numbers in (("bytes/s in cache", 2**17), ("bytes/s", 2**26)):
        source, target = torch.randn(numbers), torch.randn(numbers)
        rates[name] = 8 * numbers / best(partial(target.copy_, source), 0.5)
    return rates


def row(shape: Shape, machine: dict[str, float], pipes: list[Connection], turns: int, seconds: float) -> dict[str, Any]:
    steps = {"stack": (stack(shape), shape.members), "loop": (loop(shape), min(shape.members, IN_LOOP))}
    steps["vmap"] = (vmap(shape), shape.members)
    times = dict.fromkeys(["stack", "stack, 2 threads", "loop", "2 loops", "vmap"], float("inf"))
    for _ in range(turns):
        for way, (step, members) in steps.items():
            times[way] = min(times[way], best(step, seconds) / members)
        torch.set_num_threads(2)
        times["stack, 2 threads"] = min(times["stack, 2 threads"], best(steps["stack"][0], seconds) / shape.members)
        torch.set_num_threads(1)
        times["2 loops"] = min(times["2 loops"], by_two(pipes, shape, seconds))
    floor = shape.floor(machine)
    found: dict[str, Any] = {"width": shape.width, "hidden": shape.hidden, "K": shape.members, "batch": shape.batch}
    for way, spent in times.items():
        found |= {f"{way}/s": round(1 / spent), f"{way} : floor": round(spent / floor, 1)}
    found |= {"floor/s": round(1 / floor), "loop : floor": round(times["loop"] / floor, 1)}
    found |= {f"{way} : stack": round(times[way] / times["stack"], 2) for way in ("loop", "vmap")}
    return found | {"2 loops : stack, 2 threads": round(times["2 loops"] / times["stack, 2 threads"], 2)}


def shapes(every: bool) -> Iterator[Shape]:
    """Those of the table; without `every` a few that show how each of the four numbers matters."""
    if every:
        for hidden in (2, 4, 9):
            for width in (32, 64, 128, 256, 512):
                for batch in (128, 256):
                    for members in (1, 4, 16, 64, 256, 1024):
                        shape = Shape(width, hidden, members, batch)
                        if 64 * members * sum(shape.products()) < MOST_BYTES:  # both stacks, with gradients and moments
                            yield shape
        return
    for width in (32, 64, 128, 256, 512):
        yield Shape(width, 2, 64 if width < 512 else 16, 128)
    for members in (1, 4, 16, 256, 1024):
        yield Shape(32, 2, members, 128)
    for members in (1, 16, 256):
        yield Shape(128, 2, members, 128)
    for width, hidden in ((32, 4), (32, 9), (128, 9), (512, 9)):
        yield Shape(width, hidden, 64 if width < 512 else 4, 128)
    for width in (32, 128, 512):
        yield Shape(width, 2, 64 if width < 512 else 16, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="that each way has in each turn")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    machine, rows = measured(), list[dict[str, Any]]()
    print(", ".join(f"{name} {rate / 1e9:.1f}e9" for name, rate in machine.items()), flush=True)
    context, pipes = multiprocessing.get_context("spawn"), list[Connection]()
    for _ in range(2):
        ours, theirs = context.Pipe()
        context.Process(target=worker, args=(theirs,), daemon=True).start()
        pipes.append(ours)
    for shape in shapes(asked.all):
        rows.append(row(shape, machine, pipes, asked.turns, asked.seconds))
        show(rows[-1:], titles=len(rows) == 1)
    for pipe in pipes:
        pipe.send(None)
    write(rows, __file__)
    about = {"torch": torch.__version__, "processor": platform.processor() or platform.machine(), **machine}
    Path(__file__).with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
