"""The best weights in a file: what is there is whole and of this run, or it is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from goodfit import EarlyStopping, GoodfitError, Run
from goodfit.kept import read, write


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[3].weight = nn.Parameter(model[2].weight.detach().T)  # the same memory, as a view
    model.narrow = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    return model


def train(watch: Any, scores: list[float], first: int = 0) -> None:
    for i, score in enumerate(scores, start=first):
        with torch.no_grad():
            for t in [*watch.model.parameters(), *watch.model.buffers()]:
                t.fill_(i)
        watch(score)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_a_file_gives_back_what_memory_does(tmp_path: Path) -> None:
    disk = EarlyStopping(5).watch(net(), keep=tmp_path / "best.safetensors")
    memory = EarlyStopping(5).watch(net())
    for watch in (disk, memory):
        train(watch, [1.0, 0.5, 0.75, 0.8])
        assert tensors(watch.model)[0].max() == 3
        watch.restore()
    for a, b in zip(tensors(disk.model), tensors(memory.model), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert (a == 1).all()
    assert not [name for name in disk.state_dict() if name.startswith(("weights.", "buffers."))]
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_resumed_watch_finds_its_file(tmp_path: Path) -> None:
    stopping, keep = EarlyStopping(2), str(tmp_path / "best.safetensors")
    before = stopping.watch(net(), keep=keep)
    train(before, [1.0, 0.5, 0.75])
    after = stopping.watch(net(), keep=keep)
    after.load_state_dict(before.state_dict())
    assert after(0.6)
    assert (tensors(after.restore())[0] == 1).all()


def test_before_a_best_there_is_no_file_and_restore_changes_nothing(tmp_path: Path) -> None:
    watch = EarlyStopping(2).watch(net(), keep=tmp_path / "best")
    train(watch, [float("nan")])
    assert (tensors(watch.restore())[0] == 0).all()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    keep = tmp_path / "best"
    first, second = (EarlyStopping(9).watch(net(), keep=keep) for _ in range(2))
    train(first, [1.0, 0.5])
    train(second, [2.0])
    with pytest.raises(GoodfitError, match=r"holds the best of another run, which wrote over it; give each its own"):
        first.restore()
    other = EarlyStopping(9).watch(nn.Linear(2, 3), keep=tmp_path / "other")
    with pytest.raises(GoodfitError, match=r"cannot be read"):  # there is no such file, and it is missed at once
        other.load_state_dict(second.state_dict())
    other = EarlyStopping(9).watch(nn.Linear(2, 3), keep=keep)
    with pytest.raises(GoodfitError, match=r"the weights of another model: 'buffers\.1\.num_batches_tracked' does not match"):
        other.load_state_dict(second.state_dict())
    wider = EarlyStopping(9).watch(nn.Linear(2, 3, bias=False), keep=tmp_path / "wider")
    wider(0.5)
    write(keep, {"weights.weight": torch.ones(1, 2), "check": torch.tensor(1), "score": torch.tensor(0.5)}, wider.file.mark)
    wider.file.path = keep
    with pytest.raises(GoodfitError, match=r"another model: 'weights\.weight' does not match"):
        wider.restore()


def damages(whole: bytes) -> list[bytes]:
    return [b"", whole[: len(whole) // 2], whole[:-1], b"{}", b"\x80\x04.", b"\xff" * 64, whole + b"x"]


def test_a_damaged_missing_or_foreign_file_is_one_clear_error(tmp_path: Path) -> None:
    keep = tmp_path / "best"
    watch = EarlyStopping(9).watch(net(), keep=keep)
    train(watch, [1.0, 0.5])
    whole = keep.read_bytes()
    refused = pytest.raises(GoodfitError, match="must be a file in which goodfit kept the best weights, and cannot be read")
    for broken in damages(whole):
        keep.write_bytes(broken)
        with refused as told:
            watch.restore()
        assert "\n" not in str(told.value)
    save_file({"weight": torch.ones(2)}, keep)
    with pytest.raises(GoodfitError, match="another format"):
        read(keep)
    keep.unlink()
    with refused:
        watch.restore()
    with refused:
        read(tmp_path)


def test_a_write_that_fails_leaves_the_file_that_was(tmp_path: Path) -> None:
    keep = tmp_path / "best"
    write(keep, {"a": torch.ones(3)})
    with pytest.raises(GoodfitError, match="The best weights cannot be kept in"):
        write(keep, {"a": torch.ones(3, dtype=torch.complex128)})
    assert torch.equal(read(keep)[0]["a"], torch.ones(3))
    with pytest.raises(GoodfitError, match="The best weights cannot be kept in"):
        write(tmp_path / "nowhere" / "best", {"a": torch.ones(3)})
    (tmp_path / "folder").mkdir()
    with pytest.raises(GoodfitError, match="The best weights cannot be kept in"):
        write(tmp_path / "folder", {"a": torch.ones(3)})
    (tmp_path / "folder").rmdir()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_what_is_no_place_for_a_file_is_refused_at_once(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "nowhere" / "best"):
        with pytest.raises(GoodfitError, match="keep must be the path of a file in a folder that is there"):
            EarlyStopping(2).watch(net(), keep=wrong)
    with pytest.raises(GoodfitError, match="keep must be the path of a file for the best weights, got a bool"):
        EarlyStopping(2).watch(net(), keep=True)


def test_what_is_something_else_is_never_written_over(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis.txt"
    foreign.write_text("three years")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (foreign, tmp_path / "weights.safetensors", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(GoodfitError, match=r"keep must not be the path of something else, got .*; give a path"):
            EarlyStopping(2).watch(net(), keep=wrong)
        with pytest.raises(GoodfitError, match="keep must not be the path of something else"):
            Run(EarlyStopping(2), net(), keep=wrong)
    assert foreign.read_text() == "three years"


def test_a_file_is_looked_into_when_its_state_is_loaded(tmp_path: Path) -> None:
    keep = tmp_path / "best"
    watch = EarlyStopping(9).watch(net(), keep=keep)
    train(watch, [1.0, 0.5])
    saved, whole = watch.state_dict(), keep.read_bytes()
    run = Run(EarlyStopping(9), net(), keep=tmp_path / "run")
    run.epoch(1.0)
    state = run.state_dict()
    for broken in (b"", whole[:-1]):
        keep.write_bytes(broken)
        Path(tmp_path / "run").write_bytes(broken)
        resumed = EarlyStopping(9).watch(net(), keep=tmp_path / "free")
        resumed.file.path = keep
        with pytest.raises(GoodfitError, match="cannot be read"):
            resumed.load_state_dict(saved)
        assert resumed.history == []
        with pytest.raises(GoodfitError, match="cannot be read"):
            run.load_state_dict(state)
    keep.write_bytes(whole)
    resumed = EarlyStopping(9).watch(net(), keep=keep)
    resumed.load_state_dict(saved)
    assert all(torch.equal(*pair) for pair in zip(tensors(resumed.restore()), tensors(watch.restore()), strict=True))
