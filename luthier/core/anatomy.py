"""Anatomy: the role, kind and depth of every weight. The only place that knows model families."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from luthier.core.families import AFTER_ALL_BLOCKS, EMBEDDINGS, FEEDS_ALL_BLOCKS, SHARED
from luthier.errors import Fault, ModelError, RecipeError, did_you_mean

Role = Literal["embeddings", "block", "bridge", "head"]
Kind = Literal["weight", "bias", "norm"]

_WRAPPER = "base_model.model."  # what a PeftModel puts before every name
_INJECTED = re.compile(r"\.(?:base_layer|modules_to_save\.default)(?=\.)")
_PARAMETRIZED = re.compile(r"\.parametrizations\.([^.]+)\.original")
WORDS = ("all", "embeddings", "blocks", "bridge", "head", "backbone", "norms", "biases", "weights")
_HEADED = re.compile(r"For[A-Z]|LMHead")  # class names of models that are more than a backbone
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
class Family:
    """Where the parts of a model are: module names, each standing for all that is inside it.

    Args:
        blocks: the ModuleList or Sequential of blocks, such as ``encoder.layers``; empty where Luthier finds the parts by itself, and the
            others say what it should take otherwise.
        embeddings, bridge, head: modules, or single weights such as ``cls_token``; weights named nowhere are faults when ``blocks`` is
            given.
        shared: whether all blocks use one set of weights.
    """

    blocks: str = ""
    embeddings: tuple[str, ...] = ()
    bridge: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    shared: bool = False


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
            raise _not_found(inner, "", "some of its weights lie beside the wrapped model, such as a learned prompt")
        kind = str(getattr(getattr(inner, "config", None), "model_type", "") or "")
        places = _declared(inner, family) if family and declared else _structural(inner, kind)
        if family and not declared:
            places = _amended(inner, places, family)
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


@dataclass(frozen=True)
class _Places:
    """Where things are, relative to the model: the stack of blocks, and a rule for all other names."""

    stack: str
    blocks: Mapping[str, int]  # child of the stack -> number from the bottom
    shared: bool
    role: Mapping[str, Role]  # longest module prefix -> role
    other: Role


def _wrapped(model: nn.Module) -> bool:
    """Whether ``model`` is a PeftModel around all of another model; one with weights beside it is not looked through."""
    base = dict(model.named_children()).get("base_model")
    inside = base is not None and isinstance(getattr(base, "model", None), nn.Module)
    return inside and all(name.startswith(_WRAPPER) for name, _ in model.named_parameters())


def _structural(model: nn.Module, kind: str) -> _Places:
    """One rule for all families: in the backbone, what is before the blocks feeds them, what is after is the bridge."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    if prefix not in dict(model.named_children()):
        if kind and _HEADED.search(type(model).__name__):
            raise _not_found(model, kind, f"no backbone was found: there is no module {prefix!r}")
        prefix = ""  # a bare encoder: all of it is backbone
    start = f"{prefix}." if prefix else ""
    stack, blocks = _the_stack(model, kind, start)
    roles: dict[str, Role] = {}
    around: list[str] = []  # the modules that hold the stack
    seen = False
    for name, _ in model.named_modules():
        if name == stack:
            seen = True
        if name.startswith(f"{stack}.") or name == stack or not name:
            continue
        if stack.startswith(f"{name}."):
            around.append(name)
        elif name.startswith(start):
            roles[name] = _role(name[len(start) :], kind, seen, roles.get(name.rpartition(".")[0], "bridge"))
        else:
            roles[name] = "head"
    # What a backbone owns itself are learned inputs: XLNet's mask_emb, LayoutLMv3's cls_token.
    roles.update(dict.fromkeys([*around, stack], "embeddings"))
    return _Places(stack, blocks, kind in SHARED, roles, "head" if start else "embeddings")


def _role(inside: str, kind: str, seen: bool, parent: Role) -> Role:
    """The role of the module ``inside`` a backbone; ``seen``: whether it comes after the blocks."""
    path = inside.split(".")
    if path[-1] in FEEDS_ALL_BLOCKS or "embed" in inside or (kind, inside) in EMBEDDINGS:
        return "embeddings"
    if AFTER_ALL_BLOCKS.intersection(path):
        return "bridge"
    return parent if seen else "embeddings"


def _the_stack(model: nn.Module, kind: str, start: str) -> tuple[str, Mapping[str, int]]:
    """The one stack of blocks in the backbone; lists of embedding tables are none."""
    stacks = {
        name: found
        for name, module in _stacks(model).items()
        if name.startswith(start) and "embed" not in name[len(start) :] and (found := _blocks(module))
    }
    if not kind or not stacks:
        raise _not_found(model, kind, "no stack of blocks inside a backbone was found")
    if len(stacks) > 1:
        raise _not_found(model, kind, f"more than one stack of blocks was found: {', '.join(stacks)}")
    return next(iter(stacks.items()))


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not isinstance(module, ParametrizationList)
            and len(module)
            and not any(name.startswith(f"{outer}.") for outer in found)
        ):
            found[name] = module
    return found


