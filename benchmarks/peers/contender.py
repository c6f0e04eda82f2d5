"""What a contender is, and the data that all of them are given.

A contender prepares a cell: it returns calls that compute it, each on other memory, and the answer of one of them. The
worker holds that answer against float64 before anything is timed, within what the contender's own rounding explains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from assay import machine

#: Rows up to which calls rotate through more memory than the caches hold; wider ones through two copies.
DECODE_ROWS = 8
#: Output columns at either end of a GEMM that are checked against float64.
CHECKED_COLUMNS = 64


@dataclass(frozen=True)
class Cell:
    """One thing to compare: an op, its parameters, how many threads. Hashable."""

    op: str
    threads: int
    params: tuple[tuple[str, Any], ...]

    def __getattr__(self, name: str) -> Any:
        for key, value in object.__getattribute__(self, "params"):
            if key == name:
                return value
        raise AttributeError(name)

    @classmethod
    def of(cls, op: str, threads: int, **params: Any) -> "Cell":
        """A cell from named parameters."""
        return cls(op, threads, tuple(params.items()))

    @property
    def weight_bytes(self) -> float:
        """Of a GEMM: its weights as a file holds them; codes, 2 bytes a scale, half a byte a zero point."""
        groups = self.n * (self.k // self.group_size)
        codes = self.n * self.k * (1 if self.op == "w8a8" else 0.5)
        return codes + groups * (2.0 if self.symmetric else 2.5)

    @property
    def label(self) -> str:
        """Short text for a progress bar."""
        return f"{self.op} " + " ".join(f"{k}={v}" for k, v in self.params) + f" threads={self.threads}"


@dataclass
class Prepared:
    """A cell ready to be timed.

    Attributes
    ----------
    calls
        The computation on different memory, called in turns.
    per_call : int
        Computations of the cell in one call (a graph of independent products holds several).
    got, want : numpy.ndarray
        An answer and what it should be, computed in float64.
    tolerance : float
        Most relative error (Frobenius norm) that the contender's rounding explains; 0 for "equal".
    keep
        What must stay alive as long as the calls.
    warm : bool
        Every call is made once before those that are timed, so that they find in the cache what other contenders' turns
        have driven out.
    """

    calls: Sequence[Callable[[], object]]
    got: np.ndarray
    want: np.ndarray
    tolerance: float
    per_call: int = 1
    keep: Any = field(default=None, repr=False)
    warm: bool = False

    def error(self) -> float:
        """Relative error of the answer; infinite where it is not finite."""
        if not np.isfinite(self.got).all():
            return float("inf")
        return float(np.linalg.norm(self.got - self.want) / max(np.linalg.norm(self.want), 1e-300))


class Contender(Protocol):
    """A kernel to compare. Making one loads its library, and raises where that is not possible."""

    name: str

    def versions(self) -> dict[str, str]:
        """Library name to version, for the header."""
        ...

    def refuses(self, cell: Cell) -> str | None:
        """Why this contender does not take part in a cell; None when it does."""
        ...

    def prepare(self, cell: Cell) -> Prepared:
        """The cell, ready to be timed."""
        ...


def copies_needed(cell: Cell, nbytes: float) -> int:
    """Copies of a GEMM's weights of `nbytes` to rotate through.

    Together more than eight last-level caches when decoding; else two, or one where the output alone empties the cache.
    """
    if cell.m > DECODE_ROWS:
        return 1 if 4 * cell.m * cell.n > 128e6 else 2
    wanted = max(8.25 * machine.describe().last_level_cache_bytes, 264e6)
    most = (machine.memory_bytes("MemAvailable") or 8 << 30) / 16
    return max(2, int(-(-min(wanted, most) // nbytes)))


class Weights:
    """A random 4 or 8 bit matrix in its plainest form, the same for every contender.

    Attributes
    ----------
    codes : uint8 [N, K/2] (low nibble first) or int8 [N, K]
    scales : float16 [N, K/group_size]
    zeros : uint8 [N, K/group_size] or None
    """

    def __init__(self, n: int, k: int, group_size: int, symmetric: bool, bits: int, seed: Sequence[int] = ()) -> None:
        rng = np.random.default_rng([n, k, group_size, symmetric, bits, *seed])
        self.n, self.k, self.group_size, self.symmetric, self.bits = n, k, group_size, symmetric, bits
        if bits == 4:
            self.codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        else:
            self.codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
        self.scales = rng.uniform(0.005, 0.02, (n, k // group_size)).astype(np.float16)
        self.zeros = None if symmetric else rng.integers(0, 16, self.scales.shape, dtype=np.uint8)

    def rolled(self, by: int) -> "Weights":
        """The same rows, `by` later: other bytes, so that no library recognises a copy."""
        other = object.__new__(Weights)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "floats"})
        other.codes, other.scales = np.roll(self.codes, by, 0), np.roll(self.scales, by, 0)
        other.zeros = None if self.zeros is None else np.roll(self.zeros, by, 0)
        return other

    def unpacked(self, rows: Any = slice(None)) -> np.ndarray:
        """Codes one to a byte, uint8 0..15 or int8, [rows, K]."""
        codes = self.codes[rows]
        if self.bits == 8:
            return codes
        out = np.empty((codes.shape[0], self.k), np.uint8)
        out[:, ::2], out[:, 1::2] = codes & 15, codes >> 4
        return out

    def dequantized(self, rows: Any = slice(None)) -> np.ndarray:
        """float32 [rows, K]."""
        q = self.unpacked(rows).astype(np.float32)
        zero = 0.0 if self.bits == 8 else 8.0
        shift = zero if self.zeros is None else np.repeat(self.zeros[rows], self.group_size, 1).astype(np.float32)
        return (q - shift) * np.repeat(self.scales[rows].astype(np.float32), self.group_size, 1)

    @cached_property
    def ends(self) -> np.ndarray:
        """Indices of the columns of the output (rows of the weights) that are checked."""
        count = min(CHECKED_COLUMNS, self.n)
        return np.unique(np.r_[np.arange(count), np.arange(self.n - count, self.n)])


class WeightCache:
    """The last matrix that was asked for: cells come shape by shape."""

    def __init__(self) -> None:
        self._key: Any = None
        self._made: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made for this key."""
        if key != self._key:
            self._key = self._made = None  # first, so that both are not held at once
            self._made, self._key = make(), key
        return self._made


def weights_of(cell: Cell) -> Weights:
    """The matrix of a GEMM cell."""
    return Weights(cell.n, cell.k, cell.group_size, cell.symmetric, 8 if cell.op == "w8a8" else 4)


def activations(m: int, k: int) -> np.ndarray:
    """float32 [M, K] of normal noise."""
    return np.random.default_rng([m, k]).standard_normal((m, k), dtype=np.float32)


def product(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """float64 [M, N] = a @ w.T."""
    return a.astype(np.float64) @ w.astype(np.float64).T
