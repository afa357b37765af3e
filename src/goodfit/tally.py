"""What a training counts from one check to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Tally"]


class Tally:
    """The mean training loss over its rows, and the seconds, since the check before."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.rows = 0
        self._began = time.perf_counter()

    def add(self, loss: Tensor, rows: int) -> None:
        """The mean loss of one batch, and its rows; no device is waited for."""
        self.total, self.rows = self.total + loss.double() * rows, self.rows + rows

    @property
    def mean(self) -> float:
        """Of all rows so far."""
        return float(self.total / self.rows) if self.rows else math.nan

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far."""
        return {"total": float(self.total), "rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Count on."""
        self.total, self.rows = saved["total"], saved["rows"]
        self._began = time.perf_counter() - saved["seconds"]
