"""Settings of a recipe found by search: one search a setting and recipe, with the same budget for each (Dodge et al. 2019).

``search/NAME/N.json`` is what was asked for and what came of it, written before its run starts; ``search/NAME.log`` is Optuna's journal,
``search/NAME.json`` the winner. A search's runs are run folders like others, ``runs/NAME-searchN``. All have the one seed ``SEED``, so
that settings differ and luck does not; none of them is a run of the comparison. Only validation rows choose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.core.scores import HIGHER_IS_BETTER
from luthier.jsonfile import write_whole
from luthier.stock import alone
from luthier.trials import budget, proposals
from luthier.trials.design import Design, Trial
from luthier.trials.desk import Desk
from luthier.trials.spaces import parse

SEED = 10_000

Do = Callable[[Trial, Design], None]  # does a run, or writes down why it failed


def with_values(design: Design, setting: str, recipe: str, values: dict[str, Any] | None) -> Design:
    """The design with ``values`` by path in one recipe; None makes its runs fail: there are none."""
    return replace(design, chosen={**design.chosen, setting: {**design.chosen.get(setting, {}), recipe: values}})


@dataclass(frozen=True)
class Search:
    """The search for one recipe's settings on one data set and model."""

    desk: Desk
    design: Design
    setting: str
    recipe: str

    @property
    def name(self) -> str:
        """Of its files."""
        return self.design.filed(self.setting, self.recipe)

    @property
    def budget(self) -> dict[str, Any]:
        """``{"runs": 20}`` or ``{"minutes": 30.0}``."""
        return dict(self.design.more["search"]["budget"])

    @property
    def space(self) -> dict[str, str]:
        """Where it looks, by path, as it was written."""
        return dict(self.design.more["search"]["spaces"][self.recipe])

    @property
    def winner(self) -> dict[str, Any] | None:
        """What was found; None while it has not ended for the first time."""
        file = self._file(".json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def over(self) -> bool:
        """Whether the budget is spent and the winner known."""
        return (self.winner or {}).get("budget") == self.budget

    def trial(self, number: int) -> Trial:
        """The run of one trial."""
        named = self.design.trial(self.setting, self.recipe, {"search": number})
        return replace(named, seeds=(("seed", SEED),))

    def told(self) -> list[dict[str, Any]]:
        """What was asked for, in this order: number, optuna, values; of those that have ended also score (None = failed) and seconds."""
        files = sorted(self._file("").glob("*.json"), key=lambda file: int(file.stem))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def step(self, do: Do) -> bool:
        """Does one run that no one has; False when there is none now: the search is over, or others have what is left of it."""
        with ExitStack() as held:
            with self._alone():
                self._settle()
                one = None if self.over else self._taken(held)
            if one is None:
                return False
            do(self.trial(one["number"]), with_values(self.design, self.setting, self.recipe, one["values"]))
            with self._alone():
                self._settle()
        return True

    def _taken(self, held: ExitStack) -> dict[str, Any] | None:
        """A run that is now this process': one that was asked for and let go of, or a new one. None left: the winner is written."""
        told = self.told()
        left = [one for one in told if "score" not in one]
        for one in left:
            if self._claimed(one["number"], held):
                return one
        spaces = {path: parse(space) for path, space in self.space.items()}
        if len(told) < proposals.combinations(spaces) and not budget.spent(self.budget, told):
            number, values = proposals.ask(self._file(".log"), self.name, spaces, told)
            new = {"number": len(told), "optuna": number, "values": values}
            self._keep(new)
            return new if self._claimed(len(told), held) else None
        if not left:
            self._conclude(told)
        return None

    def _claimed(self, number: int, held: ExitStack) -> bool:
        with ExitStack() as trying:
            mine = trying.enter_context(self.desk.claimed(self.trial(number)))
            if mine:
                held.enter_context(trying.pop_all())
        return mine

    def again(self) -> None:
        """Starts are counted anew; where every trial failed, all are tried again."""
        with self._alone():
            hopeless = self.over and (self.winner or {})["values"] is None
            for one in self.told():
                trial = self.trial(one["number"])
                if hopeless:
                    self._keep({name: one[name] for name in ("number", "optuna", "values")})
                if hopeless or ("score" not in one and self.desk.failure(trial) is None):
                    self.desk.forgive(trial)
            if hopeless:
                self._file(".json").unlink()

    def _settle(self) -> None:
        """Tells what came of the runs that have ended: to Optuna, then to the trial's file."""
        for one in self.told():
            trial = self.trial(one["number"])
            why = self.desk.failure(trial)
            if "score" in one or not (self.desk.done(trial) or why is not None):
                continue
            report = self.desk.report(trial) if self.desk.done(trial) else {}
            metric = self.design.metric or str(report.get("metric"))
            score = report.get("metrics", {}).get("validation", {}).get(metric)
            if score is None or not math.isfinite(score):
                score, better = None, None
            else:
                better = score if HIGHER_IS_BETTER[metric] else -score
            proposals.tell(self._file(".log"), self.name, one["optuna"], better)
            took = report.get("seconds") or self.desk.lost(trial)
            self._keep({**one, "score": score, "metric": metric, "seconds": took})

    def _conclude(self, told: list[dict[str, Any]]) -> None:
        """Writes the winner: the best on validation, of equal ones the earliest. First runs with other settings are put aside, as are
        those that were made before there was a winner.
        """
        scored = [one for one in told if one["score"] is not None]
        sign = 1 if scored and HIGHER_IS_BETTER[scored[0]["metric"]] else -1
        best = max(scored, key=lambda one: (sign * one["score"], -one["number"]), default=None)
        before = self.winner
        won = best or dict.fromkeys(("number", "values", "metric", "score"))
        found = {
            "tried": len(told),
            "failed": len(told) - len(scored),
            "budget": self.budget,
            "space": self.space,
            "trial": won["number"],
            "values": won["values"],
            "metric": won["metric"],
            "validation": won["score"],
            "seconds": sum(one["seconds"] for one in told),
            "trials": [{name: one[name] for name in ("values", "score", "seconds")} for one in told],
        }
        if before is None or before["values"] != found["values"]:
            named = "unsearched" if before is None else f"search{before['trial']}"
            for trial in self.design.trials():
                if (trial.setting, trial.recipe) == (self.setting, self.recipe):
                    self._aside(trial, named)
        write_whole(self._file(".json"), json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def _aside(self, trial: Trial, named: str) -> None:
        run, at = self.desk.run(trial), 0
        while (to := self.desk.path / "earlier" / f"{trial.name}-{named}{f'-{at}' if at else ''}").exists():
            at += 1
        if run.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            run.rename(to)
        self.desk.forgive(trial)

    def _keep(self, one: dict[str, Any]) -> None:
        text = json.dumps(one, indent=1, ensure_ascii=False) + "\n"
        write_whole(self._file("") / f"{one['number']}.json", text)

    def _file(self, ending: str) -> Path:
        return self.desk.path / "search" / f"{self.name}{ending}"

    def _alone(self) -> AbstractContextManager[None]:
        return alone(self._file(".lock"))
