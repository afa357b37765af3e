"""`gf.fit` in several processes: what one process would train, in shares; nothing twice, nothing alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import goodfit as gf
from together import in_processes

ROWS, BATCH = 56, 12


def data() -> tuple[Any, Any]:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS + 28, 4, generator=draws, dtype=torch.float64)
    y = (x[:, :1] - x[:, 1:2] * x[:, 2:3]).sin()
    return (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def plain(found: gf.Fit) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in found.history]
    return {"history": rows, "stopped": found.stopped, "score": found.score, "best": found.best_epoch}


def keep(folder: str | Path, name: str, found: gf.Fit) -> None:
    save_file({key: t.contiguous() for key, t in found.model.state_dict().items()}, f"{folder}/{name}.safetensors")
    Path(f"{folder}/{name}.json").write_text(json.dumps(plain(found)))


def kept(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


COCKTAILS = {
    "bare": "Cocktail()",
    "penalties": "L2(1e-2), L1(1e-3), MaxNorm(2.0)",
    "decay and stopping": "WeightDecay(1e-2), GroupLasso(1e-3), EarlyStopping(2, min_delta=0.01)",
}


def train(cocktail: str, **settings: Any) -> gf.Fit:
    model = net()
    if "compute" in settings:  # batch norms and several batches in a step do not go together
        model[1] = nn.Identity()
    else:
        gf.convert_batchnorm(model, "sync")
    settings = {"batch_size": BATCH, "epochs": 4, "optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)} | settings
    mix = gf.Cocktail() if cocktail == "Cocktail()" else cocktail
    return gf.fit(model, *data(), mix, progress=False, **settings)


def all_cocktails(rank: int, folder: str) -> None:
    for name, cocktail in COCKTAILS.items():
        keep(folder, f"{name} {rank}", train(cocktail))
    keep(folder, f"accumulated {rank}", train(COCKTAILS["penalties"], compute=gf.Compute(accumulate=2)))
    keep(folder, f"checked {rank}", train(COCKTAILS["penalties"], check_every=3, refit="steps"))


@pytest.mark.parametrize("count", [2, 3])
def test_shares_train_what_one_process_trains(count: int, tmp_path: Path) -> None:
    in_processes(count, all_cocktails, tmp_path)
    expected = {name: train(cocktail) for name, cocktail in COCKTAILS.items()}
    expected["accumulated"] = train(COCKTAILS["penalties"], compute=gf.Compute(accumulate=2))
    expected["checked"] = train(COCKTAILS["penalties"], check_every=3, refit="steps")
    for name, one in expected.items():
        weights, told = kept(tmp_path, f"{name} 0")
        for key, tensor in one.model.state_dict().items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-9, msg=f"{name}: {key}")
        assert told["stopped"] == one.stopped
        for row, other in zip(told["history"], plain(one)["history"], strict=True):
            for key, value in other.items():
                assert row[key] == value or math.isclose(row[key], value, rel_tol=1e-9, abs_tol=1e-12), (name, key)
        for rank in range(1, count):
            others, also = kept(tmp_path, f"{name} {rank}")
            assert also == told
            assert all(torch.equal(weights[key], others[key]) for key in weights)
