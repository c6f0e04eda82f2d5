"""A card with a known law of time, for calibrations: kernels on the mock driver take what the law says, not what they did.

The emulator is slow, so what is emulated are launches of their own: the calls whose answers a calibration checks. Nodes of graphs,
which is how it times, only take time, and so do probes (test_probe.py shows that those do what they say).
"""

import math
import sys
import types

import numpy as np

from assay._ffi import ffi

POINTERS = (1 << 44, 1 << 47)  # where addresses of this process lie; sizes and pairs of small sizes do not


def smooth_max(a, b, p):
    return (a**p + b**p) ** (1 / p)


class Card:
    """DRAM and L2 that hold what was touched last, tensor cores, and an efficiency of each kind of kernel.

    A product of m rows takes the smooth maximum of its bytes at `memory_share` of the bandwidth and of m + 2 rows of operations at
    `compute_share` of the peak.
    """

    dram, l2, l2_bytes = 2e10, 8e10, 1 << 20
    write, l2_write = 1.5e10, 6e10
    fp16, int8 = 1.6e12, 2.4e12
    one_atomic, atomic = 1e8, 2e9
    launch_s, node_s = 3e-6, 1.5e-6
    memory_share, compute_share, p, more_rows = 0.88, 0.75, 4.0, 2
    route_s = (5e-7, 2e-9, 1e-10)  # a call, a token, a token and expert
    sampled_s = 4e-10
    noise = 0.01

    def __init__(self, mock, seed=0):
        self._mock, self._rng = mock, np.random.default_rng(seed)
        self._touched, self._distinct = {}, {}
        self.slow = lambda now: 1.0
        mock.set(l2=self.l2_bytes, launch_s=self.launch_s, node_s=self.node_s, memory=1 << 37)
        mock.law(self._executes, self._seconds)

    @staticmethod
    def _shape(name, grid, args):
        """A launch without its addresses."""
        words = np.frombuffer(args[: len(args) // 8 * 8], np.uint64)
        address = (words >= POINTERS[0]) & (words < POINTERS[1])
        return name, grid, np.where(address, 0, words).tobytes()

    def _executes(self, name, grid, args):
        return not name.startswith("assay_probe") and not self._mock.get("replaying")

    def _touch(self, address, nbytes):
        """Whether L2 holds this still; it does afterwards, if it fits."""
        held = self._touched.pop((address, nbytes), False)
        self._touched[address, nbytes] = True
        while sum(size for _, size in self._touched) > self.l2_bytes:
            del self._touched[next(iter(self._touched))]
        return held

    def _seconds(self, name, grid, args):
        body = self._body(name.removeprefix("assay_"), grid, args)
        noise = math.exp(self.noise * self._rng.standard_normal())
        return body * noise * self.slow(self._mock.get("host_s"))

    def _body(self, name, grid, args):
        def of(kind):
            found = ffi.new(f"{kind} *")
            ffi.memmove(found, args, ffi.sizeof(found[0]))
            return found

        def number(pointer):
            return int(ffi.cast("uintptr_t", pointer))

        if name == "probe_read":
            a = of("assay_probe_read_args")
            cached = a.bytes <= self.l2_bytes
            first = self.l2 if self._touch(number(getattr(a, "from")), a.bytes) else self.dram
            return a.bytes / first + (a.repeats - 1) * a.bytes / (self.l2 if cached else self.dram)
        if name == "probe_write":
            a = of("assay_probe_write_args")
            cached = a.bytes <= self.l2_bytes
            first = self.l2_write if self._touch(number(a.to), a.bytes) else self.write
            return a.bytes / first + (a.repeats - 1) * a.bytes / (self.l2_write if cached else self.write)
        if name.startswith("probe_mma"):
            depth, rate = (32, self.int8) if name.endswith("s8") else (16, self.fp16)
            return grid[0] * 8 * 8 * of("assay_probe_mma_args").repeats * 2 * 16 * 8 * depth / rate
        if name == "probe_atomic":
            a = of("assay_probe_atomic_args")
            return grid[0] * 256 * a.repeats / (self.one_atomic if a.slots == 1 else self.atomic)
        if name.startswith("moe_experts"):
            a = of("assay_cuda_experts_args")
            return self._product(a.w, a.slots, self._experts(name, grid, args, a), number(a.w.data), name)
        if name.startswith(("w4a16", "w4a8")):
            a = of("assay_w4_gemm_args")
            return self._product(a.w, a.m, 1, number(a.w.data), name)
        if name.startswith("moe_route"):
            a = of("assay_route_args")
            call, token, each = self.route_s
            return call + a.tokens * (token + each * a.num_experts)
        if name == "verify_scan":
            call = of("assay_cuda_verify_args")
            rows = call.call.batch + call.drafts
            return 4.0 * rows * call.call.vocab / (self.memory_share * self.dram)
        if name == "chain_verify":
            a = of("assay_cuda_verify_args")
            return self.sampled_s * a.call.batch * a.call.vocab if a.call.rule else 0.0
        return 0.0

    def _experts(self, name, grid, args, a):
        """Experts that a layer's product touches: read where sorting left them when a launch of this shape was emulated."""
        shape = self._shape(name, grid, args)
        if shape not in self._distinct:
            total = a.num_tokens_post_padded[0]
            block = int(name.split("_m")[-1].rstrip("z"))
            ids = np.frombuffer(ffi.buffer(a.expert_ids, 4 * (total // block)), np.int32)
            self._distinct[shape] = len(np.unique(ids))
        return self._distinct[shape]

    def _product(self, w, rows, matrices, address, name):
        weights = 4.5 / 8 * w.n * w.k if w.group_size == 32 else (4 + 16 / w.group_size) / 8 * w.n * w.k
        warm = self._touch(address, int(weights)) and matrices == 1
        moved = matrices * weights + 4.0 * rows * (w.n + w.k)
        ops = 2.0 * w.n * w.k * (rows + matrices * self.more_rows)
        rate = self.int8 if "w4a8" in name else self.fp16
        memory = moved / (self.memory_share * (self.l2 if warm else self.dram))
        return smooth_max(memory, ops / (self.compute_share * rate), self.p)


class NVMLError(Exception):
    """As pynvml's."""


def fake_nvml(mock, throttled=lambda now: 0, idle_w=60.0, busy_w=310.0):
    """A module as pynvml, of the mock's first device: its modelled time, and joules by how long it was busy."""
    module = types.ModuleType("pynvml")

    def by_uuid(uuid):
        if uuid != "GPU-a5a5a5a5-a5a5-a5a5-a5a5-a5a5a5a5a500":
            raise NVMLError(f"Not Found: {uuid}")
        return "handle"

    def clock(handle, kind):
        return 1593 if kind == 2 else 900 if throttled(mock.get("host_s")) & 0xFC else 1410

    def joules(handle):
        return 1e3 * (idle_w * mock.get("host_s") + (busy_w - idle_w) * mock.get("busy_s"))

    module.__dict__.update(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlSystemGetDriverVersion=lambda: "570.00",
        nvmlDeviceGetCount=lambda: 1, nvmlDeviceGetHandleByIndex=lambda i: "handle",
        nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetTemperature=lambda handle, kind: 61, nvmlDeviceGetPowerUsage=lambda handle: 1e3 * idle_w,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: throttled(mock.get("host_s")),
        nvmlDeviceGetTotalEnergyConsumption=joules,
    )  # fmt: skip
    sys.modules["pynvml"] = module
    return module
