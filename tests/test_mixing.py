"""Mixing, cutting, smoothing and noise on batches: numbers by hand, the papers' formulas, x and y that stay together."""

from __future__ import annotations

import math
import os
from collections import OrderedDict, namedtuple
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import goodfit as gf
from goodfit.hyper import lifted
from goodfit.losses import loss_of
from goodfit.noise import Noise
from goodfit.regularizers.distributions import beta, permutation

os.environ["KERAS_BACKEND"] = "torch"

HERE = Noise(3, "here")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
Y = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]
ALL = [gf.MixUp(0.4), gf.CutMix(1.0), gf.CutOut(1.0), gf.InputNoise(0.1)]
every = pytest.mark.parametrize("one", ALL, ids=lambda one: type(one).__name__)


def rows(count: int, *shape: int) -> Tensor:
    """An input whose numbers tell the row that they come from."""
    return torch.arange(float(count)).view(count, *[1] * len(shape)).expand(count, *shape).clone()


def shares(alpha: float, count: int = 4000) -> np.ndarray[Any, Any]:
    """Draws of lambda, one per seed."""
    return vmap(lambda seed: beta(alpha, replace(HERE, seed=seed)))(torch.arange(count)).numpy()


# What is drawn


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0, 20.0])
def test_the_share_is_drawn_from_the_beta_distribution(alpha: float) -> None:
    drawn = shares(alpha)
    low = drawn[drawn < 0.5]  # near 1 doubles are too coarse for small alphas; the distribution is symmetric
    assert abs(len(low) - 2000) < 4 * math.sqrt(1000)
    assert stats.kstest(low, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).pvalue > 0.01
    high = 1 - drawn[drawn > 0.5]
    assert alpha < 0.5 or stats.kstest(high, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).pvalue > 0.01
    assert not stats.kstest(low, lambda x: 2 * stats.beta.cdf(x, alpha * 1.25, alpha * 1.25)).pvalue > 0.01


def gamma_of_the_paper(alpha: float, u: list[float]) -> float:
    """Marsaglia and Tsang 2000, sections 4 and 6, from eight proposals and a boost."""
    d = alpha + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    for first, second, threshold in zip(u[:8], u[8:16], u[16:24], strict=True):
        z = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
        v = (1 + c * z) ** 3
        if v > 0 and math.log(1 - threshold) < z * z / 2 + d * (1 - v + math.log(v)):
            return d * v * (1 - u[24]) ** (1 / alpha)
    raise AssertionError("once in 10^10 times")


@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0])
def test_the_share_is_made_of_gamma_variates_as_the_paper_makes_them(alpha: float) -> None:
    for seed in range(150):
        first, second = (gamma_of_the_paper(alpha, u) for u in Noise(seed, "g").uniform(2, 25).tolist())
        assert float(beta(alpha, Noise(seed, "g"))) == pytest.approx(first / (first + second), rel=1e-10)


def test_a_share_of_proposals_that_all_fail_is_a_share() -> None:
    never = torch.zeros(2, 25)
    never[:, :8], never[:, 8:16] = 1 - 2**-24, 0.5  # z = −5.8 and log U = 0
    noise: Any = SimpleNamespace(uniform=lambda *shape: never)
    assert float(beta(0.05, noise)) == 0.5


def test_the_share_at_the_ends_of_alpha() -> None:
    assert (shares(0.0, 50) == 1).all()
    tiny, huge = shares(1e-5, 400), shares(1e12, 50)
    assert set(tiny.round(12)) == {0.0, 1.0}  # a coin
    assert 150 < tiny.sum() < 250
    assert np.abs(huge - 0.5).max() < 1e-5
    assert np.isfinite(shares(1e-308, 50)).all()
    assert np.isfinite(shares(1e308, 50)).all()


def test_a_share_that_is_lifted_is_the_one_of_the_loop() -> None:
    alphas = torch.tensor([0.0, 0.05, 0.7, 3.0])
    together = vmap(lambda a: beta(a, HERE))(alphas)
    torch.testing.assert_close(together, torch.stack([beta(float(a), HERE) for a in alphas]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 7, 4001])
