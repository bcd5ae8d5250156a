"""fit from end to end on a tiny model: what is saved, what is told, what stops it, and that the three doors are one."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import luthier
from luthier.core.anatomy import Anatomy
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.outputs import logits
from luthier.placement import Placement
from luthier.run import Run
from luthier.sources.models import load
from luthier.sources.tasks import Classification
from luthier.sources.text import collate
from luthier.training import frozen, probing, stages
from luthier.training.job import prepare
from luthier.training.trace import Trace
from tests.little import recipe, same, sentences, weights
from tests.tinyfolder import tiny_folder

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    out = tmp_path_factory.mktemp("finished") / "run"
    report = luthier.fit(
        recipe([*BASE, "temperature"], probe=True, steps=12, lr=2e-2), model=tiny_model, data=sentences(), out=out
    )
    return out, report


def test_the_run_folder_holds_what_it_should(finished):
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert {"recipe.yaml", "plan.json", "environment.json", "log.jsonl", "report.json", "report.html", "model"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    told = json.loads((out / "environment.json").read_text())
    assert told["identity"].keys() == {"recipe", "data", "model", "seed"}
    assert told["versions"]["torch"] == torch.__version__


def test_report_json_has_the_fields_that_are_promised(finished):
    out, _ = finished
    told = json.loads((out / "report.json").read_text())
    for split in ("validation", "test"):
        assert told["metrics"][split].keys() >= {"accuracy", "f1_macro", "mcc", "auroc", "nll", "brier", "ece", "n"}
        assert told["calibrated"][split].keys() == told["metrics"][split].keys()
    assert {"name", "steps", "seconds", "examples_per_second", "trainable_parameters", "peak_memory_bytes"} <= told[
        "stages"
    ][0].keys()
    assert [stage["steps"] for stage in told["stages"]] == [0, 12]
    assert {"seed", "recipe_digest", "warnings"} <= told.keys()


def test_the_recipe_that_is_saved_means_the_same_run(finished, tiny_model, tmp_path):
    out, report = finished
    again = luthier.fit(str(out / "recipe.yaml"), model=tiny_model, data=sentences(), out=tmp_path / "again")
    assert again.recipe_digest == report.recipe_digest
    assert same(weights(out), weights(tmp_path / "again"))


def test_the_saved_model_loads_with_plain_transformers_and_gives_our_logits(finished):
    out, report = finished
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    words = ["good fine film", "bad awful book the cast was poor"]
    with torch.no_grad():
        theirs = model(**tokenizer(words, padding=True, return_tensors="pt")).logits.numpy()
    told = luthier.predict(out, pd.DataFrame({"text": words}))
    scaled = theirs * np.asarray(report.calibration["scale"])
    likely = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    assert np.abs(likely - told.probabilities).max() < 1e-5
    assert told.labels == [("bad", "good")[at] for at in theirs.argmax(1)]


def test_a_fit_leaves_the_global_generators_as_they_were(tiny_model):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    luthier.fit(recipe(BASE), model=tiny_model, data=sentences())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(tiny_model, tmp_path):
    for at, out in enumerate(("one", "two", "other")):
        torch.manual_seed(at)
        luthier.fit(
            recipe(BASE), model=tiny_model, data=sentences(), out=tmp_path / out, seed=7 if out != "other" else 8
        )
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_evaluating_more_often_changes_no_bit(tiny_model, tmp_path, monkeypatch):
    """Ten steps with a validation after each, and as ten steps of a data set without validation in between."""
    real = Run.validate
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", lambda run, advance=Run.advance: (advance(run), real(run)))
        often = luthier.fit(recipe(BASE, steps=10), model=tiny_model, data=sentences(), out=tmp_path / "often")
    assert [step for step, _ in often.curves["validation"]] == list(range(1, 11))
    monkeypatch.setattr(Run, "validate", lambda run: {})
    never = luthier.fit(recipe(BASE, steps=10), model=tiny_model, data=sentences(), out=tmp_path / "never")
    assert never.curves["validation"] == []
    assert same(weights(tmp_path / "often"), weights(tmp_path / "never"))


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no wrong gradient scale, in double precision."""

    def touches(self):
        from luthier.core.claims import Place, owns

        return (owns(Place.OPTIMIZER),)

    def surgery(self, model, ctx):
        model.double()

    def optimizer(self, inner, ctx):
        return inner


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_add_up_to_the_big_batch(micro, tmp_path):
    """SGD in float64 without dropout: a wrong weight of one micro-batch would show in the third digit; here the twelfth agrees."""
    folder = tiny_folder(tmp_path / "tiny", dropout=0.0)
    ends = []
    for size in (None, micro):
        stage = luthier.Stage(ingredients=(PlainSGD(),), steps=5, learning_rate=0.5, batch_size=7, micro_batch=size)
        job = prepare(luthier.Recipe(name="sum", stages=(stage,), max_length=16), model=folder, data_source=sentences())
        model = job.loaded.model.double()
        run, _ = stages.attach(job, job.plan.stages[0], model, Placement())
        quiet = stages.Hooks(save=lambda *a: None, stop=lambda: False, log=lambda v: None)
        stages.train(job, run, Placement(), Trace(), quiet, Silent())
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert not torch.equal(
        ends[0]["classifier.weight"],
        load(folder, Classification(("bad", "good")), seed=0).model.state_dict()["classifier.weight"].double(),
    )
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-10, atol=1e-12)


