"""neftune: in training the embeddings of the words get uniform noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.core.claims import Place, needs
from luthier.core.families import Family
from luthier.errors import ConflictError, ModelError, RecipeError, RunError
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.neftune import NEFTune, noised, tables
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.processes import process
from tests.tiny import FAMILIES, tiny

IDS = torch.arange(3, 35).reshape(4, 8)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1, 2, 0])}
PADDED = {**BATCH, "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4, [1] * 2 + [0] * 6, [1] * 8])}


def attached(model: nn.Module | None = None, *others, steps: int = 4, loss=None, seed: int = 0, **fields) -> Run:
    given = {} if loss is None else {"loss": loss}
    return begin(
        model or tiny("bert"), [NEFTune(**fields), *others], steps=steps, learning_rate=1e-2, seed=seed, **given
    )


def words(run: Run, batch=BATCH) -> Tensor:
    """What the table of words gives inside one evaluation of the loss."""
    found: list[Tensor] = []
    handle = tables(run.model)[-1].register_forward_hook(lambda module, given, out: found.append(out.detach().clone()))
    run.loss(run.forward, batch)
    handle.remove()
    return found[0]


def noise(run: Run, batch=BATCH) -> Tensor:
    return words(run, batch) - tables(run.model)[-1].weight.detach()[batch["input_ids"]]


# By hand


def test_the_noise_is_alpha_over_the_root_of_tokens_times_width() -> None:
    # L = 2, h = 2, alpha = 3: 3 / sqrt(4) = 1.5 times the draws.
    draw = torch.tensor([[[1.0, -1.0], [0.5, 0.0]]], dtype=torch.float64)
    found = noised(torch.ones(1, 2, 2, dtype=torch.float64), draw, 3.0)
    assert found.tolist() == [[[2.5, -0.5], [1.75, 1.0]]]


def test_padding_does_not_count_and_gets_no_noise() -> None:
    # The second row has one token of width 4: 3 / sqrt(4) = 1.5; the first has four: 3 / sqrt(16) = 0.75; the last none.
    tokens = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = noised(torch.zeros(3, 4, 4), torch.ones(3, 4, 4), 3.0, tokens)
    assert found[..., 0].tolist() == [[0.75] * 4, [1.5, 0.0, 0.0, 0.0], [0.0] * 4]


# Identity


def test_at_alpha_zero_no_bit_of_the_training_changes() -> None:
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [NEFTune(alpha=0.0)]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=2)
        for _ in range(2):
            run.offer(run.closure(BATCH))
            run.step()
        run.finish()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_in_eval_mode_and_after_the_stage_there_is_no_noise() -> None:
    run = attached(alpha=50.0)
    plain = tiny("bert")(**BATCH).logits
    run.model.eval()
    assert torch.equal(run.model(**BATCH).logits, plain)
    run.train()
    assert not torch.equal(run.model(**BATCH).logits, plain)
    assert torch.equal(run.closure(BATCH).loss(noise=False), tiny("bert")(**BATCH).loss)
    run.finish()
    run.model.train()
    assert torch.equal(run.model(**BATCH).logits, plain)  # this model has no dropout
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in run.model.modules())


# Invariants


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(0.1, 50.0))
def test_noise_stays_within_its_bound_and_its_mean_square_length_is_a_third_of_alpha_squared(
    seed, count, alpha
) -> None:
    draw = torch.empty(1, 7, 64, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    tokens = (torch.arange(7) < count).long()[None]
    found = noised(torch.zeros(1, 7, 64, dtype=torch.float64), draw, alpha, tokens)
    assert found.abs().max() <= alpha / math.sqrt(64 * count)
    # The sum of squares is alpha^2 times the mean of u^2 over the tokens: exactly, whatever was drawn.
    assert float(found.square().sum()) == pytest.approx(alpha**2 * float(draw[:, :count].square().mean()), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 6))
def test_padding_changes_nothing_for_the_tokens(seed, padding) -> None:
    draw = torch.Generator().manual_seed(seed)
    embedded, uniform = torch.rand(2, 5 + padding, 8, generator=draw), torch.rand(2, 5 + padding, 8, generator=draw)
    tokens = (torch.arange(5 + padding) < 5).long().expand(2, -1)
    alone = noised(embedded[:, :5], uniform[:, :5], 5.0)
    assert torch.equal(noised(embedded, uniform, 5.0, tokens)[:, :5], alone)


def test_the_draws_are_uniform_between_minus_one_and_one() -> None:
    """4 x 8 x 16 draws a step, 20 steps: 10240; u^2 has mean 1/3 and deviation sqrt(4/45) = 0.298."""
    run = attached(alpha=math.sqrt(8 * 16))  # so that the noise is u itself
    drawn = []
    for step in range(20):
        run.progress.step = step
        drawn.append(noise(run))
    u = torch.cat(drawn)
    assert u.abs().max() <= 1 + 1e-6  # the noise is read off a sum, which rounds
    assert u.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(3 * 10240))
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=4 * 0.298 / math.sqrt(10240))


def test_half_precision_noise_is_single_precision_noise_rounded() -> None:
    draw = torch.empty(2, 8, 16).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    embedded = torch.zeros(2, 8, 16, dtype=torch.bfloat16)
    found = noised(embedded, draw, 5.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, noised(embedded.float(), draw, 5.0).bfloat16())


# Parity


def test_without_padding_it_is_the_hook_of_transformers() -> None:
    # Theirs draws in [-b, b), ours in [-1, 1) times b, from the same generator: a rounding apart, in single precision.
    from transformers.integrations.neftune import neftune_post_forward_hook

    table = nn.Embedding(64, 16).train()
    table.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    embedded = torch.zeros(4, 8, 16)
    draw = torch.empty(4, 8, 16).uniform_(-1, 1, generator=torch.Generator().manual_seed(7))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = neftune_post_forward_hook(table, None, embedded)
    assert theirs.abs().max() > 0.4
    torch.testing.assert_close(noised(embedded, draw, 5.0), theirs, atol=1e-6, rtol=0)


def test_with_padding_it_is_the_authors_formula_row_by_row() -> None:
    draw = torch.Generator().manual_seed(2)
    embedded, u = (torch.rand(4, 8, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    found = noised(embedded, u, 5.0, PADDED["attention_mask"])
    for row, count in enumerate((8, 4, 2, 8)):
        for token in range(8):
            bound = 5.0 / math.sqrt(count * 16) if token < count else 0.0
            torch.testing.assert_close(
                found[row, token], embedded[row, token] + bound * u[row, token], atol=1e-14, rtol=0
            )


# Conformance


def test_it_keeps_the_contract() -> None:
    check_ingredient(NEFTune(alpha=20.0))


def test_it_needs_the_noise_of_the_forward_pass() -> None:
    assert NEFTune().touches() == (needs(Place.NOISE),)
    with pytest.raises(ConflictError, match=r"neftune needs the noise of the forward pass, which mezo does away with"):
        attached(None, MeZO())


def test_bad_values_are_refused() -> None:
    for alpha in (-1.0, math.inf, math.nan):
        with pytest.raises(RecipeError, match=r"neftune\.alpha"):
            NEFTune(alpha=alpha)


def test_names_and_state_are_those_of_the_model_alone() -> None:
    run = attached()
    assert list(run.model.state_dict()) == list(tiny("bert").state_dict())
    assert run.state_dict()["shelf"] == {"train/neftune/noise": {}}


class Silent(nn.Module):
    """A model that cannot say what looks words up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)


