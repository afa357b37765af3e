"""The criteria of early stopping: numbers derived by hand, plain loops beside them, and K members at once."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import vmap

import goodfit as gf
from goodfit import EarlyStopping, GoodfitError
from goodfit.hyper import hypers, lifted
from goodfit.phases import Report
from goodfit.stop import (
    CRITERIA,
    GL,
    PQ,
    UP,
    Budget,
    Criterion,
    Divergence,
    Evidence,
    Patience,
    Reason,
    Smoothed,
    Target,
    evidence,
)
from together import in_two_processes

NAN, INF = math.nan, math.inf
NEVER = None


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def first_stop(criterion: Criterion, scores: list[float], mode: str = "min", **told: list[float]) -> int | None:
    """Index of the check that says stop, through EarlyStopping."""
    stopping = EarlyStopping(criterion, mode=mode)
    state = stopping.init({}, {})
    for i, score in enumerate(scores):
        report = Report(number(score), **{name: number(values[i]) for name, values in told.items()})
        go_on, state = stopping.epoch(report, {}, {}, state)
        if not go_on:
            return i
    return None


# Numbers by hand; all are exact in binary. 0.53125 is 6.25 per cent above 0.5.
ACCIDENTS = [1.0, NAN, 0.5, NAN, INF, -INF, 0.53125]
CASES: dict[str, tuple[Criterion, list[float], dict[str, list[float]], int | None]] = {
    "GL": (GL(5), [1.0, 0.5, 0.515625, 0.53125], {}, 3),
    "GL reached is not above": (GL(6.25), [1.0, 0.5, 0.53125], {}, NEVER),
    "GL of negative scores": (GL(5), [-0.25, -0.5, -0.484375, -0.46875], {}, 3),
    "GL gets better for ever": (GL(5), [-(2.0**k) for k in range(-5, 5)], {}, NEVER),
    "GL with a best of zero": (GL(1e9), [1.0, 0.0, 0.0, 1e-300], {}, 3),
    "GL across zero": (GL(150), [-1.0, 0.25, 0.75], {}, 2),
    "GL of accidents": (GL(5), ACCIDENTS, {}, 6),
    "GL of nothing": (GL(0), [NAN] * 9, {}, NEVER),
    # the second strip: GL = 6.25, P = 1000 · (1/256) / 1 = 3.90625, quotient 1.6
    "PQ": (PQ(1.5, k=2), [1.0, 0.5, 0.5, 0.53125], {"train_loss": [4.0, 3.0, 1.0, 1 + 1 / 128]}, 3),
    "PQ reached is not above": (PQ(1.6, k=2), [1.0, 0.5, 0.5, 0.53125], {"train_loss": [4, 3, 1.0, 1 + 1 / 128]}, NEVER),
    "PQ of negative losses": (PQ(1.5, k=2), [1.0, 0.5, 0.5, 0.53125], {"train_loss": [4, 3, -1.0, 1 / 128 - 1]}, 3),
    "PQ asks at ends of strips": (PQ(1e-9, k=3), [0.5, 1.0, 0.5, 1.0, 1.0, 1.0], {"train_loss": [3, 2, 1, 3, 2, 1]}, 5),
    "PQ before its first strip": (PQ(1e-9, k=4), [0.5, 9.0, 9.0], {"train_loss": [3, 2, 1]}, NEVER),
    "PQ, training stands still": (PQ(1e9, k=2), [0.5, 0.5, 0.5, 0.51], {"train_loss": [0.1] * 4}, 3),
    "PQ, all stands still": (PQ(1e-9, k=2), [0.5] * 8, {"train_loss": [0.1] * 8}, NEVER),
    "PQ, training reaches zero": (PQ(1e-9, k=2), [0.5, 9.0, 9.0, 9.0], {"train_loss": [1, 0, 0, 1e-300]}, NEVER),
    "PQ, training rests at zero": (PQ(1e9, k=2), [0.5, 0.6], {"train_loss": [0.0, 0.0]}, 1),
    "PQ, best of zero": (PQ(1e9, k=2), [0.0, 1e-300], {"train_loss": [2.0, 1.0]}, 1),
    "PQ, best and training of zero": (PQ(1.0, k=2), [0.0, 1.0], {"train_loss": [0.0, 1.0]}, NEVER),
    "PQ, score of nan at the end": (PQ(1e-9, k=2), [0.5, NAN, 0.6, 0.7], {"train_loss": [1.0] * 4}, 3),
    "PQ, training of nan is left out": (PQ(1.5, k=3), [0.5, 0.5, 0.53125], {"train_loss": [1.0, NAN, 1 + 1 / 128]}, 2),
    "PQ, training of nan alone": (PQ(1e-9, k=2), [0.5, 0.6, 0.5, 0.6], {"train_loss": [NAN, 1.0, NAN, NAN]}, NEVER),
    "UP": (UP(2, k=2), [9.0, 1.0, 0.0, 1.1, 0.0, 1.2], {}, 5),
    "UP starts again": (UP(2, k=1), [1.0, 1.1, 1.05, 1.06, 1.07], {}, 4),
    "UP, a tie is not worse": (UP(1, k=1), [1.0, 1.0, 1.0, 1.5], {}, 3),
    "UP, the first strip is not worse": (UP(1, k=3), [1.0, 2.0, 3.0, 2.0, 2.0, 3.5], {}, 5),
    "UP, nan is worse": (UP(2, k=1), [1.0, 1.1, NAN], {}, 2),
    "UP behind nan is held against a number": (UP(3, k=1), [1.0, 1.1, NAN, 1.2], {}, 3),
    "UP behind nan and better": (UP(3, k=1), [1.0, 1.1, NAN, 1.05, 1.1, 1.2], {}, NEVER),
    "UP of negative scores": (UP(1, k=1), [-3.0, -4.0, -3.5], {}, 2),
    "UP of nan alone": (UP(2, k=2), [NAN] * 9, {}, 3),
    "Target": (Target(0.5), [1.0, 0.75, 0.5], {}, 2),
    "Target and accidents": (Target(-5), [NAN, -INF, INF, -4.0, -5.5], {}, 4),
    "Divergence": (Divergence(2), [1.0, 2.0, NAN, 2.5], {}, 3),
    "Divergence to infinity": (Divergence(2), [1.0, INF], {}, 1),
    "Divergence of negative scores": (Divergence(-2), [-3.0, -2.0, -1.0], {}, 2),
    # intervals of 20, 20, 15 and 10 s: after 45 s another 15 reach 60 but do not exceed it
    "Budget": (Budget(60), [1.0] * 4, {"seconds": [15.0, 30.0, 45.0, 46.0]}, NEVER),
    "Budget in front of the bound": (Budget(59), [1.0] * 4, {"seconds": [15.0, 30.0, 45.0, 46.0]}, 2),
    "Budget, first check": (Budget(50), [1.0], {"seconds": [26.0]}, 0),
    "Budget does not ask the score": (Budget(50), [NAN], {"seconds": [26.0]}, 0),
    "Evidence": (Evidence(), [1.0] * 4, {"evidence": [-3.0, 0.0, NAN, 0.25]}, 3),
    # steps 1, 2 and 3 without an improvement behind a best at check 3: 1 + 1 · 3 are tolerated
    "Patience grows with the best": (Patience(1, grow=1.0), [3.0, 2.0, 1.0, *[1.0] * 9], {}, 6),
    "Patience grows by shares": (Patience(2, grow=0.25), [1.0] * 9, {}, 3),
    "Patience within the noise": (Patience(2, stderrs=2), [1.0, 0.75, 0.5, 0.5], {"stderr": [0.25] * 4}, 2),
    "Patience beyond the noise": (Patience(2, stderrs=2), [1.0, 0.25, 0.5, 0.5], {"stderr": [0.25] * 4}, 3),
    "Patience, the larger margin": (Patience(1, 0.5, stderrs=2), [1.0, 0.375, 0.0], {"stderr": [0.1] * 3}, 2),
    "Patience, noise of nan": (Patience(2, stderrs=1), [1.0, 0.5, 0.25], {"stderr": [NAN] * 3}, 2),
    "Smoothed by the median": (Smoothed(Patience(2), median=3), [1.0, 0.9, 0.8, 5.0, 0.7, 0.9, 0.9], {}, 6),
    "the same, not smoothed": (Patience(2), [1.0, 0.9, 0.8, 5.0, 0.85, 0.7], {}, 4),
    # ema = 0.5: heard are 4, (2·0 + 4)/3 = 4/3, (4·2 + 2·0 + 4)/7 = 12/7
    "Smoothed by the average": (Smoothed(Divergence(1.71), ema=0.5), [1.0, 1.0, 1.0, 4.0], {}, 3),
    "Smoothed, exact average": (Smoothed(Target(12 / 7), ema=0.5), [4.0, 4.0, 0.0], {}, 2),
    "Smoothed, nan is heard and left out": (Smoothed(Patience(1), ema=0.5), [4.0, 2.0, NAN], {}, 2),
    "Smoothed, nan does not poison": (Smoothed(Target(1.0), ema=0.5), [NAN, INF, 1.0], {}, 2),
    "any": (Patience(3) | GL(5), [1.0, 0.5, 0.53125], {}, 2),
    "all": (Patience(2) & GL(5), [1.0, 0.5, 0.53125, 0.5078125, 0.53125], {}, 4),
    "nested": ((Patience(1) | Target(0.25)) & GL(5), [1.0, 0.25, 0.2578125, 0.5], {}, 3),
}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_stops_at_the_check_that_follows_by_hand(case: tuple, mode: str) -> None:
    """A maximised score is the mirror of a minimised one, and so are the numbers told in its units."""
    criterion, scores, told, stop = case
    if mode == "max":
        criterion, scores = criterion.mirrored(), [-s for s in scores]
    assert first_stop(criterion, scores, mode, **told) == stop


def test_the_average_is_the_weighted_mean_of_what_came() -> None:
    heard = []

    class Ear(Criterion):
        def check(self, report: Report, state: dict) -> tuple[torch.Tensor, dict]:
            heard.append(float(report.score))
            return torch.tensor(False), state

        def reason(self, state: dict, sign: float = 1.0, unit: str = "checks") -> str:
            return ""

    first_stop(Smoothed(Ear(), ema=0.5), [4.0, 0.0, NAN, 2.0])
    assert heard[:2] == [4.0, 4 / 3]
    assert math.isnan(heard[2])
    assert heard[3] == pytest.approx((4 * 2.0 + 2 * 0.0 + 4.0) / 7, rel=1e-15)


# Plain loops


def plain_gl(scores: list[float], alpha: float, **_: Any) -> list[bool]:
    best, told = INF, []
    for v in scores:
        best = min(best, v) if math.isfinite(v) else best
        gap = v - best if math.isfinite(v) else 0.0
        told.append(gap > 0 and (best == 0 or 100 * gap / abs(best) > alpha))
    return told


def plain_pq(scores: list[float], alpha: float, k: int, train: list[float]) -> list[bool]:
    best, told = INF, []
    for t, v in enumerate(scores, start=1):
        best = min(best, v) if math.isfinite(v) else best
        strip = [x for x in train[t - k : t] if math.isfinite(x)]
        if t % k or not math.isfinite(v) or len(strip) < 2 or v == best:
            told.append(False)
            continue
        gl = INF if best == 0 else 100 * (v - best) / abs(best)
        low = min(strip)
        spread = sum(x - low for x in strip) / len(strip)
        p = 0.0 if spread == 0 else INF if low == 0 else 1000 * spread / abs(low)
        told.append(gl > alpha * p)
    return told


def plain_up(scores: list[float], s: int, k: int, **_: Any) -> list[bool]:
    ends, told = scores[k - 1 :: k], []
    for t in range(1, len(scores) + 1):
        n, row = t // k, 0
        for i in range(n):
            before = [e for e in ends[:i] if math.isfinite(e)]
            worse = not math.isfinite(ends[i]) or (bool(before) and ends[i] > before[-1])
            row = row + 1 if worse else 0
        told.append(t % k == 0 and row >= s)
    return told


series = st.lists(st.sampled_from([NAN, INF, -INF, -2.0, -0.5, 0.0, 0.25, 0.5, 0.53125, 1.0]), min_size=1, max_size=24)


def answers(criterion: Criterion, scores: list[float], train: list[float]) -> list[bool]:
    state, told = criterion.init(), []
    for v, t in zip(scores, train, strict=True):
        stop, state = criterion.check(Report(number(v), train_loss=number(t)), state)
        told.append(bool(stop))
    return told


@settings(deadline=None)
@given(series, st.integers(1, 4), st.integers(2, 4), st.sampled_from([0.25, 1.0, 5.0, 120.0]), st.randoms())
def test_it_decides_as_a_plain_loop_does(scores: list[float], s: int, k: int, alpha: float, random: Any) -> None:
    train = random.sample(scores, len(scores))
    assert answers(GL(alpha), scores, train) == plain_gl(scores, alpha)
    assert answers(PQ(alpha, k), scores, train) == plain_pq(scores, alpha, k, train)
    assert answers(UP(s, k), scores, train) == plain_up(scores, s, k)


@settings(deadline=None)
@given(series, st.integers(2, 5), st.floats(-2, 2))
def test_the_median_is_that_of_the_last_finite_scores(scores: list[float], width: int, target: float) -> None:
    finite, told = [], []
    for v in scores:
        finite += [v] if math.isfinite(v) else []
        told.append(math.isfinite(v) and statistics.median(finite[-width:]) <= target)
    assert answers(Smoothed(Target(target), median=width), scores, scores) == told


# K members at once

MEMBERS: list[tuple[Criterion, str, list[float]]] = [
    (Patience(2), "patience", [1.0, 2.0, INF]),
    (Patience(2), "min_delta", [0.0, 0.25]),
    (Patience(2), "rel_delta", [0.0, 0.5]),
    (Patience(2), "stderrs", [0.0, 1.0]),
    (Patience(2), "grow", [0.0, 0.5]),
    (GL(5), "alpha", [0.0, 5.0, 50.0]),
    (PQ(1, k=2), "alpha", [0.1, 1.0, 50.0]),
    (UP(2, k=2), "s", [1.0, 2.0, 3.0]),
    (Target(0.5), "score", [0.25, 0.75]),
    (Divergence(0.5), "score", [0.25, 0.75]),
    (Budget(5), "seconds", [3.0, 6.0]),
]


@pytest.mark.parametrize(("criterion", "name", "values"), MEMBERS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("around", ["alone", "smoothed", "joined", "mirrored"])
@pytest.mark.parametrize("nonfinite", ["bad", "stop", "ignore"])
def test_lifted_over_members_equals_the_loop(criterion, name, values, around, nonfinite) -> None:
    scores = [1.0, 0.5, NAN, 0.6, 0.53125, 0.7, 0.4, 0.8]
    wrap = {
        "alone": lambda one: one,
        "smoothed": lambda one: lifted(Smoothed(criterion, median=3), criterion=one),
        "joined": lambda one: one & (Patience(2) | Target(0.1)),
        "mirrored": lambda one: one,
    }[around]

    def results(value: Any) -> list[torch.Tensor]:
        one = lifted(criterion, **{name: value})
        stopping = lifted(EarlyStopping(nonfinite=nonfinite), patience=wrap(one), mode="max" if around == "mirrored" else "min")
        w = {"w": torch.ones(2)}
        state, told = stopping.init(w, {}), []
        for i, score in enumerate(scores):
            others = {"train_loss": score / (i + 1), "stderr": 0.05, "seconds": float(i), "evidence": i - 3.0}
            report = Report(number(score), **{n: number(v) for n, v in others.items()})
            go_on, state = stopping.epoch(report, {"w": torch.full((2,), float(i))}, {}, state)
            told.append(go_on)
        return [torch.stack(told), state["weights.w"], state["best"]]

    together = vmap(results)(torch.tensor(values, dtype=torch.float64))
    for i, value in enumerate(values):
        for lift, alone in zip(together, results(value), strict=True):
            assert torch.equal(lift[i], alone)


# Values and texts

ALONE = [Patience(10), Patience(3, 0.5, stderrs=1.0, grow=0.3), Patience(INF), GL(5), GL(0.5), PQ(2), PQ(0.5, k=3), UP(4, k=2)]
ALONE += [Target(-1.5), Divergence(3), Budget(60), Evidence(), Smoothed(Patience(5), ema=0.9), Smoothed(UP(2), median=5)]
leaves = st.sampled_from(ALONE)
trees = st.recursive(
    leaves, lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] & t[1] if t[2] else t[0] | t[1])
)


@pytest.mark.parametrize("criterion", [*ALONE, Smoothed(Patience(2) | (GL(5) & UP(2)), ema=0.5)], ids=repr)
def test_its_text_reads_back(criterion: Criterion) -> None:
    stopping = EarlyStopping(criterion, warmup=3)
    assert gf.parse(repr(stopping))[0] == gf.parse(str(stopping))[0] == stopping
    assert hash(stopping) == hash(copy.deepcopy(stopping))


@settings(deadline=None)
@given(trees)
def test_any_joined_criteria_read_back(criterion: Criterion) -> None:
    cocktail = gf.Cocktail(gf.L2(0.1), EarlyStopping(criterion))
    assert gf.parse(repr(cocktail)) == gf.parse(str(cocktail)) == cocktail


def test_the_text_of_joined_criteria_is_that_of_python() -> None:
    a, b, c = Patience(10), GL(5), UP(2)
    assert [repr(x) for x in (a | b | c, a | (b | c), a & b & c)] == ["Patience(10) | GL(5) | UP(2)"] * 2 + [
        "Patience(10) & GL(5) & UP(2)"
    ]
    assert repr((a | b) & c) == "(Patience(10) | GL(5)) & UP(2)"
    assert repr(a | b & c) == "Patience(10) | (GL(5) & UP(2))"
    assert (a | b) | c == a | (b | c)
    assert (a | b) & c != a | (b & c)


WRONG = {
    "EarlyStopping(GL(5) | 3)": "combine selectors such as kernels, and & \\| criteria",
    "EarlyStopping(GL(5) & kernels)": "combine selectors",
    "EarlyStopping(~GL(5))": "combine selectors",
    "L2(0.1, where=kernels | GL(5))": "combine selectors",
    "L2(0.1, where=GL(5))": "must be a selector",
    "L2(GL(5))": "L2.lam must be",
    "EarlyStopping(kernels)": "EarlyStopping.patience must be an integer .*or a Criterion",
    "EarlyStopping(GL)": "did you mean GL",
    "EarlyStopping(Patince(5))": "did you mean Patience",
    "EarlyStopping(GL(beta=5))": "GL has no number 'beta'",
    "EarlyStopping(Target())": "Target takes .*missing a required argument: 'score'",
    "EarlyStopping(GL(__import__('os')))": "A cocktail holds numbers",
    "EarlyStopping(GL(linear(1, 2, steps=3)))": "GL.alpha is fixed before training starts",
    "EarlyStopping(linear(1, 2, steps=3))": "EarlyStopping.patience is fixed before training starts",
    "EarlyStopping(Smoothed(3, ema=0.5))": "Smoothed.criterion must be one such as Patience",
    "EarlyStopping(Smoothed(GL(5)))": "one of ema= and median=, .* got Smoothed\\(GL\\(5\\)\\)",
    "EarlyStopping(Smoothed(GL(5), ema=0.5, median=3))": "one of ema= and median=",
    "EarlyStopping(GL(5), min_delta=0.5)": "min_delta belongs into a criterion here: Patience\\(20, min_delta=0.5\\)",
    "EarlyStopping(PQ(1, k=1))": "PQ.k must be an integer >= 2, got k=1",
    "EarlyStopping(PQ(0))": "PQ.alpha must be > 0, got alpha=0",
    "EarlyStopping(UP(0))": "UP.s must be an integer >= 1",
    "EarlyStopping(Target(inf))": "Target.score must be a finite number, got score=inf",
    "EarlyStopping(Budget(0))": "Budget.seconds must be > 0",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_text_is_one_line_that_helps(text: str) -> None:
    with pytest.raises(GoodfitError, match=WRONG[text]) as told:
        gf.parse(text)
    assert "\n" not in str(told.value)


def test_what_is_no_criterion_is_not_joined() -> None:
    for wrong in (3, None, "GL(5)", GL):
        with pytest.raises(TypeError):
            Patience(3) | wrong
        with pytest.raises(TypeError):
            wrong & Patience(3)


# Reasons

WHY: list[tuple[Criterion, list[float], dict[str, list[float]], Reason, str]] = [
    (GL(5), [0.5, 0.53125], {}, Reason.GENERALIZATION_LOSS, "a generalization loss of 6.25 %, above 5 %"),
    (
        PQ(1, k=2),
        [0.5, 0.53125],
        {"train_loss": [1.0, 1 + 1 / 128]},
        Reason.PROGRESS,
        "a generalization loss of 6.25 %, more than 1 times the training progress of 3.906 per mille over 2 checks",
    ),
    (UP(1, k=1), [0.5, 0.53125], {}, Reason.RISE, "the score got worse over 1 strip of 1 check in a row"),
    (UP(2, k=1), [0.5, 0.51, 0.53125], {}, Reason.RISE, "the score got worse over 2 strips of 1 check in a row"),
    (Target(0.53125), [0.75, 0.53125], {}, Reason.TARGET, "the score 0.53125 reached the target 0.53125"),
    (Divergence(0.5), [0.5, 0.53125], {}, Reason.DIVERGENCE, "the score 0.53125 is beyond 0.5"),
    (Evidence(), [0.5], {"evidence": [0.25]}, Reason.EVIDENCE, "noise, with an evidence of 0.25 > 0"),
    (Budget(6), [0.5], {"seconds": [4.0]}, Reason.BUDGET, "another 4 s after 4 s would exceed the budget of 6 s"),
    (Patience(1, stderrs=2), [0.5, 0.5], {"stderr": [0.1] * 2}, Reason.PATIENCE, "by more than 2 standard errors in 1 check"),
    (Patience(1, 0.5, 0.5), [0.5, 0.5], {}, Reason.PATIENCE, "by more than 0.5 and 0.5 of itself in 1 check"),
    (Smoothed(GL(5), median=3), [0.5, 0.5625], {}, Reason.GENERALIZATION_LOSS, "6.25 %, above 5 %, by the median of 3"),
    (Smoothed(GL(5), ema=0.5), [0.5, 0.546875], {}, Reason.GENERALIZATION_LOSS, "6.25 %, above 5 %, by the average of ema=0.5"),
    (Patience(9) | GL(5), [0.5, 0.53125], {}, Reason.GENERALIZATION_LOSS, "a generalization loss of 6.25 %, above 5 %: best"),
    (Patience(1) | GL(5), [0.5, 0.53125], {}, Reason.PATIENCE, "no improvement in 1 check; a generalization loss of 6.25 %"),
    (Patience(1) & GL(5), [0.5, 0.53125], {}, Reason.PATIENCE, "no improvement in 1 check and a generalization loss of 6.25 %"),
]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("criterion", "scores", "told", "reason", "text"), WHY, ids=lambda v: str(v)[:24])
def test_it_says_why_in_the_sign_of_the_user(criterion, scores, told, reason, text, mode) -> None:
    if mode == "max":
        criterion, scores = criterion.mirrored(), [-s for s in scores]
        text = text.replace("score 0.5", "score -0.5").replace("target 0.5", "target -0.5").replace("beyond 0.5", "beyond -0.5")
    stopping = EarlyStopping(criterion, mode=mode)
    state = stopping.init({}, {})
    for i, score in enumerate(scores):
        report = Report(number(score), **{name: number(values[i]) for name, values in told.items()})
        go_on, state = stopping.epoch(report, {}, {}, state)
    assert not go_on
    assert stopping.why(state) is reason
    assert text in stopping.reason(state)
    assert stopping.reason(state).endswith(f"{scores[-1]:.6g} at check {len(scores)}")


# What a criterion needs

NEEDS = {
    PQ(1): "PQ needs the training loss; say {}\\(score, train_loss=\\.\\.\\.\\)",
    Patience(3, stderrs=1): "Patience needs the standard error of the score; say {}\\(score, stderr=",
    Evidence(): "Evidence needs the evidence of the gradients, gf.stop.evidence; say {}\\(score, evidence=",
    Patience(2) | (GL(5) & Smoothed(PQ(1), ema=0.5)): "PQ needs the training loss; say {}",
}


@pytest.mark.parametrize("criterion", NEEDS, ids=repr)
def test_a_criterion_that_lacks_its_input_refuses_by_name(criterion: Criterion) -> None:
    with pytest.raises(GoodfitError, match=NEEDS[criterion].format("stopping")):
        EarlyStopping(criterion).watch(nn.Linear(1, 1))(0.5)
    with pytest.raises(GoodfitError, match=NEEDS[criterion].format("run.epoch")):
        gf.Run(EarlyStopping(criterion), nn.Linear(1, 1)).epoch(0.5)


def test_what_joined_criteria_need_is_what_their_parts_need() -> None:
    assert (Patience(2) | PQ(1) & (Budget(3) | PQ(2))).needs == ("train_loss", "seconds")
    assert Smoothed(Patience(2, stderrs=1), ema=0.5).needs == ("stderr",)


def test_the_patience_left_of_joined_criteria() -> None:
    def left(criterion: Criterion) -> float | None:
        watch = EarlyStopping(criterion).watch(nn.Linear(1, 1))
        watch(1.0)
        watch(1.0)
        return watch.stopping.patience_left(watch.state)

    assert left(Patience(5)) == left(Smoothed(Patience(5), ema=0.5)) == left(GL(5) & Patience(5)) == 4
    assert left(Patience(5, grow=2.0)) == 6
    assert left(Patience(3) | Patience(7)) == 2
    assert left(Patience(3) & Patience(7)) == 6
    assert left(GL(5)) is left(GL(5) | UP(2)) is None


def test_a_path_refuses_a_criterion_that_it_cannot_serve() -> None:
    data = torch.randn(12, 3), torch.randn(12)
    for stopping in (EarlyStopping(PQ(1)), EarlyStopping(5, unit="steps")):
        with pytest.raises(GoodfitError, match="A path stops by the validation loss after each epoch, and knows no"):
            gf.path(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), data, data, cocktail=stopping)


@pytest.mark.parametrize("kind", CRITERIA, ids=lambda kind: kind.__name__)
def test_its_docstring_has_its_parts_and_runs(kind: type[Criterion]) -> None:
    parts = ("Formula:", "Needs:", "Numbers:", "Errors:", "Source:", ">>> ")
    places = [kind.__doc__.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    assert kind.kind is not Reason.OTHER or kind is Smoothed
    torch.set_default_dtype(torch.float32)
    example = doctest.DocTestFinder().find(kind, globs={"torch": torch, "nn": nn, **vars(gf.stop)})[0]
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


@pytest.mark.parametrize("kind", [k for k in CRITERIA if k is not Smoothed], ids=lambda kind: kind.__name__)
def test_numbers_outside_their_range_are_refused_by_name(kind: type[Criterion]) -> None:
    first = {f.name: 5 for f in fields(kind)[:1]}
    assert {name for name, _ in hypers(kind)} == {f.name for f in fields(kind)}
    for name, known in hypers(kind):
        lower = float(known.valid[1:].split(",")[0])
        assert not known.required or name in first
        for wrong in (lower - 0.5, NAN, "0.1", None, True):
            with pytest.raises(GoodfitError, match=rf"{kind.__name__}.{name} must be .*, got {name}="):
                kind(**{**first, name: wrong})


# Evidence by hand: w = 0 and x = 1, so the gradient of (w x − y)² is −2 y


def line(w: float = 0.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, w)
    return model


def batch(*ys: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(len(ys), 1, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64).view(-1, 1)


def test_evidence_by_hand() -> None:
    # gradients −6, −2, −4: mean −4, variance of it 4/3; 1 − 16 / (4/3)
    assert evidence(line(), nn.functional.mse_loss, [batch(3.0), batch(1.0), batch(2.0)]) == pytest.approx(-11, rel=1e-14)
    # two rows of −4 beside one of −10: mean −6, variance (2 · 4 + 16) / (1 · 3) = 8; 1 − 36 / 8
    assert evidence(line(), nn.functional.mse_loss, [batch(1.0, 3.0), batch(5.0)]) == pytest.approx(-3.5, rel=1e-14)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 5))
def test_evidence_of_a_linear_model_is_the_closed_formula(seed: int, count: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Linear(inputs, 1, dtype=torch.float64)
    xs = [torch.randn(3, inputs, generator=draw, dtype=torch.float64) for _ in range(count)]
    ys = [torch.randn(3, 1, generator=draw, dtype=torch.float64) for _ in range(count)]
    grads = []
    for x, y in zip(xs, ys, strict=True):
        error = 2 * (x @ model.weight.T + model.bias - y) / 3
        grads.append(torch.cat([(error * x).sum(0), error.sum(0)]).detach())
    table = torch.stack(grads)
    expected = 1 - (table.mean(0).square() / (table.var(0) / count)).mean()
    found = evidence(model, nn.functional.mse_loss, list(zip(xs, ys, strict=True)))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_evidence_leaves_everything_as_it_was_and_runs_as_in_prediction() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))  # no gradient reaches it: left out
    model[1].eval()
    model[0].weight.requires_grad_(False)
    data = torch.utils.data.TensorDataset(torch.randn(12, 2).double(), torch.randn(12, 1).double())
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    nn.functional.mse_loss(model(data[:][0]), data[:][1]).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before, modes, rng = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    found = evidence(model, nn.functional.mse_loss, loader)
    assert torch.equal(torch.get_rng_state(), rng)
    assert found == evidence(model, nn.functional.mse_loss, loader)  # no dropout, and the order of rows starts alike
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    del model.extra
    with torch.no_grad():
        assert evidence(model.eval(), nn.functional.mse_loss, loader) == found


def test_evidence_refuses_what_has_no_spread() -> None:
    loss = nn.functional.mse_loss
    with pytest.raises(GoodfitError, match="two batches or more, got 1; give smaller batches"):
        evidence(line(), loss, [batch(1.0, 2.0)])
    with pytest.raises(GoodfitError, match="got the same from all"):
        evidence(line(), loss, [batch(1.0), batch(1.0)])
    with pytest.raises(GoodfitError, match="Linear has no trainable parameter"):
        evidence(line().requires_grad_(False), loss, [batch(1.0), batch(2.0)])
    with pytest.raises(GoodfitError, match="A batch must be a pair"):
        evidence(line(), loss, [torch.ones(2, 1), torch.ones(2, 1)])


def test_evidence_rises_to_noise_as_a_fit_converges() -> None:
    """At the least-squares solution the mean gradient is zero: the evidence is 1, its largest value."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=draw).double(), torch.randn(40, 1, generator=draw).double()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 40, 4)]
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 3.0)
    assert evidence(model, nn.functional.mse_loss, batches) < -10
    model.weight.data = torch.linalg.lstsq(x, y).solution.T
    assert evidence(model, nn.functional.mse_loss, batches) == pytest.approx(1.0, abs=1e-12)


