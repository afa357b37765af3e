"""Train a model at many strengths of one regularizer, each from the one before, and say which strength to take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from goodfit.errors import GoodfitError
from goodfit.fitting.data import batches_of, peek, to_device
from goodfit.fitting.loop import LossFunction
from goodfit.fitting.preparation import MakeOptimizer, averaged
from goodfit.losses import loss_of, task_of
from goodfit.paths.course import Course
from goodfit.paths.folds import finite_pair, folds_of, is_split
from goodfit.paths.grid import checked
from goodfit.paths.linear import is_linear
from goodfit.paths.problem import Problem, along, template
from goodfit.paths.result import Path
from goodfit.phases import Regularizer
from goodfit.progress import Progress
from goodfit.regularizers.sparsity import L1

__all__ = ["path"]


def path(
    build: Any,
    train: Any,
    valid: Any,
    over: type[Regularizer] | Regularizer = L1,
    *,
    cocktail: Any = (),
    loss: LossFunction | None = None,
    task: str | None = None,
    lams: Iterable[float] | None = None,
    count: int = 30,
    optimizer: MakeOptimizer | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Path:
    """Train what `build` makes at many strengths of the regularizer `over`, each with a warm start from the one before.

    Formula: J(w) = loss + cocktail + over(λ), on a grid of λ evenly spaced on the logarithmic scale. A linear model goes
        downward from the closed-form λ_max (the smallest λ at which zero is the optimum) to λ_max / 1000, each λ solved on
        all rows to convergence; with the squared error here λ is twice scikit-learn's alpha. A network goes from dense
        upward, `epochs` per λ, from a λ whose penalty is 1 % of the loss until all is zero; that λ is its λ_max.
    Shapes: build() → a new model; train: a pair (x, y) of tensors or arrays with the rows on axis 0, or without folds a
        Dataset or DataLoader. valid: the same, or a number of folds (stratified for classes), or a splitter of
        scikit-learn. With folds a score is the mean over them, and stderr of that mean; with one valid set over its rows.
    Ranges: lams positive, increasing (by default found as above); count >= 1, about how many λ; epochs >= 1, batch_size
        >= 1 and optimizer (a function from parameters to one) are for networks. The dense start takes 10 · epochs, at
        least 100, or ends by the patience of an EarlyStopping in the cocktail, else 20. At each λ the epoch with the
        lowest loss + penalty on held-out rows is kept, the start among them: rows of `valid`, or with folds a tenth of
        the training rows, so that folds score unseen rows. A number that makes no zeros goes through its range.
    Errors: a build that gives the same model twice; nan in the data; more folds than rows; lams that do not increase; an
        `over` without strength, or in the cocktail too; all of its weights frozen; a dense model that does not learn.
    Source: Friedman, Hastie and Tibshirani 2010, Regularization paths by coordinate descent; Lemhadri et al. 2021,
        LassoNet, for dense to sparse; Hastie et al. 2009, section 7.10, for the one standard error rule.

    >>> x = torch.eye(4).repeat(8, 1)
    >>> found = path(lambda: nn.Linear(4, 1), (x, x @ torch.tensor([[2.0], [0.0], [0.0], [-1.0]])), 4, count=3)
    >>> found.selected(found.best), round(found.lam_max, 4)
    ([0, 3], 0.875)
    """
    for name, number in (("count", count), ("epochs", epochs)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise GoodfitError(f"{name} must be an integer >= 1, got {name}={number!r}.")
    if not callable(build) or isinstance(build, nn.Module):
        raise GoodfitError(f"build must be a function that makes a new model, as in lambda: MyModel(), got {build!r:.60}.")
    train = finite_pair(train, "train")
    folds = folds_of(valid, train, seed) if is_split(valid) else None
    chosen = template(over)
    mix, stopping = along(cocktail, chosen)
    x, y = peek(batches_of(train, "train", batch_size, shuffle=False, seed=seed))
    kind = task if task is not None else "" if loss is not None else task_of(y)
    home = _home(device)
    x, y = to_device((x, y), home)
    measure = averaged(loss or loss_of(kind))
    problem = Problem(build, chosen, mix, stopping, measure, kind, optimizer, epochs, batch_size, seed, home, x, y)
    problem.check()
    wanted = None if lams is None else checked(lams, problem)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
        torch.manual_seed(seed)
        with Progress((len(folds or ()) + 1) * count, "path", progress) as bar:
            course = Course(problem, wanted, count, bar, is_linear(problem))
            return course.on_folds(train, folds) if folds else course.on_rows(train, finite_pair(valid, "valid"))


def _home(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError) as wrong:
        why = f"{str(wrong).splitlines()[0]:.80}"
        raise GoodfitError(f"device must be one that torch has here, got {device!r} ({why}); leave it out.") from None
