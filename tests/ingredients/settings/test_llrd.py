"""llrd: a smaller rate for each layer further down."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.core.table import ParamTable
from luthier.errors import LuthierError
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.llrd import LLRD
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import FAMILIES, tiny


class Vit(nn.Module):
    """The names of timm's and BEiT's vision transformers, and timm's own statement of their layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 2)), nn.Parameter(torch.zeros(1, 3, 2))
        self.patch_embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(2), "mlp": nn.Linear(2, 2)}) for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 3)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


VIT = Family("blocks", embeddings=("cls_token", "pos_embed", "patch_embed"), bridge=("norm",), head=("head",))


def scales(ingredient: LLRD, model: nn.Module, *, peak: float = 1.0, family: Family | None = None) -> dict[str, float]:
    """The rate of every weight by canonical name."""
    table = ParamTable.start(Anatomy.of(model, family), learning_rate=peak, steps=1)
    return {row.part.canonical: peak * row.lr_scale for row in ingredient.settings(table).rows}


def rates(ingredient: LLRD, family: str = "bert", *, peak: float = 1.0, layers: int = 3) -> dict[str, float]:
    return scales(ingredient, tiny(family, layers=layers, meta=True), peak=peak)


def said(name: str, *, head: float, bridge: float, block: Callable[[int], float], embeddings: float) -> float:
    """What a paper's closed form says of a weight, told by its name alone."""
    number = re.search(r"(?:layer|blocks)\.(\d+)\.", name)
    if number:
        return block(int(number[1]))
    if re.search(r"embed|cls_token", name):
        return embeddings
    return bridge if re.search(r"pooler|^norm", name) else head


# By hand


def test_by_hand_zhang_on_six_layers():
    """2e-5 and 0.95: head 2e-5, block 5 1.9e-5, block 4 1.805e-5, block 0 2e-5 * 0.95**6 = 1.4702e-5, embeddings * 0.95**7 = 1.3967e-5."""
    found = rates(LLRD(0.95), peak=2e-5, layers=6)
    assert found["classifier.weight"] == found["bert.pooler.dense.weight"] == pytest.approx(2e-5)
    assert found["bert.encoder.layer.5.output.dense.weight"] == pytest.approx(1.9e-5)
    assert found["bert.encoder.layer.4.attention.self.query.bias"] == pytest.approx(1.805e-5)
    assert found["bert.encoder.layer.0.output.LayerNorm.weight"] == pytest.approx(1.4702e-5, rel=1e-4)
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(1.3967e-5, rel=1e-4)


def test_by_hand_chang_gives_the_top_block_the_base_rate_and_the_head_its_own():
    """3.5e-6 * 0.9**12 = 9.885e-7 for the embeddings of twelve layers; head and pooler 3.6e-6."""
    found = rates(LLRD(0.9, top_power=0, head_learning_rate=3.6e-6), peak=3.5e-6, layers=12)
    assert found["bert.encoder.layer.11.output.dense.weight"] == pytest.approx(3.5e-6)
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(9.885e-7, rel=1e-3)
    assert found["classifier.weight"] == found["bert.pooler.dense.weight"] == pytest.approx(3.6e-6)


def test_by_hand_electra_gives_the_top_block_two_powers():
    """1e-4 * 0.8**2 = 6.4e-5; block l of L = 12 has 0.8**(13 - l)."""
    found = rates(LLRD(0.8, top_power=2), "electra", peak=1e-4, layers=12)
    assert found["electra.encoder.layer.11.output.dense.weight"] == pytest.approx(6.4e-5)
    assert found["electra.encoder.layer.3.output.dense.weight"] == pytest.approx(1e-4 * 0.8**10)
    assert (
        found["electra.embeddings.word_embeddings.weight"]
        == found["electra.embeddings_project.weight"]
        == pytest.approx(1e-4 * 0.8**14)
    )


def test_by_hand_the_bridge_may_stand_on_a_rung_of_its_own():
    # decay 0.5, head 1, bridge 0.5**3; a head with a rate of its own leaves it there, and takes it along where it has none
    found = rates(LLRD(0.5, bridge_power=3))
    assert (found["classifier.weight"], found["bert.pooler.dense.weight"]) == (1.0, 0.125)
    found = rates(LLRD(0.5, bridge_power=3, head_learning_rate=0.25))
    assert (found["classifier.weight"], found["bert.pooler.dense.weight"]) == (0.25, 0.125)
    found = rates(LLRD(0.5, head_power=2, head_learning_rate=0.25), peak=2.0)
    assert (found["classifier.weight"], found["bert.pooler.dense.weight"]) == (0.25, 0.25)
    assert found["bert.encoder.layer.2.output.dense.weight"] == 1.0


# Identity


def test_a_decay_of_one_changes_nothing():
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [LLRD(1.0)]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=3)
        for _ in range(3):
            run.loss(model, batch).backward()
            run.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# Invariants


def test_ratios_between_layers_hold_under_a_schedule():
    # Both rates are the peak times one factor: their ratio keeps its value to a rounding.
    run = begin(tiny("bert"), [LLRD(0.5, head_learning_rate=3.0), Anneal(warmup=0.25)], learning_rate=1.0, steps=8)
    run.optimizer.step()
    for _ in range(7):
        run.schedule.step()
        ladder = sorted({group["lr"] for group in run.optimizer.param_groups})
        assert [rate / ladder[0] for rate in ladder] == pytest.approx([1, 2, 4, 8, 48], rel=1e-12)


