"""The same λ in other packages: exact conversions to and from scikit-learn, Keras and torch's own weight_decay.

goodfit's objective is f + l1 · Σ|w| + l2/2 · Σw², with f the mean loss over the rows: `F.mse_loss` (no ½) for numbers, the
mean cross-entropy for classes. Every package scales loss or penalty in its own way; the factors are here, and
`docs/regularizers.md` has them as a table. scikit-learn needs the number of rows where it does not divide by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn, optim

from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError
from goodfit.groups import units
from goodfit.phases import Regularizer
from goodfit.regularizers.constraints import MaxNorm
from goodfit.regularizers.shrinkage import L2, WeightDecay
from goodfit.regularizers.sparsity import L1, ElasticNet
from goodfit.where import Where, everything, kernels, named

__all__ = ["from_keras", "from_sklearn", "from_torch", "to_keras", "to_sklearn", "to_torch"]

Mix = Cocktail | Regularizer | str


def from_sklearn(estimator: Any, rows: int | None = None, outputs: int = 1) -> Cocktail:
    """The penalties of a scikit-learn estimator as a cocktail.

    rows: the training rows (for MLPClassifier and MLPRegressor the rows of a batch, by which they divide). outputs: of a
    regression on several numbers, which `F.mse_loss` averages and scikit-learn adds up: λ is divided by them.

    Ridge: λ = 2·alpha/rows. Lasso, ElasticNet, SGDRegressor: λ = 2·alpha, since their squared error is halved.
    LogisticRegression: λ = 1/(C·rows). SGDClassifier: λ = alpha. MLPClassifier: λ = alpha/rows; MLPRegressor: 2·alpha/rows.
    A binary LogisticRegression is a model of one output with binary cross-entropy.

    >>> from sklearn.linear_model import Lasso
    >>> print(from_sklearn(Lasso(alpha=0.5)))
    L1(1.0)
    """
    kind, numbers = _kind(estimator), estimator.get_params()
    if kind == "LogisticRegression" and (numbers.get("penalty", "") is None or numbers["C"] == math.inf):
        return Cocktail()
    share, scale = _lasso_share(kind, numbers), _scale(kind, rows, outputs)
    if "C" not in numbers and not isinstance(numbers["alpha"], int | float):
        raise GoodfitError(f"{kind} converts with one alpha for all, got alpha={numbers['alpha']!r:.60}.")
    strength = scale / numbers["C"] if "C" in numbers else scale * numbers["alpha"]
    return _penalties(strength * share, strength * (1 - share))


def to_sklearn(cocktail: Mix, estimator: Any, rows: int | None = None, outputs: int = 1) -> Any:
    """A fresh copy of a scikit-learn estimator with the penalties of a cocktail; rows and outputs as for `from_sklearn`.

    A LogisticRegression that needs a lasso gets the solver that has one, saga.

    >>> from sklearn.linear_model import LogisticRegression
    >>> to_sklearn(L2(0.01), LogisticRegression(), rows=50).C
    2.0
    """
    from sklearn.base import clone

    kind, made = _kind(estimator), clone(estimator)
    l1, l2 = _strengths(cocktail, "to_sklearn")
    total = l1 + l2
    share = l1 / total if total else _lasso_share(kind, made.get_params())
    if kind in _SHARES and share != _SHARES[kind]:
        raise GoodfitError(f"{kind} takes {'L1' if _SHARES[kind] else 'L2'} alone, got {as_cocktail(cocktail)}.")
    if kind == "LogisticRegression":
        if not total:
            raise GoodfitError("LogisticRegression without a penalty is C=inf, got a cocktail of strength 0.")
        known = {"penalty": type(made)().penalty} if hasattr(made, "penalty") else {}
        solver = made.solver if not share or made.solver == "saga" or (made.solver == "liblinear" and share == 1) else "saga"
        return made.set_params(C=_scale(kind, rows, 1) / total, l1_ratio=share, solver=solver, **known)
    made.set_params(alpha=total / _scale(kind, rows, outputs))
    if kind.startswith("SGD"):
        made.set_params(penalty="elasticnet")
    return made.set_params(l1_ratio=share) if kind not in _SHARES else made


def from_keras(thing: Any) -> Cocktail:
    """A Keras regularizer, constraint or optimizer as a cocktail.

    L1(l1): λ = l1. L2(l2): λ = 2·l2, since Keras has no ½. L1L2: both. MaxNorm(max_value) on axis 0 of a Dense kernel, on
    [0, 1, 2] of a Conv2D kernel, and so on: MaxNorm. An optimizer: its weight_decay, which is decoupled and acts on every
    variable, but for those that `exclude_from_weight_decay` names, which is not read.
    """
    kind = type(thing).__name__
    if not type(thing).__module__.split(".")[0] == "keras":
        raise GoodfitError(f"from_keras takes a Keras regularizer, constraint or optimizer, got {thing!r:.60}.")
    if kind in ("L1", "L2", "L1L2"):
        return _penalties(float(getattr(thing, "l1", 0.0)), 2 * float(getattr(thing, "l2", 0.0)))
    if kind == "MaxNorm":
        axes = [thing.axis] if isinstance(thing.axis, int) else list(thing.axis)
        if axes != list(range(len(axes))):
            raise GoodfitError(f"MaxNorm bounds units where its axis is 0, or [0, 1, 2] of a Conv2D, got axis={thing.axis!r}.")
        return Cocktail(MaxNorm(float(thing.max_value)))
    if hasattr(thing, "weight_decay"):
        return Cocktail(WeightDecay(float(thing.weight_decay), where=everything)) if thing.weight_decay else Cocktail()
    raise GoodfitError(f"from_keras knows L1, L2, L1L2, MaxNorm and optimizers, got {kind}.")


def to_keras(cocktail: Mix, rank: int = 2) -> dict[str, Any]:
    """Keras' own: "kernel_regularizer" and "kernel_constraint" for layers, "weight_decay" for the optimizer.

    rank: the axes of the kernel that a MaxNorm is for: 2 of Dense, 3, 4, 5 of Conv1D, Conv2D, Conv3D.
    """
    import keras

    mix = as_cocktail(cocktail)
    l1, l2 = _strengths(Cocktail(*(one for one in mix if not isinstance(one, MaxNorm | WeightDecay))), "to_keras")
    made: dict[str, Any] = {"kernel_regularizer": keras.regularizers.L1L2(l1=l1, l2=l2 / 2)} if l1 or l2 else {}
    for one in mix:
        if isinstance(one, MaxNorm):
            _plain(one, "to_keras")
            norm = min(one.norm, getattr(made.get("kernel_constraint"), "max_value", math.inf))
            made["kernel_constraint"] = keras.constraints.MaxNorm(norm, axis=0 if rank == 2 else list(range(rank - 1)))
        if isinstance(one, WeightDecay):
            _plain(one, "to_keras", (kernels, everything))
            if one.independent:
                raise GoodfitError(f"Keras multiplies its weight_decay by the learning rate, got {one}; leave independent out.")
            made["weight_decay"] = made.get("weight_decay", 0.0) + one.lam
    return made


def from_torch(optimizer: optim.Optimizer, model: nn.Module) -> Cocktail:
    """The weight_decay of a torch optimizer's groups: WeightDecay for AdamW and other decoupled ones, else L2.

    >>> model = nn.Linear(2, 1)
    >>> from_torch(optim.AdamW(model.parameters(), weight_decay=0.1), model)
    Cocktail(WeightDecay(lam=0.1, where=everything, independent=False))
    """
    found: dict[tuple[type[Regularizer], float], list[str]] = {}
    for group in optimizer.param_groups:
        held = {id(p) for p in group["params"]}
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, optim.AdamW | optim.Adafactor | optim.Muon))
        names = [name for name, p in model.named_parameters() if id(p) in held]
        if group.get("weight_decay", 0) and names:
            found.setdefault((WeightDecay if decoupled else L2, float(group["weight_decay"])), []).extend(names)
    return Cocktail(*(kind(lam, where=_selector(names, model)) for (kind, lam), names in found.items()))  # type: ignore[call-arg]


def to_torch(cocktail: Mix, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with torch's weight_decay: of L2 for optimizers that couple it, of WeightDecay for AdamW.

    >>> [len(group["params"]) for group in to_torch(WeightDecay(0.1), nn.Linear(2, 1))]
    [1, 1]
    """
    mix = as_cocktail(cocktail)
    kinds = {type(one) for one in mix}
    if len(kinds) > 1 or not kinds <= {L2, WeightDecay}:
        raise GoodfitError(f"torch's weight_decay is L2, or under AdamW WeightDecay, one of them, got {mix}.")
    decay = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for one in (one for one in mix if isinstance(one, L2 | WeightDecay)):
        _number(one, "to_torch")
        if isinstance(one, WeightDecay) and one.independent:
            raise GoodfitError(f"torch multiplies its weight_decay by the learning rate, got {one}; leave independent out.")
        for name in one.where.select(model):
            decay[name] += one.lam
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        groups.setdefault(decay[name], []).append(p)
    return [{"params": held, "weight_decay": lam} for lam, held in groups.items()]


