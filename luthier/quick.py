"""Quick training steps on a CPU: install the kernels around one model's forward, and take them out again.

On a CPU torch draws dropout's mask serially, at the price of many of a small model's matrix products; and on AMD
processors with AVX-512 its float32 products (MKL) run at half the speed of oneDNN's. ``quicken`` answers both without
touching a module, a name or a weight: a ``TorchFunctionMode`` that is on during the model's training forward hands
``F.dropout``, ``F.scaled_dot_product_attention`` and ``F.linear`` to ``luthier.kernels``. So every model family is
served that calls them, in a module or plainly.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luthier.kernels import QuickRandom, attention, drop_chance, dropout, has_onednn, linear

__all__ = ["Handle", "QuickRandom", "keep_memory", "onednn_is_quicker", "quicken"]

_WORTH = 1 << 22  # multiply-adds below which a oneDNN call costs more to start than it saves
_FLOATS = (torch.float32, torch.float64)


@functools.cache
def onednn_is_quicker() -> bool:
    """Whether oneDNN's float32 product outruns torch's here: on AMD with AVX-512 it does, twofold where measured.

    A rule and not a stopwatch, so that a run repeated on the same machine takes the same path and gives the same bits.
    """
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text(errors="replace")
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn()


def keep_memory() -> bool:
    """Have the C library keep freed memory for the next step instead of returning it; True where it can (glibc).

    A step frees hundreds of megabytes of activations; glibc gives them back to the system and pays a page fault for
    every 4 kB at the next step. Also asks torch for huge pages, which it grants if it has not allocated a tensor yet.
    Process-wide; the process stays as large as its largest step. No number changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's names for the two settings
    return mallopt is not None and bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary dense tensors on the CPU (not meta, fake, quantised or distributed ones)."""
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided)
        for t in tensors
    )


def _transformed() -> bool:
    """Whether the call is transformed in a way a hand-written backward does not know, or will be run again.

    Checkpointing runs a forward twice, and the second time restores torch's generator, not ours.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


