"""A plan as plain values and as text: who learns, how fast, who said so."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from luthier.core.table import Row
from luthier.units import count, size

if TYPE_CHECKING:
    from luthier.planning.plan import Entry, Plan, StagePlan


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plan.json and the report hold it."""
    return {
        "recipe": plan.recipe.name,
        "digest": plan.recipe.digest,
        "seed": plan.recipe.seed,
        "stages": [_stage_json(stage) for stage in plan.stages],
    }


def _stage_json(plan: StagePlan) -> dict[str, Any]:
    memory = dataclasses.asdict(plan.memory)
    return {
        "name": plan.name,
        "solver": plan.stage.solver,
        "steps": plan.steps,
        "batch_size": plan.stage.batch_size,
        "learning_rate": plan.stage.learning_rate,
        "carry": None if plan.stage.carry is None else list(plan.stage.carry),
        "trainable": plan.trainable,
        "quiet_below": plan.table.quiet_depth,
        "ingredients": [described(entry) for entry in plan.entries],
        "claims": {entry.name: [str(claim) for claim in entry.claims] for entry in plan.entries},
        "rows_by_depth": rows_by_depth(plan),
        "memory": {**memory, "total": plan.memory.total},
        "notes": list(plan.notes),
    }


def rows_by_depth(plan: StagePlan) -> list[dict[str, Any]]:
    """One row for each depth and each way in which weights of that depth learn."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in plan.table.rows:
        rate = plan.table.learning_rate * row.lr_scale if row.trainable else 0.0
        key = (
            row.part.depth,
            row.trainable,
            rate,
            row.weight_decay if row.trainable else 0.0,
            row.schedule if row.trainable else None,
            row.asleep,
        )
        told = rows.setdefault(
            key,
            {
                "depth": row.part.depth,
                "name": plan.anatomy.depth_name(row.part.depth),
                "weights": 0,
                "tensors": 0,
                "trainable": row.trainable,
                "lr": rate,
                "weight_decay": row.weight_decay if row.trainable else 0.0,
                "schedule": str(row.schedule) if row.trainable else "",
                "asleep": [list(share) for share in row.asleep],
                "set_by": signers(row),
            },
        )
        told["weights"] += row.part.numel
        told["tensors"] += 1
    return sorted(rows.values(), key=lambda told: (-told["depth"], -told["weights"]))


def signers(row: Row) -> list[str]:
    """Who set something that counts for this row, in order; ``stage`` when nobody did."""
    counts = [name for what, name in row.set_by if row.trainable or what == "trainable"]
    return list(dict.fromkeys(counts)) or ["stage"]


def described(entry: Entry) -> str:
    """An ingredient with the values that are not its defaults: ``llrd(decay=0.9)``."""
    told = []
    for field in dataclasses.fields(entry.ingredient):  # type: ignore[arg-type]
        value = getattr(entry.ingredient, field.name)
        if value != field.default:
            told.append(f"{field.name}={_short(value)}")
    return f"{entry.name}({', '.join(told)})" + (" by default" if entry.default else "")


def _short(value: Any) -> str:
    return (
        "[" + ", ".join(map(_short, value)) + "]"
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def as_text(plan: Plan) -> str:
    """The plan at 80 columns, bottom of the model last."""
    lines = [
        f"plan: {plan.recipe.name}, seed {plan.recipe.seed}, {len(plan.stages)} {'stage' if len(plan.stages) == 1 else 'stages'}"
    ]
    for stage in plan.stages:
        lines += ["", *_stage_text(stage)]
    return "\n".join(lines)


def _stage_text(plan: StagePlan) -> list[str]:
    total = sum(row.part.numel for row in plan.table.rows)
    how = (
        "the head is solved exactly"
        if plan.stage.solver == "exact"
        else f"{plan.steps} steps of {_rows(plan)} rows, peak rate {plan.stage.learning_rate:g}"
    )
    lines = [
        f"stage {plan.index + 1} {plan.name!r}: {how}",
        f"  trains {plan.trainable:,} of {total:,} weights ({100 * plan.trainable / total:.3g} %)",
    ]
    lines += _wrapped("  with ", [described(entry) for entry in plan.entries])
    lines.append(f"  {'depth':<14}{'weights':>8}{'tensors':>8}{'rate':>10}{'decay':>8}  set by")
    for told in _merged(_at_one_rate(rows_by_depth(plan))):
        learns = "solved" if plan.stage.solver == "exact" else f"{told['lr']:.3g}"
        rate = learns if told["trainable"] else "frozen"
        decay = told["weight_decay"] if told["trainable"] and plan.steps else ""
        row = f"  {told['name']:<14}{count(told['weights']):>8}{told['tensors']:>8}{rate:>10}{decay:>8}  "
        lines += _wrapped(row, [*_rest(told["asleep"]), *told["set_by"]])
    if plan.stage.carry is not None:
        lines.append(f"  then all but {', '.join(plan.stage.carry)} is put back to what it was before this stage")
    memory = plan.memory
    lines.append(
        f"  memory forecast {size(memory.total)}: weights {size(memory.weights)}, gradients {size(memory.gradients)},"
    )
    lines.append(f"    optimizer {size(memory.optimizer)}, activations about {size(memory.activations)}")
    if plan.table.quiet_depth > 1:
        lines.append(
            f"  below {plan.anatomy.depth_name(plan.table.quiet_depth)}: frozen, no dropout; outputs are kept where they fit"
        )
    lines += [f"  note: {note}" for note in plan.notes]
    return lines


def _rest(asleep: list[list[float]]) -> list[str]:
    """When weights that rest learn: ``from 30%``, or how much of the stage they rest."""
    if not asleep:
        return []
    if len(asleep) == 1 and asleep[0][0] == 0.0:
        return [f"from {asleep[0][1]:.0%}"]
    return [f"rests {sum(end - start for start, end in asleep):.0%}"]


def _at_one_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one depth that differ in nothing but weight decay as one, with the decay of most weights first: ``0.01, 0``."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = repr([row[way] for way in ("depth", "trainable", "lr", "schedule", "asleep")])
        if key not in found:
            found[key] = {**row, "weight_decay": f"{row['weight_decay']:g}"}
            continue
        one = found[key]
        one["weights"] += row["weights"]
        one["tensors"] += row["tensors"]
        one["weight_decay"] += f", {row['weight_decay']:g}"
        one["set_by"] = list(dict.fromkeys([*one["set_by"], *row["set_by"]]))
    return list(found.values())


def _rows(plan: StagePlan) -> str:
    """Rows of a step: the batch size, or the range where an ingredient cuts batches otherwise."""
    sizes = [len(rows) for rows in plan.stream.epoch(0)] if plan.stream else []
    if not sizes or max(sizes) == plan.stage.batch_size:
        return str(plan.stage.batch_size)
    return f"{min(sizes)} to {max(sizes)}"


def _wrapped(start: str, items: list[str], width: int = 80) -> list[str]:
    lines, line = [], start
    for at, item in enumerate(items):
        piece = item + (", " if at + 1 < len(items) else "")
        if len(line) + len(piece.rstrip()) > width and line.strip() != start.strip():
            lines.append(line.rstrip())
            line = " " * len(start)
        line += piece
    return [*lines, line.rstrip()]


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks that learn alike and lie side by side as one row: ``block 0-5``."""
    ways = ("trainable", "lr", "weight_decay", "schedule", "asleep")
    merged: list[dict[str, Any]] = []
    by_way: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = repr([row[way] for way in ways])
        last = by_way.get(key)
        if (
            last
            and row["name"].startswith("block")
            and last["name"].startswith("block")
            and last["lowest"] == row["depth"] + 1
        ):
            last["weights"] += row["weights"]
            last["tensors"] += row["tensors"]
            last["lowest"] = row["depth"]
            last["name"] = f"blocks {row['depth'] - 1}-{last['depth'] - 1}"
            continue
        fresh = {**row, "lowest": row["depth"]}
        by_way[key] = fresh
        merged.append(fresh)
    return merged
