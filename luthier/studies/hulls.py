"""Convex hulls of rows: whether a hyperplane parts two of them, and how far apart they are. Pure functions of arrays.

The distance of two hulls is the margin of the hard-margin support vector machine on them. It is found by a Frank-Wolfe method that is
fully corrective: the nearest point of all hulls of the corners found so far is exact at every step, and a bound tells when it is done.

Source: Wolfe, Mathematical Programming 11, 1976: the nearest point in a polytope. Lawson, Hanson, Solving Least Squares Problems, 1974,
ch. 23: non-negative least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog, nnls

from luthier.core.scores import Array

GAP = 1e-9  # of the rows' size: how far the two bounds of a distance may lie apart
_TRIES = 20  # corners to look for a hyperplane with before a linear programme decides
_ROUNDS = 20_000


@dataclass(frozen=True)
class Distance:
    """A distance and its proof.

    Args:
        upper: the distance of a point in one hull to a point in the other.
        lower: no two points are nearer than this: the gap between the hulls along ``normal``; 0 where they meet.
        normal: shape (h,), length one, from the second hull to the first; zeros where they meet.
    """

    upper: float
    lower: float
    normal: Array


def separable(one: Array, other: Array) -> bool:
    """Whether some w, b give w.x + b >= 1 for all rows of ``one`` and <= -1 for all of ``other``: whether their hulls do not meet.

    Args:
        one, other: shapes (n, h) and (m, h).
    Differs: DirectProbe asks Gurobi, or a support vector machine that may end before it has converged; we ask HiGHS, after a
        short search for a hyperplane.
    """
    a, b, size = _scaled(one, other)
    if not size:
        return False
    if _descend(a, b, most=_TRIES, first=True).lower > GAP:
        return True
    rows = np.vstack([np.hstack([-a, -np.ones((len(a), 1))]), np.hstack([b, np.ones((len(b), 1))])])
    width = rows.shape[1]
    found = linprog(np.zeros(width), A_ub=rows, b_ub=-np.ones(len(rows)), bounds=(None, None), method="highs")
    if found.status in (0, 2):  # feasible, infeasible
        return bool(found.status == 0)
    return _descend(a, b, most=_ROUNDS, first=True).lower > GAP  # HiGHS gave up: a hyperplane is the proof


def hull_distance(one: Array, other: Array) -> Distance:
    """The least distance of a point in the hull of ``one`` to a point in the hull of ``other``; upper - lower <= 1e-9 of their size.

    Args:
        one, other: shapes (n, h) and (m, h); a single row is a point.
    """
    a, b, size = _scaled(one, other)
    found = _descend(a, b, most=_ROUNDS, first=False) if size else Distance(0.0, 0.0, np.zeros(a.shape[1]))
    if found.upper <= GAP:  # nearer than what can be told
        return Distance(0.0, 0.0, np.zeros(a.shape[1]))
    return Distance(found.upper * size, found.lower * size, found.normal)


def hull2hull(one: Array, other: Array) -> float:
    """The distance of two hulls: 0 where they meet."""
    return hull_distance(one, other).upper


def _scaled(one: Array, other: Array) -> tuple[Array, Array, float]:
    """Both around their middle and divided by their size: the largest distance to the middle."""
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    both = np.vstack([a, b])
    both = both - both.mean(axis=0)
    size = float(np.linalg.norm(both, axis=1).max())
    both = both / (size or 1.0)
    return both[: len(a)], both[len(a) :], size


def _descend(a: Array, b: Array, *, most: int, first: bool) -> Distance:
    """min |w| over w = p - q, p in hull(a), q in hull(b).

    From the middles on, each round adds the corner v = a_i - b_j with the least w.v to those found so far, and takes the nearest point
    of their hull. |w| is an upper bound, w.v / |w| a lower one.

    Args:
        first: ends as soon as the lower bound is above 0.
    """
    w = a.mean(axis=0) - b.mean(axis=0)
    corners = w[None, :]
    lower, normal = 0.0, np.zeros_like(w)
    for _ in range(most):
        length = float(np.linalg.norm(w))
        if length <= GAP:
            break
        i, j = int(np.argmin(a @ w)), int(np.argmax(b @ w))
        corner = a[i] - b[j]
        bound = float(corner @ w) / length
        if bound > lower:
            lower, normal = bound, w / length
        if length - lower <= GAP or (first and lower > GAP):
            break
        corners = np.vstack([corners, corner])
        weights = _nearest(corners)
        if not weights[-1] > 0:  # rounding lets it come no nearer
            break
        corners, weights = corners[weights > 0], weights[weights > 0]
        w = weights @ corners
    length = float(np.linalg.norm(w))
    return Distance(length, min(lower, length), normal)


def _nearest(corners: Array) -> Array:
    """The weights, shape (k,), of the point of hull(corners) nearest to 0: exact, by one non-negative least-squares problem.

    min_{z >= 0} |corners^T z|^2 + (sum z - 1)^2. For a fixed sum s the first term is least at s times the nearest point, whatever s is;
    so z / sum z are the weights.
    """
    z, _ = nnls(np.vstack([corners.T, np.ones(len(corners))]), np.append(np.zeros(corners.shape[1]), 1.0))
    return np.asarray(z / z.sum())
