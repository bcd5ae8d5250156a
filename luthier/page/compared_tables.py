"""The tables of the page of a comparison, as rows that a template only has to print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.comparison import Comparison, Level, Setting, TrialRow, Versus
from luthier.jsonfile import plain
from luthier.page.labels import Scale, chance, known
from luthier.page.words import Card, split_title
from luthier.svg import tidy
from luthier.units import count, duration, size

STATES = {"done": "done", "failed": "✕ failed", "stopped": "◼ stopped early", "open": "○ open"}


def cards(comparison: Comparison, scale: Scale) -> list[Card]:
    """Recipes, seeds, settings, runs and the metric."""
    trials, better = comparison.trials, "more is better" if scale.higher else "less is better"
    states = {state: sum(one.state == state for one in trials) for state in STATES}
    others = [f"{number} {state}" for state, number in states.items() if number and state != "done"]
    data = {one.data for one in comparison.settings}
    models = {one.model for one in comparison.settings}
    apart = f"differences in {scale.name}" if scale.name else ""
    return [
        Card("recipes", str(len(comparison.recipes))),
        Card(*_seeds(trials)),
        Card(
            "settings", str(len(comparison.settings)), f"{_many(len(data), 'data set')} × {_many(len(models), 'model')}"
        ),
        Card("runs done", f"{states['done']} of {len(trials)}", ", ".join(others) or "none failed, none open"),
        Card("metric", scale.title, ", ".join(one for one in (better, apart) if one)),
    ]


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _seeds(trials: tuple[TrialRow, ...]) -> tuple[str, str, str]:
    drawn = sorted({tuple(sorted(one.seeds.items())) for one in trials})
    streams = {
        name: sorted({dict(one)[name] for one in drawn if name in dict(one)}) for one in drawn for name, _ in one
    }
    told = " × ".join(f"{len(values)} {name}" for name, values in streams.items()) if len(streams) > 1 else ""
    if len(streams) == 1:
        (values,) = streams.values()
        told = f"{values[0]} to {values[-1]}" if len(values) > 1 else f"number {values[0]}"
    return "seeds", str(len(drawn)), told


def seeds(of: Mapping[str, int]) -> str:
    """
    >>> seeds({"seed": 3}), seeds({"head": 0, "order": 2})
    ('3', 'head 0, order 2')
    """
    return ", ".join(str(value) if name == "seed" else f"{name} {value}" for name, value in of.items())


@dataclass(frozen=True)
class LevelRow:
    """A recipe on one split, as text; ``first`` of its split, with the rows of the split it stands for."""

    split: str
    first: bool
    rows: int
    cells: tuple[str, ...]
    best: bool


LEVELS = ("recipe", "mean", "sd", "worst", "best", "seeds", "failed")


def levels(comparison: Comparison, setting: Setting, scale: Scale) -> list[LevelRow]:
    """By split, then recipe; the best mean of a split is marked."""
    found = []
    place = {recipe: at for at, recipe in enumerate(comparison.recipes)}
    for split in setting.splits:
        here = [one for one in comparison.levels if (one.setting, one.split) == (setting.name, split)]
        here.sort(key=lambda one: place.get(one.recipe, len(place)))
        means = [one.mean for one in here if known(one.mean)]
        top = (max(means) if scale.higher else min(means)) if len(set(means)) > 1 else None
        star = " *" if split == setting.chosen_on else ""
        for at, one in enumerate(here):
            found.append(LevelRow(split_title(split) + star, not at, len(here), _level(one, scale), one.mean == top))
    return found


def _level(one: Level, scale: Scale) -> tuple[str, ...]:
    told = (scale.score(value) for value in (one.mean, one.sd, one.worst, one.best))
    return (one.recipe, *told, str(one.seeds), str(len(one.failed)) if one.failed else "–")


VERSUS = ("split", "difference", "value", "interval", "p", "p (Holm)", "smallest detectable", "seeds needed")


def versus(comparison: Comparison, setting: Setting, scale: Scale) -> list[tuple[bool, tuple[str, ...]]]:
    """(whether it is claimed, cells), in the order of the splits, claims first."""
    place = {split: at for at, split in enumerate(setting.splits)}
    here = [one for one in comparison.versus if one.setting == setting.name]
    here.sort(key=lambda one: (place.get(one.split, len(place)), not one.claimed, one.p_adjusted, -abs(one.value)))
    return [(one.claimed, _versus(one, scale)) for one in here]


def _versus(one: Versus, scale: Scale) -> tuple[str, ...]:
    return (
        split_title(one.split),
        f"{one.one} {'−' if scale.higher else 'over'} {one.other}",
        scale.gap(one.value),
        f"{scale.score(one.low)} to {scale.score(one.high)}",
        chance(one.p),
        chance(one.p_adjusted),
        "none" if one.detectable is None else scale.score(one.detectable),
        "no number would do" if one.seeds_needed is None else f"{one.seeds_needed:,}",
    )


@dataclass(frozen=True)
class Runs:
    """Every run of a setting: heads of the columns, rows of cells, and why a run failed."""

    heads: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], str], ...]


def runs(comparison: Comparison, setting: Setting, scale: Scale) -> Runs:
    """Each run with its scores, what it took, and its state; of a traceback its last line."""
    found = []
    for one in comparison.trials:
        if one.setting == setting.name:
            scores = (scale.score(one.scores.get(split, {}).get(comparison.metric)) for split in setting.splits)
            took = (
                duration(one.seconds) if one.seconds else "–",
                size(one.peak_bytes) if one.peak_bytes else "–",
                count(one.trainable) if one.trainable else "–",
            )
            cells = (one.recipe, seeds(one.seeds), STATES.get(one.state, one.state), *scores, *took)
            found.append((cells, (one.why.strip().splitlines() or [""])[-1]))
    heads = ("recipe", "seed", "state", *map(split_title, setting.splits), "training", "peak memory", "weights")
    return Runs(heads, tuple(found))


def variance(told: Mapping[str, Any]) -> list[tuple[str, str, tuple[float | None, ...], tuple[str, ...]]]:
    """(recipe, heads x orders, shares of heads, orders, residual in [0, 1], p of the two), as ``statistics.variance`` parts it."""
    found = []
    for recipe, one in told.items():
        parts = one.get("shares") or one.get("squares") or one
        values = [parts.get(name) for name in ("head", "order", "residual")]
        whole = sum(value for value in values if known(value))
        shares = tuple(value / whole if known(value) and whole > 0 else None for value in values)
        grid = f"{one['heads']} × {one['orders']}" if "heads" in one and "orders" in one else "–"
        found.append((recipe, grid, shares, tuple(chance(p) for p in one.get("p") or (None, None))))
    return found


def chosen(told: Mapping[str, Any], scale: Scale) -> list[tuple[str, str, str]]:
    """(recipe, how its settings were found, where they were looked for)."""
    found = []
    for recipe, one in told.items():
        values = one.get("values") or {}
        named = ", ".join(f"{name}={short_value(value)}" for name, value in values.items()) or "the settings as written"
        score = f", validation {scale.score(one['validation'])}" if known(one.get("validation")) else ""
        found.append(
            (recipe, f"chosen from {one.get('tried', '–')} trials: {named}{score}", flat(one.get("space") or ""))
        )
    return found


def short_value(value: Any) -> str:
    """
    >>> short_value(3.2e-05), short_value("cosine"), short_value(16)
    ('3.2e-5', 'cosine', '16')
    """
    return tidy(value) if isinstance(value, float) else flat(value)


def flat(value: Any) -> str:
    """A value as one line of text."""
    if isinstance(value, str | int | float) or value is None:
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(map(str, value))
    return json.dumps(plain(value), ensure_ascii=False).replace('"', "").strip("{}")


EARLY = ("recipe", "started", "paused at", "went on", "steps taken", "of all", "spared", "as full runs")


def early(told: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What starting many and stopping most cost, a row a recipe, in the columns of ``EARLY``."""
    return [
        (
            recipe,
            flat(one.get("started")),
            percent(one.get("share")),
            flat(one.get("kept")),
            _steps(one.get("steps_taken")),
            _steps(one.get("steps_full")),
            percent(one.get("saved")),
            f"{one['runs_equivalent']:.1f}" if known(one.get("runs_equivalent")) else "–",
        )
        for recipe, one in told.items()
    ]


def percent(share: Any) -> str:
    """
    >>> percent(0.25), percent(None)
    ('25\\xa0%', '–')
    """
    return f"{100 * share:.0f}\u00a0%" if known(share) else "–"


def _steps(value: Any) -> str:
    return f"{value:,}" if known(value) else "–"
