"""Which criterion of early stopping gives how much for how many epochs, over recorded curves?

usage: python benchmarks/early_stopping_front.py

Replays the curves of `early_stopping_curves.py` (10 tables × 6 set-ups × 6 seeds, 150 epochs each) through every criterion.
The oracle is the epoch with the best validation loss of a whole curve. cost: epochs until the stop, as a multiple of the
oracle's epoch (geometric mean); epochs: their mean number. regret: how much higher the validation loss of the kept epoch is
than the oracle's, in per cent; held out: the same for the loss on rows that no criterion sees, negative where stopping early
was better than the oracle. All are means over tables of means within a table; ± is the standard error over tables.

front: no other criterion has both lower cost and lower regret. The default is chosen with one table left out, ten times: of
the criteria whose regret on the nine other tables is at most one per cent, the one with the fewest epochs; "chosen" counts
how often. Held-out rows choose nothing. Prints the table, writes it as CSV, and draws it as PNG beside this file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from table import show, write
from torch import Tensor

import goodfit as gf
from goodfit.phases import Report

INPUTS = ("valid", "train", "stderr", "evidence", "steps")
LIMIT = 1.0  # per cent of regret
CRITERIA = (
    *(f"Patience({p})" for p in (3, 5, 10, 15, 20, 30, 40)),
    *(f"Patience({p}, rel_delta=0.01)" for p in (5, 10, 20)),
    *(f"Patience({p}, stderrs={z})" for p, z in ((10, 0.25), (20, 0.25), (20, 1.0))),
    *(f"Patience({p}, grow={g})" for p, g in ((3, 0.3), (5, 0.3), (10, 0.3), (5, 1.0), (10, 1.0))),
    *(f"GL({a})" for a in (1, 2, 5, 10, 20)),
    *(f"PQ({a})" for a in (0.25, 0.5, 1, 2)),
    *(f"UP({s})" for s in (1, 2, 3, 4)),
    *(f"Smoothed(Patience({p}), ema={m})" for p, m in ((5, 0.5), (5, 0.8), (10, 0.8))),
    *(f"Smoothed(Patience({p}), median=5)" for p in (5, 10)),
    "Evidence()",
    "Patience(20) | GL(10)",
    "Patience(10) & GL(2)",
    "Patience(10) & UP(2)",
)


def curves() -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Each column as (curves, epochs), the table of each curve, and the names of the tables."""
    told = pq.read_table(Path(__file__).with_name("early_stopping_curves.parquet"))
    keys = list(zip(*(told[name].to_pylist() for name in ("table", "setup", "seed")), strict=True))
    length = int(max(told["epoch"].to_pylist()))
    columns = {
        name: torch.tensor(told[name].to_numpy(), dtype=torch.float64).view(-1, length) for name in (*INPUTS, "held_out")
    }
    names = [table for table, _, _ in keys[::length]]
    known = sorted(set(names))
    return columns, torch.tensor([known.index(name) for name in names]), known


