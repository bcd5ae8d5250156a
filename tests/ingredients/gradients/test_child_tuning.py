"""child_tuning: Fisher information by hand, masks of exactly the share asked for in every family, and what stands still."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, scales, wraps
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.masks import largest
from luthier.core.table import ParamTable
from luthier.errors import ConflictError, RecipeError, RunError
from luthier.ingredients.gradients.child_tuning import ChildTuning, cut, drawn, fisher
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.gradients.gmt import GMT
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.mixout import Mixout
from luthier.placement import Placement
from luthier.run import Run, begin, own_loss
from luthier.testing import check_ingredient
from luthier.training import stages
from luthier.training.job import prepare
from tests.little import recipe, sentences
from tests.tiny import FAMILIES, tiny


@ingredient
class PlainSGD(Ingredient):
    """Plain gradient descent, whose step shows the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


@ingredient
class Sleep(Ingredient):
    """The uppermost block learns only in the second half of the stage."""

    def touches(self) -> tuple[Claim, ...]:
        return (scales(Place.TRAINABLE),)

    def settings(self, table: ParamTable) -> ParamTable:
        return table.sleep(lambda row: ((0.0, 0.5),) if row.part.depth == 3 else ())


def batch(number: int, rows: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {
        "input_ids": torch.randint(3, 64, (rows, 6), generator=draw),
        "labels": torch.randint(0, 3, (rows,), generator=draw),
    }


SAMPLE = [batch(90), batch(91)]


def train(run: Run, first: int = 0, last: int = 3, parts: int = 1) -> None:
    for number in range(first, last):
        whole = batch(number)
        run.offer(run.closure(*({name: value[at::parts] for name, value in whole.items()} for at in range(parts))))
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def masks(run: Run) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = run.state_dict()["shelf"]["train/child_tuning/masks"]
    return kept


def squared(model: nn.Module, rows: Mapping[str, Any]) -> Tensor:
    error = model(rows["x"]).flatten() - rows["labels"]
    return error.square().mean() / 2


# By hand


def test_the_fisher_information_of_two_rows_is_the_mean_of_squares_and_of_a_batch_the_square_of_the_mean() -> None:
    # w = 1; rows (x, y) = (1, 0) and (2, 1): errors 1 and 1, gradients (w x - y) x = 1 and 2.
    # By row (1 + 4) / 2 = 2.5; as one batch ((1 + 2) / 2)^2 = 2.25.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    rows = {"x": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([0.0, 1.0])}
    asked = {"weight": model.weight}
    one, other = cut([rows], 2, single=True)
    assert fisher(model, asked, [[one], [other]], squared)["weight"].item() == 2.5
    assert fisher(model, asked, [[rows]], squared)["weight"].item() == 2.25


def test_the_parts_of_a_batch_count_by_their_rows_before_the_square_is_taken() -> None:
    # Errors 1, 1, 1 at x = 1, 2, 6: gradients 1, 2, 6, whose mean is 3. By part 1.5 and 6: 2/3 x 1.5 + 1/3 x 6 = 3, and 9 its square.
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    two = {"x": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([0.0, 1.0])}
    one = {"x": torch.tensor([[6.0]]), "labels": torch.tensor([5.0])}
    assert fisher(model, {"weight": model.weight}, [[two, one]], squared)["weight"].item() == pytest.approx(9.0)


def test_the_largest_are_taken_over_all_tensors_together() -> None:
    # Of .1 .5 | .2 .05 .4 the two largest are .5 and .4.
    found = largest({"a": torch.tensor([0.1, 0.5]), "b": torch.tensor([0.2, 0.05, 0.4])}, 2)
    assert {name: mask.tolist() for name, mask in found.items()} == {"a": [False, True], "b": [False, False, True]}


def test_many_equal_entries_do_not_make_the_mask_all_true_the_first_of_them_are_taken() -> None:
    # One entry is not zero; of the five zeros the first two fill up to three.
    found = largest({"a": torch.tensor([[0.0, 0.0], [0.0, 2.0]]), "b": torch.zeros(2)}, 3)
    assert found["a"].tolist() == [[True, True], [False, True]]
    assert found["b"].tolist() == [False, False]


def test_only_the_rows_asked_for_are_looked_at() -> None:
    rows = {"x": torch.arange(4.0), "labels": torch.zeros(4), "scale": torch.tensor(2.0), "name": "text"}
    pieces = list(cut([rows, rows], 6, single=False))
    assert [piece["x"].tolist() for piece in pieces] == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0]]
    assert all(piece["scale"] == 2.0 and piece["name"] == "text" for piece in pieces)
    assert [piece["x"].tolist() for piece in cut([rows], 3, single=True)] == [[0.0], [1.0], [2.0]]


