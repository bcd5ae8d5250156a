"""EMoE: while it learns, each token uses only those groups of a feed-forward layer's hidden units that fit it best.

Source: Qiu, Huang, Fu, NAACL 2024 (arXiv:2310.10908); the groups are the modules that pretraining left in the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from luthier.core.anatomy import select_all
from luthier.core.claims import Claim, Place, needs, owns
from luthier.core.context import Context, Tensors
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import Fault, ModelError, RecipeError

# Name and module of the first linear layer (of two, the one before the activation), the last one, the keys (d_ff, h).
Layer = tuple[str, nn.Module, nn.Module, Tensor]
# Of the two first layers of a gated variant, the one before the activation.
_ACTIVATED = ("gate_proj", "gate", "wi_0", "w1")


def balanced_groups(points: Tensor, groups: int, *, draw: torch.Generator, rounds: int = 100) -> Tensor:
    """Balanced k-means: Lloyd's rounds from a k-means++ start, in which the assignment is the cheapest with groups of equal size.

    Args:
        points: shape (n, h), float64, on the CPU; ``groups`` divides n.
        rounds: at most so many; it ends before when the summed squared distance falls no more.
    Returns:
        shape (n,), int64: the group of each point.
    Differs: the authors call KMeansConstrained (a flow instead of an assignment).
    """
    picked = [int(torch.randint(len(points), (), generator=draw))]
    far = torch.full((len(points),), math.inf, dtype=points.dtype)
    for _ in range(1, groups):
        far = torch.minimum(far, (points - points[picked[-1]]).square().sum(1))
        picked.append(int(torch.multinomial(far.clamp(min=1e-12), 1, generator=draw)))
    centres, size = points[picked], len(points) // groups
    labels, least = torch.zeros(len(points), dtype=torch.int64), math.inf
    for _ in range(rounds):
        cost = centres.square().sum(1) - 2 * points @ centres.T  # |x|^2 is the same for all groups
        found = torch.from_numpy(linear_sum_assignment(cost.repeat_interleave(size, dim=1).numpy())[1] // size)
        total = float(cost.gather(1, found[:, None]).sum())
        if total >= least:
            break
        labels, least = found, total
        centres = points[labels.argsort(stable=True)].view(groups, size, -1).mean(1)
    return labels


def gate_scores(before: Tensor, bias: Tensor | None, labels: Tensor, experts: int) -> Tensor:
    """s_e = x . mean key of expert e = the mean over its units of W_in x: without the bias, without a gradient.

    Args:
        before: W_in x + b, shape (..., d_ff): before the activation, of the gate in gated variants.
        bias: b, shape (d_ff,), or None.
        labels: the expert of each unit, shape (d_ff,), each as often as the others.
    Returns:
        shape (..., experts), at least single precision.
    Source: avg-k gating.
    Differs: the authors take the mean of the keys after each step, and multiply x with it; here the mean comes after the product, so
        that the keys are those of this very forward pass.
    """
    exact = torch.promote_types(before.dtype, torch.float32)
    plain = before.detach().to(exact) - (0.0 if bias is None else bias.detach().to(exact))
    scores: Tensor = plain[..., labels.argsort(stable=True)].unflatten(-1, (experts, -1)).mean(-1)
    return scores


def chosen_units(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Which hidden units a token uses: those of its k best experts; shape (..., d_ff), bool."""
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, dim=-1).indices, True)
    used: Tensor = best[..., labels]
    return used


class Split(Tensors):
    """The expert of each hidden unit by layer, which is saved, and the hooks by which the last linear layer hears only those chosen."""

    def __init__(self, labels: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(labels or {})
        self.handles: list[RemovableHandle] = []
        self._used: dict[str, Tensor] = {}  # from a first layer to the last one of the same forward pass, no longer

    def attach(self, layer: Layer, experts: int, k: int) -> None:
        name, first, last, _ = layer
        choose, mute = partial(self._choose, name, experts, k), partial(self._mute, name)
        self.handles += [first.register_forward_hook(choose), last.register_forward_pre_hook(mute)]

    def _choose(self, name: str, experts: int, k: int, module: nn.Module, given: Any, before: Tensor) -> None:
        labels = self[name] = self[name].to(before.device)
        scores = gate_scores(before, cast("Tensor | None", module.bias), labels, experts)
        self._used[name] = chosen_units(scores, labels, k)

    def _mute(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0].masked_fill(~self._used.pop(name), 0.0), *given[1:])  # not times 0: that keeps an overflow


