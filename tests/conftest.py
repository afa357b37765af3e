"""Tests are stricter than users: double precision, warnings are errors, one thread, fixed seeds."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True)  # --hypothesis-profile=default looks for new cases
settings.load_profile("fixed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in its background ignores Ctrl-C


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
