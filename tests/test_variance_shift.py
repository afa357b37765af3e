"""The variance that a batch norm gets in training over the one in eval mode: by hand, by simulation, and without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

import goodfit as gf
from goodfit import GoodfitError, variance_shift

ROWS = torch.randn(4000, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dropped(p: float, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Dropout(p), nn.Linear(24, 16), norm or nn.BatchNorm1d(16))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_before_a_linear_of_inputs_without_mean(p: float) -> None:
    """Each term of Σ w x m/(1 − p) has variance w² · 1/(1 − p)."""
    found = variance_shift(dropped(p), [ROWS], samples=4000)
    assert found.worst == pytest.approx(1 / (1 - p), rel=0.05)
    (row,) = found.layers
    assert row.name == "2"
    assert row.ratio == found.worst


def test_a_mean_makes_it_larger() -> None:
    """Per feature s² = 1 and m = 2: (s² + p m²) / (1 − p) = (1 + 0.3 · 4) / 0.7 = 22/7."""
    assert variance_shift(dropped(0.3), [ROWS + 2], samples=4000).worst == pytest.approx(22 / 7, rel=0.05)


def test_a_channel_apart() -> None:
    """Channel 0 reads what is dropped, channel 1 what is not: ratios 2 and 1, of median 1.5."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.stack([F.dropout(x[:, 0], 0.5, self.training), x[:, 1]], 1))

    (row,) = variance_shift(Half(), [ROWS], samples=4000).layers
    assert row.largest == pytest.approx(2, rel=0.05)
    assert row.ratio == pytest.approx(1.5, rel=0.05)


def test_it_is_what_the_running_statistics_show_after_training() -> None:
    """Settled in train mode without learning, running variances are those of training."""
    model = nn.Sequential(
        nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), *dropped(0.4)[:1], nn.Linear(16, 8), nn.BatchNorm1d(8)
    )
    for _ in range(150):
        model(ROWS)
    first, second = variance_shift(model, [ROWS], samples=4000).layers
    assert first.ratio == first.largest == 1
    assert first.running == pytest.approx(1, rel=0.01)
    assert second.ratio > 1.3
    assert second.running == pytest.approx(second.ratio, rel=0.05)


def test_statistics_that_are_not_settled_are_no_shift() -> None:
    """Dropout alone is measured: a fresh norm's running variance of 1 is another matter, told in a column of its own."""
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    found = variance_shift(model, [ROWS])
    assert [s.ratio for s in found.layers] == [1, 1]
    assert found.layers[0].running > 1.5
    assert found.worst == 1
    assert "no shift" in str(found)


def test_batches_are_one_population() -> None:
    """Eval-mode variance over batches of different means is that of all rows: checked through the running column."""
    norm = nn.BatchNorm1d(24)
    batches = [ROWS[:10], ROWS[10:300] + 5, (ROWS[300:400] - 2, None)]
    population = torch.cat([ROWS[:10], ROWS[10:300] + 5, ROWS[300:400] - 2]).var(0, unbiased=False)
    (row,) = variance_shift(norm, batches).layers
    assert row.running == pytest.approx(float((1 / population).quantile(0.5)))
    shifted = variance_shift(norm, [ROWS[:100] + 1e6]).layers[0].running
    assert shifted == pytest.approx(float((1 / ROWS[:100].var(0, unbiased=False)).quantile(0.5)), rel=1e-6)


def test_images_and_channel_dropout() -> None:
    x = torch.randn(200, 3, 6, 6)
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert variance_shift(model, [x]).worst == pytest.approx(2, rel=0.15)
    wide = nn.Sequential(nn.Dropout3d(0.5), nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8))
    assert variance_shift(wide, [torch.randn(200, 3, 4, 4, 4)]).worst == pytest.approx(2, rel=0.15)


def test_norms_without_running_statistics_and_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(24, track_running_stats=False), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(self.drop(x))

    (row,) = variance_shift(Twice(), [ROWS], samples=4000).layers
    assert row.running is None
    assert row.ratio == pytest.approx(1.5, rel=0.05)  # variances 1 and 2 of as many values, over 1


def test_nothing_is_touched_and_a_seed_repeats() -> None:
    model = dropped(0.5)
    gf.Dropout(0.3).build(inserted := nn.Sequential(nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 4), nn.BatchNorm1d(4)), ROWS)
    for one in (model, inserted):
        one.train()
        before, state = copy.deepcopy(one.state_dict()), torch.get_rng_state()
        modes, twin = [m.training for m in one.modules()], copy.deepcopy(one)
        first, again, other = (variance_shift(one, [ROWS], seed=s) for s in (1, 1, 2))
        assert first == again != other
        assert first.worst > 1.1
        assert torch.equal(state, torch.get_rng_state())
        assert [m.training for m in one.modules()] == modes
        assert all(torch.equal(before[k], v) for k, v in one.state_dict().items())
        assert not any(m._forward_pre_hooks for m in one.modules() if isinstance(m, nn.BatchNorm1d))
        for m in (one, twin):
            torch.manual_seed(3)
            m.said = m(ROWS)  # the next masks are those that would have come
        assert torch.equal(one.said, twin.said)


