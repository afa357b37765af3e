"""Statistics of batch norms: those of the data, exactly, in the order of the layers, and for averaged weights by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import goodfit as gf
from goodfit import EarlyStopping, GoodfitError, Run, recalibrate
from nets import Net
from together import in_two_processes


class Block(nn.Module):
    """A residual block whose shortcut has a norm beside those of the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.c2, self.b2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.short = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x)), inplace=True))).add_(self.short(x)))


class Functional(nn.Module):
    """Its norm is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.register_buffer("m", torch.zeros(5))
        self.register_buffer("v", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.a(x), self.m, self.v, training=self.training, momentum=0.0)


def conv_net() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Block(4), Block(4), *head)


def mlp() -> nn.Module:
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)]
    return nn.Sequential(*layers)


def images(rows: int = 50) -> Tensor:
    return torch.randn(rows, 3, 6, 6) * 3 + 2


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, other[name]) for name, t in one.items())


def as_one_batch(model: nn.Module, x: Tensor) -> Tensor:
    """What train mode says of all rows at once, without dropout."""
    whole = copy.deepcopy(model).train()
    for layer in whole.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return whole(x)


NETS = {
    "convolutions": (conv_net, images),
    "vectors": (mlp, lambda: torch.randn(50, 5) + 7),
    "series": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.GELU(), nn.Conv1d(3, 3, 2), nn.BatchNorm1d(3)),
        lambda: torch.randn(50, 2, 7),
    ),
    "functions": (lambda: nn.Sequential(Functional(), nn.Tanh(), Functional()), lambda: 4 * torch.randn(50, 5)),
    "synchronized": (lambda: nn.Sequential(nn.Linear(5, 3), nn.SyncBatchNorm(3)).eval(), lambda: torch.randn(50, 5)),
}


@pytest.mark.parametrize("case", [name for name in NETS if name != "synchronized"])
@pytest.mark.parametrize("sizes", [[48, 2], [1, 49], [10] * 5], ids=str)
def test_eval_mode_says_what_train_mode_says_of_all_data_at_once(case: str, sizes: list[int]) -> None:
    model, x = (make() for make in NETS[case])
    recalibrate(model, list(x.split(sizes)))
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x), rtol=1e-11, atol=1e-11)


def test_torchs_update_bn_weighs_a_batch_of_two_like_one_of_48_and_leaves_dropout_on() -> None:
    model, x = nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(1)), torch.cat([torch.zeros(48, 1), torch.full((2, 1), 5.0)])
    batches = [x[:48], x[48:]]
    update_bn(batches, model)
    assert model[1].running_mean.item() == 2.5
    recalibrate(model, batches)
    assert model[1].running_mean.item() == pytest.approx(0.2)
    assert model[1].running_var.item() == pytest.approx(x.var(correction=0).item())
    dropping, ones = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)), torch.ones(400, 1)
    update_bn([ones], dropping)
    assert dropping[1].running_var.item() > 0.9
    recalibrate(dropping, [ones])
    assert dropping[1].running_var.item() == 0.0


def test_a_synchronized_norm_alone() -> None:
    model, x = (make() for make in NETS["synchronized"])
    recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))


def test_one_pass_is_exact_for_the_first_norm_and_near_for_those_behind() -> None:
    model, x = conv_net(), images()
    exact, near = copy.deepcopy(model), copy.deepcopy(model)
    recalibrate(exact, list(x.split(10)))
    recalibrate(near, iter(x.split(10)), exact=False)
    assert torch.equal(exact[1].running_var, near[1].running_var)
    assert not torch.allclose(exact[8].running_mean, near[8].running_mean, rtol=1e-6)
    torch.testing.assert_close(exact[3].b1.running_mean, near[3].b1.running_mean, rtol=0.1, atol=0.05)
    recalibrate(near, [x], exact=False)
    torch.testing.assert_close(near[8].running_var, exact[8].running_var)


def test_keep_function_moves_the_statistics_and_not_the_function() -> None:
    model, x = conv_net(), images()
    recalibrate(model, [x[:7]])
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        nn.init.normal_(norm.weight)
    before, old = model.eval()(x), model[8].running_mean.clone()
    recalibrate(model, iter(x.split(20)), keep_function=True)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(model[8].running_mean, old)
    torch.testing.assert_close(model[8].running_mean, model[:8](x).mean(0), rtol=1e-11, atol=1e-11)


def test_keep_function_wants_gamma_and_beta_of_its_own() -> None:
    shared, bare = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2, affine=False))
    shared[1].weight = shared[0].weight
    for model in (shared, bare):
        before = state(model)
        with pytest.raises(GoodfitError, match="has none of its own"):
            recalibrate(model, [torch.randn(4, 2)], keep_function=True)
        assert same(before, state(model))


def test_a_norm_called_on_two_values_has_the_statistics_of_both() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.after(m.norm(m.a(x)) + m.norm(m.first(m.b(x))))

    layers = {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}
    norms = {name: nn.BatchNorm1d(3) for name in ("norm", "first", "after")}
    model, x = Net(forward, **layers, **norms), torch.randn(30, 5)
    recalibrate(model, list(x.split(11)))
    got = torch.cat([model.a(x), model.eval().first(model.b(x))])
    torch.testing.assert_close(model.norm.running_mean, got.mean(0))
    torch.testing.assert_close(model.norm.running_var, got.var(0, correction=0))
    sums = model.norm(model.a(x)) + model.norm(model.first(model.b(x)))
    torch.testing.assert_close(model.after.running_var, sums.var(0, correction=0))


def test_a_norm_called_on_its_own_output_sees_it_as_training_did() -> None:
    model, x = Net(lambda m, x: m.norm(m.a(m.norm(x))), a=nn.Linear(3, 3), norm=nn.BatchNorm1d(3)), torch.randn(9, 3) + 4
    recalibrate(model, [x])
    second = model.a((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(model.norm.running_mean, (x.mean(0) + second.mean(0)) / 2)


def test_norms_called_in_turns_come_to_an_end() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.two(m.a(m.one(x)))
        return x

    model = Net(forward, a=nn.Linear(3, 3), one=nn.BatchNorm1d(3), two=nn.BatchNorm1d(3))
    assert recalibrate(model, [torch.randn(8, 3), torch.randn(4, 3)]).keys() == {"one", "two"}


def test_norms_that_do_not_depend_on_each_other_share_a_pass_that_ends_behind_them() -> None:
    passes: list[int] = []

    class Counting(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            passes.append(0)
            return super().__iter__()

    ran: list[str] = []
    model = nn.Sequential(Block(3), nn.Flatten(), nn.Linear(108, 1))
    model[2].register_forward_hook(lambda *_: ran.append("end"))
    recalibrate(model, Counting(images(20).split(5)))
    assert len(passes) == 2  # b1 and the shortcut, then b2
    assert len(ran) == 4  # the first pass alone goes to the end: it shows what is there


def test_what_python_reads_counts_as_a_dependence() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(x * m.one(x).amax().item())

    model, x = Net(forward, one=nn.BatchNorm1d(3), two=nn.BatchNorm1d(3)), 9 * torch.randn(8, 3)
    recalibrate(model, [x[:6], x[6:]])
    got = torch.cat([part * model.eval().one(part).amax() for part in (x[:6], x[6:])])
    torch.testing.assert_close(model.two.running_mean, got.mean(0))


class Routed(nn.Module):
    """A norm that only some batches call, before one that all call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.some, self.every = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor, flag: bool) -> Tensor:
        h = self.a(x)
        return self.every(self.some(h).relu() if flag else h)


