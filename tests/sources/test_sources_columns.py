from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from luthier.errors import DataError
from luthier.sources.columns import Columns, Flags, infer
from luthier.sources.data import read
from luthier.sources.labels import are_classes, as_labels, as_number, decimal_commas, pointed
from luthier.sources.tasks import Regression, decide

LONG = ["a rather long text about nothing", "another long text about little"] * 10
SHORT = ["one word", "two words"] * 10
CLASS = ["x", "y"] * 10
NUMBER = [0.5 + i for i in range(20)]
IDS = [f"row-{i}" for i in range(20)]


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({"text": LONG, "label": CLASS}, Columns("text", None, "label")),
        ({"Label": CLASS, "Text": LONG}, Columns("Text", None, "Label")),
        ({"title": SHORT, "review": LONG, "rating": NUMBER}, Columns("review", None, "rating")),
        ({"sentence1": LONG, "sentence2": SHORT, "score": NUMBER}, Columns("sentence1", "sentence2", "score")),
        ({"premise": SHORT, "hypothesis": LONG, "gold_label": CLASS}, Columns("premise", "hypothesis", "gold_label")),
        ({"question1": LONG, "question2": LONG, "y": CLASS}, Columns("question1", "question2", "y")),
        ({"question": SHORT, "passage": LONG, "answer": [True, False] * 10}, Columns("question", "passage", "answer")),
        ({"text": LONG, "text2": SHORT, "label": CLASS, "genre": CLASS}, Columns("text", "text2", "label")),
        ({"text": LONG, "sentence2": LONG, "label": CLASS}, Columns("text", "sentence2", "label")),
        ({"text": LONG, "answer": SHORT, "label": CLASS}, Columns("text", None, "label")),
        ({"id": IDS, "blurb": LONG, "tag": CLASS}, Columns("blurb", None, "tag")),
        ({"blurb": LONG, "yield": NUMBER}, Columns("blurb", None, "yield")),
        ({"text": ["1", "2"] * 10, "body": LONG, "label": CLASS}, Columns("body", None, "label")),
        ({"text": LONG, "labels": [["x"], ["y"]] * 10, "class": CLASS}, Columns("text", None, "class")),
        ({"text": LONG, "y": CLASS, "label": CLASS}, Columns("text", None, "label")),
    ],
)
def test_columns_are_inferred(table: dict[str, list[Any]], wanted: Columns) -> None:
    assert infer(table, Flags(), source="a.csv")[0] == wanted


def test_what_was_inferred_is_said_with_what_was_left() -> None:
    table = {"text": LONG, "text2": SHORT, "label": CLASS, "genre": CLASS}
    assert infer(table, Flags(), source="a.csv")[1] == (
        "text: column 'text' (by its name)",
        "second text: column 'text2' (by its name)",
        "label: column 'label' (by its name)",
        "not used: genre",
    )


def test_a_choice_by_content_says_what_else_there_was() -> None:
    table = {"blurb": LONG, "head": SHORT, "tag": CLASS, "lang": ["p", "q", "r", "s"] * 5}
    # 'head' has two different strings, so it may be a label; 'tag' as well, and the first of equals is taken.
    notes = infer(table, Flags(), source="a.csv")[1]
    assert (
        notes[0] == "text: column 'blurb' (the longest strings, 31 characters on average; others: head, tag, lang; "
        "--text overrides)"
    )
    assert notes[1] == "label: column 'head' (the fewest distinct values, 2; others: tag, lang; --label overrides)"


def test_flags_override_names() -> None:
    table = {"text": LONG, "summary": SHORT, "label": CLASS, "other": CLASS}
    columns, notes = infer(table, Flags("summary", "text", "other"), source="a.csv")
    assert columns == Columns("summary", "text", "other")
    assert notes[0] == "text: column 'summary' (as told)"


def test_every_unknown_flag_is_told_with_a_guess_and_the_columns() -> None:
    with pytest.raises(DataError) as caught:
        infer({"text": LONG, "label": CLASS}, Flags("txt", None, "lable"), source="a.csv")
    assert [str(fault) for fault in caught.value.faults] == [
        "--text  must name a column; got 'txt'.  Did you mean 'text'?  Columns: text, label.",
        "--label  must name a column; got 'lable'.  Did you mean 'label'?  Columns: text, label.",
    ]


def test_one_column_cannot_be_both_text_and_label() -> None:
    with pytest.raises(DataError, match="must name different columns; got 'text'"):
        infer({"text": LONG, "label": CLASS}, Flags("text", None, "text"), source="a.csv")


