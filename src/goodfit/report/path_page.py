"""The page of a path: score and weights against λ, the table of the points, the columns that are left."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from goodfit.report.charts import BOTTOM, LEFT, RIGHT, TOP, Scale, finite, number, percent

__all__ = ["render_path"]

MOST_LINES = 40


def render_path(told: dict[str, Any]) -> str:
    """One self-contained HTML page: no script, no network; whatever a name in it holds, it stays text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, percent=percent)
    template = environment.from_string(files("goodfit.report").joinpath("path.html.j2").read_text("utf-8"))
    page = template.render(**told, scores=_scores(told["points"]), lines=_lines(told), most=MOST_LINES)
    return page.encode("utf-8", "replace").decode("utf-8")


def _across(points: list[dict[str, Any]]) -> Scale:
    low, high = points[0]["lam"], points[-1]["lam"]
    return Scale(low, high, LEFT, RIGHT, log=True) if high > low else Scale(low / 2, low * 2, LEFT, RIGHT, log=True)


def _scores(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The score curve with its standard errors, in pixels."""
    drawn = [(p, p["stderr"] if finite(p["stderr"]) else 0.0) for p in points if finite(p["score"])]
    low, high = min(p["score"] - e for p, e in drawn), max(p["score"] + e for p, e in drawn)
    x, y = _across(points), Scale(low, high if high > low else low + 1.0, BOTTOM, TOP)
    marks = {name: next((x(p["lam"]), y(p["score"])) for p, _ in drawn if p[name]) for name in ("best", "one_se")}
    return {
        "line": " ".join(f"{x(p['lam']):g},{y(p['score']):g}" for p, _ in drawn),
        "bars": [(x(p["lam"]), y(p["score"] - e), y(p["score"] + e)) for p, e in drawn],
        "marks": marks,
        "ends": [(LEFT, points[0]["lam"]), (RIGHT, points[-1]["lam"])],
        "heights": [(BOTTOM, low), (TOP, high)],
    }


def _lines(told: dict[str, Any]) -> list[dict[str, Any]]:
    """A line per column: the length of its weights along the path; those that matter most first."""
    points, strengths = told["points"], told["strengths"]
    high = max((v for values in strengths.values() for v in values if finite(v)), default=0.0) or 1.0
    x, y = _across(points), Scale(0.0, high, BOTTOM, TOP)
    kept = set(told["kept"]["one_se"] or ())
    ordered = sorted(strengths, key=lambda name: (name not in kept, -max(strengths[name])))
    return [
        {
            "name": name,
            "kept": name in kept,
            "line": " ".join(f"{x(p['lam']):g},{y(v):g}" for p, v in zip(points, strengths[name], strict=True) if finite(v)),
        }
        for name in ordered[:MOST_LINES]
    ]
