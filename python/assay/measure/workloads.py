"""A point as calls to time: data of the right shape, enough of it to come from DRAM, and the answer checked first."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import reference
from ..errors import AssayError
from ..machine import Machine, memory_bytes
from ..ops import info, int4, int8, moe, speculative
from .clock import Call
from .points import Point, packed_bytes

#: Columns of a GEMM that are computed by the reference too, before anything is timed.
CHECKED_COLUMNS = 64


@dataclass(frozen=True)
class Workload:
    """The calls of one point and the kernel variant that they run."""

    calls: list[Call]
    variant: str


def weights_key(point: Point) -> tuple[Any, ...] | None:
    """What two GEMM points share that run on the same weights; None for the other ops."""
    if not point.op.endswith("_gemm"):
        return None
    p = point.params
    return p["n"], p["k"], p["group_size"], p["symmetric"], 8 if point.op == "w8a8_gemm" else 4


class Workloads:
    """Makes workloads, keeping what is costly to make: packed weights (by shape) and one pool of logits.

    Parameters
    ----------
    machine
        Its last-level cache decides how much data calls rotate through; its memory, at most an eighth of which is
        used for one shape, and a quarter for all, how much at most.
    seed
        Of the random weights, activations and logits.
    rotate_bytes
        How much data the calls of one point rotate through at least, instead of 2.5 last-level caches.
    """

    def __init__(self, machine: Machine, seed: int, rotate_bytes: float | None = None) -> None:
        self._seed = seed
        available = memory_bytes("MemAvailable") or 1 << 32
        self._available_bytes = available
        self._rotate_bytes = min(rotate_bytes or 2.5 * machine.last_level_cache_bytes, available / 8)
        self._kernels = info.kernel_versions()
        self._weights: dict[tuple[Any, ...], tuple[list[int4.PackedInt4], tuple[Any, ...]]] = {}
        self._weights8: dict[tuple[Any, ...], tuple[list[int8.PackedInt8], tuple[Any, ...]]] = {}
        self._pool: np.ndarray | None = None

    def fit(self, points: Iterable[Point]) -> bool:
        """Whether the weights of all these points may be held at once."""
        keys = {key for key in map(weights_key, points) if key}
        return sum(self._rotate_bytes + packed_bytes(*key) for key in keys) <= self._available_bytes / 4

    def forget(self) -> None:
        """Lets the weights go that no workload holds any more."""
        self._weights.clear()
        self._weights8.clear()

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def make(self, point: Point) -> Workload:
        """The calls of a point, after one of them was checked against the reference.

        Raises
        ------
        AssayError
            The kernel's answer is not the reference's: naming op, variant and shape.
        """
        makers: dict[str, tuple[str, Callable[[Point], list[Call]]]] = {
            "w4a8_gemm": ("int4_gemm", self._gemm),
            "w4a16_gemm": ("int4_gemm", self._gemm),
            "w8a8_gemm": ("int8_gemm", self._gemm8),
            "moe_route": ("moe_route", self._route),
            "chain_verify": ("spec_verify", self._verify),
        }
        kernel, maker = makers[point.op]
        variant = self._kernels[kernel]
        try:
            return Workload(maker(point), variant)
        except AssertionError as exc:
            raise AssayError(f"{point.op} ({variant}) gave a wrong answer at {point.label}: {exc}") from exc

    # ---- INT4 GEMM ----

    def _packed(
        self, n: int, k: int, group_size: int, symmetric: bool
    ) -> tuple[list[int4.PackedInt4], tuple[Any, ...]]:
        """Copies of one matrix, together larger than the cache, and the first columns' unpacked weights."""
        key = (n, k, group_size, symmetric)
        if key not in self._weights:
            rng = self._rng(n, k, group_size)
            qweight = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
            scales = rng.uniform(0.005, 0.02, (n, k // group_size)).astype(np.float16)
            zeros = None if symmetric else rng.integers(0, 16, scales.shape, dtype=np.uint8)
            first = int4.pack(qweight, scales, zeros, group_size=group_size)
            copies = [first]
            while sum(w.nbytes for w in copies) < self._rotate_bytes:
                data = int4.aligned_empty(first.nbytes)
                data[:] = first.data
                copies.append(int4.PackedInt4(n, k, group_size, symmetric, data))
            head = slice(0, min(CHECKED_COLUMNS, n))
            self._weights[key] = (copies, (qweight[head], scales[head], None if zeros is None else zeros[head]))
        return self._weights[key]

    def _gemm(self, point: Point) -> list[Call]:
        p = point.params
        copies, head = self._packed(p["n"], p["k"], p["group_size"], p["symmetric"])
        a16 = point.op == "w4a16_gemm"
        gemm = int4.w4a16_gemm if a16 else int4.w4a8_gemm
        a = self._rng(p["m"], p["k"]).standard_normal((p["m"], p["k"]), dtype=np.float32)
        out = np.empty((p["m"], p["n"]), np.float32)
        gemm(a, copies[0], out, num_threads=point.threads)
        rows = min(p["m"], 2)  # a row's bits do not depend on the others: two stand for all
        naive = reference.w4a16_gemm if a16 else reference.w4a8_gemm
        qweight, scales, zeros = head
        want = naive(a[:rows], qweight, scales, zeros, p["group_size"])
        np.testing.assert_allclose(out[:rows, : want.shape[1]], want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))
        return [partial(gemm, a, w, out, num_threads=point.threads) for w in copies]

    def _packed8(self, n: int, k: int, group_size: int) -> tuple[list[int8.PackedInt8], tuple[Any, ...]]:
        """As :meth:`_packed`, for int8 weights."""
        key = (n, k, group_size)
        if key not in self._weights8:
            rng = self._rng(n, k, group_size)
            qweight = rng.integers(-127, 128, (n, k), dtype=np.int8)
            scales = rng.uniform(0.0005, 0.002, (n, k // group_size)).astype(np.float16)
            copies = [int8.pack_int8(qweight, scales)]
            while sum(w.nbytes for w in copies) < self._rotate_bytes:
                data = int4.aligned_empty(copies[0].nbytes)
                data[:] = copies[0].data
                copies.append(int8.PackedInt8(n, k, group_size, data))
            head = slice(0, min(CHECKED_COLUMNS, n))
            self._weights8[key] = (copies, (qweight[head], scales[head]))
        return self._weights8[key]

    def _gemm8(self, point: Point) -> list[Call]:
        p = point.params
        copies, head = self._packed8(p["n"], p["k"], p["group_size"])
        a = self._rng(p["m"], p["k"]).standard_normal((p["m"], p["k"]), dtype=np.float32)
        out = np.empty((p["m"], p["n"]), np.float32)
        int8.w8a8_gemm(a, copies[0], out, num_threads=point.threads)
        qweight, scales = head
        want = reference.w8a8_gemm(a[:2], qweight, scales, p["group_size"])
        np.testing.assert_allclose(out[:2, : want.shape[1]], want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))
        return [partial(int8.w8a8_gemm, a, w, out, num_threads=point.threads) for w in copies]

    # ---- routing ----

    def _route(self, point: Point) -> list[Call]:
        p = point.params
        logits = self._rng(p["tokens"], p["num_experts"]).standard_normal(
            (p["tokens"], p["num_experts"]), dtype=np.float32
        )
        got = moe.moe_route(logits, p["top_k"], num_threads=point.threads)
        want = reference.moe_route(logits, p["top_k"], True)
        np.testing.assert_array_equal(got.topk_ids, want[1])
        np.testing.assert_allclose(got.topk_weights, want[0], rtol=1e-5)
        return [partial(moe.moe_route, logits, p["top_k"], num_threads=point.threads)]

    # ---- chain verification ----

    def _rotated_logits(self, rows: int, vocab: int) -> list[np.ndarray]:
        """Views of one pool of noise, larger than the cache in all, one a call."""
        size = rows * vocab
        if self._pool is None or self._pool.size < 2 * size:
            wanted = max(int(self._rotate_bytes // 4), 2 * size)
            self._pool = self._rng(7).standard_normal(wanted, dtype=np.float32)
        starts = range(0, self._pool.size - size + 1, size)
        return [self._pool[at : at + size].reshape(rows, vocab) for at in starts]

    def _verify(self, point: Point) -> list[Call]:
        """Every draft is accepted, so that each of the K + 1 rows is read."""
        p = point.params
        batch, draft = p["batch"], p["num_draft"]
        logits = self._rotated_logits(batch * (draft + 1), p["vocab"])
        drafts = [rows.reshape(batch, draft + 1, -1).argmax(-1).astype(np.int32)[:, :draft].ravel() for rows in logits]
        cu = np.arange(0, batch * draft + 1, draft, dtype=np.int32) if draft else np.zeros(batch + 1, np.int32)
        uniforms = np.full(batch * (draft + 2), 0.5)
        uniforms.reshape(batch, draft + 2)[:, :draft] = 1e-12
        options: dict[str, Any] = {
            "temperature": 0.0 if p["rule"] == "greedy" else 1.0, "rule": p["rule"], "uniforms": uniforms,
        }  # fmt: skip
        got = speculative.verify_chain(logits[0], drafts[0], cu, **options, num_threads=point.threads)
        assert (np.asarray(got.num_accepted) == draft).all(), f"accepted {got.num_accepted} of {draft}"
        want = speculative.verify_chain(logits[0], drafts[0], cu, **options, backend="reference")
        np.testing.assert_array_equal(got.output_token_ids, want.output_token_ids)
        return [
            partial(speculative.verify_chain, rows, ids, cu, **options, num_threads=point.threads)
            for rows, ids in zip(logits, drafts, strict=True)
        ]
