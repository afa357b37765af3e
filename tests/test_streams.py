"""`gf.Parquet`: the rows of files larger than memory, each once, in an order that can be found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pyarrow import parquet
from torch import nn

import goodfit as gf
from goodfit.fitting.data import batches_of
from test_resume import Killed, ended, same

ROWS = 500


def written(path: Path, rows: int = ROWS, group: int = 64, first: int = 0) -> Path:
    """A row number, a column made of it, and a target."""
    number = np.arange(first, first + rows)
    columns = {"row": number.astype(np.float64), "wave": np.sin(number), "small": (number % 7).astype(np.int16)}
    parquet.write_table(pa.table(columns | {"y": np.cos(number), "kind": number % 3}), path, row_group_size=group)
    return path


def row_bytes(columns: int) -> int:
    return 8 * (columns + 2)


def epoch(batches: Any) -> list[tuple[list[float], list[float]]]:
    return [(x[:, 0].tolist(), y.tolist()) for x, y in batches]


@given(
    rows=st.integers(1, 120),
    group=st.integers(1, 50),
    size=st.integers(1, 40),
    room=st.integers(0, 100),
    shuffle=st.booleans(),
    count=st.integers(1, 3),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_comes_once_in_batches_of_the_usual_sizes(
    rows: int, group: int, size: int, room: int, shuffle: bool, count: int, tmp_path_factory: Any
) -> None:
    if min(size, rows) < count:
        return
    file = written(tmp_path_factory.mktemp("rows") / "r.parquet", rows, group)
    memory = row_bytes(4) * (2 * size + room)
    shares = []
    for rank in range(count):
        stream = gf.Parquet(file, "y", memory=memory)
        batches = batches_of(stream, "train", size, shuffle=shuffle, seed=1)
        batches.order.share = (rank, count)
        shares.append([[(int(row), float(y)) for row, y in zip(x[:, 0], ys, strict=True)] for x, ys in batches])
        assert len(shares[-1]) == len(batches)
    whole = [[pair for share in shared for pair in share] for shared in zip(*shares, strict=True)]
    pairs = [pair for batch in whole for pair in batch]
    assert sorted(row for row, _ in pairs) == list(range(rows))
    assert all(y == np.cos(row) for row, y in pairs)
    known = batches_of((torch.zeros(rows, 1), torch.zeros(rows)), "train", size, shuffle=False, seed=0)
    if count == 1:
        assert [len(batch) for batch in whole] == [len(y) for _, y in known]
        assert shuffle or [row for row, _ in pairs] == list(range(rows))


def test_an_order_is_that_of_its_seed_and_epoch(tmp_path: Path) -> None:
    stream = gf.Parquet(written(tmp_path / "r.parquet"), "y", memory=row_bytes(4) * 200)
    one, same, other = (batches_of(stream, "train", 32, shuffle=True, seed=seed) for seed in (1, 1, 2))
    first = epoch(one)
    assert epoch(same) == first
    assert epoch(other) != first
    second = epoch(one)
    assert second != first
    assert epoch(same) == second


def test_rows_are_shuffled_within_memory_and_all_of_them_where_they_fit(tmp_path: Path) -> None:
    file = written(tmp_path / "r.parquet", 6000, group=100)

    def distance(room: int) -> float:
        """How far rows are from their place in the file, against a third of all rows in a uniform shuffle."""
        batches = batches_of(gf.Parquet(file, "y", memory=row_bytes(4) * room), "train", 50, shuffle=True, seed=0)
        rows = torch.cat([x[:, 0] for x, _ in batches])
        return float((rows - torch.arange(6000)).abs().mean()) / 2000

    assert 0.95 < distance(6000) < 1.05
    assert 0.9 < distance(600) < 1.1  # row groups come in any order
    batches = batches_of(gf.Parquet(file, "y", memory=row_bytes(4) * 600), "train", 50, shuffle=True, seed=0)
    groups = [len({int(row) // 100 for row in x[:, 0]}) for x, _ in batches]
    assert sum(groups) / len(groups) > 5  # a batch of 50 has rows of most of the six row groups that are held


COCKTAIL = "Dropout(0.2), L2(1e-3), EarlyStopping(4)"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def train(folder: Path, after: int = 10**9, **more: Any) -> gf.Fit:
    columns = ["wave", "small"]
    streams = [gf.Parquet(folder / name, "y", columns, memory=row_bytes(3) * 128) for name in ("train", "valid.parquet")]
    return gf.fit(net(), *streams, COCKTAIL, loss=ended(after), epochs=3, batch_size=24, progress=False, **more)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    for part in range(3):
        written(tmp_path / "train" / f"{part}.parquet", 100 + part, 40, first=200 * part)
    written(tmp_path / "valid.parquet", 90, 33, first=1000)
    return tmp_path


def test_a_fit_scores_and_goes_on_as_with_rows_in_memory(table: Path) -> None:
    whole = train(table)
    assert whole.history[-1]["step"] == 3 * 13
    columns = parquet.read_table(table / "valid.parquet")
    x = torch.tensor(np.stack([columns["wave"].to_numpy(), columns["small"].to_numpy()], 1).astype(np.float64))
    with torch.no_grad():
        score = nn.functional.mse_loss(whole.model.eval()(x), torch.tensor(columns["y"].to_numpy()))
    assert whole.score == pytest.approx(float(score), rel=1e-12)
    for after in (1, 7, 13, 30):
        with pytest.raises(Killed):
            train(table, after, checkpoints=gf.Checkpoints(table / f"saved{after}", every=1))
        again = train(table, checkpoints=table / f"saved{after}")
        assert again.resumed == after
        same(again, whole)


def test_classes_and_a_stream_for_valid_alone(table: Path) -> None:
    stream = gf.Parquet(table / "valid.parquet", "kind", ["wave", "small"])
    draws = torch.randn(60, 2), torch.randint(3, (60,))
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    assert gf.fit(model, draws, stream, "L2(1e-3)", epochs=2).score > 0
    assert next(iter(batches_of(stream, "valid", 8, shuffle=False, seed=0)))[1].dtype == torch.int64


def test_numbers_beyond_the_dtype_are_named_in_training(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    parquet.write_table(pa.table({"x": [1.0, 1e300, 2.0, 3.0], "y": [0.0, 1.0, 2.0, 3.0]}), tmp_path / "r.parquet")
    stream = gf.Parquet(tmp_path / "r.parquet", "y")
    with pytest.raises(gf.GoodfitError, match=r"x has inf in 1 of its rows, the first of them row \d"):
        gf.fit(nn.Linear(1, 1), stream, (torch.zeros(4, 1), torch.zeros(4)), "L2(1e-3)", nonfinite="raise")


def table_of(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table({"x": [1.0, 2.0], "y": [0, 1]} | columns), path)
    return path


def test_what_is_no_stream_of_numbers_is_one_line(tmp_path: Path) -> None:
    good = table_of(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "none.parquet").write_text("x,y")
    (tmp_path / "empty").mkdir()
    text, gap = table_of(tmp_path / "text.parquet", x=["a", "b"]), table_of(tmp_path / "gap.parquet", x=[1.0, None])
    date = table_of(tmp_path / "date.parquet", x=pa.array([0, 1], pa.date32()))
    big = table_of(tmp_path / "big.parquet", y=pa.array([0, 2**64 - 1], pa.uint64()))
    none = table_of(tmp_path / "rows.parquet", x=pa.array([], pa.float64()), y=pa.array([], pa.int64()))
    real = table_of(tmp_path / "real.parquet", y=[0.5, 1.5])
    wide = table_of(tmp_path / "wide.parquet", z=[1.0, 2.0])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": tmp_path / "nowhere.parquet"}, "There is no Parquet file"),
        ({"path": tmp_path / "empty"}, "There is no Parquet file"),
        ({"path": tmp_path / "bad.parquet"}, "cannot be read as Parquet"),
        ({"path": tmp_path / "none.parquet"}, "cannot be read as Parquet"),
        ({"path": 3}, "Parquet.path must be a file, a folder or a list of files, got 3"),
        ({"path": []}, "Parquet.path must be a file, a folder or a list of files, got []"),
        ({"target": "yy"}, "has no column 'yy'; did you mean y"),
        ({"columns": ["xx"]}, "has no column 'xx'; did you mean x"),
        ({"columns": "x"}, "Parquet.columns must be a list of names, got 'x'; write ['x']"),
        ({"columns": ["x", "x"]}, "Parquet.columns must be inputs, each once"),
        ({"columns": ["x", "y"]}, "without the target 'y'"),
        ({"columns": []}, "Parquet.columns must be inputs"),
        ({"path": text}, "the column 'x' of"),
        ({"path": date}, "is date32[day]; encode it first"),
        ({"path": gap}, "has a missing value, in row group 0; fill it first"),
        ({"path": big}, "is uint64, and classes are int64"),
        ({"path": none}, "train has no rows"),
        ({"path": [good, real]}, "All files need columns of one kind, and 'y' is int64 in"),
        ({"path": [good, wide]}, "has other columns than"),
        ({"memory": 40}, "Parquet.memory must hold two batches of 1 rows, 48 bytes, got 40"),
        ({"memory": 0}, "Parquet.memory must be a number of bytes > 0, got memory=0"),
        ({"memory": True}, "Parquet.memory must be a number of bytes > 0, got memory=True"),
    ]
    for change, message in cases:
        with pytest.raises(gf.GoodfitError) as refused:
            list(batches_of(gf.Parquet(**{"path": good, "target": "y"} | change), "train", 1, shuffle=True, seed=0))
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_file_that_changes_under_the_training_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "r.parquet")
    batches = batches_of(gf.Parquet(file, "y"), "train", 32, shuffle=True, seed=0)
    list(batches)
    written(file, rows=ROWS + 1)
    with pytest.raises(gf.GoodfitError, match="is no longer the file that the training began with; put it back"):
        list(batches)
