"""gmt: the largest entries of each tensor's accumulated gradient, whatever the micro-batches, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.masks import masked
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.gradients.child_tuning import ChildTuning
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.gradients.gmt import GMT, largest
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.prior_decay import PriorDecay
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.tiny import tiny


@ingredient
class PlainSGD(Ingredient):
    """Plain gradient descent, whose step shows the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def batch(number: int, rows: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {
        "input_ids": torch.randint(3, 64, (rows, 6), generator=draw),
        "labels": torch.randint(0, 3, (rows,), generator=draw),
    }


def train(run: Run, steps: int = 2, parts: int = 1) -> None:
    for number in range(steps):
        whole = batch(number)
        pieces = [
            {name: value[at::parts] for name, value in whole.items()} for at in range(parts)
        ]  # ``parts`` micro-batches of equally many rows
        run.offer(run.closure(*pieces))
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the first step's loss, on a model that is not touched."""
    values: Any = torch.autograd.grad(model(**batch(0)).loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), values, strict=True))


# By hand


def test_of_four_entries_half_are_kept_the_two_largest_whatever_their_sign() -> None:
    gradient = torch.tensor([0.1, -0.5, 0.2, 0.05])
    assert (gradient * largest(gradient, 0.5)).tolist() == pytest.approx([0.0, -0.5, 0.2, 0.0])


def test_the_share_is_taken_of_each_tensor_and_never_less_than_one_entry() -> None:
    # round(0.3 x 6) = 2 of a 2 x 3 matrix; round(0.3 x 1) = 0, so 1 of a scalar.
    matrix = torch.tensor([[1.0, 5.0, 2.0], [-4.0, 3.0, 0.0]])
    assert largest(matrix, 0.3).tolist() == [[False, True, False], [True, False, False]]
    assert largest(torch.tensor(0.5), 0.3).tolist() is True
    assert largest(torch.zeros(0), 0.3).tolist() == []


def test_entries_without_a_gradient_are_not_kept_though_the_share_is_larger() -> None:
    # round(0.5 x 6) = 3, but only two have a gradient; of four that have one, three are kept.
    assert largest(torch.tensor([0.0, 2.0, -0.0, 0.0, -1.0, 0.0]), 0.5).int().tolist() == [0, 1, 0, 0, 1, 0]
    assert largest(torch.tensor([[0.0, 2.0, 3.0], [-4.0, 1.0, 0.0]]), 0.5).int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert not largest(torch.zeros(2, 3), 0.5).any()


def test_a_step_at_rate_one_moves_by_minus_what_is_kept() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = SGD([{"params": [weight], "names": ("w",)}], lr=1.0)
    masked(optimizer, {"w"}, lambda name, gradient: largest(gradient, 0.5))
    weight.grad = torch.tensor([0.1, -0.5, 0.2, 0.05])
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.0, 0.5, -0.2, 0.0])


# Identity


def test_a_ratio_of_one_changes_nothing_bit_for_bit() -> None:
    one, other = tiny("bert"), tiny("bert")
    train(begin(one, [GMT(keep_ratio=1.0)], learning_rate=1e-2, steps=2))
    train(begin(other, [], learning_rate=1e-2, steps=2))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


# Invariants


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_k_entries_with_a_gradient_are_kept_or_all_none_smaller_than_one_that_is_not(
    values: list[float], ratio: float
) -> None:
    gradient = torch.tensor(values)
    mask = largest(gradient, ratio)
    assert int(mask.sum()) == min(max(1, round(ratio * len(values))), int(gradient.count_nonzero()))
    assert gradient[mask].all()
    if mask.any() and not mask.all():
        assert gradient[mask].abs().min() >= gradient[~mask].abs().max()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_change_nothing_because_the_mask_is_of_the_whole_steps_gradient(parts: int) -> None:
    one, other = tiny("bert").double(), tiny("bert").double()
    train(begin(one, [GMT(keep_ratio=0.1), PlainSGD()], learning_rate=0.1, steps=2))
    train(begin(other, [GMT(keep_ratio=0.1), PlainSGD()], learning_rate=0.1, steps=2), parts=parts)
    for name, value in weights(one).items():
        # Sums in another order: some roundings of double precision.
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-9, atol=1e-12)


