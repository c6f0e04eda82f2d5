"""The calibration profile: one JSON file that carries everything the cost model knows about a machine.

It is the only door between measuring and predicting, so it is checked strictly: every error names the place in
the file, what was found and what was wanted. The format is described in docs/profile-format.md.
"""

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from assay.checks import (
    Json,
    check_bool,
    check_finite,
    check_int,
    check_list,
    check_middle,
    check_number,
    check_numbers,
    check_object,
    check_text,
    fail,
)
from assay.errors import ProfileError
from assay.foreign import StoredTable, WholeRun

SCHEMA = "assay-profile"
SCHEMA_VERSION = 1
MAX_PROFILE_BYTES = 64 * 2**20  # a full calibration is under 2 MiB; more than this is not a profile

MAX_EARLIER = 20  # calibrations whose roofs a profile remembers

MODES = ("quick", "full", "imported", "published")
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


@dataclass
class Profile:
    """A calibration in memory. ``fits`` and ``accuracy`` are what ``assay.cost.stored.summarise`` returns.

    ``tables`` are points of kernels that others measured on this device, ``runs`` whole models that ran on it.
    """

    created_utc: str
    command: list[str]
    seed: int
    package: dict[str, Json]
    machine: Machine
    settings: dict[str, Json]
    roofs: list[Roof] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fits: dict[str, Json] = field(default_factory=dict)
    accuracy: dict[str, Json] = field(default_factory=dict)
    complete: bool = False
    tables: list[StoredTable] = field(default_factory=list)
    runs: list[WholeRun] = field(default_factory=list)

    def roof(self, name: str, threads: int) -> Roof | None:
        """The roof of that name and thread count, or None."""
        return next((r for r in self.roofs if r.name == name and r.threads == threads), None)

    def runs_until_now(self) -> list[Json]:
        """The medians of this run's roofs behind those of the runs that it replaced, as ``settings.earlier`` keeps them."""
        now = {"created_utc": self.created_utc, "roofs": {f"{r.name}@{r.threads}": r.median for r in self.roofs}}
        return [*self.settings.get("earlier", []), now][-MAX_EARLIER:]

    def to_json(self) -> dict[str, Json]:
        """The profile as the JSON object described in docs/profile-format.md (not yet validated)."""
        machine = self.machine
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_utc": self.created_utc,
            "command": list(self.command),
            "seed": self.seed,
            "package": self.package,
            "machine": {
                **machine.extra,
                "fingerprint": machine.fingerprint,
                "cpu": machine.cpu,
                "isa": list(machine.isa),
                "cores": machine.cores,
                "memory_bytes": machine.memory_bytes,
                "caches": dict(machine.caches),
                "os": machine.os,
                "numpy": machine.numpy,
                "python": machine.python,
            },
            "settings": self.settings,
            "roofs": [
                {
                    "name": r.name,
                    "threads": r.threads,
                    "unit": r.unit,
                    "samples": list(r.samples),
                    "median": r.median,
                    "spread": r.spread,
                }
                for r in self.roofs
            ],
            "samples": [
                {
                    "op": s.op,
                    "variant": s.variant,
                    "threads": s.threads,
                    "params": dict(s.params),
                    "bytes": s.bytes,
                    "ops": s.ops,
                    "time_s": list(s.time_s),
                    "median_s": s.median_s,
                    "spread": s.spread,
                    "roof_near": dict(s.roof_near) if s.roof_near is not None else None,
                    "held_out": s.held_out,
                    **({"conditions": dict(s.conditions)} if s.conditions else {}),
                }
                for s in self.samples
            ],
            "fits": self.fits,
            "accuracy": self.accuracy,
            "complete": self.complete,
            **({"tables": [t.to_json() for t in self.tables]} if self.tables else {}),
            **({"runs": [r.to_json() for r in self.runs]} if self.runs else {}),
        }

    @classmethod
    def from_json(cls, data: Json) -> "Profile":
        """Check a parsed JSON object strictly and build the profile.

        Raises
        ------
        ProfileError
            Wrong schema, a future version, a missing or unknown key, a value of the wrong kind or range; the
            message names the JSON path, what was got and what was wanted.
        """
        return _profile(data)


# ---- validation -------------------------------------------------------------------------------------------


