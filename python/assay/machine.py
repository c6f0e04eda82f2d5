"""What is here: processor, caches, memory, limits. Nothing is assumed to be readable: what cannot be found is None."""

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_SYSTEM_CPU = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """A description that two runs on the same kind of machine share; sizes in bytes, None where unknown."""

    cpu: str
    architecture: str
    cpu_id: str | None
    isa: tuple[str, ...]
    cores: int
    usable_cores: int
    memory_bytes: int | None
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    numa_nodes: int | None
    virtual: bool | None
    os: str

    def fingerprint(self) -> str:
        """Hash of what decides kernel times: processor, tiers, cores, caches, memory to the nearest power of two."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("memory_bytes", "os", "numa_nodes", "virtual")}
        kept["memory"] = None if self.memory_bytes is None else round(self.memory_bytes / 2**30).bit_length()
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def last_level_cache_bytes(self) -> int:
        """The largest known cache; 32 MiB when none is known."""
        return max((c for c in (self.l1d_bytes, self.l2_bytes, self.l3_bytes) if c), default=32 << 20)


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """First processor's entry of /proc/cpuinfo."""
    entries: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            entries.setdefault(key.strip(), value.strip())
    return entries


def _size(text: str | None) -> int | None:
    """Bytes of a sysfs size such as "32768K"."""
    if not text:
        return None
    text = text.strip()
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * scale if digits.isdigit() else None


def _caches() -> dict[str, int | None]:
    """Data and unified caches that the first core sees, by level."""
    sizes: dict[str, int | None] = {"1": None, "2": None, "3": None}
    try:
        indexes = sorted(_SYSTEM_CPU.glob("index*"))
    except OSError:
        indexes = []
    for index in indexes:
        level = (_read(index / "level") or "").strip()
        kind = (_read(index / "type") or "").strip()
        if level in sizes and kind in ("Data", "Unified"):
            sizes[level] = _size(_read(index / "size"))
    return sizes


def affinity_count() -> int | None:
    """CPUs that the affinity mask leaves this process; None where masks do not exist."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return None


def memory_bytes(key: str = "MemTotal") -> int | None:
    """A line of /proc/meminfo ("MemTotal", "MemAvailable"), in bytes."""
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _numa_nodes() -> int | None:
    try:
        found = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    except OSError:
        return None
    return len(found) or None


def describe(isa: tuple[str, ...] = ()) -> Machine:
    """The machine that this process runs on; `isa` are the tiers that its kernels support."""
    info = _cpuinfo()
    caches = _caches()
    words = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    identity = "/".join(info[word] for word in words if word in info)
    flags = info.get("flags") or info.get("Features")
    cores = os.cpu_count() or 1
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine() or "unknown",
        architecture=platform.machine() or "unknown",
        cpu_id=identity or None,
        isa=isa,
        cores=cores,
        usable_cores=affinity_count() or cores,
        memory_bytes=memory_bytes(),
        l1d_bytes=caches["1"],
        l2_bytes=caches["2"],
        l3_bytes=caches["3"],
        numa_nodes=_numa_nodes(),
        virtual=None if flags is None else "hypervisor" in flags.split(),
        os=f"{platform.system()} {platform.release()}, Python {sys.version.split()[0]}",
    )
