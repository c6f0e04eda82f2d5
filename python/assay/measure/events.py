"""How a call is timed on a GPU: a graph of many calls between two events.

The host would take longer to make a call than a GPU takes to run it, so that calls are captured into a graph, whose nodes follow
each other without the host. Before the first event something else runs, so that the graph is in the queue before the GPU comes
to it: for cold calls that is a read of more than L2 holds, which leaves nothing dirty behind; for warm ones a replay that is
not timed. A graph lasts `GRAPH_S`, if that takes no more than `MOST_NODES` calls; the launch of the graph itself, microseconds, is
spread over them.

Samples during which the clocks were held back are taken again, `RETAKES` times at most, and flagged if that does not help. A
power cap may bind every wide product of a card: after `MOST_PAUSES` pauses nothing is waited for any more.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from time import perf_counter

from .. import cuda
from ..cuda import probe
from .clock import Call, quiet
from .nvml import Reading, Watch, conditions

GRAPH_S = 1e-3
MOST_NODES = 512
RETAKES, MOST_PAUSES = 2, 40
#: Seconds before a sample is taken again: power and temperature settle in some tenths of a second.
PAUSE_S = 0.3
BLOCKS_A_SM = 4
#: What is read between samples is as many times L2.
FLUSH_CACHES = 2
_TOGETHER = 8  # replays in the queue while joules are counted, so that the GPU does not wait for the host


class Lane:
    """A stream with two events, and memory to read between samples.

    Attributes
    ----------
    blocks : int
        Of a probe that is to fill the GPU.
    scratch : assay.cuda.DeviceArray
        uint8, twice what is read to leave nothing in L2 that a call uses.
    sink : assay.cuda.DeviceArray
        uint32 [256 blocks], what probes write.
    """

    def __init__(self, gpu: cuda.Device, watch: Watch) -> None:
        self.watch, self.blocks, self._pauses = watch, BLOCKS_A_SM * gpu.sms, 0
        self.stream = cuda.own_stream(gpu.ordinal)
        self._begin, self._end = cuda.Event(gpu.ordinal), cuda.Event(gpu.ordinal)
        size = max(FLUSH_CACHES * gpu.l2_bytes, 1 << 19) // 4096 * 4096
        self.scratch = cuda.empty(2 * size, "uint8", gpu.ordinal).fill(0)
        self.sink = cuda.empty(probe.THREADS * self.blocks, "uint32", gpu.ordinal).fill(0)
        self._flushing = self.scratch.part(0, (size,), "uint8")
        cuda.warmup(gpu.ordinal, "assay_probe")

    def flush(self) -> None:
        """Leaves in L2 nothing that a call uses, and nothing to be written back."""
        probe.read(self._flushing, self.sink, self.blocks)

    def pause(self) -> bool:
        """Waits a moment; False when that was done often enough."""
        if self._pauses >= MOST_PAUSES:
            return False
        self._pauses += 1
        time.sleep(PAUSE_S)
        return True

    def graph(self, work: Callable[[], object]) -> cuda.Graph:
        """What `work` calls on this lane's stream, each of which was called before."""
        with self.stream.capture() as graph:
            work()
        return graph

    def seconds(self, work: Callable[[], object]) -> float:
        """Between two events around what `work` puts on the stream; waits for it."""
        self._begin.record(self.stream)
        work()
        self._end.record(self.stream)
        self._end.synchronize()
        return self._end.seconds_since(self._begin)


class EventTimer:
    """Times one point over several visits, as :class:`assay.measure.clock.Timer`.

    Parameters
    ----------
    calls
        Endless: the same computation, on other data each time unless `warm`; each was called once before.
    warm
        Leave in L2 what the last replay left there.

    Attributes
    ----------
    samples : list of float
        Seconds a call.
    conditions : dict or None
        Of the last visit: :func:`assay.measure.nvml.conditions`.
    """

    def __init__(self, calls: Iterator[Call], lane: Lane, *, warm: bool = False) -> None:
        self._calls, self._lane, self.warm = calls, lane, warm
        self._graph: cuda.Graph | None = None
        self._held: list[Call] = []
        self.calls_a_graph = 0
        self.samples: list[float] = []
        self.conditions: dict[str, object] | None = None

    def _capture(self, count: int) -> None:
        self._held = list(islice(self._calls, count))  # arrays must outlive the graph

        def make_all() -> None:
            for call in self._held:
                call()

        self._graph, self.calls_a_graph = self._lane.graph(make_all), count

    def replay(self) -> None:
        """Puts the graph on the stream."""
        assert self._graph is not None
        self._graph.launch(self._lane.stream)

    def _sample(self) -> float:
        (self.replay if self.warm else self._lane.flush)()
        return self._lane.seconds(self.replay) / self.calls_a_graph

    def prepare(self) -> None:
        """Captures the graph; its length follows from the time of a call."""
        if self._graph is None:
            next(self._calls)()  # what a call keeps for the next, as workspaces, is there then
            self._capture(1)
            self._sample()
            once = max(self._sample(), 1e-7)
            self._capture(max(1, min(MOST_NODES, round(GRAPH_S / once))))

    def visit(self, budget_s: float, min_samples: int = 3, max_samples: int = 15) -> float:
        """Takes samples for about `budget_s` seconds, `min_samples` to `max_samples`; returns the seconds it took."""
        begun = perf_counter()
        with quiet():
            self.prepare()
            self._sample()  # clocks rise when there is work
            for attempt in range(1 + RETAKES):
                samples, looks = self._samples(begun, budget_s, min_samples, max_samples)
                self.conditions = conditions(looks)
                slowed = bool((self.conditions or {}).get("throttled"))
                if not slowed or attempt == RETAKES or not self._lane.pause():
                    break
        self.samples += samples
        return perf_counter() - begun

    def _samples(self, begun: float, budget_s: float, least: int, most: int) -> tuple[list[float], list[Reading]]:
        samples: list[float] = []
        looks = [self._lane.watch.read()]
        while len(samples) < most and (len(samples) < least or perf_counter() - begun < budget_s):
            samples.append(self._sample())
            looks.append(self._lane.watch.read())
        return samples, [look for look in looks if look is not None]

    def joules(self, window_s: float) -> float | None:
        """Joules a call of the whole board, over `window_s` of calls and more; None where they are not counted.

        The counter moves some ten times a second: calls are counted from one of its steps to another.
        """
        self.prepare()
        watch = self._lane.watch
        last = watch.joules()
        if last is None:
            return None
        first, calls, seconds = None, 0, 0.0

        def several() -> None:
            for _ in range(_TOGETHER):
                self.replay()

        while True:
            seconds += self._lane.seconds(several)
            now = watch.joules()
            if now is None or seconds > 3.0 * window_s + 10.0:
                return None
            calls += _TOGETHER * self.calls_a_graph if first is not None else 0
            if now != last and first is None:
                first, seconds = now, 0.0
            elif now != last and first is not None and seconds >= window_s:
                return (now - first) / calls
            last = now
