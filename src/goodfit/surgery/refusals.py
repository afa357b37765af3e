"""Which models an edit that proves itself does not take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from goodfit.errors import GoodfitError
from goodfit.surgery.insert import refuse_wrappers

__all__ = ["refuse_lazy", "refuse_unfit"]


def refuse_lazy(model: nn.Module, who: str) -> None:
    """Refuse weights and buffers that wait for a first batch to get their shape."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise GoodfitError(f"{who} needs weights that are there, but {name} is lazy: run the model on a batch once.")


def refuse_unfit(model: nn.Module, who: str) -> None:
    """Refuse what is not made of plain layers with plain dense tensors that are there."""
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"{who} takes a torch.nn.Module and an example, in this order, got a {type(model).__name__}.")
    refuse_wrappers(model, who)
    for name, module in model.named_modules():
        kind = type(module)
        if "quantized" in kind.__module__ or hasattr(module, "_orig_mod"):
            raise GoodfitError(f"{who} edits plain layers, got the {kind.__name__} {name!r}: {who} first, convert afterwards.")
        if "eval" in vars(module):  # torch.export puts one there that raises
            raise GoodfitError(
                f"{who} runs a model in eval mode, got an exported {name or 'model'}: {who} first, export afterwards."
            )
    refuse_lazy(model, who)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
            raise GoodfitError(f"{who} edits plain dense tensors, got {name} as a {type(tensor).__name__} ({tensor.layout}).")