# Parity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_entries_are_those_of_torchs_topk(dtype: torch.dtype) -> None:
    # The numbers 1 to 120 in some order and with some signs: bfloat16 tells them apart too.
    draw = torch.Generator().manual_seed(0)
    gradient = (torch.randperm(120, generator=draw) + 1).to(dtype) * (-1) ** torch.randint(0, 2, (120,), generator=draw)
    theirs = torch.zeros(120, dtype=torch.bool)
    theirs[gradient.abs().topk(36).indices] = True
    assert torch.equal(largest(gradient.view(10, 12), 0.3).flatten(), theirs)


def test_without_ties_it_is_the_papers_threshold_on_the_clipped_gradient() -> None:
    model, ratio, rate = tiny("bert").double(), 0.25, 0.1
    before, gradient = weights(model), gradients(model)
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    train(
        begin(model, [Clip(0.05), GMT(keep_ratio=ratio, where=("blocks",)), PlainSGD()], learning_rate=rate, steps=1), 1
    )
    assert norm > 0.05
    for name, value in weights(model).items():
        clipped = gradient[name] * 0.05 / (norm + 1e-6)
        if ".layer." in name and len(clipped.unique()) == clipped.numel():
            threshold = clipped.abs().flatten().sort(descending=True).values[round(ratio * clipped.numel()) - 1]
            clipped = clipped * (clipped.abs() >= threshold)
        elif ".layer." in name:
            continue  # the key's bias has no gradient but roundings
        torch.testing.assert_close(value, before[name] - rate * clipped, rtol=0, atol=1e-12)


# Conformance


def test_it_keeps_the_contract() -> None:
    check_ingredient(GMT())
    check_ingredient(GMT(keep_ratio=0.5, where=("blocks",), strict=True))


def test_it_owns_the_gradient_at_its_weights_and_needs_them_whole() -> None:
    at = GMT(where=("top:1",)).touches()
    assert at == (wraps(Place.GRADIENT, "top:1"), owns(Place.GRADIENT, "top:1"), needs(Place.WHOLE_WEIGHTS))


def test_two_masks_on_one_weight_are_refused_and_on_two_are_not() -> None:
    free = ChildTuning(mode="free")
    with pytest.raises(ConflictError, match="gmt and child_tuning cannot share a stage"):
        begin(tiny("bert"), [GMT(), free], steps=1)
    begin(tiny("bert"), [Clip(), GMT(where=("head",)), free], steps=1)


def test_an_optimizer_without_gradients_is_refused() -> None:
    with pytest.raises(ConflictError, match="gmt edits the gradient, which mezo does away with"):
        begin(tiny("bert"), [GMT(), MeZO()], steps=1)


def test_weights_that_are_not_there_are_told_once_and_frozen_ones_as_frozen() -> None:
    with pytest.raises(RecipeError, match="matches no weight with 'block'") as caught:
        begin(tiny("bert"), [GMT(where=("block",))], steps=1)
    assert len(caught.value.faults) == 1
    with pytest.raises(
        RecipeError, match="must edit weights that learn in this stage; got embeddings, all frozen"
    ) as caught:
        begin(tiny("bert"), [GMT(where=("embeddings",)), Freeze(keep=("head",))], steps=1)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("ratio", [0.0, 1.1, float("nan")])
def test_a_ratio_outside_zero_and_one_is_refused(ratio: float) -> None:
    with pytest.raises(RecipeError, match="keep_ratio"):
        GMT(keep_ratio=ratio)


def test_it_says_what_it_keeps_in_memory() -> None:
    # The head: 16 x 3 + 3 = 51 entries of 4 bytes, a copy and a mask of 1 byte: 51 x 5; without the copy one mask of 48 at a time.
    table = begin(tiny("bert"), [], steps=1).plan.table
    assert GMT(where=("head",), strict=True).state_bytes(table) == 255
    assert GMT(where=("head",)).state_bytes(table) == 48
    assert GMT(keep_ratio=1.0).state_bytes(table) == 0


# It matters


def test_exactly_k_entries_of_each_tensor_move_and_weights_elsewhere_all_may() -> None:
    model, plain = tiny("bert").double(), tiny("bert").double()
    before = weights(model)
    train(begin(model, [GMT(keep_ratio=0.2, where=("blocks",)), PlainSGD()], learning_rate=0.1, steps=1), 1)
    train(begin(plain, [PlainSGD()], learning_rate=0.1, steps=1), 1)
    for name, value in weights(model).items():
        moved = int((value != before[name]).sum())
        if ".layer." in name and "key.bias" not in name:
            assert moved == max(1, round(0.2 * value.numel())), name
        elif ".layer." not in name:
            assert torch.equal(value, weights(plain)[name])


