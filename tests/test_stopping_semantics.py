"""Early stopping beside a plain spec of its rules, on situations, on 10,000 random sequences, and beside other packages."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from early_stopping_semantics import SYSTEMS, WRONG, System, cell, said
from hypothesis import assume, given, settings, strategies as st
from stopping_job import Marked
from stopping_situations import SITUATIONS, Situation, expected
from stopping_spec import Rule, Spec
from torch.func import vmap

from goodfit import EarlyStopping
from goodfit.hyper import lifted
from goodfit.phases import Report

NAN, INF = math.nan, math.inf
OURS, *PEERS = SYSTEMS

# by hand from the rules: the check after which training ends and the best score, or the check whose weights are left
BY_HAND = {
    "constant": "3 (1)",
    "always worse": "3 (0)",
    "always better": "never (0.3125)",
    "ties with the best": "4 (0.5)",
    "a single bad check at a time": "never (0.03125)",
    "scores that rise, told so": "never (-0.3125)",
    "scores that rise, told so, then fall": "5 (0.75)",
    "min_delta exactly reached": "1 (0.75)",
    "min_delta just passed": "4 (0.4844)",
    "slow drift adds up": "never (0.9854)",
    "negative min_delta": "refused",
    "patience 0, constant": "refused",
    "patience 0, always better": "refused",
    "nan first, then better": "never (0.3125)",
    "nan in the middle, then worse": "4 (0.875)",
    "nan in the middle, told to stop": "2 (0.875)",
    "nan in the middle, told to ignore": "5 (0.875)",
    "nan in the middle, told to raise": "refused",
    "all nan": "2 (none)",
    "inf first, then better": "never (0.3125)",
    "-inf once, then better": "never (0.3125)",
    "relative, exactly reached": "1 (7)",
    "relative, negative and better": "never (-2048)",
    "relative, negative and worse": "3 (-10)",
    "warm-up 5, constant": "5 (1)",
    "warm-up 3, best in it": "3 (0.125)",
    "at least 8 checks, bad then better": "never (0.3125)",
    "target 0.5 reached": "2 (0.375)",
    "rmse falls, direction not told": "never (0.3125)",
    "accuracy rises, direction not told": "never (-0.3125)",
    "score missing": "refused",
    "restore, stopped": "kept 2",
    "restore, ran to the end": "kept 2",
    "restore, best within min_delta": "kept 1",
    "restore, nan first": "kept 2",
    "resume": "3 (1)",
    "resume with patience 6": "6 (1)",
    "resume with patience 6 and 3": "3 (1)",
}
UNTOLD = "accuracy rises, direction not told"  # lower is better unless told: a watch hears no name to guess from


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.name)
def test_goodfit_and_the_spec_say_what_follows_by_hand(situation: Situation) -> None:
    assert said(expected(situation), situation) == BY_HAND[situation.name]
    ours = cell(OURS, situation)
    if situation.name == UNTOLD:
        assert (ours.text, ours.mark) == ("3 (-1)", WRONG)
    else:
        assert (ours.text, ours.mark) == (BY_HAND[situation.name], "right")


@pytest.mark.parametrize(
    "system", [pytest.param(s, id=s.name, marks=pytest.mark.slow if s.name == "Transformers" else ()) for s in PEERS]
)
def test_the_published_table_is_what_the_other_packages_do(system: System) -> None:
    with Path(__file__).parent.parent.joinpath("benchmarks/early_stopping_semantics.csv").open() as file:
        *rows, _ = csv.DictReader(file)
    assert [row["situation"] for row in rows] == list(BY_HAND)
    if system.title not in rows[0]:
        pytest.skip(f"the table is of another version than {system.title}")
    cells = {s.name: cell(system, s) for s in SITUATIONS}
    found = {name: c.text if c.mark == "-" else f"{c.text}, {c.mark}" for name, c in cells.items()}
    assert found == {row["situation"]: row[system.title] for row in rows}


def settings_of(rule: Rule) -> dict[str, Any]:
    return {name: getattr(rule, name) for name in ("patience", "min_delta", "rel_delta", "warmup", "mode", "nonfinite")}


def memory(state: dict[str, torch.Tensor], sign: float) -> tuple[float | None, int | None, float | None]:
    """Best, its index and the anchor of goodfit's state, None before the first."""
    best, check, anchor = float(state["best"]), int(state["best_check"]), float(state["criterion.anchor"])
    return (sign * best, check - 1, sign * anchor) if check else (None, None, None)


