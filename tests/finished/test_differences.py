"""luthier diff: what two runs do not have in common, by path; distances of weights against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import luthier
from luthier import cli
from luthier.errors import LuthierError
from luthier.finished.changes import Change, changes
from luthier.finished.diff import Score
from luthier.finished.weights import Weights, weights_between
from luthier.recipe.text import build
from tests.little import recipe, sentences, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs: another rate, an ingredient more, one less, one of another value, two in another order, another seed and data."""
    out = tmp_path_factory.mktemp("differing")
    for name, rows in (("a", 60), ("b", 80)):
        sentences(rows).to_csv(out / f"{name}.csv", index=False)
    one = recipe(["adamw", {"clip": {"max_norm": 1.0}}, {"llrd": {"decay": 0.9}}, "temperature"], lr=2e-5)
    other = recipe(["temperature", "adamw", {"clip": {"max_norm": 0.5}}, {"swa": {"start": 0.5}}], lr=3e-5)
    luthier.fit(one, model=tiny_model, data=out / "a.csv", out=out / "one")
    luthier.fit(other, model=tiny_model, data=out / "b.csv", out=out / "other", seed=4)
    return out / "one", out / "other"


def saved(run: Path, **tensors: torch.Tensor) -> Path:
    """A run folder that holds weights and nothing else."""
    (run / "model").mkdir(parents=True)
    save_file(tensors, run / "model" / "model.safetensors")
    return run


def test_a_recipe_differs_by_field_and_ingredient_and_order(runs):
    found = {change.path: change for change in luthier.diff(*runs).recipe}
    assert found["stages.finetune.learning_rate"] == Change("stages.finetune.learning_rate", 2e-5, 3e-5)
    assert str(found["stages.finetune.learning_rate"]) == "stages.finetune.learning_rate: 2e-05 -> 3e-05"
    assert str(found["stages.finetune.clip.max_norm"]) == "stages.finetune.clip.max_norm: 1.0 -> 0.5"
    assert (found["stages.finetune.llrd"].only, found["stages.finetune.swa"].only) == ("one", "other")
    assert found["stages.finetune.llrd"].one["decay"] == 0.9
    assert found["stages.finetune.ingredients"].one == ["adamw", "clip", "temperature"]
    assert found["stages.finetune.ingredients"].other == ["temperature", "adamw", "clip"]
    assert (found["seed"].one, found["seed"].other) == (0, 4)
    assert len(found) == 6


def test_a_stage_more_is_one_change(runs, tiny_model, tmp_path):
    made = recipe(["adamw", "clip", "llrd", "temperature"], lr=2e-5, probe=True)
    luthier.fit(made, model=tiny_model, data=runs[0].parent / "a.csv", out=tmp_path / "more")
    found = luthier.diff(runs[0], tmp_path / "more").recipe
    assert [(change.path, change.only) for change in found if "." in change.path][-1] == ("stages.probe", "other")
    assert not [change for change in found if change.path in ("order", "stages.finetune.ingredients")]


def test_data_and_model_differ_by_digest_source_and_size(runs):
    found = {change.path: change for change in luthier.diff(*runs).identity}
    assert found["data.sizes.train"] == Change("data.sizes.train", 48, 64)
    assert found["data.source"].other.endswith("b.csv")
    assert "data.digest" in found and "model.start weights" in found  # another seed draws another head
    assert "model.pretrained" not in found
    digest = str(found["data.digest"])
    assert digest.count("...") == 2 and len(digest) == len("data.digest: ") + 2 * 15 + 4


def test_scores_stand_side_by_side_with_their_difference(runs):
    found = luthier.diff(*runs)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    told = {(score.split, score.metric): score for score in found.scores if not score.calibrated}
    for split in ("validation", "test"):
        for metric in ("accuracy", "nll", "ece"):
            one, other = (report["metrics"][split][metric] for report in reports)
            assert (told[split, metric].one, told[split, metric].other) == (one, other)
            assert told[split, metric].difference == other - one
    assert {score.split for score in found.scores if score.calibrated} == {"validation", "test"}


