"""lora: a trainable product of two thin matrices beside each chosen weight."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import luthier
from luthier.core.claims import Place
from luthier.core.context import Around
from luthier.core.families import Family
from luthier.errors import ConflictError, LuthierError, MissingExtra, RunError
from luthier.ingredients.modules.isobn import IsoBN
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.surgery.mixout import Mixout
from luthier.planning.compose import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.little import recipe, sentences
from tests.tiny import FAMILIES, tiny

BATCH = {"input_ids": torch.arange(3, 35).reshape(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


def trained(model: torch.nn.Module, ingredient: LoRA, steps: int = 3):
    run = begin(model, [ingredient], learning_rate=1e-1, steps=steps)
    for _ in range(steps):
        run.offer(run.closure(BATCH))
        run.step()
    return run


def test_by_hand_the_number_of_weights():
    # rank 2 on query and value of 3 blocks: 2 x 3 x (2 x 16 + 16 x 2) = 384; the head 16 x 3 + 3 = 51
    run = begin(tiny("bert"), [LoRA(r=2)], steps=1)
    assert run.plan.trainable == 384 + 51


def test_by_hand_the_merged_weight_is_w_plus_scaled_product():
    model = tiny("bert")
    old = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    run = begin(model, [LoRA(r=2, alpha=6.0)], steps=1)
    layer = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(0.5)
        layer.lora_B["default"].weight.fill_(0.25)
    run.finish()
    # each entry grows by (alpha / r) sum_r B A = 3 x 2 x 0.25 x 0.5 = 0.75
    assert torch.allclose(model.bert.encoder.layer[0].attention.self.query.weight, old + 0.75, atol=1e-6)


def test_at_first_nothing_changes():
    model = tiny("bert")
    before = model(**BATCH).logits
    run = begin(model, [LoRA()], steps=1)
    model.eval()
    assert torch.equal(model(**BATCH).logits, before)
    run.finish()
    assert all(torch.equal(value, tiny("bert").state_dict()[name]) for name, value in model.state_dict().items())


@given(st.integers(1, 6), st.floats(0.5, 32.0), st.booleans(), st.booleans())
@settings(max_examples=12, deadline=None)
def test_merged_and_unmerged_agree(r, alpha, rslora, dora):
    """float64: 1e-10 of the largest logit."""
    model = tiny("bert", layers=1).double()
    run = begin(model, [LoRA(r=r, alpha=alpha, rslora=rslora, dora=dora)], steps=1)
    draw = torch.Generator().manual_seed(r)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw))
    model.eval()
    before = model(**BATCH).logits.detach()
    plain = tiny("bert", layers=1).double()(**BATCH).logits
    assert float((before - plain).detach().abs().max()) > 1e-6  # the adapter says something
    run.finish()
    assert torch.allclose(model(**BATCH).logits, before, rtol=0, atol=1e-10 * float(before.abs().max()))


def test_it_learns_what_pefts_own_model_learns():
    """From the same start, three steps of the same AdamW: the same operations on the same numbers, to float32 rounding."""
    ours, base = tiny("bert"), tiny("bert")
    theirs = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    run = begin(ours, [LoRA(r=2, alpha=16.0), AdamW(weight_decay=0.0), Anneal("constant")], learning_rate=1e-2, steps=3)
    start = ours.state_dict()
    learns = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    names = {
        name: name.removeprefix("base_model.model.").replace("modules_to_save.default.", "").replace("..", ".")
        for name in learns
    }
    assert set(names.values()) == {name for name, weight in ours.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in learns.items():
            weight.copy_(start[names[name]])
    optimizer = torch.optim.AdamW(learns.values(), lr=1e-2, weight_decay=0.0)
    theirs.train()
    for _ in range(3):
        run.offer(run.closure(BATCH))
        run.step()
        theirs(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in learns.items():
        torch.testing.assert_close(weight, ours.state_dict()[names[name]], rtol=1e-4, atol=1e-6)


def test_only_the_adapter_and_the_head_learn():
    model = tiny("bert")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run = trained(model, LoRA(r=2))
    moved = []
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in start and not torch.equal(value, start[plain]):
            moved.append(plain)
    assert sorted(moved) == ["classifier.bias", "classifier.weight"]
    held = {name for group in run.optimizer.param_groups for name in group["names"]}
    assert all(".lora_" in name or name.startswith("classifier") for name in held)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_merged_it_gives_the_adapters_logits_and_the_plain_model_again(family):
    """float32: 1e-4 relative, which finish itself requires on its sample."""
    model = tiny(family)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    run = trained(model, LoRA(r=2))
    model.eval()
    before = model(**BATCH).logits
    run.finish()
    assert torch.allclose(model(**BATCH).logits, before, atol=1e-4 * float(before.abs().max().clamp(min=1.0)))
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "fields", [{"dora": True}, {"rslora": True}, {"target": ("all-linear",)}, {"target": ("key",)}, {"dropout": 0.3}]
)
def test_its_relatives_train_merge_and_change_the_model(fields):
    model = tiny("bert")
    start = copy.deepcopy(model.state_dict())
    trained(model, LoRA(r=2, **fields)).finish()
    assert list(model.state_dict()) == list(start)
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items() if "encoder" in name)


def test_the_adapter_is_saved_as_peft_loads_it(tiny_model, tmp_path):
    luthier.fit(
        recipe([{"lora": {"r": 2, "alpha": 8}}, "adamw"], steps=8),
        model=tiny_model,
        data=sentences(),
        out=tmp_path / "run",
    )
    told = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["task_type"], told["modules_to_save"]) == (2, "SEQ_CLS", ["classifier"])
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    rows = torch.arange(5, 25).reshape(2, 10)
    assert torch.allclose(theirs(input_ids=rows).logits, merged(input_ids=rows).logits, atol=1e-5)


def saved(model: torch.nn.Module, path, *, before=(), after=(), **fields) -> torch.Tensor:
    """Trains with what stands before it and after it, saves the adapter at ``path`` and gives the merged model's logits."""
    stage = Stage(ingredients=(*before, LoRA(r=2, **fields), *after), steps=2, learning_rate=1e-1)
    plan = compose(Recipe(name="x", stages=(stage,)), skeleton(model))
    run = Run(plan.stages[0], model, seed=0, around=Around(sample=[BATCH]), folder=path)
    for _ in range(2):
        run.offer(run.closure(BATCH))
        run.step()
    run.finish()
    return model(**BATCH).logits


