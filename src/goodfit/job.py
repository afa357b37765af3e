"""The main job: a table in; a regularized network, the proof of what regularization did, and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from goodfit.checkpoints.processes import on_first
from goodfit.cocktail import Cocktail, parse
from goodfit.defaults import DEPTH, WIDTH
from goodfit.errors import GoodfitError
from goodfit.fitting.fit import Fit, fit
from goodfit.fitting.preparation import refuse_maximizing
from goodfit.launch import own
from goodfit.logs import Logger, logger_at
from goodfit.losses import loss_of
from goodfit.processes import OutOfReach, rank
from goodfit.report.render import render
from goodfit.results import identity, results, save_test_predictions
from goodfit.stop.criterion import Reason
from goodfit.tabular.folder import claim, completed, load_predictor, read_json, save_predictor, write_json
from goodfit.tabular.network import mlp, outputs_of, pinned
from goodfit.tabular.prepare import Data, prepare
from goodfit.tabular.read import read
from goodfit.tabular.settings import Settings
from goodfit.tabular.unfinished import asked, begin, checkpoints_of, forget

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Settings", "fit_table", "predict_table", "resume_table", "write_report"]

Tell = Callable[[str], None]


def fit_table(path: Path, target: str, out: Path, settings: Settings, tell: Tell) -> dict[str, Any] | None:
    """Fit a network on the table in `path`, write the run folder `out`, and return what the report knows.

    Of processes that train together the first one writes, and the others return None.
    """
    on_first(lambda: claim(out))
    data = _prepared(path, target, settings, tell)
    on_first(lambda: begin(out, path, target, settings))
    try:
        found = _regularized(data, settings, out)
    except OutOfReach as wrong:
        raise GoodfitError(f"{str(wrong).removesuffix('.')}: goodfit fit --resume {out} goes on.") from None
    except (GoodfitError, KeyboardInterrupt):
        if rank() == 0:
            forget(out)
        raise
    return _written(path, data, found, out, settings, tell)


def resume_table(out: Path, tell: Tell) -> dict[str, Any] | None:
    """The same for a run folder whose training has not ended."""
    path, target, settings = asked(out)
    data = _prepared(path, target, settings, tell)
    found = _regularized(data, settings, out)
    if found.resumed:
        tell(f"went on from step {found.resumed}")
    return _written(path, data, found, out, settings, tell)


def _prepared(path: Path, target: str, settings: Settings, tell: Tell) -> Data:
    _check(settings, parse(settings.cocktail))
    return prepare(path, target, settings.task, settings.seed, settings.reading, tell)


def _regularized(data: Data, settings: Settings, out: Path) -> Fit:
    with pinned(settings.threads):
        logs = [logger_at(path) for path in settings.logs]
        return _train(data, parse(settings.cocktail), settings, settings.epochs, checkpoints_of(out, "regularized"), logs)


def _written(path: Path, data: Data, found: Fit, out: Path, settings: Settings, tell: Tell) -> dict[str, Any] | None:
    """The bare network, to compare, then the run folder."""
    for line in _ending(found, "in" if settings.check_every else "after"):
        tell(line)
    bare, interrupted = None, found.reason is Reason.INTERRUPTED
    with pinned(settings.threads):
        if not interrupted:
            tell("the same network bare, to compare")
            bare, interrupted = _bare(data, settings, found.history[-1]["epoch"], out, tell)
        if rank():
            return None
        cocktail = parse(settings.cocktail)
        story = identity(path, data, cocktail, settings)
        report = story | results(data, found, bare) | {"cocktail": str(cocktail), "cocktail_repr": repr(cocktail)}
        about = story | {"refit": found.refit, "scores": report["scores"]}
        with completed(out) as folder:
            save_predictor(folder, found.model, data.encoder, data.answers, about)
            save_test_predictions(folder / "test_predictions.csv", data, found)
            write_json(folder / "history.json", report["history"])
            write_json(folder / "report.json", report)
            (folder / "report.html").write_text(render(report), encoding="utf-8")
    if not interrupted:
        forget(out)
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
        if torch.zeros(1, device=own(settings.device)).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as wrong:
        why = f"{str(wrong).splitlines()[0]:.100}"
        raise GoodfitError(f"device must be one that torch has here, got {settings.device!r} ({why}); say cpu.") from None


def _train(data: Data, cocktail: Cocktail, settings: Settings, epochs: int, saves: Path, logs: Sequence[Logger] = ()) -> Fit:
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
        device=own(settings.device),
        progress=settings.progress,
        check_every=settings.check_every,
        refit=settings.refit,
        checkpoints=saves,
        logs=logs,
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


def _bare(data: Data, settings: Settings, epochs: int, out: Path, tell: Tell) -> tuple[Fit | None, bool]:
    """The same network without a cocktail, None where it gives no comparison; and whether it was interrupted."""
    try:
        bare = _train(data, Cocktail(), replace(settings, refit=None), epochs, checkpoints_of(out, "bare"))
        if not bare.stopped:
            return bare, False
        tell(f"without a comparison: the bare network ended early, {bare.stopped}")
        return None, bare.reason is Reason.INTERRUPTED
    except KeyboardInterrupt:
        tell("without a comparison: the bare network was interrupted")
        return None, True
    except GoodfitError as wrong:
        tell(f"the bare network diverged: {wrong}")
        return None, False
