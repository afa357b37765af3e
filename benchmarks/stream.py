"""Training on Parquet files of more and more rows within one bound of memory: stream.csv.

    python benchmarks/stream.py --rows 500000 1000000 5000000

Twenty columns of float32, row groups of 50,000 rows, one epoch of a small network in batches of 512. Each training has a
process of its own; its memory is the most that was resident, over that of a process which has imported the same and trained
on 10,000 rows. The floors: reading the same files with pyarrow alone, and training on the same rows held in memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from table import show, write
from torch import nn

import goodfit as gf

COLUMNS, GROUP, SIZE = 20, 50_000, 512


def written(path: Path, rows: int) -> None:
    """A file of numbers, written group by group."""
    draws = np.random.default_rng(0)
    fields = [pa.field(f"x{i}", pa.float32()) for i in range(COLUMNS)] + [pa.field("y", pa.float32())]
    with parquet.ParquetWriter(path, pa.schema(fields)) as file:
        for start in range(0, rows, GROUP):
            x = draws.standard_normal((COLUMNS, min(GROUP, rows - start)), dtype=np.float32)
            columns = [pa.array(one) for one in (*x, np.sin(x[0]) + x[1])]
            file.write_table(pa.table(dict(zip([f.name for f in fields], columns, strict=True))))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def measured(way: str, path: Path, memory: float) -> None:
    """In a process of its own: seconds and resident megabytes."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    if way == "read":
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16)
        sum(len(batch) for batch in file.iter_batches(2**14))
    else:
        train: Any = gf.Parquet(path, "y", memory=memory)
        if way == "in memory":
            table = parquet.read_table(path)
            x = np.stack([table[f"x{i}"].to_numpy() for i in range(COLUMNS)], 1)
            train = torch.from_numpy(x), torch.from_numpy(table["y"].to_numpy().copy())
            began = time.perf_counter()
        valid = torch.zeros(1000, COLUMNS), torch.zeros(1000)
        gf.fit(net(), train, valid, "L2(1e-4), EarlyStopping(5)", epochs=1, batch_size=SIZE, progress=False)
    print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def run(way: str, path: Path, memory: float) -> tuple[float, float]:
    command = [sys.executable, __file__, "--way", way, "--file", str(path), "--memory", str(memory)]
    seconds, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(megabytes)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[500_000, 1_000_000, 5_000_000])
    options.add_argument("--memory", type=float, default=64e6)
    options.add_argument("--way", choices=["stream", "read", "in memory"])
    options.add_argument("--file", type=Path)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    given = options.parse_args()
    if given.way:
        measured(given.way, given.file, given.memory)
        return
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        written(path, 10_000)
        bare = {way: run(way, path, given.memory)[1] for way in ("stream", "read", "in memory")}
        for rows in given.rows:
            written(path, rows)
            for way in ("read", "in memory", "stream"):
                seconds, megabytes = run(way, path, given.memory)
                row = {"rows": rows, "file_mb": round(path.stat().st_size / 1e6), "way": way, "seconds": round(seconds, 2)}
                table.append(row | {"rows_per_second": round(rows / seconds), "mb_beyond_bare": round(megabytes - bare[way])})
    show(table)
    write(table, str(given.out))


if __name__ == "__main__":
    main()
