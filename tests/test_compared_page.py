"""The page of a comparison: what it says of which numbers, that it is whole, safe, and the same every time."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.comparison import Comparison, Level, Setting, TrialRow, Versus
from luthier.errors import DataError
from luthier.page import compared, costs, dots, expected, forest, labels, trusted
from luthier.page import compared_tables as tables
from tests.test_page import EVIL, Outline

POINTS = {"name": "points", "factor": 100.0, "digits": 1}
PLAIN = {"name": "", "factor": 1.0, "digits": 3}
MAJORITY = 0.51


def a_setting(name: str = "sst2-minilm", splits: Sequence[str] = ("validation", "test", "ood_imdb")) -> Setting:
    majority = dict.fromkeys(splits, MAJORITY)
    sizes = {"train": 1000, **dict.fromkeys(splits, 872)}
    return Setting(name, "sst2", "minilm", sizes, tuple(splits), "test", majority, "validation")


def a_comparison(
    means: dict[str, float],
    *,
    seeds: int = 5,
    sd: float = 0.006,
    settings: Sequence[Setting] | None = None,
    metric: str = "accuracy",
    higher: bool = True,
    unit: dict[str, Any] | None = None,
    **changes: Any,
) -> Comparison:
    """Runs drawn around ``means``, and all that follows from them; intervals are two standard errors wide."""
    rng = np.random.default_rng(0)
    settings = (a_setting(),) if settings is None else settings
    trials, levels, versus, best_of, reliability = [], [], [], {}, {}
    for setting in settings:
        drawn: dict[tuple[str, str], list[float]] = {}
        for at, (recipe, mean) in enumerate(means.items()):
            for seed in range(seeds):
                scores = {}
                for number, split in enumerate(setting.splits):
                    value = float(mean - 0.05 * number + sd * rng.standard_normal())
                    drawn.setdefault((recipe, split), []).append(value)
                    scores[split] = {metric: value, "n": 872}
                took: dict[str, Any] = {
                    "seconds": 40.0 * 1.5**at + seed,
                    "peak_bytes": 900_000_000 + 80_000_000 * at,
                    "trainable": 22_700_000,
                }
                trials.append(
                    TrialRow(
                        f"{setting.name}-{recipe}-{seed}", setting.name, recipe, {"seed": seed}, "done", scores, **took
                    )
                )
        for (recipe, split), values in drawn.items():
            ends = (min(values), max(values)) if higher else (max(values), min(values))
            spread = stdev(values) if seeds > 1 else None
            levels.append(Level(setting.name, recipe, split, seeds, fmean(values), spread, *ends))
        pairs = list(itertools.combinations(means, 2))
        for split, (one, other) in itertools.product(setting.splits if seeds > 1 else (), pairs):
            sign = 1 if higher else -1
            gaps = [sign * (a - b) for a, b in zip(drawn[one, split], drawn[other, split], strict=True)]
            value, half = fmean(gaps), 2 * (stdev(gaps) / seeds**0.5 + 0.003)
            claimed = abs(value) > half
            told = (
                f"{one if value > 0 else other} beats {other if value > 0 else one} on {split}"
                if claimed
                else f"{one} and {other} are not told apart on {split}"
            )
            versus.append(
                Versus(
                    setting.name, split, one, other, value, value - half, value + half, tuple(gaps), 0.01 if claimed else 0.2,
                    0.031 if claimed else 0.8, len(pairs) * len(setting.splits), "t", claimed, 1.4 * half, None if abs(value) < 0.002 else 12, told,
                )
            )  # fmt: skip
        best_of[setting.name] = {
            recipe: [
                {
                    "n": n,
                    "expected": means[recipe] + (sd if higher else -sd) * (1 - 1 / n),
                    "standard_deviation": sd / n**0.5,
                }
                for n in range(1, seeds + 1)
            ]
            for recipe in means
        }
        reliability[setting.name] = {recipe: {"before": bins(0.06), "after": bins(0.01)} for recipe in means}
    outcome = tuple(one.sentence for one in sorted(versus, key=lambda one: not one.claimed) if one.split == "test")
    base = Comparison(
        metric, higher, unit or POINTS, tuple(means), tuple(settings), tuple(trials), tuple(levels), tuple(versus),
        outcome or ("Nothing was compared: one seed.",), ("Scores on validation are optimistic.",), best_of, reliability,
        asked={"recipes": list(means), "seeds": seeds, "alpha": 0.05},
    )  # fmt: skip
    return replace(base, **changes)


def bins(gap: float) -> list[dict[str, float]]:
    """Five bins of which each is right ``gap`` less often than it says."""
    middles = (0.55, 0.65, 0.75, 0.85, 0.95)
    return [
        {"low": middle - 0.05, "high": middle + 0.05, "count": 100 * at, "confidence": middle, "accuracy": middle - gap}
        for at, middle in enumerate(middles)
    ]


THREE = {"lp-ft": 0.912, "ft": 0.893, "probe": 0.871}


def said(comparison: Comparison) -> str:
    return Outline(compared.render(comparison)).said


def figures(text: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S)]


def drawn_text(svg: str) -> list[str]:
    return [(one.text or "").strip() for one in ET.fromstring(svg).iter() if one.tag.endswith("text")]


NONE: dict[str, Any] = {"best_of": {}, "reliability": {}, "asked": {}, "notes": ()}
REGRESSION: dict[str, Any] = {"metric": "rmse", "higher": False, "unit": PLAIN, "sd": 0.02}
LONG = "a recipe whose name goes on and on and differs at its end, number "


def cases() -> dict[str, Comparison]:
    fair = replace(a_setting(), majority={}, chosen_on="")
    return {
        "three recipes": a_comparison(THREE),
        "one recipe": a_comparison({"ft": 0.9}),
        "one seed": a_comparison(THREE, seeds=1),
        "one of each": a_comparison({"ft": 0.9}, seeds=1, **NONE),
        "two settings": a_comparison(THREE, settings=(a_setting("a"), a_setting("b", ("test",)))),
        "regression": a_comparison({"lp-ft": 0.52, "ft": 0.56}, settings=(fair,), **REGRESSION, **NONE),
        "nothing run yet": a_comparison(THREE, levels=(), versus=(), trials=(), **NONE),
        "names of other scripts": a_comparison({"微调": 0.9, "сонда": 0.88, "ft–β": 0.86}),
        "long names": a_comparison({f"{LONG}{at}": 0.9 - 0.02 * at for at in range(3)}),
    }


CASES = cases()


@cache
def page_of(case: str) -> str:
    return compared.render(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_every_tag_is_closed_ids_are_unique_references_lead_somewhere_and_pictures_are_xml(case: str) -> None:
    text = page_of(case)
    seen = Outline(text)
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    used |= {(told["aria-labelledby"], "") for _, told in seen.attributes if "aria-labelledby" in told}
    assert {first or second for first, second in used} <= set(seen.ids)
    assert all(len(one.attrib["aria-label"]) > 10 for one in figures(text))


@pytest.mark.parametrize("case", CASES)
def test_no_address_is_fetched_and_scripts_are_forbidden_by_the_page_itself(case: str) -> None:
    text = page_of(case)
    seen = Outline(text)
    assert "http:" not in text and "https:" not in text
    assert not {"script", "link", "img", "iframe", "image"} & set(seen.tags)
    assert not any("src" in told for _, told in seen.attributes)
    policy = next(told["content"] for tag, told in seen.attributes if told.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_outcome_comes_first_then_the_settings_then_the_numbers_then_what_was_asked() -> None:
    told = said(replace(a_comparison(THREE), outcome=("lp-ft beats ft by 1.9 points", "ft and probe: no claim")))
    places = [
        told.index(one) for one in ("lp-ft beats ft by 1.9", "ft and probe: no claim", "runs done", "Who is better")
    ]
    places += [
        told.index(one) for one in ("Every run", "What it costs", "In numbers", "Worth knowing", "What was asked")
    ]
    assert places == sorted(places)


def test_more_than_six_sentences_are_folded() -> None:
    text = compared.render(replace(a_comparison(THREE), outcome=tuple(f"sentence {at}" for at in range(9))))
    loud = text[text.index('class="outcome"') : text.index("3 more sentences")]
    assert [f"sentence {at}" in loud for at in range(9)] == [True] * 6 + [False] * 3
    assert "sentence 8" in text


def test_the_cards_count_recipes_seeds_settings_and_runs_by_state() -> None:
    base = a_comparison(THREE)
    trials = list(base.trials)
    trials[0], trials[1] = replace(trials[0], state="failed"), replace(trials[1], state="open")
    found = tables.cards(replace(base, trials=tuple(trials)), compared.scale_of(base))
    assert [(one.title, one.value, one.below) for one in found] == [
        ("recipes", "3", ""),
        ("seeds", "5", "0 to 4"),
        ("settings", "1", "1 data set × 1 model"),
        ("runs done", "13 of 15", "1 failed, 1 open"),
        ("metric", "accuracy", "more is better, differences in points"),
    ]
    streams = [replace(one, seeds={"head": at % 2, "order": at % 3}) for at, one in enumerate(trials[:6])]
    (card,) = [
        one
        for one in tables.cards(replace(base, trials=tuple(streams)), compared.scale_of(base))
        if one.title == "seeds"
    ]
    assert (card.value, card.below) == ("6", "2 head × 3 order")


def a_versus(
    one: str, other: str, value: float, *, claimed: bool = False, p_adjusted: float = 0.5, half: float = 0.01
) -> Versus:
    ends = (value - half, value + half)
    return Versus("s", "test", one, other, value, *ends, (value,), 0.02, p_adjusted, 3, "t", claimed, 0.02, 9, "")


def test_a_forest_has_a_row_each_with_value_interval_and_corrected_p_and_claims_are_squares() -> None:
    points = compared.scale_of(a_comparison(THREE))
    rows = [a_versus("lp-ft", "ft", 0.021, claimed=True, p_adjusted=0.0312), a_versus("ft", "probe", -0.004)]
    svg = forest.forest(rows, points, title="test", within=(-0.02, 0.04), label="differences", name="f")
    told = drawn_text(svg)
    # 2.1 and its interval of one point either way
    assert {"lp-ft − ft", "+2.1 [1.1, 3.1]", "0.031", "ft − probe", "−0.4 [−1.4, 0.6]", "0.50"} <= set(told)
    assert "points of accuracy; right of 0 the first is better" in told
    assert {"#163a5f", "#ffffff"} <= set(re.findall(r"<use[^>]*fill: (#\w+)", svg))


def test_where_less_is_better_a_difference_is_a_gain_and_says_so() -> None:
    rmse = labels.Scale("rmse", False, "", 1.0, 3)
    told = drawn_text(
        forest.forest([a_versus("a", "b", 0.04)], rmse, title="test", within=(0, 0.1), label="x", name="f")
    )
    assert {"a over b", "+0.040 [0.030, 0.050]", "how much lower the first's RMSE is; right of 0 it is better"} <= set(
        told
    )


def test_of_105_differences_20_are_drawn_claims_first_and_the_page_says_where_the_others_are() -> None:
    means = {f"recipe {at}": 0.90 - 0.004 * at for at in range(15)}
    many = a_comparison(means, settings=(a_setting(splits=("test",)),), seeds=3, **NONE)
    text = compared.render(many)
    assert text.count("recipe 0 −") >= 14
    claims = sum(one.claimed for one in many.versus)
    assert 20 < claims < 105
    assert f"On test: {claims} of 105 can be claimed. Drawn are the 20 that say most; 85 more are in the table." in text
    assert "All 105 differences" in text
    rows = [a_versus(f"r{at}", "x", at / 100, claimed=at == 3, p_adjusted=0.9 - at / 100) for at in range(30)]
    kept = {one.one for one in forest.chosen(rows)}
    # the claim, and of the others the 19 with the smallest p: 29, 28, ..., 11
    assert kept == {"r3", *(f"r{at}" for at in range(11, 30))}


def test_rows_stand_in_the_same_order_on_every_split() -> None:
    rows = [a_versus("a", "b", 0.01), a_versus("a", "c", 0.03), a_versus("b", "c", 0.02)]
    order = forest.ordered(rows)
    assert order == [("a", "c"), ("b", "c"), ("a", "b")]
    other = [replace(one, value=-one.value) for one in rows]
    assert [(one.one, one.other) for one in forest.chosen(other, order)] == order


def test_plots_side_by_side_share_an_axis_unless_one_is_three_times_as_wide() -> None:
    assert forest.limits([(-1.0, 1.0), (0.0, 3.0)]) == [(-1.0, 3.0), (-1.0, 3.0)]
    assert forest.limits([(0.0, 1.0), (0.0, 4.0)]) == [(0.0, 1.0), (0.0, 4.0)]


def with_failures() -> Comparison:
    """ft's seed 1 stays at chance, probe's seed 2 ends with an error, its seed 4 is open."""
    base = a_comparison(THREE)
    trials = []
    for one in base.trials:
        if (one.recipe, one.seeds["seed"]) == ("ft", 1):
            one = replace(one, scores={split: {"accuracy": 0.5} for split in one.scores})
        if (one.recipe, one.seeds["seed"]) == ("probe", 2):
            one = replace(
                one, state="failed", scores={}, why="Traceback:\n  in fit\nthe loss is not finite <at step 3>\n"
            )
        if (one.recipe, one.seeds["seed"]) == ("probe", 4):
            one = replace(one, state="open", scores={}, seconds=0.0, peak_bytes=0, trainable=0)
        trials.append(one)
    name = next(one.name for one in trials if one.recipe == "ft" and one.seeds["seed"] == 1)
    levels = [
        replace(one, failed=(name,), why="no better than a guess") if one.recipe == "ft" else one for one in base.levels
    ]
    return replace(base, trials=tuple(trials), levels=tuple(levels))


def test_failed_runs_are_crosses_runs_without_a_score_stand_at_the_edge_and_open_ones_nowhere() -> None:
    rows = {one.recipe: one for one in dots.rows(with_failures(), "sst2-minilm", "test")}
    assert [len(rows[name].scores) for name in THREE] == [5, 4, 3]
    assert rows["ft"].failed == (0.5,)
    assert [rows[name].gone for name in THREE] == [0, 0, 1]
    told = said(with_failures())
    assert "Crosses: 2 failed. Those at the left edge ended without a score." in told
    named = next(one for one in with_failures().levels if one.failed).failed[0]
    assert f"ft failed in 1 of 5 runs on test ({named}): no better than a guess" in told
    assert "↳ the loss is not finite <at step 3>" in told
    assert "○ open" in told and "✕ failed" in told
    assert "13 of 15" in told


def test_the_majority_class_is_a_line_near_the_runs_and_a_sentence_far_from_them() -> None:
    label = {"label": "x", "title": "test", "name": "d"}
    points = labels.Scale("accuracy", True, "points", 100.0, 1)
    # the runs span 0.02, so a line may lie 0.03 below them
    row = [dots.Row("ft", (0.70, 0.72))]
    assert dots.near(row, 0.671) and not dots.near(row, 0.669)
    assert "majority class" in drawn_text(dots.dots(row, points, majority=0.68, **label))
    assert "majority class" not in drawn_text(dots.dots(row, points, majority=0.51, **label))
    assert (
        "Always giving the most frequent class would score 51.0, off this axis."
        in Outline(page_of("three recipes")).said
    )


def test_the_share_of_the_majority_class_is_no_score_of_another_metric() -> None:
    told = Outline(compared.render(a_comparison({"ft": 0.6}, metric="f1_macro", **NONE))).said
    assert "macro F1, %" in told
    assert "most frequent class" not in told


def test_one_seed_has_no_deviation_and_no_differences() -> None:
    one = a_comparison(THREE, seeds=1)
    text = compared.render(one)
    assert "Who is better" not in text and "differences</" not in text
    level = next(level for level in one.levels if (level.recipe, level.split) == ("ft", "test"))
    row = f'<th scope="row">ft</th><td>{100 * level.mean:.1f}</td><td>–</td>'
    assert row in text


def test_the_table_of_scores_marks_the_best_mean_which_is_the_lowest_where_less_is_better() -> None:
    for comparison, best in ((a_comparison(THREE), "lp-ft"), (CASES["regression"], "lp-ft")):
        found = tables.levels(comparison, comparison.settings[0], compared.scale_of(comparison))
        assert {row.cells[0] for row in found if row.best} == {best}
    (level,) = [one for one in CASES["regression"].levels if (one.recipe, one.split) == ("ft", "test")]
    told = Outline(page_of("regression")).said
    assert f"{level.mean:.3f}" in told and f"{level.worst:.3f}" in told
    assert "RMSE by recipe" in told and "less is better" in told


def test_the_table_of_differences_tells_what_could_be_seen_and_how_many_seeds_it_takes() -> None:
    base = a_comparison(THREE)
    one = replace(
        a_versus("lp-ft", "ft", 0.021, claimed=True, p_adjusted=0.031),
        setting="sst2-minilm",
        seeds_needed=1200,
        detectable=None,
    )
    two = replace(one, claimed=False, seeds_needed=None, detectable=0.034, split="ood_imdb")
    ((first, cells), (second, others)) = tables.versus(
        replace(base, versus=(two, one)), base.settings[0], compared.scale_of(base)
    )
    assert (first, cells) == (True, ("test", "lp-ft − ft", "+2.1", "1.1 to 3.1", "0.020", "0.031", "none", "1,200"))
    assert (second, others[0], others[-2:]) == (False, "shifted: imdb", ("3.4", "no number would do"))


def test_what_is_empty_has_no_section_and_what_is_there_has_one() -> None:
    titles = (
        "Trying more runs",
        "Where the spread comes from",
        "How settings were chosen",
        "Bad runs stopped early",
        "What was asked",
    )
    assert not [one for one in titles if one in said(a_comparison(THREE, **NONE))]
    parts = {"head": 3.0, "order": 1.0, "residual": 4.0}
    grid = {"heads": 5, "orders": 4, "squares": parts, "p": [0.004, None]}
    full = a_comparison(
        THREE,
        variance={"sst2-minilm": {"ft": grid}},
        chosen={"lp-ft": {"tried": 20, "space": {"lr": "1e-6 to 1e-3"}, "values": {"lr": 3.2e-5}, "validation": 0.912}},
        early={
            "ft": {
                "started": 60,
                "share": 0.25,
                "kept": 15,
                "steps_taken": 12000,
                "steps_full": 34000,
                "saved": 0.647,
                "runs_equivalent": 21.2,
            }
        },
    )
    told = said(full)
    assert [one for one in titles if one not in told] == []
    # 3, 1 and 4 of 8
    assert "5 × 4" in told and "38\u00a0%" in told and "12\u00a0%" in told and "50\u00a0%" in told and "0.004" in told
    assert "chosen from 20 trials: lr=3.2e-5, validation 91.2" in told
    assert "A score on the selecting split is optimistic." in told
    assert all(cell in told for cell in ("12,000", "34,000", "65\u00a0%", "21.2"))


def test_splits_beyond_four_are_named_and_only_in_the_tables() -> None:
    splits = ("test", *(f"ood_{name}" for name in "abcde"))
    told = said(a_comparison(THREE, settings=(a_setting(splits=splits),), seeds=2))
    assert "Not drawn: shifted: d, shifted: e; see the tables." in told
    assert "shifted: e" in told[told.index("In numbers") :]


def test_a_text_with_a_script_is_shown_and_not_run() -> None:
    setting = replace(a_setting(), name=EVIL, data=EVIL, model=EVIL)
    evil = a_comparison({EVIL: 0.9, "ft": 0.88}, settings=(setting,), outcome=(EVIL,), notes=(EVIL,))
    trials = tuple(replace(one, why=EVIL, state="failed") for one in evil.trials)
    more = {"values": {EVIL: EVIL}, "space": EVIL, "tried": 2}
    evil = replace(
        evil,
        trials=trials,
        chosen={EVIL: more},
        early={EVIL: {"started": EVIL}},
        asked={EVIL: EVIL},
        variance={EVIL: {EVIL: {}}},
    )
    text = compared.render(evil)
    seen = Outline(text)
    assert "<script" not in text and "<!--" not in text
    assert "script" not in seen.tags
    assert seen.open == []
    assert "alert('x')" in seen.said


def test_the_same_comparison_gives_the_same_text_whatever_style_the_user_has_set() -> None:
    import matplotlib as mpl

    first = compared.render(with_failures())
    with mpl.rc_context({"svg.hashsalt": None, "lines.linewidth": 9, "svg.fonttype": "path", "font.size": 30}):
        assert compared.render(with_failures()) == first


def test_the_page_is_written_whole_and_reading_the_comparison_back_gives_the_same_page(tmp_path: Path) -> None:
    comparison = a_comparison(THREE)
    assert compared.save(comparison, tmp_path) == tmp_path / "compare.html"
    assert [file.name for file in tmp_path.iterdir()] == ["compare.html"]
    comparison.save(tmp_path)
    assert compared.render(Comparison.load(tmp_path)) == (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_the_picture_stands_alone_as_an_svg_with_every_recipe() -> None:
    svg = compared.picture(with_failures(), "sst2-minilm")
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert {"lp-ft", "ft", "probe", "failed"} <= set(drawn_text(svg))
    assert "shifted: imdb" in drawn_text(compared.picture(with_failures(), "sst2-minilm", split="ood_imdb"))
    with pytest.raises(DataError, match="must be one of sst2-minilm"):
        compared.picture(with_failures(), "elsewhere")
    with pytest.raises(DataError, match="must be one that was scored"):
        compared.picture(with_failures(), "sst2-minilm", split="train")


def test_cost_is_the_mean_of_done_runs_and_weights_stand_in_where_memory_is_alike() -> None:
    base = a_comparison({"ft": 0.9, "probe": 0.8}, seeds=2)
    seconds, memory = costs.costs(base, base.settings[0])
    # 40 and 41 s; 60 and 61 s
    assert [point.cost for point in seconds.points] == [40.5, 60.5]
    assert memory.name == "peak memory"
    alike = [
        replace(one, peak_bytes=10**9, trainable=10**6 if one.recipe == "ft" else 1000, state="done")
        for one in base.trials
    ]
    weights = costs.costs(replace(base, trials=tuple(alike)), base.settings[0])[1]
    assert weights.name == "weights that learn"
    assert [point.cost for point in weights.points] == [10**6, 1000]
    assert costs.costs(CASES["one recipe"], a_setting()) == []


Places = st.lists(st.tuples(st.floats(0, 374), st.floats(0, 238)), min_size=1, max_size=6)


@given(Places)
def test_up_to_six_labels_beside_points_cover_neither_points_nor_each_other(points: list[tuple[float, float]]) -> None:
    boxes = labels.beside(points, [(70.0, 11.0)] * len(points), (0.0, 0.0, 374.0, 238.0), clear=5.0)
    for one, other in itertools.combinations(boxes, 2):
        assert (
            min(one[2], other[2]) - max(one[0], other[0]) <= 1e-6
            or min(one[3], other[3]) - max(one[1], other[1]) <= 1e-6
        )
    for x, y in points:
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for box in boxes)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_spread_places_keep_their_distance_their_order_and_the_ends(places: list[float]) -> None:
    found = labels.spread(places, 10.0, 0.0, 100.0)
    ranked = [found[at] for at in sorted(range(len(places)), key=lambda at: places[at])]
    assert all(b - a >= 10.0 - 1e-6 for a, b in itertools.pairwise(ranked))
    assert min(found) >= -1e-6 and max(found) <= 100.0 + 1e-6


@given(st.lists(st.floats(0, 1), max_size=12))
def test_no_dot_covers_another(values: list[float]) -> None:
    found = dots.swarm(values, 0.1)
    for one, other in itertools.combinations(range(len(values)), 2):
        assert abs(values[one] - values[other]) >= 0.1 or found[one] != found[other]


@given(st.text(max_size=60), st.integers(4, 30))
def test_a_cut_name_fits(name: str, most: int) -> None:
    assert labels.columns(labels.cut(name, most)) <= most


def test_names_that_cutting_makes_alike_stay_apart() -> None:
    names = [f"{'a' * 20}{at}{'b' * 20}" for at in range(12)]
    found = labels.short(names, 12)
    assert len(set(found.values())) == 12
    assert max(map(labels.columns, found.values())) <= 12


def test_curves_of_one_run_are_left_out_and_the_band_is_named() -> None:
    point = {"n": 1, "expected": 0.9, "standard_deviation": 0.1}
    curves = {"one": [point], "two": [point, {**point, "n": 2}]}
    assert expected.usable(curves) == {"two": [(1, 0.9, 0.1), (2, 0.9, 0.1)]}
    told = said(a_comparison(THREE, best_of={"sst2-minilm": curves}))
    assert (
        "The band is one standard deviation either way, from one set of n runs to the next; no error of the mean."
        in told
    )


def test_calibration_is_shown_before_and_after_for_every_recipe() -> None:
    # every bin is 0.06 too sure, so the ECE is 0.06; empty bins count for nothing
    assert trusted.ece(bins(0.06)) == pytest.approx(0.06)
    recipes = {name: {"before": bins(0.06), "after": bins(0.01)} for name in (*THREE, "raw")}
    recipes["raw"] = {"before": bins(0.02), "after": []}
    told = drawn_text(trusted.trusted(recipes, label="reliability", name="t"))
    assert told.count("ECE 0.060 → 0.010") == 3
    assert "ECE 0.020" in told
    assert {"lp-ft", "ft", "probe", "raw", "as trained", "calibrated"} <= set(told)