def test_parts_that_are_frozen_in_a_training_model_stay_so() -> None:
    model = dropped(0.5).train()
    model[0].eval()
    assert variance_shift(model, [ROWS]).worst == 1
    assert variance_shift(model.eval(), [ROWS]).worst > 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    assert variance_shift(dropped(0.5).to(dtype), [ROWS.to(dtype)], samples=4000).worst == pytest.approx(2, rel=0.06)


@pytest.mark.parametrize("wrap", [DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_measured_inside(wrap: Any) -> None:
    model = dropped(0.5)
    assert variance_shift(wrap(model), [ROWS]) == variance_shift(model, [ROWS])


def test_inputs_by_position_and_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dropped(0.5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(input=a - b)

    x, model = ROWS[:1000], Two()
    found = variance_shift(model, [{"a": x, "b": x * 0}])
    assert found == variance_shift(model, [((x, x * 0), None)])
    assert found.worst == variance_shift(model.inner, [x]).worst


def test_the_table() -> None:
    model = nn.Sequential(*dropped(0.5), nn.ReLU(), nn.Linear(16, 4), nn.BatchNorm1d(4))
    lines = str(variance_shift(model, [ROWS])).splitlines()
    assert lines[0].split() == ["train/eval", "worst", "channel", "running/eval"]
    assert [line.split()[0] for line in lines[1:3]] == ["2", "5"]
    assert lines[3].startswith("worst ")
    assert "behind the last batch norm" in lines[3]
    assert str(variance_shift(nn.Sequential(nn.Linear(24, 2)), [ROWS])) == "no batch norm ran: no variance to shift"
    assert variance_shift(nn.Sequential(nn.Linear(24, 2)), [ROWS]).worst == 1


def test_a_dead_channel_has_no_ratio() -> None:
    model = dropped(0.5)
    nn.init.zeros_(model[1].weight[3].detach())
    assert variance_shift(model, [ROWS], samples=4000).worst == pytest.approx(2, rel=0.05)


def test_one_channel_that_hardly_varies_does_not_speak_for_all() -> None:
    """Channel 0 is a large mean with little variance: dropout multiplies its variance by more than a thousand."""
    model, x = dropped(0.5), ROWS.clone()
    x[:, 0] = 100 + 0.01 * x[:, 0]
    with torch.no_grad():
        model[1].weight[:, 0] = 0
        model[1].weight[0] = F.one_hot(torch.tensor(0), 24)
    found = variance_shift(model, [x], samples=4000)
    assert found.layers[0].largest > 1000
    assert found.worst == pytest.approx(2, rel=0.05)


def test_a_shift_of_few_channels_is_not_called_none() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 3), nn.BatchNorm1d(3))
    model[0] = First()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3, 24))
    found = variance_shift(model, [ROWS])
    assert found.worst == 1
    assert "no shift" not in str(found)


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.dropout(x[:, :1], 0.5, self.training), x[:, 1:]], 1)


def weighted() -> nn.Module:
    model = dropped(0.5)
    model.cache = model[1](ROWS[:2])
    return model


@pytest.mark.parametrize(
    ("make", "batches", "message"),
    [
        (lambda: "net", [ROWS], "takes a torch.nn.Module and batches, in this order, got a str"),
        (lambda: dropped(0.5), ROWS, "takes a DataLoader or a list of batches"),
        (lambda: dropped(0.5), [], "needs batches with rows"),
        (lambda: dropped(0.5), [ROWS[:, :3]], "runs Sequential on the batches in both modes, got RuntimeError: mat1"),
        (lambda: dropped(0.5), [ROWS * float("nan")], "'2' gets nan or inf"),
        (lambda: dropped(0.5), [ROWS[:1]], "at least 2 different rows"),
        (lambda: dropped(0.5), [ROWS[:1].expand(9, -1), ROWS[:1]], "at least 2 different rows"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), [ROWS], "is lazy: run the model on a batch once"),
        (weighted, [ROWS], "Sequential cannot be copied"),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Any, batches: Any, message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        variance_shift(make(), batches)


def test_a_scripted_model_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(dropped(0.5))
    with pytest.raises(GoodfitError, match="cannot look into the scripted model"):
        variance_shift(scripted, [ROWS])
