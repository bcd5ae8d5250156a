"""Recipes as text: YAML <-> Recipe, with every fault told."""

from __future__ import annotations

import json
import re

import pytest

import luthier
from luthier.errors import RecipeError
from luthier.recipe.schema import schema
from luthier.recipe.shipped import names
from luthier.recipe.text import build, read, write
from luthier.recipe.values import parse


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.5e-3", 2.5e-3),
        ("-1e-3", -1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("3", 3),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_a_number_is_read_as_a_number(said, meant):
    found = parse(f"x: {said}")["x"]
    assert found == meant
    assert type(found) is type(meant)


def test_a_key_that_stands_twice_is_a_fault_with_its_line():
    with pytest.raises(RecipeError, match=r"line 3  the key 'lr' stands twice"):
        parse("name: x\nlr: 1\nlr: 2\n")


def test_what_is_no_yaml_is_a_fault_with_its_line():
    with pytest.raises(RecipeError, match="line 2"):
        parse("a: [1,\nb: }")


BAD = """
name: bad
sed: 3
stages:
  - name: a
    epochs: 1
    lr: -1
    ingredients:
      - freez
      - llrd: {decay: 1.9, powr: 2}
      - {adamw: {}, clip: {}}
      - swa: {start: 2}
  - name: b
    epochs: 1
    steps: 5
"""


def test_all_faults_are_told_at_once_with_their_paths():
    with pytest.raises(RecipeError) as caught:
        build(parse(BAD), inside="bad.yaml")
    told = {fault.where: str(fault) for fault in caught.value.faults}
    assert set(told) == {
        "sed",
        "stages[0].learning_rate",
        "stages[0].ingredients[0]",
        "stages[0].ingredients[1].llrd.decay",
        "stages[0].ingredients[1].llrd.powr",
        "stages[0].ingredients[2]",
        "stages[0].ingredients[3].swa.start",
        "stages[1]",
    }
    assert "Did you mean 'seed'?" in told["sed"]
    assert "Did you mean 'freeze'?" in told["stages[0].ingredients[0]"]
    assert "must be <= 1.0; got 1.9" in told["stages[0].ingredients[1].llrd.decay"]
    assert "must say epochs or steps, not both" in told["stages[1]"]
    assert str(caught.value).startswith("8 faults in bad.yaml")


@pytest.mark.parametrize("name", names())
def test_a_shipped_recipe_survives_being_written(name):
    made = read(name)
    again = build(parse(write(made)), inside="again")
    assert again == made
    assert again.digest == made.digest


def test_changes_go_by_number_by_name_and_into_ingredients():
    made = read(
        "lp-ft",
        sets=[
            "stages.1.lr=3e-5",
            "stages.finetune.epochs=7",
            "stages.1.ingredients.clip.max_norm=2",
            "stages.-1.anneal.warmup=0.2",
        ],
    )
    stage = made.stages[1]
    assert (stage.learning_rate, stage.epochs) == (3e-5, 7.0)
    assert luthier.Clip(2.0) in stage.ingredients
    assert luthier.Anneal(warmup=0.2) in stage.ingredients


def test_steps_take_the_place_of_epochs():
    made = read("ft", sets=["stages.0.steps=9"])
    assert (made.stages[0].steps, made.stages[0].epochs) == (9, None)


def test_an_ingredient_without_values_can_be_given_one():
    made = read("ft", sets=["seed=4", "max_length=64"], seed=None)
    assert (made.seed, made.max_length) == (4, 64)
    assert read("ft", sets=["seed=4"], seed=9).seed == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stages.1.lr", "must be PATH=VALUE"),
        ("stages.7.lr=1", "there is no '7' here"),
        ("stages.finetun.lr=1", "there is no 'finetun' here"),
        ("stages.1.llrd.decay=1", "there is no 'llrd' here"),
        ("stages.1.lrr=1", "unknown name 'lrr'"),
        ("stags.1.lr=1", "Did you mean 'stages'?"),
        ("lr=1e-4", "lr  must say where it stands.  Did you mean stages.probe.lr or stages.finetune.lr?"),
        ("stages.epochs=2", "Did you mean stages.probe.epochs or stages.finetune.epochs?"),
        ("anneal.warmup=0", "Did you mean stages.finetune.anneal.warmup?"),
        ("warmup=0", "Did you mean stages.finetune.anneal.warmup?"),
        ("stages.1=2", "must name a value, not a list's item.  Name a value of a stage, such as stages.1.lr=3e-5"),
        ("zzz=1", "unknown name 'zzz'.  Known: name, stages"),
    ],
)
def test_a_change_that_cannot_be_made_is_told(change, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        read("lp-ft", sets=[change])


def test_a_change_of_a_recipe_without_stages_is_told(tmp_path):
    (tmp_path / "none.yaml").write_text("name: none\nstages: []\n")
    for change in ("stages.x=1", "stages.0=1", "lr=1"):
        with pytest.raises(RecipeError):
            read(tmp_path / "none.yaml", sets=[change])


def test_recipes_that_mean_the_same_run_have_the_same_digest():
    assert read("ft").digest == read("ft", sets=["name=other", "description=x"]).digest
    assert read("ft").digest == read("ft", sets=["stages.0.lr=0.00002"]).digest
    assert read("ft").digest != read("ft", sets=["seed=1"]).digest
    assert read("ft").digest != read("ft", sets=["stages.0.anneal.warmup=0.2"]).digest


@pytest.mark.parametrize("source", ["lpft", "nothing.yaml"])
def test_a_recipe_that_is_not_there_is_told(source):
    with pytest.raises(RecipeError, match="Did you mean 'lp-ft'|nothing there"):
        read(source)


def fits(value, told) -> bool:
    """Whether ``value`` fits a JSON schema, as far as ours go."""
    if "const" in told:
        return value == told["const"]
    if "enum" in told:
        return value in told["enum"]
    if "anyOf" in told:
        return any(fits(value, one) for one in told["anyOf"])
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    kind = told.get("type")
    if kind and not isinstance(value, kinds[kind]):
        return False
    if kind in ("integer", "number"):
        return not ("exclusiveMinimum" in told and value <= told["exclusiveMinimum"]) and not (
            "maximum" in told and value > told["maximum"]
        )
    if kind == "array":
        rule = told.get("items", {})
        return len(value) >= told.get("minItems", 0) and all(fits(one, rule) for one in value)
    if kind == "object":
        known = told.get("properties", {})
        if told.get("additionalProperties") is False and set(value) - set(known):
            return False
        return set(told.get("required", ())) <= set(value) and all(
            fits(one, known.get(name, {})) for name, one in value.items()
        )
    return True


def test_the_schema_takes_every_shipped_recipe_and_refuses_a_wrong_one():
    rules = json.loads(json.dumps(schema()))
    for name in names():
        assert fits(parse(write(read(name))), rules), name
    assert not fits(parse(BAD), rules)
    assert not fits({"name": "x"}, rules)


def test_a_stage_in_python_is_the_stage_in_text():
    made = luthier.Recipe(
        name="ft",
        description=read("ft").description,
        stages=(
            luthier.Stage(
                name="finetune",
                epochs=3,
                ingredients=(luthier.Anneal(warmup=0.1), luthier.AdamW(0.01), luthier.Clip(1.0), luthier.Temperature()),
            ),
        ),
    )
    assert made == read("ft")


def test_stages_must_have_names_of_their_own():
    with pytest.raises(RecipeError, match="stages must have names of their own"):
        luthier.Recipe(name="x", stages=(luthier.Stage(steps=1), luthier.Stage(steps=1)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]: x\n", "line 1  a key must be a name"),
        ("when: 2020-13-45\n", "must be YAML"),
    ],
)
def test_odd_yaml_is_a_fault_and_no_trace(text, told):
    with pytest.raises(RecipeError, match=told):
        parse(text)


