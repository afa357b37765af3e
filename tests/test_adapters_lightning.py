"""Lightning with the one callback equals the plain loop; killed and resumed as if it had not been; else it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import goodfit as gf
from plain import (
    AVERAGED,
    BEST,
    COCKTAIL,
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
    valid_loss,
    validation,
)

lightning = pytest.importorskip("pytorch_lightning")
from goodfit.adapters.lightning import Regularization  # noqa: E402

pytestmark = [  # its own ways with torch, and its advice
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


@pytest.fixture(autouse=True)
def single(strict: Any) -> Any:
    """Hosts move data in single precision."""
    torch.set_default_dtype(torch.float32)


class Module(lightning.LightningModule):
    """The module that everybody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log_dict({"valid_loss": loss, "accuracy": -loss})

    def configure_optimizers(self) -> Any:
        return adam(self.parameters())


class InRun(Module):
    """The same, with what acts on the batch and on the loss."""

    def __init__(self, regularization: Regularization) -> None:
        super().__init__()
        self.regularization = regularization

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.regularization.run.loss(*self.regularization.run.batch(*batch))


def regularization(cocktail: Any = COCKTAIL, **settings: Any) -> Regularization:
    return Regularization(cocktail, **{"monitor": "valid_loss", "example": X[:8], "loss": F.mse_loss, "seed": SEED} | settings)


def trainer(*callbacks: Any, folder: Any = ".", epochs: int = 30, **settings: Any) -> Any:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    checkpoints = any(isinstance(one, lightning.callbacks.Checkpoint) for one in callbacks)
    settings = (
        {"accelerator": "cpu", "devices": 1, "enable_checkpointing": checkpoints, "max_epochs": epochs} | quiet | settings
    )
    return lightning.Trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)


def fit(module: Any, *callbacks: Any, resume: Any = None, **settings: Any) -> Any:
    host = trainer(*callbacks, **settings)
    host.fit(module, loader(), validation(), ckpt_path=resume, **({"weights_only": False} if resume else {}))
    return host


# The same as the plain loop


def test_weights_and_stop_epoch_are_those_of_the_plain_loop() -> None:
    model, run, scores = plain()
    module, ours = Module(), regularization()
    host = fit(module, ours)
    assert host.current_epoch == len(scores) == STOP
    assert same(model, module.net)
    assert ours.stopped == run.stopped != ""


def test_without_a_stop_the_best_comes_back_too() -> None:
    model, _, scores = plain(epochs=5)
    module, ours = Module(), regularization()
    assert fit(module, ours, epochs=5).current_epoch == len(scores) == 5
    assert ours.stopped == ""
    assert same(model, module.net)
    assert valid_loss(model) == min(plain(epochs=n)[1].states(gf.EarlyStopping)[0][1]["best"].item() for n in (1, 2, 3, 4, 5))


def test_a_metric_to_maximize() -> None:
    cocktail = [*REST, gf.EarlyStopping(3, mode="max")]
    model, run, scores = plain(cocktail, score=lambda model: -valid_loss(model))
    module, ours = Module(), regularization(cocktail, monitor="accuracy")
    assert fit(module, ours).current_epoch == len(scores) == STOP
    assert same(model, module.net)
    assert ours.stopped == run.stopped


def test_what_acts_on_batch_and_loss_acts_in_the_step_of_the_module() -> None:
    cocktail = [*COCKTAIL, gf.InputNoise(0.3), gf.Flooding(0.05)]
    model, _, scores = plain(cocktail, by_run=True)
    ours = regularization(cocktail)
    module = InRun(ours)
    assert fit(module, ours).current_epoch == len(scores)
    assert same(model, module.net)
    assert not same(model, plain()[0])


@pytest.mark.filterwarnings("ignore:The gradients of several batches:goodfit.GoodfitWarning")
def test_gradient_accumulation() -> None:
    model, _, scores = plain(parts=2)
    module = Module()
    assert fit(module, regularization(), accumulate_grad_batches=2).current_epoch == len(scores)
    assert same(model, module.net)


