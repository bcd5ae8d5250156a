"""Run: a stage plan attached to a live model. The only thing that is alive between a recipe and a report.

It belongs to no trainer: a loop of one's own needs ``run.loss``, ``run.offer`` and ``run.step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from luthier.core.anatomy import Anatomy, select_all
from luthier.core.claims import Claim, Place, voids
from luthier.core.closure import Closure, LossFn
from luthier.core.context import Around, Context, Progress, Shelf
from luthier.core.groups import plain
from luthier.core.modes import quieted
from luthier.core.schedule import Schedule
from luthier.errors import CheckpointError, Fault, ModelError, RunError
from luthier.planning.compose import compose, skeleton
from luthier.planning.plan import Entry, StagePlan
from luthier.recipe.recipe import Recipe, Stage


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
        scored: the scores that were made at this step; None when there are none.

    Args:
        plan: what ``compose`` made.
        model: the live model; its surgery happens here, in place.
        seed: the recipe's.
        around: the loss, and what else the loop gives: training batches, scores.
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
        around: Around | None = None,
        place: Callable[[nn.Module], nn.Module] = lambda model: model,
        folder: Path | None = None,
    ) -> None:
        self.plan, self.model, self.seed = plan, model, seed
        self.progress = Progress(plan.steps, epoch=plan.table.epoch)
        self.notes: list[str] = list(plan.notes)
        self._shelf = Shelf()
        given = around or Around()
        self._around = given if given.loss is not None else replace(given, loss=own_loss)
        self._scored: tuple[int, Mapping[str, Any]] | None = None
        self._offered = False
        self._place = place
        self._folder = folder
        self._start: dict[str, Tensor] | None = None
        self._watching = [entry for entry in plan.entries if entry.ingredient.uses("watch")]
        self._resting = [row for row in plan.table.rows if row.trainable and row.asleep]
        edges = {edge * plan.steps for row in self._resting for share in row.asleep for edge in share}
        self._turns = {
            round(edge) + by for edge in edges for by in (-1, 0, 1)
        }  # steps at which something may wake or rest
        self._surgery()
        self._awake()
        self.forward = place(model)
        self._weights = dict(model.named_parameters())  # sharding puts other tensors under the same names
        assert self._around.loss is not None
        self.loss = self._chain(self._around.loss)
        self.optimizer = self._optimize()
        factors = [_factor(group.schedule, plan.steps) for group in plan.table.groups()]
        self.schedule = LambdaLR(self.optimizer, factors)
        self.model.zero_grad(set_to_none=True)  # of whatever was done with the model before
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
        self._offered = True
        return loss

    def step(self, take: Callable[[Optimizer], Any] = lambda optimizer: optimizer.step()) -> None:
        """Takes the step that was offered, moves the schedule on, clears gradients, wakes what is due.

        Gradients of ``run.loss(model, batch).backward()`` are a step too, unless an ingredient replaces the step (SAM, MeZO).

        Args:
            take: how the optimizer is stepped; a gradient scaler puts itself here.
        Raises:
            RunError: an ingredient replaces the step, and none was offered since the last.
        """
        if hasattr(self.optimizer, "offer") and not self._offered:
            names = ", ".join(entry.name for entry in self.plan.entries if entry.claims_any(Place.STEP))
            must = f"must come after run.offer, as {names} replaces the step"
            do = "Say run.offer(run.closure(batch)) in place of run.loss(model, batch).backward()."
            raise RunError.of([Fault("run.step()", must, do=do)], "the loop")
        self._offered = False
        take(self.optimizer)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.advance()

    def advance(self) -> None:
        """Counts a step that was taken, wakes the weights that are due, lets ingredients look; for trainers that step themselves."""
        self.progress.step += 1
        self.progress.part = 0
        if self.progress.step in self._turns:
            self._wake()
        for entry in self._watching:
            entry.ingredient.watch(self.model, self._context(entry))

    def validate(self) -> Mapping[str, Any]:
        """The scores of the weights that the stage would end with now, by metric; made once a step, whoever asks."""
        if self.scored is None:
            assert self._around.score is not None  # compose refuses whoever needs it where there is none
            with self.ended():
                self._scored = self.progress.step, self._around.score(self.forward)
        assert self._scored is not None
        return self._scored[1]

    @property
    def scored(self) -> Mapping[str, Any] | None:
        return self._scored[1] if self._scored and self._scored[0] == self.progress.step else None

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Inside it the model holds the weights that the stage would end with now (an average, say); afterwards its own."""
        owners = [entry for entry in self.plan.entries if entry.owns(Place.END_WEIGHTS)]
        if not owners:
            yield
            return
        live = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        kept = {name: value.detach().clone() for name, value in live.items()}
        try:
            for entry in owners:
                entry.ingredient.finish(self.model, self._context(entry, notes=[]))
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    live[name].copy_(value)

    def finish(self) -> Anatomy:
        """Undoes what was only for training (merges, averages). Returns the parts as they are then.

        First those that own the end weights, then those that choose among them; then the others, last ingredient first, those that
        changed the structure last of all; then, on the plain model, those that compare the end weights with the reference.
        """
        last_first = self._ordered()[::-1]
        for entry in sorted(last_first, key=_turn):
            anatomy = Anatomy.of(self.model, self.plan.family) if _turn(entry) == 3 else None
            entry.ingredient.finish(self.model, self._context(entry, anatomy))
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
            "over": self.progress.over,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "shelf": self._shelf.state_dict(),
            "notes": list(self.notes),
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
        self.progress.step, self.progress.over = state["step"], state["over"]
        self.notes[:] = state["notes"]
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
        wanted = [
            at for entry in entries for claim in entry.claims if claim.place == Place.REFERENCE for at in claim.where
        ]
        if wanted:
            chosen = select_all(anatomy, wanted)
            weights = dict(self.model.named_parameters())
            parts = [part for part in anatomy.parts if part.name in chosen]
            self._start = {part.canonical: weights[part.name].detach().clone() for part in parts}
        for entry in entries:
            if entry not in first:
                entry.ingredient.surgery(self.model, self._context(entry, anatomy))

    def _ordered(self) -> list[Entry]:
        """Those that change the model's structure first, so that they are undone last.

        The first of them is who says what learns: lora saves the head, which the others must have left plain by then.
        """

        def turn(entry: Entry) -> int:
            return 2 - entry.structural * (1 + entry.owns(Place.TRAINABLE))

        return sorted(self.plan.entries, key=turn)

    def _awake(self) -> None:
        weights = dict(self.model.named_parameters())
        planned = [row.name for row in self.plan.table.rows]
        if set(weights) != set(planned):
            odd = sorted(set(weights) ^ set(planned))
            raise ModelError.of([Fault(odd[0], "must be in the plan and in the model alike")], "the model")
        for row in self.plan.table.rows:
            weights[row.name].requires_grad_(row.learns(self.progress.fraction))

    def _wake(self) -> None:
        due = [
            row for row in self._resting if row.learns(self.progress.fraction) != self._weights[row.name].requires_grad
        ]
        for row in due:
            self._weights[row.name].requires_grad_(not self._weights[row.name].requires_grad)
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
        for entry in sorted(self.plan.entries, key=_rank):
            optimizer = entry.ingredient.optimizer(optimizer, self._context(entry))
        return optimizer

    def _context(self, entry: Entry, anatomy: Anatomy | None = None, *, notes: list[str] | None = None) -> Context:
        return Context(
            anatomy or self.plan.anatomy,
            self.progress,
            self.seed,
            entry.key,
            entry.claims,
            self._shelf,
            self.notes if notes is None else notes,
            self._start if entry.claims_any(Place.REFERENCE) else None,
            self._folder,
            self._around,
            self.validate,
            self.ended,
        )