def test_an_environment_differs_by_version_and_thread(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "copy")
    file = tmp_path / "copy" / "environment.json"
    told = json.loads(file.read_text())
    told["versions"]["torch"], told["threads"] = "1.0", 99
    told["identity"]["seed"] = 7  # what makes it the same run is no part of the environment
    file.write_text(json.dumps(told))
    found = luthier.diff(runs[0], tmp_path / "copy")
    assert [change.path for change in found.environment] == ["threads", "versions.torch"]
    assert str(found.environment[0]) == f"threads: {torch.get_num_threads()} -> 99"
    assert (found.recipe, found.identity, found.parted) == ((), (), None)
    assert found.weights.same and found.scored_alike


def test_the_lines_are_80_columns_wide_and_the_values_are_plain(runs):
    found = luthier.diff(*runs)
    lines = found.lines()
    assert max(map(len, lines)) <= 80
    assert "  stages.finetune.learning_rate: 2e-05 -> 3e-05" in lines
    assert "environment" in lines and lines[lines.index("environment") + 1] == "  the same"
    assert any(line.startswith("  test") and " accuracy " in line for line in lines)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["weights"]["equal"] == found.weights.equal


def test_a_run_and_itself_have_no_difference(runs):
    found = luthier.diff(runs[0], runs[0])
    assert found.recipe == found.environment == found.identity == ()
    assert found.weights == Weights(len(weights(runs[0])), len(weights(runs[0])))
    assert {score.difference for score in found.scores} == {0}


def test_the_distance_of_weights_is_worked_out_by_hand(tmp_path):
    """(3, 0) and (3, -5) lie 5 apart; beside the equal tensor (4) the norm of the first is that of (3, 0, 4), which is 5."""
    one = saved(tmp_path / "one", a=torch.tensor([3.0, 0.0]), b=torch.tensor(4.0))
    other = saved(tmp_path / "other", a=torch.tensor([3.0, -5.0]), b=torch.tensor(4.0))
    found = weights_between(one, other)
    assert (found.tensors, found.equal, found.largest, found.first) == (2, 1, 5.0, "a")
    (part,) = found.parts
    assert (part.part, part.weights, part.distance) == ("elsewhere", 3, 5.0)
    assert part.relative == pytest.approx(1.0)


def test_parts_are_those_of_the_model_from_the_bottom(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "copy")
    file = tmp_path / "copy" / "model" / "model.safetensors"
    state = load_file(file)
    state["classifier.bias"] += torch.tensor([3.0, 4.0])
    state["bert.encoder.layer.0.output.dense.bias"][0] += 2.0
    save_file(state, file, metadata={"format": "pt"})
    found = weights_between(runs[0], tmp_path / "copy")
    assert [part.part for part in found.parts] == ["embeddings", "block 0", "block 1", "bridge", "head"]
    assert [part.distance for part in found.parts] == pytest.approx([0, 2, 0, 0, 5], abs=1e-5)
    assert found.first == "bert.encoder.layer.0.output.dense.bias"
    assert sum(part.weights for part in found.parts) == sum(tensor.numel() for tensor in state.values())
    assert found.lines()[0] == f"{len(state) - 2} of {len(state)} tensors are bit-equal"


def test_bits_are_compared_and_not_values(tmp_path):
    """Minus zero is not zero, and a NaN is itself."""
    one = saved(tmp_path / "one", zero=torch.tensor([0.0]), nan=torch.tensor([math.nan]))
    other = saved(tmp_path / "other", zero=torch.tensor([-0.0]), nan=torch.tensor([math.nan]))
    found = weights_between(one, other)
    assert (found.equal, found.first, found.largest) == (1, "zero", 0.0)
    assert not found.same


def test_a_weight_that_is_no_number_in_one_run_is_infinitely_far(tmp_path):
    one = saved(tmp_path / "one", w=torch.tensor([1.0, 2.0]))
    other = saved(tmp_path / "other", w=torch.tensor([1.0, math.nan]))
    assert weights_between(one, other).largest == math.inf


