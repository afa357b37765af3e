"""What a model's tensors depend on, seen in one run on an example, operation by operation.

Beside each tensor two things are carried. Its *taint* says which elements depend on the input at all; the others are constants
whose value the run shows. Its *layers* say which slices of which parameters each element stands and falls with. Both are
compact: of the tensor's rank, with length 1 where they do not vary. How an operation hands them on is in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from goodfit.dataflow.atoms import Slices, compact, varying
from goodfit.dataflow.flows import INPUT, Call, Flow, Reader, Rectangle, storage, tensors_in

__all__ = ["Dependence", "plain_operations"]


class Dependence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows one run. `given` are the tensors of the example, `leaves` the parameters and buffers by identity."""

    def __init__(self, given: Iterable[Tensor], leaves: dict[int, str], rule: Callable[[Dependence, Call], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rule, self.leaves, self.slices = rule, leaves, Slices()
        self.flows: dict[int, Flow] = {}
        self.by_storage: dict[int, list[Flow]] = {}
        self.readers: list[Reader] = []
        self.rectangles: dict[bytes, Rectangle] = {}
        self.used: dict[str, int] = {}
        self.modules: list[nn.Module] = []
        self.leaked = False  # a number of the input has become a number of Python
        self.told: list[int] = []  # the tensors that Python has read
        self.attending: set[nn.Module] = set()
        self.events: list[list[int]] = []
        self.makers: dict[int, list[int]] = {}
        self.needs: list[tuple[int, Callable[[], object]]] = []
        for tensor in given:
            self.put(tensor, fed=True, taint=torch.ones((1,) * tensor.ndim, dtype=torch.bool), leaf=INPUT)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out)
        self.events.append([id(t) for t in call.inputs])
        self.rule(self, call)
        for tensor in call.outputs:
            if id(tensor) not in self.flows:
                self.put(tensor)
        written = {id(f): f for t in call.outputs for f in self.by_storage.get(storage(t), [])} if call.inplace else {}
        for tensor in [*call.outputs, *(f.tensor for f in written.values())]:
            self.makers.setdefault(id(tensor), []).append(len(self.events) - 1)
        return out

    def put(self, tensor: Tensor, fed: bool = False, taint: Tensor | None = None, **known: Any) -> Flow:
        """Remember a tensor, or know it anew after it was written."""
        taint = torch.zeros((1,) * tensor.ndim, dtype=torch.bool) if taint is None else taint
        flow = Flow(tensor, fed, taint, **known)
        aliases = self.by_storage.setdefault(storage(tensor), [])
        if id(tensor) in self.flows:
            for other in aliases:
                other.stale, other.fed = True, other.fed or fed
                other.taint = other.taint | taint.any()
            aliases[:] = [f for f in aliases if f.tensor is not tensor]
        aliases.append(flow)
        self.flows[id(tensor)] = flow
        return flow

    def of(self, tensor: Tensor) -> Flow:
        """What is known of a tensor; a parameter gets its slices when it is first met."""
        flow = self.flows.get(id(tensor))
        if flow is None:
            name = self.leaves.get(id(tensor), "")
            aliases = [] if name else self.by_storage.get(storage(tensor), [])
            fed = any(f.fed for f in aliases)
            flow = self.put(tensor, fed, torch.full((1,) * tensor.ndim, fed), leaf=name)
            if name and tensor.is_floating_point():
                for axis, size in enumerate(tensor.shape):
                    if size > 1:
                        shape = [size if d == axis else 1 for d in range(tensor.ndim)]
                        flow.layers.append(self.slices.new(name, axis, size).view(shape))
        if flow.stale:
            for layer in flow.layers:
                self.slices.pin(layer, "is written through a view")
        return flow

    def consume(self, tensor: Tensor) -> Flow:
        """The same, for an operation that computes with it; a parameter that several read is shared."""
        flow = self.of(tensor)
        if flow.leaf:
            own = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            self.used[flow.leaf] = self.used.get(flow.leaf, 0) + torch.Size(own).numel()
        return flow

    def unlevel(self, flow: Flow, dims: Iterable[int], zero: bool = False) -> Tensor:
        """The taint of what is computed across dimensions.

        A constant that varies along them (at a border, say), or whose number of terms counts, is one for this size of input
        only: so it counts as tainted, unless it is level there, and zero where `zero` asks it.
        """
        taint, value = flow.taint, flow.tensor
        for dim in dims:
            taint = taint.any(dim, keepdim=True)
        if not value.is_floating_point() or bool(taint.all()):
            return taint
        low, high = value, value
        for dim in dims:
            low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
        uneven = (high - low > 16 * torch.finfo(value.dtype).eps * high.abs()) | (high.isnan())
        return compact(taint | uneven.cpu() | (zero & (high != 0)).cpu()) if flow.fed else taint

    def hold(self, layer: Tensor, dims: Iterable[int], reason: str, if_live: bool = False) -> list[Tensor]:
        """Slices must not go along these dimensions alone: what varies beside them goes whole, the rest stays.

        Returns the layer that is left, if any. `if_live` asks it only if what is computed reaches an output.
        """
        across = varying(layer) & set(dims)
        first = layer
        for dim in across:
            first = first.narrow(dim, 0, 1)
        if if_live:
            self.needs.append((len(self.events) - 1, partial(self.hold, layer, across, reason)))
        elif across and varying(first):
            self.slices.tie(layer, first)
        elif across:
            self.slices.pin(layer, reason)
        return [first] if varying(first) else []

    def lay_out(self, ids: Tensor, even: bool = False) -> None:
        """Remember that a view laid slices out in a rectangle."""
        key = bytes(str((tuple(ids.shape), even)), "ascii") + ids.contiguous().numpy().tobytes()
        self.rectangles.setdefault(key, Rectangle(ids, even, self.modules[-1] if self.modules else None))

    def read(self, tensor: Tensor) -> None:
        """Python reads a tensor: what made it counts as an output, and numbers from now on may come from the input."""
        self.told.append(id(tensor))
        self.leaked |= self.of(tensor).fed

    def finish(self, outputs: Any) -> None:
        """Pin what the model returns, and ask of what reaches an output what it needs."""
        waiting = [*self.told, *(id(t) for t in tensors_in(outputs))]
        for flow in map(self.of, tensors_in(outputs)):
            for layer in flow.layers:
                self.slices.pin(layer, "is an output of the model")
        live: set[int] = set()
        while waiting:
            for event in self.makers.get(waiting.pop(), []):
                if event not in live:
                    live.add(event)
                    waiting.extend(self.events[event])
        for event, need in self.needs:
            if event in live:
                need()
        for reader in self.readers:
            reader.live = reader.event in live
        for held in (self.flows, self.by_storage, self.makers):
            held.clear()
        self.needs, self.events = [], []


@contextmanager
def plain_operations() -> Iterator[None]:
    """Attention and recurrence as products and softmax, which rules exist for, instead of fused operations."""
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # its context manager also sets TF32, with a warning where the machine has none
        stack.callback(torch._C._set_mkldnn_enabled, fused)
        torch._C._set_mkldnn_enabled(False)
        yield
