"""Optimizer parameter groups: from a table's rows, and from one optimizer to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError

_KEPT = ("params", "lr", "initial_lr", "weight_decay", "names")


def plain(table: ParamTable, weights: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer before any ingredient: SGD over the table's groups; every trainable weight in exactly one.

    Raises:
        RecipeError: nothing is trainable, or two names of the table are one tensor.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [weights[name] for name in group.names],
            "names": group.names,
            "lr": group.learning_rate,
            "initial_lr": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in table.groups()
    ]
    held = [id(weight) for group in groups for weight in group["params"]]
    if not held:
        raise RecipeError.of([Fault("the stage", "must train at least one weight", do="Freeze less.")], "the plan")
    if len(set(held)) != len(held):
        raise RecipeError.of([Fault("the stage", "must hold every weight in exactly one group")], "the plan")
    return torch.optim.SGD(groups, lr=table.learning_rate)


def groups_of(inner: Optimizer) -> list[dict[str, Any]]:
    """The groups of ``inner`` as another optimizer takes them: weights, names, rate, decay; none of ``inner``'s own fields."""
    return [{key: group[key] for key in _KEPT if key in group} for group in inner.param_groups]