def test_bytes_that_are_no_utf8_are_told_with_their_line(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_bytes(b"name: a\ndescription: caf\xe9\n")
    with pytest.raises(RecipeError, match="line 2  must be UTF-8; got byte 0xe9"):
        read(path)


def test_a_stage_that_says_one_thing_under_two_names_is_told():
    plain = {"name": "a", "stages": [{"steps": 1, "lr": 1e-3, "learning_rate": 1e-4}]}
    with pytest.raises(RecipeError, match=r"stages\[0\].learning_rate  must stand once; got lr and learning_rate"):
        build(plain, inside="a")


def test_a_change_takes_the_place_of_what_says_the_same_under_another_name(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("stages: [{steps: 3, lr: 1e-3}]")
    assert read(path, sets=["stages.0.learning_rate=1e-4", "stages.0.epochs=2"]).stages[0].learning_rate == 1e-4
    assert read(path, sets=["stages.0.learning_rate=1e-4", "stages.0.epochs=2"]).stages[0].steps is None


@pytest.mark.parametrize(("stages", "got"), [([], "an empty list"), (None, "nothing"), ({"a": 1}, "{'a': 1}")])
def test_a_recipe_has_a_list_of_stages(stages, got):
    with pytest.raises(RecipeError) as caught:
        build({"name": "a", "stages": stages}, inside="a")
    assert caught.value.faults[0].got == got


@pytest.mark.parametrize(("item", "at"), [("4", None), ("0", 0), ("-1", -1)])
def test_a_change_of_a_lists_item_is_told_as_the_whole_list_which_works(item, at):
    with pytest.raises(RecipeError, match="must name a value, not a list's item") as caught:
        read("ft", sets=[f"stages.0.ingredients.{item}={{r_drop: {{alpha: 2}}}}"])
    change = str(caught.value).split("Give the whole list: '")[1].removesuffix("'.")
    before, made = (list(read("ft", sets=sets).stages[0].ingredients) for sets in ([], [change]))
    new = luthier.RDrop(alpha=2)
    assert made == [*before, new] if at is None else made[at] == new and len(made) == len(before)


def test_a_change_of_a_whole_stage_names_a_value_of_it():
    with pytest.raises(RecipeError, match=r"such as stages\.0\.lr=3e-5"):
        read("ft", sets=["stages.0=3"])


SHARED = """
stages:
  - {name: a, steps: 1, ingredients: [&decay {adamw: {weight_decay: 0.1}}]}
  - {name: b, steps: 1, ingredients: [*decay]}
"""


def test_a_change_of_one_stage_leaves_a_stage_that_shares_its_text_by_an_anchor(tmp_path):
    (tmp_path / "one.yaml").write_text(SHARED)
    made = read(tmp_path / "one.yaml", sets=["stages.b.adamw.weight_decay=0.5"])
    assert [stage.ingredients for stage in made.stages] == [(luthier.AdamW(0.1),), (luthier.AdamW(0.5),)]


def test_text_that_holds_itself_is_a_fault():
    with pytest.raises(RecipeError, match="must not hold itself"):
        parse("&a [*a]")


@pytest.mark.parametrize("step", ["--1", "²", "-", "1-"])
def test_what_only_looks_like_a_number_is_no_number_of_a_stage(step):
    with pytest.raises(RecipeError, match=f"there is no '{step}' here"):
        read("lp-ft", sets=[f"stages.{step}.lr=1e-3"])
    with pytest.raises(RecipeError, match="must name a value, not a list's item"):
        read("lp-ft", sets=[f"stages.1.ingredients.{step}=swa"])


def test_a_mapping_that_is_not_there_yet_can_be_given_a_value(tmp_path):
    assert read("ft", sets=["seeds.head=3", "seeds.order=4"]).seeds == {"head": 3, "order": 4}
    (tmp_path / "one.yaml").write_text("stages: [{steps: 1}]\nseeds: {head: 1, split: 2}")
    assert read(tmp_path / "one.yaml", sets=["seeds.head=3"]).seeds == {"head": 3, "split": 2}
    assert read(read("ft"), sets=["data.in=rows.csv"]).data == {"in": "rows.csv"}
    with pytest.raises(RecipeError, match="seeds"):
        read("ft", sets=["seeds.hed=3"])


def test_a_recipe_in_the_home_folder_is_read_with_the_data_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "one.yaml").write_text("stages: [{steps: 1}]\ndata: {in: rows.csv}")
    made = read("~/one.yaml")
    assert (made.name, made.data) == ("one", {"in": str(tmp_path / "rows.csv")})
