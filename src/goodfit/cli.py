"""The terminal: `goodfit --help` is the manual. Results go to standard output, all else to standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from goodfit.defaults import COCKTAIL

__all__ = ["main"]

app = typer.Typer(
    help="Neither overfit nor underfit: regularized PyTorch networks, and what regularization did.",
    epilog="A cocktail is written as its regularizers: --cocktail 'L2(1e-4), Dropout(0.3), EarlyStopping(20)'.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell(line: str) -> None:
    typer.echo(_printable(line), err=True)


def _printable(line: str) -> str:
    """One line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "�" for c in line)


def _version(asked: bool) -> None:
    if asked:
        from goodfit import __version__

        typer.echo(f"goodfit {__version__}")
        raise typer.Exit


@app.callback()
def _goodfit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, with any command.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def fit(
    data: Annotated[Path, typer.Argument(help="A table: .csv .tsv .parquet .feather .arrow, or .npz with X and y.")],
    target: Annotated[str, typer.Option(help="The column to predict.")],
    cocktail: Annotated[str, typer.Option(help="The regularizers; goodfit list shows all.")] = COCKTAIL,
    out: Annotated[Path | None, typer.Option(help="The run folder to make [default: DATA-run, or DATA-run-2, ...].")] = None,
    task: Annotated[str | None, typer.Option(help="classes or numbers [default: by the target's values].")] = None,
    epochs: Annotated[int, typer.Option(help="At most so many passes over the training part.", min=1)] = 200,
    check_every: Annotated[int | None, typer.Option(help="Steps between validations [default: an epoch].", min=1)] = None,
    refit: Annotated[str | None, typer.Option(help="steps or epochs: train anew on train and valid, as long.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the start, the order, all noise.", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of torch; one is quick for small networks.", min=1, max=256)] = 1,
    missing: Annotated[list[str] | None, typer.Option(help="A cell that means missing; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A column to read as text; may be repeated.")] = None,
    numbers: Annotated[list[str] | None, typer.Option(help="A column to read as numbers; may be repeated.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; may be repeated.")] = None,
    encoding: Annotated[str, typer.Option(help="Of a text file.")] = "utf-8",
) -> None:
    """Fit a network on a table; write a run folder and a report."""
    from goodfit.job import Settings, fit_table

    reading: dict[str, Any] = {"encoding": encoding, "missing": missing, "text": text, "numbers": numbers, "drop": drop}
    settings = Settings(
        cocktail=cocktail,
        task=task,
        epochs=epochs,
        seed=seed,
        device=device,
        threads=threads,
        reading={key: value for key, value in reading.items() if value},
        command=_command(),
        check_every=check_every,
        refit=refit,
    )
    folder = out if out is not None else _free(data)
    try:
        report = fit_table(data, target, folder, settings, _tell)
    except KeyboardInterrupt as ended:
        _fail(f"{str(ended) or 'interrupted'}; nothing was written", 130)
    found = report["scores"]
    others = {"valid, bare network": found["bare"].get("valid", {}), "test, refit": found["refit"].get("test", {})}
    told = found["regularized"] | {part: scores for part, scores in others.items() if scores}
    for part, scores in told.items():
        typer.echo(f"{part:20}" + "".join(f"  {name} {value:.4g}" for name, value in scores.items()))
    typer.echo(f"run folder {_printable(str(folder))}, report {_printable(str(folder / 'report.html'))}")


@app.command()
def path(
    data: Annotated[Path, typer.Argument(help="A table: .csv .tsv .parquet .feather .arrow, or .npz with X and y.")],
    target: Annotated[str, typer.Option(help="The column to predict.")],
    model: Annotated[str, typer.Option(help="network or linear.")] = "network",
    over: Annotated[str | None, typer.Option(help="The regularizer [default: whole inputs of a network, else L1].")] = None,
    cocktail: Annotated[str | None, typer.Option(help="What acts along [default: the model's own].")] = None,
    cv: Annotated[int | None, typer.Option(help="Folds over train and valid [default: the valid part].", min=2)] = None,
    count: Annotated[int, typer.Option(help="About how many λ.", min=1)] = 30,
    epochs: Annotated[int, typer.Option(help="For each λ, of a network.", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="The folder to make [default: DATA-path, or DATA-path-2, ...].")] = None,
    task: Annotated[str | None, typer.Option(help="classes or numbers [default: by the target's values].")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the start, the order, all noise.", min=0, max=2**32 - 1)] = 0,
    threads: Annotated[int, typer.Option(help="Of torch; one is quick for small networks.", min=1, max=256)] = 1,
    missing: Annotated[list[str] | None, typer.Option(help="A cell that means missing; may be repeated.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; may be repeated.")] = None,
    encoding: Annotated[str, typer.Option(help="Of a text file.")] = "utf-8",
) -> None:
    """Train a table's model from dense to sparse; show which columns it needs."""
    from goodfit.paths.table import Settings, lines, path_of_table

    reading: dict[str, Any] = {"encoding": encoding, "missing": missing, "drop": drop}
    settings = Settings(
        model=model,
        over=over,
        cocktail=cocktail,
        cv=cv,
        task=task,
        count=count,
        epochs=epochs,
        seed=seed,
        threads=threads,
        reading={key: value for key, value in reading.items() if value},
        command=_command(),
    )
    folder = out if out is not None else _free(data, "path")
    for line in lines(path_of_table(data, target, folder, settings, _tell)):
        typer.echo(_printable(line))
    typer.echo(f"path folder {_printable(str(folder))}, page {_printable(str(folder / 'path.html'))}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder that goodfit fit has written.")],
    data: Annotated[Path, typer.Argument(help="A table with the same columns, in any order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV file to write.")],
) -> None:
    """Predict the target for the rows of a table."""
    from goodfit.errors import GoodfitError
    from goodfit.job import predict_table

    if output.exists() and data.exists() and output.samefile(data):
        raise GoodfitError(f"-o must not be the table itself, got {str(output)!r}; give another file.")
    table = predict_table(run, data, _tell)
    _write_csv(table, output)
    typer.echo(f"{table.num_rows} predictions in {_printable(str(output))}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder that goodfit fit has written.")]) -> None:
    """Draw a run folder's report.html anew."""
    from goodfit.job import write_report

    typer.echo(_printable(str(write_report(run))))


