"""R-Drop: the disagreement by hand, two masks that are not the same and can be had again, and both passes' gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs, voids, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context, Progress, Shelf
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.losses.r_drop import RDrop, disagreement
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.quick import QuickRandom, quicken
from luthier.run import Run, begin
from tests.processes import parallel, process
from tests.tiny import tiny


def context(step: int = 0) -> Context:
    parts: Any = None  # R-Drop does not read the model's parts
    return Context(parts, Progress(9, step), 0, "train/r_drop", RDrop().touches(), Shelf(), [])


class Says(nn.Module):
    """Gives its rows of logits one after the other, a forward pass each."""

    def __init__(self, *logits: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.tensor(one, dtype=torch.float64)) for one in logits)
        self.passes = 0

    def forward(self) -> Tensor:
        said: Tensor = self.rows[self.passes % len(self.rows)]
        self.passes += 1
        return said


def surely(model: nn.Module, batch: Any) -> Tensor:
    """The mean cross-entropy of class 0."""
    logits: Tensor = model()
    return -logits.log_softmax(-1)[:, 0].mean()


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        run.loss(run.forward, batch(step)).backward()
        run.step()


# By hand


def test_one_half_against_three_quarters_is_an_eighth_of_the_logarithm_of_three() -> None:
    # p1 = (1/2, 1/2), p2 = (3/4, 1/4). The sum of (p1 - p2)(log p1 - log p2) is
    # (-1/4) log(2/3) + (1/4) log 2 = (1/4) log 3; half of it is (1/8) log 3. The second row agrees: half of that again.
    first = torch.tensor([[0.0, 0.0], [5.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[math.log(3), 0.0], [5.0, 1.0]], dtype=torch.float64)
    assert disagreement(first[:1], second[:1]).item() == pytest.approx(math.log(3) / 8, rel=1e-14)
    assert disagreement(first, second).item() == pytest.approx(math.log(3) / 16, rel=1e-14)


def test_a_single_output_is_compared_by_its_square() -> None:
    # Differences 1 and 3: (1 + 9) / 2. A softmax of one class is 1 whatever its logit, and would see nothing.
    assert disagreement(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [5.0]])).item() == 5.0


def test_the_loss_is_the_mean_of_two_and_alpha_times_how_they_disagree() -> None:
    # The losses are log 2 and log 4/3, their mean log(8/3) / 2; and alpha 4 times (1/8) log 3 is (1/2) log 3.
    # Together half of log(8/3 x 3) = log(8) / 2.
    model = Says([[0.0, 0.0]], [[math.log(3), 0.0]])
    loss = RDrop(alpha=4.0).loss(surely, context())(model, None)
    assert model.passes == 2
    assert loss.item() == pytest.approx(math.log(8) / 2, rel=1e-14)


# Identity


def test_at_alpha_zero_the_loss_is_the_inner_loss_itself() -> None:
    assert RDrop(alpha=0.0).loss(surely, context()) is surely


def test_at_alpha_zero_training_is_the_same_bit_for_bit() -> None:
    dropped, plain = tiny("bert", dropout=0.1), tiny("bert", dropout=0.1)
    with torch.random.fork_rng():
        train(begin(dropped, [RDrop(alpha=0.0)], learning_rate=1e-2, steps=3), 0, 3)
        train(begin(plain, [], learning_rate=1e-2, steps=3), 0, 3)
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in dropped.state_dict().items())


def test_without_dropout_the_loss_and_its_gradient_are_the_inner_ones_and_it_is_told() -> None:
    dropped, plain = tiny("bert"), tiny("bert")
    run, free = begin(dropped, [RDrop(alpha=3.0)], steps=1), begin(plain, [], steps=1)
    loss, alone = run.loss(dropped, batch(0)), free.loss(plain, batch(0))
    loss.backward()
    alone.backward()
    assert loss.item() == alone.item()  # (x + x) / 2 is x, and the disagreement of equal logits is 0
    expected = dict(plain.named_parameters())
    for name, weight in dropped.named_parameters():
        # Two halves of one gradient, added; each product is rounded on its own.
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-5, atol=1e-7)
    assert any("no dropout" in note for note in run.notes)


# Invariants

LOGITS = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(-5, 5), st.integers(0, 9))
def test_it_is_symmetric_never_negative_and_blind_to_a_shift(rows: list[list[float]], by: float, seed: int) -> None:
    first = torch.tensor(rows, dtype=torch.float64)
    second = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = disagreement(first, second)
    assert found.item() >= 0.0
    assert found.item() == pytest.approx(disagreement(second, first).item(), rel=1e-12)
    # A logit of 30 has 2e-15 of rounding, times a difference of probabilities below one.
    assert found.item() == pytest.approx(disagreement(first + by, second).item(), rel=1e-9, abs=1e-12)
    assert disagreement(first, first).item() == 0.0


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    one, other = torch.tensor([[8.0, 0.0]]), torch.tensor([[7.0, 0.0]])  # both exact in bf16
    found = disagreement(one.bfloat16(), other.bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == disagreement(one, other).item()


# Parity


def test_it_is_half_the_two_divergences_of_torch() -> None:
    # Double precision: torch subtracts entropies where we multiply differences, a few roundings of 1e-16 apart.
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(8, 5, generator=draw, dtype=torch.float64)
    second = torch.randn(8, 5, generator=draw, dtype=torch.float64)
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    theirs = F.kl_div(one, other, reduction="batchmean", log_target=True)
    theirs = (theirs + F.kl_div(other, one, reduction="batchmean", log_target=True)) / 2
    torch.testing.assert_close(disagreement(first, second), theirs, rtol=1e-13, atol=0)


def test_with_a_quarter_of_the_rows_as_alpha_it_is_half_of_the_authors_formula() -> None:
    # CE1 + CE2 + (the sum over all rows and classes of both divergences) / 4, as in their model for GLUE.
    draw = torch.Generator().manual_seed(1)
    first, second = (torch.randn(16, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    model = Says(first.tolist(), second.tolist())
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    both = F.kl_div(one, other.exp(), reduction="sum") + F.kl_div(other, one.exp(), reduction="sum")
    theirs = -one[:, 0].mean() - other[:, 0].mean() + both / 4
    ours = RDrop(alpha=16 / 4).loss(surely, context())(model, None)
    torch.testing.assert_close(2 * ours, theirs, rtol=1e-13, atol=0)


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(RDrop(alpha=2.0))


def test_it_claims_the_loss_and_needs_noise_so_that_mezo_is_refused() -> None:
    assert RDrop().touches() == (wraps(Place.LOSS), needs(Place.NOISE))
    assert voids(Place.NOISE) in MeZO().touches()
    with pytest.raises(ConflictError, match="r_drop"):
        begin(tiny("bert"), [RDrop(), MeZO()], steps=1)


@pytest.mark.parametrize("alpha", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(RecipeError, match=r"r_drop\.alpha"):
        RDrop(alpha=alpha)


# It matters


def test_both_passes_have_gradients_from_their_loss_and_from_the_disagreement() -> None:
    # The first pass says (1/2, 1/2), the second (3/4, 1/4). d loss / d z1 of class 0 is half of (1/2 - 1) from the
    # cross-entropy, and alpha = 2 times half of d/dz [(p1 - q)(log p1 - log q) over both classes]. For two classes that
    # sum is (p - q)(z - log 3) with z the difference of the logits; its slope at z = 0, p' = p (1 - p) = 1/4, is
    # (1/4)(0 - log 3) + (1/2 - 3/4) = -(1 + log 3) / 4. By symmetry q' = 3/16 gives (3/16)(log 3) + 1/4 for the second,
    # whose own loss has 3/4 - 1.
    model = Says([[0.0, 0.0]], [[math.log(3), 0.0]])
    RDrop(alpha=2.0).loss(surely, context())(model, None).backward()
    first, second = (row.grad for row in model.rows)
    assert first is not None
    assert second is not None
    assert first[0, 0].item() == pytest.approx(-1 / 4 - (1 + math.log(3)) / 4, rel=1e-14)
    assert second[0, 0].item() == pytest.approx(-1 / 8 + 3 * math.log(3) / 16 + 1 / 4, rel=1e-14)


@pytest.mark.parametrize("quick", [False, True], ids=["torch's dropout", "quick dropout"])
def test_the_two_masks_differ_and_a_step_that_is_evaluated_again_has_the_same_two(quick: bool) -> None:
    model = tiny("bert", dropout=0.5)
    run = begin(model, [RDrop(alpha=1.0)], steps=4)
    random = QuickRandom(0)
    handle = quicken(model, random) if quick else None
    seen: list[Tensor] = []
    listen = model.register_forward_hook(lambda module, given, out: seen.append(out.logits.detach()))
    losses = []
    with torch.random.fork_rng():
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            random.reseed(seed)
            losses.append(run.loss(model, batch(0)).item())
    listen.remove()
    if handle is not None:
        handle.remove()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert losses[0] == losses[1] != losses[2]


@ingredient
class Thrice(Ingredient):
    """A loss of three forward passes, as adversarial methods make them."""

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.LOSS),)

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        return lambda model, batch: sum(inner(model, batch) for _ in range(3)) / 3  # type: ignore[return-value]


def test_around_a_loss_of_several_passes_the_first_of_each_are_compared() -> None:
    # Six passes; the losses are all log 2 but for the fourth, log 4/3: the means are log 2 and (2 log 2 + log 4/3) / 3.
    half, sure = [[0.0, 0.0]], [[math.log(3), 0.0]]
    model = Says(half, half, half, sure, half, half)
    loss = RDrop(alpha=8.0).loss(Thrice().loss(surely, context()), context())(model, None)
    mean = (math.log(2) + (2 * math.log(2) + math.log(4 / 3)) / 3) / 2
    assert loss.item() == pytest.approx(mean + math.log(3), rel=1e-14)


def test_in_data_parallel_the_gradient_is_that_of_the_plain_model() -> None:

    with process():
        model, plain = tiny("bert", dropout=0.5).train(), tiny("bert", dropout=0.5).train()
        wrapped = parallel(model)
        loss = RDrop(alpha=2.0).loss(lambda live, rows: live(**rows).loss, context())
        with torch.random.fork_rng():
            for live in (wrapped, plain):
                torch.manual_seed(3)
                loss(live, batch(0)).backward()
    expected = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad)
