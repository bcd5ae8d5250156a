"""freeze: only what is named stays trainable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.anatomy import Anatomy
from luthier.core.table import ParamTable
from luthier.errors import LuthierError
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import FAMILIES, tiny


def kept(keep: tuple[str, ...], family: str = "bert", **tiny_args) -> set[str]:
    table = ParamTable.start(Anatomy.of(tiny(family, meta=True, **tiny_args)), learning_rate=1.0, steps=1)
    return {row.part.canonical for row in Freeze(keep=keep).settings(table).rows if row.trainable}


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}


def test_by_hand_keeping_the_head_leaves_two_tensors():
    assert kept(("head",)) == {"classifier.weight", "classifier.bias"}


def test_by_hand_the_top_block_of_bert_has_sixteen_tensors():
    # query, key, value, attention output, intermediate, output: 6 x (weight, bias); two layer norms: 2 x (weight, bias)
    assert len(kept(("top:1",))) == 16
    assert all(name.startswith("bert.encoder.layer.2.") for name in kept(("top:1",)))


def test_by_hand_biases_norms_and_globs():
    # 2 norms a block, 1 of the embeddings; each has a weight and a bias, and both count as norm
    assert len(kept(("norms",))) == 2 * (3 * 2 + 1)
    # 6 linear biases a block, the pooler's, the classifier's
    assert len(kept(("biases",))) == 6 * 3 + 2
    assert kept(("*.query.weight",)) == {
        f"bert.encoder.layer.{block}.attention.self.query.weight" for block in range(3)
    }


def test_keeping_all_changes_nothing():
    one, other = tiny("bert", dropout=0.0), tiny("bert", dropout=0.0)
    for model, ingredients in ((one, [Freeze(keep=("all",))]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=3)
        for _ in range(3):
            run.loss(model, batch()).backward()
            run.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(["head", "bridge", "norms", "biases", "embeddings", "top:2", "bottom:1"]), min_size=1))
def test_more_selectors_never_keep_less(selectors):
    together = kept(tuple(sorted(selectors)))
    assert together == set().union(*(kept((selector,)) for selector in selectors))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_frozen_weights_stay_to_the_bit_and_kept_ones_move(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = begin(model, [Freeze(keep=("head", "norms"))], learning_rate=1e-2, steps=2)
    for _ in range(2):
        run.loss(model, batch()).backward()
        run.step()
    run.finish()
    parts = {part.name: part for part in Anatomy.of(model).parts}
    for name, value in model.named_parameters():
        if parts[name].role == "head" or parts[name].kind == "norm":
            continue
        assert torch.equal(value, before[name]), name
    head = [name for name, part in parts.items() if part.role == "head" and part.kind == "weight"]
    assert any(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in head)


def test_what_lies_below_is_quiet_and_what_learns_is_not():
    model = tiny("bert", dropout=0.5)
    run = begin(model, [Freeze(keep=("head", "top:1"))], steps=1)
    modes = {name: module.training for name, module in run.model.named_modules()}
    assert not modes["bert.embeddings.dropout"]
    assert not modes["bert.encoder.layer.1.output.dropout"]
    assert modes["bert.encoder.layer.2.output.dropout"]
    assert modes["dropout"]
    loud = begin(tiny("bert", dropout=0.5), [Freeze(keep=("head",), quiet=False)], steps=1)
    assert all(module.training for module in loud.model.modules())


def test_a_selector_that_matches_nothing_is_refused():
    with pytest.raises(LuthierError, match=r"matches no weight with '\*\.nothing'"):
        begin(tiny("bert"), [Freeze(keep=("head", "*.nothing"))], steps=1)


def test_it_keeps_its_promises():
    check_ingredient(Freeze(keep=("head", "norms")))


def test_it_matters():
    assert len(kept(("head",))) < len(Anatomy.of(tiny("bert", meta=True)).parts)
