"""What a calibration found, as rows: the roofs, and each op against them."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from ..cost.laws import product_of
from ..cost.roofs import COMPUTE_ROOF, Roofs, memory_roof_name
from ..cost.stored import load_model
from ..profile import MATRIX_OPS, SET_ROOFS, Profile, Sample
from .points import Point

#: From this many rows a GEMM is measured against the int8 (w4a16: float32) peak, below it against DRAM.
COMPUTE_ROWS = 32
#: What an op's errors on points outside the fit are held to; repeats that differ by more allow this many times their spread.
MEDIAN_ERROR, P90_ERROR, REPEATS = 0.05, 0.15, 1.5


def roof_rows(profile: Profile) -> list[dict[str, Any]]:
    """One row a roof and number of threads: name, threads, median, spread, unit."""
    rows = [
        {"roof": r.name, "threads": r.threads, "median": r.median, "unit": r.unit, "spread": r.spread}
        for r in profile.roofs
    ]
    # Sets of bytes by their size, not by their names.
    return sorted(rows, key=lambda row: (SET_ROOFS.get(str(row["roof"]), 0), str(row["roof"]), row["threads"]))


def point_roof(op: str, params: Mapping[str, Any], moved_bytes: float, ops: float) -> tuple[str, float]:
    """The roof that a point is held against, and its work in that roof's unit.

    A GEMM of `COMPUTE_ROWS` rows and more (experts: rows each): the int8 (w4a16: float32) peak, of fewer: DRAM, or the cache
    that its weights lie in. Routing: the cache, in which its logits lie. Verification: DRAM.
    """
    if op in MATRIX_OPS:
        if product_of(op, params).rows[0] >= COMPUTE_ROWS:
            return COMPUTE_ROOF[op], ops
        return memory_roof_name(params), moved_bytes
    return ("llc_read" if op == "moe_route" else "dram_read"), moved_bytes


def roof_fraction(profile: Profile, sample: Sample) -> tuple[str, float] | None:
    """The roof that a sample is held against, and the fraction of it that was reached.

    Where the roof was read beside the sample that reading counts: machines drift.
    """
    name, work = point_roof(sample.op, sample.params, sample.bytes, sample.ops)
    name = Roofs(profile.roofs).named(name)
    near = (sample.roof_near or {}).get(name)
    roof = profile.roof(name, sample.threads)
    ceiling = near or (roof.median if roof else None)
    return (name, work / sample.median_s / ceiling) if ceiling else None


def verdict(profile: Profile) -> tuple[list[str], list[str]]:
    """Ops whose errors on points outside the fit are as small as wanted, and those whose are not."""
    met: list[str] = []
    missed: list[str] = []
    for op, row in profile.accuracy.items():
        if not row.get("n") or op == "sequence":
            continue
        allowed = REPEATS * row.get("repeat_spread", 0.0)
        good = row["median_ape"] <= max(MEDIAN_ERROR, allowed) and row["p90_ape"] <= max(P90_ERROR, allowed)
        (met if good else missed).append(op)
    return met, missed


def moved_between_runs(profile: Profile) -> float | None:
    """The largest change of a memory or compute roof against an earlier run's; None without any."""
    now = {f"{r.name}@{r.threads}": r.median for r in profile.roofs if r.unit != "s"}
    changes = [
        abs(math.log(run["roofs"][key] / median))
        for run in profile.settings.get("earlier", ())
        for key, median in now.items()
        if key in run["roofs"]
    ]
    return math.expm1(max(changes)) if changes else None


def point_rows(profile: Profile) -> list[dict[str, Any]]:
    """One row a sample: what was measured, and what the profile's model says on the roofs measured beside it.

    ``error`` is predicted / measured - 1, ``inside`` whether the measured time lies in the 90% interval; None, as
    ``predicted_s``, of an op without a fit.
    """
    model = load_model(profile)
    rows = []
    for sample in profile.samples:
        point = Point(sample.op, sample.threads, dict(sample.params))
        found = roof_fraction(profile, sample)
        row: dict[str, Any] = {
            "op": sample.op, "label": point.label, "threads": sample.threads, "held_out": sample.held_out,
            "params": dict(sample.params), "measured_s": sample.median_s, "spread": sample.spread,
            "ops_per_byte": sample.ops / sample.bytes, "ops_per_s": sample.ops / sample.median_s,
            "roof": found[0] if found else None, "of_roof": found[1] if found else None,
            "predicted_s": None, "error": None, "inside": None,
        }  # fmt: skip
        if model.calibrated(sample.op):
            predicted = model.sample_time(sample)
            error = predicted / sample.median_s - 1.0
            inside = abs(math.log1p(error)) <= model.ops[sample.op].half_width_log
            row |= {"predicted_s": predicted, "error": error, "inside": inside}
        rows.append(row)
    return rows


def op_rows(profile: Profile) -> list[dict[str, Any]]:
    """One row an op, number of threads and roof: points, times, spread, fraction of the roof, held-out error.

    ``best_of_roof`` and ``median_of_roof`` are fractions. The error columns are of the op at all thread counts, on points
    that the fit never saw; None where nothing was fitted.
    """
    groups: dict[tuple[str, int, str], list[tuple[Sample, float | None]]] = {}
    for sample in profile.samples:
        found = roof_fraction(profile, sample)
        key = (sample.op, sample.threads, found[0] if found else "-")
        groups.setdefault(key, []).append((sample, found[1] if found else None))
    rows = []
    for (op, threads, roof), members in sorted(groups.items()):
        fractions = [f for _, f in members if f is not None]
        accuracy = profile.accuracy.get(op, {})
        rows.append(
            {
                "op": op,
                "threads": threads,
                "points": len(members),
                "fastest_s": min(s.median_s for s, _ in members),
                "slowest_s": max(s.median_s for s, _ in members),
                "spread": statistics.median(s.spread for s, _ in members),
                "roof": roof,
                "best_of_roof": max(fractions, default=None),
                "median_of_roof": statistics.median(fractions) if fractions else None,
                "held_out_points": accuracy.get("n"),
                "held_out_median_ape": accuracy.get("median_ape"),
                "held_out_p90_ape": accuracy.get("p90_ape"),
                "held_out_bias": accuracy.get("bias"),
                "coverage": accuracy.get("coverage"),
            }
        )
    return rows
