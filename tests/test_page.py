"""The report as a page: what it says, what it refuses to run, that it is whole, small and the same every time."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier import page
from luthier.page import tables, words
from luthier.report import Movement, Report
from luthier.svg import MOST_POINTS, smoothed, thinned
from tests.test_report import TEST, a_report

EVIL = "<script>alert('x')</script><!-- & \" --!> $x_1$"
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Outline(HTMLParser):
    """Opens and closes tags; keeps ids, references, headings and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data

    @property
    def ids(self) -> list[str]:
        return [told["id"] for _, told in self.attributes if "id" in told]


def regression(**changes: Any) -> Report:
    """A regression in one stage, without calibration."""
    scores = {"rmse": 0.5, "mae": 0.4, "pearson": 0.9, "spearman": 0.88, "n": 3}
    none: dict[str, Any] = {"calibrated": {}, "calibration": {}, "confusion": {}, "reliability": {}, "mistakes": []}
    metrics = {"test": scores, "ood": {"forums": {**scores, "pearson": 0.7}}}
    points = [[0.0, 0.2], [1.0, 0.9], [2.0, 2.5]]
    base = a_report(task="regression", labels=(), metric="pearson", metrics=metrics, scatter=points, **none)
    return replace(base, **changes)


def headings(report: Report) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page.render(report))


def test_a_classification_has_its_sections_in_order_with_warnings_first() -> None:
    assert headings(a_report()) == [
        "Worth knowing",
        "How it learned",
        "Scores",
        "Where the model changed",
        "What it confuses",
        "Whether its confidence can be trusted",
        "Its most confident mistakes",
        "What it took",
        "Where it comes from",
    ]


def test_a_regression_shows_predicted_against_true_and_nothing_of_classes() -> None:
    found = headings(regression(warnings=()))
    assert "Predicted against true" in found
    assert not {"What it confuses", "Whether its confidence can be trusted", "Worth knowing"} & set(found)


def test_a_report_with_almost_nothing_in_it_still_makes_a_page() -> None:
    empty = a_report(
        metrics={"ood": {}},
        calibrated={},
        calibration={},
        stages=(),
        movement=(),
        curves={},
        confusion={},
        reliability={},
        mistakes=[],
        data={"source": "x"},
        model={"source": "y"},
        warnings=(),
        path=None,
    )
    assert headings(empty) == ["What it took", "Where it comes from"]
    assert "nothing was measured" in page.render(empty)


@pytest.mark.parametrize("report", [a_report(), regression()], ids=["classification", "regression"])
def test_every_tag_is_closed_ids_are_unique_and_references_lead_somewhere(report: Report) -> None:
    text = page.render(report)
    seen = Outline(text)
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    used |= {(told["aria-labelledby"], "") for _, told in seen.attributes if "aria-labelledby" in told}
    assert {first or second for first, second in used} <= set(seen.ids)
    assert used


def test_a_text_with_a_script_is_shown_and_not_run() -> None:
    mistake = {"split": "test", "text": EVIL, "pair": EVIL, "label": EVIL, "prediction": EVIL, "confidence": 0.9}
    row = {"depth": 0, "name": EVIL, "weights": 1, "trainable": True, "lr": 0.1, "weight_decay": 0.0, "set_by": [EVIL]}
    curves = {**a_report().curves, "stage_starts": [[0, EVIL], [2, EVIL]]}
    report = a_report(
        recipe=EVIL,
        labels=(EVIL, EVIL),
        metric="accuracy",
        metrics={"test": TEST, "ood": {EVIL: TEST}},
        movement=(Movement(EVIL, 0, EVIL, 1, True, 1.0, 1.0),),
        curves=curves,
        confusion={"test": [[6, 1], [1, 2]], f"ood_{EVIL}": [[1, 1], [1, 1]]},
        mistakes=[mistake],
        data={"source": EVIL, "digest": EVIL, "notes": [EVIL], "sizes": {EVIL: 3}},
        model={"source": EVIL, "digest": EVIL, "parameters": 3},
        plan={"stages": [{"name": EVIL, "ingredients": [EVIL], "rows_by_depth": [row]}]},
        warnings=(EVIL,),
        environment={"versions": {EVIL: EVIL}, "processor": EVIL, "gpus": [EVIL]},
    )
    text = page.render(report)
    seen = Outline(text)
    assert "<script" not in text
    assert "script" not in seen.tags
    assert "<!--" not in text
    assert seen.open == []
    assert "alert('x')" in seen.said