@app.command("list")
def list_() -> None:
    """Show every regularizer: phases, numbers, ranges, source."""
    from shutil import get_terminal_size

    from goodfit.manual import lines

    for line in lines(max(60, get_terminal_size((100, 24)).columns)):
        typer.echo(line)


def _command() -> str:
    import shlex

    return shlex.join(["goodfit", *(a for a in sys.argv[1:] if a != "--debug")])


def _free(data: Path, kind: str = "run") -> Path:
    """DATA-run in this folder, or the first of DATA-run-2, -3, ... that is free; or DATA-path."""
    stem = data.name.split(".")[0] or "table"
    names = (f"{stem}-{kind}{end}" for end in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(Path(name) for name in names if not Path(name).exists())


def _write_csv(table: Any, output: Path) -> None:
    from pyarrow.csv import write_csv

    from goodfit.errors import GoodfitError

    whole = output.exists() and not output.is_file()  # a device such as /dev/stdout cannot be replaced
    draft = output if whole else output.parent / f".{output.name}.{os.getpid()}.draft"
    try:
        write_csv(table, draft)
        if draft != output:
            draft.replace(output)
    except OSError as wrong:
        raise GoodfitError(f"{str(output)!r} cannot be written: {wrong.strerror or wrong}; give another -o.") from None
    finally:
        if draft != output:
            draft.unlink(missing_ok=True)


def _fail(line: str, code: int) -> NoReturn:
    _tell(f"goodfit: {line}")
    sys.exit(code)


def main() -> None:
    """Run a command: exit code 0, 2 for input that must be mended, 1 for a fault of ours, 130 for Ctrl-C."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except Exception as wrong:
        if debug:
            raise
        _explain(wrong)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    if code == 130:
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(wrong: Exception) -> NoReturn:
    from typer import Abort

    from goodfit.errors import GoodfitError

    if isinstance(wrong, Abort):
        _fail("interrupted", 130)
    if isinstance(wrong, GoodfitError):
        _fail(str(wrong), 2)
    if hasattr(wrong, "format_message"):
        _fail(f"{' '.join(wrong.format_message().split()).rstrip('.')}. See goodfit --help.", 2)
    _fail(f"{type(wrong).__name__}: {str(wrong).splitlines()[0] if str(wrong) else ''} (--debug shows where)", 1)


if __name__ == "__main__":
    main()
