"""Logits whose probabilities are known, for tests of calibration."""

from __future__ import annotations

import numpy as np


def two_way(confidences: list[float]) -> np.ndarray:
    """Logits of two classes whose first has these probabilities."""
    chance = np.array(confidences)
    return np.stack([np.log(chance), np.log(1 - chance)], axis=1)


def drawn(seed: int, rows: int = 60, classes: int = 4, *, heat: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of which ``1 / heat`` would be calibrated."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (rows, classes))
    labels = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return heat * logits, labels
