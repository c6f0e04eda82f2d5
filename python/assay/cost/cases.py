"""A model served in one way on one machine, priced with its uncertainty: what techniques are applied to.

Every price is an array: element 0 is the estimate, the others are draws of everything that is not known exactly
(utilisations, overhead, the fit's error, acceptance, how alike consecutive tokens choose experts). A draw is made from
the seed and the *name* of what it stands for, so two cases that share a cause share its draws: their ratio keeps only
the errors that they do not share (common random numbers).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from assay.cost import experts
from assay.cost.kernel_model import CostModel
from assay.cost.roofline import Estimate, FloatArray, largest, shares, smooth_max
from assay.cost.speculation import chain_length_iid
from assay.cost.transformer import BF16_ROLES, GROUP, KERNEL
from assay.model import ModelSpec

Z90 = 1.6448536269514722  # the 95th percentile of a standard normal: ends of a 90% interval
#: Bits a weight takes with its scales, and the arithmetic of its products. INT4 and INT8: a float16 scale for each 32
#: weights; MXFP4 one 8-bit scale for 32 (OCP Microscaling v1.0), NVFP4 one for 16.
WEIGHTS: Mapping[str, tuple[float, str]] = {
    "bf16": (16.0, "bf16"),
    "fp8": (8.0, "fp8"),
    "int8": (8.5, "int8"),
    "w4a16": (4.5, "bf16"),
    "w4a8": (4.5, "int8"),
    "mxfp4": (4.25, "fp4"),
    "nvfp4": (4.5, "fp4"),
}
KV_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0625}  # int8: a float16 scale for each 32
USABLE_MEMORY = 0.9  # of the device: the rest is workspace, fragmentation and the runtime
MAX_CHUNK = 2048  # tokens of a prefill chunk on a GPU
PAGE = 16  # tokens of a KV page: half of one is lost a request
#: Output lengths of a static batch are taken as exponential, cut at this many times the mean, and memory is reserved for
#: the longest: without pages it cannot be known how long an answer will be.
LONGEST_OUTPUT = 4.0


class Draws:
    """Standard normal draws by the name of their cause: element 0 is 0, the estimate; the rest depend on seed and name."""

    def __init__(self, count: int = 256, seed: int = 0) -> None:
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        self.count, self.seed = count, seed
        self._made: dict[str, FloatArray] = {}

    def normal(self, name: str) -> FloatArray:
        """Array of ``count + 1``."""
        if name not in self._made:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            self._made[name] = np.concatenate([[0.0], generator.standard_normal(self.count)])
        return self._made[name]

    def between(self, name: str, low: float, middle: float, high: float) -> FloatArray:
        """A positive quantity whose 90% interval is [low, high]: log-normal on each side of its middle."""
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

    def attention(self, moved_bytes: float, ops: float, layers: int, draws: Draws) -> Part:
        """``layers`` times one attention call."""
        ...

    def chunk(self, weights: str, tokens: int) -> int:
        """Tokens of a prefill chunk."""
        ...

    def critical_batch(self, weights: str) -> float:
        """Rows at which a product of this format turns from bytes to operations."""
        ...


@dataclass(frozen=True)
class Datasheet:
    """A device known by its datasheet: dense peaks, and utilisations that are judgements with wide intervals.

    ``ops_per_s`` by arithmetic; a missing or zero one runs in bf16. Several devices scale everything but the overhead,
    as if their communication were free.
    """

    name: str
    memory_bytes: float | None
    bytes_per_s: float
    ops_per_s: Mapping[str, float]
    #: Achieved over peak bandwidth: 0.80 to 0.82 in AIConfigurator's and BLIS's fits, less for short calls.
    memory_utilisation: tuple[float, float, float] = (0.70, 0.81, 0.90)
    compute_utilisation: tuple[float, float, float] = (0.45, 0.60, 0.75)
    #: Of the bf16 rate, for INT4 unpacked to 16 bits in the kernel: AIConfigurator's tables reach 0.17 to 0.18 of fp8.
    unpacking_utilisation: tuple[float, float, float] = (0.22, 0.35, 0.60)
    overhead_s: tuple[float, float, float] = (1e-6, 2.5e-6, 6e-6)  # of a call inside a captured graph
    p: float = 6.0

    def __post_init__(self) -> None:
        """Refuses what would price to nonsense."""
        for name, value in (
            ("memory_bytes", 1.0 if self.memory_bytes is None else self.memory_bytes),
            ("bytes_per_s", self.bytes_per_s),
            ("ops_per_s", self.ops_per_s.get("bf16", 0.0)),
            ("p", self.p),
            *(("utilisation or overhead", v) for v in self.memory_utilisation + self.compute_utilisation),
            *(("utilisation or overhead", v) for v in self.unpacking_utilisation + self.overhead_s),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{self.name}: {name}: expected a finite number above 0, got {value}")

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

    def attention(self, moved_bytes: float, ops: float, layers: int, draws: Draws) -> Part:
        """At the bf16 rate."""
        one = np.ones(draws.count + 1)
        utilisation = draws.between("compute", *self.compute_utilisation)
        return self._call(
            one * moved_bytes * layers, one * ops * layers, self.ops_per_s["bf16"], utilisation, layers, draws
        )

    def chunk(self, weights: str, tokens: int) -> int:
        """At most 2,048."""
        return min(tokens, MAX_CHUNK)

    def critical_batch(self, weights: str) -> float:
        """``F eta_f bits / (16 BW eta_b)``."""
        utilisation = (self.unpacking_utilisation if self._unpacks(weights) else self.compute_utilisation)[1]
        rate = self.ops_per_s[self.arithmetic(weights)] * utilisation
        return rate * WEIGHTS[weights][0] / (16.0 * self.bytes_per_s * self.memory_utilisation[1])


def datasheet(row: Mapping[str, Any], num_devices: int = 1) -> Datasheet:
    """A row of the hardware catalog, or several such devices side by side, as if their communication were free.

    Raises
    ------
    ValueError
        No 16-bit rate or bandwidth in the row, fewer than one device.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices: expected at least 1, got {num_devices}")
    kinds = {"bf16": "ops_per_s", "int8": "int8_ops_per_s", "fp8": "fp8_ops_per_s", "fp4": "fp4_ops_per_s"}
    return Datasheet(
        row["title"] if num_devices == 1 else f"{num_devices} x {row['title']}",
        num_devices * float(row["memory_bytes"]),
        num_devices * float(row["memory_bytes_per_s"]),
        {kind: num_devices * float(row.get(key, 0)) for kind, key in kinds.items()},
    )