def _half_of_evidence(rank: int, folder: str) -> None:
    found = evidence(line(), nn.functional.mse_loss, [batch(3.0)] if rank else [batch(1.0), batch(2.0)])
    Path(folder, f"evidence{rank}").write_text(repr(found))


def test_two_processes_get_the_evidence_of_the_whole(tmp_path: Path) -> None:
    in_two_processes(_half_of_evidence, tmp_path)
    for rank in range(2):
        assert float((tmp_path / f"evidence{rank}").read_text()) == pytest.approx(-11, rel=1e-14)


def test_a_criterion_is_a_machine_of_its_own() -> None:
    """It counts checks itself where a report has no step, and its state is tensors that one call does not write into."""
    for one in (Patience(2), GL(5), UP(1, k=1), Smoothed(Patience(2), ema=0.5), Patience(2) | GL(5)):
        state = start = one.init()
        before = {name: t.clone() for name, t in start.items()}
        for score in (1.0, 0.5, 2.0):
            _, state = one.check(Report(number(score)), state)
            assert state.keys() == start.keys()
            assert all(t.dtype == start[n].dtype and t.shape == start[n].shape for n, t in state.items()), one
        assert all(torch.allclose(t, before[n], rtol=0, atol=0, equal_nan=True) for n, t in start.items())
    assert [bool(stop) for stop in _told(Patience(2), (1.0, 1.0, 1.0))] == [False, False, True]


