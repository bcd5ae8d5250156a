"""A stage that chooses its learning rate: each is tried from the same weights, the best on validation is taken and told."""

from __future__ import annotations

import math

import pytest
import torch

import luthier
from luthier.errors import ConflictError, RunError
from luthier.ingredients.settings.discriminative import Discriminative
from luthier.narrate import Silent
from luthier.placement import Placement
from luthier.recipe.text import build
from luthier.run import begin
from luthier.training import rates, stages
from luthier.training.job import prepare
from tests.little import Asks, recipe, same, sentences, weights
from tests.tiny import tiny

SEARCH = {"discriminative": {"bands": 2, "rate": "search", "rates": [1e-6, 1e-1, 1e-2], "epochs": 2}}


def searched(tiny_model, **stage):
    made = recipe([SEARCH, "anneal", "adamw", "clip", {"swa": {"start": 0.5}}], **stage)
    job = prepare(made, model=tiny_model, data_source=sentences())
    return job, job.plan.stages[0]


def choose(job, plan):
    tries = rates.asked(plan)
    assert tries is not None
    return rates.choose(job, plan, tries, Placement(), Silent(), lambda: False)


def test_the_best_rate_on_validation_is_taken_and_the_weights_are_as_they_were(tiny_model):
    job, plan = searched(tiny_model)
    before = {name: value.clone() for name, value in job.loaded.model.state_dict().items()}
    found = choose(job, plan)
    assert [rate for rate, _ in found["tried"]] == [1e-6, 1e-2, 1e-1]
    best = max(score for _, score in found["tried"])
    assert found["rate"] == next(rate for rate, score in found["tried"] if score == best)
    assert same(before, job.loaded.model.state_dict())
    assert all(weight.requires_grad and weight.grad is None for weight in job.loaded.model.parameters())


def test_a_trial_trains_the_head_alone_with_the_stages_own_schedule_and_optimizer(tiny_model, monkeypatch):
    job, plan = searched(tiny_model)
    seen = []
    real = stages.train

    def watched(job, run, *rest):
        real(job, run, *rest)
        seen.append(run.plan)

    monkeypatch.setattr(stages, "train", watched)
    choose(job, plan)
    assert [[entry.name for entry in one.entries] for one in seen] == [["freeze", "anneal", "adamw", "clip"]] * 3
    assert {row.part.role for one in seen for row in one.table.rows if row.trainable} == {"bridge", "head"}
    assert {one.steps for one in seen} == {2 * 6}  # two epochs of 48 rows by 8


def test_the_stage_is_as_one_in_which_that_rate_is_written(tiny_model, tmp_path):
    made = recipe([SEARCH, "adamw"], steps=5)
    report = luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "searched")
    rate = report.plan["stages"][0]["learning_rate"]
    assert rate in SEARCH["discriminative"]["rates"]
    assert any(f"the learning rate {rate:g} was chosen by accuracy" in note for note in report.warnings)
    written = recipe([{"discriminative": {"bands": 2}}, "adamw"], steps=5, lr=rate)
    luthier.fit(written, model=tiny_model, data=sentences(), out=tmp_path / "written")
    assert same(weights(tmp_path / "searched"), weights(tmp_path / "written"))


def test_the_plan_of_the_report_has_the_rate_of_every_stage_that_chose_one(tiny_model, tmp_path):
    stage = {"epochs": 1, "batch_size": 8, "ingredients": [SEARCH, "adamw"]}
    two = build(
        {"name": "two", "max_length": 16, "stages": [{"name": "a", **stage}, {"name": "b", **stage}]}, inside="a test"
    )

    def fit(out, **more):
        return luthier.fit(two, model=tiny_model, data=sentences(), out=tmp_path / out, save_every=1, **more)

    whole = fit("whole")
    told = [note for note in whole.warnings if "was chosen by accuracy" in note]
    assert [note[:2] for note in told] == ["a:", "b:"]
    for note, planned in zip(told, whole.plan["stages"], strict=True):
        assert f"the learning rate {planned['learning_rate']:g} was chosen" in note
    # Stopped at step 2 of the second stage, after three trials of 12 steps, 6 steps and three trials more, it knows the first one's rate when it goes on.
    with pytest.raises(luthier.LuthierError, match="stopped on request"):
        fit("resumed", narrator=Asks(36 + 6 + 36 + 2))
    again = fit("resumed", resume=True)
    assert again.plan == whole.plan
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def test_a_rate_at_which_the_loss_is_no_number_leaves_nothing_behind(tiny_model):
    made = recipe([{"discriminative": SEARCH["discriminative"] | {"rates": [1e-3, 1e38]}}, "adamw"], steps=5)
    job = prepare(made, model=tiny_model, data_source=sentences())
    before = {name: value.clone() for name, value in job.loaded.model.state_dict().items()}
    found = choose(job, job.plan.stages[0])
    assert (found["rate"], found["tried"][1]) == (1e-3, [1e38, None])
    assert same(before, job.loaded.model.state_dict())
    assert all(weight.requires_grad and weight.grad is None for weight in job.loaded.model.parameters())
    assert luthier.fit(made, model=tiny_model, data=sentences()).stages[0].steps == 5


@pytest.mark.parametrize("score", [math.nan, None], ids=["not a number", "not defined"])
def test_when_no_rate_gives_a_number_it_is_told(tiny_model, monkeypatch, score):
    job, plan = searched(tiny_model)
    monkeypatch.setattr(stages, "score", lambda *args: {"accuracy": score})
    with pytest.raises(RunError, match="none of them"):
        choose(job, plan)


def test_a_loop_of_ones_own_is_told_to_write_a_rate():
    with pytest.raises(ConflictError, match="discriminative needs trial runs before the stage"):
        begin(tiny("bert"), [Discriminative(rate="search")], steps=2, score=lambda model: {"accuracy": 1.0})


def test_the_global_generator_is_as_it_was(tiny_model):
    job, plan = searched(tiny_model)
    state = torch.random.get_rng_state()
    choose(job, plan)
    assert torch.equal(state, torch.random.get_rng_state())