@pytest.mark.parametrize("first", range(4))
def test_norms_that_some_batches_do_not_call_are_exact_in_whatever_order(first: int) -> None:
    model, x = Routed(), torch.randn(40, 4)
    parts = [{"x": x[:10], "flag": False}, {"x": 5 + 3 * x[10:20], "flag": True}, {"x": 2 * x[20:35], "flag": True}]
    parts.append({"x": x[:0], "flag": True})
    assert recalibrate(model, parts[first:] + parts[:first]).keys() == {"some", "every"}
    plain = model.a(parts[0]["x"])
    routed = model.a(torch.cat([part["x"] for part in parts[1:]]))
    torch.testing.assert_close(model.some.running_mean, routed.mean(0))
    torch.testing.assert_close(model.some.running_var, routed.var(0, correction=0))
    got = torch.cat([plain, F.batch_norm(routed, None, None, training=True).relu()])
    torch.testing.assert_close(model.every.running_mean, got.mean(0))
    torch.testing.assert_close(model.every.running_var, got.var(0, correction=0))


def test_heads_of_their_own_for_each_task_are_exact() -> None:
    heads = {"one": nn.BatchNorm1d(3), "two": nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3))}
    model = Net(
        lambda m, x, head: m.get_submodule(head)(m.body(x)), body=nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), **heads
    )
    x = torch.randn(30, 5)
    recalibrate(model, [{"x": rows, "head": head} for rows, head in zip(x.split(10), ("one", "two", "one"), strict=True)])
    body = F.batch_norm(model.body[0](x), None, None, training=True)
    torch.testing.assert_close(model.body[1].running_mean, model.body[0](x).mean(0))
    torch.testing.assert_close(model.one.running_var, torch.cat([body[:10], body[20:]]).var(0, correction=0))
    torch.testing.assert_close(model.eval().two(body[10:20]), as_one_batch(model.two, body[10:20]))


