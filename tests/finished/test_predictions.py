"""predict: new rows come back as they were, with what a finished model says of them beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import luthier
from luthier.errors import DataError, LuthierError
from luthier.finished.predictions import Predictions
from luthier.narrate import Silent
from luthier.sources.columns import Columns
from luthier.sources.data import read_unlabelled
from tests.little import recipe, sentences

TEXTS = ["good film", "bad book", "the plot was fine"]


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str = "") -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    sentences().to_csv(out / "data.csv", index=False)
    for seed in (1, 2):
        luthier.fit(
            recipe(["adamw"], steps=8), model=tiny_model, data=str(out / "data.csv"), out=out / str(seed), seed=seed
        )
    return [out / "1", out / "2"]


@pytest.fixture(scope="module")
def numbers(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("numbers") / "run"
    rows = sentences().assign(label=[at / 7 for at in range(60)])
    luthier.fit(recipe(["adamw"], steps=2), model=tiny_model, data=rows, out=out)
    return out


ROWS = [
    {"text": TEXTS[0], "id": 1234567890123456789, "seen": True, "tags": ["a", None], "note": 'x, "y"\nz'},
    {"text": TEXTS[1], "id": None, "seen": None, "tags": [], "note": None},
    {"text": TEXTS[2], "id": 3, "seen": False, "tags": None, "note": "07"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_rows_own_columns_come_back_as_they_were(runs, tmp_path, kind):
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(ROWS), source)
    told = luthier.predict(runs[0], source)
    told.save(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in ROWS[0]} for line in lines] == ROWS
    assert [line["prediction"] for line in lines] == told.labels
    told.save(tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["id"] for row in cells] == ["1234567890123456789", "", "3"]
    assert [row["seen"] for row in cells] == ["True", "", "False"]
    assert [row["note"] for row in cells] == ['x, "y"\nz', "", "07"]
    assert [float(row["p_good"]) for row in cells] == [line["p_good"] for line in lines]


@pytest.mark.parametrize("given", [["conformal"], ["temperature", {"conformal": {"alpha": 0.3, "score": "aps"}}]])
def test_prediction_sets_are_those_that_the_run_measured(given, tiny_model, tmp_path):
    rows = sentences(90).assign(label=["good", "bad", "fine"] * 30)
    for split, part in (("train", rows[:40]), ("validation", rows[40:60]), ("test", rows[60:])):
        part.to_csv(tmp_path / f"{split}.csv", index=False)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"{split}.csv").rename(tmp_path / "data" / f"{split}.csv")
    made = luthier.fit(
        recipe(["adamw", *given], steps=4), model=tiny_model, data=str(tmp_path / "data"), out=tmp_path / "run"
    )
    told = luthier.predict(tmp_path / "run", rows[60:])
    covered = [label in names for label, names in zip(rows.label[60:], told.sets, strict=True)]
    assert np.mean(covered) == pytest.approx(made.calibration["coverage_test"])
    assert np.mean([len(names) for names in told.sets]) == pytest.approx(made.calibration["set_size_test"])
    assert all(names[0] == label for names, label in zip(told.sets, told.labels, strict=True) if names)
    told.save(tmp_path / "out.csv")
    assert pd.read_csv(tmp_path / "out.csv")["prediction_set"].fillna("").tolist() == ["|".join(s) for s in told.sets]
    told.save(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction_set"] for line in lines] == told.sets
    with pytest.raises(DataError, match="column 'prediction_set'  must be free"):
        luthier.predict(tmp_path / "run", rows.assign(prediction_set=""))


def test_with_too_few_validation_rows_every_set_is_full_and_stays_so_in_the_report(tiny_model, tmp_path):
    luthier.fit(
        recipe(["adamw", {"conformal": {"alpha": 0.01}}], steps=1),
        model=tiny_model,
        data=sentences(40),
        out=tmp_path / "run",
    )
    told = luthier.predict(tmp_path / "run", pd.DataFrame({"text": TEXTS}))
    assert [sorted(names) for names in told.sets] == [["bad", "good"]] * 3


def test_what_is_no_number_is_null(tmp_path):
    Predictions({"a": [float("nan"), float("inf"), 0.5]}, [1.0, 2.0, 3.0], None, ()).save(tmp_path / "out.jsonl")
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"a": value, "prediction": at} for at, value in enumerate((None, None, 0.5), 1)]


def test_columns_where_predictions_would_stand_are_refused_before_anything_is_computed(runs, numbers, monkeypatch):
    monkeypatch.setattr("luthier.finished.predictions.reload", lambda folder: pytest.fail("a model was loaded"))
    rows = pd.DataFrame({"text": TEXTS, "prediction": 0, "p_good": 0.0, "p_other": 0.0})
    with pytest.raises(DataError) as told:
        luthier.predict(runs[0], rows)
    do = "must be free for predictions.  Rename or drop it."
    assert str(told.value).split("\n  ")[1:] == [f"column 'prediction'  {do}", f"column 'p_good'  {do}"]
    with pytest.raises(DataError, match="1 fault in the data"):
        luthier.predict(numbers, rows)


def test_a_soup_predicts_with_its_own_weights_and_its_runs_columns(runs, tmp_path):
    luthier.soup(runs, out=tmp_path / "soup", how="uniform")
    told = luthier.predict(tmp_path / "soup", pd.DataFrame({"text": TEXTS}))
    each = [luthier.predict(run, pd.DataFrame({"text": TEXTS})).probabilities for run in runs]
    assert told.names == ("bad", "good")
    assert all(np.abs(told.probabilities - one).max() > 1e-6 for one in each)


def test_a_soup_whose_runs_have_gone_says_which_are_needed(runs, tmp_path):
    luthier.soup(runs, out=tmp_path / "soup", how="uniform")
    made = json.loads((tmp_path / "soup" / "soup.json").read_text())
    (tmp_path / "soup" / "soup.json").write_text(json.dumps({**made, "runs": ["gone/a", "gone/b"]}))
    with pytest.raises(LuthierError, match=r"must name a run that is still there; got none of gone/a, gone/b"):
        luthier.predict(tmp_path / "soup", pd.DataFrame({"text": TEXTS}))
    with pytest.raises(LuthierError, match=r"no report.json\) and no soup"):
        luthier.predict(tmp_path, pd.DataFrame({"text": TEXTS}))


def test_empty_texts_are_warned_about_with_their_rows(runs):
    lines = Lines()
    luthier.predict(runs[0], pd.DataFrame({"text": ["good", None, "  ", "bad", ""]}), narrator=lines)
    assert lines.said == ["warning: no text in 'text', rows 2, 3, 5: predictions there mean nothing"]


def test_labels_that_fit_are_scored(runs, numbers):
    lines = Lines()
    said = luthier.predict(runs[0], pd.DataFrame({"text": TEXTS}), narrator=lines).labels
    assert lines.said == []
    labels = ["good", "bad", "good"]
    right = sum(one == other for one, other in zip(said, labels, strict=True)) / 3
    luthier.predict(runs[0], pd.DataFrame({"text": TEXTS, "label": labels}), narrator=lines)
    assert lines.said == [f"accuracy {right:.4f} on these 3 rows, by 'label'"]
    lines = Lines()
    found = luthier.predict(numbers, pd.DataFrame({"text": TEXTS, "label": ["1", "0,5", "2"]}), narrator=lines).labels
    rmse = np.sqrt(np.mean((np.array(found) - [1, 0.5, 2]) ** 2))
    assert lines.said == [f"rmse {rmse:.4f} on these 3 rows, by 'label'"]


@pytest.mark.parametrize("labels", [["good", "bad", "odd"], ["good", None, "bad"], [["good"], ["bad"], ["bad"]]])
def test_labels_that_do_not_fit_are_left_alone(runs, labels):
    lines = Lines()
    told = luthier.predict(runs[0], pd.DataFrame({"text": TEXTS, "label": labels}), narrator=lines)
    assert lines.said == [] and len(told.labels) == 3


ODD = ["a\rb", "a\r\nb", "a\nb", 'say "x"', "tab\tand, comma", "\r", "plain"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_carriage_return_in_a_text_comes_back(tmp_path, ending):
    path = tmp_path / f"told.{ending}"
    Predictions({"text": ODD}, ["x"] * len(ODD), None, ()).save(path)
    assert path.read_bytes().startswith(b"text\tprediction\n" if ending == "tsv" else b"text,prediction\n")
    assert path.read_bytes().endswith(b"plain\tx\n" if ending == "tsv" else b"plain,x\n")
    assert pd.read_csv(path, sep="\t" if ending == "tsv" else ",")["text"].tolist() == ODD
    split, _ = read_unlabelled(path, Columns("text", None))
    assert list(split.texts) == ODD


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path, ending):
    Predictions({"text": ["so \ud83d"]}, ["\ud83d"], None, ()).save(tmp_path / f"told.{ending}")
    assert (tmp_path / f"told.{ending}").read_text(encoding="utf-8").count("?") == 2
