"""mixout: at each training forward pass some weights are the start weights again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from luthier.errors import ConflictError, RunError
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.surgery.mixout import Mixing, Mixout, mixed
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.tiny import FAMILIES, tiny

BATCH = {"input_ids": torch.arange(3, 35).reshape(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
QUERY = "bert.encoder.layer.0.attention.self.query"


def wide(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def attached(model: nn.Module | None = None, steps: int = 4, **fields) -> Run:
    return begin(model or tiny("bert"), [Mixout(**fields)], learning_rate=1e-2, steps=steps)


def weight(run: Run, name: str = QUERY) -> Tensor:
    return run.model.get_submodule(name).weight.detach().clone()


def test_by_hand_one_kept_and_one_put_back():
    # U = (1, 1), W = (3, 5), p = 1/2: kept 1 + (3 - 1) / (1/2) = 5, put back 1
    assert mixed(wide(3, 5), wide(1, 1), wide(1, 0), 0.5).tolist() == [[5.0, 1.0]]


def test_by_hand_at_one_it_is_the_target_and_weights_at_their_target_stay():
    assert mixed(wide(3, 5), wide(1, 1), wide(1, 0), 1.0).tolist() == [[1.0, 1.0]]
    assert mixed(wide(2, 7), wide(2, 7), wide(1, 0), 0.9).tolist() == [[2.0, 7.0]]


def test_at_p_zero_and_in_eval_mode_nothing_changes():
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [Mixout(p=0.0)]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=3)
        for _ in range(3):
            run.offer(run.closure(BATCH))
            run.step()
        run.finish()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    run = attached(p=0.9)
    run.model.eval()
    assert torch.equal(run.model(**BATCH).logits, tiny("bert")(**BATCH).logits)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_mean_over_masks_is_the_weight(seed, p):
    """Exactly: the mean over M in {0, 1} with P(1) = 1 - p is p U + (1 - p)(U + (W - U) / (1 - p)) = W."""
    draw = torch.Generator().manual_seed(seed)
    w, u = (
        torch.randn(3, 4, generator=draw, dtype=torch.float64),
        torch.randn(3, 4, generator=draw, dtype=torch.float64),
    )
    mean = p * mixed(w, u, torch.zeros(3, 4, dtype=torch.float64), p) + (1 - p) * mixed(
        w, u, torch.ones(3, 4, dtype=torch.float64), p
    )
    assert torch.allclose(mean, w, rtol=1e-10)
    second = (1 - p) * (mixed(w, u, torch.ones(3, 4, dtype=torch.float64), p) - w) ** 2 + p * (u - w) ** 2
    assert torch.allclose(second, p / (1 - p) * (w - u) ** 2, rtol=1e-8)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_it_is_the_papers_equation(seed, p):
    """Equation 5 as printed, entry by entry: ((1 - M) U + M W - p U) / (1 - p); float64, so 1e-12."""
    draw = torch.Generator().manual_seed(seed)
    w, u = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    kept = torch.empty(1, 4, dtype=torch.float64).bernoulli_(1 - p, generator=draw)
    told = mixed(w, u, kept, p)
    for row in range(3):
        for column in range(4):
            m, one, other = float(kept[0, column]), float(w[row, column]), float(u[row, column])
            assert float(told[row, column]) == pytest.approx(
                ((1 - m) * other + m * one - p * other) / (1 - p), rel=1e-12, abs=1e-12
            )


def test_a_share_p_of_the_draws_puts_the_weight_back():
    """400 steps of 16 columns: the share kept has standard deviation sqrt(0.3 x 0.7 / 6400) = 0.0057; 4 of them."""
    run = attached(p=0.3)
    target = weight(run)
    with torch.no_grad():
        run.model.get_submodule(QUERY).parametrizations.weight.original.add_(1.0)
    kept = 0.0
    for number in range(400):
        run.progress.step = number
        kept += float(((weight(run) - target)[0].abs() > 0.5).double().mean()) / 400
    assert kept == pytest.approx(0.7, abs=0.023)


def test_the_gradient_is_the_mask_over_one_minus_p():
    w, u, kept = wide(3, 5).requires_grad_(), wide(1, 1), wide(1, 0)
    mixed(w, u, kept, 0.9).sum().backward()
    assert w.grad.tolist() == [[pytest.approx(10.0), 0.0]]
    assert torch.autograd.gradcheck(lambda one: mixed(one, u, kept, 0.3), (w,))


def test_with_a_target_of_zero_it_is_dropout_of_the_inputs():
    draw = torch.Generator().manual_seed(0)
    w, x = (
        torch.randn(5, 4, generator=draw, dtype=torch.float64),
        torch.randn(3, 4, generator=draw, dtype=torch.float64),
    )
    kept, p = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64), 0.4
    assert torch.allclose(F.linear(x, mixed(w, torch.zeros_like(w), kept, p)), F.linear(x * kept / (1 - p), w))


@pytest.mark.parametrize("mask", ["column", "element"])
def test_a_column_mask_is_one_draw_an_input(mask):
    run = attached(p=0.5, mask=mask)
    target = weight(run)
    with torch.no_grad():
        run.model.get_submodule(QUERY).parametrizations.weight.original.add_(1.0)
    run.progress.turn += 1
    moved = (weight(run) - target).abs() > 0.5  # where the weight was kept
    constant = (moved == moved[:1]).all()
    assert bool(constant) is (mask == "column")
    assert 0 < moved.sum() < moved.numel()


def test_masks_differ_by_step_micro_batch_pass_and_layer_and_not_by_evaluation():
    run = attached(p=0.5, mask="element")
    with torch.no_grad():
        for module in run.model.modules():
            if parametrize.is_parametrized(module, "weight"):
                module.parametrizations.weight.original.add_(1.0)

    def seen(part: int = 0, name: str = QUERY) -> Tensor:
        run.progress.turn += 1
        run.progress.part = part
        return weight(run, name)

    first = seen()
    assert torch.equal(first, seen())
    assert not torch.equal(first, seen(part=1))
    again, second_pass = seen(), weight(run)
    assert torch.equal(first, again)
    assert not torch.equal(first, second_pass)
    run.progress.step = 1
    assert not torch.equal(first, seen())
    run.progress.step = 0
    key = QUERY.replace("query", "key")
    assert not torch.equal(first - weight_of(QUERY), seen(name=key) - weight_of(key))


def weight_of(name: str) -> Tensor:
    return tiny("bert").get_submodule(name).weight.detach()


def test_a_closure_evaluated_twice_gives_the_same_loss():
    run = attached(p=0.5)
    closure = run.closure(BATCH, BATCH)
    run.offer(closure)
    run.step()
    assert torch.equal(closure.loss(), closure.loss())


def on(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0}


def test_dropout_before_mixed_layers_is_off_and_comes_back():
    model = tiny("bert", dropout=0.2)
    before = on(model)
    run = attached(model, p=0.5)
    assert on(model) == {"dropout": 0.2}  # before the head, which is not mixed
    run.finish()
    assert on(model) == before  # to the bit
    run = attached(model, p=0.5, where=("all",))
    assert on(model) == {}
    run.finish()
    assert on(model) == before
    loud = tiny("bert", dropout=0.2)
    attached(loud, p=0.5, dropout=True)
    assert loud.bert.encoder.layer[0].output.dropout.p == pytest.approx(0.2)


def test_dropout_stays_on_in_blocks_that_are_not_mixed():
    model = tiny("bert", dropout=0.2)
    attached(model, p=0.5, where=("top:1", "head"))
    layers = model.bert.encoder.layer
    assert [layer.output.dropout.p for layer in layers] == [0.2, 0.2, 0.0]
    assert (model.bert.embeddings.dropout.p, model.dropout.p) == (0.2, 0.0)
    other = tiny("bert", dropout=0.2)
    attached(other, p=0.5, where=("block:0",))
    assert [layer.output.dropout.p for layer in other.bert.encoder.layer] == [0.0, 0.2, 0.2]
    assert (other.bert.embeddings.dropout.p, other.dropout.p) == (0.0, 0.2)


def hangs_on_the_seed(run: Run, *, body: bool) -> bool:
    """Whether outputs in training mode do, the body being in it or not; the seed of the masks stays the same."""
    rows, told = {"input_ids": BATCH["input_ids"], "attention_mask": torch.ones_like(BATCH["input_ids"])}, []
    run.train()
    run.model.base_model.train(body)
    for seed in (0, 1):
        torch.manual_seed(seed)
        run.progress.turn += 1
        told.append(run.model(**rows).logits)
    return not torch.equal(*told)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_has_dropout_left_before_what_is_mixed(family):
    model = tiny(family, dropout=0.3)
    run = attached(model, p=0.5, where=("all",))
    assert not hangs_on_the_seed(run, body=True)
    run.finish()
    run = attached(model, p=0.5, where=("head",))
    assert not hangs_on_the_seed(run, body=False)
    assert hangs_on_the_seed(run, body=True)
    run.finish()
    run = attached(model, p=0.5)
    without = family in ("gpt2", "llama", "qwen2", "t5")  # no dropout in the head
    assert hangs_on_the_seed(run, body=True) is hangs_on_the_seed(run, body=False) is not without


@pytest.mark.parametrize(("family", "path", "field"), [
    ("llama", "model.layers.0.self_attn", "attention_dropout"),
    ("t5", "transformer.encoder.block.0.layer.0.SelfAttention", "dropout"),
])  # fmt: skip
def test_dropout_that_is_a_number_of_the_attention_is_off_too(family, path, field):
    model = tiny(family, dropout=0.1)
    run = attached(model, p=0.5)
    assert getattr(model.get_submodule(path), field) == 0.0
    run.finish()
    assert getattr(model.get_submodule(path), field) == 0.1


def shifted(run: Run) -> Run:
    """Moves every mixed weight away from its target."""
    with torch.no_grad():
        for module in run.model.modules():
            if parametrize.is_parametrized(module, "weight"):
                module.parametrizations.weight.original.add_(0.3)
    return run


def twice(model: nn.Module, batch) -> Tensor:
    """A loss of two forward passes that see two masks."""
    one, other = model(**batch), model(**batch)
    return one.loss + (one.logits - other.logits).square().mean()


def gradients(*, checkpointing: bool | None, passes: int) -> dict[str, Tensor]:
    model = tiny("bert")
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": not checkpointing})
    loss = twice if passes == 2 else lambda live, batch: live(**batch).loss
    run = shifted(begin(model, [Mixout(p=0.5)], steps=4, loss=loss))
    run.closure(BATCH, {**BATCH, "input_ids": BATCH["input_ids"].flip(0)}).backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_checkpointing_repeats_the_masks(passes):
    """The same operations on the same numbers: equal to the bit."""
    plain, repeated = gradients(checkpointing=None, passes=passes), gradients(checkpointing=True, passes=passes)
    assert all(torch.equal(value, repeated[name]) for name, value in plain.items())


def test_checkpointing_that_cannot_repeat_the_masks_is_refused():
    with pytest.raises(RunError, match=r"the noise of the forward pass that is repeated.*'use_reentrant': False"):
        gradients(checkpointing=False, passes=1)


def test_in_a_loop_of_ones_own_each_forward_pass_sees_another_mask():
    """Nobody seeds anything: the micro-batches of a step are counted, and a pass outside the run's loss too."""
    run = shifted(attached(p=0.5))
    told = [float(run.loss(run.model, BATCH)) for _ in range(3)] + [float(run.model(**BATCH).loss) for _ in range(2)]
    assert len(set(told)) == 5
    run.step()
    later = float(run.loss(run.model, BATCH))
    assert later not in told


