"""The outcome in sentences: a sentence a pair where they are few, else one a winner and one for what cannot be told apart."""

from __future__ import annotations

from luthier.comparison import Versus
from luthier.trials.outcome import outcome


def pair(one: str, other: str, value: float, *, claimed: bool, split: str = "test", setting: str = "a") -> Versus:
    told = f"{one}/{other}"
    by_seed = (value,) * 5
    rest = {"p": 0.5, "p_adjusted": 0.5, "comparisons": 9, "test": "t", "detectable": None, "seeds_needed": None}
    return Versus(setting, split, one, other, value, value, value, by_seed, claimed=claimed, sentence=told, **rest)


def test_few_pairs_have_a_sentence_each_claims_first():
    told = outcome([pair("b", "a", 0.1, claimed=False), pair("c", "a", 0.2, claimed=True)], "accuracy", several=False)
    assert told == ("c/a", "b/a")


def test_many_pairs_are_told_by_winner_and_what_is_left_by_what_it_has_in_common():
    pairs = [pair(f"r{at}", "base", -0.01 * at, claimed=at > 2) for at in range(1, 10)]
    pairs.append(pair("r10", "base", 0.123, claimed=True))
    assert outcome(pairs, "accuracy", several=False) == (
        "base beats r3, r4, r5, r6, r7, r8 and r9 on test by 3.0 to 9.0 points",
        "r10 beats base on test by 12.3 points",
        "5 seeds cannot separate r1 and r2 from base on test",
    )


def test_each_setting_and_split_is_told_by_itself():
    names = [f"r{at}" for at in range(5)]
    pairs = [
        pair(name, "base", 0.5, claimed=setting == "a", split=split, setting=setting)
        for setting in ("a", "b")
        for split in ("test", "ood_x")
        for name in names
    ]
    told = outcome(pairs, "nll", several=True)
    assert told[0] == "a: r0 beats base on test by 0.500"
    assert told[-1] == "b: 5 seeds cannot separate r0, r1, r2, r3 and r4 from base on ood_x"
    assert len(told) == 12


def test_pairs_without_a_recipe_in_common_are_named():
    pairs = [pair(f"a{at}", f"b{at}", 0.0, claimed=False) for at in range(17)]
    (told,) = outcome(pairs, "accuracy", several=False)
    assert told.startswith("5 seeds cannot separate a0 from b0, a1 from b1, ") and told.endswith("and 2 more on test")
