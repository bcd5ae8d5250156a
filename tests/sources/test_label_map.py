"""Shifted tests whose labels have other names."""

from __future__ import annotations

import pandas as pd
import pytest

import luthier
from luthier.errors import DataError
from luthier.sources.data import read
from tests.little import recipe, sentences

OURS = pd.DataFrame({"text": list("abcdefghijklmnopqrst"), "label": ["good", "bad"] * 10})
THEIRS = pd.DataFrame({"text": ["x", "y", "z"], "label": [1, 0, 1]})


def test_their_labels_become_ours():
    found = read(OURS, ood={"tweets": THEIRS}, label_map={"tweets": {"1": "good", "0": "bad"}})
    assert found.splits["ood_tweets"].labels == ("good", "bad", "good")
    assert found.splits["train"].labels[0] in ("good", "bad")


def test_names_may_become_numbers_and_the_kind_stays_that_of_train():
    ours = OURS.assign(label=[1, 0] * 10)
    theirs = THEIRS.assign(label=["entailment", "non-entailment", "neutral"])
    names = {"entailment": "1", "non-entailment": "0", "neutral": "0"}
    found = read(ours, ood={"hans": theirs}, label_map={"ood_hans": names})
    assert found.splits["ood_hans"].labels == (1, 0, 0)
    assert set(found.splits["train"].labels) == {0, 1}


def test_their_labels_may_be_given_as_numbers():
    found = read(OURS, ood={"tweets": THEIRS}, label_map={"tweets": {1: "good", 0: "bad"}})
    assert found.splits["ood_tweets"].labels == ("good", "bad", "good")
    with pytest.raises(DataError, match="must have the label '2' to map it"):
        read(OURS, ood={"tweets": THEIRS}, label_map={"tweets": {2: "good"}})
    with pytest.raises(DataError, match="the label map of 3  must be that of a split"):
        read(OURS, ood={"tweets": THEIRS}, label_map={3: {1: "good"}})


def test_the_digest_is_that_of_the_labels_as_they_are_used():
    mapped = read(OURS, ood={"t": THEIRS}, label_map={"t": {"1": "good", "0": "bad"}})
    written = read(OURS, ood={"t": THEIRS.assign(label=["good", "bad", "good"])})
    assert mapped.digest == written.digest


def test_a_split_or_a_label_that_is_not_there_is_told():
    with pytest.raises(DataError, match="the label map of twets  must be that of a split"):
        read(OURS, ood={"tweets": THEIRS}, label_map={"twets": {"1": "good"}})
    with pytest.raises(DataError, match="must have the label '2' to map it"):
        read(OURS, ood={"tweets": THEIRS}, label_map={"tweets": {"2": "good"}})


def test_a_run_measures_them(tiny_model):
    other = sentences(20, seed=3).replace({"label": {"good": "POS", "bad": "NEG"}})
    report = luthier.fit(
        recipe(["adamw"], steps=2), model=tiny_model, data=sentences(), ood={"other": other},
        label_map={"other": {"POS": "good", "NEG": "bad"}},
    )  # fmt: skip
    assert report.metrics["ood"]["other"]["n"] == 20
