"""Predictions with dropout on: everything that drops does, nothing else changes, and the numbers are those of the formulas."""

from __future__ import annotations

import copy
import random
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit import GoodfitError, GoodfitWarning, mc_dropout, mc_predict
from goodfit.layers.dropout import SeededLayer
from goodfit.regularizers.dropout import SeededDropout
from goodfit.sampling.prediction import of_classes
from nets import Net

ROWS = torch.randn(4, 8, dtype=torch.float64)
SERIES = torch.randn(4, 5, 8, dtype=torch.float64)
IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64)


class InTraining(nn.Module):
    """A layer that does something in training only."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if self.training else x


def per_row(x: Tensor) -> Tensor:
    return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.7) / 0.7


def by_floor(x: Tensor) -> Tensor:
    return x / 0.7 * (0.7 + torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype)).floor_()


def whole_batch(x: Tensor) -> Tensor:
    return x * torch.empty(1).bernoulli_(0.5) / 0.5


def locked(x: Tensor) -> Tensor:
    return x.masked_fill(torch.rand(1, *x.shape[1:]) < 0.3, 0) / 0.7


def half_filled(x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    mask[..., :3].bernoulli_(0.5).div_(0.5)
    return x * mask


def patches(x: Tensor) -> Tensor:
    kept = torch.randn(x.shape[:2]).argsort(1)[:, :3]
    return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def heads(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(F.scaled_dot_product_attention(h, h, h, dropout_p=m.p if m.training else 0.0))


def with_p(net: Net, p: float = 0.3) -> Net:
    net.p = p
    return net


def connect(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, F.dropout(m.a.weight, 0.4, m.training))


def layers_dropped(m: Any, x: Tensor) -> Tensor:
    for layer in (m.a, m.b, m.c):
        if m.training and torch.rand([]) < 0.3:
            continue
        x = layer(x)
    return x


def asks_above(m: Any, x: Tensor) -> Tensor:
    m.b.act = lambda h: F.dropout(h, 0.5, m.training)
    return m.b(m.a(x))


def lin() -> nn.Linear:
    return nn.Linear(8, 8)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True), 2)


DROPPERS: dict[str, tuple[Callable[[], nn.Module], Tensor, bool]] = {
    "module": (lambda: nn.Sequential(lin(), nn.Dropout(0.3), lin()), ROWS, True),
    "channels": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.3), nn.Flatten()), IMAGES, True),
    "alpha": (lambda: nn.Sequential(lin(), nn.AlphaDropout(0.3)), ROWS, True),
    "alpha by features": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.FeatureAlphaDropout(0.3)), IMAGES, True),
    "function": (lambda: Net(lambda m, x: m.b(F.dropout(m.a(x), 0.3, m.training)), a=lin(), b=lin()), ROWS, True),
    "function in place": (lambda: Net(lambda m, x: F.dropout(m.a(x), 0.3, m.training, True), a=lin()), ROWS, True),
    "attention": (lambda: with_p(Net(heads, a=lin(), b=lin())), SERIES, True),
    "lstm": (lambda: Net(lambda m, x: m.a(x)[0], a=nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)), SERIES, True),
    "gru, time first": (lambda: Net(lambda m, x: m.a(x)[0], a=nn.GRU(8, 8, 2, dropout=0.3)), SERIES, False),
    "multihead": (
        lambda: Net(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)),
        SERIES,
        True,
    ),
    "encoder with a fast path": (encoder, SERIES, True),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SERIES, True),
    "drop path": (lambda: nn.Sequential(lin(), InTraining(per_row), lin()), SERIES, True),
    "drop path by floor": (lambda: nn.Sequential(lin(), InTraining(by_floor)), SERIES, True),
    "depth for the batch": (lambda: nn.Sequential(lin(), InTraining(whole_batch)), ROWS, False),
    "locked": (lambda: nn.Sequential(lin(), InTraining(locked)), SERIES, False),
    "mask in a view": (lambda: nn.Sequential(lin(), InTraining(half_filled)), ROWS, True),
    "patches": (lambda: Net(lambda m, x: m.b(m.a(x)).mean(1), a=lin(), b=InTraining(patches)), SERIES, True),
    "in a module with weights": (lambda: Net(lambda m, x: per_row(m.a(x)) if m.training else m.a(x), a=lin()), ROWS, True),
    "weights": (lambda: Net(connect, a=lin()), ROWS, False),
    "layers": (lambda: Net(layers_dropped, a=lin(), b=lin(), c=lin()), ROWS, False),
    "asks above": (lambda: Net(asks_above, a=lin(), b=InTraining(per_row)), ROWS, True),
}


def known(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was."""
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "buffers": [b.clone().tolist() for b in model.buffers()],
        "noise": [(m.name, int(m.seed), id(m.clock), m._calls) for m in model.modules() if isinstance(m, SeededDropout)],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


