"""Precision, compilation, accumulation through transformers.Trainer: what changes a step's arithmetic but not its meaning."""

from __future__ import annotations

import pytest
import torch

import luthier
from luthier.placement import Placement, _check_device
from tests.little import Asks, recipe, same, sentences, weights
from tests.processes import process
from tests.tinyfolder import tiny_folder

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]


def test_bf16_trains_near_fp32_and_keeps_single_precision_weights(tmp_path):
    """bfloat16 has 8 bits of mantissa: the losses of the first steps agree to about one per cent."""
    folder = tiny_folder(tmp_path / "tiny", dropout=0.0)
    full = luthier.fit(recipe(BASE), model=folder, data=sentences(), out=tmp_path / "full")
    half = luthier.fit(recipe(BASE), model=folder, data=sentences(), out=tmp_path / "half", sets=["precision=bf16"])
    for (_, one), (_, other) in zip(full.curves["loss"], half.curves["loss"], strict=True):
        assert other == pytest.approx(one, rel=0.03)
        assert other != one
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "half").values())
    assert half.environment["precision"] == "bf16"


def test_a_tracker_that_is_not_known_or_not_installed_is_told_before_anything_runs(monkeypatch):
    with pytest.raises(luthier.LuthierError, match="Did you mean 'wandb'?"):
        Placement(trackers=["wandbb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(luthier.LuthierError, match="pip install mlflow"):
        Placement(trackers=["mlflow"])


@pytest.mark.slow
def test_compiled_it_ends_on_the_same_weights_but_for_rounding(tmp_path):
    folder = tiny_folder(tmp_path / "tiny", dropout=0.0)
    luthier.fit(recipe(BASE, steps=3), model=folder, data=sentences(), out=tmp_path / "plain")
    luthier.fit(recipe(BASE, steps=3), model=folder, data=sentences(), out=tmp_path / "compiled", sets=["compile=true"])
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_one_process_on_a_cpu_leaves_the_model_as_it_is(tmp_path):
    model = torch.nn.Linear(2, 2)
    placement = Placement()
    assert placement.place(model, None) is model  # type: ignore[arg-type]
    assert (placement.processes, placement.sharded, placement.main) == (1, False, True)
    assert placement.gathered([1, 2]) == [1, 2]


def test_several_processes_leave_the_model_in_single_precision_where_scores_are_made(tmp_path):
    """One process that is told it is one of two: the model is wrapped, and its own forward pass is what it was."""
    with process():
        placement, model = Placement(precision="bf16"), torch.nn.Linear(2, 2)
        placement.processes = 2
        placed = placement.place(model, None)  # type: ignore[arg-type]
        assert placed is not model and "forward" not in vars(model)
        assert model(torch.ones(1, 2)).dtype == torch.float32
        with placement.autocast():
            assert placed(torch.ones(1, 2)).dtype == torch.bfloat16


def test_half_precision_that_would_not_be_is_refused():
    with pytest.raises(
        luthier.LuthierError, match=r"precision  must be fp32 or bf16 on a processor; got fp16\.  Say bf16"
    ):
        _check_device(torch.device("cpu"), "fp16")
    with pytest.raises(luthier.LuthierError, match="must be a processor or a CUDA device; got xpu"):
        _check_device(torch.device("xpu"), "fp32")
    _check_device(torch.device("cuda"), "fp16")


def test_apples_gpus_are_passed_over_as_their_dropout_could_not_be_gone_on_with(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert Placement().device == torch.device("cpu")


def test_trainer_accumulation_is_the_big_batch(tmp_path):
    """Trap: Trainer does not divide an overridden loss by the accumulation count unless told. SGD in float64, so a wrong factor shows."""
    import transformers

    from luthier.core.claims import Place, owns
    from luthier.core.ingredient import Ingredient, ingredient
    from luthier.hosts import hf
    from tests.tiny import tiny

    @ingredient
    class SGD(Ingredient):
        def touches(self):
            return (owns(Place.OPTIMIZER),)

    rows = [{"input_ids": torch.arange(3 + at, 11 + at), "labels": at % 3} for at in range(16)]
    ends = []
    for size, count in ((8, 1), (2, 4)):
        model = tiny("bert").double()
        run = luthier.begin(model, [SGD()], learning_rate=0.5, steps=2)
        args = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=2, max_grad_norm=0,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        parts = hf.parts(run, args)
        trainer = parts.Trainer(model, args, train_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks)
        trainer.train()
        run.finish()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-10, atol=1e-12)
    assert not torch.equal(ends[0]["classifier.weight"], tiny("bert").double().state_dict()["classifier.weight"])


def test_a_run_with_a_gradient_scaler_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """A scale that is no power of two rounds gradients in its own way, so the end tells which scales there were."""
    plain = Placement.__init__

    def scaled(self, **settings):
        plain(self, **settings)
        self._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3.0, growth_factor=1.5, growth_interval=2)

    monkeypatch.setattr(Placement, "__init__", scaled)
    folder = tiny_folder(tmp_path / "tiny")

    def fit(name, **more):
        made, out = recipe(BASE, steps=12), tmp_path / name
        luthier.fit(made, model=folder, data=sentences(), out=out, save_every=1, **more)
        return weights(out)

    def stopped(name):
        with pytest.raises(luthier.LuthierError, match="stopped on request at step 7"):
            fit(name, narrator=Asks(7))
        return fit(name, resume=True)

    whole = fit("whole")
    assert same(stopped("goes on"), whole)
    monkeypatch.setattr(Placement, "load_state_dict", lambda self, state: None)
    assert not same(stopped("forgets"), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the bf16 test above is its CPU twin")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_gpu_half_precision_trains_near_single_precision(precision, tmp_path):
    folder = tiny_folder(tmp_path / "tiny", dropout=0.0)
    full = luthier.fit(recipe(BASE), model=folder, data=sentences(), out=tmp_path / "full")
    half = luthier.fit(
        recipe(BASE), model=folder, data=sentences(), out=tmp_path / "half", sets=[f"precision={precision}"]
    )
    assert full.environment["device"].startswith("cuda")
    for (_, one), (_, other) in zip(full.curves["loss"], half.curves["loss"], strict=True):
        assert other == pytest.approx(one, rel=0.03)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "half").values())
