"""What does not change is not computed twice: the output of frozen layers without dropout, kept by row.

Blocks below the lowest trainable weight run once over the training rows; from then on the topmost of them gives what it gave, and those
below it are passed through. Whether this holds for a model is tried on a batch before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy

Collate = Callable[[Sequence[int]], Mapping[str, Tensor]]
LIMIT = 2 * 1024**3  # bytes of kept outputs, on the model's device


@dataclass(frozen=True)
class Kept:
    """Outputs by row, each (length, hidden), and whether the block gives its output in a tuple."""

    rows: Mapping[int, Tensor]
    wrapped: bool


class FrozenOutputs:
    """The outputs of the topmost frozen block, one tensor (length, hidden) a row.

    Args:
        model: the live model; its ``forward`` methods are replaced while ``replayed`` is open, nothing else.
        blocks: the frozen blocks' modules, bottom to top.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, list(blocks)
        self._kept: Kept = Kept({}, False)
        self._current: Tensor | None = None

    def learn(
        self, rows: Sequence[int], lengths: Sequence[int], collate: Collate, *, size: int, tick: Callable[[int], None]
    ) -> Kept:
        """Runs the frozen layers once over ``rows``, in batches of like length; ``take`` it to replay it."""
        kept, wrapped = {}, False
        order = sorted(rows, key=lambda row: lengths[row])
        caught: list[Any] = []
        hook = self._blocks[-1].register_forward_hook(lambda module, args, output: caught.append(output))
        try:
            for at in range(0, len(order), size):
                chosen = order[at : at + size]
                caught.clear()
                with torch.no_grad():
                    self._model(**collate(chosen))
                wrapped = isinstance(caught[0], tuple)
                hidden = caught[0][0] if wrapped else caught[0]
                for place, row in enumerate(chosen):
                    kept[row] = hidden[place, : lengths[row]].detach().clone()
                tick(len(chosen))
        finally:
            hook.remove()
        return Kept(kept, wrapped)

    def take(self, kept: Kept) -> None:
        """What ``learn`` gave, here or in another run with the same frozen layers and rows."""
        self._kept = kept

    def use(self, rows: Sequence[int], width: int) -> None:
        """Sets the rows of the next forward pass, padded to ``width`` tokens."""
        first = self._kept.rows[rows[0]]
        batch = first.new_zeros(len(rows), width, first.shape[-1])
        for place, row in enumerate(rows):
            kept = self._kept.rows[row]
            batch[place, : len(kept)] = kept
        self._current = batch

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """While open, the frozen blocks give what ``use`` set."""
        through = [self._pass(module) for module in self._blocks[:-1]]
        module = self._blocks[-1]
        own = module.__dict__.get("forward")
        module.forward = self._replay  # type: ignore[method-assign]
        try:
            yield
        finally:
            _restore(module, own)
            for undo in through:
                undo()

    def _replay(self, *args: Any, **named: Any) -> Any:
        assert self._current is not None
        return (self._current,) if self._kept.wrapped else self._current

    def _pass(self, module: nn.Module) -> Callable[[], None]:
        own = module.__dict__.get("forward")

        def through(*args: Any, **named: Any) -> Any:
            hidden = args[0] if args else named["hidden_states"]
            return (hidden,) if self._kept.wrapped else hidden

        module.forward = through  # type: ignore[method-assign]
        return lambda: _restore(module, own)


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.forward = own  # type: ignore[method-assign]


def bytes_needed(lengths: Sequence[int], hidden: int) -> int:
    """Memory for all rows' outputs in single precision."""
    return 4 * hidden * sum(lengths)


def frozen_blocks(model: nn.Module, anatomy: Anatomy, depth: int) -> list[nn.Module]:
    """The blocks whose output is constant when everything below ``depth`` is frozen and quiet, bottom to top."""
    return [model.get_submodule(name) for name in anatomy.block_names[: max(0, depth - 1)]]


def holds(model: nn.Module, frozen: FrozenOutputs, rows: Sequence[int], collate: Collate, limit: float = 1e-5) -> bool:
    """Whether replaying gives the logits that computing gives, on ``rows``, to ``limit`` relative."""
    training = model.training
    model.eval()
    try:
        batch = collate(rows)
        with torch.no_grad():
            computed = model(**batch).logits
            frozen.use(rows, batch["input_ids"].shape[1])
            with frozen.replayed():
                replayed = model(**batch).logits
        return bool((computed - replayed).abs().max() <= limit * computed.abs().max().clamp(min=1.0))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        model.train(training)


@contextmanager
def read_out(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """While open, the model's logits are the features that its last linear layer reads, shape (n, hidden)."""
    assert anatomy.output is not None
    parent, _, name = anatomy.output.rpartition(".")
    holder = model.get_submodule(parent)
    linear = getattr(holder, name)
    setattr(holder, name, nn.Identity())
    try:
        yield
    finally:
        setattr(holder, name, linear)
