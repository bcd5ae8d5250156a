"""IsoBN: scales each feature that the head's last layer reads by how much of its variance others share.

Source: Zhou, Lin, Ren, AAAI 2021 (arXiv:2005.02178); the authors' code, model.py of INK-USC/IsoBN.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.context import Context, Progress
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.modes import paused
from luthier.core.table import ParamTable
from luthier.errors import Fault, ModelError

Moments = tuple[Tensor, Tensor, Tensor]  # rows (), mean (h,), scatter about the mean (h, h)


def moments(features: Tensor) -> Moments:
    """Rows n, mean m and scatter sum_r (x_r - m)(x_r - m)^T of ``features`` (n, h); at least single precision."""
    with torch.autocast(features.device.type, enabled=False):
        wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        mean = wide.mean(0)
        return wide.new_tensor(float(len(wide))), mean, (wide - mean).T @ (wide - mean)


def merged(one: Moments, other: Moments) -> Moments:
    """The moments of the rows of both: a step's rows may come in any number of parts."""
    rows, gap = one[0] + other[0], other[1] - one[1]
    share = other[0] / rows
    return rows, one[1] + share * gap, one[2] + other[2] + one[0] * share * torch.outer(gap, gap)


def isotropic(covariance: Tensor, deviation: Tensor, *, beta: float, eps: float) -> Tensor:
    """The scale k theta, theta_i = (gamma_i sigma_i + eps)^-beta.

    gamma_i = mean_j rho_ij^2 with rho_ij = C_ij / (sigma_i sigma_j), and k = sqrt(sum_i C_ii / (sum_i C_ii theta_i^2 + eps)),
    so that the sum of the variances stays.

    Args:
        covariance: C, shape (h, h), in the features' unit squared.
        deviation: sigma, shape (h,).
    Returns:
        shape (h,); ones where nothing varies.
    Source: the authors' IsoBN.forward.
    Differs: a correlation with a feature that does not vary is 0, not 0 / 0.
    """
    tiny = torch.finfo(covariance.dtype).tiny
    correlation = (covariance / torch.outer(deviation, deviation).clamp_min(tiny)).clamp(-1.0, 1.0)
    theta = (correlation.square().mean(1) * deviation + eps) ** -beta
    variance = covariance.diagonal()
    scale = theta * (variance.sum() / ((variance * theta.square()).sum() + eps)).sqrt()
    return torch.where(variance.sum() > 0, scale, torch.ones_like(scale))


