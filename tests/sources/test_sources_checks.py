from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import DataError
from luthier.sources.checks import check
from luthier.sources.columns import Columns
from luthier.sources.data import Data, Split
from luthier.sources.tasks import Classification, Regression, decide

AB = Classification(("a", "b"))


def split(n: int, *, name: str, labels: str = "ab") -> Split:
    return Split(tuple(f"{name} {i}" for i in range(n)), None, tuple(labels[i % len(labels)] for i in range(n)))


def data(**splits: Split) -> Data:
    whole = {"train": split(60, name="train"), "validation": split(50, name="validation"), **splits}
    return Data(whole, Columns("text", None, "label"), source="a.csv")


def faults(told: Data, **arguments: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(DataError) as caught:
        check(told, arguments.pop("task", AB), **arguments)
    return [(fault.where, fault.must, fault.got) for fault in caught.value.faults]


def test_clean_data_has_no_warnings() -> None:
    assert check(data(test=split(9, name="test")), AB, metrics={"metric": "f1_macro"}) == ()


def test_a_label_that_train_never_shows_is_told_with_split_and_count() -> None:
    told = data(test=split(10, name="test", labels="abcab"), ood_x=split(3, name="x", labels="B"))
    must = "must only have labels that train has"
    assert faults(told) == [("test", must, "'c' in 2 rows"), ("ood_x", must, "'B' in 3 rows")]


def test_a_guess_is_offered_for_another_case_but_not_for_the_opposite() -> None:
    task = Classification(("entailment", "neutral"))
    train = Split(("p", "q"), None, ("entailment", "neutral"))
    other = Split(("r", "s"), None, ("Entailment", "not_entailment"))
    with pytest.raises(DataError) as caught:
        check(data(train=train, validation=other), task)
    first, second = caught.value.faults
    assert first.do.startswith("Did you mean 'entailment'?")
    assert second.do == "Rename or drop these rows, or leave validation out."


def test_labels_of_another_domain_can_be_mapped_and_many_are_counted() -> None:
    other = Split(("p", "q"), None, ("a", "it's"))
    with pytest.raises(DataError) as caught:
        check(data(out_domain=other), AB)
    (fault,) = caught.value.faults
    assert fault.do == (
        """Say --map 'out_domain:it'"'"'s=YOURS', rename or drop these rows, or leave out_domain out."""
    )
    told = faults(data(ood_x=split(7, name="x", labels="tuvwxyz")))
    assert [got for _, _, got in told[:5]] == [f"{label!r} in 1 row" for label in "tuvwx"]
    assert told[5:] == [("ood_x", "has 2 more such labels", "")]


def test_empty_texts_are_told_with_their_rows_in_the_source() -> None:
    holes = Split(("x", " ", "y", "\n"), None, ("a", "b", "a", "b"), rows=(4, 8, 15, 16))
    assert faults(data(test=holes)) == [("test, rows 8, 16", "must have a text in 'text'", "no text in 2 of 4 rows")]


def test_an_empty_second_text_is_told_too() -> None:
    holes = Split(("x", "y"), ("p", ""), ("a", "b"))
    told = Data({"train": holes}, Columns("text", "text2", "label"))
    assert faults(told) == [("train, row 2", "must have a text in 'text2'", "no text in 1 of 2 rows")]


def test_all_faults_are_told_at_once() -> None:
    told = data(
        train=split(5, name="train", labels="a"), test=Split((), None, ()), ood_x=split(2, name="x", labels="b")
    )
    assert faults(told, task=Classification(("a",)), metrics={"metric": "acuracy"}) == [
        ("test", "must have rows", "0"),
        ("train", "must have at least two classes", "only 'a'"),
        ("validation", "must only have labels that train has", "'b' in 25 rows"),
        ("ood_x", "must only have labels that train has", "'b' in 2 rows"),
        ("metric", "must be a metric of classification", "'acuracy'"),
    ]


def test_a_metric_of_another_task_is_refused_with_those_there_are() -> None:
    with pytest.raises(DataError, match="There are: accuracy, f1_macro, mcc, auroc, nll, brier, ece"):
        check(data(), AB, metrics={"metric": "rmse"})


def test_regression_on_one_number_is_refused() -> None:
    flat = Split(("x", "y"), None, (1.5, 1.5))
    assert faults(Data({"train": flat}, Columns("text")), task=Regression())[0][0] == "train"


def test_a_split_with_one_class_is_warned_about() -> None:
    assert check(data(test=split(4, name="test", labels="b")), AB) == ("test: every row is 'b': scores say little",)


def test_a_duplicate_across_train_and_test_is_counted() -> None:
    leaky = Split(("train 3", " train 4 ", "new", "newer"), None, ("a", "b", "a", "b"))
    assert check(data(test=leaky), AB) == ("test: 2 of 4 rows (50.0 %) are in train too: scores flatter",)


def test_the_same_text_with_another_pair_is_no_duplicate() -> None:
    train = Split(("x", "x"), ("p", "q"), ("a", "b"))
    test = Split(("x", "x"), ("q", "r"), ("a", "b"))
    told = Data({"train": train, "test": test}, Columns("text", "text2", "label"))
    assert check(told, AB) == ("test: 1 of 2 rows (50.0 %) is in train too: scores flatter",)


def test_duplicates_within_train_and_their_differing_labels_are_counted() -> None:
    # "x" three times is two repeats, with labels a, a, b: one text with two labels. "y" twice is a third repeat.
    train = Split(("x", "x", "x", "y", "y"), None, ("a", "a", "b", "b", "b"))
    assert check(Data({"train": train}, Columns("text")), AB) == (
        "train: 3 rows repeat another",
        "train: 1 text with more than one label",
    )


def test_a_tiny_validation_is_warned_about_and_fifty_rows_are_not() -> None:
    (warning,) = check(data(validation=split(49, name="v")), AB)
    assert warning.startswith("validation: only 49 rows")


def test_a_tiny_validation_of_numbers_chooses_no_temperature() -> None:
    rows = Split(tuple(f"v {i}" for i in range(9)), None, tuple(i / 7 for i in range(9)))
    train = Split(tuple(f"t {i}" for i in range(9)), None, rows.labels)
    (warning,) = check(Data({"train": train, "validation": rows}, Columns("text", None, "label")), Regression())
    assert warning == "validation: only 9 rows: what is chosen on it (a best step) is mostly luck"


def test_classes_that_differ_in_case_and_spaces_are_warned_about_and_signs_and_numbers_are_not() -> None:
    def told(*labels: str) -> tuple[str, ...]:
        train = Split(tuple(f"t {i}" for i in range(len(labels))), None, labels)
        found = Data({"train": train}, Columns("text", None, "label"))
        return check(found, decide(found, "classification")[0])

    (warning,) = told("Negative", "negative", "negative", "pos")
    assert warning == (
        "train: 'Negative' (1 row) and 'negative' (2 rows) are classes of their own: if they are one, write them alike"
    )
    assert len(told("not entailment", "Not_Entailment", "entailment")) == 1
    assert told("C", "C++", "C#", "-", "+", "-1", "1", "_") == ()


def test_numbers_as_classes_are_compared_by_name() -> None:
    train, other = Split(("x", "y") * 5, None, (0, 1) * 5), Split(("p", "q"), None, (1, 0))
    told = Data({"train": train, "test": other}, Columns("text", None, "label"))
    assert check(told, decide(told)[0]) == ("train: 8 rows repeat another",)