def test_several_checks_per_epoch() -> None:
    """Stopped at the third check without improvement, in the middle of an epoch."""

    class Rising(Module):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("valid_loss", float(self.trainer.global_step))

    ours = regularization("EarlyStopping(3)")
    host = fit(Rising(), ours, val_check_interval=2)
    assert host.global_step == 8  # checks at steps 2 (best), 4, 6, 8
    assert ours.stopped == "no improvement in 3 checks: best 2 at check 1, 8 at check 4"


def test_clipping_by_the_host_beside_penalties() -> None:
    """It clips the gradient of the data; the slope of the penalty comes behind it."""

    model = net()
    run = gf.Run("L2(0.5)", model, seed=SEED)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    fit(module, regularization("L2(0.5)"), epochs=2, gradient_clip_val=0.1)
    assert same(model, module.net)


def test_a_second_gradient_by_the_closure_of_lightning() -> None:
    model = net()
    run = gf.Run([gf.SAM(0.1), gf.Dropout(0.3)], model, example=X[:8], seed=SEED)
    optimizer = adam(model.parameters())
    run.attach(optimizer)

    for batch in loader():

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
    module = Module()
    fit(module, regularization([gf.SAM(0.1), gf.Dropout(0.3)]), epochs=1)
    assert same(model, module.net)
    assert not same(model, plain("Dropout(0.3)", epochs=1)[0])


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return adam(self.net[:2].parameters()), optim.SGD(self.net[2:].parameters(), lr=0.1)


def test_manual_optimization_with_two_optimizers() -> None:
    model = net()
    run = gf.Run("L1(1e-3), L2(0.01), Dropout(0.3)", model, example=X[:8], seed=SEED)
    optimizers = adam(model[:2].parameters()), optim.SGD(model[2:].parameters(), lr=0.1)
    run.attach(*optimizers)
    for _ in range(2):
        for x, y in loader():
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    module = Manual()
    fit(module, regularization("L1(1e-3), L2(0.01), Dropout(0.3)"), epochs=2)
    assert same(model, module.net)


def test_mixed_precision_in_bfloat16() -> None:
    model = net()
    run = gf.Run("L2(0.01), Dropout(0.3)", model, example=X[:8], seed=SEED)
    optimizer = adam(model.parameters())
    run.attach(optimizer)
    for x, y in loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    module = Module()
    fit(module, regularization("L2(0.01), Dropout(0.3)"), epochs=1, precision="bf16-mixed")
    assert same(model, module.net)


def test_double_precision_keeps_the_best_in_double_precision(tmp_path: Any) -> None:
    ours = regularization()
    module = Module()
    fit(module, ours, precision="64-true", epochs=3)
    kept = {name: t for name, t in ours.run.state_dict().items() if ".weights." in name}
    assert {t.dtype for t in kept.values()} == {torch.float64}
    assert all(torch.equal(t, module.net.get_parameter(name.split(".weights.")[1])) for name, t in kept.items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module() -> None:
    model, _, scores = plain()
    module, ours = Module(), regularization()
    host = trainer(ours)
    host.fit(torch.compile(module, backend="eager"), loader(), validation())
    assert host.current_epoch == len(scores)
    assert same(model, module.net)


@pytest.mark.slow
def test_two_processes_are_one_with_batches_twice_as_large(tmp_path: Any) -> None:
    """Each scores its own half of the validation, and both decide by the mean."""
    file = tmp_path / "weights.pt"
    code = f"""
import torch, test_adapters_lightning as t
from plain import XV, YV, X, Y

class Share(torch.utils.data.Sampler):
    def __init__(self, rows): self.rows = rows
    def __len__(self): return self.rows // 2
    def __iter__(self): return iter(range(torch.distributed.get_rank(), self.rows, 2))

def loader(x, y):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, sampler=Share(len(x)))

module, ours = t.Module(), t.regularization("L2(0.01), L1(1e-3), EarlyStopping(3)")
host = t.trainer(ours, devices=2, strategy="ddp_fork", epochs=40, use_distributed_sampler=False)
host.fit(module, loader(X, Y), loader(XV, YV))
torch.save(module.net.state_dict(), {str(file)!r})
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    model, run, scores = plain("L2(0.01), L1(1e-3), EarlyStopping(3)", epochs=40, size=16)
    assert run.stopped
    assert len(scores) < 40
    theirs = torch.load(file, weights_only=True)
    assert all(torch.allclose(t, theirs[name], rtol=0, atol=1e-6) for name, t in model.state_dict().items())


# Killed and resumed


class Killer(lightning.Callback):
    """Ends the process in the middle of an epoch, as the machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def saver(folder: Any, **settings: Any) -> Any:
    return lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, **settings)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: Any) -> Path:
    """A folder with the checkpoints of a training that was killed in its third epoch, one step before the end."""
    folder = tmp_path_factory.mktemp("killed")
    code = f"import test_adapters_lightning as t; t.fit(t.Module(), t.regularization(), t.saver({str(folder)!r}), t.Killer(11))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (folder / "last.ckpt").exists()
    assert not (folder / "epoch=2.ckpt").exists()
    return folder


