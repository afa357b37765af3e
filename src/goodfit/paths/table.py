"""The path of a table: which columns a network or a linear model needs, and how good it is with them; as a folder."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import nn

from goodfit.cocktail import parse
from goodfit.errors import GoodfitError
from goodfit.paths.path import path
from goodfit.paths.result import Path, Point, over_text, table_of
from goodfit.phases import Regularizer
from goodfit.report.path_page import render_path
from goodfit.tabular.encode import Encoder
from goodfit.tabular.folder import claim, write_json, written_whole
from goodfit.tabular.network import mlp, outputs_of, pinned
from goodfit.tabular.prepare import Data, prepare

__all__ = ["MODELS", "Settings", "lines", "path_of_table"]

Tell = Callable[[str], None]
# For each model: over, and what acts along. A network by default loses whole inputs, a linear model single weights.
MODELS = {
    "network": ("GroupLasso(groups=inputs, where=named('0.weight'))", "WeightDecay(1e-2), EarlyStopping(20)"),
    "linear": ("L1()", ""),
}
WIDTH, DEPTH = 128, 2


@dataclass(frozen=True)
class Settings:
    """How to read the table and what path to follow; `over` and `cocktail` are None for the model's own."""

    model: str = "network"
    over: str | None = None
    cocktail: str | None = None
    cv: int | None = None
    task: str | None = None
    count: int = 30
    epochs: int = 20
    seed: int = 0
    threads: int = 1
    reading: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    progress: bool | None = None


def path_of_table(file: File, target: str, out: File, settings: Settings, tell: Tell) -> dict[str, Any]:
    """Follow the path on the table in `file`, write the folder `out`, and return what the page knows."""
    claim(out)
    if settings.model not in MODELS:
        raise GoodfitError(f"model must be one of {', '.join(MODELS)}, got {settings.model!r}.")
    over, cocktail = MODELS[settings.model]
    chosen = _one(over if settings.over is None else settings.over)
    mix = parse(cocktail if settings.cocktail is None else settings.cocktail)
    data = prepare(file, target, settings.task, settings.seed, settings.reading, tell)
    (x, y), valid = data.part("train"), data.part("valid")
    inputs, outputs = x.shape[1], data.answers.outputs
    if settings.cv is not None:
        x, y = (np.concatenate(both) for both in zip((x, y), valid, strict=True))
    scored = f"{settings.cv} folds" if settings.cv else "scored by the loss on the valid part"
    tell(f"path over {over_text(chosen)}, {settings.model}, {scored}")
    with pinned(settings.threads):
        found = path(
            lambda: _model(settings, inputs, outputs),
            (x, y),
            valid if settings.cv is None else settings.cv,
            chosen,
            cocktail=mix,
            task=data.answers.target.task,
            count=settings.count,
            epochs=settings.epochs,
            batch_size=min(128, max(16, len(y) // 8)),
            seed=settings.seed,
            progress=settings.progress,
        )
        told = _told(file, found, data, chosen, settings)
        with written_whole(out) as folder:
            _write(folder, found, told)
    return told


def lines(told: dict[str, Any]) -> list[str]:
    """What the terminal shows: the table, the columns kept at 1-SE, the test scores."""
    shown = table_of(told["points"]) + ([f"the path was {told['stopped']}"] if told["stopped"] else [])
    kept, total = told["kept"]["one_se"], len(told["columns"])
    if kept is not None:
        shown.append(f"kept at 1-SE: {len(kept)} of {total} columns: {', '.join(kept) or 'none'}")
    for name, label in (("best", "best"), ("one_se", "1-SE")):
        scores = "  ".join(f"{metric} {value:.4g}" for metric, value in told["test"][name].items())
        shown.append(f"test, {label:4}  {scores}")
    return shown


def _one(text: str) -> Regularizer:
    mix = parse(f"{text}()" if text.isidentifier() else text)
    if len(mix) != 1:
        raise GoodfitError(f"--over takes one regularizer such as 'L1' or 'ElasticNet(ratio=0.5)', got {text!r}.")
    return mix[0]


def _model(settings: Settings, inputs: int, outputs: int) -> nn.Module:
    if settings.model == "network":
        return mlp(inputs, outputs, width=WIDTH, depth=DEPTH, seed=settings.seed)
    return nn.Sequential(nn.Linear(inputs, outputs))


def _told(file: File, found: Path, data: Data, over: Regularizer, settings: Settings) -> dict[str, Any]:
    """All that the page shows, in JSON's types; here alone the test part is scored."""
    names = _columns(data.encoder)
    tests = {name: _test(found, point, data) for name, point in (("best", found.best), ("one_se", found.one_se))}
    return {
        "title": file.name,
        "command": settings.command,
        "target": data.answers.target.name,
        "model": settings.model,
        "over": over_text(over),
        "seed": settings.seed,
        "folds": settings.cv,
        "stopped": found.stopped,
        "lam_max": found.lam_max,
        "dense": None if found.dense is None else found.dense.row(),
        "points": found.rows(),
        "test": tests,
        "kept": {name: _kept(point, names) for name, point in (("best", found.best), ("one_se", found.one_se))},
        "columns": list(dict.fromkeys(names)),
        "strengths": _strengths(found, names),
        "notes": data.notes,
    }


def _test(found: Path, point: Point, data: Data) -> dict[str, float]:
    x, y = data.part("test")
    return data.answers.scores(outputs_of(found.model(point), x), y)


def _columns(encoder: Encoder) -> list[str]:
    """The table's column behind each input of the model."""
    numbers = [c.name for c in encoder.numbers]
    levels = zip(encoder.categories, encoder.levels, strict=True)
    return [*numbers, *(numbers[i] for i in encoder.flagged), *(c.name for c, known in levels for _ in known)]


def _kept(point: Point, names: list[str]) -> list[str] | None:
    return None if point.features is None else list(dict.fromkeys(names[i] for i in point.features))


def _strengths(found: Path, names: list[str]) -> dict[str, list[float]]:
    """For each column the length of its weights in the first layer along the path, which shows how it goes to zero."""
    first = next(w for w in found.coefficients.values() if w.ndim == 3)
    lengths = first.double().square().sum(1)
    columns = {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}
    return {name: lengths[:, rows].sum(1).sqrt().tolist() for name, rows in columns.items()}


def _write(folder: File, found: Path, told: dict[str, Any]) -> None:
    from safetensors.torch import save

    with (folder / "path.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["lam", "score", "stderr", "zeros", "nonzero", "inputs", "best", "one_se", "seconds"])
        for row in told["points"]:
            inputs = "" if row["features"] is None else len(row["features"])
            cells = [row[key] for key in ("lam", "score", "stderr", "zeros", "nonzero")]
            writer.writerow([*cells, inputs, int(row["best"]), int(row["one_se"]), row["seconds"]])
    write_json(folder / "path.json", told)
    weights = {name: t.contiguous() for name, t in found.one_se.weights.items()}
    (folder / "weights.safetensors").write_bytes(save(weights))
    (folder / "path.html").write_text(render_path(told), encoding="utf-8")
