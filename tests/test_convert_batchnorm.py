"""Batch norms converted in place: the same model where it must be, the nearest group norm where it cannot, or a refusal."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrize

import goodfit as gf
from goodfit import Dropout, GoodfitError, GoodfitWarning, convert_batchnorm
from goodfit.batchnorms.groupnorm import relative_error
from goodfit.layers.ghost import GhostBatchNorm2d
from goodfit.layers.synchronized import SyncBatchNorm

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class NormAct(nn.BatchNorm2d):
    """A batch norm with dropout and an activation in it, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Residual(nn.Module):
    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1), norm(16)
        self.conv, self.second = nn.Conv2d(16, 16, 3, padding=1), norm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = F.relu(x + self.second(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Calls(nn.Module):
    """A model of one batch norm and a function that uses it."""

    def __init__(self, norm: nn.Module, how: Any) -> None:
        super().__init__()
        self.norm, self.how = norm, how

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.how(self.norm, *args, **kwargs)


def settled(model: nn.Module, x: Any = IMAGES) -> nn.Module:
    """Statistics that are those of data, and γ and β that are not 1 and 0."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.3)
    for _ in range(30):
        model.train()(x)
    return model.eval()


def rows_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "Norm" in type(m).__name__]


@pytest.mark.parametrize("to", ["sync", "ghost"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct])
def test_sync_and_ghost_say_the_same_and_keep_keys(to: str, norm: Any) -> None:
    model = settled(Residual(norm))
    before = copy.deepcopy(model)
    result = convert_batchnorm(model, to, size=40)
    assert result.model is model
    assert [name for name, _, _ in result.layers] == ["first", "second"]
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(IMAGES), before(IMAGES))
    model.train()
    before.train()
    for one in (model, before):
        torch.manual_seed(5)
        one.said = one(IMAGES)
    assert torch.equal(model.said, before.said)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    before.load_state_dict(model.state_dict())
    kind = SyncBatchNorm if to == "sync" else GhostBatchNorm2d
    assert all(isinstance(m, kind) for m in (model.first, model.second))


def test_a_ghost_trains_by_chunks() -> None:
    model = settled(Residual())
    convert_batchnorm(model, "ghost", size=10)
    seen: list[Any] = []
    model.first.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    model.train()(IMAGES)
    x, y = seen[0]
    w, b = model.first.weight, model.first.bias
    meant = torch.cat([F.batch_norm(c, None, None, w, b, True, 0.0, model.first.eps) for c in x.split(10)])
    torch.testing.assert_close(y, meant)


@pytest.mark.parametrize("to", ["sync", "ghost", "group"])
def test_what_a_module_has_stays(to: str) -> None:
    """Modes, hooks, names, frozen parameters, an optimizer's parameters, shared modules, and inserted layers."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()
    )
    model.append(nn.Conv2d(16, 16, 1)).append(model[1]).append(nn.Flatten()).append(nn.Linear(16 * 36, 2))
    settled(model)
    gf.Dropout(0.3).build(model, IMAGES)
    model.train()
    model[4].eval()
    for p in model[1].parameters():
        p.requires_grad_(False)
    called: list[int] = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    modules, parameters, modes = list(model.modules()), list(model.parameters()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    convert_batchnorm(model, to, [IMAGES] if to == "group" else None)
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]
    assert model[1] is model[7]
    called.clear()
    assert model(IMAGES).shape == (40, 2)
    assert len(called) == 2


def test_a_norm_that_an_inserted_dropout_hangs_from() -> None:
    """The dropout is a child that a hook runs: it must not run twice."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), NormAct(16), nn.Conv2d(16, 4, 1))
    from goodfit.surgery.insert import insert_after

    insert_after(model[1], "extra", nn.Dropout(0.5))
    settled(model)
    twin = copy.deepcopy(model)
    convert_batchnorm(model, "ghost", size=64)
    assert model[1].followers == ("drop", "act")
    for one in (model.train(), twin.train()):
        torch.manual_seed(0)
        one.said = one(IMAGES)
    assert torch.equal(model.said, twin.said)


@pytest.mark.parametrize("to", ["sync", "ghost", "group"])
def test_a_model_that_is_a_norm_is_converted_itself(to: str) -> None:
    norm = settled(nn.BatchNorm2d(3))
    said = norm(IMAGES)
    result = convert_batchnorm(norm, to, [IMAGES] if to == "group" else None)
    assert result.model is norm
    assert str(result).startswith("the model  ")
    assert relative_error([said], [norm(IMAGES)]) < (0.8 if to == "group" else 1e-15)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, NormAct])
def test_a_converted_model_can_be_copied_pickled_and_saved(norm: Any) -> None:
    for to in ("sync", "ghost", "group"):
        model = settled(Residual(norm))
        convert_batchnorm(model, to, [IMAGES] if to == "group" else None)
        said = model(IMAGES)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False))
        assert all(torch.equal(other(IMAGES), said) for other in others)


def test_converting_twice_changes_the_size_and_nothing_to_do_is_said() -> None:
    model = settled(Residual())
    convert_batchnorm(model, "ghost", size=10)
    assert "size=20" in str(convert_batchnorm(model, "ghost", size=20))
    assert model.first.size == 20
    convert_batchnorm(model, "sync")
    assert type(model.first) is SyncBatchNorm or model.first.followers == ()
    assert str(convert_batchnorm(model, "sync")) == "nothing to convert"


# group norms


def test_γ_and_β_are_the_least_squares_solution() -> None:
    """Of one layer, by torch's solver for the same regression."""
    model = settled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))
    x = model[0](IMAGES)
    target = model(IMAGES).detach()
    result = convert_batchnorm(model, "group", [IMAGES], groups=2)
    z = F.group_norm(x, 2, eps=1e-5)
    for c in range(16):
        design = torch.stack([z[:, c].flatten(), torch.ones_like(z[:, c].flatten())], 1)
        found = torch.linalg.lstsq(design, target[:, c].flatten()[:, None]).solution.flatten()
        torch.testing.assert_close(torch.stack([model[1].weight[c], model[1].bias[c]]), found)
    error = float(((model(IMAGES).detach() - target).square().sum() / target.square().sum()).sqrt())
    assert result.error == pytest.approx(error)
    assert result.layers[0][2] == pytest.approx(error)
    assert (type(model[1]), model[1].num_groups) == (nn.GroupNorm, 2)


