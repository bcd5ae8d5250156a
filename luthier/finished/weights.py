"""How far the saved weights of two runs lie apart: bit by bit, and as a distance by part of the model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier import call
from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.core.heads import two_layers
from luthier.errors import Fault, LuthierError
from luthier.sources.models import reload

ELSEWHERE = (1 << 30, "elsewhere")  # depth and part of a tensor that the anatomy does not name, such as a buffer


@dataclass(frozen=True)
class Distance:
    """How far one part of the model lies apart.

    Args:
        part: ``embeddings``, ``block 0``, ..., ``bridge``, ``head``; ``elsewhere`` for buffers.
        weights: how many there are.
        distance: L2 norm of the difference.
        relative: the same over the norm of the first run's weights; 0.02 is two per cent.
    """

    part: str
    weights: int
    distance: float
    relative: float


@dataclass(frozen=True)
class Weights:
    """How the weights of two runs compare.

    Args:
        tensors: that both runs have, in one shape and type.
        equal: how many of them are equal to the bit.
        largest: the largest absolute difference of two weights; infinite where one of them is no number.
        first: the first tensor that differs, from the bottom of the model; empty when none does.
        parts: from the bottom; empty when all bits are equal.
        absent: tensors that only one of the runs has.
        reshaped: tensors of another shape or type.
    """

    tensors: int
    equal: int
    largest: float = 0.0
    first: str = ""
    parts: tuple[Distance, ...] = ()
    absent: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether both runs saved the same tensors, equal to the bit."""
        return self.equal == self.tensors and not self.absent and not self.reshaped

    def lines(self) -> list[str]:
        """The same as text, at most 80 columns wide but for the names of tensors."""
        if self.same:
            return [f"bit-equal, all {self.tensors} tensors"]
        told = [f"{self.equal} of {self.tensors} tensors are bit-equal"]
        if self.first:
            told += [f"largest absolute difference {self.largest:.3g}", f"first that differs: {self.first}"]
        for why, names in (("only in one of them", self.absent), ("of another shape or type", self.reshaped)):
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            told += [f"{why}: {', '.join(names[:2])}{more}"] if names else []
        if self.parts:
            told.append(f"{'':<14}{'weights':>12}{'L2 distance':>14}{'relative':>12}")
        return told + [
            f"{one.part:<14.14}{one.weights:>12,}{one.distance:>14.4g}{one.relative:>12.2e}" for one in self.parts
        ]


def weights_between(one: str | Path, other: str | Path) -> Weights:
    """Compares the safetensors in ``model/`` of two run folders, a tensor at a time.

    Raises:
        LuthierError: there are none, or a file is torn.
    """
    with ExitStack() as stack:
        ours, theirs = (_opened(Path(run), stack) for run in (one, other))
        both = [name for name in ours if name in theirs]
        pairs = {name: (ours[name].get_slice(name), theirs[name].get_slice(name)) for name in both}
        reshaped = {name for name, (a, b) in pairs.items() if _kind(a) != _kind(b)}
        whole = [name for name in both if name not in reshaped]
        moved = {name for name in whole if not _same(ours[name].get_tensor(name), theirs[name].get_tensor(name))}
        absent = tuple(sorted(ours.keys() ^ theirs.keys()))
        if not moved:
            return Weights(len(whole), len(whole), absent=absent, reshaped=tuple(sorted(reshaped)))
        parts = _parts(Path(one))
        order = sorted(whole, key=lambda name: parts.get(name, ELSEWHERE)[0])
        largest, sums = 0.0, dict[str, tuple[int, float, float]]()
        for name in order:
            before, after = ours[name].get_tensor(name).double(), theirs[name].get_tensor(name).double()
            gap = _gap(before, after)
            largest = max(largest, float(gap.max())) if gap.numel() else largest
            count, far, norm = sums.get(part := parts.get(name, ELSEWHERE)[1], (0, 0.0, 0.0))
            sums[part] = (
                count + gap.numel(),
                far + float(gap.square().sum()),
                norm + float(before.square().sum()),
            )
        found = tuple(
            Distance(part, count, math.sqrt(far), math.sqrt(far / norm) if norm else 0.0)
            for part, (count, far, norm) in sums.items()
        )
        first = next(name for name in order if name in moved)
        return Weights(len(whole), len(whole) - len(moved), largest, first, found, absent, tuple(sorted(reshaped)))


def weightless(run: Path) -> list[Fault]:
    """A fault where ``run`` has no weights, as in a comparison that keeps none, with what makes them again; no fault where it has."""
    if any((run / "model").glob("*.safetensors")):
        return []
    do = "Give the folder of a run that has ended."
    if (run / "report.json").is_file() and (run / call.NAME).is_file():
        options = call.Call.load(run).options(("--out", "NEW"))
        do = f"Make it again: luthier fit --recipe {shlex.quote(str(run / 'recipe.yaml'))} {options}"
    return [Fault(str(run / "model"), "must hold the run's weights", "nothing there", do)]


def _opened(run: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor that ``run`` saved."""
    files = sorted((run / "model").glob("*.safetensors"))
    if not files:
        raise LuthierError.of(weightless(run), str(run))
    found: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise LuthierError.of([Fault(str(path), "must be whole", str(error))], str(run)) from None
        found |= dict.fromkeys(file.keys(), file)
    return found


def _kind(part: Any) -> tuple[Any, ...]:
    return (part.get_dtype(), *part.get_shape())


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal; unlike ``torch.equal`` tells 0 from -0 and knows a NaN again."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """The absolute difference; 0 where both are no number, infinite where one is."""
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    return gap.nan_to_num(nan=math.inf, posinf=math.inf)


def _parts(run: Path) -> Mapping[str, tuple[int, str]]:
    """Depth and part of each weight of the saved model; empty where its anatomy is not known."""
    try:
        told = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        family = Family(**_tuples(told["family"])) if told.get("family") else None
        model = reload(run / "model")
        anatomy = Anatomy.of(model, two_layers(model, family) if told.get("head") == "mlp" else family)
    except (LuthierError, OSError, yaml.YAMLError, AttributeError, TypeError):
        return {}
    return {part.name: (part.depth, anatomy.depth_name(part.depth)) for part in anatomy.parts}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