def test_batches_that_are_others_in_later_passes_are_not_cut() -> None:
    x, model = torch.randn(20, 4), Routed()

    class Turning(list[dict[str, Any]]):
        passes = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            Turning.passes += 1
            return iter([{"x": x[:9], "flag": True}, {"x": x[9:], "flag": Turning.passes == 1}])

    recalibrate(model, Turning())
    torch.testing.assert_close(model.some.running_mean, model.a(x).mean(0))
    got = torch.cat([model.some.eval()(model.a(x[:9])).relu(), model.a(x[9:])])
    torch.testing.assert_close(model.every.running_mean, got.mean(0))


READ: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda t: t.numpy(),
    "array": lambda t: np.array(t),
    "list": lambda t: t.tolist(),
    "dlpack": lambda t: np.from_dlpack(t),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_numpy_reads_counts_as_a_dependence(read: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.two(x * torch.tensor(np.tanh(READ[read](m.one(x).detach()))))

    model, x = Net(forward, one=nn.BatchNorm1d(3), two=nn.BatchNorm1d(3)), 9 * torch.randn(8, 3)
    recalibrate(model, [x[:6], x[6:]])
    torch.testing.assert_close(model.two.running_mean, (x * model.eval().one(x).tanh()).mean(0))


def test_norms_inside_a_transform_are_refused() -> None:
    model = Net(
        lambda m, x: torch.func.vmap(m.norm)(m.first(x).unflatten(0, (2, -1))), first=nn.BatchNorm1d(3), norm=nn.BatchNorm1d(3)
    )
    before = state(model)
    with pytest.raises(GoodfitError, match=r"a batch norm of 3 channels, which runs inside a transform of torch\.func"):
        recalibrate(model, [torch.randn(8, 3)])
    assert same(before, state(model))


@pytest.mark.parametrize("keep_function", [True, False])
def test_a_model_made_in_inference_mode(keep_function: bool) -> None:
    with torch.inference_mode():
        model = mlp()
    x = torch.randn(20, 5)
    recalibrate(model, list(x.split(6)), keep_function=keep_function)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    assert model[1].num_batches_tracked == 4


def test_a_norm_that_later_batches_call_more_often_sees_all_its_calls() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.after(sum(m.norm(x[:, t]) for t in range(x.shape[1])))

    model = Net(forward, norm=nn.BatchNorm1d(3), after=nn.BatchNorm1d(3))
    short, long = torch.randn(4, 2, 3), torch.randn(4, 5, 3) + 9
    recalibrate(model, [short, long])
    torch.testing.assert_close(model.norm.running_mean, torch.cat([short.flatten(0, 1), long.flatten(0, 1)]).mean(0))


def test_the_numbers_that_come_back_say_how_far_each_norm_moved() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12))
    assert recalibrate(model, [torch.tensor([[-3.0], [5.0]])])["0"] == pytest.approx(0.75)  # σ from 1 to 4
    assert recalibrate(model, [torch.tensor([[-3.0], [5.0]])])["0"] == 0
    assert recalibrate(model, [torch.tensor([[5.0], [13.0]])])["0"] == pytest.approx(2.0)  # μ by 8, of σ = 4
    assert model[0].num_batches_tracked == 1
    assert recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)]) == {}


