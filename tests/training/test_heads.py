"""``head: mlp``: two layers drawn from the seed, trained, carried and saved as the head; the rest is the checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedTokenizerFast

import luthier
from luthier.core.anatomy import Anatomy
from luthier.core.heads import two_layers
from luthier.core.seeds import borrowed
from luthier.errors import ModelError, RecipeError
from luthier.recipe.recipe import Recipe
from luthier.recipe.schema import schema
from luthier.recipe.text import build, read, write
from luthier.sources.models import digest, load
from luthier.sources.tasks import Classification
from luthier.training import fitting, stages
from luthier.training.job import prepare
from tests.little import KillsItself, in_a_child, same, sentences, weights
from tests.tiny import tiny
from tests.tinyfolder import tiny_config, tiny_tokenizer

TWO = Classification(("bad", "good"))
BOTH = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def folder(path: Path, family: str, *, head: bool = False) -> Path:
    """A tiny pretrained model of ``family`` as it lies on disk."""
    tiny(family, head=head, labels=2, layers=2, dropout=0.1).save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return path


def state(model: Any) -> dict[str, Tensor]:
    """All weights and buffers, also those that are not saved."""
    return {name: value.clone() for name, value in (*model.state_dict().items(), *model.named_buffers())}


def without(told: dict[str, Tensor], names: set[str] | tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in told.items() if name not in names}


# ---- what is drawn


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_both_layers_come_from_the_seed_and_the_rest_from_the_checkpoint(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", family)
    own = load(path, TWO, seed=0)
    first, again, other = (load(path, TWO, seed=seed, head="mlp") for seed in (0, 0, 1))
    head = Anatomy.of(first.model, two_layers(first.model)).select("head")
    assert set(first.fresh) == head and len(head) == 4
    assert first.digest == again.digest != other.digest
    assert first.pretrained == again.pretrained == other.pretrained
    body = without(state(first.model), set(head))
    assert digest(body) == digest(without(state(other.model), set(head)))
    assert digest(body) == digest(without(state(own.model), set(head)))
    for name, value in load_file(path / "model.safetensors").items():
        live = f"{family}.{name}"
        assert torch.equal(first.model.get_parameter(live), value) is (live not in head or not value.any()), name
    for name in head:
        if name.endswith("weight"):
            drawn = first.model.get_parameter(name)
            assert torch.equal(drawn, again.model.get_parameter(name))
            assert not torch.equal(drawn, other.model.get_parameter(name))
            assert not torch.equal(drawn, own.model.get_parameter(name))
    assert len(first.notes) == 1 and first.notes[0].endswith("classifier, drawn anew") and "pooler" in first.notes[0]


def test_by_hand_the_pooler_is_drawn_first_and_the_last_layer_next(tiny_model: Path) -> None:
    with borrowed(3, "head"):  # BERT's initialiser: N(0, 0.02) for weights, zeros for biases
        dense, last = (torch.empty(rows, 16).normal_(0.0, 0.02) for rows in (16, 2))
    model = load(tiny_model, TWO, seed=3, head="mlp").model
    assert torch.equal(model.bert.pooler.dense.weight, dense) and not model.bert.pooler.dense.bias.any()
    assert torch.equal(model.classifier.weight, last) and not model.classifier.bias.any()
    with borrowed(3, "head"):
        alone = torch.empty(2, 16).normal_(0.0, 0.02)
    assert torch.equal(load(tiny_model, TWO, seed=3).model.classifier.weight, alone)  # own: as ever


def test_own_is_what_a_model_without_the_word_is(tiny_model: Path) -> None:
    plain, own = load(tiny_model, TWO, seed=0), load(tiny_model, TWO, seed=0, head="own")
    assert (own.digest, own.pretrained, own.fresh) == (plain.digest, plain.pretrained, plain.fresh)
    assert own.fresh == ("classifier.weight", "classifier.bias")
    job = prepare(read("lp", sets=["max_length=16"]), model=tiny_model, data_source=sentences())
    assert job.plan.stages[0].family is None and job.recipe.head == "own"
    assert job.plan.stages[0].anatomy == Anatomy.of(plain.model)


@pytest.mark.parametrize("family", ["roberta", "electra", "mpnet", "deberta-v2", "distilbert"])
def test_a_pretrained_model_whose_head_has_two_layers_anyway_is_as_it_was(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", family)
    own, mlp = load(path, TWO, seed=0), load(path, TWO, seed=0, head="mlp")
    assert (own.digest, own.pretrained, own.fresh) == (mlp.digest, mlp.pretrained, mlp.fresh)
    assert len(mlp.fresh) == 4


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_checkpoints_head_for_these_labels_is_not_kept(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", family, head=True)
    own, mlp = (load(path, Classification(("0", "1")), seed=5, head=head) for head in ("own", "mlp"))  # type: ignore[arg-type]
    assert own.fresh == () and len(mlp.fresh) == 4
    for name in mlp.fresh:
        if name.endswith("weight"):
            assert not torch.equal(own.model.get_parameter(name), mlp.model.get_parameter(name))
    assert digest(without(state(own.model), mlp.fresh)) == digest(without(state(mlp.model), mlp.fresh))


def pair(dropout: float = 0.1) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(tiny_config(dropout=dropout)), tiny_tokenizer()


def test_a_model_in_memory_gets_its_head_drawn_in_place_as_one_from_a_folder(tiny_model: Path) -> None:
    model, tokenizer = pair()
    before = state(model)
    torch.manual_seed(11)
    drawn_next = torch.random.get_rng_state()
    loaded = load((model, tokenizer), TWO, seed=3, head="mlp")
    assert torch.equal(torch.random.get_rng_state(), drawn_next)
    assert loaded.model is model and set(loaded.fresh) == BOTH
    filed = load(tiny_model, TWO, seed=3, head="mlp").model
    assert all(torch.equal(model.get_parameter(name), filed.get_parameter(name)) for name in BOTH)
    assert digest(without(state(model), BOTH)) == digest(without(before, BOTH))


def test_a_model_in_memory_that_is_not_transformers_own_is_refused(tiny_model: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny_config()

    with pytest.raises(ModelError, match="head  can be mlp for transformers' own models only; got Mine"):
        load((Mine(), tiny_tokenizer()), TWO, seed=0, head="mlp")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_is_refused_before_anything_is_written(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", family)
    with pytest.raises(ModelError, match="head  can be mlp where .*before score.  Say head: own") as caught:
        luthier.fit("lp", model=path, data=sentences(), out=tmp_path / "run", sets=["head=mlp", "max_length=16"])
    assert len(caught.value.faults) == 1
    assert not (tmp_path / "run").exists()
    model = tiny(family, labels=2)
    before = digest(state(model))
    with pytest.raises(ModelError):
        load((model, tiny_tokenizer()), TWO, seed=0, head="mlp")
    assert digest(state(model)) == before


# ---- the recipe


def test_the_word_is_in_recipe_text_digest_and_schema() -> None:
    own, mlp = read("eh-ft"), read("eh-ft", sets=["head=mlp"])
    assert (own.head, mlp.head) == ("own", "mlp") and own.digest != mlp.digest
    assert "head: mlp" in write(mlp) and build(mlp.to_dict(), inside="a test") == mlp
    told = schema()
    assert told["properties"]["head"]["enum"] == ["own", "mlp"] and told["properties"]["head"]["default"] == "own"
    with pytest.raises(RecipeError, match="head"):
        read("eh-ft", sets=["head=mpl"])


def test_the_plan_holds_both_layers_in_every_selector_and_stage(tiny_model: Path) -> None:
    job = prepare(read("eh-ft", sets=["head=mlp", "max_length=16"]), model=tiny_model, data_source=sentences())
    for plan in job.plan.stages:
        assert plan.anatomy.select("head") == BOTH
        assert not plan.anatomy.select("bridge")
        assert BOTH.isdisjoint(plan.anatomy.select("backbone"))
    trained = {row.name for row in job.plan.stages[0].table.rows if row.trainable}
    assert trained > BOTH and all(".lora_" in name for name in trained - BOTH)


# ---- training


def test_a_solved_probe_reads_the_random_layer_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    sets = ["head=mlp", "max_length=16"]
    report = luthier.fit("lp", model=tiny_model, data=sentences(), out=tmp_path / "run", sets=sets)
    before = prepare(read("lp", sets=sets), model=tiny_model, data_source=sentences()).loaded.model.state_dict()
    after = weights(tmp_path / "run")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert any(
        "only classifier is solved; the head's other layers (bert.pooler.dense.weight, bert.pooler.dense.bias) keep"
        in note
        for note in report.stages[0].notes
    )


def probed(carry: list[str] | None = None) -> Recipe:
    """A linear probe by steps, on two layers."""
    stage = {
        "name": "probe", "steps": 8, "lr": 1e-2, "batch_size": 8, "ingredients": [{"freeze": {"keep": ["head"]}}],
        "carry": carry,
    }  # fmt: skip
    return build({"name": "probed", "head": "mlp", "max_length": 16, "stages": [stage]}, inside="a test")


def test_a_probe_by_steps_trains_both_layers_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    report = luthier.fit(probed(), model=tiny_model, data=sentences(), out=tmp_path / "run")
    before = prepare(probed(), model=tiny_model, data_source=sentences()).loaded.model.state_dict()
    after = weights(tmp_path / "run")
    assert {name for name in after if not torch.equal(after[name], before[name])} == BOTH
    assert report.stages[0].trainable_parameters == 16 * 16 + 16 + 2 * 16 + 2
    assert {(row.name, row.weights) for row in report.movement if row.distance} == {("head", 306)}
    assert any("frozen blocks are computed once and kept" in note for note in report.stages[0].notes)


@pytest.mark.parametrize("family", ["bert", "albert", "roberta"])
def test_what_is_saved_loads_in_plain_transformers_with_the_same_logits(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "start", family)
    stage = {"name": "all", "steps": 3, "lr": 1e-3, "batch_size": 8}
    made = build({"name": "all", "head": "mlp", "max_length": 16, "stages": [stage]}, inside="a test")
    job = prepare(made, model=path, data_source=sentences())
    report = luthier.fit(made, model=path, data=sentences(), out=tmp_path / "run")
    fitted, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert list(fitted.state_dict()) == list(job.loaded.model.state_dict())  # no module was put in
    assert not [note for note in report.warnings if "loaded again" in note]
    ours = job.loaded.model  # the same shape, with the run's weights
    ours.load_state_dict(weights(tmp_path / "run"))
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]])
    with torch.no_grad():
        assert torch.equal(fitted.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


def test_lp_ft_with_two_layers_trains_through_both_stages_and_goes_on_after_a_kill(
    tiny_model: Path, tmp_path: Path
) -> None:
    sets = ["head=mlp", "stages.1.steps=6", "stages.1.lr=1e-3", "max_length=16"]

    def run(out: str, **more: Any) -> Any:
        return luthier.fit("lp-ft", model=tiny_model, data=sentences(), out=tmp_path / out, sets=sets, **more)

    report = run("whole")
    assert [stage.steps for stage in report.stages] == [0, 6]
    assert {row.name for row in report.movement if row.stage == "finetune" and row.distance} == {
        "head", "block 1", "block 0", "embeddings",
    }  # fmt: skip
    for after in (8, 12):
        out = str(after)
        kills = KillsItself(after)
        ended = in_a_child(lambda: run(out, save_every=1, narrator=kills))  # noqa: B023
        assert ended
        assert not (tmp_path / out / "report.json").exists()
        run(out, resume=True)
        assert same(weights(tmp_path / "whole"), weights(tmp_path / out))


# ---- EH-FT: the head alone goes on


EFFICIENT = {
    "lora": None,
    "bitfit": {"freeze": {"keep": ["biases", "head"]}},
}


def efficient(head: str, how: str) -> Recipe:
    """``eh-ft`` in a few steps, its first stage by LoRA as shipped, or by biases (BitFit)."""
    sets = ["stages.0.steps=5", "stages.0.lr=1e-2", "stages.1.steps=2", "max_length=16", f"head={head}"]
    made = read("eh-ft", sets=sets)
    if EFFICIENT[how] is None:
        return made
    plain = made.to_dict()
    plain["stages"][0]["ingredients"][0] = EFFICIENT[how]
    return build(plain, inside="a test")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], dict[str, Tensor]]]:
    """The head's names and all weights and buffers at the start of each stage that takes steps, as it begins."""
    found: list[tuple[set[str], dict[str, Tensor]]] = []
    plain = stages.attach

    def seen(job: Any, plan: Any, model: nn.Module, *rest: Any, **more: Any) -> Any:
        found.append((set(Anatomy.of(model, plan.family).select("head")), state(model)))
        return plain(job, plan, model, *rest, **more)

    monkeypatch.setattr(fitting.stages, "attach", seen)
    return found