# Identity


@pytest.mark.parametrize("mode", ["free", "data"])
def test_a_share_of_one_changes_nothing_bit_for_bit(mode: Any) -> None:
    one, other = tiny("bert"), tiny("bert")
    train(begin(one, [ChildTuning(mode=mode, p=1.0)], learning_rate=1e-2, steps=3))
    train(begin(other, [], learning_rate=1e-2, steps=3))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


# Invariants


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, 1e30]), max_size=6), min_size=1, max_size=4),
    st.data(),
)
def test_exactly_as_many_as_asked_are_true_and_none_is_smaller_than_one_that_is_false(
    values: list[list[float]], data: st.DataObject
) -> None:
    tensors = {str(at): torch.tensor(value) for at, value in enumerate(values)}
    count = data.draw(st.integers(0, sum(len(value) for value in values)))
    found = largest(tensors, count)
    flat, mask = torch.cat(list(tensors.values())), torch.cat(list(found.values()))
    assert int(mask.sum()) == count
    if 0 < count < len(flat):
        assert flat[mask].min() >= flat[~mask].max()


def test_the_masked_gradient_has_the_gradient_as_its_mean_over_masks() -> None:
    # 40000 draws of chance .3: the mean of M / p has standard deviation sqrt(.7 / .3 / 40000) = .0076; four of them are .031.
    mask = drawn(torch.zeros(200, 200), 0.3, torch.Generator().manual_seed(0))
    assert mask.float().mean().item() / 0.3 == pytest.approx(1.0, abs=0.031)


def test_the_masks_of_f_are_new_each_step_and_the_same_for_the_same_step() -> None:
    def moved() -> list[Tensor]:
        model = tiny("bert")
        run = begin(model, [ChildTuning(mode="free", p=0.5), PlainSGD()], learning_rate=0.1, steps=3)
        found, name = [], "bert.encoder.layer.0.output.dense.weight"
        for number in range(3):
            before = weights(model)[name]
            train(run, number, number + 1)
            found.append(weights(model)[name] != before)
        return found

    one, other = moved(), moved()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[1], one[2])


@pytest.mark.parametrize("mode", ["free", "data"])
def test_micro_batches_change_nothing_because_the_mask_is_put_once_a_step(mode: Any) -> None:
    one, other = tiny("bert").double(), tiny("bert").double()
    for model, parts in ((one, 1), (other, 4)):
        run = begin(model, [ChildTuning(mode=mode), PlainSGD()], learning_rate=0.1, steps=3, sample=SAMPLE)
        train(run, parts=parts)
    for name, value in weights(one).items():
        # Sums in another order: some roundings of double precision.
        torch.testing.assert_close(value, weights(other)[name], rtol=1e-9, atol=1e-12)


def test_looking_at_the_data_leaves_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.drop(self.norm(x)))
            return out

    model = Noisy().train()
    model.drop.eval()
    model.norm.bias.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    flags, state = [weight.requires_grad for weight in model.parameters()], torch.random.get_rng_state()
    rows = {"x": torch.arange(12.0).reshape(4, 3), "labels": torch.ones(4)}
    found = fisher(model, {"bias": model.norm.bias}, [[rows]], squared)
    assert found["bias"].abs().sum() > 0  # a weight that is frozen now may learn in the stage
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_that_always_draws_does_not_move_the_global_generator() -> None:
    def noisy(model: nn.Module, rows: Any) -> Tensor:
        return own_loss(model, rows) * (1.0 + torch.rand(()))

    state = torch.random.get_rng_state()
    one = begin(tiny("bert"), [ChildTuning()], steps=1, sample=SAMPLE, loss=noisy)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    other = begin(tiny("bert"), [ChildTuning()], steps=1, sample=SAMPLE, loss=noisy)
    assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(one).items())


# Parity