@pytest.mark.parametrize("name", DROPPERS)
def test_everything_drops_as_in_training(name: str) -> None:
    make, x, vectorised = DROPPERS[name]
    model = make().eval()
    next(model.modules()).train()  # modes are mixed, and come back so
    before = known(model)
    result = mc_predict(model, x, samples=8, seed=1)
    assert known(model) == before
    assert result.vectorised == vectorised
    assert result.samples.shape[:2] == (8, 4)
    assert float(result.variance.mean()) > 0
    assert torch.equal(result.samples, mc_predict(model, x, samples=8, seed=1).samples)
    assert not torch.equal(result.samples, mc_predict(model, x, samples=8, seed=2).samples)
    with torch.no_grad(), mc_dropout(model, x, seed=5):
        sampled = [model(x) for _ in range(3)]
    with torch.no_grad():
        model.train()
        torch.manual_seed(5)
        trained = [model(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(sampled, trained, strict=True))


def within(found: Tensor, expected: Tensor, samples: int, wide: float = 5.0) -> None:
    """Variances within five standard errors; that of a variance is at most √((κ − 1)/S) of it, here with κ = 5."""
    torch.testing.assert_close(found, expected, rtol=wide * (4 / samples) ** 0.5, atol=1e-12)


def test_mean_and_variance_by_hand() -> None:
    p, count = 0.3, 20_000
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 1, bias=False))
    hidden, weight = model[:2](ROWS).detach(), model[3].weight.detach()
    variance = (weight**2 * hidden**2).sum(1, keepdim=True) * p / (1 - p)
    result = mc_predict(model, ROWS, samples=count)
    assert result.vectorised
    within(result.variance, variance, count)
    assert bool(((result.mean - hidden @ weight.T).abs() < 5 * (variance / count).sqrt()).all())
    apart = torch.corrcoef(result.samples[:, :, 0].T) - torch.eye(4)
    assert float(apart.abs().max()) < 5 / count**0.5  # rows have masks of their own


def test_masks_that_rows_share_stay_shared() -> None:
    p, count = 0.4, 4000
    model = Net(connect, a=nn.Linear(8, 1, bias=False))
    weight = model.a.weight.detach()
    result = mc_predict(model, ROWS, samples=count)
    assert not result.vectorised
    covariance = (ROWS * weight**2) @ ROWS.T * p / (1 - p)
    within(result.variance[:, 0], covariance.diag(), count)
    found = torch.cov(result.samples[:, :, 0].T)
    assert float((found - covariance).abs().max()) < 5 * float(covariance.diag().max()) * (2 / count) ** 0.5


@pytest.mark.parametrize("name", ["module", "attention", "lstm", "encoder with a fast path", "drop path", "patches"])
def test_side_by_side_is_the_loop(name: str) -> None:
    make, x, _ = DROPPERS[name]
    model, count = make(), 500
    beside = mc_predict(model, x, samples=count)
    assert beside.vectorised
    with torch.no_grad(), mc_dropout(model, x, seed=9):
        loop = torch.stack([model(x) for _ in range(count)])
    spread = ((beside.variance + loop.var(0)) / count).sqrt()
    z = ((beside.mean - loop.mean(0)) / spread.clamp(min=1e-12)).flatten()
    assert float(z.abs().max()) < 5.5
    assert abs(float((beside.variance.sqrt() / loop.std(0)).log().mean())) < 0.15


