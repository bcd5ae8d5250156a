"""What the forward passes that a loss makes give, for losses that need more than their value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def heard(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside it every forward pass of ``model`` leaves its logits, shape (rows, outputs), in the list that it gives.

    Args:
        model: the model or its wrapper, as a loss is given it; its output has ``logits``, or is a tensor, or begins with one.
    """
    with _listened(model, _Ear(logits)) as found:
        yield found


@contextmanager
def answered(model: nn.Module) -> Iterator[list[Any]]:
    """Inside it every forward pass of ``model`` leaves its whole output in the list that it gives."""
    with _listened(model, _Ear(lambda out: out)) as found:
        yield found


def logits(out: Any) -> Tensor:
    """The logits of a model's output, which has some, or is a tensor, or begins with one."""
    found: Tensor = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
    return found


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Inside it whoever listens already hears nothing: for passes beside the loss's own, such as a teacher's."""
    ears = [hook for hook in model._forward_hooks.values() if isinstance(hook, _Ear) and hook.open]
    for ear in ears:
        ear.open = False
    try:
        yield
    finally:
        for ear in ears:
            ear.open = True


class _Ear:
    """A forward hook that keeps what it reads of outputs while it is open."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read, self.open = read, True
        self.found: list[Any] = []

    def __call__(self, module: nn.Module, given: Any, out: Any) -> None:
        if self.open:
            self.found.append(self.read(out))


@contextmanager
def _listened(model: nn.Module, ear: _Ear) -> Iterator[list[Any]]:
    handle = model.register_forward_hook(ear)
    try:
        yield ear.found
    finally:
        handle.remove()