class Unsure(Silent):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Silent, Unsure])
def test_a_model_that_cannot_say_what_looks_words_up_is_refused(kind) -> None:
    family = Family(blocks="blocks", head=("head",))
    with pytest.raises(ModelError, match=rf"the model {kind.__name__} .*get_input_embeddings\(\)"):
        begin(kind(), [NEFTune()], steps=1, family=family)
    begin(kind(), [NEFTune(alpha=0.0)], steps=1, family=family)


# It matters


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hears_it_within_its_bound(family) -> None:
    rows = {"input_ids": IDS, "attention_mask": BATCH["attention_mask"]}
    run = attached(tiny(family), loss=lambda model, batch: model(**batch).logits.sum(), alpha=5.0)
    found = noise(run, rows)
    assert 0 < found.abs().max() <= 5 / math.sqrt(8 * found.shape[-1]) * (1 + 1e-5)
    loud = run.model(**rows).logits
    run.model.eval()
    assert not torch.equal(loud, run.model(**rows).logits)


def test_with_adapters_around_the_embeddings_and_the_blocks_it_is_heard_too() -> None:
    pytest.importorskip("peft")
    from luthier.ingredients.modules.lora import LoRA

    model = tiny("bert")
    lora = LoRA(target=("query", "word_embeddings"))
    run = begin(model, [lora, NEFTune()], steps=1, sample=[BATCH])
    wrapper = run.model.get_input_embeddings()
    assert not isinstance(wrapper, nn.Embedding)
    assert tables(run.model) == [wrapper]  # and not what it wraps: that would be noise twice
    found = words(run) - tiny("bert").get_input_embeddings().weight.detach()[IDS]  # a new adapter adds nothing
    assert 0 < found.abs().max() <= 5 / math.sqrt(8 * 16) * (1 + 1e-5)
    run.finish()
    assert list(model.state_dict()) == list(tiny("bert").state_dict())


