"""Every shipped recipe runs, and does what its name says."""

from __future__ import annotations

import pytest
import torch

import luthier
from luthier.core.anatomy import Anatomy
from luthier.narrate import Silent
from luthier.placement import Placement
from luthier.recipe.shipped import names
from luthier.recipe.text import read
from luthier.training import probing
from luthier.training.job import prepare
from luthier.training.trace import Trace
from tests.little import sentences
from tests.tinyfolder import tiny_folder


def short(name: str) -> list[str]:
    made = read(name)
    sets = [f"stages.{at}.steps=6" for at, stage in enumerate(made.stages) if stage.solver == "sgd"] + ["max_length=16"]
    more = {"chang": "anneal.warmup_steps=2", "lp-ft-chang": "anneal.warmup_steps=2", "ulmfit": "thaw.over=0.8"}
    return sets + ([f"stages.finetune.ingredients.{more[name]}"] if name in more else [])


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory):
    """A tiny model with as many blocks as recipes have bands."""
    return tiny_folder(tmp_path_factory.mktemp("model") / "three", layers=3)


@pytest.mark.parametrize("name", names())
def test_a_shipped_recipe_trains_and_calibrates(name, three_blocks, tmp_path):
    other = {"out_domain": sentences(80, seed=1)} if name == "gradual" else {}
    report = luthier.fit(name, model=three_blocks, data=sentences(150), out=tmp_path / "run", sets=short(name), **other)
    assert report.recipe == name
    assert [stage.steps for stage in report.stages] == [
        0 if stage.solver == "exact" else 6 for stage in read(name).stages
    ]
    assert "temperature" in report.calibration
    assert report.metrics["test"]["n"] == 15
    assert (tmp_path / "run" / "adapter").exists() is ("lora" in name or name == "eh-ft")


def test_lp_trains_the_head_alone(tiny_model):
    report = luthier.fit("lp", model=tiny_model, data=sentences(), sets=["max_length=16"])
    assert report.stages[0].trainable_parameters == 16 * 2 + 2
    assert {row.name for row in report.movement if row.distance} == {"head"}


def test_lp_ft_begins_its_second_stage_from_the_pretrained_body_and_the_solved_head(tiny_model):
    job = prepare(read("lp-ft", sets=["max_length=16"]), model=tiny_model, data_source=sentences())
    model = job.loaded.model
    before = {name: value.clone() for name, value in model.state_dict().items()}  # buffers too
    probing.solve(job, job.plan.stages[0], model, Placement(), Trace(), Silent())
    head = Anatomy.of(model).select("head")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is (name not in head), name


def test_llrd_and_swa_are_in_the_recipes_that_name_them(tiny_model):
    job = prepare(read("lp-ft-llrd-swa", sets=["max_length=16"]), model=tiny_model, data_source=sentences())
    plan = job.plan.stages[1]
    rates = {row.part.depth: row.lr_scale for row in plan.table.rows}
    assert [rates[depth] for depth in sorted(rates)] == [pytest.approx(0.95**power) for power in (3, 2, 1, 0, 0)]
    assert [entry.name for entry in plan.entries] == ["anneal", "llrd", "adamw", "clip", "swa", "temperature"]
    # the averaging takes the end of the schedule over, at a quarter of each weight's own peak
    assert all(row.schedule(0.9) == pytest.approx(0.25) for row in plan.table.rows)


def test_ulmfit_wakes_its_groups_from_the_top_at_a_rate_each(three_blocks):
    job = prepare(read("ulmfit", sets=["max_length=16"]), model=three_blocks, data_source=sentences())
    plan = job.plan.stages[0]
    by_depth = {row.part.depth: row for row in plan.table.rows}
    assert [by_depth[depth].lr_scale for depth in (5, 3, 2, 1, 0)] == [pytest.approx(2.6**-n) for n in range(5)]
    wakes = [by_depth[depth].asleep[0][1] if by_depth[depth].asleep else 0.0 for depth in (5, 3, 2, 1, 0)]
    assert wakes == sorted(wakes) and wakes[0] == 0.0 and wakes[-1] == pytest.approx(0.5, abs=1 / plan.steps)


def test_mosbach_says_what_the_paper_does(three_blocks):
    job = prepare(read("mosbach", sets=["max_length=16"]), model=three_blocks, data_source=sentences())
    plan = job.plan.stages[0]
    assert plan.steps == 20 * 3  # 48 rows
    assert plan.table.rows[0].schedule(0.1) == 1.0 and plan.table.rows[0].schedule(0.55) == pytest.approx(0.5)
    made = {entry.name: entry.ingredient for entry in plan.entries}
    assert (made["adamw"].eps, made["adamw"].weight_decay, made["adamw"].bias_correction) == (1e-6, 0.01, True)
    assert made["clip"].max_norm == 1.0


def test_chang_has_its_rates_and_takes_the_average_of_its_best_steps(three_blocks):
    job = prepare(read("chang", sets=short("chang")), model=three_blocks, data_source=sentences())
    plan = job.plan.stages[0]
    rates = {row.part.depth: plan.table.learning_rate * row.lr_scale for row in plan.table.rows}
    expected = {5: 3.6e-6, 3: 3.5e-6, 2: 3.5e-6 * 0.9, 1: 3.5e-6 * 0.81, 0: 3.5e-6 * 0.729}
    assert {depth: rates[depth] for depth in expected} == {
        depth: pytest.approx(rate) for depth, rate in expected.items()
    }
    assert {entry.name for entry in plan.entries} >= {"reinit", "swa", "best", "llrd"}


# The last stage: epochs, rows of a batch, warm-up, weight decay, alpha of LoRA, epochs of the stage before. As published, but for eh-ft's rows (32).
PUBLISHED = {
    "lora": (30, 16, 0.06, 0.1, 16, None),  # Hu et al. 2022, RoBERTa-base on GLUE: 30 to 80 epochs, 16 to 64 rows
    "lp-lora": (10, 8, 0.0, 0.0, 8, None),  # Tomihari and Sato 2024
    "eh-ft": (18, 16, 0.1, 0.01, None, 2),  # Yang et al. 2022: 20 epochs, 2 of them for the head
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_with_lora_have_the_published_lengths(name):
    made = read(name)
    last, parts = made.stages[-1], {each.name(): each for each in made.stages[-1].ingredients}
    alpha = parts["lora"].alpha if "lora" in parts else None
    found = (last.epochs, last.batch_size, parts["anneal"].warmup, parts["adamw"].weight_decay, alpha)
    assert (*found, made.stages[0].epochs if len(made.stages) > 1 else None) == PUBLISHED[name]
