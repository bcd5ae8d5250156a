"""compose: what it refuses and how it says so, how long a stage is, and that it leaves the live model alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, needs, owns, scales, voids, wraps
from luthier.core.context import Context
from luthier.core.groups import plain
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.losses.l2sp import L2SP
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.modules.prefix import Prefix
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.prior_decay import PriorDecay
from luthier.ingredients.optimizers.rec_adam import RecAdam
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.mixout import Mixout
from luthier.planning.compose import compose, skeleton
from luthier.planning.plan import Plan
from luthier.recipe.recipe import Recipe, Stage
from tests.tiny import tiny


def claimant(called: str, *claims: Claim) -> Ingredient:
    """An ingredient that claims and does nothing."""

    class Claimant(Ingredient):
        def touches(self) -> tuple[Claim, ...]:
            return claims

        @classmethod
        def name(cls) -> str:
            return called

    Claimant.__name__ = called
    return ingredient(Claimant)()


def planned(*stages: Stage, shape: nn.Module | None = None, **known: Any) -> Plan:
    return compose(Recipe(name="trial", stages=stages), shape or tiny("bert", meta=True), **known)


def stage(*ingredients: Ingredient, name: str = "train", steps: int | None = 10, **said: Any) -> Stage:
    return Stage(name=name, ingredients=ingredients, steps=steps, **said)


# What is refused


def test_the_faults_of_all_stages_are_told_at_once_with_their_stage() -> None:
    with pytest.raises(RecipeError) as told:
        planned(
            stage(Anneal(warmup_steps=10), name="first"),
            stage(Freeze(keep=("no.such.weight",)), name="second"),
            Stage(name="third"),
        )
    text = str(told.value)
    assert text.startswith("4 faults in trial")
    assert "stages[0] 'first' anneal.warmup_steps  must be below the stage's 10 steps; got 10." in text
    assert "stages[1] 'second' freeze  matches no weight with 'no.such.weight'." in text
    assert "Weights are named like bert.embeddings.word_embeddings.weight" in text
    assert "stages[1] 'second'  trains no weight." in text
    assert "stages[2] 'third'" in text
    assert "must say epochs or steps" in text


def test_a_selector_with_a_bad_number_is_told_with_the_others() -> None:
    with pytest.raises(RecipeError) as told:
        planned(stage(Freeze(keep=("top:9",)), name="first"), stage(Anneal(warmup_steps=99), name="second"))
    text = str(told.value)
    assert "must be between top:0 and top:3 for this model of 3 blocks; got 9." in text
    assert "stages[0] 'first'" in text
    assert "stages[1] 'second' anneal.warmup_steps" in text


def test_two_owners_are_a_conflict_that_names_the_stage_the_reason_and_the_cure() -> None:
    one, other = claimant("galore", owns(Place.OPTIMIZER)), claimant("lomo", owns(Place.OPTIMIZER))
    with pytest.raises(ConflictError) as told:
        planned(stage(one, other))
    assert str(told.value) == (
        "1 fault in trial\n"
        "  stages[0] 'train': galore and lomo cannot share a stage  galore sets the optimizer, which lomo sets too.  "
        "Put them in different stages, or drop one."
    )


def test_conflicts_of_all_stages_are_told_at_once() -> None:
    mezo = claimant("mezo", owns(Place.OPTIMIZER), voids(Place.GRADIENT), voids(Place.NOISE))
    child, noisy = claimant("child_tuning", wraps(Place.GRADIENT)), claimant("mixout", needs(Place.NOISE))
    with pytest.raises(ConflictError) as told:
        planned(stage(mezo, child, name="first"), stage(noisy, mezo, name="second"))
    assert [fault.where for fault in told.value.faults] == [
        "stages[0] 'first': mezo and child_tuning cannot share a stage",
        "stages[1] 'second': mixout and mezo cannot share a stage",
    ]
    assert "mezo does away with the gradient, which child_tuning edits" in str(told.value)


def test_owners_of_different_weights_share_a_stage() -> None:
    head, body = owns(Place.TRAINABLE, "head"), owns(Place.TRAINABLE, "blocks")
    planned(stage(claimant("one", head), claimant("other", body)))
    with pytest.raises(ConflictError):
        planned(stage(claimant("one", head), claimant("other", owns(Place.TRAINABLE, "classifier.*"))))


def test_what_the_surroundings_do_away_with_conflicts_too() -> None:
    whole = claimant("galore", needs(Place.WHOLE_WEIGHTS))
    planned(stage(whole))
    with pytest.raises(
        ConflictError,
        match="galore cannot stand here  galore needs whole weights on every process, which the surroundings do not have",
    ):
        planned(stage(whole), voids=[voids(Place.WHOLE_WEIGHTS)])


@pytest.mark.parametrize("parts", [
    [Mixout(where=("embeddings",))], [Mixout(where=("norms",))], [Freeze(keep=("head",)), Mixout()], [Mixout(), Freeze(keep=("norms",))],
    [PriorDecay(where=("norms",))], [PriorDecay(where=("biases",))], [Freeze(keep=("head", "norms")), PriorDecay()],
    [Freeze(keep=("head",)), L2SP(head_strength=0)], [LoRA(r=1), L2SP(head_strength=0)], [Freeze(keep=("bridge",)), L2SP(strength=0)],
    [Freeze(keep=("head",)), RecAdam()], [LoRA(r=1), RecAdam()], [Prefix(vectors=2), RecAdam()],
])  # fmt: skip
def test_an_ingredient_that_finds_no_weight_that_learns_to_work_on_is_refused(parts: list[Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"1 fault in trial\n.*must work on some weight that learns in this stage; got none"
    ):
        planned(stage(*parts))


@pytest.mark.parametrize("parts", [
    [Mixout(where=("embeddings", "bridge"))], [Freeze(keep=("head",)), Mixout(p=0.0)], [Freeze(keep=("head",)), L2SP()],
    [PriorDecay(where=("norms",), exclude=())], [LoRA(r=1), PriorDecay()], [LoRA(r=1), L2SP()], [LoRA(r=1), Mixout(where=("head",))],
    [Freeze(keep=("head",)), L2SP(strength=0, head_strength=0)], [Freeze(keep=("head",)), PriorDecay(weight_decay=0)],
])  # fmt: skip
def test_one_that_finds_some_or_is_told_to_do_nothing_is_not(parts: list[Any]) -> None:
    planned_ones = [entry.ingredient for entry in planned(stage(*parts)).stages[0].entries]
    assert all(part in planned_ones for part in parts)


def test_bitfit_takes_every_bias_and_is_refused_where_a_model_has_none() -> None:
    # Of each block of a BERT: query, key, value, output 16 each, norm 16, 32 and 16 between, norm 16: 144, the norms' 32 of them.
    for keep, many in (
        ("*bias", 3 * 144 + 16 + 16 + 3),
        ("biases", 3 * 112 + 16 + 3),
    ):  # and of embeddings' norm, pooler, head
        assert planned(stage(Freeze(keep=(keep,)))).stages[0].trainable == many
    for keep in ("*bias", "biases"):
        with pytest.raises(RecipeError, match="freeze  matches no weight with"):
            planned(stage(Freeze(keep=("head", keep))), shape=tiny("llama", meta=True))


def test_what_finds_nothing_because_of_a_conflict_or_names_nothing_is_told_once() -> None:
    with pytest.raises(ConflictError):
        planned(stage(LoRA(r=1), Mixout()))
    with pytest.raises(RecipeError, match=r"1 fault in trial\n.*matches no weight"):
        planned(stage(PriorDecay(where=("no.such.weight",))))


def test_an_ingredient_that_stands_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="stages\\[0\\] 'train' anneal  stands twice in one stage"):
        planned(stage(Anneal(), Anneal(shape="cosine")))


def test_an_exact_solver_refuses_what_takes_steps_and_what_it_cannot_train() -> None:
    with pytest.raises(RecipeError) as told:
        planned(Stage(name="probe", solver="exact", ingredients=(AdamW(),)))
    text = str(told.value)
    assert "adamw  cannot work with solver: exact, which takes no steps" in text
    assert "solver: exact trains only the head" in text
    assert "Add freeze: {keep: [head]}, or say solver: sgd." in text


# How long a stage is, and who is in it


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(1, 3), (2, 6), (2.5, 8), (0.5, 2), (0.1, 1)],
)
def test_steps_follow_from_epochs_and_fractions_of_them(epochs: float, steps: int) -> None:
    # Ten rows in fours are 3 steps. Half an epoch is 1.5 steps, rounded to the even 2: 2.5 epochs are 6 + 2. A tenth is
    # 0.3 steps, and at least one is taken.
    plan = planned(Stage(epochs=epochs, batch_size=4), lengths=[5] * 10)
    assert plan.stages[0].steps == steps


def test_the_stage_without_an_optimizer_gets_adamw_by_default_and_only_then() -> None:
    default = planned(stage(Anneal())).stages[0].entries
    assert [(entry.name, entry.default) for entry in default] == [("adamw", True), ("anneal", False)]
    own = planned(stage(claimant("lomo", owns(Place.OPTIMIZER)))).stages[0].entries
    assert [entry.name for entry in own] == ["lomo"]
    exact = planned(Stage(solver="exact", ingredients=(Freeze(),))).stages[0].entries
    assert [entry.name for entry in exact] == ["freeze"]


def test_the_plan_says_who_set_what() -> None:
    rows = {row.name: row for row in planned(stage(Freeze(keep=("head", "norms")), AdamW())).stages[0].table.rows}
    frozen, norm = rows["bert.pooler.dense.weight"], rows["bert.embeddings.LayerNorm.weight"]
    assert (frozen.trainable, norm.trainable) == (False, True)
    assert ("trainable", "freeze") in frozen.set_by
    assert norm.weight_decay == 0.0
    assert rows["classifier.weight"].weight_decay == 0.01
    assert ("weight_decay", "adamw") in rows["classifier.weight"].set_by


def test_berts_pooler_is_a_bridge_between_blocks_and_head_and_the_plan_shows_it() -> None:
    # Trap 5: the pooler is neither block nor head; a probe must not train it, and a table of layers must not lose it.
    plan = planned(stage(Freeze(keep=("head",))))
    roles = {row.name: (row.part.role, row.part.depth) for row in plan.stages[0].table.rows}
    assert roles["bert.pooler.dense.weight"] == ("bridge", 4)  # above blocks 1 to 3, below the head
    assert roles["classifier.weight"] == ("head", 5)
    assert plan.stages[0].trainable == 3 * 16 + 3
    lines = str(plan).splitlines()
    assert any(line.split()[:1] == ["bridge"] and "frozen" in line and "freeze" in line for line in lines)
    assert any(line.split()[:1] == ["head"] and "frozen" not in line for line in lines)


# What it leaves alone


def digest(model: nn.Module) -> str:
    """All weights and buffers, saved with the model or not, with their names, flags and modes."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters(remove_duplicate=False):
        found.update(f"{name} {weight.requires_grad} {weight.data_ptr()}".encode())
        found.update(weight.detach().numpy().tobytes())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found.update(f"{name} {buffer.data_ptr()}".encode())
        found.update(buffer.numpy().tobytes())
    found.update(str([(name, module.training) for name, module in model.named_modules()]).encode())
    return found.hexdigest()


