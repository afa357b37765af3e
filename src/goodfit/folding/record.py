"""One run of a model in eval mode: which operation reads which tensor, in which module.

A tensor is told by the memory it lies in, so a view is followed for what it is, and every reader is seen, functions and writes
in place among them. All tensors of the run are held until it was read, so that no memory is used twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from goodfit.dataflow.flows import Call, storage, tensors_in
from goodfit.surgery.insert import user_hooks
from goodfit.surgery.running import call_model, must_run, quiet

__all__ = ["Operation", "Record", "record", "span"]


@dataclass(eq=False)
class Operation:
    """One operation, and the modules that were running, from the outermost."""

    call: Call
    modules: tuple[nn.Module, ...]


class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What happened in one run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[nn.Module] = []
        self.operations: list[Operation] = []
        self.makers: dict[int, Operation] = {}
        self.readers: dict[int, list[tuple[Operation, Tensor]]] = defaultdict(list)
        self.runs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.seen: dict[int, str] = {}  # memory → who else sees it
        self.functions: list[nn.Module] = []  # the modules that call batch_norm as a function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out)
        operation = Operation(call, tuple(self.stack))
        self.operations.append(operation)
        read = {storage(t) for t in call.inputs}
        view = call.outputs and not func._schema.is_mutable and all(storage(t) in read for t in call.outputs)
        for tensor in call.inputs:
            if not view:
                self.readers[storage(tensor)].append((operation, tensor))
        for tensor in call.outputs:
            self.makers.setdefault(storage(tensor), operation)
        return out

    def reading(self, tensor: Tensor) -> list[Operation]:
        """The operations that compute with a tensor or a part of it, each as often as it does."""
        first, last = span(tensor)
        found = []
        for operation, other in self.readers[storage(tensor)]:
            start, end = span(other)
            if start < last and first < end:
                found.append(operation)
        return found

    def show(self, value: Any, who: str) -> None:
        """Remember that somebody else sees these tensors."""
        for tensor in tensors_in(value):
            self.seen.setdefault(storage(tensor), who)


def record(model: nn.Module, example: Any) -> Record:
    """Run the model on the example."""
    run = Record()
    with quiet(model), _modules_noted(model, run), _Functions(run), run:
        try:
            outputs = call_model(model, example)
        except Exception as problem:
            raise must_run(model, problem) from problem
    run.show(outputs, "is an output of the model")
    for name, module in model.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        run.show(held, f"is kept by {name or 'the model'}")
    return run


class _Functions(TorchFunctionMode):
    """Sees the ways out of torch that no operation tells of, and which module calls batch_norm as a function."""

    def __init__(self, run: Record) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], Tensor):
            self.run.show(args[0], "is read by Python")
        by_batch = args[5] if len(args) > 5 else (kwargs or {}).get("training", False)
        if name == "batch_norm" and not by_batch and self.run.stack:
            self.run.functions.append(self.run.stack[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def _modules_noted(model: nn.Module, run: Record) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}
    hooked = {module for module in names if user_hooks(module)}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        run.stack.append(module)
        if module in hooked:
            run.show((args, kwargs), f"is seen by a hook of {names[module] or 'the model'}")

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run.stack.pop()
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if first is not None and isinstance(output, Tensor):
            run.runs[module].append((first, output))
        if module in hooked:
            run.show((args, kwargs, output), f"is seen by a hook of {names[module] or 'the model'}")

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        yield


def span(tensor: Tensor) -> tuple[int, int]:
    """The part of its memory that a tensor reaches over, in bytes."""
    reach = (
        1 + sum(int((n - 1) * stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    )
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + reach * tensor.element_size()
