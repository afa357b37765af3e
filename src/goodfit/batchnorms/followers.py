"""What a subclass of batch norm does behind the norm: hand its output to children of its own, shown by trying it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from goodfit.errors import GoodfitError
from goodfit.layers.followed import Followed
from goodfit.layers.synchronized import SyncBatchNorm
from goodfit.surgery.insert import inserted_into

__all__ = ["batch_normalized", "followers_of"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
_SPACE: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 2, 2)}


def batch_normalized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What torch's batch norm says of `x` in the mode that `norm` is in, without moving statistics."""
    by_batch = norm.training or norm.running_mean is None
    statistics = (None, None) if by_batch else (norm.running_mean, norm.running_var)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, by_batch, 0.0, norm.eps)


def followers_of(name: str, norm: _BatchNorm) -> tuple[str, ...]:
    """The children that a batch norm hands its output to; refuses one that does something else."""
    if any(is_lazy(t) for t in (*norm.parameters(False), *norm.buffers(False))):
        raise GoodfitError(
            f"convert_batchnorm needs norms that are there, but {name!r} is lazy: run the model on a batch once."
        )
    if is_parametrized(norm) or "forward" in vars(norm):
        how = "is parametrized" if is_parametrized(norm) else "has a forward of its own"
        raise GoodfitError(f"convert_batchnorm keeps what a norm does, but {name!r} {how}: take that off first.")
    if type(norm) in _PLAIN:
        return ()
    if isinstance(norm, Followed):
        return norm.followers
    children = tuple(child for child, _ in norm.named_children() if child not in inserted_into(norm))
    if not all(_agrees(norm, children, training) for training in (False, True)):
        raise GoodfitError(
            f"convert_batchnorm keeps what a norm does, but the {type(norm).__name__} {name!r} does not do in both modes what "
            f"torch's does, followed by its own layers ({', '.join(children) or 'none'}): make the model with torch's."
        )
    return children


def _agrees(norm: _BatchNorm, children: tuple[str, ...], training: bool) -> bool:
    """Whether a norm, without its hooks, is torch's norm and then the children, on numbers made up."""
    like = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
    space = next((size for kind, size in _SPACE.items() if isinstance(norm, kind)), (3, 3))
    x = torch.randn(4, norm.num_features, *space, generator=torch.Generator().manual_seed(0)).to(like)
    own, plain = copy.deepcopy(norm), copy.deepcopy(norm)
    for module in (*own.modules(), *plain.modules()):
        module.training = training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            torch.manual_seed(0)
            said = own.forward(x.clone())
            torch.manual_seed(0)
            meant = _BatchNorm.forward(plain, x.clone())
            for child in children:
                meant = plain.get_submodule(child)(meant)
    except Exception:  # whatever it is, it is not torch's
        return False
    pairs = [(said, meant), *zip(own.buffers(), plain.buffers(), strict=True)]
    return all(a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3) for a, b in pairs)
