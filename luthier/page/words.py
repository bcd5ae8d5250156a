"""What the report page says in words: the cards on top and a few plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.report import Report

TITLES = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE",
    "rmse": "RMSE",
    "mae": "MAE",
    "pearson": "Pearson r",
    "spearman": "Spearman ρ",
}
SHARES = ("accuracy", "f1_macro")  # told in per cent


@dataclass(frozen=True)
class Card:
    """One number of the headline."""

    title: str
    value: str
    below: str = ""


def title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def shown(metric: str, value: Any) -> str:
    """A score as the page prints it.

    >>> shown("accuracy", 0.912), shown("nll", 0.30149), shown("ece", None)
    ('91.2\\xa0%', '0.301', '–')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if metric in SHARES:
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def split_title(split: str) -> str:
    """
    >>> split_title("ood_bbc"), split_title("test")
    ('shifted: bbc', 'test')
    """
    return f"shifted: {split.removeprefix('ood_')}" if split.startswith("ood_") else split


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in ``n`` rows.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927); as in Brown, Cai, DasGupta, Stat. Sci. 16 (2001), eq. 4.
    Differs: nothing.
    """
    z = 1.959963984540054
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def difference(metric: str, value: Any, reference: Any, name: str) -> str:
    """How a score differs from the score on the split ``name``: ``8.1 points below test``."""
    if value is None or reference is None:
        return ""
    gap = 100 * (value - reference) if metric in SHARES else value - reference
    size = f"{abs(gap):.1f} points" if metric in SHARES else f"{abs(gap):.3f}"
    return f"as on {name}" if float(size.split()[0]) == 0 else f"{size} {'above' if gap > 0 else 'below'} {name}"


def cards(report: Report) -> list[Card]:
    """The first metric on the split that counts, on the shifted tests, and the calibration error."""
    name, metric = report.shown, report.metric
    if name is None:
        return []
    scores = report.metrics[name]
    value, n = scores.get(metric), scores.get("n")
    below = f"{n:,} rows" if n else ""
    if metric == "accuracy" and value is not None and n:
        low, high = wilson(value, n)
        below = f"95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}; {below}"
    told = [Card(f"{title(metric)} on {name}", shown(metric, value), below)]
    for split, other in report.metrics.get("ood", {}).items():
        far = other.get(metric)
        told.append(Card(split_title(f"ood_{split}"), shown(metric, far), difference(metric, far, value, name)))
    if scores.get("ece") is not None:
        after = report.calibrated.get(name, {}).get("ece")
        arrow = f" → {shown('ece', after)}" if after is not None else ""
        how = f"before → after {calibration_name(report)}" if arrow else "mean gap between confidence and accuracy"
        told.append(Card("calibration error (ECE)", shown("ece", scores["ece"]) + arrow, how))
    return told


def calibration_name(report: Report) -> str:
    heat = report.calibration.get("temperature")
    return "calibration" if heat is None else f"temperature {heat:.3g}"


def sentences(report: Report) -> list[str]:
    """The run in plain words, for someone who reads no table."""
    name = report.shown
    count = len(report.stages)
    stages = f"{count} stages ({', then '.join(stage.name for stage in report.stages)})" if count > 1 else "one stage"
    rows = report.data.get("sizes", {}).get("train")
    begin = f"The model was fine-tuned in {stages}" + (f" on {rows:,} rows" if rows else "") + "."
    if name is None:
        return [begin, "No split was held out, so nothing was measured."]
    scores = report.metrics[name]
    if report.task == "regression":
        return [begin, _regression(scores, name), *_constant(report, scores, name), *_shifted(report, scores, name)]
    return [begin, *_right(report, scores, name), *_shifted(report, scores, name), *_sure(report, scores, name)]


def _right(report: Report, scores: Mapping[str, Any], name: str) -> list[str]:
    accuracy, n = scores.get("accuracy"), scores.get("n")
    if accuracy is None or not n:
        return []
    told = f"It names the right class for {round(accuracy * n):,} of {n:,} {name} rows ({shown('accuracy', accuracy)})"
    known = report.baseline(name)
    if known is None:
        return [told + "."]
    return [f"{told}; always answering “{known[2]}” would be right for {shown(*known[:2])}{_no_better(report, name)}."]


def _regression(scores: Mapping[str, Any], name: str) -> str:
    told = [f"{scores['mae']:.3g} away from the true value on average"] if scores.get("mae") is not None else []
    if scores.get("pearson") is not None:
        told.append(f"correlated with it at {scores['pearson']:.3f} (Pearson)")
    return f"On the {scores.get('n', 0):,} {name} rows its predictions are {' and '.join(told) or 'not measured'}."


def _constant(report: Report, scores: Mapping[str, Any], name: str) -> list[str]:
    known = report.baseline(name)
    if known is None:
        return []
    ours, theirs = (shown("rmse", value) for value in (scores.get("rmse"), known[1]))
    return [f"Its RMSE is {ours}; always answering {known[2]} would give {theirs}{_no_better(report, name)}."]


def _no_better(report: Report, name: str) -> str:
    return ", so the run is no better than that" if report.no_better(name) else ""


def _shifted(report: Report, scores: Mapping[str, Any], name: str) -> list[str]:
    metric, reference = report.metric, scores.get(report.metric)
    found = {split: told.get(metric) for split, told in report.metrics.get("ood", {}).items()}
    ordered = sorted((value, split) for split, value in found.items() if value is not None)
    if not ordered or reference is None:
        return []
    if len(ordered) == 1:
        value, split = ordered[0]
        gap = difference(metric, value, reference, name)
        return [f"On the shifted test {split} its {title(metric)} is {shown(metric, value)}, {gap}."]
    (low, worst), (high, best) = ordered[0], ordered[-1]
    ends = f"{shown(metric, low)} ({worst}) to {shown(metric, high)} ({best})"
    return [f"On the {len(ordered)} shifted tests its {title(metric)} goes from {ends}."]


def _sure(report: Report, scores: Mapping[str, Any], name: str) -> list[str]:
    bins = [one for one in report.reliability.get(name, {}).get("before", []) if one["count"]]
    rows = sum(one["count"] for one in bins)
    if not rows or scores.get("accuracy") is None:
        return []
    sure, right = sum(one["count"] * one["confidence"] for one in bins) / rows, scores["accuracy"]
    how = "over-confident" if sure > right + 0.005 else "under-confident" if sure < right - 0.005 else "well balanced"
    told = f"On {name} it is {how}: {100 * sure:.1f}\u00a0% sure on average and {100 * right:.1f}\u00a0% right"
    before, after = scores.get("ece"), report.calibrated.get(name, {}).get("ece")
    if before is None or after is None:
        return [told + "."]
    change = "falls" if after < before else "rises"
    ends = f"from {shown('ece', before)} to {shown('ece', after)}"
    return [f"{told}. With {calibration_name(report)} the calibration error {change} {ends}."]
