"""Prefix tuning: trainable key and value vectors before those of every block's self-attention; the model stays frozen.

Source: Li & Liang, ACL 2021 (arXiv:2101.00190), section 4, without the network that makes the vectors; as stage 1 of
EH-FT, Yang et al., EMNLP 2022, whose code takes SwissArmyTransformer's ``PrefixTuningMixin``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.core.anatomy import select_all
from luthier.core.claims import Claim, Place, needs, owns, voids, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.modes import paused
from luthier.core.table import ParamTable
from luthier.errors import Fault, ModelError, RecipeError

Attend = Callable[..., Any]  # transformers': (module, query, key, value, mask, ...) -> (output, weights or None)
Shape = tuple[int, int]  # heads and d, of keys or of values
_NAME = "luthier_prefix"  # of ``_attend`` among transformers' attention functions


_END = (
    "prefix: its vectors are taken out after the stage and not saved, so that scores made during the stage are not those "
    "of the model that goes on: carry the head alone, and train the plain model in a stage after it"
)


def put_before(vectors: Tensor, states: Tensor) -> Tensor:
    """K' = [P; K]: the same vectors before the keys, or values, of every row.

    Args:
        vectors: P, shape (heads, T, d).
        states: K, shape (rows, heads, n, d).
    Returns:
        shape (rows, heads, T + n, d), in the type of ``states``.
    """
    same = vectors.to(states.dtype).expand(len(states), -1, -1, -1)
    return torch.cat([same, states], dim=2)


def seen_by_all(mask: Tensor, vectors: int) -> Tensor:
    """A mask (True: seen) or bias (0: seen), shape (..., queries, n), with T columns before it that all queries see."""
    return F.pad(mask, (vectors, 0), value=mask.dtype == torch.bool)


class Vectors(nn.Module):
    """The vectors of one self-attention, and its attention function with them.

    Args:
        key: shape (key heads, T, d).
        value: shape (key heads, T, d of values).
        inner: the attention function that the model would use.
        flagged: whether ``inner`` hides later tokens by itself where it is given no mask (sdpa does).
        config: the module's own, which finish puts back.
    """

    def __init__(self, key: Tensor, value: Tensor, inner: Attend, flagged: bool, config: Any) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        self.inner, self.flagged, self.config = inner, flagged, config

    def forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> Any:
        vectors, mask, asked = self.key.shape[1], attention_mask, others.get("is_causal")
        causal = getattr(module, "is_causal", True) if asked is None else asked
        if mask is None and self.flagged and causal and query.shape[2] > 1:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
        if mask is not None:
            mask = seen_by_all(mask, vectors)
        if isinstance(others.get("position_bias"), Tensor):  # T5's: none towards the vectors
            others["position_bias"] = seen_by_all(others["position_bias"], vectors)
        return self.inner(module, query, put_before(self.key, key), put_before(self.value, value), mask, **others)


@ingredient
class Prefix(Ingredient):
    """Learns T key and value vectors for each self-attention, and the head; every query sees them beside the tokens.

    The tokens keep their positions. At the end of the stage the vectors are taken out and not kept, as a plain model
    has no place for them: put it into a stage with ``carry: [head]``, before another.

    Args:
        vectors: T; 0 is the frozen model as it is, of which the head learns.
        std: standard deviation of their start around 0.
        where: selectors; the self-attention of each block of which they name a weight gets vectors.
    Raises:
        RecipeError: ``where`` names no block.
        ModelError: a block whose attention is not known.
    """

    vectors: Annotated[int, Field(ge=0)] = 17
    std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("blocks",)

    def touches(self) -> tuple[Claim, ...]:
        return (
            wraps(Place.MODULES, *self.where),
            owns(Place.TRAINABLE),
            voids(Place.TRAINABLE, "backbone"),
            needs(Place.WHOLE_WEIGHTS),
            *((voids(Place.GOES_ON, "backbone"),) if self.vectors else ()),
        )

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        named = select_all(ctx.anatomy, self.where)
        blocks = [one for one in ctx.anatomy.block_names if any(name.startswith(f"{one}.") for name in named)]
        if not blocks:
            raise RecipeError.of([Fault("prefix.where", "must name blocks", ", ".join(self.where))], "prefix")
        if not self.vectors:
            return
        for name, shapes in _attentions(model, blocks, ctx.anatomy.family).items():
            module = model.get_submodule(name)
            some = next(weight for weight in module.parameters() if weight.is_floating_point())
            key, value = (self._start(some, shape, ctx, name, at) for at, shape in zip("kv", shapes, strict=True))
            kind = _kind(module)
            module.prefix = Vectors(key, value, _function(module, kind), kind == "sdpa", module.config)
            _divert(module)

    def _start(self, like: Tensor, shape: Shape, ctx: Context, name: str, at: str) -> Tensor:
        size = (shape[0], self.vectors, shape[1])
        if like.is_meta:
            return torch.empty(size, dtype=like.dtype, device="meta")
        return (self.std * torch.randn(size, generator=ctx.rng(name, at))).to(like)

    def settings(self, table: ParamTable) -> ParamTable:
        ours = (".prefix.key", ".prefix.value")
        return table.trainable(lambda row: row.trainable and (row.name.endswith(ours) or row.part.role == "head"))

    def finish(self, model: nn.Module, ctx: Context) -> None:
        for module in list(model.modules()):
            vectors = getattr(module, "prefix", None)
            if isinstance(vectors, Vectors):
                module.config = vectors.config
                del module.prefix
                ctx.note(_END)


def _attend(module: nn.Module, *given: Any, **others: Any) -> Any:
    attend: Any = module.prefix
    return attend(module, *given, **others)


def _file(module: nn.Module) -> dict[str, Any]:
    """The names of the file that says how ``module`` computes."""
    named: dict[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return named


def _function(module: nn.Module, kind: str) -> Attend:
    """The attention function that ``module`` calls where its configuration says ``kind``."""
    named = _file(module)
    found: Attend = named["ALL_ATTENTION_FUNCTIONS"].get_interface(kind, named["eager_attention_forward"])
    return found


def _kind(module: nn.Module) -> str:
    config: Any = module.config
    return str(config._attn_implementation)


def _divert(module: nn.Module) -> None:
    """Has the attention of ``module``, and of no other, go through ``module.prefix``; in place."""
    _file(module)["ALL_ATTENTION_FUNCTIONS"].register(_NAME, _attend)
    config = copy.copy(module.config)  # of this module alone: the model's own says how masks are made
    config._attn_implementation_internal = _NAME  # type: ignore[union-attr]
    module.config = config


def _attentions(model: nn.Module, blocks: Sequence[str], family: str) -> Mapping[str, tuple[Shape, ...]]:
    """The self-attentions in ``blocks`` by name, each with (heads, d) of its keys and of its values.

    Four tokens through the model show them.

    Raises:
        ModelError: a block has none, or one whose attention function is not known.
    """
    own: dict[str, tuple[nn.Module, Any]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") or name == block for block in blocks)
        if inside and "config" in vars(module) and "ALL_ATTENTION_FUNCTIONS" in _file(module):
            own[name] = module, module.config
    odd = next((name for name, (module, _) in own.items() if _kind(module) not in ("sdpa", "eager")), None)
    if odd is not None:
        do = 'Load the model with attn_implementation="sdpa".'
        got = _kind(own[odd][0])
        raise ModelError.of([Fault(odd, "must compute its attention by sdpa or eager", got, do)], "prefix")
    found: dict[str, tuple[Shape, ...]] = {}
    try:
        for name, (module, _) in own.items():
            vars(module)["prefix"] = partial(_listen, found, name, _kind(module))
            _divert(module)
        with torch.no_grad(), paused(model), suppress(RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            body: Any = getattr(model, "base_model", model)
            table = body.get_input_embeddings()
            tokens = torch.zeros(1, 4, dtype=torch.long, device=table.weight.device)
            body(inputs_embeds=table(tokens))  # GPT-2 cannot look at token numbers that have no storage
    finally:
        for module, config in own.values():
            module.config = config
            vars(module).pop("prefix", None)
    without = [block for block in blocks if not any(f"{name}.".startswith(f"{block}.") for name in found)]
    if without:
        must = "must name blocks whose self-attention goes through transformers' attention functions"
        got, do = f"{without[0]} of {family or 'no known family'}", "Drop it for this model; lora does without them."
        raise ModelError.of([Fault("prefix.where", must, got, do)], "prefix")
    return found


def _listen(found: dict[str, Any], name: str, kind: str, module: nn.Module, *given: Any, **others: Any) -> Any:
    query, key, value = given[:3]
    if key.shape[2] == query.shape[2]:  # and not the states of another model
        found[name] = tuple((states.shape[1], states.shape[3]) for states in (key, value))
    return _function(module, kind)(module, *given, **others)
