"""The target as the network sees it, its outputs as answers, and how good they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from goodfit.errors import GoodfitError
from goodfit.tabular.columns import Target
from goodfit.tabular.values import Array

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Answers"]


@dataclass(frozen=True)
class Answers:
    """What is predicted: one of `classes`, or a number, standardised by the mean and scale of the training part."""

    target: Target
    mean: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, target: Target, table: pa.Table) -> Answers:
        """Learn the scale of a number target from the training part."""
        if target.classes is not None:
            return cls(target)
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(np.asarray(table[target.name].to_numpy(), dtype=np.float64).reshape(-1, 1))
        return cls(target, float(scaler.mean_[0]), float(scaler.scale_[0]))

    @property
    def outputs(self) -> int:
        """How many outputs the network needs."""
        return 1 if self.target.classes is None else len(self.target.classes)

    @property
    def metric(self) -> str:
        """The main score; lower is better."""
        return "rmse" if self.target.classes is None else "log_loss"

    def encode(self, table: pa.Table) -> Array:
        """The target column as class numbers (int64) or standardised numbers (float32)."""
        if self.target.classes is None:
            values = np.asarray(table[self.target.name].to_numpy(), dtype=np.float64)
            return ((values - self.mean) / self.scale).astype(np.float32)
        number = {value: i for i, value in enumerate(self.target.classes)}
        return np.array([number[value] for value in table[self.target.name].to_pylist()], dtype=np.int64)

    def decode(self, outputs: Array) -> pa.Table:
        """Predictions: a column `prediction`, and for classes the probability of each."""
        import pyarrow as pa

        if self.target.classes is None:
            return pa.table({"prediction": outputs[:, 0].astype(np.float64) * self.scale + self.mean})
        p = _softmax(outputs)
        names = [f"p({value})" for value in self.target.classes]
        best = pa.array([self.target.classes[i] for i in p.argmax(axis=1)])
        return pa.table([best, *(pa.array(p[:, i]) for i in range(len(names)))], names=["prediction", *names])

    def scores(self, outputs: Array, encoded: Array) -> dict[str, float]:
        """The field's usual scores of network outputs against encoded targets, in the target's own units."""
        from sklearn import metrics

        if self.target.classes is None:
            guess, truth = (np.asarray(v, dtype=np.float64).ravel() * self.scale + self.mean for v in (outputs, encoded))
            return {
                "rmse": float(metrics.root_mean_squared_error(truth, guess)),
                "mae": float(metrics.mean_absolute_error(truth, guess)),
                "r2": float(metrics.r2_score(truth, guess)),
            }
        p = _softmax(outputs)
        guess = p.argmax(axis=1)
        recalls = [float((guess[encoded == k] == k).mean()) for k in np.unique(encoded)]
        return {
            "log_loss": float(metrics.log_loss(encoded, p, labels=np.arange(p.shape[1]))),
            "accuracy": float((guess == encoded).mean()),
            "balanced_accuracy": float(np.mean(recalls)),
        }

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Answers:
        """Rebuild."""
        try:
            return cls(Target(**saved["target"]), float(saved["mean"]), float(saved["scale"]))
        except (KeyError, TypeError, ValueError) as wrong:
            raise GoodfitError(f"The stored target cannot be read ({type(wrong).__name__}: {wrong}); fit again.") from None


def _softmax(outputs: Array) -> Array:
    import torch

    return np.asarray(torch.softmax(torch.from_numpy(outputs).double(), dim=1))
