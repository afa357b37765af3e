"""How a step is computed: precision, accumulation, memory format, compilation, determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf

COCKTAIL = "L2(1e-2), L1(1e-3), WeightDecay(0.01), EarlyStopping(20)"


def table(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=dtype)
    return x, x[:, :1].sin()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def fit(model: nn.Module, batch: int, compute: gf.Compute | None, rows: int = 44, **settings: Any) -> gf.Fit:
    dtype = next(model.parameters()).dtype
    loader = DataLoader(TensorDataset(*table(rows, dtype=dtype)), batch)
    given: dict[str, Any] = {"cocktail": COCKTAIL, "optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0), "epochs": 3}
    return gf.fit(model, loader, table(20, 1, dtype), loss=F.mse_loss, compute=compute, **(given | settings))


@pytest.mark.parametrize("rows", [48, 44, 36, 50])  # whole steps; a short last batch; a short last step; both
def test_accumulated_batches_are_one_batch(rows: int) -> None:
    """With penalties once, and rows of equal weight also where the last batch, or the last step, is short."""
    large = fit(net(), 16, None, rows)
    small = fit(net(), 4, gf.Compute(accumulate=4), rows)
    assert [row["step"] for row in small.history] == [row["step"] for row in large.history]
    for row, other in zip(small.history, large.history, strict=True):
        for name in ("train_loss", "valid_loss", "penalty"):
            assert row[name] == pytest.approx(other[name], rel=1e-11)
    for name, t in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], t, rtol=1e-10, atol=1e-12)


def test_an_accumulated_step_is_saved_and_goes_on(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    calls = iter(range(10**6))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad and next(calls) == after:
            raise Killed
        return F.mse_loss(outputs, y)

    settings: dict[str, Any] = {"compute": gf.Compute(accumulate=4), "epochs": 3}
    loader = DataLoader(TensorDataset(*table(44)), 4, shuffle=True)
    after = -1
    whole = gf.fit(net(), loader, table(20, 1), COCKTAIL, loss=loss, **settings)
    for after in (6, 11, 13, 22, 25):
        calls = iter(range(10**6))
        saves = gf.Checkpoints(tmp_path / str(after), every=1)
        with pytest.raises(Killed):
            gf.fit(net(), loader, table(20, 1), COCKTAIL, loss=loss, checkpoints=saves, **settings)
        calls = iter(range(10**6, 10**9))
        found = gf.fit(net(), loader, table(20, 1), COCKTAIL, loss=loss, checkpoints=saves, **settings)
        assert found.resumed == after // 11 * 3 + after % 11 // 4  # three steps of 4, 4 and 3 batches
        assert all(torch.equal(t, whole.model.state_dict()[name]) for name, t in found.model.state_dict().items())


def by_hand(precision: torch.dtype, scaled: bool) -> nn.Module:
    """Torch's own recipe of mixed precision, without goodfit."""
    model = net(torch.float32)
    optimizer = SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    x, y = table(44, dtype=torch.float32)
    for _ in range(3):
        for rows in torch.arange(44).split(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", precision):
                loss = F.mse_loss(model(x[rows]), y[rows])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return model


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_is_torchs(precision: str, kind: torch.dtype) -> None:
    compute = gf.Compute(precision=precision)
    found = fit(net(torch.float32), 8, compute, cocktail="L2(0)", optimizer=lambda p: SGD(p, lr=0.05))
    expected = by_hand(kind, scaled=precision == "fp16")
    for name, t in expected.state_dict().items():
        assert t.dtype is torch.float32
        torch.testing.assert_close(found.model.state_dict()[name], t, rtol=0, atol=0)
    full = fit(net(torch.float32), 8, None, cocktail="L2(0)", optimizer=lambda p: SGD(p, lr=0.05))
    assert not torch.equal(found.model[0].weight, full.model[0].weight)


def steps_taken(spoiled: tuple[int, ...]) -> int:
    """Of 18 in half precision, where the loss overflows at some."""
    seen: list[int] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        if outputs.requires_grad:
            seen.append(1)
        return F.mse_loss(outputs.float(), y) * (1e34 if len(seen) in spoiled else 1.0)

    model, loader = net(torch.float32), DataLoader(TensorDataset(*table(44, dtype=torch.float32)), 8)
    valid = table(20, 1, torch.float32)
    found = gf.fit(model, loader, valid, "L2(1e-3)", loss=loss, epochs=3, compute=gf.Compute("fp16"))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return int(found.history[-1]["step"])


def test_a_scaled_loss_that_overflows_takes_no_step_and_goes_on_smaller() -> None:
    assert steps_taken(()) == 16  # the scale that torch begins with is too large for two
    assert steps_taken((5, 6)) == 14


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)
        self.strides: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.strides.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_channels_last_changes_the_memory_and_not_the_result() -> None:
    def trained(compute: gf.Compute) -> nn.Module:
        torch.manual_seed(0)
        model = Image().double()
        x = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        data = (x, x.mean((1, 2, 3))[:, None])
        gf.fit(model, data, data, "L2(1e-3), Dropout(0.2)", loss=F.mse_loss, epochs=2, batch_size=8, compute=compute)
        return model

    plain, last = trained(gf.Compute()), trained(gf.Compute(channels_last=True))
    assert (set(plain.strides), set(last.strides[-6:])) == ({False}, {True})
    assert last.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], t, rtol=1e-7, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
def test_a_compiled_step_gives_what_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def eager(model: nn.Module) -> Any:
        compiled.append(model)
        return compile_(model, backend="aot_eager")  # inductor needs a compiler

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", eager)
    cocktail = "L2(1e-2), Dropout(0.3), EarlyStopping(9)"
    plain = fit(net(), 11, None, cocktail=cocktail)
    found = fit(net(), 11, gf.Compute(compile=True), cocktail=cocktail)
    assert compiled == [found.model]
    for name, t in plain.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], t, rtol=1e-9, atol=1e-12)


def test_deterministic_is_held_within_the_fit_alone() -> None:
    seen: list[bool] = []

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return F.mse_loss(outputs, y)

    torch.use_deterministic_algorithms(False)
    gf.fit(net(), table(16), table(8), "L2(0)", loss=loss, epochs=1, compute=gf.Compute(deterministic=True))
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "half"}, "Compute.precision must be one of 'full', 'bf16', 'fp16', got precision='half'."),
        ({"accumulate": 0}, "Compute.accumulate must be an integer >= 1, got accumulate=0."),
        ({"accumulate": 2.0}, "Compute.accumulate must be an integer >= 1, got accumulate=2.0."),
        ({"compile": 1}, "Compute.compile must be True or False, got compile=1."),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(gf.GoodfitError) as refused:
        gf.Compute(**given)
    assert str(refused.value) == message


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch, behind a mask
def test_masks_of_a_compiled_model_are_new_at_each_step_and_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given: dict[str, Any] = {"cocktail": "Dropout(0.3), L2(1e-3)", "epochs": 4}
    one, other = (fit(net(torch.float32), 4, compute, **given) for compute in (None, gf.Compute(compile=True)))
    assert [row["valid_loss"] for row in one.history] == pytest.approx([row["valid_loss"] for row in other.history], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8  # of 44 steps


@pytest.mark.parametrize("wrong", ["bf16", {"precision": "bf16"}, True, gf.Compute], ids=repr)
def test_what_is_no_compute_is_refused(wrong: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=r"compute must be gf.Compute\(...\), got"):
        fit(net(), 4, wrong)
