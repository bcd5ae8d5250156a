"""FreeLB: the path and its mean by hand, the authors' accumulated gradient, one dropout for all passes, padding left alone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.claims import Place, needs, wraps
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.ingredient import Ingredient
from luthier.errors import ConflictError, ModelError, RecipeError
from luthier.ingredients.losses.freelb import FreeLB, begun, climbed, held, sizes
from luthier.ingredients.losses.r_drop import RDrop
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.neftune import NEFTune
from luthier.run import begin
from tests.processes import parallel, process
from tests.tiny import FAMILIES, tiny


class Toy(nn.Module):
    """w times the sum of the row's embeddings, which are numbers."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 1, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.float64)])
        nn.init.constant_(self.words.weight, 1.0)
        nn.init.constant_(self.blocks[0].weight, w)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](self.words(tokens).sum(1))
        return out


def mean(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch["input_ids"]).mean()
    return out


def own(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def context(free: FreeLB, *, step: int = 0, part: int = 0) -> Context:
    parts: Any = None  # FreeLB does not read the model's parts
    return Context(parts, Progress(9, step, part), 0, "train/freelb", free.touches(), Shelf(), [])


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "attention_mask": torch.tensor(
            [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
        ),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


ROWS = {"input_ids": torch.tensor([[4], [5]])}


# By hand


def test_the_mean_loss_of_a_straight_slope() -> None:
    # Each row's output is 3 e, its slope goes up: delta is 0, 1/4 and 1/2, the losses are 3, 3 3/4 and 4 1/2. The gradient at w
    # is the mean of e + delta, 1 1/4; at each of two embeddings half of 3.
    free, model = FreeLB(passes=3, rate=0.25, radius=None, start=0.0), Toy(3.0)
    loss = free.loss(mean, context(free))(model, ROWS)
    loss.backward()
    assert loss.item() == 3.75
    assert model.blocks[0].weight.grad.item() == 1.25  # type: ignore[union-attr, operator]
    assert model.words.weight.grad is not None
    assert model.words.weight.grad[4:6, 0].tolist() == [1.5, 1.5]


def test_the_ball_ends_the_path() -> None:
    # delta is 0, 1/4 and 3/8: losses 3, 3 3/4 and 4 1/8, their mean 3.625.
    free = FreeLB(passes=3, rate=0.25, radius=0.375, start=0.0)
    assert free.loss(mean, context(free))(Toy(3.0), ROWS).item() == 3.625


def test_padding_takes_no_part_in_the_step_although_it_has_a_gradient() -> None:
    # Both tokens have the slope 3, the second is padding: the whole 1/4 goes to the first. Losses 6 and 6 3/4.
    free = FreeLB(passes=2, rate=0.25, radius=None, start=0.0)
    rows = {"input_ids": torch.tensor([[4, 5]]), "attention_mask": torch.tensor([[1, 0]])}
    assert free.loss(mean, context(free))(Toy(3.0), rows).item() == 6.375


def test_a_start_that_reaches_beyond_the_ball_is_held_in_it() -> None:
    # The one number of a row is drawn from (-8, 8) and then cut to 1/2 on its side: the loss 3 (1 +- 1/2).
    free = FreeLB(passes=1, radius=0.5, start=8.0)
    rows = {"input_ids": torch.tensor([[4]])}
    found = {free.loss(mean, context(free, step=step))(Toy(3.0), rows).item() for step in range(9)}
    assert {1.5, 4.5} <= found
    assert all(1.5 <= loss <= 4.5 for loss in found)


def test_a_row_is_shortened_to_the_radius_and_a_step_has_the_length_of_the_rate() -> None:
    # The first row has the norm 5 and is halved to 2.5; the second is shorter.
    delta = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert sizes(delta).flatten().tolist() == [5.0, 1.0]
    assert held(delta, 2.5).tolist() == [[[1.5, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]]
    # From zero along (3, 4) / 5 by 10, and nowhere without a gradient.
    moved = climbed(torch.zeros(2, 2, 2), torch.stack([delta[0], torch.zeros(2, 2)]), rate=10.0, radius=None)
    assert moved.tolist() == [[[6.0, 0.0], [0.0, 8.0]], [[0.0, 0.0], [0.0, 0.0]]]


# Identity


@pytest.mark.parametrize("neutral", [FreeLB(radius=0.0), FreeLB(start=0.0, rate=0.0), FreeLB(start=0.0, passes=1)])
def test_where_every_perturbation_is_zero_the_loss_is_the_inner_loss_itself(neutral: FreeLB) -> None:
    assert neutral.loss(mean, context(neutral)) is mean


def test_a_perturbation_that_is_lost_in_rounding_leaves_the_loss_and_what_is_drawn_after_it() -> None:
    # 1e-30 is lost in every embedding, so the passes are one pass when they have the same dropout.
    model = tiny("bert", dropout=0.5).train()
    free = FreeLB(passes=2, rate=0.0, start=1e-30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, after = own(model, batch(0)), torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(free.loss(own, context(free))(model, batch(0)), plain)  # (x + x) / 2
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("noise", [NEFTune(alpha=20.0), Mixout(p=0.5)], ids=["neftune", "mixout"])
def test_its_passes_have_the_noise_of_what_has_a_stream_of_its_own(noise: Ingredient) -> None:
    losses = []
    for others in ([FreeLB(passes=2, rate=0.0, start=1e-30)], []):
        run = begin(tiny("bert"), [noise, *others], steps=1)
        with torch.no_grad():
            for name, weight in run.model.named_parameters():
                if "parametrizations" in name:
                    weight.add_(0.3)  # away from where mixout puts it back
        losses.append(run.loss(run.forward, batch(0)))
    assert torch.equal(*losses)


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 2.0), st.floats(1e-2, 1.0))
def test_the_path_stays_in_the_ball_and_no_step_is_longer_than_the_rate(seed: int, rate: float, radius: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    delta = held(torch.randn(2, 3, 4, generator=draw, dtype=torch.float64), radius)
    gradient = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    moved = climbed(delta, gradient, rate=rate, radius=radius)
    assert sizes(moved).max().item() <= radius * (1 + 1e-12)
    assert sizes(moved - delta).max().item() <= rate * (1 + 1e-12)  # going back into a ball makes no way longer
    free = climbed(delta, gradient, rate=rate, radius=None)
    assert sizes(free - delta).flatten().tolist() == pytest.approx([rate, rate], rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(1e-3, 2.0))
def test_the_start_is_inside_its_reach_at_real_tokens_only(seed: int, lengths: list[int], start: float) -> None:
    mask = torch.stack([(torch.arange(6) < length).double() for length in lengths]).unsqueeze(-1)
    draw = torch.Generator().manual_seed(seed)
    delta = begun(torch.zeros(len(lengths), 6, 8, dtype=torch.float64), mask, start=start, draw=draw)
    assert not delta[(mask == 0).expand_as(delta)].any()
    assert sizes(delta).max().item() <= start


def test_the_start_has_three_fifths_of_its_reach() -> None:
    # A number of U(-1, 1) has the mean square 1/3, so a row has start / sqrt(3) = 0.577 start; of 32 x 64 x 8 numbers to 1
    # percent, whatever the rows' lengths.
    mask = (torch.arange(64) < torch.arange(33, 65).unsqueeze(1)).double().unsqueeze(-1)
    draw = torch.Generator().manual_seed(0)
    delta = begun(torch.zeros(32, 64, 8, dtype=torch.float64), mask, start=2.0, draw=draw)
    assert sizes(delta).mean().item() == pytest.approx(2 / 3**0.5, rel=0.02)


# Parity


def test_the_gradient_is_what_the_authors_accumulate() -> None:
    # Written out as in their script: inputs_embeds, a backward pass of loss / K for weights and delta in each of K passes.
    model, rows = tiny("bert").double(), batch(0)
    theirs = copy.deepcopy(model)
    free = FreeLB(passes=3, rate=0.3, radius=0.5, start=0.4)
    ctx = context(free)
    loss = free.loss(own, ctx)(model, rows)
    loss.backward()

    real = rows["attention_mask"].double()
    uniform = torch.empty(4, 6, 16, dtype=torch.float64).uniform_(-1, 1, generator=ctx.rng("start", 0, 0))
    delta = uniform * real.unsqueeze(2) * (0.4 / torch.sqrt(real.sum(1) * 16)).view(-1, 1, 1)
    total = 0.0
    for number in range(3):
        delta = delta.detach().requires_grad_()
        words = theirs.get_input_embeddings()(rows["input_ids"])
        part = (
            theirs(inputs_embeds=words + delta, attention_mask=rows["attention_mask"], labels=rows["labels"]).loss / 3
        )
        total += part.item()
        part.backward()
        if number < 2:
            assert delta.grad is not None
            way = delta.grad / delta.grad.flatten(1).norm(dim=1).clamp(min=1e-8).view(-1, 1, 1)
            delta = (delta + 0.3 * way).detach()
            size = delta.flatten(1).norm(dim=1)
            delta = delta * torch.where(size > 0.5, 0.5 / size, torch.ones_like(size)).view(-1, 1, 1)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    expected = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        # Sums in another order; a rounding of 1e-16 in a small gradient's direction grows to about 1e-13.
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-9, atol=1e-12)


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(FreeLB())
    check_ingredient(FreeLB(passes=1, start=0.5, radius=None))


def test_it_claims_the_loss_and_needs_gradients_so_that_mezo_is_refused() -> None:
    assert FreeLB().touches() == (wraps(Place.LOSS), needs(Place.GRADIENT))
    with pytest.raises(ConflictError, match="freelb"):
        begin(tiny("bert"), [FreeLB(), MeZO()], steps=1)


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        FreeLB(passes=0, rate=-1.0, radius=-0.5)
    assert {fault.where for fault in told.value.faults} == {"freelb.passes", "freelb.rate", "freelb.radius"}


def test_a_model_without_named_embeddings_is_refused_before_the_first_step() -> None:
    class Plain(Toy):
        get_input_embeddings = None  # type: ignore[assignment]

    family = Family(blocks="blocks", embeddings=("words",))
    with pytest.raises(ModelError, match="get_input_embeddings"):
        begin(Plain(1.0), [FreeLB()], steps=1, loss=mean, family=family)
    begin(Plain(1.0), [FreeLB(radius=0.0)], steps=1, loss=mean, family=family)


# It matters


def passes(model: nn.Module, free: FreeLB, *, step: int = 0, part: int = 0) -> list[Tensor]:
    """What each forward pass has after its word embeddings, less what it has without a perturbation."""
    body, seen = model.get_submodule("bert.embeddings.LayerNorm"), []
    handle = body.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    own(model, batch(0))
    free.loss(own, context(free, step=step, part=part))(model, batch(0))
    handle.remove()
    return [one - seen[0] for one in seen[1:]]


def test_only_real_tokens_are_perturbed_and_each_step_has_the_length_of_the_rate() -> None:
    model, real = tiny("bert").double(), batch(0)["attention_mask"].bool()
    found = passes(model, FreeLB(passes=4, rate=0.1, radius=None, start=0.5))
    assert len(found) == 4
    assert all(not delta[~real].any() and delta[real].any() for delta in found)
    ways = [sizes(after - before).flatten() for before, after in itertools.pairwise(found)]
    for way in ways:
        torch.testing.assert_close(way, torch.full_like(way, 0.1), rtol=1e-9, atol=0)


def test_the_loss_climbs_along_the_path() -> None:
    model, losses = tiny("bert").double(), []

    def heard(live: nn.Module, rows: Any) -> Tensor:
        losses.append(own(live, rows))
        return losses[-1]

    free = FreeLB(passes=3, rate=0.2, radius=0.5, start=0.5)
    free.loss(heard, context(free))(model, batch(0))
    assert losses[0] < losses[1] < losses[2]


def test_the_start_differs_between_steps_and_micro_batches_and_is_the_same_in_the_same() -> None:
    model = tiny("bert").double()
    starts = [passes(model, FreeLB(), step=step, part=part)[0] for step, part in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[3])


def test_each_process_has_a_start_of_its_own() -> None:

    model = tiny("bert").double()
    starts = [passes(model, FreeLB())[0]]
    for rank in (0, 1):
        with process(rank, of=2):
            starts.append(passes(model, FreeLB())[0])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_perturbed(family: str) -> None:
    model = tiny(family)
    rows = batch(0)
    if family == "t5":  # a class for each token
        rows = {**rows, "labels": rows["input_ids"] % 3}
    free = FreeLB(start=0.5)
    with torch.no_grad():
        found = free.loss(own, context(free))(model, rows)
        assert not found.requires_grad
        assert found.item() != own(model, rows).item()


def test_around_r_drop_both_of_its_passes_are_perturbed_and_their_dropout_differs() -> None:
    model = tiny("bert", dropout=0.5)
    run = begin(model, [RDrop(alpha=1.0), FreeLB(passes=2)], steps=1)
    said: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, given, out: said.append(out.logits.detach()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run.loss(model, batch(0)).backward()
    handle.remove()
    assert len(said) == 4
    assert all(not torch.equal(said[one], said[other]) for one in range(4) for other in range(one))


def test_in_data_parallel_the_gradient_is_that_of_the_plain_model() -> None:

    free = FreeLB()
    plain, model = tiny("bert", dropout=0.5).train(), tiny("bert", dropout=0.5).train()
    loss = free.loss(own, context(free))
    with process():
        with torch.random.fork_rng():
            for live in (plain, parallel(model)):
                torch.manual_seed(3)
                loss(live, batch(0)).backward()
    expected = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad)


def test_in_a_run_the_perturbation_reaches_the_loss_through_frozen_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two of three blocks are frozen: their outputs would be computed once and put in the place of what was perturbed.
    import luthier
    from luthier.recipe import registry
    from tests.little import model, recipe, same, sentences, weights

    monkeypatch.setitem(registry.INGREDIENTS, "freelb", "luthier.ingredients.losses.freelb:FreeLB")
    ends = []
    for number, radius in enumerate((0.0, 0.6)):
        made = recipe([{"freeze": {"keep": ["top:1", "head"]}}, {"freelb": {"radius": radius}}], steps=16)
        luthier.fit(made, model=model(tmp_path / "model"), data=sentences(), out=tmp_path / f"run{number}")
        ends.append(weights(tmp_path / f"run{number}"))
    assert not same(*ends)