def test_the_three_doors_end_on_the_same_bits(tmp_path):
    """fit, begin in one's own loop, and transformers.Trainer, on the same batches, without dropout."""
    import transformers

    from luthier.hosts import hf

    folder = tiny_folder(tmp_path / "tiny", dropout=0.0)
    made = recipe(BASE, steps=6)
    luthier.fit(made, model=folder, data=sentences(), out=tmp_path / "fit")

    def fresh():
        job = prepare(made, model=folder, data_source=sentences())
        plan, train = job.plan.stages[0], job.encoded["train"]
        batches = [collate(train, rows, pad_id=job.pad_id) for _, rows, _ in stages.steps(plan, 0)]
        run = luthier.begin(
            job.loaded.model,
            [luthier.Anneal(warmup=0.2), luthier.AdamW(), luthier.Clip()],
            learning_rate=1e-3,
            steps=6,
            loss=lambda model, batch: job.task.loss(
                model(**{key: value for key, value in batch.items() if key != "labels"}).logits, batch["labels"]
            ),
        )
        return job.loaded.model, run, batches

    own, run, batches = fresh()
    for batch in batches:
        run.loss(own, batch).backward()
        run.step()
    run.finish()

    theirs, run, batches = fresh()
    args = transformers.TrainingArguments(
        str(tmp_path / "hf"), max_steps=6, max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=1, remove_unused_columns=False,
    )  # fmt: skip
    parts = hf.parts(run, args)
    trainer = parts.Trainer(
        theirs,
        args,
        train_dataset=batches,
        data_collator=lambda items: items[0],
        optimizers=parts.optimizers,
        callbacks=parts.callbacks,
    )
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(batches, collate_fn=lambda items: items[0])
    trainer.train()
    run.finish()

    ended = weights(tmp_path / "fit")
    for name, value in own.state_dict().items():
        if name in ended:
            assert torch.equal(value, ended[name]), name
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_the_trainer_is_refused_a_clip_that_the_plan_did_not_ask_for(tiny_model, tmp_path):
    import transformers

    from luthier.hosts import hf

    model = load(tiny_model, Classification(("a", "b")), seed=0).model
    run = luthier.begin(model, [luthier.AdamW()], steps=3)
    args = transformers.TrainingArguments(str(tmp_path), max_grad_norm=1.0, max_steps=4, report_to=[], use_cpu=True)
    with pytest.raises(LuthierError, match="args.max_grad_norm") as caught:
        hf.parts(run, args)
    assert len(caught.value.faults) == 2


@ingredient
class Explodes(Ingredient):
    """A loss that is not a number at the third step."""

    def loss(self, inner, ctx):
        return lambda model, batch: inner(model, batch) * (float("nan") if ctx.progress.step == 2 else 1.0)


