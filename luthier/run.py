"""Run: a stage plan attached to a live model. The only thing that is alive between a recipe and a report.

It belongs to no trainer: a loop of one's own needs ``run.loss``, ``run.offer`` and ``run.step``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Place
from luthier.core.closure import Closure, LossFn
from luthier.core.context import Context, Progress, Shelf
from luthier.core.groups import plain
from luthier.core.modes import quieted
from luthier.core.schedule import Schedule
from luthier.errors import CheckpointError, Fault, ModelError
from luthier.plan import Entry, StagePlan, compose, skeleton
from luthier.recipe.recipe import Recipe, Stage

_STRUCTURE = (Place.MODULES, Place.FORWARD_WEIGHTS)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a Hugging Face model computes itself when the batch holds labels, shape ()."""
    loss: Tensor = model(**batch).loss
    return loss


class Run:
    """A stage in progress.

    Attributes:
        model: the model whose weights learn, by their plain names.
        forward: what the closure calls: the model itself, or what ``place`` made of it (a data-parallel wrapper).
        optimizer: the chain of the stage's optimizer ingredients.
        schedule: the learning rates of its groups, one step a step.
        loss: the chain of the stage's loss ingredients over the given loss.
        progress: where the stage stands.
        notes: what ingredients said.

    Args:
        plan: what ``compose`` made.
        model: the live model; its surgery happens here, in place.
        seed: the recipe's.
        loss: (model, batch) -> mean loss over rows, shape ().
        sample: a few training batches, for ingredients that claim them.
        place: puts the model on devices and processes after surgery; may wrap it.
        folder: where ingredients may save something of their own.
    Raises:
        ModelError: the model is not the one that was planned for.
    """

    def __init__(
        self,
        plan: StagePlan,
        model: nn.Module,
        *,
        seed: int,
        loss: LossFn = own_loss,
        sample: Sequence[Any] = (),
        place: Callable[[nn.Module], nn.Module] = lambda model: model,
        folder: Path | None = None,
    ) -> None:
        self.plan, self.model, self.seed = plan, model, seed
        self.progress = Progress(plan.steps)
        self.notes: list[str] = list(plan.notes)
        self._shelf = Shelf()
        self._sample = sample
        self._place = place
        self._folder = folder
        self._start: dict[str, Tensor] | None = None
        self._surgery()
        self._awake()
        self.forward = place(model)
        self._weights = dict(model.named_parameters())  # sharding puts other tensors under the same names
        self.loss = self._chain(loss)
        self.optimizer = self._optimize()
        factors = [_factor(group.schedule, plan.steps) for group in plan.table.groups()]
        self.schedule = LambdaLR(self.optimizer, factors)
        self.train()

    def closure(self, *batches: Any) -> Closure:
        """The closure of one step over ``batches``, for loops of one's own."""
        return Closure(self.forward, self.loss, batches, before=self.begin_part)

    def begin_part(self, number: int) -> None:
        """Says that micro-batch ``number`` of the step is evaluated next, so that its noise is the same at every evaluation."""
        self.progress.part = number

    def offer(self, closure: Closure) -> Tensor:
        """Evaluates the step's data: leaves gradients, or whatever the stage's step needs. Returns the loss, shape ()."""
        offered = getattr(self.optimizer, "offer", None)
        loss: Tensor = offered(closure) if offered else closure.backward()
        return loss

    def step(self, take: Callable[[Optimizer], Any] = lambda optimizer: optimizer.step()) -> None:
        """Takes the step that was offered, moves the schedule on, clears gradients, wakes what is due.

        Args:
            take: how the optimizer is stepped; a gradient scaler puts itself here.
        """
        take(self.optimizer)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.advance()

    def advance(self) -> None:
        """Counts a step that was taken, and wakes the weights that are due; for trainers that step by themselves."""
        self.progress.step += 1
        self.progress.part = 0
        self._wake()

    def finish(self) -> Anatomy:
        """Undoes what was only for training (merges, averages), last ingredient first. Returns the parts as they are then."""
        for entry in reversed(self._ordered()):
            entry.ingredient.finish(self.model, self._context(entry))
        self.model.eval()
        return Anatomy.of(self.model, self.plan.family)

    def train(self) -> None:
        """Training mode, but for what the plan keeps quiet below the lowest trainable weight."""
        self.forward.train()
        for module in quieted(self.model, self.plan.anatomy, self.plan.table.quiet_depth):
            module.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that the stage needs to go on, but for the model's own weights and buffers."""
        return {
            "step": self.progress.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "shelf": self._shelf.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``; the model's weights are loaded by whoever saved them.

        Raises:
            CheckpointError: the state is of another recipe or model.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"this state is not of stage {self.plan.name!r}: {error}") from None
        self._shelf.load_state_dict(state["shelf"])
        self.progress.step = state["step"]
        self._wake()

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate now, by the first weight of each group."""
        return {group["names"][0]: float(group["lr"]) for group in self.optimizer.param_groups}

    def _surgery(self) -> None:
        entries = self._ordered()
        anatomy = Anatomy.of(self.model, self.plan.family)  # the plan's own is that of the model after surgery
        first = [entry for entry in entries if entry.owns(Place.START_WEIGHTS)]
        for entry in first:
            entry.ingredient.surgery(self.model, self._context(entry, anatomy))
        if any(entry.claims_any(Place.REFERENCE) for entry in entries):
            parts = anatomy.parts
            weights = dict(self.model.named_parameters())
            self._start = {part.canonical: weights[part.name].detach().clone() for part in parts}
        for entry in entries:
            if entry not in first:
                entry.ingredient.surgery(self.model, self._context(entry, anatomy))

    def _ordered(self) -> list[Entry]:
        """Those that change the model's structure first, so that they are undone last."""
        return sorted(self.plan.entries, key=lambda entry: not entry.claims_any(*_STRUCTURE))

    def _awake(self) -> None:
        weights = dict(self.model.named_parameters())
        planned = [row.name for row in self.plan.table.rows]
        if set(weights) != set(planned):
            odd = sorted(set(weights) ^ set(planned))
            raise ModelError.of([Fault(odd[0], "must be in the plan and in the model alike")], "the model")
        for row in self.plan.table.rows:
            weights[row.name].requires_grad_(row.trainable and row.wakes_at <= self.progress.fraction)

    def _wake(self) -> None:
        due = [
            row
            for row in self.plan.table.rows
            if row.trainable
            and 0 < row.wakes_at <= self.progress.fraction
            and not self._weights[row.name].requires_grad
        ]
        for row in due:
            self._weights[row.name].requires_grad_(True)
        if due and self.forward is not self.model:
            self.forward = self._place(self.model)

    def _chain(self, loss: LossFn) -> LossFn:
        for entry in self.plan.entries:
            loss = entry.ingredient.loss(loss, self._context(entry))
        chain, progress = loss, self.progress

        def counted(model: nn.Module, batch: Any) -> Tensor:
            progress.turn += 1
            value = chain(model, batch)
            progress.part += 1
            return value

        return counted

    def _optimize(self) -> Optimizer:
        optimizer = plain(self.plan.table, self._weights)
        for entry in sorted(self.plan.entries, key=lambda entry: not entry.owns(Place.OPTIMIZER, Place.STEP)):
            optimizer = entry.ingredient.optimizer(optimizer, self._context(entry))
        return optimizer

    def _context(self, entry: Entry, anatomy: Anatomy | None = None) -> Context:
        return Context(
            anatomy or self.plan.anatomy,
            self.progress,
            self.seed,
            entry.key,
            entry.claims,
            self._shelf,
            self.notes,
            self._start if entry.claims_any(Place.REFERENCE) else None,
            self._sample if entry.claims_any(Place.SAMPLE) else (),
            self._folder,
        )


