"""Batches from what people have: every row once, in an order that the seed fixes, without touching their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from goodfit import GoodfitError
from goodfit.fitting.data import Batches, batches_of, peek, to_device

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], Y[i]


def plain(data: Any, size: int = 4, **how: Any) -> Any:
    return batches_of(data, "train", size, **{"shuffle": False, "seed": 0, **how})


@given(st.integers(1, 40), st.integers(1, 45), st.booleans())
def test_every_row_comes_once_and_no_batch_of_several_has_one_row(rows: int, size: int, shuffle: bool) -> None:
    y = torch.arange(rows)
    batches = plain((y, y), size, shuffle=shuffle)
    sizes = [len(b) for _, b in batches]
    assert len(batches) == len(sizes)
    assert sorted(torch.cat([b for _, b in batches]).tolist()) == y.tolist()
    assert all(n == size for n in sizes[:-1])
    assert sizes[-1] <= size + 1
    assert size == 1 or rows == 1 or 1 not in sizes


@pytest.mark.parametrize(
    "data", [(X, Y), [X, Y], (X.numpy(), Y.numpy()), TensorDataset(X, Y), Rows()], ids=lambda d: type(d).__name__
)
def test_all_kinds_of_data_give_the_same_batches_in_the_same_order(data: Any) -> None:
    reference, batches = plain((X, Y), shuffle=True, seed=5), plain(data, shuffle=True, seed=5)
    peek(batches)
    for _ in range(2):
        for (x, y), (x2, y2) in zip(reference, batches, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = plain((X, Y), shuffle=True, seed=seed)
        return [torch.cat([y for _, y in batches]).tolist() for _ in range(3)]

    first = epochs(1)
    before = torch.get_rng_state()
    assert epochs(1) == first
    assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(order) for order in (*first, *epochs(2), range(10))}) == 7


def test_nested_inputs_keep_their_shape_and_rows_together() -> None:
    x = {"a": X, "pair": (Y, X[:, 0])}
    for batch, y in plain((x, Y), shuffle=True):
        assert torch.equal(batch["a"], X[y])
        assert torch.equal(batch["pair"][0], y)
        assert torch.equal(batch["pair"][1], X[y, 0])


def test_a_batch_shares_no_memory_with_the_data() -> None:
    x, y = X.clone(), Y.clone()
    for batch, target in plain((x, y), 10):
        batch.zero_()
        target.zero_()
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones((4, 2)), torch.float64),  # torch's default type, which is double in tests
        (np.ones((4, 2), np.float32), torch.float32),
        (np.ones((4, 2), int), torch.int64),
        (np.ones((4, 2), np.uint8), torch.uint8),
        (np.ones((4, 2), bool), torch.bool),
        (np.ones((2, 4)).T, torch.float64),
        (np.ones((8, 2))[::-2], torch.float64),
        (np.ones((4, 2), ">f4"), torch.float32),
        ([[1.0, 1.0]] * 4, torch.float64),
        ([1, 1, 1, 1], torch.int64),
    ],
)
def test_arrays_become_tensors_of_a_fitting_type(array: Any, dtype: torch.dtype) -> None:
    (x, _), *_ = plain((array, torch.zeros(4)))
    assert x.dtype == dtype
    assert torch.equal(x, torch.ones(np.shape(array), dtype=dtype))


def test_doubles_become_the_default_type() -> None:
    torch.set_default_dtype(torch.float32)
    (x, y), *_ = plain((np.ones((4, 2)), np.ones(4)))
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)


def test_reversed_rows_stay_reversed() -> None:
    (x, _), *_ = plain((np.arange(4.0)[::-1], torch.zeros(4)))
    assert x.tolist() == [3, 2, 1, 0]


def test_a_read_only_memory_map_is_read_in_place(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float32).reshape(20, 2))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = plain((x, torch.zeros(20)), 5)
    assert batches.x.data_ptr() == x.ctypes.data
    assert torch.equal(torch.cat([b for b, _ in batches]), torch.from_numpy(np.array(x)))


def test_tensors_are_not_copied_and_a_loader_is_left_alone() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    assert plain(loader) is loader
    batches = plain((X, Y))
    assert isinstance(batches, Batches)
    assert batches.x is X


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((X[i], Y[i]) for i in range(10))


def test_a_stream_is_batched_in_its_order() -> None:
    assert [y.tolist() for _, y in plain(Stream(), shuffle=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"train must be a DataLoader, a Dataset, a gf\.Parquet or a pair \(x, y\) of tensors or arrays, got NoneType"),
        ((X, Y, Y), "got tuple of 3"),
        ({"x": X, "y": Y}, "got dict of 2"),
        (X, "got Tensor"),
        ((X, Y[:5]), r"train must have as many rows in x as in y, got \[5, 10\]"),
        (({"a": X, "b": X[:7]}, Y), r"as many rows in x as in y, got \[7, 10\]"),
        ((X, torch.tensor(1.0)), r"as many rows in x as in y, got \[0, 10\]"),
        ((X[:0], Y[:0]), "train has no rows; give at least one batch"),
        (TensorDataset(X[:0], Y[:0]), "train has no rows"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "train has no rows"),
        ((np.array(["a", "b"]), Y[:2]), "train must hold numbers, in rows of one length, got dtype <U1"),
        ((np.array([1, None]), Y[:2]), "train must hold numbers"),
        (([[1.0], [1.0, 2.0]], Y[:2]), "train must hold numbers"),
        ((np.ones(2, complex), Y[:2]), "got dtype complex128"),
    ],
)
def test_what_is_no_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        plain(data)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_a_batch_size_is_a_positive_integer(size: Any) -> None:
    with pytest.raises(GoodfitError, match="batch_size must be an integer >= 1, got batch_size="):
        plain((X, Y), size)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X, "y": Y}, "A batch must be a pair .*, got a dict of 2"),
        ((X, Y, Y), "got a tuple of 3"),
        (X, "got a Tensor"),
        ((X, {"a": Y}), "The y of a batch must be a tensor, got a dict"),
    ],
)
def test_a_batch_is_a_pair(batch: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        to_device(batch, torch.device("cpu"))


def test_a_list_of_inputs_as_a_loader_makes_it_is_a_tuple_of_positions() -> None:
    (x, _) = to_device(([X, Y], Y), torch.device("cpu"))
    assert isinstance(x, tuple)
    assert torch.equal(x[1], Y)
