"""Anatomy: the role, kind and depth of every weight."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from luthier.core.families import Family, Role
from luthier.core.locating import Places, located, not_found
from luthier.errors import Fault, RecipeError

Kind = Literal["weight", "bias", "norm"]

_WRAPPER = "base_model.model."  # what a PeftModel puts before every name
_INJECTED = re.compile(r"\.(?:base_layer|modules_to_save\.default)(?=\.)")
_PARAMETRIZED = re.compile(r"\.parametrizations\.([^.]+)\.original")
WORDS = ("all", "embeddings", "blocks", "bridge", "head", "backbone", "norms", "biases", "weights")
_NUMBERED = re.compile(r"(top|bottom|block):(.*)")


@dataclass(frozen=True)
class Part:
    """One parameter of a model.

    Args:
        name: its live name in ``model.named_parameters()``; a tied tensor has the first of its names.
        canonical: the name without what injections and parametrizations add to it.
        shape: of the tensor.
        numel: weights in it.
        bytes: memory it takes.
        role: embeddings, block, bridge (between blocks and head: a pooler, a final norm) or head.
        kind: norm (of a normalisation), bias, or weight.
        depth: 0 embeddings, 1..L blocks from the bottom, L + 1 bridge, L + 2 head.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    numel: int
    bytes: int
    role: Role
    kind: Kind
    depth: int


