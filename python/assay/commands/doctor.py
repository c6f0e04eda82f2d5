"""``assay doctor``: what is here, and what of it assay uses. Always prints: each probe is guarded by itself."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
ENVIRONMENT = {
    "ASSAY_ISA": "highest instruction-set tier that kernels may use",
    "ASSAY_NUM_THREADS": "threads of a call that names none",
    "ASSAY_PROFILE": "profile that `assay predict` reads",
    "ASSAY_CUDA_DRIVER": "NVIDIA's driver, where it is not libcuda.so.1",
    "ASSAY_CACHE": "where compiled GPU kernels are kept (in cuda/)",
    "ASSAY_DEBUG": "show the traceback of an error",
    "XDG_CACHE_HOME": "where the default profile lies (in assay/)",
}
LIBRARIES = ("numpy", "cffi", "tqdm", "tabulate", "numba", "scipy", "matplotlib", "torch", "gguf", "pytest-benchmark")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON (docs/doctor.md) instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the report; the exit status is 0 whatever was found."""
    report = collect()
    if args.json:
        json.dump(report, sys.stdout, indent=2, default=str)
        print()
    else:
        print(_text(report))
    return 0


def collect() -> dict[str, Any]:
    """Every section; one whose probe failed holds only {"error": why}."""
    probes: dict[str, Callable[[], Any]] = {
        "assay": _assay,
        "machine": _machine,
        "isa_tiers": _tiers,
        "kernels": _kernels,
        "threads": _threads,
        "libraries": _libraries,
        "gpu": _gpu,
        "environment": _environment,
    }
    report: dict[str, Any] = {"schema": "assay-doctor", "schema_version": SCHEMA_VERSION}
    for name, probe in probes.items():
        try:
            report[name] = probe()
        except Exception as exc:  # noqa: BLE001 - a doctor that dies of one symptom helps nobody
            report[name] = {"error": f"{type(exc).__name__}: {exc}"}
    return report


def _assay() -> dict[str, Any]:
    import assay
    from assay.ops import info

    return {"version": assay.__version__, "compiler": info.compiler(), "python": sys.version.split()[0]}


def _machine() -> dict[str, Any]:
    from dataclasses import asdict

    from assay import machine

    try:
        from assay.ops import info

        isa = tuple(t["isa"] for t in info.isa_tiers() if t["supported"])
    except Exception:  # noqa: BLE001 - the machine is worth describing without the compiled module
        isa = ()
    here = machine.describe(isa)
    available = machine.memory_bytes("MemAvailable")
    return {**asdict(here), "memory_available_bytes": available, "fingerprint": here.fingerprint()}


def _tiers() -> list[Any]:
    from assay.ops import info

    return list(info.isa_tiers())


def _kernels() -> list[Any]:
    from assay.ops import info

    return list(info.variants())


def _threads() -> dict[str, Any]:
    from assay import machine
    from assay.ops import info, probe

    used = info.num_threads()
    return {
        "cores": os.cpu_count(),
        "affinity": machine.affinity_count(),
        "cgroup_quota": info.cgroup_quota(),
        "ASSAY_NUM_THREADS": os.environ.get("ASSAY_NUM_THREADS"),
        "used": used,
        "dispatch_s": probe.dispatch_latency(used) if used > 1 else None,
    }


def _libraries() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _gpu() -> dict[str, Any]:
    """NVIDIA GPUs by the driver: no CUDA context is made."""
    from dataclasses import asdict

    from assay import cuda
    from assay.cuda.compile import WHEEL, find_nvrtc
    from assay.errors import UnsupportedError

    report: dict[str, Any] = {
        "available": False,
        "device_files": sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*")),
        "nvrtc": str(find_nvrtc() or "") or None,
    }
    try:
        version, path = cuda.driver()
        found = [cuda.device(i) for i in range(cuda.device_count())]
    except (UnsupportedError, cuda.CudaError) as exc:
        return {**report, "why": str(exc)}
    report |= {"driver": path, "driver_cuda": f"{version[0]}.{version[1]}", "devices": [asdict(d) for d in found]}
    usable = [d for d in found if d.capability >= (8, 0)]
    if not usable:
        return {**report, "why": "compute capability 8.0 (A100, RTX 30) or newer is needed"}
    code = cuda.code_for(usable[0])
    if code is None:
        return {**report, "why": f"no kernels compiled for it are here: pip install '{WHEEL}'"}
    return {**report, "available": True, "why": f"kernels: {code}"}


