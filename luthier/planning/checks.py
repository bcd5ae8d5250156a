"""What cannot be right in a stage though each value is: an ingredient that would do nothing, a stage that would not learn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from luthier.core.anatomy import WORDS, Anatomy
from luthier.core.claims import Place
from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError
from luthier.planning.plan import Entry
from luthier.recipe.recipe import Stage

KINDS = ("norms", "biases")  # words for what a recipe may be about, so that a model without is no model for it


def selected(where: Sequence[str], anatomy: Anatomy) -> frozenset[str]:
    """The live names that any of ``where`` stands for; of a selector that cannot be, none."""
    found: frozenset[str] = frozenset()
    for selector in where:
        with suppress(RecipeError):  # a number that cannot be: its ingredient tells
            found |= anatomy.select(selector)
    return found


def idle(entries: Sequence[Entry], before: Anatomy, after: Anatomy, label: str) -> list[Fault]:
    """An ingredient that names weights and matches none would do nothing, silently."""
    faults: list[Fault] = []
    for entry in entries:
        for selector in dict.fromkeys(at for claim in entry.claims if claim.how != "voids" for at in claim.where):
            if (
                selector in WORDS
                and selector not in KINDS
                and any(selected(claim.where, after) for claim in entry.claims if selector in claim.where)
            ):
                continue  # a model may have no bridge; a word is no slip of the pen
            try:
                found = any(anatomy.select(selector) for anatomy in (after, before))
            except RecipeError as error:
                faults.extend(
                    Fault(f"{label} {entry.name} {one.where}", one.must, one.got, one.do) for one in error.faults
                )
                continue
            if not found:
                some = ", ".join(part.canonical for part in after.parts[:3])
                do = f"The model has no {selector}." if selector in KINDS else f"Weights are named like {some}."
                faults.append(Fault(f"{label} {entry.name}", f"matches no weight with {selector!r}", do=do))
    return faults


def on_frozen(entries: Sequence[Entry], before: Anatomy, table: ParamTable, label: str) -> list[Fault]:
    """An ingredient that edits gradients of frozen weights alone would do nothing, silently; of no weight is told by ``idle``."""
    trainable = {row.name for row in table.rows if row.trainable}
    faults: list[Fault] = []
    for entry in entries:
        wheres = {
            claim.where for claim in entry.claims if claim.place == Place.GRADIENT and claim.how in ("owns", "wraps")
        }
        for where in wheres:
            chosen = selected(where, table.anatomy)
            if where != ("all",) and (chosen or selected(where, before)) and not chosen & trainable:
                must = "must edit weights that learn in this stage"
                faults.append(Fault(f"{label} {entry.name}", must, f"{', '.join(where)}, all frozen", "Choose others."))
    return faults


def workless(entries: Sequence[Entry], before: Anatomy, table: ParamTable, label: str) -> list[Fault]:
    """An ingredient that finds no weight to work on that learns would do nothing, silently; who names none is told by ``idle``."""
    trainable = {row.name for row in table.rows if row.trainable}
    started = frozenset(part.canonical for part in before.parts)
    must = "must work on some weight that learns in this stage"
    faults = []
    for entry in entries:
        part = entry.ingredient
        named = all(selected(claim.where, before) for claim in entry.claims if claim.how == "needs")
        works = part.works_on(table, started) if named else None
        if works is not None and not works & trainable:
            do = f"Choose others (luthier card {entry.name} says which it takes), or drop it."
            faults.append(Fault(f"{label} {entry.name}", must, "none", do))
    return faults


def untrained(table: ParamTable, label: str) -> list[Fault]:
    """A stretch of the stage in which no weight learns."""
    edges = {0.0, *(edge for row in table.rows for share in row.asleep for edge in share if edge < 1.0)}
    still = [edge for edge in sorted(edges) if not any(row.learns(edge) for row in table.rows)]
    if not still:
        return []
    when = f" from {still[0]:.0%} of it on" if still[0] or any(row.trainable for row in table.rows) else ""
    return [Fault(label, f"trains no weight{when}", do="Freeze less, or drop the stage.")]


def carried(stage: Stage, anatomy: Anatomy, label: str) -> list[Fault]:
    faults = []
    for selector in stage.carry or ():
        try:
            if not anatomy.select(selector) and selector not in WORDS:
                faults.append(Fault(f"{label} carry", f"matches no weight with {selector!r}"))
        except RecipeError as error:
            faults.extend(Fault(f"{label} carry {one.where}", one.must, one.got, one.do) for one in error.faults)
    return faults


def unsolvable(entries: Sequence[Entry], table: ParamTable, anatomy: Anatomy, label: str) -> list[Fault]:
    faults = []
    hooks = ("surgery", "batches", "loss", "optimizer")
    for entry in entries:
        used = [hook for hook in hooks if entry.ingredient.uses(hook)]
        if used:
            faults.append(
                Fault(
                    f"{label} {entry.name}",
                    "cannot work with solver: exact, which takes no steps",
                    do="Drop it, or say solver: sgd.",
                )
            )
    if anatomy.output is None:
        faults.append(Fault(label, "solver: exact needs a head that ends in a linear layer"))
    outside = [row.name for row in table.rows if row.trainable and row.part.role != "head"]
    if outside:
        faults.append(
            Fault(
                label,
                "solver: exact trains only the head",
                f"{len(outside)} trainable weights outside it, such as {outside[0]}",
                "Add freeze: {keep: [head]}, or say solver: sgd.",
            )
        )
    return faults
