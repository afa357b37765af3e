"""Ignite: the weights and the stop of the plain loop, whatever ends the training and wherever it is resumed."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Loss
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

import goodfit as gf
from goodfit.adapters.ignite import Regularization
from plain import (
    AVERAGED,
    BEST,
    COCKTAIL,
    EPOCHS,
    REST,
    SEED,
    STOP,
    X,
    adam,
    loader,
    net,
    patience,
    plain,
    same,
    validation,
    whole_loss,
)
from together import in_two_processes

loop = partial(plain, score=whole_loss)


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    """Hosts move data in single precision."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


class Host:
    """What a user writes, once."""

    def __init__(
        self, cocktail: Any = COCKTAIL, *, every: int = 1, parts: int = 1, by_run: bool = False, hears: bool = True, **told: Any
    ) -> None:
        self.model = net()
        self.regularization = Regularization(cocktail, self.model, example=X[:8], loss=F.mse_loss, seed=SEED, **told)
        self.optimizer = adam(self.model.parameters())
        self.trainer = Engine(self.by_run if by_run else self.update)
        self.evaluator = Engine(self.validate)
        Loss(F.mse_loss).attach(self.evaluator, "loss")
        self.parts, self.scores = parts, []
        self.regularization.attach(self.trainer, self.evaluator if hears else None, self.optimizer)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every), lambda: self.evaluator.run(validation(32)))
        self.evaluator.add_event_handler(Events.COMPLETED, lambda e: self.scores.append(e.state.metrics["loss"]))

    def update(self, engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        self.model.train()
        (F.mse_loss(self.model(batch[0]), batch[1]) / self.parts).backward()
        if engine.state.iteration % self.parts == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def by_run(self, engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        x, y = self.regularization.run.batch(*batch)
        self.regularization.run.loss(x, y).backward()
        self.optimizer.step()

    @torch.no_grad()
    def validate(self, engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.model.eval()
        return self.model(batch[0]), batch[1]

    def fit(self, epochs: int = EPOCHS) -> Host:
        self.trainer.run(loader(), max_epochs=epochs)
        return self


def test_the_weights_and_the_stop_are_those_of_the_plain_loop() -> None:
    model, run, scores = loop()
    host = Host().fit()
    assert host.trainer.state.epoch == len(scores) == STOP
    assert host.scores == scores
    assert host.regularization.stopped == run.stopped
    assert f"at check {BEST}, " in run.stopped
    assert same(model, host.model)
    assert whole_loss(host.model) == scores[BEST - 1]


def test_batch_and_loss_regularizers_act_in_the_update() -> None:
    cocktail = gf.Cocktail(gf.InputNoise(0.5), gf.Flooding(0.3), *COCKTAIL)
    model, _, scores = loop(cocktail, by_run=True)
    host = Host(cocktail, by_run=True).fit()
    assert host.scores == scores
    assert same(model, host.model)
    assert not same(model, loop(by_run=True)[0])


def test_a_second_gradient_is_had_by_run_loss_and_refused_by_name_without() -> None:
    model, _, _ = loop((gf.SAM(0.1), gf.Dropout(0.3), gf.BatchNorm()), epochs=2, by_run=True)
    assert same(model, Host((gf.SAM(0.1), gf.Dropout(0.3), gf.BatchNorm()), by_run=True).fit(2).model)
    with pytest.raises(gf.GoodfitError, match="SAM needs a second gradient"):
        Host(gf.SAM(0.1)).fit(1)


@pytest.mark.parametrize("toy", [gf.InputNoise(0.1), gf.Flooding(0.1)])
def test_what_the_update_does_not_call_is_refused_with_the_line_to_add(toy: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=r"which was not called; add: "):
        Host((gf.L2(0.1), toy)).fit(1)


def test_validation_every_second_epoch_is_a_check_every_second_epoch() -> None:
    stopping = gf.EarlyStopping(2)
    model, _, scores = loop((*REST, stopping), every=2)
    host = Host((*REST, stopping), every=2).fit()
    assert host.scores == scores
    assert host.trainer.state.epoch == 2 * len(scores) < EPOCHS
    assert same(model, host.model)


@pytest.mark.filterwarnings("ignore:The gradients of several batches")
def test_accumulated_gradients_are_one_step() -> None:
    model, run, scores = loop(parts=2)
    host = Host(parts=2).fit()
    assert host.scores == scores
    assert int(host.regularization.run.state_dict()["step"]) == int(run.state_dict()["step"]) == 2 * len(scores)
    assert same(model, host.model)


def test_a_metric_to_maximize_and_two_stoppings_on_one() -> None:
    cocktail = (gf.L2(0.01), gf.EarlyStopping(5, mode="max"), gf.EarlyStopping(2, mode="max", min_delta=1e-3))
    model, run, scores = loop(cocktail, score=lambda m: -whole_loss(m))
    host = Host(cocktail, monitor=lambda evaluator: -evaluator.state.metrics["loss"]).fit()
    assert host.regularization.stopped == run.stopped
    assert "2 checks" in run.stopped
    assert host.trainer.state.epoch == len(scores)
    assert same(model, host.model)


@pytest.mark.parametrize("score", [1.0, math.nan])
def test_a_score_that_never_moves_stops(score: float) -> None:
    host = Host((gf.L2(0.01), gf.EarlyStopping(3)), monitor=lambda evaluator: score).fit()
    assert host.trainer.state.epoch == (4 if score == 1.0 else 3)


def test_a_missing_metric_is_named_with_the_nearest() -> None:
    with pytest.raises(gf.GoodfitError, match=r"monitor='los' must name .*; the evaluator has: loss; did you mean loss\?"):
        Host(monitor="los").fit(1)


def test_early_stopping_without_an_evaluator_is_refused_at_the_start() -> None:
    with pytest.raises(gf.GoodfitError, match=r"EarlyStopping\(3.*needs the evaluator that validates"):
        Host(hears=False)
    host = Host(REST, hears=False).fit(2)
    assert same(host.model, loop(REST, epochs=2)[0])


def test_an_evaluator_that_never_ran_is_told_of_at_the_end() -> None:
    with pytest.raises(gf.GoodfitError, match="EarlyStopping has heard no score"):
        Host(every=5).fit(2)


# The evaluator runs more often than once


def test_evaluations_of_the_same_weights_count_once_and_those_outside_never() -> None:
    host = Host()
    host.evaluator.run(validation(32))
    data = validation(32)
    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), lambda: host.evaluator.run(data))
    for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
        host.trainer.add_event_handler(event, lambda: host.evaluator.run(data))
    host.trainer._event_handlers[Events.EPOCH_COMPLETED].pop(0)
    host.fit()
    host.evaluator.run(loader())
    assert int(host.regularization.run.states(gf.EarlyStopping)[0][1]["checks"]) == STOP
    assert same(host.model, loop()[0])


def test_two_sets_of_data_in_one_evaluator_are_refused() -> None:
    host = Host()
    host.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: host.evaluator.run(loader()))
    with pytest.raises(gf.GoodfitError, match="ran on two sets of data at iteration 4, and one score decides"):
        host.fit()


