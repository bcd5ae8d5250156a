"""A folder named from the home folder, ``~/run``, is one folder for all that is done with a run."""

from __future__ import annotations

import pandas as pd

import luthier
from luthier.comparison import Comparison
from luthier.recipe.text import write
from luthier.report import Report
from luthier.trials.comparing import designed, gather
from luthier.trials.work import work
from tests.little import recipe, sentences


def test_a_run_in_the_home_folder_is_made_and_found_there(tiny_model, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    sentences().to_csv(home / "data.csv", index=False)
    (home / "one.yaml").write_text(write(recipe(["adamw"], steps=2)))
    luthier.fit("~/one.yaml", model=str(tiny_model), data="~/data.csv", out="~/runs/a")
    assert Report.load("~/runs/a").path == str(home / "runs" / "a")
    told = luthier.predict("~/runs/a", pd.DataFrame({"text": ["good film"]}))
    told.save("~/told.csv")
    again = luthier.rerun("~/runs/a", out="~/runs/b")
    assert again.same and luthier.diff("~/runs/a", "~/runs/b").weights.same
    luthier.study("~/runs/a", kinds=["clusters"], rows=6)
    luthier.soup(["~/runs/a", "~/runs/b"], out="~/soup")
    luthier.predict("~/soup", pd.DataFrame({"text": ["good film"]}))
    designed(["~/one.yaml"], model=str(tiny_model), data="~/data.csv", out="~/comparison", seeds=2)
    assert work("~/comparison") == 2
    assert gather("~/comparison").path == str(home / "comparison")
    assert Comparison.load("~/comparison").recipes
    assert {path.name for path in home.glob("[!.]*")} == {
        *("data.csv", "one.yaml", "told.csv"),
        *("runs", "soup", "comparison"),
    }
    assert (home / "runs" / "a" / "study").is_dir() and list(here.iterdir()) == []
