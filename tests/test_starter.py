"""starter: what it writes is read back as the recipe it means."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from luthier.recipe.recipe import Recipe
from luthier.recipe.text import read
from luthier.starter import starter


def started(folder: Path, rows: pd.DataFrame, *, name: str = "recipe.yaml") -> Recipe:
    """The recipe that is read from the starter for ``rows``."""
    rows.to_csv(folder / "rows.csv", index=False, quoting=csv.QUOTE_ALL)
    made, _ = starter(str(folder / "rows.csv"), file=str(folder / name))
    (folder / name).write_text(made, encoding="utf-8")
    return read(folder / name)


def rows(text: str, **more: object) -> pd.DataFrame:
    """Forty rows of two labels; each text is another one."""
    texts = [f"{text} {at}" for at in range(40)]
    return pd.DataFrame({"text": texts, **more, "label": ["good", "bad"] * 20})


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("good film " * 20, 64),  # 41 words: 61.5 tokens
        ("good film " * 21, 128),  # 43 words: 64.5
        ("electroencephalographically " * 10, 128),  # 271 letters: 67.75 tokens, and 16.5 by words
        ("電影很好" * 15, 64),  # 60 ideographs and two digits
        ("電影很好" * 25, 128),
        ("電影很好" * 200, 512),
    ],
)
def test_the_length_fits_the_words_or_the_letters(tmp_path, text, length):
    assert started(tmp_path, rows(text)).max_length == length


def test_the_length_fits_both_texts_of_a_pair(tmp_path):
    pairs = rows("what is it?", passage="it was a long story " * 30)  # 150 words: 225 tokens, and 6 of the question
    pairs.to_csv(tmp_path / "rows.csv", index=False)
    made, _ = starter(str(tmp_path / "rows.csv"), text="text", text_pair="passage", label="label")
    (tmp_path / "recipe.yaml").write_text(made, encoding="utf-8")
    assert read(tmp_path / "recipe.yaml").max_length == 256


@pytest.mark.parametrize("name", ["2024", "yes", "1e5", "null", "a: b", "my #1", 'say "x"', "été 😀", "~"])
def test_any_name_of_a_file_is_the_recipes_name(tmp_path, name):
    assert started(tmp_path, rows("good film"), name=f"{name}.yaml").name == name


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\x1b"])
def test_a_label_with_a_line_break_stays_in_its_comment(tmp_path, end):
    told = rows("good film").replace({"label": {"good": f"good{end}seed: 7"}})
    assert started(tmp_path, told).seed == 0