def test_normal_numbers(count: int) -> None:
    drawn = HERE.normal(count, dtype=torch.float64)
    assert drawn.shape == (count,)
    assert count < 100 or stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert count < 100 or abs(np.corrcoef(drawn[:2000], drawn[2000:4000])[0, 1]) < 0.06


def test_orders_are_even_and_apart_from_the_share() -> None:
    orders = torch.stack([permutation(4, Noise(seed, "order")) for seed in range(2400)])
    assert stats.chisquare(torch.unique(orders, dim=0, return_counts=True)[1].numpy()).pvalue > 0.01
    assert len(torch.unique(orders, dim=0)) == 24
    drawn = [HERE.part(part).uniform(3) for part in ("share", "permutation", "cut", "patch")]
    assert len(torch.unique(torch.stack(drawn), dim=0)) == 4


# MixUp


def test_mixup_by_hand() -> None:
    x, y = gf.MixUp(0.4).batch(X, Y, HERE)
    share, order = float(beta(0.4, HERE.part("share"))), permutation(6, HERE.part("permutation")).tolist()
    for row, other in enumerate(order):
        for column in range(4):
            by_hand = share * float(X[row, column]) + (1 - share) * float(X[other, column])
            assert float(x[row, column]) == pytest.approx(by_hand, rel=1e-14)
        for label in range(3):
            by_hand = share * float(Y[row, label]) + (1 - share) * float(Y[other, label])
            assert float(y[row, label]) == pytest.approx(by_hand, rel=1e-14)
    assert 0 < share < 1
    assert sorted(order) == list(range(6)) != order


def test_mixup_is_that_of_keras_with_the_same_draws() -> None:
    import keras

    images = torch.rand(6, 5, 4, 3, dtype=torch.float32)
    x, y = gf.MixUp(0.4).batch(images, Y.float(), HERE)
    share, order = beta(0.4, HERE.part("share")).float(), permutation(6, HERE.part("permutation"))
    drawn = {"mix_weight": share.expand(6), "permutation_order": order}
    layer = keras.layers.MixUp(0.4)
    theirs = [layer.transform_images(images, drawn), layer.transform_labels(Y.float(), drawn)]
    for mine, other in zip((x, y), theirs, strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-6, atol=1e-7)


