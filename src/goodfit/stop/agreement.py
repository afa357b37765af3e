"""What several processes agree on, so that all of them stop at the same check."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.phases import Report
from goodfit.processes import gathered, world

__all__ = ["reduced"]


def reduced(report: Report) -> Report:
    """The report of all processes that train together: means, the standard error of the mean score, the latest time.

    Each process tells the score of its share, of equal size. Where all tell the same number, it is that of the whole.
    """
    if world() == 1:
        return report
    names = [f.name for f in fields(report)]
    own = [getattr(report, name) for name in names]
    told = [t is not None for t in own]
    row = torch.tensor([math.nan if t is None else float(t) for t in own] + [float(one) for one in told], dtype=torch.float64)
    table = gathered(row)
    for name, given in zip(names, table[:, len(names) :].T, strict=True):
        if not (given == given[0]).all():
            raise GoodfitError(f"All processes must tell the same inputs of a check, got {name} from some of them alone.")
    columns = dict(zip(names, table.T, strict=False))
    return Report(**{name: _joint(name, columns) for name, given in zip(names, told, strict=True) if given})


def _joint(name: str, columns: dict[str, Tensor]) -> Tensor:
    column, score = columns[name], columns["score"]
    if name in ("step", "seconds"):
        return column.max()
    same = bool((column == column[0]).all())
    if name == "stderr" and not (same and (score == score[0]).all()):
        return column.square().sum().sqrt() / len(column)
    return column[0] if same else column.mean()
