"""One thread a process, so that forked children are safe and bits do not depend on the machine's cores; no network at all."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True
)  # no test depends on the clock or on luck
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """A tiny pretrained BERT on disk."""
    from tests.tinyfolder import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")
