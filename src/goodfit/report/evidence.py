"""What a report says of the weights: sizes, zeros and histograms, of the regularized network beside the bare one."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from goodfit.where import roles

__all__ = ["weights_of"]

BINS = 40


def weights_of(model: nn.Module, bare: nn.Module | None) -> list[dict[str, Any]]:
    """A row per parameter of `model`, compared with the parameter of the same name in `bare` where there is one."""
    other = {} if bare is None else dict(bare.named_parameters())
    found = []
    for name, role in roles(model).items():
        w = _array(model.get_parameter(name))
        o = _array(other[name]) if name in other else None
        both = np.concatenate([w, o]) if o is not None else w
        reach = max(float(np.abs(both).max()), 1e-12)
        edges = np.linspace(-reach, reach, BINS + 1)
        row: dict[str, Any] = {"name": name, "shape": list(model.get_parameter(name).shape), "role": role}
        row |= {"zeros": float((w == 0).mean()), "norm": float(np.linalg.norm(w))}
        row |= {"bare_zeros": None, "bare_norm": None}
        histogram = {"edges": edges.tolist(), "regularized": np.histogram(w, edges)[0].tolist(), "bare": []}
        if o is not None:
            row |= {"bare_zeros": float((o == 0).mean()), "bare_norm": float(np.linalg.norm(o))}
            histogram["bare"] = np.histogram(o, edges)[0].tolist()
        found.append(row | {"histogram": histogram})
    return found


def _array(p: nn.Parameter) -> np.ndarray[Any, Any]:
    return np.asarray(p.detach().cpu().numpy(), dtype=np.float64).ravel()
