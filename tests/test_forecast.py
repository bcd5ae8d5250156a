"""luthier plan leaves everything as it was: the global generators too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier import forecast
from luthier.training.job import prepare
from tests.little import recipe, sentences


def test_the_generator_of_the_device_that_is_timed_is_put_back(tiny_model, monkeypatch):
    """On a CPU: the processor's is, and the device is named to whoever puts back."""
    real, named = forecast.remembered, []
    monkeypatch.setattr(forecast, "remembered", lambda devices: real(named.extend(devices) or named))
    before = torch.get_rng_state()
    forecast.forecast(recipe(["adamw"]), model=tiny_model, data=sentences())
    assert torch.equal(torch.get_rng_state(), before)
    assert [device.type for device in named] == ["cuda" if torch.cuda.is_available() else "cpu"]


def test_a_probe_is_timed_on_the_device_of_the_run_and_the_model_stays_where_it_is(tiny_model, monkeypatch):
    """The meta device stands for a GPU: the model that is looked at must be there, as the rows are."""
    job, seen = prepare(recipe(["adamw"], probe=True), model=tiny_model, data_source=sentences()), []
    monkeypatch.setattr(forecast, "logits", lambda model, *rest, **named: seen.append(next(model.parameters()).device))
    forecast._stage_seconds(job, job.plan.stages[0], SimpleNamespace(device=torch.device("meta")))
    assert seen == [torch.device("meta")]
    assert next(job.loaded.model.parameters()).device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_too_the_generator_is_as_it_was(tiny_model):
    before = torch.cuda.get_rng_state()
    forecast.forecast(recipe(["adamw"]), model=tiny_model, data=sentences())
    assert torch.equal(torch.cuda.get_rng_state(), before)
