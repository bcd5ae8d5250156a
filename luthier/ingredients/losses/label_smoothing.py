"""Label smoothing: a share of each target is spread evenly over all classes.

Source: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, CVPR 2016, section 7 (arXiv:1512.00567).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context
from luthier.core.heard import answered, logits
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.errors import Fault, ModelError

_IGNORED = -100  # torch's label of what does not count


def uniform(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """The cross-entropy against the uniform distribution, H(u, p) = -1/k sum_j log p_j, averaged over rows.

    Args:
        logits: shape (..., k), float; unnormalised.
        labels: shape (...,), class numbers; rows labelled -100 do not count, as in torch. None where all count.
    Returns:
        shape (), nats, at least single precision.
    Source: section 7, with u(k) = 1/K.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = -wide.log_softmax(-1).mean(-1)
    if labels is None or labels.shape != each.shape:
        return each.mean()
    return each[labels.to(each.device) != _IGNORED].mean()


def moved(labels: Tensor) -> Tensor:
    """The labels that logits are compared with where each token's predict the next one: shape (rows, length); the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def apart(logits: Tensor, labels: Tensor, loss: Tensor) -> tuple[float, float]:
    """How far ``loss`` is from the cross-entropy against the labels as they are, and against the moved ones, in nats.

    Args:
        logits: shape (rows, length, k), float.
        labels: shape (rows, length), class numbers or -100.
        loss: shape ().
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    found = [F.cross_entropy(wide, one.to(wide.device).flatten()) for one in (labels, moved(labels))]
    here, ahead = ((one - loss.detach()).abs().nan_to_num(torch.inf).item() for one in found)
    return here, ahead


@ingredient
class LabelSmoothing(Ingredient):
    """The loss becomes (1 - eps) H(q, p) + eps H(u, p), H(u, p) being the cross-entropy against all classes alike.

    Over plain cross-entropy this is ``torch.nn.functional.cross_entropy(..., label_smoothing=eps)``.

    Args:
        eps: the share of the target that is spread; 0 changes nothing.
    Raises:
        ModelError: there are no classes, or the loss is not the cross-entropy against one of them.
    Differs: nothing over cross-entropy. Over a loss with more in it (a penalty that was written before) all of that
        loss is weighted by 1 - eps. Where a loss makes several forward passes, the logits of the last count. Where there is
        a label for each token, the first loss is compared with the cross-entropy to see which token each is for.
    """

    eps: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.LOSS),)

    def settings(self, table: ParamTable) -> ParamTable:
        """The table as it is.

        Raises:
            ModelError: the head has one output, so that there are no classes.
        """
        weight = f"{table.anatomy.output}.weight"
        shape = next((row.part.shape for row in table.rows if row.part.canonical == weight), ())
        if self.eps and shape[:1] == (1,):
            raise ModelError.of([_classless(table.anatomy.output or "", "one")], "label_smoothing")
        return table

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        if not self.eps:
            return inner

        moves: list[bool] = []  # whether logits are compared with the next token's label, once that is known

        def smoothed(model: nn.Module, batch: Any) -> Tensor:
            with answered(model) as outs:
                value = inner(model, batch)
            scores = _told(outs)
            labels = batch.get("labels") if hasattr(batch, "get") else None
            if isinstance(labels, Tensor) and scores.dim() == 3 and labels.shape == scores.shape[:-1]:
                if not moves:
                    moves.extend(_moves(scores, labels, getattr(outs[-1], "loss", None), value))
                labels = moved(labels) if moves and moves[0] else labels
            return (1.0 - self.eps) * value + self.eps * uniform(scores, labels)

        return smoothed


def _told(outs: Sequence[Any]) -> Tensor:
    """The logits of the last forward pass.

    Raises:
        ModelError: they are no scores of classes.
    """
    found = logits(outs[-1]) if outs else None
    if found is None or found.dim() < 2 or found.shape[-1] < 2:
        got = "a loss without a forward pass" if found is None else f"logits of shape {tuple(found.shape)}"
        raise ModelError.of([_classless("the model", got)], "label_smoothing")
    return found


def _moves(scores: Tensor, labels: Tensor, own: Tensor | None, value: Tensor) -> list[bool]:
    """Whether the model's own loss, or else the loss, is that of the next token's labels; empty where this batch does not tell.

    Raises:
        ModelError: it is neither that nor that of the labels as they are.
    """
    loss = value if own is None else own
    here, ahead = apart(scores, labels, loss)
    if min(here, ahead) > 1e-4 + 0.01 * abs(loss.item()):  # half precision is worse than single, and better than that
        must = "must be the mean cross-entropy over tokens, which shows whether each is compared with its label or the next"
        do = "Write label_smoothing before what adds to the loss, or drop it."
        raise ModelError.of([Fault("the loss", must, f"{value.item():.4g}", do)], "label_smoothing")
    return [ahead < here] if max(here, ahead) > 3 * min(here, ahead) else []


def _classless(where: str, got: str) -> Fault:
    do = "Drop label_smoothing: targets that are numbers cannot be spread over classes."
    return Fault(where, "must have an output for each of two or more classes", got, do)
