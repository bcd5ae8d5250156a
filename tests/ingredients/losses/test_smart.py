"""SMART: the penalty and the pull by hand, the worst perturbation inside its box, and noise that is not the dropout's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context, Progress, Shelf, Tensors
from luthier.core.families import Family
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, ModelError, RecipeError
from luthier.ingredients.losses.smart import SMART, climbed, divergence, followed
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.neftune import NEFTune
from luthier.run import Run, begin
from tests.processes import parallel, process
from tests.tiny import tiny

TOY = Family(blocks="blocks", embeddings=("words",), head=("head",))


class Toy(nn.Module):
    """w times the sum of the row's embeddings, which are numbers; the output is that number."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 1, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.float64)])  # of weight 1
        self.head = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.words.weight, 1.0)
        nn.init.constant_(self.blocks[0].weight, 1.0)  # type: ignore[arg-type]
        nn.init.constant_(self.head.weight, w)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks[0](self.words(tokens).sum(1)))
        return out


class Plain(Toy):
    """Toy, without a word on where its embeddings are."""

    get_input_embeddings = None  # type: ignore[assignment]


def toward(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared distance of the head's weight to 3; the forward pass is made, and not part of it."""
    model(batch["input_ids"])
    head: Any = model.head
    return ((head.weight - 3) ** 2).sum() / 2


def own(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def context(smart: SMART, *, step: int = 0) -> Context:
    parts: Any = None  # SMART does not read the model's parts
    return Context(parts, Progress(9, step), 0, "train/smart", smart.touches(), Shelf(), [])


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no factor of the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "attention_mask": torch.tensor(
            [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
        ),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def shifted(run: Run) -> Run:
    """Moves what mixout mixes away from where it started, so that it is noise."""
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if "parametrizations" in name:
                weight.add_(0.3)
    return run


TOKENS = {"input_ids": torch.tensor([[4, 5]])}


# By hand


def test_one_half_against_three_quarters_is_a_quarter_of_the_logarithm_of_three() -> None:
    # (p - q)(log p - log q) is (-1/4) log(2/3) for the first class and (1/4) log 2 for the second.
    first = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert divergence(first, second).item() == pytest.approx(math.log(3) / 4, rel=1e-14)
    # One output: differences 1 and 3, (1 + 9) / 2.
    assert divergence(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [5.0]])).item() == 5.0


def test_a_step_goes_along_the_gradient_by_its_largest_entry_and_stays_in_the_box() -> None:
    # (2, -4) / 4 = (1/2, -1); half of it on (1/8, 0) is (3/8, -1/2), which the box cuts to -7/16. The second token has no
    # gradient and stays.
    delta = torch.tensor([[[0.125, 0.0], [0.25, 0.0]]])
    gradient = torch.tensor([[[2.0, -4.0], [0.0, 0.0]]])
    assert climbed(delta, gradient, step=0.5, radius=0.4375).tolist() == [[[0.375, -0.4375], [0.25, 0.0]]]


def test_the_penalty_of_a_linear_answer_is_the_square_of_what_the_box_allows() -> None:
    # The output is 3 e for the one token of each row. It climbs away from zero on the side where it starts, to the wall at
    # 1/4: the answer moves by 3/4, the penalty is 2 x 9/16 = 9/8. The loss itself is (3 - 3)^2 / 2 = 0.
    smart = SMART(strength=2.0, step=1.0, sigma=1e-3, radius=0.25)
    loss = smart.loss(toward, context(smart))(Toy(3.0), {"input_ids": torch.tensor([[4], [5]])})
    assert loss.item() == pytest.approx(9 / 8, rel=1e-14)


def test_padding_is_not_moved_although_it_has_a_gradient() -> None:
    # Two tokens whose embeddings are added, the second is padding: the answer moves as if there were one.
    smart = SMART(strength=2.0, step=1.0, sigma=1e-3, radius=0.25)
    rows = {"input_ids": torch.tensor([[4, 5]]), "attention_mask": torch.tensor([[1, 0]])}
    assert smart.loss(toward, context(smart))(Toy(3.0), rows).item() == pytest.approx(9 / 8, rel=1e-14)


def test_the_penalty_has_a_gradient_for_the_weights() -> None:
    # (w / 4)^2 x 2 has the slope w / 4 = 3/4 at w = 3, with delta held.
    smart, model = SMART(strength=2.0, step=1.0, sigma=1e-3, radius=0.25), Toy(3.0)
    smart.loss(toward, context(smart))(model, {"input_ids": torch.tensor([[4]])}).backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.item() == pytest.approx(3 / 4, rel=1e-14)


def test_the_teacher_follows_and_pulls() -> None:
    # w = 1 is also the teacher's, so the first step sees (1 - 3)^2 / 2 = 2 alone, and SGD at rate 1 takes w to 3. The teacher
    # goes half of the way, to 2. The answers are then 2 w = 6 and 4: the loss is 0 + 5 x (6 - 4)^2 = 20, its gradient at w
    # 5 x 2 x (6 - 4) x 2 = 40.
    assert followed(torch.tensor([1.0]), torch.tensor([3.0]), 0.75).item() == 1.5
    model = Toy(1.0)
    pulls: list[Any] = [SMART(strength=0.0, pull=5.0, beta=0.5), PlainSGD()]
    run = begin(model, pulls, learning_rate=1.0, steps=4, loss=toward, family=TOY)
    first = run.loss(model, TOKENS)
    first.backward()
    run.step()
    assert first.item() == 2.0
    assert model.head.weight.item() == 3.0
    second = run.loss(model, TOKENS)
    second.backward()
    assert second.item() == 20.0
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.item() == 40.0
    assert model.head.weight.item() == 3.0


# Identity


@pytest.mark.parametrize("neutral", [SMART(strength=0.0), SMART(radius=0.0)])
def test_at_its_neutral_values_the_loss_is_the_inner_loss_itself(neutral: SMART) -> None:
    assert neutral.loss(toward, context(neutral)) is toward


def test_without_a_pull_the_optimizer_has_no_hook_and_nothing_is_kept() -> None:
    smart = SMART()
    ctx = context(smart)
    optimizer = SGD([{"params": [nn.Parameter(torch.ones(1))], "names": ("w",)}], lr=0.1)
    assert smart.optimizer(optimizer, ctx) is optimizer
    assert not optimizer._optimizer_step_post_hooks
    assert ctx.shelf.state_dict() == {}


def test_a_perturbation_of_nothing_adds_nothing_although_there_is_dropout() -> None:
    # 1e-30 is lost in every embedding: the passes are equal when they have the same dropout, and their divergence is 0.
    model = tiny("bert", dropout=0.5).train()
    smart = SMART(strength=1e9, step=1e-30, sigma=1e-30, radius=1e-30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = own(model, batch(0))
        after = torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(smart.loss(own, context(smart))(model, batch(0)), plain)
        assert torch.equal(torch.get_rng_state(), after)  # and what is drawn next is what would be drawn without it


@pytest.mark.parametrize("noise", [NEFTune(alpha=20.0), Mixout(p=0.5)], ids=["neftune", "mixout"])
def test_its_passes_have_the_noise_of_what_has_a_stream_of_its_own(noise: Ingredient) -> None:
    # As above: a penalty of a thousand million times the change is 0 only where all passes see the same noise.
    losses = []
    for others in ([SMART(strength=1e9, step=1e-30, sigma=1e-30, radius=1e-30)], []):
        model = shifted(begin(tiny("bert"), [noise, *others], steps=1))
        losses.append(model.loss(model.forward, batch(0)))
    assert torch.equal(*losses)


def test_checkpointing_repeats_the_masks_of_mixout_in_all_its_passes() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny("bert")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run = shifted(begin(model, [Mixout(p=0.5), SMART(strength=100.0, step=0.1, radius=0.1)], steps=1))
        run.closure(batch(0), batch(1)).backward()
        grads.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_no_entry_leaves_the_box_and_the_step_is_uphill(seed: int, step: float, radius: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    delta = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).clamp(-radius, radius)
    gradient = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    moved = climbed(delta, gradient, step=step, radius=radius)
    assert moved.abs().max().item() <= radius
    assert ((moved - delta) * gradient >= 0).all()  # the box cuts the way, it does not turn it
    assert (moved - delta).abs().max().item() <= step * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999))