def test_a_last_step_that_leaves_no_numbers_is_told_though_no_loss_comes_after_it(tiny_model, tmp_path):
    with pytest.raises(
        LuthierError, match=r"finetune, step 1  must leave finite weights\.  --resume would come to the same"
    ):
        luthier.fit(recipe(["adamw"], steps=1, lr=1e38), model=tiny_model, data=sentences(), out=tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_keeps_finite_weights_and_says_what_to_do(tiny_model, tmp_path):
    stage = luthier.Stage(ingredients=(Explodes(),), steps=6, learning_rate=1e-3, batch_size=8)
    made = luthier.Recipe(name="nan", stages=(stage,), max_length=16)
    from luthier.recipe import registry

    registry.INGREDIENTS["test_engine"] = f"{__name__}:Explodes"
    try:
        with pytest.raises(LuthierError, match="step 3  the loss must be a finite number; got nan") as caught:
            luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "run")
    finally:
        del registry.INGREDIENTS["test_engine"]
    assert caught.value.exit_code == 1
    do = "The weights before this step are finite.  --resume would come to the same: start anew in another --out"
    assert do in str(caught.value)
    (kept,) = (tmp_path / "run" / "checkpoints").glob("stage-0-step-*")
    state = torch.load(kept / "state.pt", weights_only=True)
    assert state["run"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_frozen_layers_are_run_once_and_training_ends_where_it_would_have(tmp_path):
    """The kept outputs come from other batches, so they differ from computed ones by float32 rounding, which Adam amplifies."""
    folder = tiny_folder(tmp_path / "tiny", layers=3)
    made = recipe([{"freeze": {"keep": ["head", "top:1"]}}, *BASE], steps=14)
    report = luthier.fit(made, model=folder, data=sentences(), out=tmp_path / "kept")
    assert any("2 frozen blocks are computed once" in note for note in report.stages[0].notes)
    real = frozen.LIMIT
    try:
        frozen.LIMIT = 0
        other = luthier.fit(made, model=folder, data=sentences(), out=tmp_path / "computed")
    finally:
        frozen.LIMIT = real
    assert any("are computed anew each step" in note for note in other.stages[0].notes)
    one, two = weights(tmp_path / "kept"), weights(tmp_path / "computed")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_frozen_layers_run_once_a_row(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "tiny", layers=3)
    made = recipe([{"freeze": {"keep": ["head", "top:1"]}}, *BASE], steps=24)
    job = prepare(made, model=folder, data_source=sentences())
    run, inner = stages.attach(job, job.plan.stages[0], job.loaded.model, Placement())
    stages.keep_frozen(job, run, inner, Placement(), Silent())
    seen = []
    run.model.get_submodule("bert.encoder.layer.0.attention").register_forward_hook(lambda *args: seen.append(1))
    monkeypatch.setattr(Run, "validate", lambda run: {})
    stages.train(job, run, Placement(), Trace(), stages.Hooks(lambda *a: None, lambda: False, lambda v: None), Silent())
    assert run.progress.step == 24
    assert seen == []


def test_a_solved_head_gives_the_solvers_logits(tiny_model):
    """logits of the whole model == features @ weight.T + bias to 1e-5."""
    made = luthier.fit(recipe(BASE, probe=True, steps=1), model=tiny_model, data=sentences())
    assert made.stages[0].solver == "exact"
    job = prepare(recipe(BASE, probe=True), model=tiny_model, data_source=sentences())
    model, plan = job.loaded.model, job.plan.stages[0]
    probing.solve(job, plan, model, Placement(), Trace(), Silent())
    with frozen.read_out(model, Anatomy.of(model)):
        features = logits(model, job.encoded["test"], pad_id=job.pad_id).astype(np.float64)
    linear = model.classifier
    told = features @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    assert np.abs(told - logits(model, job.encoded["test"], pad_id=job.pad_id)).max() < 1e-5


def test_regression_runs_from_numbers_to_scatter(tiny_model, tmp_path):
    rows = sentences(60)
    rows["label"] = [len(text.split()) + 0.5 for text in rows["text"]]
    made = recipe(BASE, probe=True, steps=20)
    report = luthier.fit(made, model=tiny_model, data=rows, out=tmp_path / "run")
    assert report.task == "regression"
    assert report.metrics["test"].keys() >= {"rmse", "mae", "pearson", "spearman", "n"}
    assert report.calibrated == {}
    assert report.scatter and len(report.scatter[0]) == 2
    spread = float(np.std(rows["label"]))
    assert report.metrics["test"]["rmse"] < 2 * spread


def test_the_report_says_how_far_each_depth_moved(finished):
    _, report = finished
    probe = {row.name: row for row in report.movement if row.stage == "probe"}
    tuned = {row.name: row for row in report.movement if row.stage == "finetune"}
    assert probe["head"].distance > 0
    assert all(row.distance == 0 for name, row in probe.items() if name != "head")
    assert all(row.distance > 0 for row in tuned.values())


def test_named_shifted_splits_are_measured_and_never_chosen_on(tiny_model, tmp_path):
    sentences(20, seed=5).to_csv(tmp_path / "far.csv", index=False)
    made = recipe([*BASE, "temperature"], probe=True, steps=12, lr=2e-2)
    report = luthier.fit(made, model=tiny_model, data=sentences(), ood={"far": str(tmp_path / "far.csv")})
    assert report.metrics["ood"]["far"]["n"] == 20
    assert report.calibrated["ood"]["far"]["accuracy"] == report.metrics["ood"]["far"]["accuracy"]


def test_the_trainer_is_refused_an_optimizer_that_misses_trainable_weights(tiny_model, tmp_path):
    """Trap: a second ``train()`` after unfreezing would train the head alone, silently."""
    import transformers

    from luthier.hosts import hf

    model = load(tiny_model, Classification(("a", "b")), seed=0).model
    run = luthier.begin(model, [luthier.Freeze()], steps=2)
    args = transformers.TrainingArguments(
        str(tmp_path), max_grad_norm=0, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    parts = hf.parts(run, args)
    rows = [{"input_ids": torch.arange(5, 9), "labels": 0}] * 4
    trainer = parts.Trainer(model, args, train_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks)
    for weight in model.parameters():
        weight.requires_grad_(True)
    with pytest.raises(LuthierError, match="must hold every trainable weight; got 39 missing"):
        trainer.train()


def test_a_pair_of_texts_is_read_and_trained_on(tiny_model):
    rows = sentences(60)
    pairs = pd.DataFrame({"sentence1": rows["text"], "sentence2": list(reversed(rows["text"])), "label": rows["label"]})
    report = luthier.fit(recipe(BASE, steps=2), model=tiny_model, data=pairs)
    assert report.data["columns"]["text_pair"] == "sentence2"
    assert report.metrics["test"]["n"] == 6


class Bars(Silent):
    """Each bar's label, its length, and how far it came."""

    def __init__(self) -> None:
        self.bars: list[list] = []

    def bar(self, label, total):
        self.bars.append([label, total, 0])
        return super().bar(label, total)

    def advance(self, by=1, *, say=""):
        self.bars[-1][2] += by


def test_the_bar_of_measuring_comes_to_its_end(tiny_model):
    bars = Bars()
    luthier.fit(recipe(BASE, steps=1), model=tiny_model, data=sentences(), narrator=bars)
    assert [told for told in bars.bars if told[0] == "measuring"] == [["measuring", 12, 12]]  # 60 rows, 48 to train


def test_a_regression_is_told_beside_the_mean_of_its_training_labels(tiny_model):
    train = pd.DataFrame({"text": ["a film", "the book", "it is", "was so"], "label": [0.5, 1.5, 2.25, 3.75]})
    test = pd.DataFrame({"text": ["a cast", "the plot"], "label": [1.0, 6.0]})
    rows = {"train": train, "validation": train, "test": test}
    report = luthier.fit(recipe(BASE, steps=1), model=tiny_model, data=rows, task="regression")
    # the mean is 2, which is 1 and 4 away: sqrt((1 + 16) / 2)
    assert report.data["constant"]["test"] == pytest.approx(math.sqrt(8.5))
    assert report.no_better("test") == (report.metrics["test"]["rmse"] >= math.sqrt(8.5))
    assert "always answering the mean of the training labels: rmse 2.9155 on test" in report.summary()