def test_a_batch_norm_that_is_a_group_norm_is_found_exactly() -> None:
    """Where each row has the same mean and variance per channel, groups of one channel are a batch norm."""
    x = F.group_norm(torch.randn(30, 4, 6, 6), 4, eps=1e-30) * torch.rand(4, 1, 1) + torch.randn(4, 1, 1)
    model = nn.Sequential(nn.Identity(), settled(nn.BatchNorm2d(4), x))
    said = model(x)
    result = convert_batchnorm(model, "group", [x], groups=4)
    assert result.error < 1e-4
    torch.testing.assert_close(model(x), said, rtol=1e-3, atol=1e-3)


def test_a_later_norm_is_fitted_to_what_it_gets_behind_converted_ones() -> None:
    """Reference: one norm after the other in the real model, each regressed on what the old model says there."""
    model, batches = settled(Residual()), [IMAGES[:25], IMAGES[25:]]
    old, slow = copy.deepcopy(model), copy.deepcopy(model)
    result = convert_batchnorm(model, "group", batches, groups=4)
    for name in ("first", "second"):
        seen: dict[str, Tensor] = {}
        for one, key in ((old, "t"), (slow, "z")):
            handle = one.get_submodule(name).register_forward_hook(
                lambda m, a, y, k=key, into=seen: into.update({k: y if k == "t" else a[0]})
            )
            one(IMAGES)
            handle.remove()
        z, t = (v.transpose(0, 1).flatten(1) for v in (F.group_norm(seen["z"], 4, eps=1e-5), seen["t"]))
        norm = nn.GroupNorm(4, 16)
        for c in range(16):
            slope = torch.cov(torch.stack([z[c], t[c]]))
            norm.weight.data[c] = slope[0, 1] / slope[0, 0]
            norm.bias.data[c] = t[c].mean() - norm.weight.data[c] * z[c].mean()
        slow.set_submodule(name, norm)
    torch.testing.assert_close(model(IMAGES), slow(IMAGES))
    assert result.error == pytest.approx(relative_error([old(IMAGES)], [model(IMAGES)]))
    assert 0 < result.error < 1
    assert f"error of the outputs, to be trained away: {result.error:.1%}" in str(result)