# Whatever ends the training


def test_the_best_comes_back_at_the_last_epoch() -> None:
    host = Host().fit(7)
    assert host.regularization.stopped == ""
    assert same(host.model, loop(epochs=7)[0])
    assert whole_loss(host.model) == host.scores[BEST - 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_best_comes_back_after_an_error_which_goes_on(error: type[BaseException]) -> None:
    host = Host()

    def fail() -> None:
        raise error("in epoch 7")

    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=26), fail)
    with pytest.raises(error, match="in epoch 7"):
        host.fit()
    assert len(host.scores) == 6
    assert whole_loss(host.model) == host.scores[BEST - 1]


def test_an_error_before_the_first_score_is_the_one_that_is_seen() -> None:
    host = Host()

    def fail() -> None:
        raise RuntimeError("in epoch 1")

    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), fail)
    with pytest.raises(RuntimeError, match="in epoch 1"):
        host.fit()


def test_an_error_that_the_user_handles_stays_handled_and_what_trains_trains_on() -> None:
    """The error is in the third step of the seventh epoch, whose last step is left out."""
    host, handled, weights = Host(patience(50)), [], {}

    def fail() -> None:
        weights["error"] = copy.deepcopy(host.model)
        raise RuntimeError("in epoch 7")

    host.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: handled.append(error))
    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=27), fail)
    host.trainer.add_event_handler(Events.EPOCH_STARTED(once=8), lambda: weights.update(next=copy.deepcopy(host.model)))
    host.fit()
    assert "in epoch 7" in str(handled[0])
    assert len(host.scores) == EPOCHS
    assert same(weights["error"], weights["next"])
    assert whole_loss(host.model) == min(host.scores)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_best_comes_back_where_a_handled_error_ends_the_training(error: type[BaseException]) -> None:
    """Ctrl-C does although it is handled, and any error does that a handler raises on."""
    host = Host()

    def handle(engine: Engine, wrong: BaseException) -> None:
        if isinstance(wrong, RuntimeError):
            raise wrong

    def fail() -> None:
        raise error("in epoch 7")

    host.trainer.add_event_handler(Events.EXCEPTION_RAISED, handle)
    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=26), fail)
    with pytest.raises(error) if error is RuntimeError else nullcontext():
        host.fit()
    assert len(host.scores) == 6
    assert whole_loss(host.model) == host.scores[BEST - 1]


