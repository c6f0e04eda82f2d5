"""Draws of what is not known exactly, and times split by cause: what every price is computed in.

Every price is an array: element 0 is the estimate, the others are draws of everything that is not known exactly
(utilisations, overhead, the fit's error, acceptance, prices). A draw is made from the seed and the *name* of what it
stands for, so two cases that share a cause share its draws: their ratio keeps only the errors that they do not share
(common random numbers).
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.cost.roofline import FloatArray

Z90 = 1.6448536269514722  # the 95th percentile of a standard normal: ends of a 90% interval


class Draws:
    """Standard normal draws by the name of their cause: element 0 is 0, the estimate; the rest depend on seed and name."""

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        self.count, self.seed = count, seed
        self._made: dict[str, FloatArray] = {}
        self._notes: dict[str, None] = {}

    def note(self, text: str) -> None:
        """Remembers what a reader of the answer must know (a call outside the calibrated range), once."""
        self._notes[text] = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted, in order."""
        return tuple(self._notes)

    def normal(self, name: str) -> FloatArray:
        """Array of ``count + 1``."""
        if name not in self._made:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            self._made[name] = np.concatenate([[0.0], generator.standard_normal(self.count)])
        return self._made[name]

    @property
    def causes(self) -> tuple[str, ...]:
        """Names drawn so far, in order."""
        return tuple(self._made)

    def between(self, name: str, low: float, middle: float, high: float) -> FloatArray:
        """A positive quantity whose 90% interval is [low, high]: log-normal on each side of its middle."""
        if not 0 < low <= middle <= high < math.inf:
            raise ValueError(f"{name}: expected 0 < low <= middle <= high, got {low}, {middle}, {high}")
        z = self.normal(name) / Z90
        up, down = math.log(high / middle), math.log(middle / low)
        return np.asarray(middle * np.exp(np.where(z > 0, z * up, z * down)))


@dataclass(frozen=True)
class Part:
    """Seconds of some calls by draw, split by cause."""

    time_s: FloatArray
    memory_s: FloatArray
    compute_s: FloatArray
    overhead_s: FloatArray

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.time_s + other.time_s,
            self.memory_s + other.memory_s,
            self.compute_s + other.compute_s,
            self.overhead_s + other.overhead_s,
        )

    def times(self, factor: float | FloatArray) -> "Part":
        """All of it so many times."""
        return Part(self.time_s * factor, self.memory_s * factor, self.compute_s * factor, self.overhead_s * factor)


class Ends(Draws):
    """Two draws: one cause at the low and at the high end of its 90% interval, every other at its estimate."""

    def __init__(self, cause: str) -> None:
        super().__init__(2)
        self.cause = cause

    def normal(self, name: str) -> FloatArray:
        """Array of three: the estimate, then both ends for the cause asked about."""
        end = Z90 if name == self.cause else 0.0
        return np.array([0.0, -end, end])


@dataclass(frozen=True)
class Influence:
    """What one uncertain input alone does to an answer: its values at the ends of the input's 90% interval."""

    cause: str
    at_low: float
    at_high: float

    @property
    def swing(self) -> float:
        """The larger end over the smaller: 1 where it moves nothing."""
        return max(self.at_low, self.at_high) / min(self.at_low, self.at_high)


def influences(answer: Callable[[Draws], FloatArray]) -> list[Influence]:
    """Every uncertain input of a positive ``answer(draws)``, the one that moves it most first."""
    asked = Draws(0)
    answer(asked)
    found = []
    for cause in asked.causes:
        values = answer(Ends(cause))
        found.append(Influence(cause, float(values[1]), float(values[2])))
    return sorted(found, key=lambda i: -i.swing)


def interval(values: FloatArray) -> tuple[float, float, float]:
    """Element 0, and the 5th and 95th percentiles of the rest."""
    middle = float(values[0])
    if values.size < 2:
        return middle, middle, middle
    low, high = (float(v) for v in np.percentile(values[1:], [5.0, 95.0]))
    return middle, min(low, middle), max(high, middle)
