"""What samples say: mean and variance, and for classes the entropy and the mutual information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goodfit.errors import GoodfitError

__all__ = ["Prediction", "of_classes", "of_numbers", "probabilities"]


@dataclass(frozen=True)
class Prediction:
    """What `gf.mc_predict` returns, for S samples of N rows.

    samples (S, N, ...): outputs, for classes probabilities, in single precision at least. mean and variance (N, ...) are those
    over samples, the variance unbiased (divided by S − 1). For classes, in nats: entropy of the mean, and mutual_information
    between prediction and masks, the entropy of the mean less the mean entropy; None for numbers. vectorised: whether samples
    were drawn side by side in one pass. on: the modules that dropped.
    """

    samples: Tensor
    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    vectorised: bool
    on: tuple[str, ...]

    def __str__(self) -> str:
        how = "side by side" if self.vectorised else "one after the other"
        spread = float(self.variance.mean().sqrt())
        return f"{len(self.samples)} samples {how} of outputs {tuple(self.mean.shape)}, standard deviation {spread:.3g}"


def of_numbers(samples: Tensor, vectorised: bool, on: tuple[str, ...]) -> Prediction:
    """A prediction from outputs as they are."""
    return Prediction(samples, samples.mean(0), samples.var(0), None, None, vectorised, on)


def of_classes(samples: Tensor, vectorised: bool, on: tuple[str, ...]) -> Prediction:
    """A prediction from probabilities: of classes along axis 2, or of the second of two classes where there is one column.

    >>> certain = of_classes(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), False, ())  # two samples that contradict each other
    >>> certain.entropy, certain.mutual_information
    (tensor([0.6931]), tensor([0.6931]))
    """
    mean = samples.mean(0)
    entropy = _entropy(mean[None])[0]
    shared = (entropy - _entropy(samples).mean(0)).clamp(min=0)  # below zero by rounding alone
    return Prediction(samples, mean, samples.var(0), entropy, shared, vectorised, on)


def probabilities(outputs: Tensor) -> Tensor:
    """Probabilities from scores: softmax along axis 1, sigmoid where there is one column or none."""
    rows, one = len(outputs), outputs.ndim == 1 or outputs.shape[1] == 1
    within = bool(((outputs >= 0) & (outputs <= 1)).all()) and outputs.numel() > 0
    if not one and within and bool(((outputs.sum(1) - 1).abs() < 1e-2).all()) and rows:
        raise GoodfitError(
            "mc_predict takes the softmax of the scores (logits) for task='classes', but the model returns probabilities "
            "already: give the model without its softmax, or task='numbers'."
        )
    return outputs.sigmoid() if one else outputs.softmax(1)


def _entropy(p: Tensor) -> Tensor:
    """Of samples (S, N, classes, ...) or (S, N), (S, N, 1, ...) for two classes."""
    if p.ndim == 2:
        return torch.special.entr(p) + torch.special.entr(1 - p)
    if p.shape[2] == 1:
        return (torch.special.entr(p) + torch.special.entr(1 - p)).squeeze(2)
    return torch.special.entr(p).sum(2)