@pytest.mark.parametrize("how", EFFICIENT)
@pytest.mark.parametrize("head", ["own", "mlp"])
def test_eh_ft_fine_tunes_from_the_pretrained_backbone_and_the_first_stages_head(
    head: str, how: str, tiny_model: Path, tmp_path: Path, starts: list[Any]
) -> None:
    made = efficient(head, how)
    pretrained = state(prepare(made, model=tiny_model, data_source=sentences()).loaded.model)
    alone = dataclasses.replace(made, stages=(dataclasses.replace(made.stages[0], carry=None),))
    luthier.fit(alone, model=tiny_model, data=sentences(), out=tmp_path / "first")
    trained = weights(tmp_path / "first")
    starts.clear()
    report = luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "run")
    [(names, first), (again, second)] = starts
    assert names == again == (BOTH if head == "mlp" else {"classifier.weight", "classifier.bias"})
    assert digest(first) == digest(pretrained)
    # stage 2: the backbone is the pretrained one by hash, buffers too; the head is the first stage's, bit for bit
    assert "bert.embeddings.position_ids" in second
    assert digest(without(second, names)) == digest(without(pretrained, names))
    for name in names:
        assert torch.equal(second[name], trained[name])
        assert not torch.equal(second[name], pretrained[name])
    changed = {name for name in trained if not torch.equal(trained[name], pretrained[name])} - names
    assert changed, "the first stage moved the backbone, which was put back"
    if how == "bitfit":
        assert all(name.endswith("bias") for name in changed)
    assert report.stages[0].notes[-1] == "only head goes on; the rest is as it was before the stage"


def test_a_buffer_that_training_changes_is_put_back_too(starts: list[Any]) -> None:
    model, tokenizer = pair()
    model.bert.register_buffer("seen", torch.zeros(()))

    def count(module: Any, given: Any, out: Any) -> None:
        if module.training:
            module.seen += 1

    model.bert.register_forward_hook(count)
    luthier.fit(efficient("mlp", "bitfit"), model=(model, tokenizer), data=sentences())
    [(_, first), (_, second)] = starts
    assert first["bert.seen"] == second["bert.seen"] == 0
    assert model.bert.seen == 2  # the second stage's own two steps


def test_the_adapter_of_the_first_stage_holds_both_layers(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    made = efficient("mlp", "lora")
    alone = dataclasses.replace(made, stages=(dataclasses.replace(made.stages[0], carry=None),))
    luthier.fit(alone, model=tiny_model, data=sentences(), out=tmp_path / "run")
    fitted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    base = load(tiny_model, TWO, seed=9).model  # another head: the adapter brings its own
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]])
    with torch.no_grad():
        ours, theirs = fitted(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)  # W + BA in one matrix, or beside it
