"""ntk: the neural tangent kernel of a classifier, P + F; and kernel regression on it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from sklearn.linear_model import LogisticRegressionCV
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.families import Family
from luthier.errors import DataError, ModelError
from luthier.studies.kernel_regression import kernel_regression, kernel_regressions
from luthier.studies.ntk import NTK, ntk
from tests.tiny import FAMILIES, tiny

CLASSIFIERS = [family for family in FAMILIES if family != "t5"]  # a T5 encoder has a head for tokens only
IDS = torch.tensor([[1, 5, 6, 7, 5, 2], [1, 9, 5, 8, 2, 0], [1, 3, 4, 2, 0, 0], [1, 9, 9, 9, 9, 2]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": torch.tensor([0, 1, 2, 1])}
ALL = slice(None)


class Straight(nn.Module):
    """phi = B x, f = V phi + b, in float64."""

    def __init__(self, B: torch.Tensor, V: torch.Tensor, b: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(B.shape[1], B.shape[0], bias=False)])
        self.head = nn.Linear(V.shape[1], V.shape[0], bias=b is not None)
        self.double()
        with torch.no_grad():
            self.layers[0].weight.copy_(B)
            self.head.weight.copy_(V)
            if b is not None:
                self.head.bias.copy_(b)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.layers[0](x)))


STRAIGHT = Family(blocks="layers", head=("head",))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def text(seed: int, rows: int, classes: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, 6), generator=random)
    labels = torch.randint(0, classes, (rows,), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def product(model: nn.Module, batch: dict[str, torch.Tensor], *, head: bool) -> np.ndarray:
    """The Gram matrix of whole gradients, one row and logit after the other: of the last linear module, or of all else."""
    output = Anatomy.of(model).output
    weights = [weight for name, weight in model.named_parameters() if name.startswith(f"{output}.") == head]
    found = []
    for at in range(len(batch["labels"])):
        row = {name: value[at : at + 1] for name, value in batch.items() if name != "labels"}
        for logit in model(**row).logits[0]:
            slopes = torch.autograd.grad(logit, weights, retain_graph=True, materialize_grads=True)
            found.append(torch.cat([slope.reshape(-1) for slope in slopes]))
    G = torch.stack(found)
    rows = len(batch["labels"])
    return (G @ G.T).reshape(rows, len(G) // rows, rows, len(G) // rows).numpy()


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the rounding of sums of float64."""
    return bool(np.abs(one - other).max() <= 1e-12 * np.abs(other).max())


# By hand.


def test_two_points_of_a_diagonal_model():
    # V = diag(1, 2), B = I, x = (1, 0), x' = (1, 1): <phi, phi'> + 1 = 2, so P = 2 I. Jphi Jphi'^T = <x, x'> I = I, so F = V V^T =
    # diag(1, 4), and P + F = diag(3, 6).
    model = Straight(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])), torch.zeros(2))
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    kernel = ntk(model, [{"x": x, "labels": torch.tensor([0, 1])}], family=STRAIGHT)
    first, second = slice(0, 1), slice(1, 2)
    for part, wanted in (("P", [2, 2]), ("F", [1, 4]), ("P+F", [3, 6])):
        assert np.array_equal(kernel.block(part, first, second)[0, :, 0], np.diag(wanted)), part


