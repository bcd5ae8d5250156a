"""Out-domain: some rows of another domain are mixed among the stage's own.

Source: gradual fine-tuning, Xu, Ebner, Yarmohammadi, White, Van Durme, Murray, AdaptNLP 2021 (arXiv:2103.02205): a stage for each of
several amounts that shrink to none.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.seeds import generator
from luthier.core.stream import Stream
from luthier.errors import Fault, RecipeError


def _told_once(amount: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(amount)
    except ValidationError:
        raise ValueError("must be a number of rows, such as 200, or a share up to 100%, written as 50%") from None


Rows = Annotated[int, Field(ge=0)]
Share = Annotated[str, Field(pattern=r"^([0-9]{1,2}(\.[0-9]+)?|100(\.0+)?)%$")]
Amount = Annotated[Rows | Share, WrapValidator(_told_once)]


def chosen(spare: tuple[int, ...], many: int, draw: torch.Generator) -> tuple[int, ...]:
    """The first ``many`` of ``spare`` in a random order, given back ascending; for the same draw, fewer are a part of more.

    Args:
        many: at most as many as there are.
    """
    places = torch.randperm(len(spare), generator=draw)[:many].tolist()
    return tuple(sorted(spare[place] for place in places))


@ingredient
class OutDomain(Ingredient):
    """Adds ``amount`` out-domain rows to the rows of each epoch, shuffled among them; all of the stage's own rows stay.

    The out-domain rows are given with the data (``--out-domain``). Without this ingredient a stage takes none of them. Validation and
    test are always in-domain.

    Args:
        amount: rows, or a share of those there are such as ``50%`` (rounded); 0 adds none.
        draw: ``nested`` takes fewer in a later stage from those of an earlier one; ``anew`` draws each stage's by itself.
    Raises:
        RecipeError: ``amount`` is more than there are.
    Differs: the authors' files of each amount are fixed; whether they are nested is not said.
    """

    amount: Amount = "100%"
    draw: Literal["nested", "anew"] = "nested"

    def touches(self) -> tuple[Claim, ...]:
        return () if self._none() else (wraps(Place.BATCHES), needs(Place.OUT_DOMAIN))

    def batches(self, stream: Stream, ctx: Context) -> Stream:
        if self._none() or not stream.spare:
            return stream
        there = len(stream.spare)
        many = math.floor(float(self.amount[:-1]) / 100 * there + 0.5) if isinstance(self.amount, str) else self.amount
        if many > there:
            must, do = f"must be at most the {there} there are", f"Write {there} or 100%, or give more rows."
            raise RecipeError.of([Fault("out_domain.amount", must, str(many), do)], "the plan")
        names = ("out_domain",) if self.draw == "nested" else ("out_domain", ctx.key)
        return stream.of((*stream.rows, *chosen(stream.spare, many, generator(ctx.seed, *names))))

    def _none(self) -> bool:
        return not (float(self.amount[:-1]) if isinstance(self.amount, str) else self.amount)