_HALVED = ("Lasso", "ElasticNet", "SGDRegressor")
_SHARES = {"Ridge": 0.0, "Lasso": 1.0, "MLPClassifier": 0.0, "MLPRegressor": 0.0}
_PENALTIES = {"l1": 1.0, "l2": 0.0}
_SQUARED = ("Ridge", "Lasso", "ElasticNet", "MLPRegressor")
_LOSSES = {"SGDRegressor": "squared_error", "SGDClassifier": "log_loss", "MLPRegressor": "squared_error"}
_SUMMED = ("Ridge", "LogisticRegression", "MLPClassifier", "MLPRegressor")


def _kind(estimator: Any) -> str:
    known = {*_HALVED, *_SHARES, *_SUMMED, "SGDClassifier"}
    theirs = (kind.__name__ for kind in type(estimator).__mro__ if kind.__module__.startswith("sklearn."))
    name = next(theirs, "")
    if name not in known:
        raise GoodfitError(f"The conversion knows {', '.join(sorted(known))}, got {estimator!r:.60}.")
    numbers = estimator.get_params()
    loss = _LOSSES.get(name)
    if loss is not None and numbers.get("loss", loss) != loss:
        raise GoodfitError(f"{name} converts with loss={loss!r}, got loss={numbers['loss']!r}.")
    return name


