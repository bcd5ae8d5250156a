"""Dropout, attention and linear layers on a CPU: torch's distribution and mathematics, in less time.

A mask element is one 16-bit random word compared with a threshold; attention with dropout is written out in blocks
that stay in cache, with its backward; a linear layer goes through oneDNN, forward and backward. ``luthier.quick`` puts
them to use in a model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import Fault, RecipeError

_WORDS = 1 << 16  # a chance is a whole number of 65536ths
_BLOCK = 1 << 19  # attention scores worked on at once: 2 MB of float32, about the second-level cache of two cores


def drop_chance(p: float) -> float:
    """The chance that is drawn for ``p``: the nearest multiple of 1/65536, so that its inverse scale is exact."""
    return round(p * _WORDS) / _WORDS


class QuickRandom:
    """A stream of random 16-bit words, apart from torch's and numpy's global generators.

    The stream is SFC64, keyed by a hash of the seed and the names last given to ``reseed``; a run that reseeds at every
    step from the step's number has no other state to save.

    Args:
        seed: any integer.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.reseed()

    def reseed(self, *names: int | str) -> None:
        """Start the stream named by the seed and ``names``, in place: equal names give equal bits (about 10 us)."""
        key = hashlib.blake2b(repr((self.seed, *names)).encode(), digest_size=16).digest()
        self._bits = np.random.SFC64(int.from_bytes(key, "little"))

    def keep(self, shape: Iterable[int], p: float) -> Tensor:
        """The next mask.

        Returns:
            ``shape``, uint8: 1 with chance ``1 - drop_chance(p)``, else 0, independently.
        """
        sizes = tuple(shape)
        count = math.prod(sizes)
        threshold = round(p * _WORDS)
        if threshold >= _WORDS:
            return torch.zeros(sizes, dtype=torch.uint8)
        words = np.asarray(self._bits.random_raw(-(-count // 4)), dtype=np.uint64).view(np.uint16)[:count]
        kept = np.greater_equal(words, np.uint16(threshold)).view(np.uint8)
        return torch.from_numpy(kept).view(sizes)


def _scale(p: float) -> float:
    return 0.0 if drop_chance(p) == 1.0 else 1.0 / (1.0 - drop_chance(p))


def _call(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x.mul(keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grads[0].mul(keep).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float, *, random: QuickRandom) -> Tensor:
    """``x * keep / (1 - p)`` with p a multiple of 1/65536, so that the mean over masks is ``x``.

    Args:
        x: any shape, floating, on the CPU.
        p: in [0, 1]; 0 gives ``x`` itself and draws nothing.
        random: the stream the mask is drawn from.
    Raises:
        RecipeError: p is not in [0, 1].
    Differs: torch draws p more finely; 0.1 is 6554/65536 = 0.100006 here, in the mask and in the scale alike.
    """
    _check_chance(p)
    if drop_chance(p) == 0.0:
        return x
    return _call(_Dropout, x, random.keep(x.shape, p), _scale(p))


def _check_chance(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise RecipeError.of([Fault("p", "must be in [0, 1]", repr(p))], "quick dropout")


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor, scales: tuple[float, float]
) -> Tensor:
    """softmax(scaling q k^T + bias) * keep * scale @ v in torch's own operations, differentiable at any order."""
    scores = (q * scales[0]) @ k.transpose(-1, -2)
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return _call(_Dropout, weights, keep, scales[1]) @ v


def _flat(x: Tensor, scale: float = 1.0) -> Tensor:
    """``x`` (batch, heads, length, width) times ``scale`` as contiguous (batch * heads, length, width)."""
    flat = torch.empty(x.shape, dtype=x.dtype)
    return (flat.copy_(x) if scale == 1.0 else torch.mul(x, scale, out=flat)).view(-1, *x.shape[2:])


def _blocks(keep: Tensor) -> Iterable[tuple[slice, slice]]:
    """Slices of the batch, and of batch * heads, whose scores fit a block."""
    batch, heads, rows, columns = keep.shape
    step = max(1, _BLOCK // max(1, heads * rows * columns))
    for start in range(0, batch, step):
        stop = min(batch, start + step)
        yield slice(start, stop), slice(start * heads, stop * heads)


class _Attention(torch.autograd.Function):
    """With P the softmax, M the mask and s its scale: O = (P*M) s V; G = dO (sV)^T * M; dS = P * (G - sum(G*P))."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor, scales: tuple[float, float]
    ) -> Tensor:
        batch, heads, rows, columns = keep.shape
        fq, fk, fv = _flat(q, scales[0]), _flat(k).transpose(1, 2), _flat(v, scales[1])
        weights = q.new_empty(batch * heads, rows, columns)
        out = q.new_empty(batch * heads, rows, v.shape[-1])
        mask = keep.view(weights.shape)
        for items, part in _blocks(keep):
            scores = torch.bmm(fq[part], fk[part])
            if bias is not None:
                scores.view(-1, heads, rows, columns).add_(bias[items])
            torch.softmax(scores, -1, out=weights[part])
            torch.bmm(torch.mul(weights[part], mask[part], out=scores), fv[part], out=out[part])
        ctx.save_for_backward(q, k, v, bias, keep, weights)
        ctx.scales = scales
        return out.view(batch, heads, rows, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, keep, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            out = _plain_attention(q, k, v, bias, keep, ctx.scales)
            asked = [part for part in (q, k, v) if part.requires_grad]
            found = iter(torch.autograd.grad(out, asked, grads[0], create_graph=True))
            return (*(next(found) if part.requires_grad else None for part in (q, k, v)), None, None, None)
        g, fq, fk, fv = _flat(grads[0], ctx.scales[1]), _flat(q, ctx.scales[0]), _flat(k, ctx.scales[0]), _flat(v)
        dq, dk, dv = torch.empty_like(fq), torch.empty_like(fk), torch.empty_like(fv)
        mask = keep.view(weights.shape)
        for _, part in _blocks(keep):
            kept = weights[part] * mask[part]
            torch.bmm(kept.transpose(1, 2), g[part], out=dv[part])
            slope = torch.bmm(g[part], fv[part].transpose(1, 2), out=kept).mul_(mask[part])
            slope = torch._softmax_backward_data(slope, weights[part], -1, slope.dtype)
            torch.bmm(slope, fk[part], out=dq[part])
            torch.bmm(slope.transpose(1, 2), fq[part], out=dk[part])
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    p: float,
    random: QuickRandom,
    mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    """``dropout(softmax(scaling q k^T + mask), p) v``, as ``scaled_dot_product_attention`` has it.

    A row that sees nothing gives 0.

    Args:
        q: shape (batch, heads, rows, width), float32 or float64, on the CPU; k and v: (batch, heads, columns, width).
        p: the chance that a weight is dropped; 0 draws nothing.
        mask: broadcasts to (batch, heads, rows, columns); bool (True = seen) or floating (added to the scores).
        causal: row i sees columns 0..i only.
        scaling: default 1/sqrt(width).
    Returns:
        shape (batch, heads, rows, width of v).
    Raises:
        RecipeError: p is not in [0, 1].
    """
    _check_chance(p)
    scales = (q.shape[-1] ** -0.5 if scaling is None else scaling, _scale(p))
    shape = (*q.shape[:3], k.shape[2])
    keep = torch.ones(shape, dtype=torch.uint8) if drop_chance(p) == 0.0 else random.keep(shape, p)
    bias, blind = _bias(mask, causal, shape, q.dtype)
    if bias is not None and bias.requires_grad:
        out = _plain_attention(q, k, v, bias, keep, scales)
    else:
        out = _call(_Attention, q, k, v, bias, keep, scales)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _bias(
    mask: Tensor | None, causal: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The term added to the scores, (batch, 1 or heads, rows or 1, columns), and the rows that see nothing, if any."""
    if causal:
        seen = torch.ones(shape[2:], dtype=torch.bool).tril()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.masked_fill(~seen, -math.inf)
        else:
            mask = seen if mask is None else mask & seen
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)
    bias = mask.to(dtype)
    bias = bias.view((1,) * (4 - bias.dim()) + bias.shape)
    bias = bias.expand(shape[0], *bias.shape[1:])
    blind = (bias == -math.inf).all(-1, keepdim=True)
    if bool(blind.any()):
        return bias.masked_fill(blind, 0.0), blind
    return bias, None


def has_onednn() -> bool:
    """Whether this torch has the oneDNN products that ``linear`` calls, and they agree with its own on a small case."""
    x, w = torch.linspace(-1, 1, 64 * 48).view(64, 48), torch.linspace(-1, 1, 32 * 48).view(32, 48).sin()
    g = F.linear(x, w, w[:, 0])
    try:
        with torch.no_grad():
            found = (_product(x, w, w[:, 0]), *_slopes(g, x))
        pairs = zip(found, (g, g.t() @ x, g.sum(0)), strict=True)
        return all(torch.allclose(got, want, rtol=1e-4, atol=1e-3) for got, want in pairs)
    except (AttributeError, RuntimeError, TypeError):  # torch's own operations, which may go or change their form
        return False


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    bias = None if b is None else b.contiguous()  # the operation ignores a bias's strides
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], ""))


def _slopes(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's and the bias's gradient, g^T x and the sum of g's rows, from g (n, outputs) and x (n, inputs)."""
    if torch.is_grad_enabled():  # create_graph: an operation torch can differentiate
        return linear(g.t(), x.t()), g.sum(0)
    blocked = (g.contiguous().to_mkldnn(), x.contiguous().to_mkldnn())
    made = torch.ops.aten.mkldnn_linear_backward_weights(*blocked, g, True)  # a dense third argument: dense results
    return cast(tuple[Tensor, Tensor], made)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return _product(x, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        dx = None if w is None else linear(grads[0], w.t())
        if x is None:
            return dx, None, g.sum(0) if ctx.needs_input_grad[2] else None
        dw, db = _slopes(g, x.reshape(-1, x.shape[-1]))
        return dx, dw, db if ctx.needs_input_grad[2] else None


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``x w^T + b`` by oneDNN, in float32 throughout, forward and backward; only the rounding is not torch's.

    Args:
        x: shape (..., inputs), float32, at least two axes; w: (outputs, inputs); b: (outputs,) or None.
    """
    return _call(_Linear, x, w, b)