@dataclass(frozen=True)
class Calibrated:
    """A calibrated machine. Formats with a fitted kernel (w4a8, int8) are priced by it, the others on its roofs."""

    name: str
    cost: CostModel
    threads: int
    memory_bytes: float | None = None

    def arithmetic(self, weights: str) -> str:
        """Products without an integer kernel run in float32."""
        return "int8" if WEIGHTS[weights][1] == "int8" else "bf16"

    def _kernel(self, weights: str) -> str:
        return KERNEL["int4"] if weights == "w4a8" else KERNEL["int8"] if weights == "int8" else ""

    def product(
        self, weights: str, m: FloatArray, n: int, k: int, copies: FloatArray, layers: int, draws: Draws
    ) -> Part:
        """One call for each copy, as the package's kernels run them."""
        rows = float(m[0])
        if self.cost.calibrated(self._kernel(weights)):
            op = self._kernel(weights)
            params = {"m": rows, "n": n, "k": k, "group_size": GROUP, "symmetric": True}
            e = self.cost.kernel_time(op, params, self.threads)
        else:
            op = "roofs"
            moved = WEIGHTS[weights][0] / 8.0 * n * k + 2.0 * rows * (n + k)
            e = self._on_roofs(moved, 2.0 * rows * n * k, self.arithmetic(weights))
        return self._draw(e, op, draws).times(copies * layers)

    def _on_roofs(self, moved: float, ops: float, arithmetic: str) -> Estimate:
        compute = "int8_peak" if arithmetic == "int8" else "fp32_peak"
        return self.cost.roof_times(moved, ops, self.threads, compute=compute, note="").at(0)

    def _draw(self, e: Estimate, op: str, draws: Draws) -> Part:
        time = draws.between(op, e.low_s, e.time_s, e.high_s)
        share = time / e.time_s
        return Part(time, share * e.memory_s, share * e.compute_s, share * e.overhead_s)

    def attention(self, moved_bytes: float, ops: float, layers: int, draws: Draws) -> Part:
        """On the measured roofs."""
        return self._draw(self._on_roofs(moved_bytes, ops, "bf16"), "attention", draws).times(float(layers))

    def chunk(self, weights: str, tokens: int) -> int:
        """At most 512, and what the kernel was calibrated for."""
        from assay.cost.transformer import prefill_chunk

        return prefill_chunk(self.cost, {"w4a8": "int4", "int8": "int8"}.get(weights, "bf16"), tokens)

    def critical_batch(self, weights: str) -> float:
        """The least power of two rows (to 4,096) at which a 4096 x 4096 product takes longer for operations than bytes."""
        one, draws = np.ones(1), Draws(0)
        for exponent in range(13):
            part = self.product(weights, one * 2.0**exponent, 4096, 4096, one, 1, draws)
            if part.compute_s[0] > part.memory_s[0]:
                break
        return 2.0**exponent


