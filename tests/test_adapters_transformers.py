"""The HF Trainer with the one callback equals the plain loop, killed and resumed as if it had not been; else it refuses."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from plain import AVERAGED, COCKTAIL, REST, SEED, STOP, XV, YV, X, Y, adam, loader, net, patience, plain, same, valid_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import FullyShardedDataParallelPlugin  # noqa: E402

from goodfit.adapters.transformers import Regularization  # noqa: E402

MORE = patience(6)


@pytest.fixture(autouse=True)
def single(strict: Any) -> Any:
    """Hosts move data in single precision."""
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """A model as the Trainer wants it: with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.net(x)
        return {"loss": F.mse_loss(outputs, labels), "logits": outputs}


class Ordered(transformers.Trainer):
    """Without shuffling, as the plain loop."""

    def _get_train_sampler(self, *args: Any) -> None:
        return None


class InRun(Ordered):
    """The same, with what acts on the batch and on the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        run = next(one.run for one in self.callback_handler.callbacks if isinstance(one, Regularization))
        x, y = run.batch(inputs["x"], inputs["labels"])
        return run.loss(x, y)


def regularization(cocktail: Any = COCKTAIL, **settings: Any) -> Regularization:
    given = {"monitor": "eval_loss", "model": "net", "example": X[:8], "loss": F.mse_loss, "seed": SEED}
    return Regularization(cocktail, **given | settings)


def rows(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": one, "labels": other} for one, other in zip(x, y, strict=True)]


def trainer(model: Any, *callbacks: Any, folder: Any, kind: Any = Ordered, data: Any = None, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "num_train_epochs": 30,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_grad_norm": 0.0,
        "learning_rate": 0.02,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given | settings)
    valid = rows(XV, YV) if data is None else data
    source = {"model_init": model} if isinstance(model, type) else {"model": model}
    return kind(args=arguments, train_dataset=rows(X, Y), eval_dataset=valid, callbacks=list(callbacks), **source)


def train(model: Any, *callbacks: Any, resume: Any = None, **settings: Any) -> Any:
    host = trainer(model, *callbacks, **settings)
    host.train(resume_from_checkpoint=None if resume is None else str(resume))
    return host


# The same as the plain loop


def test_weights_and_stop_epoch_are_those_of_the_plain_loop(tmp_path: Any) -> None:
    model, run, scores = plain()
    hosted, ours = Model(), regularization()
    assert train(hosted, ours, folder=tmp_path).state.epoch == len(scores)
    assert len(scores) == STOP
    assert same(model, hosted.net)
    assert ours.stopped == run.stopped != ""


def test_without_a_stop_the_best_comes_back_too(tmp_path: Any) -> None:
    model, _, scores = plain(epochs=5)
    hosted, ours = Model(), regularization()
    host = train(hosted, ours, folder=tmp_path, num_train_epochs=5)
    assert host.state.epoch == len(scores) == 5
    assert ours.stopped == ""
    assert same(model, hosted.net)
    assert host.evaluate()["eval_loss"] == pytest.approx(valid_loss(model))
    assert ours.run.states(gf.EarlyStopping)[0][1]["checks"] == 5  # an evaluation afterwards is none


def test_the_fused_optimizer_that_the_trainer_makes_by_itself(tmp_path: Any) -> None:
    """It rounds otherwise than the plain one."""
    model, _, scores = plain()
    hosted = Model()
    assert train(hosted, regularization(), folder=tmp_path, optim="adamw_torch_fused").state.epoch == len(scores)
    ours = model.state_dict()
    assert all(torch.allclose(t, ours[name], rtol=0, atol=1e-6) for name, t in hosted.net.state_dict().items())


def test_a_metric_to_maximize(tmp_path: Any) -> None:
    cocktail = [*REST, gf.EarlyStopping(3, mode="max")]
    model, _, scores = plain(cocktail, score=lambda model: -valid_loss(model))
    hosted, ours = Model(), regularization(cocktail, monitor="eval_goodness")
    host = trainer(hosted, ours, folder=tmp_path)
    host.compute_metrics = lambda told: {"goodness": -float(((told.predictions - told.label_ids) ** 2).mean())}
    host.train()
    assert host.state.epoch == len(scores) == STOP
    assert same(model, hosted.net)


def test_what_acts_on_batch_and_loss_acts_in_compute_loss(tmp_path: Any) -> None:
    cocktail = [*COCKTAIL, gf.InputNoise(0.3), gf.Flooding(0.05)]
    model, _, scores = plain(cocktail, by_run=True)
    hosted = Model()
    assert train(hosted, regularization(cocktail), folder=tmp_path, kind=InRun).state.epoch == len(scores)
    assert same(model, hosted.net)
    assert not same(model, plain()[0])


@pytest.mark.filterwarnings("ignore:The gradients of several batches:goodfit.GoodfitWarning")
def test_gradient_accumulation(tmp_path: Any) -> None:
    model, _, scores = plain(parts=2)
    hosted = Model()
    assert train(hosted, regularization(), folder=tmp_path, gradient_accumulation_steps=2).state.epoch == len(scores)
    assert same(model, hosted.net)


def test_checks_by_steps(tmp_path: Any) -> None:
    """Scores that never move: stopped at the fourth check, which is at step 8, and the first is kept."""
    model = Model()
    ours = regularization("EarlyStopping(3)", monitor="eval_still")
    host = trainer(model, ours, folder=tmp_path, eval_strategy="steps", eval_steps=2)
    host.compute_metrics = lambda told: {"still": 1.0}
    host.train()
    assert host.state.global_step == 8
    assert ours.stopped == "no improvement in 3 checks: best 1 at check 1, 1 at check 4"


def test_a_look_before_the_training_is_no_check(tmp_path: Any) -> None:
    hosted = Model()
    host = trainer(hosted, regularization(), folder=tmp_path, eval_on_start=True, save_strategy="epoch")
    host.evaluate()
    host.train()
    assert host.state.epoch == STOP
    assert same(plain()[0], hosted.net)
    hosted, ours = Model(), regularization()
    train(hosted, ours, folder=tmp_path, eval_on_start=True, resume=tmp_path / "checkpoint-8")
    assert ours.run.states(gf.EarlyStopping)[0][1]["checks"] == STOP
    assert same(plain()[0], hosted.net)


class Look(transformers.TrainerCallback):
    """Evaluates on the training data, beside the Trainer's own evaluation."""

    def __init__(self, prefix: str, event: str) -> None:
        self.prefix = prefix
        setattr(self, event, self.look)

    def look(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        before = copy.deepcopy(control)  # an evaluation takes the wish for one back
        self.host.evaluate(rows(X, Y), metric_key_prefix=self.prefix)
        return before


@pytest.mark.parametrize("prefix", ["train", "eval"])
@pytest.mark.parametrize("event", ["on_epoch_begin", "on_step_end", "on_epoch_end", "on_save"])
def test_an_evaluation_that_somebody_calls_is_no_check_and_needs_no_metric(prefix: str, event: str, tmp_path: Any) -> None:
    hosted, look = Model(), Look(prefix, event)
    by_steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 2}
    host = look.host = trainer(hosted, look, regularization(), folder=tmp_path, **by_steps)
    host.train()
    assert host.state.epoch == STOP
    assert same(plain()[0], hosted.net)


