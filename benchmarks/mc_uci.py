"""`gf.mc_predict` on UCI regression, beside the numbers of Gal and Ghahramani's protocol (Dropout as a Bayesian approximation,
arXiv:1506.02142; their networks trained 100 times as long: the columns "MC dropout" of the data's README).

    OMP_NUM_THREADS=1 python benchmarks/mc_uci.py DATA [--only yacht] [--splits 20] [--quick]

Theirs and ours: one hidden layer of 50 units, dropout before both layers, Adam at 1e-3 with batches of 128, numbers
standardized by the training rows, 20 splits of 90 to 10; rate and precision τ by the log-likelihood of a fifth of the training
rows, then a fit on all of them. Ours differs: splits of our own, rows of a batch drawn with replacement, no weight decay, 1,000
samples for 10,000, τ from a grid around the validation error, and where sets are large fewer splits and fewer steps than their
4,000 epochs (the table says how many epochs it were). All networks of a set train side by side, as a stack.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from table import write
from torch import Tensor, nn

import goodfit as gf

RATES = (0.005, 0.01, 0.05, 0.1)
UNITS, BATCH, SAMPLES = 50, 128, 1000
# set: splits, steps; then what the README tells: RMSE deterministic, RMSE and log-likelihood of MC dropout
SETS = {
    "yacht": (20, 12000, 1.229, 0.6663, -1.250),
    "energy-efficiency": (20, 20000, 0.9668, 0.5389, -1.212),
    "wine-quality-red": (20, 12000, 0.6571, 0.6218, -0.928),
    "power-plant": (5, 30000, 4.176, 4.014, -2.808),
    "naval-propulsion": (5, 30000, 0.0017, 0.0007, 4.449),
}


class Stack(nn.Module):
    """K networks, each with its own rate."""

    def __init__(self, features: int, rates: Tensor) -> None:
        super().__init__()
        k = len(rates)
        bound = (6 / (features + UNITS)) ** 0.5, (6 / (UNITS + 1)) ** 0.5  # Glorot's, as theirs
        self.w1 = nn.Parameter(torch.empty(k, features, UNITS).uniform_(-bound[0], bound[0]))
        self.b1 = nn.Parameter(torch.zeros(k, 1, UNITS))
        self.w2 = nn.Parameter(torch.empty(k, UNITS, 1).uniform_(-bound[1], bound[1]))
        self.b2 = nn.Parameter(torch.zeros(k, 1, 1))
        self.keep = 1 - rates.view(-1, 1, 1)

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) < self.keep) / self.keep

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.b1, self.drop(x), self.w1).relu()
        return torch.baddbmm(self.b2, self.drop(hidden), self.w2).squeeze(2)

    def member(self, k: int) -> nn.Sequential:
        """One network of the stack, as anybody would write it."""
        p = float(1 - self.keep[k])
        first, second = nn.Linear(self.w1.shape[1], UNITS), nn.Linear(UNITS, 1)
        with torch.no_grad():
            first.weight.copy_(self.w1[k].T), first.bias.copy_(self.b1[k, 0])
            second.weight.copy_(self.w2[k].T), second.bias.copy_(self.b2[k, 0])
        return nn.Sequential(nn.Dropout(p), first, nn.ReLU(), nn.Dropout(p), second)


def train(x: Tensor, y: Tensor, rates: Tensor, steps: int) -> Stack:
    """A network per entry of x (K, rows, features) and y (K, rows)."""
    stack = Stack(x.shape[2], rates)
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3, fused=True)
    which = torch.arange(len(x))[:, None]
    for _ in range(steps):
        rows = torch.randint(x.shape[1], (len(x), min(BATCH, x.shape[1])))
        loss = (stack(x[which, rows]) - y[which, rows]).square().mean(1).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return stack


def likelihood(samples: Tensor, y: Tensor, tau: float) -> float:
    """Mean log-likelihood of y (N) under the mixture of normal distributions around samples (S, N)."""
    mixed = torch.logsumexp(-0.5 * tau * (y - samples).square(), 0) - math.log(len(samples))
    return float((mixed - 0.5 * math.log(2 * math.pi) + 0.5 * math.log(tau)).mean())


def sample(model: nn.Module, x: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Samples (S, N) with dropout on, and the output in eval mode, in the units of the target."""
    drawn = gf.mc_predict(model, x, samples=SAMPLES).samples.squeeze(2)
    with torch.no_grad():
        plain = model.eval()(x).squeeze(1)
    return drawn.double() * y[1] + y[0], plain.double() * y[1] + y[0]


