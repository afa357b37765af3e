"""The terminal: `goodfit --help` is the manual. Results go to standard output, all else to standard error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from goodfit.defaults import COCKTAIL
from goodfit.launch import join, launched, leave
from goodfit.terminal import command, explain, fail, free_folder, printable, tell, write_csv

__all__ = ["main"]

TABLE = "A table: .csv .tsv .parquet .feather .arrow, or .npz with X and y."

app = typer.Typer(
    help="Neither overfit nor underfit: regularized PyTorch networks, and what regularization did.",
    epilog="A cocktail is written as its regularizers: --cocktail 'L2(1e-4), Dropout(0.3), EarlyStopping(20)'.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    elif context.invoked_subcommand != "fit" and launched():
        fail(f"{context.invoked_subcommand} runs in one process; start it without torchrun, as goodfit.", 2)


@app.command()
def fit(
    context: typer.Context,
    data: Annotated[Path | None, typer.Argument(help=TABLE)] = None,
    target: Annotated[str | None, typer.Option(help="The column to predict.")] = None,
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
    log_to: Annotated[list[Path] | None, typer.Option(help="A .csv file or a TensorBoard folder; may be repeated.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run folder whose training goes on; alone.", metavar="RUN")] = None,
) -> None:
    """Fit a network on a table; write a run folder and a report."""
    from goodfit.checkpoints.processes import on_first
    from goodfit.job import Settings, fit_table, resume_table
    from goodfit.results import score_lines

    reading: dict[str, Any] = {"encoding": encoding, "missing": missing, "text": text, "numbers": numbers, "drop": drop}
    settings = Settings(
        cocktail=cocktail,
        task=task,
        epochs=epochs,
        seed=seed,
        device=device,
        threads=threads,
        reading={key: value for key, value in reading.items() if value},
        command=command(),
        check_every=check_every,
        refit=refit,
        logs=[str(path.absolute()) for path in log_to or ()],
    )
    _refuse_beside(context, resume, data, target)
    join()
    folder = Path(on_first(lambda: str(resume or out or free_folder(data or Path()))))
    try:
        report = resume_table(folder, tell) if data is None else fit_table(data, str(target), folder, settings, tell)
    except KeyboardInterrupt as ended:
        left = f"goodfit fit --resume {folder} goes on" if folder.exists() else "nothing was written"
        fail(f"{str(ended) or 'interrupted'}; {left}", 130)
    if report is not None:
        for line in score_lines(report):
            typer.echo(line)
        typer.echo(f"run folder {printable(str(folder))}, report {printable(str(folder / 'report.html'))}")


@app.command()
def path(
    data: Annotated[Path, typer.Argument(help=TABLE)],
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
        command=command(),
    )
    folder = out if out is not None else free_folder(data, "path")
    for line in lines(path_of_table(data, target, folder, settings, tell)):
        typer.echo(printable(line))
    typer.echo(f"path folder {printable(str(folder))}, page {printable(str(folder / 'path.html'))}")


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
    table = predict_table(run, data, tell)
    write_csv(table, output)
    typer.echo(f"{table.num_rows} predictions in {printable(str(output))}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder that goodfit fit has written.")]) -> None:
    """Draw a run folder's report.html anew."""
    from goodfit.job import write_report

    typer.echo(printable(str(write_report(run))))


@app.command("list")
def list_() -> None:
    """Show every regularizer: phases, numbers, ranges, source."""
    from shutil import get_terminal_size

    from goodfit.manual import lines

    for line in lines(max(60, get_terminal_size((100, 24)).columns)):
        typer.echo(line)


def _refuse_beside(context: typer.Context, resume: Path | None, data: Path | None, target: str | None) -> None:
    """A training that goes on has its settings; one that begins needs a table and its target."""
    from goodfit.errors import GoodfitError

    said = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    beside = [name for name in said if name != "resume"]
    if resume is not None and beside:
        raise GoodfitError(f"--resume takes all settings from its run folder, got {beside[0]} too; leave it out.")
    if resume is None and (data is None or target is None):
        raise GoodfitError(f"fit needs {'a table' if data is None else '--target, the column to predict'}, or --resume RUN.")


def main() -> None:
    """Run a command: exit code 0, 2 for input that must be mended, 1 for a fault of ours, 130 for Ctrl-C."""
    try:
        leave(_command())
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else 1)


def _command() -> int:
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except Exception as wrong:
        if debug:
            raise
        explain(wrong)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    if code == 130:
        fail("interrupted", 130)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