def test_what_loaders_give() -> None:
    x, y = torch.randn(10, 5), torch.randn(10)
    wanted = mlp()
    start = state(wanted)
    recalibrate(wanted, [x])
    given: dict[str, Any] = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        "rows alone": DataLoader(TensorDataset(x), batch_size=3),
        "pairs": [[x[:3], y[:3]], (x[3:], y[3:])],
    }
    for batches in given.values():
        model = mlp()
        model.load_state_dict(start)
        recalibrate(model, batches)
        torch.testing.assert_close(
            model.state_dict(), wanted.state_dict() | {n: t for n, t in model.state_dict().items() if "num" in n}
        )
    keyed = Net(lambda m, features, **_: m.net(features), net=mlp())
    keyed.net.load_state_dict(start)
    recalibrate(keyed, [{"features": x, "labels": y}])
    assert same(keyed.net.state_dict(), wanted.state_dict())
    short = mlp()
    recalibrate(short, list(x.split(3)), samples=5)
    torch.testing.assert_close(short[1].running_mean, short[0](x[:6]).mean(0))


def test_torchs_generator_is_untouched_and_each_pass_sees_the_same_random_data() -> None:
    class Noisy(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            return torch.randn(5)

    model, before = mlp(), torch.get_rng_state()
    recalibrate(model, DataLoader(Noisy(), batch_size=4))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.cat(list(DataLoader(Noisy(), batch_size=4)))
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


def ok(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "met NaN, inf or numbers beyond .* in what 1 gets": (lambda: [ok(), ok() * torch.nan], {}),
    "met NaN, .* in what 4 gets; all statistics are as they were": (lambda: [ok(), ok()], {}),
    "must run on the example in eval mode, got RuntimeError": (lambda: [ok(), torch.randn(4, 6)], {}),
    "got a stream that can be read once: give a list or a DataLoader": (lambda: iter([ok(), ok()]), {}),
    "needs batches with rows": (list, {}),
    r"takes a DataLoader or a list of batches, got a Tensor: give \[x\]": (ok, {}),
    r"got a tuple of 3; several inputs: \(\(a, b\), y\)": (lambda: [(ok(), ok(), ok())], {}),
    "samples, a number of rows >= 1, got samples=0": (lambda: [ok()], {"samples": 0}),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("exact", [True, False])
def test_a_refusal_leaves_the_model_as_it_was(message: str, exact: bool) -> None:
    make, options = REFUSED[message]
    if "stream" in message and not exact:
        pytest.skip("one pass may read a stream")
    model = mlp()
    model[4].eval()
    if "what 4" in message:
        with torch.no_grad():
            model[3].weight[0, 0] = torch.inf
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(GoodfitError, match=message):
        recalibrate(model, make(), exact=exact, **options)
    assert same(before, state(model))
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_poisoned_statistics_are_cured() -> None:
    model, x = mlp(), torch.randn(20, 5)
    model[1].running_mean.fill_(torch.nan)
    model[4].running_var.fill_(torch.inf)
    recalibrate(model, [x])
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_lazy_models_and_statistics_elsewhere_are_refused() -> None:
    with pytest.raises(GoodfitError, match="cannot look into the scripted"):
        recalibrate(torch.jit.script(mlp()), [torch.randn(4, 5)])
    with pytest.raises(GoodfitError, match=r"0\.weight is lazy: run the model on a batch once"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(4, 5)])
    halved = Net(lambda m, x: F.batch_norm(x, m.norm.running_mean / 2, m.norm.running_var), norm=nn.BatchNorm1d(5))
    with pytest.raises(GoodfitError, match="register them as buffers"):
        recalibrate(halved, [torch.randn(4, 5)])


def test_frozen_untracked_and_instance_norms_stay_and_what_does_not_run_is_told() -> None:
    instance = nn.InstanceNorm1d(5, track_running_stats=True)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False), nn.Unflatten(0, (2, -1)), instance)
    gf.freeze_batchnorm(model, where=gf.where.named("0"))
    before = state(model)
    assert recalibrate(model, [torch.randn(10, 5)]) == {}
    assert same(before, state(model))
    aside = Net(lambda m, x: m.a(x), a=nn.BatchNorm1d(5), unused=nn.BatchNorm1d(5))
    with pytest.warns(gf.GoodfitWarning, match="recalibrate leaves unused as it is"):
        recalibrate(aside, [torch.randn(10, 5)])


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DataParallel", "compiled"]
)
def test_wrapped_models_are_recalibrated_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = mlp(), torch.randn(20, 5)
    wrapped = wrap(model)
    wrapped.train()(x)
    recalibrate(wrapped, list(x.split(6)))
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_double(dtype: torch.dtype) -> None:
    norm, x = nn.BatchNorm1d(1).to(dtype), (1000 + torch.randn(5000, 1)).to(dtype)
    recalibrate(norm, list(x.split(7)))
    assert norm.running_mean.dtype == dtype
    assert torch.equal(norm.running_mean, x.double().mean(0).to(dtype))
    assert torch.equal(norm.running_var, x.double().var(0, correction=0).to(dtype))


