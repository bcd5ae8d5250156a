"""Anatomy: the role, kind and depth of every weight. The only place that knows model families."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from luthier.core.families import EMBEDDINGS, FEEDS_ALL_BLOCKS, SHARED
from luthier.errors import Fault, ModelError, RecipeError, did_you_mean

Role = Literal["embeddings", "block", "bridge", "head"]
Kind = Literal["weight", "bias", "norm"]

_WRAPPER = "base_model.model."  # what a PeftModel puts before every name
_INJECTED = re.compile(r"\.(?:base_layer|modules_to_save\.default)(?=\.)")
_PARAMETRIZED = re.compile(r"\.parametrizations\.([^.]+)\.original")
_WORDS = ("all", "embeddings", "blocks", "bridge", "head", "backbone", "norms", "biases", "weights")
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
        blocks: the ModuleList of blocks, such as ``encoder.layers``.
        embeddings, bridge, head: modules; weights named nowhere are faults.
        shared: whether all blocks use one set of weights.
    """

    blocks: str
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
        output: the last linear module of the head, whose output are the logits; None without a head.
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
        kind = str(getattr(getattr(inner, "config", None), "model_type", "") or "")
        places = _declared(inner, family) if family else _structural(inner, kind)
        return _read(inner, places, outer, "declared" if family else kind)

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
                ``weights``, ``top:N``, ``bottom:N``, ``block:I`` (from 0; negative from the top), or a glob over canonical names.
        Raises:
            RecipeError: a number that is none, or a block that is not there.
        """
        numbered = _NUMBERED.fullmatch(selector)
        if numbered:
            depths = self._numbered(selector, numbered[1], numbered[2])
            return frozenset(part.name for part in self.parts if part.role == "block" and part.depth in depths)
        if selector in _WORDS:
            return frozenset(part.name for part in self.parts if _is(part, selector))
        match = re.compile(fnmatch.translate(selector)).match
        return frozenset(part.name for part in self.parts if match(part.canonical))

    def _numbered(self, selector: str, word: str, said: str) -> range:
        try:
            number = int(said)
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
    blocks: int
    shared: bool
    role: Mapping[str, Role]  # longest module prefix -> role
    other: Role


def _wrapped(model: nn.Module) -> bool:
    return any(name == "base_model" for name, _ in model.named_children()) and hasattr(model.base_model, "model")


def _structural(model: nn.Module, kind: str) -> _Places:
    """One rule for all families: in the backbone, what is before the blocks feeds them, what is after is the bridge."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    if prefix not in dict(model.named_children()):
        prefix = ""  # a bare encoder: all of it is backbone
    start = f"{prefix}." if prefix else ""
    stacks = {name: stack for name, stack in _stacks(model).items() if name.startswith(start)}
    if not kind or not stacks:
        raise _not_found(model, kind)
    stack = max(stacks, key=lambda name: (len(stacks[name]), -len(name)))
    roles: dict[str, Role] = {}
    seen = False
    for name, _ in model.named_modules():
        if name == stack:
            seen = True
        if not name or f"{stack}.".startswith(f"{name}.") or name.startswith(f"{stack}."):
            continue
        inside = name[len(start) :] if name.startswith(start) else None
        if inside is None:
            roles[name] = "head"
        elif (
            inside.rpartition(".")[2] in FEEDS_ALL_BLOCKS
            or "embed" in inside
            or (kind, inside) in EMBEDDINGS
            or not seen
        ):
            roles[name] = "embeddings"
        else:
            roles[name] = roles.get(name.rpartition(".")[0], "bridge")
    return _Places(stack, len(stacks[stack]), kind in SHARED, roles, "bridge" if not start else "head")


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not any(name.startswith(f"{outer}.") for outer in found)
        ):
            found[name] = module
    return found


def _declared(model: nn.Module, family: Family) -> _Places:
    modules = dict(model.named_modules())
    faults = []
    roles: dict[str, Role] = {}
    for role, names in (("embeddings", family.embeddings), ("bridge", family.bridge), ("head", family.head)):
        for name in names:
            roles[name] = role  # type: ignore[assignment]
            if name not in modules:
                faults.append(Fault(f"family.{role}", f"there is no module {name!r}", do=did_you_mean(name, modules)))
    stack = modules.get(family.blocks)
    if stack is None:
        faults.append(
            Fault("family.blocks", f"there is no module {family.blocks!r}", do=did_you_mean(family.blocks, modules))
        )
    elif not isinstance(stack, (nn.ModuleList, nn.Sequential)):
        faults.append(Fault("family.blocks", "must be a ModuleList or Sequential of blocks", type(stack).__name__))
    if not faults:
        for name, _ in model.named_parameters():
            if not name.startswith(f"{family.blocks}.") and not any(
                name.startswith(f"{known}.") or name == known for known in roles
            ):
                faults.append(
                    Fault(
                        "family",
                        f"no part holds the weight {name!r}",
                        do="Add its module to embeddings, bridge or head.",
                    )
                )
    if faults:
        raise ModelError.of(faults, "family")
    return _Places(family.blocks, len(stack), family.shared, roles, "head")  # type: ignore[arg-type]


def _not_found(model: nn.Module, kind: str) -> ModelError:
    seen = ", ".join(f"{name} ({len(stack)})" for name, stack in _stacks(model).items()) or "none"
    named = f"the model type {kind!r}" if kind else type(model).__name__
    return ModelError(
        f"Where the blocks of {named} are is not known: no stack of blocks inside a backbone was found.\n"
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
        owner = _PARAMETRIZED.sub(r".\1", name).rpartition(".")[0]
        kind: Kind = (
            "norm"
            if owner in norms
            else "bias"
            if name.split(".")[-1].startswith("bias") or name.endswith(".bias.original")
            else "weight"
        )
        parts.append(
            Part(
                outer + name,
                canonical(name),
                tuple(weight.shape),
                weight.numel(),
                weight.numel() * weight.element_size(),
                role,
                kind,
                depth,
            )
        )
    names = tuple(f"{outer}{places.stack}.{number}" for number in range(places.blocks))
    return Anatomy(tuple(parts), places.blocks, names, places.shared, _output(model, places, outer), family)


def canonical(name: str) -> str:
    """A parameter's name without what injections and parametrizations add.

    >>> canonical("bert.query.parametrizations.weight.original"), canonical("bert.query.base_layer.weight")
    ('bert.query.weight', 'bert.query.weight')
    """
    return _INJECTED.sub("", _PARAMETRIZED.sub(r".\1", name))


def _place(name: str, places: _Places) -> tuple[Role, int]:
    if name.startswith(f"{places.stack}."):
        number = int(name[len(places.stack) + 1 :].partition(".")[0])
        return "block", number + 1
    at = name
    while at:
        if at in places.role:
            role = places.role[at]
            break
        at = at.rpartition(".")[0]
    else:
        role = places.other
    return role, {"embeddings": 0, "bridge": places.blocks + 1, "head": places.blocks + 2}.get(role, 0)


def _output(model: nn.Module, places: _Places, outer: str) -> str | None:
    """The last linear module of the head."""
    found = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and not name.startswith(f"{places.stack}.")
            and _place(f"{name}.weight", places)[0] == "head"
        ):
            found = outer + name
    return found