def test_batch_norms_do_not_notice() -> None:
    def norm(c: int) -> nn.Module:
        layer = nn.BatchNorm2d(c)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        nn.init.normal_(layer.running_mean)
        return layer

    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 2, 3), norm(2)).train()
    model[1].eval()
    before = known(model)
    result = mc_predict(model, IMAGES, samples=4)
    assert result.vectorised
    assert known(model) == before
    other = copy.deepcopy(model).train()
    for layer in (other[1], other[5]):
        layer.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = other(IMAGES.repeat(4, 1, 1, 1)).view(4, 4, 2, 2, 2)
    assert torch.equal(result.samples, expected)


def test_a_norm_by_hand_that_drops_is_refused() -> None:
    def normed(m: Any, x: Tensor) -> Tensor:
        return F.dropout(F.batch_norm(x, m.mean, m.var, training=m.training), 0.5, m.training)

    model = Net(normed)
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("var", torch.ones(8))
    before = known(model)
    with pytest.raises(GoodfitError, match="updates 'mean' in the same module that drops"):
        mc_predict(model, ROWS)
    assert known(model) == before
    apart = Net(
        lambda m, x: F.dropout(m.norm(x), 0.5, m.training),
        norm=Net(lambda m, x: F.batch_norm(x, m.mean, m.var, training=m.training)),
    )
    apart.norm.register_buffer("mean", torch.ones(8))
    apart.norm.register_buffer("var", torch.ones(8))
    assert mc_predict(apart, ROWS).on == ("",)
    assert torch.equal(apart.norm.mean, torch.ones(8))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_act_on_each_other_are_run_as_one_batch(rows: int) -> None:
    """Copies of one batch have its statistics, but under dropout each copy has its own."""
    x = SERIES[:rows].transpose(1, 2)
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    result = mc_predict(nn.Sequential(nn.Dropout(0.5), norm), x, samples=10)
    assert not result.vectorised
    torch.testing.assert_close(result.samples.mean((1, 3)), torch.zeros(10, 8))
    centred = Net(lambda m, x: m.drop(x - x.mean()), drop=nn.Dropout(0.5))
    assert not mc_predict(centred, ROWS[:rows], samples=10).vectorised


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 30])
@pytest.mark.parametrize(
    "act",
    [
        lambda h: centred(h * (torch.rand_like(h) > 0.4) / 0.6),
        lambda h: centred(F.dropout(h, 0.4)),
        lambda h: centred(per_row(h)),
        lambda h: F.dropout(h, 0.4) + h.flip(0),
        lambda h: F.dropout(h, 0.4) + h.cumsum(0),
        lambda h: F.dropout(h, 0.4) + h.roll(1, 0),
        lambda h: F.dropout(h, 0.4) + torch.arange(len(h), dtype=h.dtype)[:, None],
        lambda h: h - (h * (torch.rand_like(h) > 0.4) - 0.6 * h).mean(0),  # nothing where each mask is its mean
    ],
)
@pytest.mark.filterwarnings("ignore:mc_dropout finds that Net computes more than dropout")
def test_rows_that_act_on_each_other_in_training_alone(act: Callable[[Tensor], Tensor], rows: int) -> None:
    model = Net(lambda m, x: act(m.a(x)) if m.training else m.a(x), a=lin())
    x = torch.randn(rows, 8, dtype=torch.float64)
    assert not mc_predict(model, x, samples=30).vectorised
    if rows > 1:
        with pytest.raises(GoodfitError, match=f"cannot split {rows} rows"):
            mc_predict(model, x, batch_size=1)


def test_variance_where_rows_act_on_each_other_in_training() -> None:
    """x₁, x₂ with masks of variance p/(1 − p), centred: (x₁² + x₂²)/4 · p/(1 − p) for either row."""
    model, count = Net(lambda m, x: centred(F.dropout(x, 0.4)) if m.training else x), 4000
    with pytest.warns(GoodfitWarning, match="computes more than dropout"):
        result = mc_predict(model, torch.tensor([[1.0], [3.0]], dtype=torch.float64), samples=count)
    within(result.variance, torch.full((2, 1), 10 / 4 * 0.4 / 0.6, dtype=torch.float64), count)


