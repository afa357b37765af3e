"""Whether a model scores what its check said."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from goodfit.errors import listed
from goodfit.tensors import tensors_of

__all__ = ["otherwise"]


def otherwise(model: nn.Module, score: float, row: dict[str, Any]) -> str:
    """How a score of the model differs from that of its check by more than rounding, and what may be why; "" if not."""
    types = [p.dtype for p in model.parameters() if p.is_floating_point()]
    rounding = max((torch.finfo(kind).eps ** 0.5 for kind in types), default=0.0)
    said = row["valid_loss"]
    if not math.isfinite(said) or math.isclose(score, said, rel_tol=rounding, abs_tol=1e-12):
        return ""
    known = tensors_of(model)[1]
    passing = [name for name, _ in model.named_buffers() if name not in known]
    told = f"; not restored, since not persistent: buffer {listed(passing)}" if passing else ""
    return (
        f"The model that comes back scores {score:.6g}, and its check in epoch {row['epoch']} said {said:.6g}: validation "
        "is not the same twice; give data and a model that are (F.dropout and F.scaled_dot_product_attention drop in eval "
        f"mode too, where a rate is passed{told})."
    )