@dataclass(frozen=True)
class Speculation:
    """Drafts that are verified ``width - 1`` at a time in ``depth`` draft steps.

    ``accept`` is the (low, middle, high) probability that the next draft is accepted; ``length``, where given, the
    measured accepted length a step (low, middle, high) instead. ``branches`` are the children of each node by depth:
    all 1 is a chain. A second child is accepted with ``a (1 - a)``, and so on. ``draft`` is the time of one draft step
    and ``fixed`` that of a verification's bookkeeping, as a share of a plain step of the same case.
    """

    branches: tuple[int, ...]
    accept: tuple[float, float, float] = (0.7, 0.7, 0.7)
    length: tuple[float, float, float] | None = None
    draft: float = 0.05
    fixed: float = 0.0

    def __post_init__(self) -> None:
        """Refuses impossible trees and rates."""
        if not 1 <= len(self.branches) <= 64 or any(not 1 <= b <= 64 for b in self.branches):
            raise ValueError(f"branches: expected 1 to 64 depths of 1 to 64 children, got {self.branches}")
        if self.width > 4096:
            raise ValueError(f"branches: expected at most 4095 drafts, got {self.width - 1}")
        low, middle, high = self.accept
        if not 0 <= low <= middle <= high <= 1:
            raise ValueError(f"accept: expected 0 <= low <= middle <= high <= 1, got {self.accept}")
        if self.length is not None:
            low, middle, high = self.length
            if not 1 <= low <= middle <= high <= len(self.branches) + 1:
                raise ValueError(
                    f"length: expected 1 to {len(self.branches) + 1} tokens a step (depth + 1), got {self.length}"
                )
        for name, value in (("draft", self.draft), ("fixed", self.fixed)):
            if not 0 <= value <= 100:
                raise ValueError(f"{name}: expected a share of a plain step from 0 to 100, got {value}")

    @property
    def width(self) -> int:
        """Tokens verified at once: all drafts and the last accepted token."""
        return 1 + sum(math.prod(self.branches[: d + 1]) for d in range(len(self.branches)))

    def tokens_per_step(self, draws: Draws) -> FloatArray:
        """``1 + sum_d prod_(j<=d) (1 - (1-a)^b_j)``: some child at each depth; a chain is Leviathan's closed form."""
        z = draws.normal("acceptance") / Z90
        low, middle, high = self.length or self.accept
        top = float(len(self.branches) + 1) if self.length else 1.0
        value = np.clip(
            middle + np.where(z > 0, z * (high - middle), z * (middle - low)), 1.0 if self.length else 0, top
        )
        if self.length:
            return np.asarray(value)
        if set(self.branches) == {1}:
            return np.array([chain_length_iid(float(a), len(self.branches)) for a in value])
        total, alive = np.ones(value.shape), np.ones(value.shape)
        for children in self.branches:
            alive = alive * (1.0 - (1.0 - value) ** children)
            total = total + alive
        return np.asarray(total)


