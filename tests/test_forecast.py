"""luthier plan leaves everything as it was: the global generators too."""

from __future__ import annotations

import pytest
import torch

from luthier import forecast
from tests.little import recipe, sentences


def test_the_generator_of_the_device_that_is_timed_is_put_back(tiny_model, monkeypatch):
    """On a CPU: the processor's is, and the device is named to whoever puts back."""
    real, named = forecast.remembered, []
    monkeypatch.setattr(forecast, "remembered", lambda devices: real(named.extend(devices) or named))
    before = torch.get_rng_state()
    forecast.forecast(recipe(["adamw"]), model=tiny_model, data=sentences())
    assert torch.equal(torch.get_rng_state(), before)
    assert [device.type for device in named] == ["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_too_the_generator_is_as_it_was(tiny_model):
    before = torch.cuda.get_rng_state()
    forecast.forecast(recipe(["adamw"]), model=tiny_model, data=sentences())
    assert torch.equal(torch.cuda.get_rng_state(), before)