@pytest.mark.parametrize("skip", [False, True])
def test_the_best_comes_back_where_the_user_terminates(skip: bool) -> None:
    host = Host()
    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=26), lambda: host.trainer.terminate(skip_completed=skip))
    host.fit()
    assert whole_loss(host.model) == host.scores[BEST - 1]
    early = Host()
    early.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: early.trainer.terminate(skip_completed=skip))
    early.fit()
    assert early.trainer.state.iteration == 2


def test_averaged_weights_get_their_statistics_from_the_training_data() -> None:
    host = Host((gf.EMA(0.5, warmup=False), gf.BatchNorm()), hears=False).fit(2)
    means = host.regularization.run.states(gf.EMA)[0][1]
    assert torch.equal(host.model[0].weight.data, means["mean.0.weight"])
    alike = gf.Run(gf.BatchNorm(), net(), example=X[:8]).model
    alike.load_state_dict(host.model.state_dict())
    gf.recalibrate(alike, loader())
    assert same(alike, host.model)


def test_what_is_scored_and_kept_is_averaged_and_what_trains_and_is_saved_is_not(tmp_path: Path) -> None:
    model, run, scores = loop(AVERAGED)
    host = Host(AVERAGED)
    saving(host, tmp_path)
    host.fit()
    assert host.scores == scores
    assert host.regularization.stopped == run.stopped != ""
    assert same(model, host.model)
    assert same(model, resumed(tmp_path, 12, AVERAGED).fit().model)


@pytest.mark.parametrize("handled", [False, True])
def test_an_error_in_the_validation_puts_back_what_trains(handled: bool) -> None:
    host = Host(AVERAGED)
    validate, failed = host.evaluator._process_function, []

    def fail(*batch: Any) -> Any:
        if host.trainer.state.epoch == 7 and not failed:
            failed.append(True)
            raise OSError("disk")
        return validate(*batch)

    def look() -> None:
        try:
            host.evaluator.run(validation(32))
        except OSError:
            host.evaluator.run(validation(32))

    host.evaluator._process_function = fail
    if handled:
        host.trainer._event_handlers[Events.EPOCH_COMPLETED].pop(0)
        host.trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
        host.fit()
        assert same(host.model, loop(AVERAGED)[0])
    else:
        with pytest.raises(OSError, match="disk"):
            host.fit()
        assert same(host.model, loop(AVERAGED, epochs=6)[0])


def test_an_error_in_the_first_validation_leaves_what_trained() -> None:
    host = Host(AVERAGED)

    def fail(evaluator: Engine, batch: Any) -> None:
        raise OSError("disk")

    host.evaluator._process_function = fail
    with pytest.raises(OSError, match="disk"):
        host.fit()
    assert same(host.model, loop(REST, epochs=1)[0])


# Resuming


def saving(host: Host, folder: Path, *, behind: bool = True) -> dict[str, Any]:
    parts = {
        "model": host.model,
        "optimizer": host.optimizer,
        "trainer": host.trainer,
        "goodfit": host.regularization,
    }
    keeper = Checkpoint(parts, DiskSaver(str(folder), create_dir=True, require_empty=False), n_saved=None)
    engine, event = (host.trainer, Events.EPOCH_COMPLETED) if behind else (host.trainer, Events.ITERATION_COMPLETED(every=4))
    engine.add_event_handler(event, keeper)
    return parts


def resumed(folder: Path, iteration: int, cocktail: Any = COCKTAIL) -> Host:
    host = Host(cocktail)
    saved = torch.load(folder / f"checkpoint_{iteration}.pt")
    Checkpoint.load_objects(saving(host, folder), saved)
    return host


