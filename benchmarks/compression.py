"""Test error against compression: LeNet-300-100 and LeNet-5 with L1 at its optimum, on images.

    python benchmarks/compression.py DATA [--net lenet300 --net lenet5] [--set fashion --set usps --set mnist] [--quick]

DATA is a folder with fashion-mnist/ or mnist/ (the four .gz files of the original form) and usps.npz. Each network is
trained densely once; then λ rises, each λ starting from the weights of the one before: a lasso, an adaptive lasso on its
result (factors 1/|w|, so that what is left is hardly shrunk), and a fit of what is left, with the zeros held. Nothing is
chosen on test data: every λ is a row. "kept" counts weights and biases that are not zero; "shrunk" is the size of the dense
network that `gf.shrink` leaves, with equal outputs.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import show, write
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf

LAMBDAS = (4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4, 1.28e-3, 2.56e-3)
STAGES = {"lenet300": (12, 8, 8, 5), "lenet5": (5, 3, 3, 2)}  # epochs: dense; lasso, adaptive lasso, refit at each λ
BATCH, RATE = 256, 1e-3


def idx(path: Path) -> np.ndarray[Any, Any]:
    """An array in the form of the MNIST files."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def images(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (rows, 1, side, side) in standard units of the training part, and their classes."""
    if name == "usps":
        held = np.load(folder / "usps.npz")
        parts = [held[key] for key in ("X_train", "y_train", "X_test", "y_test")]
    else:
        at = folder / ("fashion-mnist" if name == "fashion" else name)
        kinds = [("train", "images-idx3"), ("train", "labels-idx1"), ("t10k", "images-idx3"), ("t10k", "labels-idx1")]
        parts = [idx(at / f"{part}-{kind}-ubyte.gz") for part, kind in kinds]
    x, y, x_test, y_test = (
        torch.from_numpy(np.array(p, dtype=np.float32 if i % 2 == 0 else np.int64)) for i, p in enumerate(parts)
    )
    side = round(x[0].numel() ** 0.5)
    mean, spread = x.mean(), x.std()
    return (x.view(-1, 1, side, side) - mean) / spread, y, (x_test.view(-1, 1, side, side) - mean) / spread, y_test


def lenet300(side: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5(side: int) -> nn.Module:
    """The one of Caffe, which the literature compresses: 20 and 50 filters, 500 units."""
    after = ((side - 4) // 2 - 4) // 2
    filters = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*filters, nn.Linear(50 * after * after, 500), nn.ReLU(), nn.Linear(500, 10))


NETS = {"lenet300": lenet300, "lenet5": lenet5}


def train(model: nn.Module, x: Tensor, y: Tensor, cocktail: Any, epochs: int, seed: int) -> None:
    """A plain loop: AdamW, the learning rate down to nothing along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    gf.Run(cocktail, model).attach(optimizer)
    steps = epochs * -(-len(y) // BATCH)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(y), generator=draw), BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[rows]), y[rows]))
            optimizer.step()
            slower.step()


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in torch.split(x, 1000)])
    return 100 * float((found != y).double().mean())


def row(name: str, net: str, lam: float, model: nn.Module, data: tuple[Tensor, ...], seconds: float) -> dict[str, Any]:
    total = sum(p.numel() for p in model.parameters())
    kept = sum(int((p != 0).sum()) for p in model.parameters())
    found = {"set": name, "net": net, "lam": lam, "test error %": round(error(model, *data[2:]), 2), "kept": kept}
    shrunk = gf.shrink(model, data[0][:8]).parameters[1] if lam else total
    return (
        found
        | {"compression": round(total / kept, 1), "shrunk": shrunk, "error after %": round(error(model, *data[2:]), 2)}
        | {"seconds": round(seconds)}
    )


def copy_of(model: nn.Module, net: str, side: int) -> nn.Module:
    other = NETS[net](side)
    other.load_state_dict(model.state_dict())
    return other


def curve(name: str, net: str, data: tuple[Tensor, ...], quick: bool) -> list[dict[str, Any]]:
    """Dense first, then every λ from the one before."""
    x, y = data[:2]
    side = x.shape[-1]
    scale = min(1.0, 20_000 / len(y)) if quick else max(1.0, 20_000 / len(y))  # small sets need as many steps
    dense, lasso, adaptive, refit = (max(1, round(scale * epochs)) for epochs in STAGES[net])
    torch.manual_seed(0)
    model, started = NETS[net](side), time.perf_counter()
    train(model, x, y, gf.Cocktail(), dense, 0)
    rows = [row(name, net, 0.0, model, data, time.perf_counter() - started)]
    for lam in LAMBDAS:
        started = time.perf_counter()
        train(model, x, y, gf.L1(lam), lasso, 1)
        branch = copy_of(model, net, side)
        train(branch, x, y, gf.L1(lam / 10, factors=gf.factors.adaptive()), adaptive, 2)
        train(branch, x, y, gf.L1(1e-12, factors=gf.factors.adaptive()), refit, 3)
        rows.append(row(name, net, lam, branch, data, time.perf_counter() - started))
        print("  ".join(f"{value:>12}" for value in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--net", choices=NETS, action="append")
    parser.add_argument("--set", choices=("fashion", "usps", "mnist"), action="append")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in asked.set or ("fashion", "usps"):
        data = images(asked.data, name)
        for net in asked.net or NETS:
            rows += curve(name, net, data, asked.quick)
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