def test_the_start_is_nearer_than_γ_and_β_as_they_were() -> None:
    model = settled(Residual())
    plain, said = copy.deepcopy(model), model(IMAGES)
    result = convert_batchnorm(model, "group", [IMAGES], groups=4)
    for name in ("first", "second"):
        old, norm = plain.get_submodule(name), nn.GroupNorm(4, 16)
        norm.load_state_dict({"weight": old.weight, "bias": old.bias})
        plain.set_submodule(name, norm)
    assert result.error < 0.8 * relative_error([said], [plain(IMAGES)])


@pytest.mark.parametrize(
    ("channels", "asked", "space", "groups"),
    [(64, 32, (8, 8), 32), (48, 32, (8, 8), 24), (7, 32, (8, 8), 7), (64, 32, (), 8), (64, 4, (), 4), (6, 32, (), 1)],
)
def test_the_number_of_groups_divides_and_leaves_values(channels: int, asked: int, space: Any, groups: int) -> None:
    x = torch.randn(20, channels, *space)
    norm = nn.BatchNorm2d(channels) if space else nn.BatchNorm1d(channels)
    model = nn.Sequential(nn.Identity(), settled(norm, x))
    assert f"GroupNorm({groups}, {channels})" in str(convert_batchnorm(model, "group", [x], groups=asked))
    assert model(x).shape == x.shape


def test_rows_alone_say_the_same_as_rows_together() -> None:
    model = rows_model()
    convert_batchnorm(model, "group", [torch.randn(50, 6)])
    x = torch.randn(5, 6)
    torch.testing.assert_close(model.train()(x), torch.cat([model(row) for row in x.split(1)]))


def test_a_norm_with_an_activation_keeps_it() -> None:
    model = settled(Residual(NormAct))
    convert_batchnorm(model, "group", [IMAGES], groups=4)
    assert isinstance(model.first, nn.GroupNorm)
    assert float(model.first(torch.randn(4, 16, 8, 8)).detach().min()) == 0
    assert "drop" in dict(model.first.named_children())


@pytest.mark.parametrize("how", [{"affine": False}, {"bias": False}, {"track_running_stats": False}])
def test_norms_without_a_part(how: dict[str, Any]) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, **how), nn.ReLU()))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    said = model(IMAGES)
    result = convert_batchnorm(model, "group", [IMAGES], groups=4)
    assert result.error == pytest.approx(relative_error([said], [model(IMAGES)]))
    assert result.error < 0.7
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert set(model[1].state_dict()) == {"weight", "bias"}


def test_a_norm_called_several_times_is_fitted_over_its_calls() -> None:
    """By the last call all are known: γ and β are the regression over both calls together."""
    model = settled(Calls(nn.BatchNorm2d(3), lambda norm, x: norm(x) + norm(3 * x)))
    both = [IMAGES, 3 * IMAGES]
    said, target = model(IMAGES), torch.cat([model.norm(x) for x in both])
    result = convert_batchnorm(model, "group", [IMAGES], groups=1)
    z = torch.cat([F.group_norm(x, 1) for x in both])
    for c in range(3):
        design = torch.stack([z[:, c].flatten(), torch.ones_like(z[:, c].flatten())], 1)
        found = torch.linalg.lstsq(design, target[:, c].flatten()[:, None]).solution.flatten()
        torch.testing.assert_close(torch.stack([model.norm.weight[c], model.norm.bias[c]]), found)
    assert result.error == pytest.approx(relative_error([said], [model(IMAGES)]))


def test_a_constant_channel_stays_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    nn.init.zeros_(model[0].weight[5].detach())
    settled(model)
    said = model(IMAGES)
    convert_batchnorm(model, "group", [IMAGES], groups=16)
    assert model(IMAGES).isfinite().all()
    torch.testing.assert_close(model(IMAGES)[:, 5], said[:, 5])