@pytest.mark.parametrize("epoch", [1, 3, 5, 7])
def test_killed_and_resumed_is_as_if_it_had_run_through(epoch: int, tmp_path: Path) -> None:
    first = Host()
    saving(first, tmp_path)
    first.fit()
    second = resumed(tmp_path, 4 * epoch).fit()
    assert second.trainer.state.epoch == first.trainer.state.epoch == STOP
    assert second.scores == first.scores[epoch:]
    assert second.regularization.stopped == first.regularization.stopped
    assert same(first.model, second.model)


def test_the_new_patience_wins_on_resume(tmp_path: Path) -> None:
    first = Host()
    saving(first, tmp_path)
    first.fit()
    longer = patience(5)
    second = resumed(tmp_path, 28, longer).fit()
    whole = Host(longer).fit()
    assert second.trainer.state.epoch == whole.trainer.state.epoch == STOP + 2
    assert same(second.model, whole.model)
    shorter = resumed(tmp_path, 24, patience(2)).fit()
    assert shorter.trainer.state.epoch == STOP - 1


def test_a_validation_at_the_start_is_heard_once_however_often_it_is_resumed(tmp_path: Path) -> None:
    """A check at each start, of the weights that the checkpoint has been told of already."""

    def validated(host: Host) -> Host:
        host.trainer.add_event_handler(Events.STARTED, lambda: host.evaluator.run(validation(32)))
        return host

    first = validated(Host())
    saving(first, tmp_path)
    first.fit()
    second = validated(resumed(tmp_path, 4 * 6)).fit()
    assert second.regularization.stopped == first.regularization.stopped
    assert f"at check {BEST + 1}, " in first.regularization.stopped
    assert second.trainer.state.epoch == STOP
    assert same(first.model, second.model)


def test_what_had_stopped_stays_stopped_and_goes_on_with_another_patience(tmp_path: Path) -> None:
    first = Host()
    saving(first, tmp_path)
    first.fit()
    again = resumed(tmp_path, 4 * STOP).fit()
    assert (again.trainer.state.iteration, again.scores) == (4 * STOP, [])
    assert again.regularization.stopped == first.regularization.stopped
    assert same(again.model, first.model)
    longer = resumed(tmp_path, 4 * STOP, patience(5)).fit()
    assert longer.trainer.state.epoch == STOP + 2
    assert same(longer.model, loop(patience(5))[0])


def test_a_stopped_training_that_is_run_again_is_asked_anew() -> None:
    host = Host().fit()
    assert host.trainer.state.epoch == STOP
    host.fit()
    assert host.trainer.state.epoch == STOP + 1
    assert "in 4 checks" in host.regularization.stopped


def test_a_checkpoint_before_the_validation_is_warned_of_once(tmp_path: Path) -> None:
    host = Host()
    saving(host, tmp_path, behind=False)
    with pytest.warns(gf.GoodfitWarning, match="checkpoint of iteration 4 was saved before the validation") as told:
        host.fit(3)
    assert len(told) == 1


# A second Regularization


def second(host: Host, cocktail: Any, **told: Any) -> Regularization:
    return Regularization(cocktail, host.model, **told).attach(host.trainer, host.evaluator, host.optimizer)


def test_a_second_one_may_only_stop() -> None:
    host = Host()
    stopping = second(host, "EarlyStopping(1)", seed=SEED)
    assert same(host.fit().model, loop((*REST, gf.EarlyStopping(1)))[0])
    assert "in 1 check" in stopping.stopped
    assert host.regularization.stopped == ""


@pytest.mark.parametrize("more", ["L2(0.1)", "EarlyStopping(3), Dropout(0.1)"])
def test_a_second_one_that_does_more_is_refused_beside_the_same_model_alone(more: str) -> None:
    host = Host()
    with pytest.raises(gf.GoodfitError, match=r"A second Regularization may only stop the training, got (L2|Dropout)\(0\.1\)"):
        second(host, more, example=X[:8], seed=SEED)
    other = net()
    Regularization(more, other, example=X[:8]).attach(host.trainer, host.evaluator, adam(other.parameters()))