@given(st.integers(0, 10**9), st.floats(0, 50), st.integers(1, 9))
@settings(max_examples=50)
def test_a_linear_target_stays_one_under_mixup(seed: int, alpha: float, count: int) -> None:
    x, w = torch.randn(count, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mixed, y = gf.MixUp(alpha).batch(x, x @ w, Noise(seed, "m"))
    torch.testing.assert_close(y, mixed @ w, rtol=1e-13, atol=1e-13)
    mixed, y = gf.MixUp(alpha).batch(x, torch.stack([x @ w, -x @ w], 1), Noise(seed, "m"))
    torch.testing.assert_close(y[:, 1], -mixed @ w, rtol=1e-13, atol=1e-13)


def test_mixup_over_seeds_draws_rows_to_their_mean() -> None:
    drawn = torch.stack([gf.MixUp(1.0).batch(X, Y, Noise(seed, "m"))[0] for seed in range(1500)])
    torch.testing.assert_close(drawn.mean(0), (X + X.mean(0)) / 2, rtol=0, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_coarse_input_is_mixed_in_the_shares_of_its_target(dtype: torch.dtype) -> None:
    x = torch.eye(3, dtype=dtype)
    for seed in range(20):
        mixed, y = gf.MixUp(1.0).batch(x, torch.eye(3, dtype=torch.float64), Noise(seed, "m"))
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed, y.to(dtype), rtol=0, atol=1e-7)
        assert torch.equal(y.sum(1), torch.ones(3))


Pair = namedtuple("Pair", ["left", "right"])
NESTS: list[Any] = [
    {"a": X, "b": X[:, 0]},
    (X, X * 2),
    [X, {"c": X, "d": None}],
    Pair(X, (X, [X])),
    OrderedDict(z=X, a=X + 1),
]


@every
@pytest.mark.parametrize("x", NESTS, ids=lambda x: type(x).__name__)
def test_nested_inputs_keep_their_form(one: Any, x: Any) -> None:
    out, _ = one.batch(x, Y, HERE)
    same, leaves = torch.utils._pytree.tree_structure, torch.utils._pytree.tree_leaves
    form = (lambda tree: dict(tree)) if isinstance(x, dict) else (lambda tree: tree)
    assert same(form(out)) == same(form(x))
    for old, new in zip(leaves(x), leaves(out), strict=True):
        assert (old is None) == (new is None)
        assert old is None or (old.shape, old.dtype) == (new.shape, new.dtype)
        assert old is None or not torch.equal(old, new) or isinstance(one, gf.CutMix | gf.CutOut)


def test_all_tensors_of_an_input_are_mixed_alike() -> None:
    x, y = gf.MixUp(1.0).batch({"a": rows(6, 4), "b": (rows(6), rows(6, 2, 3, 3))}, rows(6), HERE)
    for mixed in (x["a"], x["b"][0][:, None], x["b"][1].flatten(1)):
        torch.testing.assert_close(mixed, y[:, None].expand_as(mixed), rtol=1e-14, atol=1e-14)
    assert not torch.equal(y, rows(6))


# CutMix


def box_of_the_paper(height: int, width: int, share: float, cy: int, cx: int) -> tuple[range, range]:
    """Yun et al. 2019, section 3.1: sides W·√(1 − λ) and H·√(1 − λ), the middle anywhere, cut off at the border."""
    h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    ys, xs = (cy - h // 2, cy - h // 2 + h), (cx - w // 2, cx - w // 2 + w)
    return range(max(ys[0], 0), min(ys[1], height)), range(max(xs[0], 0), min(xs[1], width))


@pytest.mark.parametrize("seed", range(12))
def test_cutmix_exchanges_the_box_of_the_paper(seed: int) -> None:
    noise, (height, width) = Noise(seed, "c"), (8, 11)
    x, y = gf.CutMix(1.0).batch(rows(5, 2, height, width), rows(5), noise)
    share = float(beta(1.0, noise.part("share")))
    cy, cx = (int(float(u) * size) for u, size in zip(noise.part("patch").uniform(2), (height, width), strict=True))
    ys, xs = box_of_the_paper(height, width, share, cy, cx)
    order = permutation(5, noise.part("permutation")).tolist()
    expected = rows(5, 2, height, width)
    for row, other in enumerate(order):
        for i in ys:
            for j in xs:
                expected[row, :, i, j] = other
    assert torch.equal(x, expected)
    kept = 1 - len(ys) * len(xs) / (height * width)
    torch.testing.assert_close(y, kept * rows(5) + (1 - kept) * torch.tensor(order).double(), rtol=1e-14, atol=1e-14)


@given(st.integers(0, 10**9), st.floats(0.05, 20), st.sampled_from([(2, 8, 8), (1, 5, 9), (1, 1, 1), (7,), (1,), ()]))
@settings(max_examples=80)
def test_targets_have_the_shares_that_were_exchanged(seed: int, alpha: float, shape: tuple[int, ...]) -> None:
    x, y = gf.CutMix(1.0, alpha=alpha).batch(rows(4, *shape), torch.eye(4), Noise(seed, "c"))
    counted = torch.stack([(x.reshape(4, -1) == row).double().mean(1) for row in range(4)], 1)
    torch.testing.assert_close(y, counted, rtol=1e-12, atol=1e-12)


def test_the_columns_of_several_tensors_are_one_table() -> None:
    seen = set()
    for seed in range(40):
        x, y = gf.CutMix(1.0).batch({"a": rows(4), "b": rows(4, 1), "c": rows(4, 2)}, torch.eye(4), Noise(seed, "c"))
        table = torch.cat([x["a"][:, None], x["b"], x["c"]], 1)
        assert torch.equal(y, torch.stack([(table == row).double().mean(1) for row in range(4)], 1))
        seen |= {tuple(row) for row in (table != rows(4, 4)).int().tolist()}
    assert len(seen) > 8  # subsets of four columns


def test_images_of_one_size_have_one_box() -> None:
    image, mask = gf.CutMix(1.0).batch((rows(5, 3, 6, 6), rows(5, 1, 6, 6)), rows(5), Noise(4, "c"))[0]
    assert torch.equal(image[:, :1], mask)
    assert 0 < (mask != rows(5, 1, 6, 6)).double().mean() < 1


def test_the_number_of_columns_is_even_over_the_shares() -> None:
    counts = torch.zeros(5)
    for seed in range(1600):
        noise = Noise(seed, "c")
        x, _ = gf.CutMix(1.0).batch(rows(2, 4), rows(2), noise)
        moved = permutation(2, noise.part("permutation")).tolist() == [1, 0]
        counts[int((x[0] == 1).sum())] += moved
    expected = torch.tensor([1, 2, 2, 2, 1]) / 8 * counts.sum()  # round(4u) with u ~ U(0, 1)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.01


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_p_is_the_share_of_batches_that_cutmix_cuts(p: float) -> None:
    changed = sum(not torch.equal(gf.CutMix(p, alpha=50.0).batch(X, Y, Noise(seed, "c"))[0], X) for seed in range(500))
    assert abs(changed - 500 * p) < 4 * math.sqrt(500 * p * (1 - p)) + 4  # a batch may meet its own order


# CutOut


@pytest.mark.parametrize(("ratio", "zeros"), [(0.0, 0), (0.2, 1), (0.25, 1), (0.5, 2), (0.6, 2), (0.65, 3), (1.0, 4)])
def test_cutout_zeroes_so_many_columns_of_each_row(ratio: float, zeros: int) -> None:
    targets = torch.zeros(50)
    x, y = gf.CutOut(1.0, ratio=ratio).batch(torch.ones(50, 4), targets, HERE)
    assert y is targets
    assert ((x == 0).sum(1) == zeros).all()
    assert zeros in (0, 4) or len(torch.unique(x, dim=0)) > 3  # each row by itself


def test_cutout_columns_are_chosen_evenly() -> None:
    x, _ = gf.CutOut(1.0, ratio=0.25).batch(torch.ones(4000, 4), torch.zeros(4000), HERE)
    assert stats.chisquare((x == 0).sum(0).numpy()).pvalue > 0.01


@pytest.mark.parametrize("shape", [(8,), (2, 6, 6)])
def test_p_is_the_share_of_rows_that_cutout_cuts(shape: tuple[int, ...]) -> None:
    x, _ = gf.CutOut(0.3, ratio=0.5).batch(torch.ones(2000, *shape), torch.zeros(2000), HERE)
    cut = float((x == 0).flatten(1).any(1).double().mean())
    assert abs(cut - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


def test_cutout_cuts_the_box_of_its_ratio_in_every_channel() -> None:
    noise = Noise(2, "o")
    x, _ = gf.CutOut(1.0, ratio=0.25).batch(torch.ones(200, 3, 8, 12), torch.zeros(200), noise)
    points = noise.part("patch").uniform(2, 200, 1)
    sizes = set()
    for row in range(200):
        expected = torch.ones(3, 8, 12)
        ys, xs = box_of_the_paper(8, 12, 0.75, int(points[0, row] * 8), int(points[1, row] * 12))
        expected[:, ys.start : ys.stop, xs.start : xs.stop] = 0
        assert torch.equal(x[row], expected)
        sizes.add(len(ys) * len(xs))
    assert max(sizes) == 4 * 6  # a quarter of the area, less at the border
    assert min(sizes) < 24


def test_cutout_and_noise_leave_whole_numbers_alone() -> None:
    x = {"tokens": torch.arange(6)[:, None], "mask": torch.ones(6, 2, dtype=torch.bool), "table": X}
    for one in (gf.CutOut(1.0, ratio=0.5), gf.InputNoise(0.3)):
        out, _ = one.batch(x, Y, HERE)
        assert out["tokens"] is x["tokens"]
        assert out["mask"] is x["mask"]
        assert not torch.equal(out["table"], X)


# LabelSmoothing


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_label_smoothing_is_that_of_torch(shape: tuple[int, ...], share: float) -> None:
    outputs, classes = torch.randn(shape), torch.randint(3, (6, *shape[2:]))
    hard = F.one_hot(classes, 3).movedim(-1, 1).double()
    x, y = gf.LabelSmoothing(share).batch(X, hard, HERE)
    assert x is X
    theirs = nn.CrossEntropyLoss(label_smoothing=share)(outputs, classes)
    torch.testing.assert_close(F.cross_entropy(outputs, y), theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.sum(1), torch.ones(6, *shape[2:]), rtol=1e-14, atol=1e-14)


def test_smoothing_before_and_behind_mixup_is_the_same() -> None:
    smooth, mix = gf.LabelSmoothing(0.3), gf.MixUp(1.0)
    before = mix.batch(*smooth.batch(X, Y, HERE), HERE)[1]
    torch.testing.assert_close(before, smooth.batch(*mix.batch(X, Y, HERE), HERE)[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "y",
    [torch.rand(6), torch.rand(6, 1), torch.randn(6, 3), torch.tensor([[1.5, -0.5]]), torch.tensor([[1.0, 1.0, 0.0]])],
    ids=["reals", "one column", "several reals", "negative", "two labels"],
)
def test_label_smoothing_refuses_what_is_no_probability(y: Tensor) -> None:
    with pytest.raises(gf.GoodfitError, match=r"LabelSmoothing needs probabilities.* got .*of shape .*; leave it out"):
        gf.LabelSmoothing(0.1).batch(X, y, HERE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_may_be_coarse(dtype: torch.dtype) -> None:
    y = torch.rand(50, 100).softmax(1).to(dtype)
    y = gf.MixUp(1.0).batch(torch.rand(50, 2), y, HERE)[1]
    assert gf.LabelSmoothing(0.1).batch(X, y, HERE)[1].dtype == dtype


def test_targets_of_many_members_are_smoothed_without_a_look_at_their_numbers() -> None:
    y = torch.stack([Y, Y.flip(0)])
    both = vmap(lambda one, share: lifted(gf.LabelSmoothing(), share=share).batch(X, one, HERE)[1])(y, torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(both[1], 0.6 * Y.flip(0) + 0.4 / 3, rtol=1e-14, atol=1e-14)


# InputNoise


def test_input_noise_has_its_standard_deviation() -> None:
    x, y = gf.InputNoise(0.3).batch((torch.full((400, 6), 2.0), torch.zeros(400, 6)), Y, Noise(1, "n"))
    assert y is Y
    for noisy, mean in zip(x, (2.0, 0.0), strict=True):
        assert stats.kstest((noisy.flatten().numpy() - mean) / 0.3, "norm").pvalue > 0.01
    assert abs(np.corrcoef(x[0].flatten(), x[1].flatten())[0, 1]) < 0.1


def test_noise_on_the_inputs_of_a_linear_model_is_the_penalty_of_bishop() -> None:
    w, y = torch.tensor([1.0, -2.0, 0.5, 0.3]), torch.randn(6)
    x = X.repeat(3000, 1)
    noisy, same = gf.InputNoise(0.2).batch(x, y.repeat(3000), HERE)
    excess = F.mse_loss(noisy @ w, same) - F.mse_loss(X @ w, y)
    assert float(excess) == pytest.approx(0.2**2 * float(w.square().sum()), rel=0.05)


# All of them


@every
def test_nothing_is_changed_in_place_and_draws_are_pure(one: Any) -> None:
    x, y = X.clone(), Y.clone()
    state = torch.get_rng_state()
    first, second = one.batch(x, y, HERE), one.batch(x, y, HERE)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    others = [replace(HERE, seed=8), replace(HERE, step=1), replace(HERE, call=1), replace(HERE, rank=1)]
    assert len({str(one.batch(rows(6, 4), y, noise)[0].tolist()) for noise in [HERE, *others]}) > 3


@every
@pytest.mark.parametrize("x", [X, X.view(6, 1, 2, 2)], ids=["table", "images"])
def test_a_member_of_a_stack_draws_as_it_would_alone(one: Any, x: Tensor) -> None:
    seeds = torch.tensor([5, 3, 9])
    together = vmap(lambda seed: one.batch(x, Y, replace(HERE, seed=seed)))(seeds)
    for i, seed in enumerate(seeds.tolist()):
        for a, b in zip(together, one.batch(x, Y, replace(HERE, seed=seed)), strict=True):
            torch.testing.assert_close(a[i] if a.ndim > b.ndim else a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("one", [gf.CutMix(0.7), gf.CutOut(0.7, ratio=0.5)], ids=str)
def test_images_are_cut_alike_for_numbers_that_are_lifted(one: Any) -> None:
    x, name = rows(6, 2, 5, 5) + 1, "alpha" if isinstance(one, gf.CutMix) else "ratio"
    numbers = torch.tensor([[0.0, 0.5], [0.7, 0.5], [1.0, 0.2]])
    both = vmap(lambda n: lifted(one, **{"p": n[0], name: n[1]}).batch(x, Y, HERE)[0])(numbers)
    for i, (p, other) in enumerate(numbers.tolist()):
        assert torch.equal(both[i], type(one)(p, **{name: other}).batch(x, Y, HERE)[0])
    assert torch.equal(both[0], x)


@every
@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row_are_batches(one: Any, count: int) -> None:
    x, y = one.batch(X[:count], Y[:count], HERE)
    assert x.shape == (count, 4)
    assert torch.equal(y, Y[:count])


TOKENS = {"tokens": torch.arange(6), "values": X}


@pytest.mark.parametrize(
    ("one", "x", "y", "message"),
    [
        (gf.MixUp(0.4), TOKENS, Y, r"MixUp mixes rows, .* got x\['tokens'\] of torch.int64; hand it over as one"),
        (gf.CutMix(0.4), TOKENS, Y, r"CutMix mixes rows, .* got x\['tokens'\] of torch.int64; hand it over as one"),
        (gf.MixUp(0.4), (X, X > 0), Y, r"got x\[1\] of torch.bool"),
        (gf.MixUp(0.4), {"a": X, "names": ["a"] * 6}, Y, r"got x\['names'\]\[0\] of str"),
        (gf.MixUp(0.4), torch.arange(6), Y, "MixUp acts on tensors of floating point, got x of torch.int64; leave it out"),
        (
            gf.InputNoise(0.4),
            (None, torch.arange(6)),
            Y,
            r"InputNoise acts on .* got x\[0\] of NoneType, x\[1\] of torch.int64;",
        ),
        (gf.CutOut(0.4), {}, Y, "CutOut acts on tensors of floating point, got an empty x; leave it out"),
        (
            gf.MixUp(0.4),
            (X, X.T),
            Y,
            r"MixUp needs the 6 rows of y on axis 0 .* got x\[1\] of shape \(4, 6\); put the batch first",
        ),
        (
            gf.CutOut(0.4),
            (X, torch.tensor(1.0)),
            Y,
            r"CutOut needs the 6 rows .* got x\[1\] of shape \(\); put the batch first",
        ),
        (
            gf.CutMix(0.4),
            X.view(6, 2, 2),
            Y,
            r"CutMix cuts tables \(rows, columns\) or images .* got x of shape \(6, 2, 2\); leave",
        ),
        (
            gf.CutOut(0.4),
            (X, X.view(6, 1, 2, 2)),
            Y,
            r"CutOut cuts .* got x\[0\] of shape \(6, 4\), x\[1\] of shape \(6, 1, 2, 2\)",
        ),
        (gf.CutMix(0.4), (X.view(6, 1, 2, 2), X.view(6, 1, 4, 1)), Y, "of one size, got"),
        (gf.CutMix(0.4), X, Y[..., None], r"CutMix mixes one target per row, .* got y of shape \(6, 3, 1\); leave it out"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(one: Any, x: Any, y: Tensor, message: str) -> None:
    with pytest.raises(gf.GoodfitError, match=message) as refused:
        one.batch(x, y, HERE)
    assert "\n" not in str(refused.value)


# In a training


def test_a_table_of_classes_trains_on_mixed_rows_and_is_scored_on_plain_ones() -> None:
    x, classes = torch.randn(90, 4), torch.arange(90) % 2  # of three classes that the model knows, two occur
    x[:, 0] += 2.5 * classes
    seen: list[Tensor] = []

    def spy(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return loss_of("classes")(outputs, y)

    data = (x[:60], classes[:60]), (x[60:], classes[60:])
    cocktail = "MixUp(0.4), LabelSmoothing(0.1), EarlyStopping(5)"

    def fitted(**more: Any) -> gf.Fit:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.02)  # noqa: E731
        return gf.fit(model, *data, cocktail, task="classes", epochs=12, batch_size=20, optimizer=optimizer, **more)

    found = fitted(loss=spy)
    in_training = torch.cat([y for y in seen if y.is_floating_point()])
    assert in_training.shape[1] == 3
    torch.testing.assert_close(in_training.sum(1), torch.ones(len(in_training)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_training[:, 2], torch.full((len(in_training),), 0.1 / 3))
    assert len(torch.unique(in_training[:, 0].round(decimals=6))) > 10  # every batch has a share of its own
    assert {y.dtype for y in seen} == {torch.float64, torch.int64}  # validation: as it came
    found.model.eval()
    with torch.no_grad():
        assert found.score == pytest.approx(F.cross_entropy(found.model(x[60:]), classes[60:]).item(), rel=1e-12)
        assert (found.model(x[60:]).argmax(1) == classes[60:]).double().mean() > 0.8
    again = fitted()
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), again.model.parameters(), strict=True))


def test_images_train_under_all_of_them() -> None:
    x, classes = torch.rand(64, 1, 8, 8), torch.arange(64) % 2
    x[:, 0, :, :4] += 1.5 * classes[:, None, None]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    cocktail = "CutMix(0.5), CutOut(0.5, ratio=0.25), InputNoise(0.1), LabelSmoothing(0.1), EarlyStopping(10)"
    found = gf.fit(model, (x[:48], classes[:48]), (x[48:], classes[48:]), cocktail, epochs=10, batch_size=16)
    with torch.no_grad():
        assert (found.model.eval()(x[48:]).argmax(1) == classes[48:]).double().mean() > 0.8


def test_a_run_in_a_loop_of_ones_own_mixes_each_micro_batch_by_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    run = gf.Run("MixUp(1.0)", model, task="numbers", seed=4)
    first, second = run.batch(X, Y[:, 0]), run.batch(X, Y[:, 0])
    assert not torch.equal(first[0], second[0])
    with pytest.raises(gf.GoodfitError, match=r"MixUp needs y as probabilities or reals, got torch.int64"):
        run.batch(X, torch.arange(6))


def test_regression_targets_are_refused_for_label_smoothing_before_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(gf.GoodfitError, match=r"LabelSmoothing needs probabilities \(rows, classes\), got y of shape \(4,\)"):
        gf.fit(model, (X[:4], X[:4, 0]), (X[4:], X[4:, 0]), "LabelSmoothing(0.1)", epochs=1)