@dataclass(frozen=True)
class Anatomy:
    """Every parameter of a model with its role, kind and depth.

    Args:
        parts: in the order of ``named_parameters()``.
        blocks: L, the blocks that have weights of their own.
        block_names: the module name of each, from the bottom.
        shared: whether the blocks share one set of weights.
        output: the last linear module of the head, whose output are the logits (with LoRA on it, the module that holds both); None
            without a head.
        family: the model type, or ``declared``.
    """

    parts: tuple[Part, ...]
    blocks: int
    block_names: tuple[str, ...]
    shared: bool
    output: str | None
    family: str

    @classmethod
    def of(cls, model: nn.Module, family: Family | None = None) -> Anatomy:
        """The anatomy of ``model``; needs names and shapes only, so a model on the meta device will do.

        Raises:
            ModelError: the parts cannot be told apart; says what was looked for and how to declare it.
        """
        outer, inner = (_WRAPPER, model.get_submodule(_WRAPPER[:-1])) if _wrapped(model) else ("", model)
        declared = family is not None and bool(family.blocks)
        if not (outer or declared) and hasattr(inner, "peft_config") and "base_model" in dict(inner.named_children()):
            raise not_found(inner, "", "some of its weights lie beside the wrapped model, such as a learned prompt")
        kind = str(getattr(getattr(inner, "config", None), "model_type", "") or "")
        places = located(inner, kind, family)
        return _read(inner, places, outer, "declared" if declared else kind)

    @cached_property
    def _by_name(self) -> Mapping[str, Part]:
        return {part.name: part for part in self.parts}

    def part(self, name: str) -> Part:
        """The part with the live name ``name``."""
        return self._by_name[name]

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths that hold a part, ascending."""
        return tuple(sorted({part.depth for part in self.parts}))

    def depth_name(self, depth: int) -> str:
        """``embeddings``, ``block 0``, ..., ``bridge`` or ``head``."""
        fixed = {0: "embeddings", self.blocks + 1: "bridge", self.blocks + 2: "head"}
        return fixed.get(depth, f"block {depth - 1}")

    def select(self, selector: str) -> frozenset[str]:
        """The live names that ``selector`` stands for; may be empty.

        Args:
            selector: ``all``, ``embeddings``, ``blocks``, ``bridge``, ``head``, ``backbone`` (all but the head), ``norms``, ``biases``,
                ``weights``, ``top:N``, ``bottom:N`` (blocks, or a share of them such as ``top:40%``), ``block:I`` (from 0; negative
                from the top), a glob over canonical names, or ``but:A,B`` for all that neither ``A`` nor ``B`` stands for.
        Raises:
            RecipeError: a number that is none, or a block that is not there.
        """
        if selector.startswith("but:"):
            named = select_all(self, selector.removeprefix("but:").split(","))
            return frozenset(part.name for part in self.parts if part.name not in named)
        numbered = _NUMBERED.fullmatch(selector)
        if numbered:
            depths = self._numbered(selector, numbered[1], numbered[2])
            return frozenset(part.name for part in self.parts if part.role == "block" and part.depth in depths)
        if selector in WORDS:
            return frozenset(part.name for part in self.parts if _is(part, selector))
        match = re.compile(fnmatch.translate(selector)).match
        return frozenset(part.name for part in self.parts if match(part.canonical))

    def _numbered(self, selector: str, word: str, said: str) -> range:
        try:
            share = float(said.removesuffix("%")) / 100 if said.endswith("%") and word != "block" else None
            number = int(said) if share is None else math.floor(share * self.blocks + 0.5)
        except ValueError:
            raise RecipeError.of(
                [Fault(selector, f"must be {word}: and a whole number", repr(said))], "a selector"
            ) from None
        lowest, highest = (-self.blocks, self.blocks - 1) if word == "block" else (0, self.blocks)
        if not lowest <= number <= highest:
            must = f"must be between {word}:{lowest} and {word}:{highest} for this model of {self.blocks} blocks"
            raise RecipeError.of([Fault(selector, must, said)], "a selector")
        if word == "block":
            return range(number % self.blocks + 1, number % self.blocks + 2)
        return range(self.blocks - number + 1, self.blocks + 1) if word == "top" else range(1, number + 1)


def select_all(anatomy: Anatomy, selectors: Iterable[str]) -> frozenset[str]:
    """The live names that any of ``selectors`` stands for."""
    return frozenset().union(*(anatomy.select(selector) for selector in selectors))


def _is(part: Part, word: str) -> bool:
    match word:
        case "all":
            return True
        case "backbone":
            return part.role != "head"
        case "blocks":
            return part.role == "block"
        case "norms" | "biases" | "weights":
            return part.kind == {"norms": "norm", "biases": "bias", "weights": "weight"}[word]
    return part.role == word


def _wrapped(model: nn.Module) -> bool:
    """Whether ``model`` is a PeftModel around all of another model; one with weights beside it is not looked through."""
    base = dict(model.named_children()).get("base_model")
    inside = base is not None and isinstance(getattr(base, "model", None), nn.Module)
    return inside and all(name.startswith(_WRAPPER) for name, _ in model.named_parameters())


def _read(model: nn.Module, places: Places, outer: str, family: str) -> Anatomy:
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    parts = []
    for name, weight in model.named_parameters():
        role, depth = places.of(name)
        parts.append(
            Part(
                outer + name,
                canonical(name),
                tuple(weight.shape),
                weight.numel(),
                weight.numel() * weight.element_size(),
                role,
                _kind(name, norms),
                depth,
            )
        )
    names = tuple(f"{outer}{places.stack}.{child}" for child in places.blocks)
    return Anatomy(tuple(parts), len(names), names, places.shared, _output(model, places, outer), family)


def _kind(name: str, norms: Collection[str]) -> Kind:
    if _PARAMETRIZED.sub(r".\1", name).rpartition(".")[0] in norms:
        return "norm"
    own = canonical(name).rpartition(".")[2]
    return "bias" if own.startswith("bias") or own.endswith("bias") else "weight"


def canonical(name: str) -> str:
    """A parameter's name without what injections and parametrizations add.

    >>> canonical("bert.query.parametrizations.weight.original"), canonical("bert.query.base_layer.weight")
    ('bert.query.weight', 'bert.query.weight')
    """
    return _INJECTED.sub("", _PARAMETRIZED.sub(r".\1", name))


def _output(model: nn.Module, places: Places, outer: str) -> str | None:
    """The last linear module of the head; one that is wrapped by an injection counts as its wrapper, whose output is the sum."""
    found = None
    for name, module in model.named_modules():
        if name.startswith(f"{places.stack}.") or (found and name.startswith(f"{found}.")):
            continue
        if isinstance(getattr(module, "base_layer", module), nn.Linear) and places.of(f"{name}.weight")[0] == "head":
            found = name
    return None if found is None else outer + found
