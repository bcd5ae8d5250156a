"""The forecast of memory: what waits for a backward pass is measured beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.planning.compose import compose, skeleton
from luthier.planning.cost import Memory
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run
from tests.tiny import tiny

TOP = ("freeze", {"keep": ("head", "bridge", "top:1")})


def waiting(name: str, above: int = 1, below: int = 0, **values: Any) -> tuple[int, int]:
    return registry.find(name)(**values).waiting(above, below)


def step(*parts: Any, family: str = "bert") -> tuple[int, Memory]:
    """Bytes that were saved for backward passes at once in one step, and the forecast; ``parts`` are names, or (name, values)."""
    named = [(part, {}) if isinstance(part, str) else part for part in parts]
    stage = Stage(
        name="a", steps=1, batch_size=8, ingredients=tuple(registry.find(name)(**values) for name, values in named)
    )
    model = tiny(family, dropout=0.1, layers=4)
    (plan,) = compose(Recipe(name="x", stages=(stage,)), skeleton(model), lengths=[16] * 8).stages
    run = Run(plan, model, seed=0)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    owners: dict[int, int] = {}
    now = most = 0

    class Saved:
        """A saved tensor; its storage counts while one of them lives."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor.detach()
            self.place, self.bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if self.place in own:
                self.bytes = 0
            owners[self.place] = owners.get(self.place, 0) + 1
            now += self.bytes if owners[self.place] == 1 else 0
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            owners[self.place] -= 1
            now -= self.bytes if not owners[self.place] else 0

    rows = torch.arange(128).reshape(8, 16) % 60 + 3
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": torch.zeros(8, dtype=torch.long)}
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        torch.manual_seed(0)
        run.offer(run.closure(batch))
    return most, plan.memory


def test_how_many_passes_wait_by_hand() -> None:
    assert waiting("adamw") == waiting("sam") == (1, 0)
    assert waiting("r_drop", 3, 1) == (6, 2)
    # Three passes, of which the last does not climb and so does not reach below.
    assert waiting("freelb") == (3, 2) and waiting("freelb", 2, 1) == (6, 5) and waiting("freelb", passes=1) == (1, 0)
    assert waiting("smart") == (2, 1) and waiting("smart", 3, 2) == (6, 5)
    assert waiting("mezo") == (0, 0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("r_drop", {"alpha": 0}),
        ("freelb", {"radius": 0}),
        ("smart", {"strength": 0, "pull": 1}),
        ("smart", {"radius": 0}),
    ],
)
def test_at_its_neutral_value_a_loss_keeps_no_more(name: str, values: dict[str, Any]) -> None:
    assert waiting(name, 3, 1, **values) == (3, 1)


@pytest.mark.parametrize(
    "parts",
    [("freelb",), ("r_drop",), ("smart",), ("sam",), ("freelb", "r_drop"), ("smart", "r_drop"), ("freelb", "smart")],
)
def test_activations_are_forecast_in_the_proportion_in_which_they_are_kept(parts: tuple[str, ...]) -> None:
    (plain, base), (kept, told) = step(), step(*parts)
    assert told.activations / base.activations == pytest.approx(kept / plain, rel=0.02)


@pytest.mark.parametrize("parts", [(), ("freelb",), ("smart",), ("r_drop",), ("r_drop", "freelb")])
def test_frozen_blocks_count_where_a_loss_asks_for_the_gradient_at_the_embeddings(parts: tuple[str, ...]) -> None:
    # What a frozen block keeps is an estimate, for inner layers four times as wide as the blocks; here they are twice.
    (plain, base), (kept, told) = step(), step(TOP, *parts)
    assert told.activations / base.activations == pytest.approx(kept / plain, rel=0.25)


def test_without_a_backward_pass_there_is_nothing_to_keep() -> None:
    kept, told = step("mezo")
    assert (kept, told.activations, told.gradients) == (0, 0, 0) and told.weights


def test_blocks_below_a_head_that_learns_alone_keep_nothing_whether_or_not_they_share_their_weights() -> None:
    for family in ("bert", "albert"):
        assert step(("freeze", {"keep": ("head",)}), family=family)[1].activations == 0
    assert step(family="albert")[1].activations == step()[1].activations
