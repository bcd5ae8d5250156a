"""Every ingredient beside every other: values that make each do something, what a pair does, and the page that says so.

``python -m tests.pairs`` writes docs/methods/README.md.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.catalogue import FAMILIES, _sentence
from luthier.core.context import Around, Progress, Shelf
from luthier.core.ingredient import Findings, Ingredient, Outputs
from luthier.errors import Fault, LuthierError
from luthier.observe import _score, batch
from luthier.planning.compose import compose, skeleton
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run, own_loss
from luthier.testing import tiny_model
from luthier.training.stages import steps

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "README.md"
STEPS = 4

# Values with which an ingredient does something on a BERT of three blocks in four steps.
VALUES: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.5, 0.9)},
    "anneal": {"warmup": 0.25},
    "best": {"every": 1, "metric": "nll"},
    "child_tuning": {"mode": "data", "p": 0.5, "rows": 8},
    "clip": {"max_norm": 0.1},
    "discriminative": {"bands": 2},
    "ema": {"decay": 0.5},
    "emoe": {"experts": 4, "k": 2},
    "freeze": {"keep": ("head", "bridge", "top:2")},
    "grouped_llrd": {"factors": (1.0, 2.0)},
    "head_scale": {"factor": 2.0},
    "l2sp": {"strength": 0.5},
    "label_smoothing": {"eps": 0.1},
    "lengths": {"window": 2},
    "lisa": {"layers": 1, "every": 1},
    "llrd": {"decay": 0.5},
    "lora": {"r": 2},
    "mixout": {"p": 0.5},
    "out_domain": {"amount": 4},
    "prior_decay": {"weight_decay": 0.5},
    "rec_adam": {"strength": 1.0, "t0": 0.5},
    "smart": {"pull": 1.0},
    "swa": {"start": 0.2},
    "thaw": {"bands": 1, "over": 0.5},
    "wise": {"alpha": 0.5},
}
BESIDE = {"lora_plus": ("lora",)}  # what an ingredient cannot do without
IDLE = {
    ("neftune", "freeze"): "frozen embeddings are quiet, and a note says so"
}  # who does nothing beside whom, and why

LENGTHS = [4 + number * 5 % 8 % 5 for number in range(32)]  # the last eight rows are out-domain
ROWS = {name: torch.cat([batch(number)[name] for number in range(8)]) for name in batch(0)}
ROWS["attention_mask"] *= torch.arange(8) < torch.tensor(LENGTHS).unsqueeze(-1)
HELD_OUT = {name: torch.cat([batch(number)[name] for number in range(92, 104)]) for name in batch(0)}


def made(name: str) -> Ingredient:
    return registry.find(name)(**VALUES.get(name, {}))


def stage(*names: str) -> Recipe:
    """A recipe of one stage with these ingredients, and what they cannot do without."""
    wanted = list(dict.fromkeys([other for name in names for other in BESIDE.get(name, ())] + list(names)))
    parts = tuple(made(name) for name in wanted)
    return Recipe(name="pair", stages=(Stage(ingredients=parts, steps=STEPS, learning_rate=1e-2, batch_size=4),))


def begun(recipe: Recipe, model: nn.Module) -> Run:
    plan = compose(recipe, skeleton(model), lengths=LENGTHS, out_domain=8)
    run: Run

    def score(model: nn.Module) -> dict[str, float]:
        """The model's scores, moved so that the end of the third step is the best: not the last, and not where averages begin."""
        found = _score(model)
        return {**found, "nll": found["nll"] + 10.0 * (run.progress.step != STEPS - 1)}

    run = Run(plan.stages[0], model, seed=0, around=Around(own_loss, [batch(90), batch(91)], score))
    return run


def chosen(rows: list[int]) -> dict[str, Tensor]:
    """The batch of these training rows."""
    return {name: value[rows] for name, value in ROWS.items()}


@cache
def refusal(*names: str) -> str | None:
    """Why a stage with these ingredients is refused; None when it is planned."""
    try:
        compose(stage(*names), skeleton(tiny_model()), lengths=LENGTHS, out_domain=8)
    except LuthierError as error:
        return "; ".join(dict.fromkeys(map(_said, error.faults))) or str(error)
    return None


