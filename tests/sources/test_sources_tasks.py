from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from luthier.errors import DataError
from luthier.sources.checks import check
from luthier.sources.data import Data, read
from luthier.sources.tasks import Classification, Regression, decide


def data(labels: list[Any]) -> Data:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": pd.Series(labels, dtype=object)})
    return read({"train": frame, "validation": frame})


def test_strings_are_classes_in_alphabetical_order_and_counted() -> None:
    task, said = decide(data(["b", "a", "b", "c"] * 5))
    assert task == Classification(("a", "b", "c"))
    assert said == "classification: 3 labels (column 'label': a 5, b 10, c 5)"


def test_whole_numbers_are_classes_in_numeric_order() -> None:
    task, _ = decide(data([10, 9, 2] * 5))
    assert task.label_names == ("2", "9", "10")
    assert task.targets([10, 2, 9]).tolist() == [2, 0, 1]


def test_numbers_with_decimals_are_a_quantity() -> None:
    task, said = decide(data([i / 2 for i in range(20)]))
    assert task == Regression()
    assert said == "regression: one number a row (column 'label': 0 to 9.5, mean 4.75)"


def test_few_distinct_decimals_are_a_quantity_with_a_hint() -> None:
    assert "only 2 distinct: if they are classes, --task classification" in decide(data([0.0, 1.0] * 10))[1]


def test_the_task_can_be_told_either_way() -> None:
    assert decide(data([0.0, 1.0] * 10), "classification")[0].label_names == ("0", "1")
    assert decide(data([1, 2, 3] * 10), "regression")[0].kind == "regression"


def beside(labels: list[Any], **others: list[Any]) -> Data:
    """Data of which ``labels`` are train's and validation's, and others those of other splits."""
    frames = {
        name: pd.DataFrame({"text": [f"{name} {i}" for i in range(len(each))], "label": pd.Series(each, dtype=object)})
        for name, each in {"train": labels, "validation": labels, **others}.items()
    }
    return read(frames)


@pytest.mark.parametrize("name", ["out_domain", "ood_x"])
@pytest.mark.parametrize("labels", [[0.1, 0.9] * 20, list(range(40)), ["pos", "neg"] * 20])
def test_rows_of_another_domain_have_no_say_in_the_task(name: str, labels: list[Any]) -> None:
    told = beside([0, 1] * 10, **{name: labels})
    assert told.splits["train"].labels == (0, 1) * 10
    assert decide(told)[0] == Classification(("0", "1"))
    with pytest.raises(DataError, match=f"{name}  must only have labels that train has"):
        check(told, decide(told)[0])


def test_rows_of_another_domain_have_no_say_in_the_split() -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)], "label": [0, 1] * 30})
    other = pd.DataFrame({"text": ["a", "b"], "label": [0.1, 0.9]})
    assert any("stratified by label" in note for note in read(frame, out_domain=other).notes)
    assert read(frame, out_domain=other).splits["test"] == read(frame).splits["test"]


def test_rows_of_another_domain_must_have_numbers_where_the_task_has() -> None:
    assert decide(beside([i / 2 for i in range(20)], out_domain=[1, 2]))[0] == Regression()
    with pytest.raises(
        DataError, match=r"out_domain, row 2  must have a number .* got 'high'.  Mend them, or leave out"
    ):
        decide(beside([i / 2 for i in range(20)], out_domain=[1, "high"]))


def test_regression_with_words_names_their_rows() -> None:
    with pytest.raises(DataError) as caught:
        decide(data([1.5, "two", 3.5, "four"]), "regression")
    assert [fault.where for fault in caught.value.faults] == ["train, rows 2, 4", "validation, rows 2, 4"]
    assert "got 'two', 'four'" in str(caught.value)


def test_a_column_of_numbers_with_a_slip_is_not_taken_for_classes() -> None:
    with pytest.raises(DataError, match="train, row 31  must have a number as label; got 'NA'"):
        decide(data([*(i + 0.5 for i in range(30)), "NA"]))


def test_labels_that_hardly_repeat_are_refused_unless_told() -> None:
    texts = [f"answer {i}" for i in range(30)]
    with pytest.raises(
        DataError, match="column 'label'  must repeat, to be classes; got 30 different values in 30 rows"
    ):
        decide(data(texts))
    assert decide(data(texts), "classification")[0].num_labels == 30


def test_an_unknown_task_is_refused_with_a_guess() -> None:
    with pytest.raises(DataError, match=r"got 'clasification'.  Did you mean 'classification'"):
        decide(data(["a", "b"] * 5), "clasification")


def test_unknown_labels_are_refused_by_targets() -> None:
    with pytest.raises(DataError, match=r"must be one of a, B; got 'b'"):
        Classification(("a", "B")).targets(["a", "b"])
    with pytest.raises(DataError, match="rows 2, 3"):
        Regression().targets([1.0, "x", "y"])


def test_losses_by_hand() -> None:
    # Two equal logits: ln 2, whatever the class. Logits (ln 3, 0), class 0: -ln(3/4) = ln(4/3).
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    loss = Classification(("a", "b")).loss(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-6)
    # Errors 1 and -2: (1 + 4) / 2.
    loss = Regression().loss(torch.tensor([[3.0], [1.0]]), torch.tensor([2.0, 3.0]))
    assert loss.item() == 2.5
    assert loss.shape == ()


def test_losses_of_half_precision_logits_are_computed_in_single() -> None:
    logits = torch.tensor([[0.1, 0.7]], dtype=torch.bfloat16)
    assert Classification(("a", "b")).loss(logits, torch.tensor([0])).dtype == torch.float32
    assert Regression().loss(logits[:, :1], torch.tensor([0.0])).dtype == torch.float32


def test_targets_have_the_types_that_the_losses_take() -> None:
    assert Classification(("0", "1")).targets([1, 0]).dtype == np.int64
    assert Regression().targets([1, 0.5]).dtype == np.float32


def test_decoding_by_hand() -> None:
    assert Classification(("a", "b")).decode(np.array([[0.0, 1.0], [2.0, 1.0]])) == ["b", "a"]
    assert Regression().decode(np.array([[0.5], [2.0]])) == [0.5, 2.0]
    # exp(ln 3) : exp(0) = 3 : 1.
    assert Classification(("a", "b")).probabilities(np.array([[math.log(3), 0.0]]))[0] == pytest.approx([0.75, 0.25])
    with pytest.raises(TypeError, match="no probabilities"):
        Regression().probabilities(np.zeros((1, 1)))


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)))
def test_probabilities_sum_to_one_and_agree_with_decode(logits: np.ndarray[Any, Any]) -> None:
    task = Classification(("a", "b", "c", "d"))
    shares = task.probabilities(logits)
    assert shares.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-12)
    best = shares.max(axis=1)
    assert all(shares[i, task.labels.index(name)] == best[i] for i, name in enumerate(task.decode(logits)))