@pytest.mark.parametrize(
    "fields", [{}, {"target": ("all-linear",), "rslora": True}, {"target": ("all-linear",), "dora": True}]
)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_peft_loads_the_adapter_of_every_family(family, fields, tmp_path):
    """float32, two ways to add the same product: 1e-4 of the largest logit."""
    merged = saved(tiny(family), tmp_path, **fields)
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(**BATCH).logits, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    assert not torch.allclose(tiny(family)(**BATCH).logits, merged, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("other", [Mixout(p=0.5, where=("head",)), IsoBN()])
@pytest.mark.parametrize("at", ["before", "after"])
def test_peft_loads_the_adapter_wherever_others_that_change_the_head_stand(at, other, family, tmp_path):
    merged = saved(tiny(family), tmp_path, **{at: (other,)})
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = set(tiny(family).state_dict())
    assert all(name.removeprefix("base_model.model.") in names for name in kept if ".lora_" not in name)
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(**BATCH).logits, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))


@pytest.mark.parametrize("family", ["roberta", "electra", "deberta-v2"])
def test_a_head_whose_modules_are_called_like_the_target_learns_whole(family, tmp_path):
    model = tiny(family)
    merged = saved(model, tmp_path, target=("dense",))  # the head has a module called dense too
    assert not [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "base_layer" in name]
    theirs = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    assert torch.allclose(theirs(**BATCH).logits, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))


@pytest.mark.parametrize(("family", "names"), [
    ("bert", {"query", "value"}), ("albert", {"query", "value"}), ("distilbert", {"q_lin", "v_lin"}), ("mpnet", {"q", "v"}),
    ("deberta-v2", {"query_proj", "value_proj"}), ("llama", {"q_proj", "v_proj"}), ("t5", {"q", "v"}),
    ("modernbert", {"Wqkv"}), ("gpt2", {"c_attn"}),  # query, key and value in one
])  # fmt: skip
def test_without_a_target_it_is_the_attentions_query_and_value_in_every_family(family, names):
    run = begin(tiny(family), [LoRA(r=2)], steps=1)
    held = {
        name.partition(".lora_")[0].rpartition(".")[2] for name, _ in run.model.named_parameters() if ".lora_" in name
    }
    assert held == names


