"""What acts on losses and gradients: by hand, against torch, and in the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import goodfit as gf
from goodfit.errors import GoodfitError
from goodfit.noise import Noise

HERE = Noise(0, "here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = draw(12, 5), draw(12, seed=1)


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), *([nn.BatchNorm1d(7)] if norm else []), nn.Tanh(), nn.Linear(7, 1)).double()


def trained(
    cocktail: str, *, steps: int = 3, how: str = "calls", model: nn.Module | None = None, lr: float = 0.1
) -> tuple[nn.Module, gf.Run]:
    model = net() if model is None else model
    run = gf.Run(cocktail, model, task="numbers", example=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if how != "calls":
        run.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X)[:, 0], Y)
        loss.backward()
        return loss

    for _ in range(steps):
        if how == "closure":
            optimizer.step(closure)
            continue
        x, y = run.batch(X, Y)
        optimizer.zero_grad()
        run.loss(x, y).backward()
        if how == "calls":
            run.gradient(optimizer)
        optimizer.step()
        if how == "calls":
            run.step(optimizer)
    return model, run


def by_hand(gradient: Callable[[nn.Module], dict[str, Tensor]], steps: int = 3, model: nn.Module | None = None) -> nn.Module:
    model = net() if model is None else model
    for _ in range(steps):
        for name, g in gradient(model).items():
            dict(model.named_parameters())[name].data.sub_(0.1 * g)
    return model


def grads(model: nn.Module, x: Tensor = X, extra: Callable[[nn.Module], Any] = lambda m: 0.0) -> dict[str, Tensor]:
    loss = F.mse_loss(model(x)[:, 0], Y) + extra(model)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def close(one: nn.Module, other: nn.Module, atol: float = 1e-12) -> None:
    for name, t in one.state_dict().items():
        torch.testing.assert_close(t, other.state_dict()[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("norm", [0.05, 0.5, 50.0])
def test_clip_norm_is_that_of_torch(norm: float) -> None:
    weights = [nn.Parameter(draw(3, 4)), nn.Parameter(draw(4, seed=5))]
    for p in weights:
        p.grad = draw(*p.shape, seed=p.ndim)
    before = {str(i): p.grad.clone() for i, p in enumerate(weights)}
    mine, _ = gf.ClipNorm(norm).gradient(before, {}, {}, None, HERE)
    torch.nn.utils.clip_grad_norm_(weights, norm)
    for i, p in enumerate(weights):
        torch.testing.assert_close(mine[str(i)], p.grad, rtol=1e-4, atol=0)  # torch adds 1e-6 to the length
    length = math.sqrt(sum(float(g.square().sum()) for g in mine.values()))
    assert length == pytest.approx(min(norm, math.sqrt(sum(float(g.square().sum()) for g in before.values()))), rel=1e-14)


def test_clip_value_is_that_of_torch_to_the_bit() -> None:
    p = nn.Parameter(torch.zeros(50, dtype=torch.float32))
    p.grad = draw(50).float()
    mine, _ = gf.ClipValue(0.3).gradient({"w": p.grad.clone()}, {}, {}, None, HERE)
    torch.nn.utils.clip_grad_value_([p], 0.3)
    assert torch.equal(mine["w"], p.grad)


def test_a_zero_gradient_stays_zero_and_a_long_one_does_not_overflow() -> None:
    clipped, _ = gf.ClipNorm(1.0).gradient({"w": torch.zeros(3)}, {}, {}, None, HERE)
    assert torch.equal(clipped["w"], torch.zeros(3))
    long, _ = gf.ClipNorm(1.0).gradient({"w": torch.full((4,), 1e30)}, {}, {}, None, HERE)
    torch.testing.assert_close(long["w"], torch.full((4,), 0.5))


def test_gradient_noise_has_the_variance_that_it_says_and_fades() -> None:
    for step, variance in ((0, 0.04), (99, 0.04 / 100**0.55)):
        noise = Noise(7, "0.GradientNoise", step)
        noisy, _ = gf.GradientNoise(0.04).gradient({"a": torch.zeros(200_000), "b": torch.zeros(200_000)}, {}, {}, None, noise)
        for g in noisy.values():
            assert float(g.var()) == pytest.approx(variance, rel=0.02)
            assert abs(float(g.mean())) < 5 * math.sqrt(variance / 200_000)
        assert abs(float(torch.corrcoef(torch.stack(list(noisy.values())))[0, 1])) < 0.02


def test_gradient_noise_is_of_the_run_and_not_of_torchs_generator() -> None:
    torch.manual_seed(1)
    one, _ = trained("GradientNoise(0.1)")
    torch.manual_seed(2)
    other, _ = trained("GradientNoise(0.1)")
    close(one, other, 0.0)


@pytest.mark.parametrize("how", ["calls", "hooks", "closure"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_steps_by_the_gradient_uphill(how: str, adaptive: bool) -> None:
    def gradient(model: nn.Module) -> dict[str, Tensor]:
        first, up = grads(model), copy.deepcopy(model)
        size = {n: p.detach().abs() if adaptive else torch.ones_like(p) for n, p in model.named_parameters()}
        length = math.sqrt(sum(float((size[n] * g).square().sum()) for n, g in first.items()))
        for n, p in up.named_parameters():
            p.data.add_(0.3 * size[n] ** 2 * first[n] / length)
        return grads(up)

    close(trained(f"SAM(0.3, adaptive={adaptive})", how=how)[0], by_hand(gradient))


def test_sams_gradient_is_that_of_loss_and_penalty() -> None:
    def l2(model: nn.Module) -> Tensor:
        return 0.05 / 2 * (model[0].weight.square().sum() + model[2].weight.square().sum())

    def gradient(model: nn.Module) -> dict[str, Tensor]:
        first, up = grads(model, extra=l2), copy.deepcopy(model)
        length = math.sqrt(sum(float(g.square().sum()) for g in first.values()))
        for n, p in up.named_parameters():
            p.data.add_(0.2 * first[n] / length)
        return grads(up, extra=l2)

    close(trained("L2(0.05), SAM(0.2)")[0], by_hand(gradient))


@pytest.mark.parametrize("one", ["SAM(0.2)", "FGSM(0.1)"])
def test_the_second_gradient_leaves_statistics_and_the_generator_of_masks_alone(one: str) -> None:
    seen = []
    for cocktail in (f"Dropout(0.5), {one}", "Dropout(0.5)"):
        model, run = trained(cocktail, steps=1, model=net(norm=True), lr=0.0)
        x, y = run.batch(X, Y)
        run.loss(x, y)
        seen.append((model[1].running_mean.clone(), int(model[1].num_batches_tracked), model(X).detach()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] == 2
    assert torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("how", ["calls", "hooks"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_fgsm_trains_on_inputs_moved_against_the_model(how: str, share: float) -> None:
    def gradient(model: nn.Module) -> dict[str, Tensor]:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.mse_loss(model(x)[:, 0], Y), x)
        clean, moved = grads(model), grads(model, X + 0.1 * slope.sign())
        return {n: (1 - share) * clean[n] + share * moved[n] for n in clean}

    close(trained(f"FGSM(0.1, share={share})", how=how)[0], by_hand(gradient))
    assert X.grad is None
    assert not X.requires_grad


def test_fgsm_needs_the_batch_that_a_closure_hides_and_inputs_of_floating_point() -> None:
    with pytest.raises(GoodfitError, match=r"FGSM needs a second gradient, which takes one run.loss\(x, y\) per step"):
        trained("FGSM(0.1)", how="closure")
    words = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 1))
    run = gf.Run("FGSM(0.1)", words, task="numbers")
    with pytest.raises(GoodfitError, match="Inputs must hold numbers of floating point"):
        run.loss(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2))


@pytest.mark.parametrize(
    ("cocktail", "line"),
    [
        ("ClipNorm(1.0), SAM(0.1)", "SAM asks for a second gradient, so what ClipNorm does .* write SAM before it"),
        ("FGSM(0.1), GradientNoise(0.1), SAM(0.1)", "what GradientNoise does"),
        ("SAM(0.1), FGSM(0.1)", "lost; leave one of them out"),
    ],
)
def test_what_a_second_gradient_would_lose_is_refused(cocktail: str, line: str) -> None:
    with pytest.raises(GoodfitError, match=line):
        gf.Run(cocktail, net(), task="numbers")


def test_clipping_behind_sam_clips_the_second_gradient() -> None:
    model, before = net(), net()
    trained("SAM(0.1), ClipNorm(0.01)", steps=1, model=model)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-12)


def test_flooding_climbs_below_its_level() -> None:
    start = F.mse_loss(net()(X)[:, 0], Y).detach()

    def gradient(model: nn.Module) -> dict[str, Tensor]:
        return {n: -g for n, g in grads(model).items()}

    close(trained(f"Flooding({float(start) + 0.5})", steps=1)[0], by_hand(gradient, steps=1))
    close(trained(f"Flooding({float(start) / 9})", steps=1)[0], by_hand(grads, steps=1))


def test_the_confidence_penalty_is_the_entropy() -> None:
    outputs, y = draw(6, 4).requires_grad_(), torch.arange(6) % 4
    loss = F.cross_entropy(outputs, y)
    entropy = torch.distributions.Categorical(logits=outputs).entropy().mean()
    torch.testing.assert_close(gf.ConfidencePenalty(0.7).loss(loss, outputs, y), loss - 0.7 * entropy)
    maps = draw(2, 3, 5)
    each = torch.distributions.Categorical(logits=maps.movedim(1, -1)).entropy().mean()
    torch.testing.assert_close(gf.ConfidencePenalty(0.7).loss(loss, maps, y), loss - 0.7 * each)


@pytest.mark.parametrize("outputs", [torch.zeros(4), torch.zeros(4, 1), {"a": 1}])
def test_the_confidence_penalty_refuses_what_is_no_score_of_classes(outputs: Any) -> None:
    with pytest.raises(GoodfitError, match="ConfidencePenalty needs scores of classes"):
        gf.ConfidencePenalty(0.1).loss(torch.tensor(1.0), outputs, torch.zeros(4))


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 2, 3, 3)])
def test_orthogonal_pulls_a_kernel_to_orthonormal_rows(shape: tuple[int, ...]) -> None:
    w = {"w": draw(*shape) / 3}
    for _ in range(2000):
        w = {"w": w["w"] - gf.Orthogonal(0.05).slope(w, {})["w"]}
    m = w["w"].flatten(1)
    product = m @ m.T if len(m) <= m.shape[1] else m.T @ m
    torch.testing.assert_close(product, torch.eye(len(product), dtype=torch.float64))
    assert float(gf.Orthogonal(0.05).penalty(w, {})) < 1e-20


def test_orthogonal_refuses_a_model_without_a_matrix_where_it_looks() -> None:
    with pytest.raises(GoodfitError, match="Orthogonal needs weights of two axes or more, and where=biases picks none"):
        gf.Run("Orthogonal(0.1, where=biases)", net(), task="numbers")


def test_fgsm_moves_along_the_gradient_of_this_step_alone() -> None:
    def trained_on(x: Tensor, fresh: bool) -> nn.Module:
        model = net()
        run = gf.Run("FGSM(0.1)", model, task="numbers")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            run.loss(x.clone() if fresh else x, Y).backward()
            optimizer.step()
        return model

    close(trained_on(X.clone().requires_grad_(), False), trained_on(X, True), 0.0)


def test_the_second_gradient_has_the_precision_of_the_first() -> None:
    seen: list[torch.dtype] = []
    model = net().float()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run = gf.Run("SAM(0.05)", model, task="numbers", example=X.float())
    seen.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run.loss(X.float(), Y.float())
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16] * 2


def test_a_step_that_was_not_taken_is_forgotten() -> None:
    model = net()
    run = gf.Run("SAM(0.05)", model, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for taken in (False, True, False, False, True):
        optimizer.zero_grad()
        run.loss(X, Y).backward()
        if taken:
            optimizer.step()
    close(model, trained("SAM(0.05)", steps=2)[0], 0.0)


def test_inputs_with_a_graph_of_their_own_are_refused_where_it_would_run_twice() -> None:
    encoder, model = nn.Linear(5, 5).double(), net()
    run = gf.Run("SAM(0.1)", model, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    run.loss(encoder(X), Y).backward()
    with pytest.raises(GoodfitError, match="x carries a graph of its own"):
        optimizer.step()


def test_fit_refuses_a_second_gradient_of_several_batches() -> None:
    data = (X.float(), Y.float())
    with pytest.raises(GoodfitError, match=r"SAM\(0.1\) takes the gradient of one batch twice, got accumulate=2"):
        gf.fit(net().float(), data, data, "SAM(0.1)", compute=gf.Compute(accumulate=2), progress=False)


def test_orthogonal_means_the_outputs_of_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(8, 2, 3).double()
    model = nn.Sequential(layer, nn.Flatten())
    run = gf.Run("Orthogonal(1.0)", model)
    m = layer.weight.detach().transpose(0, 1).flatten(1)
    assert run.penalty() == pytest.approx(float((m @ m.T - torch.eye(2)).square().sum()), rel=1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.attach(optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        (model(torch.zeros(1, 8, 4, 4, dtype=torch.float64)) * 0).sum().backward()
        optimizer.step()
    assert run.penalty() < 1e-12


@pytest.mark.parametrize("y", [torch.tensor([0, -100, 1] * 4), torch.tensor([0, 5, 1] * 4)])
def test_classes_that_have_no_probability_are_one_line(y: Tensor) -> None:
    model = nn.Linear(5, 3).float()
    with pytest.raises(GoodfitError, match=r"MixUp makes probabilities of classes, which must lie in 0 to 2"):
        gf.fit(model, (X.float(), y), (X.float(), y.clamp(0, 2)), "MixUp(0.2)", progress=False, epochs=1)


def test_class_weights_beside_probabilities_are_told() -> None:
    y, weighted = torch.arange(12) % 3, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0], dtype=torch.float32))
    options: dict[str, Any] = {"progress": False, "epochs": 1, "loss": weighted}
    with pytest.warns(gf.GoodfitWarning, match="MixUp makes probabilities of classes, for which torch divides"):
        gf.fit(nn.Linear(5, 3).float(), (X.float(), y), (X.float(), y), "MixUp(0.2)", **options)
    torch.manual_seed(0)
    first = nn.Linear(5, 3).float()
    losses = []
    for mix in ("L2(0.0)", "InputNoise(1e-9)", "CutOut(1e-9)"):
        found = gf.fit(copy.deepcopy(first), (X.float(), y), (X.float(), y), mix, **options)
        losses.append(found.history[0]["train_loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


@pytest.mark.parametrize("one", ["SAM(1e-9)", "FGSM(1e-9)"])
@pytest.mark.parametrize("apart", [False, True])
def test_two_losses_of_one_step_are_refused_and_one_that_is_only_looked_at_is_not(one: str, apart: bool) -> None:
    model = net()
    run = gf.Run(one, model, task="numbers")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    first = run.loss(X[:6], Y[:6])
    with torch.no_grad():
        run.loss(X[6:], Y[6:])
    second = run.loss(X[6:], Y[6:])
    first.backward()
    if not apart:
        (second * 1).backward()
        with pytest.raises(GoodfitError, match="seen: 2"):
            run.gradient(optimizer)
        return
    run.gradient(optimizer)
    expected = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(F.mse_loss(model(X[:6])[:, 0], Y[:6]), list(model.parameters())),
            strict=True,
        )
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-8)
