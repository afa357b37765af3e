"""Which criterion of early stopping gives how much for how many epochs, over recorded curves?

usage: python benchmarks/early_stopping_front.py

Replays the curves of `early_stopping_curves.py` (10 tables × 6 set-ups × 6 seeds, 150 epochs each) through every criterion.
The oracle is the epoch with the best validation loss of a whole curve. cost: epochs until the stop, as a multiple of the
oracle's epoch (geometric mean); epochs: their mean number. regret: how much higher the validation loss of the kept epoch is
than the oracle's, in per cent; held out: the same for the loss on rows that no criterion sees, negative where stopping early
was better than the oracle. All are means over tables of means within a table; ± is the standard error over tables.

front: no other criterion has both lower cost and lower regret. serves: a default must do with a score alone, since many loops
tell no more, and must stop where a score stands still. Of those that serve, the default is the one of lowest cost whose regret
is at most one per cent. It is chosen with one table left out, ten times: "chosen" counts how often, and the second table tells
what each choice gave on the table that it had not seen; below stand the choice of all ten tables and what the package has now.
Held-out rows choose nothing. Prints both tables, and writes them (CSV, JSON) and the picture (PNG) beside this file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from table import show, write
from torch import Tensor

import goodfit as gf
from goodfit.defaults import COCKTAIL
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
    "Patience(20) | GL(5)",
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


def serves(text: str, length: int) -> bool:
    """Whether it needs a score alone, and stops where that stands still."""
    stopping: Any = gf.parse(f"EarlyStopping({text})")[0]
    still = dict.fromkeys(INPUTS, torch.ones(1, length, dtype=torch.float64))
    return not stopping.criterion.needs and int(stops(text, still)) < length


def choice(cost: Tensor, regret: Tensor, candidates: Tensor, tables: Tensor) -> int:
    """Of the candidates within the limit on these tables, the one of lowest cost on them."""
    allowed = candidates & (regret[:, tables].mean(1) <= LIMIT)
    assert allowed.any(), f"no criterion has a regret of at most {LIMIT} % on these tables"
    return int(torch.where(allowed, cost[:, tables].mean(1), torch.inf).argmin())


def left_out(whole: dict[str, Tensor], candidates: Tensor, names: list[str]) -> tuple[list[int], list[dict[str, Any]]]:
    """What the other tables choose for each table, all of them last, and what it gives there."""
    tables = torch.arange(len(names))
    chosen = [choice(whole["cost"], whole["regret"], candidates, tables[tables != i]) for i in range(len(names))]
    told = {name: whole[name][chosen, tables] for name in whole}
    rows = [
        given(name, CRITERIA[i], {k: t[n] for k, t in told.items()})
        for n, (name, i) in enumerate(zip(names, chosen, strict=True))
    ]
    rows.append(given("mean of these", "", {k: t.mean() for k, t in told.items()}))
    patience = next(one.patience for one in gf.parse(COCKTAIL) if isinstance(one, gf.EarlyStopping))
    default = patience if isinstance(patience, gf.stop.Criterion) else gf.stop.Patience(patience)
    best = choice(whole["cost"], whole["regret"], candidates, tables)
    for title, i in (("all tables", best), ("defaults.py", CRITERIA.index(repr(default)))):
        rows.append(given(title, CRITERIA[i], {k: t[i].mean() for k, t in whole.items()}))
    return [*chosen, best], rows


def given(title: str, text: str, numbers: dict[str, Tensor]) -> dict[str, Any]:
    """A row of the second table."""
    rounded = {name: round(float(t.exp() if name == "cost" else t), 2) for name, t in numbers.items()}
    return {"table": title, "chosen": text, **rounded}


def draw(rows: list[dict[str, Any]], default: str, path: Path) -> None:
    """Cost against regret, the front as a line, its criteria numbered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.5), layout="constrained")
    kinds = ["joined" if " | " in r["criterion"] or " & " in r["criterion"] else r["criterion"].partition("(")[0] for r in rows]
    for kind in sorted(set(kinds)):
        of = [row for row, known in zip(rows, kinds, strict=True) if known == kind]
        axes.scatter([r["cost"] for r in of], [r["regret"] for r in of], label=kind, s=28, zorder=2)
    front = sorted((row["cost"], row["regret"], row["criterion"]) for row in rows if row["front"])
    axes.plot([cost for cost, _, _ in front], [regret for _, regret, _ in front], color="0.7", zorder=1)
    for i, (cost, regret, _) in enumerate(front, 1):
        axes.annotate(
            str(i),
            (cost, regret),
            xytext=(-3, -5 if i % 2 else -13),
            textcoords="offset points",
            fontsize=8,
            ha="right",
            va="top",
        )
    at = next(row for row in rows if row["criterion"] == default)
    axes.scatter([at["cost"]], [at["regret"]], s=160, facecolors="none", edgecolors="k", label=f"chosen: {default}", zorder=3)
    axes.set(xlabel="epochs until the stop / epoch of the oracle (geometric mean)", ylabel="regret in validation loss, %")
    axes.set(xscale="log", xlim=(0.5, 5), xticks=(0.5, 1, 2, 4), xticklabels=("0.5", "1", "2", "4"))
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(ylim=(-0.01, 20), yticks=(0, 0.1, 1, 10), yticklabels=("0", "0.1", "1", "10"))
    axes.xaxis.minorticks_off()
    listed = "\n".join(["front", "", *(f"{i:>2}  {text}" for i, (_, _, text) in enumerate(front, 1))])
    axes.text(1.02, 1, listed, transform=axes.transAxes, fontsize=8, va="top", linespacing=1.6)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    torch.set_num_threads(1)
    columns, table, names = curves()
    found = [measured(text, columns, table) for text in CRITERIA]
    whole = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    front = on_front(whole["cost"].mean(1), whole["regret"].mean(1))
    candidates = torch.tensor([serves(text, columns["valid"].shape[1]) for text in CRITERIA])
    (*chosen, best), choices = left_out(whole, candidates, names)
    rows = []
    for i, text in enumerate(CRITERIA):
        row: dict[str, Any] = {"criterion": text, "cost": round(float(whole["cost"][i].mean().exp()), 2)}
        row["epochs"] = round(float(whole["epochs"][i].mean()), 1)
        for name in ("regret", "held out"):
            row |= {name: round(float(whole[name][i].mean()), 2)}
            row |= {f"{name} ±": round(float(whole[name][i].std() / len(names) ** 0.5), 2)}
        row |= {"front": "front" if front[i] else "", "serves": "serves" if candidates[i] else ""}
        rows.append(row | {"chosen": Counter(chosen)[i] or ""})
    show(rows)
    write(rows, __file__)
    print()
    show(choices)
    Path(__file__).with_suffix(".json").write_text(json.dumps(choices, indent=1) + "\n", encoding="utf-8")
    draw(rows, CRITERIA[best], Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
