"""What runs share: made once, by whoever comes first; and never another thing than the run would have made."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import luthier
from luthier.recipe.text import build
from luthier.stock import MOST, Stock, key
from luthier.training import frozen
from luthier.training.fitting import Fitting
from tests.little import recipe, same, sentences, weights

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]


def test_a_value_is_made_once_and_the_oldest_of_its_kind_goes():
    stock, made = Stock(), []

    def make(name: str) -> str:
        made.append(name)
        return name

    for number in range(MOST):
        stock.get(f"a-{number}", lambda number=number: make(f"a{number}"))
    stock.get("b-0", lambda: make("b0"))
    stock.get("a-0", lambda: make("again"))  # asked for last, so it stays
    stock.get("a-new", lambda: make("new"))
    assert made == [*(f"a{number}" for number in range(MOST)), "b0", "new"]
    stock.get("a-0", lambda: make("again"))
    stock.get("a-1", lambda: make("once more"))
    stock.get("b-0", lambda: make("again"))
    assert made[-1] == "once more"


def test_one_run_alone_lets_go_of_what_it_needs_no_more_and_one_of_several_does_not():
    for lasting, left in ((False, {"b-0"}), (True, {"a-0", "b-0"})):
        stock = Stock(lasting=lasting)
        for name in ("a-0", "b-0"):
            stock.get(name, lambda: 1)
        stock.forget("a")
        assert {name for name in ("a-0", "b-0") if stock.get(name, lambda: 2) == 1} == left


def test_frozen_outputs_are_let_go_of_when_their_stage_is_over(tiny_model, monkeypatch):
    alive = []
    real = frozen.FrozenOutputs.learn

    def learn(*given, **named):
        kept = real(*given, **named)
        alive.append(weakref.ref(kept))
        return kept

    seen = []
    monkeypatch.setattr(frozen.FrozenOutputs, "learn", learn)
    monkeypatch.setattr(Fitting, "_keep_end", lambda self, stage: seen.append([one() is not None for one in alive]))
    stage = {"steps": 14, "batch_size": 8}
    first = {"name": "top", **stage, "ingredients": [{"freeze": {"keep": ["head", "top:1"]}}]}
    made = build({"name": "two", "max_length": 16, "stages": [first, {"name": "all", **stage}]}, inside="a test")
    luthier.fit(made, model=tiny_model, data=sentences())
    gc.collect()
    assert len(alive) == 1
    assert seen == [[False], [False]]


def test_a_key_is_another_with_other_threads():
    with_all = key("probe", 1, "x")
    assert with_all == key("probe", 1, "x") != key("probe", 1, "y")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert key("probe", 1, "x") != with_all
    finally:
        torch.set_num_threads(before)


def _make(folder: Path, marks: Path) -> None:
    def slow() -> dict[str, np.ndarray]:
        (marks / str(multiprocessing.current_process().pid)).touch()
        time.sleep(0.5)
        return {"x": np.array([0.1, 1 / 3])}

    assert Stock(folder).arrays("k-1", slow)["x"].tolist() == [0.1, 1 / 3]


def test_processes_that_share_a_folder_make_arrays_once(tmp_path):
    (tmp_path / "marks").mkdir()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_make, args=(tmp_path / "shared", tmp_path / "marks")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(list((tmp_path / "marks").iterdir())) == 1


@pytest.mark.parametrize(
    "made",
    [
        recipe(BASE, probe=True, steps=4),
        recipe([{"freeze": {"keep": ["head", "top:1"]}}, *BASE], steps=20),
        recipe([{"freeze": {"keep": ["head"]}}, *BASE], steps=20),
    ],
    ids=["exact probe", "frozen layers", "probe by steps"],
)
def test_sharing_changes_no_bit_of_any_run(made, tiny_model, tmp_path):
    data = tmp_path / "data.csv"
    sentences(80).to_csv(data, index=False)
    stock = Stock(tmp_path / "shared")
    for seed in (0, 1, 2):
        alone = luthier.fit(made, model=tiny_model, data=data, seed=seed, out=tmp_path / f"alone{seed}")
        other = luthier.fit(made, model=tiny_model, data=data, seed=seed, out=tmp_path / f"other{seed}", stock=stock)
        assert same(weights(tmp_path / f"alone{seed}"), weights(tmp_path / f"other{seed}"))
        assert alone.metrics == other.metrics
        assert alone.curves["loss"] == other.curves["loss"]
    again = luthier.fit(
        made, model=tiny_model, data=data, seed=1, out=tmp_path / "late", stock=Stock(tmp_path / "shared")
    )
    assert same(weights(tmp_path / "late"), weights(tmp_path / "alone1"))
    assert again.metrics == luthier.Report.load(tmp_path / "alone1").metrics


def test_the_probe_is_solved_once_for_all_seeds_and_anew_for_other_rows(tiny_model, tmp_path, monkeypatch):
    from luthier.training import head

    solved = []
    real = head.solve_classification
    monkeypatch.setattr(head, "solve_classification", lambda *a, **k: solved.append(1) or real(*a, **k))
    data = tmp_path / "data.csv"
    sentences(80).to_csv(data, index=False)
    stock = Stock(tmp_path / "shared")
    made = recipe(BASE, probe=True, steps=1)
    reports = [luthier.fit(made, model=tiny_model, data=data, seed=seed, stock=stock) for seed in (0, 1)]
    assert len(solved) == 1
    assert reports[0].stages[0].seconds == reports[1].stages[0].seconds > 0  # counted in full, whoever solved it
    sentences(90).to_csv(data, index=False)
    luthier.fit(made, model=tiny_model, data=data, seed=0, stock=stock)
    assert len(solved) == 2
    luthier.fit(dataclasses.replace(made, max_length=8), model=tiny_model, data=data, seed=0, stock=stock)
    assert len(solved) == 3
