"""Mixout: at each training forward pass some weights are the start weights again.

Source: Lee, Cho, Kang, ICLR 2020 (arXiv:1909.11299), equation 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from luthier.core.anatomy import Anatomy, canonical
from luthier.core.claims import Claim, Place, needs, owns
from luthier.core.context import Context, Tensors
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.perturb import Draws
from luthier.core.table import ParamTable, Row

_MIXED = ".parametrizations.weight.original"


def mixed(weight: Tensor, target: Tensor, kept: Tensor, p: float) -> Tensor:
    """U + M (W - U) / (1 - p): the target where M is 0, and so scaled where M is 1 that the mean over M is W.

    Args:
        weight: W, shape (out, in).
        target: U, the same shape.
        kept: M, 1 with probability 1 - p, broadcast over the shape.
        p: share of W that is put back, in [0, 1]; at 1 the result is U.
    Source: equation 5.
    Differs: the authors' code gives the gradient M, without the factor 1 / (1 - p); this is the true one.
    """
    return target if p == 1.0 else target + kept * (weight - target) / (1.0 - p)


class Mixing(nn.Module):
    """The parametrization of one weight. Its target is a buffer, so it is saved and moved with the model.

    The mask is drawn from the ingredient's own stream, named by the weight, the step, the micro-batch and the number of the
    forward pass inside the evaluation (see ``Draws``).
    """

    target: Tensor

    def __init__(self, target: Tensor, *, p: float, shape: tuple[int, ...], name: str, ctx: Context) -> None:
        super().__init__()
        self.register_buffer("target", target)
        self._p, self._shape, self._name, self._ctx = p, shape, name, ctx
        self.draws: Draws[int] = Draws(ctx.progress, signer="mixout", where=name)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or self._p == 0.0 or weight.is_meta:
            return weight
        return mixed(weight, self.target, self._kept(weight), self._p)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _kept(self, weight: Tensor) -> Tensor:
        draw = torch.Generator(weight.device).manual_seed(self.draws.next(self._named))
        kept = torch.empty(self._shape, dtype=weight.dtype, device=weight.device)
        return kept.bernoulli_(1.0 - self._p, generator=draw)

    def _named(self, number: int) -> int:
        return self._ctx.seed_of(self._name, self._ctx.progress.part, number)


@ingredient
class Mixout(Ingredient):
    """Mixes the weights of linear layers with those they started from; biases, norms and embeddings are left alone.

    Args:
        p: the chance that a weight is put back.
        mask: ``column`` draws once for each input of a layer, as in the paper; ``element`` once for each weight.
        where: selectors of the weights.
        dropout: whether dropout before mixed layers stays on; the paper's mixout takes its place.
    """

    p: Annotated[float, Field(ge=0, le=1)] = 0.1
    mask: Literal["column", "element"] = "column"
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("backbone",)
    dropout: bool = False

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.FORWARD_WEIGHTS, *self.where), needs(Place.NOISE), needs(Place.REFERENCE, *self.where))

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        chosen = frozenset().union(*(ctx.anatomy.select(selector) for selector in self.where))
        tied = _tied(model)
        names = []
        for name, module, transposed in list(_linears(model)):
            if f"{name}.weight" not in chosen:
                continue
            weight = cast(Tensor, module.weight)
            if id(weight) in tied:
                ctx.note(f"mixout leaves {name} alone: its weight is tied to another module")
                continue
            if not weight.is_floating_point():
                ctx.note(f"mixout leaves {name} alone: its weight is quantised")
                continue
            column = (weight.shape[0], 1) if transposed else (1, weight.shape[1])
            shape = column if self.mask == "column" else tuple(weight.shape)
            start = ctx.reference.get(canonical(f"{name}.weight"))  # none while the stage is only planned
            mixing = Mixing(
                weight.detach().clone() if start is None else start, p=self.p, shape=shape, name=name, ctx=ctx
            )
            parametrize.register_parametrization(module, "weight", mixing, unsafe=True)
            names.append(name)
        if self.p and not self.dropout:
            before = {
                f"{name}.{field}": torch.tensor(p, dtype=torch.float64)
                for name, field, p in _dropouts(model, ctx.anatomy, names)
            }
            ctx.keep("dropout", lambda: Tensors(before))
            for at in before:
                _set(model, at, 0.0)

    def finish(self, model: nn.Module, ctx: Context) -> None:
        for _, module, _ in list(_linears(model)):
            if parametrize.is_parametrized(module, "weight") and any(
                isinstance(one, Mixing)
                for one in module.parametrizations.weight  # type: ignore[union-attr]
            ):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                for name in [name for name in module._parameters if name != "weight"]:
                    module.register_parameter(
                        name, module._parameters.pop(name)
                    )  # back behind the weight, where it was
        for name, p in ctx.keep("dropout", Tensors).items():
            _set(model, name, float(p))

    def works_on(self, table: ParamTable, started: frozenset[str]) -> frozenset[str] | None:
        return frozenset(row.name for row in self._mixed(table)) if self.p else None

    def state_bytes(self, table: ParamTable) -> int:
        """The start of all that is named, and the mixed weights (with ``element`` their masks too), which wait for the backward pass.

        Those of one forward pass; a loss of several, such as r_drop's, keeps as much for each.
        """
        chosen = table.select(self.where)
        start = sum(row.part.bytes for row in table.rows if row.name in chosen)
        kept = (1 + (self.mask == "element")) * sum(row.part.bytes for row in self._mixed(table))
        return start + (kept if 0.0 < self.p < 1.0 else 0)

    def _mixed(self, table: ParamTable) -> list[Row]:
        """The rows of what is mixed; the table is that of the model after surgery."""
        chosen = table.select(self.where)
        return [row for row in table.rows if row.name in chosen and row.name.endswith(_MIXED)]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Linear layers as (name, module, whether the weight is (in, out) as in GPT-2's Conv1D)."""
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("Parametrized")
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            yield name, module, kind == "Conv1D"


