"""`gf.mc_dropout`: a model in eval mode with everything that drops switched on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.sampling.kept import fresh, modes_kept, noise_kept, seeded
from goodfit.sampling.observe import observing, set_modes
from goodfit.sampling.survey import Survey, own_layers, survey
from goodfit.surgery.running import call_model

__all__ = ["Dropping", "mc_dropout"]


class Dropping:
    """What `mc_dropout` yields: which modules drop (`on`), and which stay in eval mode though they draw, and why (`off`).

    Both are known once the model has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.survey: Survey | None = None
        self._model = model
        self._on = own_layers(model)
        set_modes(model, self._on)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the modules in train mode."""
        return tuple(sorted(self._on)) if self.survey is None else self.survey.on

    @property
    def off(self) -> dict[str, str]:
        """Names of modules that draw in training and stay in eval mode, with the reason."""
        return {} if self.survey is None else dict(self.survey.off)

    def look(self, call: Callable[[], Any]) -> Survey:
        """Find all that drops by running the model, and switch it on."""
        found = survey(self._model, call)
        for line in found.doubts:
            warnings.warn(f"mc_dropout {line}.", GoodfitWarning, stacklevel=4)
        self.survey, self._on = found, set(found.on)
        set_modes(self._model, self._on)
        return found

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook of the model: look at its first input, and set the modes anew, whoever changed them."""
        if observing():
            return
        if self.survey is None:
            self.look(lambda: model(*fresh(args), **fresh(kwargs)))
        set_modes(model, self._on)


@contextmanager
def mc_dropout(model: nn.Module, example: Any = None, *, seed: int | None = None) -> Iterator[Dropping]:
    """The model in eval mode with everything on that drops in training: calls within the block sample from it.

    Formula:  y ~ f(x; W ∘ mask), with the masks of training and with the statistics that batch norms have stored.
    Shapes:   the example is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords); without
              one, the first batch that the model sees is it. The model runs on it a few times more, in eval and in train mode,
              so what drops is found by what it draws: dropout layers of torch and goodfit, F.dropout, attention, recurrent
              layers, stochastic depth, layer drop, masks by hand. Batch norms never train. Noise that drops nothing (RReLU,
              augmentation) stays off and is named in `off` of what the block yields; `on` has what drops.
    Numbers:  seed >= 0 makes the draws of the block repeatable and puts torch's, Python's and NumPy's generators back behind
              it; None goes on with torch's generator. Layers with noise of their own go on as if they had drawn nothing.
    Errors:   GoodfitError for wrapped, compiled, scripted or lazy models, for one in which nothing drops, and for one whose
              dropout cannot be on while the rest is in eval mode: where a module that drops updates buffers, returns another
              form of output in training, or asks another module whether it trains. GoodfitWarning for a module that might
              drop, yet cannot be followed, and for a block in which the model was never called. A branch that the example
              does not take is known only by the classes of its layers.
    Source:   Gal and Ghahramani 2016, Dropout as a Bayesian approximation, arXiv:1506.02142. Modes come back whatever happens.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    >>> with mc_dropout(model, seed=0) as dropping:
    ...     outputs = [model(torch.ones(2, 4)) for _ in range(10)]
    >>> dropping.on, model.training
    (('3',), True)
    """
    _refuse(model)
    with ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        if seed is not None:
            stack.enter_context(seeded(model, seed))
        stack.enter_context(noise_kept(model, int(torch.randint(2**62, ())) if seed is None else seed))
        dropping = Dropping(model)
        stack.callback(model.register_forward_pre_hook(dropping.before_forward, prepend=True, with_kwargs=True).remove)
        if example is not None:
            dropping.look(lambda: call_model(model, fresh(example)))
        yield dropping
        if dropping.survey is None:
            warnings.warn(
                f"mc_dropout: {type(model).__name__} was not called in the block, so only dropout layers of torch and goodfit "
                "were on in its parts; give an example: mc_dropout(model, example).",
                GoodfitWarning,
                stacklevel=3,
            )


def _refuse(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"mc_dropout takes a torch.nn.Module, got a {type(model).__name__}.")
    for name, module in model.named_modules():
        kind = type(module).__name__
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule | DataParallel | DistributedDataParallel):
            shown = f"compiled {kind}" if compiled else kind
            raise GoodfitError(
                f"mc_dropout must see each operation of plain modules, got a {shown}{f' {name!r}' if name else ''}: give the "
                "model as it was before it was wrapped, compiled or scripted."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise GoodfitError(f"mc_dropout needs weights that are there, but {name} is lazy: run the model on a batch once.")
