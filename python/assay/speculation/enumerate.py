"""Exact laws without sampling: of a program that makes random choices, and of a kernel that is given uniforms."""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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
    max_boxes: int = 1_000_000, cuts: Sequence[Sequence[tuple[int, float]]] | None = None,
) -> tuple[list[dict[tuple[int, ...], float]], int]:  # fmt: skip
    """The exact law of deterministic programs of uniforms, seen from outside only: kernels, for example.

    The cube of uniforms is split into boxes on which the outcome is constant. Where two corners of a box that differ in
    one uniform differ in outcome, a threshold between them is found by bisection and the box is split there. What this
    rests on: in each uniform, the others held, an outcome is taken on one interval, so that boxes whose corners agree are
    constant. Decisions by thresholds and draws by a cumulated sum are so; random points check it. A draw from one of two
    laws, whichever the same uniform says, is so on either side of where they meet: `cuts`.

    Parameters
    ----------
    run : callable
        (program int64 [n], uniforms float64 [n, dims]) to outcomes int [n, width]. Any n.
    programs, dims : int
        How many programs, and the uniforms of each.
    bits : int
        Thresholds are found to 2^-bits: 34 for float32 probabilities, 50 for float64.
    cuts : sequence of sequence of (int, float), optional
        Of each program: uniforms and values at which the cube is split beforehand. One too many does no harm.

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
    inset = 2.0**-bits  # four times what a threshold may be off by
    corners = (np.arange(2**dims)[:, None] >> np.arange(dims) & 1).astype(bool)
    owner, low, high = _first_boxes(programs, dims, cuts)
    boxes = 0
    rng = np.random.default_rng(dims)
    while len(owner):
        if boxes + len(owner) > max_boxes:
            raise ValueError(f"run: expected at most {max_boxes} boxes of constant outcome, got more")
        points = np.where(corners, high[:, None] - inset, low[:, None] + inset)
        found = run(np.repeat(owner, len(corners)), points.reshape(-1, dims)).reshape(len(owner), len(corners), -1)
        narrow = (high - low).min(axis=1) <= 4 * inset
        bracket = _differing_corners(points, found, low, high)
        constant = bracket.axis < 0
        for b in np.flatnonzero(constant | narrow):
            law, outcome = laws[owner[b]], tuple(found[b, 0].tolist())
            law[outcome] = law.get(outcome, 0.0) + float((high[b] - low[b]).prod())
            boxes += 1
        wide = np.flatnonzero(constant & ((high - low).min(axis=1) > 64 * inset))
        inside = low[wide] + (high[wide] - low[wide]) * rng.uniform(0.1, 0.9, (len(wide), dims))
        if len(wide) and (run(owner[wide], inside) != found[wide, 0]).any():
            raise ValueError(
                "run: expected outcomes on intervals of each uniform, got another one between equal corners"
            )

        split = np.flatnonzero(~(constant | narrow))
        if not len(split):
            break
        cut = _threshold(run, owner[split], bracket.take(split), bits)
        at, axis = np.arange(len(split)), bracket.axis[split]
        left, right = high[split].copy(), low[split].copy()
        left[at, axis] = right[at, axis] = cut
        owner = np.concatenate([owner[split]] * 2)
        low, high = np.concatenate([low[split], right]), np.concatenate([left, high[split]])
    return laws, boxes


def _first_boxes(
    programs: int, dims: int, cuts: Sequence[Sequence[tuple[int, float]]] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner, lower and upper corners of the boxes to begin with."""
    owner, low, high = [], [], []
    for program in range(programs):
        ends: list[set[float]] = [{0.0, 1.0} for _ in range(dims)]
        for axis, value in cuts[program] if cuts else ():
            if 0 < value < 1:
                ends[axis].add(value)
        for box in itertools.product(*(itertools.pairwise(sorted(e)) for e in ends)):
            owner.append(program)
            low.append([a for a, _ in box])
            high.append([b for _, b in box])
    shape = (len(owner), dims)
    return np.array(owner, np.int64), np.reshape(np.array(low, float), shape), np.reshape(np.array(high, float), shape)


@dataclass
class _Bracket:
    """Of each box: a uniform that matters (-1: none was found), a point and its outcome, and two values of that uniform,
    of which the lower gives that outcome and the upper another."""

    axis: np.ndarray
    point: np.ndarray
    base: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def take(self, boxes: np.ndarray) -> "_Bracket":
        return _Bracket(self.axis[boxes], self.point[boxes], self.base[boxes], self.low[boxes], self.high[boxes])


def _differing_corners(points: np.ndarray, found: np.ndarray, low: np.ndarray, high: np.ndarray) -> _Bracket:
    """The first uniform in which two corners differ."""
    count, corners, dims = points.shape
    axis, corner = np.full(count, -1), np.zeros(count, np.int64)
    for j in range(dims - 1, -1, -1):
        lower = np.flatnonzero(~(np.arange(corners) >> j & 1).astype(bool))
        differs = (found[:, lower] != found[:, lower | 1 << j]).any(axis=2)
        some = differs.any(axis=1)
        axis[some], corner[some] = j, lower[differs.argmax(axis=1)[some]]
    at = np.arange(count)
    return _Bracket(axis, points[at, corner].copy(), found[at, corner], low[at, axis].copy(), high[at, axis].copy())


def _threshold(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], owner: np.ndarray, bracket: _Bracket, bits: int
) -> np.ndarray:
    """Where the outcome at the lower end of each bracket stops."""
    at, a, b = np.arange(len(owner)), bracket.low, bracket.high
    point = bracket.point
    while (b - a).max() > 2.0 ** -(bits + 1):
        middle = (a + b) / 2
        point[at, bracket.axis] = middle
        below = (run(owner, point) == bracket.base).all(axis=1)
        a, b = np.where(below, middle, a), np.where(below, b, middle)
    return (a + b) / 2
