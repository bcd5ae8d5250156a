"""Child-Tuning: each step moves only a part of the weights, drawn anew (F) or chosen once by the task's data (D).

Source: Xu, Luo, Zhang, Tan, Chang, Huang, Huang, EMNLP 2021 (arXiv:2109.05687), Child-Tuning-F and -D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.core.anatomy import canonical, select_all
from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context, Tensors
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.masks import largest, masked
from luthier.core.modes import paused
from luthier.core.seeds import borrowed
from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError, RunError


def drawn(like: Tensor, p: float, draw: torch.Generator) -> Tensor:
    """M of F: bool, the shape and device of ``like``, each entry true with chance ``p``. E[M g / p] = g."""
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(p, generator=draw)


def fisher(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Sequence[Mapping[str, Any]]], loss: LossFn
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: F = mean over ``batches`` of (d loss / d w)^2, in eval mode.

    Args:
        model: gets no ``.grad``; its modes, and which of its weights require gradients, are afterwards as they were.
        weights: those of its weights that are asked about, by name.
        batches: of one row each for the paper's F; of many for that of the authors' code, which squares the mean gradient. Each in the
            parts that go through the model at once.
        loss: (model, part) -> -log p(y | x), mean over the part's rows, nats, shape ().
    Returns:
        single precision, by name, each the shape of its weight; zero for a weight that the loss does not read.
    Raises:
        RecipeError: there is no batch.
    Source: Child-Tuning-D, F(w) = 1/|D| sum_j (d log p(y_j | x_j; w) / d w)^2.
    Differs: the authors' code looks in training mode, and clips each tensor's gradient to norm 1 first.
    """
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    learns = [(weight, weight.requires_grad) for weight in model.parameters()]
    count = 0
    try:
        model.requires_grad_(False)
        for asked in weights.values():
            asked.requires_grad_(True)
        with paused(model):
            for parts in batches:
                count += 1
                rows, mean = sum(len(part["labels"]) for part in parts), dict[str, Tensor]()
                for part in parts:
                    told = loss(model, part) * (len(part["labels"]) / rows)
                    gradients = torch.autograd.grad(told, list(weights.values()), allow_unused=True)
                    for name, gradient in zip(weights, gradients, strict=True):
                        if gradient is not None:
                            mean[name] = mean[name] + gradient if name in mean else gradient
                for name, gradient in mean.items():
                    total[name].add_(gradient.float().square())
    finally:
        for weight, learned in learns:
            weight.requires_grad_(learned)
    if not count:
        must, do = "needs training rows to look at", "Give begin(..., sample=batches)."
        raise RecipeError.of([Fault("child_tuning", must, do=do)], "child_tuning")
    return {name: value.div_(count) for name, value in total.items()}


def cut(batches: Iterable[Mapping[str, Any]], rows: int, *, single: bool) -> Iterator[dict[str, Any]]:
    """The first ``rows`` rows of ``batches``, batch by batch or one by one; tensors without a row for each label stay whole.

    Raises:
        RecipeError: a batch without labels.
    """
    for batch in batches:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            must = "needs batches that are mappings with the targets under 'labels'"
            raise RecipeError.of([Fault("begin(..., sample=)", must, got)], "child_tuning")
        size = len(batch["labels"])
        taken = min(size, rows)
        step = 1 if single else max(1, taken)
        for at in range(0, taken, step):
            yield {name: value[at : at + step] if _by_row(value, size) else value for name, value in batch.items()}
        rows -= taken
        if not rows:
            return


