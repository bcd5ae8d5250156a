"""What a stage will need: memory by part, forecast from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from luthier.core.ingredient import Ingredient
from luthier.core.stream import Stream
from luthier.core.table import ParamTable
from luthier.recipe.recipe import Stage


@dataclass(frozen=True)
class Memory:
    """Bytes by part; activations are an estimate, the rest is counted."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def forecast(
    shape: nn.Module,
    table: ParamTable,
    ingredients: Sequence[Ingredient],
    stage: Stage,
    stream: Stream | None,
) -> Memory:
    """Memory of one step, in bytes.

    Activations: for each forward pass that waits for its backward pass (``Ingredient.waiting``), a block that is trained, or lies above
    one that is, keeps about 16 numbers a token and hidden unit and 2 numbers a token, token and head. A block below them keeps half of
    the former where a loss asks for the gradient at the embeddings, as no weight asks for a linear layer's input; else nothing. The
    largest batch of the first epoch is assumed. Where no pass waits there are no gradients.
    Source: Korthikanti et al., MLSys 2023 (arXiv:2205.05198), table 2, without tensor parallelism and in 4-byte numbers.
    Differs: their count is in 2-byte numbers and one-byte dropout masks; ours counts every kept number as 4 bytes.
    """
    weights = sum(row.part.bytes for row in table.rows)
    trained = [row for row in table.rows if row.trainable]
    above, below = 1, 0
    for part in ingredients:
        above, below = part.waiting(above, below)
    gradients = 0 if stage.solver == "exact" or not above else sum(row.part.bytes for row in trained)
    state = sum(part.state_bytes(table) for part in ingredients)
    config = getattr(shape, "config", None)
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0) or 0
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 0) or 0
    activations = 0
    if stream is not None and stream.lengths and trained:
        rows, longest = _largest(stream, stage.micro_batch)
        lowest = min(row.part.depth for row in trained)
        blocks = table.anatomy.blocks
        uses = getattr(config, "num_hidden_layers", blocks) // blocks if table.anatomy.shared else 1
        over = max(0, blocks - max(0, lowest - 1))
        kept, crossed = above * over * uses, below * (blocks - over) * uses
        tokens = rows * longest
        activations = 4 * tokens * ((16 * kept + 8 * crossed) * hidden + 2 * heads * longest * (kept + crossed))
    return Memory(weights, gradients, state, activations)


def _largest(stream: Stream, micro_batch: int | None) -> tuple[int, int]:
    """Rows and tokens a row of the first epoch's batch with the most tokens in one forward pass, padding counted."""
    sizes = [
        (min(len(rows), micro_batch or len(rows)), max(stream.lengths[row] for row in rows)) for rows in stream.epoch(0)
    ]
    return max(sizes, key=lambda size: size[0] * size[1])
