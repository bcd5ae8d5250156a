"""How far each depth of the model moved in a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from luthier.planning.plan import StagePlan


def movement(plan: StagePlan, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row a depth: the L2 norm of the change of its weights, and that norm over the norm at the stage's start.

    Args:
        before, after: weights by canonical name; only names that are in both count.
    """
    rows: dict[int, dict[str, Any]] = {}
    squares: dict[int, tuple[float, float]] = {}
    anatomy = plan.anatomy
    trained = {row.part.canonical for row in plan.table.rows if row.trainable}
    for part in anatomy.parts:
        if part.canonical not in before or part.canonical not in after:
            continue
        old = before[part.canonical].double()
        change = after[part.canonical].detach().cpu().double() - old
        moved, start = squares.get(part.depth, (0.0, 0.0))
        squares[part.depth] = (moved + float(change.square().sum()), start + float(old.square().sum()))
        row = rows.setdefault(
            part.depth,
            {
                "stage": plan.name,
                "depth": part.depth,
                "name": anatomy.depth_name(part.depth),
                "weights": 0,
                "trainable": False,
            },
        )
        row["weights"] += part.numel
        row["trainable"] = row["trainable"] or part.canonical in trained
    for depth, row in rows.items():
        moved, start = squares[depth]
        row["distance"] = moved**0.5
        row["relative"] = (moved / start) ** 0.5 if start else 0.0
    return [rows[depth] for depth in sorted(rows)]