@pytest.mark.parametrize(
    ("layer", "reason", "warned"),
    [
        (nn.RReLU(), "rrelu_with_noise.* drops nothing", False),
        (InTraining(lambda x: x + torch.randn_like(x)), "randn_like.* drops nothing", False),
        (InTraining(lambda x: x[torch.randperm(len(x))]), "randperm.* drops nothing", False),
        (InTraining(lambda x: x.flip(1) if torch.rand(1) < 0.5 else x), "decides something by a random number", True),
        (InTraining(lambda x: x * random.random()), "Python's or NumPy's generator", True),
        (InTraining(lambda x: x * np.random.rand()), "Python's or NumPy's generator", True),
        (InTraining(lambda x: x[:2]), "returns outputs of another form", False),
        (InTraining(lambda x: 1 // 0 * x), "fails with ZeroDivisionError", True),
    ],
)
def test_what_does_not_drop_stays_off_and_is_named(layer: nn.Module, reason: str, warned: bool) -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5), layer, lin())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mc_dropout(model, ROWS) as dropping:
            assert not layer.training
    assert dropping.on == ("1",)
    assert list(dropping.off) == ["2"]
    assert re.search(reason, dropping.off["2"])
    assert [w.category for w in caught] == [GoodfitWarning] * warned


def test_what_a_dropping_module_does_besides_is_told() -> None:
    def louder(m: Any, x: Tensor) -> Tensor:
        h = F.dropout(m.a(x), 0.3, m.training)
        return 1.1 * h if m.training else h

    def noisy(m: Any, x: Tensor) -> Tensor:
        return F.dropout(m.a(x), 0.3, m.training) + (torch.randn_like(x) if m.training else 0)

    with pytest.warns(GoodfitWarning, match="computes more than dropout"), mc_dropout(Net(louder, a=lin()), ROWS):
        pass
    with pytest.warns(GoodfitWarning, match="also adds noise"), mc_dropout(Net(noisy, a=lin()), ROWS):
        pass


def test_heads_for_training_stay_off() -> None:
    def auxiliary(m: Any, x: Tensor) -> Any:
        h = m.drop(m.a(x))
        return (m.b(h), m.aux(h)) if m.training else m.b(h)

    model = Net(auxiliary, a=lin(), drop=nn.Dropout(0.5), b=lin(), aux=nn.Sequential(lin(), nn.Dropout(0.7)))
    result = mc_predict(model, ROWS)
    assert result.on == ("drop", "aux.1")
    assert result.vectorised


def test_what_cannot_drop_alone_is_refused() -> None:
    def auxiliary(m: Any, x: Tensor) -> Any:
        h = F.dropout(m.a(x), 0.5, m.training)
        return (h, h) if m.training else h

    with pytest.raises(GoodfitError, match="cannot let Net drop: in train mode it returns outputs of another form"):
        mc_predict(Net(auxiliary, a=lin()), ROWS)


def test_a_detector_is_refused() -> None:
    def detector(m: Any, x: Tensor, targets: Any = None) -> Any:
        if m.training and targets is None:
            raise ValueError("targets should not be None")
        boxes = m.drop(m.a(x))
        return [{"boxes": one, "scores": one.sum(-1)} for one in boxes]

    model = Net(detector, a=lin(), drop=nn.Dropout(0.5))
    with pytest.raises(GoodfitError, match="one tensor of real numbers"), pytest.warns(GoodfitWarning, match="targets"):
        mc_predict(model, ROWS)
    assert model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(lin(), nn.ReLU()),
        lambda: nn.Sequential(lin(), nn.Dropout(0.0)),
        lambda: nn.Sequential(lin(), SeededDropout(p=0.0)),
        lambda: nn.Sequential(lin(), nn.RReLU()),
        lambda: Net(lambda m, x: F.dropout(m.a(x), 0.5, training=False), a=lin()),
    ],
)
def test_a_model_that_drops_nothing_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(GoodfitError, match="nothing that drops"):
        mc_predict(model, ROWS)
    with pytest.raises(GoodfitError, match="nothing that drops"), mc_dropout(model):
        model(ROWS)
    assert model.training
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_wrapped_models_are_refused() -> None:
    plain = nn.Sequential(lin(), nn.Dropout(0.5))
    for model, match in (
        (nn.DataParallel(plain), "DataParallel"),
        (torch.compile(plain), "compiled"),
        (nn.Sequential(torch.compile(plain)), "compiled"),
        (torch.jit.script(plain), "RecursiveScriptModule"),
        (nn.Sequential(nn.LazyLinear(3), nn.Dropout()), "lazy"),
        (3, "torch.nn.Module"),
    ):
        with pytest.raises(GoodfitError, match=match):
            mc_predict(model, ROWS)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"samples": 1}, "samples must be an integer >= 2"),
        ({"samples": True}, "samples"),
        ({"seed": -1}, "seed"),
        ({"seed": "a"}, "seed must be an integer >= 0"),
        ({"seed": True}, "seed"),
        ({"seed": None}, "seed"),
        ({"seed": 2**63}, "seed must be an integer from 0"),
        ({"samples": None}, "samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"task": "class"}, "task"),
    ],
)
def test_odd_numbers_are_refused(numbers: dict[str, Any], match: str) -> None:
    with pytest.raises(GoodfitError, match=match):
        mc_predict(nn.Sequential(lin(), nn.Dropout()), ROWS, **numbers)