@dataclass(frozen=True)
class Case:
    """A model served in one way on one machine.

    ``batch`` is the most requests at once; memory may allow fewer. ``continuous`` batching refills a slot as soon as it is
    free and pages its cache; a static batch reserves memory for the longest answer and runs until it is done.
    ``prefix_hit`` is the share of the prompt found in a prefix cache.
    """

    model: ModelSpec
    machine: Machine
    weights: str = "bf16"
    kv: str = "bf16"
    batch: int = 1
    isl: int = 512
    osl: int = 128
    continuous: bool = True
    prefix_hit: float = 0.0
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        """Refuses impossible cases, the model's own included."""
        self.model.validate()
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.kv not in KV_BYTES:
            raise ValueError(f"kv: expected one of {', '.join(KV_BYTES)}, got {self.kv!r}")
        for name, top in (("batch", 65536), ("isl", 1 << 24), ("osl", 1 << 24)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
                raise ValueError(f"{name}: expected an integer in 1..{top}, got {value!r}")
        if not 0 <= self.prefix_hit < 1:
            raise ValueError(f"prefix_hit: expected a share from 0 to below 1, got {self.prefix_hit}")

    def bits(self, role: str) -> float:
        """Bits of a weight of this role: routers and embeddings stay in bf16."""
        return WEIGHTS[self.format(role)][0]

    def format(self, role: str) -> str:
        """Weight format of this role."""
        return "bf16" if role in BF16_ROLES else self.weights

    @property
    def weights_bytes(self) -> float:
        """Bytes of all weights."""
        model = self.model
        vectors = model.vector_params + model.expert_vector_params * (model.experts.num_experts if model.experts else 0)
        return sum(self.bits(m.role) / 8.0 * m.n * m.k * model.copies(m) for m in model.matrices) + 2.0 * vectors

    @property
    def kv_bytes_per_request(self) -> float:
        """Memory that the cache of one request takes: pages of its mean length, or a reservation for the longest."""
        length = self.isl + self.osl / 2.0 + PAGE / 2.0 if self.continuous else self.isl + LONGEST_OUTPUT * self.osl
        return KV_BYTES[self.kv] * self.model.kv_elements(math.ceil(length))

    @property
    def room(self) -> int | None:
        """Requests that fit beside the weights; 0 when not even one does, None when memory is unknown."""
        if self.machine.memory_bytes is None:
            return None
        free = USABLE_MEMORY * self.machine.memory_bytes - self.weights_bytes
        return max(0, math.floor(free / self.kv_bytes_per_request))

    @property
    def running(self) -> int:
        """Requests at once: the batch, or what fits; 1 where not even that does (``room`` says so)."""
        return self.batch if self.room is None else max(1, min(self.batch, self.room))


@dataclass(frozen=True)
class Priced:
    """A case with its price. Arrays are by draw, element 0 the estimate."""

    case: Case
    tokens_per_s: FloatArray
    step_s: FloatArray
    tokens_per_step: FloatArray
    touched_experts: float | None
    parts: Part = field(repr=False)

    @property
    def fits(self) -> bool | None:
        """None where the machine's memory is unknown."""
        return None if self.case.room is None else self.case.room >= 1

    @property
    def bound(self) -> str:
        """Where most of the time goes: "memory", "compute" or "overhead"."""
        return largest(*(float(p[0]) for p in (self.parts.memory_s, self.parts.compute_s, self.parts.overhead_s)))


def touched(case: Case, requests: int, width: int, draws: Draws) -> FloatArray:
    """Distinct experts a layer: requests are independent, the tokens of one alike (``w^beta``, beta 0.69 to 0.77)."""
    e = case.model.experts
    if e is None:
        return np.zeros(draws.count + 1)
    beta = draws.between("beta", 0.69, experts.WITHIN_REQUEST_EXPONENT, 0.77)
    one = experts.uniform(e.num_experts, e.experts_per_token, np.maximum(1.0, width**beta))
    all_of_them = e.num_experts * (1.0 - (1.0 - one / e.num_experts) ** requests)
    return np.clip(all_of_them, e.experts_per_token, min(e.num_experts, float(e.experts_per_token) * requests * width))


def _pass(case: Case, requests: int, width: int, past: float, logits: int, draws: Draws) -> Part:
    """One pass of ``width`` new tokens for each request over ``past`` cached ones."""
    model, one = case.model, np.ones(draws.count + 1)
    tokens = requests * width
    found: list[Part] = []
    for matrix in model.matrices:
        if matrix.role == "embedding" or (matrix.role == "lm_head" and not logits):
            continue
        rows, copies = one * (logits if matrix.role == "lm_head" else tokens), one
        if matrix.role == "expert" and model.experts is not None:
            copies = touched(case, requests, width, draws)
            rows = experts.tokens_per_expert(model.experts.experts_per_token, tokens, copies)
        found.append(
            case.machine.product(case.format(matrix.role), rows, matrix.n, matrix.k, copies, matrix.count, draws)
        )
    for kind in model.attention:
        length, seen = past + width, past + (width + 1) / 2.0
        if kind.window is not None:
            length, seen = min(length, kind.window + width - 1.0), min(seen, float(kind.window))
        moved = KV_BYTES[case.kv] * requests * length * kind.kv_elements_per_token
        heads = 2 * kind.kv_elements_per_token if kind.kind == "mla" else kind.head_dim + kind.v_head_dim
        ops = 2.0 * tokens * seen * kind.num_heads * heads
        found.append(case.machine.attention(moved, ops, kind.num_layers, draws))
    return _sum(found)


def _sum(parts: Sequence[Part]) -> Part:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _prefill(case: Case, draws: Draws) -> Part:
    """One prompt, less what the prefix cache holds (at least its last token runs), in chunks."""
    new = max(1, round(case.isl * (1.0 - case.prefix_hit)))
    cached = case.isl - new
    chunk = case.machine.chunk(case.weights, new)
    full, rest = divmod(new, chunk)
    parts = [_pass(case, 1, chunk, cached + (full - 1) * chunk / 2.0, 0, draws).times(float(full))]
    if rest:
        parts.append(_pass(case, 1, rest, cached + full * chunk, 0, draws))
    head = next(m for m in case.model.matrices if m.role == "lm_head")
    one = np.ones(draws.count + 1)
    parts.append(case.machine.product(case.format("lm_head"), one, head.n, head.k, one, 1, draws))
    return _sum(parts)


def longest_over_mean(requests: int, cut: float = LONGEST_OUTPUT) -> float:
    """E[longest] / E[mean] of so many exponential output lengths, each cut at ``cut`` times the mean before cutting."""
    x = np.linspace(0.0, cut, 2001)
    unfinished = 1.0 - (-np.expm1(-x)) ** requests
    longest = float(np.sum((unfinished[1:] + unfinished[:-1]) / 2.0) * (x[1] - x[0]))
    return max(1.0, longest / -math.expm1(-cut))


def price(case: Case, draws: Draws | None = None) -> Priced:
    """Output tokens a second of a case, prompts included.

    ``X = B o / (B t_prefill + o' t_step / tau)``: o' is o with continuous batching and the longest output of the batch
    without; ``t_step = t_verify(B, w) + (depth c_draft + c_fixed) t_plain``.
    """
    draws = draws or Draws()
    requests, spec = case.running, case.speculation
    past = case.isl + case.osl / 2.0
    plain = _pass(case, requests, 1, past, requests, draws)
    step, tokens = plain, np.ones(draws.count + 1)
    if spec is not None:
        verify = _pass(case, requests, spec.width, past, requests * spec.width, draws)
        step = verify + plain.times(len(spec.branches) * spec.draft + spec.fixed)
        tokens = spec.tokens_per_step(draws)
    steps = case.osl / tokens * (1.0 if case.continuous else longest_over_mean(requests))
    whole = _prefill(case, draws).times(float(requests)) + step.times(steps)
    experts_touched = None
    if case.model.experts is not None:
        experts_touched = float(touched(case, requests, spec.width if spec else 1, draws)[0])
    return Priced(case, requests * case.osl / whole.time_s, step.time_s, tokens, experts_touched, whole)
