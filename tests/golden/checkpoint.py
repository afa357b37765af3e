"""Write the checkpoint of format 1 that every later version reads, or refuses by its number: tests/golden/checkpoint-1.

    python tests/golden/checkpoint.py FOLDER

It is written once, and never again for the same format. `kinds()` has one of each kind that a state can hold.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import goodfit as gf

STEP = 2


def kinds() -> dict[str, Any]:
    """One of each kind, none of which depends on a generator."""
    numbers = {"int": 7, "long": 2**80, "float": 0.1, "nan": float("nan"), "-inf": float("-inf")}
    return numbers | {
        "none": None,
        "yes": True,
        "é": "é",
        "tensor": torch.arange(6.0, dtype=torch.float32).reshape(2, 3),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "array": np.arange(3, dtype=np.int16),
        "scalar": np.float64(0.25),
        "tuple": (1, (2, [3])),
        "pairs": {0: "a", (1, "x"): None},
        "counter": Counter({3: 2}),
    }


def seed() -> None:
    """Generators where the checkpoint has them."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


if __name__ == "__main__":
    seed()
    gf.Checkpoints(Path(sys.argv[1])).watch(training=kinds()).save(STEP)
