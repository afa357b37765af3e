"""Models that tests of several rooms are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Net(nn.Module):
    """A model from named layers and a function that calls them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def settled(model: nn.Module) -> nn.Module:
    """The model with batch norm statistics as after training."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
            norm.weight.detach().uniform_(0.5, 2), norm.bias.detach().normal_()
    return model