def test_block_1_is_not_block_10():
    found = rates(LLRD(0.5), layers=12)
    assert found["bert.encoder.layer.1.output.dense.weight"] == 0.5**11
    assert found["bert.encoder.layer.10.output.dense.weight"] == 0.5**2


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.1, 1.0), st.integers(0, 3), st.integers(0, 3), st.sampled_from([f for f in FAMILIES if f != "albert"])
)
def test_rates_never_rise_on_the_way_down_and_every_weight_is_in_one_group(decay, head_power, top_power, family):
    anatomy = Anatomy.of(tiny(family, meta=True))
    table = LLRD(decay, head_power, top_power).settings(ParamTable.start(anatomy, learning_rate=1.0, steps=1))
    by_depth = {row.part.depth: row.lr_scale for row in table.rows}
    ladder = [by_depth[depth] for depth in sorted(by_depth) if depth <= anatomy.blocks]
    assert ladder == sorted(ladder)
    names = [name for group in table.groups() for name in group.names]
    assert sorted(names) == sorted(part.name for part in anatomy.parts)


# Parity


@pytest.mark.parametrize("L", [2, 12])
def test_parity_with_zhang_for_every_weight(L):
    """The closed form of run_glue.py in floats: 1e-12 for the order of its products."""
    lr, d = 2e-5, 0.95
    for name, rate in rates(LLRD(d), peak=lr, layers=L).items():
        assert rate == pytest.approx(
            said(name, head=lr, bridge=lr, block=lambda at: lr * d ** (L - at), embeddings=lr * d ** (L + 1)), rel=1e-12
        ), name


@pytest.mark.parametrize("L", [2, 12])
def test_parity_with_chang_for_every_weight(L):
    base, own, d = 3.5e-6, 3.6e-6, 0.9
    for name, rate in rates(LLRD(d, top_power=0, head_learning_rate=own), peak=base, layers=L).items():
        assert rate == pytest.approx(
            said(name, head=own, bridge=own, block=lambda at: base * d ** (L - 1 - at), embeddings=base * d**L),
            rel=1e-12,
        ), name


@pytest.mark.parametrize("L", [2, 12])
def test_parity_with_electra_for_every_weight(L):
    """ELECTRA numbers embeddings 0, block l l + 1, the head L + 2, and scales by decay ** (L + 2 - number)."""
    lr, d = 1e-4, 0.8
    for name, rate in rates(LLRD(d, top_power=2), "electra", peak=lr, layers=L).items():
        assert rate == pytest.approx(
            said(name, head=lr, bridge=lr, block=lambda at: lr * d ** (L + 1 - at), embeddings=lr * d ** (L + 2)),
            rel=1e-12,
        ), name


@pytest.mark.parametrize("L", [2, 12])
def test_parity_with_beit_for_every_weight(L):
    """BEiT numbers tokens and patches 0, block l l + 1, all else L + 1, and scales by decay ** (L + 1 - number)."""
    d = 0.65
    for name, rate in scales(LLRD(d), Vit(L), family=VIT).items():
        assert rate == pytest.approx(
            said(name, head=1.0, bridge=1.0, block=lambda at: d ** (L + 1 - (at + 1)), embeddings=d ** (L + 1)),
            rel=1e-12,
        ), name


@pytest.fixture
def param_groups_layer_decay(monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """timm's function, from the two files that it is in: importing all of timm needs a torchvision that fits torch."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("needs timm")

    def module(name: str, **contents: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def file(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.replace("/", "_"), Path(found.origin).parent / f"{path}.py")
        assert spec and spec.loader
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    module("timm.layers", use_reentrant_ckpt=None)
    module("timm.models", group_parameters=file("models/_manipulate").group_parameters)
    return file("optim/_param_groups").param_groups_layer_decay


@pytest.mark.parametrize("L", [2, 12])
def test_parity_with_timm_for_every_weight(L, param_groups_layer_decay):
    """timm's final norm shares the last block's number, which is ``bridge_power=1``; both are powers of one float: equal."""
    model = Vit(L)
    theirs = {
        id(weight): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.75)
        for weight in group["params"]
    }
    ours = scales(LLRD(0.75, bridge_power=1), model, family=VIT)
    assert ours == {name: theirs[id(weight)] for name, weight in model.named_parameters()}
    assert ours["norm.weight"] == ours[f"blocks.{L - 1}.mlp.weight"] == 0.75


# Conformance


def test_shared_layers_are_refused():
    with pytest.raises(LuthierError, match="the blocks of this model share one set of weights"):
        begin(tiny("albert"), [LLRD(0.9)], steps=1)


def test_values_out_of_bounds_are_told_together():
    with pytest.raises(LuthierError) as caught:
        LLRD(decay=1.1, head_power=-1, top_power=-1, bridge_power=-1, head_learning_rate=0.0)
    fields = ["decay", "head_power", "top_power", "bridge_power", "head_learning_rate"]
    assert [fault.where for fault in caught.value.faults] == [f"llrd.{field}" for field in fields]


@pytest.mark.parametrize("made", [LLRD(0.7), LLRD(0.7, bridge_power=2, head_learning_rate=0.1)])
def test_it_keeps_its_promises(made):
    check_ingredient(made)


# It matters


def test_it_matters():
    assert len(set(rates(LLRD(0.9)).values())) == 5  # head and bridge, three blocks, embeddings
