"""What came of a fit on a table: what was done, how it scores, and what the report knows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from goodfit.cocktail import Cocktail
from goodfit.defaults import DEPTH, WIDTH
from goodfit.fitting.fit import Fit
from goodfit.report.evidence import weights_of
from goodfit.tabular.network import outputs_of
from goodfit.tabular.prepare import Data
from goodfit.tabular.settings import Settings

__all__ = ["identity", "results", "save_test_predictions", "score_lines"]

PARTS = ("train", "valid", "test")


def identity(path: Path, data: Data, cocktail: Cocktail, settings: Settings) -> dict[str, Any]:
    """What was done, before anything is known of how it went."""
    target = data.answers.target
    return {
        "title": path.name,
        "command": settings.command,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "task": target.task,
        "target": target.name,
        "classes": None if target.classes is None else [str(c) for c in target.classes],
        "cocktail": repr(cocktail),
        "network": {"inputs": data.x.shape[1], "outputs": data.answers.outputs, "width": WIDTH, "depth": DEPTH},
        "seed": settings.seed,
        "threads": settings.threads,
        "check_every": settings.check_every,
        "reading": {key: list(v) if isinstance(v, tuple) else v for key, v in settings.reading.items()},
        "rows": data.parts.sizes,
        "versions": {name: version(name) for name in ("goodfit", "torch", "numpy", "scikit-learn", "pyarrow")}
        | {"python": platform.python_version()},
    }


def results(data: Data, found: Fit, bare: Fit | None) -> dict[str, Any]:
    """What came of it; here alone the test part is scored."""
    validated = found.validated or found.model  # a refit network has seen the validation part
    last = found.history[-1]
    kept = found.kept or {"epoch": None, "step": None}
    return {
        "network": "MLP " + " → ".join(map(str, [data.x.shape[1], *[WIDTH] * DEPTH, data.answers.outputs])),
        "duplicates": data.duplicates,
        "columns": [c.to_json() for c in data.columns],
        "notes": data.notes,
        "metric": data.answers.metric,
        "scores": {
            "regularized": {part: _scores(data, validated, part) for part in PARTS},
            "bare": {} if bare is None else {part: _scores(data, bare.model, part) for part in ("train", "valid")},
            "refit": {"test": _scores(data, found.model, "test")} if found.refit else {},
        },
        "baseline": {"valid": _baseline(data)},
        "history": {"regularized": found.history, "bare": [] if bare is None else bare.history},
        **{f"{name}_{unit}": row[unit] for name, row in (("best", kept), ("stop", last)) for unit in ("epoch", "step")},
        "stopped": found.stopped,
        "reason": None if found.reason is None else found.reason.value,
        "refit": found.refit,
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "weights": weights_of(found.model, bare.model if bare is not None else None),
    }


def _scores(data: Data, model: nn.Module, part: str) -> dict[str, float]:
    x, y = data.part(part)
    return data.answers.scores(outputs_of(model, x), y)


def _baseline(data: Data) -> dict[str, float]:
    """Scores of saying the same of every row: the class shares, or the mean, of the training part."""
    y, (x, valid) = data.part("train")[1], data.part("valid")
    if data.answers.target.classes is None:
        return data.answers.scores(np.zeros((len(valid), 1)), valid)
    shares = np.bincount(y, minlength=data.answers.outputs) / len(y)
    return data.answers.scores(np.tile(np.log(np.maximum(shares, 1e-12)), (len(x), 1)), valid)


def score_lines(report: dict[str, Any]) -> Iterator[str]:
    """The scores of a report for a terminal, a line for each part."""
    scores = report["scores"]
    others = {"valid, bare network": scores["bare"].get("valid", {}), "test, refit": scores["refit"].get("test", {})}
    for part, found in (scores["regularized"] | {part: told for part, told in others.items() if told}).items():
        yield f"{part:20}" + "".join(f"  {name} {value:.4g}" for name, value in found.items())


def save_test_predictions(path: Path, data: Data, found: Fit) -> None:
    """The predictions of the rows that nothing was chosen on."""
    import pyarrow as pa
    from pyarrow.csv import write_csv

    x, _ = data.part("test")
    table = data.answers.decode(outputs_of(found.model, x))
    write_csv(table.add_column(0, "row", pa.array(data.rows[data.parts.test])), path)
