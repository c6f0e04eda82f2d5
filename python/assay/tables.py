"""Measured kernel calls as columns: what the importers make of foreign files, and what `assay.cost.device` fits.

One `KernelTable` holds points of one op, in one number format, of one kernel variant, on one system. Sizes are float64
columns named as in `SIZES`; times are seconds, power is watts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Sizes of a point by op: name -> smallest value allowed.
SIZES: Mapping[str, Mapping[str, float]] = {
    "gemm": {"m": 1, "n": 1, "k": 1},
    "moe": {
        "tokens": 1,
        "hidden": 1,
        "inter": 1,
        "top_k": 1,
        "num_experts": 1,
        "tp": 1,
        "ep": 1,
        "alpha": 0,
        "matrices": 2,
    },
    "context_attention": {
        "batch": 1,
        "isl": 1,
        "past": 0,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 1,
        "window": 0,
    },
    "generation_attention": {
        "batch": 1,
        "kv_len": 1,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 1,
        "window": 0,
    },
    "allreduce": {"bytes": 1, "ranks": 1},
    "all_gather": {"bytes": 1, "ranks": 1},
    "reduce_scatter": {"bytes": 1, "ranks": 1},
    "alltoall": {"bytes": 1, "ranks": 1},
}


@dataclass(frozen=True)
class NumberFormat:
    """Bytes of one number of a weight (or KV cache entry), of an activation, and of a result."""

    weight_bytes: float
    activation_bytes: float
    result_bytes: float = 2.0


#: Number formats by the names that tables use. Block formats carry their scales: MXFP4 one byte for 32 values (OCP MX
#: 1.0), NVFP4 one for 16, INT4 two for 128.
FORMATS: Mapping[str, NumberFormat] = {
    "float32": NumberFormat(4.0, 4.0, 4.0),
    "bfloat16": NumberFormat(2.0, 2.0),
    "float16": NumberFormat(2.0, 2.0),
    "half": NumberFormat(2.0, 2.0),
    "fp8": NumberFormat(1.0, 1.0),
    "fp8_block": NumberFormat(1.0, 1.0),
    "fp8_ootb": NumberFormat(1.0, 1.0),
    "int8": NumberFormat(1.0, 1.0),
    "sq": NumberFormat(1.0, 1.0),
    "int8_wo": NumberFormat(1.0, 2.0),
    "int4_wo": NumberFormat(0.5 + 2.0 / 128, 2.0),
    "w4afp8": NumberFormat(0.5 + 2.0 / 128, 1.0),
    "w4a8": NumberFormat(0.5 + 2.0 / 128, 1.0),
    "w4a16_mxfp4": NumberFormat(0.5 + 1.0 / 32, 2.0),
    "w4a8_mxfp4_mxfp8": NumberFormat(0.5 + 1.0 / 32, 1.0),
    "mxfp4": NumberFormat(0.5 + 1.0 / 32, 0.5 + 1.0 / 32),
    "nvfp4": NumberFormat(0.5 + 1.0 / 16, 0.5 + 1.0 / 16),
}
UNKNOWN_FORMAT = NumberFormat(2.0, 2.0)


@dataclass(frozen=True)
class KernelTable:
    """Points of one op.

    ``system`` names the device as the table does; ``source`` the software and its version; ``variant`` the kernel that
    ran. ``time_s`` [n] are seconds per call, ``power_w`` [n] watts or None. ``notes`` are what a reader must know.
    """

    op: str
    dtype: str
    system: str
    source: str
    variant: str
    sizes: Mapping[str, FloatArray]
    time_s: FloatArray
    power_w: FloatArray | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.op not in SIZES:
            raise ValueError(f"op: expected one of {', '.join(SIZES)}, got {self.op!r}")
        if set(self.sizes) != set(SIZES[self.op]):
            raise ValueError(f"sizes: expected {', '.join(SIZES[self.op])}, got {', '.join(self.sizes)}")
        n = self.time_s.shape
        if self.time_s.ndim != 1 or not self.time_s.size:
            raise ValueError(f"time_s: expected a vector of at least one time, got shape {n}")
        _check("time_s", self.time_s, 0.0, strict=True)
        for name, low in SIZES[self.op].items():
            if self.sizes[name].shape != n:
                raise ValueError(f"{name}: expected shape {n}, got {self.sizes[name].shape}")
            _check(name, self.sizes[name], low, strict=False)
        if self.power_w is not None:
            if self.power_w.shape != n:
                raise ValueError(f"power_w: expected shape {n}, got {self.power_w.shape}")
            _check("power_w", self.power_w, 0.0, strict=True)

    def __len__(self) -> int:
        return int(self.time_s.size)

    @property
    def known_format(self) -> bool:
        """Whether `FORMATS` says how many bytes a number of this table's dtype has."""
        return self.dtype in FORMATS

    @property
    def format(self) -> NumberFormat:
        """Bytes of the dtype's numbers; of 16-bit numbers where the dtype is not known."""
        return FORMATS.get(self.dtype, UNKNOWN_FORMAT)

    def take(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "KernelTable":
        """The points at ``rows`` (a mask or indices), at least one."""
        return replace(
            self,
            sizes={name: values[rows] for name, values in self.sizes.items()},
            time_s=self.time_s[rows],
            power_w=None if self.power_w is None else self.power_w[rows],
        )


def joined(tables: Sequence[KernelTable], variant: str) -> KernelTable:
    """Points of several tables of one op, dtype and system as one, under the name ``variant``."""
    first = tables[0]
    power = [t.power_w for t in tables]
    return replace(
        first,
        variant=variant,
        sizes={name: np.concatenate([t.sizes[name] for t in tables]) for name in first.sizes},
        time_s=np.concatenate([t.time_s for t in tables]),
        power_w=None if any(p is None for p in power) else np.concatenate([p for p in power if p is not None]),
        notes=tuple(dict.fromkeys(note for t in tables for note in t.notes)),
    )


def _check(name: str, values: FloatArray, low: float, *, strict: bool) -> None:
    bad = ~np.isfinite(values) | ((values <= low) if strict else (values < low))
    if bad.any():
        wanted = f"finite values {'above' if strict else 'of at least'} {low:g}"
        first = values[np.argmax(bad)]
        raise ValueError(
            f"{name}: expected {wanted}, got {first:g} and the like in {int(bad.sum())} of {bad.size} rows"
        )
