"""The bias of a layer before an inserted batch norm: it rests as long as the norm makes it redundant."""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from goodfit.batchnorms.still import is_frozen
from goodfit.surgery.insert import inserted_into

__all__ = ["biases", "rest_bias", "settle_biases"]


def rest_bias(model: nn.Module, host: nn.Module) -> None:
    """Take the bias before an inserted norm out of training, unless another layer has it too."""
    bias = host._parameters.get("bias")
    owners = sum(bias is p for m in model.modules() for p in m.parameters(recurse=False))
    if bias is not None and bias.requires_grad and owners == 1:
        vars(host)["bias_rests"] = True
        bias.requires_grad_(False)


def settle_biases(model: nn.Module) -> None:
    """Let biases train, or rest, as the norms behind them now ask for."""
    still = {m for m in model.modules() if is_frozen(m)}
    for bias, trains in biases(model, still, {}).items():
        bias.requires_grad_(trains)


def biases(model: nn.Module, still: Set[nn.Module], trained: Mapping[nn.Parameter, bool]) -> dict[nn.Parameter, bool]:
    """Whether the biases that were put to rest shall train, with these norms held still and these parameters trained or not.

    One is redundant before a norm that goes by its batch, and beside a β that trains; it does not train where its weight rests.
    """
    found = {}
    for host in model.modules():
        bias = host._parameters.get("bias")
        if bias is not None and "bias_rests" in vars(host):
            norm = host.get_submodule("batchnorm") if "batchnorm" in inserted_into(host) else None
            redundant = isinstance(norm, _BatchNorm) and (norm not in still or _trains(norm.bias, trained))
            weights = [p for n, p in host.named_parameters() if n != "bias" and not n.startswith("batchnorm.")]
            found[bias] = not redundant and any(p.requires_grad for p in weights)
    return found


def _trains(parameter: nn.Parameter | None, trained: Mapping[nn.Parameter, bool]) -> bool:
    return parameter is not None and trained.get(parameter, parameter.requires_grad)
