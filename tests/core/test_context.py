"""What an ingredient may see, and what it may keep."""

from __future__ import annotations

import pytest
import torch

from luthier.core.claims import Place, needs
from luthier.core.context import Around, Context, Progress, Shelf, Tensors
from luthier.core.seeds import borrowed, derive, generator, remembered, reseed
from luthier.errors import RecipeError


def context(*claims, progress=None, key="finetune/x", seed=0, **more) -> Context:
    return Context(None, progress or Progress(10), seed, key, claims, Shelf(), [], **more)  # type: ignore[arg-type]


def draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def test_random_numbers_are_named_by_seed_stage_ingredient_step_and_use():
    here = draw(context().rng())
    assert here == draw(context().rng())
    assert here != draw(context(seed=1).rng())
    assert here != draw(context(key="finetune/y").rng())
    assert here != draw(context(progress=Progress(10, step=1)).rng())
    assert here != draw(context().rng("mask"))


def test_names_are_not_run_together():
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(0, 12) == derive(0, "12")


def test_borrowing_the_global_generator_gives_it_back():
    before = torch.random.get_rng_state()
    with borrowed(3, "peft"):
        one = torch.rand(3)
    with borrowed(3, "peft"):
        two = torch.rand(3)
    assert torch.equal(one, two)
    assert torch.equal(before, torch.random.get_rng_state())


def generators(monkeypatch, count: int) -> list[torch.Generator]:
    """Generators that pass for those of ``count`` CUDA devices, of which the last is the current one."""
    fake = [torch.Generator().manual_seed(at) for at in range(count)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
    monkeypatch.setattr(torch.cuda, "default_generators", fake)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda at: fake[at].get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: fake[at].set_state(state))
    return fake


def test_the_generators_of_the_processor_and_of_the_devices_named_are_put_back_and_no_others(monkeypatch):
    fake = generators(monkeypatch, 3)
    states, ours = [one.get_state() for one in fake], torch.get_rng_state()
    put_back = remembered(
        [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda")]
    )  # cuda: the current one, 2
    for _ in range(2):
        reseed(5, torch.device("cuda"))
        fake[0].manual_seed(6)
        fake[1].manual_seed(7)
        put_back()
    assert torch.equal(torch.get_rng_state(), ours)
    assert [torch.equal(one.get_state(), state) for one, state in zip(fake, states, strict=True)] == [True, False, True]


def test_borrowing_gives_every_device_its_generator_back(monkeypatch):
    fake = generators(monkeypatch, 2)
    states = [one.get_state() for one in fake]
    with borrowed(3, "peft"):
        for one in fake:
            one.manual_seed(8)
    assert all(torch.equal(one.get_state(), state) for one, state in zip(fake, states, strict=True))


def test_plain_cuda_is_the_current_device(monkeypatch):
    fake = generators(monkeypatch, 2)
    with torch.random.fork_rng(devices=[]):
        reseed(5, torch.device("cuda"))
    assert [one.initial_seed() for one in fake] == [0, 5]


def test_reseeding_is_what_manual_seed_does_on_a_cpu():
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        theirs = torch.rand(4)
        reseed(12345, torch.device("cpu"))
        assert torch.equal(theirs, torch.rand(4))
    assert generator(0, "a").initial_seed() == derive(0, "a")


def test_what_was_not_claimed_is_not_seen():
    weights = {"w": torch.ones(1)}
    assert context(needs(Place.REFERENCE), start=weights).reference == weights
    with pytest.raises(RecipeError, match=r"must claim needs\(REFERENCE\)"):
        _ = context(start=weights).reference
    with pytest.raises(RecipeError, match=r"must claim needs\(SAMPLE\)"):
        _ = context(around=Around(sample=[1])).sample
    with pytest.raises(RecipeError, match=r"must claim needs\(SAMPLE\)"):
        context(around=Around(loss=lambda model, batch: torch.zeros(()))).loss(torch.nn.Identity(), {})
    with pytest.raises(RecipeError, match=r"must claim needs\(VALIDATION\)"):
        context(around=Around(score=lambda model: {"accuracy": 1.0})).score(torch.nn.Identity())


def test_what_is_kept_is_made_once():
    ctx, made = context(), []

    def make() -> Tensors:
        made.append(1)
        return Tensors({"n": torch.zeros(())})

    assert ctx.keep("count", make) is ctx.keep("count", make)
    assert made == [1]


def test_what_was_saved_waits_for_its_holder_and_is_not_lost_without_it():
    one = context()
    one.keep("count", lambda: Tensors({"n": torch.tensor(3)}))
    state = one.shelf.state_dict()
    two = context()
    two.shelf.load_state_dict(state)
    assert two.shelf.state_dict()["finetune/x/count"]["n"] == 3
    assert two.keep("count", lambda: Tensors({"n": torch.tensor(0)}))["n"] == 3
    three = context()
    three.keep("count", lambda: Tensors({"n": torch.tensor(0)}))
    three.shelf.load_state_dict(state)
    assert three.keep("count", Tensors)["n"] == 3


def test_saved_state_is_a_copy():
    ctx = context()
    held = ctx.keep("x", lambda: Tensors({"v": torch.zeros(2)}))
    state = ctx.shelf.state_dict()
    held["v"].add_(1)
    assert state["finetune/x/x"]["v"].tolist() == [0, 0]


def test_notes_are_said_once_and_saving_without_a_folder_writes_nothing(tmp_path):
    ctx = context()
    ctx.note("twice")
    ctx.note("twice")
    assert ctx.notes == ["twice"]
    ctx.save("adapter", lambda path: (path / "x").write_text("x"))
    context(folder=tmp_path).save("adapter", lambda path: (path / "x").write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_progress_is_a_share_of_the_stage():
    assert Progress(4, step=1).fraction == 0.25
    assert Progress(4, step=9).fraction == 1.0
    assert Progress(0).fraction == 1.0
