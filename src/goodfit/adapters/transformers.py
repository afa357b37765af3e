"""HF Trainer: one callback that builds before the optimizer is made, acts beside its steps, stops, and restores the best.

from goodfit.adapters.transformers import Regularization

regularization = Regularization("L2(1e-4), Dropout(0.3), EarlyStopping(5)", monitor="eval_loss", example=batch)
Trainer(model, arguments, callbacks=[regularization], ...).train()
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from goodfit.adapters.host import Hosted, imported, monitored, refuse_clipping, refuse_sharded, submodule
from goodfit.cocktail import Cocktail
from goodfit.errors import GoodfitError
from goodfit.fitting.data import mapped
from goodfit.phases import Build, Epoch, Regularizer
from goodfit.tensors import load_tensors, tensors_of

__all__ = ["Regularization"]

_transformers = imported("transformers", "transformers")
_accelerate = imported("transformers", "accelerate")
_SHARDED = {"deepspeed_plugins": "DeepSpeed", "fsdp_plugin": "FSDP", "megatron_lm_plugin": "Megatron-LM"}


class Regularization(Hosted, _transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """A cocktail in an HF Trainer, given to it as `callbacks=[...]`, for one `train()`.

    monitor: the metric that Epoch regularizers hear, as the Trainer logs it ("eval_loss"). model: the submodule to
    regularize, by name, else the whole. example: one input batch of it for what is inserted. loss, task, seed: as in `Run`.
    checkpoint: the folder that is resumed from, where that is not one of this `output_dir`.
    """

    _made = "give it to the Trainer where that is made, as callbacks=[...]"

    def __init__(
        self, cocktail: Cocktail | Regularizer | str, *, checkpoint: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        super().__init__(cocktail, **settings)
        self.checkpoint = checkpoint
        self._whole: nn.Module | None = None
        self._file = "goodfit.safetensors"
        self._finished = self._due = False
        self._heard = -1
        self._before: dict[str, Tensor] = {}
        self._others: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._run is not None:
            raise GoodfitError("A Regularization serves one Trainer, once in its callbacks; make a new one for another model.")
        beside = vars(state).setdefault("regularizations", [])  # what callbacks of one Trainer share
        beside.append(self)
        self._join(beside)
        if len(beside) > 1:
            self._file = f"goodfit-{len(beside)}.safetensors"
        self._refuse(args, model)
        part = model if self.model is None else submodule(model, self.model)
        home = next((p.device for p in part.parameters()), torch.device("cpu"))
        example = None if self.example is None else mapped(self.example, lambda t: t.to(home))
        self._make(part, example)
        self._whole = model

    def _refuse(self, args: Any, model: nn.Module) -> None:
        shared = _accelerate.state.AcceleratorState._shared_state  # a new AcceleratorState would forget what shards
        kind = next((kind for plugin, kind in _SHARDED.items() if shared.get(plugin) is not None), None)
        refuse_sharded(model, kind)
        self._refuse_unfed(self.example)
        builder = next(self.cocktail.of(Build), None)
        if builder is not None and args.n_gpu > 1:
            raise GoodfitError(f"{builder} cannot act in nn.DataParallel, which copies modules at each step; use torchrun.")
        if args.auto_find_batch_size:
            raise GoodfitError(
                "auto_find_batch_size=True begins train() anew on weights that have trained; say per_device_train_batch_size."
            )
        if args.max_grad_norm > 0:
            setting = f"TrainingArguments(max_grad_norm={args.max_grad_norm})"
            refuse_clipping(self.cocktail, setting, "set max_grad_norm=0")
        deaf = next(self.cocktail.of(Epoch), None)
        if deaf is not None and args.eval_strategy == "no":
            raise GoodfitError(f"{deaf} hears the evaluation, and there is none; set eval_strategy='epoch' or 'steps'.")
        if deaf is not None and args.load_best_model_at_end:
            raise GoodfitError(
                f"{deaf} restores the best weights, and so does load_best_model_at_end=True, by its own measure; leave it out."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kw: Any) -> None:
        if self._attached:
            raise GoodfitError("A Regularization serves one train(), and this one has; make a new one, and a Trainer with it.")
        if model is not self._whole and self._run is not None:
            raise GoodfitError("The Trainer made its model anew after the regularization; give model= in place of model_init=.")
        self.run.attach(optimizer)
        self._attached = True
        if state.global_step:
            self._resume(Path(self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        if self.stopped:
            control.should_training_stop = True
            self.run.detach()
            self._before = {name: t.clone() for tensors in tensors_of(self.run.model) for name, t in tensors.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer looks whether to stop behind a step, which leaves no trace where all had stopped before it."""
        if self._before:
            load_tensors(self.run.model, self._before, {})
            control.should_evaluate = control.should_save = False

    on_epoch_end = on_step_end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = self._due or control.should_evaluate  # whoever evaluates: behind it the Trainer thinks it has been done

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.monitor is None or not _within_training():
            return
        self._due = False
        if self.monitor in metrics and not self.stopped:
            self._heard = state.global_step
            self._tell_saved(state.global_step)
            go_on = self.run.epoch(metrics[self.monitor])
            control.should_training_stop = control.should_training_stop or not go_on
        self._others |= metrics

    def _refuse_unheard(self, state: Any) -> None:
        """Several evaluation sets give their metrics one after the other: what is missing shows behind them."""
        if self._due and self.monitor is not None:
            raise GoodfitError(
                f"The evaluation of step {state.global_step} was cancelled by one that a callback called; let that callback "
                "return a copy of control from before it."
            )
        if self._others and self._heard != state.global_step:
            monitored(self._others, str(self.monitor), "the Trainer")
        self._others = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._refuse_unheard(state)

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self._refuse_unheard(state)
        self.run.finish(train_dataloader)
        self._finished = True

    def finish(self, batches: Any = None) -> None:
        """Restore the best after a Ctrl-C or an exception, of which the Trainer tells its callbacks nothing."""
        if not self._finished and self._heard >= 0:
            self.run.finish(batches)
            self._finished = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._saved = state.global_step
        told = {"weights": _fingerprint(self.run.model)}
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._file
        unfinished = path.with_suffix(".unfinished")
        save_file({name: t.contiguous() for name, t in self.run.state_dict().items()}, unfinished, told)
        unfinished.replace(path)

    def _resume(self, folder: Path) -> None:
        if not (folder / self._file).is_file():
            raise GoodfitError(
                f"A checkpoint to resume from must have {self._file}, and {folder} has none; say where it is by "
                "Regularization(..., checkpoint=folder), or train anew from its weights without resume_from_checkpoint."
            )
        with safe_open(folder / self._file, "pt") as file:
            told = file.metadata()
        state = load_file(folder / self._file)
        if told["weights"] != _fingerprint(self.run.model):
            raise GoodfitError(
                f"{folder / self._file} belongs to other weights than those that the Trainer has loaded; say which folder is "
                "resumed from by Regularization(..., checkpoint=folder)."
            )
        self.run.load_state_dict(state)
        self._heard = 0 if state["heard"] else -1


def _within_training() -> bool:
    """Whether the Trainer evaluates as its arguments say: neither on start nor as somebody calls `evaluate`, of which it
    tells a callback nothing, and after a Ctrl-C it still says that it trains."""
    return {"_maybe_log_save_evaluate", "_evaluate"} <= {frame.f_code.co_name for frame, _ in walk_stack(None)}


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers: tells to which checkpoint a state belongs."""
    digest = hashlib.sha256()
    for tensors in tensors_of(model):
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
