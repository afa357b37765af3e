"""Early stopping: the cases in which nine other implementations differ, each with the index that follows from our formula."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from goodfit import EarlyStopping, GoodfitError, Run

NAN, INF = math.nan, math.inf
DRIFT = [1 - k / 1024 for k in range(40)]  # exact in binary
FALLING = [1 - k / 16 for k in range(12)]
NEVER = None

# what it shows: numbers, scores, index of the check that stops, index of the kept one
CASES = {
    "constant": ({"patience": 3}, [1.0] * 9, 3, 0),
    "patience 1, constant": ({"patience": 1}, [1.0] * 9, 1, 0),
    "patience 1, always better": ({"patience": 1}, FALLING, NEVER, 11),
    "drift adds up against the anchor": ({"patience": 6, "min_delta": 5 / 1024}, DRIFT, NEVER, 39),
    "drift too slow stops, and loses nothing": ({"patience": 5, "min_delta": 5 / 1024}, DRIFT, 5, 5),
    "delta exactly reached": ({"patience": 1, "min_delta": 0.25}, [1.0, 0.75, 0.7], 1, 1),
    "delta just passed": ({"patience": 1, "min_delta": 0.25}, [1.0, 0.7499, 0.4998], NEVER, 2),
    "the counter starts again": ({"patience": 2}, [1.0, 1.1, 0.9, 1.1, 0.8, 0.9, 0.9, 0.7], 6, 4),
    "a tie is no improvement and keeps the first": ({"patience": 3}, [1.0, 0.5, 0.5, 0.5, 0.5, 0.1], 4, 1),
    "nan first": ({"patience": 3}, [NAN, *FALLING], NEVER, 12),
    "nan in the middle": ({"patience": 3}, [1.0, 0.9, NAN, 0.95, 0.95, 0.95], 4, 1),
    "all nan": ({"patience": 3}, [NAN] * 6, 2, None),
    "inf first": ({"patience": 3}, [INF, *FALLING], NEVER, 12),
    "inf only": ({"patience": 2}, [INF] * 6, 1, None),
    "minus inf is no best": ({"patience": 3}, [1.0, -INF, -INF, -INF, 0.0], 3, 0),
    "relative, negative and worse": ({"patience": 3, "rel_delta": 0.1}, [-10.0, -9.0, -8.0, -7.0, -6.0], 3, 0),
    "relative, negative and better": ({"patience": 1, "rel_delta": 0.1}, [-10.0, -12.0, -14.0, -17.0], NEVER, 3),
    "relative, negative and hardly better": ({"patience": 1, "rel_delta": 0.125}, [-8.0, -8.5, -10.0], 1, 1),
    "relative, exactly reached": ({"patience": 1, "rel_delta": 0.125}, [8.0, 7.0, 6.0], 1, 1),
    "relative, around zero": ({"patience": 2, "rel_delta": 0.5}, [0.0, -1e-9, -1.4e-9, -1.6e-9, -1e-9, -1e-9], 5, 3),
    "the larger of both deltas counts": ({"patience": 1, "min_delta": 1.0, "rel_delta": 0.125}, [16.0, 14.5], 1, 1),
    "warm-up cannot stop": ({"patience": 3, "warmup": 5}, [1.0] * 9, 5, 0),
    "warm-up shorter than patience": ({"patience": 3, "warmup": 2}, [1.0] * 9, 3, 0),
    "warm-up is tracked": ({"patience": 2, "warmup": 3}, [0.1, 1.0, 0.9, 0.8, 0.7], 3, 0),
    "off": ({"patience": INF}, [1.0] * 60, NEVER, None),
}
cases = pytest.mark.parametrize(("numbers", "scores", "stop", "kept"), CASES.values(), ids=CASES)


def stop_index(stopping: EarlyStopping, scores: list[float], model: nn.Module | None = None) -> int | None:
    """Index of the check that says stop. The weight of the model is the index of the check."""
    model = model or nn.Linear(1, 1)
    watch = stopping.watch(model)
    for i, score in enumerate(scores):
        nn.init.constant_(model.weight, i)
        if watch(score):
            break
    else:
        i = None
    nn.init.constant_(model.weight, -1)
    watch.restore()
    return i


@cases
@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_stops_at_the_check_that_follows_from_the_formula(numbers, scores, stop, kept, mode) -> None:
    signed = [-s for s in scores] if mode == "max" else scores
    model = nn.Linear(1, 1)
    assert stop_index(EarlyStopping(**numbers, mode=mode), signed, model) == stop
    assert model.weight.item() == (-1 if kept is None else kept)


@cases
def test_a_run_decides_like_a_watch(numbers, scores, stop, kept) -> None:
    model = nn.Linear(1, 1)
    run = Run(EarlyStopping(**numbers), model)
    went_on = []
    for i, score in enumerate(scores):
        nn.init.constant_(model.weight, i)
        went_on.append(run.epoch(score))
        if not went_on[-1]:
            break
    assert went_on == ([True] * len(scores) if stop is None else [True] * stop + [False])
    last = model.weight.item()
    assert run.finish().weight.item() == (last if kept is None else kept)


scores_with_accidents = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30)


@given(scores_with_accidents, st.sampled_from(["min", "max"]))
def test_the_best_is_the_best_of_the_finite_scores(scores: list[float], mode: str) -> None:
    watch = EarlyStopping(5, mode=mode).watch(nn.Linear(1, 1))
    for score in scores:
        watch(score)
    better = min if mode == "min" else max
    finite = [s for s in scores if math.isfinite(s)]
    assert watch.best == (better(finite) if finite else INF if mode == "min" else -INF)


@given(
    st.lists(st.sampled_from([NAN, INF, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=25),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(0, 6),
)
def test_it_decides_as_a_plain_loop_does(scores, patience, min_delta, rel_delta, warmup) -> None:
    anchor, bad, expected = None, 0, None
    for i, v in enumerate(scores):
        if math.isfinite(v) and (anchor is None or anchor - v > max(min_delta, rel_delta * abs(anchor))):
            anchor, bad = v, 0
        else:
            bad += 1
        if bad >= patience and i >= warmup:
            expected = i
            break
    assert stop_index(EarlyStopping(patience, min_delta, rel_delta, warmup), scores) == expected


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"patience": 0}, r"patience must be an integer >= 1 \(or inf\), got patience=0"),
        ({"patience": 2.5}, "patience must be an integer >= 1"),
        ({"patience": NAN}, "patience must be an integer >= 1"),
        ({"min_delta": -0.1}, "min_delta must be >= 0, got min_delta=-0.1"),
        ({"rel_delta": -0.1}, "rel_delta must be >= 0, got rel_delta=-0.1"),
        ({"warmup": -1}, "warmup must be an integer >= 0, got warmup=-1"),
        ({"mode": "auto"}, "mode must be 'min' or 'max', got mode='auto'"),
    ],
)
def test_numbers_without_a_meaning_are_refused(numbers: dict, rule: str) -> None:
    with pytest.raises(GoodfitError, match=rf"EarlyStopping\.{rule}"):
        EarlyStopping(**numbers)


def test_the_best_weights_and_buffers_come_back_together() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    watch, snapshots = EarlyStopping(9).watch(model), []
    for score in (0.9, 0.3, 0.5, NAN):
        model(torch.randn(8, 2)).square().mean().backward()
        optimizer.step()
        snapshots.append(copy.deepcopy(model.state_dict()))
        watch(score)
    assert all(not torch.equal(a, b) for a, b in zip(snapshots[1].values(), snapshots[3].values(), strict=True))
    restored = watch.restore().state_dict()
    assert restored["1.num_batches_tracked"] == 2
    assert all(torch.equal(restored[name], tensor) for name, tensor in snapshots[1].items())


def test_what_is_kept_does_not_move_with_the_live_model() -> None:
    model = nn.Linear(2, 1)
    stopping = EarlyStopping(3)
    watch = stopping.watch(model)
    watch(1.0)
    at_best = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(5)
    assert torch.equal(watch.state["weights.weight"], at_best)
    watch.restore()
    with torch.no_grad():
        model.weight.add_(5)
    assert torch.equal(watch.state["weights.weight"], at_best)
    assert all(isinstance(value, torch.Tensor) for value in watch.state.values())
    assert not {t.data_ptr() for t in watch.state.values()} & {p.data_ptr() for p in model.parameters()}


def test_restoring_before_any_finite_score_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    watch = EarlyStopping(3).watch(model)
    watch(NAN)
    with torch.no_grad():
        model.weight.fill_(7)
    assert torch.equal(watch.restore().weight, torch.full((1, 2), 7.0))
    assert watch.best == INF


def test_a_new_patience_acts_on_an_old_state() -> None:
    model = nn.Linear(1, 1)
    short = Run(EarlyStopping(2), model)
    assert [short.epoch(s) for s in (1.0, 1.0)] == [True, True]
    long = Run(EarlyStopping(4), model)
    long.load_state_dict(short.state_dict())
    assert [long.epoch(1.0) for _ in range(3)] == [True, True, False]  # 1 + 3 bad checks


@pytest.mark.parametrize(
    ("stopping", "scores", "reason"),
    [
        (EarlyStopping(2), [1.0, 0.5, 0.75, 0.625], "no improvement in 2 checks: best 0.5 at check 2, 0.625 at check 4"),
        (
            EarlyStopping(1, min_delta=0.5),
            [1.0, 0.75],
            "no improvement by more than 0.5 in 1 check: best 0.75 at check 2, 0.75",
        ),
        (EarlyStopping(1, rel_delta=0.5), [1.0, 0.75], "no improvement by more than 0.5 of itself in 1 check: best 0.75"),
        (EarlyStopping(1, mode="max"), [0.5, 0.25], "no improvement in 1 check: best 0.5 at check 1, 0.25 at check 2"),
        (EarlyStopping(2), [NAN, NAN], "no finite score in 2 checks: nan at check 2"),
    ],
)
def test_it_says_why_it_stopped(stopping: EarlyStopping, scores: list[float], reason: str) -> None:
    watch = stopping.watch(nn.Linear(1, 1))
    stops = [watch(score) for score in scores]
    assert stops == [False] * (len(scores) - 1) + [True]
    assert watch.stopped.startswith(reason)


def test_patience_left_counts_down_to_zero() -> None:
    stopping = EarlyStopping(2, warmup=5)
    watch = stopping.watch(nn.Linear(1, 1))
    left = []
    for score in (1.0, 1.0, 1.0, 1.0, 0.5):
        watch(score)
        left.append(stopping.patience_left(watch.state))
    assert left == [2, 1, 0, 0, 2]


def test_a_score_may_be_a_tensor_that_needs_a_gradient() -> None:
    model = nn.Linear(1, 1)
    watch = EarlyStopping(1).watch(model)
    assert not watch(model(torch.ones(1, 1)).sum())
    assert not watch.state["best"].requires_grad
