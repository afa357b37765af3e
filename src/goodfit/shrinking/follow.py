"""Run a model once, and learn what of it can go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from goodfit.dataflow.dependence import Dependence, plain_operations
from goodfit.dataflow.flows import tensors_in
from goodfit.dataflow.rules import rule
from goodfit.shrinking.choice import Choice
from goodfit.shrinking.slicing import bias_of, owner
from goodfit.surgery.running import call_model, quiet

__all__ = ["choose", "follow"]


def follow(model: nn.Module, example: Any) -> Dependence:
    """What all tensors of one run in eval mode depend on."""
    leaves = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    run = Dependence(tensors_in(example), leaves, rule)
    with quiet(model), plain_operations(), _stack_of_modules(model, run.modules), _Reads(run), run:
        outputs = call_model(model, example)
    run.finish(outputs)
    return run


class _Reads(TorchFunctionMode):
    """Sees the ways out of torch that no operation tells of."""

    def __init__(self, run: Dependence) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__") and isinstance(args[0], Tensor):
            self.run.read(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _stack_of_modules(model: nn.Module, stack: list[nn.Module]) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


def choose(model: nn.Module, run: Dependence) -> tuple[Choice, dict[str, str]]:
    """What can go; and which parameters stay whole since more than one place uses them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    holders: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named:
        holders[tensor.data_ptr() if tensor.numel() else id(tensor)].append(name)
    shared = {n: f"is shared: {' = '.join(names)}" for names in holders.values() if len(names) > 1 for n in names}
    numel = {name: tensor.numel() for name, tensor in named}
    for name, used in run.used.items():
        if used > numel.get(name, used):
            shared.setdefault(name, "is shared: used more than once in a run")
    shared |= {name: "is parametrized" for name in numel if ".parametrizations." in f".{name}"}
    unfoldable = {reader.name for reader in run.readers if reader.name and not _can_fold(model, reader.name, shared)}
    return Choice(run, shared, unfoldable), shared


def _can_fold(model: nn.Module, name: str, shared: dict[str, str]) -> bool:
    module, attribute = owner(model, name)
    if name in shared or bias_of(name) in shared or "weight" not in attribute:
        return False
    bias = module._parameters.get(bias_of(attribute))
    return bias is not None or (isinstance(module, nn.Linear | _ConvNd) and attribute == "weight")