def test_a_norm_that_eval_does_not_reach_is_converted_and_said() -> None:
    class Auxiliary(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.aux(self.stem(x)).mean() if self.training else 0)

    model = settled(Auxiliary())
    weight = model.aux.weight.detach().clone()
    assert "aux     GroupNorm(2, 16)  not reached" in str(convert_batchnorm(model, "group", [IMAGES]))
    assert torch.equal(model.aux.weight, weight)
    assert model.train()(IMAGES).isfinite().all()


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: [(x, torch.ones(len(x)))], lambda x: [[x[:20]], [x[20:]]]])
def test_batches_as_loaders_give_them(wrap: Any) -> None:
    model = settled(Residual())
    other = copy.deepcopy(model)
    convert_batchnorm(model, "group", wrap(IMAGES))
    convert_batchnorm(other, "group", iter([IMAGES]))
    torch.testing.assert_close(model(IMAGES), other(IMAGES))


def test_inputs_by_position_and_by_keyword_and_rows_that_are_enough() -> None:
    for x in ((IMAGES, IMAGES.flip(0)), {"a": IMAGES, "b": IMAGES.flip(0)}):
        model = Calls(nn.BatchNorm2d(3), lambda norm, a, b: norm(a) * b.abs())
        assert convert_batchnorm(model, "group", [(x, None)], groups=1).error < 1
    taken: list[int] = []
    stream = (taken.append(i) or IMAGES[:10] for i in range(9))
    convert_batchnorm(Residual(), "group", stream, samples=25)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_and_channels_last(dtype: torch.dtype) -> None:
    model = settled(Residual()).to(dtype).to(memory_format=torch.channels_last)
    x = IMAGES.to(dtype).contiguous(memory_format=torch.channels_last)
    reference = settled(Residual())
    reference.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    result = convert_batchnorm(model, "group", [x], groups=4)
    assert result.error == pytest.approx(convert_batchnorm(reference, "group", [IMAGES], groups=4).error, rel=0.1)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for to in ("ghost", "sync"):
        other = Residual().to(dtype)
        convert_batchnorm(other, to, size=4)
        assert other(x).dtype == dtype


# refusals


class Odd(nn.BatchNorm2d):
    """A batch norm that does something of its own in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 if self.training else 0.0)


class Reads(Residual):
    """A model that reads what batch norms alone have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first.running_mean.sum()


def parametrized() -> nn.Module:
    model = Residual()
    parametrize.register_parametrization(model.first, "weight", nn.Identity())
    return model


def patched() -> nn.Module:
    model = Residual()
    model.first.forward = lambda x: x
    return model


def mixing() -> nn.Module:
    return Calls(nn.BatchNorm2d(3), lambda norm, x: norm(x) - norm(x).mean(0))


def dice() -> nn.Module:
    return Calls(nn.BatchNorm2d(3), lambda norm, x: norm(x) * torch.rand_like(x))


X = [IMAGES]


def with_nan() -> Tensor:
    x = IMAGES.clone()
    x[1, 0, 2, 2] = float("nan")
    return x


