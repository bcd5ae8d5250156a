"""Drift: each statistic by hand, the token that the head reads in every family, and a study that only looks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.errors import DataError, ModelError
from luthier.studies.drift import (
    Drift,
    cka,
    cosine_pairs,
    cosine_self,
    diff,
    drift,
    fdr,
    features,
    look,
    study,
)
from luthier.studies.features import head_norm
from tests.tiny import FAMILIES, tiny


def batches(seed: int = 0, *, rows: int = 8, labels: int = 3, first: int = 1) -> list[dict[str, torch.Tensor]]:
    """Two batches; the second half of the rows ends in two tokens of padding."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        ids = torch.randint(3, 60, (rows, 7), generator=draw)
        ids[:, 0] = first
        ids[rows // 2 :, 5:] = 0
        made.append({
            "input_ids": ids, "attention_mask": (ids != 0).long(),
            "labels": torch.arange(rows) % labels,
        })  # fmt: skip
    return made


def trained(model: nn.Module, *, where: str = "", by: float = 0.05, seed: int = 1) -> nn.Module:
    """A copy whose weights with ``where`` in their name have moved at random."""
    moved, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in moved.named_parameters():
            if where in name:
                weight += by * torch.randn(weight.shape, generator=draw)
    return moved


def cloud(seed: int, n: int, h: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(n, h))


def rotation(seed: int, h: int) -> np.ndarray[Any, Any]:
    return np.asarray(np.linalg.qr(cloud(seed, h, h))[0])


# By hand


def test_diff_is_the_mean_length_of_the_steps():
    # (3, 4) is 5 long, (0, 1) is 1 long: the mean is 3
    assert diff(np.zeros((2, 2)), np.array([[3.0, 4.0], [0.0, 1.0]])) == 3.0


def test_cosines_of_different_rows():
    # angles 0, 90 and 45 degrees: cosines 0, 1/sqrt 2, 1/sqrt 2; lengths do not count
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert cosine_pairs(rows) == pytest.approx(math.sqrt(2) / 3, abs=1e-15)
    assert cosine_pairs(np.vstack([rows, np.zeros((1, 2))])) == pytest.approx(math.sqrt(2) / 3, abs=1e-15)
    assert cosine_pairs(rows[:1]) is None


def test_cosine_of_a_row_with_itself():
    # a row that doubled (cosine 1), one that turned by 60 degrees (1/2), one that was nothing: no direction
    before = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    after = np.array([[2.0, 0.0], [0.5, math.sqrt(0.75)], [1.0, 0.0]])
    assert cosine_self(before, after) == pytest.approx(0.75, abs=1e-15)
    assert cosine_self(before[2:], after[2:]) is None


def test_fisher_ratio_on_a_line():
    # classes at 0, 2 (mean 1) and 10, 12 (mean 11): S_W = 1, S_B = 25, ridge r = 1/4 of S_W: 25 / 1.25 = 20; without ridge 25
    rows, labels = np.array([[0.0], [2.0], [10.0], [12.0]]), np.array([0, 0, 1, 1])
    assert fdr(rows, labels, ridge=0.25) == pytest.approx(20.0, rel=1e-14)
    assert fdr(rows, labels, ridge=0.0) == pytest.approx(25.0, rel=1e-14)


def test_fisher_ratio_of_a_singular_scatter_needs_the_ridge():
    # the same line with a second axis that only tells the classes apart, by 2: S_W = diag(1, 0), S_B = [[25, 5], [5, 1]].
    # pinv does not see the second axis: 25. With ridge 0.02, r = 0.01: 25 / 1.01 + 1 / 0.01
    rows, labels = np.array([[0.0, -1], [2, -1], [10, 1], [12, 1]]), np.array([0, 0, 1, 1])
    assert fdr(rows, labels, ridge=0.0) == pytest.approx(25.0, rel=1e-12)
    assert fdr(rows, labels, ridge=0.02) == pytest.approx(25 / 1.01 + 100, rel=1e-12)


def test_fisher_ratio_counts_classes_by_their_rows():
    # 0, 2 and 5: means 1 and 5, of all 7/3; S_W = 2/3, S_B = (2 (4/3)^2 + (8/3)^2) / 3 = 32/9: ratio 16/3
    assert fdr(np.array([[0.0], [2.0], [5.0]]), np.array([4, 4, 9]), ridge=0.0) == pytest.approx(16 / 3, rel=1e-14)


def test_fisher_ratio_is_not_defined_for_one_class_or_for_classes_without_width():
    assert fdr(np.array([[0.0], [1.0]]), np.array([0, 0])) is None
    assert fdr(np.array([[0.1], [0.1], [0.7], [0.7]]), np.array([0, 0, 1, 1])) is None


def test_cka_by_hand():
    # x = (-1, 0, 1), y = (-1, 2, -1), centred: x.y = 0, so CKA(x, y) = 0. [x y] holds x: ||x^T [x y]||^2 = 2^2 + 0,
    # ||[x y]^T [x y]|| = |diag(2, 6)| = sqrt 40: CKA = 4 / (2 sqrt 40) = 1 / sqrt 10
    x, y = np.array([[-1.0], [0], [1]]), np.array([[-1.0], [2], [-1]])
    assert cka(x, y) == pytest.approx(0.0, abs=1e-15)
    assert cka(x, np.hstack([x, y])) == pytest.approx(1 / math.sqrt(10), rel=1e-14)
    assert cka(x + 5, np.hstack([x, y]) - 7) == pytest.approx(
        1 / math.sqrt(10), rel=1e-13
    )  # what is constant does not count
    assert cka(x, np.ones((3, 2))) is None


def test_cka_by_rows_is_cka_by_columns():
    # five rows of three columns go by columns; twelve columns of zeros more, and they go by rows
    x, y = cloud(0, 5, 3), cloud(1, 5, 2)
    assert cka(np.hstack([x, np.zeros((5, 12))]), y) == pytest.approx(cka(x, y), rel=1e-13)


# Identity


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["more rows", "more columns"])
def test_cka_of_features_with_themselves_turned_and_scaled_is_one(shape):
    x = cloud(0, *shape)
    assert cka(x, x) == pytest.approx(1.0, abs=1e-14)
    assert cka(x, x @ rotation(1, shape[1])) == pytest.approx(1.0, abs=1e-14)
    assert cka(x, -3.5 * x) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("family", ["roberta", "gpt2", "albert"])
