"""`gf.mc_predict`: predictions with dropout on, and how sure they are."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from goodfit.errors import GoodfitError
from goodfit.losses import loss_of
from goodfit.sampling.apart import rows_apart
from goodfit.sampling.dropping import mc_dropout
from goodfit.sampling.kept import buffers_kept
from goodfit.sampling.prediction import Prediction, of_classes, of_numbers, probabilities
from goodfit.sampling.rows import answer_of, call_with, inputs_of, repeated, rows_of, sliced
from goodfit.sampling.survey import Survey

__all__ = ["mc_predict"]

_LARGEST = 1 << 23  # bytes of one activation, of which three or four live at a time


def mc_predict(
    model: nn.Module, x: Any, samples: int = 50, *, seed: int = 0, task: str = "numbers", batch_size: int | None = None
) -> Prediction:
    """Predict one batch many times with dropout on: the mean, and how much the samples differ.

    Formula:  mean = Σ yₛ/S and variance = Σ (yₛ − mean)²/(S − 1) over samples yₛ = f(x; W ∘ maskₛ). For task="classes" yₛ are
              probabilities, H[p] = −Σ p log p in nats, entropy = H[mean] and mutual information = H[mean] − Σ H[yₛ]/S.
    Shapes:   x is one input batch as the model takes it (a tensor, a tuple of positions, a dict of keywords), with rows first,
              as many as you like: trials run on a few of them, and `batch_size` splits the passes;
              the model returns one tensor, or logits: for classes scores (N, classes, ...), softmax along axis 1, or (N,) and
              (N, 1, ...), sigmoid. Results are (N, ...), samples (S, N, ...).
    Numbers:  samples, at least 2. seed >= 0: equal seeds give equal numbers (for equal batch sizes). batch_size, the most rows
              of one pass; None takes as many as keep an activation within 8 MiB, and at least those of x.
    Errors:   GoodfitError as for `mc_dropout`, for several outputs, for scores that are probabilities already, and for a
              batch_size below the rows of x where these cannot be split. Model, buffers and generators stay as they were.
    Source:   Gal and Ghahramani 2016, Dropout as a Bayesian approximation, arXiv:1506.02142; mutual information: Houlsby et
              al. 2011, Bayesian active learning, arXiv:1112.5745.

    Samples are drawn side by side, the batch repeated in one pass, where trials show that rows do not act on each other, with
    dropout on and off, and that every mask is drawn per row; else one after the other. `result.vectorised` says which. The
    trials cost several passes over a few rows; within `with gf.mc_dropout(model):` they are made once for all batches.

    >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.ones_(model[1].weight)
    >>> result = mc_predict(model, torch.ones(1, 1), samples=4000)  # 0 or 2, each half of the time
    >>> round(float(result.mean), 1), round(float(result.variance), 1)
    (1.0, 1.0)
    """
    _check(x, samples, seed, task, batch_size)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        dropping = stack.enter_context(mc_dropout(model, x, seed=seed))
        stack.enter_context(buffers_kept(model))
        found = dropping.survey
        assert found is not None  # an example was given
        answer_of(found.still.output)
        inputs, rows = inputs_of(x), rows_of(x)
        limit = _limit(found, rows, batch_size)
        apart = rows > 0 and not rows <= limit < 2 * rows and rows_apart(model, found)
        if not apart and batch_size is not None and batch_size < rows:
            raise GoodfitError(
                f"mc_predict cannot split {rows} rows for batch_size={batch_size}, since rows of this model act on each other "
                "or share masks: give fewer rows, or no batch_size."
            )
        drawn = _side_by_side(model, inputs, samples, limit) if apart else _in_turn(model, inputs, samples)
        if task == "classes":
            return of_classes(torch.stack([probabilities(one) for one in drawn]), apart, dropping.on)
        return of_numbers(drawn, apart, dropping.on)


def _check(x: Any, samples: int, seed: int, task: str, batch_size: int | None) -> None:
    if x is None:
        raise GoodfitError("mc_predict.x must be one input batch as the model takes it, got None.")
    loss_of(task)  # refuses another
    for name, value, least in (("samples", samples, 2), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if name == "batch_size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GoodfitError(f"mc_predict.{name} must be an integer >= {least}, got {name}={value!r}.")


def _limit(found: Survey, rows: int, batch_size: int | None) -> int:
    """The most rows of one pass."""
    if batch_size is not None:
        return batch_size
    return max(rows, _LARGEST * rows_of(found.inputs) // max(found.moving.draws.largest, 1))


def _side_by_side(model: nn.Module, x: Any, samples: int, limit: int) -> Tensor:
    rows, pieces = rows_of(x), []
    for start in range(0, rows, limit):
        piece = sliced(x, start, start + limit)
        count, drawn = rows_of(piece), []
        copies = max(1, limit // count)
        for done in range(0, samples, copies):
            some = min(copies, samples - done)
            answer = answer_of(call_with(model, repeated(piece, some)))
            drawn.append(answer.view(some, count, *answer.shape[1:]))
        pieces.append(torch.cat(drawn))
    return torch.cat(pieces, 1)


def _in_turn(model: nn.Module, x: Any, samples: int) -> Tensor:
    return torch.stack([answer_of(call_with(model, x)) for _ in range(samples)])