@pytest.mark.slow
def test_compiled_it_draws_the_same_masks():
    from luthier.planning.compose import compose, skeleton
    from luthier.recipe.recipe import Recipe, Stage

    told = []
    for place in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = tiny("bert")
        stage = Stage(ingredients=(Mixout(p=0.5),), steps=3, learning_rate=1e-2)
        plan = compose(Recipe(name="x", stages=(stage,)), skeleton(model))
        run = Run(plan.stages[0], model, seed=0, place=place)
        losses = []
        for _ in range(3):
            losses.append(float(run.offer(run.closure(BATCH))))
            run.step()
        told.append(losses)
    assert told[0] == told[1]
    assert len(set(told[0])) == 3


@pytest.mark.parametrize(("mask", "passes"), [("column", 1), ("element", 2)])
def test_the_plan_counts_the_start_and_what_waits_for_the_backward_pass(mask, passes):
    # A block: four (16, 16) of attention, (32, 16) and (16, 32): 2048 weights of 4 bytes; biases and norms make it 2224.
    run = attached(p=0.5, mask=mask, where=("top:1",))
    made = Mixout(p=0.5, mask=mask, where=("top:1",))
    assert (
        made.state_bytes(run.plan.table)
        == 4 * 2224 + passes * 4 * 2048
        == sum(value.numel() * 4 for value in run._start.values()) + (saved(run) - saved(attached(p=0.0)) + slack(mask))
    )
    assert Mixout(p=0.0, where=("top:1",)).state_bytes(run.plan.table) == 4 * 2224


