"""Which claims can share a stage."""

from __future__ import annotations

import pytest

from luthier.core.claims import Place, conflicts, needs, owns, scales, voids, wraps

NAMES = {"all": {"a", "b", "c"}, "head": {"c"}, "top": {"b", "c"}, "low": {"a"}}


def select(where):
    return frozenset().union(*(NAMES[name] for name in where))


def clash(one, other) -> int:
    return len(conflicts([("first", [one]), ("second", [other])], select, "stages[1] 'x'"))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (owns(Place.OPTIMIZER), owns(Place.OPTIMIZER), 1),
        (owns(Place.TRAINABLE, "head"), owns(Place.TRAINABLE, "low"), 0),
        (owns(Place.TRAINABLE, "head"), owns(Place.TRAINABLE, "top"), 1),
        (owns(Place.OPTIMIZER), owns(Place.STEP), 0),
        (scales(Place.LR), owns(Place.LR), 0),
        (scales(Place.LR), scales(Place.LR), 0),
        (wraps(Place.LOSS), wraps(Place.LOSS), 0),
        (wraps(Place.GRADIENT), voids(Place.GRADIENT), 1),
        (voids(Place.GRADIENT), wraps(Place.GRADIENT), 1),
        (needs(Place.NOISE), voids(Place.NOISE), 1),
        (voids(Place.NOISE), voids(Place.NOISE), 0),
        (needs(Place.NOISE), needs(Place.NOISE), 0),
    ],
)
def test_pairs(one, other, expected):
    assert clash(one, other) == expected
    assert clash(other, one) == expected


def test_the_message_names_stage_both_ingredients_the_reason_and_the_cure():
    (fault,) = conflicts(
        [("mezo", [voids(Place.GRADIENT)]), ("clip", [wraps(Place.GRADIENT)])], select, "stages[1] 'x'"
    )
    assert str(fault) == (
        "stages[1] 'x': mezo and clip cannot share a stage  mezo does away with the gradient, which clip edits.  "
        "Put them in different stages, or drop one."
    )


def test_every_pair_is_told_once():
    three = [(name, [owns(Place.OPTIMIZER), owns(Place.STEP)]) for name in ("a", "b", "c")]
    assert len(conflicts(three, select, "s")) == 3
