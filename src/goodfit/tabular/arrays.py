"""NumPy archives: the arrays X and y as a table."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goodfit.errors import GoodfitError
from goodfit.tabular.cells import shown

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["read_npz"]


def read_npz(path: Path) -> tuple[pa.Table, list[str]]:
    """The table of the columns of X and of y, and notes."""
    import numpy as np
    import pyarrow as pa

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of damaged headers before it refuses them
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            x_name, y_name = _pair(names)
            x, y = _array(archive, x_name), _array(archive, y_name)
    if x.ndim == 0 or y.size != len(x) or y.ndim == 0 or len(y) != len(x):
        raise GoodfitError(
            f"expected X (rows, ...) and y (rows,), got {x_name} {x.shape} and {y_name} {y.shape}; mend the arrays."
        )
    said = [f"{x_name} of shape {x.shape} flattened to {(len(x), x[:1].size)}"] if x.ndim > 2 and len(x) else []
    if others := [shown(name) for name in names if name not in (x_name, y_name)]:
        said.append(f"arrays left out: {', '.join(others[:20])}")
    columns = np.ascontiguousarray(x.reshape(len(x), -1 if x.size else 0).T)
    names = [*(f"x{i}" for i in range(len(columns))), y_name]
    return pa.table([pa.array(column) for column in (*columns, y.reshape(-1))], names=names), said


def _pair(names: list[str]) -> tuple[str, str]:
    """The names of the two arrays."""
    xs = [name for name in names if name.lower() == "x"]
    ys = [name for name in names if name.lower() in ("y", "target")]
    if len(xs) != 1 or len(ys) != 1:
        got = ", ".join(shown(name) for name in names[:20]) or "none"
        raise GoodfitError(f"expected the arrays X and y (or target), got {got}; store one X and one y, all rows in them.")
    return xs[0], ys[0]


def _array(archive: Any, name: str) -> Any:
    import numpy as np

    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise GoodfitError(
            f"array {shown(name)}: expected numbers or text, got Python objects; store X.astype(float)."
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufUM":
        got = getattr(array, "dtype", type(array).__name__)
        raise GoodfitError(f"array {shown(name)}: expected numbers or text, got {shown(got)}; convert it before np.savez.")
    with np.errstate(over="ignore"):
        kind = np.dtype("f8") if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        return array.astype(kind, copy=False)
