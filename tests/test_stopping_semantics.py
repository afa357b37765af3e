"""Early stopping against its written rules, said a second time as a plain loop, and against the installed peers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from stopping_peer import cell
from stopping_peers import PEERS
from stopping_rules import SITUATIONS, Verdict, expected, verdict
from torch import nn

from goodfit import EarlyStopping, GoodfitError
from goodfit.phases import Report

NAN, INF = math.nan, math.inf

# The rules by hand, which goodfit follows; then Keras 3.15, Lightning 2.6, Ignite 0.5.5, transformers 5.23, skorch 1.4,
# scikit-learn 1.9 and ReduceLROnPlateau of torch 2.13, each as it was seen to do.
SYSTEMS = ["goodfit", "Keras", "Lightning", "Ignite", "Hugging Face", "skorch", "scikit-learn", "torch plateau"]
TABLE = {
    "delta exactly reached, p=1": "1 1 1 1 1 1 3 2",
    "drift 0.001, delta 0.005, p=6": "never never never 6 6 never 7 never",
    "constant": "3 3 3 3 3 3 never 4",
    "p=0, constant": "error 1 1 error 0 0 error 1",
    "p=0, improving": "error never never error 0 0 error never",
    "delta -0.1, constant": "error 3 never error 3 never error never",
    "nan first, improving": "never 3 0 never never never never never",
    "nan in the middle": "4 4 2 6 4 4 6 5",
    "all nan": "2 3 0 never 3 2 never 3",
    "inf first, improving": "never never 0 never never never never never",
    "relative, negative and worse": "3 no no never no never no never",
    "warm-up 5, constant": "5 8 no no no no no no",
    "kept: the best": "1 1 no no no 1 1 no",
    "kept: nan first": "2 0 no no no 2 2 no",
    "kept: better by less than delta": "2 0 no no no 0 2 no",
    "resumed": "3 5 3 3 4 5 never 4",
    "resumed, p=3 becomes 6": "6 8 3 6 7 8 never 4",
    "p=3 beside p=6, resumed": "3 5 error 3 4 5 never 4",
}


def test_the_table_is_whole() -> None:
    assert list(TABLE) == list(SITUATIONS)
    assert list(PEERS) == SYSTEMS


@pytest.mark.parametrize("situation", TABLE)
def test_goodfit_and_the_loop_follow_the_rules_as_derived_by_hand(situation: str) -> None:
    by_hand = TABLE[situation].split()[0]
    assert expected(SITUATIONS[situation]) == by_hand
    assert cell(PEERS["goodfit"], SITUATIONS[situation]) == by_hand


@pytest.mark.parametrize("system", SYSTEMS[1:])
@pytest.mark.parametrize("situation", TABLE)
def test_peers_do_what_the_table_says_of_them(situation: str, system: str) -> None:
    pytest.importorskip(PEERS[system].package)
    assert cell(PEERS[system], SITUATIONS[situation]) == TABLE[situation].split()[SYSTEMS.index(system)]


def test_a_handler_of_ignite_that_was_attached_forgets_when_the_trainer_starts_again() -> None:
    """Why its column resumes through an event handler, as its own example says."""
    engine = pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")
    trainer, evaluator = engine.Engine(lambda _, batch: batch), engine.Engine(lambda _, batch: batch)
    handler = handlers.EarlyStopping(3, lambda host: host.state.output, trainer, mode="min")
    handler.attach(evaluator, reset_engine=trainer)
    handler.load_state_dict({"counter": 2, "best_score": 0.5, "threshold_mode": "abs"})
    trainer.run([0])
    assert (handler.counter, handler.best_score) == (0, None)


# Ours against the loop


def decided(numbers: dict[str, Any], scores: Sequence[float], steps: Sequence[int] | None = None) -> Verdict:
    """What EarlyStopping does, without a model."""
    stopping = EarlyStopping(**numbers, unit="checks" if steps is None else "steps")
    state, stop = stopping.init({}, {}), None
    for i, score in enumerate(scores):
        step = None if steps is None else torch.tensor(steps[i], dtype=torch.float64)
        go_on, state = stopping.epoch(Report(torch.tensor(score, dtype=torch.float64), step=step), {}, {}, state)
        if not go_on:
            stop = i
            break
    return Verdict(stop, stopping.sign * float(state["best"]), int(state["best_check"]))


def a_score(draw: random.Random, kind: str) -> float:
    if draw.random() < 0.15:
        return draw.choice([NAN, INF, -INF])
    if kind == "ties":
        return float(draw.randint(-2, 2))
    scale = {"usual": 1.0, "huge": 1e307, "small": 1e-300, "smallest": 5e-324}[kind]
    return draw.choice([draw.gauss(0, 1), draw.gauss(-4, 1), float(draw.randint(-9, 9))]) * scale


def a_case(draw: random.Random) -> tuple[dict[str, Any], list[float], list[int] | None]:
    kind = draw.choice(["ties", "usual", "usual", "huge", "small", "smallest"])
    scores = [a_score(draw, kind) for _ in range(draw.randint(1, 14))]
    numbers = {
        "patience": draw.choice([1, 1, 2, 2, 3, 4, INF]),
        "min_delta": draw.choice([0.0, 0.0, 0.5, 1.0, 1e306, 1e-300, 5e-324]),
        "rel_delta": draw.choice([0.0, 0.0, 0.25, 1e-4, 1.5]),
        "warmup": draw.choice([0, 0, 1, 4]),
        "mode": draw.choice(["min", "max"]),
        "nonfinite": draw.choice(["bad", "stop", "ignore", "rollback"]),
    }
    if draw.random() < 0.7:
        return numbers, scores, None
    steps, at = [], 0
    for _ in scores:
        at += draw.choice([0, 1, 1, 2, 3])
        steps.append(at)
    return numbers, scores, steps


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_sequences_end_as_the_loop_says(block: int) -> None:
    draw, stops = random.Random(block), 0
    for _ in range(1000):
        numbers, scores, steps = a_case(draw)
        found = decided(numbers, scores, steps)
        assert found == verdict(scores, **numbers, steps=steps), (numbers, scores, steps)
        stops += found.stop is not None
    assert 300 < stops < 900  # both ends are met


NUMBERS = st.fixed_dictionaries(
    {
        "patience": st.integers(1, 5),
        "min_delta": st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 1e6),
        "rel_delta": st.sampled_from([0.0, 0.125, 0.5]),
        "warmup": st.integers(0, 6),
        "mode": st.sampled_from(["min", "max"]),
        "nonfinite": st.sampled_from(["bad", "stop", "ignore", "rollback"]),
    }
)
ACCIDENTS = st.sampled_from([NAN, INF, -INF])
SCORES = st.lists(st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6) | ACCIDENTS, min_size=1, max_size=16)


class Aged:
    """A watch beside a model whose weights and buffers tell how many checks it has seen."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        self.watch = EarlyStopping(**numbers).watch(self.model)

    def train(self, scores: Sequence[float], start: int = 0) -> int | None:
        for i, score in enumerate(scores, start):
            for tensor in self.model.state_dict().values():
                tensor.fill_(i)
            if self.watch(score):
                return i
        return None

    def ages(self) -> set[float]:
        return {t.item() for t in self.watch.restore().state_dict().values()}


