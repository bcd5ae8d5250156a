"""The report as a value and as a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import LuthierError, RunError
from luthier.jsonfile import plain
from luthier.report import Movement, Report, StageReport

TEST = {"accuracy": 0.8, "f1_macro": 0.79, "nll": 0.5, "brier": 0.3, "ece": 0.1, "n": 10}
BINS = [
    {"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None},
    {"low": 0.5, "high": 1.0, "count": 10, "confidence": 0.9, "accuracy": 0.8},
]


def a_report(**changes: Any) -> Report:
    """A small report of a classification in two stages; 8 of 10 test rows are right."""
    whole = Report(
        recipe="lp-ft",
        recipe_digest="sha256:aa",
        seed=13,
        task="classification",
        labels=("no", "yes"),
        metric="accuracy",
        metrics={
            "validation": {**TEST, "accuracy": 0.7},
            "test": dict(TEST),
            "ood": {"bbc": {**TEST, "accuracy": 0.65, "n": 20}},
        },
        calibrated={"validation": {**TEST, "accuracy": 0.7}, "test": {**TEST, "nll": 0.4, "ece": 0.02}, "ood": {}},
        calibration={"temperature": 1.5, "at_bound": False},
        stages=(
            StageReport("probe", 2, 1.0, 64.0, 10, 1_000_000, "adamw", ("a note",)),
            StageReport("finetune", 4, 2.0, 32.0, 1000, 2_000_000, "adamw", ()),
        ),
        movement=(
            Movement("probe", 0, "embeddings", 500, False, 0.0, 0.0),
            Movement("probe", 1, "head", 10, True, 0.5, 0.25),
            Movement("finetune", 0, "embeddings", 500, True, 0.3, 0.01),
            Movement("finetune", 1, "head", 10, True, 0.1, 0.05),
        ),
        curves={
            "loss": [[step, 1.0 / step] for step in range(1, 7)],
            "learning_rate": [[step, 1e-3 if step < 3 else 1e-5] for step in range(1, 7)],
            "validation": [[2, {"nll": 0.6, "accuracy": 0.5}], [6, {"nll": 0.5, "accuracy": 0.7}]],
            "stage_starts": [[0, "probe"], [2, "finetune"]],
        },
        confusion={"test": [[6, 1], [1, 2]], "ood_bbc": [[8, 4], [3, 5]]},
        reliability={"test": {"before": BINS, "after": BINS}},
        mistakes=[
            {"split": "test", "text": "so so", "pair": None, "label": "no", "prediction": "yes", "confidence": 0.97}
        ],
        data={"source": "trec6/", "digest": "sha256:bb", "notes": ["a reading"], "sizes": {"train": 40, "test": 10}},
        model={"source": "tiny", "digest": "sha256:cc", "parameters": 1510},
        plan={},
        warnings=("3 rows of test also stand in train",),
        seconds=3.5,
        path="runs/lp-ft",
    )
    return replace(whole, **changes)


def test_a_saved_report_is_read_back_equal(tmp_path: Path) -> None:
    report = a_report()
    assert report.save(tmp_path) == tmp_path / "report.json"
    assert Report.load(tmp_path) == report
    assert Report.load(tmp_path / "report.json") == report


def test_numbers_that_are_not_finite_become_null_and_floats_read_back_as_nan(tmp_path: Path) -> None:
    stage = replace(a_report().stages[0], examples_per_second=math.nan)
    a_report(stages=(stage,), metrics={"test": {"pearson": math.inf}, "ood": {}}).save(tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["stages"][0]["examples_per_second"] is None
    assert told["metrics"]["test"]["pearson"] is None
    read = Report.load(tmp_path)
    assert math.isnan(read.stages[0].examples_per_second)
    assert read.metrics["test"]["pearson"] is None


def test_numpy_values_paths_and_half_surrogates_are_saved(tmp_path: Path) -> None:
    a_report(
        metrics={"test": {"accuracy": np.float32(0.5), "n": np.int64(4)}, "ood": {}},
        confusion={"test": np.array([[1, 2], [3, 4]])},
        data={"source": Path("here"), "notes": ["\ud83d"]},
    ).save(tmp_path)
    read = Report.load(tmp_path)
    assert read.metrics["test"] == {"accuracy": 0.5, "n": 4}
    assert read.confusion == {"test": [[1, 2], [3, 4]]}
    assert read.data == {"source": "here", "notes": ["?"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(JSON)
def test_what_is_plain_survives_strict_json_unchanged(value: Any) -> None:
    told = plain(value)
    assert json.loads(json.dumps(told, allow_nan=False, ensure_ascii=False).encode("utf-8")) == told
    assert plain(told) == told


def test_report_json_has_the_names_that_other_programs_read() -> None:
    told = a_report().to_json()
    assert told["schema"] == 3
    assert set(told["metrics"]["test"]) == {"accuracy", "f1_macro", "nll", "brier", "ece", "n"}
    assert told["metrics"]["ood"]["bbc"]["accuracy"] == 0.65
    assert told["stages"][1] == {
        "name": "finetune",
        "steps": 4,
        "seconds": 2.0,
        "examples_per_second": 32.0,
        "trainable_parameters": 1000,
        "peak_memory_bytes": 2_000_000,
        "solver": "adamw",
        "notes": [],
    }


def test_a_report_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="must be there"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "must be a report in JSON"), ("[]", "no schema"), ('{"schema": 1}', "must have schema 3; got schema 1")],
)
def test_a_file_that_is_no_report_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(LuthierError, match=said):
        Report.load(tmp_path)


def test_every_fault_of_a_report_is_told_at_once(tmp_path: Path) -> None:
    told = a_report().to_json()
    del told["recipe"]
    told["seed"] = "13"
    told["colour"] = "red"
    told["stages"][1]["steps"] = None
    told["warnings"] = [1]
    (tmp_path / "report.json").write_text(json.dumps(told))
    with pytest.raises(LuthierError) as caught:
        Report.load(tmp_path)
    found = {fault.where: fault.must for fault in caught.value.faults}
    assert found == {
        "recipe": "must be there",
        "seed": "must be of type int",
        "colour": "must be a known name",
        "stages[1].steps": "must be of type int",
        "warnings[0]": "must be of type str",
    }


def test_a_failed_save_leaves_the_earlier_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_report(seed=1).save(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        a_report(seed=2).save(tmp_path)
    assert Report.load(tmp_path).seed == 1
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_the_split_that_counts_is_test_then_validation_then_none() -> None:
    assert a_report().shown == "test"
    assert a_report(metrics={"validation": TEST, "ood": {}}).shown == "validation"
    assert a_report(metrics={"ood": {"bbc": TEST}}).shown is None


def test_the_summary_tells_scores_shift_calibration_and_where_the_report_is() -> None:
    assert a_report().summary().splitlines() == [
        "lp-ft, seed 13: accuracy 0.8000 on test",
        "                        accuracy  f1_macro       nll       ece      rows",
        "  validation              0.7000    0.7900    0.5000    0.1000        10",
        "  test                    0.8000    0.7900    0.5000    0.1000        10",
        "  ood bbc                 0.6500    0.7900    0.5000    0.1000        20",
        "  after temperature 1.5000: ece 0.1000 -> 0.0200 on test",
        "  to know: 3 rows of test also stand in train",
        "  report: runs/lp-ft/report.html",
    ]


def test_the_summary_fits_80_columns_but_for_the_path_which_is_never_cut() -> None:
    path = "/a/long/way/" * 12
    ood = {"a shifted test with a very long name " * 3: TEST}
    told = a_report(path=path, recipe="r" * 70, warnings=("word " * 60,), metrics={"test": TEST, "ood": ood})
    *lines, last = told.summary().splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"  report: {Path(path) / 'report.html'}"


def test_the_summary_of_a_run_without_held_out_rows_says_that_nothing_was_measured() -> None:
    told = a_report(metrics={"ood": {}}, calibrated={}, warnings=(), path=None).summary()
    assert "nothing was measured" in told
    assert told.endswith("nothing was kept on disk")


def test_reading_a_report_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, luthier.report; print(sorted({'torch', 'matplotlib', 'numpy', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_large_scores_stand_apart_and_shares_keep_four_digits() -> None:
    scores = {"rmse": 210679.2785, "mae": 202800.3905, "pearson": -0.12345, "spearman": -3.2e12, "n": 10}
    told = a_report(task="regression", metric="rmse", metrics={"validation": scores, "ood": {}}, calibrated={})
    line = next(line for line in told.summary().splitlines() if line.startswith("  validation"))
    assert line.split() == ["validation", "210679", "202800", "-0.1235", "-3.2e+12", "10"]


def test_a_run_that_is_no_better_than_one_answer_for_all_is_told_so() -> None:
    # 7 of the 10 test rows are "no"
    assert a_report().baseline("test") == ("accuracy", 0.7, "no") and not a_report().no_better("test")
    assert "always answering" not in a_report().summary()
    bad = a_report(metrics={"test": {**TEST, "accuracy": 0.7}, "ood": {}}, calibrated={})
    assert "  always answering 'no': accuracy 0.7000 on test; this run is no better" in bad.summary().splitlines()
    for rmse, told in ((0.5, "rmse 2.0000 on test"), (2.0, "rmse 2.0000 on test; this run is no better")):
        one = a_report(
            task="regression",
            metric="rmse",
            metrics={"test": {"rmse": rmse, "n": 9}, "ood": {}},
            calibrated={},
            confusion={},
            data={"constant": {"test": 2.0}},
        )
        flat = " ".join(one.summary().split())
        assert f"always answering the mean of the training labels: {told} report:" in flat.replace(
            "to know: 3 rows of test also stand in train ", ""
        )
    assert a_report(confusion={}).baseline("test") is None