class Scaling(nn.Module):
    """The running statistics and the scale of a layer's inputs, as buffers: saved, moved and resumed with the model."""

    covariance: Tensor
    deviation: Tensor
    scale: Tensor
    steps: Tensor
    fitted = False  # whether the layer was, before the stage

    def __init__(self, weight: Tensor, where: str, progress: Progress) -> None:
        super().__init__()
        ones = torch.ones_like(weight[0], dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
        self.register_buffer("covariance", torch.outer(ones, ones) * 0)
        self.register_buffer("deviation", ones * 0)
        self.register_buffer("scale", ones)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.where, self.handles, self._progress = where, list[Any](), progress
        self._dropped: tuple[Any, Any] = None, None  # what the last dropout gave, and what it was given
        self._seen: Moments | None = None  # of this step so far
        # Micro-batches of this step: what passes them again is no new row, and may be perturbed.
        self._heard: set[int] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hear(self, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if module.training and given:
            self._dropped = out, given[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        features: Tensor = given[0]
        if features.dim() != 2:
            raise _unfit(self.where, tuple(features.shape))
        (out, before), self._dropped = self._dropped, (None, None)
        if self.training and self._progress.part not in self._heard:
            self._heard.add(self._progress.part)
            new = moments(before if out is features else features)  # before dropout, as in the paper
            self._seen = new if self._seen is None else merged(self._seen, new)
        return (features * self.scale.clone()).to(features.dtype), *given[1:]

    @torch.no_grad()
    def update(self, momentum: float, eps: float, beta: float) -> None:
        """Takes the step's rows, of all processes, into the running statistics, and makes the scale anew."""
        none = self.scale.new_zeros(()), self.deviation * 0, self.covariance * 0
        rows, _, scatter = _together(self._seen or none)
        self._seen = None
        self._heard.clear()
        if rows < 2 or not torch.isfinite(scatter).all():
            return
        self.steps += 1
        share = momentum / (1.0 - (1.0 - momentum) ** int(self.steps))
        self.covariance += share * (scatter / rows - self.covariance)
        self.deviation += share * ((scatter.diagonal() / rows).sqrt() - self.deviation)
        self.scale.copy_(isotropic(self.covariance, self.deviation, beta=beta, eps=eps))


@ingredient
class IsoBN(Ingredient):
    """Scales the inputs of the head's last linear layer by k theta (``isotropic``); no gradient, no mean.

    The scale is made anew after each step and holds for every forward pass until the next, so that micro-batches and
    repeated evaluations see one function; before the first step it is 1. The weight of a head that was fitted before the
    stage takes each change of the scale back, W <- W diag(old / new), so that its logits do not jump and the scale
    speaks through the gradient alone; that of a fresh head, whose bias is all zero, does not. At the end the scale goes
    into the weight, W <- W diag(k theta): a plain model with the same outputs.

    Args:
        momentum: the weight of a step's statistics in the running ones.
        eps: keeps theta and k finite.
        beta: how far the scales follow the shared variance; 0 leaves the model alone.
    Raises:
        ModelError: no plain linear layer ends the head, it shares its weight, or it reads tokens.
    Differs: the authors' running statistics start at zero and are too small for the first hundred steps; ours are
        divided by the weight they have. The authors' scale knows the batch that it scales; ours ends with the step
        before.
    """

    momentum: Annotated[float, Field(gt=0, le=1)] = 0.05
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.MODULES), needs(Place.NOISE, "head"), needs(Place.WHOLE_WEIGHTS))

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if not self.beta:
            return
        linear = _output(model, ctx.anatomy)
        scaling = Scaling(linear.weight, ctx.anatomy.output or "", ctx.progress)
        scaling.fitted = linear.weight.is_meta or linear.bias is None or bool(linear.bias.any())
        scaling.handles.append(linear.register_forward_pre_hook(scaling.take))
        stack = ctx.anatomy.block_names[0].rpartition(".")[0]
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and not name.startswith(f"{stack}."):
                scaling.handles.append(module.register_forward_hook(scaling.hear))
        linear.add_module("isobn", scaling)

    @torch.no_grad()
    def watch(self, model: nn.Module, ctx: Context) -> None:
        if not self.beta:
            return
        scaling, linear = _scaling(model, ctx.anatomy), model.get_submodule(ctx.anatomy.output or "")
        before = scaling.scale.clone()
        scaling.update(self.momentum, self.eps, self.beta)
        if scaling.fitted and type(linear) is nn.Linear:
            linear.weight.mul_(before / scaling.scale)
        elif scaling.fitted:
            ctx.note("isobn: mixout holds the head as it was fitted, so its logits jump with the scale.")

    @torch.no_grad()
    def finish(self, model: nn.Module, ctx: Context) -> None:
        if not self.beta:
            return
        scaling, linear = _scaling(model, ctx.anatomy), model.get_submodule(ctx.anatomy.output or "")
        for handle in scaling.handles:
            handle.remove()
        del linear.isobn
        linear.weight.mul_(scaling.scale)  # type: ignore[operator]
        if not scaling.steps.is_meta and not scaling.steps:
            ctx.note("isobn saw no step with two rows, so it changed nothing.")

    def state_bytes(self, table: ParamTable) -> int:
        """Matrices of the running and of the step's moments, and two while a scale is made."""
        name = f"{table.anatomy.output}.weight"
        return sum(16 * row.part.shape[1] ** 2 for row in table.rows if row.part.canonical == name) if self.beta else 0


def _together(mine: Moments) -> Moments:
    """The moments of all processes' rows, the same on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    rows, mean, scatter = mine
    total = _summed(rows)
    middle = _summed(rows * mean) / total.clamp_min(1)
    return total, middle, _summed(scatter + rows * torch.outer(mean - middle, mean - middle))


def _summed(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def _scaling(model: nn.Module, anatomy: Anatomy) -> Scaling:
    found: Scaling = model.get_submodule(f"{anatomy.output}.isobn")  # type: ignore[assignment]
    return found


def _output(model: nn.Module, anatomy: Anatomy) -> nn.Linear:
    """The layer that makes the logits from one vector a row; two rows of four tokens through a skeleton show it.

    Raises:
        ModelError: there is none, it is no plain linear layer, its weight is used elsewhere too, or it reads tokens.
    """
    linear = model.get_submodule(anatomy.output) if anatomy.output else None
    where = anatomy.output or "the head"
    if linear is not None and is_parametrized(linear, "weight"):
        raise _unfit(where, "one that mixout mixes", "Write isobn before mixout.")
    if linear is None or type(linear) is not nn.Linear:
        raise _unfit(where, type(linear).__name__ if linear else "none")
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight is linear.weight and name != f"{where}.weight":
            raise _unfit(where, f"one that shares its weight with {name}")
    seen: list[tuple[int, ...]] = []
    if linear.weight.is_meta:
        handle = linear.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
        with torch.no_grad(), paused(model), suppress(RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            model(input_ids=torch.zeros(2, 4, dtype=torch.long, device="meta"))
        handle.remove()
    if seen and len(seen[0]) != 2:
        raise _unfit(where, seen[0])
    return linear


def _unfit(where: str, got: object, do: str = "Drop isobn for this model.") -> ModelError:
    must = "must be a linear layer of its own that reads one vector a row, shape (rows, features)"
    return ModelError.of([Fault(where, must, str(got), do)], "isobn")
