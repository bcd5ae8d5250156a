"""What is compared: recipes x seeds x settings, as a frozen value in design.json. Nothing here knows whether a run was made yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from luthier.call import Call
from luthier.errors import Fault, LuthierError
from luthier.jsonfile import read_as, write_whole
from luthier.recipe.recipe import Recipe
from luthier.recipe.text import build, read
from luthier.trials import spaces

NAME = "design.json"
SCHEMA = 2  # 1: settings had no folder
VARIED = ("head", "order", "dropout")  # streams that can be varied apart


@dataclass(frozen=True)
class Asked:
    """One setting: a model and data.

    Args:
        name: that tables have for it.
        call: its model and data.
        folder: in which its runs lie; empty for the one that a comparison began with alone.
    """

    name: str
    call: Call
    folder: str = ""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        setting, recipe: names.
        seeds: ``{"seed": 3}``, or the streams that vary apart, such as ``{"head": 0, "order": 2}``.
        name: of its folder.
    """

    setting: str
    recipe: str
    seeds: tuple[tuple[str, int], ...]
    name: str


@dataclass(frozen=True)
class Design:
    """Everything that a comparison's runs follow from.

    Args:
        recipes: by name, every default filled in.
        settings: at least one.
        seeds: of every recipe in every setting.
        metric: what is compared; None = the task's own.
        against: the recipe that the others are compared with; None compares all with all.
        more: what a search or an early stop adds; see their files.
        weights: whether runs that have ended keep their weights.
        chosen: by setting, by recipe, values by path that go before the recipe's own (None: a search found none); not saved.
    """

    recipes: dict[str, Any]
    settings: tuple[Asked, ...]
    seeds: tuple[dict[str, int], ...]
    metric: str | None = None
    against: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    weights: bool = True
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def trials(self) -> tuple[Trial, ...]:
        """All runs, seed by seed, so that a comparison that was stopped has seen every recipe about equally often."""
        return tuple(
            self.trial(asked.name, recipe, seeds)
            for seeds, asked, recipe in product(self.seeds, self.settings, self.recipes)
        )

    def trial(self, setting: str, recipe: str, seeds: Mapping[str, int]) -> Trial:
        """The run of ``recipe`` in ``setting`` with ``seeds``."""
        which = "-".join(f"{stream}{number}" for stream, number in seeds.items())
        return Trial(setting, recipe, tuple(seeds.items()), f"{self.filed(setting, recipe)}-{which}")

    def filed(self, setting: str, recipe: str) -> str:
        """What names of files begin with that belong to ``recipe`` in ``setting``."""
        folder = self.asked(setting).folder
        return f"{folder}/{recipe}" if folder else recipe

    def asked(self, setting: str) -> Asked:
        """The setting of that name."""
        return next(asked for asked in self.settings if asked.name == setting)

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of ``trial``, with its seeds.

        Raises:
            LuthierError: there are no values for it, or it refuses them.
        """
        plain = self.recipes[trial.recipe]
        seeds = seeded(trial.seeds)
        if plain.get("seeds"):  # that of the split, which the comparison leaves alone
            seeds["seeds"] = {**plain["seeds"], **seeds.get("seeds", {})}
        made = build({**plain, **seeds}, inside=trial.recipe)
        values = self.chosen.get(trial.setting, {}).get(trial.recipe, {})
        if values is None:
            raise LuthierError(f"{trial.recipe}: none of the settings that its search tried ended well.")
        return read(made, sets=spaces.changes(values)) if values else made

    def call(self, trial: Trial) -> Call:
        """The model and data of ``trial``."""
        return self.asked(trial.setting).call

    def save(self, folder: Path) -> None:
        """Writes design.json into ``folder``, whole or not at all."""
        told = {"schema": SCHEMA, **asdict(replace(self, chosen={}))}
        write_whole(folder / NAME, json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Design:
        """The design of the comparison in ``folder``.

        Raises:
            LuthierError: there is none, or it cannot be read.
        """
        file = folder / NAME
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            fault = Fault(str(file), "must be there", do="Give the folder of a comparison.")
            raise LuthierError.of([fault], "the comparison") from None
        except (OSError, ValueError) as error:
            raise LuthierError.of([Fault(str(file), "must be JSON", str(error))], "the comparison") from None
        if not isinstance(told, dict) or told.pop("schema", None) != SCHEMA:
            raise LuthierError.of([Fault(str(file), f"must have schema {SCHEMA}")], "the comparison")
        return read_as(cls, told, inside=str(file))

    def grown(self, before: Design) -> Design:
        """This design with the recipes, seeds and settings that ``before`` has beyond it, so that no run that was made is lost.

        Settings can be added where there were several, or where the one that was there is asked for too: another one alone is more
        likely a slip. Streams that vary have a full grid over all their numbers.

        Raises:
            LuthierError: a recipe of the same name means another run, model and data are others, or the metric is another one than runs
                were chosen by; every one is named.
        """
        faults = [
            Fault(
                name, "must be the recipe it was when this comparison began", do="Give it another name, as NAME=RECIPE."
            )
            for name, plain in self.recipes.items()
            if name in before.recipes and _meant(before.recipes[name]) != _meant(plain)
        ]
        faults += [
            Fault(
                what,
                "must be what it was when this comparison began",
                _told(now),
                f"It was {_told(then)}; choose another --out.",
            )
            for what, now, then in (
                *((key, self.more.get(key), before.more.get(key)) for key in ({*self.more, *before.more} - {"search"})),
            )
            if now != then
        ]
        if before.more and self.metric != before.metric:
            now, then = (one.metric or "the task's own" for one in (self, before))
            must = "must be what it was when this comparison began, as runs were chosen by it"
            faults.append(Fault("--metric", must, now, f"It was {then}; choose another --out."))
        calls = [asked.call for asked in before.settings]
        new = tuple(replace(asked, folder=asked.name) for asked in self.settings if asked.call not in calls)
        slip = len(calls) == 1 and len(new) == len(self.settings)
        if slip or {asked.name for asked in new} & {asked.name for asked in before.settings}:
            do = f"It was {_told(before.settings)}; choose another --out."
            faults.append(
                Fault("data and model", "must be what it was when this comparison began", _told(self.settings), do)
            )
        shared = [name for name in self.recipes if name in before.recipes]
        search = spaces.grown(self.more.get("search"), before.more.get("search"), shared)
        if search is None:
            must = "must be what it was when this comparison began; --budget may grow, in the same unit"
            faults.append(Fault("--search", must, do="Choose another --out."))
        if set(map(frozenset, self.seeds)) != set(map(frozenset, before.seeds)):  # the streams that vary
            faults.append(Fault("--vary", "must be what it was when this comparison began", do="Choose another --out."))
        if faults:
            raise LuthierError.of(faults, "the comparison that is there")
        numbers = dict.fromkeys(number for one in (*before.seeds, *self.seeds) for number in one.values())
        grid = spread(list(numbers), [stream for stream in before.seeds[0] if stream != "seed"])
        seeds = (*before.seeds, *(one for one in grid if one not in before.seeds))
        more = {**self.more, **({"search": search} if search else {})}
        recipes = {**before.recipes, **self.recipes}
        return replace(self, recipes=recipes, settings=(*before.settings, *new), seeds=seeds, more=more)


def _meant(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what it says about itself."""
    return {name: value for name, value in recipe.items() if name != "description"}


