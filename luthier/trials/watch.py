"""Watching a comparison: how many runs are done, a live table of them, when it will be over. All read from the folder."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from luthier.report import flat
from luthier.trials.design import Design, Trial
from luthier.trials.desk import Desk
from luthier.trials.early import stopped, turns
from luthier.trials.searched import progress, waiting
from luthier.units import duration

MOST_COLUMNS = 8  # of seeds in the live table
MOST_LETTERS = 160  # of why a run failed


@dataclass
class Watch:
    """What is known of a comparison's runs; asks the folder only for what can have changed.

    Args:
        workers: how many runs are under way at a time.
    """

    desk: Desk
    design: Design
    workers: int = 1
    _ended: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _searched: dict[str, str] = field(default_factory=dict)

    def news(self) -> Iterator[str]:
        """A line for each run that has ended since the last look."""
        trials, gone = self.design.trials(), stopped(self.desk, self.design)
        held = waiting(self.desk, self.design)
        for trial in trials:
            if trial.name in self._ended or (trial.setting, trial.recipe) in held:
                continue
            state = self.desk.state(trial)
            if state == "done":
                report = self.desk.report(trial)
                self._ended[trial.name] = _score(report)
                self._seconds.setdefault(trial.recipe, []).append(report["seconds"])
                told = f"{report['metric']} {_score(report)} on {_shown(report)}, {duration(report['seconds'])}"
            elif state == "failed":
                self._ended[trial.name] = "failed"
                last = str(self.desk.failure(trial)).strip().splitlines()[-1]
                told = f"failed: {textwrap.shorten(last, MOST_LETTERS, placeholder=' ...')}"
            elif trial in gone:
                self._ended[trial.name] = "stopped"
                told = "stopped early"
            else:
                continue
            yield f"{len(self._ended)}/{len(trials)} {trial.name}: {told}{self._left()}"

    def until(self, over: Callable[[], bool], *, every: float = 0.3) -> Iterator[str]:
        """The news until ``over()`` is true, and what is left of them then."""
        while not over():
            yield from self.searched()
            yield from self.news()
            time.sleep(every)
        yield from self.searched()
        yield from self.news()

    def searched(self) -> Iterator[str]:
        """A line for each search that has got further since the last look."""
        for name, line in progress(self.desk, self.design).items():
            if self._searched.get(name) != line:
                self._searched[name] = line
                yield line

    @property
    def over(self) -> bool:
        """Whether all runs had ended at the last look."""
        return all(trial.name in self._ended for trial in self.design.trials())

    def seconds_left(self) -> float | None:
        """About how long it will take; None before a run has ended."""
        known = [each for every in self._seconds.values() for each in every]
        if not known:
            return None
        total = 0.0
        for trial, share in turns(self.desk, self.design):
            usual = statistics.fmean(self._seconds.get(trial.recipe) or known)
            total += usual * max(0.0, (share or 1.0) - self.desk.progress(trial))
        return total / max(1, self.workers)

    def table(self) -> Any:
        """The runs as a table of rich: a row a recipe, a column a seed; with many seeds how many runs are how far."""
        from rich.table import Table

        seeds = [_seed(trial.seeds) for trial in self.design.trials()]
        many = len(set(seeds)) > MOST_COLUMNS
        columns = ["done", "failed", "running", "open"] if many else list(dict.fromkeys(seeds))
        table = Table(
            box=None,
            pad_edge=False,
            title=f"{len(self._ended)} of {len(seeds)} runs{self._left()}",
            title_justify="left",
            caption="\n".join(self._searched.values()) or None,
            caption_justify="left",
        )
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for trial in self.design.trials():
            row = rows.setdefault((trial.setting, trial.recipe), dict.fromkeys(columns, "0") if many else {})
            if many:
                state = self._ended.get(trial.name) or self.desk.state(trial)
                column = state if state in columns else "done"
                row[column] = str(int(row[column]) + 1)
            else:
                row[_seed(trial.seeds)] = self._cell(trial)
        several = len(self.design.settings) > 1
        for (setting, recipe), cells in rows.items():
            table.add_row(f"{setting} {recipe}" if several else recipe, *(cells.get(column, "") for column in columns))
        return table

    def _cell(self, trial: Trial) -> str:
        if trial.name in self._ended:
            return self._ended[trial.name]
        return f"{100 * self.desk.progress(trial):.0f}%" if self.desk.state(trial) == "running" else "."

    def _left(self) -> str:
        left = self.seconds_left()
        return f"; about {duration(left)} left" if left else ""


def _seed(seeds: tuple[tuple[str, int], ...]) -> str:
    return " ".join(f"{name} {number}" for name, number in seeds)


def _shown(report: dict[str, Any]) -> str:
    return next((name for name in ("test", "validation") if name in report["metrics"]), "nothing")


def _score(report: dict[str, Any]) -> str:
    scores = flat(report["metrics"]).get(_shown(report), {})
    value = scores.get(report["metric"])
    return "-" if value is None else f"{value:.4f}"
