"""The state of every generator of random numbers that a process has."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from goodfit.processes import rank

__all__ = ["Randomness"]


class Randomness:
    """The global generators of Python, NumPy and torch, those of torch's devices, and others that are named."""

    def __init__(self, *others: torch.Generator) -> None:
        self.others = others

    def state_dict(self) -> dict[str, Any]:
        """Where they all are."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
            "others": [one.get_state() for one in self.others],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put them there. Devices that are no longer there are left out."""
        if saved["numpy"][2] not in range(625):  # NumPy would take it, and read beyond its 624 numbers
            raise ValueError("NumPy's generator has no such place")
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        torch.set_rng_state(saved["torch"])
        for device, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)
        for one, state in zip(self.others, saved["others"], strict=True):
            one.set_state(state)

    def adopt(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Of other processes than there are now: a process that is new keeps the generators that it has begun with."""
        if rank() < len(states):
            self.load_state_dict(states[rank()])
