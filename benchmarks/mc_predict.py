"""`gf.mc_predict` against a plain loop of forwards: dropout layers switched to train mode by hand, the batch run S times.

    OMP_NUM_THREADS=1 python benchmarks/mc_predict.py [--samples 10 50 100] [--turns 5] [--device cpu]

The loop knows its models: what drops in them is set by hand, nothing is checked and nothing is put back. `mc_predict` pays for
finding and proving (a few forwards of a few rows, whatever S is), and wins by drawing samples side by side; within
`with gf.mc_dropout(model):` the first call has paid for all. Its time is of the whole call: medians of turns taken alternately,
on a CPU in time of the process, so that a busy machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from table import show, write
from torch import Tensor, nn

import goodfit as gf


class Last(nn.Module):
    """A class from the last step of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 64, 2, dropout=0.2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> tuple[nn.Module, Tensor]:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*hidden, nn.Linear(256, 10)), torch.randn(16, 64)


def lenet() -> tuple[nn.Module, Tensor]:
    convolutions = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Dropout(0.5), nn.Linear(120, 84), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*convolutions, *dense, nn.Linear(84, 10)), torch.randn(16, 1, 28, 28)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * 64, 10)), torch.randn(8, 16, 64)


def lstm() -> tuple[nn.Module, Tensor]:
    return Last(), torch.randn(16, 20, 32)


MODELS = {"mlp": mlp, "lenet": lenet, "transformer": transformer, "lstm": lstm}


def loop(model: nn.Module, x: Tensor, samples: int) -> Tensor:
    """What people write; none of these models has a batch norm, so all of it may train."""
    with torch.no_grad():
        return torch.stack([model.train()(x) for _ in range(samples)])


def seconds(act: Callable[[], Any], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    act()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def within(model: nn.Module, x: Tensor, samples: int, device: str) -> float:
    """The second call in a block."""
    with gf.mc_dropout(model):
        gf.mc_predict(model, x, 2)
        return seconds(lambda: gf.mc_predict(model, x, samples), device)


def compare(name: str, samples: int, turns: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model, x = model.to(device), x.to(device)
    times: dict[str, list[float]] = {"loop": [], "ours": [], "rest": [], "block": []}
    for turn in range(turns + 1):
        spent = (
            seconds(lambda: loop(model, x, samples), device),
            seconds(lambda: gf.mc_predict(model, x, samples), device),
            seconds(lambda: gf.mc_predict(model, x, 2), device),
            within(model, x, samples, device),
        )
        if turn:
            for way, one in zip(times, spent, strict=True):
                times[way].append(one)
    middle = {way: 1e3 * statistics.median(spent) for way, spent in times.items()}
    row = {"model": name, "device": device, "rows": len(x), "samples": samples, "loop ms": round(middle["loop"], 2)}
    row |= {"mc_predict ms": round(middle["ours"], 2), "of that for S=2 ms": round(middle["rest"], 2)}
    row |= {"in a block ms": round(middle["block"], 2), "loop/mc_predict": round(middle["loop"] / middle["ours"], 2)}
    return row | {"loop/in a block": round(middle["loop"] / middle["block"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    rows = [compare(name, samples, asked.turns, asked.device) for name in MODELS for samples in asked.samples]
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
