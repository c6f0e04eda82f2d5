"""The roofs of a GPU: DRAM and L2 bandwidth both ways, tensor-core peaks, atomics, and what launches and graph nodes cost.

The peaks are those of ``mma.sync``, which the package's kernels use but for wide products on Hopper: Hopper's and Blackwell's own
warpgroup instructions go further.
"""

from collections.abc import Callable

from .. import cuda
from ..cuda import probe
from .events import Lane
from .gpu_data import DeviceArena

#: Bytes and seconds of a reading: long enough that its launch, some microseconds, is no hundredth.
READ_BYTES, PEAK_S, NEAR_S = 2 << 30, 2e-3, 3e-4
#: Kernels one behind another, and nodes of a short and of a long graph, between which a node's cost lies.
LAUNCHES, NODES = 64, (32, 288)
ATOMICS = 256


class DeviceRoofs:
    """Measures roofs, keeping all readings; see :class:`assay.measure.roofs.Roofs`. The number of threads is 1: one stream."""

    def __init__(self, gpu: cuda.Device, arena: DeviceArena, lane: Lane) -> None:
        self._gpu, self._arena, self._lane = gpu, arena, lane
        self._blocks, self._sink, self._scratch = lane.blocks, lane.sink, lane.scratch
        self._graphs: dict[str, tuple[cuda.Graph, float]] = {}
        self.readings: dict[tuple[str, int], list[float]] = {}

    def near(self, threads: int) -> dict[str, float]:
        """DRAM bandwidth and both peaks right now."""
        found = {
            "dram_read": self._rate("dram_read near", self._read_arena(NEAR_S)),
            "int8_peak": self._rate("int8_peak near", self._products("s8", NEAR_S)),
            "fp16_peak": self._rate("fp16_peak near", self._products("f16", NEAR_S)),
        }
        for name, value in found.items():
            self._keep(name, value)
        return found

    def measure(self) -> None:
        """One reading of every roof."""
        l2 = max(self._gpu.l2_bytes // 4 // 4096, 1) * 4096
        cached = self._scratch.part(0, (min(l2, self._scratch.nbytes),), "uint8")
        repeats = max(1, READ_BYTES // cached.nbytes)
        for name, work in (
            ("dram_read", self._read_arena(PEAK_S)),
            ("dram_write", lambda: self._write(self._scratch, max(4, READ_BYTES // self._scratch.nbytes))),
            ("llc_write", lambda: self._write(cached, repeats)),
            ("llc_read", lambda: self._read(cached, repeats)),
            ("int8_peak", self._products("s8", PEAK_S)),
            ("fp16_peak", self._products("f16", PEAK_S)),
            ("atomics_one", lambda: probe.add(self._sink, 1, self._blocks, ATOMICS)),
            ("atomics_many", lambda: probe.add(self._sink, self._sink.size, self._blocks, ATOMICS)),
        ):
            self._keep(name, self._rate(name, work))
        self._latencies()

    # ---- work, and how much of it ----

    def _read(self, data: cuda.DeviceArray, repeats: int) -> float:
        probe.read(data, self._sink, self._blocks, repeats)
        return float(data.nbytes * repeats)

    def _write(self, data: cuda.DeviceArray, repeats: int) -> float:
        probe.write(data, self._blocks, repeats)
        return float(data.nbytes * repeats)

    def _read_arena(self, seconds: float) -> Callable[[], float]:
        data = self._arena.data
        share = min(seconds / PEAK_S, 1.0)
        return lambda: self._read(data, max(1, round(share * READ_BYTES / data.nbytes)))

    def _products(self, kind: str, seconds: float) -> Callable[[], float]:
        """So many products that they last about `seconds`: one launch of known length says how many."""

        def work() -> float:
            repeats = max(64, round(self._pace(kind) * seconds))
            return float(probe.multiply(kind, self._sink, self._blocks, repeats))

        self._pace(kind)
        return work

    def _pace(self, kind: str) -> float:
        """Repeats a second."""
        name = f"pace {kind}"
        if name not in self._graphs:
            graph = self._lane.graph(lambda: probe.multiply(kind, self._sink, self._blocks, 1024))
            self._seconds(graph)
            self._graphs[name] = graph, 1024 / self._seconds(graph)
        return self._graphs[name][1]

    # ---- timing ----

    def _seconds(self, graph: cuda.Graph) -> float:
        """Of a graph that is in the queue before its turn comes."""
        lane = self._lane
        lane.flush()
        return lane.seconds(lambda: graph.launch(lane.stream))

    def _rate(self, name: str, work: Callable[[], float]) -> float:
        """Units of work a second; work that stays in L2 is replayed once before."""
        if name not in self._graphs:
            amount = 0.0

            def captured() -> None:
                nonlocal amount
                amount = work()

            self._graphs[name] = self._lane.graph(captured), amount
        graph, amount = self._graphs[name]
        if name.startswith("llc"):
            graph.launch(self._lane.stream)
            return amount / self._lane.seconds(lambda: graph.launch(self._lane.stream))
        return amount / self._seconds(graph)

    def _latencies(self) -> None:
        lane = self._lane

        def empties(count: int) -> Callable[[], None]:
            def work() -> None:
                for _ in range(count):
                    probe.empty(self._sink)

            return work

        # Longer than the host takes for the launches, so that they wait in the queue.
        self._products("s8", 10 * PEAK_S)()
        self._keep("launch_latency", lane.seconds(empties(LAUNCHES)) / LAUNCHES)
        took = []
        for nodes in NODES:
            name = f"{nodes} nodes"
            if name not in self._graphs:
                self._graphs[name] = lane.graph(empties(nodes)), float(nodes)
            took.append(self._seconds(self._graphs[name][0]))
        node = (took[1] - took[0]) / (NODES[1] - NODES[0])
        self._keep("graph_node", max(node, 1e-9))
        self._keep("graph_latency", max(took[0] - NODES[0] * node, 1e-9))

    def _keep(self, name: str, value: float) -> None:
        self.readings.setdefault((name, 1), []).append(value)
