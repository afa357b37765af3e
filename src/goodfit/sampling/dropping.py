"""`gf.mc_dropout`: a model in eval mode with everything that drops switched on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.sampling.draws import own_layers
from goodfit.sampling.kept import modes_kept, noise_kept, seeded
from goodfit.sampling.observe import observing, set_modes
from goodfit.sampling.rows import form_of, inputs_of, is_empty
from goodfit.sampling.survey import Survey, survey

__all__ = ["Dropping", "mc_dropout"]

_BLOCKS: list[Dropping] = []  # those that are open now, in any thread
_ENTERING = threading.Lock()


class Dropping:
    """What `mc_dropout` yields: which modules drop (`on`), and which stay in eval mode though they draw, and why (`off`).

    Both are known once the model has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.survey: Survey | None = None
        self._known: dict[Any, Survey] = {}  # by the form of the inputs, for the blocks within as well
        self._model, self._modules, self._thread = model, set(model.modules()), threading.get_ident()
        self._on = own_layers(model)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Refuse a model that another thread samples from, and go on with what a block around has found."""
        with _ENTERING:
            for block in _BLOCKS:
                if block._thread != self._thread and not self._modules.isdisjoint(block._modules):
                    raise GoodfitError(
                        f"mc_dropout sets the modes of {type(self._model).__name__}, but another thread samples from it now: "
                        "give each thread a model of its own (copy.deepcopy), or let one wait for the other."
                    )
                if block._model is self._model:
                    self._known = block._known
            _BLOCKS.append(self)
        try:
            yield
        finally:
            _BLOCKS.remove(self)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the modules in train mode."""
        return tuple(sorted(self._on)) if self.survey is None else self.survey.on

    @property
    def off(self) -> dict[str, str]:
        """Names of modules that draw in training and stay in eval mode, with the reason."""
        return {} if self.survey is None else dict(self.survey.off)

    def look(self, inputs: Any) -> None:
        """Find all that drops by running the model, unless a block around has, and switch it on."""
        if is_empty(inputs):
            raise GoodfitError("mc_dropout finds what drops by running the model on a batch, got an empty one: give some rows.")
        form = form_of(inputs)
        if form not in self._known:
            self._known[form] = survey(self._model, inputs)
            for line in self._known[form].doubts:
                warnings.warn(f"mc_dropout {line}.", GoodfitWarning, stacklevel=4)
        self.survey = self._known[form]
        self.switch_on()

    def switch_on(self) -> None:
        """Set all modes, whoever changed them."""
        set_modes(self._model, self._on if self.survey is None else self.survey.on)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook of the model: look at its first input, and set the modes anew."""
        if observing():
            return
        if self.survey is None:
            self.look((args, kwargs))
        self.switch_on()


@contextmanager
def mc_dropout(model: nn.Module, example: Any = None, *, seed: int | None = None) -> Iterator[Dropping]:
    """The model in eval mode with everything on that drops in training: calls within the block sample from it.

    Formula:  y ~ f(x; W ∘ mask), with the masks of training and with the statistics that batch norms have stored.
    Shapes:   the example is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords); without
              one, the first batch that the model sees is it. The model runs on a few of its rows a few times more, in eval and
              in train mode (on all rows where it does not take a few), so what drops is found by what it draws: dropout layers
              of torch and goodfit, F.dropout, attention, recurrent layers, stochastic depth, layer drop, masks by hand. Batch
              norms never train. Noise that drops nothing (RReLU, augmentation) stays off and is named in `off` of what the
              block yields; `on` has what drops. This is looked for once: `mc_predict` and blocks on the same model within this
              block go on with it for inputs of the same form, whatever their rows, so leave the model as it is there.
    Numbers:  seed from 0 to 2**63 - 1 makes the draws of the block repeatable and puts torch's, Python's and NumPy's generators
              back behind it; None goes on with torch's generator, as all threads do. Layers with noise of their own go on as if
              they had drawn nothing.
    Errors:   GoodfitError for wrapped, compiled, scripted or lazy models, for one that another thread samples from (other
              models may run there), for an empty example, for one in which nothing drops, and for one whose
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
    _refuse(model, seed)
    dropping = Dropping(model)
    with ExitStack() as stack:
        stack.enter_context(dropping.open())
        stack.enter_context(modes_kept(model))
        if seed is not None:
            stack.enter_context(seeded(model, seed))
        stack.enter_context(noise_kept(model, int(torch.randint(2**62, ())) if seed is None else seed))
        dropping.switch_on()
        stack.callback(model.register_forward_pre_hook(dropping.before_forward, prepend=True, with_kwargs=True).remove)
        if example is not None:
            dropping.look(inputs_of(example))
        yield dropping
        if dropping.survey is None:
            warnings.warn(
                f"mc_dropout: {type(model).__name__} was not called in the block, so only dropout layers of torch and goodfit "
                "were on in its parts; give an example: mc_dropout(model, example).",
                GoodfitWarning,
                stacklevel=3,
            )


def _refuse(model: nn.Module, seed: Any) -> None:
    if not isinstance(model, nn.Module):
        raise GoodfitError(f"mc_dropout takes a torch.nn.Module, got a {type(model).__name__}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise GoodfitError(f"mc_dropout.seed must be an integer from 0 to 2**63 - 1, or None, got {seed!r}.")
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
