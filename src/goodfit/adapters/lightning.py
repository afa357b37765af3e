"""Lightning: one callback that builds before the optimizer is made, acts beside its steps, stops, and restores the best.

from goodfit.adapters.lightning import Regularization

Trainer(callbacks=[Regularization("L2(1e-4), Dropout(0.3), EarlyStopping(5)", monitor="valid_loss", example=x)])
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from itertools import count
from typing import Any

from torch import nn

from goodfit.adapters.host import (
    Hosted,
    beside_training,
    imported,
    monitored,
    refuse_clipping,
    refuse_sharded,
    submodule,
)
from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError, GoodfitWarning
from goodfit.fitting.data import mapped
from goodfit.phases import Build, Epoch, Finish, Gradient, Regularizer

__all__ = ["Regularization"]

_lightning = imported("lightning", "lightning.pytorch", "pytorch_lightning")
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_UNPLACED = count(-1, -1)  # until `setup` no two keys are equal, for which Lightning would blame the keys
_AVERAGERS = (_lightning.callbacks.WeightAveraging, _lightning.callbacks.StochasticWeightAveraging)


class Regularization(Hosted, _lightning.Callback):  # type: ignore[misc, name-defined]
    """A cocktail in a Lightning Trainer.

    monitor: the logged validation metric that Epoch regularizers hear. model: the submodule to regularize, by name; without
    one it is the LightningModule where that has a `forward`, else its only child with weights. example: one input batch of it
    for what is inserted, else `example_input_array`. loss, task, seed: as in `Run`. `run` is there from `setup` on.
    """

    _made = "it is made where trainer.fit sets up its callbacks"

    def __init__(self, cocktail: Cocktail | Regularizer | str, **settings: Any) -> None:
        super().__init__(cocktail, **settings)
        self._names: set[str] = set()
        self._place: int | None = None
        self._view = ExitStack()
        self.heard = self.finished = self._fitting = False

    @property
    def state_key(self) -> str:
        """Apart for several callbacks on one metric, and the same for another patience."""
        return self._generate_state_key(monitor=self.monitor, place=next(_UNPLACED) if self._place is None else self._place)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        beside = [one for one in trainer.callbacks if isinstance(one, Regularization)]
        if beside.count(self) > 1:
            raise GoodfitError("The same Regularization is in callbacks=[...] twice; list it once.")
        self._place, self._fitting = beside.index(self), stage == "fit"
        self._join(beside)
        if self._fitting:
            self._refuse(trainer, pl_module)
            if not any(isinstance(one, _Restore) and one.owner is self for one in trainer.callbacks):
                trainer.callbacks.append(_Restore(self))
        if self._run is None:
            self._begin(trainer, pl_module)
            self._names = {name for name, _ in self.run.model.named_parameters()}

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """On the device and in the precision of the training, which Lightning would see to only later."""
        part = self._part(pl_module)
        example = pl_module.example_input_array if self.example is None else self.example
        self._refuse_unfed(example)
        device = trainer.strategy.root_device
        trainer.precision_plugin.convert_module(pl_module.to(device))
        if example is not None:
            example = trainer.precision_plugin.convert_input(mapped(example, lambda t: t.to(device)))
        self._make(part, example)

    def _part(self, pl_module: Any) -> nn.Module:
        if self.model is not None:
            return submodule(pl_module, self.model)
        if type(pl_module).forward is not _lightning.LightningModule.forward:
            return pl_module
        weighty = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        if len(weighty) == 1 and not pl_module._parameters:
            return weighty[0]
        if any(self.cocktail.of(Build)):
            raise GoodfitError(
                f"{type(pl_module).__name__} has no forward that the example could go through; give it one, or say which "
                "of its parts is the model: Regularization(..., model='net')."
            )
        return pl_module

    def _refuse(self, trainer: Any, pl_module: Any) -> None:
        sharding = next((kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDED), None)
        if self._attached or (self._run is not None and self._run.model is not self._part(pl_module)):
            raise GoodfitError("A Regularization serves one module and one trainer.fit, and this one has; make a new one.")
        refuse_sharded(pl_module, sharding)
        self._refuse_averager(trainer.callbacks)
        if trainer.gradient_clip_val:
            setting = f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
            refuse_clipping(self.cocktail, setting, "leave gradient_clip_val out")
        twice = next((one for one in self.cocktail.of(Gradient) if one.twice), None)
        if twice is not None and trainer.accumulate_grad_batches > 1:
            raise GoodfitError(
                f"{twice} takes the gradient of a step twice, and Lightning would take only the last of its "
                f"{trainer.accumulate_grad_batches} batches again; leave accumulate_grad_batches out."
            )
        deaf = next(self.cocktail.of(Epoch), None)
        if deaf is not None and not trainer.enable_validation:
            raise GoodfitError(f"{deaf} hears the validation, and there is none; give a validation_step and val_dataloaders.")

    def _refuse_averager(self, callbacks: list[Any]) -> None:
        """Lightning's averages are of the module as it was at their own setup, and take the place of what trains."""
        averager = next((one for one in callbacks if isinstance(one, _AVERAGERS)), None)
        if averager is None:
            return
        name, keeper = type(averager).__name__, next(self.cocktail.of(Finish), None)
        if keeper is not None:
            raise GoodfitError(f"{keeper} gives the weights to keep, and {name} puts its averages in their place; drop {name}.")
        builder = next(self.cocktail.of(Build), None)
        if builder is not None and callbacks.index(averager) < callbacks.index(self):
            raise GoodfitError(f"{name} averages a copy of the module without {builder}; put it behind Regularization.")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        new = sorted({name for name, _ in self.run.model.named_parameters()} ^ self._names)
        if new:
            raise GoodfitError(
                f"{new[0]} was made or removed after the regularization, which acts before LightningModule.setup and "
                "configure_model; make the layers in __init__."
            )
        self.run.attach(*trainer.optimizers)
        self._attached = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or bool(self.stopped)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._view.enter_context(self.run.view(beside_training(trainer.train_dataloader)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        with self._view:  # checkpoints, which come later, hold what trains
            if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
                return
            self._tell_saved(trainer.global_step)
            go_on = self.run.epoch(monitored(trainer.callback_metrics, self.monitor, "the Trainer"))
            self.heard = True
            trainer.should_stop = trainer.should_stop or not go_on

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._view.close()

    def state_dict(self) -> dict[str, Any]:
        if self._run is None:
            return {}
        return {"run": self._run.state_dict(), "finished": self.finished}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = trainer.global_step

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._fitting and self.state_key not in checkpoint["callbacks"]:
            raise GoodfitError(
                f"The checkpoint has no {self.state_key}: it was written without this callback, or with another monitor; "
                "to start anew from its weights, load them into the module and leave ckpt_path out."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:
            return
        if state_dict["finished"]:
            raise GoodfitError(
                "The checkpoint was written after the best weights were restored, so nothing can go on from it as if it had "
                "not ended; give ckpt_path one of during the training."
            )
        self.run.load_state_dict(state_dict["run"])
        self.heard = bool(state_dict["run"]["heard"])

    def finish(self, batches: Any) -> None:
        """Restore the best; called when Lightning's own checkpoints of the last step are written."""
        self.run.finish(batches)
        self.finished = True


class _Restore(_lightning.Callback):  # type: ignore[misc, name-defined]
    """The end of a Regularization, behind all checkpoint callbacks: they save what trains, and not what is kept."""

    def __init__(self, owner: Regularization) -> None:
        self.owner = owner

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.owner.finish(trainer.train_dataloader)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.owner.heard and not self.owner.finished:
            try:
                self.owner.finish(trainer.train_dataloader)
            except GoodfitError as wrong:
                warnings.warn(
                    f"After {type(exception).__name__} the best was not restored: {wrong}", GoodfitWarning, stacklevel=2
                )
