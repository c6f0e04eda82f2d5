"""How a call is timed, the same way by ``assay calibrate`` and by ``benchmarks/``.

A sample is the mean over as many calls as make it last 100 us (one, for a GEMM of any size), after one call that is not
timed: it wakes the workers and brings the code in. Calls rotate through copies of their data, so that weights come from
DRAM as they do in a model. Machines drift and are shared: points are visited in turns, several times a run, and what is
kept are all samples, their median and their spread.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from time import perf_counter_ns
from typing import Any

Call = Callable[[], object]
Clock = Callable[[], int]

SAMPLE_NS = 100_000


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while timing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Timer:
    """Times one point over several visits; the rotation goes on from visit to visit.

    Parameters
    ----------
    calls
        The same computation on different data of the same shape; at least one. Of an iterator every call is made once, in the
        order in which they come: it should be endless.
    clock
        Nanoseconds, for tests.
    """

    def __init__(self, calls: Sequence[Call] | Iterator[Call], clock: Clock = perf_counter_ns) -> None:
        if not calls:
            raise ValueError("calls: expected at least one, got none")
        self._next = (calls if isinstance(calls, Iterator) else cycle(calls)).__next__
        self._clock = clock
        self._per_sample: int | None = None
        #: Seconds per call, one entry a sample.
        self.samples: list[float] = []
        #: Of a CPU nothing is read meanwhile.
        self.conditions: dict[str, Any] | None = None

    def call(self) -> object:
        """Makes the next call of the rotation."""
        return self._next()()

    def calibrate(self) -> tuple[int, float]:
        """Calls that make a sample, and about how many seconds it lasts, from one call after one that is not timed."""
        self._time(1)
        took = max(self._time(1), 1)
        if self._per_sample is None:
            self._per_sample = max(1, round(SAMPLE_NS / took))
        return self._per_sample, 1e-9 * took * self._per_sample

    def _time(self, count: int) -> int:
        batch = [self._next() for _ in range(count)]
        clock = self._clock
        start = clock()
        for call in batch:
            call()
        return clock() - start

    def visit(self, budget_s: float, min_samples: int = 3, max_samples: int = 15) -> float:
        """Takes samples for about `budget_s` seconds, `min_samples` to `max_samples`; returns the seconds it took.

        A call that lasts longer than the whole visit needs no warming: one is made, and it is the sample.
        """
        begun = self._clock()
        limit = 1e9 * budget_s
        with quiet():
            took = max(self._time(1), 1)
            if took > limit > 0:
                self._per_sample = 1
                self.samples.append(1e-9 * took)
                return 1e-9 * (self._clock() - begun)
            if self._per_sample is None:
                self._per_sample = max(1, round(SAMPLE_NS / max(self._time(1), 1)))
            for taken in range(max_samples):
                spent = self._clock() - begun
                if (taken >= min_samples and spent > limit) or (taken and spent > 3 * limit > 0):
                    break
                self.samples.append(1e-9 * max(self._time(self._per_sample), 1) / self._per_sample)
        return 1e-9 * (self._clock() - begun)
