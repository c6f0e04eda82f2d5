"""What one kernel call costs: the fitted laws on the measured roofs, with an interval and what it rests on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from assay.cost.laws import (
    MATRIX_SIZES,
    GemmClass,
    LinearClass,
    OpFit,
    Params,
    SequenceClass,
    group_class,
    linear_bytes,
    linear_features,
    linear_sizes,
    packed_bytes,
    product_of,
)
from assay.cost.roofline import Estimate, Estimates, FloatArray, from_roofs, shares, smooth_max
from assay.cost.roofs import COMPUTE_ROOF, Roofs, memory_roof_name, roof_of
from assay.errors import ProfileError
from assay.profile import GEMM_OPS, MATRIX_OPS, Roof, Sample

if TYPE_CHECKING:
    from assay.cost.tabled import Tables
    from assay.foreign import StoredTable

RANGE_SLACK = 2.0  # N * K may leave the calibrated range by this factor before a prediction is called extrapolated
# package.kernels may name the kernel file instead of the op.
KERNEL_OF_OP = {
    "w4a8_gemm": "int4_gemm",
    "w4a16_gemm": "int4_gemm",
    "w8a8_gemm": "int8_gemm",
    "w4a16_gemv": "int4_gemm",
    "moe_experts": "int4_gemm",
    "chain_verify": "spec_verify",
}


@dataclass(frozen=True)
class CostModel:
    """What a profile knows about kernels: fitted laws by op, roofs, which variant runs when none is named, and how far
    predictions of points outside the fits were off (as `assay.cost.stored.summarise` returns it); and the tables that others
    measured, which price what they cover where the profile has no kernel of its own; and what calls of a step cost each other."""

    ops: Mapping[str, OpFit]
    roofs: Roofs
    kernels: Mapping[str, str] = field(default_factory=dict)
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    tables: "Tables | None" = None
    sequence: tuple[SequenceClass, ...] = ()
    working_set: float | None = None

    def reading(self, working_set: float) -> "CostModel":
        """The same for calls that read so many bytes over and over, part of which a cache may keep."""
        return replace(self, working_set=working_set)

    def table(self, op: str, precision: str) -> "StoredTable | None":
        """The imported table that prices an op of `assay.tables.SIZES` in a precision, or None."""
        return None if self.tables is None else self.tables.find(op, precision)

    def calibrated(self, op: str) -> bool:
        """Whether a fitted law stands behind ``op``."""
        return op in self.ops

    def between_calls(self, threads: int) -> Estimate | None:
        """What each call of a step costs beyond itself alone; None where that was not measured."""
        if not self.sequence:
            return None
        found = min(self.sequence, key=lambda c: abs(math.log(c.threads / threads)))
        low, time, high = max(found.seconds - found.half_s, 0.0), found.seconds, found.seconds + found.half_s
        near = found.threads == threads
        note = f"calls of a step were timed at {found.threads} threads, not {threads}"
        return Estimate(time, low, high, 0.0, 0.0, time, "overhead", "measured", near, () if near else (note,))

    def threads(self) -> tuple[int, ...]:
        """Thread counts at which any op was calibrated; those of the memory roof when none was."""
        counts = {c.threads for fit in self.ops.values() for c in fit.classes}
        return tuple(sorted(counts)) or self.roofs.threads("dram_read")

    def kernel_time(self, op: str, params: Params, threads: int, variant: str | None = None) -> Estimate:
        """Predicted time of one call.

        Parameters
        ----------
        op
            One of `MATRIX_OPS`, "moe_route" or "chain_verify".
        params
            As in a profile's samples: gemm ``m, n, k`` (``group_size`` 32 and ``symmetric`` True when left out),
            moe_experts ``tokens, top_k, distinct_experts, hidden_size, intermediate_size`` and those two,
            moe_route ``tokens, num_experts, top_k``, chain_verify ``batch, num_draft, vocab, rule``.
        threads
            Threads of the call; the nearest calibrated count stands in for one that is not, and is flagged.

        Raises
        ------
        ProfileError
            The profile has no samples of ``op``.
        ValueError
            A size that is not a finite number above 0.
        """
        return self.kernel_times(op, params, threads, variant).at(0)

    def kernel_times(self, op: str, params: Params, threads: int, variant: str | None = None) -> Estimates:
        """`kernel_time` of many calls at once: any size in ``params`` may be an array, and they broadcast."""
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        if op not in self.ops:
            raise ProfileError(f"$.samples: expected samples of {op}, got {', '.join(self.ops) or 'none'}")
        defaults: dict[str, Any] = {"group_size": 32, "symmetric": True} if op in MATRIX_OPS else {"rule": "greedy"}
        full = defaults | dict(params)
        for name in MATRIX_SIZES.get(op) or linear_sizes(op):
            values = np.asarray(full[name], dtype=np.float64)
            low = 0.0 if name != "num_draft" else -1.0
            if not np.all(np.isfinite(values)) or np.any(values <= low):
                raise ValueError(f"{name}: expected finite numbers above {low:g}, got {full[name]!r}")
        return self._times(op, full, threads, variant, None)

    def sample_time(self, sample: Sample, *, near: bool = True) -> float:
        """Predicted seconds of a sample's call; with ``near``, on the roofs that were measured next to it."""
        times = self._times(sample.op, sample.params, sample.threads, sample.variant, sample if near else None)
        return float(times.time_s[0])

    def roof_times(
        self, moved_bytes: npt.ArrayLike, ops: npt.ArrayLike, threads: int, *, compute: str, note: str
    ) -> Estimates:
        """Price calls without a calibrated kernel on the roofs, at the utilisations that the INT4 kernel reaches.

        ``compute`` names the compute roof; where the int8 one is of tiles (there is an ``int8_vector_peak``), its utilisation is
        that of a kernel under the same roof. Without a fit: 80% of memory, 60% of compute, the fractions that
        well-tuned kernels reach (AIConfigurator, BLIS); either way the interval spans from the roof to twice the time.
        """
        memory_utilisation, compute_utilisation, overhead, p = 0.8, 0.6, 5e-6, 4.0
        fit = next((self.ops[op] for op in GEMM_OPS if op in self.ops), None)
        if fit is not None:
            chosen = self._pick(fit, threads, None, group=32)
            assert isinstance(chosen, GemmClass)
            memory_utilisation = float(np.clip(chosen.memory_utilisation, 0.2, 1.0))
            overhead, p = chosen.overhead_s, chosen.p
            # Of the widest product: at narrow ones memory hides what the arithmetic could reach. Of a kernel under the same roof
            # where int8 products have tiles: what they reach of theirs says nothing of vector instructions.
            if "int8_vector_peak" in self.roofs:
                fit = next((self.ops[op] for op in GEMM_OPS if op in self.ops and COMPUTE_ROOF[op] == compute), None)
                chosen = None if fit is None else self._pick(fit, threads, None, group=32)
            if chosen is not None:
                compute_utilisation = float(np.clip(chosen.compute_utilisation(chosen.m[-1]), 0.05, 1.0))
        gain, _ = self._reuse(threads)
        return from_roofs(
            moved_bytes,
            ops,
            bytes_per_s=gain * self.roofs.get("dram_read", threads).median,
            ops_per_s=self.roofs.get(compute, threads).median,
            memory_utilisation=memory_utilisation,
            compute_utilisation=compute_utilisation,
            overhead_s=overhead,
            p=p,
            notes=(note,),
        )

    def _reuse(self, threads: int) -> tuple[float, Roof]:
        if self.working_set is None:
            return 1.0, self.roofs.get("dram_read", threads)
        return self.roofs.reuse(self.working_set, threads)

    def _pick(
        self, fit: OpFit, threads: int, variant: str | None, *, group: int = 0, symmetric: bool = True,
        resident: str = "dram", rule: str = ""
    ) -> Any:  # fmt: skip
        """The class nearest to what is asked: variant first, then where the weights lie or the rule, threads, symmetry, group size."""
        wanted = variant or self.kernels.get(fit.op) or self.kernels.get(KERNEL_OF_OP.get(fit.op, ""))
        if wanted not in {c.variant for c in fit.classes}:
            counts: dict[str, int] = {}
            for c in fit.classes:
                counts[c.variant] = counts.get(c.variant, 0) + c.num_samples
            wanted = max(sorted(counts), key=counts.__getitem__)

        def distance(c: GemmClass | LinearClass) -> tuple[Any, ...]:
            ratio = abs(math.log(c.threads / threads))
            if isinstance(c, GemmClass):
                # The whole row is further from any group than groups are from one another.
                far = 10.0 if (c.group_size < 0) != (group < 0) else abs(math.log(max(c.group_size, 1) / max(group, 1)))
                return c.variant != wanted, c.resident != resident, ratio, c.threads, c.symmetric != symmetric, far
            return c.variant != wanted, c.rule != rule, ratio, c.threads

        return min(fit.classes, key=distance)

    def _times(self, op: str, params: Params, threads: int, variant: str | None, near: Sample | None) -> Estimates:
        if op in MATRIX_OPS:
            return self._matrix_times(op, params, threads, variant, near)
        return self._linear_times(op, params, threads, variant)

    def _matrix_times(
        self, op: str, params: Params, threads: int, variant: str | None, near: Sample | None
    ) -> Estimates:
        fit = self.ops[op]
        group, symmetric = group_class(params), bool(params["symmetric"])
        resident = str(params.get("resident", "dram"))
        chosen = self._pick(fit, threads, variant, group=group, symmetric=symmetric, resident=resident)
        assert isinstance(chosen, GemmClass)
        product = product_of(op, params)
        memory_roof, gain = self.roofs.get(memory_roof_name(params), threads), 1.0
        memory_drift = self.roofs.drift(memory_roof)
        if resident == "dram" and near is None:
            gain, kept = self._reuse(threads)
            memory_drift = max(memory_drift, self.roofs.drift(kept)) if gain > 1.0 else memory_drift
        compute_roof = self.roofs.get(COMPUTE_ROOF[op], threads)
        if near is not None:
            moved: FloatArray = np.array([near.bytes])
            bytes_per_s = roof_of(near, memory_roof_name(params), self.roofs)
            ops_per_s = roof_of(near, COMPUTE_ROOF[op], self.roofs)
        else:
            weight_bytes = packed_bytes(chosen, group, symmetric, product.reduced)
            moved = weight_bytes * product.weights + product.activation_bytes
            bytes_per_s, ops_per_s = memory_roof.median, compute_roof.median
        from_dram = moved / (bytes_per_s * chosen.memory_utilisation)
        memory = from_dram / gain
        compute = 2.0 * product.weights * chosen.rows(product.rows) / ops_per_s
        time = chosen.overhead_s + smooth_max(memory, compute, chosen.p)
        memory_s, compute_s = shares(memory, compute, time, chosen.overhead_s, chosen.p)
        notes: list[tuple[str, npt.NDArray[np.bool_]]] = []
        widen = np.zeros(time.shape)
        everywhere = np.ones(time.shape, dtype=bool)
        for differs, text in (
            (chosen.threads != threads, f"{op} was calibrated at {chosen.threads} threads, not {threads}"),
            (
                chosen.group_size != group,
                f"{op} was calibrated at group size {_group_text(chosen.group_size)}, not {_group_text(group)}",
            ),
            (chosen.resident != resident, f"{op} was calibrated with weights from {chosen.resident}, not {resident}"),
            (chosen.symmetric != symmetric, f"{op} was calibrated {'' if chosen.symmetric else 'a'}symmetric only"),
            (
                variant is not None and chosen.variant != variant,
                f"{op} was calibrated as {chosen.variant}, not {variant}",
            ),
        ):
            if differs:
                notes.append((text, everywhere))
                widen += math.log(1.25)
        for value, low, high, text in (
            (
                product.rows,
                chosen.m[0],
                chosen.m[-1],
                f"M outside the calibrated {chosen.m[0]:g} to {chosen.m[-1]:g} of {op}",
            ),
            (
                product.weights,
                chosen.nk_low / RANGE_SLACK,
                chosen.nk_high * RANGE_SLACK,
                f"N*K outside the calibrated {chosen.nk_low:.3g} to {chosen.nk_high:.3g} of {op}",
            ),
        ):
            beyond = np.maximum(np.log(np.maximum(low / value, value / high)), 0.0)
            outside = beyond > 1e-9
            if outside.any():
                notes.append((text, outside))
                widen = widen + 0.1 * beyond  # a judgement, not a measurement: 7% more each factor of two beyond
        body = np.maximum(time, np.finfo(np.float64).tiny)
        half = np.sqrt(
            (fit.half_width_log + widen) ** 2
            + (memory_drift * memory_s / body) ** 2
            + (self.roofs.drift(compute_roof) * compute_s / body) ** 2
        )
        # Who else uses the cache may take what it keeps of these weights: the slow end is that of all from DRAM.
        slowest = chosen.overhead_s + smooth_max(from_dram, compute, chosen.p)
        return _estimates(
            time,
            half,
            slowest=slowest,
            memory_s=memory_s,
            compute_s=compute_s,
            overhead_s=np.full(time.shape, chosen.overhead_s),
            notes=notes,
        )

    def _linear_times(self, op: str, params: Params, threads: int, variant: str | None) -> Estimates:
        fit = self.ops[op]
        rule = str(params.get("rule", "")) if op == "chain_verify" else ""
        chosen = self._pick(fit, threads, variant, rule=rule)
        assert isinstance(chosen, LinearClass)
        features = linear_features(op, {**params, "rule": chosen.rule})
        time, overhead = chosen.times(features)
        body = time - overhead
        moved = linear_bytes(op, {**params, "rule": chosen.rule})
        memory_s = np.minimum(body, moved / self.roofs.get("dram_read", threads).median)
        notes: list[tuple[str, npt.NDArray[np.bool_]]] = []
        widen = np.zeros(time.shape)
        everywhere = np.ones(time.shape, dtype=bool)
        for differs, text in (
            (chosen.threads != threads, f"{op} was calibrated at {chosen.threads} threads, not {threads}"),
            (chosen.rule != rule, f"{op} was calibrated with the rule {chosen.rule}, not {rule}"),
            (
                variant is not None and chosen.variant != variant,
                f"{op} was calibrated as {chosen.variant}, not {variant}",
            ),
        ):
            if differs:
                notes.append((text, everywhere))
                widen += math.log(1.25)
        for name, (low, high) in chosen.ranges.items():
            if name not in params:
                continue
            value = np.broadcast_to(np.asarray(params[name], dtype=np.float64), time.shape)
            above = np.log(np.maximum(value, 1e-9) / (max(high, 1e-9) * RANGE_SLACK))
            below = np.log(max(low, 1e-9) / RANGE_SLACK / np.maximum(value, 1e-9))
            beyond = np.maximum(np.maximum(above, below), 0.0) if name != "num_draft" else np.maximum(above, 0.0)
            outside = beyond > 1e-9
            if outside.any():
                notes.append((f"{name} outside the calibrated {low:g} to {high:g} of {op}", outside))
                widen = widen + 0.1 * beyond
        return _estimates(
            time,
            fit.half_width_log + widen,
            memory_s=memory_s,
            compute_s=body - memory_s,
            overhead_s=overhead,
            notes=notes,
        )


def _group_text(group: int) -> str:
    return "whole row" if group < 0 else str(group)


def _estimates(
    time: FloatArray,
    half: FloatArray,
    *,
    slowest: FloatArray | None = None,
    memory_s: FloatArray,
    compute_s: FloatArray,
    overhead_s: FloatArray,
    notes: list[tuple[str, npt.NDArray[np.bool_]]],
) -> Estimates:
    outside = np.zeros(time.shape, dtype=bool)
    for _, where in notes:
        outside |= where
    return Estimates(
        time_s=time,
        low_s=time * np.exp(-half),
        high_s=(time if slowest is None else slowest) * np.exp(half),
        memory_s=memory_s,
        compute_s=compute_s,
        overhead_s=overhead_s,
        basis="measured",
        in_range=~outside,
        notes=tuple(notes),
    )