def test_the_change_and_the_ratio_of_one_row():
    # As above with one row x = (1, 0), y = 0 and logits (1, 0): P = (1 + 1) I, F = diag(1, 4). delta = (1 - p, -(1 - p)) with
    # 1 - p = 1 / (1 + e). F delta is (1 - p)(1, -4), (P + F) delta is (1 - p)(3, -6): the ratio is sqrt(17 / 45).
    model = Straight(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])), torch.zeros(2))
    batch = {"x": torch.tensor([[1.0, 0.0]], dtype=torch.float64), "labels": torch.tensor([0])}
    kernel = ntk(model, [batch], family=STRAIGHT)
    assert np.allclose(kernel.change("F"), np.array([[1, -4]]) / (1 + math.e), rtol=1e-14)
    assert np.allclose(kernel.change(), np.array([[3, -6]]) / (1 + math.e), rtol=1e-14)
    assert kernel.ft_ratio == pytest.approx(math.sqrt(17 / 45), rel=1e-14)
    told = kernel.to_dict()  # as matrices: P = diag(2, 2), F = diag(1, 4), P + F = diag(3, 6)
    assert told["parts"]["P"] == {"rank": 2, "frobenius": pytest.approx(8**0.5), "trace": pytest.approx(4)}
    assert told["parts"]["F"] == {"rank": 2, "frobenius": pytest.approx(17**0.5), "trace": pytest.approx(5)}
    assert told["parts"]["P+F"] == {"rank": 2, "frobenius": pytest.approx(45**0.5), "trace": pytest.approx(9)}
    assert told["head_norm"] == pytest.approx(5**0.5)
    assert told["weights"] == 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model_has_closed_forms(bias):
    B, V, x = drawn(5, 4), drawn(3, 5, seed=1), drawn(6, 4, seed=2)
    model = Straight(B, V, drawn(3, seed=3) if bias else None)
    kernel = ntk(model, [{"x": x, "labels": torch.zeros(6, dtype=torch.long)}], family=STRAIGHT)
    phi, V, x = (x @ B.T).numpy(), V.numpy(), x.numpy()
    assert near(kernel.P, phi @ phi.T + bias)
    assert near(kernel.F, np.einsum("nm,cd->ncmd", x @ x.T, V @ V.T))
    assert kernel.rank("P") == 3 * (4 + bias)  # phi has four directions, and the bias one
    assert kernel.rank("F") == 4 * 3


def test_lora_at_its_start_sees_only_what_its_first_matrix_lets_through():
    # With B = 0 in W + (alpha / r) B A only B has a gradient, (alpha / r) V^T e_c (A x)^T: F = (alpha / r)^2 <A x, A x'> V V^T.
    V, x = drawn(3, 5, seed=1), drawn(6, 4, seed=2)
    model = Straight(drawn(5, 4), V)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["layers.0"])
    inject_adapter_in_model(config, model)
    model.double()
    A = model.layers[0].lora_A["default"].weight.detach()
    batch = {"x": x, "labels": torch.zeros(6, dtype=torch.long)}
    kernel = ntk(model, [batch], family=STRAIGHT, where=("*.lora_*",))
    through = (x @ A.T).numpy()
    assert near(kernel.F, np.einsum("nm,cd->ncmd", 9.0 * through @ through.T, (V @ V.T).numpy()))
    assert near(ntk(model, [batch], family=STRAIGHT, where=("*.lora_B*",)).F, kernel.F)
    assert not ntk(model, [batch], family=STRAIGHT, where=("*.lora_A*",)).F.any()
    plain = ntk(Straight(drawn(5, 4), V), [batch], family=STRAIGHT)
    assert np.array_equal(kernel.P, plain.P)
    model.layers[0].merge()
    with pytest.raises(ModelError, match="unmerged"):
        ntk(model, [batch], family=STRAIGHT)


# Identity.


