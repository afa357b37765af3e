"""Which input features a model still reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from goodfit.dataflow.flows import tensors_in
from goodfit.surgery.running import call_model, evaluating

__all__ = ["features_of", "readers"]


@torch.no_grad()
def readers(model: nn.Module, x: Any) -> list[str]:
    """Names of the weights that read the input itself, found by running it; none where another layer reads it too."""
    if not isinstance(x, Tensor):
        return []
    found: dict[str, bool] = {}

    def hook(name: str, module: nn.Module) -> Any:
        plain = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd))
        counts = plain and getattr(module, "groups", 1) == 1

        def seen(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = inputs[0] if inputs else None
            if isinstance(first, Tensor) and first.shape == x.shape and first.data_ptr() == x.data_ptr():
                found[f"{name}.weight".lstrip(".")] = counts

        return seen

    hooks = [
        m.register_forward_pre_hook(hook(n, m))
        for n, m in model.named_modules()
        if any(True for _ in m.parameters(recurse=False))
    ]
    try:
        with evaluating(model):
            call_model(model, x)
    finally:
        for one in hooks:
            one.remove()
    return list(found) if all(found.values()) and not _passes_by(model, list(found), x) else []


def _passes_by(model: nn.Module, names: list[str], x: Tensor) -> bool:
    """Whether the input reaches the output by another way than these weights: it still counts where they are zero."""
    blind = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    with evaluating(model):
        first, second = (list(tensors_in(functional_call(model, blind, (given,)))) for given in (x, 1.5 * x + 1))
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def features_of(weights: dict[str, Tensor], names: list[str]) -> tuple[int, ...] | None:
    """Indices of the features with a weight that is not zero in any of the layers that read them."""
    if not names or len({weights[n].shape[1] for n in names}) > 1:
        return None
    alive = torch.stack([weights[n].transpose(0, 1).flatten(1).any(1) for n in names]).any(0)
    return tuple(alive.nonzero().flatten().tolist())