def test_killed_and_resumed_it_stops_at_the_same_epoch_with_the_same_weights(killed: Path) -> None:
    model, run, scores = plain()
    module, ours = Module(), regularization()
    assert fit(module, ours, resume=killed / "last.ckpt").current_epoch == len(scores)
    assert same(model, module.net)
    assert ours.stopped == run.stopped
    assert all(torch.equal(t, ours.run.state_dict()[name]) for name, t in run.state_dict().items() if name != "seconds")


def test_a_new_patience_wins_over_the_one_that_was_saved(killed: Path) -> None:
    patient = patience(6)
    model, run, scores = plain(patient)
    module, ours = Module(), regularization(patient)
    assert fit(module, ours, resume=killed / "last.ckpt").current_epoch == len(scores) > STOP
    assert same(model, module.net)
    assert ours.stopped == run.stopped


def test_what_had_stopped_stays_stopped_and_goes_on_with_another_patience(tmp_path: Any) -> None:
    first = regularization()
    assert fit(Module(), first, saver(tmp_path)).current_epoch == STOP
    module, again = Module(), regularization()
    host = fit(module, again, resume=tmp_path / "last.ckpt")
    assert (host.current_epoch, host.global_step) == (STOP, 4 * STOP)
    assert again.stopped == first.stopped
    assert same(plain()[0], module.net)
    patient = patience(6)
    module, more = Module(), regularization(patient)
    assert fit(module, more, resume=tmp_path / "last.ckpt").current_epoch == STOP + 3
    assert same(plain(patient)[0], module.net)


@pytest.mark.parametrize("restore", [True, False])
def test_what_had_stopped_within_an_epoch_stays_there(restore: bool, tmp_path: Any) -> None:
    """At the second check without improvement, which is at step 6 of two epochs of 4."""
    cocktail = gf.Cocktail(*REST, gf.EarlyStopping(2, mode="max", restore=restore))
    saved = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="valid_loss", filename="{step}", save_top_k=-1)
    module, first = Module(), regularization(cocktail)
    assert fit(module, first, saved, val_check_interval=2).global_step == 6
    resumed, again = Module(), regularization(cocktail)
    assert fit(resumed, again, resume=tmp_path / "step=6.ckpt", val_check_interval=2).global_step == 6
    assert again.stopped == first.stopped
    assert same(module.net, resumed.net)


