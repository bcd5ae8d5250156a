"""prepare: everything that can be found wrong is found here, before step 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.core.claims import Claim, Place
from luthier.core.claims import voids as gone
from luthier.narrate import Narrator, Silent
from luthier.planning.compose import compose, skeleton
from luthier.planning.plan import Plan
from luthier.recipe.recipe import Recipe
from luthier.sources import checks, data, models, places, tasks
from luthier.sources.limits import pad_id
from luthier.sources.text import Encoded, encode
from luthier.stock import Stock, key


@dataclass(frozen=True)
class Job:
    """A recipe, a model, data and a plan that fit together. ``loaded.model`` is the only live thing in it."""

    recipe: Recipe
    data: data.Data
    task: tasks.Task
    loaded: models.Loaded
    encoded: Mapping[str, Encoded]
    plan: Plan
    metric: str
    warnings: tuple[str, ...]
    stock: Stock = field(default_factory=Stock)

    @cached_property
    def training(self) -> Encoded:
        """The rows that a stream's numbers stand for: those of ``train``, then those of ``out_domain``."""
        other = self.encoded.get("out_domain")
        return self.encoded["train"] if other is None else self.encoded["train"].joined(other)

    @property
    def pad_id(self) -> int:
        """The token that fills batches up."""
        return pad_id(self.loaded.model, self.loaded.tokenizer)

    def targets(self, split: str) -> np.ndarray[Any, Any]:
        """What there is to predict in ``split``, shape (rows,)."""
        wanted = self.encoded[split].targets
        assert wanted is not None  # prepare encodes every split with its labels
        return wanted

    def rows_of(self, model: nn.Module, device: torch.device) -> tuple[object, ...]:
        """What a frozen model's outputs on training and validation rows depend on beside its weights; a part of a stock's key."""
        config: Any = getattr(model, "config", None)
        told = config.to_json_string(use_diff=False) if config is not None else ""
        rows = [self.encoded[name].digest for name in ("train", "validation", "out_domain") if name in self.encoded]
        return *rows, self.pad_id, self.task.kind, told, str(device)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "recipe": self.recipe.digest,
            "data": self.data.digest,
            "model": self.loaded.digest,
            "seed": self.recipe.seed,
        }


@dataclass(frozen=True)
class Columns:
    """Which columns of the data are what; None infers."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def prepare(
    recipe: Recipe,
    *,
    model: Any,
    data_source: Any,
    columns: Columns | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    voids: Sequence[Claim] = (),
    narrator: Narrator | None = None,
    stock: Stock | None = None,
) -> Job:
    """Reads the data and the model, checks them, and composes the plan. Trains nothing, writes nothing.

    Raises:
        LuthierError: anything that is wrong with the data, the model or the recipe for them, all faults of each at once.
    """
    say = (narrator or Silent()).line
    chosen = columns or Columns()
    shared = stock or Stock(lasting=False)
    split_seed = recipe.seed_of("split")

    def read() -> data.Data:
        return data.read(
            data_source,
            text=chosen.text,
            text_pair=chosen.text_pair,
            label=chosen.label,
            task=recipe.task,
            seed=split_seed,
            ood=ood,
            out_domain=out_domain,
            label_map=label_map,
        )

    sources = [data_source, *(ood or {}).values(), *([out_domain] if out_domain is not None else [])]
    files = places.signature(sources)  # None for what is in memory
    asked = (data_source, chosen, recipe.task, split_seed, ood, out_domain, label_map, files)
    found = read() if files is None else shared.get(key("data", *asked), read)
    for note in found.notes:
        say(note)
    decided, sentence = tasks.decide(found, recipe.task)
    say(sentence)
    warnings = [*found.warnings, *checks.check(found, decided, metrics=_judged_by(recipe))]
    loaded = models.load(
        model,
        decided,
        seed=recipe.seed_of("head"),
        max_length=recipe.max_length,
        head=recipe.head,
        family=recipe.family,
    )
    for note in loaded.notes:
        say(note)

    def tokens() -> dict[str, Encoded]:
        return {
            name: encode(loaded.tokenizer, split, decided.targets(split.labels or ()), max_length=loaded.max_length)
            for name, split in found.splits.items()
        }

    known = None if isinstance(model, tuple) else places.signature([loaded.source])
    these = key("tokens", found.digest, loaded.source, loaded.max_length, decided.kind, known)
    encoded = tokens() if known is None else shared.get(these, tokens)
    cut = {name: one.truncated for name, one in encoded.items()}
    rows = {name: len(one) for name, one in encoded.items()}
    warnings += checks.truncated(cut, rows, max_length=loaded.max_length)
    absent = [] if "validation" in found.splits else [gone(Place.VALIDATION)]
    other = encoded["out_domain"].lengths if "out_domain" in encoded else ()
    plan = compose(
        recipe,
        skeleton(loaded.model),
        lengths=(*encoded["train"].lengths, *other),
        out_domain=len(other),
        voids=[*voids, *absent],
        goes_on=True,
    )
    warnings += _measures(recipe, found, plan)
    for warning in warnings:
        say(f"warning: {warning}")
    return Job(recipe, found, decided, loaded, encoded, plan, recipe.metric or decided.metric, tuple(warnings), shared)


def fits(recipe: Recipe, job: Job, *, voids: Sequence[Claim] = ()) -> Plan:
    """The plan of ``recipe`` for the model and the data of ``job``, if there can be one; loads and trains nothing.

    Raises:
        LuthierError: it cannot; all faults.
    """
    checks.check(job.data, job.task, metrics=_judged_by(recipe))
    absent = [] if "validation" in job.encoded else [gone(Place.VALIDATION)]
    train, other = job.encoded["train"].lengths, job.encoded.get("out_domain")
    lengths = (*train, *(other.lengths if other is not None else ()))
    many = len(other) if other is not None else 0
    shape, around = skeleton(job.loaded.model), [*voids, *absent]
    return compose(recipe, shape, lengths=lengths, out_domain=many, voids=around, goes_on=True)


def _judged_by(recipe: Recipe) -> dict[str, str]:
    """Every metric that the recipe names, under where it does."""
    told = {"metric": recipe.metric}
    for at, stage in enumerate(recipe.stages):
        for part in stage.ingredients:
            told[f"stages[{at}] {part.name()}.metric"] = getattr(part, "metric", None)
    return {where: metric for where, metric in told.items() if metric is not None}


def _measures(recipe: Recipe, found: data.Data, plan: Plan) -> list[str]:
    asks = any(
        claim.place == Place.OUT_DOMAIN for one in plan.stages for entry in one.entries for claim in entry.claims
    )
    if "out_domain" in found.splits and not asks:
        return ["there are out-domain rows, and no stage asks for any: put out_domain into one, or leave them out"]
    if "validation" not in found.splits and any(stage.solver == "exact" for stage in recipe.stages):
        return ["no validation split: the head's strength is chosen by cross-validation"]
    return []