@pytest.mark.parametrize("at", range(1, 9))
def test_all_comes_back_after_an_exception(at: int) -> None:
    def fails(m: Any, x: Tensor) -> Tensor:
        m.count += 1
        if m.count == at:
            raise KeyError("a fault of the model")
        return m.d(m.b(m.a(x)))

    model = Net(fails, a=lin(), b=nn.BatchNorm1d(8), d=SeededDropout(p=0.5)).train()
    model.a.eval()
    model.count = 0
    before = known(model)
    failures = (KeyError, GoodfitError) if at in {1, 4, 5, 6, 7, 8} else ()  # a failure in train mode once is got round
    with pytest.raises(failures) if failures else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore", GoodfitWarning)
        mc_predict(model, ROWS, samples=6, batch_size=4)
    assert model.count >= at
    assert known(model) == before


def test_an_exception_in_the_block() -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5))
    before = known(model)

    def block() -> None:
        with mc_dropout(model, seed=3):
            model(ROWS)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        block()
    assert known(model) == before


def test_other_models_run_in_other_threads() -> None:
    """A model that runs elsewhere all the while, and one that is called by nothing of the sampled model, are not looked at."""
    beside, stop, failed, expected = nn.Sequential(lin(), nn.Dropout(0.5), lin()), threading.Event(), [], 0

    def work() -> None:
        nonlocal expected
        while not stop.is_set():
            try:
                beside(ROWS)
                expected += 1
            except Exception as problem:
                failed.append(problem)

    def within_it(m: Any, x: Tensor) -> Tensor:
        outside.train()
        return m.d(outside(m.a(x)))

    outside, threads = nn.Sequential(nn.Dropout(0.0), lin()), [threading.Thread(target=work) for _ in range(2)]
    model = Net(within_it, a=lin(), d=nn.Dropout(0.5))
    for thread in threads:
        thread.start()
    try:
        results = [mc_predict(model, ROWS, samples=4) for _ in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert expected > 0
    assert {result.on for result in results} == {("d",)}


def test_one_model_in_two_threads_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(lin(), nn.BatchNorm1d(8)), nn.Dropout(0.5))
    problems: list[Exception] = []

    def work(part: nn.Module) -> None:
        try:
            mc_predict(part, ROWS, samples=2)
        except Exception as problem:
            problems.append(problem)

    def elsewhere(part: nn.Module) -> None:
        thread = threading.Thread(target=work, args=(part,))
        thread.start()
        thread.join()

    with mc_dropout(model, ROWS):
        elsewhere(model)
        elsewhere(nn.Sequential(model[0], nn.Dropout(0.1)))
        elsewhere(copy.deepcopy(model))
    assert len(problems) == 2
    assert all(isinstance(p, GoodfitError) and "another thread samples from it" in str(p) for p in problems)
    elsewhere(model)
    assert len(problems) == 2
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("x", [None, ROWS[:0], (ROWS[:0],), {"x": ROWS[:0]}])
def test_batches_without_rows_are_refused(x: Any) -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5))
    with pytest.raises(GoodfitError, match="got None" if x is None else "got an empty one"):
        mc_predict(model, x)
    with pytest.raises(GoodfitError, match="empty"), mc_dropout(model):
        model(ROWS[:0])
    assert model.training