@pytest.mark.parametrize("by", ["row", "batch"])
def test_the_mask_is_that_of_the_authors_percentile_over_accumulated_squares(by: Any) -> None:
    model, p = tiny("bert"), 0.3
    theirs = {name: torch.zeros_like(weight) for name, weight in model.named_parameters() if "layer." in name}
    single = [{name: value[at : at + 1] for name, value in rows.items()} for rows in SAMPLE for at in range(4)]
    looked = single if by == "row" else SAMPLE
    for rows in looked:
        model.zero_grad()
        own_loss(model, rows).backward()
        for name, weight in model.named_parameters():
            if name in theirs and weight.grad is not None:
                theirs[name] += weight.grad**2 / len(looked)
    model.zero_grad()
    flat = np.concatenate([value.numpy().reshape(-1) for value in theirs.values()])
    polar = np.percentile(flat, (1 - p) * 100)
    ours = masks(begin(model, [ChildTuning(p=p, fisher=by)], steps=1, sample=SAMPLE))
    assert ours.keys() == theirs.keys()
    # The percentile lies between two entries, and the mean is divided at another place: the entries next to it may differ.
    different = sum(int((mask != (theirs[name] >= polar)).sum()) for name, mask in ours.items())
    assert sum(int(mask.sum()) for mask in ours.values()) == round(p * len(flat))
    assert different <= 2


def test_f_gives_the_clipped_gradient_over_p_where_it_gives_any() -> None:
    model, p, rate = tiny("bert").double(), 0.5, 0.1
    before = weights(model)
    values: Any = torch.autograd.grad(own_loss(model, batch(0)), list(model.parameters()))
    gradient = dict(zip(before, values, strict=True))
    norm = torch.stack([value.norm() for value in values]).norm()
    assert norm > 0.01
    free = ChildTuning(mode="free", p=p, where=("all",))
    train(begin(model, [Clip(0.01), free, PlainSGD()], learning_rate=rate, steps=1), 0, 1)
    for name, value in weights(model).items():
        moved = value != before[name]
        expected = before[name] - rate * gradient[name] * 0.01 / (norm + 1e-6) / p
        torch.testing.assert_close(value[moved], expected[moved], rtol=0, atol=1e-14)


# Conformance


@pytest.mark.parametrize(
    "one",
    [
        ChildTuning(),
        ChildTuning(fisher="batch", strict=True),
        ChildTuning("free"),
        ChildTuning("free", 0.9, strict=True),
    ],
)
def test_it_keeps_the_contract(one: ChildTuning) -> None:
    check_ingredient(one)


def test_it_claims_the_gradient_at_its_weights_and_data_only_where_it_looks_at_some() -> None:
    at = (wraps(Place.GRADIENT, "top:1"), owns(Place.GRADIENT, "top:1"), needs(Place.WHOLE_WEIGHTS))
    assert ChildTuning(mode="free", where=("top:1",)).touches() == at
    assert ChildTuning(mode="data", where=("top:1",)).touches() == (*at, needs(Place.SAMPLE))


def test_it_stands_beside_clip_and_neither_beside_another_mask_nor_without_gradients() -> None:
    begin(tiny("bert"), [ChildTuning(), Clip()], steps=1, sample=SAMPLE)
    with pytest.raises(ConflictError, match="child_tuning and gmt cannot share a stage"):
        begin(tiny("bert"), [ChildTuning(), GMT()], steps=1, sample=SAMPLE)
    with pytest.raises(ConflictError, match="mezo does away with the gradient, which child_tuning edits"):
        begin(tiny("bert"), [MeZO(), ChildTuning()], steps=1, sample=SAMPLE)


def test_a_run_that_goes_on_has_the_masks_it_began_with() -> None:
    one = begin(tiny("bert"), [ChildTuning()], learning_rate=1e-2, steps=3, sample=SAMPLE)
    train(one, 0, 1)
    other = begin(tiny("bert", seed=1), [ChildTuning()], learning_rate=1e-2, steps=3, sample=[batch(7)])
    assert any(not torch.equal(mask, masks(other)[name]) for name, mask in masks(one).items())
    other.model.load_state_dict(one.model.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    train(one, 1, 3)
    train(other, 1, 3)
    assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(one).items())
    assert all(torch.equal(value, weights(other.model)[name]) for name, value in weights(one.model).items())


@pytest.mark.parametrize(
    "bad", [{"p": 0.0}, {"p": 1.1}, {"rows": 0}, {"where": ()}, {"mode": "task"}, {"fisher": "one"}]
)
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(bad))):
        ChildTuning(**bad)


def test_d_without_rows_and_with_gradients_that_are_not_numbers_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs training rows"):
        begin(tiny("bert"), [ChildTuning()], steps=1)
    with pytest.raises(RecipeError, match="needs training rows"):
        fisher(tiny("bert"), {}, [], own_loss)
    with pytest.raises(RunError, match="finite"):
        begin(
            tiny("bert"), [ChildTuning()], steps=1, sample=SAMPLE, loss=lambda model, rows: own_loss(model, rows) * float("inf")
        )  # fmt: skip