def scaled(t: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t in units of the standard deviations of `by`, and these with the mean; a constant column stays."""
    mean, deviation = by.mean(0), by.std(0)
    deviation = torch.where(deviation > 0, deviation, torch.ones(()).to(deviation))
    return ((t - mean) / deviation).float(), mean, deviation


def splits_of(rows: int, count: int) -> list[np.ndarray[Any, Any]]:
    return [np.random.default_rng(seed).permutation(rows) for seed in range(count)]


def chosen(x: Tensor, y: Tensor, parts: list[Any], steps: int) -> list[tuple[float, float]]:
    """Rate and precision per split, by the rows that validation keeps from training."""
    cut = int(0.8 * len(parts[0]))
    xs = [scaled(x[p], x[p[:cut]])[0] for p in parts]
    ys = [scaled(y[p], y[p[:cut]]) for p in parts]
    many = [(s, rate) for s in range(len(parts)) for rate in RATES]
    stack = train(
        torch.stack([xs[s][:cut] for s, _ in many]),
        torch.stack([ys[s][0][:cut] for s, _ in many]),
        torch.tensor([rate for _, rate in many]),
        steps,
    )
    best: dict[int, tuple[float, float, float]] = {}
    for k, (s, rate) in enumerate(many):
        drawn, _ = sample(stack.member(k), xs[s][cut:], ys[s][1:])
        truth = y[parts[s]][cut:]
        base = 1 / float((drawn.mean(0) - truth).square().mean())
        for factor in np.geomspace(0.1, 30, 40):
            found = likelihood(drawn, truth, base * factor), rate, base * factor
            best[s] = max(best.get(s, found), found)
    return [best[s][1:] for s in range(len(parts))]


def measure(name: str, folder: Path, splits: int, steps: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    table = parquet.read_table(folder / f"{name}.parquet")
    data = torch.from_numpy(np.column_stack([table[c].to_numpy().astype(np.float64) for c in table.column_names]))
    x, y = data[:, :-1], data[:, -1]
    orders, cut = splits_of(len(x), splits), round(0.9 * len(x))
    picked = chosen(x, y, [order[:cut] for order in orders], steps)
    xs = [scaled(x[order], x[order[:cut]])[0] for order in orders]
    ys = [scaled(y[order], y[order[:cut]]) for order in orders]
    stack = train(
        torch.stack([t[:cut] for t in xs]),
        torch.stack([t[0][:cut] for t in ys]),
        torch.tensor([rate for rate, _ in picked]),
        steps,
    )
    scores = []
    for k, order in enumerate(orders):
        drawn, plain = sample(stack.member(k), xs[k][cut:], ys[k][1:])
        truth = y[order[cut:]]
        errors = [float((one - truth).square().mean().sqrt()) for one in (plain, drawn.mean(0))]
        scores.append([*errors, likelihood(drawn, truth, picked[k][1])])
    table_row = np.array(scores)
    mean, error = table_row.mean(0), table_row.std(0, ddof=1) / len(scores) ** 0.5
    row: dict[str, Any] = {"set": name, "splits": splits, "epochs": round(steps * min(BATCH, cut) / cut)}
    for what, value, wide, theirs in zip(("RMSE det", "RMSE MC", "LL MC"), mean, error, SETS[name][2:], strict=True):
        row |= {what: f"{value:.4g}", f"{what} s.e.": f"{wide:.2g}", f"{what} README": theirs}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=SETS, action="append")
    parser.add_argument("--splits", type=int, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="two splits and a tenth of the steps, written nowhere")
    asked = parser.parse_args()
    target, rows = Path(__file__).with_suffix(".csv"), list[dict[str, Any]]()
    for name in asked.only or SETS:
        splits, steps = SETS[name][:2]
        splits, steps = (2, steps // 10) if asked.quick else (min(splits, asked.splits or splits), steps)
        started = time.process_time()
        rows.append(measure(name, asked.data, splits, steps))
        print("\n".join(f"{key:>18}: {value}" for key, value in rows[-1].items()))
        print(f"{'processor seconds':>18}: {time.process_time() - started:.0f}\n", flush=True)
    if asked.quick:
        return
    told = list(csv.DictReader(target.open())) if target.exists() else []
    write([old for old in told if old["set"] not in {row["set"] for row in rows}] + rows, __file__)


if __name__ == "__main__":
    main()
