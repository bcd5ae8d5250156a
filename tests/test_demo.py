"""The real model on real text, small enough for every run of the tests: what `make demo` does, with fewer rows and tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import luthier
from luthier.sources.demo import rows
from tests.little import weights


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    report = luthier.fit(
        "lp-ft", model="demo", data=rows(limit_per_class=24), out=out, sets=["max_length=48", "stages.1.steps=4"]
    )
    return out, report


@pytest.mark.slow
def test_a_solved_head_on_real_features_knows_the_topics(demo):
    """Five topics, chance is 0.2: with 96 articles the pretrained features and a solved head get most of the twelve right."""
    _, report = demo
    assert report.metrics["test"]["n"] == 12
    assert report.metrics["test"]["accuracy"] >= 0.6
    assert report.labels == ("business", "entertainment", "politics", "sports", "tech")


@pytest.mark.slow
def test_the_probe_moved_the_head_alone_and_the_second_stage_everything(demo):
    _, report = demo
    probe = {row.name: row.distance for row in report.movement if row.stage == "probe"}
    tuned = {row.name: row.distance for row in report.movement if row.stage == "finetune"}
    assert {name for name, distance in probe.items() if distance} == {"head"}
    assert all(tuned.values())
    assert len(tuned) == 9  # embeddings, six blocks, bridge, head


@pytest.mark.slow
def test_the_saved_real_model_predicts_what_the_report_measured(demo):
    out, report = demo
    from luthier.sources.data import read

    test = read(rows(limit_per_class=24), seed=0).splits["test"]
    told = luthier.predict(out, pd.DataFrame({"text": list(test.texts)}))
    right = np.mean([one == other for one, other in zip(told.labels, test.labels, strict=True)])
    assert right == pytest.approx(report.metrics["test"]["accuracy"])
    assert np.allclose(told.probabilities.sum(1), 1)


@pytest.mark.slow
def test_it_is_the_real_model(demo):
    out, report = demo
    assert report.model["parameters"] == 22_715_141  # all-MiniLM-L6-v2 with a pooler, and a head of 384 x 5 + 5
    assert all(torch.isfinite(value).all() for value in weights(out).values())
