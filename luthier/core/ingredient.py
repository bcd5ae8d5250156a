"""What a fine-tuning method is: a frozen value with a few typed hooks that do nothing until overridden.

The hooks, in the order of a stage's life: ``tries``, ``surgery``, ``settings``, ``batches``, ``loss``, ``optimizer``, ``watch``,
``finish``, ``measure``.
Each attaches to an object of PyTorch's (a module, a parameter group, a loss function, an optimizer), so the same ingredient works
in a recipe, in one's own loop and in ``transformers.Trainer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import numpy as np
import pydantic
from pydantic.dataclasses import dataclass as checked
from torch import nn
from torch.optim import Optimizer

from luthier.core.calibration import Table
from luthier.core.claims import Claim
from luthier.core.closure import LossFn
from luthier.core.conformal import Sets
from luthier.core.context import Context
from luthier.core.faults import faults_of
from luthier.core.stream import Stream
from luthier.core.table import ParamTable
from luthier.errors import RecipeError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the trained model says of one split: the only thing a ``measure`` hook reads.

    Args:
        logits: shape (n, classes), float; unnormalised.
        targets: shape (n,): class numbers, or numbers to predict.
    """

    logits: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a ``measure`` hook found.

    Args:
        values: numbers by name, for the report.
        scale: factor on the logits, shape () or (classes,), that the predictions should be read with; None leaves them as they are.
        shift: added after ``scale``.
        table: for each class the points (x, y) of a rising curve; the probabilities are read through them and normalised.
        sets: of the classes that cannot be ruled out; they are beside the prediction, and change nothing of it.
        notes: sentences for the report.
    """

    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    table: tuple[Table, ...] | None = None
    sets: Sets | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Findings:
        """What changes predictions, or stands beside them, as a report's ``calibration`` tells it."""
        scale, shift = (None if told.get(name) is None else tuple(told[name]) for name in ("scale", "shift"))
        sets = None
        if held := told.get("sets"):
            threshold = held["threshold"]  # infinity is no number of JSON
            sets = Sets(held["score"], float("inf") if threshold is None else threshold)
        return cls(scale=scale, shift=shift, table=told.get("table"), sets=sets)

    @property
    def changes(self) -> bool:
        """Whether predictions should be read otherwise than they are."""
        return any(change is not None for change in (self.scale, self.shift, self.table))

    def beside(self, other: Findings) -> Findings:
        """The values and notes of both, and what that one of the two which changes predictions makes of them."""
        change = other if other.changes else self
        values, notes = {**self.values, **other.values}, self.notes + other.notes
        return dataclasses.replace(change, values=values, sets=self.sets or other.sets, notes=notes)


@dataclasses.dataclass(frozen=True)
class Tries:
    """Learning rates among which the engine chooses by validation before a stage.

    Args:
        rates: what is tried, each from the stage's start weights.
        keep: selectors of what learns meanwhile.
        epochs: how long each is tried.
    """

    rates: tuple[float, ...]
    keep: tuple[str, ...]
    epochs: float


class Ingredient:
    """One fine-tuning method. Subclasses are made with ``@ingredient`` and hold hyper-parameters only, never state."""

    def touches(self) -> tuple[Claim, ...]:
        """What it claims; pure, may read the fields."""
        return ()

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        """Changes the model in place, once, before the stage; also called on a storage-free copy when it claims modules."""

    def settings(self, table: ParamTable) -> ParamTable:
        """A table with edited rows; pure: no context, no model."""
        return table

    def batches(self, stream: Stream, ctx: Context) -> Stream:
        """A stream made from a stream."""
        return stream

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        """A loss made from a loss."""
        return inner

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        """An optimizer made from an optimizer, or the same one with step hooks."""
        return inner

    def watch(self, model: nn.Module, ctx: Context) -> None:
        """Looks at the model after every step, when ``progress`` has counted it; ``ctx.validate()`` scores it. May end the stage."""

    def finish(self, model: nn.Module, ctx: Context) -> None:
        """Changes the model in place, once, after the stage; called in reverse order."""

    def tries(self) -> Tries | None:
        """Learning rates to choose the stage's from; None leaves it as it is written. Pure; needs ``Place.TRIALS``."""
        return None

    def measure(self, outputs: Mapping[str, Outputs], ctx: Context) -> Findings | None:
        """Reads the trained model's outputs by split; changes nothing."""
        return None

    def works_on(self, table: ParamTable, started: frozenset[str]) -> frozenset[str] | None:
        """The live names of the weights it works on, of which the plan wants one that learns; None where that is not asked. Pure.

        Args:
            started: canonical names of the weights that were there before the stage's surgery.
        """
        return None

    def state_bytes(self, table: ParamTable) -> int:
        """Memory that it keeps beside weights and gradients, in bytes; pure."""
        return 0

    def waiting(self, above: int, below: int) -> tuple[int, int]:
        """Forward passes whose activations wait for a backward pass at once; pure, for the forecast.

        Args:
            above, below: those of the loss inside, in the layers from the lowest that learns on, and in those below it.
        """
        return above, below

    @classmethod
    def name(cls) -> str:
        """Its name in a recipe: the name of its file."""
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def uses(cls, hook: str) -> bool:
        """Whether it overrides ``hook``."""
        return getattr(cls, hook) is not getattr(Ingredient, hook)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def ingredient(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose values are checked when it is made, all faults at once.

    Raises (when an instance is made):
        RecipeError: unknown names or bad values; each with its field, what must hold and what came.
    """
    made = checked(cls, frozen=True, config=pydantic.ConfigDict(extra="forbid", strict=False))
    construct = made.__init__

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            construct(self, *args, **values)
        except pydantic.ValidationError as error:
            name = cls.__module__.rsplit(".", 1)[-1]
            known = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
            raise RecipeError.of(faults_of(error, name, known), name) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]
