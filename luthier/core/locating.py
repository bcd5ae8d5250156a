"""Where the blocks, embeddings, bridge and head of a model are: found by one rule for all families, or declared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from luthier.core.families import AFTER_ALL_BLOCKS, EMBEDDINGS, FEEDS_ALL_BLOCKS, SHARED, Family, Role
from luthier.errors import Fault, ModelError, did_you_mean

_HEADED = re.compile(r"For[A-Z]|LMHead")  # class names of models that are more than a backbone


@dataclass(frozen=True)
class Places:
    """Where things are, relative to the model: the stack of blocks, and a rule for all other names."""

    stack: str
    blocks: Mapping[str, int]  # child of the stack -> number from the bottom
    shared: bool
    role: Mapping[str, Role]  # longest module prefix -> role
    other: Role

    def of(self, name: str) -> tuple[Role, int]:
        """The role and depth of what is called ``name``: 0 embeddings, 1..L blocks, L + 1 bridge, L + 2 head."""
        number = self.block(name)
        if number is not None:
            return "block", number + 1
        role = _holder(name, self.role) or self.other
        return role, {"embeddings": 0, "bridge": len(self.blocks) + 1, "head": len(self.blocks) + 2}[role]

    def block(self, name: str) -> int | None:
        """The number of the block that holds ``name``."""
        inside = name.removeprefix(f"{self.stack}.")
        return None if inside == name else self.blocks.get(inside.partition(".")[0])


def located(model: nn.Module, kind: str, family: Family | None) -> Places:
    """The places of ``model``, of the model type ``kind``, with what ``family`` says of them.

    Raises:
        ModelError: they cannot be told apart; says what was looked for and how to declare it.
    """
    if family and family.blocks:
        return _declared(model, family)
    places = _structural(model, kind)
    return _amended(model, places, family) if family else places


def _structural(model: nn.Module, kind: str) -> Places:
    """One rule for all families: in the backbone, what is before the blocks feeds them, what is after is the bridge."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    if prefix not in dict(model.named_children()):
        if kind and _HEADED.search(type(model).__name__):
            raise not_found(model, kind, f"no backbone was found: there is no module {prefix!r}")
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
    return Places(stack, blocks, kind in SHARED, roles, "head" if start else "embeddings")


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
        raise not_found(model, kind, "no stack of blocks inside a backbone was found")
    if len(stacks) > 1:
        raise not_found(model, kind, f"more than one stack of blocks was found: {', '.join(stacks)}")
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


def _amended(model: nn.Module, places: Places, family: Family) -> Places:
    """``places``, but for the modules and weights that ``family`` names."""
    roles, faults = _named(model, family)
    inside = f"{places.stack}."
    faults += [Fault("family", f"{name!r} must stand outside the blocks") for name in roles if name.startswith(inside)]
    if faults:
        raise ModelError.of(faults, "family")
    told = tuple(f"{name}." for name in roles)
    kept = {name: role for name, role in places.role.items() if not f"{name}.".startswith(told)}
    return replace(places, role={**kept, **roles}, shared=places.shared or family.shared)


def _declared(model: nn.Module, family: Family) -> Places:
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
    places = Places(family.blocks, _blocks(stack), family.shared, roles, "head")
    faults = [
        Fault("family", f"no part holds the weight {name!r}", do="Add its module to embeddings, bridge or head.")
        for name, _ in model.named_parameters()
        if places.block(name) is None and _holder(name, roles) is None
    ]
    if faults:
        raise ModelError.of(faults, "family")
    return places


def not_found(model: nn.Module, kind: str, why: str) -> ModelError:
    seen = ", ".join(f"{name} ({len(stack)})" for name, stack in _stacks(model).items()) or "none"
    named = f"the model type {kind!r}" if kind else type(model).__name__
    return ModelError(
        f"Where the blocks of {named} are is not known: {why}.\n"
        f"  ModuleLists seen, with their lengths: {seen}.\n"
        "  Say where the parts are, in the recipe:\n"
        "    family: {blocks: encoder.layers, embeddings: [embed], bridge: [norm], head: [classifier]}\n"
        "  or in Python: Family(blocks='encoder.layers', embeddings=('embed',), bridge=('norm',), head=('classifier',))"
    )


def _holder(name: str, roles: Mapping[str, Role]) -> Role | None:
    """The role of the innermost module in ``roles`` that holds ``name``."""
    while name and name not in roles:
        name = name.rpartition(".")[0]
    return roles.get(name)
