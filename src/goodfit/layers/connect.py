"""DropConnect: a weight is masked for the time of its module's forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from goodfit.layers.seeded import Seeded

__all__ = ["SeededDropConnect"]


class SeededDropConnect(Seeded):
    """In training each number of a weight is zero with probability p, the others are scaled up: w · mask / (1 − p).

    weight: its name in the host, "weight_hh_l0" or "out_proj.weight". Between `begin` and `end` of a forward pass of the whole
    model all uses of the weight share one mask.
    """

    def __init__(self, name: str = "drop_connect", p: float = 0.0, weight: str = "weight") -> None:
        super().__init__(name, p)
        self.weight = weight
        self._held: tuple[Tensor | None, ...] = ()
        self._noise: Tensor | None = None
        self._passes = 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight!r}"

    def begin(self) -> None:
        """A forward pass of the whole model starts."""
        self._passes += 1

    def end(self) -> None:
        """It ends, also where it fails."""
        self._passes = max(self._passes - 1, 0)
        self._noise = None

    def put(self, host: nn.Module) -> None:
        """The host's forward starts: it meets the masked weight."""
        owner, name = _owner(host, self.weight)
        whole = getattr(owner, name) if self.training else None
        self._held = (*self._held, whole)
        if whole is not None:
            _set(owner, name, self.masked(whole))

    def take(self, host: nn.Module) -> None:
        """It ends, also where it fails: the weight itself is back."""
        if not self._held:  # the host failed before it started
            return
        *held, whole = self._held
        self._held = tuple(held)
        if whole is not None:
            _set(*_owner(host, self.weight), whole)

    def masked(self, weight: Tensor) -> Tensor:
        """w · mask / (1 − p)."""
        noise = self._noise if self._noise is not None else self.draw(weight.shape, weight.device)
        if self._passes:
            self._noise = noise
        return self.scaled(weight, noise)


def _owner(host: nn.Module, weight: str) -> tuple[nn.Module, str]:
    path, _, name = weight.rpartition(".")
    return host.get_submodule(path), name


def _set(owner: nn.Module, name: str, value: Tensor) -> None:
    """Write past `nn.Module.__setattr__`, which takes parameters alone; what is no parameter here is one of a replica."""
    holder: dict[str, Any] = owner._parameters if name in owner._parameters else vars(owner)
    holder[name] = value
    if isinstance(owner, nn.RNNBase):  # what its forward reads
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
