"""skorch: a callback that regularizes a net's training, hears its validation, and ends it with the best weights.

net = NeuralNetClassifier(Module, callbacks=[Regularization("L2(1e-4), Dropout(0.3), EarlyStopping(5)")])
net.fit(X, y)
"""

from __future__ import annotations

import secrets
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from goodfit.adapters.host import imported, monitored, refuse_clipping, refuse_second
from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.data import peek
from goodfit.hooks import lacking
from goodfit.phases import Build, Epoch, Finish, Regularizer
from goodfit.run import Run

__all__ = ["Regularization"]

_skorch = imported("skorch", "skorch")


class Regularization(_skorch.callbacks.Callback):  # type: ignore[misc, name-defined]
    """One cocktail on the `module_` of a skorch net.

    monitor: the column of the history that is the score; lower is better unless EarlyStopping says mode="max". example: an
    input batch for insertion, else the first of the training data. seed: of all noise. The run is at `net.goodfit_.run`; its
    loss function is the net's. `Checkpoint(f_goodfit=...)` saves its state, and `LoadInitState` behind it loads that. A second
    one, which may only stop, is at `net.goodfit2_`.
    """

    def __init__(
        self,
        cocktail: Cocktail | Regularizer | str,
        *,
        monitor: str = "valid_loss",
        example: Any = None,
        seed: int = 0,
    ) -> None:
        self.cocktail = cocktail
        self.monitor = monitor
        self.example = example
        self.seed = seed
        self.run_: Run | None = None
        self.net_: Any = None
        self.state_: dict[str, Tensor] = {}
        self.mark_ = ""
        self.held_: list[Optimizer] = []
        self.data_: Any = None
        self.view_ = ExitStack()
        self.epochs_, self.saved_, self.told_, self.known_, self.resumed_ = 0, False, False, False, False

    @property
    def run(self) -> Run:
        """The run of the training that is on, or was last."""
        if self.run_ is None:
            raise GoodfitError(
                "A run begins with the training: call net.fit(X, y), or regularization.prepare(net, X) before it."
            )
        return self.run_

    @property
    def stopped(self) -> str:
        """Why the training was stopped, "" where it was not."""
        return self.run.stopped

    def prepare(self, net: Any, X: Any = None, y: Any = None) -> None:
        """Make the run of an initialized net; call it yourself to load weights that were saved with inserted layers."""
        mix = as_cocktail(self.cocktail)
        first = self._join(net, mix)
        model = getattr(net.module_, "_orig_mod", net.module_)
        optimizers = {name: one for name, one in vars(net).items() if isinstance(one, Optimizer)}
        before, held = self.run_, list(optimizers.values())
        if before is not None and before.model is model and before.cocktail == mix and self.held_ == held:
            return
        self._refuse(net, mix)
        state = self._state(net, model)
        if before is not None:
            before.detach()
        example = self._example(net, X, y) if any(mix.of(Build)) else None
        self.run_ = Run(mix, model, loss=partial(net.get_loss, training=True), example=example, seed=first.seed)
        if lacking(model, held):
            _deal(net, optimizers)
        self.run_.attach(*held)
        self.net_, self.held_, self.mark_ = net, held, vars(model).setdefault("_goodfit", secrets.token_hex(8))
        self.known_ = state.keys() == self.run_.state_dict().keys()
        if self.known_:  # also under other numbers
            self.run_.load_state_dict(state)

    def _join(self, net: Any, mix: Cocktail) -> Regularization:
        """Take a name of its own in the net, and tell the first, by whose seed inserted layers draw."""
        if self.net_ is not None and self.net_ is not net:
            raise GoodfitError("A Regularization serves one net, and this one has another; make one for each net.")
        beside = [one for _, one in net.callbacks_ if isinstance(one, Regularization)]
        place = beside.index(self)
        name = f"goodfit{place + 1}" if place else "goodfit"
        if place:
            refuse_second(as_cocktail(beside[0].cocktail), mix)
            saving = [one for _, one in net.callbacks_ if getattr(one, "f_goodfit", None)]
            forgetful = next((one for one in saving if not getattr(one, f"f_{name}", None)), None)
            if forgetful is not None:
                raise GoodfitError(
                    f"{type(forgetful).__name__}(f_goodfit=...) saves the first Regularization alone, and this one would begin "
                    f"anew where it is resumed; save both: f_{name}='{name}.pt'."
                )
        setattr(net, f"{name}_", self)
        return beside[0]

    def _refuse(self, net: Any, mix: Cocktail) -> None:
        if any(isinstance(one, _skorch.callbacks.GradientNormClipping) for _, one in net.callbacks_):
            refuse_clipping(mix, "GradientNormClipping", "leave the callback out")
        keeper = next((one for one in mix.of(Finish) if getattr(one, "restore", True)), None)
        if keeper is not None and any(getattr(one, "load_best", False) for _, one in net.callbacks_):
            raise GoodfitError(
                f"{keeper} gives the weights to keep, and so does Checkpoint(load_best=True), by its own measure; leave it out."
            )

    def _state(self, net: Any, model: Any) -> dict[str, Tensor]:
        """What a training that goes on has been through, in this very module: also a copied one bears its mark."""
        if not net.history:
            return {}
        state = self.state_ if self.run_ is None else self.run_.state_dict()
        if state and vars(model).get("_goodfit") != self.mark_:
            raise GoodfitError(
                "The training would go on in another module_ than that of its state; begin anew, by net.initialize() or fit."
            )
        return state

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        self.view_.close()  # where an error in a validation left it open
        self.prepare(net, X, y)
        if not self.resumed_:
            self.run.go_on()
        self.epochs_, self.data_ = 0, None

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        self.data_, self.saved_ = dataset_train, False
        if len(net.history) > 1 and not self.known_:
            warnings.warn(
                f"The training goes on, and its regularizers begin anew: {self.run.cocktail}; to resume, save their state, by "
                "Checkpoint(f_goodfit='goodfit.pt').",
                GoodfitWarning,
                stacklevel=2,
            )
        self.known_ = True
        if self.stopped:  # by a checkpoint: a training that is run again was asked anew
            net.history.pop()
            raise KeyboardInterrupt
        deaf = next(self.run.cocktail.of(Epoch), None)
        if deaf is not None and dataset_valid is None and self.monitor == "valid_loss":
            raise GoodfitError(
                f"{deaf} needs a validation, and the net has train_split=None; give it a train_split, as in "
                "train_split=ValidSplit(5), or name another column of the history, as in monitor='train_loss'."
            )

    def on_batch_begin(self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        if not training:
            self.view_.enter_context(self.run.view(self._batches(net)))

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        with self.view_:
            self._check(net)

    def _check(self, net: Any) -> None:
        self.epochs_ += 1
        if not any(self.run.cocktail.of(Epoch)):
            return
        row = {name: value for name, value in net.history[-1].items() if not isinstance(value, bool | list)}
        score = monitored(row, self.monitor, "the history, before Regularization,")
        if self.saved_ and not self.told_:
            self.told_ = True
            warnings.warn(
                "The checkpoint of this epoch was saved before its score was heard, so what resumes from it has heard one "
                "check less; put Checkpoint behind Regularization.",
                GoodfitWarning,
                stacklevel=2,
            )
        if not self.run.epoch(score, train_loss=row.get("train_loss")):
            if net.verbose:
                print(f"Stopping: {self.stopped}")
            raise KeyboardInterrupt  # which is how skorch's own early stopping ends a training

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        self.view_.close()
        try:
            self.run.finish(self._batches(net))
        except GoodfitError:
            if self.epochs_:  # else it was interrupted before there was anything to give back
                raise
        self.data_, self.resumed_ = None, False

    def state_dict(self) -> dict[str, Tensor]:
        """All that the run must remember, for `Checkpoint(f_goodfit=...)`."""
        self.saved_ = True
        return self.run.state_dict()

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken; the numbers of the cocktail are those of now."""
        self.run.load_state_dict(saved)
        self.known_ = self.resumed_ = True

    def __getstate__(self) -> dict[str, Any]:
        """A copied optimizer has lost its hooks, so the run of a copied net is made again, from its state."""
        state = self.state_ if self.run_ is None else {name: t.cpu() for name, t in self.run_.state_dict().items()}
        return {**vars(self), "net_": None, "run_": None, "state_": state, "held_": [], "data_": None, "view_": ExitStack()}

    def _batches(self, net: Any) -> Any:
        return None if self.data_ is None else net.get_iterator(self.data_, training=False)

    def _example(self, net: Any, X: Any, y: Any) -> Any:
        x = self.example
        if x is None:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
                x, _ = _skorch.dataset.unpack_data(peek(net.get_iterator(net.get_dataset(X, y), training=False)))
        return _skorch.utils.to_tensor(x, device=net.device)


def _deal(net: Any, optimizers: dict[str, Optimizer]) -> None:
    """Give the optimizers the parameters of inserted layers too, as the net deals them; schedulers hold these very objects."""
    net.initialize_optimizer()
    for name, one in optimizers.items():
        dealt = getattr(net, name).param_groups
        if len(dealt) == len(one.param_groups):
            for group, other in zip(one.param_groups, dealt, strict=True):
                group["params"] = other["params"]
        else:  # a pattern of the net names inserted layers
            one.param_groups[:] = dealt
        setattr(net, name, one)
