"""Folding: each batch norm goes into the layer at its side, the model says the same, or it is told why not."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm as parametrized_weight_norm

import goodfit as gf
from goodfit import GoodfitError
from goodfit.surgery.proof import answers, largest_error
from nets import Net, settled

SHAPES = ((5, 4), (3, 4, 9), (2, 4, 8, 8), (2, 4, 5, 6, 7))
ROWS, LINES, IMAGES, VOLUMES = (torch.randn(shape, dtype=torch.float64) for shape in SHAPES)


def folded(model: nn.Module, example: Any, fresh: Any = None) -> Any:
    """The result; on the example and on fresh numbers the outputs are those of before, and modes are kept."""
    settled(model)
    before, modes = copy.deepcopy(model), {n: m.training for n, m in model.named_modules()}
    result = gf.fold_batchnorm(model, example)
    assert result.model is model
    assert {n: m.training for n, m in model.named_modules() if n in modes} == {
        n: mode for n, mode in modes.items() if n in dict(model.named_modules())
    }
    assert result.error <= 1e-10
    fresh = 3 * torch.randn_like(example) if fresh is None else fresh
    for x in (example, fresh):
        assert largest_error(answers(before, x), answers(model, x))[1] <= 1e-10
    return result


def kept(result: Any) -> dict[str, str]:
    return dict(result.kept)


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


BEHIND = {
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), ROWS),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), LINES),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), IMAGES),
    "conv3d": (nn.Conv3d(4, 6, (1, 3, 2)), nn.BatchNorm3d(6), VOLUMES),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6), IMAGES),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), IMAGES),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), IMAGES),
    "same": (nn.Conv1d(4, 6, 3, padding="same"), nn.BatchNorm1d(6), LINES),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), LINES),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, padding=1, output_padding=1, stride=2), nn.BatchNorm2d(6), IMAGES),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), VOLUMES),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGES),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), IMAGES),
    "no affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGES),
    "cumulative": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, momentum=None, eps=0.1), ROWS),
    "synchronized": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), IMAGES),
    "instance": (nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), IMAGES),
}


def randomized(norm: Any) -> Any:
    """Statistics as after training, for a norm with or without weights."""
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        norm.weight.detach().uniform_(0.5, 2), norm.bias.detach().normal_()
    return norm


def exact(model: nn.Module, example: Tensor) -> Any:
    """The same as `folded`, of a model whose statistics are set."""
    before = copy.deepcopy(model)
    result = gf.fold_batchnorm(model, example)
    for x in (example, 3 * torch.randn_like(example)):
        assert largest_error(answers(before, x), answers(model, x))[1] <= 1e-10
    return result


@pytest.mark.parametrize("case", BEHIND.values(), ids=BEHIND)
def test_a_norm_behind_a_layer(case: Any) -> None:
    layer, norm, example = copy.deepcopy(case)
    model = nn.Sequential(layer, nn.Dropout(0.5), randomized(norm), nn.ReLU()).double()
    assert exact(model, example).folded == (("2", "0"),)
    assert type(model[2]) is nn.Identity


BEFORE = {
    "linear": (nn.BatchNorm1d(4), nn.Linear(4, 6), ROWS),
    "no bias": (nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False), ROWS),
    "conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), LINES),
    "conv2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), IMAGES),
    "conv3d": (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2), VOLUMES),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), IMAGES),
    "depthwise": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGES),
}


@pytest.mark.parametrize("case", BEFORE.values(), ids=BEFORE)
def test_a_norm_before_a_layer(case: Any) -> None:
    norm, layer, example = copy.deepcopy(case)
    model = nn.Sequential(nn.ReLU(), randomized(norm), nn.Identity(), layer).double()
    assert exact(model, example).folded == (("1", "3"),)


def test_the_numbers_by_hand() -> None:
    layer, norm = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)
    with torch.no_grad():
        for tensor, value in ((layer.weight, 3.0), (layer.bias, 5.0), (norm.weight, 4.0), (norm.bias, 7.0)):
            tensor.fill_(value)
        norm.running_mean.fill_(2.0), norm.running_var.fill_(16.0)
    behind, before = (copy.deepcopy(nn.Sequential(*pair)) for pair in ((layer, norm), (norm, layer)))
    gf.fold_batchnorm(behind, torch.ones(2, 1))  # 4 · (3x + 5 − 2) / 4 + 7
    assert (behind[0].weight.item(), behind[0].bias.item()) == (3.0, 10.0)
    gf.fold_batchnorm(before, torch.ones(2, 1))  # 3 · (4 · (x − 2) / 4 + 7) + 5
    assert (before[1].weight.item(), before[1].bias.item()) == (3.0, 20.0)


def test_a_norm_before_a_layer_that_pads_goes_only_without_a_shift() -> None:
    model = nn.Sequential(nn.ReLU(), randomized(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1))
    with pytest.raises(GoodfitError, match="1 comes before 2: it pads, and a shift is none at the border"):
        gf.fold_batchnorm(model, IMAGES)
    model[1].running_mean.zero_(), model[1].bias.detach().zero_()
    assert exact(model, IMAGES).folded == (("1", "2"),)


def test_transposed_layers_do_not_keep_a_shift() -> None:
    model = nn.Sequential(nn.ReLU(), randomized(nn.BatchNorm1d(4)), nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2))
    with pytest.raises(GoodfitError, match="a shift is none at the border"):
        gf.fold_batchnorm(model, LINES)
    model[1].running_mean.zero_(), model[1].bias.detach().zero_()
    assert exact(model, LINES).folded == (("1", "2"),)


def test_norms_on_both_sides_and_behind_each_other() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Tanh()
    )
    result = folded(model, IMAGES)
    assert set(result.folded) == {("2", "3"), ("4", "3"), ("5", "3")}
    assert norms_of(model) == 0


def test_through_flatten_each_channel_is_a_block_of_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(6 * 36, 3))
    assert folded(model, IMAGES).folded == (("2", "5"),)


def test_tokens_turned_to_channels() -> None:
    turned = Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).transpose(1, 2), fc=nn.Linear(9, 6), bn=nn.BatchNorm1d(6))
    assert folded(turned, LINES).folded == (("bn", "fc"),)
    flat = Net(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).relu(), fc=nn.Linear(9, 6), bn=nn.BatchNorm1d(6))
    assert folded(flat, LINES).folded == (("bn", "fc"),)
    added = Net(lambda m, x: m.bn(m.fc(x.mT).mT).relu(), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))  # bias in a second step
    assert folded(added, LINES).folded == (("bn", "fc"),)


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.bn(y)
    y.mul_(2)
    return z + y


def keeps(m: Any, x: Tensor) -> Tensor:
    m.features = m.conv(x)
    return m.bn(m.features)


def in_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += 1
    return m.bn(y)


def branches(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y) if y.mean().item() > -1e9 else y


def overwritten(m: Any, x: Tensor) -> Tensor:
    """The norm's input changes behind it: without the norm, the layer would read the change."""
    y = m.bn(x)
    x.relu_()
    return m.conv(y)


