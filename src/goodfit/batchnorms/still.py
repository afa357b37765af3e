"""What holds one batch norm still, whatever `train()` says."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["Still", "is_frozen", "still_of"]


class Still:
    """Stands in for `train` of one norm: a copied or unpickled norm gets its own, and a compiled graph sees nothing of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode = module, module.training
        self.trained: dict[str, bool] = {}

    def __call__(self, mode: bool = True) -> nn.Module:
        """Note the mode for later, and tell the layers inside."""
        type(self.module).train(self.module, mode)
        self.mode, self.module.training = self.module.training, False
        return self.module

    def note(self, known: Mapping[nn.Parameter, bool]) -> None:
        """Note whether γ and β trained, as is known of those that another norm holds, too."""
        for name, p in self.module.named_parameters(recurse=False):
            self.trained.setdefault(name, known.get(p, p.requires_grad))

    @property
    def notes(self) -> dict[nn.Parameter, bool]:
        """Whether the γ and β that are held trained before."""
        return {p: self.trained[n] for n, p in self.module.named_parameters(recurse=False) if n in self.trained}


def still_of(module: nn.Module) -> Still | None:
    """What holds a norm still, if `freeze_batchnorm` does."""
    held = module.__dict__.get("train")
    return held if isinstance(held, Still) else None


def is_frozen(module: nn.Module) -> bool:
    """Whether a norm is held still, by `freeze_batchnorm` or by being a FrozenBatchNorm of another library."""
    return still_of(module) is not None or "frozen" in type(module).__name__.lower()
