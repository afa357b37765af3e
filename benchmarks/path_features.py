"""Does a path over group lasso on the inputs find the columns that matter, also among random ones?

usage: python benchmarks/path_features.py DATA_FOLDER [EPOCHS]

Each table is taken as it is, and with half as many random columns again (50 %), of which each is a shuffled copy of a true
input, so that no marginal distribution gives it away. Precision and recall are those of the original inputs among the kept
ones; on the synthetic table (Friedman 1991: 5 inputs that matter of 10) those of the five. Beside the test loss stands that
of the dense network that the path started from. At most 4000 rows of a table are used. Prints the table and writes it
beside this file as path_features.csv.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_friedman1
from sklearn.model_selection import train_test_split
from table import show, write
from torch import nn

import goodfit as gf
from goodfit.fitting.loop import evaluate
from goodfit.losses import loss_of
from goodfit.tabular.network import mlp
from goodfit.tabular.prepare import prepare

TABLES = ("california-housing", "house_16H", "pol", "spambase", "jannis_part", "waveform-5000")
ROWS, WIDTH, SEED = 4000, 64, 0
Part = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def parts_of(folder: Path, name: str) -> tuple[dict[str, Part], str, int, int]:
    """Train, valid and test, the task, the outputs, and how many of the first inputs matter."""
    if name == "friedman1":
        x, y = make_friedman1(2000, 10, noise=1.0, random_state=SEED)
        x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
        y = ((y - y.mean()) / y.std()).astype(np.float32)
        rest, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=SEED)
        train, valid = train_test_split(rest, test_size=0.25, random_state=SEED)
        return {"train": (x[train], y[train]), "valid": (x[valid], y[valid]), "test": (x[test], y[test])}, "numbers", 1, 5
    data = prepare(folder / f"{name}.parquet", "target", None, SEED, {}, lambda _: None)
    draw = np.random.default_rng(SEED)
    found = {}
    for part, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        x, y = data.part(part)
        rows = draw.permutation(len(y))[: round(share * ROWS)]
        found[part] = (x[rows], y[rows])
    return found, data.answers.target.task, data.answers.outputs, data.x.shape[1]


def with_random(parts: dict[str, Part]) -> dict[str, Part]:
    """Half as many columns again, each the shuffled copy of a true one."""
    draw = np.random.default_rng(SEED + 1)
    columns = parts["train"][0].shape[1]
    copied = draw.choice(columns, (columns + 1) // 2, replace=False)

    def shuffled(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.column_stack([draw.permutation(x[:, i]) for i in copied])

    return {name: (np.concatenate([x, shuffled(x)], axis=1), y) for name, (x, y) in parts.items()}


def measured(name: str, parts: dict[str, Part], task: str, outputs: int, true: int, epochs: int) -> list[dict[str, Any]]:
    started, inputs = time.perf_counter(), parts["train"][0].shape[1]
    over = gf.GroupLasso(groups=gf.groups.inputs, where=gf.where.named("0.weight"))
    build = lambda: mlp(inputs, outputs, width=WIDTH, depth=2, seed=SEED)  # noqa: E731
    found = gf.path(
        build,
        parts["train"],
        parts["valid"],
        over,
        task=task,
        count=25,
        epochs=epochs,
        cocktail="WeightDecay(1e-2)",
        progress=False,
    )
    seconds = time.perf_counter() - started
    assert found.dense is not None
    rows = []
    for which, point in (("dense", found.dense), ("best", found.best), ("1-SE", found.one_se)):
        kept = found.selected(point)
        right = sum(i < true for i in kept)
        rows.append(
            {
                "table": name,
                "inputs": inputs,
                "true": true,
                "model": which,
                "lam": f"{point.lam:.3g}",
                "kept": len(kept),
                "precision": f"{right / max(len(kept), 1):.2f}",
                "recall": f"{right / true:.2f}",
                "valid_loss": f"{point.score:.4f}",
                "test_loss": f"{test_loss(found.model(point), parts['test'], task):.4f}",
                "lam_max": f"{found.lam_max or float('nan'):.3g}",
                "seconds": f"{seconds:.1f}",
            }
        )
    return rows


def test_loss(model: nn.Module, part: Part, task: str) -> float:
    return evaluate(model, [tuple(map(torch.from_numpy, part))], loss_of(task))


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in ("friedman1", *TABLES):
        parts, task, outputs, true = parts_of(folder, name)
        for title, taken in ((name, parts), (f"{name} +50%", with_random(parts))):
            new = measured(title, taken, task, outputs, true, epochs)
            show(new, titles=not rows)
            rows += new
    write(rows, __file__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
