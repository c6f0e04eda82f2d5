"""The fits and accuracy that a profile stores (docs/profile-format.md): made, written as JSON values, read again."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from assay.cost.fit import fit_profile
from assay.cost.kernel_model import CostModel
from assay.cost.laws import LINEAR_TERMS, GemmClass, LinearClass, OpFit, SequenceClass
from assay.cost.roofs import Roofs
from assay.errors import ProfileError
from assay.profile import MATRIX_OPS, Profile

LAW = 2  # raised when the meaning of the stored numbers changes: older fits are then made anew


def summarise(profile: Profile) -> tuple[dict[str, Any], dict[str, Any]]:
    """``fits`` and ``accuracy`` as a profile stores them (docs/profile-format.md).

    Accuracy is counted on points outside the fit: the held-out ones, joined by leave-one-shape-out points where
    there are fewer than 8. Predictions use the roof measured next to each point when there is one, since the machine's
    drift between two moments is no error of the law; ``raw_median_ape`` is the error without that help. ``coverage`` is
    that of `assay.cost.fit.jackknife_coverage`: no point is judged by an interval that it helped to set.
    """
    model = fit_profile(profile)
    return model_to_json(model), dict(model.accuracy)


def load_model(profile: Profile) -> CostModel:
    """The model of a profile: its stored fits when they belong to its samples, else fitted now; and its tables."""
    model = _load(profile)
    if not profile.tables:
        return model
    from assay.cost.tabled import Tables

    tables = Tables(profile.tables)
    return replace(model, tables=tables, accuracy={**model.accuracy, **tables.accuracy()})


def _load(profile: Profile) -> CostModel:
    counts: dict[str, int] = {}
    for sample in profile.samples:
        counts[sample.op] = counts.get(sample.op, 0) + 1
    needed = {op for op in (*MATRIX_OPS, *LINEAR_TERMS) if any(s.op == op and not s.held_out for s in profile.samples)}
    needed |= {"sequence"} & counts.keys()
    current = all(
        isinstance(fit, dict) and fit.get("law") == LAW and fit.get("num_samples") == counts.get(op)
        for op, fit in profile.fits.items()
    )
    if profile.fits and current and needed == set(profile.fits) == set(profile.accuracy):
        return model_from_json(profile.fits, profile)
    return fit_profile(profile)


def model_to_json(model: CostModel) -> dict[str, Any]:
    """The fitted laws as JSON values; the roofs and kernels stay where they are in the profile."""
    found: dict[str, Any] = {op: _fit_to_json(fit) for op, fit in model.ops.items()}
    if model.sequence:
        found["sequence"] = {
            "law": LAW,
            "num_samples": sum(c.num_samples for c in model.sequence),
            "classes": [
                {"threads": c.threads, "seconds": c.seconds, "half_s": c.half_s, "num_samples": c.num_samples}
                for c in model.sequence
            ],
        }
    return found


def _fit_to_json(fit: OpFit) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for c in fit.classes:
        if isinstance(c, GemmClass):
            rows.append(
                {
                    "variant": c.variant,
                    "threads": c.threads,
                    "group_size": c.group_size,
                    "symmetric": c.symmetric,
                    "overhead_s": c.overhead_s,
                    "memory_utilisation": c.memory_utilisation,
                    "p": c.p,
                    "m": c.m.tolist(),
                    "compute_utilisation": c.compute_utilisation(c.m).tolist(),
                    "weight_bytes": c.weight_bytes,
                    "n_times_k": [c.nk_low, c.nk_high],
                    "num_samples": c.num_samples,
                }
                | ({} if c.resident == "dram" else {"resident": c.resident})
            )
        else:
            rows.append(
                {
                    "variant": c.variant,
                    "threads": c.threads,
                    "rule": c.rule,
                    "seconds_per": dict(zip(LINEAR_TERMS[fit.op], c.seconds, strict=False)),
                    "seconds_per_alone": c.alone and dict(zip(LINEAR_TERMS[fit.op], c.alone, strict=False)),
                    "ranges": {k: list(v) for k, v in c.ranges.items()},
                    "num_samples": c.num_samples,
                }
            )
    return {
        "law": LAW,
        "num_samples": fit.num_samples,
        "half_width_log": fit.half_width_log,
        "interval_from": fit.interval_from,
        "classes": rows,
    }


def model_from_json(fits: Mapping[str, Any], profile: Profile) -> CostModel:
    """The model that `model_to_json` wrote, with the roofs and kernels of ``profile``.

    Raises
    ------
    ProfileError
        A fit that `model_to_json` would not have written.
    """
    ops: dict[str, OpFit] = {}
    sequence: tuple[SequenceClass, ...] = ()
    for op, data in fits.items():
        try:
            if op == "sequence":
                sequence = tuple(_sequence_from_json(row) for row in data["classes"])
                continue
            read = _gemm_from_json if op in MATRIX_OPS else _linear_from_json
            ops[op] = OpFit(
                op,
                tuple(read(op, row) for row in data["classes"]),  # type: ignore[arg-type]
                _above_zero(data["half_width_log"]),
                str(data["interval_from"]),
                int(data["num_samples"]),
            )
            if not ops[op].classes:
                raise ValueError("no classes")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ProfileError(
                f"$.fits.{op}: expected a fit as assay writes it, got a broken one ({error!r})"
            ) from error
    return CostModel(
        ops,
        Roofs(profile.roofs, profile.settings.get("earlier", ())),
        dict(profile.package.get("kernels", {})),
        dict(profile.accuracy),
        sequence=sequence,
    )


def _sequence_from_json(row: Mapping[str, Any]) -> SequenceClass:
    seconds, half = float(row["seconds"]), float(row["half_s"])
    if not (math.isfinite(seconds) and math.isfinite(half) and seconds >= 0 and half >= 0):
        raise ValueError(f"seconds, half_s: expected finite numbers of at least 0, got {seconds!r}, {half!r}")
    return SequenceClass(int(_above_zero(row["threads"])), seconds, half, int(row["num_samples"]))


def _above_zero(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"expected a finite number above 0, got {value!r}")
    return number


def _gemm_from_json(op: str, row: Mapping[str, Any]) -> GemmClass:
    m = np.array([_above_zero(v) for v in row["m"]])
    utilisation = np.array([_above_zero(v) for v in row["compute_utilisation"]])
    if m.size == 0 or m.size != utilisation.size or np.any(np.diff(m) <= 0):
        raise ValueError(f"m: expected rising widths, one utilisation each, got {m.size} and {utilisation.size}")
    return GemmClass(
        variant=str(row["variant"]),
        threads=int(_above_zero(row["threads"])),
        group_size=int(row["group_size"]),
        symmetric=bool(row["symmetric"]),
        overhead_s=_above_zero(row["overhead_s"]),
        memory_utilisation=_above_zero(row["memory_utilisation"]),
        p=_above_zero(row["p"]),
        m=m,
        log_rows=np.maximum.accumulate(np.log(m / utilisation)),
        weight_bytes=_above_zero(row["weight_bytes"]),
        nk_low=_above_zero(row["n_times_k"][0]),
        nk_high=_above_zero(row["n_times_k"][1]),
        num_samples=int(row["num_samples"]),
        resident=str(row.get("resident", "dram")),
    )


def _linear_from_json(op: str, row: Mapping[str, Any]) -> LinearClass:
    wanted = len(LINEAR_TERMS[op]) - (op == "chain_verify" and row["rule"] != "rejection")

    def terms(name: str) -> tuple[float, ...]:
        seconds = tuple(float(row[name][term]) for term in LINEAR_TERMS[op] if term in row[name])
        if len(seconds) != wanted or not all(math.isfinite(s) and s >= 0 for s in seconds) or not any(seconds):
            raise ValueError(f"{name}: expected {wanted} finite seconds, got {row[name]!r}")
        return seconds

    return LinearClass(
        variant=str(row["variant"]),
        threads=int(_above_zero(row["threads"])),
        rule=str(row["rule"]),
        seconds=terms("seconds_per"),
        alone=None if row["seconds_per_alone"] is None else terms("seconds_per_alone"),
        ranges={str(k): (float(v[0]), float(v[1])) for k, v in row["ranges"].items()},
        num_samples=int(row["num_samples"]),
    )
