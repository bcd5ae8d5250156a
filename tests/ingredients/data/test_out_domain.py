"""Out-domain: which rows a stage has, that fewer are a part of more, and gradual fine-tuning from stage to stage."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import luthier
from luthier.core.context import Context, Progress, Shelf
from luthier.core.seeds import generator
from luthier.core.stream import Shuffled
from luthier.errors import ConflictError, DataError, RecipeError
from luthier.ingredients.data.lengths import Lengths
from luthier.ingredients.data.out_domain import OutDomain, chosen
from luthier.recipe.text import build, read
from luthier.testing import check_ingredient
from luthier.training.job import prepare
from tests.little import recipe, same, sentences, weights

STREAM = Shuffled((5,) * 10, 4, seed=0, spare=(6, 7, 8, 9))


def with_rows(one: OutDomain, stream: Any = STREAM, *, key: str = "a/out_domain", seed: int = 0) -> Any:
    anatomy: Any = None  # the ingredient reads the stream alone
    return one.batches(stream, Context(anatomy, Progress(3), seed, key, one.touches(), Shelf(), []))


def epoch(stream: Any) -> list[int]:
    return sorted(row for batch in stream.epoch(0) for row in batch)


def other(rows: int = 40) -> pd.DataFrame:
    """Sentences that none of ``sentences()`` is."""
    frame = sentences(rows, seed=1)
    frame["text"] = frame["text"] + " zzz"
    return frame


# By hand


def test_all_of_the_stages_own_rows_stay_and_the_amount_is_added() -> None:
    # Six rows of its own, four spare: half of them is two, 12.5 % is half a row, which rounds up to one.
    assert epoch(STREAM) == [0, 1, 2, 3, 4, 5]
    for amount, many in ((1, 1), ("50%", 2), ("100%", 4), ("12.5%", 1), (4, 4)):
        rows = epoch(with_rows(OutDomain(amount=amount)))
        assert rows[:6] == [0, 1, 2, 3, 4, 5] and len(rows) == 6 + many and set(rows[6:]) <= {6, 7, 8, 9}


def test_the_steps_of_an_epoch_count_the_rows_that_were_added() -> None:
    assert [with_rows(OutDomain(amount=amount)).count(0) for amount in (0, 2, 3)] == [2, 2, 3]


def test_they_are_shuffled_among_the_others() -> None:
    stream = Shuffled((5,) * 40, 40, seed=0, spare=tuple(range(20, 40)))
    (batch,) = with_rows(OutDomain(), stream).epoch(0)
    assert (
        sorted(batch) == list(range(40))
        and any(row >= 20 for row in batch[:10])
        and any(row < 20 for row in batch[-10:])
    )


# Identity


@pytest.mark.parametrize("amount", [0, "0%", "0.0%"])
def test_none_is_the_stream_itself(amount: Any) -> None:
    assert with_rows(OutDomain(amount=amount)) is STREAM
    assert OutDomain(amount=amount).touches() == ()


def test_rows_of_another_domain_that_nobody_asks_for_change_no_bit(tiny_model: Any) -> None:
    plain = luthier.fit(recipe(["adamw"]), model=tiny_model, data=sentences())
    beside = luthier.fit(recipe(["adamw"]), model=tiny_model, data=sentences(), out_domain=other())
    assert plain.curves["loss"] == beside.curves["loss"] and plain.metrics == beside.metrics
    assert any("no stage asks for any" in note for note in beside.warnings)


# Invariants


@given(st.integers(1, 30), st.data())
def test_fewer_are_a_part_of_more(there: int, data: st.DataObject) -> None:
    more = data.draw(st.integers(0, there))
    fewer = data.draw(st.integers(0, more))
    spare = tuple(range(100, 100 + there))
    taken = [set(chosen(spare, many, generator(0, "out_domain"))) for many in (fewer, more)]
    assert taken[0] <= taken[1] <= set(spare) and [len(one) for one in taken] == [fewer, more]


def test_nested_stages_share_their_rows_and_stages_drawn_anew_do_not() -> None:
    stream = Shuffled((5,) * 1000, 16, seed=0, spare=tuple(range(500, 1000)))
    nested = [set(epoch(with_rows(OutDomain(amount=many), stream, key=key))) for many, key in ((200, "a"), (50, "b"))]
    assert nested[1] <= nested[0]
    anew = [set(epoch(with_rows(OutDomain(50, "anew"), stream, key=key))) for key in ("a", "b")]
    assert anew[0] != anew[1]
    assert set(epoch(with_rows(OutDomain(50), stream, seed=1))) != nested[1]


@pytest.mark.parametrize("first", [True, False])
def test_it_goes_with_batches_of_like_length_in_either_order(first: bool) -> None:
    stream = Shuffled(tuple(range(1, 41)), 4, seed=0, spare=tuple(range(20, 40)))
    anatomy: Any = None
    ctx = Context(anatomy, Progress(3), 0, "a/lengths", (), Shelf(), [])
    alike = Lengths(window=2)
    mixed = (
        alike.batches(with_rows(OutDomain("50%"), stream), ctx)
        if first
        else with_rows(OutDomain("50%"), alike.batches(stream, ctx))
    )
    rows = epoch(mixed)
    assert rows[:20] == list(range(20)) and len(rows) == 30 and mixed.count(0) == 8


# What is refused


def test_more_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(RecipeError, match=r"must be at most the 4 there are; got 5.  Write 4 or 100%, or give more"):
        with_rows(OutDomain(amount=5))


def test_without_such_rows_it_is_refused_before_training(tiny_model: Any) -> None:
    with pytest.raises(ConflictError, match="out_domain cannot stand here  out_domain needs out-domain rows"):
        luthier.fit(recipe(["out_domain"]), model=tiny_model, data=sentences())


@pytest.mark.parametrize("amount", [-1, "101%", "100.5%", "half", "-5%", "50 %", 0.5, 1.5])
def test_values_that_are_no_count_and_no_share_are_refused_once_with_how_to_write_them(amount: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        OutDomain(amount=amount)
    (fault,) = caught.value.faults
    assert (fault.where, fault.got) == ("out_domain.amount", repr(amount))
    assert fault.must == "must be a number of rows, such as 200, or a share up to 100%, written as 50%"


def test_labels_that_train_does_not_have_are_told(tiny_model: Any) -> None:
    odd = other()
    odd.loc[0, "label"] = "strange"
    with pytest.raises(DataError, match="out_domain  must only have labels that train has; got 'strange' in 1 row"):
        luthier.fit(recipe(["out_domain"]), model=tiny_model, data=sentences(), out_domain=odd)


def test_labels_that_are_named_otherwise_can_be_mapped(tiny_model: Any) -> None:
    theirs = other().replace({"label": {"good": "pos", "bad": "neg"}})
    with pytest.raises(DataError, match="Say --map out_domain:pos=YOURS"):
        prepare(recipe(["out_domain"]), model=tiny_model, data_source=sentences(), out_domain=theirs)
    names = {"out_domain": {"pos": "good", "neg": "bad"}}
    job = prepare(recipe(["out_domain"]), model=tiny_model, data_source=sentences(), out_domain=theirs, label_map=names)
    assert job.data.splits["out_domain"].labels == tuple(other()["label"])


def test_rows_that_are_measured_too_are_told(tiny_model: Any) -> None:
    job = prepare(recipe(["out_domain"]), model=tiny_model, data_source=sentences(), out_domain=sentences())
    assert any(warning.startswith("test: 6 of 6 rows") and "scores flatter" in warning for warning in job.warnings)


# Gradual fine-tuning


def gradual(*amounts: Any, **more: Any) -> Any:
    stages = [
        {
            "name": f"s{at}",
            "steps": 6,
            "lr": 1e-2,
            "batch_size": 8,
            "ingredients": [{"out_domain": {"amount": amount}}, "adamw", {"best": {"every": 2}}],
        }
        for at, amount in enumerate(amounts)
    ]
    return build({"name": "gradual", "max_length": 16, "stages": stages, **more}, inside="a test")


def test_each_stage_has_its_amount_and_validation_is_in_domain(tiny_model: Any) -> None:
    job = prepare(gradual("100%", "50%", 0), model=tiny_model, data_source=sentences(), out_domain=other())
    rows = [set(epoch(plan.stream)) for plan in job.plan.stages]
    own = set(range(48))
    assert [len(one - own) for one in rows] == [40, 20, 0] and all(own <= one for one in rows)
    assert rows[1] <= rows[0]
    texts = job.data.splits["validation"].texts + job.data.splits["test"].texts
    assert not any("zzz" in text for text in texts)


def test_a_stage_starts_from_the_best_weights_of_the_one_before_and_a_new_optimizer(
    tiny_model: Any, tmp_path: Any
) -> None:
    class Recorded(Exception):
        pass

    starts: list[Any] = []
    from luthier.run import Run

    class Watch(Run):
        def __init__(self, plan: Any, model: Any, **given: Any) -> None:
            super().__init__(plan, model, **given)
            starts.append(
                ({name: value.clone() for name, value in model.state_dict().items()}, dict(self.optimizer.state))
            )

    import luthier.training.stages as stages

    real, stages.Run = stages.Run, Watch  # type: ignore[misc]
    try:
        luthier.fit(gradual("100%", 0), model=tiny_model, data=sentences(), out_domain=other())
    finally:
        stages.Run = real  # type: ignore[misc]
    luthier.fit(gradual("100%"), model=tiny_model, data=sentences(), out_domain=other(), out=tmp_path / "first")
    kept = weights(tmp_path / "first")
    assert all(torch.equal(starts[1][0][name], value) for name, value in kept.items())
    assert starts[1][1] == {}


def test_one_stage_of_none_is_plain_fine_tuning(tiny_model: Any, tmp_path: Any) -> None:
    none = recipe([{"out_domain": {"amount": 0}}, "adamw"])
    luthier.fit(none, model=tiny_model, data=sentences(), out_domain=other(), out=tmp_path / "none")
    luthier.fit(recipe(["adamw"]), model=tiny_model, data=sentences(), out=tmp_path / "plain")
    assert same(weights(tmp_path / "none"), weights(tmp_path / "plain"))


def test_a_recipe_may_say_where_its_data_is(tiny_model: Any, tmp_path: Any) -> None:
    sentences().to_csv(tmp_path / "mine.csv", index=False)
    other().to_csv(tmp_path / "theirs.csv", index=False)
    (tmp_path / "g.yaml").write_text(
        "data: {in: mine.csv, out: theirs.csv}\nmax_length: 16\n"
        "stages: [{name: a, steps: 2, ingredients: [{out_domain: {amount: 25%}}]}]\n"
    )
    report = luthier.fit(tmp_path / "g.yaml", model=tiny_model)
    assert report.data["sizes"]["out_domain"] == 40
    assert read(tmp_path / "g.yaml").data == {"in": str(tmp_path / "mine.csv"), "out": str(tmp_path / "theirs.csv")}


# Conformance


def test_it_keeps_its_promises() -> None:
    check_ingredient(OutDomain(amount=4))
    check_ingredient(OutDomain(amount="50%", draw="anew"))


# It matters


def test_with_it_the_stage_sees_rows_that_it_else_would_not(tiny_model: Any) -> None:
    with_them = luthier.fit(recipe(["out_domain"]), model=tiny_model, data=sentences(), out_domain=other())
    without = luthier.fit(recipe([]), model=tiny_model, data=sentences(), out_domain=other())
    assert with_them.curves["loss"] != without.curves["loss"]
