"""A model's weights and buffers by name: out of the model, and back into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["from_text", "load_tensors", "put", "tensors_of", "to_text", "truth"]


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and persistent buffers of a model by name, tied ones once."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    kept = model.state_dict(keep_vars=True)
    return weights, {name: b for name, b in model.named_buffers() if name in kept}


@torch.no_grad()
def load_tensors(model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model, in place."""
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in {**weights, **buffers}.items():
        if now[name] is not tensor:
            now[name].copy_(tensor)


def put(tensor: Tensor, value: Tensor) -> None:
    """Write into a tensor in place, also one that was made in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def truth(flag: Tensor) -> bool | None:
    """Whether a flag holds, None where it stands for many members at once."""
    if flag.ndim or torch._C._functorch.is_functorch_wrapped_tensor(flag):
        return None
    return bool(flag)


def from_text(text: str) -> Tensor:
    """A text as a tensor, for a state of tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def to_text(tensor: Tensor) -> str:
    """The text that `from_text` took."""
    return bytes(tensor.tolist()).decode()
