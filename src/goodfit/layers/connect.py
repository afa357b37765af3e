"""DropConnect: a weight is masked for the time of its module's forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from goodfit.layers.seeded import Seeded

__all__ = ["SeededDropConnect"]


class SeededDropConnect(Seeded):
    """In training each number of a weight is zero with probability p, the others are scaled up: w · mask / (1 − p).

    weight: its name in the host, "weight_hh_l0" or "out_proj.weight". All uses of the weight in a forward pass of the whole
    model share one mask.
    """

    def __init__(self, name: str = "drop_connect", p: float = 0.0, weight: str = "weight") -> None:
        super().__init__(name, p)
        self.weight = weight
        self._masks = False
        self._noise: Tensor | None = None
        self._passes = 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight!r}"

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A forward pass of the whole model."""
        self._passes += 1
        try:
            yield
        finally:
            self._passes -= 1
            self._noise = self._noise if self._passes else None

    @contextmanager
    def around(self, host: nn.Module) -> Iterator[Tensor | None]:
        """The host's forward, which meets the masked weight; a host that runs itself once more meets it as it is."""
        if not self.training or self._masks:
            yield None
            return
        owner, name = _owner(host, self.weight)
        whole = getattr(owner, name)
        masked = self.masked(whole)
        try:
            self._masks = True
            _set(owner, name, masked)
            yield masked
        finally:
            _set(owner, name, whole)
            self._masks = False

    def masked(self, weight: Tensor) -> Tensor:
        """w · mask / (1 − p)."""
        noise = self._noise if self._noise is not None else self.draw(weight.shape, weight.device)
        if self._passes:
            self._noise = noise
        return self.scaled(weight, noise)


def _owner(host: nn.Module, weight: str) -> tuple[nn.Module, str]:
    path, _, name = weight.rpartition(".")
    return host.get_submodule(path), name


def _set(owner: nn.Module, name: str, value: Any) -> None:
    """Write past `nn.Module.__setattr__`, which takes parameters alone."""
    owner._parameters[name] = value
    if isinstance(owner, nn.RNNBase):  # what its forward reads
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
