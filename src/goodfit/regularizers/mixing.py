"""Rows mixed with rows, and their targets with their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goodfit.errors import GoodfitError
from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Batch
from goodfit.regularizers.distributions import beta, blended, number, permutation
from goodfit.regularizers.leaves import only_floats, refuse_other_rows, replaced
from goodfit.regularizers.patches import patches

__all__ = ["CutMix", "MixUp"]


@dataclass(frozen=True)
class MixUp(Batch):
    """Mixup: the model trains on lines between two rows, and on the same lines between their targets.

    Formula: x ← share · x + (1 − share) · x', y ← share · y + (1 − share) · y', where x', y' are the rows of the batch in a
        random order and share ~ Beta(alpha, alpha); one share and one order per batch, as in the paper.
    Phase: Batch. All tensors of x get the same order and share; y holds probabilities or reals (gf.fit makes the classes of y
        one-hot). Validation is never mixed.
    Numbers: alpha >= 0, off at 0: near 0 rows stay almost as they are, at 1 every share is as likely, beyond it halves are.
    Errors: alpha < 0; x with integers or booleans, such as tokens and masks; a tensor of x without the rows on axis 0.
    Source: Zhang et al. 2018, mixup: beyond empirical risk minimization, arXiv 1710.09412; the draw: Marsaglia and Tsang 2000,
        A simple method for generating gamma variables.

    >>> x, y = MixUp(0.4).batch(torch.eye(3), torch.eye(3), Noise(0, "mixup"))
    >>> torch.equal(x, y), y.sum(1)
    (True, tensor([1., 1., 1.]))
    """

    alpha: float = hyper(0.2, valid="[0, inf)", off=0.0, low=0.0, high=1.0)

    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        found = only_floats(x, "MixUp")
        refuse_other_rows(found, y, "MixUp")
        share, order = beta(self.alpha, noise.part("share")), permutation(len(y), noise.part("permutation"))
        return replaced(x, {name: blended(t, share, order) for name, t in found.items()}), blended(y, share, order)


@dataclass(frozen=True)
class CutMix(Batch):
    """CutMix: a part of each row comes from another row, and so much of its target.

    Formula: x ← x' within a patch, y ← kept · y + (1 − kept) · y', where x', y' are the rows of the batch in a random order and
        kept is the share of x that is outside the patch, counted after it is cut off at the border. share ~ Beta(alpha, alpha).
        Images (rows, channels, height, width): a box with sides √(1 − share) of the image's around a point anywhere. Tables
        (rows, columns): a random round((1 − share) · columns) of the columns. One patch and one order per batch, as in the
        paper, which has images alone, and as in the code of Kadra et al., which exchanges one column at least.
    Phase: Batch. In a dict or tuple the columns of all tensors are those of one table. The columns of a one-hot category are
        exchanged each by itself. y holds probabilities or reals; of maps of targets, (rows, classes, ...), there is no share.
    Numbers: p, the probability that a batch is cut, in [0, 1], off at 0. alpha > 0: at 1 every share is as likely.
    Errors: p outside [0, 1]; alpha <= 0; x with integers or booleans, neither table nor images, of images of several sizes, or
        without the rows on axis 0; y of more than two axes.
    Source: Yun et al. 2019, CutMix: regularization strategy to train strong classifiers, arXiv 1905.04899; on tables, with p to
        tune and alpha = 1: Kadra et al. 2021, Well-tuned simple nets excel on tabular datasets, arXiv 2106.11189.

    >>> x, y = CutMix(1.0).batch(torch.arange(3.0)[:, None].expand(3, 4), torch.eye(3), Noise(7, "cutmix"))
    >>> x[0], y[0]
    (tensor([0., 2., 0., 0.]), tensor([0.7500, 0.0000, 0.2500]))
    """

    p: float = hyper(0.5, valid="[0, 1]", off=0.0, low=0.0, high=1.0)
    alpha: float = hyper(1.0, valid="(0, inf)", low=0.2, high=2.0)

    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        found = only_floats(x, "CutMix")
        refuse_other_rows(found, y, "CutMix")
        if y.ndim > 2:
            raise GoodfitError(
                f"CutMix mixes one target per row, (rows,) or (rows, classes), got y of shape {tuple(y.shape)}; leave it out "
                "of the cocktail."
            )
        cut = noise.part("cut").uniform() < number(self.p)
        share = torch.where(cut, 1 - beta(self.alpha, noise.part("share")), 0.0)
        masks, whole = patches(found, share.reshape(1, 1), noise.part("patch"), "CutMix")
        order = permutation(len(y), noise.part("permutation"))
        mixed = {n: torch.where(masks[n].to(t.device), t[order.to(t.device)], t) for n, t in found.items()}
        return replaced(x, mixed), blended(y, 1 - whole.double().mean(), order)
