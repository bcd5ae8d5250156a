"""Drift stage by stage: numbers by hand, and what is said of a stage that is not known or moves nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from luthier.errors import DataError
from luthier.studies.drift import Look, drift
from luthier.studies.drift_stages import StagedDrift, by_stage
from luthier.studies.features import Rows


def look(*points: list[float], norm: float = 1.0, outside: list[list[float]] | None = None, digest: str = "x") -> Look:
    """A model of one layer that makes these vectors of rows, whose labels are 0, 1, 0, 1, ..."""
    vectors = {"block 0": np.array(points), "head": np.array(points)}
    far = None if outside is None else Rows({"block 0": np.array(outside), "head": np.array(outside)}, None, "y")
    return Look(Rows(vectors, np.arange(len(points)) % 2, digest), far, norm)


START = look([0.0, 0.0], [0.0, 0.0], norm=0.5)
MIDDLE = look([3.0, 4.0], [0.0, 1.0], norm=2.0)
END = look([3.0, 4.0], [0.0, 9.0], norm=3.0)


def moved(found: StagedDrift) -> dict[str, float]:
    return {span.name: span.drift.layers[0].diff for span in found.spans}


def test_each_stage_is_from_where_the_one_before_it_ended() -> None:
    # first: rows go 5 and 1 far, mean 3; second: 0 and 8, mean 4; both together: 5 and 9, mean 7
    found = by_stage([("first", START), ("second", MIDDLE)], END)
    assert moved(found) == {"first": 3.0, "second": 4.0}
    assert found.whole.layers[0].diff == 7.0
    norms = [(span.drift.head_norm_before, span.drift.head_norm_after) for span in found.spans]
    assert norms == [(0.5, 2.0), (2.0, 3.0)]


def test_a_way_there_and_back_is_seen_in_the_stages_and_not_in_the_whole() -> None:
    found = by_stage([("there", START), ("back", MIDDLE)], START)
    assert moved(found) == {"there": 3.0, "back": 3.0}
    assert found.whole.layers[0].diff == 0.0


def test_stages_between_which_the_model_is_not_known_are_taken_together() -> None:
    starts = [("first", START), ("second", None), ("third", MIDDLE), ("fourth", None)]
    found = by_stage(starts, END, hidden=["The model before 'second' is not known: why."])
    assert moved(found) == {"first + second": 3.0, "third + fourth": 4.0}
    assert "The model before 'second' is not known: why." in found.lines()


def test_the_whole_keeps_its_names_in_json_and_the_stages_stand_beside_it() -> None:
    told = by_stage([("first", START), ("second", MIDDLE)], END).to_dict()
    whole = drift(START, END).to_dict()
    assert {name: told[name] for name in whole} == whole
    assert [(one["stage"], one["layers"][-1]["diff"]) for one in told["stages"]] == [("first", 3.0), ("second", 4.0)]
    assert json.loads(json.dumps(told)) == told


def test_one_stage_reads_as_before() -> None:
    found, alone = by_stage([("finetune", START)], END), drift(START, END)
    assert found.lines() == alone.lines()
    assert found.plot() == alone.plot()
    assert moved(found) == {"finetune": 7.0}


def test_a_stage_that_moves_the_head_alone_says_so_and_the_whole_is_that_of_the_other() -> None:
    probed = look([0.0, 0.0], [0.0, 0.0], norm=2.0)
    lines = by_stage([("probe", START), ("finetune", probed)], END).lines()
    at = lines.index("probe: norm of the head 0.5 -> 2")
    assert lines[at + 1] == "no feature moved"
    at = lines.index("from start to end: norm of the head 0.5 -> 3")
    assert lines[at + 1] == "the features as in finetune"
    assert sum(line.startswith("block 0") for line in lines) == 1


def test_the_text_fits_80_columns_whatever_the_stages_are_called() -> None:
    names = ["a stage with a long name " * 4, "b" * 70, "c"]
    found = by_stage([(names[0], START), (names[1], None), (names[2], MIDDLE)], END, hidden=["why " * 60])
    assert max(map(len, found.lines())) <= 80


def test_the_plot_names_every_stage_and_what_is_outside_and_is_the_same_bytes_twice() -> None:
    states = [
        look([0.0, at], [3.0, -at], [at, 2.0], [4.0, 1.0], outside=[[at * at, 1.0], [2.0, at]])
        for at in (0.0, 1.0, 3.0, 4.0)
    ]
    found = by_stage(list(zip(("warm", "tune", "cool"), states[:3], strict=True)), states[3])
    drawn = found.plot()
    for text in ("warm", "tune", "cool", "rows outside", "FDR at the start", "moved (L2)", "CKA (1: same)"):
        assert f">{text}</text>" in drawn, text
    assert drawn == found.plot()


def test_looks_at_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="same rows"):
        by_stage([("first", START)], look([3.0, 4.0], [0.0, 9.0], digest="z"))
