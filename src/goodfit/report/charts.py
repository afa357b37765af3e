"""Numbers to SVG geometry: the learning curves and the weight histograms. The template only writes it down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Bars", "Curves", "curves", "finite", "histogram", "number", "percent"]

LEFT, RIGHT, TOP, BOTTOM = 68.0, 708.0, 44.0, 356.0
BAR_LEFT, BAR_RIGHT, BAR_TOP, BAR_BOTTOM = 4.0, 236.0, 22.0, 104.0
MOST_POINTS = 500
_SERIES = (("bare", "train"), ("bare", "valid"), ("regularized", "train"), ("regularized", "valid"))


@dataclass(frozen=True)
class Scale:
    """Value to pixel; with `log` the logarithm of the value."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low * 1e-9) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        # Far outside of the frame it is cut off anyway, and renderers dislike huge coordinates.
        return round(self.start + min(max(share, -9.0), 9.0) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Mark:
    """A labelled place: a tick, the dot at the best epoch, the rule at the stop epoch."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve: polylines between the gaps, and dots where a value stands alone."""

    network: str
    split: str
    segments: list[str]
    dots: list[Mark]


@dataclass(frozen=True)
class Curves:
    """The learning curves of both networks."""

    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    best: Mark | None
    stop: Mark | None
    log: bool
    clipped: list[str]


@dataclass(frozen=True)
class Bars:
    """One weight's histogram: filled steps for the regularized network, an outline for the bare one."""

    regularized: str
    bare: str
    spike: Mark | None
    bare_spike: Mark | None
    ticks: list[Mark]
    log: bool


def number(value: Any) -> str:
    """Four significant digits, a real minus sign, a dash for what is missing."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    size = abs(value)
    if isinstance(value, int) or not size:
        text = f"{value:,.0f}"
    elif not 1e-3 <= size < 1e7:
        text = f"{value:.3g}"
    else:
        text = f"{value:,.{min(max(3 - math.floor(math.log10(size)), 0), 4)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def finite(value: Any) -> bool:
    """Whether the value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def curves(
    history: dict[str, list[dict[str, Any]]], best_at: int | None, stop_at: int | None, unit: str = "epoch"
) -> Curves | None:
    """The learning curves over epochs or steps, or None where there is no finite loss at all."""
    values = {pair: _points(history.get(pair[0]) or [], pair[1], unit) for pair in _SERIES}
    drawn = {pair: [y for _, y in points if finite(y)] for pair, points in values.items()}
    if not any(drawn.values()):
        return None
    times = [x for points in values.values() for x, _ in points]
    first, last = min(times), max(times)
    wide = 0.0 if last > first else 1.0
    low, high, log = _limits(drawn)
    x = Scale(first - wide, last + wide, LEFT, RIGHT)
    y = Scale(low, high, BOTTOM, TOP, log)
    keep = {best_at, stop_at, last}
    lines = [_line(*pair, _thin(points, keep), x, y) for pair, points in values.items() if drawn[pair]]
    best = [v for e, v in values["regularized", "valid"] if e == best_at and finite(v)]
    stop = stop_at if finite(stop_at) else None
    return Curves(
        lines=lines,
        x_ticks=[Mark(x(at), BOTTOM, f"{at:,.0f}") for at in _ticks(first, last, 8, 1.0)],
        y_ticks=[Mark(LEFT, y(at), _tick_text(at)) for at in (_log_ticks(low, high) if log else _ticks(low, high, 6))],
        best=Mark(x(best_at), y(best[0]), "best") if best and best_at is not None else None,
        stop=Mark(x(stop), TOP, "stop") if stop is not None and first <= stop <= last else None,
        log=log,
        clipped=_clipped(values, low, high),
    )


def histogram(weight: dict[str, Any]) -> Bars | None:
    """The histogram of one weight in both networks, or None where there are no usable counts."""
    found = weight.get("histogram") or {}
    edges, counts, bare = (found.get(key) or [] for key in ("edges", "regularized", "bare"))
    if not counts or len(edges) != len(counts) + 1 or not all(map(finite, [*edges, *counts])) or edges[0] >= edges[-1]:
        return None
    bare = bare if len(bare) == len(counts) and all(map(finite, bare)) else []
    total, heights = sum(counts), sorted(c for c in [*counts, *bare] if c > 0) or [1]
    log = heights[-1] > 20 * heights[len(heights) // 2]
    x = Scale(edges[0], edges[-1], BAR_LEFT, BAR_RIGHT)
    y = Scale(1.0, heights[-1] + 1.0, BAR_BOTTOM, BAR_TOP, log)

    def spike(share: Any) -> Mark | None:
        if not finite(share) or share <= 0 or not edges[0] <= 0 <= edges[-1]:
            return None
        return Mark(x(0.0), y(min(share, 1.0) * total + 1), f"{percent(share)} exactly 0")

    middle = [0.0] if edges[0] + edges[-1] * 0.5 < 0 < edges[-1] + edges[0] * 0.5 else []
    return Bars(
        regularized=_steps(edges, counts, x, y),
        bare=_steps(edges, bare, x, y) if bare else "",
        spike=spike(weight.get("zeros")),
        bare_spike=spike(weight.get("bare_zeros")) if bare else None,
        ticks=[Mark(x(at), BAR_BOTTOM, f"{at:.2g}".replace("-", "\N{MINUS SIGN}")) for at in [edges[0], *middle, edges[-1]]],
        log=log,
    )


def percent(share: Any) -> str:
    """A share as a percentage that is 0 or 100 only when it is exactly that."""
    if not finite(share):
        return "–"
    text = f"{100 * share:.3g}" if share < 0.1 else f"{100 * share:.1f}"
    return f"{text} %" if text != "100.0" else "100 %" if share >= 1 else "> 99.9 %"


def _points(rows: list[dict[str, Any]], split: str, unit: str) -> list[tuple[float, Any]]:
    return [(row[unit], row.get(f"{split}_loss")) for row in rows if finite(row.get(unit))]


def _thin(points: list[tuple[float, Any]], keep: set[Any]) -> list[tuple[float, Any]]:
    stride = math.ceil(len(points) / (MOST_POINTS - len(keep))) if len(points) > MOST_POINTS else 1
    return [point for index, point in enumerate(points) if index % stride == 0 or point[0] in keep]


def _line(network: str, split: str, points: list[tuple[float, Any]], x: Scale, y: Scale) -> Line:
    runs: list[list[Mark]] = [[]]
    for epoch, value in points:
        if finite(value):
            runs[-1].append(Mark(x(epoch), y(value), ""))
        elif runs[-1]:
            runs.append([])
    segments = [" ".join(f"{p.x:g},{p.y:g}" for p in run) for run in runs if len(run) > 1]
    return Line(network, split, segments, [run[0] for run in runs if len(run) == 1])


def _limits(drawn: dict[tuple[str, str], list[float]]) -> tuple[float, float, bool]:
    """The y axis: all of it, unless one network's losses leave those of the other far behind."""
    everything = sorted(value for values in drawn.values() for value in values)
    low, high = everything[0], everything[-1]
    log = low > 1e-30 and high > 30 * low
    # A bare network's validation loss has no upper end, and its training loss none below: neither may set the axis.
    upper = sorted(v for pair, values in drawn.items() if pair != ("bare", "valid") for v in values) or everything
    lower = min((v for pair, values in drawn.items() if pair != ("bare", "train") for v in values), default=low)
    crest = upper[math.ceil(0.98 * (len(upper) - 1))]
    if log:
        room = max(crest / lower, 10.0) ** 0.5
        high, low = min(high, max(crest, lower) * room), max(low, lower / room)
        pad = (high / low) ** 0.04
        return low / pad, high * pad, True
    high = min(high, crest + max(crest - low, abs(crest) / 2 or 1.0))
    pad = 0.04 * (high - low) or abs(high) / 10 or 0.5
    return low - pad, high + pad, False


def _clipped(values: dict[tuple[str, str], list[tuple[float, Any]]], low: float, high: float) -> list[str]:
    found = [(y, x, pair) for pair, points in values.items() for x, y in points if finite(y)]
    notes = []
    for (value, epoch, (network, split)), out, side in (
        (max(found), max(found)[0] > high, "highest"),
        (min(found), min(found)[0] < low, "lowest"),
    ):
        if out:
            which = "training" if split == "train" else "validation"
            notes.append(f"The {side} loss, {number(value)} ({network}, {which}, epoch {epoch:,.0f}), is outside of the chart.")
    return notes


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> Iterator[float]:
    rough = max((high - low) / most, least) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step


def _log_ticks(low: float, high: float) -> Iterator[float]:
    decades = math.log10(high / low)
    stride = max(1, math.ceil(decades / 7))
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 3.5 else (1,):
            at = factor * 10.0**power
            if power % stride == 0 and low <= at <= high:
                yield at


def _tick_text(at: float) -> str:
    text = f"{at:,.0f}" if 1000 <= abs(at) < 1e7 else f"{at:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _steps(edges: list[float], counts: list[float], x: Scale, y: Scale) -> str:
    path = [f"M{x(edges[0]):g},{BAR_BOTTOM:g}"]
    for right, count in zip(edges[1:], counts, strict=True):
        path.append(f"V{y(count + 1):g}H{x(right):g}")
    return "".join([*path, f"V{BAR_BOTTOM:g}"])