def test_the_divergence_is_symmetric_and_zero_only_at_itself(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    assert divergence(first, second).item() == pytest.approx(divergence(second, first).item(), rel=1e-13)
    assert divergence(first, second).item() > 0.0
    assert divergence(first, first).item() == 0.0


# Parity


def test_the_divergence_is_both_of_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    theirs = F.kl_div(one, other.exp(), reduction="batchmean") + F.kl_div(other, one.exp(), reduction="batchmean")
    torch.testing.assert_close(divergence(first, second), theirs, rtol=1e-13, atol=0)


def test_it_is_what_a_model_gives_that_is_handed_its_embeddings() -> None:
    # The same in double precision by another way: embeddings, start, one step and divergence written out with inputs_embeds.
    model, rows = tiny("bert").double(), batch(0)
    smart = SMART(strength=1e4, step=2e-3, sigma=1e-3, radius=2.5e-3)
    ctx = context(smart)
    real = rows["attention_mask"].unsqueeze(-1)
    words = model.get_input_embeddings()(rows["input_ids"])

    def answer(delta: Tensor | float) -> Any:
        return model(inputs_embeds=words + delta, attention_mask=rows["attention_mask"], labels=rows["labels"])

    start = torch.empty(4, 6, 16, dtype=torch.float64).normal_(0.0, 1e-3, generator=ctx.rng("start", 0, 0)) * real
    delta = start.clone().requires_grad_()
    clean = answer(0.0)
    p, q = clean.logits.detach().softmax(-1), answer(delta).logits.softmax(-1)
    ((p * (p / q).log()).sum() / 4 + (q * (q / p).log()).sum() / 4).backward()
    assert delta.grad is not None
    way = delta.grad / delta.grad.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    worst = (start + 2e-3 * way).clamp(-2.5e-3, 2.5e-3)
    p, q = clean.logits.softmax(-1), answer(worst).logits.softmax(-1)
    expected = clean.loss + 1e4 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 4

    # The largest entry decides the rest of a token: 1e-16 of rounding on a gradient of 1e-6, then a divergence of 1e-6.
    torch.testing.assert_close(smart.loss(own, ctx)(model, rows), expected, rtol=1e-7, atol=0)
    assert (expected - clean.loss).item() > 0.001


# Conformance


@pytest.mark.parametrize("smart", [SMART(), SMART(strength=0.0, pull=1.0), SMART(strength=10.0, pull=1.0, beta=0.5)])
def test_it_keeps_the_contract(smart: SMART) -> None:
    from luthier.testing import check_ingredient

    check_ingredient(smart)


def test_it_claims_the_loss_and_gradients_and_whole_weights_only_for_the_teacher() -> None:
    assert SMART().touches() == (wraps(Place.LOSS), needs(Place.GRADIENT))
    assert SMART(pull=1.0).touches() == (wraps(Place.LOSS), needs(Place.GRADIENT), needs(Place.WHOLE_WEIGHTS))
    with pytest.raises(ConflictError, match="smart"):
        begin(tiny("bert"), [SMART(), MeZO()], steps=1)


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        SMART(strength=-1.0, sigma=0.0, beta=1.5)
    assert {fault.where for fault in told.value.faults} == {"smart.strength", "smart.sigma", "smart.beta"}


def test_a_model_without_named_embeddings_is_refused_before_the_first_step() -> None:
    with pytest.raises(ModelError, match="get_input_embeddings"):
        begin(Plain(1.0), [SMART()], steps=1, loss=toward, family=TOY)
    begin(Plain(1.0), [SMART(strength=0.0, pull=1.0)], steps=1, loss=toward, family=TOY)


# It matters


def passes(model: nn.Module, smart: SMART, rows: Any, *, step: int = 0, part: int = 0) -> list[Tensor]:
    """What each forward pass saw added to its word embeddings."""
    body, seen = model.get_submodule("bert.embeddings.LayerNorm"), []
    handle = body.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    ctx = context(smart, step=step)
    ctx.progress.part = part
    smart.loss(own, ctx)(model, rows)
    handle.remove()
    return [one - seen[0] for one in seen]


def test_only_real_tokens_are_moved_first_by_chance_and_then_by_the_step() -> None:
    model, rows = tiny("bert").double(), batch(0)
    clean, start, worst = passes(model, SMART(step=0.5, sigma=1e-3, radius=0.5), rows)
    real = rows["attention_mask"].bool()
    assert not clean.any()
    assert not start[~real].any()
    assert not worst[~real].any()
    # 18 real tokens of 16 numbers: the deviation of 288 draws is known to 4 percent.
    assert start[real].std().item() == pytest.approx(1e-3, rel=0.2)
    # The largest entry of each token climbs by 0.5, up to the start, which the box holds.
    assert worst[real].abs().amax(-1).tolist() == pytest.approx([0.5] * int(real.sum()), abs=4e-3)


def test_the_start_differs_between_steps_and_micro_batches_and_is_the_same_in_the_same() -> None:
    model, rows = tiny("bert").double(), batch(0)
    starts = [passes(model, SMART(), rows, step=step, part=part)[1] for step, part in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[3])


def test_each_process_has_a_start_of_its_own() -> None:

    model, rows = tiny("bert").double(), batch(0)
    starts = [passes(model, SMART(), rows)[1]]
    for rank in (0, 1):
        with process(rank, of=2):
            starts.append(passes(model, SMART(), rows)[1])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.slow
def test_as_it_comes_it_moves_the_gradient_of_a_real_model() -> None:
    """all-MiniLM-L6-v2 after a few steps: a thousandth is all but nothing there, the default a few per cent."""
    import transformers

    from luthier.sources.demo import model_folder, rows

    frame = rows(2)
    labels = {name: number for number, name in enumerate(sorted(set(frame.label)))}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    given = tokenizer(list(frame.text), truncation=True, max_length=16, padding=True, return_tensors="pt")
    given = {**given, "labels": torch.tensor([labels[name] for name in frame.label])}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model = load(model_folder(), num_labels=len(labels))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
        for _ in range(4):
            own(model, given).backward()
            optimizer.step()
            optimizer.zero_grad()

        def gradient(*others: SMART) -> Tensor:
            run = begin(model, others, steps=1)
            torch.manual_seed(0)
            run.loss(run.forward, given).backward()
            return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

        plain = gradient()
        changes = [
            ((gradient(smart) - plain).norm() / plain.norm()).item()
            for smart in (SMART(), SMART(step=1e-3, radius=1e-3))
        ]
    assert 0.01 < changes[0] < 0.5
    assert changes[1] < 0.005


def test_the_step_is_worse_than_chance() -> None:
    # The same box, with a step and without: the divergence after the step is far above that of the start.
    model, rows = tiny("bert"), batch(0)
    found = []
    for step in (0.0, 1e-2):
        smart = SMART(strength=1.0, step=step, sigma=1e-3, radius=1e-2)
        found.append((smart.loss(own, context(smart))(model, rows) - own(model, rows)).item())
    assert found[1] > 10 * abs(found[0])


def test_the_weights_gradient_is_changed_and_asked_for_only_where_gradients_are_wanted() -> None:
    smoothed, plain = tiny("bert"), tiny("bert")
    smart = SMART(strength=100.0, step=0.1, radius=0.1)
    loss = smart.loss(own, context(smart))
    loss(smoothed, batch(0)).backward()
    own(plain, batch(0)).backward()
    changed = [
        not torch.allclose(one.grad, other.grad)
        for one, other in zip(smoothed.parameters(), plain.parameters(), strict=True)
        if one.grad is not None and other.grad is not None
    ]
    assert sum(changed) > len(changed) / 2
    with torch.no_grad():
        found = loss(smoothed, batch(0))
    assert not found.requires_grad
    torch.testing.assert_close(found, loss(smoothed, batch(0)).detach())


def test_the_teacher_answers_without_dropout_and_leaves_the_models_modes_and_noise_alone() -> None:
    model = tiny("bert", dropout=0.5)
    run = begin(model, [SMART(strength=0.0, pull=1.0)], steps=2)
    model.get_submodule("bert.embeddings").eval()
    said: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, given, out: said.append(out.logits.detach()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run.loss(model, batch(0))
        torch.manual_seed(0)
        own(model, batch(0))
    assert model.training
    assert not model.get_submodule("bert.embeddings").training
    model.eval()
    own(model, batch(0))
    handle.remove()
    teacher, student, alone, quiet = said
    assert torch.equal(teacher, quiet)
    assert torch.equal(student, alone)
    assert not torch.equal(student, teacher)


def test_frozen_weights_have_no_teacher_and_it_is_counted_in_the_forecast() -> None:
    from luthier.ingredients.settings.freeze import Freeze

    model = tiny("bert")
    run = begin(model, [Freeze(keep=("head",)), SMART(pull=1.0)], steps=2)
    entry = next(entry for entry in run.plan.entries if entry.name == "smart")
    teacher = run._context(entry).keep("teacher", Tensors)
    assert set(teacher) == {"classifier.weight", "classifier.bias"}
    assert SMART(pull=1.0).state_bytes(run.plan.table) == 4 * (3 * 16 + 3)
    assert SMART().state_bytes(run.plan.table) == 0


def test_half_precision_is_told_that_the_start_is_lost() -> None:
    model, notes = tiny("bert"), []
    for kind in (torch.float32, torch.bfloat16):
        smart = SMART()
        ctx = context(smart)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != torch.float32):
            smart.loss(own, ctx)(model, batch(0))
        notes.append([note for note in ctx.notes if "half precision" in note])
    assert [len(told) for told in notes] == [0, 1]


def test_in_data_parallel_the_gradient_is_that_of_the_plain_model() -> None:

    plain, model = tiny("bert", dropout=0.5), tiny("bert", dropout=0.5)
    smart = SMART(strength=1e3, pull=1.0, beta=0.5)
    with process():
        with torch.random.fork_rng():
            for live, wrapped in ((plain, False), (model, True)):
                run: Run = begin(live, [smart, PlainSGD()], learning_rate=0.1, steps=3)
                forward = parallel(live) if wrapped else live
                for step in range(2):
                    torch.manual_seed(step)
                    run.loss(forward, batch(step)).backward()
                    run.step()
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
