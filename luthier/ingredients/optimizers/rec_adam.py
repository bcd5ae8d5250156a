"""RecAdam: the stage begins by holding on to the pretrained weights and lets the task take over along a sigmoid.

Source: Chen, Hou, Cui, Che, Liu, Yu, EMNLP 2020 (arXiv:2004.12651), section 3.3; the authors' code, RecAdam.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.core.wrappers import placed


def shares(step: int, *, k: float, middle: float) -> tuple[float, float]:
    """The shares of the task and of the recall: lambda = 1 / (1 + exp(-k (t - t0))) and 1 - lambda.

    >>> shares(10, k=0.5, middle=10.0)
    (0.5, 0.5)

    Args:
        step: t, number of the optimizer step, from 1.
        k: per step; how steep.
        middle: t0 in steps, where both shares are a half.
    Returns:
        each in [0, 1]; either is exact where the other is nearly 1.
    Source: the annealing function of the paper, as the authors' code has it.
    """
    along = k * (step - middle)
    small = math.exp(-abs(along))
    less, more = small / (1.0 + small), 1.0 / (1.0 + small)
    return (more, less) if along >= 0 else (less, more)


def steepness(k: float | None, *, middle: float) -> float:
    """k, per step; where it is None 0.1, or in a short stage as much more as brings lambda at t = 0 down to 1/100.

    >>> steepness(None, middle=1000.0), round(steepness(None, middle=10.0), 4)
    (0.1, 0.4595)
    """
    if k is not None:
        return k
    return max(0.1, math.log(99.0) / middle) if middle else 0.1


def recalled(before: Tensor, after: Tensor, start: Tensor, *, task: float, pull: float) -> Tensor:
    """w + lambda (w' - w) - pull (w - w0): a share of the optimizer's step from w to w', and of the way back to w0.

    Args:
        before, after, start: w, w' and w0, one shape and placement, any float type; may be sharded.
        task: lambda.
        pull: rate times (1 - lambda) times gamma, without unit.
    Returns:
        the same shape and placement, at least single precision.
    Source: the update of the paper's algorithm.
    Differs: the authors' code measures the way back from where lambda of the step has led.
    """
    old = before.to(torch.promote_types(before.dtype, torch.float32))
    return old + task * (after - old) - pull * (old - start)


@ingredient
class RecAdam(Ingredient):
    """Takes lambda(t) of each step of the backbone, and rate x (1 - lambda(t)) x strength of the way back to its start.

    lambda rises from 0 to 1 over the stage. The pull does not go through the gradient, so the optimizer's moments know only the task.
    Trainable weights that were there when the stage began are meant; the head learns as it would without.

    Args:
        strength: gamma, the pull to the start per unit of learning rate; 0 changes nothing at all, not even the steps. From rate x
            strength = 2 on the pull would swing ever further past the start.
        k: how steep lambda rises, per optimizer step; None = 0.1, or more in a short stage, so that lambda begins at no more than 1/100.
        t0: share of the stage at which lambda is a half.
    Differs: t0 is a share, not a number of steps. Any optimizer will do; where it has decay of its own, that is part of its step.
    """

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5000.0
    k: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    t0: Annotated[float, Field(ge=0, le=1)] = 0.1

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.STEP), needs(Place.REFERENCE, "backbone"), needs(Place.GRADIENT))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if not self.strength:
            return inner
        body = {part.name: part.canonical for part in ctx.anatomy.parts if part.role != "head"}
        middle = self.t0 * ctx.progress.steps
        k = steepness(self.k, middle=middle)
        starts: dict[str, Tensor | None] = {}  # the reference, placed like the weights at its first use
        held: list[tuple[Tensor, Tensor, Tensor, float]] = []  # weight, w, w0, rate; empty between steps

        def before(optimizer: Optimizer, args: Any, named: Any) -> None:
            held.clear()
            if shares(ctx.progress.step + 1, k=k, middle=middle)[0] == 1.0:  # also in the last digit
                return
            for group in optimizer.param_groups:
                for name, weight in zip(group["names"], group["params"], strict=True):
                    if name not in body or weight.grad is None:
                        continue
                    if name not in starts:
                        start = ctx.reference.get(body[name])
                        starts[name] = None if start is None else placed(start, weight)
                    if (start := starts[name]) is not None:
                        held.append((weight, weight.detach().clone(), start, group["lr"]))

        @torch.no_grad()
        def after(optimizer: Optimizer, args: Any, named: Any) -> None:
            task, recall = shares(ctx.progress.step + 1, k=k, middle=middle)
            if not getattr(optimizer, "found_inf", None):  # a gradient scaler's: the step was left out
                for weight, old, start, rate in held:
                    weight.copy_(recalled(old, weight, start, task=task, pull=rate * recall * self.strength))
            held.clear()

        inner.register_step_pre_hook(before)
        first = inner.register_step_post_hook(after)  # before hooks that look at the step's end or undo a part of it
        inner._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
        rates = [group["lr"] for group in inner.param_groups if not body.keys().isdisjoint(group["names"])]
        if rates and max(rates) * self.strength >= 2.0:
            told = f"rec_adam: rate x strength is {max(rates) * self.strength:g}, and must be below 2 for the pull to lead back"
            ctx.note(f"{told} to the start: take a smaller strength or rate.")
        return inner

    def works_on(self, table: ParamTable, started: frozenset[str]) -> frozenset[str] | None:
        if not self.strength:
            return None
        return frozenset(row.name for row in table.rows if row.part.role != "head" and row.part.canonical in started)

    def state_bytes(self, table: ParamTable) -> int:
        """A copy of the backbone as it was, and one of what learns of it while a step is taken."""
        if not self.strength:
            return 0
        body = [row for row in table.rows if row.part.role != "head"]
        return sum(row.part.bytes * (1 + row.trainable) for row in body)
