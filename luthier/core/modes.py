"""Which modules lie below the lowest trainable weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from luthier.core.anatomy import Anatomy


def quieted(model: nn.Module, anatomy: Anatomy, depth: int) -> Iterator[nn.Module]:
    """The modules whose output cannot change when everything below ``depth`` is frozen and without noise.

    Args:
        model: the live model that ``anatomy`` describes.
        depth: as in ``Part.depth``; 0 gives nothing.
    Yields:
        the embeddings' modules, the blocks below ``depth``, and what stands beside the blocks without weights (such as the
        dropout after GPT-2's embeddings).
    """
    if depth <= 0 or not anatomy.block_names:
        return
    live = {part.name.rpartition(".")[0] for part in anatomy.parts if part.depth >= depth}
    above = {name[:at] for name in live for at in _ends(name)}
    stack = anatomy.block_names[0].rpartition(".")[0]
    around = {
        stack[:at] for at in _ends(stack)
    }  # the containers of the blocks: their loose dropouts come before the blocks
    for name, module in model.named_modules():
        if name in above or not name:
            continue
        holds = any(True for _ in module.parameters())
        if holds or (name.rpartition(".")[0] in around and name.rpartition(".")[0]):
            yield module


def _ends(name: str) -> Iterator[int]:
    at = name.find(".")
    while at != -1:
        yield at
        at = name.find(".", at + 1)
    yield len(name)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
