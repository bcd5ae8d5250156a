"""What a search tries next: Optuna's part of it, one journal a search. Whoever calls holds the search's lock."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from luthier.core.seeds import derive
from luthier.errors import MissingExtra
from luthier.trials.spaces import Space

FIRST = 10  # settings drawn at random before the tree-structured Parzen estimator (Bergstra et al. 2011) has enough to go by
MOST = 10_000  # combinations up to which none is tried twice


def needed() -> None:
    """
    Raises:
        MissingExtra: Optuna is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingExtra('A search needs optuna.  pip install "luthier[search]"') from error


def combinations(spaces: Mapping[str, Space]) -> float:
    """How many different settings there are; infinity where there is no end of them, or no use in counting.

    >>> combinations({"a": Space("one", choices=(1, 2)), "b": Space("int", 1, 3)}), combinations({"a": Space("float", 0, 1)})
    (6, inf)
    """
    many = math.prod(math.inf if space.every is None else len(space.every) for space in spaces.values())
    return many if many <= MOST else math.inf


def ask(
    log: Path, name: str, spaces: Mapping[str, Space], earlier: Sequence[Mapping[str, Any]]
) -> tuple[int, dict[str, Any]]:
    """Optuna's number of a new trial, and the values to try.

    The draw follows from ``name``, how many were asked for, and the scores so far; not from the process that asks.

    Args:
        earlier: trials that were asked for: ``{"optuna": number, "values": by path}``.
    """
    import optuna

    with _quiet():
        study = _study(log, name, len(earlier))
        kept = {one["optuna"] for one in earlier}
        for lost in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if lost.number not in kept:  # whoever asked for it was killed before it was written down
                study.tell(lost.number, state=optuna.trial.TrialState.FAIL)
        among = {path: _distribution(space) for path, space in spaces.items()}
        trial = study.ask(among)
        tried = [one["values"] for one in earlier]
        values = {path: _value(space, trial.params[path]) for path, space in spaces.items()}
        if values in tried and combinations(spaces) < math.inf:  # one seed: the same run again
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            every = product(*(space.every or () for space in spaces.values()))
            values = next(new for one in every if (new := dict(zip(spaces, one, strict=True))) not in tried)
            study.enqueue_trial({path: _param(space, values[path]) for path, space in spaces.items()})
            trial = study.ask(among)
        return trial.number, values


def tell(log: Path, name: str, number: int, score: float | None) -> None:
    """What came of a trial; telling it twice does nothing.

    Args:
        score: larger is better; None = it failed.
    """
    import optuna

    with _quiet():
        state = optuna.trial.TrialState.FAIL if score is None else None
        _study(log, name, 0).tell(number, score, state=state, skip_if_finished=True)


def _study(log: Path, name: str, asked: int) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    _mend(log)
    lock: Any = _Held()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(log), lock_obj=lock))
    # with several workers what is under way counts as bad, so that they do not try the same
    sampler = optuna.samplers.TPESampler(
        seed=derive(0, "search", name, asked) % 2**32, n_startup_trials=FIRST, constant_liar=True
    )
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", sampler=sampler, load_if_exists=True
    )


def _distribution(space: Space) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.kind == "one":
        return CategoricalDistribution([_param(space, choice) for choice in space.choices])
    if space.kind == "int":
        least, most = space.ends
        return IntDistribution(least, most, step=space.step)
    return FloatDistribution(space.low, space.high, log=space.kind == "log")


def _param(space: Space, value: Any) -> Any:
    return json.dumps(value) if space.kind == "one" else value


def _value(space: Space, param: Any) -> Any:
    return json.loads(param) if space.kind == "one" else param


class _Held:
    """A lock that is held already: the search's own, which the kernel takes from a process that dies."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _mend(log: Path) -> None:
    """Takes away a last line that was not written to its end."""
    if log.is_file():
        with log.open("rb+") as file:
            whole = file.read().rpartition(b"\n")
            if whole[2]:
                file.truncate(len(whole[0]) + len(whole[1]))
                os.fsync(file.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