def heard(rule: Rule, scores: list[float], cut: int | None = None) -> list[Any]:
    """What a watch says and remembers after each score; at the cut its state goes into a fresh watch of a fresh model."""
    watch, told = EarlyStopping(**settings_of(rule)).watch(Marked()), []
    for i, score in enumerate(scores):
        if i == cut:
            saved = watch.state_dict()
            watch = EarlyStopping(**settings_of(rule)).watch(Marked())
            watch.load_state_dict(saved)
        watch.model.mark(i)
        told.append((watch(score), *memory(watch.state, watch.stopping.sign)))
    return told


def spelled_out(rule: Rule, scores: list[float]) -> list[Any]:
    """The same by the spec; a watch that has said stop says so ever after."""
    spec, told, stopped = Spec(rule), [], False
    for score in scores:
        stopped = spec(score) or stopped
        told.append((stopped, spec.best, spec.best_index, spec.anchor))
    return told


numbers = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 0.875, 0.75, -1.0, -0.875, 5e-324, -1.7e308, 1.7e308]),
    st.floats(allow_nan=True, allow_infinity=True),
)
rules = st.builds(
    Rule,
    patience=st.integers(1, 6),
    min_delta=st.sampled_from([0.0, 0.0, 0.125, 1.0, 1e-12, 1e300]),
    rel_delta=st.sampled_from([0.0, 0.0, 0.125, 1.0, 1e-9, 1e10]),
    warmup=st.sampled_from([0, 0, 1, 4, 9]),
    mode=st.sampled_from(["min", "max"]),
    nonfinite=st.sampled_from(["bad", "bad", "stop", "ignore"]),
)
tame = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 0.875, 0.75, -1.0, -0.875]),
    st.floats(1e-100, 1e100),
    st.floats(-1e100, -1e-100),
)


@settings(deadline=None)
@given(rules, st.lists(numbers, min_size=1, max_size=14), st.integers(0, 14))
def test_it_decides_and_remembers_as_the_spec_wherever_it_is_cut(rule: Rule, scores: list[float], cut: int) -> None:
    assert heard(rule, scores, cut) == spelled_out(rule, scores)


def _random(draw: random.Random, mode: str, policy: str) -> tuple[Rule, list[float]]:
    """A walk with ties and accidents, of any size and sign, whose margins are of the size of its steps."""
    size = draw.choice([1.0, 1.0, 1.0, 1e-30, 1e30, 1e-300, 1e306])
    level, scores = draw.uniform(-4, 4), []
    for _ in range(30):
        level += draw.choice([0.0, 0.0, -0.25, 0.25, -1.0, draw.gauss(-0.05, 0.5)])
        accident = draw.choice([NAN, INF, -INF, -level * size, 1.7e308, -1.7e308])
        scores.append(accident if draw.random() < 0.06 else level * size)
    rule = Rule(
        patience=draw.randint(1, 8),
        min_delta=size * draw.choice([0.0, 0.0, 0.25, draw.random()]),
        rel_delta=draw.choice([0.0, 0.0, 0.25, draw.random(), 3.0]),
        warmup=draw.choice([0, 0, draw.randint(0, 12)]),
        mode=mode,  # type: ignore[arg-type]
        nonfinite=policy,  # type: ignore[arg-type]
    )
    return rule, scores