def test_tensors_of_one_run_and_of_other_shapes_and_types_are_named(tmp_path):
    one = saved(tmp_path / "one", a=torch.ones(2), b=torch.ones(2), c=torch.ones(2), d=torch.ones(1))
    other = saved(tmp_path / "other", a=torch.ones(3), b=torch.ones(2).double(), c=torch.ones(2), e=torch.ones(1))
    found = weights_between(one, other)
    assert (found.tensors, found.equal, found.absent, found.reshaped) == (1, 1, ("d", "e"), ("a", "b"))
    assert not found.same and found.first == ""
    assert "only in one of them: d, e" in found.lines()


def test_weights_in_several_files_are_one_model(tmp_path):
    one = saved(tmp_path / "one", a=torch.ones(2), b=torch.zeros(2))
    (tmp_path / "other" / "model").mkdir(parents=True)
    for name, tensor in {"a": torch.ones(2), "b": torch.zeros(2)}.items():
        save_file({name: tensor}, tmp_path / "other" / "model" / f"model-{name}.safetensors")
    assert weights_between(one, tmp_path / "other") == Weights(2, 2)


PLAIN = st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3), max_leaves=8)  # fmt: skip
NESTED = st.dictionaries(st.text("abc", min_size=1, max_size=2), PLAIN, max_size=4)


@given(NESTED, NESTED)
def test_there_are_changes_exactly_where_two_mappings_differ(one, other):
    assert (changes(one, other) == ()) == (one == other)
    assert {change.path for change in changes(one, other)} == {change.path for change in changes(other, one)}
    swapped = {"": "", "one": "other", "other": "one"}
    back = {change.path: (change.other, change.one, swapped[change.only]) for change in changes(other, one)}
    assert {change.path: (change.one, change.other, change.only) for change in changes(one, other)} == back


def test_a_stage_or_ingredient_of_the_same_name_twice_is_told_apart(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "copy")
    plain = recipe(["clip", {"clip": {"max_norm": 2.0}}]).to_dict()
    from luthier.recipe.text import write

    (tmp_path / "copy" / "recipe.yaml").write_text(write(build(plain, inside="a test")))
    paths = [change.path for change in luthier.diff(runs[0], tmp_path / "copy").recipe]
    assert "stages.finetune.clip 2" in paths


@pytest.mark.parametrize("harm", ["report.json", "environment.json", "recipe.yaml", "model/model.safetensors"])
def test_a_file_that_is_not_there_or_torn_is_named(harm, runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "copy")
    file = tmp_path / "copy" / harm
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(LuthierError, match=file.name) as caught:
        luthier.diff(runs[0], tmp_path / "copy")
    assert caught.value.exit_code == 2
    file.unlink()
    with pytest.raises(LuthierError, match=file.name if "model" not in harm else "must hold the run's weights"):
        luthier.diff(runs[0], tmp_path / "copy")


def test_the_command_shows_it_and_changes_no_file(runs, monkeypatch, capsys):
    before = {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["luthier", "diff", *map(str, runs)])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert not leave.value.code
    out = capsys.readouterr().out
    assert "  stages.finetune.learning_rate: 2e-05 -> 3e-05" in out
    assert "weights" in out and "L2 distance" in out
    assert {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()} == before


def test_reading_recipes_and_environments_loads_no_torch():
    work = "import sys; import luthier.finished.diff, luthier.finished.changes, luthier.call; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_a_difference_too_small_for_four_digits_is_not_shown_as_none():
    assert str(Score("ood_far", "nll", 0.5, 0.25)).split() == ["ood", "far", "nll", "0.5000", "0.2500", "-0.2500"]
    assert str(Score("test", "nll", 0.5, 0.5 + 2**-20)).split()[-1] == "+9.5e-07"
    assert str(Score("test", "n", 40, 50)).split()[-3:] == ["40", "50", "+10"]
    assert str(Score("test", "pearson", None, 0.5)).split() == ["test", "pearson", "-", "0.5000"]
    assert str(Score("test", "nll", 0.5, 0.5)).split()[-1] == "same"
