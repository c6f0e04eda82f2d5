"""What a calibration measures of a machine: the machine itself, its roofs, and the samples of its kernels."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from assay.checks import (
    Json,
    check_bool,
    check_int,
    check_list,
    check_middle,
    check_number,
    check_numbers,
    check_object,
    check_text,
    fail,
)

ROOF_UNITS = {
    "dram_read": "bytes_per_s",
    "llc_read": "bytes_per_s",
    "int8_peak": "ops_per_s",
    "int8_vector_peak": "ops_per_s",
    "fp32_peak": "ops_per_s",
}
#: Bytes that a reading goes over again and again: what a cache that others use too holds of so much is measured, not assumed.
SET_ROOFS = {f"read_{mib}MiB": mib << 20 for mib in (64, 128, 256, 512)}
#: Roofs that a GPU has besides: its float peak is its tensor cores', on 16-bit floats; "s" are seconds of latency.
GPU_ROOF_UNITS = {
    "fp16_peak": "ops_per_s",
    "dram_write": "bytes_per_s",
    "llc_write": "bytes_per_s",
    "atomics_one": "ops_per_s",
    "atomics_many": "ops_per_s",
    "launch_latency": "s",
    "graph_latency": "s",
    "graph_node": "s",
}
KNOWN_ROOFS = ROOF_UNITS | GPU_ROOF_UNITS | dict.fromkeys(SET_ROOFS, "bytes_per_s")
UNITS = ("bytes_per_s", "ops_per_s", "s")
GEMM_OPS = ("w4a8_gemm", "w4a16_gemm", "w8a8_gemm", "w4a16_gemv")
#: Those, and the expert layer, which is a product of as many weights as its experts have.
MATRIX_OPS = (*GEMM_OPS, "moe_experts")
VERIFY_RULES = ("greedy", "rejection")


def spread_of(values: Sequence[float]) -> float:
    """Interquartile range over the median (0 for fewer than two values)."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / statistics.median(values)


@dataclass(frozen=True)
class Machine:
    """The machine that was measured. ``memory_bytes`` and the caches are None where the system does not say."""

    fingerprint: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    caches: Mapping[str, int | None]
    os: str
    numpy: str
    python: str
    extra: Mapping[str, Json] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """The fields, by name, with those of ``extra`` beside them."""
        return {
            **self.extra,
            "fingerprint": self.fingerprint,
            "cpu": self.cpu,
            "isa": list(self.isa),
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "caches": dict(self.caches),
            "os": self.os,
            "numpy": self.numpy,
            "python": self.python,
        }

    @classmethod
    def from_json(cls, value: Json, path: str) -> "Machine":
        """Checks strictly; ProfileError names the place."""
        known = ("fingerprint", "cpu", "isa", "cores", "memory_bytes", "caches", "os", "numpy", "python")
        data = check_object(value, path, known, optional=None)
        caches = check_object(data["caches"], f"{path}.caches", ("l1d_bytes", "l2_bytes", "l3_bytes"), optional=None)
        return cls(
            fingerprint=check_text(data["fingerprint"], f"{path}.fingerprint"),
            cpu=check_text(data["cpu"], f"{path}.cpu"),
            isa=tuple(check_text(v, f"{path}.isa[{i}]") for i, v in enumerate(check_list(data["isa"], f"{path}.isa"))),
            cores=check_int(data["cores"], f"{path}.cores", 1),
            memory_bytes=None
            if data["memory_bytes"] is None
            else check_int(data["memory_bytes"], f"{path}.memory_bytes", 1),
            caches={k: None if v is None else check_int(v, f"{path}.caches.{k}", 0) for k, v in caches.items()},
            os=check_text(data["os"], f"{path}.os"),
            numpy=check_text(data["numpy"], f"{path}.numpy"),
            python=check_text(data["python"], f"{path}.python"),
            extra={k: v for k, v in data.items() if k not in known},
        )