def test_channels_last() -> None:
    model, x = conv_net().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)
    recalibrate(model, list(x.split(20)))
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


def _one_of_two(rank: int, folder: str) -> None:
    model = mlp().double()
    model.load_state_dict(torch.load(f"{folder}/model"))
    x = torch.load(f"{folder}/x")
    recalibrate(model, [x[:5], x[5:13]] if rank == 0 else [x[13:]])
    torch.save(model.state_dict(), f"{folder}/{rank}")
    routed = Routed().double()
    routed.load_state_dict(torch.load(f"{folder}/routed"))
    rows = torch.load(f"{folder}/rows")
    recalibrate(routed, [{"x": rows[:9], "flag": False}] if rank == 0 else [{"x": t, "flag": True} for t in rows[9:].split(8)])
    torch.save(routed.state_dict(), f"{folder}/routed{rank}")


@pytest.mark.slow
def test_two_processes_with_a_share_each_get_the_statistics_of_the_whole(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(30, 5) + 3
    torch.save(model.state_dict(), tmp_path / "model")
    torch.save(x, tmp_path / "x")
    routed, rows = Routed(), torch.randn(30, 4) + 3
    torch.save(routed.state_dict(), tmp_path / "routed")
    torch.save(rows, tmp_path / "rows")
    in_two_processes(_one_of_two, tmp_path)
    recalibrate(model, [x])
    for rank in range(2):
        for name, t in torch.load(tmp_path / str(rank)).items():
            if "num" not in name:
                torch.testing.assert_close(t, model.state_dict()[name], rtol=1e-12, atol=1e-12)
    recalibrate(routed, [{"x": rows[:9], "flag": False}, {"x": rows[9:], "flag": True}])
    for rank in range(2):  # one of which never calls a norm that the other calls
        for name, t in torch.load(tmp_path / f"routed{rank}").items():
            if "num" not in name:
                torch.testing.assert_close(t, routed.state_dict()[name], rtol=1e-12, atol=1e-12)


def trained(cocktail: Any, model: nn.Module, x: Tensor, scores: list[float]) -> Run:
    run = Run(cocktail, model, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for score in scores:
        for rows in x.split(10):
            optimizer.zero_grad()
            run.loss(rows, rows.sum(1, keepdim=True)).backward()
            run.gradient(optimizer)
            optimizer.step()
            run.step(optimizer)
        with run.view([x]):
            run.epoch(score)
    return run


def test_averaged_weights_get_statistics_of_their_own() -> None:
    model, x = mlp(), torch.randn(40, 5)
    run = trained(gf.EMA(0.95, warmup=False), model, x, [1.0, 0.5])
    before = state(model)
    with pytest.raises(
        GoodfitError, match=r"EMA\(0\.95, warmup=False\) averages weights, .*run\.finish\(batches=train_loader\)"
    ):
        run.finish()
    assert same(before, state(model))
    with pytest.raises(GoodfitError, match="met NaN"):
        run.finish([torch.full((3, 5), torch.nan)])
    assert same(before, state(model))
    assert run.finish(list(x.split(16))) is model
    assert not torch.equal(model[0].weight, before["0.weight"])
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


def test_a_restored_snapshot_keeps_its_statistics() -> None:
    model, x = mlp(), torch.randn(40, 5)
    run = trained((EarlyStopping(5),), model, x, [1.0])
    best = state(model)
    with suppress(GoodfitError):
        model(x)
    run.epoch(2.0)
    assert same(best, run.finish([x]).state_dict())


@pytest.mark.parametrize(
    "order",
    [(gf.EMA(0.95, warmup=False), EarlyStopping(5)), (EarlyStopping(5), gf.EMA(0.95, warmup=False))],
    ids=["last", "first"],
)
def test_what_was_scored_is_what_is_kept_in_any_order(order: Any) -> None:
    model, x = mlp(), torch.randn(40, 5)
    run = trained(order, model, x, [1.0])
    with run.view([x]):
        scored = state(model)
    assert not same(scored, state(model))
    with pytest.raises(GoodfitError, match=r"with run\.view\(train_loader\)"):
        run.epoch(2.0)
    with run.view([2 * x]):
        run.epoch(2.0)
    run.finish()  # no data: the statistics are those that were scored
    assert same(scored, state(model))


def test_without_batch_norms_averaging_needs_no_data() -> None:
    run = trained(gf.EMA(0.95, warmup=False), nn.Sequential(nn.Linear(5, 1)), torch.randn(20, 5), [1.0])
    assert isinstance(run.finish(), nn.Module)


def test_fit_hands_over_its_training_data() -> None:
    model, x = mlp(), torch.randn(40, 5)
    gf.fit(
        model,
        (x, x.sum(1, keepdim=True)),
        (x, x.sum(1, keepdim=True)),
        gf.EMA(0.95, warmup=False),
        epochs=2,
        batch_size=12,
        progress=False,
    )
    torch.testing.assert_close(model.eval()(x), as_one_batch(model, x))


def test_data_that_is_one_batch_takes_one_pass() -> None:
    x, seen = torch.randn(12, 5), []
    one, two = mlp(), mlp()
    two.load_state_dict(one.state_dict())
    one.register_forward_pre_hook(lambda *_: seen.append(1))
    recalibrate(one, iter([x]))
    recalibrate(two, [x[:4], x[4:]])
    assert len(seen) == 1
    torch.testing.assert_close(
        [b for n, b in one.named_buffers() if "running" in n], [b for n, b in two.named_buffers() if "running" in n]
    )
