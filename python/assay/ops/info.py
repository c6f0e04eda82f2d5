"""What the compiled module is and can do here."""

from typing import TypedDict

from .._ffi import ISA_NAMES, ffi, lib, refresh_isa


class Variant(TypedDict):
    """A kernel variant of csrc/variants.inc."""

    op: str
    isa: str
    compiled: bool
    supported: bool
    selected: bool


class Tier(TypedDict):
    """An instruction-set tier of csrc/isa.inc."""

    isa: str
    features: str
    supported: bool
    allowed: bool


def variants() -> list[Variant]:
    """Every kernel variant: in this build, runnable on this CPU, and the one that calls pick; best first within an op."""
    op, isa = ffi.new("char **"), ffi.new("char **")
    flags = [ffi.new("int *") for _ in range(3)]
    rows: list[Variant] = []
    for i in range(lib.assay_variant_count()):
        lib.assay_variant_info(i, op, isa, *flags)
        compiled, supported, selected = (bool(flag[0]) for flag in flags)
        rows.append(
            {"op": ffi.string(op[0]).decode(), "isa": ffi.string(isa[0]).decode(), "compiled": compiled,
             "supported": supported, "selected": selected}
        )  # fmt: skip
    return rows


def isa_tiers() -> list[Tier]:
    """Every instruction-set tier, rising; `allowed` is what the CPU has and ASSAY_ISA leaves."""
    name, features = ffi.new("char **"), ffi.new("char **")
    supported, allowed = ffi.new("int *"), ffi.new("int *")
    rows: list[Tier] = []
    for i in range(len(ISA_NAMES)):
        lib.assay_isa_info(i, name, features, supported, allowed)
        rows.append({"isa": ISA_NAMES[i], "features": ffi.string(features[0]).decode(),
                     "supported": bool(supported[0]), "allowed": bool(allowed[0])})  # fmt: skip
    return rows


def kernel_versions() -> dict[str, str]:
    """The variant that each op picks here: {"int4_gemm": "avx2", ...}."""
    return {v["op"]: v["isa"] for v in variants() if v["selected"]}


def num_threads() -> int:
    """Threads that a call uses when it names none."""
    return int(lib.assay_num_threads())


def cgroup_quota() -> float | None:
    """CPUs' worth of time that the control groups grant this process; None without a limit."""
    return float(lib.assay_cgroup_quota()) or None


def compiler() -> str:
    """The compiler that built the kernels."""
    return str(ffi.string(lib.assay_compiler()).decode())


__all__ = [
    "Tier",
    "Variant",
    "cgroup_quota",
    "compiler",
    "isa_tiers",
    "kernel_versions",
    "num_threads",
    "refresh_isa",
    "variants",
]
