"""Times a stack of layers in turns with the same calls alone: what calls of a model cost each other."""

import statistics
from collections.abc import Iterator, Sequence
from time import perf_counter_ns
from typing import Any

from .clock import Call, Clock, quiet

#: Calls of one shape that are timed alone, one after another, in each turn; fewer where the stack has fewer.
ALONE_CALLS = 8


class SequenceTimer:
    """Times a stack; each of its calls takes data of its own, as in :class:`assay.measure.clock.Timer`.

    Parameters
    ----------
    order
        The rotation of each call of the stack, in order; calls of one shape share theirs.
    clock
        Nanoseconds, for tests.

    Attributes
    ----------
    samples : list of float
        Seconds of a whole stack.
    conditions : dict
        ``alone_s``: the median over all turns of what its calls took alone, added up.
    """

    def __init__(self, order: Sequence[Iterator[Call]], clock: Clock = perf_counter_ns) -> None:
        if not order:
            raise ValueError("order: expected at least one call, got none")
        self._order, self._clock = list(order), clock
        counts: dict[int, int] = {}
        for rotation in self._order:
            counts[id(rotation)] = counts.get(id(rotation), 0) + 1
        self._shapes = [(next(r for r in self._order if id(r) == key), count) for key, count in counts.items()]
        self._alone: list[float] = []
        self.samples: list[float] = []
        self.conditions: dict[str, Any] | None = None

    def _time(self, calls: Sequence[Call]) -> float:
        start = self._clock()
        for call in calls:
            call()
        return 1e-9 * max(self._clock() - start, 1)

    def _turn(self) -> None:
        alone = 0.0
        for rotation, count in self._shapes:
            timed = min(count, ALONE_CALLS)
            calls = [next(rotation) for _ in range(timed + 1)]
            calls[0]()  # as before every visit to a point: it wakes the workers and brings the code in
            alone += count / timed * self._time(calls[1:])
        self._alone.append(alone)
        self.samples.append(self._time([next(rotation) for rotation in self._order]))

    def visit(self, budget_s: float, min_samples: int = 3, max_samples: int = 15) -> float:
        """Takes turns for about `budget_s` seconds, `min_samples` to `max_samples`; returns the seconds it took."""
        begun = self._clock()
        with quiet():
            for taken in range(max_samples):
                spent = 1e-9 * (self._clock() - begun)
                if (taken >= min_samples and spent > budget_s) or (taken and spent > 3 * budget_s > 0):
                    break
                self._turn()
        self.conditions = {"alone_s": statistics.median(self._alone)}
        return 1e-9 * (self._clock() - begun)
