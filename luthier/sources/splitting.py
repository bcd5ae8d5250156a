"""Shares of a table by lot: stratified by label, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from luthier.sources.labels import Label

FEWEST = 3  # rows, copies apart, that a class needs to be in train, validation and test


def quotas(sizes: Sequence[int], total: int, room: Sequence[int]) -> list[int]:
    """``total`` places over classes in proportion to ``sizes``, none above ``room``.

    Where there is room, each is within one of its exact share: a place that is over goes to the class furthest below
    its own, the first in a tie.

    >>> quotas([50, 30, 20], 10, [49, 29, 19])
    [5, 3, 2]
    >>> quotas([5, 5, 1], 2, [4, 4, 0])
    [1, 1, 0]
    """
    whole = sum(sizes)
    exact = [size * total / whole for size in sizes]
    taken = [min(int(share), most) for share, most in zip(exact, room, strict=True)]
    for _ in range(min(total, sum(room)) - sum(taken)):
        open_ = [i for i in range(len(sizes)) if taken[i] < room[i]]
        taken[min(open_, key=lambda i: (taken[i] - exact[i], i))] += 1
    return taken


def divide(
    labels: Sequence[Label],
    shares: Mapping[str, float],
    *,
    stratify: bool,
    seed: int,
    keys: Sequence[Hashable] | None = None,
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Row numbers (from 0, ascending) of each named share and of ``train``, which takes the rest.

    Rows of one key are drawn as one. A row with more copies than the smallest share has rows stays in train with them,
    unless most have as many. Copies whose labels differ are of a class of their own.

    Args:
        shares: name -> fraction of the rows, copies apart, in (0, 1); rounded to whole rows, at least one.
        stratify: keep each class's share; classes of fewer than three rows, copies apart, stay in train whole.
        keys: of each row, what its copies have too; None = there are no copies.
    Returns:
        the rows of each share, and notes on what could not be stratified.
    """
    copies: dict[Hashable, list[int]] = {}
    for row, key in enumerate(range(len(labels)) if keys is None else keys):
        copies.setdefault(key, []).append(row)
    together = {rows[0]: rows for rows in copies.values()}
    usual = sorted(map(len, together.values()))[len(together) // 2]
    most = max(usual, min(shares.values()) * len(labels))
    classes: dict[Hashable, list[int]] = {}
    for first, rows in together.items():
        if len(rows) <= most:
            classes.setdefault(_class([labels[row] for row in rows]) if stratify else None, []).append(first)
    drawn = _drawn(classes, shares, stratify=stratify, seed=seed)
    divided = {name: sorted(row for first in firsts for row in together[first]) for name, firsts in drawn.items()}
    held_out = {row for rows in divided.values() for row in rows}
    divided["train"] = [row for row in range(len(labels)) if row not in held_out]
    return divided, _notes(labels, divided) if stratify else ()


def _class(labels: Sequence[Label]) -> Hashable:
    """The label of copies; where theirs differ, all of these."""
    several = tuple(sorted(set(labels), key=str))
    return several[0] if len(several) == 1 else several


def _drawn(
    classes: Mapping[Hashable, Sequence[int]], shares: Mapping[str, float], *, stratify: bool, seed: int
) -> dict[str, list[int]]:
    """The rows of each share, each standing for its copies."""
    lot = np.random.default_rng([seed, 0x5911])
    keys = sorted(classes, key=str)
    sizes = [len(classes[key]) for key in keys]
    left = [lot.permutation(classes[key]).tolist() for key in keys]
    kept = [size if stratify and size < FEWEST else 1 for size in sizes]  # rows that train keeps, whatever the shares
    drawn: dict[str, list[int]] = {}
    for name, share in shares.items():
        room = [max(len(rows) - least, 0) for rows, least in zip(left, kept, strict=True)]
        taken = quotas(sizes, max(1, round(share * sum(sizes))), room)
        drawn[name] = [row for rows, many in zip(left, taken, strict=True) for row in rows[:many]]
        left = [rows[many:] for rows, many in zip(left, taken, strict=True)]
    return drawn


def _notes(labels: Sequence[Label], divided: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    every = set(labels)
    notes = []
    for name in divided:
        absent = sorted(str(label) for label in every - {labels[row] for row in divided[name]})
        if absent:
            told = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            notes.append(f"{name}: no rows of {told}: too few to be in every split")
    return tuple(notes)
