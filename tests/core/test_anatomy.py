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

from luthier.core.anatomy import Anatomy, canonical, select_all
from luthier.core.families import Family
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
# the same where blocks differ: ModernBERT's first has no norm before its attention, T5's first holds the relative positions of all
UNEVEN = {
    "albert": ((7, (16,), 2, 2), "classifier"),
    "modernbert": ((2, (5, 6, 6), 1, 4), "classifier"),
    "t5": ((1, (9, 8, 8), 1, 2), "classifier"),
}
# families that share their code with one of the above, and Qwen3's two norms more in each attention
RELATIVES = {
    "xlm-roberta": ((5, 48, 0, 4), "classifier.out_proj"),
    "camembert": ((5, 48, 0, 4), "classifier.out_proj"),
    "mistral": ((1, 27, 1, 1), "score"),
    "gemma": ((1, 27, 1, 1), "score"),
    "qwen3": ((1, 33, 1, 1), "score"),
}
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
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


def of_roles(anatomy: Anatomy) -> tuple[int, ...]:
    found = Counter(part.role for part in anatomy.parts)
    return tuple(found[role] for role in ("embeddings", "block", "bridge", "head"))


def small(kind: str, model_type: str, **more) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(model_type, **SMALL | more))


@pytest.mark.parametrize("family", UNEVEN)
def test_blocks_need_not_be_alike(family):
    anatomy = Anatomy.of(tiny(family, meta=True))
    (embeddings, blocks, bridge, head), output = UNEVEN[family]
    assert of_roles(anatomy) == (embeddings, sum(blocks), bridge, head)
    assert tuple(sum(part.depth == 1 + at for part in anatomy.parts) for at in range(len(blocks))) == blocks
    assert anatomy.output == output


@pytest.mark.parametrize("model_type", RELATIVES)
def test_relatives_are_read_by_the_same_rule(model_type):
    anatomy = Anatomy.of(small("AutoModelForSequenceClassification", model_type))
    assert (of_roles(anatomy), anatomy.output) == RELATIVES[model_type]
    assert anatomy.blocks == 3


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


def test_with_lora_on_the_last_linear_the_output_is_still_what_gives_the_logits():
    model = tiny("bert")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query", "classifier"]), model)
    anatomy = Anatomy.of(model)
    assert anatomy.output == "classifier"  # classifier.lora_B.default is a linear too, but gives a summand only
    assert anatomy.part("classifier.lora_B.default.weight").role == "head"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_learned_prompt_beside_the_model_is_refused_not_left_out(family):
    # PEFT keeps the prompt outside the wrapped model; Llama's own backbone is called "model", as a wrapped model is.
    learned = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, num_layers=3, token_dim=16, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="beside the wrapped model"):
        Anatomy.of(peft.get_peft_model(tiny(family), learned))


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


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_and_decoder_are_two_stacks_and_not_guessed(model_type):
    more = {
        "num_layers": 2,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "d_model": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    with pytest.raises(ModelError, match="more than one stack of blocks was found") as caught:
        Anatomy.of(small("AutoModel", model_type, **more))
    assert "decoder." in str(caught.value)


def test_blocks_that_lie_in_several_lists_are_not_guessed():
    # XLM keeps attentions, norms and feed-forwards in four lists as long as each other.
    with pytest.raises(ModelError, match="more than one stack"):
        Anatomy.of(small("AutoModelForSequenceClassification", "xlm", emb_dim=16, n_layers=3, n_heads=2))


def test_a_head_without_a_known_backbone_is_not_taken_for_a_bridge():
    class StrangerForSequenceClassification(transformers.BertPreTrainedModel):
        base_model_prefix = "stranger"

        def __init__(self, config):
            super().__init__(config)
            self.body = transformers.BertModel(config)
            self.classifier = nn.Linear(16, 3)

    with pytest.raises(ModelError, match="no backbone was found: there is no module 'stranger'"):
        Anatomy.of(StrangerForSequenceClassification(transformers.BertConfig(**SMALL)))


def test_lists_of_embedding_tables_are_no_blocks():
    # MarkupLM has 50 tables for tags and 50 for their numbers by default, and fewer blocks.
    anatomy = Anatomy.of(small("AutoModelForSequenceClassification", "markuplm"))
    assert anatomy.block_names == tuple(f"markuplm.encoder.layer.{number}" for number in range(3))


def test_what_a_backbone_owns_itself_is_an_embedding():
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=3, n_head=2, d_inner=32)
    xlnet = Anatomy.of(transformers.XLNetForSequenceClassification(config))
    assert xlnet.part("transformer.mask_emb").depth == 0
    assert xlnet.part("transformer.layer.0.rel_attn.r_w_bias").kind == "bias"


def test_what_is_named_before_the_blocks_but_runs_after_them_is_the_bridge():
    opt = Anatomy.of(small("AutoModelForSequenceClassification", "opt", ffn_dim=32, word_embed_proj_dim=16))
    assert opt.part("model.decoder.final_layer_norm.weight").role == "bridge"


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


class Tokens(nn.Module):
    """Learned tokens of its own, blocks with names, an activation among them."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(4))
        self.body = nn.Sequential()
        self.body.add_module("first", nn.TransformerEncoderLayer(4, 1, 8))
        self.body.add_module("act", nn.ReLU())
        self.body.add_module("second", nn.Linear(4, 4))
        self.out = nn.Linear(4, 2)
        self.spare = nn.ModuleList()


def test_declared_blocks_may_have_names_and_a_single_weight_may_be_declared():
    anatomy = Anatomy.of(Tokens(), Family(blocks="body", embeddings=("cls",), head=("out",)))
    assert anatomy.block_names == ("body.first", "body.second")  # an activation has no weights: no block
    assert anatomy.select("block:1") == {"body.second.weight", "body.second.bias"}
    assert (anatomy.part("cls").role, anatomy.part("out.weight").depth) == ("embeddings", 4)
    assert anatomy.part("body.first.self_attn.in_proj_bias").kind == "bias"
    assert anatomy.part("body.first.self_attn.in_proj_weight").kind == "weight"


def test_a_module_in_two_parts_and_a_stack_without_weights_are_told_together():
    with pytest.raises(ModelError) as caught:
        Anatomy.of(Tokens(), Family(blocks="spare", embeddings=("cls", "out"), head=("out",)))
    assert [fault.where for fault in caught.value.faults] == ["family.head", "family.blocks"]


def test_a_weight_of_the_stack_itself_must_be_declared():
    model = Tokens()
    model.body.register_parameter("gate", nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError, match=r"no part holds the weight 'body\.gate'"):
        Anatomy.of(model, Family(blocks="body", embeddings=("cls",), head=("out",)))
    declared = Family(blocks="body", embeddings=("cls", "body.gate"), head=("out",))
    assert Anatomy.of(model, declared).part("body.gate").depth == 0
