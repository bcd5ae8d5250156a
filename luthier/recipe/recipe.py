"""Recipe and Stage: what is to be done, as frozen values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from luthier.core.families import Family
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import LuthierError

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
RandomStream = Literal["head", "order", "dropout", "split"]
ALIASES = {"lr": "learning_rate", "num_train_epochs": "epochs", "max_steps": "steps"}  # other names of a stage's fields


@ingredient
class Stage:
    """A stretch of training with one optimizer and one schedule.

    Args:
        name: how logs and reports call it.
        ingredients: the methods, in the order in which they nest.
        epochs: passes over the training rows; may be a fraction. Either this or ``steps``.
        steps: optimizer steps.
        learning_rate: the peak rate of a weight whose ``lr_scale`` is one.
        batch_size: rows in one optimizer step, over all processes and micro-batches: what the mathematics sees.
        micro_batch: most rows in one forward pass on one device: what the memory sees; None = all at once.
        solver: ``exact`` solves the head in closed form or by L-BFGS on cached features; ``sgd`` takes steps.
        carry: selectors of what goes on to the next stage; all other weights and buffers are put back to what they were when this stage
            began. None = everything goes on.
    """

    name: str = "train"
    ingredients: tuple[pydantic.InstanceOf[Ingredient], ...] = ()
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    batch_size: Count = 16
    micro_batch: Count | None = None
    solver: Literal["sgd", "exact"] = "sgd"
    carry: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("must say epochs or steps, not both")


@ingredient
class Recipe:
    """Stages in order, and what holds for all of them.

    Args:
        name: how reports call it.
        stages: at least one.
        description: a sentence for lists of recipes.
        seed: every random stream of the run is derived from it, but for the split of the data.
        seeds: seeds of single streams that go before it: ``head`` (its start), ``order`` (of the rows), ``dropout``, and ``split`` (which
            rows are validation and test when the data does not say; 0 without, so that runs of other seeds have the same rows).
        task: ``auto`` decides from the labels.
        metric: the number the report leads with; None = the task's own (accuracy, or root mean squared error).
        max_length: tokens kept of each text; None = what the model allows, at most 512.
        precision: of the forward and backward pass; weights and optimizer state stay in single precision.
        compile: whether ``torch.compile`` is used.
        family: where the parts of a model are, for families that Luthier does not know.
        head: ``own`` is the model's own, as it was loaded or drawn; ``mlp`` is dense, activation, linear, both layers drawn anew from the
            seed's stream ``head`` and both of them the head for every selector: the model's own head where it has two layers (RoBERTa),
            else its pooler's dense layer and the last linear one (BERT). Models with neither (Llama) are refused.
        data: where the training data is (``in``), and rows of another domain (``out``), when the recipe is for one data set; what the
            caller names goes before it.
    """

    name: str
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    description: str = ""
    seed: Seed = 0
    seeds: dict[RandomStream, Seed] | None = None
    task: Literal["auto", "classification", "regression"] = "auto"
    metric: str | None = None
    max_length: Annotated[int, Field(ge=4)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    family: Family | None = None
    head: Literal["own", "mlp"] = "own"
    data: dict[Literal["in", "out"], str] | None = None

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages must have names of their own")

    def seed_of(self, which: RandomStream) -> int:
        """The seed of one random stream."""
        return (self.seeds or {}).get(which, 0 if which == "split" else self.seed)

    def source(self, which: Literal["in", "out"], given: Any) -> Any:
        """What the caller names, else what the recipe does.

        Raises:
            LuthierError: neither names the training data.
        """
        found = given if given is not None else (self.data or {}).get(which)
        if found is None and which == "in":
            raise LuthierError("--data must be given, or data: {in: PATH} in the recipe.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default filled in; what the run folder's recipe.yaml holds."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain["stages"] = [_stage(stage) for stage in self.stages]
        plain["family"] = dataclasses.asdict(self.family) if self.family else None
        listed: dict[str, Any] = _listed(plain)
        return listed

    @property
    def digest(self) -> str:
        """Sixteen hex digits that are the same for two recipes exactly when they mean the same run."""
        meaning = {key: value for key, value in self.to_dict().items() if key not in ("name", "description", "data")}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def _stage(stage: Stage) -> dict[str, Any]:
    plain = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}  # type: ignore[arg-type]
    plain["ingredients"] = [
        {part.name(): {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}}  # type: ignore[arg-type]
        for part in stage.ingredients
    ]
    return plain


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return value