def _blocks(stack: nn.Module) -> dict[str, int]:
    """Child of ``stack`` -> its number from the bottom; one without any weight, such as an activation, is no block."""
    holding = (
        name for name, block in stack.named_children() if any(True for _ in (*block.parameters(), *block.buffers()))
    )
    return {name: number for number, name in enumerate(holding)}


def _named(model: nn.Module, family: Family) -> tuple[dict[str, Role], list[Fault]]:
    """The role of each module and weight that ``family`` names, and what is wrong with the names."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    faults = []
    roles: dict[str, Role] = {}
    declared: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("embeddings", family.embeddings),
        ("bridge", family.bridge),
        ("head", family.head),
    )
    for role, names in declared:
        for name in names:
            if name not in known:
                faults.append(Fault(f"family.{role}", f"there is no module {name!r}", do=did_you_mean(name, known)))
            elif roles.setdefault(name, role) != role:
                faults.append(Fault(f"family.{role}", f"{name!r} must be in one part", f"{roles[name]} and {role}"))
    return roles, faults


def _amended(model: nn.Module, places: _Places, family: Family) -> _Places:
    """``places``, but for the modules and weights that ``family`` names."""
    roles, faults = _named(model, family)
    inside = f"{places.stack}."
    faults += [Fault("family", f"{name!r} must stand outside the blocks") for name in roles if name.startswith(inside)]
    if faults:
        raise ModelError.of(faults, "family")
    told = tuple(f"{name}." for name in roles)
    kept = {name: role for name, role in places.role.items() if not f"{name}.".startswith(told)}
    return replace(places, role={**kept, **roles}, shared=places.shared or family.shared)


def _declared(model: nn.Module, family: Family) -> _Places:
    modules = dict(model.named_modules())
    roles, faults = _named(model, family)
    stack = modules.get(family.blocks)
    if stack is None:
        faults.append(
            Fault("family.blocks", f"there is no module {family.blocks!r}", do=did_you_mean(family.blocks, modules))
        )
    elif not isinstance(stack, (nn.ModuleList, nn.Sequential)):
        faults.append(Fault("family.blocks", "must be a ModuleList or Sequential of blocks", type(stack).__name__))
    elif not _blocks(stack):
        faults.append(Fault("family.blocks", "must hold blocks with weights", f"{family.blocks!r} without any"))
    if faults:
        raise ModelError.of(faults, "family")
    assert stack is not None
    places = _Places(family.blocks, _blocks(stack), family.shared, roles, "head")
    faults = [
        Fault("family", f"no part holds the weight {name!r}", do="Add its module to embeddings, bridge or head.")
        for name, _ in model.named_parameters()
        if _number(name, places) is None and _holder(name, roles) is None
    ]
    if faults:
        raise ModelError.of(faults, "family")
    return places


def _not_found(model: nn.Module, kind: str, why: str) -> ModelError:
    seen = ", ".join(f"{name} ({len(stack)})" for name, stack in _stacks(model).items()) or "none"
    named = f"the model type {kind!r}" if kind else type(model).__name__
    return ModelError(
        f"Where the blocks of {named} are is not known: {why}.\n"
        f"  ModuleLists seen, with their lengths: {seen}.\n"
        "  Say where the parts are, in the recipe:\n"
        "    family: {blocks: encoder.layers, embeddings: [embed], bridge: [norm], head: [classifier]}\n"
        "  or in Python: Family(blocks='encoder.layers', embeddings=('embed',), bridge=('norm',), head=('classifier',))"
    )


def _read(model: nn.Module, places: _Places, outer: str, family: str) -> Anatomy:
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    parts = []
    for name, weight in model.named_parameters():
        role, depth = _place(name, places)
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


def _place(name: str, places: _Places) -> tuple[Role, int]:
    number = _number(name, places)
    if number is not None:
        return "block", number + 1
    role = _holder(name, places.role) or places.other
    return role, {"embeddings": 0, "bridge": len(places.blocks) + 1, "head": len(places.blocks) + 2}[role]


def _number(name: str, places: _Places) -> int | None:
    """The number of the block that holds ``name``."""
    inside = name.removeprefix(f"{places.stack}.")
    return None if inside == name else places.blocks.get(inside.partition(".")[0])


def _holder(name: str, roles: Mapping[str, Role]) -> Role | None:
    """The role of the innermost module in ``roles`` that holds ``name``."""
    while name and name not in roles:
        name = name.rpartition(".")[0]
    return roles.get(name)


def _output(model: nn.Module, places: _Places, outer: str) -> str | None:
    """The last linear module of the head; one that is wrapped by an injection counts as its wrapper, whose output is the sum."""
    found = None
    for name, module in model.named_modules():
        if name.startswith(f"{places.stack}.") or (found and name.startswith(f"{found}.")):
            continue
        if (
            isinstance(getattr(module, "base_layer", module), nn.Linear)
            and _place(f"{name}.weight", places)[0] == "head"
        ):
            found = name
    return None if found is None else outer + found
