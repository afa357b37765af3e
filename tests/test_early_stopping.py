"""Early stopping: its ten rules, and the cases in which nine other implementations differ, each with the index that follows
from our formula."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from goodfit import Cocktail, EarlyStopping, GoodfitError, GoodfitWarning, Run
from goodfit.phases import Report
from goodfit.stop import GL, PQ, UP, AllOf, AnyOf, Budget, Criterion, Divergence, Evidence, Patience, Reason, Smoothed, Target
from together import in_two_processes

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
        ({"unit": "epochs"}, "unit must be 'checks' or 'steps', got unit='epochs'"),
        ({"nonfinite": "best"}, "nonfinite must be 'bad', 'stop', 'raise', 'ignore' or 'rollback', got nonfinite='best'"),
        ({"restore": 1}, "restore must be True or False, got restore=1"),
        ({"patience": GL(5), "rel_delta": 0.1}, r"rel_delta belongs into a criterion here: Patience\(20, rel_delta=0.1\)"),
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
            "no improvement on 1 by more than 0.5 in 1 check: best 0.75 at check 2, 0.75",
        ),
        (EarlyStopping(1, rel_delta=0.5), [1.0, 0.75], "no improvement on 1 by more than 0.5 of itself in 1 check: best 0.75"),
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


def heard(watch: Any, scores: list[float], **told: list[float]) -> list[bool]:
    """What a watch answers; the weight of the model is the index of the check."""
    answers = []
    for i, score in enumerate(scores):
        with torch.no_grad():
            next(watch.model.parameters()).fill_(i)
        answers.append(watch(score, **{name: values[i] for name, values in told.items()}))
    return answers


def one() -> nn.Linear:
    return nn.Linear(1, 1, bias=False)


# Rule 3 and 5 in steps


def test_patience_and_warmup_in_steps_count_from_the_last_improvement() -> None:
    steps = [4, 8, 13, 14, 30]
    assert heard(EarlyStopping(10, unit="steps").watch(one()), [1.0] * 5, step=steps) == [False] * 3 + [True] * 2
    assert heard(EarlyStopping(10, unit="steps", warmup=14).watch(one()), [1.0] * 5, step=steps) == [False] * 4 + [True]
    assert heard(EarlyStopping(10, unit="steps").watch(one()), [1.0, 0.5, 0.4, 0.4, 0.4], step=steps) == [False] * 4 + [True]
    watch = EarlyStopping(10, unit="steps").watch(one())
    assert heard(watch, [1.0, 1.0], step=[4, 11]) == [False, False]
    assert watch.stopping.patience_left(watch.state) == 3
    assert heard(watch, [1.0], step=[14]) == [True]
    assert watch.stopped == "no improvement in 10 steps: best 1 at check 1, 1 at check 3"
    assert int(watch.state["best_step"]) == 4


def test_steps_must_be_told_and_never_fall() -> None:
    watch = EarlyStopping(10, unit="steps").watch(one())
    with pytest.raises(GoodfitError, match=r"unit='steps'\) needs the optimizer step; say stopping\(score, step=\.\.\.\)"):
        watch(1.0)
    assert not watch(1.0, step=5)
    with pytest.raises(GoodfitError, match="never falls, got 4 after 5; count over all epochs"):
        watch(1.0, step=4)
    with pytest.raises(GoodfitError, match="an integer >= 0, got step=nan"):
        watch(1.0, step=NAN)
    assert watch.history == [1.0]


# Rule 4


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("policy", "scores", "answers"),
    [
        ("bad", [1.0, NAN, INF, NAN], [False, False, False, True]),
        ("stop", [1.0, NAN], [False, True]),
        ("stop", [INF], [True]),
        ("ignore", [1.0, NAN, 1.0, NAN, INF, 1.0, NAN, 1.0], [False] * 7 + [True]),
        ("ignore", [NAN] * 9, [False] * 9),
        ("rollback", [1.0, NAN, INF, NAN], [False, False, False, True]),
    ],
)
def test_a_score_that_is_not_finite_does_as_told(policy: Any, scores: list, answers: list, mode: str) -> None:
    watch = EarlyStopping(3, nonfinite=policy, mode=mode).watch(one())
    assert heard(watch, [-s for s in scores] if mode == "max" else scores) == answers


def test_a_score_that_is_not_finite_raises_where_asked_and_names_the_check() -> None:
    watch = EarlyStopping(3, nonfinite="raise").watch(one())
    watch(1.0)
    with pytest.raises(GoodfitError, match=r"heard a score of nan at check 2; lower the learning rate"):
        watch(NAN)
    assert watch.history == [1.0]
    with pytest.raises(GoodfitError, match=r"heard a score of -inf at check 2"):
        watch(-INF)


def test_a_stop_for_a_score_says_so() -> None:
    watch = EarlyStopping(3, nonfinite="stop").watch(one())
    assert heard(watch, [1.0, NAN]) == [False, True]
    assert watch.reason is Reason.NONFINITE
    assert watch.stopped == "a score of nan, which is not finite: best 1 at check 1, nan at check 2"


def test_time_and_evidence_go_on_where_a_score_is_ignored() -> None:
    stopping = EarlyStopping(Patience(2) | (Evidence() | Target(0.0)), nonfinite="ignore")
    watch = stopping.watch(one())
    assert heard(watch, [1.0, NAN, NAN, NAN], evidence=[-1.0, -1.0, -1.0, 0.5]) == [False, False, False, True]
    assert watch.reason is Reason.EVIDENCE
    assert watch.stopped.endswith("evidence of 0.5 > 0: best 1 at check 1, 1 at check 1")
    state, told = EarlyStopping(Budget(4), nonfinite="ignore").init({}, {}), []
    for i in range(5):
        report = Report(torch.tensor(NAN), seconds=torch.tensor(float(i)))
        go_on, state = EarlyStopping(Budget(4), nonfinite="ignore").epoch(report, {}, {}, state)
        told.append(bool(go_on))
    assert told == [True, True, True, True, False]


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_rollback_puts_the_best_weights_and_buffers_back(on_disk: bool, restore: bool, tmp_path: Path) -> None:
    model = nn.BatchNorm1d(1)
    keep = tmp_path / "best.safetensors" if on_disk else None
    watch = EarlyStopping(9, nonfinite="rollback", restore=restore).watch(model, keep=keep)
    watch(NAN)  # there is no best yet
    assert not on_disk or not keep.exists()
    for i, score in enumerate((1.0, 0.5, 0.75)):
        nn.init.constant_(model.weight, i)
        model.running_mean.fill_(i)
        watch(score)
    assert model.weight.item() == 2
    nn.init.constant_(model.weight, NAN)
    watch(NAN)
    assert (model.weight.item(), model.running_mean.item()) == (1, 1)
    nn.init.constant_(model.weight, 5)
    assert watch.restore().weight.item() == (1 if restore else 5)


# Rule 9


@pytest.mark.parametrize("run", [True, False])
def test_without_restore_the_last_weights_stay_and_nothing_is_copied(run: bool) -> None:
    model, stopping = one(), EarlyStopping(2, restore=False)
    if run:
        watched = Run(stopping, model)
        for i in range(3):
            nn.init.constant_(model.weight, i)
            watched.epoch(float(i))
        watched.finish()
        state = watched.states(EarlyStopping)[0][1]
    else:
        watch = stopping.watch(model)
        heard(watch, [0.0, 1.0, 2.0])
        state = watch.restore() and watch.state
    assert model.weight.item() == 2
    assert not [name for name in state if name.startswith("weights")]


def test_weights_are_copied_at_improvements_alone() -> None:
    watch = EarlyStopping(5).watch(nn.Linear(3, 3))
    places = []
    for score in (1.0, 2.0, NAN, 0.5, 0.7):
        watch(score)
        places.append(watch.state["weights.weight"].data_ptr())
    assert places[0] == places[1] == places[2] != places[3] == places[4]


def test_tied_weights_come_back_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    watch = EarlyStopping(5).watch(model)
    heard(watch, [1.0, 0.5, 2.0])
    watch.restore()
    assert model[1].weight is model[0].weight
    assert (model[0].weight == 1).all()


def test_a_criterion_that_never_stops_keeps_the_best_all_the_same() -> None:
    model = one()
    watch = EarlyStopping(Patience(INF)).watch(model)
    assert not any(heard(watch, [1.0, 0.5, *[2.0] * 9]))
    assert watch.restore().weight.item() == 1


def test_what_is_kept_has_the_best_score_as_told_not_as_smoothed() -> None:
    watch = EarlyStopping(Smoothed(Patience(2), median=3)).watch(one())
    heard(watch, [1.0, 0.5, 0.9, 0.8, 0.8, 0.8])
    assert (watch.best, watch.best_check, watch.restore().weight.item()) == (0.5, 2, 1)


def test_two_early_stoppings_on_one_model_and_score_do_not_collide() -> None:
    model = one()
    first, second = EarlyStopping(1).watch(model), EarlyStopping(3, mode="max").watch(model)
    told = []
    for i, score in enumerate((0.5, 0.75, 0.25, 0.25, 0.25)):
        nn.init.constant_(model.weight, i)
        told.append((first(score), second(score)))
    assert [a for a, _ in told] == [False, True, True, True, True]
    assert [b for _, b in told] == [False, False, False, False, True]
    assert first.restore().weight.item() == 2
    assert second.restore().weight.item() == 1

    def run() -> Run:
        return Run(Cocktail(EarlyStopping(1), EarlyStopping(3), EarlyStopping(3)), one())

    whole = run()
    assert [whole.epoch(s) for s in (0.5, 0.75)] == [True, False]
    again = run()
    again.load_state_dict(whole.state_dict())
    assert [int(state["checks"]) for _, state in again.states(EarlyStopping)] == [2, 2, 2]


# Rule 7

SETTINGS: list[Criterion | float] = [2, Patience(2, grow=0.5), GL(20), PQ(1, k=2), UP(2, k=2), Target(0.3), Divergence(4)]
SETTINGS += [Smoothed(Patience(2), ema=0.5), Smoothed(GL(5), median=3), Patience(2) & GL(5) | Target(0.1), Evidence()]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SETTINGS),
    st.lists(st.sampled_from([NAN, INF, 0.25, 0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=12),
    st.sampled_from(["bad", "stop", "ignore"]),
    st.sampled_from(["checks", "steps"]),
    st.data(),
)
def test_a_watch_that_is_saved_and_loaded_stops_at_the_same_check(criterion, scores, nonfinite, unit, data) -> None:
    cut = data.draw(st.integers(0, len(scores)))
    stopping = EarlyStopping(criterion, nonfinite=nonfinite, unit=unit, warmup=2)

    def play(watch: Any, first: int, last: int) -> list[bool]:
        answers = []
        for i in range(first, last):
            nn.init.constant_(watch.model.weight, i)
            answers.append(watch(scores[i], train_loss=1 / (i + 1), evidence=i - 7.5, step=i + 1))
        return answers

    whole, before, after = (stopping.watch(one()) for _ in range(3))
    answers = play(whole, 0, len(scores))
    assert play(before, 0, cut) == answers[:cut]
    saved = before.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in saved.values())
    after.load_state_dict(copy.deepcopy(saved))
    assert play(after, cut, len(scores)) == answers[cut:]
    assert (after.stopped, after.reason, after.best, after.best_check) == (
        whole.stopped,
        whole.reason,
        whole.best,
        whole.best_check,
    )
    assert str(after.history) == str(whole.history)
    for watch in (after, whole):
        nn.init.constant_(watch.model.weight, -1)
    assert torch.equal(after.restore().weight, whole.restore().weight)


def test_the_time_before_a_resume_counts() -> None:
    stopping = EarlyStopping(Budget(1000))
    saved = stopping.watch(one()).state_dict()
    saved["watch.seconds"] = torch.tensor(999.0, dtype=torch.float64)
    again = stopping.watch(one())
    again.load_state_dict(saved)
    assert again(1.0)
    assert again.reason is Reason.BUDGET


def test_a_state_goes_back_only_where_it_came_from() -> None:
    saved = EarlyStopping(2).watch(one()).state_dict()
    with pytest.raises(GoodfitError, match=r"another criterion than GL\(5\), of which .anchor. does not match"):
        EarlyStopping(GL(5)).watch(one()).load_state_dict(saved)
    with pytest.raises(GoodfitError, match=r"'weights\.weight' must have shape \(1, 3\), got \(1, 1\)"):
        EarlyStopping(2).watch(nn.Linear(3, 1, bias=False)).load_state_dict(saved)
    with pytest.raises(GoodfitError, match="does not match"):
        EarlyStopping(2).watch(one()).load_state_dict({})


# Rule 8


def _of_two(rank: int, folder: str) -> None:
    def stop(stopping: EarlyStopping, scores: list[list[float]], **told: Any) -> str:
        watch = stopping.watch(nn.Linear(1, 1))
        answers = heard(watch, scores[rank], **{n: v[rank] for n, v in told.items()})
        return f"{answers.index(True) if True in answers else None} {watch.best} {watch.stopped}"

    # means 1, 1.125, 1.125: none of them alone would stop
    found = [stop(EarlyStopping(2), [[1.0, 0.5, 1.5, 0.4], [1.0, 1.75, 0.75, 1.8]])]
    found.append(stop(EarlyStopping(2), [[1.0, 0.5, NAN, 0.25], [1.0, 0.5, 0.25, NAN]]))
    # means 1, 0.9; two standard errors: √(0.06² + 0.08²)/2 = 0.05
    noise = [[0.06] * 3, [0.08] * 3]
    found.append(stop(EarlyStopping(Patience(1, stderrs=1.99)), [[1.0, 0.9], [1.0, 0.9001]], stderr=noise))
    found.append(stop(EarlyStopping(Patience(1, stderrs=2.01)), [[1.0, 0.9], [1.0, 0.9001]], stderr=noise))
    same = [[0.09] * 2] * 2  # both tell what holds for the whole
    found.append(stop(EarlyStopping(Patience(1, stderrs=1)), [[1.0, 0.92], [1.0, 0.92]], stderr=same))
    found.append(stop(EarlyStopping(5, unit="steps"), [[1.0] * 3] * 2, step=[[1, 5, 6], [1, 4, 5]]))
    watch = EarlyStopping(2).watch(nn.Linear(1, 1))
    try:
        watch(1.0, **({"stderr": 0.5} if rank else {}))
    except GoodfitError as refused:
        found.append(str(refused))
    model = nn.BatchNorm1d(1)
    kept = EarlyStopping(2).watch(model, keep=f"{folder}/best.safetensors")
    for score in (1.0, 2.0):
        model.running_mean.fill_(10 * score + rank)
        kept(score)
    found.append(f"{kept.restore().running_mean.item()} {kept.file.path}")
    Path(folder, f"{rank}").write_text("\n".join(found))


def test_processes_that_train_together_stop_together(tmp_path: Path) -> None:
    in_two_processes(_of_two, tmp_path)
    first, second = ((tmp_path / f"{rank}").read_text().splitlines() for rank in range(2))
    assert first[:-1] == second[:-1]
    assert [line.split()[:2] for line in first[:6]] == [
        ["2", "1.0"],
        ["3", "0.5"],
        ["None", "0.90005"],
        ["1", "0.90005"],
        ["1", "0.92"],
        ["2", "1.0"],
    ]
    assert first[6] == "All processes must tell the same inputs of a check, got stderr from some of them alone."
    assert first[7] == f"10.0 {tmp_path}/best.safetensors"
    assert second[7] == f"11.0 {tmp_path}/best.rank1.safetensors"


# What a watch takes

NUMBERS = [0.5, 1, np.float32(0.5), np.float64(0.5), np.int64(3), np.array(0.5), Fraction(1, 2)]
NUMBERS += [torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5, dtype=torch.bfloat16), torch.ones((), requires_grad=True)]


@pytest.mark.parametrize("score", NUMBERS, ids=lambda s: f"{type(s).__name__} {s!r}")
def test_a_score_is_one_number_of_python_numpy_or_torch(score: Any) -> None:
    watch = EarlyStopping(1).watch(one())
    assert watch(score) is False
    value = score.item() if isinstance(score, torch.Tensor) else float(score)
    assert watch.best == value
    assert watch(value) is True


WRONG = ["0.5", None, True, torch.tensor(True), np.bool_(True), 1j, [0.5], (0.5,), {"loss": 0.5}, torch.ones(1), np.ones(1)]
WRONG += [torch.ones(2), torch.tensor(1j), 10**400, object(), torch.empty((), device="meta")]


@pytest.mark.parametrize("score", WRONG, ids=lambda s: f"{type(s).__name__} {s!r:.30}")
def test_everything_else_is_one_clear_error(score: Any) -> None:
    watch = EarlyStopping(1).watch(one())
    with pytest.raises(GoodfitError, match="A score must be one number, got ") as told:
        watch(score)
    assert "\n" not in str(told.value)
    with pytest.raises(GoodfitError, match="train_loss must be one number"):
        watch(0.5, train_loss=score if score is not None else "none")
    assert watch.history == []


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(GoodfitError, match=r"watch takes a torch\.nn\.Module, got a list"):
        EarlyStopping(1).watch([torch.ones(1)])


def test_it_goes_on_listening_behind_its_stop() -> None:
    watch = EarlyStopping(1).watch(one())
    assert heard(watch, [1.0, 2.0, 0.5]) == [False, True, True]
    assert watch.stopped == "no improvement in 1 check: best 1 at check 1, 2 at check 2"
    assert (watch.best, watch.history, watch.reason) == (0.5, [1.0, 2.0, 0.5], Reason.PATIENCE)


def test_a_check_before_the_first_step_can_stop() -> None:
    assert EarlyStopping(Target(2.0), unit="steps").watch(one())(1.0, step=0)


def test_warmup_holds_for_every_criterion() -> None:
    assert stop_index(EarlyStopping(Target(2.0), warmup=2), [1.0] * 4) == 2
    assert stop_index(EarlyStopping(UP(1, k=2), warmup=5), [1.0, 1, 1, 2, 1, 3, 1, 4]) == 5
    assert stop_index(EarlyStopping(2, nonfinite="stop", warmup=3), [NAN] * 5) == 3


@pytest.mark.parametrize("value", [-1, 2.5, math.inf, -math.inf])
def test_a_step_that_is_no_count_is_refused(value: float) -> None:
    watch = EarlyStopping(10, unit="steps").watch(one())
    with pytest.raises(GoodfitError, match=f"step must be the number of optimizer steps so far, .* got step={value:g}"):
        watch(1.0, step=value)
    assert watch.history == []


def test_a_negative_standard_error_is_refused_and_one_of_nan_lets_nothing_count() -> None:
    watch = EarlyStopping(Patience(2, stderrs=1.0)).watch(one())
    with pytest.raises(GoodfitError, match=r"stderr must be >= 0, the standard error of the score, got stderr=-0\.1"):
        watch(1.0, stderr=-0.1)
    assert [watch(1 / (1 + i), stderr=NAN if i else 0.0) for i in range(3)] == [False, False, True]
    assert watch.stopped.startswith("no improvement on 1 by more than 1 standard error in 2 checks: best 0.333333 at check 3")


def test_joined_are_criteria_alone() -> None:
    for wrong in ((1, 2), (), [GL(5)], (GL(5), EarlyStopping(3))):
        for kind in (AnyOf, AllOf):
            with pytest.raises(GoodfitError, match=f"{kind.__name__} joins criteria, as in Patience"):
                kind(wrong)
    with pytest.raises(TypeError):
        GL(5) | 3


def test_counts_that_are_written_as_reals_are_the_same_value() -> None:
    assert repr(EarlyStopping(5.0, warmup=2.0)) == repr(EarlyStopping(5, warmup=2))
    assert repr(PQ(1, k=2.0)) == "PQ(1, k=2)"
    with pytest.raises(GoodfitError, match="an integer >= 1"):
        EarlyStopping(5.5)


def test_a_watch_that_had_stopped_stays_so_and_goes_on_with_more_patience() -> None:
    watch = EarlyStopping(2).watch(one())
    assert [watch(score) for score in (1.0, 2.0, 2.0)] == [False, False, True]
    same, patient = EarlyStopping(2).watch(one()), EarlyStopping(4).watch(one())
    for other in (same, patient):
        other.load_state_dict(watch.state_dict())
    assert same.stopped == watch.stopped != ""
    assert (patient.stopped, patient.reason) == ("", None)
    assert [patient(2.0), patient(2.0)] == [False, True]
    assert patient.best == 1.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EarlyStopping(2, mode="max"), "saved with mode='min', and here it is 'max'"),
        (EarlyStopping(2, unit="steps"), "saved with unit='checks', and here it is 'steps'"),
        (EarlyStopping(2, restore=False), "the best weights in it, for which restore=False has no use"),
        (EarlyStopping(Smoothed(Patience(2), median=3)), "another criterion than Smoothed"),
        (EarlyStopping(Patience(2) | GL(5)), "another criterion than"),
    ],
)
def test_a_state_that_would_mean_something_else_is_refused(other: EarlyStopping, message: str) -> None:
    watch = EarlyStopping(2).watch(one())
    watch(1.0)
    resumed = other.watch(one())
    with pytest.raises(GoodfitError, match=message):
        resumed.load_state_dict(watch.state_dict())
    assert resumed.history == []
    run, again = (Run(stopping, one()) for stopping in (EarlyStopping(2), other))
    with pytest.raises(GoodfitError, match=message):
        again.load_state_dict(run.state_dict())


def test_k_and_median_are_named_where_they_differ() -> None:
    for saved, here in ((PQ(1, k=3), PQ(1, k=4)), (Smoothed(Patience(2), median=3), Smoothed(Patience(2), median=5))):
        with pytest.raises(GoodfitError, match="may change, and not its kind, k or median"):
            EarlyStopping(here).watch(one()).load_state_dict(EarlyStopping(saved).watch(one()).state_dict())
    watch = EarlyStopping(Smoothed(Patience(9), median=3)).watch(one())
    watch.load_state_dict(EarlyStopping(Smoothed(Patience(2, min_delta=0.1), median=3)).watch(one()).state_dict())


@pytest.mark.parametrize("wrong", [None, "state", 3, {"a": 1}, [torch.zeros(1)]], ids=str)
def test_what_no_state_dict_gave_is_one_line(wrong: Any) -> None:
    for target in (EarlyStopping(2).watch(one()), Run(EarlyStopping(2), one())):
        with pytest.raises(GoodfitError, match="load_state_dict takes the dict of tensors that state_dict gave") as refused:
            target.load_state_dict(wrong)
        assert "\n" not in str(refused.value)


def changed(model: nn.Sequential, how: str) -> None:
    if how == "reshaped":
        model[0] = nn.Linear(2, 2)
    elif how == "added":
        model.append(nn.Linear(1, 1))
    elif how == "broadcast":  # torch would spread the kept one over it
        model[0].bias = nn.Parameter(torch.zeros(5))
    else:
        del model[0]


@pytest.mark.parametrize("how", ["reshaped", "added", "broadcast", "removed"])
def test_another_model_between_two_checks_is_refused(how: str) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    watch = EarlyStopping(5).watch(model)
    watch(1.0)
    changed(model, how)
    for call in (lambda: watch(0.5), watch.restore):
        with pytest.raises(GoodfitError, match=r"must be the one of the checks before, and '(weights|buffers)\..* was "):
            call()


def test_restore_before_any_check_changes_nothing_and_says_so() -> None:
    model = one()
    before = model.weight.detach().clone()
    with pytest.warns(GoodfitWarning, match=r"restore\(\) came before any check: the model stays as it is"):
        EarlyStopping(2).watch(model).restore()
    assert torch.equal(model.weight, before)
    off = EarlyStopping(math.inf).watch(model)
    assert [off(float(i)) for i in range(50)] == [False] * 50
    with torch.no_grad():
        model.weight.fill_(7.0)
    off.restore()
    assert model.weight.item() == 7.0


def test_weights_that_are_not_there_yet_are_refused() -> None:
    with pytest.raises(GoodfitError, match="watch needs weights that are there, but weight is lazy"):
        EarlyStopping(2).watch(nn.LazyLinear(3))


def test_an_expanded_buffer_is_kept_and_refused_only_where_it_would_change() -> None:
    model = one()
    model.register_buffer("scale", torch.zeros(1).expand(4))
    watch = EarlyStopping(2).watch(model)
    watch(1.0)
    watch(2.0)
    watch.restore()
    model.scale = torch.ones(1).expand(4)
    with pytest.raises(GoodfitError, match="'scale' is an expanded tensor, which nothing can be written into"):
        watch.restore()


def test_two_that_hear_one_score_as_better_in_opposite_ways_are_refused() -> None:
    with pytest.raises(GoodfitError, match="hear the same score, and it is lower or higher for better; give both one mode"):
        Run(Cocktail(EarlyStopping(2), EarlyStopping(3, mode="max")), one())
    Run(Cocktail(EarlyStopping(2), EarlyStopping(3)), one())


def test_steps_that_never_come_are_noticed() -> None:
    run = Run(EarlyStopping(5, unit="steps"), one())
    assert run.epoch(1.0)
    with pytest.raises(GoodfitError, match=r"unit='steps'.* has not acted: no optimizer step has reached this run"):
        run.epoch(1.0)