class Accident(lightning.Callback):
    def __init__(self, epoch: int, error: BaseException) -> None:
        self.epoch, self.error = epoch, error

    def on_train_epoch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), SystemExit), (OSError("disk"), OSError)], ids=["Ctrl-C", "error"]
)
def test_after_an_accident_the_best_is_back_and_the_checkpoint_of_it_goes_on(error: Any, raised: Any, tmp_path: Any) -> None:
    """Behind the seventh check, where the fifth was the best: the checkpoint holds the last weights, and not those."""
    module, before = Module(), signal.getsignal(signal.SIGINT)
    saved = lightning.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(raised):
        fit(module, regularization(), saved, Accident(7, error), folder=tmp_path)
    signal.signal(signal.SIGINT, before)  # Lightning lets nobody interrupt it twice
    assert same(plain(epochs=7)[0], module.net)
    assert plain(epochs=7)[1].states(gf.EarlyStopping)[0][1]["best_check"] == BEST
    module = Module()
    again = regularization()
    host = fit(module, again, resume=tmp_path / "on_exception.ckpt")
    assert (again.stopped, host.global_step) == (plain()[1].stopped, STOP * 4)
    assert same(plain()[0], module.net)


def test_an_accident_before_the_first_score_leaves_the_error_alone() -> None:
    with pytest.raises(OSError, match="disk"):
        fit(Module(), regularization(), Accident(0, OSError("disk")))


