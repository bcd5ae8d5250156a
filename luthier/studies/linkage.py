"""DirectProbe's clusters: rows of one label are merged as long as the hulls of different labels do not meet. Pure functions of arrays.

Source: Zhou, Srikumar, NAACL 2021 (DirectProbe).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from luthier.core.scores import Array
from luthier.errors import DataError, Fault
from luthier.studies.hulls import separable

_STUDY, _MOST = "a study of clusters", 5
Members = tuple[tuple[int, ...], ...]


def clusters(vectors: Array, labels: Array, *, name: str = "vectors") -> Members:
    """The rows of each cluster; there are as many clusters as labels exactly where no two labels' hulls meet.

    Each row begins as a cluster. The two clusters of one label whose means are nearest are merged, unless the hull of the two would meet
    the hull of a cluster of another label: such a pair is left apart for good. It ends when no pair is left.

    Args:
        vectors: shape (n, h).
        labels: shape (n,), whole numbers.
        name: of the vectors, for the error.
    Returns:
        row numbers, ascending within a cluster; clusters by their first row.
    Raises:
        DataError: no rows, labels that are no classes, or rows with one vector and two labels, whose clusters meet from the start.
    Differs: without Gurobi the authors decide by a support vector machine, which may end early; a linear programme is exact. They merge
        first and search for the first bad merge; we look before each merge, but neither at labels whose whole hulls do not meet nor at
        pairs that hold a pair left apart before. The clusters are the same.
    """
    at, x = _numbered(vectors, labels, name), reduced(vectors)
    n, kinds = len(x), int(at.max()) + 1
    meet = np.zeros((kinds, kinds), dtype=bool)
    for one in range(kinds):
        for other in range(one):
            meet[one, other] = meet[other, one] = not separable(x[at == one], x[at == other])
    members, means, alive = [[row] for row in range(n)], x.copy(), np.ones(n, dtype=bool)
    apart = at[:, None] != at[None, :]  # pairs of clusters that are never merged
    np.fill_diagonal(apart, True)
    gaps = np.where(apart, np.inf, cdist(x, x))
    while True:
        i, j = divmod(int(gaps.argmin()), n)
        if gaps[i, j] == np.inf:
            break
        both = members[i] + members[j]
        mean = x[both].mean(axis=0)
        others = np.flatnonzero(alive & meet[at[i]][at])
        nearest = others[np.linalg.norm(means[others] - mean, axis=1).argsort(kind="stable")]
        if all(separable(x[both], x[members[other]]) for other in nearest):
            members[i], means[i], alive[j] = both, mean, False
            apart[i] |= apart[j]  # a hull that holds one that meets another meets it too
            gaps[j] = gaps[:, j] = np.inf
            gaps[i] = np.where(apart[i] | ~alive, np.inf, np.linalg.norm(means - mean, axis=1))
            gaps[:, i], apart[:, i] = gaps[i], apart[i]
        else:
            apart[i, j] = apart[j, i] = True
            gaps[i, j] = gaps[j, i] = np.inf
    return tuple(sorted(tuple(sorted(members[row])) for row in np.flatnonzero(alive)))


def reduced(vectors: Array) -> Array:
    """The rows in as many coordinates as they span: shape (n, at most n - 1); all distances between them stay."""
    x = np.array(vectors, dtype=np.float64)
    x -= x.mean(axis=0)
    if x.shape[1] < len(x):
        return x
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    kept = singular > 1e-13 * singular.max(initial=0.0)
    return np.asarray(left[:, kept] * singular[kept])


def _numbered(vectors: Array, labels: Array, name: str) -> Array:
    """Each row's label as a number from 0; refuses what cannot be clustered."""
    told = np.asarray(labels)
    if len(vectors) == 0 or told.shape != (len(vectors),) or told.dtype.kind not in "iu":
        got = f"{told.dtype} labels of shape {told.shape} for {len(vectors)} rows"
        raise DataError.of([Fault(name, "must have one class number for each of at least one row", got)], _STUDY)
    if not np.isfinite(vectors).all():
        raise DataError.of([Fault(name, "must be finite", "NaN or infinity")], _STUDY)
    at = np.unique(told, return_inverse=True)[1]
    _, same = np.unique(np.asarray(vectors) + 0.0, axis=0, return_inverse=True)  # -0.0 is 0.0
    same = same.reshape(-1)
    groups = [np.flatnonzero(same == group) for group in range(int(same.max()) + 1)]
    faults = [_twins(rows, told, name) for rows in groups if len(set(at[rows])) > 1]
    if faults:
        raise DataError.of(faults[:_MOST], _STUDY)
    return np.asarray(at)


def _twins(rows: Array, labels: Array, name: str) -> Fault:
    first = rows[0]
    other = next(row for row in rows if labels[row] != labels[first])
    got = f"labels {labels[first]} and {labels[other]} on the vector of rows {first} and {other}"
    return Fault(
        name,
        "must not give one vector two labels",
        got,
        "Drop one of the rows, or look at weights that tell them apart.",
    )
