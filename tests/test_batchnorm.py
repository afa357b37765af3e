"""How an inserted batch norm starts: as the identity, with given numbers, with zero at the end of residual branches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit import BatchNorm, GoodfitError, Run
from goodfit.surgery.running import call_model


class Residual(nn.Module):
    """x + f(x), where f ends in a convolution or in a norm."""

    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(*end)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.b(F.relu(self.a(x))))


class Squeeze(nn.Module):
    """Squeeze-excite, the gate spread over the image by hand, or by broadcasting."""

    def __init__(self, expand: bool) -> None:
        super().__init__()
        self.conv, self.reduce, self.gate, self.out = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 2, 1),
            nn.Conv2d(2, 8, 1),
            nn.Conv2d(8, 1, 1),
        )
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        gate = self.gate(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.out(x * (gate.expand_as(x) if self.expand else gate))


IMAGES, ROWS = torch.randn(5, 3, 8, 8), torch.randn(9, 6)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def residual(*end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Residual(*end), nn.Conv2d(4, 1, 1))


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(
            F.relu(
                self.a(
                    F.relu(self.a(x)),
                )
            )
        )


CASES: dict[str, Any] = {
    "vectors": (mlp, ROWS),
    "images": (residual, IMAGES),
    "reused": (Twice, ROWS),
    "dead unit": (lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 1)), torch.zeros(4, 6)),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.SiLU(), nn.ConvTranspose3d(4, 1, 2)), torch.randn(2, 1, 3, 4, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_identity_leaves_eval_mode_unchanged_on_any_input(case: str) -> None:
    make, x = CASES[case]
    model, x = make().double(), x.double()
    plain = copy.deepcopy(model)
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    BatchNorm(calibrate="identity").build(model, x)
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [m.training for m in model.modules() if not hasattr(m, "running_mean")]
    for given in (x, -3 * x + 1, torch.randn_like(x)):
        torch.testing.assert_close(model.eval()(given), plain.eval()(given), rtol=1e-12, atol=1e-12)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(x), model(x))


def test_identity_takes_the_statistics_of_the_example() -> None:
    model = mlp().double()
    BatchNorm(calibrate="identity").build(model, ROWS.double())
    for host in (model[0], model[2]):
        norm = host.batchnorm
        torch.testing.assert_close(norm.weight.square(), norm.running_var + norm.eps)
        assert torch.equal(norm.bias, norm.running_mean)
    got = F.linear(ROWS.double(), model[0].weight, model[0].bias)
    torch.testing.assert_close(model[0].batchnorm.running_mean, got.mean(0))
    torch.testing.assert_close(model[0].batchnorm.running_var, got.var(0, correction=0))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_identity_in_other_precisions(dtype: torch.dtype, bound: float) -> None:
    model, x = residual().to(dtype).eval().requires_grad_(False), IMAGES.to(dtype)
    before = model(x)
    BatchNorm(calibrate="identity").build(model, x)
    assert float((model(x).detach() - before).abs().max() / before.abs().max()) < bound


def test_nothing_is_inserted_where_the_example_cannot_calibrate() -> None:
    model = mlp()
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(GoodfitError, match="cannot calibrate on what Sequential makes of the example: NaN, inf"):
        BatchNorm(calibrate="identity").build(model, torch.full((4, 6), torch.inf, dtype=torch.float64))
    assert before == [n for n, _ in model.named_modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_gamma_and_beta_start_where_they_are_told() -> None:
    norm = BatchNorm(gamma=0.5, beta=-2.0).build(mlp(), ROWS.double())[0].batchnorm
    assert norm.weight.tolist() == [0.5] * 8
    assert norm.bias.tolist() == [-2.0] * 8
    assert gf.parse(repr(BatchNorm(gamma=0.5, calibrate="", zero_residual=True)))[0] == BatchNorm(gamma=0.5, zero_residual=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": "idenity"}, "calibrate must be 'identity' or '', got calibrate='idenity'; did you mean identity?"),
        ({"calibrate": 1}, "must be 'identity' or '', got calibrate=1"),
        ({"calibrate": "identity", "zero_residual": True}, "cannot keep the function of a model"),
        ({"calibrate": "identity", "gamma": 2.0}, "cannot keep the function of a model"),
        ({"calibrate": "identity", "track_running_stats": False}, "cannot keep the function of a model"),
        ({"calibrate": "identity", "affine": False}, "affine=False leaves them out"),
        ({"beta": 1.0, "affine": False}, "affine=False leaves them out"),
        ({"zero_residual": 1}, "must be True or False"),
    ],
)
def test_starts_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GoodfitError, match=message):
        BatchNorm(**options)


def test_zero_residual_makes_each_block_the_identity() -> None:
    model, x = residual().double(), IMAGES.double()
    BatchNorm(zero_residual=True).build(model, x)
    inserted = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n: float(w.detach().max()) for n, w in inserted.items()} == {
        "0.batchnorm": 1,
        "2.a.batchnorm": 1,
        "2.b.batchnorm": 0,
    }
    h = torch.randn(5, 4, 8, 8)
    for mode in (True, False):
        assert torch.equal(model[2].train(mode)(h), h)
    model.train()(x).square().sum().backward()
    assert bool(model[2].b.batchnorm.weight.grad.any())


def test_zero_residual_leaves_branches_that_end_in_a_norm_and_says_where_there_are_none() -> None:
    model = residual(nn.BatchNorm2d(4))
    with pytest.raises(GoodfitError, match="found no residual branch in Sequential that ends in a layer"):
        BatchNorm(zero_residual=True).build(model, IMAGES.double())
    assert not any("batchnorm" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("expand", [True, False])
def test_the_gate_of_squeeze_excite_keeps_its_scale(expand: bool) -> None:
    model = BatchNorm().build(Squeeze(expand), IMAGES.double())
    assert [n for n, _ in model.named_modules() if "batchnorm" in n] == ["conv.batchnorm"]


def test_a_redundant_bias_rests_at_its_value_and_weights_load_both_ways() -> None:
    x = ROWS.double()
    old, new = mlp().eval(), mlp().eval()
    BatchNorm(calibrate="identity").build(new, x)
    assert [n for n, p in new.named_parameters() if not p.requires_grad] == ["0.bias", "2.bias"]
    odd = new.load_state_dict(old.state_dict(), strict=False)
    assert odd.unexpected_keys == []
    assert all(".batchnorm." in name for name in odd.missing_keys)
    kept = copy.deepcopy(old)
    trained = mlp()
    BatchNorm(calibrate="identity").build(trained, x)
    kept.load_state_dict({n: t for n, t in trained.state_dict().items() if "batchnorm" not in n})
    torch.testing.assert_close(kept(x), trained.eval()(x), rtol=1e-12, atol=1e-12)


def test_the_resting_bias_had_no_gradient_and_is_moved_by_nothing() -> None:
    model, x = BatchNorm().build(mlp(), ROWS.double()), ROWS.double()
    model[0].bias.requires_grad_(True)
    model.train()(x).square().sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.zeros(8), rtol=0, atol=1e-12)
    model = mlp()
    run = Run("BatchNorm(), L2(0.1, where=everything)", model, example=x, task="numbers")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    before, moving = model[0].bias.clone(), model[4].bias.clone()
    run.loss(x, x[:, :1]).backward()
    run.gradient(optimizer)
    optimizer.step()
    run.step(optimizer)
    assert torch.equal(before, model[0].bias)
    assert not torch.equal(moving, model[4].bias)


def test_a_bias_that_another_layer_has_too_goes_on_training() -> None:
    model = mlp()
    model[2].bias = model[0].bias
    assert BatchNorm().build(model, ROWS.double())[0].bias.requires_grad


ENDED = {
    "folded": lambda m: gf.fold_batchnorm(m, ROWS.double()),
    "frozen": gf.freeze_batchnorm,
    "group norm": lambda m: gf.convert_batchnorm(m, "group", [ROWS.double()]),
}
GOING_ON = {
    "synchronized": lambda m: gf.convert_batchnorm(m, "sync"),
    "ghost": lambda m: gf.convert_batchnorm(m, "ghost"),
    "statistics alone frozen": lambda m: gf.freeze_batchnorm(m, affine=False),
}


@pytest.mark.parametrize("passed", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("how", [*ENDED, *GOING_ON])
def test_a_bias_trains_again_when_no_norm_makes_it_redundant(how: str, passed: Any) -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)  # by its owner
    model = passed(BatchNorm().build(model, ROWS.double()))
    (ENDED | GOING_ON)[how](model)
    assert [model[0].bias.requires_grad, model[2].bias.requires_grad] == [how in ENDED, False]


def test_a_bias_that_woke_rests_again_behind_a_thawed_norm_and_stays_with_its_weight() -> None:
    model = BatchNorm().build(mlp(), ROWS.double())
    gf.freeze_batchnorm(model, where=gf.where.named("0.batchnorm"))
    assert [model[0].bias.requires_grad, model[2].bias.requires_grad] == [True, False]
    gf.thaw_batchnorm(model)
    assert [model[0].bias.requires_grad, model[2].bias.requires_grad] == [False, False]
    model[0].requires_grad_(False)
    gf.freeze_batchnorm(model)
    assert [model[0].bias.requires_grad, model[2].bias.requires_grad] == [False, True]
    bare = BatchNorm(affine=False).build(mlp(), ROWS.double())
    gf.freeze_batchnorm(bare, affine=False)
    assert bare[0].bias.requires_grad  # no β shifts in its stead


def test_a_fold_that_fails_leaves_the_bias_at_rest() -> None:
    model = BatchNorm().build(mlp(), ROWS.double())
    model[0].batchnorm.register_forward_hook(lambda *_: None)
    model[2].batchnorm.register_forward_hook(lambda *_: None)
    with pytest.raises(GoodfitError, match="can fold no batch norm"):
        gf.fold_batchnorm(model, ROWS.double())
    assert [model[0].bias.requires_grad, model[2].bias.requires_grad] == [False, False]


def test_a_norm_that_was_put_in_before_stays_and_other_numbers_are_told() -> None:
    model = BatchNorm().build(mlp(), ROWS.double())
    BatchNorm().build(model, ROWS.double())
    with pytest.warns(gf.GoodfitWarning, match=r"as they are, with momentum=0\.1 and not 0\.5: set it there, or build a fresh"):
        BatchNorm(momentum=0.5).build(model, ROWS.double())
    with pytest.warns(gf.GoodfitWarning, match="with affine=True and not False"):
        BatchNorm(affine=False).build(model, ROWS.double())
    assert model[0].batchnorm.momentum == 0.1
    gf.convert_batchnorm(model, "group", [ROWS.double()])
    assert BatchNorm(momentum=0.5).build(model, ROWS.double()) is model


def test_one_row_calibrates_no_variance() -> None:
    model = mlp()
    with pytest.raises(GoodfitError, match="one value per channel in Sequential: the example must have several rows"):
        BatchNorm(calibrate="identity").build(model, ROWS[:1].double())
    assert not any("batchnorm" in n for n, _ in model.named_modules())
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()
    BatchNorm(calibrate="identity").build(images, IMAGES[:1].double())
    assert bool(images[0].batchnorm.running_var.all())


def test_an_example_of_keywords_calibrates_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
            return self.net(features) * scale

    model, x = Named().eval(), {"features": ROWS.double()}
    before = call_model(model, x)
    BatchNorm(calibrate="identity").build(model, x)
    torch.testing.assert_close(call_model(model, x), before, rtol=1e-12, atol=1e-12)
