"""Frozen batch norms: not a bit of them moves, whoever says `train()`; thawed ones are as they would have been."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import goodfit as gf
from goodfit import GoodfitError, Run, freeze_batchnorm, thaw_batchnorm


class Own(nn.Module):
    """A norm that torch does not know, with layers inside where asked."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.weight = nn.Parameter(torch.ones(4))
        self.inside = nn.Sequential(*inside) if inside else None

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, training=self.training)


class Activated(nn.BatchNorm1d):
    """A batch norm with layers inside, as timm has them."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def net() -> nn.Module:
    middle = nn.Sequential(nn.Linear(6, 4), Activated(4), nn.Linear(4, 4), Own())
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.ReLU(), middle, nn.Linear(4, 1))


def epoch(model: nn.Module, **options: Any) -> None:
    """One epoch as people write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for x in torch.randn(4, 8, 5):
        optimizer.zero_grad(**options)
        F.mse_loss(model(x), x[:, :1]).backward()
        optimizer.step()


def norms(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the norms."""
    return {n: t.clone() for n, t in model.state_dict().items() if n.rpartition(".")[0] in ("1", "3.1", "3.3")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def remade(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("passed", [lambda m: m, copy.deepcopy, remade], ids=["itself", "copied", "pickled"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_an_epoch_not_a_bit_has_moved(passed: Callable[[nn.Module], nn.Module], set_to_none: bool) -> None:
    model = net()
    epoch(model)
    freeze_batchnorm(model)
    model = passed(model)
    before, weight = norms(model), model[0].weight.clone()
    assert {n for n in before if "num_batches" in n} == {"1.num_batches_tracked", "3.1.num_batches_tracked"}
    for _ in range(2):
        epoch(model, set_to_none=set_to_none)
    assert same(before, norms(model))
    assert not torch.equal(weight, model[0].weight)
    assert [m.training for m in (model, model[1], model[3], model[3][1], model[3][1].drop)] == [True, False, True, False, True]


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda m: torch.compile(m, backend="eager", fullgraph=True), nn.Sequential],
    ids=["DataParallel", "compiled", "nested"],
)
@pytest.mark.parametrize("first", [True, False], ids=["frozen first", "wrapped first"])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], first: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    if first:
        freeze_batchnorm(model)
    wrapped = wrap(model)
    if not first:
        wrapped.train()(torch.randn(8, 5))
        freeze_batchnorm(wrapped)
    before = norms(model)
    epoch(wrapped)
    assert same(before, norms(model))


def test_thawing_gives_back_what_would_have_been() -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        one[1].weight.requires_grad_(False)
        one[3][1].eval()

    def seen(m: nn.Module) -> Any:
        return [[x.training for x in m.modules()], [p.requires_grad for p in m.parameters()]]

    freeze_batchnorm(model, affine=False)
    assert model[3][1].weight.requires_grad
    freeze_batchnorm(model)
    freeze_batchnorm(model, affine=False)
    assert not model[3][1].weight.requires_grad
    thaw_batchnorm(model)
    assert seen(model) == seen(twin)
    freeze_batchnorm(model)
    for one in (model, twin):
        one.train()
        one.eval()
        one[3].train()
    thaw_batchnorm(model)
    thaw_batchnorm(model)
    assert seen(model) == seen(twin)
    assert not any("train" in vars(m) for m in model.modules())
    for one in (model, twin):
        torch.manual_seed(7)
        epoch(one)
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("apart", [False, True])
def test_a_shared_scale_trains_again_when_the_last_norm_that_holds_it_is_thawed(apart: bool) -> None:
    model, first = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)), gf.where.named("0")
    scale = model[2].weight = model[0].weight
    freeze_batchnorm(model, where=first) if apart else freeze_batchnorm(model)
    freeze_batchnorm(model)
    assert not scale.requires_grad
    thaw_batchnorm(model, where=first)
    assert [scale.requires_grad, model[0].bias.requires_grad, model[2].bias.requires_grad] == [False, True, False]
    thaw_batchnorm(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("verb", [freeze_batchnorm, thaw_batchnorm])
def test_other_things_are_refused_in_one_line(verb: Callable[..., None]) -> None:
    with pytest.raises(GoodfitError, match=r"takes where as a selector, got where='0': say where=gf\.where\.named\('0'\)"):
        verb(net(), where="0")
    with pytest.raises(GoodfitError, match=r"_batchnorm takes a torch\.nn\.Module, got a NoneType"):
        verb(None)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process that trains with itself."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/address", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own compiled DDP
@pytest.mark.parametrize(
    "around", [lambda m: m, lambda m: torch.compile(m, backend="eager"), nn.Sequential], ids=["DDP", "compiled", "nested"]
)
def test_what_trains_within_ddp_does_not_change(around: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    wrapped = around(DistributedDataParallel(model))
    with pytest.raises(GoodfitError, match="freeze before wrapping, or say affine=False"):
        freeze_batchnorm(wrapped)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    freeze_batchnorm(wrapped, affine=False)
    before = {n: t for n, t in norms(model).items() if "running" in n}
    epoch(wrapped)
    assert same(before, {n: t for n, t in norms(model).items() if "running" in n})
    thaw_batchnorm(wrapped)
    freeze_batchnorm(model := net())
    wrapped = around(DistributedDataParallel(model))
    with pytest.raises(GoodfitError, match="thaw the model inside, and wrap it anew"):
        thaw_batchnorm(wrapped)
    assert not model[1].train().training
    freeze_batchnorm(wrapped)
    before = norms(model)
    epoch(wrapped)
    assert same(before, norms(model))


@pytest.mark.usefixtures("alone")
def test_within_ddp_a_resting_bias_stays_at_rest() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))
    gf.BatchNorm(affine=False).build(model, torch.randn(8, 5))
    wrapped = DistributedDataParallel(model)
    with pytest.raises(GoodfitError, match="freeze before wrapping"):
        freeze_batchnorm(wrapped, affine=False)
    assert model[0].batchnorm.training
    assert not model[0].bias.requires_grad


def test_what_later_wakes_a_frozen_norm_is_as_the_docstring_says() -> None:
    model = net()
    freeze_batchnorm(model)
    model.requires_grad_(True)
    before = norms(model)
    epoch(model)
    after = norms(model)
    assert all(torch.equal(t, after[n]) == ("weight" not in n and "bias" not in n) for n, t in before.items())
    freeze_batchnorm(model)
    assert not model[1].weight.requires_grad
    torched = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torched.train()[1].training


def test_where_chooses_by_the_names_of_modules() -> None:
    model = net()
    freeze_batchnorm(model, where=gf.where.named("3.*"))
    assert [model.train()[1].training, model[3][1].training, model[3][3].training] == [True, False, False]
    freeze_batchnorm(model)
    thaw_batchnorm(model, where=~gf.where.named("3.1"))
    assert [model[1].training, model[3][1].training, model[3][3].training] == [True, False, True]
    with pytest.raises(GoodfitError, match=r"found no batch norm in Sequential \(where=named\('4'\)\)"):
        freeze_batchnorm(model, where=gf.where.named("4"))


def test_frozen_scales_are_not_penalised_and_a_run_leaves_them_alone() -> None:
    model, x = net(), torch.randn(8, 5)
    freeze_batchnorm(model)
    before, kernel = norms(model), model[0].weight.clone()
    run = Run("L2(0.1, where=everything), L1(0.1, where=norms), WeightDecay(0.1, where=everything)", model, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    run.loss(x, x[:, :1]).backward()
    run.gradient(optimizer)
    optimizer.step()
    run.step(optimizer)
    run.finish()
    assert same(before, norms(model))
    assert not torch.equal(kernel, model[0].weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "found no batch norm in Linear"),
        (lambda: nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True)), "found no batch norm in Sequential"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(4, track_running_stats=False)), "'1' has none and normalizes"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.LazyBatchNorm1d()), "'1' is lazy: run the model on a batch once"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), Own(nn.Linear(4, 4))), "of '1' alone: the Own has layers beside them"),
        (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(2))), "cannot reach into the scripted '0'"),
        (lambda: "model", r"takes a torch\.nn\.Module, got a str"),
    ],
)
def test_refusals_leave_the_model_alone(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(GoodfitError, match=message):
        freeze_batchnorm(model)
    if isinstance(model, nn.Module):
        assert all(m.training for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype).to(memory_format=torch.channels_last)
    freeze_batchnorm(model)
    before = norms(model)
    model.train()(torch.randn(2, 3, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)).sum().backward()
    assert same(before, norms(model))
    assert model[1].weight.grad is None
