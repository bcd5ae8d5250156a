"""The model between two stages: solved again or kept, and in both cases the very weights that were there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

import luthier
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.recipe.recipe import Recipe
from luthier.recipe.text import build
from luthier.training.job import Job, prepare
from luthier.training.replay import Replay, keep, kept, named
from tests.little import Counts, KillsItself, in_a_child, same, sentences, weights

PROBE = {"name": "probe", "solver": "exact", "ingredients": [{"freeze": {"keep": ["head"]}}]}


def trained(name: str, *parts: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "steps": 4, "lr": 1e-2, "batch_size": 8, "ingredients": [*parts, "adamw"], **more}


def made(*stages: dict[str, Any]) -> Recipe:
    return build({"name": "several", "max_length": 16, "stages": list(stages)}, inside="a test")


THREE = (PROBE, trained("first", {"lora": {"r": 2}}), trained("second"))


def fit(stages: tuple[dict[str, Any], ...], model: Path, out: Path, **more: Any) -> Path:
    luthier.fit(made(*stages), model=model, data=sentences(), out=out, **more)
    return out


def job(stages: tuple[dict[str, Any], ...], model: Path) -> Job:
    return prepare(made(*stages), model=model, data_source=sentences())


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A run of three stages that kept what was between them."""
    return fit(THREE, tiny_model, tmp_path_factory.mktemp("kept") / "run", keep_stages=True)


def test_what_is_kept_is_what_a_run_that_stops_there_ends_with(run, tiny_model, tmp_path):
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["first.safetensors", "probe.safetensors"]
    for stage, many in (("probe", 1), ("first", 2)):
        shorter = weights(fit(THREE[:many], tiny_model, tmp_path / stage))
        found = load_file(kept(run, stage))
        assert same({name: found[name] for name in shorter}, shorter)


def test_keeping_changes_no_bit_and_is_not_done_unasked(run, tiny_model, tmp_path):
    plain = fit(THREE, tiny_model, tmp_path / "plain")
    assert same(weights(plain), weights(run))
    assert not (plain / "stages").exists()


@pytest.mark.parametrize("share", [0.35, 0.5, 0.65, 0.8])
def test_a_killed_run_goes_on_and_keeps_the_same(share, run, tiny_model, tmp_path):
    counts = Counts()
    fit(THREE, tiny_model, tmp_path / "counted", narrator=counts, keep_stages=True, save_every=1)
    out, says = tmp_path / "killed", KillsItself(int(share * counts.said))
    begun = lambda: fit(THREE, tiny_model, out, narrator=says, keep_stages=True, save_every=1)  # noqa: E731
    assert in_a_child(begun) == signal.SIGKILL
    fit(THREE, tiny_model, out, resume=True, keep_stages=True)
    for stage in ("probe", "first"):
        assert same(load_file(kept(out, stage)), load_file(kept(run, stage)))


def test_a_run_that_is_asked_only_when_it_goes_on_keeps_the_start_of_the_stage_it_is_in(run, tiny_model, tmp_path):
    class Asks(Silent):
        steps = 0

        def advance(self, by: int = 1, *, say: str = "") -> None:
            self.steps += say.startswith("loss")
            if self.steps == 6:  # the second of the last stage
                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "stopped"
    with pytest.raises(LuthierError, match="stopped on request at step 2"):
        fit(THREE, tiny_model, out, narrator=Asks())
    assert (out / "checkpoints" / "stage-2-start").is_dir()
    assert not (out / "stages").exists()
    fit(THREE, tiny_model, out, resume=True, keep_stages=True)
    assert same(load_file(kept(out, "first")), load_file(kept(run, "first")))
    assert not kept(out, "probe").exists()


def test_a_probe_is_solved_again_to_the_bit_and_the_job_s_model_stays(run, tiny_model):
    known = job(THREE, tiny_model)
    before = state(known.loaded.model)
    again = Replay(known)
    assert same(state(again.at("probe")), before)
    assert same(state(again.at("first")), load_file(kept(run, "probe")))
    assert same(state(again.at("first")), load_file(kept(run, "probe")))  # the second time from what was solved
    assert same(state(known.loaded.model), before)


def test_a_kept_end_is_the_next_stage_s_start_and_a_probe_after_it_is_solved_from_there(tiny_model, tmp_path):
    stages = (trained("first"), PROBE, trained("second"))
    out = fit(stages, tiny_model, tmp_path / "run", keep_stages=True)
    again = Replay(job(stages, tiny_model), out)
    after_probe = load_file(kept(out, "probe"))
    kept(out, "probe").unlink()
    assert same(state(again.at("probe")), load_file(kept(out, "first")))
    assert same(state(again.at("second")), after_probe)


