"""Processes that train together and meet trouble: nan in one of them, a kill, other rows, other numbers of processes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

import goodfit as gf
from goodfit.order import Order
from test_distributed import data, keep, kept
from together import in_processes


def net(noise: bool = True) -> nn.Module:
    torch.manual_seed(1)
    drop = nn.Dropout(0.3) if noise else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), drop, nn.Tanh(), nn.Linear(8, 1)).double()


LOSSES = [nn.functional.mse_loss, nn.functional.l1_loss]


class Longer(DistributedSampler[Any]):
    """One that says more than it gives."""

    def __len__(self) -> int:
        return 15


class Killed(Exception):
    """What ends a training in its middle."""


class Dying(torch.optim.AdamW):
    """An optimizer that ends its training behind so many steps, in every process."""

    left = 10**9

    def step(self, closure: Any = None) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed
        super().step()


def dying(after: int) -> Callable[[Any], Dying]:
    def make(parameters: Any) -> Dying:
        one = Dying(parameters, lr=0.01, weight_decay=0.0)
        one.left = after
        return one

    return make


def train(after: int = 10**9, *, noise: bool = True, **settings: Any) -> gf.Fit:
    mix = "Dropout(0.2), L2(1e-3), EarlyStopping(3)" if noise else "L2(1e-3), EarlyStopping(3)"
    settings = {"batch_size": 12, "epochs": 4, "optimizer": dying(after)} | settings
    return gf.fit(net(noise), *data(), mix, progress=False, **settings)


def loaders(rank: int, count: int) -> Callable[[], DataLoader[Any]]:
    rows = TensorDataset(*data()[0])
    return lambda: DataLoader(rows, 6, sampler=DistributedSampler(rows, count, rank, seed=5))


def resumed(rank: int, folder: str) -> None:
    keep(folder, f"whole {rank}", train())
    for after in (3, 10):
        saves = gf.Checkpoints(f"{folder}/{after}", every=1)
        try:
            train(after, checkpoints=saves)
        except Killed:
            keep(folder, f"resumed {after} {rank}", train(checkpoints=f"{folder}/{after}"))
    with suppress(Killed):
        train(8, checkpoints=gf.Checkpoints(f"{folder}/two", every=1), noise=False)
    for name, after, saves in (("loader", 10**9, None), ("torn", 7, "loader"), ("loader again", 10**9, "loader")):
        checkpoints = saves and gf.Checkpoints(f"{folder}/{saves}", every=1)
        try:
            found = gf.fit(
                net(), loaders(rank, 2)(), data()[1], "L2(1e-3)", optimizer=dying(after), epochs=3, checkpoints=checkpoints
            )
            keep(folder, f"{name} {rank}", found)
        except Killed:
            shutil.copytree(f"{folder}/loader", f"{folder}/torn", dirs_exist_ok=True)


def test_processes_go_on_with_the_same_bits_or_others_in_their_place(tmp_path: Path) -> None:
    in_processes(2, resumed, tmp_path)
    for rank in (0, 1):
        for name, again in (("whole", "resumed 3"), ("whole", "resumed 10"), ("loader", "loader again")):
            (weights, told), (others, also) = kept(tmp_path, f"{name} {rank}"), kept(tmp_path, f"{again} {rank}")
            assert also == told
            assert all(torch.equal(others[key], weights[key]) for key in weights)
    expected = train(noise=False)
    with pytest.warns(gf.GoodfitWarning, match="saved with processes 2, and goes on with 1"):
        alone = train(noise=False, checkpoints=str(tmp_path / "two"))
    assert alone.resumed == 8
    for key, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(alone.model.state_dict()[key], tensor, rtol=0, atol=1e-9)
    whole = DataLoader(TensorDataset(*data()[0]), 12)
    with pytest.raises(gf.GoodfitError, match=r"saved in the middle of an epoch by 2 processes.* start 2"):
        gf.fit(net(), whole, data()[1], "L2(1e-3)", optimizer=dying(9), epochs=3, checkpoints=str(tmp_path / "torn"))


class Spoiling:
    """A loss that is nan in one process, once."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += outputs.requires_grad
        spoils = self.rank == 1 and outputs.requires_grad and self.calls == 4
        return nn.functional.mse_loss(outputs, y) * (torch.nan if spoils else 1)


def spoiled(rank: int, folder: str) -> None:
    (x, y), valid = data()
    bad = x.clone()
    bad[list(Order(len(x), 12, shuffle=True, share=(1, 2)))[2][1]] = torch.nan  # the third batch of the second process
    for name, train_x, policy in (("data", bad, "raise"), ("data", bad, "skip"), ("loss", x, "stop"), ("loss", x, "skip")):
        loss = Spoiling(rank) if name == "loss" else nn.functional.mse_loss
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                found = gf.fit(
                    net(False), (train_x, y), valid, "L2(1e-3)", loss=loss, epochs=2, batch_size=12, nonfinite=policy
                )
                keep(folder, f"{name} {policy} {rank}", found)
                told = found.stopped or str(heard[-1].message)
            except gf.GoodfitError as wrong:
                told = str(wrong)
        Path(f"{folder}/{name} {policy} {rank}.txt").write_text(told)


