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
from goodfit.layers.synchronized import SyncBatchNorm
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


def inserted_norms(rank: int, folder: str) -> None:
    model = net()
    model[1] = nn.Identity()
    mix = gf.Cocktail(gf.BatchNorm(sync=True), gf.L2(1e-3))
    keep(folder, f"inserted {rank}", gf.fit(model, *data(), mix, batch_size=BATCH, epochs=3, progress=False))


def test_a_cocktail_inserts_synchronized_norms(tmp_path: Path) -> None:
    in_processes(2, inserted_norms, tmp_path)
    inserted_norms(9, str(tmp_path))
    (weights, told), (expected, one) = kept(tmp_path, "inserted 0"), kept(tmp_path, "inserted 9")
    assert math.isclose(told["score"], one["score"], rel_tol=1e-9)
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-9)


SHAPES = [(7, 3), (5, 3, 4), (5, 3, 2, 2)]


def normed(layer: nn.Module, x: Tensor, passes: int = 2) -> list[Tensor]:
    """What a norm says, what flows back, and its statistics, after some passes."""
    x = x.clone().requires_grad_()
    for _ in range(passes):
        y = layer(x)
        layer.zero_grad()
        x.grad = None
        (y**3 * (1 + x)).sum().backward()
    statistics = [b.double() for b in (layer.running_mean, layer.running_var, layer.num_batches_tracked) if b is not None]
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *statistics]


def norms() -> list[tuple[dict[str, Any], Tensor]]:
    draws = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=draws, dtype=torch.float64) + 3 for shape in SHAPES]
    settings = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False, "eps": 1e-3}]
    return [(one, x) for one in settings for x in tensors]


def synchronized_norms(rank: int, folder: str) -> None:
    for i, (settings, x) in enumerate(norms()):
        layer = SyncBatchNorm(3, **settings).double()
        share = [0, 3, len(x)]  # of unequal sizes
        own = normed(layer, x[share[rank] : share[rank + 1]])
        save_file({str(k): t.contiguous() for k, t in enumerate(own)}, f"{folder}/norm{i}.{rank}.safetensors")


def test_a_synchronized_norm_is_a_batch_norm_over_all_rows(tmp_path: Path) -> None:
    in_processes(2, synchronized_norms, tmp_path)
    for i, (settings, x) in enumerate(norms()):
        layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.ndim](3, **settings).double()
        expected = normed(layer, x)
        first, second = (load_file(tmp_path / f"norm{i}.{rank}.safetensors") for rank in (0, 1))
        affine = 2 if settings.get("affine", True) else 0
        for k, whole in enumerate(expected):
            one, other = first[str(k)], second[str(k)]
            found = torch.cat([one, other]) if k < 2 else one + other if k < 2 + affine else one
            torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
            assert k < 2 + affine or torch.equal(one, other)


class Masks(nn.Module):
    """A dropout that writes down what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.seen = nn.Dropout(0.5), []

    def forward(self, x: Tensor) -> Tensor:
        kept = self.drop(torch.ones_like(x))
        if self.training:
            self.seen.append(kept[0].tolist())
        return x * kept


def masks(rank: int, folder: str) -> None:
    seen = Masks()
    model = nn.Sequential(nn.Linear(4, 16), seen, nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).double()
    weights: list[list[float]] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            weights.append([float(p.detach().double().sum()) for p in model.parameters()])

    found = gf.fit(model, *data(), "Dropout(0.3)", optimizer=lambda p: Noted(p, 0.1), epochs=3, batch_size=BATCH)
    keep(folder, f"masks {rank}", found)
    Path(f"{folder}/masks{rank}.json").write_text(json.dumps({"seen": seen.seen, "weights": weights}))


@pytest.mark.filterwarnings("ignore::goodfit.GoodfitWarning")
def test_masks_differ_and_weights_do_not(tmp_path: Path) -> None:
    in_processes(2, masks, tmp_path)
    one, other = (json.loads((tmp_path / f"masks{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == other["weights"]
    steps = [each["seen"][-len(one["weights"]) :] for each in (one, other)]  # behind what has looked at the model
    assert all(mine != theirs for mine, theirs in zip(*steps, strict=True))
    assert {key: t.tolist() for key, t in kept(tmp_path, "masks 0")[0].items()} == {
        key: t.tolist() for key, t in kept(tmp_path, "masks 1")[0].items()
    }  # the statistics of a norm of its own too


def compiled(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float32)
    for name, compute in (
        ("compiled", gf.Compute(compile=True)),
        ("half", gf.Compute(precision="bf16")),
        ("plain", gf.Compute()),
    ):
        model = net()
        model[1] = nn.Identity()
        (x, y), (other, target) = data()
        parts = (x.float(), y.float()), (other.float(), target.float())
        found = gf.fit(model.float(), *parts, "L2(1e-3)", batch_size=BATCH, epochs=2, compute=compute, progress=False)
        keep(folder, f"{name} {rank}", found)


@pytest.mark.slow
def test_processes_compile_and_compute_in_half_precision(tmp_path: Path) -> None:
    in_processes(2, compiled, tmp_path)
    plain_weights = kept(tmp_path, "plain 0")[0]
    for name, tolerance in (("compiled", 1e-5), ("half", 1e-2)):
        (one, told), (other, also) = kept(tmp_path, f"{name} 0"), kept(tmp_path, f"{name} 1")
        assert told == also
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key])
            torch.testing.assert_close(tensor, plain_weights[key], rtol=0, atol=tolerance)