def slack(mask: str) -> int:
    """The masks by column, which are not counted: 5 of 16 and one of 32."""
    return -4 * (5 * 16 + 32) if mask == "column" else 0


def saved(run: Run) -> int:
    """Bytes beside weights and buffers that a forward pass keeps for its backward pass."""
    own = {value.untyped_storage().data_ptr() for value in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = run.loss(run.model, BATCH)
    assert loss.requires_grad
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def test_quantised_weights_are_left_alone_and_it_is_said():
    model = tiny("bert")
    layer = model.get_submodule(QUERY)
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    from luthier.core.anatomy import Anatomy
    from luthier.core.context import Context, Progress, Shelf

    ctx = Context(Anatomy.of(model), Progress(1), 0, "train/mixout", Mixout().touches(), Shelf(), [])
    Mixout(p=0.5).surgery(model, ctx)
    assert not parametrize.is_parametrized(layer)
    assert any("quantised" in note for note in ctx.notes)


def test_only_linear_weights_of_what_is_named_are_mixed():
    run = attached(p=0.5, where=("top:1",))
    mixing = {name for name, module in run.model.named_modules() if parametrize.is_parametrized(module)}
    assert len(mixing) == 6
    assert all(name.startswith("bert.encoder.layer.2.") for name in mixing)
    everywhere = attached(p=0.5)
    names = {name for name, module in everywhere.model.named_modules() if parametrize.is_parametrized(module)}
    assert "classifier" not in names
    assert "bert.pooler.dense" in names
    assert not any("LayerNorm" in name or "embeddings" in name for name in names)


def test_after_finish_names_order_and_kind_are_as_before():
    model = tiny("bert")
    names, kinds = [name for name, _ in model.named_parameters()], [type(module) for module in model.modules()]
    run = attached(model, p=0.5, steps=1)
    run.offer(run.closure(BATCH))
    run.step()
    run.finish()
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(module) for module in model.modules()] == kinds
    assert list(copy.deepcopy(model).state_dict()) == list(tiny("bert").state_dict())


