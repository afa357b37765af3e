"""Linear models: the closed-form λ_max, and the path downward from it, each λ solved to convergence on all rows at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD

from goodfit.errors import GoodfitWarning
from goodfit.paths.problem import Problem, tensors
from goodfit.phases import Batch, Build, Gradient, Loss
from goodfit.run import Run
from goodfit.surgery.trace import call_model

__all__ = ["Descent", "is_linear"]

Weights = dict[str, Tensor]
PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten)
MOST = 20_000


def is_linear(problem: Problem) -> bool:
    """Whether a path of this model is a convex problem: one layer with weights, nothing nonlinear, nothing random.

    The types of the modules must say so, and then a test: a function in `forward` has no module.
    """
    model, x = problem.fresh().eval(), problem.example
    if not isinstance(x, Tensor) or any(isinstance(r, Build | Batch | Loss | Gradient) for r in (*problem.cocktail, problem.over)):
        return False
    leaves = [m for m in model.modules() if not list(m.children())]
    layers = [m for m in leaves if isinstance(m, nn.Linear | _ConvNd)]
    owned = {id(p) for layer in layers for p in layer.parameters()}
    if len(layers) != 1 or owned != {id(p) for p in model.parameters()}:
        return False
    return all(m in layers or isinstance(m, PASSIVE) for m in leaves) and _affine(model, x)


def _affine(model: nn.Module, x: Tensor) -> bool:
    """Whether the outputs at the sum of two weights are the sum of the outputs."""
    draw = torch.Generator().manual_seed(0)
    one, other = (
        {n: torch.randn(p.shape, generator=draw).to(p) for n, p in model.named_parameters()} for _ in range(2)
    )
    both = {n: one[n] + other[n] for n in one}
    with torch.no_grad():
        parts = [functional_call(model, w, (x,)) for w in (one, other, both)]
    if not all(isinstance(p, Tensor) for p in parts):
        return False
    return torch.allclose(parts[0] + parts[1], parts[2], rtol=1e-3, atol=1e-3 * float(parts[2].abs().max()))


class Descent:
    """The reference loop on all rows at once: one optimizer step with its proximal step is a map, which is accelerated.

    SGD without momentum at the rate 1/L makes the map that of Beck and Teboulle 2009; their extrapolation goes between its
    steps, and starts anew where it points uphill (O'Donoghue and Candes 2015). L, the curvature of the loss, starts from
    power iteration, and grows where two gradients show a larger one.
    """

    def __init__(self, problem: Problem, x: Tensor, y: Tensor) -> None:
        self.problem, self.y = problem, y
        model = problem.fresh()
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.chosen = problem.penalised(model)
        self.shift = self._shift(model, x)
        self.x = x if self.shift is None else x - self.shift
        self.curvature, self.scale = self._curvature(model), 1.0
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
        return high

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
        self._step(run, SGD([p for p in run.model.parameters() if p.requires_grad], lr=1 / self.curvature))
        return not any(run.model.get_parameter(n).any() for n in self.chosen)

    def _step(self, run: Run, optimizer: SGD) -> list[Tensor]:
        """One step of the reference loop; the slopes of the loss before it."""
        optimizer.zero_grad()
        torch.autograd.backward(run.loss(*run.batch(self.x, self.y)))
        free = optimizer.param_groups[0]["params"]
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
        optimizer = SGD(free, lr=1 / self.curvature)
        eps = torch.finfo(free[0].dtype).eps
        enough, rounding = (share * self.scale for share in (max(1e-8, 8 * eps), 1e4 * eps))
        last, before, momentum = _copies(free), None, 1.0
        for _ in range(MOST):
            start = _copies(free)
            slopes = self._step(run, optimizer)
            if before is not None:
                gap = _size(_less(start, before[0]))
                bent = _size(_less(slopes, before[1])) / gap if gap * self.curvature > rounding else 0.0
                if bent > self.curvature * (1 + 1e-6):
                    self.curvature, momentum = bent, 1.0
                    optimizer.param_groups[0]["lr"] = 1 / bent
            before = start, slopes
            now = _copies(free)
            if max(float(d.abs().max()) for d in _less(now, start)) * self.curvature <= enough:
                return
            uphill = sum(float((a * b).sum()) for a, b in zip(_less(start, now), _less(now, last), strict=True)) > 0
            momentum, old = (1.0, 1.0) if uphill else ((1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum)
            with torch.no_grad():
                for p, n, moved in zip(free, now, _less(now, last), strict=True):
                    p.copy_(n + (old - 1) / momentum * moved)
            last = now
        with torch.no_grad():
            for p, n in zip(free, last, strict=True):
                p.copy_(n)
        warnings.warn(f"The linear model under {told} still moved after {MOST} steps; scale its inputs.", GoodfitWarning, 2)

    def _curvature(self, model: nn.Module) -> float:
        """The largest eigenvalue of the loss's Hessian where the model starts."""
        free = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(self.problem.measure(call_model(model, self.x), self.y), free, create_graph=True)
        draw = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p) for p in free]
        found = 0.0
        for _ in range(30):
            size = _size(v)
            v = list(torch.autograd.grad(slopes, free, [t / size for t in v], retain_graph=True))
            found = _size(v)
            if not found or not math.isfinite(found):
                return 1.0
        return found

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


def _copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _less(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _size(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in parts))
