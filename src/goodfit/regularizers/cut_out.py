"""Parts of an input set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from goodfit.hyper import hyper
from goodfit.noise import Noise
from goodfit.phases import Batch
from goodfit.regularizers.leaves import floats, refuse_other_rows, replaced
from goodfit.regularizers.patches import patches

__all__ = ["CutOut"]


@dataclass(frozen=True)
class CutOut(Batch):
    """Cutout: a patch of a row is set to 0, the mean of inputs that are standardized; its target stays.

    Formula: x ← 0 within a patch, with probability p for each row, which has a patch of its own. Images (rows, channels,
        height, width): a box with sides √ratio of the image's around a point anywhere, cut off at the border. Tables (rows,
        columns): a random round(ratio · columns) of the columns.
    Phase: Batch. In a dict or tuple the columns of all tensors are those of one table; integers and booleans stay as they are.
        The columns of a one-hot category are cut each by itself. Nothing is scaled up. The paper cuts a square of a given
        length from every image (16 of 32 pixels are ratio 0.25, and a square where the image is one). p and tables come from
        Kadra et al., whose code cuts the same columns from all rows of a batch, one at least; here each row is cut by itself,
        as in the paper on images.
    Numbers: p, the probability that a row is cut, in [0, 1], off at 0. ratio of the area or of the columns, in [0, 1].
    Errors: p or ratio outside [0, 1]; x without floating point, neither table nor images, of images of several sizes, or
        without the rows on axis 0.
    Source: DeVries and Taylor 2017, Improved regularization of convolutional neural networks with cutout, arXiv 1708.04552;
        Kadra et al. 2021, Well-tuned simple nets excel on tabular datasets, arXiv 2106.11189.

    >>> CutOut(1.0, ratio=0.5).batch(torch.ones(2, 4), torch.zeros(2), Noise(0, "cutout"))[0]
    tensor([[0., 1., 0., 1.],
            [0., 1., 0., 1.]])
    """

    mixes: ClassVar[bool] = False

    p: float = hyper(0.5, valid="[0, 1]", off=0.0, low=0.0, high=1.0)
    ratio: float = hyper(0.25, valid="[0, 1]", low=0.0, high=1.0)

    def batch(self, x: Any, y: Tensor, noise: Noise) -> tuple[Any, Tensor]:
        found = floats(x, "CutOut")
        refuse_other_rows(found, y, "CutOut")
        device = next(iter(found.values())).device
        p, ratio = (torch.as_tensor(n, dtype=torch.float32, device=device) for n in (self.p, self.ratio))
        cut = noise.part("cut").uniform(len(y), 1, device=device) < p
        masks, _ = patches(found, torch.where(cut, ratio, 0.0), noise.part("patch"), "CutOut")
        return replaced(x, {name: torch.where(masks[name], 0.0, t) for name, t in found.items()}), y
