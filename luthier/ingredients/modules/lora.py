"""LoRA: a trainable product of two thin matrices beside each chosen weight, which stays frozen.

Source: Hu et al., ICLR 2022 (arXiv:2106.09685), section 4.1; the layers are PEFT's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.seeds import borrowed
from luthier.core.table import ParamTable
from luthier.errors import Fault, MissingExtra, RecipeError, RunError

TOLERANCE = 1e-4  # of merged against unmerged logits, relative to the largest


@ingredient
class LoRA(Ingredient):
    """Trains W + (alpha / r) B A with W frozen, and the head; B starts at zero, so nothing changes at first.

    At the end the adapter is saved in PEFT's format (``adapter/`` in the run folder), merged into W, and taken out.

    Args:
        r: rank of B A.
        alpha: the product is scaled by alpha / r (alpha / sqrt(r) with ``rslora``).
        dropout: on the adapter's input.
        target: names that modules end with, such as ``query``; ``all-linear``; empty for PEFT's own choice for the family,
            or all linear layers of the blocks where it has none.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        dora: the product changes W's direction only (Liu et al. 2024, arXiv:2402.09353).
    """

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.MODULES), owns(Place.TRAINABLE), needs(Place.SAMPLE), needs(Place.WHOLE_WEIGHTS))

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if importlib.util.find_spec("peft") is None:
            raise MissingExtra('lora needs PEFT.  pip install "luthier[peft]"')
        from peft import inject_adapter_in_model

        with borrowed(ctx.seed_of("start")):
            try:
                inject_adapter_in_model(self._config(model), model)
            except ValueError as error:
                linears = sorted(
                    {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
                )
                do = f"Linear modules here end with: {', '.join(linears)}."
                raise RecipeError.of(
                    [Fault("lora.target", "must match modules of this model", str(error).splitlines()[0], do)], "lora"
                ) from None

    def settings(self, table: ParamTable) -> ParamTable:
        return table.trainable(lambda row: row.trainable and (".lora_" in row.name or row.part.role == "head"))

    def finish(self, model: nn.Module, ctx: Context) -> None:
        live = not any(weight.is_meta for weight in model.parameters())
        if live:
            ctx.save("adapter", lambda path: self._save(model, ctx, path))
        before = _logits(model, ctx) if live else []
        for parent, name, layer in list(_layers(model)):
            if live:
                layer.merge(safe_merge=True)
            setattr(parent, name, layer.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for old, new in zip(before, _logits(model, ctx) if live else [], strict=True):
            worst = float((old - new).abs().max() / old.abs().max().clamp(min=1.0))
            if not worst <= TOLERANCE:
                raise RunError(
                    f"lora: the merged model's logits differ from the adapter's by {worst:.2g} of the largest"
                )

    def _config(self, model: nn.Module) -> Any:
        from peft import LoraConfig
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        kind = getattr(getattr(model, "config", None), "model_type", "")
        target: Any = list(self.target) or KNOWN.get(kind)
        if not target or self.target == ("all-linear",):
            target = sorted({name for name, _ in _inside(model)})
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=target,
            use_rslora=self.rslora,
            use_dora=self.dora,
            bias="none",
            task_type="SEQ_CLS",
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        )

    def _save(self, model: nn.Module, ctx: Context, path: Path) -> None:
        """What ``PeftModel.from_pretrained(base, path)`` reads: the adapter's weights and the head's."""
        from safetensors.torch import save_file

        heads = {part.name.partition(".")[0] for part in ctx.anatomy.parts if part.role == "head"}
        kept: dict[str, Tensor] = {}
        for name, weight in model.state_dict().items():
            if ".lora_" in name:
                kept["base_model.model." + name.replace(".default", "")] = weight.detach().cpu().contiguous().clone()
            elif name.partition(".")[0] in heads:
                kept["base_model.model." + name] = weight.detach().cpu().contiguous().clone()
        save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._config(model)
        config.modules_to_save = sorted(heads)
        config.inference_mode = True
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
        config.save_pretrained(path)


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """PEFT's layers as (the module that holds it, its name there, the layer)."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parent, _, own = name.rpartition(".")
            yield model.get_submodule(parent), own, module


def _inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of the blocks, by name."""
    from luthier.core.anatomy import Anatomy

    blocks = tuple(f"{name}." for name in Anatomy.of(model).block_names)
    for name, module in model.named_modules():
        if (
            (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and name.startswith(blocks)
            and ".lora_" not in name
        ):
            yield name.removesuffix(".base_layer"), module


@torch.no_grad()
def _logits(model: nn.Module, ctx: Context) -> list[Tensor]:
    """The model's logits on the sample, in eval mode."""
    training = model.training
    model.eval()
    found = []
    for batch in ctx.sample:
        if isinstance(batch, dict):
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "rows")}
            device = next(model.parameters()).device
            found.append(model(**{name: value.to(device) for name, value in inputs.items()}).logits)
    model.train(training)
    return found
