"""Reading a table: the right values, or one line that names the place and the way out; never a silent loss."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from goodfit.errors import GoodfitError
from goodfit.tabular.read import read

FIVE = {pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.timestamp("us")}
TEN = "\n".join(str(i) for i in range(10))


def values(path: Path, **said: Any) -> dict[str, list[Any]]:
    table, notes = read(path, **said)
    assert set(table.schema.types) <= FIVE
    assert all("\n" not in note for note in notes)
    return table.to_pydict()


def message(path: Path, **said: Any) -> str:
    with pytest.raises(GoodfitError) as caught:
        read(path, **said)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text


def written(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


RIGHT: dict[str, tuple[str | bytes, dict[str, Any], dict[str, list[Any]]]] = {
    "numbers": ("a,b\n1,2.5\n-3,1e3\n+4, .5 \n", {}, {"a": [1, -3, 4], "b": [2.5, 1000.0, 0.5]}),
    "missing numbers": ("a,b\n1,NA\n?,2\n,n/k\n", {"missing": ["n/k"]}, {"a": [1, None, None], "b": [None, 2, None]}),
    "NA is a level of text": ("a,b\nNA,1\nx,2\n,3\n", {}, {"a": ["NA", "x", None], "b": [1, 2, 3]}),
    "truth values": ("a,b\ntrue,yes\nFALSE,no\nNA,no\n", {}, {"a": [True, False, None], "b": ["yes", "no", "no"]}),
    "dates": (
        "a,b\n2024-01-31,2024-01-31T10:00:00\n,2024-02-01 00:00\n",
        {},
        {"a": [dt.datetime(2024, 1, 31), None], "b": [dt.datetime(2024, 1, 31, 10), dt.datetime(2024, 2, 1)]},
    ),
    "dates with a zone": ("a\n2024-01-31 10:00:00+02:00\n2024-01-31T10:00:00.123456789Z\n", {}, {
        "a": [dt.datetime(2024, 1, 31, 8), dt.datetime(2024, 1, 31, 10, 0, 0, 123456)]}),
    "dates that do not exist": ("a\n2024-02-31\n", {}, {"a": ["2024-02-31"]}),
    "leading zeros": ("id,b\n007,0\n010,0.5\n", {}, {"id": ["007", "010"], "b": [0.0, 0.5]}),
    "leading zeros as numbers": ("id\n007\n010\n", {"numbers": ["id"]}, {"id": [7, 10]}),
    "beyond int64": ("a\n9223372036854775808\n1\n", {}, {"a": ["9223372036854775808", "1"]}),
    "beyond 2**53": ("a,b\n9007199254740993,9007199254740992\n", {}, {"a": ["9007199254740993"], "b": [2**53]}),
    "semicolon and decimal comma": ("a;b\n1,5;x\n-2;y\n", {}, {"a": [1.5, -2.0], "b": ["x", "y"]}),
    "tab and decimal comma": ("a\tb\n1,5\t3\n", {}, {"a": [1.5], "b": [3]}),
    "bar": ("a|b\n1|x,y\n", {}, {"a": [1], "b": ["x,y"]}),
    "separator in quotes": ('"a;x";"b,y"\n1;2\n', {}, {"a;x": [1], "b,y": [2]}),
    "one column": ("a\n1\n\n2\n", {}, {"a": [1, 2]}),
    "mark of UTF-8": (b'\xef\xbb\xbf"a,b",c\n1,2\n', {}, {"a,b": [1], "c": [2]}),
    "UTF-16 when said": ("a,b\n1,é\n".encode("utf-16"), {"encoding": "utf-16"}, {"a": [1], "b": ["é"]}),
    "latin-1 when said": ("a,b\n1,é\n".encode("latin-1"), {"encoding": "latin-1"}, {"a": [1], "b": ["é"]}),
    "returns and blank lines": ("a,b\r1,2\r\r\n3,4\r\n\n", {}, {"a": [1, 3], "b": [2, 4]}),
    "line breaks and quotes in cells": ('a,b\n"x\ny, z",1\n"5"" pipe",2\n', {}, {"a": ["x\ny, z", '5" pipe'], "b": [1, 2]}),
    "a quote within a cell": ('a,b\n5" pipe,1\n', {}, {"a": ['5" pipe'], "b": [1]}),
    "names of any script": ("名,🙂,</script>\n1,2,3\n", {}, {"名": [1], "🙂": [2], "</script>": [3]}),
    "spaces around": (" a , b\n x,1\n", {}, {"a": ["x"], "b": [1]}),
    "the index of pandas": (",a\n0,5\n1,6\n", {}, {"a": [5, 6]}),
    "mostly text": ("a\n1\n2\nx\n", {}, {"a": ["1", "2", "x"]}),
    "text when said": (f"a\n{TEN}\nx\n", {"text": ["a"]}, {"a": [*(str(i) for i in range(10)), "x"]}),
    "odd cell said to be missing": (f"a\n{TEN}\nx\n", {"missing": ["x"]}, {"a": [*range(10), None]}),
    "infinity said to be missing": ("a\n1.5\ninf\n", {"missing": ["inf"]}, {"a": [1.5, None]}),
    "all missing": ("a,b\nNA,1\n,2\n", {}, {"a": [None, None], "b": [1, 2]}),
    "dropped": ("a,b\n1,2\n", {"drop": ["b"]}, {"a": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_a_csv_is_read_as_what_it_says(case: str, tmp_path: Path) -> None:
    content, said, expected = RIGHT[case]
    assert values(written(tmp_path, content), **said) == expected


WRONG: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "row too short": ("a,b\n1,2\n\n3\n", {}, "row 2: expected 2 cells as in the header, got 1"),
    "row too long": ("a,b\n1,2\n3,4,5\n", {}, "row 2: expected 2 cells as in the header, got 3"),
    "quote left open": ('a,b\n1,2\n"3,4\n5,6\n', {}, "row 2: expected a closing quote"),
    "quote open in the last column": ('a,b\n1,"2\n3,4\n', {}, "row 1: expected a closing quote"),
    "quote open at the end": ('a,b\n1,2\n3,"4', {}, "row 2: expected a closing quote"),
    "quote closed rows later": ('a,b\n1,"x\n2,"y"\n', {}, "row 1: expected a closing quote"),
    "latin-1 byte": (b"a,b\n1,x\n2,\xe9\n", {}, "line 3: expected utf-8, got the byte 0xe9; if it was written"),
    "NUL byte": (b"a,b\n1,2\n3,\x00\n", {}, "line 3: expected text, got a NUL byte"),
    "text among numbers": (f"a\n{TEN}\nx y\n", {}, "column a: expected numbers, got text in 1 of 11 cells, first 'x y' in row"
                           " 11; make such a cell missing with --missing 'x y', or read the column as text with --text a."),
    "text in forced numbers": ("a\n1\nx\n", {"numbers": ["a"]}, "first 'x' in row 2"),
    "infinity": ("a\n1\n-inf\n", {}, "column a: expected finite numbers, got 1 infinite, first '-inf' in row 2; "
                 "make them missing with --missing=-inf."),
    "too large for a float": ("a\n1.5\n1e999\n", {}, "column a: expected finite numbers, got 1 infinite, first inf in row 2"),
    "two decimal signs": ("a;b\n1,5;2\n1.5;3\n", {}, "expected one decimal sign, got '1,5' in row 1 and '1.5' in row 2"),
    "thousands": ('a,b\n"1,234",x\n12,y\n', {}, "column a: expected numbers such as 1234.5, got '1,234' in row 1"),
    "decimal comma in quotes": ('a,b\n"1,5",x\n', {}, "expected numbers such as 1234.5, got '1,5' in row 1"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), {}, "got UTF-16; use --encoding utf-16."),
    "UTF-16 without its mark": ("a,b\n1,2\n".encode("utf-16-be"), {}, "got UTF-16; use --encoding utf-16-be."),
    "UTF-32": ("a,b\n1,2\n".encode("utf-32"), {}, "got UTF-32; use --encoding utf-32."),
    "unknown encoding": ("a\n1\n", {"encoding": "utf-9"}, "got utf-9"),
    "same name twice": ("a,b,a\n1,2,3\n", {}, "expected each column name once, got more than one a;"),
    "no name": ("a,,c\n1,2,3\n", {}, "got none for column 2 of 3"),
    "empty": ("", {}, "got an empty file"),
    "only blank lines": ("\n \n", {}, "got an empty file"),
    "header only": ("a,b\n", {}, "has a header but no rows"),
    "no header": ("1,2\n3,4\n", {}, "the first line must be the column names, got 1, 2;"),
    "no header before a label": ("5.1,3.5,iris\n4.9,3.0,iris\n", {}, "the first line must be the column names"),
    "unknown column": ("height,b\n1,2\n", {"text": ["hieght"]}, "--text hieght names no column; did you mean height?"),
    "text and numbers": ("a\n1\n", {"text": "a", "numbers": "a"}, "expected text or numbers, got both"),
    "everything dropped": ("a\n1\n", {"drop": ["a"]}, "at least one column"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_csv_in_doubt_is_one_line_with_the_place_and_the_way_out(case: str, tmp_path: Path) -> None:
    content, said, expected = WRONG[case]
    assert expected in message(written(tmp_path, content), **said)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("a;b\n1,5;2\n", "read with ';' as separator"),
        ("a;b\n1,5;2\n", "column a: read with ',' as decimal sign"),
        ("id,b\n01,02\n", "columns id, b: leading zeros kept, read as text"),
        ("a\n9007199254740993\n", "column a: whole numbers beyond 2**53 kept as text"),
        ("a\n2024-02-31\n", "column a: holds dates that do not exist, read as text"),
        (" a,b\nx, y\n", "spaces around column names cut off"),
        (" a,b\nx, y\n", "column b: spaces around the text cut off"),
        (",a\n1,5\n", "the unnamed first column counts the rows"),
        ("a b\n1 2\n", "one column"),
        ("a,b\n,1\n", "column a: every cell is missing"),
        ("39,State-gov\n40,x\n", "1 of 2 column names are numbers (39)"),
    ],
)
def test_a_decision_is_noted(content: str, note: str, tmp_path: Path) -> None:
    _, notes = read(written(tmp_path, content))
    assert any(note in line for line in notes), notes


def test_a_fault_far_down_is_found_with_its_row(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i / 8}\n" for i in range(200_000))
    assert "row 200001: expected 2 cells" in message(written(tmp_path, f"a,b\n{rows}7\n"))
    assert "line 200002: expected utf-8" in message(written(tmp_path, f"a,b\n{rows}7,".encode() + b"\xff\n"))
    assert "first 'x' in row 200001" in message(written(tmp_path, f"a,b\n{rows}x,7\n"))


def test_csv_comes_under_other_names_and_packed(tmp_path: Path) -> None:
    for name, content in (("t.TXT", b"a,b\n1,2\n"), ("t.tsv", b"a\tb\n1\t2\n"), ("t.csv.gz", gzip.compress(b"a,b\n1,2\n"))):
        assert values(written(tmp_path, content, name)) == {"a": [1], "b": [2]}
    assert "expected a readable csv" in message(written(tmp_path, gzip.compress(b"a,b\n1,2\n" * 99)[:-9], "cut.csv.gz"))


def test_every_arrow_type_becomes_one_of_five(tmp_path: Path) -> None:
    day = dt.datetime(2024, 1, 31)
    zoned = pa.array([day, None], pa.timestamp("ns", "Europe/Berlin"))
    columns: dict[str, tuple[Any, list[Any]]] = {
        "i8": (pa.array([1, None], pa.int8()), [1, None]),
        "u64": (pa.array([1, 2], pa.uint64()), [1, 2]),
        "huge": (pa.array([1, 2**63], pa.uint64()), ["1", str(2**63)]),
        "f16": (pa.array([1.5, float("nan")], pa.float16()), [1.5, None]),
        "decimal": (pa.array([decimal.Decimal("1.5"), None]), [1.5, None]),
        "bool": (pa.array([True, None]), [True, None]),
        "digits": (pa.array(["01", "2"]), ["01", "2"]),
        "large": (pa.array(["NA", None], pa.large_string()), ["NA", None]),
        "levels": (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        "codes": (pa.array([3, 4]).dictionary_encode(), ["3", "4"]),
        "date": (pa.array([day.date(), None]), [day, None]),
        "zoned": (zoned, [day, None]),
        "time": (pa.array([dt.time(0, 1, 30), None]), [90.0, None]),
        "second": (pa.array([90, None], pa.time32("s")), [90.0, None]),
        "duration": (pa.array([dt.timedelta(seconds=2.5), None]), [2.5, None]),
        "null": (pa.nulls(2), [None, None]),
    }
    table = pa.table({name: column for name, (column, _) in columns.items()})
    expected = {name: right for name, (_, right) in columns.items()}
    pq.write_table(table, tmp_path / "t.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "t.feather")
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as sink:
        sink.write_table(table)
    for name in ("t.parquet", "t.feather", "t.arrow"):
        assert values(tmp_path / name) == expected


def test_a_typed_file_obeys_what_is_said_of_its_columns(tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, -999.0], "b": ["1", "x"], "c": [1, 2], "d": [[1], [2]]})
    pq.write_table(table, path := tmp_path / "t.pq")
    said: dict[str, Any] = {"missing": ["-999", "x"], "text": ["c"], "numbers": ["b"], "drop": ["d"]}
    assert values(path, **said) == {"a": [1.0, None], "b": [1, None], "c": ["1", "2"]}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pa.table({"a": [1.0, float("inf")]}), "column a: expected finite numbers, got 1 infinite, first inf in row 2"),
        (pa.table({"a": [[1], [2]]}), "column a: expected numbers, text or dates, got list<"),
        (pa.table({"a b": [b"1"]}), "got binary; leave it out with --drop 'a b'."),
        (pa.table([[1], [2]], names=["a", "a"]), "expected each column name once, got more than one a"),
        (pa.table({"a": pa.array([], pa.int64())}), "no rows"),
        (pa.table({"a": pa.array([2**31 - 1], pa.date32())}), "expected a readable column a"),
    ],
)
def test_a_typed_table_in_doubt_is_one_line(table: pa.Table, expected: str, tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "t.ipc", table.schema) as sink:
        sink.write_table(table)
    assert expected in message(tmp_path / "t.ipc")


def test_arrays_become_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, X=np.arange(8, dtype=">f4").reshape(2, 2, 2), Y=np.array(["x", "y"]), more=np.zeros(3))
    assert values(path) == {"x0": [0, 4], "x1": [1, 5], "x2": [2, 6], "x3": [3, 7], "Y": ["x", "y"]}
    assert read(path)[1] == ["X of shape (2, 2, 2) flattened to (2, 4)", "arrays left out: more"]
    np.savez(path, x=np.array([1.5, np.nan]), target=np.array([[True], [False]]))
    assert values(path) == {"x0": [1.5, None], "target": [True, False]}


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"X_train": [[1]], "y_train": [1], "X_test": [[1]]}, "got X_train, y_train, X_test; store one X and one y"),
        ({"X": [[1], [2]], "y": [1]}, "got X (2, 1) and y (1,)"),
        ({"X": [[1], [2]], "y": [[1, 0], [0, 1]]}, "got X (2, 1) and y (2, 2)"),
        ({"X": np.array([[1], ["x", 2]], dtype=object), "y": [1, 2]}, "array X: expected numbers or text, got Python objects"),
        ({"X": [[1j]], "y": [1]}, "array X: expected numbers or text, got complex128"),
        ({"X": np.zeros((0, 2)), "y": []}, "no rows"),
    ],
)
def test_arrays_in_doubt_are_one_line(arrays: dict[str, Any], expected: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **{name: np.asarray(array) for name, array in arrays.items()})
    assert expected in message(tmp_path / "t.npz")


def test_a_path_that_is_no_table_is_one_line(tmp_path: Path) -> None:
    written(tmp_path, "a\n1\n", "train.csv")
    assert "there is no such file; did you mean train.csv?" in message(tmp_path / "trian.csv")
    assert "nor its folder" in message(tmp_path / "none" / "t.csv")
    assert "got a folder" in message(tmp_path)
    assert "got .xlsx; save the table as CSV" in message(written(tmp_path, "x", "t.xlsx"))
    for name in ("t.parquet", "t.arrow", "t.npz"):
        assert "empty file" in message(written(tmp_path, "", name))
        assert f"expected a readable {name[2:]}" in message(written(tmp_path, "not a table", name))
    assert "expected a readable file" in message(tmp_path / f"{'n' * 300}.csv")


def test_the_reader_is_imported_without_pyarrow() -> None:
    code = "import sys, goodfit.tabular.read; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        j = min(j, i + rng.choice([1, 8, 64]))
        odd = rng.choice([b'"', b",", b";", b"\n", b"\r", b"\0", b"\xff", b"inf", b"1,5", b"-", rng.randbytes(3), data[i:j]])
        data[i : rng.choice([i, j])] = odd
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def reads_or_says_why(path: Path) -> bool:
    said = ""
    try:
        assert any(values(path).values())
    except GoodfitError as error:
        said = str(error)
    assert len(said.splitlines()) == bool(said)
    return not said


def test_a_damaged_csv_is_a_table_or_one_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = "".join(f'{i},{i / 3:.3f},"text, {i}",2024-01-{i + 1:02},true,0{i}\n' for i in range(20))
    whole = f"n,x,words,day,truth,id\n{rows}".encode()
    outcomes = [reads_or_says_why(written(tmp_path, mutated(whole, rng))) for _ in range(300)]
    assert 20 < sum(outcomes) < 280


@pytest.mark.parametrize("name", ["t.parquet", "t.npz"])
def test_a_damaged_binary_file_is_a_table_or_one_line(name: str, tmp_path: Path) -> None:
    path, rng = tmp_path / name, random.Random(1)
    if name == "t.npz":
        np.savez(path, X=np.ones((9, 3)), y=np.array(["x"] * 9))
    else:
        pq.write_table(pa.table({"a": [1.5, 2.5, None] * 3, "b": ["x", "é", None] * 3}), path)
    whole = path.read_bytes()
    for _ in range(100):
        reads_or_says_why(written(tmp_path, mutated(whole, rng), name))