def test_nothing_of_the_model_changes():
    model = tiny("bert", dropout=0.5).train()
    model.bert.pooler.eval()
    frozen = model.bert.embeddings.LayerNorm.bias.requires_grad_(False)
    model.classifier.bias.grad = torch.ones(3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batch = dict(TEXT)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = ntk(model, [batch], held=[batch], limit_bytes=200_000)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad and all(w.requires_grad for w in model.parameters() if w is not frozen)
    assert torch.equal(model.classifier.bias.grad, torch.ones(3))
    assert [name for name, w in model.named_parameters() if w.grad is not None] == ["classifier.bias"]
    assert not any(module._forward_hooks for module in model.modules())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert np.array_equal(first.F, ntk(model.eval(), [batch], held=[batch], limit_bytes=200_000).F)  # no dropout


def test_a_call_without_gradients_and_frozen_weights_that_are_named_give_the_same():
    model = tiny("bert", layers=1).double()
    whole = ntk(model, [TEXT])
    model.requires_grad_(False)
    with torch.no_grad():
        assert np.array_equal(ntk(model, [TEXT], where=("all",)).F, whole.F)


# Invariants.


@settings(max_examples=5, deadline=None)
@given(limit=st.integers(15_000, 1_500_000))
def test_the_kernel_does_not_depend_on_how_much_is_held_at_once(limit):
    model, few = tiny("bert", layers=1).double(), {name: value[:2] for name, value in TEXT.items()}
    whole, parts = ntk(model, [few]), ntk(model, [few], limit_bytes=limit)
    assert near(parts.F, whole.F)
    largest = 2 * 3 * 32 * 8  # one row of the widest weight, over two texts and three classes, float64
    assert parts.most_bytes <= max(limit, largest)
    assert whole.passes == 1 and parts.passes >= whole.most_bytes / max(limit, largest)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 4), scale=st.floats(0.1, 50.0))
def test_a_larger_head_scales_f_by_its_square_and_leaves_p(seed, classes, scale):
    B, V, x = drawn(5, 4, seed=seed), drawn(classes, 5, seed=seed + 1), drawn(4, 4, seed=seed + 2)
    batch = {"x": x, "labels": torch.zeros(4, dtype=torch.long)}
    one, two = (ntk(Straight(B, V * s, torch.ones(classes)), [batch], family=STRAIGHT) for s in (1.0, scale))
    assert np.array_equal(one.P, two.P)
    assert near(two.F, scale**2 * one.F)
    assert two.head_norm == pytest.approx(scale * one.head_norm)
    for part in ("P", "F", "P+F"):
        matrix = one.block(part, ALL, ALL).reshape(4 * classes, -1)
        assert np.array_equal(matrix, matrix.T)
        assert np.linalg.eigvalsh(matrix).min() >= -1e-12 * np.linalg.eigvalsh(matrix).max()
        told = one.to_dict()["parts"][part]
        assert told["frobenius"] == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
        assert told["trace"] == pytest.approx(np.trace(matrix), rel=1e-12)
        assert told["rank"] == np.linalg.matrix_rank(
            matrix, hermitian=True, tol=4 * classes * one.eps * np.linalg.norm(matrix, 2)
        )
    assert one.rank("P") % classes == 0


def test_millions_of_weights_are_summed_as_exactly_as_few():
    # All gradients are positive: a float32 sum of two million products, one after the other, is off in the fifth digit.
    x = 1.0 + drawn(2, 500_000).abs()
    V = 1.0 + drawn(2, 4, seed=1).abs()
    model = Straight(torch.zeros(4, 500_000), V).float()
    kernel = ntk(model, [{"x": x.float(), "labels": torch.tensor([0, 1])}], family=STRAIGHT)
    wanted = np.einsum("nm,cd->ncmd", (x @ x.T).numpy(), (V @ V.T).numpy())
    assert np.abs(kernel.F / wanted - 1).max() < 2e-6


def test_rows_may_come_in_any_batches_and_held_rows_stand_last():
    model = tiny("roberta", layers=1).double()
    halves = [{name: value[at : at + 2] for name, value in TEXT.items()} for at in (0, 2)]
    whole, split, held = ntk(model, [TEXT]), ntk(model, halves), ntk(model, halves[:1], held=halves[1:])
    assert np.array_equal(whole.F, split.F) and np.array_equal(whole.P, split.P)
    assert np.array_equal(whole.F, held.F) and held.train == 2 and held.labels.tolist() == [0, 1, 2, 1]
    assert held.change().shape == (4, 3)
    assert near(held.change(), np.einsum("ncmd,md->nc", whole.block("P+F", ALL, slice(2)), whole.delta[:2]))


