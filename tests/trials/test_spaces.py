"""Where a search looks: what is read, what is refused and how."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.recipe.changes import place
from luthier.recipe.text import read
from luthier.trials import budget
from luthier.trials.spaces import Space, asked, changes, grown, parse
from tests.little import recipe

FT = dataclasses.replace(recipe(["adamw", "clip"], steps=4), name="ft")
LP_FT = dataclasses.replace(recipe([{"l2sp": {"strength": 0.1}}], steps=4, probe=True), name="lp-ft")
BOTH = {"ft": FT, "lp-ft": LP_FT}


@pytest.mark.parametrize(
    ("told", "space", "ends"),
    [
        ("log:1e-6:1e-4", Space("log", 1e-6, 1e-4), (1e-6, 1e-4)),
        ("float:-0.5:0.5", Space("float", -0.5, 0.5), (-0.5, 0.5)),
        ("int:1:8", Space("int", 1, 8), (1, 8)),
        ("int:4:33:8", Space("int", 4, 33, 8), (4, 28)),
        ("one:linear, cosine,null", Space("one", choices=("linear", "cosine", None)), ("linear", "cosine", None)),
        ("one:[head],[head, norm]", Space("one", choices=(["head"], ["head", "norm"])), (["head"], ["head", "norm"])),
    ],
)
def test_a_space_is_what_it_says(told, space, ends):
    assert parse(told) == space and parse(told).ends == ends


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("log:1e-4:1e-6", "LOW below HIGH"),
        ("log:0:1", "LOW above 0"),
        ("float:0:inf", "LOW below HIGH"),
        ("float:0", "must be log:LOW:HIGH"),
        ("float:0:1:2", "must be log:LOW:HIGH"),
        ("int:1:2.5", "must be log:LOW:HIGH"),
        ("int:1:8:0", "STEP of at least 1"),
        ("one:a", "two or more"),
        ("one:a,b,a", "each once"),
        ("one:", "two or more"),
        ("normal:0:1", "must be log:LOW:HIGH"),
    ],
)
def test_what_is_no_space_is_refused(told, why):
    with pytest.raises(LuthierError, match=why):
        parse(told)


def test_without_a_recipe_a_space_is_for_all_that_have_the_field():
    found = asked(["stages.finetune.lr=log:1e-5:1e-3", "lp-ft:stages.finetune.l2sp.strength=float:0:1"], BOTH)
    assert found == {
        "ft": {"stages.finetune.lr": "log:1e-5:1e-3"},
        "lp-ft": {"stages.finetune.lr": "log:1e-5:1e-3", "stages.finetune.l2sp.strength": "float:0:1"},
    }
    assert asked(["stages.finetune.l2sp.strength=float:0:1"], BOTH).keys() == {"lp-ft"}


def test_all_faults_are_told_at_once():
    with pytest.raises(LuthierError) as caught:
        asked(
            [
                "stages.finetune.lr=log:1:0.1",
                "lpft:stages.finetune.lr=float:0.1:1",
                "stages.finetun.lr=float:0.1:1",
                "stages.finetune.nosuch=float:0.1:1",
                "ft:stages.finetune.l2sp.strength=float:0:1",
                "stages.finetune.batch_size=int:0:8",
                "seed=int:0:9",
                "nothing",
                "head=one:own,three",
                "ft:stages.0.learning_rate=log:1e-5:1e-4",
                "ft:stages.finetune.lr=log:1e-5:1e-4",
                "ft:stages.0.steps=int:1:4",
                "ft:stages.0.epochs=int:1:4",
            ],
            BOTH,
        )
    told = "\n".join(str(fault) for fault in caught.value.faults)
    for part in (
        "lr=log:1:0.1  must have numbers with LOW below HIGH",
        "Did you mean 'lp-ft'?",
        "Did you mean 'finetune'?",
        "nosuch=float:0.1:1  must name a value that a recipe has",
        "ft:stages.finetune.l2sp.strength=float:0:1  must name a value",
        "in ft: stages[0].batch_size",
        "in lp-ft: stages[1].batch_size",
        "seed=int:0:9  must not be of name",
        "must be [RECIPE:]PATH=SPACE",
        "in ft: head",
        "ft:stages.finetune.lr=log:1e-5:1e-4  must be searched once in ft",
        "ft:stages.0.epochs=int:1:4  must be searched once in ft",
    ):
        assert part in told, part


@given(st.floats(1e-12, 1e3), st.integers(1, 10_000), st.sampled_from(["own", "mlp"]))
def test_values_come_back_from_a_recipe_as_they_were(rate, batch, head):
    values = {"stages.finetune.lr": rate, "stages.0.batch_size": batch, "head": head}
    made = read(FT, sets=changes(values))
    assert (made.stages[0].learning_rate, made.stages[0].batch_size, made.head) == (rate, batch, head)
    assert dataclasses.replace(made, stages=FT.stages, head="own") == FT


def test_a_place_is_found_by_name_and_by_number_and_only_where_it_is():
    plain = LP_FT.to_dict()
    stage = plain["stages"][1]
    assert place(plain, "stages.finetune.lr") == place(plain, "stages.-1.learning_rate") == (stage, "learning_rate")
    assert place(plain, "stages.1.l2sp.strength") == (stage["ingredients"][0]["l2sp"], "strength")
    for path in ("stages.2.lr", "stages.1.adamw.betas", "nosuch", "stages.0", "family.head", ""):
        assert place(plain, path) is None
    assert plain == LP_FT.to_dict()  # looking changes nothing


def test_a_budget_is_runs_or_minutes():
    assert budget.read(None) == {"runs": 10} and budget.read(20) == budget.read(" 20 ") == {"runs": 20}
    assert budget.read("1.5min") == budget.read("1.5 min") == {"minutes": 1.5}
    for bad in (0, "-3", "2.5", "soon", "min", "infmin", "30sec", "nanmin"):
        with pytest.raises(LuthierError, match="must be runs"):
            budget.read(bad)


def test_minutes_are_spent_by_what_has_ended_and_what_is_under_way():
    ended = {"score": 0.5, "seconds": 60.0}
    assert not budget.spent({"minutes": 3.0}, []) and not budget.spent({"minutes": 3.0}, [{}, {}, {}, {}])
    assert not budget.spent({"minutes": 3.0}, [ended, {}]) and budget.spent({"minutes": 3.0}, [ended, {}, {}])
    assert budget.spent({"minutes": 3.0}, [ended] * 3) and not budget.spent({"minutes": 3.5}, [ended] * 3)
    failed = {"score": None, "seconds": 0.0}
    assert not budget.spent({"minutes": 3.0}, [failed] * 9) and budget.spent({"minutes": 3.0}, [failed] * 10)
    assert budget.spent({"runs": 2}, [{}, {}]) and not budget.spent({"runs": 2}, [ended])


def test_a_search_may_get_more_budget_and_more_recipes_but_no_other_space():
    one = {"spaces": {"ft": {"lr": "log:1:2"}}, "budget": {"runs": 10}}
    more = {"spaces": {"ft": {"lr": "log:1:2"}}, "budget": {"runs": 20}}
    other = {"spaces": {"lp": {"lr": "log:1:2"}}, "budget": {"runs": 20}}
    assert grown(more, one, ["ft"]) == grown(one, more, ["ft"]) == more
    assert grown(other, one, []) == {"spaces": {**one["spaces"], **other["spaces"]}, "budget": {"runs": 20}}
    assert grown(None, None, ["ft"]) == {} and grown(None, one, []) == one
    assert grown({**one, "spaces": {"ft": {"lr": "log:1:3"}}}, one, ["ft"]) is None
    assert grown(None, one, ["ft"]) is None and grown(one, None, ["ft"]) is None
    assert grown({**one, "budget": {"minutes": 3.0}}, one, ["ft"]) is None