def _factor(schedule: Schedule, steps: int) -> Callable[[int], float]:
    return lambda step: schedule(min(step / steps, 1.0))


def begin(
    model: nn.Module,
    ingredients: Sequence[Any],
    *,
    learning_rate: float = 2e-5,
    steps: int,
    seed: int = 0,
    loss: LossFn = own_loss,
    family: Any = None,
) -> Run:
    """Attaches ingredients to a model for a training loop of one's own.

    Args:
        model: any torch module whose parts ``Anatomy`` can tell, or whose ``family`` says where they are.
        ingredients: in the order in which they nest; AdamW is added when none of them owns the optimizer.
        learning_rate: the peak rate.
        steps: optimizer steps to come.
        seed: of every random stream.
        loss: (model, batch) -> mean loss, shape (); the model's own when it returns one.
        family: where the model's parts are, for families that Luthier does not know.
    Returns:
        a Run: ``loss = run.loss(model, batch); loss.backward(); run.step()``, and ``run.finish()`` at the end.
    Raises:
        RecipeError, ConflictError: as ``compose`` does.
    """
    stage = Stage(name="train", ingredients=tuple(ingredients), steps=steps, learning_rate=learning_rate)
    recipe = Recipe(name="begin", stages=(stage,), seed=seed, family=family)
    plan = compose(recipe, skeleton(model))
    return Run(plan.stages[0], model, seed=seed, loss=loss)
