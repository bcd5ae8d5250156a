"""One optimizer step's data, ready to be evaluated with or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.modes import paused

Batch = Mapping[str, Any]
LossFn = Callable[[nn.Module, Any], Tensor]


class Closure:
    """The loss of one step as a function of the weights: the same batches, and the same dropout, at every call.

    Args:
        model: what is trained.
        loss: (model, batch) -> mean loss over the batch's rows, shape ().
        batches: the step's micro-batches.
        shares: each micro-batch's share of the step's rows; sums to one over all processes.
        before: called with the micro-batch's number before it is evaluated; the engine seeds dropout there.
        backward: turns a loss into gradients; the engine scales here for half precision.
        together: averages or sums a loss over processes.
        around: a context for each forward and backward pass (such as no_sync), by micro-batch number.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFn,
        batches: Sequence[Any],
        *,
        shares: Sequence[float] = (),
        before: Callable[[int], None] = lambda number: None,
        backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
        together: Callable[[Tensor], Tensor] = lambda loss: loss,
        around: Callable[[int], AbstractContextManager[Any]] = lambda number: nullcontext(),
    ) -> None:
        self.model = model
        self._loss = loss
        self._batches = batches
        self._shares = tuple(shares) or (1.0 / len(batches),) * len(batches)
        self._before, self._backward, self._together, self._around = before, backward, together, around

    def loss(self, *, noise: bool = True) -> Tensor:
        """The step's loss, shape (), without gradients.

        Args:
            noise: whether dropout and its like are on, as in training; off, the model is in eval mode for the call.
        """
        with torch.no_grad(), nullcontext() if noise else paused(self.model):
            return self._together(_added(self._parts()))

    def backward(self) -> Tensor:
        """The step's loss, shape (), detached; gradients are added to the weights' ``.grad``."""
        return self._together(_added(self._parts(grad=True)))

    def _parts(self, *, grad: bool = False) -> Iterator[Tensor]:
        for number, (batch, share) in enumerate(zip(self._batches, self._shares, strict=True)):
            self._before(number)
            with self._around(number):
                part = self._loss(self.model, batch)
                if share != 1.0:
                    part = part * share
                if grad:
                    self._backward(part)
            yield part.detach()


def _added(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
