"""`gf.stop`: when enough is enough. Criteria for `EarlyStopping`, as values that `&` and `|` join.

    EarlyStopping(Patience(10) | GL(5))         # whichever comes first
    EarlyStopping(UP(3) & Patience(5))          # only where both say stop

A criterion is a frozen value with a parsable repr; what it remembers is a dict of tensors.
"""

from __future__ import annotations

from goodfit.stop.criterion import AllOf, AnyOf, Criterion, Reason
from goodfit.stop.gradients import evidence
from goodfit.stop.limits import Budget, Divergence, Evidence, Target
from goodfit.stop.patience import Patience
from goodfit.stop.prechelt import GL, PQ, UP
from goodfit.stop.smoothed import Smoothed

CRITERIA: tuple[type[Criterion], ...] = (Patience, GL, PQ, UP, Smoothed, Target, Divergence, Budget, Evidence)

__all__ = [
    "CRITERIA",
    "GL",
    "PQ",
    "UP",
    "AllOf",
    "AnyOf",
    "Budget",
    "Criterion",
    "Divergence",
    "Evidence",
    "Patience",
    "Reason",
    "Smoothed",
    "Target",
    "evidence",
]
