"""What is said of a comparison: claims, what cannot be told, and why."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.errors import DataError
from luthier.statistics.paired import Difference, difference, interval
from luthier.statistics.verdict import PLAIN, Pair, Unit, sentence, verdicts

CLEAR = (0.019, 0.024, 0.021, 0.018, 0.026, 0.02, 0.023, 0.017)  # mean 0.021
MUDDY = (0.03, -0.02, 0.01, 0.04, -0.01, 0.02, -0.03, 0.02)  # mean 0.0075


def pair(
    by_seed: tuple[float, ...], *, one: str = "lp-ft", other: str = "ft", shared: float = 0.0, on: str = "ood"
) -> Pair:
    return Pair(one, other, on, Difference(by_seed, rows=500, shared=shared))


def said(by_seed: tuple[float, ...], *, shared: float = 0.0, **options) -> str:
    return sentence(verdicts([pair(by_seed, shared=shared)], **options)[0])


# By hand


def test_a_claim_names_the_winner_the_difference_and_the_interval():
    # sd .00312, error .00110, t(.975, 7) = 2.365: 2.1 +- 0.26 points; p = 2/256
    found = verdicts([pair(CLEAR)])[0]
    assert (found.claimed, found.p, found.p_adjusted) == (True, 2 / 256, 2 / 256)
    assert sentence(found) == "lp-ft beats ft on ood by 2.1 points [1.8, 2.4]"


def test_the_other_recipe_may_win():
    turned = tuple(-one for one in CLEAR)
    assert said(turned) == "ft beats lp-ft on ood by 2.1 points [1.8, 2.4]"


def test_noise_is_told_with_the_seeds_it_would_need():
    # sd .02493, error .00881, times 2.365: .75 +- 2.08 points; .75 / 2.493 = .30 sd needs about (2.8 / .30)^2 + 2 = 89 seeds
    assert said(MUDDY) == (
        "8 seeds cannot separate lp-ft from ft on ood (0.8 points [-1.3, 2.8], p = 0.49): they would need about 89, "
        "while 8 see differences only from about 3.0 points on"
    )


def test_three_seeds_can_never_claim_and_it_is_said():
    found = verdicts([pair((0.05, 0.051, 0.052))])[0]
    assert (found.p, found.floor, found.claimed, found.detectable) == (0.25, 0.25, False, math.inf)
    assert found.interval.low > 0
    assert sentence(found) == (
        "3 seeds cannot separate lp-ft from ft on ood (5.1 points [4.9, 5.3]): their smallest possible p is 0.25, "
        "so nothing can be claimed, and they would need about 6"
    )


def test_the_floor_counts_holm():
    # 6 seeds: 1/32 alone is below .05; over two comparisons 1/16 is not, unless the other one is certain already
    six, sure = pair(CLEAR[:6]), pair((*CLEAR, *CLEAR), one="swa")
    alone, both, beside = verdicts([six])[0], verdicts([six, six])[0], verdicts([six, sure])[0]
    assert (alone.floor, alone.claimed) == (1 / 32, True)
    assert (both.floor, both.p_adjusted, both.claimed) == (1 / 16, 1 / 16, False)
    assert (beside.floor, beside.claimed) == (1 / 32, True)
    assert "smallest possible p is 0.0625 after Holm over 2, so nothing can be claimed" in sentence(both)


def test_seeds_that_agree_on_rows_that_are_too_few_earn_no_claim():
    found = verdicts([pair(CLEAR, shared=0.02**2)])[0]
    assert found.p_adjusted < 0.05 and found.interval.low < 0 and not found.claimed and found.seeds_needed is None
    assert sentence(found) == (
        "8 seeds separate lp-ft from ft on ood, but other test rows than these 500 might not "
        "(2.1 points [-1.8, 6.0], p = 0.0078): no number of seeds would do on 500 test rows, more rows are needed"
    )


def test_recipes_that_do_the_same_are_said_to():
    assert said((0.0,) * 4) == "lp-ft and ft score the same on ood with each of 4 seeds"


def test_a_difference_of_nearly_nothing_needs_more_seeds_than_anyone_has():
    assert "they would need more than 10,000" in said((0.01, -0.01, 0.02, -0.02, 0.03, -0.03, 0.001, -0.0009))


def test_all_of_a_call_are_corrected_together():
    muddy, clear = map(sentence, verdicts([pair(MUDDY, other="mosbach"), pair(CLEAR)]))
    assert clear.startswith("lp-ft beats ft on ood by 2.1 points [1.8, 2.4]")
    assert (
        muddy.startswith("8 seeds cannot separate lp-ft from mosbach on ood (")
        and "p = 0.49 after Holm over 2" in muddy
    )


def test_other_units_and_no_place():
    found = Pair("a", "b", "", Difference(CLEAR, 500, 0.0))
    assert sentence(verdicts([found])[0], unit=PLAIN) == "a beats b by 0.021 [0.018, 0.024]"
    assert sentence(verdicts([found])[0], unit=Unit("%", 100, 2)) == "a beats b by 2.10 % [1.84, 2.36]"


def test_a_bound_that_is_not_zero_is_not_printed_as_zero():
    # 2.1 - 2.0977 points: one digit would say 0.0
    shared = (0.0209 / 1.965) ** 2
    found = verdicts([pair(tuple([0.021] * 8), shared=shared)])[0]
    assert found.claimed and 0 < found.interval.low < 0.0005
    low = sentence(found).split("[")[1].split(",")[0]
    assert float(low) > 0


# Identity


def test_the_numbers_are_those_of_the_interval():
    draw = np.random.default_rng(0)
    found = difference(draw.random((8, 40)) < 0.8, draw.random((8, 40)) < 0.7)
    assert verdicts([Pair("a", "b", "", found)], alpha=0.1)[0].interval == interval(found, level=0.9)


# It matters


def test_a_claim_needs_both_the_seeds_and_the_rows():
    for by_seed, shared, claimed in (
        (CLEAR, 0.0, True),
        (CLEAR, 0.02**2, False),
        (MUDDY, 0.0, False),
        (CLEAR[:5], 0.0, False),
    ):
        assert verdicts([pair(by_seed, shared=shared)])[0].claimed is claimed


def test_the_t_distribution_may_be_asked_for_and_claims_with_five_seeds():
    found = verdicts([pair(CLEAR[:5])], test="t")[0]
    assert found.claimed and found.p == found.interval.p and found.floor == 0.0 and found.seeds_needed == 3
    assert math.isfinite(found.detectable)


def test_five_seeds_by_the_t_distribution_read_as_in_the_readme():
    # .0216 +- 2.776 x .0015
    clear, muddy = map(sentence, verdicts([pair(CLEAR[:5]), pair(MUDDY[:5], other="mosbach")], test="t"))
    assert clear.startswith("lp-ft beats ft on ood by 2.2 points [1.7, 2.6]")
    assert muddy.startswith("5 seeds cannot separate lp-ft from mosbach on ood")


def test_no_claim_is_made_at_an_alpha_that_the_seeds_cannot_reach():
    assert verdicts([pair(CLEAR)], alpha=0.05)[0].claimed and not verdicts([pair(CLEAR)], alpha=0.005)[0].claimed


# Refused


def test_unknown_tests_and_levels_are_refused():
    with pytest.raises(DataError, match="'sign flips' or 't'"):
        verdicts([pair(CLEAR)], test="wilcoxon")
    with pytest.raises(DataError, match="alpha"):
        verdicts([pair(CLEAR)], alpha=5)
    assert verdicts([]) == ()
