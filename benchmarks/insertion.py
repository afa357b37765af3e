"""What inserted dropout costs: building, and a training step beside torch's own layers at the same places.

    python benchmarks/insertion.py [--model resnet50|gpt2|mlp] [--steps 5] [--rows 4] [--threads 2] [--device cpu]

The models are those of cost.py. Side by side in one process, steps (forward and backward) in turn: without dropout; each kind
of ours as it is inserted; and torch's layer, where there is one, hung at the very places of ours by the same hooks.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cost import MODELS
from table import show, write
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit.layers.dropout import SeededLayer

WAYS: dict[str, tuple[gf.phases.Build, Callable[[], nn.Module] | None]] = {
    "Dropout": (gf.Dropout(0.1), lambda: nn.Dropout(0.1)),
    "ChannelDropout": (gf.ChannelDropout(0.1), lambda: nn.Dropout2d(0.1)),
    "AlphaDropout": (gf.AlphaDropout(0.1), lambda: nn.AlphaDropout(0.1)),
    "GaussianDropout": (gf.GaussianDropout(0.1), None),
    "DropBlock": (gf.DropBlock(0.1, 7), None),
}


@dataclass
class Way:
    """A model to be timed, its layers, and the seconds that building took."""

    name: str
    model: nn.Module
    layers: int = 0
    building: float = 0.0


def fresh(name: str, rows: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name]()
    return model.to(device), x[:rows].to(device), y.view(len(x), -1)[:rows].flatten().to(device)


def ways(name: str, rows: int, device: str) -> list[Way]:
    """The bare model, and for each kind that has places in it ours and torch's."""
    found = [Way("bare", fresh(name, rows, device)[0])]
    for kind, (one, torchs) in WAYS.items():
        model, x, _ = fresh(name, rows, device)
        started = time.perf_counter()
        try:
            one.build(model, x)
        except gf.GoodfitError as refused:
            print(refused)
            continue
        building = time.perf_counter() - started
        layers = sum(isinstance(m, SeededLayer) for m in model.modules())
        found.append(Way(kind, model, layers, building))
        if torchs is not None and not (kind == "ChannelDropout" and name != "resnet50"):  # Dropout2d is for images
            other, x, _ = fresh(name, rows, device)
            one.build(other, x)
            for host in list(other.modules()):
                for child, layer in list(host.named_children()):
                    if isinstance(layer, SeededLayer):
                        host.add_module(child, torchs())
            found.append(Way(f"nn.{type(torchs()).__name__}", other, layers))
    return found


def seconds(way: Way, x: Tensor, y: Tensor) -> float:
    started = time.perf_counter()
    torch.autograd.backward(F.cross_entropy(way.model(x), y))
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(name: str, steps: int, rows: int, device: str) -> list[dict[str, Any]]:
    """A row per way: the median over steps taken in turn, and its share beside the bare step."""
    _, x, y = fresh(name, rows, device)
    made = ways(name, rows, device)
    times: dict[str, list[float]] = {way.name: [] for way in made}
    for turn in range(steps + 1):
        for way in made:
            way.model.train().zero_grad()
            taken = seconds(way, x, y)
            if turn:
                times[way.name].append(taken)
    table = []
    for way in made:
        extra = statistics.median(b - a for a, b in zip(times["bare"], times[way.name], strict=True))
        row = {"model": name, "device": device, "threads": torch.get_num_threads(), "rows": len(x)}
        row |= {"way": way.name, "layers": way.layers, "seconds": round(statistics.median(times[way.name]), 4)}
        row |= {"extra %": round(100 * extra / statistics.median(times["bare"]), 1)}
        table.append(row | {"building s": round(way.building, 3) if way.building else ""})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="of a batch, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")
    rows = [row for name in asked.model or MODELS for row in compare(name, asked.steps, asked.rows, asked.device)]
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
