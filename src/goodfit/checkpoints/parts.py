"""The parts of a training: what each gives to a checkpoint, and takes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.checkpoints.plain import packed
from goodfit.errors import GoodfitError
from goodfit.tensors import put

__all__ = ["check", "give", "refuse", "take"]


def refuse(name: str, part: Any) -> None:
    """Refuse what has no state that could be saved and loaded, and names that are none of a file."""
    if not name.isidentifier():
        raise GoodfitError(f"A part of a checkpoint needs a name such as an argument has, got {name!r:.80}; rename it.")
    plain = isinstance(part, dict | list | torch.Generator)
    if not plain and not all(callable(getattr(part, call, None)) for call in ("state_dict", "load_state_dict")):
        raise GoodfitError(
            f"A checkpoint needs parts with state_dict and load_state_dict, generators, lists or dicts; {name} is a "
            f"{type(part).__name__}; put it into a dict."
        )
    packed(give(part), name)  # what no checkpoint can hold is told before anything could be lost


def give(part: Any) -> dict[str, Any]:
    """The state of a part. That of a model has all its buffers, also those that are not persistent."""
    if isinstance(part, nn.Module):
        return {**_passing(part), **part.state_dict()}
    if isinstance(part, torch.Generator):
        return {"state": part.get_state()}
    if isinstance(part, dict | list):
        return {"value": part}
    return {"kind": type(part).__name__, "state": part.state_dict()}


def check(name: str, part: Any, state: Mapping[str, Any]) -> None:
    """Refuse the state of another part, before anything is changed."""
    if isinstance(part, nn.Module):
        _check_model(name, part, state)
        return
    expected = "value" if isinstance(part, dict | list) else "state"
    kind = " ".join(str(state.get("kind", type(part).__name__)).split())[:80]
    if expected not in state or kind != type(part).__name__:
        raise GoodfitError(f"The checkpoint was saved with another {name}: a {kind}, not a {type(part).__name__}.")
    if isinstance(part, dict | list) and type(state["value"]) is not type(part):
        raise GoodfitError(f"The checkpoint was saved with another {name}: a {type(state['value']).__name__}.")


def take(part: Any, state: Mapping[str, Any]) -> None:
    """Put a part where its state was taken."""
    if isinstance(part, nn.Module):
        passing = _passing(part)
        for name in passing:
            _put_buffer(part, name, state[name])
        part.load_state_dict({name: value for name, value in state.items() if name not in passing})
    elif isinstance(part, torch.Generator):
        part.set_state(state["state"])
    elif isinstance(part, list):
        part[:] = state["value"]
    elif isinstance(part, dict):
        part.clear()
        part.update(state["value"])
    else:
        part.load_state_dict(state["state"])


def _passing(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the model's own state_dict."""
    kept = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in kept}


def _put_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """A buffer that is not persistent may be a cache, which has grown."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    now = owner._buffers[last]
    assert now is not None
    if now.shape == value.shape:
        put(now, value)
    else:
        owner._buffers[last] = value.to(now)


def _check_model(name: str, model: nn.Module, state: Mapping[str, Any]) -> None:
    now, passing = give(model), _passing(model)
    odd = [key for key in (*now, *state) if (key in now) != (key in state)]
    if odd:
        where = "this one has not" if odd[0] in state else "the saved one had not"
        raise GoodfitError(f"The checkpoint is of another {name}: {odd[0]!r} is what {where}; build the same model first.")
    for key, tensor in now.items():
        if isinstance(tensor, Tensor) and key not in passing:
            there, here = (_kind(one) for one in (state[key], tensor))
            if there != here:
                raise GoodfitError(f"The checkpoint is of another {name}: {key!r} was {there}, and is {here} here.")


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
