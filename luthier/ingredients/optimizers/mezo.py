"""MeZO: training with forward passes only.

Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, NeurIPS 2023 (arXiv:2305.17333), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, needs, owns, scales, voids
from luthier.core.closure import Closure
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable


class ForwardOnly(Optimizer):
    """Steps along a random direction z by the slope of the loss along it; z is drawn anew from its seed, never stored.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);  theta <- theta - lr (g z + weight_decay theta).

    Args:
        groups: as other optimizers take them; each has its own rate and decay.
        eps: half the distance of the two evaluations, in units of z.
        seed: gives the seed of this step's direction.
    Source: algorithm 1.
    Differs: going back to theta and stepping are one addition, which saves a rounding; the generator is private; the loss of several
        micro-batches and processes is averaged before g is formed.
    """

    def __init__(self, groups: list[dict[str, Any]], *, eps: float, seed: Callable[[], int]) -> None:
        super().__init__(groups, {"lr": 1e-6, "weight_decay": 0.0})
        self._eps, self._seed = eps, seed
        self._offered: tuple[int, float] | None = None

    @torch.no_grad()
    def offer(self, closure: Closure) -> Tensor:
        """Evaluates the two points, without dropout. Returns the loss at theta + eps z, shape ().

        The weights are left at theta - eps z, from where ``step`` goes on; at theta when either loss is not a number.
        """
        if self._offered is not None:  # offered again before a step: back to theta first
            self._move(self._offered[0], self._eps)
            self._offered = None
        seed = self._seed()
        self._move(seed, self._eps)
        high = closure.loss(noise=False)
        self._move(seed, -2 * self._eps)
        low = closure.loss(noise=False)
        slope = (float(high) - float(low)) / (2 * self._eps)
        if slope != slope or abs(slope) == float("inf"):
            self._move(seed, self._eps)
            return high if not torch.isfinite(high) else low
        self._offered = seed, slope
        return high

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Goes back to theta and takes the step that was offered; without an offer nothing moves."""
        if self._offered is None:
            return
        seed, slope = self._offered
        self._offered = None
        for weight, direction, group in self._directions(seed):
            shrunk = 1.0 - group["lr"] * group["weight_decay"]
            if shrunk != 1.0:
                weight.mul_(shrunk)
            weight.add_(direction, alpha=self._eps * shrunk - group["lr"] * slope)

    def _move(self, seed: int, distance: float) -> None:
        for weight, direction, _ in self._directions(seed):
            weight.add_(direction, alpha=distance)

    def _directions(self, seed: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Each weight that is awake, with its part of z."""
        made: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if not weight.requires_grad:
                    continue
                if weight.device not in made:
                    made[weight.device] = torch.Generator(weight.device).manual_seed(seed)
                draw = torch.randn(
                    weight.shape, generator=made[weight.device], device=weight.device, dtype=weight.dtype
                )
                yield weight, draw, group


@ingredient
class MeZO(Ingredient):
    """Replaces gradients by two forward passes along a random direction; the memory is that of inference.

    Args:
        eps: half the distance of the two evaluations.
        weight_decay: per unit of learning rate; biases and norms do not decay.
    """

    eps: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    def touches(self) -> tuple[Claim, ...]:
        return (
            owns(Place.OPTIMIZER),
            owns(Place.STEP),
            scales(Place.DECAY),
            voids(Place.GRADIENT),
            voids(Place.NOISE),
            needs(Place.WHOLE_WEIGHTS),
        )

    def settings(self, table: ParamTable) -> ParamTable:
        return table.decay(lambda row: self.weight_decay if row.part.kind == "weight" else 0.0)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return ForwardOnly(groups_of(inner), eps=self.eps, seed=lambda: ctx.seed_of("direction"))

    def waiting(self, above: int, below: int) -> tuple[int, int]:
        return 0, 0
