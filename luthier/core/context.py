"""All that an ingredient may see of the run it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place
from luthier.core.closure import LossFn
from luthier.core.seeds import derive, generator
from luthier.errors import Fault, RecipeError


class Holder(Protocol):
    """Something with state that is saved with the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


H = TypeVar("H", bound=Holder)


class Tensors(dict[str, Tensor]):
    """Tensors by name, as a holder; numbers such as a count are tensors of shape ()."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().clone() for name, value in self.items()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        for name, value in state.items():
            if name in self and self[name].shape == value.shape:
                self[name].copy_(value)
            else:
                self[name] = value.clone()


class Shelf:
    """The state holders of one stage, by name; what was saved waits until its holder is made."""

    def __init__(self) -> None:
        self._holders: dict[str, Holder] = {}
        self._waiting: dict[str, dict[str, Any]] = {}

    def keep(self, name: str, make: Callable[[], H]) -> H:
        if name not in self._holders:
            holder = make()
            if name in self._waiting:
                holder.load_state_dict(self._waiting.pop(name))
            self._holders[name] = holder
        return self._holders[name]  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        return {**self._waiting, **{name: holder.state_dict() for name, holder in self._holders.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name in self._holders:
                self._holders[name].load_state_dict(value)
            else:
                self._waiting[name] = value


@dataclass
class Progress:
    """Where the stage stands.

    Args:
        steps: optimizer steps of the stage.
        step: steps done.
        part: number of the micro-batch of this step that is being evaluated.
        turn: evaluations of the loss so far, whatever for; not the same in a run that was gone on with.
        epoch: steps of the first epoch; 0 where the rows are not known.
        over: why the stage ends before its last step; empty while it goes on.
    """

    steps: int
    step: int = 0
    part: int = 0
    turn: int = 0
    epoch: int = 0
    over: str = ""

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, in [0, 1]."""
        return min(self.step / self.steps, 1.0) if self.steps else 1.0


@dataclass(frozen=True)
class Around:
    """What the loop around a stage gives its ingredients; a loop of one's own may give less.

    Args:
        loss: (model, batch) -> mean loss over the batch's rows, shape (): the task's, without any ingredient.
        sample: training batches, each a mapping; asked twice, the same ones, as many as there are rows.
        score: a model's scores on the validation rows, by metric; leaves the model as it was.
        metric: the score that counts when an ingredient names none.
    """

    loss: LossFn | None = None
    sample: Iterable[Any] = ()
    score: Callable[[nn.Module], Mapping[str, Any]] | None = None
    metric: str = "accuracy"


@dataclass(frozen=True)
class Context:
    """What a hook is given.

    Args:
        anatomy: the model's parts, as they are at this hook.
        progress: where the stage stands (live: read it when needed, do not keep a copy).
        seed: the recipe's seed.
        key: the stage and the ingredient, which name the random streams and the kept state.
        claims: what the ingredient claimed; ``reference``, ``sample`` and ``score`` are only for those who claimed them.
        folder: the run folder, if there is one.
        around: what the loop gives.
        validate: scores of the weights that the stage would end with now, by metric; made once a step, whoever asks.
        ended: inside it the model holds the weights that the stage would end with now (an average, say); afterwards its own.
    """

    anatomy: Anatomy
    progress: Progress
    seed: int
    key: str
    claims: tuple[Claim, ...]
    shelf: Shelf
    notes: list[str]
    start: Mapping[str, Tensor] | None = None
    folder: Path | None = None
    around: Around = field(default_factory=Around)
    validate: Callable[[], Mapping[str, Any]] = dict
    ended: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """The stage's start weights by canonical name, detached clones.

        Raises:
            RecipeError: the ingredient did not claim ``needs(Place.REFERENCE)``.
        """
        self._claimed(Place.REFERENCE)
        return self.start or {}

    @property
    def sample(self) -> Iterable[Any]:
        """Training batches; asked twice, the same ones. Take as many as are wanted (``itertools.islice``).

        Raises:
            RecipeError: the ingredient did not claim ``needs(Place.SAMPLE)``.
        """
        self._claimed(Place.SAMPLE)
        return self.around.sample

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's mean loss over a batch of ``sample``, shape (), without what ingredients make of it.

        Raises:
            RecipeError: the ingredient did not claim ``needs(Place.SAMPLE)``.
        """
        self._claimed(Place.SAMPLE)
        assert self.around.loss is not None
        return self.around.loss(model, batch)

    def score(self, model: nn.Module) -> Mapping[str, Any]:
        """The scores of ``model`` as it is now on the validation rows, by metric.

        Raises:
            RecipeError: the ingredient did not claim ``needs(Place.VALIDATION)``.
        """
        self._claimed(Place.VALIDATION)
        assert self.around.score is not None  # compose refuses where there is none
        return self.around.score(model)

    def rng(self, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator, named by recipe seed, stage, ingredient, step and ``names``; the same call gives the same numbers."""
        return generator(self.seed, self.key, self.progress.step, *names, device=device)

    def seed_of(self, *names: str | int) -> int:
        """The seed that ``rng`` would start from."""
        return derive(self.seed, self.key, self.progress.step, *names)

    def note(self, text: str) -> None:
        """Says something once in the report."""
        if text not in self.notes:
            self.notes.append(text)

    def save(self, name: str, write: Callable[[Path], Any]) -> None:
        """Gives something of the ingredient's own a folder ``name`` in the run folder; without a run folder nothing is written."""
        if self.folder is not None:
            path = self.folder / name
            path.mkdir(parents=True, exist_ok=True)
            write(path)

    def keep(self, name: str, make: Callable[[], H]) -> H:
        """A state holder: made at the first call, the same ever after, saved and restored with the run."""
        return self.shelf.keep(f"{self.key}/{name}", make)

    def _claimed(self, place: Place) -> None:
        if not any(claim.place == place for claim in self.claims):
            raise RecipeError.of(
                [Fault(self.key, f"must claim needs({place.name}) before it reads {place.value}")], "an ingredient"
            )