@pytest.mark.parametrize("seed", [-3, "a", True, 1.0, 2**63])
def test_odd_seeds_are_refused(seed: Any) -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5))
    with pytest.raises(GoodfitError, match="seed must be an integer from 0"), mc_dropout(model, seed=seed):
        pass


@pytest.mark.parametrize("kind", [gf.GaussianDropout, gf.AlphaDropout])
def test_noise_that_is_dropout_by_its_class(kind: Callable[[float], Any]) -> None:
    model, count = nn.Sequential(lin(), nn.ReLU(), nn.Linear(8, 1)), 2000
    if kind is gf.AlphaDropout:
        model[1] = nn.SELU()
    gf.Run(kind(0.4), model, example=ROWS)
    result = mc_predict(model, ROWS, samples=count)
    assert result.vectorised
    if kind is gf.GaussianDropout:
        hidden, weight = model[0](ROWS).relu().detach(), model[2].weight.detach()
        within(result.variance, (weight**2 * hidden**2).sum(1, keepdim=True) * 0.4 / 0.6, count)
    for layer in model.modules():
        if isinstance(layer, SeededLayer):
            layer.p = 0.0
    with pytest.raises(GoodfitError, match="nothing that drops"):
        mc_predict(model, ROWS)


def test_trials_see_few_rows_and_a_block_is_surveyed_once() -> None:
    model, seen = nn.Sequential(lin(), nn.Dropout(0.5), lin()), list[int]()
    model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    many = torch.randn(10_000, 8, dtype=torch.float64)
    mc_predict(model, many, samples=2, batch_size=1000)
    assert [n for n in seen if n > 1000] == []
    assert seen.count(1000) == 20
    trials, rest = [n for n in seen if n < 1000], len(seen)
    assert 3 < len(trials) < 8
    assert max(trials) <= 8
    with mc_dropout(model) as dropping:
        first = mc_predict(model, many, samples=2, batch_size=1000)
        assert len(seen) == 2 * rest
        again = [mc_predict(model, part, samples=2, batch_size=1000) for part in (many, many[:3000])]
        assert len(seen) == 2 * rest + 20 + 6
        model(ROWS)
        assert len(seen) == 2 * rest + 20 + 6 + 1
        assert dropping.on == first.on
        with mc_dropout(model, ROWS):
            assert len(seen) == 2 * rest + 20 + 6 + 1
        model.float()
        mc_predict(model, many.float(), samples=2, batch_size=1000)  # of another form
        assert len(seen) == 3 * rest + 20 + 6 + 1
    assert torch.equal(first.samples, again[0].samples)
    mc_predict(model, many.float(), samples=2, batch_size=1000)
    assert len(seen) == 4 * rest + 20 + 6 + 1


def test_a_model_that_few_rows_do_not_suit_sees_all() -> None:
    graph = Net(lambda m, x, edges: m.d(m.a(x)).index_add(0, edges[0], x[edges[1]]), a=lin(), d=nn.Dropout(0.5))
    x, edges = torch.randn(9, 8, dtype=torch.float64), torch.tensor([[0, 8], [8, 1]])
    assert mc_predict(graph, (x, edges), samples=2).samples.shape == (2, 9, 8)
    steps = Net(lambda m, x: m.d(m.b(x.mT).mT), b=nn.Linear(9, 9), d=nn.Dropout(0.5))
    assert mc_predict(steps, x, samples=2).on == ("d",)
    large = Net(lambda m, x: m.d(x) if len(x) > 8 else x, d=Net(lambda m, x: F.dropout(x, 0.5, m.training)))
    assert mc_predict(large, x, samples=2).on == ("d",)


def test_blocks_within_blocks() -> None:
    model = nn.Sequential(nn.Sequential(lin(), InTraining(per_row)), nn.BatchNorm1d(8), nn.Dropout(0.5)).eval()
    before = known(model)
    with torch.no_grad(), mc_dropout(model) as outer:
        with mc_dropout(model[0]) as inner, mc_dropout(model) as same:
            model[0](ROWS)
            model(ROWS)
        assert inner.on == ("1",)
        assert same.on == ("0.1", "2")
        first = model(ROWS)
        model.train()  # in the way of a loop that somebody calls
        second = model(ROWS)
        assert not model[1].training
        assert mc_predict(model, ROWS, samples=3).on == outer.on == ("0.1", "2")
        assert not torch.equal(first, second)
        assert not torch.equal(model[0](ROWS), model[0](ROWS))
    assert {k: v for k, v in known(model).items() if k != "torch"} == {k: v for k, v in before.items() if k != "torch"}


