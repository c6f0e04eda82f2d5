"""GGUF's Q4_0 and Q4_1 as INT4.

Blocks of 32: f16 d (and m), then 16 bytes, byte j the elements j (low) and j + 16 (high); d (q - 8), or d q + m.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from typing import Any

import numpy as np

from .._checks import bad, expect
from ..weights import Int4Weights, zeros_or_none
from .act_order import refuse_order

BLOCK = 32  # weights of a block


def from_q4_0(rows: np.ndarray, *, name: str = "") -> Int4Weights:
    """Reads GGUF Q4_0 rows, exactly: group size 32, zero point 8.

    Parameters
    ----------
    rows : uint8 [N, K/32 * 18]
        As `GGUFFile.raw` gives them.
    name : str
        Of the tensor, for messages.
    """
    blocks = blocks_of(rows, 18, name, "Q4_0")
    return Int4Weights(_block_codes(blocks[..., 2:]), _halfs(blocks, 0, name or "rows", "scale"), None, BLOCK)


def from_q4_1(rows: np.ndarray, *, name: str = "") -> Int4Weights:
    """Reads GGUF Q4_1 rows where they are exactly INT4 with integer zero points.

    A block is d q + m. It equals d (q - z) only if m = -d z for an integer z of 0..15, which llama.cpp's quantiser has
    no reason to give (but `to_q4_1` does); any other block is a FormatError that says how many there are.

    Parameters
    ----------
    rows : uint8 [N, K/32 * 20]
    """
    where = name or "rows"
    blocks = blocks_of(rows, 20, name, "Q4_1")
    d, m = _halfs(blocks, 0, where, "scale"), _halfs(blocks, 2, where, "minimum")
    step, least = d.astype(np.float64), m.astype(np.float64)  # products of a f16 and 0..15 are exact here
    z = np.clip(np.rint(-least / np.where(step == 0, 1, step)), 0, 15)
    wrong = -step * z != least
    if wrong.any():
        n, b = np.argwhere(wrong)[0]
        bad(
            where,
            "minimums m = -d z with an integer z of 0..15 (other Q4_1 blocks are not representable without loss)",
            f"d = {d[n, b]}, m = {m[n, b]} in row {n}, block {b}, and so on in {wrong.sum()} of {wrong.size} blocks",
        )
    return Int4Weights(_block_codes(blocks[..., 4:]), d, zeros_or_none(z.astype(np.uint8)), BLOCK)


def to_q4_0(w: Int4Weights) -> np.ndarray:
    """GGUF Q4_0 rows, uint8 [N, K/32 * 18]; FormatError for zero points other than 8 and what Q4_0 cannot hold."""
    d, zeros = _block_scales(w, "Q4_0")
    if (zeros != 8).any():
        bad("zeros", "8 everywhere (Q4_0 is symmetric)", str(zeros[zeros != 8][0]))
    out = np.empty((*d.shape, 18), np.uint8)
    out[..., :2] = d.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:] = _block_payload(w.q)
    return out.reshape(w.n, -1)


def to_q4_1(w: Int4Weights) -> np.ndarray:
    """GGUF Q4_1 rows, uint8 [N, K/32 * 20]; FormatError where float16 cannot hold a minimum -d z exactly."""
    d, zeros = _block_scales(w, "Q4_1")
    wanted = 0.0 - d.astype(np.float64) * zeros
    with np.errstate(over="ignore"):
        m = wanted.astype(np.float16)
    lost = m.astype(np.float64) != wanted
    if lost.any():
        n, b = np.argwhere(lost)[0]
        bad(
            "zeros",
            "minimums -d z that float16 holds exactly (Q4_1)",
            f"{wanted[n, b]} in row {n}, block {b}, and so on in {lost.sum()} of {lost.size} blocks",
        )
    out = np.empty((*d.shape, 20), np.uint8)
    out[..., :2] = d.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:4] = m.astype("<f2")[..., None].view(np.uint8)
    out[..., 4:] = _block_payload(w.q)
    return out.reshape(w.n, -1)


def blocks_of(rows: Any, block_bytes: int, name: str, type_name: str) -> np.ndarray:
    """[N, K/32, block_bytes]"""
    where = name or "rows"
    expect(rows, where, ("uint8",), (None, None), says=f" ({type_name} rows)")
    n, row_bytes = rows.shape
    if n < 1 or row_bytes < 1 or row_bytes % block_bytes:
        bad(where, f"rows of whole {type_name} blocks ({block_bytes} bytes)", f"uint8 {[n, row_bytes]}")
    return np.ascontiguousarray(rows).reshape(n, -1, block_bytes)


def _halfs(blocks: np.ndarray, at: int, where: str, what: str) -> np.ndarray:
    """The f16 at byte `at` of every block, [N, K/32]."""
    value = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float16, copy=False)
    if not np.isfinite(value).all():
        n, b = np.argwhere(~np.isfinite(value))[0]
        bad(where, f"a finite {what}", f"{value[n, b]} in row {n}, block {b}")
    return value


def _block_codes(payload: np.ndarray) -> np.ndarray:
    both = np.concatenate([payload & np.uint8(15), payload >> np.uint8(4)], axis=-1)
    return both.reshape(len(both), -1)


def _block_payload(q: np.ndarray) -> np.ndarray:
    blocks = q.reshape(len(q), -1, 2, BLOCK // 2)
    return blocks[:, :, 0] | blocks[:, :, 1] << np.uint8(4)


def _block_scales(w: Int4Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    """f16 scales and zeros a block of 32: a wider group's are repeated."""
    refuse_order(w, name)
    if w.group_size % BLOCK:
        bad("group_size", f"a multiple of 32 ({name} has a scale for every 32 weights)", str(w.group_size))
    with np.errstate(over="ignore"):
        d = w.scales.astype(np.float16)
    lost = d.astype(np.float32) != w.scales
    if lost.any():
        at = tuple(int(i) for i in np.argwhere(lost)[0])
        bad("scales", f"values that float16 holds exactly ({name})", f"{w.scales[at]} at {list(at)}")
    repeat = w.group_size // BLOCK
    return np.repeat(d, repeat, axis=1), np.repeat(w.zero_points(), repeat, axis=1)