def test_no_address_is_fetched_and_scripts_are_forbidden_by_the_page_itself() -> None:
    text = page.render(a_report())
    seen = Outline(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "img", "iframe", "image"} & set(seen.tags)
    assert not any("src" in told for _, told in seen.attributes)
    policy = next(told["content"] for tag, told in seen.attributes if told.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_figure_says_in_words_what_it_shows() -> None:
    drawn = [told for tag, told in Outline(page.render(a_report())).attributes if tag == "svg"]
    # three curves, movement twice, reliability before and after
    assert len(drawn) == 7
    assert all(told["role"] == "img" and len(told["aria-label"]) > 10 for told in drawn)


POINTS = [[0.25, 0.0], [0.5, 0.0], [0.75, 1 / 3], [1.0, 0.5]]


def selective(after: list[list[float]]) -> tuple[str, list[str]]:
    """The page of a report with a risk-coverage curve of test, and the labels of its figures."""
    trust = {"ece": 0.1, "ece_low": 0.1, "ece_high": 0.2, "ece_mass": 0.1, "mce": 0.2}
    trust |= {"aurc": 0.2083, "accuracy_at_80": 0.5, "accuracy_at_50": 1.0}
    curves = {"test": {"before": POINTS, "after": after}}
    told = {"test": {"before": trust, "after": {**trust, "aurc": 0.1875} if after else {}}}
    text = page.render(a_report(selective=curves, trust=told))
    return text, [told["aria-label"] for tag, told in Outline(text).attributes if tag == "svg"]


def test_risk_against_coverage_stands_beside_the_reliability_diagrams() -> None:
    text, labels = selective([])
    assert labels[-3:] == [
        "Reliability diagram, test, as trained: ECE 0.100",
        "Reliability diagram, test, after temperature 1.5: ECE 0.020",
        "Risk against coverage, test; 0.500 where all are answered",
    ]
    for said in (
        "coverage (share of the rows answered, surest first)",
        "risk (share of these wrong)",
        "all rows: 0.500",
    ):
        assert f">{said}</text>" in text, said
    assert "test: how often it is wrong if only its surest rows are answered" in text
    assert "the mean over all shares (AURC) is 0.208." in text
    assert ">after temperature 1.5</text>" not in text


def test_calibration_has_a_curve_of_its_own_only_where_it_changes_the_order() -> None:
    other, _ = selective([[0.25, 0.0], [0.5, 0.0], [0.75, 0.25], [1.0, 0.5]])
    assert ">after temperature 1.5</text>" in other
    assert "(AURC) is 0.208, 0.188 after temperature 1.5." in other
    same, _ = selective(POINTS)
    assert ">after temperature 1.5</text>" not in same
    assert "(AURC) is 0.208; calibration leaves the order of the rows as it is." in same


@pytest.mark.parametrize("points", [[[1.0, 0.0]], [[1.0, 1.0]], [[0.5, 1.0], [1.0, 0.5]]])
def test_a_curve_of_one_row_or_without_a_mistake_is_drawn(points: list[list[float]]) -> None:
    text = page.render(a_report(selective={"test": {"before": points, "after": []}}))
    assert f"all rows: {points[-1][1]:.3f}" in text


def test_the_same_report_gives_the_same_bytes_whatever_style_the_user_has_set() -> None:
    import matplotlib as mpl

    first = page.render(a_report())
    with mpl.rc_context({"svg.hashsalt": None, "lines.linewidth": 9, "svg.fonttype": "path", "font.size": 30}):
        assert page.render(a_report()) == first


def test_a_long_run_with_many_classes_stays_below_a_megabyte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps, classes = 50_000, 150
    curves = {
        "loss": [[step, float(value)] for step, value in enumerate(rng.random(steps), 1)],
        "learning_rate": [[step, 1e-5 * step] for step in range(1, steps + 1)],
        "validation": [[step, {"nll": 0.5, "accuracy": 0.5}] for step in range(500, steps, 500)],
        "stage_starts": [[0, "finetune"]],
    }
    mistakes = [{**a_report().mistakes[0], "text": "a long text " * 5000}] * 20
    counts = rng.integers(0, 9, (classes, classes)).tolist()
    report = a_report(
        curves=curves,
        mistakes=mistakes,
        labels=tuple(f"class {at}" for at in range(classes)),
        confusion={"test": counts},
    )
    path = page.save(report, tmp_path)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 1_000_000


def test_more_than_25_classes_show_the_ten_pairs_that_are_confused_most() -> None:
    counts = np.diag(np.full(26, 10))
    counts[3, 4], counts[7, 2] = 6, 9
    report = a_report(labels=tuple(f"c{at}" for at in range(26)), confusion={"test": counts.tolist()})
    (found,) = tables.confusions(report, ["test"])
    # of class 3, 6 of 10 + 6 rows are taken for class 4; of class 7, 9 of 10 + 9 for class 2
    assert found.pairs == (("c7", "c2", 9, 9 / 19), ("c3", "c4", 6, 6 / 16))
    assert found.rows == ()


def test_a_confusion_matrix_is_shaded_by_the_share_of_the_true_class() -> None:
    (found,) = tables.confusions(a_report(), ["test"])
    # class no: 6 + 1 rows, class yes: 1 + 2
    assert found.rows == (("no", ((6, 6 / 7), (1, 1 / 7))), ("yes", ((1, 1 / 3), (2, 2 / 3))))


def test_only_scores_that_calibration_changes_have_two_columns() -> None:
    found = tables.scores(a_report())
    changed = {title for title, twice in found.columns if twice}
    assert changed == {"NLL (nats)", "ECE"}
    split, rows, values = found.rows[1]
    assert (split, rows) == ("test", "10")
    # accuracy, macro F1, NLL twice, Brier, ECE twice
    assert values == ("80.0\u00a0%", "79.0\u00a0%", "0.500", "0.400", "0.300", "0.100", "0.020")


def test_the_cards_tell_the_score_its_interval_the_shift_and_the_calibration() -> None:
    # Wilson for 8 of 10 and z = 1.96: centre (0.8 + 0.1921) / 1.3841 = 0.7167, half width
    # 1.96 sqrt(0.016 + 0.0096) / 1.3841 = 0.2266, so 0.490 to 0.943
    assert [(card.value, card.below) for card in words.cards(a_report())] == [
        ("80.0\u00a0%", "95\u00a0% interval 49.0 to 94.3; 10 rows"),
        ("65.0\u00a0%", "15.0 points below test"),
        ("0.100 → 0.020", "before → after temperature 1.5"),
    ]


def test_the_sentences_say_it_plainly() -> None:
    # the larger class has 7 of 10 rows; the bins are 90 % sure and 80 % right
    assert words.sentences(a_report()) == [
        "The model was fine-tuned in 2 stages (probe, then finetune) on 40 rows.",
        "It names the right class for 8 of 10 test rows (80.0\u00a0%); "
        "always answering “no” would be right for 70.0\u00a0%.",
        "On the shifted test bbc its accuracy is 65.0\u00a0%, 15.0 points below test.",
        "On test it is over-confident: 90.0\u00a0% sure on average and 80.0\u00a0% right. "
        "With temperature 1.5 the calibration error falls from 0.100 to 0.020.",
    ]
    assert words.sentences(regression())[1:] == [
        "On the 3 test rows its predictions are 0.4 away from the true value on average "
        "and correlated with it at 0.900 (Pearson).",
        "On the shifted test forums its Pearson r is 0.700, 0.200 below test.",
    ]


def test_a_run_that_is_no_better_than_one_answer_for_all_is_told_in_words() -> None:
    bad = replace(a_report(), metrics={"test": {**TEST, "accuracy": 0.7}, "ood": {}}, calibrated={})
    end = "always answering “no” would be right for 70.0\u00a0%, so the run is no better than that."
    assert words.sentences(bad)[1].endswith(end)
    told = {error: words.sentences(regression(data={"constant": {"test": error}}))[2] for error in (0.5, 0.75)}
    assert told[0.75] == "Its RMSE is 0.500; always answering the mean of the training labels would give 0.750."
    assert told[0.5].endswith("would give 0.500, so the run is no better than that.")


def test_blocks_that_learn_alike_are_one_row_of_the_plan_and_decay_is_told_once() -> None:
    def row(depth: int, name: str, lr: float, decay: float = 0.0) -> dict[str, Any]:
        same = {"weights": 5, "trainable": lr > 0, "set_by": ["freeze" if lr == 0 else "llrd"]}
        return {"depth": depth, "name": name, "lr": lr, "weight_decay": decay, **same}

    stage = {
        "name": "finetune",
        "steps": 40,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "rows_by_depth": [
            row(0, "embeddings", 0),
            row(1, "block 0", 0),
            row(2, "block 1", 0),
            row(3, "block 2", 5e-5, 0.01),
            row(3, "block 2", 5e-5),
            row(4, "head", 1e-4),
        ],
    }
    (found,) = tables.plans({"stages": [stage]})
    assert found.about == "40 steps of 32 rows, peak rate 0.0001"
    assert [(one.name, one.weights, one.rate, one.share, one.decay) for one in found.rows] == [
        ("head", 5, "0.0001", 1.0, "0"),
        ("block 2", 10, "5e-5", 0.5, "0.01 or 0"),
        ("blocks 0–1", 10, "frozen", 0.0, ""),
        ("embeddings", 5, "frozen", 0.0, ""),
    ]


def test_a_solved_head_has_no_rate() -> None:
    same = {"weights": 5, "weight_decay": 0.0, "set_by": ["stage"]}
    rows = [
        {"depth": 0, "name": "block 0", "trainable": False, "lr": 0.0, **same},
        {"depth": 1, "name": "head", "trainable": True, "lr": 2e-5, **same},
    ]
    stage = {"name": "probe", "solver": "exact", "rows_by_depth": rows, "memory": {"weights": 9, "gradients": 0}}
    (found,) = tables.plans({"stages": [stage]})
    assert found.about == "the head is solved exactly, without steps"
    assert [(one.name, one.rate, one.share) for one in found.rows] == [("head", "solved", 0), ("block 0", "frozen", 0)]
    assert found.memory == {"weights": 9}


def test_a_plan_of_another_shape_is_left_out() -> None:
    assert tables.plans({"stages": [{"name": "x"}]}) == []
    assert tables.plans({}) == []


def test_a_mean_that_moves_over_a_constant_is_that_constant_and_short_series_are_themselves() -> None:
    assert smoothed(np.full(200, 0.5)).tolist() == pytest.approx([0.5] * 200, abs=1e-12)
    assert smoothed(np.array([1.0, 3.0])).tolist() == [1.0, 3.0]
    # up to 79 values: each is averaged with one neighbour on either side, at the ends with the one there is
    assert smoothed(np.arange(40.0))[[0, 1, 39]].tolist() == [0.5, 1.0, 38.5]


@given(st.integers(1, 3 * MOST_POINTS))
def test_thinning_keeps_the_mean_of_the_values_when_every_point_stands_for_as_many(n: int) -> None:
    steps, values = np.arange(1.0, n + 1), np.sin(np.arange(n))
    few, means = thinned(steps, values)
    assert len(few) == len(means) <= MOST_POINTS
    assert np.all(np.diff(few) > 0)
    assert means.min() >= values.min()
    assert means.max() <= values.max()
    if n % MOST_POINTS == 0:
        assert means.mean() == pytest.approx(values.mean(), abs=1e-12)