def test_strict_entries_stand_still_under_momentum_and_decay_which_move_them_otherwise() -> None:
    def moves(strict: bool) -> list[int]:
        model = tiny("bert")
        run = begin(
            model, [GMT(keep_ratio=0.1, where=("*.query.weight",), strict=strict), AdamW(weight_decay=0.1)],
            learning_rate=1e-2, steps=3,
        )  # fmt: skip
        found = []
        for number in range(3):
            before = weights(model)
            run.offer(run.closure(batch(number)))
            run.step()
            name = "bert.encoder.layer.1.attention.self.query.weight"
            found.append(int((weights(model)[name] != before[name]).sum()))
        return found

    # 26 = round(0.1 x 256) entries a step; without strict the decay alone moves all 256.
    assert moves(True) == [26, 26, 26]
    assert moves(False) == [256, 256, 256]


def test_strict_embeddings_of_tokens_that_a_step_does_not_read_stand_still() -> None:
    # Batches of 8 rows have 48 tokens, so at most 48 of 64 rows of the table have a gradient; 16 x 64 x 0.9 = 922 entries would.
    model = tiny("bert")
    run = begin(model, [GMT(keep_ratio=0.9, strict=True), AdamW(weight_decay=0.1)], learning_rate=1e-2, steps=3)
    table = model.get_input_embeddings().weight
    for number in range(3):
        before, read = table.detach().clone(), set(batch(number)["input_ids"].flatten().tolist())
        run.offer(run.closure(batch(number)))
        run.step()
        assert {at for at in range(64) if not torch.equal(table[at], before[at])} == read


@pytest.mark.parametrize(
    "mask", [GMT(keep_ratio=0.2, where=("blocks",), strict=True), ChildTuning(mode="free", p=0.2, strict=True)]
)
def test_strict_weights_stand_still_under_prior_decay_wherever_it_is_written(mask: Ingredient) -> None:
    ends = []
    for order in ([PriorDecay(weight_decay=5.0), mask], [mask, PriorDecay(weight_decay=5.0)]):
        model, name = tiny("bert"), "bert.encoder.layer.1.output.dense.weight"
        run = begin(model, order, learning_rate=1e-2, steps=3)
        for number in range(3):
            before = weights(model)[name]
            run.offer(run.closure(batch(number)))
            run.step()
            share = (weights(model)[name] != before).float().mean().item()
            assert share == pytest.approx(0.2, abs=0.07)  # 512 entries: F's share has standard deviation .018
        ends.append(weights(model)[name])
    assert torch.equal(*ends)


def test_strict_undoes_what_any_hook_before_the_step_does_and_the_mask_keeps_its_turn() -> None:
    # The hook before it sees the whole gradient and moves the weight by 5; the one after it puts 9 into every gradient.
    weight, seen = nn.Parameter(torch.zeros(4)), []

    def first(*given: Any) -> None:
        seen.append(weight.grad.tolist())
        weight.data.add_(5.0)

    def last(*given: Any) -> None:
        weight.grad.fill_(9.0)

    optimizer = SGD([{"params": [weight], "names": ("w",)}], lr=1.0)
    optimizer.register_step_pre_hook(first)
    masked(optimizer, {"w"}, lambda name, gradient: largest(gradient, 0.5))
    optimizer.register_step_pre_hook(last)
    for _ in range(2):  # the second time into the same copy
        with torch.no_grad():
            weight.zero_()
        weight.grad = torch.tensor([0.1, -0.5, 0.2, 0.05])
        optimizer.step()
        assert weight.tolist() == [0.0, 5.0 - 9.0, 5.0 - 9.0, 0.0]
    assert seen[0] == pytest.approx([0.1, -0.5, 0.2, 0.05])


def test_frozen_weights_and_weights_without_a_gradient_are_left_alone() -> None:
    model = tiny("bert")
    before = weights(model)
    train(begin(model, [Freeze(keep=("head",)), GMT(keep_ratio=0.5)], learning_rate=1e-2, steps=2))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    sleeping = nn.Parameter(torch.ones(3))
    optimizer = SGD([{"params": [sleeping], "names": ("w",)}], lr=1.0, weight_decay=0.5)
    masked(optimizer, {"w"}, lambda name, gradient: largest(gradient, 0.5))
    optimizer.step()
    assert sleeping.tolist() == [1.0, 1.0, 1.0]


def test_an_optimizer_that_lost_the_names_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = masked(SGD([weight], lr=0.1), {"w"}, lambda name, gradient: gradient > 0)
    with pytest.raises(RecipeError, match="must name the weights"):
        optimizer.step()
