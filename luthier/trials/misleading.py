"""When a look at a run before its end says little of how it will end. Read off the plan, not off ingredients' names."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core.claims import Place
from luthier.errors import Fault
from luthier.planning.plan import Plan, StagePlan
from luthier.training.stages import pause_step

_LATER = "Take a larger share, or leave the recipe out."
_ROUNDING = 1 + 1e-9


def misleads(plan: Plan, share: float, *, validation: bool = True) -> list[Fault]:
    """Why runs of ``plan`` cannot be chosen among after ``share`` of their trained steps; nothing when they can.

    Refused: a rate that has yet to rise; weights that have yet to wake (blocks that take turns, as many after the pause as before it,
    are no reason); an average that has not begun; a stage whose weights do not go on; no step after the pause; no validation rows.

    Args:
        validation: whether there are rows to look at.
    """
    found = [] if validation else [Fault("early", "needs validation rows to choose by", do="Give some.")]
    trained = [one for one in plan.stages if one.steps]
    whole = sum(one.steps for one in trained)
    left = pause_step(share, whole)
    if left >= whole:
        must = f"needs steps after the pause at {100 * share:g} %"
        return [*found, Fault("early", must, f"{whole} in all", "Train longer, or leave the recipe out.")]
    before: list[StagePlan] = []
    for here in trained:
        if left <= here.steps:
            later = trained[len(before) + 1 :]
            carried = _carried(here, last=here.index == len(plan.stages) - 1)
            return [
                *found,
                *_rising(here, left),
                *_waking(before, here, later, left),
                *_averages(here, later, left),
                *carried,
            ]
        left -= here.steps
        before.append(here)
    return found


def _rising(here: StagePlan, left: int) -> list[Fault]:
    """Whether the highest rate is still to come, or the rate rises at the pause: the warm-up of a schedule is not over."""
    if left == here.steps:
        return []
    for schedule in {group.schedule for group in here.table.groups()}:
        rates = [schedule(step / here.steps) for step in range(here.steps)]
        if max(rates[left:]) > _ROUNDING * max(rates[:left]) or rates[left] > _ROUNDING * rates[left - 1]:
            must = "must be past the rise of its rate when it pauses"
            over = 1 + max(range(here.steps), key=rates.__getitem__)
            return [_at(here, left, must, f"a rate that is highest at step {over}", _LATER)]
    return []


def _waking(before: Sequence[StagePlan], here: StagePlan, later: Sequence[StagePlan], left: int) -> list[Fault]:
    """Whether more weights learn at a time after the pause than ever before it."""
    last, now = (left - 1) / here.steps, left / here.steps
    seen = [_awake(one, edge) for one in before for edge in _edges(one)]
    seen += [_awake(here, edge) for edge in _edges(here) if edge <= last]
    coming = [_awake(one, edge) for one in later for edge in _edges(one)]
    coming += [_awake(here, edge) for edge in (now, *_edges(here)) if now <= edge < 1.0]
    if max(coming, default=0) <= max(seen):
        return []
    must = "must have all its weights awake by the pause"
    return [_at(here, left, must, f"{max(seen):,} at a time before it and {max(coming):,} after it", _LATER)]


def _averages(here: StagePlan, later: Sequence[StagePlan], left: int) -> list[Fault]:
    """Averages that the run ends with and the pause does not see: of a later stage, or of this one, where none is taken yet.

    Who owns the end weights and has a field ``start`` averages from that share on, ``every`` so many steps.
    """
    found = []
    must = "must have begun its average ({}) by the pause, which else looks at other weights"
    for one in (here, *later):
        for entry in [entry for entry in one.entries if entry.owns(Place.END_WEIGHTS)]:
            start, every = getattr(entry.ingredient, "start", 0.0), getattr(entry.ingredient, "every", 1)
            if one is not here or (left - every) / here.steps < start:
                found.append(_at(here, left, must.format(entry.name), "", _LATER))
    return found


def _carried(here: StagePlan, *, last: bool) -> list[Fault]:
    if last or here.stage.carry is None:
        return []
    going = here.table.select(here.stage.carry)
    gone = [row for row in here.table.rows if row.trainable and row.name not in going]
    if not gone:
        return []
    got = f"a stage that carries {', '.join(here.stage.carry)} only"
    must = "must pause in a stage whose weights go on, as they are what the pause looks at"
    return [Fault(f"stages[{here.index}] {here.name!r}", must, got, _LATER)]


def _at(here: StagePlan, left: int, must: str, got: str, do: str) -> Fault:
    return Fault(f"stages[{here.index}] {here.name!r}, step {left} of {here.steps}", must, got, do)


def _edges(one: StagePlan) -> tuple[float, ...]:
    """Shares of the stage at which weights may wake or rest, its beginning among them."""
    return tuple(sorted({0.0, *(edge for row in one.table.rows for rest in row.asleep for edge in rest if edge < 1.0)}))


def _awake(one: StagePlan, fraction: float) -> int:
    """How many weights learn in the step that begins at ``fraction``."""
    return sum(row.part.numel for row in one.table.rows if row.learns(fraction))
