"""The law of one kernel: fixed overhead plus a smooth maximum of a memory term and a compute term.

``t = t0 + (t_mem^p + t_cmp^p)^(1/p)``. At ``p = inf`` this is the roofline of Williams et al. (CACM 2009); real
kernels overlap loads and arithmetic imperfectly, and near the ridge they are slower than either roof: ``p`` says by
how much (2^(1/p) at the ridge itself).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BOUNDS = ("memory", "compute", "overhead")


def smooth_max(a: npt.ArrayLike, b: npt.ArrayLike, p: npt.ArrayLike) -> FloatArray:
    """``(a^p + b^p)^(1/p)`` of non-negative arrays, without overflow: between max(a, b) and 2^(1/p) of it."""
    high = np.maximum(a, b)
    low = np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros(np.shape(high)), where=np.asarray(high) > 0)
    return np.asarray(high * (1.0 + ratio ** np.asarray(p)) ** (1.0 / np.asarray(p)), dtype=np.float64)


def shares(
    memory_s: npt.ArrayLike,
    compute_s: npt.ArrayLike,
    time_s: npt.ArrayLike,
    overhead_s: npt.ArrayLike,
    p: npt.ArrayLike,
) -> tuple[FloatArray, FloatArray]:
    """Split ``time_s - overhead_s`` into the parts that memory and compute answer for.

    The split is that of the smooth maximum: ``t_mem^p : t_cmp^p``, so far from the ridge the larger term gets all.
    """
    memory = np.asarray(memory_s, dtype=np.float64)
    compute = np.asarray(compute_s, dtype=np.float64)
    high = np.maximum(np.maximum(memory, compute), np.finfo(np.float64).tiny)
    weight_memory = (memory / high) ** np.asarray(p)
    weight_compute = (compute / high) ** np.asarray(p)
    total = np.maximum(weight_memory + weight_compute, np.finfo(np.float64).tiny)
    body = np.asarray(time_s) - np.asarray(overhead_s)
    return body * weight_memory / total, body * weight_compute / total


@dataclass(frozen=True)
class Estimate:
    """The predicted time of one kernel call, in seconds, and where it comes from.

    Attributes
    ----------
    time_s, low_s, high_s
        The estimate and its 90% interval; ``0 < low_s <= time_s <= high_s``.
    memory_s, compute_s, overhead_s
        The parts of ``time_s`` that each answers for; they add up to it.
    bound
        The largest part: "memory", "compute" or "overhead".
    basis
        "measured" when a fitted kernel stands behind it, "roof" when only measured ceilings do.
    in_range
        False when the question lies outside what was calibrated; ``notes`` say in what.
    """

    time_s: float
    low_s: float
    high_s: float
    memory_s: float
    compute_s: float
    overhead_s: float
    bound: str
    basis: str
    in_range: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimates:
    """Many estimates at once: the fields of `Estimate` as arrays of one shape, with notes by index of the call."""

    time_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    memory_s: FloatArray
    compute_s: FloatArray
    overhead_s: FloatArray
    basis: str
    in_range: npt.NDArray[np.bool_]
    notes: tuple[tuple[str, npt.NDArray[np.bool_]], ...] = ()

    def __len__(self) -> int:
        return int(self.time_s.size)

    def at(self, index: int) -> Estimate:
        """The estimate at a flat index."""
        parts = (
            float(self.memory_s.flat[index]),
            float(self.compute_s.flat[index]),
            float(self.overhead_s.flat[index]),
        )
        return Estimate(
            float(self.time_s.flat[index]),
            float(self.low_s.flat[index]),
            float(self.high_s.flat[index]),
            *parts,
            bound=largest(*parts),
            basis=self.basis,
            in_range=bool(self.in_range.flat[index]),
            notes=tuple(text for text, where in self.notes if where.flat[index]),
        )


def largest(memory_s: float, compute_s: float, overhead_s: float) -> str:
    """Which of the three parts is the largest; on a tie the first of memory, compute, overhead."""
    parts = (memory_s, compute_s, overhead_s)
    return BOUNDS[parts.index(max(parts))]


def from_roofs(
    moved_bytes: npt.ArrayLike,
    ops: npt.ArrayLike,
    *,
    bytes_per_s: float,
    ops_per_s: float,
    memory_utilisation: float,
    compute_utilisation: float,
    overhead_s: float,
    p: float,
    notes: tuple[str, ...] = (),
) -> Estimates:
    """Price calls for which no kernel was measured, on measured ceilings and borrowed utilisations.

    The interval is wide on purpose: from both roofs at 100% with no overhead, to twice the estimate.
    """
    moved = np.atleast_1d(np.asarray(moved_bytes, dtype=np.float64))
    work = np.atleast_1d(np.asarray(ops, dtype=np.float64))
    memory = moved / (bytes_per_s * memory_utilisation)
    compute = work / (ops_per_s * compute_utilisation)
    time = overhead_s + smooth_max(memory, compute, p)
    ideal = np.maximum(moved / bytes_per_s, work / ops_per_s)
    share_memory, share_compute = shares(memory, compute, time, overhead_s, p)
    everywhere = np.ones(time.shape, dtype=bool)
    return Estimates(
        time_s=time,
        low_s=np.minimum(ideal, time),
        high_s=2.0 * time,
        memory_s=share_memory,
        compute_s=share_compute,
        overhead_s=np.full(time.shape, overhead_s),
        basis="roof",
        in_range=everywhere,
        notes=tuple((note, everywhere) for note in notes),
    )
