"""NEFTune: in training the embeddings of the words get uniform noise.

Source: Jain et al., ICLR 2024 (arXiv:2310.05914), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.perturb import Draws, process
from luthier.errors import Fault, ModelError


def noised(embedded: Tensor, draw: Tensor, alpha: float, tokens: Tensor | None = None) -> Tensor:
    """X + alpha / sqrt(L h) u, u uniform in [-1, 1): noise of about the same length, alpha / sqrt(3), whatever L and h.

    Args:
        embedded: X, shape (rows, length, hidden).
        draw: u, the same shape, at least single precision.
        alpha: length of the noise of one row, in units of sqrt(3).
        tokens: shape (rows, length), 1 at a row's tokens and 0 at its padding, which gets no noise; L is then each
            row's own count of tokens. None: L is ``length``, padding and all.
    Returns:
        shape and type of ``embedded``.
    Source: Jain et al., algorithm 1; L by row and no noise on padding as in the authors' training code.
    Differs: the noise is computed in single precision at least. The hook in transformers takes the padded length for L.
    """
    seen = torch.ones_like(draw[..., :1]) if tokens is None else tokens.unsqueeze(-1).to(draw)
    bound = alpha / (seen.sum(-2, keepdim=True).clamp(min=1) * embedded.shape[-1]).sqrt()
    noisy: Tensor = embedded + (draw * seen * bound).to(embedded.dtype)
    return noisy


class Noise:
    """The hooks on a live model: on what looks words up, and on the model itself, to see which tokens are padding.

    The noise is drawn from the ingredient's own stream, named by the step, the micro-batch, the process and the number
    of the look-up in the evaluation (see ``Draws``).
    """

    def __init__(self, alpha: float, model: nn.Module, ctx: Context) -> None:
        self._alpha, self._model, self._ctx = alpha, model, ctx
        self._tokens: Tensor | None = None
        self.draws: Draws[tuple[int, Tensor | None]] = Draws(ctx.progress, signer="neftune", where="the embeddings")
        self._handles = [module.register_forward_hook(self._add) for module in tables(model)]
        self._handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {}  # the streams are named, so that they need no memory

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, model: nn.Module, given: Any, named: Mapping[str, Any]) -> None:
        self._tokens = named.get("attention_mask")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, model: nn.Module, given: Any, out: Any) -> None:
        self._tokens = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, table: nn.Module, given: Any, embedded: Tensor) -> Tensor | None:
        if not table.training:
            if self._model.training:
                self._ctx.note("neftune adds no noise: frozen embeddings are quiet.  Say freeze: {quiet: false}.")
            return None
        seed, tokens = self.draws.next(self._named)
        kind = torch.promote_types(embedded.dtype, torch.float32)
        random = torch.Generator(embedded.device).manual_seed(seed)
        draw = torch.empty(embedded.shape, dtype=kind, device=embedded.device).uniform_(-1, 1, generator=random)
        fits = isinstance(tokens, Tensor) and tokens.shape == embedded.shape[:-1]
        return noised(embedded, draw, self._alpha, tokens if fits else None)

    def _named(self, number: int) -> tuple[int, Tensor | None]:
        return self._ctx.seed_of(self._ctx.progress.part, number, process()), self._tokens


def tables(model: nn.Module) -> list[nn.Module]:
    """The module that looks words up, and embeddings tied to it: T5 looks up in a tied one, not in the one it names.

    Raises:
        ModelError: the model does not say which module it is.
    """
    named = None
    with suppress(AttributeError, NotImplementedError):
        named = cast(Any, model).get_input_embeddings()
    if not isinstance(named, nn.Module):
        must, do = "must have get_input_embeddings(), to say what looks words up", "Give it one, or drop neftune."
        raise ModelError.of([Fault(f"the model {type(model).__name__}", must, do=do)], "neftune")
    inside = set(named.modules())  # what an adapter wraps has the same weight, and is heard through its wrapper
    others = [one for one in model.modules() if isinstance(one, nn.Embedding) and one not in inside]
    return [named, *(one for one in others if one.weight is getattr(named, "weight", None))]


@ingredient
class NEFTune(Ingredient):
    """Adds noise to the embeddings of the words in training; in eval mode, and at ``alpha`` 0, nothing.

    Args:
        alpha: size of the noise; each row's has the length alpha / sqrt(3), whatever the number of its tokens.
    Raises:
        ModelError: the model does not say where it looks words up.
    """

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0

    def touches(self) -> tuple[Claim, ...]:
        return (needs(Place.NOISE),)

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if self.alpha:
            self._noise(model, ctx)

    def finish(self, model: nn.Module, ctx: Context) -> None:
        if self.alpha:
            self._noise(model, ctx).remove()

    def _noise(self, model: nn.Module, ctx: Context) -> Noise:
        return ctx.keep("noise", lambda: Noise(self.alpha, model, ctx))
