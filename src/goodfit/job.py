"""The main job: a table in; a regularized network, the proof of what regularization did, and a report out."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from goodfit.cocktail import Cocktail, parse
from goodfit.defaults import COCKTAIL, DEPTH, WIDTH
from goodfit.errors import GoodfitError
from goodfit.fitting import Fit, fit
from goodfit.losses import loss_of
from goodfit.preparation import refuse_maximizing
from goodfit.report.evidence import weights_of
from goodfit.report.render import render
from goodfit.stop.criterion import Reason
from goodfit.tabular.folder import claim, load_predictor, read_json, save_predictor, write_json, written_whole
from goodfit.tabular.network import mlp, outputs_of, pinned
from goodfit.tabular.prepare import Data, prepare
from goodfit.tabular.read import read

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Settings", "fit_table", "predict_table", "write_report"]

PARTS = ("train", "valid", "test")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to read the table and how to train. reading: what `read` takes. command: what the user typed.

    threads: of torch; one is quick for networks of this size, and two busy processes of two threads each ruin each other.
    """

    cocktail: str = COCKTAIL
    task: str | None = None
    epochs: int = 200
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    reading: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    progress: bool | None = None
    check_every: int | None = None
    refit: str | None = None


def fit_table(path: Path, target: str, out: Path, settings: Settings, tell: Tell) -> dict[str, Any]:
    """Fit a network on the table in `path`, write the run folder `out`, and return what the report knows."""
    started = time.perf_counter()
    claim(out)
    cocktail = parse(settings.cocktail)
    _check(settings, cocktail)
    data = prepare(path, target, settings.task, settings.seed, settings.reading, tell)
    with pinned(settings.threads):
        found = _train(data, cocktail, settings, settings.epochs)
        epochs = found.history[-1]["epoch"]
        for line in _ending(found, "in" if settings.check_every else "after"):
            tell(line)
        bare = None
        if found.reason is not Reason.INTERRUPTED:
            tell("the same network bare, to compare")
            bare = _bare(data, replace(settings, refit=None), epochs, tell)
        story = _identity(path, data, cocktail, settings)
        report = story | _results(data, found, bare) | {"cocktail": str(cocktail), "cocktail_repr": repr(cocktail)}
        report["seconds"] = round(time.perf_counter() - started, 2)
        with written_whole(out) as folder:
            save_predictor(
                folder, found.model, data.encoder, data.answers, story | {"refit": found.refit, "scores": report["scores"]}
            )
            _save_test_predictions(folder / "test_predictions.csv", data, found)
            write_json(folder / "history.json", report["history"])
            write_json(folder / "report.json", report)
            (folder / "report.html").write_text(render(report), encoding="utf-8")
    return report


def predict_table(folder: Path, path: Path, tell: Tell) -> pa.Table:
    """Predictions of a run folder's network for the rows of another table, in their order."""
    model, encoder, answers, about = load_predictor(folder)
    types = {c.name: c.type for c in encoder.columns if c.used}
    kept = {key: about["reading"][key] for key in ("encoding", "missing") if key in about["reading"]}
    table, notes = read(path, like=types, **kept)
    for note in dict.fromkeys([*notes, *encoder.strangers(table)]):
        tell(note)
    with pinned(about["threads"]):
        return answers.decode(outputs_of(model, encoder.transform(table)))


def write_report(folder: Path) -> Path:
    """Draw the report of a run folder anew."""
    page = folder / "report.html"
    page.write_text(render(read_json(folder / "report.json")), encoding="utf-8")
    return page


def _check(settings: Settings, cocktail: Cocktail) -> None:
    """Refuse what would fail only after the table is read."""
    if settings.refit not in (None, "steps", "epochs"):
        raise GoodfitError(f"--refit must be steps or epochs, or left out, got {settings.refit!r}.")
    refuse_maximizing(cocktail)
    if settings.task is not None:
        loss_of(settings.task)
    try:
        if torch.zeros(1, device=settings.device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as wrong:
        why = f"{str(wrong).splitlines()[0]:.100}"
        raise GoodfitError(f"device must be one that torch has here, got {settings.device!r} ({why}); say cpu.") from None


def _train(data: Data, cocktail: Cocktail, settings: Settings, epochs: int) -> Fit:
    x, y = data.part("train")
    model = mlp(x.shape[1], data.answers.outputs, width=WIDTH, depth=DEPTH, seed=settings.seed)
    rows = len(y)
    found = fit(
        model,
        (x, y),
        data.part("valid"),
        cocktail,
        task=data.answers.target.task,
        epochs=epochs,
        batch_size=min(128, max(16, rows // 8)),
        seed=settings.seed,
        device=settings.device,
        progress=settings.progress,
        check_every=settings.check_every,
        refit=settings.refit,
    )
    for trained in filter(None, (found.model, found.validated)):
        trained.to("cpu")  # scores and predictions are the bits that `predict` will give
    return found


def _ending(found: Fit, at: str) -> Iterator[str]:
    """Why it ended, and whose weights are kept."""
    last, kept = found.history[-1], found.kept
    known = " in epoch " in found.stopped
    yield f"ended: {found.stopped}" if known else f"ended {at} epoch {last['epoch']}: {found.stopped or 'the last one'}"
    if kept is None:
        yield "kept: the weights of the last step, which no check has scored"
    elif kept["valid_loss"] <= last["best"]:
        yield f"kept: the best weights, of epoch {kept['epoch']}"
    else:
        yield f"kept: the weights of the last step, not those of epoch {found.best_epoch}: no EarlyStopping restores the best"
    if found.refit:
        yield found.refit


def _bare(data: Data, settings: Settings, epochs: int, tell: Tell) -> Fit | None:
    try:
        bare = _train(data, Cocktail(), settings, epochs)
        if not bare.stopped:
            return bare
        tell(f"without a comparison: the bare network ended early, {bare.stopped}")
        return None
    except KeyboardInterrupt:
        tell("without a comparison: the bare network was interrupted")
        return None
    except GoodfitError as wrong:
        tell(f"the bare network diverged: {wrong}")
        return None


def _identity(path: Path, data: Data, cocktail: Cocktail, settings: Settings) -> dict[str, Any]:
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


def _results(data: Data, found: Fit, bare: Fit | None) -> dict[str, Any]:
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


def _save_test_predictions(path: Path, data: Data, found: Fit) -> None:
    import pyarrow as pa
    from pyarrow.csv import write_csv

    x, _ = data.part("test")
    table = data.answers.decode(outputs_of(found.model, x))
    write_csv(table.add_column(0, "row", pa.array(data.rows[data.parts.test])), path)
