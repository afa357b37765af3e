"""`gf.shrink`: remove what is exactly zero from a model, and prove that it still says the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from goodfit.errors import GoodfitError
from goodfit.surgery.choice import Choice
from goodfit.surgery.cost import flops, milliseconds, size
from goodfit.surgery.dependence import Dependence, plain_attention, tensors_in
from goodfit.surgery.inputs import ignored, take
from goodfit.surgery.insert import refuse_wrappers
from goodfit.surgery.proof import answers, largest_error, quiet, shuffled
from goodfit.surgery.rules import rule
from goodfit.surgery.shrunk import BENIGN, Shrunk, kept_zeros, what_went
from goodfit.surgery.slicing import Snapshot, bias_of, cut, owner
from goodfit.surgery.trace import call_model

__all__ = ["shrink"]

_Family = tuple[int, ...]


def shrink(model: nn.Module, example: Any) -> Shrunk:
    """Remove units, filters, heads and input features that are exactly zero; in eval mode the model then says the same.

    Formula:  W₂ f(W₁x + b₁) + b₂ = W₂[:, A] f(W₁[A]x + b₁[A]) + (b₂ + W₂[:, Z] f(b₁[Z])), where the rows Z of W₁ are zero.
    Shapes:   the example is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords); inputs
              and outputs of the model keep their shapes.
    Ranges:   weights count as zero at exactly 0. The largest difference of outputs on the example, and on the example with
              its numbers in another order, relative to the largest output, is at most 1e-10 in float64, 1e-5 in float32,
              1e-2 in float16 and 5e-2 in bfloat16. Equality is claimed for finite inputs in eval mode.
    Errors:   GoodfitError, with the model untouched, for wrapped, compiled, scripted, lazy, sparse or quantized models, for a
              model that does not run on the example, and if there are zero units but none can go. A unit that must stay
              while others go is told in `kept`, with the reason.
    Source:   He, Zhang & Sun, Channel Pruning, 2017, arXiv:1707.06168, for what goes together; here nothing is approximated,
              and constants that zero units still emit are folded into the next bias or, before padding, into one channel.

    Parameters that were cut are new objects: make the optimizer anew. `result.model is model`.

    >>> first = nn.Linear(2, 3)
    >>> _ = nn.init.zeros_(first.weight[1].detach())
    >>> result = shrink(nn.Sequential(first, nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2))
    >>> result.parameters
    (13, 9)
    """
    _refuse(model)
    tests = [example, shuffled(example, torch.Generator().manual_seed(0))]
    try:
        truth = [answers(model, tests[0])]
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise GoodfitError(
            f"{type(model).__name__} must run on the example in eval mode, got {type(error).__name__}: {first}; give one input "
            "batch as the model takes it: a tensor, a tuple of positions or a dict of keywords."
        ) from error
    try:
        truth.append(answers(model, tests[1]))
    except Exception:
        tests.pop()  # a model may well refuse numbers in another order
    before = Snapshot(model)
    try:
        run = _follow(model, example)
        choice, shared = _choice(model, run)
        before.restore()
        search = _Search(model, choice, shared, before, lambda: _gap(model, tests, truth))
        error = search.largest()
    except BaseException:
        before.restore()
        raise
    return _told(model, example, search, error, before)


def _gap(model: nn.Module, tests: list[Any], truth: list[list[Tensor]]) -> tuple[float, float]:
    return max(largest_error(known, answers(model, test)) for test, known in zip(tests, truth, strict=True))


def _told(model: nn.Module, example: Any, search: _Search, error: float, before: Snapshot) -> Shrunk:
    after, choice = Snapshot(model), search.choice
    removed = what_went(model, choice, search.inputs)
    kept = kept_zeros(choice, search.reasons)
    if not removed and any(reason not in BENIGN for _, _, reason in kept):
        before.restore()
        shown = "; ".join(f"{count} in {name}: {reason}" for name, count, reason in kept[:5])
        more = f" and {len(kept) - 5} more" if len(kept) > 5 else ""
        raise GoodfitError(f"shrink found zero units in {type(model).__name__} but none can be removed: {shown}{more}.")
    measured: dict[str, list[Any]] = defaultdict(list)
    rounds = 3 if removed else 1
    for turn in range(2 * rounds):
        (before if turn % 2 == 0 else after).restore()
        if turn < 2:
            measured["parameters"].append(size(model))
            measured["flops"].append(flops(model, example))
        measured["before" if turn % 2 == 0 else "after"].append(milliseconds(model, example))
    latency = tuple(sorted(measured[when])[rounds // 2] for when in ("before", "after"))
    inputs = {name.rpartition(".")[0]: tuple(taken.tolist()) for name, taken in search.inputs.items()}
    pairs: Any = [tuple(measured[what]) for what in ("parameters", "flops")]
    return Shrunk(model, pairs[0], pairs[1], (latency[0], latency[1]), tuple(removed), tuple(kept), inputs, error)


def _refuse(model: nn.Module) -> None:
    refuse_wrappers(model, "shrink")
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule) or "quantized" in kind.__module__ or hasattr(module, "_orig_mod"):
            raise GoodfitError(f"shrink edits plain layers, got the {kind.__name__} {name!r}: shrink first, convert afterwards.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if is_lazy(tensor):
            raise GoodfitError(f"shrink needs weights that are there, but {name} is lazy: run the model on a batch once.")
        if not plain or type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
            raise GoodfitError(f"shrink cuts plain dense tensors, got {name} as a {type(tensor).__name__} ({tensor.layout}).")


def _follow(model: nn.Module, example: Any) -> Dependence:
    leaves = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    run = Dependence(tensors_in(example), leaves, rule)
    with quiet(model), plain_attention(), _stack_of_modules(model, run.modules), run:
        outputs = call_model(model, example)
    run.finish(outputs)
    return run


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


def _choice(model: nn.Module, run: Dependence) -> tuple[Choice, dict[str, str]]:
    """What can go; and which parameters stay whole since more than one place uses them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    holders: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named:
        holders[tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)].append(name)
    shared = {n: f"is tied: {' = '.join(names)}" for names in holders.values() if len(names) > 1 for n in names}
    numel = {name: tensor.numel() for name, tensor in named}
    for name, used in run.used.items():
        if used > numel.get(name, used):
            shared.setdefault(name, "is used more than once in a run (a shared layer)")
    shared |= {name: "is parametrized" for name in numel if ".parametrizations." in f".{name}"}
    unfoldable = {reader.name for reader in run.readers if reader.name and not _can_fold(model, reader.name, shared)}
    return Choice(run, shared, unfoldable), shared