def test_a_linear_probe_moves_no_feature_and_its_norm_shows(family):
    model = tiny(family)
    weight = Anatomy.of(model).output
    probed = trained(model, where=f"{weight}.")
    found = study(model, probed, batches(), outside=batches(5))
    assert all(layer.diff == 0.0 and layer.diff_outside == 0.0 and layer.relative == 0.0 for layer in found.layers)
    assert all(layer.ratio is None and layer.fdr_before == layer.fdr_after for layer in found.layers)
    assert all(layer.cka == pytest.approx(1, abs=1e-12) for layer in found.layers if layer.cka is not None)
    assert found.head_norm_before == float(torch.linalg.norm(model.get_submodule(weight).weight.detach().double()))
    assert found.head_norm_after == float(torch.linalg.norm(probed.get_submodule(weight).weight.detach().double()))


def test_the_norm_of_the_head_leaves_out_its_bias_and_holds_what_is_injected():
    class Injected(nn.Module):
        """As LoRA on a linear layer: 2 x the base layer's output more, in all three times its weight."""

        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer

        @property
        def weight(self) -> torch.Tensor:
            return self.base_layer.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base_layer(hidden) + 2 * hidden @ self.weight.T

    model = tiny("bert")
    with torch.no_grad():
        model.classifier.bias.fill_(5.0)
    plain = head_norm(model)
    assert plain == pytest.approx(float(model.classifier.weight.detach().norm()), rel=1e-6)
    model.classifier = Injected(model.classifier)
    assert head_norm(model) == pytest.approx(3 * plain, rel=1e-5)  # told in single precision


# Invariants


