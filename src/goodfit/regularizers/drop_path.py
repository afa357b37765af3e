"""Drop path: stochastic depth for any model with residual blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from goodfit.hyper import hyper
from goodfit.layers.path import SeededDropPath, SeededShakeDrop
from goodfit.regularizers.branching import Branching
from goodfit.where import Where, everything

__all__ = ["DropPath"]


@dataclass(frozen=True)
class DropPath(Branching):
    """Drop path, or stochastic depth: in training a row passes by the branch of a residual block with probability p.

    Formula: y = x + f(x) · mask / (1 − p_l) with one Bernoulli(1 − p_l) per row in training; y = x + f(x) in eval. With
        linear, p_l = p · l / L for the l-th of L residual additions in the order of the forward run, as in the paper (timm
        and torchvision count p · (l − 1) / (L − 1) by blocks, so that their first one never drops); else p_l = p. A layer
        that serves several additions in a row has the rate of the last: in `for _ in range(3): x = x + f(x)`, p at each.
    Phase: Build. A layer is inserted behind the module that hands over the branch f(x) of a residual addition: bn3 of a
        bottleneck, the attention and the mlp of a transformer block, dropout1 and dropout2 of nn.TransformerEncoderLayer
        (whose fast path torch leaves where there are hooks). Stochastic depth that the model has, such as
        torchvision.ops.StochasticDepth and the DropPath of timm and transformers, gets the rate and stays the only one; it
        draws from torch's generator. where picks branches by the name of that module; l and L count all. A
        shortcut of one layer is one where the sum is not what the model says (as that of a wide and a deep part), the branch
        serves this sum alone (unlike keys of attention) and is not the way up of a U-Net. The axis of the rows is found by
        repeating and by moving rows of the example. Shapes of tensors stay.
    Numbers: p, the probability that the last block drops a row, in [0, 1), off at 0.
    Errors: p outside [0, 1); a model without residual additions, or where no branch comes from a module or shows its rows;
        none that where picks; with linear, a module that runs in blocks apart; lazy layers; a bare leaf, a DDP or compiled
        wrapper. Branches where it cannot stand are left out, with a warning. A function of the model's own that drops rows
        is not seen.
    Source: Huang et al. 2016, Deep networks with stochastic depth, arXiv 1603.09382.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> model = DropPath(0.4).build(nn.Sequential(layer), torch.zeros(2, 3, 8))
    >>> layer.dropout1.drop_path, layer.dropout2.drop_path
    (SeededDropPath(p=0.2), SeededDropPath(p=0.4))
    """

    made: ClassVar[type[SeededDropPath]] = SeededDropPath
    child: ClassVar[str] = "drop_path"

    p: float = hyper(0.1, valid="[0, 1)", off=0.0, low=0.0, high=0.5)
    where: Where = everything
    linear: bool = True

    def knows(self, layer: nn.Module) -> bool:
        return not isinstance(layer, SeededShakeDrop)