def test_a_second_one_of_another_seed_or_beside_averages_is_refused() -> None:
    with pytest.raises(gf.GoodfitError, match="has the seed of the first, by which inserted layers draw: seed=54, got seed=0"):
        second(Host(), "EarlyStopping(3)")
    with pytest.raises(gf.GoodfitError, match=r"EMA\(0\.8, warmup=False\) averages weights, of which a second"):
        second(Host(AVERAGED), "EarlyStopping(3)", seed=SEED)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_goes_on_beside_a_second_one(error: type[BaseException]) -> None:
    host = Host()
    second(host, "EarlyStopping(50)", seed=SEED)

    def fail() -> None:
        raise error("in epoch 7")

    host.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=26), fail)
    with pytest.raises(error, match="in epoch 7"):
        host.fit()
    assert whole_loss(host.model) == host.scores[BEST - 1]


# Two processes


def process(rank: int, folder: str) -> None:
    """Each has a score of its own, by epoch and rank."""
    scores = [[3.0, 1.0], [2.0, 1.0], [1.0, 2.5], [4.0, 0.0], [0.0, 9.0], [0.0, 0.0]]
    model = nn.Linear(3, 1)
    regularization = Regularization("EarlyStopping(2)", model, monitor=lambda evaluator: scores[trainer.state.epoch - 1][rank])
    trainer, evaluator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    regularization.attach(trainer, evaluator, torch.optim.SGD(model.parameters()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    trainer.run([0], max_epochs=6)
    torch.save({"epochs": trainer.state.epoch, "stopped": regularization.stopped}, f"{folder}/{rank}.pt")


def test_two_processes_stop_together_on_the_mean_of_their_scores(tmp_path: Path) -> None:
    """Means 2, 1.5, 1.75, 2: two checks behind the second it ends, at the fourth; alone, neither rank would stop there."""
    in_two_processes(process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second == {"epochs": 4, "stopped": "no improvement in 2 checks: best 1.5 at check 2, 2 at check 4"}


# What stands in the way


def test_what_is_attached_twice_or_without_an_optimizer_is_refused() -> None:
    host = Host()
    for optimizers in ((host.optimizer,), (adam(host.model.parameters()),)):
        with pytest.raises(gf.GoodfitError, match="with all optimizers that step; it is attached already; attach"):
            host.regularization.attach(host.trainer, host.evaluator, *optimizers)
    with pytest.raises(gf.GoodfitError, match="it got none; attach"):
        Regularization("EarlyStopping(3)", net()).attach(host.trainer, host.evaluator)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(gf.GoodfitError, match=r"takes a cocktail and a torch.nn.Module, in this order, got a str"):
        Regularization(net(), "L2(0.1)")  # type: ignore[arg-type]


def test_fused_unscaling_is_refused() -> None:
    host = Host(gf.L2(0.1), hears=False)
    host.optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(gf.GoodfitError, match="unscales fp16 gradients inside its step"):
        host.fit(1)


def test_a_scaler_that_unscales_before_the_step_changes_nothing() -> None:
    host = Host((gf.L2(0.01), gf.ClipNorm(0.1)), hears=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        host.model.train()
        host.optimizer.zero_grad()
        scaler.scale(F.mse_loss(host.model(batch[0]), batch[1])).backward()
        scaler.step(host.optimizer)
        scaler.update()

    host.trainer._process_function = update
    host.fit(2)
    assert same(host.model, loop((gf.L2(0.01), gf.ClipNorm(0.1)), epochs=2)[0])


@pytest.fixture
def group() -> Iterator[None]:
    """One process that trains together with itself."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def parted(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def parted_by_names(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def parted_in_place(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("shard", [parted, parted_by_names, parted_in_place])
def test_shards_of_weights_are_refused(shard: Any, group: None) -> None:
    trainer, model, late = Engine(lambda engine, batch: None), nn.Linear(3, 2), nn.Linear(3, 2)
    regularization = Regularization("L2(0.1)", late)
    with pytest.raises(gf.GoodfitError, match="SGD holds shards of weights"):
        regularization.attach(trainer, None, torch.optim.SGD(shard(late).parameters()))
    if shard is not parted_in_place:
        with pytest.raises(gf.GoodfitError, match=r"holds shards of weights|matched no weights"):
            gf.Run("L2(0.1)", wrapped := shard(model)).attach(torch.optim.SGD(wrapped.parameters()))
    else:
        with pytest.raises(gf.GoodfitError, match="weight is sharded over processes"):
            Regularization("L2(0.1)", shard(model))


def test_without_ignite_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['ignite'] = None; import goodfit.adapters.ignite"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip().splitlines()
    assert told[-1].endswith('goodfit.adapters.ignite needs ignite, which is not installed; pip install "goodfit[ignite]".')