class Holder:
    """An object that is no module, no container and no data class."""


def held(place: str) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, holder = m.conv(x), Holder()
        holder.found, holder.itself = y, holder
        for _ in range(2000):
            holder = holding(next=holder)
        m.cache = {"list": [("y", y)], "dict": {"a": {"y": y}}, "object": holder}[place]
        return m.bn(y)

    return forward


CONV = {"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)}
KEPT = {
    "residual": (residual, "also read by add"),
    "returned too": (lambda m, x: (m.conv(x), m.bn(m.conv(x))), "is read 2 times"),
    "returned": (lambda m, x: [y := m.conv(x), m.bn(y)], "is an output of the model"),
    "in place behind": (in_place, "also read by add, mul"),
    "in place between": (in_between, "also read by add"),
    "kept": (keeps, "is kept by the model"),
    "kept in a list of tuples": (held("list"), "is kept by the model"),
    "kept in a dict of dicts": (held("dict"), "is kept by the model"),
    "kept in an object": (held("object"), "is kept by the model"),
    "python reads": (branches, "also read by mean"),
    "listed": (lambda m, x: (m.bn(y := m.conv(x)) * len(y.tolist())), "is read by Python"),
    "conv twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "is read 2 times"),
    "norm twice": (lambda m, x: m.bn(m.bn(m.conv(x))), "runs 2 times"),
    "norm as a function too": (
        lambda m, x: m.bn(m.conv(x)) + F.batch_norm(x, m.bn.running_mean, m.bn.running_var), "read elsewhere",
    ),
    "conv as a function too": (lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum(), "is read 2 times"),
    "never": (lambda m, x: m.conv(x), "does not run"),
    "other sides": (lambda m, x: m.bn(m.conv(x).relu()), "stands between relu and the output"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_what_must_stay_is_refused_with_the_reason(case: Any) -> None:
    forward, reason = case
    model = settled(Net(forward, **copy.deepcopy(CONV)).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GoodfitError, match=reason):
        gf.fold_batchnorm(model, IMAGES.clone())
    assert type(model.bn) is nn.BatchNorm2d
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_an_input_that_is_overwritten_behind_the_norm_fails_the_proof() -> None:
    model = settled(Net(lambda m, x: overwritten(m, x.clone()), **copy.deepcopy(CONV)).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GoodfitError, match="bn fails the proof: outputs would differ by"):
        gf.fold_batchnorm(model, IMAGES)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_a_fold_that_fails_leaves_the_others() -> None:
    layers = {**copy.deepcopy(CONV), "one": nn.Conv2d(4, 4, 3), "two": nn.BatchNorm2d(4), "three": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.three(m.two(m.one(overwritten(m, x.clone())))), **layers).double()
    result = folded(model, IMAGES)
    assert set(result.folded) == {("two", "one"), ("three", "one")}
    assert "fails the proof" in kept(result)["bn"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)


def test_batch_norm_as_a_function_is_told() -> None:
    with pytest.raises(GoodfitError, match=r"Sequential: 0 calls batch_norm as a function, whose numbers belong to no layer\."):
        gf.fold_batchnorm(nn.Sequential(Functional(), nn.ReLU()), IMAGES)
    result = folded(nn.Sequential(Functional(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)), IMAGES)
    assert result.folded == (("2", "1"),)
    assert list(kept(result)) == ["0"]


def standardizes(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + F.conv2d(x, F.batch_norm(m.conv.weight[None].flatten(2), None, None, training=True)[0].view(6, 4, 3, 3))


def test_batch_norm_as_a_function_of_the_batch_has_nothing_to_fold() -> None:
    assert folded(Net(standardizes, conv=nn.Conv2d(4, 6, 3)), IMAGES).kept == ()


def test_three_silent_errors_of_torchs_fuser() -> None:
    """Where `torch.fx.experimental.optimization.fuse` says something else, the model stays or is folded right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.fx.experimental.optimization import fuse

    conv = nn.Conv2d(4, 4, 1)
    linear, square = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9)), torch.randn(3, 9, 9)
    cases = {
        "one conv, two norms": (nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4)), IMAGES),
        "one conv, once with a norm": (nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv), IMAGES),
        "features last": (linear, square),
    }
    for name, (model, x) in cases.items():
        settled(model).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fused = fuse(copy.deepcopy(model))
        assert largest_error(answers(model, x), answers(fused, x))[1] > 0.05, name
        with pytest.raises(GoodfitError, match=r"is read 2 times|channels are not those of the norm"):
            gf.fold_batchnorm(model, x)


def test_statistics_that_cannot_be_folded() -> None:
    def pair(**numbers: Any) -> Any:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, **numbers))

    with pytest.raises(GoodfitError, match="1 normalizes by its batch in eval too"):
        gf.fold_batchnorm(pair(track_running_stats=False), ROWS)
    for wrong in (float("nan"), float("inf")):
        model = pair()
        model[1].running_mean[1] = wrong
        with pytest.raises(GoodfitError, match="1 has statistics or weights that are not finite"):
            gf.fold_batchnorm(model, ROWS)
    dead = pair()
    dead[1].running_var.zero_()
    assert exact(dead, ROWS).folded == (("1", "0"),)


def test_weights_that_are_computed_or_tied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        computed = [weight_norm(nn.Linear(4, 3)), spectral_norm(nn.Linear(4, 3)), parametrized_weight_norm(nn.Linear(4, 3))]
    for layer in computed:
        with pytest.raises(GoodfitError, match="1 comes after 0: its weight is computed"):
            gf.fold_batchnorm(settled(nn.Sequential(layer, nn.BatchNorm1d(3))), ROWS)
    tied = settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)))
    tied[3].weight = tied[0].weight
    with pytest.raises(GoodfitError, match="comes after 0: its weight is tied"):
        gf.fold_batchnorm(tied, ROWS)


def holding(**found: Tensor) -> Holder:
    holder = Holder()
    vars(holder).update(found)
    return holder


class Slots:
    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


OPAQUE = {
    "an iterator": (lambda m, x: iter([m.bn(m.conv(x))]), "got list_iterator"),
    "a generator": (lambda m, x: (y for y in [m.bn(m.conv(x))]), "got generator"),
    "a part": (lambda m, x: (m.bn(m.conv(x)), map(abs, [x])), "got map"),
    "slots": (lambda m, x: (m.bn(m.conv(x)), Slots(x)), "got Slots"),
    "an array": (lambda m, x: (m.bn(m.conv(x)), x.numpy()), "got ndarray"),
    "no tensors": (lambda m, x: m.bn(m.conv(x)).mean().item(), "got float"),
    "an empty object": (lambda m, x: (m.bn(m.conv(x)), holding())[1], "got Holder"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPAQUE.values(), ids=OPAQUE)
def test_outputs_that_cannot_be_read_prove_nothing(case: Any) -> None:
    forward, reason = case
    for edit in (gf.fold_batchnorm, gf.shrink, lambda m, x: gf.convert_batchnorm(m, "group", [x])):
        model = settled(Net(forward, **copy.deepcopy(CONV)).double())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(GoodfitError, match=f"outputs of Net are compared, so they must be tensors.*{reason}"):
            edit(model, IMAGES)
        assert type(model.bn) is nn.BatchNorm2d
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_objects_are_looked_into() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        out = holding(y=m.bn(m.conv(x)), name="a")
        out.itself = [out]  # type: ignore[attr-defined]
        return out

    assert folded(Net(forward, **copy.deepcopy(CONV)).double(), IMAGES).folded == (("bn", "conv"),)
    both = Net(lambda m, x: holding(y=m.bn(c := m.conv(x)), features=c), **copy.deepcopy(CONV)).double()
    with pytest.raises(GoodfitError, match="is an output of the model"):
        gf.fold_batchnorm(settled(both), IMAGES)
    other = Net(lambda m, x: holding(y=m.bn(m.conv(x)) if x.sum() > 0 else m.conv(x)), **copy.deepcopy(CONV)).double()
    with pytest.raises(GoodfitError, match="fails the proof"):
        gf.fold_batchnorm(settled(other), IMAGES.abs())


def test_folding_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU())).eval()
    before = copy.deepcopy(model)
    with torch.inference_mode():
        gf.fold_batchnorm(model, ROWS)
    assert not any(p.is_inference() for p in model.parameters())
    torch.testing.assert_close(model(ROWS), before(ROWS))
    model(ROWS).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_what_hooks_see_stays() -> None:
    model = settled(nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.BatchNorm1d(3), nn.ReLU()))
    for module, reason in (
        (model[0][0], "it has hooks|is seen by a hook"),
        (model[0], "is seen by a hook of 0"),
        (model[1], "has hooks"),
    ):
        handle = module.register_forward_hook(lambda *_: None)
        with pytest.raises(GoodfitError, match=reason):
            gf.fold_batchnorm(model, ROWS)
        handle.remove()
    between = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Identity(), nn.Linear(4, 3))
    between[2].register_forward_hook(lambda *_: None)
    with pytest.raises(GoodfitError, match="what the norm gives is seen by a hook of 2"):
        gf.fold_batchnorm(between, ROWS)
    model[2].register_forward_hook(lambda *_: None)  # sees what it saw
    assert folded(model, ROWS).folded == (("1", "0.0"),)


def test_dropout_that_goodfit_set_is_nothing_in_eval_mode() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.dropout(m.bn(m.conv(x)).mean((2, 3)), 0.5, m.training))

    for mix in (gf.DropConnect(0.3), gf.Dropout(0.3)):
        inner = Net(forward, fc=nn.Linear(4, 3), **copy.deepcopy(CONV)).double()
        model = nn.Sequential(inner)
        run = gf.Run(mix, model, example=IMAGES)
        assert folded(model, IMAGES).folded == (("0.bn", "0.conv"),)
        model.train()
        assert any(not torch.equal(model(IMAGES), model(IMAGES)) for _ in range(9))
        del run


def test_norms_that_goodfit_inserted() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)
    )
    keys = {*model.state_dict(), "0.bias"}
    gf.BatchNorm().build(model, IMAGES)
    gf.Dropout(0.3).build(model, IMAGES)
    assert norms_of(model) == 2
    assert folded(model, IMAGES).folded == (("0.batchnorm", "0"), ("2.batchnorm", "2"))
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Conv2d))
    assert [name for name, _ in model.named_modules() if "dropout" in name] == ["3.dropout"]
    gf.BatchNorm().build(model, IMAGES)
    assert norms_of(model) == 2


class Frozen(nn.Module):
    """As in detectors: buffers only, and an eps that nothing tells."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        for name, value in (("weight", torch.rand(n) + 0.5), ("bias", torch.randn(n))):
            self.register_buffer(name, value)
        self.register_buffer("running_mean", torch.randn(n))
        self.register_buffer("running_var", torch.rand(n) + 0.5)
        self.inner = eps

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        scale = w * (v + self.inner).rsqrt()
        return x * scale + (b - m * scale)


class NormAct(nn.BatchNorm2d):
    """As in timm: a norm that calls an activation itself."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Skewed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


def test_other_classes_of_norms() -> None:
    assert exact(nn.Sequential(nn.Conv2d(4, 6, 3), Frozen(6, 1e-5)), IMAGES).folded == (("1", "0"),)
    for other in (Frozen(6, 1e-3), settled(Skewed(6))):
        with pytest.raises(GoodfitError, match=r"1 does not act as scale · x \+ shift of its running statistics"):
            gf.fold_batchnorm(nn.Sequential(nn.Conv2d(4, 6, 3), other), IMAGES)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), NormAct(6), nn.Conv2d(6, 4, 3))
    act = model[1].act
    assert folded(model, IMAGES).folded == (("1", "0"),)
    assert model[1].act is act
    assert not list(model[1].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))).to(dtype)
    result = gf.fold_batchnorm(model, IMAGES.to(dtype))
    assert result.folded == (("1", "0"),)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert result.error <= {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


def test_a_model_that_rounds_by_more_than_the_bound_is_judged_in_double_precision() -> None:
    def chaotic(size: float) -> Any:
        forward = lambda m, x: torch.sin(size * m.bn(m.fc(x)))  # noqa: E731
        return settled(Net(forward, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)).float())

    x = torch.randn(500, 4, dtype=torch.float32)
    result = gf.fold_batchnorm(chaotic(300.0), x)
    assert result.folded == (("bn", "fc"),)
    assert 1e-5 < result.error < 1e-3
    with pytest.raises(GoodfitError, match="bn fails the proof: outputs would differ by"):
        gf.fold_batchnorm(chaotic(1e6), x)


def test_small_errors_that_are_none_of_rounding_fail() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x)) + (1e-4 if hasattr(m.bn, "running_mean") else 0.0)

    model = settled(Net(forward, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)).float())
    with pytest.raises(GoodfitError, match="fails the proof"):
        gf.fold_batchnorm(model, ROWS.float())


def test_what_a_layer_has_stays_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6))
    model = model.to(memory_format=torch.channels_last)
    model[3].weight.requires_grad_(False)
    first, bias = model[0].weight, model[0].bias
    folded(model.train(), IMAGES)
    assert model[0].weight is first
    assert model[0].bias is bias
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert first.requires_grad
    assert not model[3].bias.requires_grad
    assert model.training
    assert model[4].training
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_the_folded_model_copies_saves_and_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    folded(model, ROWS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ROWS), model(ROWS))
    fresh = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.ReLU(), nn.Linear(6, 2))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ROWS), model(ROWS))
    model(ROWS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_to_fold() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    result = folded(model, ROWS)
    assert (result.folded, result.kept, result.error) == ((), (), 0.0)
    assert str(result).startswith("no batch norm to fold")


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    shown = str(folded(model, IMAGES)).splitlines()
    assert shown[0] == "1 of 2 batch norms folded"
    assert shown[-2:] == ["1: folded into 0", "3 stands between relu and the output, with no layer at its side"]


def exported() -> nn.Module:
    model = settled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))).double().eval()
    return torch.export.export(model, (ROWS,)).module()


REFUSED = {
    "not a model": (lambda: ROWS, "takes a torch.nn.Module"),
    "leaf": (lambda: nn.BatchNorm1d(4), "single BatchNorm1d"),
    "data parallel": (lambda: nn.DataParallel(nn.Sequential(nn.Linear(4, 4))), "DataParallel"),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 4))), "compiled"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "lazy"),
    "exported": (exported, "runs a model in eval mode, got an exported model: fold_batchnorm first, export afterwards"),
    "meta": (lambda: nn.Sequential(nn.Linear(4, 4)).to("meta"), "plain dense"),
    "wrong input": (lambda: nn.Sequential(nn.Linear(3, 4)), "must run on the example"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_models_that_are_refused(case: Any) -> None:
    build, reason = case
    with pytest.raises(GoodfitError, match=reason):
        gf.fold_batchnorm(build(), ROWS)


def test_an_error_in_between_puts_every_bit_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    before, norm = copy.deepcopy(model.state_dict()), model[1]
    for place in ("Folding.grow", "Folding.apply"):
        with monkeypatch.context() as patch:

            def stop(self: Any, *args: Any) -> None:
                raise KeyboardInterrupt

            def late(self: Any, pairs: Any, real: Any = gf.folding.trials.Folding.apply) -> None:
                real(self, pairs)
                raise KeyboardInterrupt

            patch.setattr(f"goodfit.folding.trials.{place}", late if place.endswith("apply") else stop)
            with pytest.raises(KeyboardInterrupt):
                gf.fold_batchnorm(model, IMAGES)
        assert model[1] is norm
        assert model[0].bias is None
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_torchs_generator_is_untouched() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.BatchNorm1d(6)))
    state = torch.get_rng_state()
    gf.fold_batchnorm(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state)


def test_words_and_positions_as_inputs() -> None:
    model = Net(lambda m, a, b: {"y": m.bn(m.fc(a)) + b}, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    other = copy.deepcopy(model)
    assert folded(model, (ROWS, ROWS), (ROWS * 2, ROWS)).folded == (("bn", "fc"),)
    assert folded(other, {"a": ROWS, "b": ROWS}, {"a": ROWS * 2, "b": ROWS}).folded == (("bn", "fc"),)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def falls_back(m: Any, x: Tensor) -> Tensor:
    try:
        return m.wrong(x)
    except RuntimeError:
        return m.bn(m.fc(x))


def test_a_layer_that_fails_within_the_model() -> None:
    model = Net(falls_back, wrong=Fails(), fc=nn.Linear(4, 3), bn=nn.BatchNorm1d(3))
    assert folded(model, ROWS).folded == (("bn", "fc"),)


def test_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = settled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        before = model.eval()(ROWS)
    assert gf.fold_batchnorm(model, ROWS).folded == (("1", "0"),)
    torch.testing.assert_close(model(ROWS), before.clone(), rtol=1e-10, atol=1e-10)


def test_weights_in_one_block_of_memory() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert exact(model, ROWS).folded == (("1", "0"), ("3", "4"))


def test_dropout_that_never_rests_is_no_identity() -> None:
    model = settled(Net(lambda m, x: m.bn(F.dropout(m.fc(x), 0.5, True)), fc=nn.Linear(4, 3), bn=nn.BatchNorm1d(3)))
    with pytest.raises(GoodfitError, match="stands between mul and the output"):
        gf.fold_batchnorm(model, ROWS)


LAYERS: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, bias=False),
    "padded": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, groups=2),
    "norm": lambda: nn.BatchNorm2d(4),
    "acting": lambda: NormAct(4),
    "frozen": lambda: Frozen(4, 1e-5),
    "relu": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout2d(),
    "pool": lambda: nn.AvgPool2d(1),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=7), st.integers(0, 3), st.booleans())
def test_any_stack_of_layers_says_the_same_or_is_untouched(names: list[str], again: int, skip: bool) -> None:
    torch.manual_seed(len(names))
    layers = [LAYERS[name]() for name in names]
    layers += layers[:1] * (again == 3)  # a shared layer
    plain = nn.Sequential(*layers)
    model = settled(Net(lambda m, x: m.body(x).mean() + m.body(x * 2).mean() if skip else m.body(x), body=plain))
    before, x = copy.deepcopy(model), torch.randn(2, 4, 12, 12)
    try:
        result = gf.fold_batchnorm(model, x)
    except GoodfitError:
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.state_dict().items())
        return
    assert not (skip and result.folded)
    for one in (x, torch.randn(3, 4, 15, 15)):
        assert largest_error(answers(before, one), answers(model, one))[1] <= 1e-10
