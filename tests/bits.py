"""States to compare bit by bit."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor


def bits(value: Any) -> Any:
    """All that tells one plain state from another, so that nan equals nan, and -0.0 differs from 0.0, and 1 from True."""
    if isinstance(value, Tensor):
        whole = value.detach().resolve_conj().resolve_neg().contiguous()
        return "tensor", value.dtype, tuple(value.shape), bytes(whole.reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, np.ndarray | np.generic):
        return type(value), str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value), [(bits(key), bits(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(one) for one in value]
    return type(value), struct.pack("d", value) if isinstance(value, float) else value