def test_a_table_of_lists_is_refused_with_what_its_columns_hold() -> None:
    with pytest.raises(DataError) as caught:
        infer({"tokens": [["a"]] * 20, "tags": [["O"]] * 20}, Flags(), source="a.csv")
    assert [fault.where for fault in caught.value.faults] == ["text", "label"]
    assert "tokens (lists), tags (lists)" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["a", "b"], True),
        ([0, 1] * 5, True),
        ([1, 2, 3, 4, 5] * 4, True),
        (list(range(20)) * 2, True),  # 20 distinct, each twice: the most that passes
        (list(range(21)) * 2, False),  # 21 ids want 420 rows
        (list(range(21)) * 20, True),
        (list(range(1, 151)) * 20, True),
        ([0, *range(2, 22)] * 20, False),  # a gap: counts, not ids
        (list(range(10)), False),  # each value once
        ([0.0, 1.0] * 5, False),
        ([0.5, 1.5] * 5, False),
    ],
)
def test_whole_numbers_are_classes_when_few(labels: list[Any], wanted: bool) -> None:
    assert are_classes(labels) is wanted


def test_whole_numbers_of_one_split_make_whole_floats_of_another_ints() -> None:
    assert as_labels({"train": [0, 1], "test": [1.0]}) == {"train": (0, 1), "test": (1,)}
    assert as_labels({"train": [0, 1], "test": [1.5]}) == {"train": (0.0, 1.0), "test": (1.5,)}
    assert as_labels({"train": ["0"], "test": ["no"]}) == {"train": ("0",), "test": ("no",)}


def other(name: str, cells: list[str], **more: Any) -> tuple[str, ...]:
    rows = pd.DataFrame({"s1": [f"the first of two texts {i}" for i in range(20)], name: cells, "y": ["a", "b"] * 10})
    return read(rows, **more).warnings


def test_a_second_column_of_texts_that_is_not_read_is_warned_about_with_the_flag_that_reads_it() -> None:
    texts = [f"another text {i}" for i in range(20)]
    (warning,) = other("s2", texts)
    assert (
        warning
        == "only 's1' is read, and 's2' looks like text too: for pairs, --text-pair s2; for 's1' alone, --text s1"
    )
    assert other("s2", texts, text_pair="s2") == other("s2", texts, text="s1") == ()


def test_ids_places_and_names_are_no_second_text() -> None:
    assert other("id", [f"row-{i}" for i in range(20)]) == ()
    assert other("url", [f"https://example.org/{i}" for i in range(20)]) == ()
    assert other("name", ["Ada Lee", "Bo Ek"] * 10) == ()


COMMAS = "text;rating\n" + "".join(f"a long text number {i};{i % 9 / 2}\n".replace(".", ",") for i in range(45))


def test_ratings_with_decimal_commas_are_numbers_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text(COMMAS)
    found = read(path)
    labels = {label for split in found.splits.values() for label in split.labels or ()}
    assert labels == {i / 2 for i in range(9)}
    do = "if they are classes, --task classification"
    assert f"labels: numbers with decimal commas, '0,0' is read as 0.0; {do}" in found.notes
    assert decide(found)[0] == Regression()
    assert "3,5" in (read(path, task="classification").splits["train"].labels or ())


@pytest.mark.parametrize("odd", ["3.5", "x", "1,2,3", "0,5 points"])
def test_labels_of_which_one_is_no_decimal_comma_stay_strings(odd: str) -> None:
    labels = as_labels({"train": ["3,5", "4", odd]})
    assert decimal_commas({"train": ["3,5", "4", odd]}) is None
    assert labels == {"train": ("3,5", "4", odd)}


def test_whole_numbers_beside_decimal_commas_are_numbers_too() -> None:
    assert decimal_commas({"train": ["4", " 3,5 ", "-1,25"], "ood_x": ["x"]}) == "3,5"
    assert [pointed(cell) for cell in ("4", " 3,5 ", "x,y", 3)] == ["4", "3.5", "x,y", 3]


def test_commas_that_may_mark_thousands_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    rows = "".join(f'a long text number {i};"{1 + i % 9},{i:03}"\n' for i in range(45))
    path.write_text("text;label\n" + rows)
    with pytest.raises(
        DataError,
        match=r"labels  must say whether a comma marks thousands or decimals; got '\d,0\d\d'.  Write 1100 or 1.100",
    ):
        read(path)
    assert "3,002" in (read(path, task="classification").splits["train"].labels or ())
    path.write_text("text;label\n" + rows + "a long text number 46;0,5\n")
    assert 3.002 in (read(path).splits["train"].labels or ())


def test_what_is_beyond_the_largest_float_is_no_number() -> None:
    # The largest is about 1.8e308; Python itself reads no whole number of more than 4300 digits.
    for cell in ("9" * 5000, "9" * 400, "-" + "9" * 400, "1e400", 10**400, -(10**400), float("inf"), float("nan")):
        assert as_number(cell) is None
    assert as_number("9" * 300) == as_number(int("9" * 300)) == 10**300 - 1
    assert as_labels({"train": ["9" * 5000, "1"]}) == {"train": ("9" * 5000, "1")}
