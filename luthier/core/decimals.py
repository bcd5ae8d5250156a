"""Numbers as they are written, so that ranks do not depend on how a float is rounded."""

from __future__ import annotations

from fractions import Fraction


def decimal(number: float) -> Fraction:
    """0.1 as one tenth."""
    return Fraction(str(float(number)))


def whole(number: Fraction) -> int:
    """The largest whole number that is not above it."""
    return number.numerator // number.denominator