def test_composing_leaves_the_live_model_and_the_global_generator_alone() -> None:
    model = tiny("bert")
    model.register_buffer("loose", torch.arange(3.0), persistent=False)
    before, state = digest(model), torch.random.get_rng_state()
    planned(stage(Freeze(), Anneal(), AdamW()), shape=skeleton(model), lengths=[3] * 9)
    assert digest(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_skeleton_has_shapes_and_no_storage() -> None:
    model = tiny("bert")
    shape = skeleton(model)
    held = [*shape.parameters(), *shape.buffers()]
    assert all(tensor.is_meta for tensor in held)
    assert [tuple(tensor.shape) for tensor in held] == [
        tuple(tensor.shape) for tensor in [*model.parameters(), *model.buffers()]
    ]
    assert [name for name, _ in shape.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_tied_weights_are_tied_in_the_skeleton() -> None:
    model = tiny("t5")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) > len(list(model.named_parameters()))  # T5 shares its embeddings
    shape = skeleton(model)
    assert [name for name, _ in shape.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in shape.named_parameters(remove_duplicate=False)] == names


def test_bert_base_is_planned_without_its_weights() -> None:
    import transformers

    with torch.device("meta"):
        shape = transformers.BertForSequenceClassification(transformers.BertConfig())
    (plan,) = planned(Stage(epochs=3, batch_size=16), shape=shape, lengths=[128] * 1000).stages
    # Embeddings (30522 + 512 + 2 + 2) x 768; a block 4 (768 x 768 + 768) + 2 x 768 x 3072 + 3072 + 768 + 4 x 768;
    # pooler 768 x 768 + 768; head 2 x 768 + 2.
    embeddings, block = 31038 * 768, 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert plan.trainable == embeddings + 12 * block + 768 * 768 + 768 + 2 * 768 + 2 == 109_483_778
    assert plan.steps == 3 * 63
    assert (plan.memory.weights, plan.memory.gradients) == (4 * plan.trainable, 4 * plan.trainable)
    assert plan.memory.optimizer == 8 * plan.trainable
    assert all(weight.is_meta for weight in shape.parameters())


# Groups


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_groups_hold_every_trainable_weight_exactly_once(data: st.DataObject) -> None:
    model = tiny("bert")
    choice = st.tuples(
        st.booleans(), st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 0.1]), st.sampled_from([(), ((0.0, 0.5),)])
    )
    (base,) = planned(stage(), shape=skeleton(model)).stages
    ways = {row.name: data.draw(choice) for row in base.table.rows}
    table = (
        ParamTable.start(base.anatomy, learning_rate=0.1, steps=4)
        .trainable(lambda row: ways[row.name][0])
        .scale_lr(lambda row: ways[row.name][1])
        .decay(lambda row: ways[row.name][2])
        .sleep(lambda row: ways[row.name][3])
    )
    weights = dict(model.named_parameters())
    chosen = {id(weights[name]) for name, way in ways.items() if way[0]}
    if not chosen:
        with pytest.raises(RecipeError, match="must train at least one weight"):
            plain(table, weights)
        return
    optimizer = plain(table, weights)
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == chosen
    for group in optimizer.param_groups:
        for name, weight in zip(group["names"], group["params"], strict=True):
            assert weight is weights[name]
            assert group["lr"] == pytest.approx(0.1 * ways[name][1])
            assert group["weight_decay"] == ways[name][2]