class _Mode(TorchFunctionMode):
    """Serves the calls it knows; a server answers None for what it leaves to torch."""

    def __init__(self, random: QuickRandom, linears: bool) -> None:
        super().__init__()
        self.random = random
        self.graph = True  # whether gradients were being recorded when the model's forward began
        self.served: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
            F.dropout: self.dropout,
            F.scaled_dot_product_attention: self.attention,
        }
        if linears:
            self.served |= {F.linear: self.linear, torch.addmm: self.addmm}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        serve = self.served.get(func)
        named = kwargs or {}
        if serve is not None and torch.is_grad_enabled() == self.graph and not _transformed():
            out = serve(*args, **named)
            if out is not None:
                return out
        return func(*args, **named)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
        if not training or inplace or not 0.0 < p <= 1.0 or not _plain(input) or not input.is_floating_point():
            return None
        return dropout(input, p, random=self.random)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        parts = (query, key, value)
        ordinary = _plain(*parts, attn_mask) and all(t.dim() == 4 and t.dtype == query.dtype for t in parts)
        if (
            not (0.0 < dropout_p <= 1.0)
            or not ordinary
            or query.dtype not in _FLOATS
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        if (
            query.shape[:2] != key.shape[:2]
            or key.shape[:3] != value.shape[:3]
            or (is_causal and attn_mask is not None)
        ):
            return None
        return attention(
            query, key, value, p=dropout_p, random=self.random, mask=attn_mask, causal=is_causal, scaling=scale
        )

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if (
            not _plain(input, weight, bias)
            or input.dim() < 2
            or weight.dim() != 2
            or input.numel() * len(weight) < _WORTH
        ):
            return None
        if any(t is not None and t.dtype != torch.float32 for t in (input, weight, bias)):
            return None
        return None if torch.is_autocast_enabled("cpu") else linear(input, weight, bias)

    def addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Tensor | None:
        return None if scales or input.dim() != 1 or not _plain(mat2) else self.linear(mat1, mat2.t(), input)


class _Forward:
    """A model's forward, the mode on while it trains. It is copied with its model and keeps its signature."""

    def __init__(self, model: nn.Module, handle: Handle) -> None:
        functools.update_wrapper(self, model.forward)
        self.forward, self.model, self.handle = model.forward, model, handle
        self.checkpointed = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.handle.mode
        recomputes = any(part.gradient_checkpointing for part in self.checkpointed)
        off = not self.model.training and not self.handle.evaluation
        if not self.handle.active or off or recomputes:
            return self.forward(*args, **kwargs)
        mode.graph = torch.is_grad_enabled()
        with mode:
            return self.forward(*args, **kwargs)


class Handle:
    """What ``quicken`` installed. Also a context manager that removes it.

    Attributes:
        random: the stream of the masks; ``random.reseed("dropout", step, part)`` before a forward makes it repeatable.
        notes: what is served and what is left to torch, a sentence each.
        active: False after ``remove``.
    """

    def __init__(self, model: nn.Module, random: QuickRandom, linears: bool, *, evaluation: bool = False) -> None:
        self.random = random
        self.evaluation = evaluation
        self.notes = _notes(model, linears)
        self.active = True
        self.mode = _Mode(random, linears)
        self._model = model
        self._before = model.__dict__.get("forward")
        self._forward = _Forward(model, self)
        model.__dict__["forward"] = self._forward

    def remove(self) -> None:
        """Leave the model as it was, in place; a second call does nothing."""
        self.active = (
            False  # enough by itself where something else has since wrapped the forward, or the model was copied
        )
        if self._model.__dict__.get("forward") is self._forward:
            del self._model.__dict__["forward"]
            if self._before is not None:
                self._model.__dict__["forward"] = self._before

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self  # a copy of the model draws from the same stream and is released with it


def quicken(model: nn.Module, random: QuickRandom, *, linears: bool | None = None, evaluation: bool = False) -> Handle:
    """Make the model's training forward quick on the CPU, until ``Handle.remove``.

    Only the instance's ``forward`` is replaced. Left to torch: evaluation mode unless asked, other devices, ``torch.func``,
    compilation, gradient checkpointing, p = 0. Attention is served where it is ``scaled_dot_product_attention``.

    Args:
        random: the stream of the masks.
        linears: whether linear layers go through oneDNN (they then differ from torch's by rounding); None asks
            ``onednn_is_quicker``.
        evaluation: whether linear layers are served in evaluation mode as well, where there is no dropout to serve.
    """
    chosen = onednn_is_quicker() if linears is None else linears and has_onednn()
    return Handle(model, random, chosen, evaluation=evaluation)


def _notes(model: nn.Module, linears: bool) -> tuple[str, ...]:
    parts = tuple(model.modules())
    drops = sum(isinstance(part, nn.Dropout) and drop_chance(part.p) > 0 for part in parts)
    way = getattr(getattr(model, "config", None), "_attn_implementation", None)
    devices = {weight.device.type for weight in model.parameters()}
    said = [
        f"{drops} dropout modules draw 16-bit masks",
        "linear layers go through oneDNN" if linears else "linear layers stay with torch",
    ]
    if way not in (None, "sdpa"):
        said.append(
            f"attention is {way!r}: its dropout is quick, the rest stays; attn_implementation='sdpa' is served whole"
        )
    if any(isinstance(part, nn.MultiheadAttention) for part in parts):
        said.append("nn.MultiheadAttention drops its weights inside torch and is left as it is")
    if any(getattr(part, "gradient_checkpointing", False) for part in parts):
        said.append("gradient checkpointing is on: all is left to torch, whose masks it can repeat")
    if devices - {"cpu"}:
        said.append(f"weights on {', '.join(sorted(devices - {'cpu'}))} are left to torch")
    return tuple(said)
