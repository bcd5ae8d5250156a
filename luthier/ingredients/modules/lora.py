"""LoRA: a trainable product of two thin matrices beside each chosen weight, which stays frozen.

Source: Hu et al., ICLR 2022 (arXiv:2106.09685), section 4.1; the layers are PEFT's.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, needs, owns, voids, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.seeds import borrowed
from luthier.core.table import ParamTable
from luthier.errors import Fault, MissingExtra, RecipeError, RunError

# What the query and value of an attention are called where PEFT has no choice for the family; the last are fused with the key.
QUERY_VALUE = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"), ("q", "v"), ("Wqkv",), ("qkv",))
TOLERANCE = 1e-4  # of merged against unmerged logits, relative to the largest


@ingredient
class LoRA(Ingredient):
    """Trains W + (alpha / r) B A with W frozen, and the head; B starts at zero, so nothing changes at first.

    At the end the adapter is saved in PEFT's format (``adapter/`` in the run folder), merged into W, and taken out.

    Args:
        r: rank of B A.
        alpha: the product is scaled by alpha / r (alpha / sqrt(r) with ``rslora``).
        dropout: on the adapter's input.
        target: names that modules end with, such as ``query``; globs over whole names of linear modules; ``all-linear`` for those of the
            blocks. Empty for PEFT's own choice for the family; where it has none for the attention's query and value, or
            ``all-linear`` where they have no name that is known. Never the head, which learns whole.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        dora: the product changes W's direction only (Liu et al. 2024, arXiv:2402.09353).
    Raises:
        MissingExtra: PEFT is not installed.
        RecipeError: ``target`` matches nothing.
        RunError: merged, the model does not give the same logits.
    """

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def touches(self) -> tuple[Claim, ...]:
        return (
            wraps(Place.MODULES),
            owns(Place.FORWARD_WEIGHTS, "backbone"),
            owns(Place.TRAINABLE),
            voids(Place.TRAINABLE, "backbone"),
            needs(Place.SAMPLE),
            needs(Place.WHOLE_WEIGHTS),
        )

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if importlib.util.find_spec("peft") is None:
            raise MissingExtra('lora needs PEFT.  pip install "luthier[peft]"')
        from peft import inject_adapter_in_model

        config = self._config(model, ctx.anatomy)
        with borrowed(ctx.seed_of("start")):
            try:
                inject_adapter_in_model(config, model)
            except ValueError as error:
                raise RecipeError.of([_unmatched(model, ctx.anatomy, str(error).splitlines()[0])], "lora") from None

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

    def _config(self, model: nn.Module, anatomy: Anatomy) -> Any:
        from peft import LoraConfig

        target, excluded = self._targets(model, anatomy)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=target,
            exclude_modules=excluded or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            bias="none",
            task_type=_task(model),
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        )

    def _targets(self, model: nn.Module, anatomy: Anatomy) -> tuple[Any, list[str]]:
        """What PEFT finds the modules by, and the head's modules that it must leave alone though they are called alike.

        Raises:
            RecipeError: entries of ``target`` that match nothing, all of them.
        """
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        known = KNOWN.get(getattr(getattr(model, "config", None), "model_type", ""))
        if not self.target and isinstance(known, str):
            return known, []  # PEFT's choice is one pattern over whole names
        heads = tuple(f"{head}." for head in _heads(anatomy))
        linears, embeddings = _linears(model), [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        body = [name for name in linears if not f"{name}.".startswith(heads)]
        found: dict[str, None] = {}
        faults = []
        for entry in self.target or known or _query_value(body) or ("all-linear",):
            if entry == "all-linear":
                inside = tuple(f"{block}." for block in anatomy.block_names)
                matched = [name for name in body if f"{name}.".startswith(inside)]
            elif any(mark in entry for mark in "*?["):
                matched = fnmatch.filter(body, entry)
            else:
                matched = [entry] if any(_ends(name, entry) for name in (*body, *embeddings)) else []
            if not matched:
                faults.append(_unmatched(model, anatomy, repr(entry)))
            found |= dict.fromkeys(matched)
        if faults:
            raise RecipeError.of(faults, "lora")
        alike = [name for name in linears if name not in body and any(_ends(name, entry) for entry in found)]
        return list(found), alike

    def _save(self, model: nn.Module, ctx: Context, path: Path) -> None:
        """What ``PeftModel.from_pretrained(base, path)`` reads: the adapter's weights and the head's."""
        from safetensors.torch import save_file

        heads = _heads(ctx.anatomy)
        kept: dict[str, Tensor] = {}
        for name, weight in model.state_dict().items():
            if ".lora_" in name or name.startswith(tuple(f"{head}." for head in heads)):
                plain = name.replace(".default", "") if ".lora_" in name else name
                kept[f"base_model.model.{plain}"] = weight.detach().cpu().contiguous().clone()
        save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(cast(Any, model).peft_config["default"])
        for field in ("target_modules", "exclude_modules"):  # sets, whose order in the file would be chance
            if isinstance(getattr(config, field), set):
                setattr(config, field, sorted(getattr(config, field)))
        config.modules_to_save = heads
        config.inference_mode = True
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
        config.save_pretrained(path)


def _ends(name: str, entry: str) -> bool:
    """Whether PEFT takes ``entry`` for the module called ``name``."""
    return name == entry or name.endswith(f".{entry}")


def _task(model: nn.Module) -> str | None:
    """PEFT's word for what the model is for."""
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for kind, task in kinds.items() if type(model).__name__.endswith(kind)), None)


def _heads(anatomy: Anatomy) -> list[str]:
    """The outermost modules that hold weights of the head and no others."""
    others = [part.name for part in anatomy.parts if part.role != "head"]
    found: dict[str, None] = {}
    for part in anatomy.parts:
        if part.role != "head":
            continue
        steps = part.name.split(".")[:-1]
        ways = (".".join(steps[: at + 1]) for at in range(len(steps)))
        module = next((way for way in ways if not any(other.startswith(f"{way}.") for other in others)), None)
        if module is not None:
            found[module] = None
    return list(found)


def _linears(model: nn.Module) -> list[str]:
    """Names of linear layers, GPT-2's Conv1D among them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def _query_value(names: list[str]) -> tuple[str, ...]:
    """What query and value are called among linear modules; empty where they have no name that is known."""
    there = (called for called in QUERY_VALUE if all(any(_ends(name, end) for name in names) for end in called))
    return next(there, ())


def _unmatched(model: nn.Module, anatomy: Anatomy, got: str) -> Fault:
    heads = tuple(f"{head}." for head in _heads(anatomy))
    ends = sorted({name.rpartition(".")[2] for name in _linears(model) if not f"{name}.".startswith(heads)})
    do = f"Linear modules here end with: {', '.join(ends)}."
    return Fault("lora.target", "must match modules of this model outside its head", got, do)


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """PEFT's layers as (the module that holds it, its name there, the layer)."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parent, _, own = name.rpartition(".")
            yield model.get_submodule(parent), own, module


@torch.no_grad()
def _logits(model: nn.Module, ctx: Context) -> list[Tensor]:
    """The model's logits on the sample, in eval mode."""
    training = model.training
    model.eval()
    found = []
    for batch in islice(ctx.sample, 2):
        if isinstance(batch, Mapping):
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "rows")}
            device = next(model.parameters()).device
            found.append(model(**{name: value.to(device) for name, value in inputs.items()}).logits)
    model.train(training)
    return found