def test_a_tensor_under_two_names_of_the_table_is_refused() -> None:
    model = tiny("bert")
    (base,) = planned(stage(), shape=skeleton(model)).stages
    weights = dict(model.named_parameters())
    weights["bert.pooler.dense.weight"] = weights["bert.encoder.layer.0.attention.self.query.weight"]
    with pytest.raises(RecipeError, match="exactly one group"):
        plain(base.table, weights)


# Surgery on the skeleton


def test_what_claims_modules_operates_on_the_skeleton_and_is_undone_after_the_stage() -> None:
    seen: list[tuple[str, bool]] = []

    class Grows(Ingredient):
        """Puts one more weight into the head, and takes it away at the end."""

        def touches(self) -> tuple[Claim, ...]:
            return (wraps(Place.MODULES, "head"), scales(Place.LR))

        def surgery(self, model: nn.Module, ctx: Context) -> None:
            weight = next(iter(model.parameters()))
            seen.append(("surgery", weight.is_meta))
            model.classifier.register_parameter("extra", nn.Parameter(torch.ones(2, device=weight.device)))  # type: ignore[union-attr]

        def finish(self, model: nn.Module, ctx: Context) -> None:
            seen.append(("finish", next(iter(model.parameters())).is_meta))
            del model.classifier.extra  # type: ignore[union-attr]

        def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
            raise AssertionError("compose makes no optimizer")

        @classmethod
        def name(cls) -> str:
            return "grows"

    make: Callable[[], Ingredient] = ingredient(Grows)
    first, second = planned(stage(make(), name="first"), stage(name="second")).stages
    assert seen == [("surgery", True), ("finish", True)]
    assert "classifier.extra" in {row.name for row in first.table.rows}
    assert "classifier.extra" not in {row.name for row in second.table.rows}
