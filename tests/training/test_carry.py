"""What a stage carries on: the head alone, with the rest bit-identical to what it was, buffers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import RecipeError
from luthier.recipe.text import build, read
from luthier.sources.models import digest, load
from luthier.training.job import prepare
from tests.little import KillsItself, in_a_child, same, sentences, weights


def two(carry: Any, *, first: Any = ("adamw",), second_steps: int = 1) -> Any:
    """A stage that moves everything, and one that moves nothing that can be seen."""
    stages = [
        {"name": "first", "steps": 6, "lr": 1e-2, "batch_size": 8, "carry": carry, "ingredients": list(first)},
        {"name": "second", "steps": second_steps, "lr": 1e-30, "batch_size": 8, "ingredients": ["adamw"]},
    ]
    return build({"name": "two", "max_length": 16, "stages": stages[: 1 + bool(second_steps)]}, inside="a test")


def start(recipe: Any, model: Path) -> dict[str, torch.Tensor]:
    return dict(prepare(recipe, model=model, data_source=sentences()).loaded.model.state_dict())


@pytest.mark.parametrize(
    "first", [("adamw",), ({"lora": {"r": 2}}, "adamw"), ({"freeze": {"keep": ["head", "biases"]}},)]
)
def test_only_the_head_goes_on(first: Any, tiny_model: Path, tmp_path: Path) -> None:
    made = two(["head"], first=first, second_steps=0)
    before = start(made, tiny_model)
    luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "run")
    after = weights(tmp_path / "run")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    body = {name: value for name, value in after.items() if not name.startswith("classifier")}
    assert digest(body) == digest({name: before[name] for name in body})


def test_the_head_that_goes_on_is_the_one_that_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    luthier.fit(two(["head"]), model=tiny_model, data=sentences(), out=tmp_path / "carried")
    luthier.fit(two(None), model=tiny_model, data=sentences(), out=tmp_path / "all")
    carried, everything = weights(tmp_path / "carried"), weights(tmp_path / "all")
    assert torch.equal(carried["classifier.weight"], everything["classifier.weight"])
    assert not same(carried, everything)


def test_carrying_all_is_carrying_on(tiny_model: Path, tmp_path: Path) -> None:
    luthier.fit(two(["all"]), model=tiny_model, data=sentences(), out=tmp_path / "carried")
    luthier.fit(two(None), model=tiny_model, data=sentences(), out=tmp_path / "all")
    assert same(weights(tmp_path / "carried"), weights(tmp_path / "all"))


def test_a_killed_run_goes_on_to_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    made = two(["head"], second_steps=4)
    luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "whole")
    for after in (8, 14):
        out = tmp_path / str(after)
        kills = KillsItself(after)
        in_a_child(lambda: luthier.fit(made, model=tiny_model, data=sentences(), out=out, save_every=1, narrator=kills))  # noqa: B023
        luthier.fit(made, model=tiny_model, data=sentences(), out=out, resume=True)
        assert same(weights(tmp_path / "whole"), weights(out))


def test_movement_is_that_of_the_training_and_the_report_says_what_went_back(tiny_model: Path) -> None:
    report = luthier.fit(two(["head"]), model=tiny_model, data=sentences())
    assert all(row.distance > 0 for row in report.movement if row.stage == "first")
    assert report.stages[0].notes[-1] == "only head goes on; the rest is as it was before the stage"
    assert "then all but head is put back" in str(
        prepare(two(["head"]), model=tiny_model, data_source=sentences()).plan
    )


def test_eh_ft_starts_fine_tuning_from_the_pretrained_body(tiny_model: Path, tmp_path: Path) -> None:
    sets = ["stages.0.steps=4", "stages.1.steps=1", "stages.1.lr=1e-8", "max_length=16"]
    report = luthier.fit("eh-ft", model=tiny_model, data=sentences(), out=tmp_path / "run", sets=sets)
    job = prepare(read("eh-ft", sets=sets), model=tiny_model, data_source=sentences())
    fresh = load(str(tiny_model), job.task, seed=0, max_length=16)
    after = weights(tmp_path / "run")
    for name, value in fresh.model.state_dict().items():
        near = torch.allclose(
            after[name], value, rtol=0, atol=3e-8
        )  # one step of Adam at 1e-8 moves a weight by no more
        assert near is (not name.startswith("classifier")), name
    assert report.stages[0].trainable_parameters < report.stages[1].trainable_parameters


def test_a_selector_that_matches_nothing_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\[0\] 'first' carry  matches no weight with 'haed'"):
        prepare(two(["haed"]), model=tiny_model, data_source=sentences())
