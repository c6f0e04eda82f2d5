"""Kernel calls that were priced, and the step that they add up to.

A step is a sum of calls, since kernels run one after another, and of what they cost each other where that was measured. Its
interval takes the errors of calls of one op as fully correlated (they share a fit: their interval ends add up) and of different
ops as independent (their half widths add in quadrature).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from assay.cost.roofline import Estimate, largest

_TIMES = ("time_s", "low_s", "high_s", "memory_s", "compute_s", "overhead_s")


class _Split:
    """A time by what it goes to."""

    memory_s: float
    compute_s: float
    overhead_s: float

    @property
    def bound(self) -> str:
        """What the largest part of the time goes to: "memory", "compute" or "overhead"."""
        return largest(self.memory_s, self.compute_s, self.overhead_s)


@dataclass(frozen=True)
class Call(_Split):
    """All calls of one kernel with one shape in a step: ``count`` times the same; seconds are of all together."""

    name: str
    op: str
    count: float
    shape: str
    time_s: float
    low_s: float
    high_s: float
    memory_s: float
    compute_s: float
    overhead_s: float
    basis: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, op: str, count: float, shape: str, estimate: Estimate) -> "Call":
        """So many calls that are estimated alike."""
        times = {key: count * getattr(estimate, key) for key in _TIMES}
        return cls(name=name, op=op, count=count, shape=shape, basis=estimate.basis, notes=estimate.notes, **times)

    def repeated(self, count: int) -> "Call":
        """The same, so many times over."""
        return replace(self, **{key: getattr(self, key) * count for key in ("count", *_TIMES)})


@dataclass(frozen=True)
class StepEstimate(_Split):
    """A sum of calls, with its 90% interval.

    ``basis`` is "measured" when calls with a calibrated kernel make at least 80% of the time, "roof" when they make
    less than 20%, else "mixed". ``extrapolated`` says in what the calls leave the calibrated range.
    """

    calls: tuple[Call, ...]
    time_s: float
    low_s: float
    high_s: float
    memory_s: float
    compute_s: float
    overhead_s: float
    measured_share: float
    extrapolated: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def basis(self) -> str:
        """Where the time comes from: "measured", "mixed" or "roof"."""
        return "measured" if self.measured_share >= 0.8 else "roof" if self.measured_share < 0.2 else "mixed"

    @classmethod
    def of(cls, calls: Sequence[Call]) -> "StepEstimate":
        """The sum of the calls."""
        by_op: dict[str, list[float]] = {}
        for c in calls:
            ends = by_op.setdefault(c.op, [0.0, 0.0])
            ends[0] += c.time_s - c.low_s
            ends[1] += c.high_s - c.time_s
        time = sum(c.time_s for c in calls)
        measured = [c for c in calls if c.basis == "measured"]
        return cls(
            calls=tuple(calls),
            time_s=time,
            low_s=time - math.hypot(*(low for low, _ in by_op.values())),
            high_s=time + math.hypot(*(high for _, high in by_op.values())),
            memory_s=sum(c.memory_s for c in calls),
            compute_s=sum(c.compute_s for c in calls),
            overhead_s=sum(c.overhead_s for c in calls),
            measured_share=sum(c.time_s for c in measured) / time,
            extrapolated=_gathered(measured),
            notes=_gathered([c for c in calls if c.basis != "measured"]),
        )


def _gathered(calls: Sequence[Call]) -> tuple[str, ...]:
    """Each note once, with the calls that it is about."""
    names: dict[str, dict[str, None]] = {}
    for call in calls:
        for note in call.notes:
            names.setdefault(note, {})[call.name] = None
    return tuple(f"{note} ({', '.join(about)})" for note, about in names.items())