@dataclass(frozen=True)
class Roof:
    """A measured ceiling, or a latency. ``samples`` and ``median`` are in ``unit`` ("bytes_per_s", "ops_per_s" or "s")."""

    name: str
    threads: int
    unit: str
    samples: tuple[float, ...]
    median: float
    spread: float

    @classmethod
    def of(cls, name: str, threads: int, samples: Iterable[float], unit: str | None = None) -> "Roof":
        """Roof with median and spread taken from ``samples``; the unit of a known roof may be left out."""
        values = tuple(float(v) for v in samples)
        if not values:
            raise ValueError("samples: expected at least one value, got none")
        if unit is None:
            unit = KNOWN_ROOFS.get(name)
            if unit is None:
                raise ValueError(f"unit: expected one for the unknown roof {name!r}, got None")
        return cls(name, threads, unit, values, statistics.median(values), spread_of(values))

    def to_json(self) -> dict[str, Json]:
        """The fields, by name."""
        return asdict(self) | {"samples": list(self.samples)}

    @classmethod
    def from_json(cls, value: Json, path: str) -> "Roof":
        """Checks strictly; ProfileError names the place."""
        data = check_object(value, path, ("name", "threads", "unit", "samples", "median", "spread"))
        name = check_text(data["name"], f"{path}.name")
        unit = check_text(data["unit"], f"{path}.unit")
        wanted = (KNOWN_ROOFS[name],) if name in KNOWN_ROOFS else UNITS
        if unit not in wanted:
            raise fail(f"{path}.unit", " or ".join(wanted), unit)
        samples = check_numbers(data["samples"], f"{path}.samples")
        return cls(
            name=name,
            threads=check_int(data["threads"], f"{path}.threads", 1),
            unit=unit,
            samples=samples,
            median=check_middle(data["median"], f"{path}.median", samples),
            spread=check_number(data["spread"], f"{path}.spread", positive=False),
        )


@dataclass(frozen=True)
class Sample:
    """One measured point: an op, its shape, and how long calls took.

    ``bytes`` and ``ops`` are per call (bytes as moved from memory, a multiply-add counts 2). ``roof_near`` holds
    roofs measured next to this point, for machines whose speed drifts. ``held_out`` points never enter a fit.
    ``conditions``: what a GPU was doing meanwhile (docs/profile-format.md).
    """

    op: str
    variant: str
    threads: int
    params: Mapping[str, Json]
    bytes: float
    ops: float
    time_s: tuple[float, ...]
    median_s: float
    spread: float
    roof_near: Mapping[str, float] | None = None
    held_out: bool = False
    conditions: Mapping[str, Json] | None = None

    @classmethod
    def of(
        cls,
        op: str,
        variant: str,
        threads: int,
        params: Mapping[str, Json],
        *,
        moved_bytes: float,
        ops: float,
        time_s: Iterable[float],
        roof_near: Mapping[str, float] | None = None,
        held_out: bool = False,
        conditions: Mapping[str, Json] | None = None,
    ) -> "Sample":
        """Sample with median and spread taken from ``time_s`` (seconds per call)."""
        times = tuple(float(t) for t in time_s)
        if not times:
            raise ValueError("time_s: expected at least one time, got none")
        return cls(
            op=op,
            variant=variant,
            threads=threads,
            params=dict(params),
            bytes=float(moved_bytes),
            ops=float(ops),
            time_s=times,
            median_s=statistics.median(times),
            spread=spread_of(times),
            roof_near=dict(roof_near) if roof_near else None,
            held_out=held_out,
            conditions=dict(conditions) if conditions else None,
        )

    def to_json(self) -> dict[str, Json]:
        """The fields, by name; ``conditions`` only where there are any."""
        return {
            "op": self.op,
            "variant": self.variant,
            "threads": self.threads,
            "params": dict(self.params),
            "bytes": self.bytes,
            "ops": self.ops,
            "time_s": list(self.time_s),
            "median_s": self.median_s,
            "spread": self.spread,
            "roof_near": dict(self.roof_near) if self.roof_near is not None else None,
            "held_out": self.held_out,
            **({"conditions": dict(self.conditions)} if self.conditions else {}),
        }

    @classmethod
    def from_json(cls, value: Json, path: str) -> "Sample":
        """Checks strictly; ProfileError names the place."""
        required = ("op", "variant", "threads", "params", "bytes", "ops", "time_s", "median_s", "spread")
        data = check_object(value, path, (*required, "roof_near", "held_out"), ("conditions",))
        op = check_text(data["op"], f"{path}.op")
        near = data["roof_near"]
        if near is not None:
            near = check_object(near, f"{path}.roof_near", (), optional=None)
            near = {k: check_number(v, f"{path}.roof_near.{k}", positive=True) for k, v in near.items()}
        times = check_numbers(data["time_s"], f"{path}.time_s")
        conditions = _conditions(data.get("conditions"), f"{path}.conditions")
        if op == "sequence":
            check_number((conditions or {}).get("alone_s"), f"{path}.conditions.alone_s", positive=True)
        return cls(
            op=op,
            variant=check_text(data["variant"], f"{path}.variant"),
            threads=check_int(data["threads"], f"{path}.threads", 1),
            params=_params(op, data["params"], f"{path}.params"),
            bytes=check_number(data["bytes"], f"{path}.bytes", positive=False),
            ops=check_number(data["ops"], f"{path}.ops", positive=False),
            time_s=times,
            median_s=check_middle(data["median_s"], f"{path}.median_s", times),
            spread=check_number(data["spread"], f"{path}.spread", positive=False),
            roof_near=near,
            held_out=check_bool(data["held_out"], f"{path}.held_out"),
            conditions=conditions,
        )


