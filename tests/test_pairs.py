"""Every ingredient beside every other acts, trains and goes on exactly, or is refused with a reason; the page says which."""

from __future__ import annotations

import re

import pytest

from luthier.recipe import registry
from tests.pairs import IDLE, PAGE, acts, end, page, refusal

NAMES = sorted(registry.INGREDIENTS)
LOSSES = {name for name in NAMES if registry.family(name) == "losses"}


@pytest.mark.parametrize("one", NAMES)
def test_a_pair_acts_and_goes_on_to_the_same_bits_or_is_refused_with_a_reason(one):
    for other in NAMES[NAMES.index(one) + 1 :]:
        why = refusal(one, other)
        if why is not None:
            assert {one, other} & set(re.findall(r"\w+", why)), f"{one} with {other}: {why!r} names neither"
            continue
        for pair in [(one, other), *([(other, one)] if {one, other} <= LOSSES else [])]:
            whole = end(*pair)
            odd = whole.differs(end(*pair, stop=2))
            assert odd is None, f"{' with '.join(pair)}: {odd} differs after a resume"
            idle = [(a, b) for a, b in ((one, other), (other, one)) if not acts(a, b, whole)]
            assert idle == [both for both in IDLE if set(both) == {one, other}], f"{pair}: {idle}"


def test_whether_a_pair_is_refused_does_not_hang_on_its_order():
    for at, one in enumerate(NAMES):
        for other in NAMES[at + 1 :]:
            assert (refusal(one, other) is None) is (refusal(other, one) is None), (one, other)


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.pairs writes it"
    told = re.search(r"Of (\d+) pairs, (\d+) train together", page())
    readme = (PAGE.parents[2] / "README.md").read_text(encoding="utf-8")
    assert told and f"{told[2]} of {told[1]} pairs do" in readme