@settings(max_examples=150, deadline=None)
@given(NUMBERS, SCORES)
def test_a_watch_ends_as_the_loop_says_and_gives_back_what_had_the_best_score(numbers: Any, scores: list[float]) -> None:
    aged, rules = Aged(numbers), verdict(scores, **numbers)
    assert aged.train(scores) == rules.stop
    assert (aged.watch.best, aged.watch.best_check) == (rules.best, rules.best_check)
    assert bool(aged.watch.stopped) == (aged.watch.reason is not None) == (rules.stop is not None)
    ended = len(scores) - 1 if rules.stop is None else rules.stop
    assert aged.ages() == {scores.index(rules.best) if rules.best_check else ended}


@settings(max_examples=100, deadline=None)
@given(NUMBERS, SCORES)
def test_what_is_to_raise_raises_at_the_first_score_that_is_not_finite(numbers: Any, scores: list[float]) -> None:
    numbers |= {"nonfinite": "raise"}
    try:
        rules = verdict(scores, **numbers)
    except FloatingPointError as accident:
        with pytest.raises(GoodfitError, match=rf"heard a score of .* at check {accident.args[0] + 1};"):
            decided(numbers, scores)
    else:
        assert decided(numbers, scores) == rules


@settings(max_examples=100, deadline=None)
@given(NUMBERS, SCORES, st.data())
def test_cut_anywhere_and_resumed_it_ends_alike(numbers: Any, scores: list[float], data: Any) -> None:
    whole = Aged(numbers)
    stop = whole.train(scores)
    heard = len(scores) if stop is None else stop
    cut = data.draw(st.integers(0, heard))
    first, second = Aged(numbers), Aged(numbers)
    assert first.train(scores[:cut]) is None
    second.watch.load_state_dict(first.watch.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert second.train(scores[cut:], cut) == stop
    assert second.watch.history == pytest.approx(whole.watch.history, abs=0, rel=0, nan_ok=True)
    assert second.watch.stopped == whole.watch.stopped
    assert (second.watch.best, second.watch.best_check) == (whole.watch.best, whole.watch.best_check)
    if whole.watch.best_check:
        assert second.ages() == whole.ages()


@settings(max_examples=100, deadline=None)
@given(NUMBERS, SCORES, st.integers(1, 5), st.data())
def test_resumed_with_another_patience_it_ends_as_if_that_had_been_asked_all_along(
    numbers: Any, scores: list[float], patience: int, data: Any
) -> None:
    other = numbers | {"patience": patience}
    stops = [verdict(scores, **one).stop for one in (numbers, other)]
    cut = data.draw(st.integers(0, min(len(scores) if stop is None else stop for stop in stops)))
    first, second = Aged(numbers), Aged(other)
    assert first.train(scores[:cut]) is None
    second.watch.load_state_dict(first.watch.state_dict())
    assert second.train(scores[cut:], cut) == stops[1]


@settings(max_examples=100, deadline=None)
@given(NUMBERS, SCORES)
def test_max_of_the_negated_scores_is_min_of_the_scores(numbers: Any, scores: list[float]) -> None:
    low = decided(numbers | {"mode": "min"}, scores)
    high = decided(numbers | {"mode": "max"}, [-v for v in scores])
    assert high == Verdict(low.stop, -low.best, low.best_check)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, SCORES, st.sampled_from([-40, -1, 1, 40]))
def test_another_unit_of_the_score_changes_nothing(numbers: Any, scores: list[float], power: int) -> None:
    """Powers of two, which scale without rounding where nothing is subnormal."""
    unit = 2.0**power
    scores = [v if not math.isfinite(v) or abs(v) > 1e-200 else 0.0 for v in scores]
    numbers |= {"min_delta": numbers["min_delta"] if numbers["min_delta"] > 1e-200 else 0.0}
    once = decided(numbers, scores)
    scaled = decided(numbers | {"min_delta": unit * numbers["min_delta"]}, [unit * v for v in scores])
    assert scaled == Verdict(once.stop, unit * once.best, once.best_check)
