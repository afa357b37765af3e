"""γ and β that make up for new statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from goodfit.batchnorms.norm import Norm
from goodfit.errors import GoodfitError

__all__ = ["affine_changes"]


def affine_changes(model: nn.Module, norms: Mapping[int, Norm], names: Mapping[int, str]) -> list[tuple[Tensor, Tensor]]:
    """Parameters and their new values, so that each norm says with its known statistics what it says with those it has."""
    own, taken = {id(p) for p in model.parameters()}, set[int]()
    changes = []
    for key, norm in norms.items():
        (weight, bias), *others = norm.affines.values() or [(None, None)]
        if weight is None or bias is None or others or not {id(weight), id(bias)} <= own - taken:
            raise GoodfitError(
                f"keep_function changes γ and β with the statistics, but {names[key]} has none of its own: leave it out."
            )
        taken |= {id(weight), id(bias)}
        assert norm.known is not None
        (mean, var), (new_mean, new_var) = [(m.double(), v.double()) for m, v in ((norm.mean, norm.var), norm.known)]
        scale = weight.double() / (var + norm.eps).sqrt()
        for old, new in ((weight, scale * (new_var + norm.eps).sqrt()), (bias, bias.double() + scale * (new_mean - mean))):
            if not bool(new.to(old.dtype).isfinite().all()):
                raise GoodfitError(
                    f"keep_function needs finite statistics to start from, {names[key]} has others: recalibrate first."
                )
            changes.append((old, new))
    return changes