def stops(text: str, columns: dict[str, Tensor]) -> Tensor:
    """After how many epochs a criterion stops each curve; the last one where it does not."""
    stopping: Any = gf.parse(f"EarlyStopping({text}, restore=False)")[0]
    count, length = columns["valid"].shape

    def check(state: dict[str, Tensor], row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        told: tuple[bool | Tensor, dict[str, Tensor]] = stopping.epoch(Report(*row), {}, {}, state)
        return torch.as_tensor(told[0]), told[1]

    state = {name: t.expand(count, *t.shape).clone() for name, t in stopping.init({}, {}).items()}
    rows = torch.stack([columns[name] for name in INPUTS], dim=-1)
    found = torch.full((count,), length)
    for epoch in range(length):
        go_on, state = torch.func.vmap(check)(state, rows[:, epoch])
        found = torch.where(~go_on & (found == length), epoch + 1, found)
    return found


def by_table(values: Tensor, table: Tensor) -> Tensor:
    """The mean within each table."""
    return torch.stack([values[table == i].mean() for i in range(int(table.max()) + 1)])


def measured(text: str, columns: dict[str, Tensor], table: Tensor) -> dict[str, Tensor]:
    """What a criterion costs and gives, for each table."""
    valid, held = columns["valid"], columns["held_out"]
    stop, oracle = stops(text, columns), valid.argmin(1)
    epoch = torch.arange(valid.shape[1])
    kept = torch.where(epoch < stop[:, None], valid, torch.inf).argmin(1)

    def worse(losses: Tensor) -> Tensor:
        mine, best = (losses.gather(1, index[:, None])[:, 0] for index in (kept, oracle))
        return 100 * (mine / best - 1)

    found = {"cost": (stop / (oracle + 1)).log(), "epochs": stop.double(), "regret": worse(valid), "held out": worse(held)}
    return {name: by_table(t, table) for name, t in found.items()}


def on_front(cost: Tensor, regret: Tensor) -> Tensor:
    """Which are dominated by none."""
    worse = (cost[:, None] >= cost) & (regret[:, None] >= regret) & ((cost[:, None] > cost) | (regret[:, None] > regret))
    return ~worse.any(1)


def choices(epochs: Tensor, regret: Tensor) -> list[int]:
    """For each table the criterion that the others choose: of those within the limit the one with the fewest epochs."""
    found = []
    for left_out in range(epochs.shape[1]):
        rest = torch.arange(epochs.shape[1]) != left_out
        allowed = regret[:, rest].mean(1) <= LIMIT
        found.append(int(torch.where(allowed, epochs[:, rest].mean(1), torch.inf).argmin()))
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against regret, the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    points = {row["criterion"]: (row["cost"], max(row["regret"], 0.01)) for row in rows}
    kinds = {text: "joined" if " | " in text or " & " in text else text.partition("(")[0] for text in points}
    for kind in sorted(set(kinds.values())):
        x, y = zip(*(at for text, at in points.items() if kinds[text] == kind), strict=True)
        axes.scatter(x, y, label=kind, s=28)
    front = sorted((points[row["criterion"]], row["criterion"]) for row in rows if row["front"])
    axes.plot(*zip(*(at for at, _ in front), strict=True), color="0.7", zorder=0)
    for at, text in front:
        axes.annotate(text, at, xytext=(-3, -3), textcoords="offset points", fontsize=7, rotation=40, ha="right", va="top")
    axes.set(xlabel="epochs until the stop / epoch of the oracle", ylabel="regret in validation loss, %")
    axes.set(
        xscale="log", yscale="log", xlim=(0.4, 6), xticks=(0.5, 1, 2, 4), xticklabels=("0.5", "1", "2", "4"), ylim=(0.007, 20)
    )
    axes.xaxis.minorticks_off()
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    columns, table, names = curves()
    found = [measured(text, columns, table) for text in CRITERIA]
    whole = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    front = on_front(whole["cost"].mean(1), whole["regret"].mean(1))
    chosen = choices(whole["epochs"], whole["regret"])
    rows = []
    for i, text in enumerate(CRITERIA):
        row: dict[str, Any] = {"criterion": text, "cost": round(float(whole["cost"][i].mean().exp()), 2)}
        row["epochs"] = round(float(whole["epochs"][i].mean()), 1)
        for name in ("regret", "held out"):
            row |= {name: round(float(whole[name][i].mean()), 2)}
            row |= {f"{name} ±": round(float(whole[name][i].std() / len(names) ** 0.5), 2)}
        rows.append(row | {"front": "front" if front[i] else "", "chosen": Counter(chosen)[i] or ""})
    show(rows)
    write(rows, __file__)
    left = {name: float(whole[name][chosen, range(len(names))].mean()) for name in ("epochs", "regret", "held out")}
    print("chosen without a table, and used on it:", ", ".join(f"{name} {number:.2f}" for name, number in left.items()))
    draw(rows, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
