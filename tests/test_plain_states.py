"""States as plain data: every kind comes back by equal bits, or is refused by name."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

import goodfit as gf
from bits import bits
from goodfit.checkpoints.plain import packed, unpacked


def through(folder: Path, **parts: Any) -> dict[str, Any]:
    """The states of these parts, of dicts here, through a checkpoint."""
    saving = gf.Checkpoints(folder).watch(**parts)
    saving.save(1)
    saving.close()
    back: dict[str, Any] = {name: type(part)() for name, part in parts.items()}
    saving = gf.Checkpoints(folder).watch(**back)
    assert saving.restore() == 1
    saving.close()
    return back


DTYPES = [one for one in vars(torch).values() if isinstance(one, torch.dtype)]
WHOLE = [one for one in DTYPES if not str(one).startswith(("torch.q", "torch.uint", "torch.int", "torch.bits", "torch.float4"))]
WHOLE += [getattr(torch, f"{sign}int{n}") for sign in ("", "u") for n in (8, 16, 32, 64) if hasattr(torch, f"{sign}int{n}")]


def random_bytes(dtype: torch.dtype, n: int = 6) -> Tensor:
    """Numbers of every kind: nan with a payload, denormal, -0.0; bool is 0 or 1."""
    if dtype is torch.bool:
        return torch.randint(2, (n,), dtype=dtype)
    return torch.randint(256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", sorted(set(WHOLE), key=str), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back_by_equal_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    flat = random_bytes(dtype)
    part = {
        "flat": flat,
        "0-d": flat[0],
        "empty": flat[:0],
        "empty too": flat.reshape(2, 3)[:, :0],
        "matrix": flat.reshape(2, 3),
    }
    part |= {"strided": flat[::2], "turned": flat.reshape(2, 3).T, "expanded": flat[:1].expand(4)}
    if dtype.is_complex:
        part |= {"conj": flat.conj(), "imag": flat.conj().imag}
    back = through(tmp_path, part=part)["part"]
    assert bits(back) == bits(part)
    assert all(tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() for tensor in back.values())


NUMPY = "?bhilqBHILQefdFD"


@pytest.mark.parametrize("kind", NUMPY)
def test_numpy_comes_back_by_equal_bits(kind: str, tmp_path: Path) -> None:
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(kind)
    part = {"array": array, "0-d": np.array(array[1, 1]), "scalar": array[1, 2], "empty": array[:0], "turned": array.T}
    part |= {"back": array[::-1], "expanded": np.broadcast_to(array[:1], (3, 3))}
    back = through(tmp_path, part=part)["part"]
    assert [(one.dtype, one.shape, one.tolist()) for one in back.values()] == [
        (one.dtype, one.shape, one.tolist()) for one in part.values()
    ]
    assert isinstance(back["scalar"], np.generic)
    assert type(back["0-d"]) is np.ndarray


def test_numbers_of_another_byte_order_come_back_as_the_same_numbers(tmp_path: Path) -> None:
    back = through(tmp_path, part={"array": np.arange(3, dtype=">f8")})["part"]["array"]
    assert back.tolist() == [0.0, 1.0, 2.0]


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(st.characters())
    | st.sampled_from(DTYPES[:0] or [torch.float64, torch.bfloat16, torch.bool]).map(lambda dtype: torch.ones(2).to(dtype))
    | st.floats(width=32).map(np.float32)
)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text()) | st.floats(allow_nan=False)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


@given(state=PLAIN)
@settings(deadline=None)
def test_a_nested_plain_state_is_packed_and_unpacked_by_equal_bits(state: Any) -> None:
    tree, tensors = packed(state, "part")
    assert bits(unpacked(tree, tensors)) == bits(state)


@given(state=st.dictionaries(st.text(), PLAIN, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_nested_plain_state_comes_back_from_the_disk_by_equal_bits(state: dict[str, Any], tmp_path_factory: Any) -> None:
    back = through(tmp_path_factory.mktemp("saved"), part=state, listed=[state, 1])
    assert bits(back) == bits({"part": state, "listed": [state, 1]})


ODD: dict[str, Any] = {
    "names that safetensors has for itself": {
        "__metadata__": torch.ones(2),
        "": torch.ones(1),
        "x": {"__metadata__": torch.ones(3)},
    },
    "names that read alike": {"a.b": torch.zeros(1), "a": {"b": torch.ones(1), "b'": torch.ones(2)}, "a.b'": torch.ones(3)},
    "a key of half a character": {"\ud800": torch.ones(2), "\\ud800": torch.ones(3)},
    "names of files": {"../x": torch.ones(1), "/etc/passwd": torch.ones(2), "\0": torch.ones(3), "model": torch.ones(4)},
    "a number of 20,000 digits": {"n": 10**20000, "m": -(10**20000)},
    "numbers that are no numbers": {"n": [math.nan, math.inf, -math.inf, -0.0, 5e-324]},
    "words of the format": {"tensor": "x", "dict": {"tuple": [1]}, "float": {"float": "nan"}},
    "keys that are no texts": {0: "a", True: None, None: 1, (1, "x"): [2], 1.5: {}, -7: {"x": {3: 4}}},
    "a counter with tensors": Counter({3: 2, "x": 1}),
    "a hundred levels": [[[{"x": ([({1: ({},)},)],)}]]],
}


@pytest.mark.parametrize("state", ODD.values(), ids=ODD)
def test_odd_states_come_back_by_equal_bits(state: Any, tmp_path: Path) -> None:
    assert bits(through(tmp_path, part={"state": state})) == bits({"part": {"state": state}})


def test_a_model_with_odd_names_comes_back(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        one = nn.Module()
        one.register_buffer("__metadata__", torch.full((2,), value))
        return one

    there, here = model(3.0), model(0.0)
    gf.Checkpoints(tmp_path).watch(model=there).save(1)
    assert gf.Checkpoints(tmp_path).watch(model=here).restore() == 1
    assert bits(here.state_dict()) == bits(there.state_dict())


def nested(kind: type, levels: int) -> Any:
    state: Any = kind()
    for _ in range(levels):
        state = {"x": state} if kind is dict else kind([state])
    return state


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_what_is_saved_is_never_too_deep_to_be_restored(kind: type, tmp_path: Path) -> None:
    assert through(tmp_path / "in", part={"x": nested(kind, 90)})["part"]["x"] == nested(kind, 90)
    endless: list[Any] = []
    endless.append(endless)
    for state in (nested(kind, 400), nested(kind, 2000), endless):
        with pytest.raises(gf.GoodfitError, match=r"100 levels deep, and part\.value\.x.* goes deeper; flatten it") as refused:
            gf.Checkpoints(tmp_path / "out").watch(part={"x": state}).save(1)
        assert len(str(refused.value)) < 300


class Own:
    """Something without a state."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR", "ignore:torch.quantize_per")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Own, "part.value.x is a Own"),
        (lambda: {1, 2}, "is a set"),
        (lambda: b"x", "is a bytes"),
        (lambda: 1j, "is a complex"),
        (lambda: len, "is a builtin_function_or_method"),
        (lambda: torch.float32, "is a dtype"),
        (lambda: torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "plain dense tensors"),
        (lambda: torch.ones(2, device="meta"), "on meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, dtype=torch.float32), 0.1, 0, torch.qint8), "plain dense tensors"),
        (lambda: np.array(["a"]), "is a ndarray of dtype <U1"),
        (lambda: np.array([None]), "is a ndarray of dtype object"),
        (lambda: np.ma.array([1.0], mask=[True]), "is a MaskedArray"),
        (lambda: np.longdouble(1), "is a longdouble of dtype"),
        (lambda: np.datetime64("2020-01-01"), "is a datetime64"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    """Before the training; and in a save, where it comes later."""
    with pytest.raises(gf.GoodfitError, match=message):
        gf.Checkpoints(tmp_path).watch(part={"x": make()})
    part: dict[str, Any] = {}
    saving = gf.Checkpoints(tmp_path).watch(part=part)
    part["x"] = make()
    with pytest.raises(gf.GoodfitError, match=message) as refused:
        saving.save(1)
    assert "\n" not in str(refused.value)
    assert [one.name for one in tmp_path.iterdir()] == [".lock"]


def test_orders_and_subclasses_of_dict_come_back_as_dicts(tmp_path: Path) -> None:
    back = through(tmp_path, part={"x": OrderedDict([("b", 1), ("a", 2)])})["part"]["x"]
    assert list(back.items()) == [("b", 1), ("a", 2)]


def test_what_is_restored_does_not_hang_on_the_file(tmp_path: Path) -> None:
    gf.Checkpoints(tmp_path).watch(part={"x": torch.ones(10_000)}).save(1)
    back: dict[str, Any] = {}
    gf.Checkpoints(tmp_path).watch(part=back).restore()
    file = tmp_path / "step-000000001" / "part.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\1" * file.stat().st_size)
        opened.truncate(10)
    assert torch.equal(back["x"], torch.ones(10_000))


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    x, listed, array = torch.ones(3), [1], np.ones(2)
    saving = gf.Checkpoints(tmp_path).watch(part={"x": x, "listed": listed, "array": array})
    saving.save(1)
    x.zero_(), listed.append(2), array.fill(0)
    assert saving.restore() == 1
    assert bits(saving.parts["part"]) == bits({"x": torch.ones(3), "listed": [1], "array": np.ones(2)})
    assert torch.equal(x, torch.zeros(3))  # what the loop has in its own hands is its own