@pytest.mark.parametrize("rows", [{"x": torch.ones(2), "y": torch.ones(2)}, (torch.ones(2), torch.ones(2))])
def test_batches_without_labels_are_refused(rows: Any) -> None:
    with pytest.raises(RecipeError, match=r"under 'labels'; got (x, y|tuple)\."):
        begin(tiny("bert"), [ChildTuning()], steps=1, sample=[rows])


def test_a_sample_that_can_be_asked_only_once_is_looked_at_whole() -> None:
    whole = masks(begin(tiny("bert"), [ChildTuning()], steps=1, sample=SAMPLE))
    once = masks(begin(tiny("bert"), [ChildTuning()], steps=1, sample=iter(SAMPLE)))
    assert all(torch.equal(mask, once[name]) for name, mask in whole.items())


def test_it_says_what_it_keeps_in_memory() -> None:
    # The head has 16 x 3 + 3 = 51 weights of 4 bytes. A mask is 1 byte each, the copy 4; F and a gradient before the stage 8, and
    # with a second gradient, of a batch's parts so far, 12.
    table = begin(tiny("bert"), [], steps=1).plan.table
    assert ChildTuning("free", where=("head",), strict=True).state_bytes(table) == 51 * 5
    assert ChildTuning("free", where=("head",)).state_bytes(table) == 51
    assert ChildTuning("data", where=("head",)).state_bytes(table) == 51 * 8
    assert ChildTuning("data", where=("head",), fisher="batch").state_bytes(table) == 51 * 12
    assert ChildTuning("data", p=1.0).state_bytes(table) == 0


# In a recipe


def chosen(tiny_model: Any, rows: Any, **stage: Any) -> dict[str, Tensor]:
    """The masks that a stage of a recipe chooses by 32 rows."""
    made = recipe([{"child_tuning": {"rows": 32, **stage.pop("child", {})}}], batch_size=8, **stage)
    job = prepare(made, model=tiny_model, data_source=rows)
    run, _ = stages.attach(job, job.plan.stages[0], job.loaded.model, Placement())
    return {name: mask.clone() for name, mask in run.state_dict()["shelf"]["finetune/child_tuning/masks"].items()}


def sorted_rows() -> dict[str, Any]:
    rows = sentences(100)
    return {"train": rows[:80].sort_values("label"), "validation": rows[80:90], "test": rows[90:]}


def test_the_rows_that_are_looked_at_are_of_all_classes_though_the_file_is_sorted(tiny_model: Any) -> None:
    job = prepare(recipe(["adamw"]), model=tiny_model, data_source=sorted_rows())
    sample = stages.Sample(job, 16, 16, torch.device("cpu"))
    first = next(iter(sample))
    # Of 40 and 40 rows, 16 drawn: 8 expected of each, standard deviation 1.8.
    assert 3 <= int(first["labels"].sum()) <= 13
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(sample, sample, strict=True))
    assert sorted(torch.cat([rows["labels"] for rows in sample]).tolist()) == [0] * 40 + [1] * 40


def test_micro_batches_are_the_same_rows_of_the_same_steps(tiny_model: Any) -> None:
    job = prepare(recipe(["adamw"]), model=tiny_model, data_source=sorted_rows())
    whole, parts = (stages.Sample(job, 16, most, torch.device("cpu")) for most in (16, 5))
    assert (whole.parts, parts.parts) == (1, 4)
    assert [len(rows["labels"]) for rows in parts][:5] == [5, 5, 5, 1, 5]
    assert torch.equal(*(torch.cat([rows["labels"] for rows in one]) for one in (whole, parts)))


@pytest.mark.parametrize("by", ["row", "batch"])
def test_micro_batches_do_not_change_what_is_chosen(tiny_model: Any, by: str) -> None:
    whole = chosen(tiny_model, sorted_rows(), child={"fisher": by})
    parts = chosen(tiny_model, sorted_rows(), child={"fisher": by}, micro_batch=3)
    total = sum(int(mask.sum()) for mask in whole.values())
    different = sum(int((mask & ~parts[name]).sum()) for name, mask in whole.items())
    # Sums in another order, so near the threshold a few may change places; squaring each part's gradient changes hundreds.
    assert different <= total // 500