def test_after_finish_it_is_saved_and_loaded_as_any_model(tmp_path):
    model = tiny("bert")
    run = attached(model, p=0.5, steps=1)
    run.offer(run.closure(BATCH))
    run.step()
    run.finish()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_tied_weights_are_left_alone_and_it_is_said():
    model = tiny("bert")
    model.bert.encoder.layer[0].attention.self.key.weight = model.bert.encoder.layer[0].attention.self.query.weight
    run = attached(model, p=0.5)
    assert not parametrize.is_parametrized(model.get_submodule(QUERY))
    assert any("tied" in note for note in run.notes)


def test_gpt2s_transposed_weights_are_masked_by_input():
    run = begin(tiny("gpt2"), [Mixout(p=0.5)], steps=1)
    mixing = run.model.get_submodule("transformer.h.0.attn.c_attn").parametrizations.weight[0]
    assert isinstance(mixing, Mixing)
    assert mixing._shape == (16, 1)  # (inputs, 1): the weight is (16, 48)


def test_it_cannot_share_a_stage_with_a_method_without_noise():
    with pytest.raises(ConflictError, match=r"mixout needs the noise of the forward pass, which mezo does away with"):
        begin(tiny("bert"), [Mixout(p=0.5), MeZO()], steps=1)


@pytest.mark.parametrize("mask", ["column", "element"])
def test_it_keeps_its_promises(mask):
    check_ingredient(Mixout(p=0.5, mask=mask))


def test_it_matters():
    run = attached(p=0.7)
    with torch.no_grad():
        run.model.get_submodule(QUERY).parametrizations.weight.original.add_(1.0)
    run.model.train()
    assert not torch.equal(weight(run), run.model.get_submodule(QUERY).parametrizations.weight.original)
