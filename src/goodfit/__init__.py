"""goodfit: the regularization that a PyTorch model needs, how much of it, and what it did.

    import goodfit as gf
    run = gf.Run(gf.Cocktail(gf.L2(1e-4), gf.Dropout(0.2)), model, example=x)

Every regularizer is here by its name; what they are told is in `gf.where`, `gf.groups`, `gf.factors` and `gf.schedules`,
what they mean elsewhere in `gf.convert`, what they are made of in `gf.phases` and `gf.hyper`. Nothing is imported before it
is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goodfit import (
        convert as convert,
        factors as factors,
        groups as groups,
        hyper as hyper,
        logs as logs,
        phases as phases,
        schedules as schedules,
        spaces as spaces,
        stop as stop,
        surgery as surgery,
        where as where,
    )
    from goodfit.batchnorms.convert import Converted as Converted, convert_batchnorm as convert_batchnorm
    from goodfit.batchnorms.freeze import freeze_batchnorm as freeze_batchnorm, thaw_batchnorm as thaw_batchnorm
    from goodfit.batchnorms.recalibrate import recalibrate as recalibrate
    from goodfit.batchnorms.variance_shift import VarianceShift as VarianceShift, variance_shift as variance_shift
    from goodfit.checkpoints.checkpoints import Checkpoints as Checkpoints
    from goodfit.cocktail import Cocktail as Cocktail, parse as parse
    from goodfit.errors import GoodfitError as GoodfitError, GoodfitWarning as GoodfitWarning
    from goodfit.explanation import Explanation as Explanation, explain as explain
    from goodfit.fitting.compute import Compute as Compute
    from goodfit.fitting.fit import Fit as Fit, fit as fit
    from goodfit.fitting.small_batches import merge_last as merge_last
    from goodfit.folding.fold import fold_batchnorm as fold_batchnorm
    from goodfit.paths.path import path as path
    from goodfit.paths.result import Path as Path
    from goodfit.regularizers.alpha_dropout import AlphaDropout as AlphaDropout
    from goodfit.regularizers.attention_dropout import AttentionDropout as AttentionDropout
    from goodfit.regularizers.averaging import EMA as EMA, SWA as SWA, Lookahead as Lookahead
    from goodfit.regularizers.batchnorm import BatchNorm as BatchNorm
    from goodfit.regularizers.channel_dropout import ChannelDropout as ChannelDropout
    from goodfit.regularizers.clipping import ClipNorm as ClipNorm, ClipValue as ClipValue
    from goodfit.regularizers.confidence_penalty import ConfidencePenalty as ConfidencePenalty
    from goodfit.regularizers.constraints import MaxNorm as MaxNorm
    from goodfit.regularizers.cut_out import CutOut as CutOut
    from goodfit.regularizers.drop_block import DropBlock as DropBlock
    from goodfit.regularizers.drop_connect import DropConnect as DropConnect
    from goodfit.regularizers.drop_path import DropPath as DropPath
    from goodfit.regularizers.dropout import Dropout as Dropout
    from goodfit.regularizers.early_stopping import EarlyStopping as EarlyStopping
    from goodfit.regularizers.flooding import Flooding as Flooding
    from goodfit.regularizers.gaussian_dropout import GaussianDropout as GaussianDropout
    from goodfit.regularizers.gradient_noise import GradientNoise as GradientNoise
    from goodfit.regularizers.group_lasso import GroupLasso as GroupLasso
    from goodfit.regularizers.input_dropout import InputDropout as InputDropout
    from goodfit.regularizers.input_noise import InputNoise as InputNoise
    from goodfit.regularizers.label_smoothing import LabelSmoothing as LabelSmoothing
    from goodfit.regularizers.mixing import CutMix as CutMix, MixUp as MixUp
    from goodfit.regularizers.orthogonal import Orthogonal as Orthogonal
    from goodfit.regularizers.shake_drop import ShakeDrop as ShakeDrop
    from goodfit.regularizers.shake_shake import ShakeShake as ShakeShake
    from goodfit.regularizers.sharpness import FGSM as FGSM, SAM as SAM
    from goodfit.regularizers.shrinkage import L2 as L2, L2SP as L2SP, WeightDecay as WeightDecay
    from goodfit.regularizers.skip_connections import SkipConnections as SkipConnections
    from goodfit.regularizers.sparsity import L1 as L1, ElasticNet as ElasticNet
    from goodfit.regularizers.spectral_norm import SpectralNorm as SpectralNorm
    from goodfit.run import Run as Run
    from goodfit.sampling.dropping import mc_dropout as mc_dropout
    from goodfit.sampling.predict import mc_predict as mc_predict
    from goodfit.sampling.prediction import Prediction as Prediction
    from goodfit.shrinking.shrink import shrink as shrink
    from goodfit.stack.stack import Stack as Stack
    from goodfit.streams.parquet import Parquet as Parquet

__version__ = "0.1.0"

_MODULES = ("convert", "factors", "groups", "hyper", "logs", "phases", "schedules", "spaces", "stop", "surgery", "where")
_NAMES = {
    "Checkpoints": "checkpoints.checkpoints",
    "Cocktail": "cocktail",
    "Compute": "fitting.compute",
    "Converted": "batchnorms.convert",
    "Explanation": "explanation",
    "Fit": "fitting.fit",
    "GoodfitError": "errors",
    "GoodfitWarning": "errors",
    "Parquet": "streams.parquet",
    "Path": "paths.result",
    "Prediction": "sampling.prediction",
    "Run": "run",
    "Stack": "stack.stack",
    "VarianceShift": "batchnorms.variance_shift",
    "convert_batchnorm": "batchnorms.convert",
    "explain": "explanation",
    "fit": "fitting.fit",
    "freeze_batchnorm": "batchnorms.freeze",
    "merge_last": "fitting.small_batches",
    "fold_batchnorm": "folding.fold",
    "mc_dropout": "sampling.dropping",
    "mc_predict": "sampling.predict",
    "parse": "cocktail",
    "path": "paths.path",
    "recalibrate": "batchnorms.recalibrate",
    "shrink": "shrinking.shrink",
    "thaw_batchnorm": "batchnorms.freeze",
    "variance_shift": "batchnorms.variance_shift",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"goodfit.{name}")
    if name in _NAMES:
        found = getattr(importlib.import_module(f"goodfit.{_NAMES[name]}"), name)
    elif name.startswith("_"):
        raise AttributeError(name)
    else:
        from goodfit.errors import nearest
        from goodfit.regularizers import catalogue

        if name not in catalogue():
            raise AttributeError(f"goodfit has no {name!r}; {nearest(name, __dir__())}")
        found = catalogue()[name]
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from goodfit.regularizers import catalogue

    return sorted({*_NAMES, *_MODULES, *catalogue()})
