"""Forward passes with something added to the word embeddings, with the noise of an earlier pass, with other weights.

What adversarial losses are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from luthier.core.context import Progress
from luthier.core.seeds import remembered
from luthier.errors import Fault, ModelError, RunError

_WRAPPERS = ("module", "_orig_mod")

T = TypeVar("T")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compiled wrappers, whose weights have their plain names."""
    while len(model._modules) == 1 and next(iter(model._modules)) in _WRAPPERS and not model._parameters:
        inner = next(iter(model._modules.values()))
        assert inner is not None
        model = inner
    return model


def embeddings(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that give the word embeddings: what ``get_input_embeddings`` names, and those that share its weight.

    Raises:
        ModelError: the model does not say which they are.
    """
    plain = unwrapped(model)
    ask: Any = getattr(plain, "get_input_embeddings", None)
    named = ask() if ask is not None else None
    if not isinstance(named, nn.Module) or not isinstance(getattr(named, "weight", None), Tensor):
        must = "must have get_input_embeddings(), which gives the module of its word embeddings"
        raise ModelError.of(
            [Fault(type(plain).__name__, must, do="Write that method, or drop the ingredient.")], "the model"
        )
    shared = [part for part in plain.modules() if isinstance(part, nn.Embedding) and part.weight is named.weight]
    return tuple({id(part): part for part in (named, *shared)}.values())


def zeros(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A perturbation of the batch's word embeddings that is nothing yet, and where there is something to perturb.

    Returns:
        zeros of shape (rows, length, width), at least single precision, and a mask of shape (rows, length, 1) in the same type:
        1 at real tokens, 0 at padding.
    """
    named = embeddings(model)[0]
    tokens: Tensor = batch["input_ids"]
    weight: Any = named.weight
    width: int = getattr(named, "embedding_dim", None) or weight.shape[-1]
    kind = torch.promote_types(weight.dtype, torch.float32)
    real = batch.get("attention_mask")
    mask = torch.ones_like(tokens) if real is None else real.to(tokens.device)
    return torch.zeros(*tokens.shape, width, dtype=kind, device=tokens.device), (mask != 0).to(kind).unsqueeze(-1)


@contextmanager
def perturbed(model: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside it ``delta`` is added to what the model's word embeddings give, at each of their calls.

    A compiled model is run as it is written here, so that it is sure to see the addition and has dropout that can be had again.

    Args:
        model: the model or its wrapper, as a loss is given it.
        delta: shape (rows, length, width), any float type; added in the type of the embeddings.
    Raises:
        RunError: the embeddings were not called, or gave another shape.
    """
    shapes = []

    def add(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        shapes.append(tuple(out.shape))
        if out.shape != delta.shape:
            raise _unreached(model, f"must give word embeddings of the shape {tuple(delta.shape)}", str(shapes[-1]))
        return out + delta.to(out.dtype)

    handles = [part.register_forward_hook(add) for part in embeddings(model)]
    try:
        with uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
    if not shapes:
        raise _unreached(model, "must call its word embeddings", "a forward pass without them")


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside it a compiled model runs as it is written; other models are not concerned."""
    if any(hasattr(part, "_orig_mod") for part in model.modules()):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def slope(value: Tensor, delta: Tensor, *, keep: bool) -> Tensor:
    """The gradient of ``value`` at ``delta``, of its shape; no weight gets one.

    Args:
        value: shape (), made inside ``perturbed(model, delta)``, where ``delta`` asked for gradients.
        keep: whether ``value`` is differentiated again.
    Raises:
        RunError: ``value`` does not depend on ``delta``.
    """
    (found,) = torch.autograd.grad(value, delta, retain_graph=keep, allow_unused=True)
    if found is None:
        must = "must depend on what is added to the word embeddings"
        raise RunError.of(
            [Fault("the loss", must, do="Do not replay outputs of layers above them.")], "a perturbed pass"
        )
    return found


def afresh(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch as a perturbed pass needs it: with frozen embeddings, without the row numbers by which the engine would put kept
    outputs of frozen layers in the place of new ones."""
    frozen = "rows" in batch and not any(part.weight.requires_grad for part in embeddings(model))  # type: ignore[union-attr]
    return {name: value for name, value in batch.items() if name != "rows"} if frozen else batch


def rewinder(model: nn.Module) -> Callable[[], None]:
    """Remembers where the noise of forward passes stands; each call of what it gives puts it back there, in place.

    So several passes see the same dropout. The global generators of the processor and of the model's CUDA devices are meant,
    the stream of quick dropout where ``luthier.quick`` serves the model, and ``Draws``. They are set, never drawn from.
    """
    put_back = remembered(weight.device for weight in model.parameters())
    handle = getattr(vars(unwrapped(model)).get("forward"), "handle", None)  # as ``luthier.quick`` leaves it
    quick = getattr(handle, "random", None)
    stream = copy.deepcopy(vars(quick)) if quick is not None else {}
    places = [(draws, draws.place) for draws in _draws(model)]

    def rewind() -> None:
        put_back()
        for draws, place in places:
            draws.place = place
        if quick is not None:
            vars(quick).update(copy.deepcopy(stream))

    return rewind


class Draws(Generic[T]):
    """Numbers the draws of noise that has a named stream, from 0 in each evaluation of the loss: made twice, it sees the same noise.

    A module, or the owner of a module's forward hook, that has it as ``draws`` is rewound by ``rewinder``. A draw that gradient
    checkpointing repeats in the backward pass is the one it was; of several, the last one first, as backward passes go.

    Args:
        progress: of the stage.
        signer: the ingredient, for messages.
        where: what sees the noise, for messages.
    """

    def __init__(self, progress: Progress, *, signer: str, where: str) -> None:
        self._progress, self._signer, self._where = progress, signer, where
        self.place = (-1, -1, 0)  # step, evaluation, draws in it
        self._step, self._drawn = -1, list[T]()  # of this step, which a backward pass may repeat

    def next(self, make: Callable[[int], T]) -> T:
        """What ``make`` gives for the number of this draw.

        Raises:
            RunError: a pass is repeated that was first made without gradients (``use_reentrant=True``).
        """
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass, as torch.utils.checkpoint asks it
            if not self._drawn:
                do = "Say gradient_checkpointing_kwargs={'use_reentrant': False}, or leave checkpointing off."
                must = "must see again the noise of the forward pass that is repeated"
                raise RunError.of([Fault(self._where, must, do=do)], self._signer)
            return self._drawn.pop()
        (step, turn, number), now = self.place, self._progress
        if (now.step, now.turn) != (step, turn):
            number = 0
        self.place = now.step, now.turn, number + 1
        if now.step != self._step:
            self._step = now.step
            self._drawn.clear()
        drawn = make(number)
        if torch.is_grad_enabled():
            self._drawn.append(drawn)
        return drawn


def _draws(model: nn.Module) -> Iterator[Draws[Any]]:
    for module in model.modules():
        for owner in (module, *(getattr(hook, "__self__", None) for hook in module._forward_hooks.values())):
            draws = getattr(owner, "draws", None)
            if isinstance(draws, Draws):
                yield draws


def process() -> int:
    """The number of this process among those that train together, for streams that each draws for its own rows; 0 alone."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@contextmanager
def lent(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it the model's weights have the values of ``weights``; afterwards their own again. For passes without gradients.

    What autocast keeps of weights is thrown away on both sides.

    Args:
        weights: by plain live name, of the shapes of the model's; cast to its types.
    """
    live = dict(unwrapped(model).named_parameters())
    own = {name: live[name].data for name in weights}
    try:
        for name, value in weights.items():
            live[name].data = value.to(own[name].dtype)
        torch.clear_autocast_cache()
        with uncompiled(model):
            yield
    finally:
        for name, value in own.items():
            live[name].data = value
        torch.clear_autocast_cache()


def named(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every weight of an optimizer whose groups name theirs, with its plain live name."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def copied(weight: Tensor) -> Tensor:
    """A detached copy of at least single precision, so that the small steps of an average are not lost."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _unreached(model: nn.Module, must: str, got: str) -> RunError:
    do = "This model cannot be perturbed: drop the ingredient."
    return RunError.of([Fault(type(unwrapped(model)).__name__, must, got, do)], "a perturbed pass")