def _machine(value: Json, path: str) -> Machine:
    known = ("fingerprint", "cpu", "isa", "cores", "memory_bytes", "caches", "os", "numpy", "python")
    data = check_object(value, path, known, optional=None)
    caches = check_object(data["caches"], f"{path}.caches", ("l1d_bytes", "l2_bytes", "l3_bytes"), optional=None)
    return Machine(
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


def _roof(value: Json, path: str) -> Roof:
    data = check_object(value, path, ("name", "threads", "unit", "samples", "median", "spread"))
    name = check_text(data["name"], f"{path}.name")
    unit = check_text(data["unit"], f"{path}.unit")
    wanted = (KNOWN_ROOFS[name],) if name in KNOWN_ROOFS else UNITS
    if unit not in wanted:
        raise fail(f"{path}.unit", " or ".join(wanted), unit)
    samples = check_numbers(data["samples"], f"{path}.samples")
    return Roof(
        name=name,
        threads=check_int(data["threads"], f"{path}.threads", 1),
        unit=unit,
        samples=samples,
        median=check_middle(data["median"], f"{path}.median", samples),
        spread=check_number(data["spread"], f"{path}.spread", positive=False),
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


def _sample(value: Json, path: str) -> Sample:
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
    return Sample(
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


def _accuracy(value: Json, path: str) -> dict[str, Json]:
    table = check_object(value, path, (), optional=None)
    for op, row in table.items():
        data = check_object(row, f"{path}.{op}", ("n", "median_ape", "p90_ape", "bias", "coverage"), optional=None)
        check_int(data["n"], f"{path}.{op}.n", 0)
    return table


def _profile(value: Json) -> Profile:
    if not isinstance(value, dict):
        raise fail("$", "an object", value)
    if value.get("schema") != SCHEMA:
        raise fail("$.schema", repr(SCHEMA), value.get("schema"))
    version = check_int(value.get("schema_version"), "$.schema_version", 1)
    if version > SCHEMA_VERSION:
        raise ProfileError(
            f"schema_version {version} is newer than this assay understands ({SCHEMA_VERSION}); upgrade assay"
        )
    required = ("created_utc", "command", "seed", "package", "machine", "settings", "roofs", "samples")
    data = check_object(
        value, "$", ("schema", "schema_version", *required, "fits", "accuracy", "complete"), ("tables", "runs")
    )
    package = check_object(data["package"], "$.package", ("assay", "kernels", "compiler"), optional=None)
    settings = check_object(data["settings"], "$.settings", ("mode", "threads"), optional=None)
    if settings["mode"] not in MODES:
        raise fail("$.settings.mode", " or ".join(MODES), settings["mode"])
    for i, threads in enumerate(check_list(settings["threads"], "$.settings.threads")):
        check_int(threads, f"$.settings.threads[{i}]", 1)
    for i, earlier in enumerate(check_list(settings.get("earlier", []), "$.settings.earlier")):
        path = f"$.settings.earlier[{i}]"
        run = check_object(earlier, path, ("created_utc", "roofs"), optional=None)
        for name, median in check_object(run["roofs"], f"{path}.roofs", (), optional=None).items():
            check_number(median, f"{path}.roofs.{name}", positive=True)
    check_text(package["assay"], "$.package.assay")
    check_text(package["compiler"], "$.package.compiler")
    for op, variant in check_object(package["kernels"], "$.package.kernels", (), optional=None).items():
        check_text(variant, f"$.package.kernels.{op}")
    machine = _machine(data["machine"], "$.machine")
    roofs = [_roof(v, f"$.roofs[{i}]") for i, v in enumerate(check_list(data["roofs"], "$.roofs"))]
    seen: set[tuple[str, int]] = set()
    for i, roof in enumerate(roofs):
        if (roof.name, roof.threads) in seen:
            raise ProfileError(
                f"$.roofs[{i}]: expected one roof per name and threads, got {roof.name} x{roof.threads} twice"
            )
        seen.add((roof.name, roof.threads))
    samples = [_sample(v, f"$.samples[{i}]") for i, v in enumerate(check_list(data["samples"], "$.samples"))]
    fits = check_object(data["fits"], "$.fits", (), optional=None)
    accuracy = _accuracy(data["accuracy"], "$.accuracy")
    for path, part in (
        ("$.package", package),
        ("$.machine", dict(machine.extra)),
        ("$.settings", settings),
        ("$.fits", fits),
        ("$.accuracy", accuracy),
    ):
        check_finite(part, path)
    for i, sample in enumerate(samples):
        check_finite(dict(sample.params), f"$.samples[{i}].params")
    return Profile(
        created_utc=check_text(data["created_utc"], "$.created_utc"),
        command=[check_text(v, f"$.command[{i}]") for i, v in enumerate(check_list(data["command"], "$.command"))],
        seed=check_int(data["seed"], "$.seed", 0),
        package=package,
        machine=machine,
        settings=settings,
        roofs=roofs,
        samples=samples,
        fits=fits,
        accuracy=accuracy,
        complete=check_bool(data["complete"], "$.complete"),
        tables=[
            StoredTable.from_json(v, f"$.tables[{i}]")
            for i, v in enumerate(check_list(data.get("tables", []), "$.tables"))
        ],
        runs=[WholeRun.from_json(v, f"$.runs[{i}]") for i, v in enumerate(check_list(data.get("runs", []), "$.runs"))],
    )


# ---- files ------------------------------------------------------------------------------------------------


def default_profile_path(environ: Mapping[str, str] | None = None, ordinal: int | None = None) -> Path:
    """Where the profile of this machine lives: ``$ASSAY_PROFILE``, else ``assay/profile.json`` in the user's cache.

    Parameters
    ----------
    environ
        The environment to read; that of the process when left out. ``XDG_CACHE_HOME`` counts only if absolute,
        as the XDG base directory specification asks.
    ordinal
        Of a GPU, whose profile is ``assay/profile-cuda-N.json`` there, whatever ``$ASSAY_PROFILE`` is.
    """
    env = os.environ if environ is None else environ
    if env.get("ASSAY_PROFILE") and ordinal is None:
        return Path(env["ASSAY_PROFILE"]).expanduser()
    cache = env.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "assay" / ("profile.json" if ordinal is None else f"profile-cuda-{ordinal}.json")


def _read_json(path: str | os.PathLike[str]) -> Json:
    name = os.fspath(path)
    try:
        with Path(name).open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{name}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{name}: expected at most {MAX_PROFILE_BYTES} bytes, got more")

    def refuse(constant: str) -> float:
        raise ProfileError(f"{name}: expected finite numbers only, got {constant}")

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ProfileError(f"{name}: expected JSON of moderate depth, got one nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"{name}: expected UTF-8 text, got byte {raw[error.start]:#04x} at {error.start}") from error
    except ProfileError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers with more digits than Python converts
        raise ProfileError(f"{name}: expected JSON, got a syntax error: {error}") from error


def load(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile.

    Raises
    ------
    ProfileError
        The file cannot be read, is larger than 64 MiB, is no JSON, or fails validation.
    """
    data = _read_json(path)
    try:
        return Profile.from_json(data)
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from error


def save(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile so that a reader sees either the old file or the whole new one, never a part.

    The text goes to a temporary file beside ``path``, is flushed to the disk, and takes the name by a rename.

    Raises
    ------
    ProfileError
        The profile would not load again (NaN, infinity, negative times, wrong params): nothing is written.
    """
    data = profile.to_json()
    try:
        text = json.dumps(data, allow_nan=False, indent=1) + "\n"
    except ValueError as error:
        raise ProfileError(f"profile: expected finite numbers only, got NaN or infinity ({error})") from error
    except TypeError as error:
        raise ProfileError(f"profile: expected JSON values only: {error}") from error
    Profile.from_json(json.loads(text))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private; a profile is meant to be shared
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def compatible(profile: Profile, machine_fingerprint: str) -> str | None:
    """A warning when the profile comes from another machine, None when it is this one's.

    Predicting with a profile from elsewhere is allowed, and useful; the reader only has to know it.
    """
    if profile.machine.fingerprint == machine_fingerprint:
        return None
    return (
        f"the profile was measured on another machine ({profile.machine.cpu}, {profile.machine.cores} cores; "
        f"fingerprint {profile.machine.fingerprint}): the prediction is for that machine, not for this one "
        f"({machine_fingerprint})"
    )


# ---- importer ---------------------------------------------------------------------------------------------


def _dict(value: Json) -> dict[str, Json]:
    """The value if it is an object, else an empty one: for parts of a foreign file that may be left out."""
    return value if isinstance(value, dict) else {}


def _imported_machine(info: Mapping[str, Json]) -> dict[str, Json]:
    """The machine of a pytest-benchmark file: our own block when benchmarks/ wrote one, else what the plugin knows."""
    own = _dict(info.get("assay")).get("machine")
    if isinstance(own, dict):
        return own
    cpu = _dict(info.get("cpu"))
    name = str(cpu.get("brand_raw") or info.get("processor") or "unknown")
    system = " ".join(str(info[k]) for k in ("system", "release") if info.get(k))
    identity = json.dumps([name, cpu.get("count"), system, info.get("node")])
    return {
        "fingerprint": "imported-" + hashlib.sha256(identity.encode()).hexdigest()[:16],
        "cpu": name,
        "isa": [],
        "cores": cpu["count"] if isinstance(cpu.get("count"), int) and cpu["count"] > 0 else 1,
        "memory_bytes": None,
        "caches": {"l1d_bytes": None, "l2_bytes": None, "l3_bytes": None},
        "os": system,
        "numpy": "",
        "python": str(info.get("python_version", "")),
    }


def from_pytest_benchmark(path: str | os.PathLike[str]) -> Profile:
    """Make a profile of the JSON that ``pytest benchmarks/ --benchmark-json FILE`` writes.

    A benchmark becomes a sample when its ``extra_info`` carries ``op, variant, threads, params, bytes, ops`` (and
    optionally ``held_out``, ``roof_near``), and a roof when it carries ``roof, threads, unit, work`` (bytes or ops
    of one call). Benchmarks with neither are left out. Times are ``stats.data``, in seconds per call.

    Raises
    ------
    ProfileError
        Not such a file, a benchmark with half of the keys or without its times, or no usable benchmark at all.
    """
    name = os.fspath(path)
    data = _read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise ProfileError(
            f"{name}: $.benchmarks: expected the list of a pytest-benchmark file, got none; "
            "tables that others measured are scored by `assay validate`"
        )
    info = _dict(data.get("machine_info"))
    roofs: list[dict[str, Json]] = []
    samples: list[dict[str, Json]] = []
    try:
        for i, bench in enumerate(data["benchmarks"]):
            at = f"$.benchmarks[{i}]"
            row = check_object(bench, at, (), optional=None)
            extra = row.get("extra_info") or {}
            if not isinstance(extra, dict):
                raise fail(f"{at}.extra_info", "an object", extra)
            if "op" not in extra and "roof" not in extra:
                continue
            stats = check_object(row.get("stats"), f"{at}.stats", ("data",), optional=None)
            times = check_numbers(stats["data"], f"{at}.stats.data")
            if "roof" in extra:
                fields = check_object(extra, f"{at}.extra_info", ("roof", "threads", "unit", "work"), optional=None)
                work = check_number(fields["work"], f"{at}.extra_info.work", positive=True)
                rates = [work / t for t in times]
                roofs.append(
                    {
                        "name": fields["roof"],
                        "threads": fields["threads"],
                        "unit": fields["unit"],
                        "samples": rates,
                        "median": statistics.median(rates),
                        "spread": spread_of(rates),
                    }
                )
                continue
            keys = ("op", "variant", "threads", "params", "bytes", "ops")
            fields = check_object(extra, f"{at}.extra_info", keys, optional=None)
            samples.append(
                {key: fields[key] for key in keys}
                | {
                    "time_s": list(times),
                    "median_s": statistics.median(times),
                    "spread": spread_of(times),
                    "roof_near": extra.get("roof_near"),
                    "held_out": extra.get("held_out", False),
                }
            )
        if not samples and not roofs:
            raise ProfileError("$.benchmarks: expected benchmarks with extra_info of an op or a roof, got none")
        package = _dict(info.get("assay")).get("package") or {"assay": "unknown", "kernels": {}, "compiler": "unknown"}
        threads = sorted({s["threads"] for s in samples + roofs if isinstance(s["threads"], int)})
        return Profile.from_json(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "created_utc": str(data.get("datetime", "")),
                "command": ["assay", "profile", "import", Path(name).name],
                "seed": 0,
                "package": package,
                "machine": _imported_machine(info),
                "settings": {"mode": "imported", "threads": threads},
                "roofs": roofs,
                "samples": samples,
                "fits": {},
                "accuracy": {},
                "complete": True,
            }
        )
    except ProfileError as error:
        raise ProfileError(f"{name}: {error}") from error