def _params(op: str, value: Json, path: str) -> dict[str, Json]:
    if op in GEMM_OPS:
        data = check_object(value, path, ("m", "n", "k", "group_size", "symmetric"), optional=None)
        for key in ("m", "n", "k"):
            check_int(data[key], f"{path}.{key}", 1)
        group = check_int(data["group_size"], f"{path}.group_size", -1)
        if group == 0 or (group > 0 and data["k"] % group):
            raise fail(f"{path}.group_size", "-1 (whole row) or a divisor of k", group)
        check_bool(data["symmetric"], f"{path}.symmetric")
        if data.get("resident", "dram") not in ("dram", "llc"):
            raise fail(f"{path}.resident", '"dram" or "llc"', data["resident"])
    elif op == "moe_route":
        data = check_object(value, path, ("tokens", "num_experts", "top_k"), optional=None)
        check_int(data["tokens"], f"{path}.tokens", 1)
        experts = check_int(data["num_experts"], f"{path}.num_experts", 1)
        if check_int(data["top_k"], f"{path}.top_k", 1) > experts:
            raise fail(f"{path}.top_k", f"at most num_experts ({experts})", data["top_k"])
    elif op == "moe_experts":
        sizes = ("tokens", "top_k", "distinct_experts", "hidden_size", "intermediate_size")
        data = check_object(value, path, (*sizes, "group_size", "symmetric"), optional=None)
        for key in sizes:
            check_int(data[key], f"{path}.{key}", 1)
        slots = data["tokens"] * data["top_k"]
        if not data["top_k"] <= data["distinct_experts"] <= slots:
            raise fail(f"{path}.distinct_experts", f"top_k to tokens * top_k ({slots})", data["distinct_experts"])
        if check_int(data["group_size"], f"{path}.group_size", -1) == 0:
            raise fail(f"{path}.group_size", "-1 (whole row) or above 0", 0)
        check_bool(data["symmetric"], f"{path}.symmetric")
    elif op == "chain_verify":
        data = check_object(value, path, ("batch", "num_draft", "vocab", "rule"), optional=None)
        check_int(data["batch"], f"{path}.batch", 1)
        check_int(data["num_draft"], f"{path}.num_draft", 0)
        check_int(data["vocab"], f"{path}.vocab", 1)
        if data["rule"] not in VERIFY_RULES:
            raise fail(f"{path}.rule", " or ".join(VERIFY_RULES), data["rule"])
    elif op == "sequence":
        sizes = ("m", "hidden_size", "kv_size", "intermediate_size", "layers")
        data = check_object(value, path, ("of", *sizes), optional=None)
        if check_text(data["of"], f"{path}.of") not in GEMM_OPS:
            raise fail(f"{path}.of", " or ".join(GEMM_OPS), data["of"])
        for key in sizes:
            check_int(data[key], f"{path}.{key}", 1)
    else:  # an op of a later assay: kept as it is, used by nothing here
        data = check_object(value, path, (), optional=None)
    return dict(data)


def _conditions(value: Json, path: str) -> dict[str, Json] | None:
    """Numbers of at least 0, and the names of what slowed the clocks."""
    if value is None:
        return None
    data = check_object(value, path, (), optional=None)
    for key, item in data.items():
        if key == "throttled":
            for i, reason in enumerate(check_list(item, f"{path}.throttled")):
                check_text(reason, f"{path}.throttled[{i}]")
        else:
            check_number(item, f"{path}.{key}", positive=False)
    return data
