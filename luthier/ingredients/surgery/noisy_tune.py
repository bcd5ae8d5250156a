"""NoisyTune: before training, each pretrained tensor gets a little uniform noise, in proportion to its own spread.

Source: Wu, Wu, Qi, Huang, Xie, ACL 2022 (arXiv:2202.12024), section 2.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.anatomy import canonical, select_all
from luthier.core.claims import Claim, Place, owns, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient


def perturbed(weight: Tensor, draw: Tensor, strength: float) -> Tensor:
    """W + strength (u - 1/2) std(W): uniform noise in [-strength / 2, strength / 2) standard deviations of the tensor.

    Args:
        weight: W, any shape, any float type.
        draw: u, the same shape, uniform in [0, 1), at least single precision.
        strength: lambda; the noise has the standard deviation strength / sqrt(12) of the tensor's own.
    Returns:
        W's shape and type; ``weight`` itself where it has no spread (one element, or all of them equal).
    Source: Wu et al., section 2; the standard deviation is over the whole tensor, with n - 1.
    Differs: a tensor of one element, whose deviation with n - 1 is no number, stays; half precision is computed in
        single precision and rounded once.
    """
    if weight.numel() < 2 or bool((weight == weight.flatten()[0]).all()):
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    noisy: Tensor = wide + (draw.to(wide) - 0.5) * (strength * wide.std())
    return noisy.to(weight.dtype)


@ingredient
class NoisyTune(Ingredient):
    """Adds noise to the start weights, once; biases and norms too, buffers never, a tied weight once.

    Args:
        strength: lambda, the width of the noise in standard deviations of each tensor; 0 changes nothing.
        where: selectors of the weights.
        reference: whether methods that compare with the start weights (mixout, l2sp, wise) see the ``noisy`` or the
            ``clean`` ones.
    """

    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.15
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("backbone",)
    reference: Literal["noisy", "clean"] = "noisy"

    def touches(self) -> tuple[Claim, ...]:
        """The run remembers the start weights after their owners and before those that only wrap them."""
        claim = owns if self.reference == "noisy" else wraps
        return (claim(Place.START_WEIGHTS, *self.where),)

    @torch.no_grad()
    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if self.strength == 0:
            return
        chosen = {ctx.anatomy.part(name).canonical for name in select_all(ctx.anatomy, self.where)}
        left = []
        for live, weight in model.named_parameters():
            name = canonical(live)  # mixout or an adapter may have moved it
            if name not in chosen:
                continue
            if not weight.is_floating_point() or weight.element_size() == 1:
                left.append(name)
                continue
            kind = torch.promote_types(weight.dtype, torch.float32)
            draw = torch.rand(weight.shape, generator=ctx.rng(name), dtype=kind)  # on the CPU: alike on every device
            weight.copy_(perturbed(weight, draw, self.strength))
        if left:
            ctx.note(f"noisy_tune leaves {len(left)} quantised tensors alone, such as {left[0]}.")

    def finish(self, model: nn.Module, ctx: Context) -> None:
        if self.strength and hasattr(model, "peft_config"):
            ctx.note("noisy_tune: the adapter that lora saves belongs to the weights with noise, not to those without.")