REFUSED: dict[str, tuple[Any, Any, Any, dict[str, Any], str]] = {
    "no norm": (lambda: nn.Sequential(nn.Linear(2, 2)), "sync", None, {}, "found no batch norm in Sequential"),
    "no model": (lambda: "net", "sync", None, {}, "takes a torch.nn.Module and a target, got a str"),
    "target": (Residual, "gost", None, {}, "'sync', 'ghost' or 'group', got 'gost'; did you mean ghost"),
    "no batches": (Residual, "group", None, {}, "needs batches to begin from"),
    "batches": (Residual, "ghost", X, {}, "takes no batches"),
    "a tensor": (Residual, "group", IMAGES, {}, "a DataLoader or a list of batches, got a Tensor"),
    "a pair": (Residual, "group", (IMAGES, IMAGES), {}, "got a tuple: give"),
    "empty": (Residual, "group", [], {}, "needs batches with rows, got none"),
    "triple": (Residual, "group", [(IMAGES, IMAGES, IMAGES)], {}, "got a tuple of 3"),
    "shapes": (Residual, "group", [IMAGES, IMAGES[..., :4]], {}, "Rows can be joined where they are of one shape"),
    "nan": (Residual, "group", [with_nan()], {}, "needs finite numbers, but the batch norm 'first' gets nan or inf"),
    "groups": (Residual, "group", X, {"groups": 0}, "groups must be an integer >= 1, got groups=0"),
    "size": (Residual, "ghost", None, {"size": 1}, "size must be an integer >= 2, got size=1"),
    "samples": (Residual, "group", X, {"samples": 0.5}, "a number of rows >= 1, got samples=0.5"),
    "wrong x": (Residual, "group", [IMAGES[:, :2]], {}, "must run on the example in eval mode"),
    "odd subclass": (lambda: Residual(Odd), "ghost", None, {}, "Odd 'first' does not do in both modes"),
    "parametrized": (parametrized, "sync", None, {}, "'first' is parametrized"),
    "patched": (patched, "group", X, {}, "'first' has a forward of its own"),
    "reads": (Reads, "group", X, {}, "reads what batch norms alone have"),
    "mixing rows": (mixing, "group", X, {}, "rows that do not depend on one another"),
    "random": (dice, "group", X, {}, "from run to run"),
    "lazy": (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "ghost", None, {}, "'0' is lazy"),
    "ghost of sync": (
        lambda: nn.Sequential(nn.SyncBatchNorm(3)),
        "ghost",
        None,
        {},
        "'0' is a SyncBatchNorm, whose statistics are those of more rows",
    ),
    "wrapped": (lambda: DataParallel(Residual()), "ghost", None, {}, "got a DataParallel"),
}


def test_converting_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, affine=False))
    with torch.inference_mode():
        convert_batchnorm(model, "group", [torch.randn(20, 3)])
    model(torch.randn(20, 3)).sum().backward()
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case: str) -> None:
    make, to, batches, how, message = REFUSED[case]
    model = make()
    is_model = isinstance(model, nn.Module)
    kinds = [type(m) for m in model.modules()] if is_model else []
    lists = [sorted(vars(m)) for m in model.modules()] if is_model else []
    state = copy.deepcopy(model.state_dict()) if is_model and case != "lazy" else {}
    with pytest.raises(GoodfitError, match=message):
        convert_batchnorm(model, to, batches, **how)
    if is_model:
        assert [type(m) for m in model.modules()] == kinds
        assert [sorted(vars(m)) for m in model.modules()] == lists
        assert state == {} or all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_compiled_and_scripted_models_are_refused_and_compiled_afterwards_right() -> None:
    with pytest.raises(GoodfitError, match="got a compiled"):
        convert_batchnorm(torch.compile(Residual(), backend="eager"), "ghost")
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    for model, message in ((scripted, "got a RecursiveScriptModule"), (nn.Sequential(scripted), "the scripted '0'")):
        with pytest.raises(GoodfitError, match=message):
            convert_batchnorm(model, "ghost")
    model = settled(Residual())
    compiled = torch.compile(model, backend="eager")
    assert compiled(IMAGES).shape == (40, 4)
    convert_batchnorm(model, "group", [IMAGES])
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_a_module_with_statistics_of_its_own_is_left_and_told() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)

    model = nn.Sequential(Own(), nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    with pytest.warns(GoodfitWarning, match="leaves 0: no batch norm of torch"):
        result = convert_batchnorm(model, "ghost")
    assert result.left == ("0",)
    assert "0: left as it is" in str(result)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Residual())
    said, runs = model(IMAGES), []

    def interrupted(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 4:  # the run of the converted model
            raise KeyboardInterrupt

    handle = model.head.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_batchnorm(model, "group", [IMAGES])
    handle.remove()
    assert type(model.first) is nn.BatchNorm2d
    assert torch.equal(model(IMAGES), said)


def test_group_norms_train_in_a_run() -> None:
    model = settled(Residual())
    convert_batchnorm(model, "group", [IMAGES], groups=4)
    found = gf.fit(model, (IMAGES, torch.randn(40, 4)), (IMAGES, torch.randn(40, 4)), Dropout(0.0), epochs=2, batch_size=13)
    assert found.score > 0
    assert [type(m) for m in norms(model)] == [nn.GroupNorm, nn.GroupNorm]