def test_a_block_without_a_call_is_told_of() -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5))
    seen: list[Any] = []
    with pytest.warns(GoodfitWarning, match="was not called in the block"), mc_dropout(model) as dropping:
        seen += [dropping.on, model[1](ROWS), model[1](ROWS)]
    assert seen[0] == ("1",)
    assert not torch.equal(seen[1], seen[2])


def test_blocks_without_a_seed_go_on_with_torchs_generator() -> None:
    model = nn.Sequential(lin(), SeededDropout(p=0.5), nn.Dropout(0.5))
    torch.manual_seed(0)
    with mc_dropout(model, ROWS):
        first = model(ROWS)
    with mc_dropout(model, ROWS):
        second = model(ROWS)
    torch.manual_seed(0)
    with mc_dropout(model, ROWS):
        again = model(ROWS)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The gradients of several batches")
def test_training_goes_on_as_if_nothing_had_been_sampled() -> None:
    def trained(sampling: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(lin(), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        model[3] = SeededDropout(p=0.0)
        run = gf.Run(gf.Dropout(0.4), model, example=ROWS, seed=7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.attach(optimizer)
        drawn = []
        for _ in range(3):
            optimizer.zero_grad()
            for half in (ROWS[:2], ROWS[2:]):
                model(half).square().mean().backward()
                if sampling:
                    drawn.append(mc_predict(model, ROWS, samples=5, seed=1).samples)
            optimizer.step()
        return [t.clone() for t in (*model.parameters(), *model.buffers())], drawn

    (plain, _), (sampled, drawn) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled, strict=True))
    assert float(drawn[0].var(0).mean()) > 0


def test_inserted_dropout_draws_anew_and_by_the_seed() -> None:
    model = nn.Sequential(lin(), nn.ReLU(), nn.Linear(8, 1))
    gf.Run(gf.Dropout(0.4), model, example=ROWS)
    hidden, weight = model[0](ROWS).relu().detach(), model[2].weight.detach()
    for batch_size, vectorised in ((None, True), (4, False)):
        result = mc_predict(model, ROWS, samples=1000, seed=4, batch_size=batch_size)
        assert result.vectorised == vectorised
        within(result.variance, (weight**2 * hidden**2).sum(1, keepdim=True) * 0.4 / 0.6, 1000)
        assert torch.equal(result.samples, mc_predict(model, ROWS, samples=1000, seed=4, batch_size=batch_size).samples)
        assert not torch.equal(result.samples, mc_predict(model, ROWS, samples=1000, seed=5, batch_size=batch_size).samples)


def test_entropy_and_mutual_information_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0]], [[0.25, 0.25, 0.5]]])
    result = of_classes(p, False, ())
    mean = np.array([0.375, 0.375, 0.25])
    entropy = -(mean * np.log(mean)).sum()
    inner = (np.log(2) + 0.5 * np.log(4) + 0.5 * np.log(2)) / 2
    assert float(result.entropy) == pytest.approx(entropy, rel=1e-12)
    assert float(result.mutual_information) == pytest.approx(entropy - inner, rel=1e-12)
    torch.testing.assert_close(result.variance, torch.tensor([[0.03125, 0.03125, 0.125]]))
    two = of_classes(torch.cat([1 - p[..., :1], p[..., :1]], 2), False, ())
    one = of_classes(p[..., :1], False, ())
    none = of_classes(p[..., 0], False, ())
    torch.testing.assert_close(two.entropy, one.entropy)
    torch.testing.assert_close(two.mutual_information, none.mutual_information)


