"""Record validation curves of trainings that nothing stops, for `early_stopping_front.py` to replay.

usage: python benchmarks/early_stopping_curves.py DATA_FOLDER [--out FILE] [--part I/N]

Ten small tables × six set-ups × six seeds, each for 150 epochs. A row is an epoch: the loss of the training as it was during
the epoch, mean and standard error of the validation loss over rows, the loss on held-out rows, which no criterion sees, the
evidence of the gradients (Mahsereci et al. 2017; at each fifth epoch), and the steps so far. The file is written after each
curve, and a second call goes on where the first ended. --part trains every N-th curve, so that N processes share the work.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit.fitting.stepping import Stepping
from goodfit.losses import loss_of
from goodfit.tabular.network import mlp
from goodfit.tabular.prepare import prepare

TABLES = (
    "credit-g", "diabetes", "cmc", "vehicle", "yeast", "steel-plates-fault",
    "wine-quality-red", "ames-housing", "california-housing", "puma32H",
)  # fmt: skip
SETUPS = {
    "plain": ("L2(0)", 1e-3),
    "plain, high rate": ("L2(0)", 1e-2),
    "WeightDecay": ("WeightDecay(0.3)", 1e-3),
    "L1": ("L1(1e-3)", 1e-3),
    "Dropout": ("Dropout(0.4)", 1e-3),
    "default": ("BatchNorm(), Dropout(0.2), WeightDecay(1e-2)", 1e-3),
}
SEEDS, EPOCHS, WIDTH, BATCH = range(6), 150, 64, 64
ROWS = {"train": 800, "valid": 300, "held-out": 1000}


def parts_of(folder: Path, name: str, seed: int) -> tuple[dict[str, tuple[Tensor, Tensor]], str, int]:
    """Rows of a table, split anew for each seed; the task, and the outputs."""
    data = prepare(folder / f"{name}.parquet", "target", None, seed, {}, lambda _: None)
    whole = [data.part(part) for part in ("train", "valid", "test")]
    x, y = (torch.from_numpy(np.concatenate([part[i] for part in whole])) for i in (0, 1))
    share = min(1.0, len(y) / sum(ROWS.values()))
    train, rest = train_test_split(np.arange(len(y)), train_size=int(ROWS["train"] * share), random_state=seed)
    valid, held = train_test_split(rest, train_size=int(ROWS["valid"] * share), random_state=seed)
    found = {"train": train, "valid": valid, "held-out": held[: ROWS["held-out"]]}
    return {part: (x[rows], y[rows]) for part, rows in found.items()}, data.answers.target.task, data.answers.outputs


@torch.no_grad()
def by_row(model: nn.Module, part: tuple[Tensor, Tensor], task: str) -> Tensor:
    """The loss of each row, in eval mode."""
    outputs = model.eval()(part[0])
    model.train()
    if task == "classes":
        return F.cross_entropy(outputs, part[1], reduction="none").double()
    return F.mse_loss(outputs.reshape(part[1].shape), part[1], reduction="none").double()


def curve(folder: Path, name: str, setup: str, seed: int) -> list[dict[str, Any]]:
    """One training, a row per epoch."""
    parts, task, outputs = parts_of(folder, name, seed)
    cocktail, lr = SETUPS[setup]
    x, y = parts["train"]
    model = mlp(x.shape[1], outputs, width=WIDTH, depth=2, seed=seed)
    run = gf.Run(cocktail, model, example=x[:BATCH], task=task, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order, loss, rows = torch.Generator().manual_seed(seed), loss_of(task), []
    for epoch in range(1, EPOCHS + 1):
        index = torch.split(torch.randperm(len(y), generator=order), BATCH)
        batches = [(x[rows], y[rows]) for rows in index if len(rows) > 1]
        row: dict[str, Any] = {"table": name, "setup": setup, "seed": seed, "epoch": epoch, "steps": epoch * len(batches)}
        row["train"] = Stepping(run, optimizer).epoch(batches)
        valid = by_row(model, parts["valid"], task)
        row |= {"valid": float(valid.mean()), "stderr": float(valid.std() / len(valid) ** 0.5)}
        row["held_out"] = float(by_row(model, parts["held-out"], task).mean())
        row["evidence"] = gf.stop.evidence(model, loss, batches) if epoch % 5 == 0 else float("nan")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".parquet"))
    parser.add_argument("--part", default="0/1")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = pq.read_table(asked.out).to_pylist() if asked.out.exists() else []
    known = {(row["table"], row["setup"], row["seed"]) for row in rows}
    first, step = map(int, asked.part.split("/"))
    for one in list(product(TABLES, SETUPS, SEEDS))[first::step]:
        if one not in known:
            rows += curve(asked.data, *one)
            print(*one, f"valid {min(row['valid'] for row in rows[-EPOCHS:]):.4f}", flush=True)
            told = pa.Table.from_pylist(rows)
            small = [pa.field(f.name, pa.float32() if pa.types.is_floating(f.type) else f.type) for f in told.schema]
            pq.write_table(told.cast(pa.schema(small)), asked.out, compression="zstd")


if __name__ == "__main__":
    main()
