"""Exact laws without sampling: of a program that makes random choices, and of a kernel that is given uniforms."""

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np


class Draw:
    """The random choices of one run of a program, each of which is taken in every possible way.

    Probabilities may be floats or :class:`fractions.Fraction`, with which the law is exact.

    Attributes
    ----------
    weight : float or Fraction
        Probability of the choices made so far.
    """

    def __init__(self, script: tuple[int, ...] = ()) -> None:
        self.weight: Any = 1
        self._script = script
        self._taken: list[int] = []
        self._pending: list[tuple[int, ...]] = []

    def choose(self, weights: Sequence[Any]) -> int:
        """An index with probability in proportion to its weight.

        Raises
        ------
        ValueError
            A negative or non-finite weight, or all of them 0.
        """
        values = list(weights)
        for i, w in enumerate(values):
            if not 0 <= w < float("inf"):
                raise ValueError(f"weights[{i}]: expected a finite value of 0 or more, got {w}")
        possible = [i for i, w in enumerate(values) if w > 0]
        if not possible:
            raise ValueError("weights: expected one above 0, got none")
        at = len(self._taken)
        if at < len(self._script):
            index = self._script[at]
        else:
            index = possible[0]
            self._pending += [(*self._taken, other) for other in possible[1:]]
        self._taken.append(index)
        if len(possible) > 1:
            chosen = values[index]
            self.weight *= (Fraction(chosen) if isinstance(chosen, int) else chosen) / sum(values)
        return index

    def accept(self, probability: Any) -> bool:
        """True with this probability (1 where it is more)."""
        p = min(probability, 1)
        return self.choose([p, 1 - p]) == 0


def enumerate_law(program: Callable[[Draw], Hashable], *, max_paths: int = 1_000_000) -> tuple[dict[Any, Any], int]:
    """The exact law of what a program returns.

    Parameters
    ----------
    program
        A function whose only randomness is the :class:`Draw` that it is given. It is run once for each way its choices
        can go, each run replaying the choices before the one that differs.
    max_paths
        ValueError beyond so many runs.

    Returns
    -------
    (dict, int)
        Outcome to probability, and the number of runs.
    """
    law: dict[Any, Any] = {}
    waiting: list[tuple[int, ...]] = [()]
    runs = 0
    while waiting:
        runs += 1
        if runs > max_paths:
            raise ValueError(f"program: expected at most {max_paths} ways for its choices to go, got more")
        draw = Draw(waiting.pop())
        outcome = program(draw)
        law[outcome] = law.get(outcome, 0) + draw.weight
        waiting += draw._pending
    return law, runs


def uniform_law(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], programs: int, dims: int, *, bits: int = 34,
    max_boxes: int = 1_000_000,
) -> tuple[list[dict[tuple[int, ...], float]], int]:  # fmt: skip
    """The exact law of deterministic programs of uniforms, seen from outside only: kernels, for example.

    The cube of uniforms is split into boxes on which the outcome is constant. Where two corners of a box that differ in
    one uniform differ in outcome, the threshold between them is found by bisection and the box is split there. What
    this rests on: in each uniform, the others held, an outcome is taken on one interval, and boxes whose corners agree are
    constant. Decisions by thresholds and draws by a cumulated sum are so; random points check it.

    Parameters
    ----------
    run : callable
        (program int64 [n], uniforms float64 [n, dims]) to outcomes int [n, width]. Any n.
    programs, dims : int
        How many programs, and the uniforms of each.
    bits : int
        Thresholds are found to 2^-bits: 34 for float32 probabilities, 50 for float64.

    Returns
    -------
    (list of dict, int)
        Of each program: outcome to probability; and the number of boxes.

    Raises
    ------
    ValueError
        An outcome that its box did not foretell, or more than `max_boxes` boxes.
    """
    laws: list[dict[tuple[int, ...], float]] = [{} for _ in range(programs)]
    inset = 2.0 ** -(bits + 1)
    corners = (np.arange(2**dims)[:, None] >> np.arange(dims) & 1).astype(bool)
    owner, low, high = np.arange(programs), np.zeros((programs, dims)), np.ones((programs, dims))
    boxes = 0
    rng = np.random.default_rng(dims)
    while len(owner):
        if boxes + len(owner) > max_boxes:
            raise ValueError(f"run: expected at most {max_boxes} boxes of constant outcome, got more")
        points = np.where(corners, high[:, None] - inset, low[:, None] + inset)
        found = run(np.repeat(owner, len(corners)), points.reshape(-1, dims)).reshape(len(owner), len(corners), -1)
        same = (found == found[:, :1]).all(axis=(1, 2))
        narrow = (high - low).min(axis=1) <= 4 * inset
        done = np.flatnonzero(same | narrow)
        boxes += len(done)
        volumes = (high[done] - low[done]).prod(axis=1)
        for b, volume in zip(done, volumes, strict=True):
            outcome = tuple(found[b, 0].tolist())
            law = laws[owner[b]]
            law[outcome] = law.get(outcome, 0.0) + float(volume)
        sure = np.flatnonzero(same & ~narrow)
        inside = low[sure] + (high[sure] - low[sure]) * rng.uniform(0.001, 0.999, (len(sure), dims))
        if len(sure) and (run(owner[sure], inside) != found[sure, 0]).any():
            raise ValueError(
                "run: expected outcomes on intervals of each uniform, got another one between equal corners"
            )

        open_ = np.flatnonzero(~(same | narrow))
        if not len(open_):
            break
        axis, cut = _threshold(run, owner[open_], points[open_], found[open_], low[open_], high[open_], bits)
        at = np.arange(len(open_))
        left, right = high[open_].copy(), low[open_].copy()
        left[at, axis] = right[at, axis] = cut
        owner = np.concatenate([owner[open_]] * 2)
        low, high = np.concatenate([low[open_], right]), np.concatenate([left, high[open_]])
    return laws, boxes


def _threshold(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], owner: np.ndarray, points: np.ndarray, found: np.ndarray,
    low: np.ndarray, high: np.ndarray, bits: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of each box, a uniform that matters (the first that does) and where the outcome of its lower end stops."""
    count, corners, dims = points.shape
    axis, corner = np.full(count, -1), np.zeros(count, np.int64)
    for j in range(dims - 1, -1, -1):
        lower = np.flatnonzero(~(np.arange(corners) >> j & 1).astype(bool))
        differs = (found[:, lower] != found[:, lower | 1 << j]).any(axis=2)
        some = differs.any(axis=1)
        axis[some], corner[some] = j, lower[differs.argmax(axis=1)[some]]
    at = np.arange(count)
    base, probe = found[at, corner], points[at, corner].copy()
    a, b = low[at, axis].copy(), high[at, axis].copy()
    for _ in range(bits):
        middle = (a + b) / 2
        probe[at, axis] = middle
        below = (run(owner, probe) == base).all(axis=1)
        a, b = np.where(below, middle, a), np.where(below, b, middle)
        if (b - a <= 2.0**-bits).all():
            break
    return axis, (a + b) / 2