def test_classes_from_scores() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.5), nn.Conv2d(5, 4, 1))
    result = mc_predict(model, IMAGES, samples=6, task="classes")
    assert result.entropy.shape == (4, 6, 6)
    torch.testing.assert_close(result.samples.sum(2), torch.ones(6, 4, 6, 6))
    scores = mc_predict(model, IMAGES, samples=6).samples
    torch.testing.assert_close(result.samples, scores.softmax(2))
    assert bool((result.mutual_information <= result.entropy).all())
    assert bool((result.entropy <= np.log(4) + 1e-12).all())
    column = mc_predict(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)), ROWS, samples=6, task="classes")
    assert column.entropy.shape == column.mutual_information.shape == (4,)
    certain = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(1))
    with pytest.raises(GoodfitError, match="probabilities already"):
        mc_predict(certain, ROWS, task="classes")


def test_batches_are_split_where_rows_are_independent() -> None:
    p, count = 0.3, 1500
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 1, bias=False))
    seen: list[int] = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    result = mc_predict(model, ROWS, samples=count, batch_size=3)
    assert result.vectorised
    passes = seen[-count - count // 3 :]  # three rows a time, then the last one three times a time
    assert set(passes) == {3}
    hidden, weight = model[:2](ROWS).detach(), model[3].weight.detach()
    within(result.variance, (weight**2 * hidden**2).sum(1, keepdim=True) * p / (1 - p), count)
    with pytest.raises(GoodfitError, match="cannot split 4 rows"):
        mc_predict(DROPPERS["weights"][0](), ROWS, batch_size=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(lin(), nn.ReLU(), nn.Dropout(0.5), nn.LayerNorm(8), lin()).to(dtype)
    result = mc_predict(model, ROWS.to(dtype), samples=20, task="classes")
    assert result.vectorised
    assert result.samples.dtype == torch.float32
    torch.testing.assert_close(result.mean.sum(1), torch.ones(4, dtype=torch.float32))


def test_inputs_as_models_take_them() -> None:
    def two(m: Any, u: Tensor, v: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        u.mul_(2)
        return {"logits": m.drop(m.a(u) + v) * scale, "hidden": u}

    model, x, shared = Net(two, a=lin(), drop=nn.Dropout(0.5)), ROWS.clone(), torch.ones(1, 8)
    named = mc_predict(model, {"u": x, "v": shared, "scale": 2.0}, samples=7)
    placed = mc_predict(model, (x, shared, 2.0), samples=7)
    assert torch.equal(named.samples, placed.samples)
    assert named.vectorised
    assert torch.equal(x, ROWS)
    with torch.no_grad(), mc_dropout(model, seed=0):
        first = model(x.clone(), v=shared, scale=2.0)["logits"]
    assert torch.equal(first == 0, placed.samples[0] == 0) or first.shape == placed.samples[0].shape


def test_a_transformer_with_skipped_layers() -> None:
    config = transformers.OPTConfig(
        vocab_size=20,
        hidden_size=8,
        ffn_dim=8,
        word_embed_proj_dim=8,
        num_hidden_layers=6,
        num_attention_heads=2,
        layerdrop=0.5,
    )
    model = transformers.OPTForCausalLM(config)
    model.config.use_cache = False
    text = torch.randint(3, 20, (2, 5))
    result = mc_predict(model, {"input_ids": text}, samples=4)
    layers = {f"model.decoder.layers.{i}" for i in range(6)}
    assert layers <= set(result.on)  # although each pass skips some
    assert not result.vectorised
    config.layerdrop = 0.0
    assert mc_predict(transformers.OPTForCausalLM(config), {"input_ids": text}, samples=4).vectorised


def test_gradients_flow_in_the_block() -> None:
    model = nn.Sequential(lin(), nn.Dropout(0.5))
    with mc_dropout(model, ROWS, seed=0):
        out = model(ROWS)
    out.sum().backward()
    assert torch.equal(model[0].bias.grad, 2 * (out != 0).sum(0).to(out.dtype))
    with torch.inference_mode():
        assert mc_predict(model, ROWS, samples=3).samples.shape == (3, 4, 8)


def test_always_on_dropout_needs_no_switch() -> None:
    model = Net(lambda m, x: F.dropout(m.a(x), 0.5), a=lin()).eval()
    result = mc_predict(model, ROWS, samples=50)
    assert float(result.variance.mean()) > 0
    assert not result.vectorised


def test_the_result_speaks() -> None:
    result = mc_predict(nn.Sequential(lin(), nn.Dropout(0.5)), ROWS, samples=3)
    assert str(result).startswith("3 samples side by side of outputs (4, 8), standard deviation")
