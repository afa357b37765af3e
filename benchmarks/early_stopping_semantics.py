"""Where early stopping differs: the same scores in each installed package's own loop, beside the written rule.

    python benchmarks/early_stopping_semantics.py [--only Keras]

Prints a table, a row per situation and a column per package, and writes a whole one beside this file as .csv. A cell is the
0-based check after which training ended and what the package calls its best, or the check whose weights it left. Right is
what the plain spec of stopping_spec.py says, which shares no code with goodfit; own rule is what the package documents to do
instead. Not run: fastai and Composer.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stopping_peers as peers
import stopping_trainers as trainers
from stopping_job import Job, NoOption, Outcome, Scores
from stopping_situations import SITUATIONS, Expected, Situation, expected

import goodfit as gf

RIGHT, OWN, WRONG, NONE = "right", "own rule", "WRONG", "-"


@dataclass(frozen=True)
class System:
    """A package, its adapter, and where its documentation gives another rule of its own."""

    name: str
    module: str
    package: str
    run: Callable[[Scores, Job], Outcome]
    convention: dict[str, Any] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}" if self.installed else f"{self.name}, not installed"

    @property
    def version(self) -> str:
        return gf.__version__ if self.name == "goodfit" else importlib.metadata.version(self.package)


SYSTEMS = [
    System("goodfit", "goodfit", "goodfit", peers.goodfit),
    System("Keras", "keras", "keras", peers.keras),
    System("Lightning", "pytorch_lightning", "pytorch-lightning", trainers.lightning, {"nonfinite": "stop"}),
    System("Ignite", "ignite", "pytorch-ignite", peers.ignite),
    System("Transformers", "transformers", "transformers", trainers.hugging_face),
    System("skorch", "skorch", "skorch", peers.skorch),
    System("sklearn MLP", "sklearn", "scikit-learn", peers.sklearn, {"extra": 1}),
    System("ReduceLROnPlateau", "torch", "torch", peers.plateau, {"extra": 1}),
]


@dataclass(frozen=True)
class Cell:
    """What a package did, and whether that is right."""

    text: str
    mark: str
    why: str = ""


def cell(system: System, situation: Situation) -> Cell:
    """Run it; a refusal is an exception that names no option that is missing."""
    rule = expected(situation)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            did = system.run(situation.scores, situation.job)
        except NoOption:
            return Cell("no option", NONE)
        except Exception as error:  # whatever a package raises to refuse
            return Cell("refused", RIGHT if rule.outcome is None else NONE, " ".join(repr(error).split()))
    return Cell(shown(did, situation), mark(did, situation, system, rule))


def mark(did: Outcome, situation: Situation, system: System, rule: Expected) -> str:
    strict = system.name == "goodfit"
    if agrees(did, situation, rule, strict):
        return RIGHT
    own = {"extra": 1} if situation.job.rule.patience == 0 else system.convention  # stops at the first without improvement
    return OWN if own and agrees(did, situation, expected(situation, **own), strict) else WRONG


def agrees(did: Outcome, situation: Situation, rule: Expected, strict: bool) -> bool:
    """strict: the best is the strictly best; else it may as well be the last accepted one."""
    if rule.outcome is None:
        return False
    if situation.job.keep:
        return did.kept == rule.outcome.kept
    bests = {rule.outcome.best} if strict else {rule.outcome.best, rule.anchor}
    return did.stop == rule.outcome.stop and any(_same(did.best, best) for best in bests)


def _same(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-6)


def shown(did: Outcome, situation: Situation) -> str:
    if situation.job.keep:
        return f"kept {'a mixture' if did.kept is None else did.kept}"
    return f"{'never' if did.stop is None else did.stop} ({'none' if did.best is None else f'{did.best:.4g}'})"


def said(rule: Expected, situation: Situation) -> str:
    return "refused" if rule.outcome is None else shown(rule.outcome, situation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="name of a package")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    systems = [s for s in SYSTEMS if not asked.only or s.name in asked.only]
    columns = [{s.name: cell(system, s) for s in SITUATIONS} if system.installed else {} for system in systems]
    lost = Cell("not installed", NONE)
    rows = []
    for s in SITUATIONS:
        row = {"situation": s.name, "the rule": said(expected(s), s)}
        for system, column in zip(systems, columns, strict=True):
            found = column.get(s.name, lost)
            row[system.title] = found.text if found.mark == NONE else f"{found.text}, {found.mark}"
        rows.append(row)
    counts = [Counter(c.mark for c in column.values()) for column in columns]
    totals = {"situation": "right, own rule, wrong", "the rule": ""}
    totals |= {s.title: f"{n[RIGHT]}, {n[OWN]}, {n[WRONG]}" for s, n in zip(systems, counts, strict=True)}
    widths = {key: max(len(row[key]) for row in [*rows, totals, {k: k for k in totals}]) for key in totals}
    for row in [{k: k for k in totals}, *rows, totals]:
        print("  ".join(f"{row[key]:{width}}" for key, width in widths.items()))
    for system, column in zip(systems, columns, strict=True):
        for name, found in column.items():
            if found.why:
                print(f"{system.name} refused {name!r}: {found.why[:160]}")
    if asked.only:
        return
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, totals)
        writer.writeheader()
        writer.writerows([*rows, totals])


if __name__ == "__main__":
    main()
