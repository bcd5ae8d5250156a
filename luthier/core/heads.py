"""Two-layer heads: the dense layer, with its activation, that a model has below the last linear one.

Source: RoBERTa's classification head, dense, tanh, linear (Liu et al. 2019, arXiv:1907.11692; fairseq's RobertaClassificationHead). BERT's
pooler and last linear layer are the same function of the first token, so that a pooler drawn anew makes the same head.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.families import POOLER, Family
from luthier.errors import Fault, ModelError

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def two_layers(model: nn.Module, family: Family | None = None) -> Family | None:
    """Where the parts of ``model`` are when its head is to have two layers: ``family``, with the bridge's dense layer in the head.

    A final norm stays in the bridge. Needs names and shapes only, so a model on the meta device will do.

    Args:
        model: as it was loaded, without injections.
        family: where its parts are, for families that Luthier does not know.
    Returns:
        ``family`` itself when the head has two linear layers already (RoBERTa, ELECTRA, DistilBERT, DeBERTa).
    Raises:
        ModelError: there is no dense layer with an activation between the blocks and the last linear layer (Llama, GPT-2).
    """
    anatomy = Anatomy.of(model, family)
    roles = {part.name: part.role for part in anatomy.parts}
    linears = {
        name: roles.get(f"{name}.weight") for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if list(linears.values()).count("head") > 1:
        return family
    below = list(linears)[: list(linears).index(anatomy.output)] if anatomy.output else []
    dense = tuple(name for name in below if linears[name] == "bridge" and _bends(model, name))
    if not dense:
        raise ModelError.of([_single(anatomy)], "the model")
    plain = family or Family()
    bridge = tuple(name for name in plain.bridge if not f"{name}.".startswith(tuple(f"{one}." for one in dense)))
    return dataclasses.replace(plain, bridge=bridge, head=(*plain.head, *dense))


def _bends(model: nn.Module, name: str) -> bool:
    """Whether an activation follows the linear layer ``name``: it is a pooler's, or an activation stands beside it."""
    beside = model.get_submodule(name.rpartition(".")[0]).children()
    return POOLER in name.split(".") or any(
        type(one).__module__ in _ACTIVATIONS and not any(True for _ in one.parameters()) for one in beside
    )


def _single(anatomy: Anatomy) -> Fault:
    between = ", ".join(part.canonical for part in anatomy.parts if part.role == "bridge") or "nothing"
    must = "can be mlp where a dense layer with an activation stands between the blocks and the last linear layer"
    do = "Say head: own, or take a model with a pooler or a head of two layers, such as BERT or RoBERTa."
    return Fault("head", must, f"{between} before {anatomy.output or 'no linear layer'}", do)
