"""The situations in which early stopping differs between packages, and what the written rule says of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stopping_job import Job, Outcome, Scores, parts
from stopping_spec import Refused, Rule, Spec

NAN, INF = math.nan, math.inf
FALLING = tuple(1 - k / 16 for k in range(12))  # exact in binary, as all numbers here that a difference is taken of
DRIFT = tuple(1 - k / 1024 for k in range(16))
FLAT = (1.0,) * 14


@dataclass(frozen=True)
class Situation:
    """Scores and what is asked for. Each sequence goes on for longer than any rule needs to stop in it."""

    name: str
    scores: Scores
    job: Job


@dataclass(frozen=True)
class Expected:
    """What the rule says: the outcome, None for a refusal, and the other number that may be called the best."""

    outcome: Outcome | None
    anchor: float | None = None


def expected(situation: Situation, **convention: Any) -> Expected:
    """By the plain spec; convention: settings in which a package's own, documented rule differs, extra: of its patience."""
    job, extra = situation.job, convention.pop("extra", 0)
    rule = replace(job.rule, warmup=max(job.rule.warmup, job.least - 1, 0), **convention)
    stop = None
    try:
        specs = [Spec(replace(rule, patience=p + extra)) for p in job.patiences]
        for start, part, now in parts(situation.scores, job):
            specs = [spec.resumed(patience=p + extra) for spec, p in zip(specs, now.patiences, strict=True)]
            for index, score in enumerate(part, start):
                asked = stop is None and [spec(score) for spec in specs]
                stop = index if asked and any(asked) else stop
    except Refused:
        return Expected(None)
    return Expected(Outcome(stop, specs[0].best, specs[0].best_index), specs[0].anchor)


def _row(title: str, scores: Any, **asked: Any) -> Situation:
    jobs = {n: asked.pop(n) for n in ("keep", "also", "least", "resume", "then", "told", "name") if n in asked}
    return Situation(title, scores, Job(Rule(**asked), **jobs))


SITUATIONS = [
    _row("constant", FLAT),
    _row("always worse", [float(k) for k in range(12)]),
    _row("always better", FALLING),
    _row("ties with the best", [1.0, 0.5] + [0.5] * 12),
    _row("a single bad check at a time", [1.0, 1.5, 0.75, 1.5, 0.5, 1.5, 0.25, 1.5, 0.125, 1.5, 0.0625, 0.03125], patience=2),
    _row("scores that rise, told so", [-v for v in FALLING], mode="max"),
    _row("scores that rise, told so, then fall", [0.25, 0.5, 0.75] + [0.5] * 11, mode="max"),
    _row("min_delta exactly reached", [1.0, 0.75] + [0.75] * 12, patience=1, min_delta=0.25),
    _row("min_delta just passed", [1.0, 0.7421875] + [0.484375] * 12, patience=2, min_delta=0.25),
    _row("slow drift adds up", DRIFT, patience=6, min_delta=5 / 1024),
    _row("negative min_delta", FLAT, min_delta=-0.125),
    _row("patience 0, constant", FLAT, patience=0),
    _row("patience 0, always better", FALLING, patience=0),
    _row("nan first, then better", [NAN, *FALLING]),
    _row("nan in the middle, then worse", [1.0, 0.875, NAN] + [0.9375] * 11),
    _row("nan in the middle, told to stop", [1.0, 0.875, NAN] + [0.9375] * 11, nonfinite="stop"),
    _row("nan in the middle, told to ignore", [1.0, 0.875, NAN] + [0.9375] * 11, nonfinite="ignore"),
    _row("nan in the middle, told to raise", [1.0, 0.875, NAN] + [0.9375] * 11, nonfinite="raise"),
    _row("all nan", [NAN] * 12),
    _row("inf first, then better", [INF, *FALLING]),
    _row("-inf once, then better", [1.0, -INF, *FALLING[1:]]),
    _row("relative, exactly reached", [8.0, 7.0] + [7.0] * 12, patience=1, rel_delta=0.125),
    _row("relative, negative and better", [-1.0 * 2**k for k in range(12)], rel_delta=0.5),
    _row("relative, negative and worse", [-10.0 + k / 2 for k in range(14)], rel_delta=0.125),
    _row("warm-up 5, constant", FLAT, warmup=5),
    _row("warm-up 3, best in it", [0.125, 1.0, 0.75, 0.625] + [0.5] * 10, patience=2, warmup=3),
    _row("at least 8 checks, bad then better", [1.0] * 5 + list(FALLING[1:]), least=8),
    _row("target 0.5 reached", [1.0, 0.75, 0.375] + [0.25] * 10, patience=9, target=0.5),
    _row("rmse falls, direction not told", FALLING, told=False, name="rmse"),
    _row("accuracy rises, direction not told", [-v for v in FALLING], mode="max", told=False, name="accuracy"),
    _row("score missing", [None] * 12),
    _row("restore, stopped", [1.0, 0.5, 0.25] + [0.75] * 11, keep=True),
    _row("restore, ran to the end", [1.0, 0.5, 0.25, 0.75, 0.75], keep=True),
    _row("restore, best within min_delta", [1.0, 0.875] + [0.9375] * 12, keep=True, min_delta=0.25),
    _row("restore, nan first", [NAN, 1.0, 0.5] + [0.75] * 11, keep=True),
    _row("resume", [1.0] + [1.5] * 15, resume=3),
    _row("resume with patience 6", [1.0] + [1.5] * 15, resume=3, then=6),
    _row("resume with patience 6 and 3", [1.0] + [1.5] * 15, resume=3, also=6),
]