def _scale(kind: str, rows: int | None, outputs: int) -> float:
    """λ per unit of alpha (or of 1/C)."""
    if not isinstance(outputs, int) or outputs < 1 or (outputs > 1 and kind not in _SQUARED):
        raise GoodfitError(f"outputs must be an integer >= 1, and more than 1 only for {', '.join(_SQUARED)}, got {outputs!r}.")
    doubled = (2.0 if kind in (*_HALVED, "Ridge", "MLPRegressor") else 1.0) / outputs
    if kind not in _SUMMED:
        return doubled
    if not isinstance(rows, int) or rows < 1:
        raise GoodfitError(f"{kind} does not divide its loss by the rows: give rows=, an integer >= 1, got rows={rows!r}.")
    return doubled / rows


def _lasso_share(kind: str, numbers: Mapping[str, Any]) -> float:
    if kind in _SHARES:
        return _SHARES[kind]
    penalty = numbers.get("penalty")
    if penalty in _PENALTIES:
        return _PENALTIES[penalty]
    if penalty is None and kind.startswith("SGD"):
        raise GoodfitError(f"{kind} has no penalty to convert, got penalty=None.")
    return float(numbers["l1_ratio"] or 0.0)


def _penalties(l1: float, l2: float) -> Cocktail:
    if l1 and l2:
        return Cocktail(ElasticNet(l1 + l2, ratio=l1 / (l1 + l2)))
    return Cocktail(*([L1(l1)] if l1 else [L2(l2)] if l2 else []))


def _strengths(cocktail: Mix, who: str) -> tuple[float, float]:
    """What a cocktail adds to the objective, as multiples of Σ|w| and of Σw²/2."""
    l1 = l2 = 0.0
    for one in as_cocktail(cocktail):
        if not isinstance(one, L1 | L2 | ElasticNet) or getattr(one, "factors", None) is not None:
            raise GoodfitError(f"{who} converts L1, L2 and ElasticNet without factors, got {one}.")
        _plain(one, who)
        share = 1.0 if isinstance(one, L1) else 0.0 if isinstance(one, L2) else one.ratio
        l1, l2 = l1 + one.lam * share, l2 + one.lam * (1 - share)
    return l1, l2


def _number(one: Any, who: str) -> None:
    if one.scheduled:
        raise GoodfitError(f"{who} needs fixed numbers, got {one}.")


def _plain(one: Any, who: str, where: tuple[Where, ...] = (kernels,)) -> None:
    """Refuse what the other package has no word for: a schedule, a selection, groups of one's own."""
    _number(one, who)
    if one.where not in where or getattr(one, "groups", units) != units:
        raise GoodfitError(f"{who} converts what acts on whole kernels, got {one}; leave where= and groups= out.")


def _selector(names: list[str], model: nn.Module) -> Where:
    for known in (everything, kernels):
        if set(known.select(model)) == set(names):
            return known
    where = named(names[0])
    for name in names[1:]:
        where = where | named(name)
    return where