@given(seed=st.integers(0, 999), n=st.integers(4, 12), h=st.integers(1, 9), scale=st.sampled_from([1e-3, 7.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_statistics_turn_and_scale_as_they_should(seed: int, n: int, h: int, scale: float):
    x, y, turn, labels = cloud(seed, n, h), cloud(seed + 1, n, h), rotation(seed + 2, h), np.arange(n) % 2
    assert diff(scale * x @ turn, scale * y @ turn) == pytest.approx(scale * diff(x, y), rel=1e-9)
    assert fdr(scale * x @ turn + 3 * scale, labels) == pytest.approx(fdr(x, labels), rel=1e-6)
    assert cosine_self(scale * x @ turn, y @ turn) == pytest.approx(cosine_self(x, y), abs=1e-9)
    assert cosine_pairs(scale * x @ turn) == pytest.approx(cosine_pairs(x), abs=1e-9)
    found = cka(x, y)
    assert found is not None and 0 <= found <= 1
    assert cka(scale * x @ turn, y) == pytest.approx(found, abs=1e-9)
    assert cka(y, x) == pytest.approx(found, abs=1e-12)


# Parity


def test_pairs_are_the_mean_of_all_cosines_but_the_diagonal():
    rows = cloud(3, 9, 4)
    table = torch.nn.functional.cosine_similarity(torch.tensor(rows)[:, None], torch.tensor(rows)[None], dim=2)
    assert cosine_pairs(rows) == pytest.approx((float(table.sum()) - 9) / 72, abs=1e-14)


def test_cka_is_the_definition_by_centred_kernels():
    # HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K = X X^T, centred on both sides (Kornblith et al. 2019, eq. 3 and 4)
    x, y = cloud(4, 8, 3), cloud(5, 8, 5)
    middle = np.eye(8) - 1 / 8
    k, m = middle @ x @ x.T @ middle, middle @ y @ y.T @ middle
    expected = np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert cka(x, y) == pytest.approx(expected, rel=1e-12)


# The features


def last_state(model: nn.Module, batch: dict[str, torch.Tensor], at: int) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**given, output_hidden_states=True).hidden_states[at]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert"])
def test_encoders_give_the_first_token_of_each_block(family):
    model, batch = tiny(family), batches()[0]
    found = features(model, [batch])
    assert list(found) == ["block 0", "block 1", "block 2", "head"]
    assert np.array_equal(found["block 1"], last_state(model, batch, 2)[:, 0].double().numpy())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_decoders_give_the_last_token_that_is_no_padding(family):
    model, batch = tiny(family), batches()[0]
    found = features(model, [batch])
    states = last_state(model, batch, 2)
    assert np.array_equal(found["block 1"][:4], states[:4, 6].double().numpy())
    assert np.array_equal(found["block 1"][4:], states[4:, 4].double().numpy())


def test_a_model_that_answers_at_every_token_gives_the_mean_over_the_mask():
    model, batch = tiny("t5"), batches()[0]
    found = features(model, [batch])
    states = last_state(model, batch, 1).double()
    assert found["block 0"][0] == pytest.approx(states[0].mean(dim=0).numpy(), abs=1e-12)
    assert found["block 0"][7] == pytest.approx(states[7, :5].mean(dim=0).numpy(), abs=1e-12)


def test_a_model_that_averages_its_tokens_gives_their_mean():
    model, batch = tiny("modernbert"), batches()[0]
    model.config.classifier_pooling = "mean"
    states = last_state(model, batch, 1).double()
    assert features(model, [batch])["block 0"][7] == pytest.approx(states[7, :5].mean(dim=0).numpy(), abs=1e-12)


def test_shared_blocks_are_numbered_by_use():
    assert list(features(tiny("albert"), batches())) == ["block 0", "block 1", "block 2", "head"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_s_last_linear_makes_the_logits_of_what_is_called_head(family):
    model, batch = tiny(family), batches()[0]
    rows = torch.tensor(features(model, [batch])["head"], dtype=torch.float32)
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**given).logits
        made = model.get_submodule(Anatomy.of(model).output)(rows)
    if logits.ndim == 3:  # t5 answers at every token: the mean of the answers, where nothing is padded
        logits, made = logits[:4].mean(dim=1), made[:4]
    assert torch.allclose(made, logits, atol=1e-5)


class Declared(nn.Module):
    """Blocks over vectors, no tokens; its head's output, or nothing of it, is what it gives."""

    def __init__(self, *, reads: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.reads = reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x)) if self.reads else self.blocks(x).detach()


def test_a_declared_model_without_tokens_gives_its_blocks_vectors():
    model, x = Declared(), torch.ones(3, 2)
    anatomy = Anatomy.of(model, Family(blocks="blocks", head=("head",)))
    found = features(model, [{"x": x}], anatomy=anatomy)
    with torch.no_grad():
        assert np.array_equal(found["block 0"], model.blocks[0](x).double().numpy())
        assert np.array_equal(found["head"], model.blocks(x).double().numpy())


class Padded(nn.Module):
    """Tokens through a block that leaves NaN at padding; the head reads the token that ``reads`` says."""

    def __init__(self, reads: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.reads = reads

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x.masked_fill(attention_mask[..., None] == 0, math.nan))[:, self.reads])


@pytest.mark.parametrize("reads", [0, 1])
def test_what_padding_holds_does_not_matter(reads: int):
    model, x = Padded(reads), torch.arange(12.0).reshape(2, 3, 2)
    anatomy = Anatomy.of(model, Family(blocks="blocks", head=("head",)))
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with torch.no_grad():
        expected = model.blocks(x)[:, reads].double().numpy()
    assert np.array_equal(features(model, [batch], anatomy=anatomy)["block 0"], expected)


def test_a_model_whose_logits_come_from_elsewhere_is_refused():
    model = Declared(reads=False)
    anatomy = Anatomy.of(model, Family(blocks="blocks", head=("head",)))
    with pytest.raises(ModelError, match="do not depend on it"):
        features(model, [{"x": torch.ones(3, 2)}], anatomy=anatomy)


