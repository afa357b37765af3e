"""Linear models: the closed-form λ_max, and the path downward from it, each λ solved to convergence on all rows at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD

from goodfit.errors import GoodfitWarning
from goodfit.paths.problem import Problem, tensors
from goodfit.phases import Batch, Build, Gradient, Loss
from goodfit.run import Run
from goodfit.surgery.running import call_model

__all__ = ["Descent", "is_linear"]

Weights = dict[str, Tensor]
PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten)
MOST = 10_000


def is_linear(problem: Problem) -> bool:
    """Whether a path of this model is a convex problem: one layer with weights, nothing nonlinear, nothing random.

    The types of the modules must say so, and then a test: a function in `forward` has no module.
    """
    model, x = problem.fresh().eval(), problem.example
    if not isinstance(x, Tensor) or any(
        isinstance(r, Build | Batch | Loss | Gradient) for r in (*problem.cocktail, problem.over)
    ):
        return False
    leaves = [m for m in model.modules() if not list(m.children())]
    layers = [m for m in leaves if isinstance(m, nn.Linear | _ConvNd)]
    owned = {id(p) for layer in layers for p in layer.parameters()}
    if len(layers) != 1 or owned != {id(p) for p in model.parameters()}:
        return False
    return all(m in layers or isinstance(m, PASSIVE) for m in leaves) and _affine(model, x)


def _affine(model: nn.Module, x: Tensor) -> bool:
    """Whether the outputs at the sum of two weights are the sum of the outputs, also where these are opposite."""
    draw = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(p.shape, generator=draw).to(p) for n, p in model.named_parameters()}
    others = {n: torch.randn(p.shape, generator=draw).to(p) for n, p in model.named_parameters()}
    return _adds(model, x, weights, others) and _adds(model, x, weights, {n: -w for n, w in weights.items()})


@torch.no_grad()
def _adds(model: nn.Module, x: Tensor, one: Weights, other: Weights) -> bool:
    parts = [functional_call(model, w, (x,)) for w in (one, other, {n: one[n] + other[n] for n in one})]
    if not all(isinstance(p, Tensor) for p in parts):
        return False
    return torch.allclose(parts[0] + parts[1], parts[2], rtol=1e-3, atol=1e-3 * float(parts[0].abs().max()))


class Descent:
    """The reference loop on all rows at once: one optimizer step with its proximal step is a map, which is accelerated.

    SGD without momentum at the rate 1/L makes the map that of Beck and Teboulle 2009; their extrapolation goes between its
    steps, and starts anew where it points uphill (O'Donoghue and Candes 2015). Each tensor has its own L, the curvature of
    the loss along it by power iteration, since a bias and the weights of small inputs differ by orders; `stretch` is the
    factor that bounds all of them together, which grows where two gradients show a larger one.
    """

    def __init__(self, problem: Problem, x: Tensor, y: Tensor) -> None:
        self.problem, self.y = problem, y
        model = problem.fresh()
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.chosen = problem.penalised(model)
        self.shift = self._shift(model, x)
        self.x = x if self.shift is None else x - self.shift
        self.scale, self.stretch = 1.0, 1.0
        self.curvature = self._curvatures(model)
        self.null, self.slopes = self._at_zero()
        self.scale = max((float(s.abs().max()) for s in self.slopes.values()), default=1.0) or 1.0

    def lam_max(self) -> float | None:
        """The smallest λ at which a proximal step from zero stays at zero; None where there is none."""
        if not self.problem.selects or not any(s.any() for s in self.slopes.values()):
            return None
        high = 1.0
        while not self._stays(high):
            high *= 2
            if high > 1e30:
                return None
        low = high / 2
        while low > 1e-30 and self._stays(low):
            high, low = low, low / 2
        while (middle := math.sqrt(low * high)) not in (low, high) and high / low > 1 + 1e-15:
            low, high = (low, middle) if self._stays(middle) else (middle, high)
        free = next(iter(self.slopes.values()))
        return high * (1 + 2 * _enough(free.dtype))  # the other weights are at their optimum only so far

    def downward(self, lams: list[float]) -> Iterator[Weights]:
        """The state at each λ, from the largest down, each from the one before."""
        state = self.null
        for turn, lam in enumerate(sorted(lams, reverse=True)):
            run = self.problem.run(lam, turn=turn)
            run.model.load_state_dict(state)
            self._settle(run, str(self.problem.at(lam)))
            state = tensors(run.model)
            yield self._back(run.model)

    def _stays(self, lam: float) -> bool:
        run = self.problem.run(lam)
        run.model.load_state_dict(self.null)
        self._step(run, self._optimizer(run.model))
        return not any(run.model.get_parameter(n).any() for n in self.chosen)

    def _optimizer(self, model: nn.Module) -> SGD:
        free = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return SGD([{"params": [p], "lr": 1 / (self.stretch * self.curvature[n])} for n, p in free.items()])

    def _step(self, run: Run, optimizer: SGD) -> list[Tensor]:
        """One step of the reference loop; the slopes of the loss before it."""
        optimizer.zero_grad()
        torch.autograd.backward(run.loss(*run.batch(self.x, self.y)))
        free = [p for group in optimizer.param_groups for p in group["params"]]
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in free]
        run.gradient(optimizer)
        optimizer.step()
        run.step(optimizer)
        return slopes

    def _at_zero(self) -> tuple[Weights, Weights]:
        """The state with all penalised weights at zero and the others at their optimum, and the slopes of the loss there."""
        run = self.problem.run(None)
        weights = {n: run.model.get_parameter(n) for n in self.chosen}
        with torch.no_grad():
            for w in weights.values():
                w.requires_grad_(False).zero_()
        if any(p.requires_grad for p in run.model.parameters()):
            self._settle(run, "the model at zero")
        for w in weights.values():
            w.requires_grad_(True)
        loss = self.problem.measure(call_model(run.model, self.x), self.y)
        slopes = torch.autograd.grad(loss, list(weights.values()))
        return tensors(run.model), dict(zip(weights, slopes, strict=True))

    def _settle(self, run: Run, told: str) -> None:
        """Go on until a step no longer moves the weights."""
        free = [p for p in run.model.parameters() if p.requires_grad]
        along = [self.curvature[n] for n, p in run.model.named_parameters() if p.requires_grad]
        optimizer = self._optimizer(run.model)
        eps = torch.finfo(free[0].dtype).eps
        enough, rounding = (share * self.scale for share in (_enough(free[0].dtype), 1e4 * eps))
        last, before, momentum = _copies(free), None, 1.0
        for _ in range(MOST):
            start = _copies(free)
            slopes = self._step(run, optimizer)
            if before is not None:
                gap, bent = _less(start, before[0]), _less(slopes, before[1])
                bend = _ratio(bent, gap, along)
                if (
                    bend > self.stretch * (1 + 1e-6)
                    and max(c * float(g.abs().max()) for c, g in zip(along, gap, strict=True)) > rounding
                ):
                    self.stretch, momentum = bend, 1.0
                    for c, group in zip(along, optimizer.param_groups, strict=True):
                        group["lr"] = 1 / (bend * c)
            before = start, slopes
            now = _copies(free)
            step = _less(now, start)
            if self.stretch * max(c * float(s.abs().max()) for c, s in zip(along, step, strict=True)) <= enough:
                return
            moved = _less(now, last)
            uphill = sum(c * float((s * m).sum()) for c, s, m in zip(along, step, moved, strict=True)) < 0
            momentum, old = (1.0, 1.0) if uphill else ((1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum)
            with torch.no_grad():
                for p, n, m in zip(free, now, moved, strict=True):
                    p.copy_(n + (old - 1) / momentum * m)
            last = now
        with torch.no_grad():
            for p, n in zip(free, last, strict=True):
                p.copy_(n)
        warnings.warn(f"The linear model under {told} still moved after {MOST} steps; scale its inputs.", GoodfitWarning, 2)

    def _curvatures(self, model: nn.Module) -> dict[str, float]:
        """The largest eigenvalue of the loss's Hessian along each tensor, where the model starts."""
        free = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = self.problem.measure(call_model(model, self.x), self.y)
        slopes = torch.autograd.grad(loss, list(free.values()), create_graph=True)
        self.scale = max(float(s.detach().abs().max()) for s in slopes) or 1.0
        draw = torch.Generator().manual_seed(0)
        return {n: _bend(s, p, draw) for (n, p), s in zip(free.items(), slopes, strict=True)}

    def _shift(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """The columns' means where a free bias can take them over: the same optimum, better conditioned."""
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        bias = {n for n, p in model.named_parameters() if p.requires_grad and n not in self.chosen and p.ndim == 1}
        return x.mean(0, keepdim=True) if layers and layers[0].bias is not None and bias else None

    def _back(self, model: nn.Module) -> Weights:
        """The state for the inputs as they came."""
        if self.shift is not None:
            layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
            with torch.no_grad():
                layer.bias.sub_(layer.weight @ self.shift.flatten())
        return tensors(model)


def _enough(dtype: torch.dtype) -> float:
    """How small a slope is nothing, beside those at zero weights."""
    return max(1e-6, 30 * torch.finfo(dtype).eps)


def _copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _less(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _ratio(bent: list[Tensor], gap: list[Tensor], along: list[float]) -> float:
    """How much more the slope has changed than the curvatures say."""
    above = sum(float(b.square().sum()) / c for b, c in zip(bent, along, strict=True))
    below = sum(float(g.square().sum()) * c for g, c in zip(gap, along, strict=True))
    return math.sqrt(above / below) if below > 0 else 0.0


def _bend(slope: Tensor, p: Tensor, draw: torch.Generator) -> float:
    """The largest eigenvalue of the Hessian along one tensor, by power iteration."""
    v, found = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p), 0.0
    for _ in range(30):
        (v,) = torch.autograd.grad(slope, p, v / v.norm(), retain_graph=True)
        found = float(v.norm())
        if not found or not math.isfinite(found):
            return 1.0
    return found