def _said(fault: Fault) -> str:
    """What must hold, beginning with the ingredient at which it does not, and what came."""
    place = fault.where.split()[-1]
    must = f"{place} {fault.must}" if place in registry.INGREDIENTS else fault.must
    return f"{must} ({fault.got})" if fault.got else must


@dataclass(frozen=True)
class End:
    """What a stage leaves: the model's weights, and what its ingredients find in the outputs of held-out rows."""

    weights: dict[str, Tensor]
    findings: dict[str, Findings]

    def differs(self, other: End) -> str | None:
        """The name of something that is not, to the bit, as in ``other``."""
        if self.weights.keys() != other.weights.keys():
            return "the names of the weights"
        odd = [name for name, value in self.weights.items() if not torch.equal(value, other.weights[name])]
        return odd[0] if odd else None if self.findings == other.findings else "what is found"


def end(*names: str, stop: int | None = None) -> End:
    """The end of a stage with these ingredients; saved, made anew and loaded after step ``stop``."""
    with torch.random.fork_rng(devices=[]):
        run = begun(stage(*names), tiny_model())
        for number, rows, _ in steps(run.plan, 0):
            if number == stop:
                file = io.BytesIO()
                torch.save({"model": run.model.state_dict(), "run": run.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                run = begun(stage(*names), tiny_model())
                run.model.load_state_dict(state["model"])
                run.load_state_dict(state["run"])
            if run.progress.over:
                break
            torch.manual_seed(1000 + number)
            run.offer(run.closure(chosen(rows)))
            run.step()
        run.finish()
    return End(dict(run.model.state_dict()), _found(run))


def _found(run: Run) -> dict[str, Findings]:
    measuring = [entry for entry in run.plan.entries if entry.ingredient.uses("measure")]
    if not measuring:
        return {}
    run.model.eval()
    with torch.no_grad():
        logits = run.model(**HELD_OUT).logits.double().numpy()
    outputs = {"validation": Outputs(logits, HELD_OUT["labels"].numpy())}
    progress, shelf = Progress(STEPS, STEPS), Shelf()
    found = {}
    for entry in measuring:
        ctx = run.plan.context(entry, seed=0, progress=progress, shelf=shelf, notes=[])
        found[entry.name] = entry.ingredient.measure(outputs, ctx)
    return {name: one for name, one in found.items() if one is not None}


@cache
def alone(name: str) -> End:
    """The end of a stage with this ingredient, and what it cannot do without."""
    return end(name)


def acts(one: str, other: str, both: End) -> bool:
    """Whether a stage with both ends otherwise than one with ``other`` alone. What ``other`` cannot do without does act."""
    return one in BESIDE.get(other, ()) or both.differs(alone(other)) is not None


def page() -> str:
    """docs/methods/README.md: the ingredients by family, and which two cannot share a stage."""
    names = sorted(registry.INGREDIENTS)
    lines = ["# Methods", "", "One ingredient a page. `luthier card NAME` prints it with what it claims.", ""]
    for family, about in FAMILIES.items():
        lines += [f"## {family}: {about}", ""]
        lines += [f"- [{name}]({name}.md): {_sentence(name)}" for name in names if registry.family(name) == family]
        lines.append("")
    lines += [
        "## across runs (no ingredient)",
        "",
        "- [soup](soup.md): the mean of the weights of several runs: `luthier soup`.",
        "",
    ]
    pairs = [(one, other) for at, one in enumerate(names) for other in names[at + 1 :]]
    refused = [(one, other, why) for one, other in pairs if (why := refusal(one, other))]
    idle = "; ".join(f"`{one}` beside `{other}`: {why}" for (one, other), why in IDLE.items())
    lines += [
        "## Which two share a stage",
        "",
        f"Of {len(pairs)} pairs, {len(pairs) - len(refused)} train together, and go on from a checkpoint to the same bits; tests/test_pairs.py",
        "trains each, pairs of losses in both orders, and sees that each of the two changes what the other leaves (not so "
        f"{idle}).",
        f"The other {len(refused)} are refused before training, with the reason. Ingredients that are refused here may stand in",
        "different stages of one recipe. (Tried on a BERT of three blocks, with `freeze` keeping the two topmost.)",
        "",
        "| | | why not |",
        "|---|---|---|",
    ]
    lines += [f"| {one} | {other} | {why} |" for one, other, why in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
