"""Every shipped recipe runs, and does what its name says."""

from __future__ import annotations

import pytest
import torch

import luthier
from luthier import stages
from luthier.core.anatomy import Anatomy
from luthier.job import prepare
from luthier.narrate import Silent
from luthier.placement import Placement
from luthier.recipe.shipped import names
from luthier.recipe.text import read
from tests.little import sentences


def short(name: str) -> list[str]:
    made = read(name)
    return [f"stages.{at}.steps=6" for at, stage in enumerate(made.stages) if stage.solver == "sgd"] + ["max_length=16"]


@pytest.mark.parametrize("name", names())
def test_a_shipped_recipe_trains_and_calibrates(name, tiny_model, tmp_path):
    report = luthier.fit(name, model=tiny_model, data=sentences(150), out=tmp_path / "run", sets=short(name))
    assert report.recipe == name
    assert [stage.steps for stage in report.stages] == [
        0 if stage.solver == "exact" else 6 for stage in read(name).stages
    ]
    assert "temperature" in report.calibration
    assert report.metrics["test"]["n"] == 15
    assert (tmp_path / "run" / "adapter").exists() is (name == "lora")


def test_lp_trains_the_head_alone(tiny_model):
    report = luthier.fit("lp", model=tiny_model, data=sentences(), sets=["max_length=16"])
    assert report.stages[0].trainable_parameters == 16 * 2 + 2
    assert {row.name for row in report.movement if row.distance} == {"head"}


def test_lp_ft_begins_its_second_stage_from_the_pretrained_body_and_the_solved_head(tiny_model):
    job = prepare(read("lp-ft", sets=["max_length=16"]), model=tiny_model, data_source=sentences())
    model = job.loaded.model
    before = {name: value.clone() for name, value in model.state_dict().items()}  # buffers too
    stages.solve(job, job.plan.stages[0], model, Placement(), stages.Trace(), Silent())
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
