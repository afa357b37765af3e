"""accelerate: a run whose state is in the checkpoints of the accelerator.

run = Regularization("L2(1e-4), Dropout(0.3), EarlyStopping(5)", model, accelerator, example=x)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)      # made after it
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
run.attach(optimizer)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from goodfit.adapters.host import imported, refuse_second, refuse_sharded
from goodfit.cocktail import Cocktail, as_cocktail
from goodfit.errors import GoodfitError
from goodfit.phases import Regularizer
from goodfit.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Regularization"]

_accelerate = imported("accelerate", "accelerate")
_SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


class Regularization(Run):
    """A `gf.Run` for a loop of accelerate, made on the model before `accelerator.prepare`.

    accelerator: whose `save_state` and `load_state` carry the run from here on. The rest is as for `gf.Run`.
    """

    def __init__(
        self,
        cocktail: Cocktail | Regularizer | str,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        example: Any = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        task: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(accelerator, _accelerate.Accelerator):
            got = f"a {type(model).__name__} and a {type(accelerator).__name__}"
            raise GoodfitError(
                f"Regularization takes a cocktail, a torch.nn.Module and an Accelerator, in this order, got {got}."
            )
        kind = accelerator.distributed_type.value
        refuse_sharded(model, kind if kind in _SHARDED else None)
        cocktail = as_cocktail(cocktail)
        beside = (one for one in accelerator._custom_objects if isinstance(one, Regularization) and one.model is model)
        first = next(beside, None)
        if first is not None:
            refuse_second(first.cocktail, cocktail)
        self.seed: int = seed if first is None else first.seed  # inserted layers draw by that of the run that was made last
        super().__init__(cocktail, model, example=example, loss=loss, task=task, seed=self.seed)
        accelerator.register_for_checkpointing(self)

    @property
    def run(self) -> Run:
        """The run, which this is."""
        return self