def _tied(model: nn.Module) -> set[int]:
    """The ids of weights that have more than one name."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, weight in model.named_parameters(remove_duplicate=False):
        (twice if id(weight) in seen else seen).add(id(weight))
    return twice


def _dropouts(model: nn.Module, anatomy: Anatomy, mixed: Collection[str]) -> Iterator[tuple[str, str, float]]:
    """Every dropout that is on and stands before a layer called in ``mixed``, as (module, field, chance).

    That is the dropout in blocks that hold one; what feeds the lowest block where that does, or the embeddings; and what stands between
    the blocks and the head's layers where one of those is mixed.
    Modules have it as ``p``; layers that call the functional form, such as Llama's and T5's attention, as a number of their own
    whose name says dropout.
    """
    roles = {part.name: part.role for part in anatomy.parts}
    within = [block for block in anatomy.block_names if any(f"{name}.".startswith(f"{block}.") for name in mixed)]
    inside = tuple(f"{block}." for block in within)
    below = anatomy.block_names[0] in within or any(roles[f"{name}.weight"] == "embeddings" for name in mixed)
    above = any(roles[f"{name}.weight"] == "head" for name in mixed)
    stack = anatomy.block_names[0].rpartition(".")[0]
    heads = [name for name, role in roles.items() if role == "head"]
    reached = False
    for name, module in model.named_modules():
        reached |= name == stack
        holder = name.rpartition(".")[0]
        if f"{name}.".startswith(f"{stack}."):
            wanted = f"{name}.".startswith(inside)
        else:  # beside the blocks in a module without the head is before them: T5's encoder uses its dropout on both sides
            beside = _holds(holder, stack) and not any(_holds(holder, head) for head in heads)
            wanted = below if not reached or beside else above
        if not wanted:
            continue
        if isinstance(module, nn.Dropout):
            fields = ["p"]
        else:
            fields = [field for field, value in vars(module).items() if "dropout" in field and isinstance(value, float)]
        for field in fields:
            if getattr(module, field) > 0:
                yield name, field, getattr(module, field)


def _holds(module: str, name: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _set(model: nn.Module, at: str, p: float) -> None:
    name, _, field = at.rpartition(".")
    setattr(model.get_submodule(name), field, p)