def _by_row(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


@ingredient
class ChildTuning(Ingredient):
    """Masks the gradient: F keeps a share p drawn anew for every step, and divides by p; D the share p of largest Fisher information.

    The mask of D is chosen once, over all weights at ``where`` that learn in the stage, and is saved with the run. Exactly
    round(p n) of their n entries are kept, at least 1.

    Args:
        mode: ``free`` is F, ``data`` is D.
        p: share of the weights that is kept; at 1 nothing changes.
        where: selectors of the weights; all others learn as usual.
        rows: rows of the training data that D looks at before the stage, drawn from them.
        fisher: ``row`` squares the gradient of each row, as the paper's equation; ``batch`` that of each ``batch_size`` rows, as its code.
        strict: what the mask leaves out stands still in this step, bit for bit; otherwise momentum and weight decay move it, as in the
            paper.
    Raises:
        RecipeError: D without training rows, or with batches without labels.
        RunError: D's gradients are not finite.
    Differs: F masks the blocks by default, the authors' code all weights with the head; D looks at ``rows`` rows in eval mode,
        theirs at all under dropout; strict is ours.
    """

    mode: Literal["free", "data"] = "data"
    p: Annotated[float, Field(gt=0, le=1)] = 0.3
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("blocks",)
    rows: Annotated[int, Field(ge=1)] = 512
    fisher: Literal["batch", "row"] = "row"
    strict: bool = False

    def touches(self) -> tuple[Claim, ...]:
        # wraps: refuses what does away with gradients; owns: one mask a weight
        edits = (wraps(Place.GRADIENT, *self.where), owns(Place.GRADIENT, *self.where), needs(Place.WHOLE_WEIGHTS))
        return (*edits, needs(Place.SAMPLE)) if self.mode == "data" else edits

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if self.mode == "free" or self.p == 1.0:
            return
        chosen = {canonical(name) for name in select_all(ctx.anatomy, self.where)}
        others = {canonical(part.name) for part in ctx.anatomy.parts} - chosen  # in neither is what LoRA put in since
        weights = {name: weight for name, weight in model.named_parameters() if canonical(name) not in others}
        weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
        single = self.fisher == "row"
        pieces = cut(ctx.sample, self.rows, single=single)
        first = list(islice(pieces, 1))
        if first and first[0]["labels"].device != next(model.parameters()).device:
            model.to(first[0]["labels"].device)  # where the stage's steps are made in any case
        pieces, parts = chain(first, pieces), 1 if single else getattr(ctx.sample, "parts", 1)
        with borrowed(ctx.seed_of("fisher")):
            found = fisher(model, weights, iter(lambda: list(islice(pieces, parts)), []), ctx.loss)
        odd = [Fault(name, "must have finite gradients") for name, value in found.items() if not value.isfinite().all()]
        if odd:
            raise RunError.of(odd, "child_tuning")
        ctx.keep("fisher", Tensors).update(found)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if self.p == 1.0:
            return inner
        chosen, p = select_all(ctx.anatomy, self.where), self.p
        if self.mode == "free":

            def anew(name: str, gradient: Tensor) -> Tensor:
                return drawn(gradient, p, ctx.rng(name, device=gradient.device))

            return masked(inner, chosen, anew, factor=1.0 / p, strict=self.strict)

        def once() -> Tensors:
            found = ctx.keep("fisher", Tensors)  # of all at ``where``; which of them learn is known only here
            pairs = [pair for group in inner.param_groups for pair in zip(group["names"], group["params"], strict=True)]
            learning = {name: found[name].to(weight.device) for name, weight in pairs if name in chosen}
            found.clear()
            return Tensors(largest(learning, max(1, round(p * sum(value.numel() for value in learning.values())))))

        masks = ctx.keep("masks", once)
        return masked(inner, masks.keys(), lambda name, gradient: masks[name], strict=self.strict)

    def state_bytes(self, table: ParamTable) -> int:
        """The masks, and with ``strict`` a copy of the weights; or before the stage F and the gradient, where that is more.

        With ``batch`` two of it, as a batch may come in parts.
        """
        chosen = table.select(self.where)
        rows = [row for row in table.rows if row.name in chosen and self.p < 1.0]
        slopes = 1 + (self.fisher == "batch")
        before = sum(4 * row.part.numel + slopes * row.part.bytes for row in rows) if self.mode == "data" else 0
        during = sum(row.part.numel + self.strict * row.part.bytes for row in rows if row.trainable)
        return max(before, during)
