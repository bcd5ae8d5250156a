"""llrd: a smaller rate for each layer further down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.anatomy import Anatomy
from luthier.core.table import ParamTable
from luthier.errors import LuthierError
from luthier.ingredients.settings.llrd import LLRD, power
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import FAMILIES, tiny


def rates(ingredient: LLRD, family: str = "bert", *, peak: float = 1.0, layers: int = 3) -> dict[str, float]:
    """The rate of every weight by canonical name."""
    table = ParamTable.start(Anatomy.of(tiny(family, layers=layers, meta=True)), learning_rate=peak, steps=1)
    return {row.part.canonical: peak * row.lr_scale for row in ingredient.settings(table).rows}


def test_by_hand_zhang_on_six_layers():
    """2e-5 and 0.95: head 2e-5, block 5 1.9e-5, block 4 1.805e-5, block 0 2e-5 * 0.95**6 = 1.4702e-5, embeddings * 0.95**7 = 1.3967e-5."""
    found = rates(LLRD(0.95), peak=2e-5, layers=6)
    assert found["classifier.weight"] == found["bert.pooler.dense.weight"] == pytest.approx(2e-5)
    assert found["bert.encoder.layer.5.output.dense.weight"] == pytest.approx(1.9e-5)
    assert found["bert.encoder.layer.4.attention.self.query.bias"] == pytest.approx(1.805e-5)
    assert found["bert.encoder.layer.0.output.LayerNorm.weight"] == pytest.approx(1.4702e-5, rel=1e-4)
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(1.3967e-5, rel=1e-4)


def test_by_hand_chang_gives_the_top_block_the_base_rate():
    """3.5e-6 * 0.9**12 = 9.885e-7 for the embeddings of twelve layers."""
    found = rates(LLRD(0.9, head_power=0, top_power=0), peak=3.5e-6, layers=12)
    assert found["bert.encoder.layer.11.output.dense.weight"] == pytest.approx(3.5e-6)
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(9.885e-7, rel=1e-3)


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


@pytest.mark.parametrize("blocks", [2, 12, 24])
def test_parity_with_timm_and_beit(blocks):
    """timm and BEiT number embeddings 0, block l l + 1, head L + 1, and scale by decay ** (L + 1 - number)."""
    decay = 0.75
    assert decay ** power(blocks + 2, blocks=blocks, head_power=0, top_power=1) == decay ** (blocks + 1 - (blocks + 1))
    for block in range(blocks):
        assert power(block + 1, blocks=blocks, head_power=0, top_power=1) == blocks + 1 - (block + 1)
    assert power(0, blocks=blocks, head_power=0, top_power=1) == blocks + 1


def test_a_decay_of_one_changes_nothing():
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [LLRD(1.0)]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=3)
        for _ in range(3):
            run.loss(model, batch).backward()
            run.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


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


def test_shared_layers_are_refused():
    with pytest.raises(LuthierError, match="the blocks of this model share one set of weights"):
        begin(tiny("albert"), [LLRD(0.9)], steps=1)


def test_it_keeps_its_promises():
    check_ingredient(LLRD(0.7))


def test_it_matters():
    assert len(set(rates(LLRD(0.9)).values())) == 5  # head and bridge, three blocks, embeddings