@pytest.mark.parametrize("policy", ["bad", "stop", "ignore", "rollback"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_ten_thousand_random_sequences_are_decided_as_by_the_spec(mode: str, policy: str) -> None:
    draw = random.Random(f"{mode} {policy}")
    cases = [_random(draw, mode, "bad" if policy == "rollback" else policy) for _ in range(1250)]
    names = ("patience", "min_delta", "rel_delta", "warmup")
    columns = [torch.tensor([float(getattr(rule, name)) for rule, _ in cases]) for name in names]
    stopping = EarlyStopping(mode=mode, nonfinite=policy, restore=False)
    sign = stopping.sign

    def step(report: torch.Tensor, state: Any, *row: torch.Tensor) -> Any:
        one = lifted(stopping, **dict(zip(names, row, strict=True)))
        return one.epoch(Report(report), {}, {}, state)

    state = {name: t.expand(len(cases), *t.shape) for name, t in stopping.init({}, {}).items()}
    specs, stops = [Spec(rule) for rule, _ in cases], 0
    for told in torch.tensor([scores for _, scores in cases]).T:
        go_on, state = vmap(step)(told, state, *columns)
        said_stop = [spec(score) for spec, score in zip(specs, told.tolist(), strict=True)]
        assert (~go_on).tolist() == said_stop
        stops += sum(said_stop)
        best, anchor = (state["best"] * sign).tolist(), (state["criterion.anchor"] * sign).tolist()
        checks = state["best_check"].tolist()
        ours = [(b, c - 1, a) if c else (None, None, None) for b, c, a in zip(best, checks, anchor, strict=True)]
        assert ours == [(spec.best, spec.best_index, spec.anchor) for spec in specs]
    assert 2000 < stops < 30 * len(cases) - 2000


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_through_a_watch_that_is_saved_and_loaded(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        rule, scores = _random(draw, draw.choice(["min", "max"]), draw.choice(["bad", "stop", "ignore"]))
        assert heard(rule, scores[:20], draw.randrange(20)) == spelled_out(rule, scores[:20])


def stop_and_best(rule: Rule, scores: list[float]) -> tuple[list[bool], int | None]:
    told = heard(rule, scores)
    return [row[0] for row in told], told[-1][2]


@settings(deadline=None, max_examples=50)
@given(rules, st.lists(tame, min_size=1, max_size=12))
def test_max_of_negated_scores_is_min(rule: Rule, scores: list[float]) -> None:
    least, most = (Rule(**{**settings_of(rule), "mode": mode}) for mode in ("min", "max"))
    assert stop_and_best(most, [-v for v in scores]) == stop_and_best(least, scores)


@settings(deadline=None, max_examples=50)
@given(rules, st.lists(tame, min_size=1, max_size=12), st.integers(-60, 60))
def test_the_unit_of_scores_does_not_matter(rule: Rule, scores: list[float], exponent: int) -> None:
    unit = 2.0**exponent  # a power of two, so that no rounding differs
    scaled = Rule(**{**settings_of(rule), "min_delta": rule.min_delta * unit})
    assume(math.isfinite(scaled.min_delta))
    assert stop_and_best(scaled, [v * unit for v in scores]) == stop_and_best(rule, scores)


@settings(deadline=None, max_examples=50)
@given(rules, st.lists(st.integers(-64, 64).map(float), min_size=1, max_size=12), st.integers(-1024, 1024))
def test_without_a_relative_margin_the_origin_of_scores_does_not_matter(rule: Rule, scores: list[float], shift: int) -> None:
    rule = Rule(**{**settings_of(rule), "rel_delta": 0.0})
    assert stop_and_best(rule, [v + shift for v in scores]) == stop_and_best(rule, scores)


@settings(deadline=None, max_examples=50)
@given(rules, st.floats(allow_nan=False, allow_infinity=False))
def test_scores_that_never_move_stop_at_patience_or_behind_the_warm_up(rule: Rule, score: float) -> None:
    stop = max(rule.patience, rule.warmup)
    assert stop_and_best(rule, [score] * (stop + 2)) == ([False] * stop + [True] * 2, 0)


@settings(deadline=None, max_examples=50)
@given(rules, st.lists(numbers, min_size=1, max_size=12), st.integers(1, 6))
def test_more_patience_never_stops_earlier(rule: Rule, scores: list[float], more: int) -> None:
    longer = Rule(**{**settings_of(rule), "patience": rule.patience + more})
    impatient, patient = stop_and_best(rule, scores), stop_and_best(longer, scores)
    assert impatient[1] == patient[1]
    assert all(a or not b for a, b in zip(impatient[0], patient[0], strict=True))


@settings(deadline=None, max_examples=50)
@given(rules, st.lists(numbers, min_size=1, max_size=12))
def test_what_comes_back_is_the_model_of_the_strictly_best_score(rule: Rule, scores: list[float]) -> None:
    watch = EarlyStopping(**{**settings_of(rule), "nonfinite": "bad"}).watch(Marked())
    for i, score in enumerate(scores):
        watch.model.mark(i)
        watch(score)
    finite = [v for v in scores if math.isfinite(v)]
    best = (min if rule.mode == "min" else max)(finite, default=None)
    watch.restore()
    assert watch.model.marked == (len(scores) - 1 if best is None else scores.index(best))
