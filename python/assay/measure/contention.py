"""How much of the processors others took while something was timed: other programs, and a hypervisor's other guests."""

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

STAT = Path("/proc/stat")
#: Fields of a line of /proc/stat that are work (proc(5)): user, nice, system, irq, softirq, steal.
WORK = (0, 1, 2, 5, 6, 7)


def _busy_s(text: str, cpus: set[int], ticks: int) -> float:
    """Seconds of work on these processors since the system started, time stolen by the hypervisor among it."""
    names = {f"cpu{i}" for i in cpus}
    rows = [line.split() for line in text.splitlines()]
    return sum(int(row[1 + i]) for row in rows if row and row[0] in names for i in WORK) / ticks


def _own_s() -> float:
    spent = os.times()
    return spent.user + spent.system


class Contention:
    """Counts from its making on, over the processors that this process may use.

    Parameters
    ----------
    stat
        The text of /proc/stat; None where there is none.
    own
        Seconds of work of this process, all threads.
    """

    def __init__(
        self, stat: Callable[[], str | None] = lambda: STAT.read_text() if STAT.exists() else None,
        own: Callable[[], float] = _own_s, clock: Callable[[], float] = perf_counter,
        cpus: set[int] | None = None, ticks: int | None = None,
    ) -> None:  # fmt: skip
        self._stat, self._own, self._clock = stat, own, clock
        self._cpus = cpus or (os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set())
        self._ticks = ticks or (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)
        self._begun = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        text = self._stat()
        return None if text is None else (_busy_s(text, self._cpus, self._ticks), self._own(), self._clock())

    def share(self) -> float | None:
        """Processors that others kept busy on average, as a share of all that this process may use; None where the system does not say."""
        now = self._now()
        if self._begun is None or now is None or not self._cpus:
            return None
        busy, own, wall = (b - a for a, b in zip(self._begun, now, strict=True))
        return min(max(busy - own, 0.0) / (wall * len(self._cpus)), 1.0) if wall > 0 else None
