"""lora: a trainable product of two thin matrices beside each chosen weight."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import luthier
from luthier.errors import LuthierError, RunError
from luthier.ingredients.modules.lora import LoRA
from luthier.plan import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import begin
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


def test_a_target_that_matches_nothing_names_what_there_is():
    with pytest.raises(LuthierError, match=r"Linear modules here end with: .*query") as caught:
        begin(tiny("bert"), [LoRA(target=("q_proj",))], steps=1)
    assert "lora.target" in str(caught.value)


def test_a_merge_that_changed_the_logits_would_stop_the_run(monkeypatch):
    model = tiny("bert")
    run = begin(model, [LoRA(r=2)], steps=1)
    run._sample = [BATCH]
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
    check_ingredient(LoRA(r=2, dropout=0.1))


def test_it_matters():
    model = tiny("bert")
    trained(model, LoRA(r=2)).finish()
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(model.state_dict()[query], tiny("bert").state_dict()[query])