@pytest.mark.parametrize(("every", "told"), [(4, 1), (3, 0)])
def test_a_checkpoint_that_was_saved_before_the_check_of_its_step_is_told_of_once(every: int, told: int, tmp_path: Any) -> None:
    """Validated at steps 4 and 8; saved at 3 and 6 all checks so far are in it."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", gf.GoodfitWarning)
        fit(Module(), regularization(), saver(tmp_path, every_n_train_steps=every), epochs=2)
    ours = [str(one.message) for one in given if one.category is gf.GoodfitWarning]
    assert len(ours) == told
    assert all("The checkpoint of step 4 was saved before the validation, so what resumes" in one for one in ours)


def test_checkpoints_that_cannot_go_on_are_refused(tmp_path: Any) -> None:
    fit(Module(), saver(tmp_path / "bare"), epochs=1)
    with pytest.raises(gf.GoodfitError, match=r"has no Regularization\{'monitor': 'valid_loss', 'place': 0\}: it was"):
        fit(Module(), regularization("L2(0.1), EarlyStopping(3)"), resume=tmp_path / "bare" / "last.ckpt")
    host = fit(Module(), regularization(), epochs=1)
    host.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(gf.GoodfitError, match="written after the best weights were restored"):
        fit(Module(), regularization(), resume=tmp_path / "end.ckpt")


def test_a_checkpoint_is_validated_in_another_process_without_a_fit(tmp_path: Any) -> None:
    """The model is built for it, as its weights have the batch norms that were inserted."""
    host = fit(Module(), regularization(), epochs=2)
    host.save_checkpoint(tmp_path / "end.ckpt")
    module = Module()
    other = trainer(regularization())
    scores = other.validate(module, validation(), ckpt_path=tmp_path / "end.ckpt", weights_only=False, verbose=False)
    assert scores[0]["valid_loss"] == pytest.approx(valid_loss(plain(epochs=2)[0]))


# Averaged weights


def test_what_is_scored_and_kept_is_averaged_and_what_trains_and_is_saved_is_not(tmp_path: Any) -> None:
    model, run, scores = plain(AVERAGED)
    module, ours = Module(), regularization(AVERAGED)
    assert fit(module, ours, saver(tmp_path)).current_epoch == len(scores) == STOP
    assert ours.stopped == run.stopped
    assert same(model, module.net)
    module = Module()
    fit(module, regularization(AVERAGED), resume=tmp_path / "epoch=2.ckpt")
    assert same(model, module.net)


def test_an_error_in_the_validation_leaves_what_trains_in_the_checkpoint(tmp_path: Any) -> None:
    class Failing(Module):
        def on_validation_epoch_end(self) -> None:
            if self.trainer.current_epoch == 6 and not self.trainer.sanity_checking:
                raise OSError("disk")

    module = Failing()
    saved = lightning.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(OSError, match="disk"):
        fit(module, regularization(AVERAGED), saved, saver(tmp_path), folder=tmp_path)
    assert same(plain(AVERAGED, epochs=6)[0], module.net)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, saved[f"net.{name}"]) for name, t in plain(REST, epochs=7)[0].state_dict().items())
    module = Module()
    fit(module, regularization(AVERAGED), resume=tmp_path / "last.ckpt")
    assert same(plain(AVERAGED)[0], module.net)


# Several stoppings


def test_two_early_stoppings_on_one_metric(tmp_path: Any) -> None:
    """In one cocktail or in two callbacks: the one with less patience decides, and each has its own state."""
    one, two = Module(), Module()
    patient = patience(9)
    expected = STOP
    assert fit(one, regularization([*patient, gf.EarlyStopping(3)])).current_epoch == expected
    callbacks = regularization(patient), regularization("EarlyStopping(3)", seed=9)
    host = fit(two, *callbacks, saver(tmp_path))
    assert host.current_epoch == expected
    assert [bool(callback.stopped) for callback in callbacks] == [False, True]
    assert same(one, two)
    assert same(one.net, plain()[0])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if key.startswith("Regularization")]) == 2
    with pytest.raises(gf.GoodfitError, match=r"A second Regularization may only stop the training, got L2\(0\.1\)"):
        fit(Module(), regularization(), regularization("L2(0.1)"))


# What comes before a fit, and around it


def test_the_tuner_finds_a_rate_without_regularizers_and_leaves_no_trace(tmp_path: Any) -> None:
    module, ours = Module(), regularization()
    module.lr = 0.02
    host = trainer(ours, folder=tmp_path)
    tuner = lightning.tuner.Tuner(host)
    tuner.lr_find(module, loader(), validation(), num_training=8, update_attr=False)
    host.fit(module, loader(), validation())
    assert host.current_epoch == STOP
    assert same(plain()[0], module.net)


def test_one_callback_serves_one_fit_of_one_module_and_is_listed_once() -> None:
    reason = r"serves one module and one trainer\.fit, and this one has; make a new one"
    ours = regularization()
    host = fit(Module(), ours, epochs=1)
    for other in (host, trainer(ours)):
        with pytest.raises(gf.GoodfitError, match=reason):
            other.fit(Module(), loader(), validation())
    host = trainer(regularization())
    host.validate(Module(), validation(), verbose=False)
    with pytest.raises(gf.GoodfitError, match=reason):
        host.fit(Module(), loader(), validation())
    ours = regularization()
    with pytest.raises(gf.GoodfitError, match=r"The same Regularization is in callbacks=\[\.\.\.\] twice; list it once"):
        fit(Module(), ours, ours)


def test_a_missing_metric_is_named_beside_those_that_are_there() -> None:
    with pytest.raises(gf.GoodfitError, match=r"'valid_los' must name .* has: accuracy, valid_loss; did you mean valid_loss"):
        fit(Module(), regularization(monitor="valid_los"))
    with pytest.raises(gf.GoodfitError, match=r"EarlyStopping\(3\) needs the name of the metric"):
        Regularization("EarlyStopping(3)")
    assert fit(Module(), Regularization("L2(0.1)"), epochs=1).current_epoch == 1


# Refusals


@pytest.mark.parametrize(
    ("cocktail", "settings", "reason"),
    [
        ([gf.InputNoise(0.1)], {}, r"InputNoise acts in run\.batch, which was not called; add: x, y = run\.batch\(x, y\)"),
        ([gf.Flooding(0.1)], {}, r"Flooding acts in run\.loss, which was not called; add: loss = run\.loss\(x, y\)"),
        (
            [gf.ClipNorm(0.5)],
            {"gradient_clip_val": 0.1},
            r"Trainer\(gradient_clip_val=0\.1\) clips the gradient before ClipNorm",
        ),
        ([gf.SAM(0.5)], {"accumulate_grad_batches": 2}, r"SAM\(0\.5\) .* take only the last of its 2 batches again"),
        ("EarlyStopping(3)", {"limit_val_batches": 0}, r"EarlyStopping\(3\) hears the validation, and there is none"),
    ],
)
def test_what_would_be_wrong_is_refused(cocktail: Any, settings: Any, reason: str) -> None:
    with pytest.raises(gf.GoodfitError, match=reason):
        fit(Module(), regularization(cocktail), **settings)


@pytest.mark.parametrize(
    "averager",
    [
        lightning.callbacks.WeightAveraging(),
        lightning.callbacks.EMAWeightAveraging(decay=0.9),
        lightning.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2),
    ],
    ids=lambda one: type(one).__name__,
)
def test_averages_of_lightning_serve_behind_the_regularization_where_nothing_is_restored(averager: Any) -> None:
    reason = f"gives the weights to keep, and {type(averager).__name__} puts its averages in their place; drop"
    for cocktail in ("EarlyStopping(3)", [gf.EMA(0.8, warmup=False)]):
        with pytest.raises(gf.GoodfitError, match=reason):
            fit(Module(), regularization(cocktail), averager)
    with pytest.raises(gf.GoodfitError, match=r"a copy of the module without BatchNorm\(.*\); put it behind Regularization"):
        fit(Module(), averager, regularization("BatchNorm()"))
    module, bare = Module(), Module()
    fit(module, regularization("L2(0.1), BatchNorm()"), averager, epochs=4)
    fit(bare, regularization("L2(0.1), BatchNorm()"), epochs=4)
    assert not same(module.net, bare.net)


def test_a_second_gradient_without_a_closure_is_refused() -> None:
    with pytest.raises(gf.GoodfitError, match="A second gradient needs a closure that runs backward"):
        fit(Manual(), regularization([gf.SAM(0.1)]))


def test_the_decay_of_the_optimizer_beside_ours_is_told() -> None:
    class Decayed(Module):
        def configure_optimizers(self) -> Any:
            return optim.AdamW(self.parameters())

    with pytest.warns(gf.GoodfitWarning, match="Weights decay twice"):
        fit(Decayed(), regularization("WeightDecay(0.1)"), epochs=1)


def test_a_fused_optimizer_that_unscales_by_itself_is_refused() -> None:
    class Fused(Module):
        def configure_optimizers(self) -> Any:
            return optim.AdamW(self.parameters(), fused=True, weight_decay=0.0)

    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(gf.GoodfitError, match="A fused AdamW unscales fp16 gradients inside its step"):
        fit(Fused(), regularization("L2(0.1)"), plugins=plugin)
    module = Module()
    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(module, regularization("L2(0.1)"), plugins=plugin, epochs=1)


def test_sharded_weights_are_refused() -> None:
    host = trainer()
    host.strategy.__class__ = type("Mine", (lightning.strategies.FSDPStrategy,), {})  # a Trainer would ask it for a GPU
    with pytest.raises(gf.GoodfitError, match=r"FSDPStrategy shards the weights"):
        regularization()._refuse(host, Module())


def test_layers_that_are_made_too_late_are_refused() -> None:
    class Late(Module):
        def configure_model(self) -> None:
            self.net.append(nn.Linear(1, 1))

    with pytest.raises(gf.GoodfitError, match=r"5\.bias was made or removed after the regularization"):
        fit(Late(), regularization("L2(0.1)"))


def test_where_the_model_is() -> None:
    class Forward(Module):
        example_input_array = X[:8]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)

    ours = Regularization("BatchNorm()")
    fit(module := Forward(), ours, epochs=1)
    assert ours.run.model is module
    with pytest.raises(gf.GoodfitError, match=r"Two has no forward .* Regularization\(\.\.\., model='net'\)"):
        fit(Two(), regularization())
    with pytest.raises(gf.GoodfitError, match=r"Two has no submodule 'nett'; did you mean net or net"):
        fit(Two(), regularization(model="nett"))
    with pytest.raises(gf.GoodfitError, match=r"BatchNorm\(.*\) acts before the optimizer is made, and needs an input batch"):
        fit(Module(), regularization("BatchNorm()", example=None))
    with pytest.raises(gf.GoodfitError, match="has no run yet"):
        regularization().run