@pytest.mark.parametrize("criterion", [c for c in ALONE if c.scored] + [Patience(1) | GL(5) & UP(1, k=1)], ids=repr)
def test_a_check_that_does_not_count_is_one_that_was_not_heard(criterion: Criterion) -> None:
    state = criterion.init()
    for score, counts in ((1.0, True), (2.0, False), (0.1, False)):
        report = Report(number(score), train_loss=number(score), stderr=number(0.1))
        before, (stop, state) = state, criterion.hear(report, state, torch.tensor(counts))
        if not counts:
            assert not stop
            assert all(
                torch.allclose(t, before[n], rtol=0, atol=0, equal_nan=True) for n, t in state.items() if "asked" not in n
            )


def _told(criterion: Criterion, scores: tuple[float, ...]) -> list[torch.Tensor]:
    state, told = criterion.init(), []
    for score in scores:
        stop, state = criterion.check(Report(number(score)), state)
        told.append(stop)
    return told


def test_every_reason_is_reached_and_named_once() -> None:
    kinds = [kind.kind for kind in CRITERIA if kind is not Smoothed]
    assert len(set(kinds)) == len(kinds)
    assert set(Reason) - set(kinds) == {Reason.NONFINITE, Reason.INTERRUPTED, Reason.FAILED, Reason.OTHER}
    assert all(a.value != b.value for a, b in itertools.combinations(Reason, 2))


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    one = replace(Patience(3), patience=torch.tensor(4), min_delta=number(0.5))
    assert repr(one) == "Patience(4, min_delta=0.5)"
