"""Early stopping of the installed packages, each through its own objects, asked the same questions.

Keras and skorch hear epochs through their callbacks, Ignite runs its engines, Lightning is asked for its decision, Hugging
Face hears its callback and then the Trainer's own rule of the best, scikit-learn trains a perceptron whose score is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Self

import torch
from stopping_peer import Peer, Torchs, ages
from stopping_rules import Asked
from torch import nn, optim

import goodfit as gf

__all__ = ["PEERS"]

os.environ.setdefault("KERAS_BACKEND", "torch")


class Goodfit(Peer):
    package = "goodfit"
    offers = frozenset({"relative", "warmup", "restore"})

    def start(self) -> None:
        one, self.host = self.asked, Torchs()
        absolute, relative = (0.0, one.delta) if one.relative else (one.delta, 0.0)
        self.own = gf.EarlyStopping(one.patience, absolute, relative, one.warmup).watch(self.host.model)

    def check(self, score: float) -> bool:
        return self.own(score)

    def kept(self) -> str:
        self.own.restore()
        return super().kept()


class Keras(Peer):
    package = "keras"
    offers = frozenset({"warmup", "restore"})

    def start(self) -> None:
        keras, one = import_module("keras"), self.asked
        self.model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), keras.layers.BatchNormalization()])
        self.callback = keras.callbacks.EarlyStopping(
            min_delta=one.delta,
            patience=one.patience,
            mode="min",
            restore_best_weights=one.restore,
            start_from_epoch=one.warmup,
        )
        self.model.stop_training = False  # as fit does
        self.callback.set_model(self.model)
        self.callback.on_train_begin()

    def fill(self, number: int) -> None:
        self.model.set_weights([0 * weight + number for weight in self.model.get_weights()])

    def check(self, score: float) -> bool:
        self.callback.on_epoch_end(self.heard - 1, {"val_loss": score})
        return bool(self.model.stop_training)

    def kept(self) -> str:
        self.callback.on_train_end()
        dense, norm = self.model.layers
        return ages(float(dense.kernel[0, 0]), float(norm.moving_mean[0]))


class Lightning(Peer):
    package = "pytorch_lightning"

    def start(self) -> None:
        callbacks = import_module("pytorch_lightning.callbacks")
        self.own = callbacks.EarlyStopping("score", min_delta=self.asked.delta, patience=self.asked.patience)

    def check(self, score: float) -> bool:
        return bool(self.own._evaluate_stopping_criteria(torch.tensor(score, dtype=torch.float64))[0])

    @classmethod
    def pair(cls, one: Asked, other: Asked, scores: Sequence[float]) -> int | None:
        callbacks = [cls(one).own, cls(other).own]
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        import_module("pytorch_lightning").Trainer(callbacks=callbacks, accelerator="cpu", devices=1, **silent)
        return super().pair(one, other, scores)


class Ignite(Peer):
    package = "ignite"
    offers = frozenset({"relative"})

    def start(self) -> None:
        engine, handlers, one = import_module("ignite.engine"), import_module("ignite.handlers"), self.asked
        self.trainer = engine.Engine(lambda _, batch: batch)
        self.evaluator = engine.Engine(lambda _, batch: batch)
        self.own = handlers.EarlyStopping(
            one.patience,
            lambda evaluator: evaluator.state.output,
            self.trainer,
            threshold=one.delta,
            threshold_mode="rel" if one.relative else "abs",
            mode="min",
        )
        self.evaluator.add_event_handler(engine.Events.COMPLETED, self.own)

    def check(self, score: float) -> bool:
        self.evaluator.run([score])
        return bool(self.trainer.should_terminate)


class HuggingFace(Peer):
    package = "transformers"

    def start(self) -> None:
        hub, one = import_module("transformers"), self.asked
        self.callback = hub.EarlyStoppingCallback(one.patience, one.delta)
        self.control = hub.TrainerControl()
        self.loop = SimpleNamespace(
            args=SimpleNamespace(metric_for_best_model="loss", greater_is_better=False, save_strategy="epoch"),
            state=hub.TrainerState(),
        )
        self.note_best = hub.Trainer._determine_best_metric

    def check(self, score: float) -> bool:
        metrics = {"eval_loss": score}
        self.callback.on_evaluate(self.loop.args, self.loop.state, self.control, metrics)
        self.note_best(self.loop, metrics, None)  # the Trainer's order: first the callback
        return bool(self.control.should_training_stop)

    def resumed(self, asked: Asked) -> Self:
        new = type(self)(asked, self.heard)  # by default a checkpoint restores the state of the trainer, not of callbacks
        new.loop.state = replace(self.loop.state)
        return new


class Skorch(Peer):
    package = "skorch"
    offers = frozenset({"relative", "restore"})

    def start(self) -> None:
        one, self.host = self.asked, Torchs()
        self.net = SimpleNamespace(module_=self.host.model, verbose=0, history=import_module("skorch.history").History())
        self.callback = import_module("skorch.callbacks").EarlyStopping(
            patience=one.patience, threshold=one.delta, threshold_mode="rel" if one.relative else "abs", load_best=one.restore
        )
        self.callback.on_train_begin(self.net)

    def check(self, score: float) -> bool:
        self.net.history.new_epoch()
        self.net.history.record("epoch", self.heard)
        self.net.history.record("valid_loss", score)
        try:
            self.callback.on_epoch_end(self.net)
        except KeyboardInterrupt:  # its way to stop
            return True
        return False

    def kept(self) -> str:
        self.callback.on_train_end(self.net)
        return super().kept()

    def resumed(self, asked: Asked) -> Self:
        new = type(self)(asked, self.heard)
        new.net.history = self.net.history  # what is loaded; partial_fit starts the callback again
        return new


class ScikitLearn(Peer):
    package = "sklearn"
    offers = frozenset({"restore"})

    def start(self) -> None:
        one = self.asked
        patience = {"tol": one.delta, "n_iter_no_change": one.patience}
        self.model = _perceptron(self)(hidden_layer_sizes=1, early_stopping=True, warm_start=True, **patience)

    def check(self, score: float) -> bool:
        raise NotImplementedError("a perceptron is trained in one call")

    def train(self, scores: Sequence[float]) -> int | None:
        self.left: Iterator[float] = iter(scores)
        self.over = False
        self.model.fit(torch.arange(20.0).reshape(20, 1).numpy(), torch.arange(20.0).numpy())
        return None if self.over else self.heard - 1

    def kept(self) -> str:
        return f"{self.model.coefs_[0][0, 0]:g}"

    def resumed(self, asked: Asked) -> Self:
        self.asked = asked
        self.model.set_params(n_iter_no_change=asked.patience)
        return self


def _perceptron(peer: ScikitLearn) -> Any:
    """A perceptron whose scores are given; they are higher for better."""
    regressor: Any = import_module("sklearn.neural_network").MLPRegressor

    class Scripted(regressor):  # type: ignore[misc]
        def _score(self, *_: Any, **__: Any) -> float:
            score = next(peer.left, None)
            if score is None:
                peer.over = True
                raise KeyboardInterrupt  # by which it ends a training
            for weight in self.coefs_:
                weight[:] = peer.heard
            peer.heard += 1
            return -score

    return Scripted


class Plateau(Peer):
    package = "torch"
    offers = frozenset({"relative"})

    def start(self) -> None:
        one = self.asked
        self.optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self.own = optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, patience=one.patience, threshold=one.delta, threshold_mode="rel" if one.relative else "abs"
        )

    def check(self, score: float) -> bool:
        self.own.step(score)
        return bool(self.optimizer.param_groups[0]["lr"] < 1.0)


PEERS: dict[str, type[Peer]] = {
    "goodfit": Goodfit,
    "Keras": Keras,
    "Lightning": Lightning,
    "Ignite": Ignite,
    "Hugging Face": HuggingFace,
    "skorch": Skorch,
    "scikit-learn": ScikitLearn,
    "torch plateau": Plateau,
}