# Parity.


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_both_parts_are_the_whole_gradients_products(family):
    model = tiny(family, layers=2).double()
    kernel = ntk(model, [TEXT], limit_bytes=100_000)
    assert near(kernel.block("P", ALL, ALL), product(model, TEXT, head=True))
    assert near(kernel.F, product(model, TEXT, head=False))
    assert kernel.head_bias == (family not in ("gpt2", "llama", "qwen2"))


def test_f_is_what_the_papers_feature_jacobians_give():
    # Their way: the whole Jacobian of phi, times the last linear module's weight, times itself.
    model = tiny("bert", layers=1).double()
    weights = [weight for name, weight in model.named_parameters() if not name.startswith("classifier")]
    rows = []
    for at in range(4):
        phi = model.bert(IDS[at : at + 1], attention_mask=TEXT["attention_mask"][at : at + 1]).pooler_output[0]
        slopes = [torch.autograd.grad(one, weights, retain_graph=True, materialize_grads=True) for one in phi]
        Jphi = torch.stack([torch.cat([slope.reshape(-1) for slope in of_one]) for of_one in slopes])
        rows.append(model.classifier.weight.detach() @ Jphi)
    assert near(ntk(model, [TEXT]).F, torch.einsum("ncp,mdp->ncmd", torch.stack(rows), torch.stack(rows)).numpy())


def test_a_table_that_is_also_read_without_its_module_is_taken_whole():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layers, self.head = nn.Embedding(9, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 2)

        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            hidden = self.layers[0](self.words(input_ids).mean(1)).tanh()
            return SimpleNamespace(logits=self.head(hidden @ self.words.weight.T @ self.words.weight))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied().double()
    family = Family(blocks="layers", embeddings=("words",), head=("head",))
    ids = torch.tensor([[1, 2, 2], [2, 3, 4]])
    kernel = ntk(model, [{"input_ids": ids, "labels": torch.tensor([0, 1])}], family=family, where=("embeddings",))
    G = [
        torch.autograd.grad(model(ids[at : at + 1]).logits[0, c], model.words.weight)[0].reshape(-1)
        for at in range(2)
        for c in range(2)
    ]
    assert near(kernel.F.reshape(4, 4), torch.stack(G).mm(torch.stack(G).T).numpy())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_one_small_step_changes_the_logits_as_predicted(family):
    # f(theta - eta grad) - f(theta) = eta (P + F) delta + O(eta^2), so that halving eta quarters the error.
    train, held = text(1, 5), text(2, 3)
    model = tiny(family, layers=2).double()
    kernel = ntk(model, [train], held=[held])
    inputs = {name: torch.cat([train[name], held[name]]) for name in ("input_ids", "attention_mask")}
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    errors = []
    for eta in (1e-6, 5e-7):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(start[name])
        before = model(**inputs).logits
        loss = nn.functional.cross_entropy(before[:5], train["labels"], reduction="sum")
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
                weight -= eta * slope
            change = (model(**inputs).logits - before).numpy()
        errors.append(float(np.abs(change - eta * kernel.change()).max() / np.abs(change).max()))
    assert errors[0] < 1e-4
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)  # of the change, which halves too


def test_kernel_regression_is_the_papers_fit():
    model = tiny("bert", layers=1).double()
    kernel = ntk(model, [text(3, 12)], held=[text(4, 7)])
    found = kernel_regressions(kernel)
    assert list(found) == ["P", "F", "P+F"]
    for part, mine in found.items():
        train = kernel.block(part, slice(12), slice(12)).reshape(36, 36)
        held = kernel.block(part, slice(12, None), slice(12)).reshape(21, 36)
        wanted = np.eye(3, dtype=int)[kernel.labels].reshape(-1)
        with pytest.warns(FutureWarning):
            theirs = LogisticRegressionCV(cv=5, max_iter=10_000, random_state=0).fit(train, wanted[:36])
        assert mine.train.answers == theirs.score(train, wanted[:36])
        assert mine.held.answers == theirs.score(held, wanted[36:])
        likely = theirs.decision_function(held).reshape(7, 3).argmax(1)
        assert mine.held.classes == float((likely == kernel.labels[12:]).mean())
        assert mine.held.all_no == 2 / 3


