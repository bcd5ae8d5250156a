"""Two-layer heads: which layers they are in each family, and that the rest of the anatomy stays as it is."""

from __future__ import annotations

import pytest
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.core.heads import two_layers
from luthier.errors import ModelError
from tests.tiny import tiny

# family: (the dense layer, whether it is in the head anyway, the last linear layer)
TABLE = {
    "bert": ("bert.pooler.dense", False, "classifier"),
    "albert": ("albert.pooler", False, "classifier"),
    "roberta": ("classifier.dense", True, "classifier.out_proj"),
    "electra": ("classifier.dense", True, "classifier.out_proj"),
    "mpnet": ("classifier.dense", True, "classifier.out_proj"),
    "distilbert": ("pre_classifier", True, "classifier"),
    "deberta-v2": ("pooler.dense", True, "classifier"),
    "modernbert": ("head.dense", True, "classifier"),
}


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.parametrize("meta", [True, False])
def test_both_layers_are_the_head_and_all_else_is_where_it_was(family, meta):
    model = tiny(family, meta=meta)
    dense, own, output = TABLE[family]
    made = two_layers(model)
    assert (made is None) is own
    before, after = Anatomy.of(model), Anatomy.of(model, made)
    assert after.output == before.output == output
    assert (after.family, after.blocks, after.block_names) == (before.family, before.blocks, before.block_names)
    told = {part.name: part for part in after.parts}
    for part in before.parts:
        layer = part.name.rpartition(".")[0]
        if layer in (dense, output):
            assert (told[part.name].role, told[part.name].depth) == ("head", before.blocks + 2)
        else:
            assert told[part.name] == part
    assert {dense, output} <= {name.rpartition(".")[0] for name in after.select("head")}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "t5"])
def test_a_model_with_a_final_norm_alone_is_refused(family):
    with pytest.raises(ModelError) as caught:
        two_layers(tiny(family, meta=True))
    [fault] = caught.value.faults
    assert fault.where == "head"
    assert "a dense layer with an activation" in fault.must
    assert "norm" in fault.got or "ln_f" in fault.got
    assert "head: own" in fault.do


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ModelError, match="pooler.dense.weight, pooler.dense.bias before no linear layer"):
        two_layers(tiny("bert", head=False))


class Custom(nn.Module):
    """A model of no known family: blocks, a norm, a dense layer with or without an activation beside it, a last linear layer."""

    def __init__(self, activation):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.top = nn.Module()
        self.top.norm = nn.LayerNorm(4)
        self.top.dense = nn.Linear(4, 4)
        if activation is not None:
            self.top.bend = activation
        self.out = nn.Linear(4, 2)


@pytest.mark.parametrize("bridge", [("top",), ("top.norm", "top.dense")])
def test_a_declared_family_keeps_its_norm_in_the_bridge(bridge):
    declared = Family(blocks="blocks", bridge=bridge, head=("out",))
    made = two_layers(Custom(nn.Tanh()), declared)
    roles = {part.name: part.role for part in Anatomy.of(Custom(nn.Tanh()), made).parts if part.role != "block"}
    assert roles == {
        "top.norm.weight": "bridge", "top.norm.bias": "bridge", "top.dense.weight": "head", "top.dense.bias": "head",
        "out.weight": "head", "out.bias": "head",
    }  # fmt: skip


@pytest.mark.parametrize("beside", [None, nn.Dropout(0.1), nn.MultiheadAttention(4, 2)])
def test_a_projection_without_an_activation_is_no_layer_of_a_head(beside):
    with pytest.raises(ModelError, match="can be mlp where"):
        two_layers(Custom(beside), Family(blocks="blocks", bridge=("top",), head=("out",)))


def test_a_family_without_blocks_says_only_what_is_otherwise():
    model = tiny("bert", meta=True)
    before = {part.name: part.role for part in Anatomy.of(model).parts}
    assert {part.name: part.role for part in Anatomy.of(model, Family()).parts} == before
    after = {part.name: part.role for part in Anatomy.of(model, Family(head=("bert.pooler",))).parts}
    assert {name for name in before if before[name] != after[name]} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }


def test_a_family_without_blocks_names_what_is_there_and_outside_the_blocks():
    faulty = Family(head=("bert.poolre", "bert.encoder.layer.2"), bridge=("bert.encoder.layer.2",))
    with pytest.raises(ModelError) as caught:
        Anatomy.of(tiny("bert", meta=True), faulty)
    assert len(caught.value.faults) == 3
    assert "Did you mean" in str(caught.value) and "'bert.encoder.layer.2' must stand outside the blocks" in str(
        caught.value
    )


def test_a_family_without_blocks_does_not_help_where_no_blocks_are_found():
    with pytest.raises(ModelError, match="Where the blocks of Custom are is not known"):
        Anatomy.of(Custom(None), Family(head=("out",)))
