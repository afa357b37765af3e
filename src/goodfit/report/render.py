"""`render(data)`: the report page of one run, from plain JSON types. Whatever a name in it holds, it stays text."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from goodfit.report.charts import curves, finite, histogram, number, percent

__all__ = ["render"]

MOST_ROWS = 200
MOST_CHARTS = 12
_HIGHER = ("accuracy", "balanced_accuracy", "r2", "auc", "roc_auc", "f1")
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}

MARGIN = 0.02  # losses closer than this share count as equal: one split, one seed
CLEARLY = 0.1  # the rise of a loss above its best that is called memorising


def render(data: dict[str, Any]) -> str:
    """One self-contained HTML page: no script, no network, its numbers inside it as a JSON block too."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    block = _json(data)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, percent=percent, shorten=_shorten)
    template = environment.from_string(files("goodfit.report").joinpath("report.html.j2").read_text("utf-8"))
    # The page is drawn from what it embeds, so that both say the same; _json leaves nothing in it that HTML could read.
    page = template.render(_view(json.loads(block)), block=Markup(block))  # noqa: S704
    return page.encode("utf-8", "replace").decode("utf-8")


def _json(data: dict[str, Any]) -> str:
    text = json.dumps(_strict(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shorten(text: Any, most: int = 80) -> str:
    line = str(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def _view(data: dict[str, Any]) -> dict[str, Any]:
    history, weights, columns = (data.get(key) or {} for key in ("history", "weights", "columns"))
    kernels = [(weight, bars) for weight in weights if weight.get("role") == "kernel" and (bars := histogram(weight))]
    texts = ("title", "command", "target", "cocktail", "cocktail_repr", "network", "stopped", "metric", "refit")
    unit, best_at = _unit(data), data.get(f"best_{_unit(data)}")
    mood, verdict = _verdict(data)
    return {
        **{key: "" if data.get(key) is None else str(data[key]) for key in texts},
        "created": str(data.get("created") or "").replace("T", " "),
        "classes": data.get("classes") or [],
        "is_classes": data.get("task") == "classes",
        "parameters": data.get("parameters"),
        "seconds": data.get("seconds"),
        "unit": unit,
        "best_at": best_at,
        "stop_at": data.get(f"stop_{unit}"),
        "mood": mood,
        "verdict": verdict,
        "warning": _warning(data),
        "scores": _scores(data),
        "curves": curves(history, best_at, data.get(f"stop_{unit}"), unit) if history else None,
        "gaps": _gaps(data),
        "weights": [_filled(weight, "name", "shape", "role", "zeros", "norm", "bare_zeros", "bare_norm") for weight in weights],
        "histograms": kernels[:MOST_CHARTS],
        "more_histograms": max(len(kernels) - MOST_CHARTS, 0),
        "columns": [_filled(column, "name", "kind", "missing", "distinct", "used", "note") for column in columns],
        "most": MOST_ROWS,
        "notes": data.get("notes") or [],
        "splits": _splits(data),
        "seed": data.get("seed"),
        "versions": data.get("versions") or {},
    }


def _unit(data: dict[str, Any]) -> str:
    """What validations are counted in."""
    return "step" if data.get("check_every") else "epoch"


def _filled(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: row.get(key) for key in keys}


def _splits(data: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    rows, duplicates = data.get("rows") or {}, data.get("duplicates") or {}
    return [(name, rows.get(key), duplicates.get(key)) for key, name in _SPLITS if key in rows]


_SPLITS = (("train", "Training"), ("valid", "Validation"), ("test", "Test"))


def _scores(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One block per metric, the main one first; the bare network is never tested."""
    scores = data.get("scores") or {}
    networks: list[tuple[str, dict[str, Any], tuple[str, ...]]]
    networks = [("Regularized", scores.get("regularized") or {}, ("train", "valid", "test"))]
    networks += [("Bare", scores.get("bare") or {}, ("train", "valid"))] if scores.get("bare") else []
    networks += [("Refit", scores["refit"], ("test",))] if scores.get("refit") else []
    networks += [("Baseline", data["baseline"], ("train", "valid"))] if data.get("baseline") else []
    names = dict.fromkeys([data.get("metric"), *(m for _, by, _ in networks for split in by.values() for m in split or {})])
    blocks = []
    for metric in (name for name in names if name):
        rows = [
            (name, [(by.get(s) or {}).get(metric) if s in seen else None for s, _ in _SPLITS]) for name, by, seen in networks
        ]
        better = "higher is better" if metric in _HIGHER else "lower is better" if metric == data.get("metric") else ""
        blocks.append({"metric": metric, "better": better, "rows": rows})
    return blocks


def _gaps(data: dict[str, Any]) -> list[tuple[str, Any, Any, Any, Any]]:
    """(network, epoch or step, training loss, validation loss, gap): at the end, and where the kept weights are from."""
    history, unit = data.get("history") or {}, _unit(data)
    found = []
    for network, name in (("regularized", "Regularized"), ("bare", "Bare")):
        rows = history.get(network) or []
        kept = [row for row in rows[:-1] if network == "regularized" and row.get(unit) == data.get(f"best_{unit}")]
        for row, what in [*((row, "best") for row in kept[:1]), *((row, "end") for row in rows[-1:])]:
            train, valid = row.get("train_loss"), row.get("valid_loss")
            gap = valid - train if finite(train) and finite(valid) else None
            found.append((f"{name}, {what}", row.get(unit), train, valid, gap))
    return found


def _verdict(data: dict[str, Any]) -> tuple[str, str]:
    """A few words, and the sentence that bears them out."""
    history, unit = data.get("history") or {}, _unit(data)
    regularized, bare = (_losses(history.get(key) or [], unit) for key in ("regularized", "bare"))
    if not regularized:
        return "No verdict.", "The regularized network has no validation loss that is a number."
    kept = [loss for loss in regularized if loss[1] == data.get(f"best_{unit}")] or regularized[-1:]
    loss, at = kept[0]
    first = f"The regularized network’s validation loss is {number(loss)}, from {unit} {at}"
    if not bare:
        return "Nothing to compare with.", f"{first}; there is no bare network’s loss beside it."
    best, best_at = min(bare)
    end, _ = bare[-1]
    scale = max(abs(best), abs(loss)) or 1.0
    gain, decline = (best - loss) / scale, (end - best) / scale
    text = f"{first}; the bare one’s best was {number(best)}, at {unit} {best_at}"
    if decline > MARGIN:
        text += f", and it ended at {number(end)}"
        if decline > CLEARLY and _memorised(history["bare"], best_at, unit):
            text += f": it had started to memorise at {unit} {best_at}"
    if gain > MARGIN:
        return "Regularization helped.", text + "."
    if gain < -MARGIN:
        return "Regularization did not help.", f"{text}. Stopped at its best {unit}, the bare network is better."
    if decline > MARGIN:
        return "Regularization made it no better.", f"{text}. Stopped at its best {unit}, the bare network is as good."
    return "Regularization made no difference.", f"{text}. The bare network is as good."


def _losses(rows: list[dict[str, Any]], unit: str) -> list[tuple[float, int]]:
    return [(row["valid_loss"], row[unit]) for row in rows if finite(row.get("valid_loss")) and finite(row.get(unit))]


def _memorised(rows: list[dict[str, Any]], at: int, unit: str) -> bool:
    """Whether the training loss still fell after that, while the validation loss did not."""
    losses: dict[Any, float] = {row.get(unit): row["train_loss"] for row in rows if finite(row.get("train_loss"))}
    return at in losses and list(losses.values())[-1] < losses[at]


def _warning(data: dict[str, Any]) -> str:
    """What makes the scores worth less than they look, or nothing."""
    metric, parts = data.get("metric"), []
    ours: Any = (((data.get("scores") or {}).get("regularized") or {}).get("valid") or {}).get(metric)
    plain: Any = ((data.get("baseline") or {}).get("valid") or {}).get(metric)
    if finite(ours) and finite(plain) and ours >= plain:
        simple = "the class shares" if data.get("task") == "classes" else "the mean"
        parts.append(f"On the validation rows the network is no better than predicting {simple}.")
    copies = [(name.lower(), count) for name, _, count in _splits(data) if finite(count) and count > 0]
    parts += [
        f"{count:,} {name} {'row stands' if count == 1 else 'rows stand'} in an earlier part too." for name, count in copies
    ]
    return " ".join(parts)