# What is told and refused.


def test_the_numbers_are_plain_and_the_lines_are_short():
    kernel = ntk(tiny("bert", layers=1), [text(3, 6)])
    told = kernel.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["rank_tolerance"] == 6 * 3 * torch.finfo(torch.float32).eps
    regression = kernel_regression(kernel, "F")
    assert regression.held is None and json.loads(json.dumps(regression.to_dict())) == regression.to_dict()
    assert max(map(len, [*kernel.lines(), *regression.lines()])) <= 80
    picture = kernel.plot()
    assert picture == kernel.plot() and "number of the eigenvalue" in picture


def test_a_kernel_in_which_nothing_changes_has_no_ratio():
    kernel = NTK(
        np.zeros((1, 1)), np.zeros((1, 2, 1, 2)), np.zeros((1, 2)), np.zeros(1, int), 1, 0.0, False, 1, 1, 8, 1e-16
    )
    assert math.isnan(kernel.ft_ratio) and kernel.to_dict()["ft_ratio"] is None and kernel.rank("P+F") == 0


def test_what_is_no_classifier_is_refused():
    with pytest.raises(ModelError, match="last linear"):
        ntk(tiny("bert").requires_grad_(False), [TEXT])
    with pytest.raises(ModelError, match="where"):
        ntk(tiny("bert"), [TEXT], where=("classifier*",))
    with pytest.raises(ModelError, match="without a head"):
        ntk(tiny("bert", head=False), [TEXT])
    with pytest.raises(ModelError, match="logits"):
        ntk(tiny("t5"), [TEXT])
    with pytest.raises(ModelError, match="logits"):
        ntk(tiny("bert", labels=1), [{**TEXT, "labels": torch.zeros(4, dtype=torch.long)}])
    with pytest.raises(DataError, match="at least one row"):
        ntk(tiny("bert"), [])
    with pytest.raises(DataError, match="class numbers below 3"):
        ntk(tiny("bert"), [{**TEXT, "labels": torch.tensor([0, 1, 3, 1])}])
    with pytest.raises(DataError, match="labels"):
        ntk(tiny("bert"), [{"input_ids": IDS}])
    with pytest.raises(DataError, match="at least 5 rows"):
        kernel_regression(ntk(tiny("bert", layers=1), [TEXT]))
    assert kernel_regressions(ntk(tiny("bert", layers=1), [TEXT])) == {}


def test_a_kernel_that_does_not_fit_in_memory_is_refused_before_it_is_made():
    # 2^27 numbers of 8 bytes are 11585^2 and some more: 57 rows of 200 classes are 11400, 58 are 11600.
    batches = [text(at, 29, classes=200) for at in (0, 1)]
    must = r"the kernel  must fit in 1\.1 GB; got 58 rows of 200 classes\.  Look at 57 rows at most, held-out ones among them\."
    with pytest.raises(DataError, match=must):
        ntk(tiny("bert", labels=200), batches[:1], held=batches[1:])


# It matters.


def test_what_is_not_trained_adds_nothing_to_f():
    model = tiny("bert", layers=2).double()
    whole = ntk(model, [TEXT]).F
    apart = [ntk(model, [TEXT], where=(one,)).F for one in ("embeddings", "block:0", "block:1", "bridge")]
    assert all(part.any() for part in apart)
    assert near(sum(apart), whole)
    model.bert.embeddings.requires_grad_(False)
    assert near(ntk(model, [TEXT]).F, sum(apart[1:]))
