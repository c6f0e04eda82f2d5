"""Machines that models run on: a device known by its datasheet, or one that was calibrated; in time and in watts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from assay.cost.draws import Draws, Part
from assay.cost.formats import GROUP, KERNEL, WEIGHTS
from assay.cost.kernel_model import CostModel
from assay.cost.roofline import Estimate, FloatArray, shares, smooth_max
from assay.cost.transformer import prefill_chunk

MAX_CHUNK = 2048  # tokens of a prefill chunk on a GPU


class Machine(Protocol):
    """What a case needs of a machine."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def memory_bytes(self) -> float | None:
        """None when unknown: then nothing limits the batch."""
        ...

    def arithmetic(self, weights: str) -> str:
        """The arithmetic ("bf16", "int8", "fp8", "fp4") that products of a weight format run in here."""
        ...

    def product(
        self, weights: str, m: FloatArray, n: int, k: int, copies: FloatArray, layers: int, draws: Draws
    ) -> Part:
        """``layers`` times ``copies`` products of m rows (arrays by draw) with [n, k] weights."""
        ...

    def attention(self, moved_bytes: float | FloatArray, ops: float | FloatArray, layers: int, draws: Draws) -> Part:
        """``layers`` times one attention call."""
        ...

    def chunk(self, weights: str, tokens: int) -> int:
        """Tokens of a prefill chunk."""
        ...

    def communication(self, tokens: FloatArray, hidden_size: int, layers: int, draws: Draws) -> Part:
        """What several devices say to each other in a pass of so many tokens (by draw)."""
        ...

    def glue(self, layers: int, expert_layers: int, draws: Draws) -> Part:
        """What a pass spends outside products and attention: norms, rotary embedding, routing, gaps, the scheduler."""
        ...

    def unmodelled(self, draws: Draws) -> FloatArray:
        """A measured pass over the sum of its parts: around 1, as wide as whole passes were found to differ."""
        ...

    def power(self, part: Part, draws: Draws) -> FloatArray | None:
        """Mean watts while it does ``part``; None where nothing is known."""
        ...

    @property
    def watts(self) -> float | None:
        """Nameplate watts of all devices; None where unknown."""
        ...

    def critical_batch(self, weights: str) -> float:
        """Rows at which a product of this format turns from bytes to operations."""
        ...


