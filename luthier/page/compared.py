"""The page of a comparison: no script, no network, opens from a mail, prints on few sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.comparison import Comparison, Setting, Versus, failures
from luthier.errors import DataError, Fault
from luthier.jsonfile import plain, write_whole
from luthier.page import Figure, costs, dots, environment, expected, forest, trusted
from luthier.page import compared_tables as tables
from luthier.page.labels import Scale, known
from luthier.page.words import split_title

LOUD = 6  # sentences on top; the others are folded
MOST_SPLITS = 4  # with pictures
MOST_OPEN = 24  # rows of a table that is not folded


@dataclass(frozen=True)
class Section:
    """What is shown of one setting."""

    setting: Setting
    about: str
    forests: tuple[Figure, ...]
    dots: tuple[Figure, ...]
    costs: tuple[Figure, ...]
    more: tuple[Figure, ...]
    variance: list[Any]
    levels: list[tables.LevelRow]
    sentences: tuple[str, ...]
    versus: list[tuple[bool, tuple[str, ...]]]
    runs: tables.Runs
    left: tuple[str, ...]


def render(comparison: Comparison) -> str:
    """The page; the same text for the same comparison."""
    scale = scale_of(comparison)
    return (
        environment()
        .get_template("compared.html.j2")
        .render(
            found=comparison,
            title=_title(comparison),
            loud=comparison.outcome[:LOUD],
            quiet=comparison.outcome[LOUD:],
            cards=tables.cards(comparison, scale),
            sections=[_section(comparison, at, scale) for at in range(len(comparison.settings))],
            scale=scale,
            heads={"levels": tables.LEVELS, "versus": tables.VERSUS, "early": tables.EARLY},
            chosen=tables.chosen(comparison.chosen, scale),
            early=tables.early(comparison.early),
            asked=_asked(comparison.asked),
            most_open=MOST_OPEN,
            level=_level(comparison),
        )
    )


def save(comparison: Comparison, folder: str | Path) -> Path:
    """Writes compare.html into ``folder``, whole or not at all.

    Raises:
        RunError: it cannot be written; what stood there is untouched.
    """
    path = Path(folder) / "compare.html"
    write_whole(path, render(comparison))
    return path


def picture(comparison: Comparison, setting: str, *, split: str = "") -> str:
    """The dots of each seed as an SVG that stands alone: in a README, a slide, a browser.

    Args:
        setting: its name.
        split: the one that the setting shows first, without.
    Raises:
        DataError: no such setting, or no run has a score there.
    """
    one = next((one for one in comparison.settings if one.name == setting), None)
    if one is None:
        names = ", ".join(one.name for one in comparison.settings)
        raise DataError.of([Fault("setting", f"must be one of {names}", setting)], "the picture of a comparison")
    split = split or one.shown
    if not dots.rows(comparison, setting, split):
        raise DataError.of([Fault("split", "must be one that was scored", split)], "the picture of a comparison")
    svg = _dots(comparison, one, split, scale_of(comparison), "picture").svg
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, Helvetica, Arial, sans-serif" class="plot"'
    begin, _, rest = svg.partition(">")
    return begin.replace('<svg class="plot"', head) + '><rect width="100%" height="100%" fill="#fff"/>' + rest


def scale_of(comparison: Comparison) -> Scale:
    unit = comparison.unit
    return Scale(
        comparison.metric, comparison.higher_is_better, str(unit["name"]), float(unit["factor"]), int(unit["digits"])
    )


def _title(comparison: Comparison) -> str:
    names = comparison.recipes
    if len(names) == 1:
        return f"{names[0]}, by seed"
    if len(names) <= 3 and sum(map(len, names)) < 60:
        return f"{', '.join(names[:-1])} and {names[-1]} compared"
    return f"{len(names)} recipes compared"


def _level(comparison: Comparison) -> str:
    alpha = comparison.asked.get("alpha")
    return f"{100 * (1 - alpha):g}\u00a0% " if known(alpha) else ""


def _asked(asked: dict[str, Any]) -> str:
    return yaml.safe_dump(plain(asked), allow_unicode=True, sort_keys=False, width=100) if asked else ""


def _section(comparison: Comparison, at: int, scale: Scale) -> Section:
    setting = comparison.settings[at]
    splits = [setting.shown, *(one for one in setting.splits if one.startswith("ood_") and one != setting.shown)]
    shown, left = splits[:MOST_SPLITS], splits[MOST_SPLITS:]
    rows = ", ".join(f"{split_title(name)} {number:,}" for name, number in setting.sizes.items())
    here = [one for one in comparison.levels if one.setting == setting.name]
    return Section(
        setting=setting,
        about=f"data {setting.data} · model {setting.model}" + (f" · rows: {rows}" if rows else ""),
        forests=_forests(comparison, setting, shown, scale, at),
        dots=tuple(
            _dots(comparison, setting, split, scale, f"s{at}-dots-{number}")
            for number, split in enumerate(shown)
            if dots.rows(comparison, setting.name, split)
        ),
        costs=_costs(comparison, setting, scale, at),
        more=_more(comparison, setting, scale, at),
        variance=tables.variance(comparison.variance.get(setting.name) or {}),
        levels=tables.levels(comparison, setting, scale),
        sentences=failures(here),
        versus=tables.versus(comparison, setting, scale),
        runs=tables.runs(comparison, setting, scale),
        left=tuple(split_title(split) for split in left),
    )


def _forests(comparison: Comparison, setting: Setting, splits: list[str], scale: Scale, at: int) -> tuple[Figure, ...]:
    every = {
        split: [one for one in comparison.versus if (one.setting, one.split) == (setting.name, split)]
        for split in splits
    }
    full = [split for split in splits if every[split]]
    order = forest.ordered(every[full[0]]) if full else []
    drawn = [forest.chosen(every[split], order) for split in full]
    ends = forest.limits([forest.reach(rows) for rows in drawn])
    found = []
    for number, (split, rows, within) in enumerate(zip(full, drawn, ends, strict=True)):
        label = f"Differences on {split_title(split)}: " + "; ".join(forest.told(row, scale) for row in rows)
        svg = forest.forest(
            rows, scale, title=split_title(split), within=within, label=label, name=f"s{at}-forest-{number}"
        )
        found.append(Figure(svg, _of_forest(split, setting, len(rows), every[split])))
    return tuple(found)


def _of_forest(split: str, setting: Setting, drawn: int, every: list[Versus]) -> str:
    claims = sum(one.claimed for one in every)
    told = f"On {split_title(split)}: {claims or 'none'} of {len(every)} can be claimed."
    if len(every) > drawn:
        told += f" Drawn are the {drawn} that say most; {len(every) - drawn} more are in the table."
    if split == setting.chosen_on:
        told += " Weights or rates were chosen on this split: its scores are optimistic."
    return told


def _dots(comparison: Comparison, setting: Setting, split: str, scale: Scale, name: str) -> Figure:
    found = dots.rows(comparison, setting.name, split)
    majority = setting.majority.get(split) if comparison.metric == "accuracy" else None
    where = split_title(split)
    label = f"{scale.title} of each run on {where}; mean " + ", ".join(
        f"{row.recipe} {scale.score(row.mean)}" for row in found
    )
    told = f"{scale.title} on {where}, a dot a seed, a bar at the mean."
    failed = sum(len(row.failed) + row.gone for row in found)
    if failed:
        told += f" Crosses: {failed} failed."
        told += " Those at the left edge ended without a score." if any(row.gone for row in found) else ""
    if known(majority) and not dots.near(found, majority):
        told += f" Always giving the most frequent class would score {scale.score(majority)}, off this axis."
    if split == setting.chosen_on:
        told += " Weights or rates were chosen on this split: its scores are optimistic."
    return Figure(dots.dots(found, scale, majority=majority, title=where, label=label, name=name), _capital(told))


def _costs(comparison: Comparison, setting: Setting, scale: Scale, at: int) -> tuple[Figure, ...]:
    found = []
    for number, one in enumerate(costs.costs(comparison, setting)):
        told = f"{_capital(scale.title)} on {split_title(setting.shown)} against {one.name}, means over runs"
        told += "; bars: one standard deviation." if any(point.sd is not None for point in one.points) else "."
        found.append(Figure(costs.cost(one, scale, label=told, name=f"s{at}-cost-{number}"), told))
    return tuple(found)


def _more(comparison: Comparison, setting: Setting, scale: Scale, at: int) -> tuple[Figure, ...]:
    found = []
    curves = expected.usable(comparison.best_of.get(setting.name) or {})
    if curves:
        few = len(curves) <= expected.MOST_BANDS
        bands = "The band is" if len(curves) == 1 else "The bands are" if few else "The bands of the best three are"
        told = f"Expected best validation {scale.title} of n runs. {bands} one standard deviation either way, from one"
        told += " set of n runs to the next; no error of the mean."
        if len(curves) > expected.MOST_LINES:
            told += f" Pale lines: {len(curves) - expected.MOST_LINES} more recipes."
        svg = expected.expected(comparison.best_of[setting.name], scale, label=told, name=f"s{at}-expected")
        found.append(Figure(svg, told))
    trust = {
        name: told for name, told in (comparison.reliability.get(setting.name) or {}).items() if any(told.values())
    }
    if trust:
        told = f"Confidence against accuracy on {split_title(setting.shown)}, all seeds together."
        told += " Below the dashed line: over-confident. ECE: the mean gap between the two."
        found.append(Figure(trusted.trusted(trust, label=told, name=f"s{at}-trusted"), told))
    return tuple(found)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