@ingredient
class EMoE(Ingredient):
    """Splits feed-forward layers in experts of alike hidden units; each token uses the best k. No weight is added, none is moved.

    The split is made once, from the start weights. At the end the layer is dense again, with the weights that learned as they are.

    Args:
        experts: groups of equal size; must divide the hidden units of the layer.
        k: experts that a token uses; all of them are the dense layer, bit for bit.
        where: selectors; each block of which they name a weight is split, so they must name all matrices of its feed-forward layer.
    Raises:
        RecipeError: ``where`` leaves out a matrix of a layer, or ``experts`` does not divide its units.
        ModelError: a block without such a layer, with several, or with experts already.
    """

    experts: Annotated[int, Field(ge=1)] = 64
    k: Annotated[int, Field(ge=1)] = 16
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("block:-2",)

    def __post_init__(self) -> None:
        if self.k > self.experts:
            raise ValueError(f"k must be at most experts: {self.k} of {self.experts} cannot be chosen")

    def touches(self) -> tuple[Claim, ...]:
        at = self.where
        return (owns(Place.FORWARD_WEIGHTS, *at), needs(Place.START_WEIGHTS, *at), needs(Place.TRAINABLE, *at))

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        named = select_all(ctx.anatomy, self.where)
        blocks = [one for one in ctx.anatomy.block_names if any(name.startswith(f"{one}.") for name in named)]
        if not blocks:
            raise RecipeError.of([Fault("emoe.where", "must name blocks", ", ".join(self.where))], "emoe")
        layers, matrices = zip(*(_layer(model, block) for block in blocks), strict=True)
        missed = [one for names in matrices for one in names if f"{one}.weight" not in named]
        if missed:
            must, do = "must name all matrices of the layers that it splits", "Name whole blocks, such as block:-2."
            raise RecipeError.of([Fault("emoe.where", must, f"no {', '.join(missed)}", do)], "emoe")
        faults = [_uneven(name, len(keys), self.experts) for name, *_, keys in layers if len(keys) % self.experts]
        if faults:
            raise RecipeError.of(faults, "emoe")
        if self.k == self.experts or any(keys.is_meta for *_, keys in layers):
            return
        split = ctx.keep("labels", lambda: self._split(layers, ctx))
        for layer in layers:
            split.attach(layer, self.experts, self.k)

    def _split(self, layers: Sequence[Layer], ctx: Context) -> Split:
        rows = {name: F.normalize(keys.detach().cpu().double(), dim=1) for name, *_, keys in layers}
        return Split({name: balanced_groups(one, self.experts, draw=ctx.rng(name)) for name, one in rows.items()})

    def finish(self, model: nn.Module, ctx: Context) -> None:
        for handle in ctx.keep("labels", Split).handles:
            handle.remove()
            ctx.note("emoe: the model is dense again; scores made during the stage are those of the split layers")


def _layer(model: nn.Module, block: str) -> tuple[Layer, list[str]]:
    """The feed-forward layer of a block, told by the shapes of the linear layers outside the attention; names of all its linear layers.

    Raises:
        ModelError: no such pair, more than one, weights that are no floats, or experts that are there already.
    """
    inside, attention = model.get_submodule(block), tuple[str, ...]()
    names = (name for name, _ in [*inside.named_modules(), *inside.named_parameters()])
    own = next((name for name in names if "experts" in name.split(".")), None)
    if own:
        must, got = "must name blocks without experts of their own", f"{block} with {own}"
        raise ModelError.of(
            [Fault("emoe.where", must, got, "Name other blocks, or drop it for this model.")], "the model"
        )
    rows: dict[str, Tensor] = {}  # weights as (out, in), by the name in the block
    for name, module in inside.named_modules():
        kind = type(module).__name__.removeprefix("Parametrized")
        if name and "attention" in kind.lower():
            attention += (f"{name}.",)
        elif (isinstance(module, nn.Linear) or kind == "Conv1D") and not name.startswith(attention):
            weight = cast(Tensor, module.weight)
            rows[name] = weight.T if kind == "Conv1D" else weight
    found = []
    for last, out in rows.items():
        firsts = [name for name, keys in rows.items() if keys.shape == out.shape[::-1] and len(keys) > len(out)]
        gates = [name for name in firsts if name.rpartition(".")[2] in _ACTIVATED] if len(firsts) == 2 else firsts
        found += [(gates[0] if len(gates) == 1 else "", last)] if firsts else []
    first, last = found[0] if len(found) == 1 else ("", "")
    if not first or not rows[first].is_floating_point():
        seen = ", ".join(f"{name} ({w.shape[1]} -> {w.shape[0]}, {str(w.dtype)[6:]})" for name, w in rows.items())
        must = "must name blocks with one linear layer from h to d_ff > h (beside its gate, if any) and one back to h"
        do = "Name other blocks, or drop it for this model: fused gates and quantised weights cannot be split."
        got = f"{block} with {seen or 'none'} outside its attention"
        raise ModelError.of([Fault("emoe.where", must, got, do)], "the model")
    whole = [f"{block}.{name}" for name, w in rows.items() if name == last or w.shape == rows[first].shape]
    return (f"{block}.{first}", inside.get_submodule(first), inside.get_submodule(last), rows[first]), whole


def _uneven(name: str, units: int, experts: int) -> Fault:
    divisors = [number for number in range(1, units + 1) if units % number == 0]
    near = [max(d for d in divisors if d < experts), *[d for d in divisors if d > experts][:1]]
    do = f"Nearest that do: {' and '.join(map(str, near))}."
    return Fault("emoe.experts", f"must divide the {units} hidden units of {name}", str(experts), do)