@dataclass(frozen=True)
class Datasheet:
    """A device known by its datasheet: dense peaks, and utilisations that are judgements with wide intervals.

    ``ops_per_s`` by arithmetic; a missing or zero one runs in bf16. ``num_devices`` share every layer (tensor
    parallelism): memory, bandwidth and rates are of all of them, and each layer pays two all-reduces of its hidden
    vectors over links of ``link_bytes_per_s`` a device and direction.
    """

    name: str
    memory_bytes: float | None
    bytes_per_s: float
    ops_per_s: Mapping[str, float]
    #: Achieved over peak bandwidth: 0.80 to 0.82 in AIConfigurator's and BLIS's fits, less for short calls.
    memory_utilisation: tuple[float, float, float] = (0.65, 0.82, 0.95)
    compute_utilisation: tuple[float, float, float] = (0.40, 0.60, 0.80)
    #: Of the bf16 rate, for INT4 unpacked to 16 bits in the kernel: AIConfigurator's tables reach 0.17 to 0.18 of fp8.
    unpacking_utilisation: tuple[float, float, float] = (0.22, 0.35, 0.60)
    overhead_s: tuple[float, float, float] = (1e-6, 2.5e-6, 6e-6)  # of a call inside a captured graph
    p: float = 6.0
    watts: float | None = None
    num_devices: int = 1
    link_bytes_per_s: float = 0.0
    #: All-reduce of a small message, and the share of a link that a large one reaches: vLLM's and NCCL's on eight H200
    #: in AIConfigurator's tables start at 4.4 us in a captured graph, 20 us outside one, and reach 0.35 to 0.50.
    link_latency_s: tuple[float, float, float] = (4.4e-6, 6e-6, 20e-6)
    link_utilisation: tuple[float, float, float] = (0.33, 0.42, 0.52)
    #: Of a layer, everything that is no product and no attention, and the same of a layer's routing and permutation of
    #: experts; of a pass, the scheduler. The middles are set on 330 measured servers (docs/serving.md), the ends span
    #: a bare graph of fused kernels and a general server.
    layer_s: tuple[float, float, float] = (4e-6, 12e-6, 40e-6)
    expert_layer_s: tuple[float, float, float] = (12e-6, 35e-6, 90e-6)
    pass_s: tuple[float, float, float] = (1e-4, 5e-4, 2e-3)
    #: A measured pass over the sum of the parts above: what servers of two models needed for 90% of them to lie in the
    #: interval was chosen with the third hidden, which it then held in 90% (docs/serving.md).
    pass_factor: tuple[float, float, float] = (0.81, 1.0, 1.23)
    #: Shares of the nameplate watts: idle, memory at its roof, arithmetic at its roof. They give the 298 of 700 W that
    #: an H200 and the 356 and 670 of 750 W that an MI300X draw decoding and in prompts (InferenceX, 2026): a judgement.
    idle_share: tuple[float, float, float] = (0.10, 0.15, 0.22)
    memory_share: tuple[float, float, float] = (0.20, 0.33, 0.48)
    compute_share: tuple[float, float, float] = (0.55, 0.75, 0.95)

    def __post_init__(self) -> None:
        """Refuses what would price to nonsense."""
        for name, value in (
            ("memory_bytes", 1.0 if self.memory_bytes is None else self.memory_bytes),
            ("bytes_per_s", self.bytes_per_s),
            ("ops_per_s", self.ops_per_s.get("bf16", 0.0)),
            ("p", self.p),
            *(("utilisation or overhead", v) for v in self.memory_utilisation + self.compute_utilisation),
            *(("utilisation or overhead", v) for v in self.unpacking_utilisation + self.overhead_s),
            *(("time of a layer or pass", v) for v in self.layer_s + self.expert_layer_s + self.pass_s),
            *(("factor of a pass", v) for v in self.pass_factor),
            ("watts", 1.0 if self.watts is None else self.watts),
            ("link_bytes_per_s", 1.0 if self.num_devices == 1 else self.link_bytes_per_s),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{self.name}: {name}: expected a finite number above 0, got {value}")
        if self.num_devices < 1:
            raise ValueError(f"{self.name}: num_devices: expected at least 1, got {self.num_devices}")

    def arithmetic(self, weights: str) -> str:
        """bf16 where the device has no rate for the format's own arithmetic."""
        wanted = WEIGHTS[weights][1]
        return wanted if self.ops_per_s.get(wanted, 0.0) > 0 else "bf16"

    def _unpacks(self, weights: str) -> bool:
        return WEIGHTS[weights][0] < 8 and self.arithmetic(weights) == "bf16"

    def _call(
        self, moved: FloatArray, ops: FloatArray, rate: float, utilisation: FloatArray, calls: float, draws: Draws
    ) -> Part:
        overhead = draws.between("overhead", *self.overhead_s) * calls
        memory = moved / (self.bytes_per_s * draws.between("memory", *self.memory_utilisation))
        compute = ops / (rate * utilisation)
        time = overhead + smooth_max(memory, compute, self.p)
        return Part(time, *shares(memory, compute, time, overhead, self.p), overhead)

    def product(
        self, weights: str, m: FloatArray, n: int, k: int, copies: FloatArray, layers: int, draws: Draws
    ) -> Part:
        """All copies of a layer in one launch (a grouped product)."""
        moved = layers * copies * (WEIGHTS[weights][0] / 8.0 * n * k + 2.0 * m * (n + k))
        ops = layers * copies * 2.0 * m * n * k
        rate = self.ops_per_s[self.arithmetic(weights)]
        if self._unpacks(weights):
            utilisation = draws.between("unpacking", *self.unpacking_utilisation)
        else:
            utilisation = draws.between("compute", *self.compute_utilisation)
        return self._call(moved, ops, rate, utilisation, layers, draws)

    def attention(self, moved_bytes: float | FloatArray, ops: float | FloatArray, layers: int, draws: Draws) -> Part:
        """At the bf16 rate."""
        one = np.ones(draws.count + 1)
        utilisation = draws.between("compute", *self.compute_utilisation)
        return self._call(
            one * moved_bytes * layers, one * ops * layers, self.ops_per_s["bf16"], utilisation, layers, draws
        )

    def communication(self, tokens: FloatArray, hidden_size: int, layers: int, draws: Draws) -> Part:
        """Two all-reduces a layer, of bf16: ``latency + 2 (n-1)/n bytes / link`` each (a ring). Counted as overhead."""
        zero = np.zeros(draws.count + 1)
        if self.num_devices == 1:
            return Part(zero, zero, zero, zero)
        n = self.num_devices
        moved = 2.0 * (n - 1) / n * 2.0 * np.asarray(tokens, dtype=np.float64) * hidden_size
        speed = self.link_bytes_per_s * draws.between("link", *self.link_utilisation)
        time = 2.0 * layers * (draws.between("link latency", *self.link_latency_s) + moved / speed)
        return Part(time, zero, zero, time)

    def glue(self, layers: int, expert_layers: int, draws: Draws) -> Part:
        """``t_pass + L t_layer + L_experts t_expert``, counted as overhead."""
        time = draws.between("scheduler", *self.pass_s) + layers * draws.between("layer", *self.layer_s)
        if expert_layers:
            time = time + expert_layers * draws.between("routing", *self.expert_layer_s)
        zero = np.zeros(draws.count + 1)
        return Part(time, zero, zero, time)

    def unmodelled(self, draws: Draws) -> FloatArray:
        """``pass_factor``."""
        return draws.between("unmodelled", *self.pass_factor)

    def power(self, part: Part, draws: Draws) -> FloatArray | None:
        """``P = watts min(1, idle + mem u_mem + cmp u_cmp)``, u the share of the time at each roof."""
        if self.watts is None:
            return None
        share = (
            draws.between("idle watts", *self.idle_share)
            + draws.between("memory watts", *self.memory_share) * part.memory_s / part.time_s
            + draws.between("compute watts", *self.compute_share) * part.compute_s / part.time_s
        )
        return np.asarray(self.watts * np.minimum(1.0, share))

    def of(self, num_devices: int) -> "Datasheet":
        """So many of them, from one."""
        if self.num_devices != 1:
            raise ValueError(f"{self.name}: num_devices: expected one device to multiply, got {self.num_devices}")
        if num_devices == 1:
            return self
        return replace(
            self,
            name=f"{num_devices} x {self.name}",
            memory_bytes=None if self.memory_bytes is None else num_devices * self.memory_bytes,
            bytes_per_s=num_devices * self.bytes_per_s,
            ops_per_s={kind: num_devices * rate for kind, rate in self.ops_per_s.items()},
            watts=None if self.watts is None else num_devices * self.watts,
            num_devices=num_devices,
        )

    def chunk(self, weights: str, tokens: int) -> int:
        """At most 2,048."""
        return min(tokens, MAX_CHUNK)

    def critical_batch(self, weights: str) -> float:
        """``F eta_f bits / (16 BW eta_b)``."""
        utilisation = (self.unpacking_utilisation if self._unpacks(weights) else self.compute_utilisation)[1]
        rate = self.ops_per_s[self.arithmetic(weights)] * utilisation
        return rate * WEIGHTS[weights][0] / (16.0 * self.bytes_per_s * self.memory_utilisation[1])


#: Chips that keep weights in SRAM are scheduled by a compiler: no launches, no scheduler. Set so that public runs lie in the
#: intervals (docs/serving.md): Groq's Mixtral 8x7B, Llama 2 70B and 7B at 480, 300 and 750 tokens/s for one user.
STATIC: Mapping[str, Any] = {
    "overhead_s": (3e-7, 1.5e-6, 3e-6),
    "layer_s": (2e-6, 1e-5, 2.5e-5),
    "expert_layer_s": (4e-6, 2e-5, 5e-5),
    "pass_s": (1e-5, 2e-4, 1e-3),
    "link_latency_s": (1e-6, 6e-6, 1.5e-5),
}


def datasheet(row: Mapping[str, Any], num_devices: int = 1) -> Datasheet:
    """A row of the hardware catalog, or several such devices that share every layer.

    Raises
    ------
    ValueError
        No 16-bit rate or bandwidth in the row, fewer than one device, several of a kind that has no link.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices: expected at least 1, got {num_devices}")
    kinds = {"bf16": "ops_per_s", "int8": "int8_ops_per_s", "fp8": "fp8_ops_per_s", "fp4": "fp4_ops_per_s"}
    one = Datasheet(
        row["title"],
        float(row["memory_bytes"]),
        float(row["memory_bytes_per_s"]),
        {kind: float(row.get(key, 0)) for kind, key in kinds.items()},
        watts=float(row["tdp_w"]) if row.get("tdp_w") else None,
        link_bytes_per_s=float(row.get("link_bytes_per_s", 0)),
    )
    if row.get("kind") == "sram":
        one = replace(one, **STATIC)
    return one.of(num_devices)


@dataclass(frozen=True)
class Calibrated:
    """A calibrated machine. Formats with a fitted kernel (w4a8, w4a16, int8) are priced by it, single
    products of the others by imported tables where there are some, and what is left on its roofs."""

    name: str
    cost: CostModel
    threads: int
    memory_bytes: float | None = None
    watts: float | None = None

    def communication(self, tokens: FloatArray, hidden_size: int, layers: int, draws: Draws) -> Part:
        """One machine: none."""
        zero = np.zeros(draws.count + 1)
        return Part(zero, zero, zero, zero)

    def glue(self, layers: int, expert_layers: int, draws: Draws) -> Part:
        """Not measured, so not priced."""
        zero = np.zeros(draws.count + 1)
        return Part(zero, zero, zero, zero)

    def unmodelled(self, draws: Draws) -> FloatArray:
        """One: the kernels' own intervals are all that is known."""
        return np.ones(draws.count + 1)

    def power(self, part: Part, draws: Draws) -> FloatArray | None:
        """``watts``, a reading of the whole machine at work, where it was given."""
        return None if self.watts is None else np.full(draws.count + 1, self.watts)

    def arithmetic(self, weights: str) -> str:
        """Products without an integer kernel run in float32."""
        return "int8" if WEIGHTS[weights][1] == "int8" else "bf16"

    def product(
        self, weights: str, m: FloatArray, n: int, k: int, copies: FloatArray, layers: int, draws: Draws
    ) -> Part:
        """One call for each copy, as the package's kernels run them."""
        rows = float(m[0])
        op = KERNEL.get(weights, "")
        if self.cost.calibrated(op):
            params = {"m": rows, "n": n, "k": k, "group_size": GROUP, "symmetric": True}
            e = self.cost.kernel_time(op, params, self.threads)
        elif (table := self.cost.table("gemm", weights)) and self.cost.tables and np.all(copies == 1.0):
            op, e = f"gemm {table.dtype}", self.cost.tables.price(table, m=max(rows, 1.0), n=n, k=k).at(0)
        else:
            op = "roofs"
            moved = WEIGHTS[weights][0] / 8.0 * n * k + 2.0 * rows * (n + k)
            e = self._on_roofs(moved, 2.0 * rows * n * k, self.arithmetic(weights))
        return self._draw(e, op, draws).times(copies * layers)

    def _on_roofs(self, moved: float, ops: float, arithmetic: str) -> Estimate:
        compute = "int8_peak" if arithmetic == "int8" else "fp32_peak"
        return self.cost.roof_times(
            moved, ops, self.threads, compute=compute, note="no calibrated kernel, priced on the measured roofs"
        ).at(0)

    def _draw(self, e: Estimate, op: str, draws: Draws) -> Part:
        for text in e.notes:
            draws.note(f"{op}: {text}")
        time = draws.between(op, e.low_s, e.time_s, e.high_s)
        share = time / e.time_s
        return Part(time, share * e.memory_s, share * e.compute_s, share * e.overhead_s)

    def attention(self, moved_bytes: float | FloatArray, ops: float | FloatArray, layers: int, draws: Draws) -> Part:
        """On the measured roofs."""
        return self._draw(
            self._on_roofs(float(np.ravel(moved_bytes)[0]), float(np.ravel(ops)[0]), "bf16"), "attention", draws
        ).times(float(layers))

    def chunk(self, weights: str, tokens: int) -> int:
        """At most 512, and what the kernel was calibrated for."""
        return prefill_chunk(self.cost, weights, tokens)

    def critical_batch(self, weights: str) -> float:
        """The least power of two rows (to 4,096) at which a 4096 x 4096 product takes longer for operations than bytes."""
        one, draws = np.ones(1), Draws(0)
        for exponent in range(13):
            part = self.product(weights, one * 2.0**exponent, 4096, 4096, one, 1, draws)
            if part.compute_s[0] > part.memory_s[0]:
                break
        return 2.0**exponent