@pytest.mark.parametrize("carry", [["head"], ["biases"], ["backbone"]])
def test_of_a_solved_probe_goes_on_what_it_carries(carry, tiny_model, tmp_path):
    stages = ({**PROBE, "carry": carry}, trained("second"))
    out = fit(stages, tiny_model, tmp_path / "run", keep_stages=True)
    known = job(stages, tiny_model)
    assert same(state(Replay(known).at("second")), load_file(kept(out, "probe")))
    moved = {
        name for name, value in load_file(kept(out, "probe")).items()
        if not torch.equal(value, known.loaded.model.state_dict()[name])
    }  # fmt: skip
    assert moved == {
        "head": {"classifier.weight", "classifier.bias"}, "biases": {"classifier.bias"}, "backbone": set(),
    }[carry[0]]  # fmt: skip


def test_the_start_of_a_stage_after_training_is_not_known_unless_it_was_kept(run, tiny_model):
    known = job(THREE, tiny_model)
    assert [Replay(known).blocked(name) for name in ("probe", "first", "second")] == ["", "", "first"]
    assert Replay(known, run).blocked("second") == ""
    with pytest.raises(LuthierError, match=r"the start of 'second'  must be known: 'first' trains before it") as caught:
        Replay(known).at("second")
    assert "--keep-stages" in str(caught.value)
    with pytest.raises(LuthierError, match="must be a stage of the recipe; got third"):
        Replay(known, run).at("third")


@pytest.mark.parametrize("harm", ["cut", "another model", "empty"])
def test_a_file_that_is_torn_or_of_another_model_counts_as_not_kept(harm, run, tiny_model, tmp_path):
    from safetensors.torch import save_file

    file = kept(tmp_path, "first")
    file.parent.mkdir()
    whole = kept(run, "first").read_bytes()
    if harm == "another model":
        save_file({name: value[:1].clone() for name, value in load_file(kept(run, "first")).items()}, file)
    else:
        file.write_bytes(whole[:-9] if harm == "cut" else b"")
    assert Replay(job(THREE, tiny_model), tmp_path).blocked("second") == "first"


def test_keeping_needs_a_folder(tiny_model):
    with pytest.raises(LuthierError, match="keep_stages needs out"):
        luthier.fit(made(*THREE), model=tiny_model, data=sentences(), keep_stages=True)


def test_a_name_is_kept_as_it_is_up_to_230_bytes_and_cut_from_there_on():
    """255 bytes - ".safetensors" (12) - "." and ".1234567.tmp" (1 + 12), which it has while it is written, are 230."""
    assert named("a" * 230) == "a" * 230
    assert named("森" * 25) == "%E6%A3%AE" * 25  # 9 characters each: 225
    # echo -n aaa... (231 of them) | sha256sum
    told = "ec1912690da2d9ffcbe64c966179c1e4deab08601e50a902e1eae5859cb5e13c"
    assert named("a" * 231) == f"{'a' * 165}+{told}"  # 165 + 1 + 64 = 230
    assert len(named("森" * 28)) == 230


texts = st.one_of(st.text(max_size=40), st.text(min_size=1, max_size=12).map(lambda part: part * (400 // len(part))))


@given(texts, texts)
@example("a" * 231, "a" * 232)
@example("a" * 231, named("a" * 231))  # what a cut name is cut to is no other stage's
@example("森" * 26, "森" * 26 + " ")
@example("way", "Way")
def test_names_fit_and_no_two_are_the_same(one, other):
    for name in (one, other):
        assert len(f".{named(name)}.safetensors.1234567.tmp".encode()) <= 255
        assert named(name) == quote(name, safe="") or len(quote(name, safe="")) > 230
    assert (named(one) == named(other)) == (one == other)


@pytest.mark.parametrize("name", ["森" * 28, "a" * 240, "a" * 4000])
def test_a_stage_with_a_long_name_is_kept_by_a_process_with_a_long_number(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 4194304)  # the highest that Linux has
    model = torch.nn.Linear(2, 2)
    keep(tmp_path, name, model)
    assert same(load_file(kept(tmp_path, name)), state(model))


def test_a_run_with_a_long_name_of_a_stage_is_replayed_from_what_it_kept(tiny_model, tmp_path):
    stages = (trained("森" * 28), trained("second"))
    out = fit(stages, tiny_model, tmp_path / "run", keep_stages=True)
    again = Replay(job(stages, tiny_model), out)
    assert again.blocked("second") == ""
    assert same(state(again.at("second")), load_file(kept(out, "森" * 28)))
