"""Soups: means by hand, what greed keeps, and a soup of real run folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.finished.soups import greedy, mean
from luthier.sources.models import reload
from tests.little import recipe, sentences, weights
from tests.tinyfolder import tiny_folder


def test_the_mean_of_one_two_and_six_is_three_and_counts_are_left_alone():
    states = [{"w": torch.tensor([value]), "n": torch.tensor(number)} for number, value in enumerate((1.0, 2.0, 6.0))]
    assert mean(states)["w"].item() == 3.0
    assert mean(states)["n"].item() == 0


def test_the_mean_of_one_is_itself_to_the_bit():
    state = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(mean([state])["w"], state["w"])


def test_greed_keeps_what_does_no_harm():
    # Scores of sets: 2 alone .8; with 0 .7 (harm: left out); with 1 .8 (no worse: kept); with 1 and 3 .9 (kept).
    scores = {(2,): 0.8, (2, 0): 0.7, (2, 1): 0.8, (2, 1, 3): 0.9}
    assert greedy(4, [2, 0, 1, 3], lambda some: scores[tuple(some)], higher=True) == (2, 1, 3)


def test_greed_on_a_loss_wants_less_and_never_what_is_no_number():
    scores = {(0,): 0.8, (0, 1): 0.5, (0, 1, 2): float("nan")}
    assert greedy(3, [0, 1, 2], lambda some: scores[tuple(some)], higher=False) == (0, 1)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    (out / "data.csv").write_text(sentences().to_csv(index=False))
    for seed in range(3):
        luthier.fit(
            recipe(["adamw"], steps=8), model=tiny_model, data=str(out / "data.csv"), out=out / str(seed), seed=seed
        )
    return [out / str(seed) for seed in range(3)]


def test_a_uniform_soup_is_the_mean_of_the_saved_models(runs, tmp_path):
    made = luthier.soup(runs, out=tmp_path / "soup", how="uniform")
    expected = mean([weights(run) for run in runs])
    found = weights(tmp_path / "soup")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert made.kept == tuple(map(str, runs))
    assert json.loads((tmp_path / "soup" / "soup.json").read_text())["metrics"] == made.metrics
    assert reload(tmp_path / "soup" / "model").config.id2label == reload(runs[0] / "model").config.id2label


def test_a_greedy_soup_is_never_worse_on_validation_than_its_best_run(runs, tmp_path):
    made = luthier.soup(runs, out=tmp_path / "soup")
    best = max(one["validation"]["accuracy"] for one in made.each.values())
    assert made.metrics["validation"]["accuracy"] >= best
    assert "optimistic" in made.notes[0]
    first = luthier.report.Report.load(runs[0])
    assert made.each[str(runs[0])]["test"] == pytest.approx(first.metrics["test"])


def test_each_run_is_scored_on_the_rows_it_held_out_whatever_its_seed(runs, tmp_path):
    made = luthier.soup(runs[1:], out=tmp_path / "soup", how="uniform")
    for run in runs[1:]:
        told = luthier.report.Report.load(run).metrics
        assert {name: made.each[str(run)][name] for name in ("validation", "test")} == {
            name: pytest.approx(told[name]) for name in ("validation", "test")
        }


def test_the_shifted_tests_of_the_run_are_scored_too(tiny_model, tmp_path):
    sentences().to_csv(tmp_path / "data.csv", index=False)
    sentences(12, seed=9).replace({"label": {"good": "+"}}).to_csv(tmp_path / "far.csv", index=False)
    for seed in (1, 2):
        luthier.fit(
            recipe(["adamw"], steps=2),
            model=tiny_model,
            data=str(tmp_path / "data.csv"),
            ood={"far": str(tmp_path / "far.csv")},
            label_map={"far": {"+": "good"}},
            out=tmp_path / str(seed),
            seed=seed,
        )
    runs = [tmp_path / "1", tmp_path / "2"]
    made = luthier.soup(runs, out=tmp_path / "soup", ood={"near": sentences(8, seed=5)})
    told = luthier.report.Report.load(runs[0]).metrics["ood"]["far"]
    assert made.each[str(runs[0])]["ood"]["far"] == pytest.approx(told)
    assert set(made.metrics["ood"]) == {"far", "near"}


def test_runs_that_split_their_data_otherwise_need_rows_that_none_was_trained_on(runs, tiny_model, tmp_path):
    data, one = runs[0].parent / "data.csv", recipe(["adamw"], steps=1)
    other = dataclasses.replace(one, seeds={"split": 5})
    luthier.fit(other, model=tiny_model, data=str(data), out=tmp_path / "other")
    pair, out = [runs[0], tmp_path / "other"], tmp_path / "soup"
    with pytest.raises(LuthierError, match="must have the data of .*got a split by seed 5, and not 0.*--data"):
        luthier.soup(pair, out=out)
    with pytest.raises(LuthierError, match=r"data +must have train, validation and test of its own.*got 0, 5"):
        luthier.soup(pair, out=out, data=str(data))
    assert not out.exists()
    own = {name: sentences(12, seed=seed) for seed, name in enumerate(("train", "validation", "test"), 20)}
    assert luthier.soup(pair, out=out, data=own).metrics["test"]["n"] == 12


def test_split_seeds_do_not_matter_where_the_data_has_splits(tiny_model, tmp_path):
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("train", "validation", "test")):
        sentences(30, seed=seed).to_csv(tmp_path / "data" / f"{name}.csv", index=False)
    for seed in (1, 2):
        one = dataclasses.replace(recipe(["adamw"], steps=1), seeds={"split": seed})
        luthier.fit(one, model=tiny_model, data=str(tmp_path / "data"), out=tmp_path / str(seed))
    made = luthier.soup([tmp_path / "1", tmp_path / "2"], out=tmp_path / "soup")
    assert made.metrics["test"]["n"] == 30


def test_data_that_has_changed_since_is_refused_and_data_in_memory_is_asked_for(tiny_model, tmp_path):
    data = tmp_path / "data.csv"
    sentences().to_csv(data, index=False)
    for seed in (1, 2):
        luthier.fit(recipe(["adamw"], steps=1), model=tiny_model, data=str(data), out=tmp_path / str(seed), seed=seed)
        luthier.fit(recipe(["adamw"], steps=1), model=tiny_model, data=sentences(), out=tmp_path / f"m{seed}")
    sentences(70).to_csv(data, index=False)
    with pytest.raises(LuthierError, match="data.csv  must hold what it held"):
        luthier.soup([tmp_path / "1", tmp_path / "2"], out=tmp_path / "soup")
    data.unlink()
    with pytest.raises(LuthierError, match="must be where it was .* Give --data"):
        luthier.soup([tmp_path / "1", tmp_path / "2"], out=tmp_path / "soup")
    pair = [tmp_path / "m1", tmp_path / "m2"]
    with pytest.raises(LuthierError, match="it was in memory when the run was made.  Give --data"):
        luthier.soup(pair, out=tmp_path / "soup")
    made = luthier.soup(pair, out=tmp_path / "soup", data=sentences())
    told = luthier.report.Report.load(pair[0]).metrics["test"]
    assert made.each[str(pair[0])]["test"] == pytest.approx(told)


def test_other_data_without_some_of_the_classes_keeps_their_numbers(runs, tmp_path):
    rows = sentences(40, seed=11)
    good = rows[rows["label"] == "good"]
    made = luthier.soup(runs, out=tmp_path / "soup", how="uniform", data=dict.fromkeys(("train", "test"), good))
    said = luthier.predict(runs[0], good).labels
    assert made.each[str(runs[0])]["test"]["accuracy"] == sum(label == "good" for label in said) / len(good)


def test_what_does_not_fit_together_is_told_at_once_and_nothing_is_written(runs, tmp_path, tiny_model):
    other = tiny_folder(tmp_path / "other", seed=7)
    luthier.fit(recipe(["adamw"], steps=1), model=other, data=sentences(), out=tmp_path / "odd")
    with pytest.raises(LuthierError) as told:
        luthier.soup([tmp_path / "nothing", runs[0], tmp_path / "odd"], out=tmp_path / "soup")
    assert "must be the folder of a run that has ended" in str(told.value)
    assert f"must start from the pretrained model that {runs[0]} started from" in str(told.value)
    assert not (tmp_path / "soup").exists()


def test_a_folder_with_something_in_it_is_left_alone(runs, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(LuthierError, match="is not empty"):
        luthier.soup(runs, out=tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_greed_takes_a_score_that_is_not_defined_for_the_worst():
    scores = {(0,): None, (0, 1): None, (0, 2): 0.5, (0, 2, 3): None}
    assert greedy(4, [0, 1, 2, 3], lambda some: scores[tuple(some)], higher=True) == (0, 2)


def test_a_soup_whose_metric_is_not_defined_on_a_split_shows_a_dash(tiny_model, tmp_path):
    """All validation and test labels are one number: there is no correlation with it."""
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("train", "validation", "test")):
        label = [1.5] * 20 if seed else [at / 7 for at in range(20)]
        sentences(20, seed=seed).assign(label=label).to_csv(tmp_path / "data" / f"{name}.csv", index=False)
    one = dataclasses.replace(recipe(["adamw"], steps=1), metric="pearson", task="regression")
    runs = [tmp_path / "1", tmp_path / "2"]
    for seed, run in enumerate(runs):
        luthier.fit(one, model=tiny_model, data=str(tmp_path / "data"), out=run, seed=seed)
    made = luthier.soup(runs, out=tmp_path / "soup")
    assert made.metrics["validation"]["pearson"] is None and made.kept == (str(runs[0]),)
    assert all(line.split()[-2:] == ["-", "-"] for line in made.lines()[1:4])
