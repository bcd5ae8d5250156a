"""The head of a loaded model: which weights it is, whose labels it is for, and drawing it anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from luthier.sources.tasks import Task


def names_of(task: Task) -> dict[str, Any]:
    """What a config says of the labels."""
    return {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: i for i, name in enumerate(task.label_names)},
        "problem_type": task.problem_type,
    }


def outputs(model: Any, task: Task) -> Iterator[str]:
    """The weights beyond the body that have one row an output."""
    body = model.base_model_prefix + "."
    for name, weight in model.named_parameters():
        if not name.startswith(body) and weight.shape[0] == task.num_labels:
            yield name


def same_classes(had: Mapping[int, str], task: Task) -> bool:
    """Whether a checkpoint's classes are the task's, in order; nameless ones (LABEL_0, ...) are taken for 0, 1, ..."""
    theirs = tuple(str(name).removeprefix("LABEL_") for _, name in sorted(had.items()))
    return len(theirs) == 1 if task.kind == "regression" else theirs == task.label_names


def draw(model: Any, fresh: set[str]) -> None:
    """Draws the weights named ``fresh`` anew, in place, by the model's own rule and from the global generator.

    Transformers skips what it has marked as set; so all marks are made again: set, but for ``fresh``.
    """
    for module in model.modules():
        module._is_hf_initialized = False
    for name, weight in model.named_parameters():
        weight._is_hf_initialized = name not in fresh
    for buffer in model.buffers():
        buffer._is_hf_initialized = True
    model.initialize_weights()