def test_a_model_without_a_head_no_rows_and_no_numbers_are_refused():
    with pytest.raises(ModelError, match="must end in a linear layer"):
        features(tiny("bert", head=False), batches())
    with pytest.raises(DataError, match="at least one row"):
        features(tiny("bert"), [])
    with pytest.raises(DataError, match=r"block 0  must be finite.*NaN"):
        features(trained(tiny("bert"), where="layer.0", by=math.nan), batches())


# It only looks


def state(model: nn.Module) -> list[Any]:
    return [
        [(name, value.clone()) for name, value in model.state_dict().items()],
        [module.training for module in model.modules()],
        [(weight.requires_grad, weight.grad) for weight in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    ]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_study_changes_nothing_and_sees_through_dropout(family):
    model = tiny(family, dropout=0.5)
    quiet = look(model, batches())
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before, drawn = state(model), torch.random.get_rng_state()
    noisy = look(model, batches(), outside=batches(3))
    after = state(model)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(np.array_equal(quiet.inside.vectors[name], rows) for name, rows in noisy.inside.vectors.items())


def test_a_study_of_frozen_weights_works():
    model = tiny("gpt2").requires_grad_(False)
    assert study(model, trained(model), batches()).layers[-1].diff > 0


# The study


def test_numbers_of_the_study_are_those_of_the_functions():
    model = tiny("roberta")
    other = trained(model)
    found = study(model, other, batches(), outside=batches(5), ridge=0.1)
    before, after, far = features(model, batches()), features(other, batches()), features(other, batches(5))
    layer = found.layers[2]
    old, new = before["block 2"], after["block 2"]
    labels = np.tile(np.arange(8) % 3, 2)
    assert (layer.name, layer.width, found.rows, found.rows_outside, found.classes) == ("block 2", 16, 16, 16, 3)
    assert layer.diff == diff(old, new)
    assert layer.relative == layer.diff / np.linalg.norm(old, axis=1).mean()
    assert layer.diff_outside == diff(features(model, batches(5))["block 2"], far["block 2"])
    assert layer.ratio == layer.diff / layer.diff_outside
    assert (layer.cosine_self, layer.cka) == (cosine_self(old, new), cka(old, new))
    assert (layer.cosine_pairs_before, layer.cosine_pairs_after) == (cosine_pairs(old), cosine_pairs(new))
    assert (layer.fdr_before, layer.fdr_after) == (fdr(old, labels, ridge=0.1), fdr(new, labels, ridge=0.1))


def test_what_moves_one_block_moves_no_block_below_it():
    model = tiny("bert")
    found = study(model, trained(model, where="layer.1."), batches())
    assert [layer.diff > 0 for layer in found.layers] == [False, True, True, True]


def relabelled(all_: list[Any], change: Callable[[torch.Tensor], Any]) -> list[Any]:
    return [{**batch, "labels": change(batch["labels"])} for batch in all_]


def test_labels_that_are_no_classes_give_no_fisher_ratio():
    model = tiny("bert")
    for change in (lambda labels: labels.float(), lambda labels: None):
        found = study(model, trained(model), relabelled(batches(), change))
        assert found.classes == 0 and found.layers[0].fdr_before is None and found.layers[0].diff > 0


def test_two_looks_at_other_rows_or_layers_are_refused():
    model = tiny("bert")
    seen = look(model, batches())
    with pytest.raises(DataError, match="Do not shuffle"):
        drift(seen, look(model, batches()[::-1]))
    with pytest.raises(DataError, match="Do not shuffle"):
        drift(seen, look(model, relabelled(batches(), lambda labels: labels.flip(0))))
    with pytest.raises(DataError, match="same layers"):
        drift(seen, look(tiny("bert", layers=2), batches()))
    with pytest.raises(DataError, match="before and after, or never"):
        drift(seen, look(model, batches(), outside=batches(5)))


@pytest.fixture(scope="module")
def found() -> Drift:
    model = tiny("gpt2")
    return study(model, trained(model, by=0.5), batches(), outside=batches(5))


def test_the_study_is_json_and_eighty_columns(found: Drift):
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["layers"][3]["name"] == "head" and told["layers"][3]["cka"] == found.layers[3].cka
    lines = found.lines()
    assert max(map(len, lines)) <= 80
    assert lines[5].startswith("block 1") and f"{found.layers[1].diff:.3g}" in lines[5]


def test_the_plot_is_the_same_bytes_twice_and_says_its_units(found: Drift):
    drawn = found.plot()
    assert drawn == found.plot()
    assert drawn.startswith("<svg ") and drawn.rstrip().endswith("</svg>")
    for word in ("moved (L2)", "likeness", "FDR", "outside", "what the head reads"):
        assert word in drawn


def test_the_plot_leaves_out_what_is_not_known():
    model = tiny("bert")
    drawn = study(model, trained(model), relabelled(batches(), lambda labels: None)).plot()
    assert "outside" not in drawn and "CKA" in drawn