@pytest.mark.parametrize("last", [1, 2], ids=["at the end", "before"])
def test_an_evaluation_in_place_of_the_own_of_the_trainer_is_refused_at_once(last: int, tmp_path: Any) -> None:
    class Careless(Look):
        def look(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            super().look(args, state, *rest, **kwargs)

    look = Careless("train", "on_epoch_end")
    look.host = trainer(Model(), look, regularization(), folder=tmp_path, num_train_epochs=last)
    with pytest.raises(gf.GoodfitError, match=r"evaluation of step 4 was cancelled by one that a callback called; let that"):
        look.host.train()


def test_several_evaluation_sets(tmp_path: Any) -> None:
    """The metric of one of them, wherever it stands."""
    for order in (("a", "b"), ("b", "a")):
        sets = {name: rows(XV, YV) if name == "a" else rows(X[:8], Y[:8]) for name in order}
        hosted = Model()
        host = train(hosted, regularization(monitor="eval_a_loss"), folder=tmp_path, data=sets)
        assert host.state.epoch == STOP
        assert same(plain()[0], hosted.net)
    with pytest.raises(gf.GoodfitError, match=r"'eval_c_loss' must name .* eval_a_loss, .*; did you mean"):
        train(Model(), regularization(monitor="eval_c_loss"), folder=tmp_path, data=sets)


def test_clipping_by_the_host_beside_penalties(tmp_path: Any) -> None:
    """It clips the gradient of the data; the slope of the penalty comes behind it."""
    model = net()
    optimizer = adam(model.parameters())
    gf.Run("L2(0.5)", model, seed=SEED).attach(optimizer)
    for x, y in loader():
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    hosted = Model()
    train(hosted, regularization("L2(0.5)"), folder=tmp_path, num_train_epochs=1, max_grad_norm=0.1)
    assert same(model, hosted.net)


def test_a_second_gradient_through_the_run(tmp_path: Any) -> None:
    model = plain([gf.SAM(0.1), gf.Dropout(0.3)], epochs=2, by_run=True)[0]
    hosted = Model()
    ours = regularization([gf.SAM(0.1), gf.Dropout(0.3)])
    train(hosted, ours, folder=tmp_path, kind=InRun, num_train_epochs=2)
    assert same(model, hosted.net)
    assert not same(model, plain("Dropout(0.3)", epochs=2)[0])


def test_mixed_precision_in_bfloat16(tmp_path: Any) -> None:
    model = Model()
    optimizer = adam(model.parameters())
    gf.Run("L2(0.01), Dropout(0.3)", model.net, example=X[:8], seed=SEED).attach(optimizer)
    for x, y in loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)["loss"]
        loss.backward()
        optimizer.step()
    hosted = Model()
    train(hosted, regularization("L2(0.01), Dropout(0.3)"), folder=tmp_path, num_train_epochs=1, bf16=True)
    assert same(model, hosted)


