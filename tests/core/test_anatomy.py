"""Role, kind and depth of every weight, for every family."""

from __future__ import annotations

from collections import Counter

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from luthier.core.anatomy import Anatomy, Family, canonical, select_all
from luthier.errors import LuthierError, ModelError, RecipeError
from tests.tiny import FAMILIES, tiny

# family: (embeddings, a block, bridge, head) as numbers of tensors, counted from the classes; the last linear of the head
COUNTED = {
    "bert": ((5, 16, 2, 2), "classifier"),
    "roberta": ((5, 16, 0, 4), "classifier.out_proj"),
    "distilbert": ((4, 16, 0, 4), "classifier"),
    "electra": ((7, 16, 0, 4), "classifier.out_proj"),
    "deberta-v2": ((7, 16, 0, 4), "classifier"),
    "mpnet": ((5, 16, 0, 4), "classifier.out_proj"),
    "gpt2": ((2, 12, 2, 1), "score"),
    "llama": ((1, 9, 1, 1), "score"),
    "qwen2": ((1, 12, 1, 1), "score"),
}
PLACES = {
    "bert": {"bert.pooler.dense.weight": ("bridge", 4), "bert.embeddings.LayerNorm.bias": ("embeddings", 0)},
    "roberta": {"classifier.dense.weight": ("head", 5), "roberta.encoder.layer.2.output.dense.weight": ("block", 3)},
    "distilbert": {"pre_classifier.weight": ("head", 5), "distilbert.transformer.layer.0.ffn.lin1.bias": ("block", 1)},
    "electra": {"electra.embeddings_project.weight": ("embeddings", 0)},
    "deberta-v2": {
        "deberta.encoder.rel_embeddings.weight": ("embeddings", 0),
        "deberta.encoder.LayerNorm.weight": ("embeddings", 0),
        "pooler.dense.weight": ("head", 5),
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in.weight": ("embeddings", 0),
        "albert.pooler.weight": ("bridge", 2),
    },
    "mpnet": {"mpnet.encoder.relative_attention_bias.weight": ("embeddings", 0)},
    "modernbert": {
        "model.final_norm.weight": ("bridge", 4),
        "head.dense.weight": ("head", 5),
        "head.norm.weight": ("head", 5),
    },
    "gpt2": {
        "transformer.wpe.weight": ("embeddings", 0),
        "transformer.ln_f.weight": ("bridge", 4),
        "score.weight": ("head", 5),
    },
    "llama": {"model.norm.weight": ("bridge", 4), "model.layers.1.mlp.up_proj.weight": ("block", 2)},
    "qwen2": {"model.embed_tokens.weight": ("embeddings", 0)},
    "t5": {
        "transformer.shared.weight": ("embeddings", 0),
        "transformer.encoder.final_layer_norm.weight": ("bridge", 4),
    },
}
BERT = Anatomy.of(tiny("bert", meta=True))


@pytest.mark.parametrize("family", COUNTED)
def test_the_tensors_of_each_role_are_counted(family):
    anatomy = Anatomy.of(tiny(family, meta=True))
    (embeddings, block, bridge, head), output = COUNTED[family]
    found = Counter(part.role for part in anatomy.parts)
    assert (found["embeddings"], found["block"], found["bridge"], found["head"]) == (
        embeddings,
        3 * block,
        bridge,
        head,
    )
    assert all(sum(part.depth == depth for part in anatomy.parts) == block for depth in (1, 2, 3))
    assert anatomy.output == output


@pytest.mark.parametrize("family", PLACES)
def test_named_weights_are_where_they_belong(family):
    anatomy = Anatomy.of(tiny(family, meta=True))
    for name, (role, depth) in PLACES[family].items():
        assert (anatomy.part(name).role, anatomy.part(name).depth) == (role, depth), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False])
def test_every_weight_has_one_place_and_names_are_the_models(family, head):
    model = tiny(family, head=head, meta=True)
    anatomy = Anatomy.of(model)
    assert [part.name for part in anatomy.parts] == [name for name, _ in model.named_parameters()]
    assert len({part.canonical for part in anatomy.parts}) == len(anatomy.parts)
    assert sum(part.numel for part in anatomy.parts) == sum(weight.numel() for weight in model.parameters())
    assert anatomy.blocks == (1 if family == "albert" else 3)
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in anatomy.block_names)
    if not head:
        assert anatomy.output is None
        assert not anatomy.select("head")


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_told_from_weights(family):
    anatomy = Anatomy.of(tiny(family, meta=True))
    for part in anatomy.parts:
        if part.kind == "norm":
            assert len(part.shape) == 1
            assert "norm" in part.name.lower() or ".ln_" in part.name
        elif part.kind == "bias":
            assert part.name.endswith("bias")
        else:
            assert len(part.shape) == 2, part.name


def test_only_albert_shares_its_layers():
    assert [family for family in FAMILIES if Anatomy.of(tiny(family, meta=True)).shared] == ["albert"]


