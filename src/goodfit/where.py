"""Which weights a regularizer acts on: selectors by the role of a parameter, never guessed from its name alone.

`kernels`, `biases`, `norms`, `embeddings` and `everything` select by the type of the module that owns a parameter;
`named("conv*")` selects by glob. They combine with `&`, `|` and `~`, are frozen, and print as they are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from goodfit.errors import GoodfitError

__all__ = ["Where", "biases", "embeddings", "everything", "kernels", "named", "norms", "owners", "roles"]

KERNELS = (nn.Linear, _ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Where(ABC):
    """A predicate over (name, role) of a parameter."""

    @abstractmethod
    def holds(self, name: str, role: str) -> bool:
        """Whether the parameter `name` with this `role` is selected."""

    @property
    def by_role(self) -> bool:
        """Whether it asks for the role of a weight, which the place of a layer does not have."""
        return False

    def __and__(self, other: Where) -> Where:
        return _Both(self, other) if isinstance(other, Where) else NotImplemented

    def __or__(self, other: Where) -> Where:
        return _Either(self, other) if isinstance(other, Where) else NotImplemented

    def __invert__(self) -> Where:
        return _Not(self)

    def select(self, model: nn.Module) -> list[str]:
        """Names of the selected parameters of `model`, tied weights once, in the model's order."""
        return [name for name, role in roles(model).items() if self.holds(name, role)]


@dataclass(frozen=True, repr=False)
class _Role(Where):
    name: str
    role: str

    def __repr__(self) -> str:
        return self.name

    @property
    def by_role(self) -> bool:
        return self.role != ""

    def holds(self, name: str, role: str) -> bool:
        return self.role in ("", role)


@dataclass(frozen=True, repr=False)
class _Named(Where):
    glob: str

    def __repr__(self) -> str:
        return f"named({self.glob!r})"

    def holds(self, name: str, role: str) -> bool:
        return fnmatchcase(name, self.glob)


@dataclass(frozen=True, repr=False)
class _Both(Where):
    left: Where
    right: Where

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"

    @property
    def by_role(self) -> bool:
        return self.left.by_role or self.right.by_role

    def holds(self, name: str, role: str) -> bool:
        return self.left.holds(name, role) and self.right.holds(name, role)


@dataclass(frozen=True, repr=False)
class _Either(Where):
    left: Where
    right: Where

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"

    @property
    def by_role(self) -> bool:
        return self.left.by_role or self.right.by_role

    def holds(self, name: str, role: str) -> bool:
        return self.left.holds(name, role) or self.right.holds(name, role)


@dataclass(frozen=True, repr=False)
class _Not(Where):
    inner: Where

    def __repr__(self) -> str:
        return f"~{self.inner!r}"

    @property
    def by_role(self) -> bool:
        return self.inner.by_role

    def holds(self, name: str, role: str) -> bool:
        return not self.inner.holds(name, role)


kernels: Where = _Role("kernels", "kernel")
biases: Where = _Role("biases", "bias")
norms: Where = _Role("norms", "norm")
embeddings: Where = _Role("embeddings", "embedding")
everything: Where = _Role("everything", "")


def named(glob: str) -> Where:
    """Parameters whose full name matches the glob: `named("encoder.*.weight")`."""
    if not isinstance(glob, str):
        raise GoodfitError(f"named takes a glob such as 'encoder.*.weight', got {glob!r}.")
    return _Named(glob)


def roles(model: nn.Module) -> dict[str, str]:
    """Role of each parameter: "kernel", "bias", "norm", "embedding" or "other", tied weights once.

    The role follows from the type of the owning module. A module that is not known counts as a kernel where its
    parameter is a matrix, or has more axes of which two are longer than 1 and the first is (one that is broadcast over the
    batch is no kernel); so a layer scale (C, 1, 1), a class token (1, 1, C) and positions (1, N, C) are "other". A weight
    tied to an embedding is an embedding.
    """
    found: dict[str, str] = {}
    first: dict[Tensor, str] = {}
    for name, parameter, module, local in _owned(model):
        known = first.setdefault(parameter, name)
        role = _role(module, local, parameter)
        if known == name or role == "embedding":
            found[known] = role
    return found


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module that owns each parameter, with the parameter's name in it, tied weights once.

    An attention layer owns the projection inside it; a parametrized layer owns what its weight is computed from.
    """
    found: dict[Tensor, tuple[str, nn.Module, str]] = {}
    for name, parameter, module, local in _owned(model):
        found.setdefault(parameter, (name, module, local))
    return {name: (module, local) for name, module, local in found.values()}


def by_shape(module: nn.Module) -> bool:
    """Whether the roles of a module's parameters follow from their shapes, since its type is not known."""
    return not isinstance(module, (*KERNELS, *NORMS, nn.Embedding, nn.EmbeddingBag))


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, str]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name, owner, within = (f"{path}.{local}" if path else local), module, local
            if isinstance(module, ParametrizationList):
                owner_path, _, weight = path.rpartition("parametrizations.")
                whole = local == "original" or max(parameter.shape, default=1) < parameter.numel()  # of several, a length
                owner, within = modules[owner_path.rstrip(".")], weight if whole else ""
            parent_path, _, child = path.rpartition(".")
            parent = modules.get(parent_path)
            if isinstance(parent, nn.MultiheadAttention):
                owner, within = parent, f"{child}.{local}"
            yield name, parameter, owner, within


def _role(module: nn.Module, local: str, parameter: Tensor) -> str:
    if not local:  # a length beside the direction that a parametrization splits it from
        return "other"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, KERNELS):
        return "bias" if "bias" in local else "kernel"
    if "bias" in local.split("_"):
        return "bias"
    long_axes = sum(length > 1 for length in parameter.shape)
    broadcast = parameter.ndim > 2 and parameter.shape[0] == 1
    return "kernel" if parameter.ndim == 2 or (long_axes >= 2 and not broadcast) else "other"
