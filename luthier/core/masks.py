"""Gradient masks: which entries of a step's gradient pass, and which weights stand still in that step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from luthier.errors import Fault, RecipeError

_ABOVE_ALL = 0x7F800001  # one more than the bits of infinity in single precision


def masked(
    optimizer: Optimizer,
    chosen: Collection[str],
    mask: Callable[[str, Tensor], Tensor],
    *,
    factor: float = 1.0,
    strict: bool = True,
) -> Optimizer:
    """Puts g <- factor M g in place before every step of ``optimizer``; where M is 0, the step may be undone after it.

    Args:
        optimizer: its groups have ``names`` beside ``params``. It gets a hook before the step; with ``strict`` one more that comes before
            all others, so that what they do to a weight is undone too, and one after the step.
        chosen: live names of the weights that are masked; a weight without a gradient is left alone.
        mask: (name, gradient) -> M, bool, of the gradient's shape, once a step and weight. It must not change the gradient.
        factor: multiplies what passes.
        strict: weights under a 0 of the mask get the bits back that they had before the step, whatever momentum and weight decay
            did to them. Costs a copy of the chosen weights: on the processor all the time, elsewhere while the step is taken.
    Returns:
        ``optimizer``.
    """
    held: list[tuple[str, Tensor, Tensor]] = []  # name, weight, M; empty between steps
    kept: dict[str, Tensor] = {}  # what weights were; on the processor for good, as fresh memory takes time

    @torch.no_grad()
    def remember(optimizer: Optimizer, args: Any, values: Any) -> None:
        for name, weight in _named(optimizer):
            if name in chosen and weight.grad is not None:
                if name not in kept:
                    kept[name] = torch.empty_like(weight)
                kept[name].copy_(weight)

    @torch.no_grad()
    def before(optimizer: Optimizer, args: Any, values: Any) -> None:
        held.clear()
        for name, weight in _named(optimizer):
            if name not in chosen or weight.grad is None:
                continue
            passes = mask(name, weight.grad)
            weight.grad.masked_fill_(~passes, 0.0)
            if factor != 1.0:
                weight.grad.mul_(factor)
            if strict:
                held.append((name, weight, passes))

    @torch.no_grad()
    def after(optimizer: Optimizer, args: Any, values: Any) -> None:
        for name, weight, passes in held:
            torch.where(passes, weight, kept[name], out=weight)
            if weight.device.type != "cpu":
                del kept[name]
        held.clear()

    optimizer.register_step_pre_hook(before)
    if strict:
        first = optimizer.register_step_pre_hook(remember)
        optimizer._optimizer_step_pre_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(after)
    return optimizer


def largest(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks that are true at the ``count`` largest entries of all tensors together; of equal entries the first are taken.

    Exactly ``count``, so that many entries of value 0 do not make all of a mask true. Needs no copy of the values: the bits of
    non-negative floats have the order of the floats, so the threshold is found by halving 31 times and counting.

    Args:
        values: single precision, not negative, finite.
        count: from 0 to the number of entries.
    """
    bits = {name: value.contiguous().view(torch.int32) for name, value in values.items()}
    low, high = 0, _ABOVE_ALL  # at least ``count`` entries are >= low, fewer are >= high (``count`` 0: none is wanted)
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(int(torch.count_nonzero(value >= middle)) for value in bits.values()) >= count
        low, high = (middle, high) if enough else (low, middle)
    masks = {name: value > low for name, value in bits.items()}
    left = count - sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    for name, value in bits.items():
        if not left:
            break
        equal = (value == low).flatten().nonzero().flatten()[:left]
        masks[name].view(-1)[equal] = True
        left -= len(equal)
    return masks


def _named(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        if "names" not in group:
            must = "must name the weights of each of its groups"
            raise RecipeError.of(
                [Fault("the optimizer", must, do="Make its groups with groups_of.")], "a gradient mask"
            )
        yield from zip(group["names"], group["params"], strict=True)