def test_a_transformer_as_a_whole(tmp_path: Any) -> None:
    """Batches are dicts of keywords, weights are tied, dropout is there already."""
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = transformers.BertForMaskedLM(config)
    words = torch.randint(20, (16, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": one, "labels": one} for one in words]
    ours = Regularization(
        "L1(0.05), WeightDecay(0.1), Dropout(0.2), EarlyStopping(2)", monitor="eval_loss", example={"input_ids": words[:4]}
    )
    host = trainer(model, ours, folder=tmp_path, data=data, num_train_epochs=3)
    host.train_dataset = data
    host.train()
    assert (model.bert.encoder.layer[0].intermediate.dense.weight == 0).any()
    assert model.bert.encoder.layer[0].output.dropout.p == 0.2
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


class Averaged(Ordered):
    """Scores what will be kept."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        run = next(one.run for one in self.callback_handler.callbacks if isinstance(one, Regularization))
        with run.view(loader()) if self.is_in_train else nullcontext():
            return super().evaluate(*args, **kwargs)


def near(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal, but for the rounding of statistics over batches that the host has collated."""
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_what_is_scored_and_kept_is_averaged_and_what_trains_and_is_saved_is_not(tmp_path: Any) -> None:
    model, run, scores = plain(AVERAGED)
    hosted, ours = Model(), regularization(AVERAGED)
    host = train(hosted, ours, folder=tmp_path, kind=Averaged, save_strategy="epoch")
    assert host.state.epoch == len(scores) == STOP
    assert ours.stopped == run.stopped
    near(model, hosted.net)
    assert host.evaluate()["eval_loss"] == pytest.approx(min(scores))
    hosted = Model()
    train(hosted, regularization(AVERAGED), folder=tmp_path, kind=Averaged, resume=tmp_path / "checkpoint-12")
    near(model, hosted.net)
    with pytest.raises(gf.GoodfitError, match=r"validate and call run\.epoch within: with run\.view"):
        train(Model(), regularization(AVERAGED), folder=tmp_path)


# Killed and resumed


class Killer(transformers.TrainerCallback):
    """Ends the process in the middle of an epoch, as the machine would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: Any) -> Path:
    """The checkpoint of epoch 2, of a training that was killed in epoch 3."""
    folder = tmp_path_factory.mktemp("killed")
    code = (
        "import test_adapters_transformers as t; "
        f"t.train(t.Model(), t.regularization(), t.Killer(), folder={str(folder)!r}, save_strategy='epoch')"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert sorted(one.name for one in folder.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    return folder / "checkpoint-8"


@pytest.mark.parametrize("cocktail", [COCKTAIL, MORE], ids=["the same", "a new patience"])
def test_killed_and_resumed_it_stops_at_the_same_epoch_with_the_same_weights(cocktail: Any, killed: Path) -> None:
    model, run, scores = plain(cocktail)
    hosted, ours = Model(), regularization(cocktail)
    assert train(hosted, ours, folder=killed.parent, resume=killed).state.epoch == len(scores)
    assert same(model, hosted.net)
    assert ours.stopped == run.stopped
    assert all(torch.equal(t, ours.run.state_dict()[name]) for name, t in run.state_dict().items() if name != "seconds")


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Any) -> None:
    class Stopper(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 11:
                raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        train(Model(), regularization(), Stopper(), folder=tmp_path, save_strategy="steps", save_steps=5)
    hosted = Model()
    assert train(hosted, regularization(), folder=tmp_path, resume=tmp_path / "checkpoint-10").state.epoch == STOP
    assert same(plain()[0], hosted.net)


@pytest.mark.parametrize(("every", "step"), [(4, 4), (3, 8)])
def test_a_checkpoint_that_was_saved_before_the_check_of_its_step_is_told_of_once(every: int, step: int, tmp_path: Any) -> None:
    """Evaluated at the end of the epoch, behind steps 4 and 8; saved at 3 and 6 all checks so far are in it, and at the last
    step the Trainer always saves."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", gf.GoodfitWarning)
        train(Model(), regularization(), folder=tmp_path, save_strategy="steps", save_steps=every, num_train_epochs=2)
    ours = [str(one.message) for one in given if one.category is gf.GoodfitWarning]
    assert len(ours) == 1
    assert f"The checkpoint of step {step} was saved before the validation, so what resumes from it has heard" in ours[0]


def test_what_had_stopped_stays_stopped_and_goes_on_with_another_patience(tmp_path: Any) -> None:
    first = regularization()
    last = train(Model(), first, folder=tmp_path, save_strategy="epoch").state.global_step
    hosted = Model()
    host = train(hosted, regularization(MORE), folder=tmp_path, resume=tmp_path / f"checkpoint-{last}")
    assert host.state.epoch == STOP + 3
    assert same(plain(MORE)[0], hosted.net)


@pytest.mark.parametrize("kinds", [REST, [*REST[:-1], gf.EMA(0.8, warmup=False)]], ids=["batch norms", "averages"])
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.filterwarnings("ignore:The gradients of several batches:goodfit.GoodfitWarning")
def test_the_step_that_the_trainer_takes_where_all_had_stopped_leaves_no_trace(
    kinds: Any, restore: bool, parts: int, tmp_path: Any
) -> None:
    """It looks whether to stop behind a batch: one that is not kept, and neither evaluated nor saved."""
    cocktail = gf.Cocktail(*kinds, gf.EarlyStopping(3, restore=restore))
    settings = {"kind": Averaged, "save_strategy": "epoch", "gradient_accumulation_steps": parts}
    hosted, first = Model(), regularization(cocktail)
    last = train(hosted, first, folder=tmp_path, **settings).state.global_step
    left = sorted(tmp_path.iterdir())
    resumed, again = Model(), regularization(cocktail)
    host = train(resumed, again, folder=tmp_path, resume=tmp_path / f"checkpoint-{last}", **settings)
    assert again.stopped == first.stopped != ""
    assert same(hosted, resumed)
    assert host.state.global_step == last + (parts == 1)
    assert sorted(tmp_path.iterdir()) == left
    assert not any("eval_loss" in one for one in host.state.log_history if one["step"] > last)


def test_a_checkpoint_from_elsewhere_is_named_and_never_mistaken(killed: Path, tmp_path: Any) -> None:
    shutil.copytree(killed.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / killed.name
    with pytest.raises(gf.GoodfitError, match=r"must have goodfit\.safetensors, and .*here/checkpoint-8 has none"):
        train(Model(), regularization(), folder=tmp_path / "here", resume=moved)
    hosted = Model()
    train(hosted, regularization(checkpoint=moved), folder=tmp_path / "here", resume=moved)
    assert same(plain()[0], hosted.net)
    other = regularization("Dropout(0.1), BatchNorm(), EarlyStopping(3)")
    train(Model(), other, folder=tmp_path / "other", save_strategy="epoch", num_train_epochs=2)
    with pytest.raises(gf.GoodfitError, match="belongs to other weights than those that the Trainer has loaded"):
        train(Model(), regularization(), folder=tmp_path / "other", resume=moved)


class Accident(transformers.TrainerCallback):
    def __init__(self, error: BaseException, epoch: int) -> None:
        self.error, self.epoch = error, epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch == self.epoch:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")], ids=["Ctrl-C", "error"])
def test_after_an_accident_finish_restores_the_best(error: Any, tmp_path: Any) -> None:
    hosted, ours = Model(), regularization()
    host = trainer(hosted, ours, Accident(error, 7), folder=tmp_path)
    with pytest.raises(type(error)):
        host.train()
    assert not same(plain(epochs=7)[0], hosted.net)
    host.evaluate(rows(X, Y))  # of other data, and no check
    ours.finish()
    assert same(plain(epochs=7)[0], hosted.net)
    assert host.evaluate()["eval_loss"] == pytest.approx(valid_loss(plain(epochs=7)[0]))
    assert ours.run.states(gf.EarlyStopping)[0][1]["checks"] == 7
    early = regularization()
    with pytest.raises(type(error)):
        train(Model(), early, Accident(error, 0), folder=tmp_path)
    early.finish()  # of nothing: `finally: regularization.finish()` hides no error


def test_an_evaluation_after_one_that_was_interrupted_is_no_check(tmp_path: Any) -> None:
    """The Trainer then still wants to evaluate, and says that it trains."""

    class Interrupt(transformers.TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.epoch == 3:
                self.on_prediction_step = lambda *rest, **kwargs: None
                raise KeyboardInterrupt

    hosted, ours = Model(), regularization()
    host = trainer(hosted, ours, Interrupt(), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        host.train()
    host.evaluate(rows(X, Y))
    ours.finish()
    assert ours.run.states(gf.EarlyStopping)[0][1]["checks"] == 2
    assert same(plain(epochs=2)[0], hosted.net)


# Several stoppings, and refusals


def test_two_early_stoppings_on_one_metric(tmp_path: Any) -> None:
    patient = patience(9)
    one, two = Model(), Model()
    train(one, regularization([*patient, gf.EarlyStopping(3)]), folder=tmp_path / "one")
    callbacks = regularization(patient), regularization("EarlyStopping(3)", seed=9)
    host = train(two, *callbacks, folder=tmp_path / "two", save_strategy="epoch")
    assert host.state.epoch == STOP
    assert same(one, two)
    assert same(one.net, plain()[0])
    assert [bool(callback.stopped) for callback in callbacks] == [False, True]
    files = sorted((tmp_path / "two" / "checkpoint-4").glob("goodfit*"))
    assert [len(load_file(one)) > 10 for one in files] == [True, True]
    again = Model()
    resumed = tmp_path / "two" / "checkpoint-8"
    train(again, regularization(patient), regularization("EarlyStopping(3)"), folder=tmp_path / "two", resume=resumed)
    assert same(again, one)
    with pytest.raises(gf.GoodfitError, match=r"A second Regularization may only stop the training, got L2\(0\.1\)"):
        trainer(Model(), regularization(), regularization("L2(0.1)"), folder=tmp_path)


@pytest.mark.parametrize(
    ("cocktail", "settings", "reason"),
    [
        (
            [gf.ClipNorm(0.5)],
            {"max_grad_norm": 1.0},
            r"TrainingArguments\(max_grad_norm=1\.0\) clips the gradient before",
        ),
        ("EarlyStopping(3)", {"eval_strategy": "no"}, r"EarlyStopping\(3\) hears the evaluation, and there is none"),
        (
            "EarlyStopping(3)",
            {"load_best_model_at_end": True, "save_strategy": "epoch"},
            r"EarlyStopping\(3\) restores the best weights, and so does load_best_model_at_end=True",
        ),
        ("L2(0.1)", {"auto_find_batch_size": True}, r"auto_find_batch_size=True begins train\(\) anew on weights that have"),
        ([gf.InputNoise(0.1)], {}, r"InputNoise acts in run\.batch, which was not called; add: x, y = run\.batch\(x, y\)"),
        ([gf.Flooding(0.1)], {}, r"Flooding acts in run\.loss, which was not called; add: loss = run\.loss\(x, y\)"),
        ([gf.SAM(0.1)], {}, r"SAM needs a second gradient, which takes one run\.loss\(x, y\) per step \(seen: 0\)"),
    ],
)
def test_what_would_be_wrong_is_refused(cocktail: Any, settings: Any, reason: str, tmp_path: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=reason):
        train(Model(), regularization(cocktail), folder=tmp_path, **settings)


def test_sharding_and_copied_modules_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Trainer has where it sees two GPUs, and Accelerate's state where processes shard."""
    host = trainer(Model(), folder=tmp_path)
    host.args._n_gpu = 2
    with pytest.raises(gf.GoodfitError, match=r"Dropout\(0\.3\) cannot act in nn\.DataParallel"):
        regularization()._refuse(host.args, host.model)
    monkeypatch.setitem(host.accelerator.state.__dict__, "fsdp_plugin", FullyShardedDataParallelPlugin())
    with pytest.raises(gf.GoodfitError, match="FSDP shards the weights"):
        regularization()._refuse(host.args, host.model)


def test_the_decay_of_the_trainer_beside_ours_is_told(tmp_path: Any) -> None:
    with pytest.warns(gf.GoodfitWarning, match="Weights decay twice"):
        train(Model(), regularization("WeightDecay(0.1)"), folder=tmp_path, weight_decay=0.01, num_train_epochs=1)


def test_a_run_is_made_once_for_the_model_that_trains(tmp_path: Any) -> None:
    ours = regularization()
    host = train(Model(), ours, folder=tmp_path, num_train_epochs=1)
    with pytest.raises(gf.GoodfitError, match=r"serves one train\(\), and this one has"):
        host.train()
    with pytest.raises(gf.GoodfitError, match=r"serves one Trainer, once in its callbacks; make a new one"):
        trainer(Model(), ours, folder=tmp_path)
    ours = regularization("L2(0.1)")
    with pytest.raises(gf.GoodfitError, match=r"serves one Trainer, once in its callbacks; make a new one"):
        trainer(Model(), ours, ours, folder=tmp_path)
    with pytest.raises(gf.GoodfitError, match="made its model anew after the regularization"):
        train(Model, regularization(), folder=tmp_path)
    host = trainer(Model(), folder=tmp_path)
    host.add_callback(regularization())
    with pytest.raises(gf.GoodfitError, match="give it to the Trainer where that is made"):
        host.train()
    model = Model()
    host = trainer(model, regularization("BatchNorm()"), folder=tmp_path)
    host.optimizer = adam([p for name, p in model.named_parameters() if "batchnorm" not in name])  # as one made before
    with pytest.raises(gf.GoodfitError, match=r"The optimizer lacks the trainable parameter 0\.batchnorm\.weight"):
        host.train()


def test_what_is_missing_is_named(tmp_path: Any) -> None:
    with pytest.raises(gf.GoodfitError, match=r"BatchNorm\(.*\) acts before the optimizer is made, and needs an input batch"):
        trainer(Model(), regularization("BatchNorm()", example=None), folder=tmp_path)
    with pytest.raises(gf.GoodfitError, match="Model has no submodule 'nett'; did you mean net"):
        trainer(Model(), regularization(model="nett"), folder=tmp_path)
    with pytest.raises(gf.GoodfitError, match=r"'eval_los' must name .* eval_loss, .*; did you mean eval_loss"):
        train(Model(), regularization(monitor="eval_los"), folder=tmp_path)
    with pytest.raises(gf.GoodfitError, match=r"EarlyStopping\(3\) needs the name of the metric"):
        Regularization("EarlyStopping(3)")