def test_selectors_by_hand():
    assert BERT.select("head") == {"classifier.weight", "classifier.bias"}
    assert BERT.select("bridge") == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert len(BERT.select("top:2")) == len(BERT.select("bottom:2")) == 32
    assert BERT.select("top:0") == frozenset()
    assert BERT.select("block:-1") == BERT.select("block:2") == BERT.select("top:1")
    assert BERT.select("*.word_embeddings.weight") == {"bert.embeddings.word_embeddings.weight"}
    assert BERT.select("nothing.*") == frozenset()
    assert BERT.select("all") == BERT.select("backbone") | BERT.select("head")
    assert BERT.select("weights") | BERT.select("biases") | BERT.select("norms") == BERT.select("all")
    assert select_all(BERT, ["head", "bridge"]) == BERT.select("head") | BERT.select("bridge")


@pytest.mark.parametrize("bad", ["top:x", "top:4", "block:3", "block:-4", "bottom:-1"])
def test_a_number_that_is_none_is_refused(bad):
    with pytest.raises(RecipeError, match=bad):
        BERT.select(bad)


@settings(max_examples=50)
@given(
    st.sampled_from(["embeddings", "blocks", "bridge", "head", "norms", "biases", "weights", "top:1", "*.bias", "b*"])
)
def test_a_selection_is_a_part_of_the_model(selector):
    assert BERT.select(selector) <= BERT.select("all")


def test_roles_partition_the_model():
    roles = [BERT.select(word) for word in ("embeddings", "blocks", "bridge", "head")]
    assert sum(map(len, roles)) == len(frozenset().union(*roles)) == len(BERT.parts)


def test_depths_have_names():
    assert [BERT.depth_name(depth) for depth in BERT.depths] == [
        "embeddings",
        "block 0",
        "block 1",
        "block 2",
        "bridge",
        "head",
    ]


def test_injected_and_parametrized_names_keep_their_places():
    model = tiny("bert")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"]), model)
    anatomy = Anatomy.of(model)
    base = anatomy.part("bert.encoder.layer.1.attention.self.query.base_layer.weight")
    assert (base.canonical, base.depth, base.kind) == ("bert.encoder.layer.1.attention.self.query.weight", 2, "weight")
    thin = anatomy.part("bert.encoder.layer.1.attention.self.query.lora_A.default.weight")
    assert (thin.role, thin.depth) == ("block", 2)

    mixed = tiny("bert")
    parametrize.register_parametrization(mixed.bert.pooler.dense, "weight", nn.Identity())
    parametrize.register_parametrization(mixed.bert.pooler.dense, "bias", nn.Identity())
    parts = {part.canonical: part for part in Anatomy.of(mixed).parts}
    assert parts["bert.pooler.dense.weight"].role == "bridge"
    assert parts["bert.pooler.dense.bias"].kind == "bias"
    assert canonical("a.parametrizations.weight.original") == "a.weight"


def test_a_peft_model_is_looked_through():
    wrapped = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    anatomy = Anatomy.of(wrapped)
    assert [part.name for part in anatomy.parts] == [name for name, _ in wrapped.named_parameters()]
    assert anatomy.blocks == 3


def test_a_tied_head_counts_once_at_the_embeddings():
    model = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))  # fmt: skip
    anatomy = Anatomy.of(model)
    assert anatomy.part("bert.embeddings.word_embeddings.weight").depth == 0
    assert "cls.predictions.decoder.weight" not in {part.name for part in anatomy.parts}
    assert anatomy.part("cls.predictions.transform.dense.weight").role == "head"


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.towers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)


def test_an_unknown_model_is_not_guessed():
    with pytest.raises(ModelError) as caught:
        Anatomy.of(Custom())
    said = str(caught.value)
    assert "no stack of blocks inside a backbone was found" in said
    assert "towers (5)" in said
    assert "family: {blocks:" in said
    assert "Family(blocks=" in said


def test_a_declared_family_is_taken_at_its_word():
    anatomy = Anatomy.of(Custom(), Family(blocks="towers", embeddings=("embed",), bridge=("norm",), head=("out",)))
    assert [part.depth for part in anatomy.parts] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert anatomy.output == "out"
    assert anatomy.family == "declared"


def test_a_wrong_declaration_is_told_with_all_its_faults():
    with pytest.raises(LuthierError) as caught:
        Anatomy.of(Custom(), Family(blocks="tower", embeddings=("embd",), head=("out",)))
    assert [fault.where for fault in caught.value.faults] == ["family.embeddings", "family.blocks"]
    assert "Did you mean 'towers'?" in str(caught.value)
    with pytest.raises(LuthierError, match=r"no part holds the weight 'norm\.weight'"):
        Anatomy.of(Custom(), Family(blocks="towers", embeddings=("embed",), head=("out",)))


def test_bert_base_has_201_tensors():
    # 5 embeddings, 12 x 16, pooler 2, classifier 2
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig())
    anatomy = Anatomy.of(model)
    assert len(anatomy.parts) == 201
    assert anatomy.block_names[10] == "bert.encoder.layer.10"
    assert anatomy.part("bert.encoder.layer.10.output.dense.weight").depth == 11
