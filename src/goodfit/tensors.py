"""A model's weights and buffers by name: out of the model, and back into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError

__all__ = ["below", "from_text", "load_tensors", "matched", "put", "refuse_no_state", "tensors_of", "to_text", "truth", "under"]


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
        if _expanded(now[name]):
            if not torch.equal(now[name], tensor):
                raise GoodfitError(f"{name!r} is an expanded tensor, which nothing can be written into; register its clone().")
        elif now[name] is not tensor:
            now[name].copy_(tensor)


def _expanded(tensor: Tensor) -> bool:
    """Whether some of its places are one place in memory."""
    return any(stride == 0 < size - 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def matched(now: Mapping[str, Tensor], saved: Any, whose: str) -> dict[str, Tensor]:
    """A saved state in tensors like those of now; refuses one that was not saved from the same."""
    refuse_no_state(saved)
    odd = sorted(saved.keys() ^ now.keys())
    if odd:
        raise GoodfitError(f"The state of another {whose}: {odd[0]!r} does not match; make the same one first.")
    for name, t in now.items():
        if saved[name].shape != t.shape:
            shapes = f"{tuple(t.shape)}, got {tuple(saved[name].shape)}"
            raise GoodfitError(f"The state of another {whose}: {name!r} must have shape {shapes}; make the same one first.")
    return {name: torch.empty_like(t).copy_(saved[name]) for name, t in now.items()}


def refuse_no_state(saved: Any) -> None:
    """Refuse what no state_dict has given."""
    if not isinstance(saved, Mapping) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise GoodfitError(f"load_state_dict takes the dict of tensors that state_dict gave, got {saved!r:.60}.")


def put(tensor: Tensor, value: Tensor) -> None:
    """Write into a tensor in place, also one that was made in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def truth(flag: Tensor) -> bool | None:
    """Whether a flag holds, None where it stands for many members at once."""
    if flag.ndim or torch._C._functorch.is_functorch_wrapped_tensor(flag):
        return None
    return bool(flag)


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries, each under a prefix."""
    return {prefix + name: t for name, t in state.items()}


def from_text(text: str) -> Tensor:
    """A text as a tensor, for a state of tensors."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def to_text(tensor: Tensor) -> str:
    """The text that `from_text` took."""
    return bytes(tensor.tolist()).decode()