def test_nan_in_one_process_is_named_in_all_and_spoils_none(tmp_path: Path) -> None:
    in_processes(2, spoiled, tmp_path)
    row, loss = "x has nan in 1 of its rows, the first of them row", "the loss is nan, of outputs that are finite"
    expected = {
        "data raise": f"step 3 is not finite: in process 1 {row} 1; the step was not taken.",
        "data skip": f"step [6-9] is not finite: in process [01] {row} [0-5]; it is left out.",  # in the second epoch
        "loss skip": f"step 4 is not finite: in process 1 {loss}; it is left out.",
        "loss stop": f"step 4 is not finite: in process 1 {loss}; the step was not taken.",
    }
    for name, text in expected.items():
        told = [(tmp_path / f"{name} {rank}.txt").read_text() for rank in (0, 1)]
        assert told[0] == told[1]
        assert re.fullmatch(text, told[0]), told
    for name in ("data skip", "loss skip"):
        (one, first), (other, second) = kept(tmp_path, f"{name} 0"), kept(tmp_path, f"{name} 1")
        assert first == second
        assert len(first["history"]) == 2
        assert all(torch.equal(one[key], other[key]) and one[key].isfinite().all() for key in one)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*data()[0], strict=True)


class Idle(nn.Module):
    """A model with a weight that no output knows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def refused(rank: int, folder: str) -> None:
    train_, valid = data()
    rows, few = TensorDataset(*train_), TensorDataset(train_[0][: 10 if rank else 30], train_[1][: 10 if rank else 30])
    split = DistributedSampler(rows, 2, rank)
    shuffled = DataLoader(TensorDataset(*valid), 8, shuffle=True)
    uneven = DataLoader(few, 5, sampler=DistributedSampler(few, 2, rank))
    torched = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3), nn.Linear(3, 1)).double()
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    cases: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
        "whole loader": (net(), DataLoader(rows, 8, shuffle=True), valid, {}),
        "sampler": (net(), DataLoader(rows, 8, sampler=RandomSampler(rows)), valid, {}),
        "stream": (net(), Stream(), valid, {}),
        "shuffled valid": (net(), train_, shuffled, {}),
        "split valid": (net(), train_, DataLoader(rows, 8, sampler=split), {}),
        "uneven": (net(), uneven, valid, {}),
        "uneven at length": (net(), DataLoader(few, 5, sampler=Longer(few, 2, rank)), valid, {}),
        "settings": (net(), train_, valid, {"seed": rank, "nonfinite": "skip" if rank else "stop", "loss": LOSSES[rank]}),
        "one row": (net(), train_, valid, {"batch_size": 1}),
        "torch's norm": (torched, train_, valid, {}),
        "norm of one row": (normed, train_, valid, {"batch_size": 2}),
        "idle": (Idle(), train_, valid, {}),
    }
    told = {}
    for name, (model, one, other, settings) in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gf.fit(model, one, other, "L2(1e-3)", epochs=2, **settings)
                told[name] = "nothing"
            except gf.GoodfitError as wrong:
                told[name] = str(wrong)
    Path(f"{folder}/refused{rank}.json").write_text(json.dumps(told))


def test_what_several_processes_would_do_wrong_is_refused_in_all(tmp_path: Path) -> None:
    in_processes(2, refused, tmp_path)
    one, other = (json.loads((tmp_path / f"refused{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    expected = {
        "whole loader": "train must be split among the 2 processes: .* sampler=DistributedSampler",
        "sampler": "train must be split among the 2 processes",
        "stream": "train is a stream, which cannot be shared among processes",
        "shuffled valid": "valid must give all its rows, in one order, to each of the 2 processes",
        "split valid": "valid must give all its rows, in one order, to each of the 2 processes",
        "uneven": "asked for different trainings, in the number of batches of train; run the same line in each",
        "uneven at length": "train ends before its batch for some of the 2 processes",
        "settings": "asked for different trainings, in loss, seed, nonfinite; run",
        "one row": "2 processes share each batch, and those of train have 1 rows",
        "torch's norm": "torch's SyncBatchNorm '1' is none for the CPU; gf.convert_batchnorm",
        "norm of one row": "train gives batches of one row",
        "idle": "the weight 'idle.weight' got none in the first step",
    }
    for name, text in expected.items():
        assert re.search(text, one[name]), (name, one[name])


def test_processes_that_nobody_has_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(gf.GoodfitError, match=r"torchrun has started 2 processes.* torch\.distributed\.init_process_group\(\)"):
        train(noise=False)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 18, 19, 23, 24, 30])
def test_the_shares_of_an_epoch_are_its_rows_each_once(rows: int, each: int, count: int) -> None:
    size = 8
    if min(rows, size) < count:
        return
    orders = [Order(rows, size, shuffle=True, seed=3, share=(rank, count)) for rank in range(count)]
    for order in orders:
        order.each = each
    batches = list(zip(*orders, strict=True))  # as many in every process
    assert len(batches) == len(orders[0])
    assert sorted(int(row) for batch in batches for share in batch for row in share) == list(range(rows))
    if rows >= size:
        assert min(len(share) for batch in batches for share in batch) >= min(each, size // count)
    alone = Order(rows, size, shuffle=True, seed=3)
    if rows % size >= max(2, each * count) or rows % size == 0:  # the batches of one process
        assert [sorted(torch.cat(batch).tolist()) for batch in batches] == [sorted(batch.tolist()) for batch in alone]
