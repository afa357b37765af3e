"""What regularization costs beside a training step: L1 + L2 + WeightDecay + ClipNorm attached to fused AdamW.

    python benchmarks/cost.py [--model resnet50|gpt2|mlp] [--steps 5] [--threads 2] [--device cpu]

Side by side in one process, steps in turn: the bare step; ours by run.attach; and what people write, penalties in the loss
by autograd with torch's clip_grad_norm_ and AdamW's own decay. The floor is the bytes that ours must move at least (weights,
gradients and second moments read and written once per phase), at the bandwidth that a copy measures here.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from table import show, write
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit.hyper import hyper

Step = Callable[[], None]


@dataclass(frozen=True)
class ClipNorm(gf.phases.Gradient):
    """Gradients scaled down to a total length of `norm` at most."""

    norm: float = hyper(1.0, valid="(0, inf]", off=math.inf, low=0.1, high=10.0, log=True)

    def gradient(
        self, grads: Mapping[str, Tensor], weights: Mapping[str, Tensor], state: Any, again: Any, noise: Any
    ) -> tuple[dict[str, Tensor], Any]:
        length = torch.stack(torch._foreach_norm(list(grads.values()))).norm()
        scale = (self.norm / (length + 1e-6)).clamp(max=1.0)
        return {name: grad.mul_(scale) for name, grad in grads.items()}, state


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, each with a batch norm, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        short = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.short = short if stride != 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50() -> tuple[nn.Module, Any]:
    """25.6 million weights; 32 images of 224²."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    return model, (torch.randn(32, 3, 224, 224), torch.randint(1000, (32,)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (12, 64)).transpose(1, 2) for t in self.projections(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.perceptron(self.norms[1](x))


class GPT2(nn.Module):
    """124 million weights, the head tied to the embedding; 4 texts of 512 tokens."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(12)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 50257, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.tokens(x) + self.places(places))).flatten(0, 1)


def gpt2() -> tuple[nn.Module, Any]:
    text = torch.randint(50257, (4, 513))
    return GPT2(), (text[:, :-1], text[:, 1:].flatten())


def mlp() -> tuple[nn.Module, Any]:
    """A small network, where the calls count and not the bytes: 3 × 512, batch 128."""
    sizes = [64, 512, 512, 512]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10)), (torch.randn(128, 64), torch.randint(10, (128,)))


MODELS = {"resnet50": resnet50, "gpt2": gpt2, "mlp": mlp}
L1, L2, DECAY, CLIP = 1e-6, 1e-5, 1e-2, 1.0


def step_of(way: str, model: nn.Module, batch: Any) -> Step:
    """One training step, in one of the ways that are compared."""
    x, y = batch
    kernels = [p for n, p in model.named_parameters() if n in set(gf.where.kernels.select(model))]
    others = [p for p in model.parameters() if not any(p is k for k in kernels)]
    decay = DECAY if way == "autograd" else 0.0
    groups = [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if way == "ours":
        gf.Run(gf.Cocktail(gf.L1(L1), gf.L2(L2), gf.WeightDecay(DECAY), ClipNorm(CLIP)), model).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if way == "autograd":
            loss = loss + sum(L1 * p.abs().sum() + L2 / 2 * p.square().sum() for p in kernels)
        torch.autograd.backward(loss)
        if way == "autograd":
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def bandwidth(device: str) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def least_bytes(model: nn.Module) -> int:
    """L2: read w and g, write g. Clip: read g, read and write g. Decay: read and write w. L1: read v and w, write w."""
    kernels = sum(model.get_parameter(n).nbytes for n in gf.where.kernels.select(model))
    return kernels * (3 + 2 + 3) + 3 * sum(p.nbytes for p in model.parameters())


def peak(way: str, name: str, device: str) -> float:
    """MiB at the peak of two steps, in a process of its own (resident on a CPU, allocated on a GPU)."""
    import subprocess

    words = [sys.executable, __file__, "--model", name, "--device", device, "--peak", way]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def measured_peak(way: str, name: str, device: str) -> float:
    step = make(way, name, device)[1]
    for _ in range(2):
        step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def make(way: str, name: str, device: str) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model, batch = model.to(device), tuple(t.to(device) for t in batch)
    return model, step_of(way, model, batch)


def compare(name: str, steps: int, device: str) -> list[dict[str, Any]]:
    """A row per way: the median over steps taken in turn, its share beside the bare step, and the peak of memory."""
    ways = ("bare", "ours", "autograd")
    peaks = {way: peak(way, name, device) for way in ways}  # first: a child inherits the peak of its parent
    made = {way: make(way, name, device) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(steps + 1):
        for way in ways:
            started = time.perf_counter()
            made[way][1]()
            if turn:
                times[way].append(time.perf_counter() - started)
    floor = least_bytes(made["bare"][0]) / bandwidth(device)
    rows = []
    for way in ways:
        middle = statistics.median(times[way])
        extra = statistics.median(b - a for a, b in zip(times["bare"], times[way], strict=True))
        share = 100 * extra / statistics.median(times["bare"])
        row = {"model": name, "device": device, "threads": torch.get_num_threads(), "way": way, "seconds": round(middle, 4)}
        row |= {"extra %": round(share, 2), "floor %": round(100 * floor / statistics.median(times["bare"]), 2)}
        rows.append(row | {"peak MiB": round(peaks[way])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak:
        print(measured_peak(asked.peak, asked.model[0], asked.device))
        return
    rows = [row for name in asked.model or MODELS for row in compare(name, asked.steps, asked.device)]
    show(rows)
    write(rows, __file__)


if __name__ == "__main__":
    main()