def test_a_target_may_be_a_glob_over_whole_names():
    run = begin(tiny("bert"), [LoRA(r=2, target=("*.layer.[01].*.query",))], steps=1)
    held = {name.partition(".lora_")[0] for name, _ in run.model.named_parameters() if ".lora_" in name}
    assert held == {f"bert.encoder.layer.{number}.attention.self.query" for number in (0, 1)}


def test_a_model_that_says_where_its_parts_are_has_its_blocks_linears_taken(tmp_path):
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Module()
            self.net.embed = torch.nn.Linear(4, 4)
            self.net.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
            self.net.out = torch.nn.Linear(4, 2)

    family = Family(blocks="net.layers", embeddings=("net.embed",), head=("net.out",))
    model = Stack()
    names = list(model.state_dict())
    run = begin(model, [LoRA(r=2)], steps=1, family=family)
    assert {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name} == {
        "net.layers.0",
        "net.layers.1",
    }
    run._folder = tmp_path
    run.finish()
    assert list(model.state_dict()) == names
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["modules_to_save"] == ["net.out"]  # and not the whole net


def test_after_finish_it_is_copied_saved_and_loaded_as_any_model(tmp_path):
    model = tiny("bert")
    trained(model, LoRA(r=2)).finish()
    copy.deepcopy(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_without_peft_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "luthier\[peft\]"'):
        begin(tiny("bert"), [LoRA()], steps=1)


@pytest.mark.parametrize("flip", [False, True])
def test_with_mixout_it_is_refused_as_the_base_does_not_move(flip):
    pair = [LoRA(r=2), Mixout(p=0.5)]
    with pytest.raises(ConflictError, match="sets the weights as the forward pass sees them, which .* sets too"):
        begin(tiny("bert"), pair[::-1] if flip else pair, steps=1)


def test_targets_that_match_nothing_are_all_told():
    with pytest.raises(LuthierError) as caught:
        begin(tiny("bert"), [LoRA(target=("query", "q_proj", "*.attn.*", "classifier"))], steps=1)
    assert [fault.got for fault in caught.value.faults] == ["'q_proj'", "'*.attn.*'", "'classifier'"]


def test_a_target_that_matches_nothing_names_what_there_is():
    with pytest.raises(LuthierError, match=r"Linear modules here end with: .*query") as caught:
        begin(tiny("bert"), [LoRA(target=("q_proj",))], steps=1)
    assert "lora.target" in str(caught.value)


def test_a_merge_that_changed_the_logits_would_stop_the_run(monkeypatch):
    model = tiny("bert")
    run = begin(model, [LoRA(r=2)], steps=1, sample=[BATCH])
    from peft.tuners.lora import Linear

    monkeypatch.setattr(
        Linear, "merge", lambda self, safe_merge=False: torch.nn.init.eye_(self.get_base_layer().weight)
    )
    with pytest.raises(RunError, match="the merged model's logits differ"):
        run.finish()


def test_planning_leaves_the_skeleton_with_the_names_it_had():
    shape = skeleton(tiny("bert"))
    names = [name for name, _ in shape.named_parameters()]
    made = Recipe(name="x", stages=(Stage(name="a", ingredients=(LoRA(),), steps=1), Stage(name="b", steps=1)))
    plan = compose(made, shape)
    assert [name for name, _ in shape.named_parameters()] == names
    assert any(".lora_A." in row.name for row in plan.stages[0].table.rows)
    assert not any(".lora_A." in row.name for row in plan.stages[1].table.rows)


def test_it_keeps_its_promises():
    """Its product is in modules of its own, which the suite does not see as a change of the weights themselves."""
    check_ingredient(LoRA(r=2, dropout=0.1), unobservable=[Place.FORWARD_WEIGHTS])


def test_it_matters():
    model = tiny("bert")
    trained(model, LoRA(r=2)).finish()
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(model.state_dict()[query], tiny("bert").state_dict()[query])