def _can_fold(model: nn.Module, name: str, shared: dict[str, str]) -> bool:
    module, attribute = owner(model, name)
    if name in shared or bias_of(name) in shared or "weight" not in attribute:
        return False
    bias = module._parameters.get(bias_of(attribute))
    return bias is not None or (isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and attribute == "weight")


class _Search:
    """Cuts as much as the proof accepts: all; else without what a view laid out; else by halves."""

    def __init__(
        self,
        model: nn.Module,
        choice: Choice,
        shared: dict[str, str],
        before: Snapshot,
        gap: Callable[[], tuple[float, float]],
    ) -> None:
        self.model, self.choice, self.shared, self.before, self.gap = model, choice, shared, before, gap
        self.inputs: dict[str, Tensor] = {}
        self.trials, self.with_inputs = 0, True
        self.reasons: Counter[str] = Counter()

    def largest(self) -> float:
        """Leave the model with the largest cut that holds, and return the error of its proof."""
        families = list(self.choice.families)
        error = self._attempt([])
        if error is not None:
            return error
        laid = torch.zeros(len(self.choice.label), dtype=torch.bool)
        for rectangle in self.choice.run.rectangles.values():
            laid[self.choice.label[rectangle.ids]] = True
        plain = [f for f in families if not laid[self.choice.families[f]].any()]
        accepted = self._grow([], plain)
        accepted = self._grow(accepted, [f for f in families if f not in set(plain)])
        error = self._attempt(self._others(accepted))
        if error is None:
            self.with_inputs = False
            error = self._attempt(self._others(accepted))
        if error is None:
            self.choice.settle(families, self._reason)
            self.before.restore()
        return error or 0.0

    _reason = "fails the proof: the code of the model fixes its size"

    def _others(self, accepted: Iterable[_Family]) -> list[_Family]:
        return [f for f in self.choice.families if f not in set(accepted)]

    def _grow(self, accepted: list[_Family], more: list[_Family]) -> list[_Family]:
        if not more or self.trials > 64:
            return accepted
        if self._attempt(self._others([*accepted, *more])) is not None:
            return [*accepted, *more]
        if len(more) == 1:
            return accepted
        half = len(more) // 2
        return self._grow(self._grow(accepted, more[:half]), more[half:])

    def _attempt(self, banned: list[_Family]) -> float | None:
        """The error of the proof of one cut, None where it fails; the model is then as before."""
        self.trials += 1
        self.before.restore()
        self.choice.settle(banned, self._reason)
        self.inputs = ignored(self.model, self.choice, self.shared) if self.with_inputs else {}
        if not self.choice.removed.any() and not self.inputs:
            return 0.0
        try:
            cut(self.model, self.choice)
            take(self.model, self.inputs)
            over, error = self.gap()
        except Exception:
            over = float("inf")
        if over <= 1:
            return error
        self.before.restore()
        return None
