"""Profiles from the JSON that pytest-benchmark writes."""

import hashlib
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path

from assay.checks import Json, check_number, check_numbers, check_object, fail
from assay.errors import ProfileError
from assay.profile.document import SCHEMA, SCHEMA_VERSION, Profile
from assay.profile.files import read_json
from assay.profile.parts import spread_of


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
    data = read_json(path)
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