def _environment() -> dict[str, Any]:
    known = {name: {"meaning": meaning, "value": os.environ.get(name)} for name, meaning in ENVIRONMENT.items()}
    unknown = sorted(name for name in os.environ if name.startswith("ASSAY_") and name not in ENVIRONMENT)
    return {"understood": known, "unknown": unknown, "warnings": _warnings(unknown)}


def _warnings(unknown: list[str]) -> list[str]:
    found = [f"{name} is set but means nothing to assay" for name in unknown]
    threads = os.environ.get("ASSAY_NUM_THREADS")
    if threads and not (threads.isdigit() and int(threads) >= 1):
        found.append(f"ASSAY_NUM_THREADS: expected a number from 1, got {threads!r}; it is ignored")
    isa = os.environ.get("ASSAY_ISA")
    if isa:
        try:
            from assay.ops import info

            names = [t["isa"] for t in info.isa_tiers() if t["allowed"]]
        except Exception:  # noqa: BLE001 - reported under "kernels"
            names = None
        if names == []:
            found.append(f"ASSAY_ISA={isa!r} names no tier that this CPU runs: every kernel call will fail")
    return found


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


def _text(report: dict[str, Any]) -> str:
    """The report as text; a section that failed says why in its place."""
    writers: dict[str, Callable[[Any], list[str]]] = {
        "assay": lambda s: [f"{s['version']}, built by {s['compiler']}, Python {s['python']}"],
        "machine": _machine_text,
        "isa_tiers": lambda rows: [
            f"{t['isa']:<12} {t['features']:<28} "
            + ("used" if t["allowed"] else "supported, not in use" if t["supported"] else "not on this CPU")
            for t in rows
        ],
        "kernels": _kernels_text,
        "threads": _threads_text,
        "libraries": lambda s: [", ".join(f"{name} {v or '-'}" for name, v in s.items())],
        "gpu": lambda s: [
            *(f"cuda:{d['ordinal']} {d['name']}, compute capability {d['capability'][0]}.{d['capability'][1]}, "
              f"{d['sms']} multiprocessors, {_bytes(d['memory_bytes'])}, L2 {_bytes(d['l2_bytes'])}" for d in s.get("devices", [])),
            s["why"],
        ],
        "environment": lambda s: [
            *(f"{name}={v['value'] if v['value'] is not None else '(not set)'}: {v['meaning']}"
              for name, v in s["understood"].items()),
            *(f"warning: {line}" for line in s["warnings"]),
        ],
    }  # fmt: skip
    lines = []
    for name, write in writers.items():
        section = report[name]
        broken = isinstance(section, dict) and set(section) == {"error"}
        body = [f"not available: {section['error']}"] if broken else write(section)
        lines += [name.replace("_", " "), *(f"  {line}" for line in body)]
    return "\n".join(lines)


def _machine_text(s: dict[str, Any]) -> list[str]:
    caches = ", ".join(f"{k[:-6].upper()} {_bytes(s[k])}" for k in ("l1d_bytes", "l2_bytes", "l3_bytes"))
    kind = {True: "virtual machine", False: "bare metal", None: "unknown"}[s["virtual"]]
    return [
        f"{s['cpu']} ({s['cpu_id']}), {s['architecture']}, {kind}",
        f"{s['cores']} cores, {s['usable_cores']} usable, {s['numa_nodes'] or '?'} NUMA node(s); caches: {caches}",
        f"memory {_bytes(s['memory_bytes'])}, {_bytes(s['memory_available_bytes'])} available",
        f"{s['os']}; fingerprint {s['fingerprint']}",
    ]


def _kernels_text(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        states = []
        for row in (r for r in rows if r["op"] == op):
            if row["selected"]:
                states.append(f"[{row['isa']}]")
            elif row["compiled"] and row["supported"]:
                states.append(row["isa"])
            else:
                states.append(f"{row['isa']} ({'not on this CPU' if row['compiled'] else 'not compiled'})")
        lines.append(f"{op:<12} {'  '.join(states)}")
    return [*lines, "[selected]"]


def _threads_text(s: dict[str, Any]) -> list[str]:
    quota = "none" if s["cgroup_quota"] is None else f"{s['cgroup_quota']:.3g} CPUs"
    lines = [f"{s['used']} used by default ({s['cores']} cores, affinity {s['affinity']}, cgroup quota {quota})"]
    if s["dispatch_s"] is not None:
        lines.append(f"dispatch to all of them: {1e6 * s['dispatch_s']:.2f} us")
    return lines