def test_the_models_own_mask_says_what_is_padding() -> None:
    run = attached(alpha=5.0)
    found = noise(run, PADDED)
    assert torch.equal(found != 0, (PADDED["attention_mask"] == 1)[..., None].expand_as(found))
    for row, count in enumerate((8, 4, 2, 8)):
        bound = 5 / math.sqrt(16 * count)
        assert 0.75 * bound < found[row].abs().max() <= bound * (1 + 1e-5)  # of 32 draws or more
    unmasked = {name: value for name, value in PADDED.items() if name != "attention_mask"}
    assert (noise(run, unmasked) != 0).all()
    noise(run, PADDED)
    table = run.model.get_input_embeddings()
    assert (table(IDS) != table.weight[IDS]).all()  # no mask is left over from the pass before


def test_noise_differs_by_step_micro_batch_pass_and_seed_and_not_by_evaluation() -> None:
    def both(model: nn.Module, batch) -> Tensor:
        return model(**batch).loss + model(**batch).loss

    run = attached(loss=both, alpha=5.0)

    def told() -> list[Tensor]:
        found: list[Tensor] = []
        handle = tables(run.model)[0].register_forward_hook(lambda module, given, out: found.append(out.detach()))
        run.closure(BATCH, BATCH).loss()
        handle.remove()
        return found

    first, again = told(), told()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    run.progress.step += 1
    every = [*first, *told(), words(attached(alpha=5.0, seed=1))]
    assert len({tuple(one.flatten().tolist()) for one in every}) == 9  # 2 steps x 2 parts x 2 passes, and another seed


def test_in_a_loop_of_ones_own_each_pass_sees_other_noise() -> None:
    run = attached(alpha=20.0)
    told = [run.loss(run.model, BATCH).item() for _ in range(3)] + [run.model(**BATCH).loss.item() for _ in range(2)]
    assert len(set(told)) == 5


def test_another_process_draws_other_noise() -> None:

    mine, found = noise(attached()), []
    for rank in (0, 1):
        with process(rank, of=2):
            found.append(noise(attached()))
    assert torch.equal(found[0], mine)
    assert not torch.equal(found[1], mine)


def repeated(how: str) -> dict[str, Tensor]:
    """Gradients of two micro-batches of two passes each, which the backward pass repeats where ``how`` says so."""

    def once(model: nn.Module, batch) -> Tensor:
        if how == "plain":
            return model(**batch).loss
        weight = model.classifier.weight.sum()  # the other kind of checkpointing needs something with a gradient
        return checkpoint(lambda _: model(**batch).loss, weight, use_reentrant=how == "reentrant")

    run = attached(loss=lambda model, batch: once(model, batch) + 2 * once(model, PADDED), alpha=20.0)
    run.closure(BATCH, {**BATCH, "input_ids": IDS.flip(0)}).backward()
    return {name: weight.grad for name, weight in run.model.named_parameters()}


def test_a_forward_pass_that_is_repeated_sees_the_noise_it_had() -> None:
    # The same operations on the same numbers: equal to the bit.
    plain, again = repeated("plain"), repeated("whole")
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_checkpointing_that_cannot_repeat_the_noise_is_refused() -> None:
    with pytest.raises(RunError, match=r"the noise of the forward pass that is repeated.*'use_reentrant': False"):
        repeated("reentrant")


def test_gradient_checkpointing_of_the_blocks_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny("bert")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = attached(model, alpha=20.0)
        run.closure(BATCH).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_frozen_embeddings_hear_it_unless_they_are_quiet_and_that_is_said() -> None:
    quiet = attached(None, Freeze(keep=("blocks", "bridge", "head")), alpha=5.0)
    assert not noise(quiet).any()
    assert [note for note in quiet.notes if note.startswith("neftune adds no noise")]
    loud = attached(None, Freeze(keep=("blocks", "bridge", "head"), quiet=False), alpha=5.0)
    assert noise(loud).any()
    loud.model.eval()
    loud.model(**BATCH)
    assert not loud.notes


def test_gradients_flow_through_the_noise_as_through_a_constant() -> None:
    embedded = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    draw = torch.rand(2, 3, 4, dtype=torch.float64)
    noised(embedded, draw, 5.0).sum().backward()
    assert torch.equal(embedded.grad, torch.ones_like(embedded))


@pytest.mark.slow
def test_compiled_it_draws_the_same_noise() -> None:
    from luthier.planning.compose import compose, skeleton
    from luthier.recipe.recipe import Recipe, Stage

    told = []
    for place in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = tiny("bert")
        stage = Stage(ingredients=(NEFTune(alpha=20.0),), steps=3, learning_rate=1e-2)
        plan = compose(Recipe(name="x", stages=(stage,)), skeleton(model))
        run = Run(plan.stages[0], model, seed=0, place=place)
        losses = []
        for _ in range(3):
            losses.append(float(run.offer(run.closure(PADDED))))
            run.step()
        told.append(losses)
    assert told[0] == told[1]
    assert len(set(told[0])) == 3
