"""Early stopping as each installed package does it, in that package's own training loop.

Each adapter trains a model whose weights are `i` while check `i` is heard, hands the scores to the package's own early
stopping, and tells after which check the training ended, what the package calls its best, and whose weights it left.
Nothing is corrected: a patience is handed over as it is, and an option that a package lacks is refused with `NoOption`.
Those with a trainer that saves checkpoints are in stopping_trainers.py.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from stopping_job import Job, Marked, NoOption, Outcome, Scores, needs_no, number, parts
from torch import nn


def goodfit(scores: Scores, job: Job) -> Outcome:
    from goodfit import EarlyStopping
    from goodfit.stop import Patience, Target

    rule, model = job.rule, Marked()
    settings: dict[str, Any] = {"warmup": max(rule.warmup, job.least - 1, 0), "nonfinite": rule.nonfinite, "restore": job.keep}
    settings |= {"mode": rule.mode} if job.told else {}
    states: list[Any] = []
    for start, part, now in parts(scores, job):
        watches = []
        for p in now.patiences:
            criterion: dict[str, Any] = {"patience": p, "min_delta": rule.min_delta, "rel_delta": rule.rel_delta}
            if rule.target is not None:
                criterion = {"patience": Patience(**criterion) | Target(rule.target)}
            watches.append(EarlyStopping(**criterion, **settings).watch(model))
        for watch, state in zip(watches, states, strict=False):
            watch.load_state_dict(state)
        for index, score in enumerate(part, start):
            model.mark(index)
            asked = [watch(score) for watch in watches]  # type: ignore[arg-type]
            if any(asked):
                watches[0].restore()
                return Outcome(index, number(watches[0].best, rule), model.marked)
        states = [watch.state_dict() for watch in watches]
    watches[0].restore()
    return Outcome(None, number(watches[0].best, rule), model.marked)


def keras(scores: Scores, job: Job) -> Outcome:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    needs_no(job, "rel_delta", "target")
    metrics = {"rmse": [k.metrics.RootMeanSquaredError(name="rmse")], "accuracy": [k.metrics.BinaryAccuracy(name="accuracy")]}
    model = k.Sequential([k.Input((1,)), k.layers.Dense(1), k.layers.BatchNormalization()])
    model.compile(optimizer=k.optimizers.SGD(0.0), loss="mse", metrics=metrics.get(job.name))
    heard = 0

    def tell(epoch: int, logs: dict[str, Any]) -> None:
        nonlocal heard
        heard = epoch
        model.set_weights([w * 0 + epoch for w in model.get_weights()])
        if (score := scores[epoch]) is not None:
            logs[f"val_{job.name}"] = score

    settings: dict[str, Any] = {"min_delta": job.rule.min_delta, "start_from_epoch": max(job.rule.warmup, job.least)}
    settings |= {"mode": job.rule.mode} if job.told else {}
    stops = [
        k.callbacks.EarlyStopping(f"val_{job.name}", patience=p, restore_best_weights=job.keep, **settings)
        for p in job.patiences
    ]
    x = torch.zeros(2, 1)
    for start, part, now in parts(scores, job):
        for stop, patience in zip(stops, now.patiences, strict=True):
            stop.patience = patience
        told = [k.callbacks.LambdaCallback(on_epoch_end=tell), *stops]
        model.fit(x, x, epochs=start + len(part), initial_epoch=start, verbose=0, callbacks=told)
        if model.stop_training:
            break
    left = {float(v) for w in model.get_weights() for v in w.flat}
    return Outcome(
        heard if model.stop_training else None, number(stops[0].best, job.rule), int(left.pop()) if len(left) == 1 else None
    )


def ignite(scores: Scores, job: Job) -> Outcome:
    from ignite.engine import Engine, Events
    from ignite.handlers import EarlyStopping

    needs_no(job, "warmup", "least", "target", "keep")
    if None in scores:
        raise NoOption("names of scores")
    rule, model, heard = job.rule, Marked(), 0
    settings: dict[str, Any] = {"threshold": rule.rel_delta or rule.min_delta}
    settings |= {"threshold_mode": "rel"} if rule.rel_delta else {}
    settings |= {"mode": rule.mode} if job.told else {}
    states: list[Any] = []
    for start, part, now in parts(scores, job):
        trainer = Engine(lambda engine, batch: None)

        def score(engine: Any, start: int = start) -> float | None:
            nonlocal heard
            heard = start + engine.state.epoch - 1
            model.mark(heard)
            return scores[heard]

        stops = [EarlyStopping(p, score, trainer, **settings) for p in now.patiences]
        for stop, state in zip(stops, states, strict=False):
            stop.load_state_dict(state)
        for stop in stops:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, stop)
        trainer.run([0], max_epochs=len(part))
        if trainer.should_terminate:
            break
        states = [stop.state_dict() for stop in stops]
    return Outcome(heard if trainer.should_terminate else None, number(stops[0].best_score, job.rule), model.marked)


def skorch(scores: Scores, job: Job) -> Outcome:
    from skorch import NeuralNet
    from skorch.callbacks import EarlyStopping, EpochScoring

    needs_no(job, "warmup", "least", "target")
    rule = job.rule
    settings: dict[str, Any] = {"threshold": rule.rel_delta or rule.min_delta, "load_best": job.keep}
    settings |= {"threshold_mode": "rel" if rule.rel_delta else "abs"}
    settings |= {"lower_is_better": rule.mode == "min"} if job.told else {}

    def score(net: Any, x: Any, y: Any) -> float | None:
        index = len(net.history) - 1
        net.module_.mark(index)
        return 0.0 if scores[index] is None else scores[index]

    name = "other" if None in scores else job.name
    told = [("tell", EpochScoring(score, name=name, use_caching=False, on_train=True))]
    stops = [(f"stop{i}", EarlyStopping(job.name, p, **settings)) for i, p in enumerate(job.patiences)]
    net = NeuralNet(Marked, nn.MSELoss, lr=0.0, train_split=None, callbacks=told + stops, verbose=0)
    x, y = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for _, part, now in parts(scores, job):
        if net.initialized_:
            net.set_params(**{f"callbacks__stop{i}__patience": p for i, p in enumerate(now.patiences)})
        net.partial_fit(x, y, epochs=len(part))
    heard = len(net.history) - 1
    epoch = dict(net.callbacks_)["stop0"].best_epoch_
    best = scores[epoch - 1] if epoch else None
    return Outcome(heard if heard < len(scores) - 1 else None, best, net.module_.marked)


def sklearn(scores: Scores, job: Job) -> Outcome:
    from sklearn.neural_network import MLPRegressor

    needs_no(job, "rel_delta", "warmup", "least", "target", "also")
    rule, heard = job.rule, -1
    if not job.told or None in scores:
        raise NoOption("names of scores")

    def score(x: Any, y: Any, sample_weight: Any = None) -> float:
        nonlocal heard
        heard += 1
        for weights in (*mlp.coefs_, *mlp.intercepts_):
            weights[...] = heard
        return (-1 if rule.mode == "min" else 1) * scores[heard]  # type: ignore[operator]

    settings = {"early_stopping": True, "tol": rule.min_delta, "learning_rate_init": 1e-300, "warm_start": True}
    mlp = MLPRegressor(hidden_layer_sizes=(1,), solver="sgd", batch_size=1, momentum=0.0, alpha=0.0, **settings)
    mlp._score = score  # the hook that its own loop calls: "let's hope no-one overloads .score with mse"
    x, y = np.zeros((20, 1)), np.zeros(20)  # a tenth is its validation set, of two rows or more
    for _, part, now in parts(scores, job):
        mlp.set_params(n_iter_no_change=now.rule.patience, max_iter=len(part)).fit(x, y)
    best = mlp.best_validation_score_
    kept = {round(float(v)) for weights in (*mlp.coefs_, *mlp.intercepts_) for v in weights.flat}
    sign = -1 if rule.mode == "min" else 1
    return Outcome(
        heard if heard < len(scores) - 1 else None, number(sign * best, job.rule), kept.pop() if len(kept) == 1 else None
    )


def plateau(scores: Scores, job: Job) -> Outcome:
    needs_no(job, "warmup", "least", "target", "keep")
    if None in scores:
        raise NoOption("names of scores")
    rule, model = job.rule, Marked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings: dict[str, Any] = {"threshold": rule.rel_delta or rule.min_delta, "threshold_mode": "abs"}
    settings |= {"threshold_mode": "rel"} if rule.rel_delta else {}
    settings |= {"mode": rule.mode} if job.told else {}
    states: list[Any] = []
    for start, part, now in parts(scores, job):
        stops = [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=p, **settings) for p in now.patiences]
        for stop, state in zip(stops, states, strict=False):
            stop.load_state_dict(state)
        for index, score in enumerate(part, start):
            model.mark(index)
            for stop in stops:
                stop.step(score)  # type: ignore[arg-type]
            if optimizer.param_groups[0]["lr"] < 1.0:
                return Outcome(index, number(stops[0].best, job.rule), model.marked)
        states = [stop.state_dict() for stop in stops]
    return Outcome(None, number(stops[0].best, job.rule), model.marked)
