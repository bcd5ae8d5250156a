"""Claims: what an ingredient says it will touch, and which claims cannot share a stage.

``scales`` commutes with anything; ``wraps`` nests in the written order; two overlapping ``owns`` conflict; ``needs`` conflicts with
``voids``; ``voids`` conflicts with ``needs`` and ``wraps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from luthier.errors import Fault

How = Literal["scales", "wraps", "owns", "needs", "voids"]


class Place(StrEnum):
    """What can be claimed. Each is a thing of PyTorch's, or of the data's, never of the engine's."""

    LR = "the learning rate"
    DECAY = "the weight decay"
    TRAINABLE = "what is trainable"
    START_WEIGHTS = "the start weights"
    MODULES = "the modules"
    FORWARD_WEIGHTS = "the weights as the forward pass sees them"
    LOSS = "the loss"
    GRADIENT = "the gradient"
    OPTIMIZER = "the optimizer"
    STEP = "the step"
    END_WEIGHTS = "the end weights"
    BATCHES = "the batches"
    PREDICTIONS = "the predictions"
    NOISE = "the noise of the forward pass"
    REFERENCE = "the reference weights"
    SAMPLE = "a sample of the data"
    WHOLE_WEIGHTS = "whole weights on every process"
    VALIDATION = "the validation rows"
    TRIALS = "trial runs before the stage"
    OUT_DOMAIN = "out-domain rows"
    EARLIER = "what earlier stages trained"
    GOES_ON = "what goes on after the stage"


@dataclass(frozen=True)
class Claim:
    """One thing an ingredient touches.

    Args:
        how: scales, wraps, owns, needs or voids.
        place: what is touched.
        where: a selector of parameters (a glob over names, or a word such as ``head`` or ``top:4``); ``all`` where it is not about weights.
    """

    how: How
    place: Place
    where: tuple[str, ...] = ("all",)

    def __str__(self) -> str:
        at = "" if self.where == ("all",) else f" at {', '.join(self.where)}"
        return f"{self.how} {self.place.value}{at}"


def scales(place: Place, *where: str) -> Claim:
    return Claim("scales", place, where or ("all",))


def wraps(place: Place, *where: str) -> Claim:
    return Claim("wraps", place, where or ("all",))


def owns(place: Place, *where: str) -> Claim:
    return Claim("owns", place, where or ("all",))


def needs(place: Place, *where: str) -> Claim:
    return Claim("needs", place, where or ("all",))


def voids(place: Place, *where: str) -> Claim:
    return Claim("voids", place, where or ("all",))


_CLASHES = {("owns", "owns"), ("needs", "voids"), ("voids", "needs"), ("voids", "wraps"), ("wraps", "voids")}
_VERB = {"owns": "sets", "needs": "needs", "voids": "does away with", "wraps": "edits", "scales": "scales"}
_CURE = {
    Place.VALIDATION: "Give validation rows, or drop it.",
    Place.OUT_DOMAIN: "Give --out-domain, or drop it.",
    Place.EARLIER: "Put it into the first stage, or drop it.",
    Place.GOES_ON: "Let the stage carry the head only (carry: [head]), and put a stage after it.",
}
_THEIRS = {"needs": "need", "voids": "do not have"}  # what is around the stage claims no more than this


def conflicts(
    claims: Sequence[tuple[str, Sequence[Claim]]],
    select: Callable[[tuple[str, ...]], frozenset[str]],
    stage: str,
) -> tuple[Fault, ...]:
    """Every pair of ingredients of one stage that cannot share it.

    Args:
        claims: (ingredient's name, its claims), in the written order; what is around the stage has a name that starts with ``the``.
        select: gives the weights that a claim's ``where`` stands for.
        stage: how the stage is named in the message.
    Returns:
        one fault a pair, with the reason and the cure.
    """
    faults = []
    for at, (first, mine) in enumerate(claims):
        for second, theirs in claims[at + 1 :]:
            clash = next(
                (
                    (a, b)
                    for a in mine
                    for b in theirs
                    if a.place == b.place and (a.how, b.how) in _CLASHES and select(a.where) & select(b.where)
                ),
                None,
            )
            if clash:
                a, b = clash
                around = second.startswith("the ")
                told = f"{first} cannot stand here" if around else f"{first} and {second} cannot share a stage"
                verb = _THEIRS[b.how] if around else _VERB[b.how] + (" too" if a.how == b.how else "")
                do = _CURE.get(a.place, "Drop it.") if around else "Put them in different stages, or drop one."
                must = f"{first} {_VERB[a.how]} {a.place.value}, which {second} {verb}"
                faults.append(Fault(f"{stage}: {told}", must, do=do))
    return tuple(faults)