# It matters


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_share_of_the_blocks_moves_and_everything_else_learns(family: str) -> None:
    model = tiny(family)
    before = weights(model)
    child = ChildTuning(p=0.2, fisher="batch", strict=True)
    sample = [copy.deepcopy(rows) for rows in SAMPLE]
    loss = own_loss if family != "t5" else _tokens
    run = begin(model, [child, AdamW(weight_decay=0.1)], learning_rate=1e-2, steps=2, sample=sample, loss=loss)
    blocks = {part.name for part in run.plan.anatomy.parts if part.role == "block"}
    kept = masks(run)
    assert kept.keys() == blocks
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.2 * sum(mask.numel() for mask in kept.values()))
    train(run, 0, 2)
    for name, value in weights(model).items():
        if name in blocks:  # decay would move all of them
            assert torch.equal(value[~kept[name]], before[name][~kept[name]])
        elif any(part.name == name and part.role == "head" for part in run.plan.anatomy.parts):
            assert not torch.equal(value, before[name])
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items() if name in blocks)


def _tokens(model: nn.Module, rows: Any) -> Tensor:
    logits = model(input_ids=rows["input_ids"]).logits
    return nn.functional.cross_entropy(logits.mean(1), rows["labels"])


def test_without_strict_weight_decay_moves_what_the_mask_leaves_out_by_pure_decay() -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, [ChildTuning(p=0.1), AdamW(weight_decay=0.1)], learning_rate=1e-2, steps=3, sample=SAMPLE)
    kept = masks(run)
    train(run)
    name = "bert.encoder.layer.1.output.dense.weight"
    still = before[name][~kept[name]]
    # No gradient ever came, so each of three steps multiplies by 1 - rate x decay = .999; three roundings in single precision.
    torch.testing.assert_close(weights(model)[name][~kept[name]], still * 0.999**3, rtol=4e-7, atol=0)
    assert not torch.equal(weights(model)[name][~kept[name]], still)


def test_strict_holds_unsampled_weights_still_where_momentum_would_move_them() -> None:
    def moved(strict: bool) -> float:
        model = tiny("bert")
        child, momentum = ChildTuning("free", 0.25, strict=strict), AdamW(weight_decay=0.0)
        run = begin(model, [child, momentum], learning_rate=1e-2, steps=3)
        train(run, 0, 2)
        before = weights(model)
        train(run, 2, 3)
        name = "bert.encoder.layer.1.output.dense.weight"
        return (weights(model)[name] != before[name]).float().mean().item()

    # 512 weights: of chance .25 the share has standard deviation .019. Over three steps 1 - .75^3 = .58 had a gradient.
    assert moved(True) == pytest.approx(0.25, abs=0.08)
    assert moved(False) == pytest.approx(0.58, abs=0.09)


def test_the_share_is_of_what_learns_and_frozen_weights_are_left_alone() -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, [Freeze(keep=("top:1", "head")), ChildTuning(p=0.5)], learning_rate=1e-2, steps=3, sample=SAMPLE)
    kept = masks(run)
    assert all(name.startswith("bert.encoder.layer.2.") for name in kept)
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.5 * sum(mask.numel() for mask in kept.values()))
    train(run)
    assert all(
        torch.equal(value, before[name])
        for name, value in weights(model).items()
        if name not in kept and not name.startswith("classifier")
    )
    assert run.state_dict()["shelf"]["train/child_tuning/fisher"] == {}  # not carried along in every checkpoint


@pytest.mark.parametrize("mode", ["free", "data"])
def test_weights_that_are_asleep_are_left_alone_until_they_wake(mode: Any) -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, [Sleep(), ChildTuning(mode=mode)], learning_rate=1e-2, steps=4, sample=SAMPLE)
    top = [name for name in before if ".layer.2." in name]
    train(run, 0, 2)
    assert all(torch.equal(weights(model)[name], before[name]) for name in top)
    train(run, 2, 4)
    assert any(not torch.equal(weights(model)[name], before[name]) for name in top)


def test_weights_that_were_put_in_or_renamed_before_are_found() -> None:
    adapted = masks(begin(tiny("bert"), [LoRA(r=2), ChildTuning(p=0.5)], steps=1, sample=SAMPLE))
    assert adapted and all("lora_" in name for name in adapted)
    mixed = masks(begin(tiny("bert"), [ChildTuning(p=0.5), Mixout(p=0.1)], steps=1, sample=SAMPLE))
    plain = masks(begin(tiny("bert"), [ChildTuning(p=0.5)], steps=1, sample=SAMPLE))
    assert any(name.endswith("parametrizations.weight.original") for name in mixed)
    same = {name.replace("parametrizations.weight.original", "weight"): mask for name, mask in mixed.items()}
    assert all(torch.equal(mask, same[name]) for name, mask in plain.items())