def seeded(seeds: Sequence[tuple[str, int]] | Mapping[str, int]) -> dict[str, Any]:
    """The fields of a recipe that ``seeds`` set.

    >>> seeded({"seed": 3}), seeded({"head": 0, "order": 1})
    ({'seed': 3}, {'seed': 0, 'seeds': {'head': 0, 'order': 1}})
    """
    told = dict(seeds)
    return {"seed": told["seed"]} if "seed" in told else {"seed": 0, "seeds": told}


def spread(seeds: int | Sequence[int], vary: Sequence[str]) -> tuple[dict[str, int], ...]:
    """The seeds of a comparison: one number for everything, or a full grid over the streams in ``vary``.

    >>> spread(2, ()), spread([0, 5], ["head", "order"])[:3]
    (({'seed': 0}, {'seed': 1}), ({'head': 0, 'order': 0}, {'head': 0, 'order': 5}, {'head': 5, 'order': 0}))

    Raises:
        LuthierError: no seeds, one twice, or a stream that is none.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    faults = [Fault("--vary", f"must be of {', '.join(VARIED)}", name) for name in vary if name not in VARIED]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        faults.append(Fault("--seeds", "must be a number of seeds, or different seeds from 0 on", str(seeds)))
    if len(set(vary)) < len(vary):
        faults.append(Fault("--vary", "must name each stream once", ", ".join(vary)))
    if faults:
        raise LuthierError.of(faults, "the seeds")
    if not vary:
        return tuple({"seed": number} for number in numbers)
    return tuple(dict(zip(vary, cell, strict=True)) for cell in product(numbers, repeat=len(vary)))


def independent(seeds: Sequence[tuple[str, int]]) -> bool:
    """Whether all streams have the same number: of a grid the diagonal, no two of whose runs share a head's start or an order.

    >>> independent((("seed", 3),)), independent((("head", 3), ("order", 3))), independent((("head", 3), ("order", 0)))
    (True, True, False)
    """
    return len({number for _, number in seeds}) == 1


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(one.name for one in value)
    return json.dumps(value) if value else "nothing"