def _rank(entry: Entry) -> int:
    """When its ``optimizer`` comes: who makes the optimizer, who replaces its step, the others, and averages, which see a step's end."""
    if entry.owns(Place.OPTIMIZER):
        return 0
    return 1 if entry.owns(Place.STEP) else 3 if entry.owns(Place.END_WEIGHTS) else 2


def _turn(entry: Entry) -> int:
    """When its ``finish`` comes: see ``Run.finish``."""
    if entry.owns(Place.END_WEIGHTS):
        return 0
    if entry.claims_any(Place.END_WEIGHTS):
        return 3 if entry.claims_any(Place.REFERENCE) else 1
    return 2


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
    sample: Iterable[Any] = (),
    score: Callable[[nn.Module], Mapping[str, Any]] | None = None,
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
        sample: training batches, for ingredients that look at some before they start.
        score: the model's scores by metric on rows that are not trained on, for ingredients that choose by them.
        family: where the model's parts are, for families that Luthier does not know.
    Returns:
        a Run: for each batch ``run.offer(run.closure(batch)); run.step()``, and ``run.finish()`` at the end. ``offer`` leaves the gradients
        and gives the loss; without SAM and MeZO, which replace the step, ``run.loss(model, batch).backward()`` does as well.
    Raises:
        RecipeError, ConflictError, ModelError: as ``compose`` does.
    """
    stage = Stage(name="train", ingredients=tuple(ingredients), steps=steps, learning_rate=learning_rate)
    recipe = Recipe(name="begin", stages=(stage,), seed=seed, family=family)
    absent: list[Claim] = [voids(Place.TRIALS), *([] if score else [voids(Place.VALIDATION)])]
    plan = compose(recipe, skeleton(model), voids=absent)
    return Run(plan.stages[0], model, seed=seed, around=Around(loss, sample, score))
