"""What a measured call asks of a device: bytes, operations, fixed work, and the coordinates in which efficiency varies.

Bytes and operations are the least that the mathematics needs. The coordinates are those in which kernels differ from that:
logarithms of the sizes, and the terms of their decomposition into tiles: how full the last wave of tiles over the
multiprocessors is (wave quantisation, NVIDIA's "Matrix Multiplication Background User's Guide"), rows padded to a tile,
alignment of M, multiprocessors left idle. docs/cost-model.md lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from assay.cost.loads import BLOCKS, loads_of
from assay.cost.roofline import FloatArray, IntArray
from assay.tables import KernelTable, NumberFormat

#: Output tiles that GEMM kernels use; efficiency steps where they stop filling waves. No kernel is asked which it has.
TILES = ((64, 64), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128))
ATTENTION_ROWS = (64.0, 128.0)


@dataclass(frozen=True)
class Work:
    """Per call: ``bytes`` and ``ops`` [n], ``fixed`` [n, j] counts of work with a cost of its own, ``features`` [n, d].

    ``start`` [d] is where the search for the features' scales begins. ``shape`` and ``model`` [n] are integers: points
    of one value have one weight shape (or heads, or experts and parallelism), or come from one model.
    """

    bytes: FloatArray
    ops: FloatArray
    fixed: FloatArray
    features: FloatArray
    start: FloatArray
    shape: IntArray
    model: IntArray


def work_of(table: KernelTable, multiprocessors: int) -> Work:
    """The work of every point of ``table`` on a device of so many multiprocessors."""
    law = {
        "gemm": _gemm,
        "moe": _moe,
        "context_attention": _context,
        "generation_attention": _generation,
    }.get(table.op, _collective)
    with np.errstate(divide="ignore"):
        return law(table.sizes, table.format, float(multiprocessors))


def _groups(*columns: FloatArray) -> IntArray:
    _, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return inverse.reshape(-1).astype(np.int64)


def _waves(tiles: FloatArray, multiprocessors: float) -> tuple[FloatArray, FloatArray]:
    """Log of time lost to a last wave that is not full, and log of the share of multiprocessors that have a tile."""
    waves = tiles / multiprocessors
    return np.where(waves > 1, np.log(np.ceil(waves) / waves), 0.0), np.log(np.minimum(waves, 1.0))


def _alignment(m: FloatArray) -> list[FloatArray]:
    return [(m % step != 0).astype(np.float64) for step in (2.0, 4.0, 8.0, 16.0)]


def _work(
    moved: FloatArray,
    ops: FloatArray,
    fixed: list[FloatArray],
    scaled: list[tuple[FloatArray, float]],
    **groups: IntArray,
) -> Work:
    return Work(
        bytes=moved,
        ops=ops,
        fixed=np.stack(fixed, axis=1) if fixed else np.zeros((moved.size, 0)),
        features=np.stack([f for f, _ in scaled], axis=1),
        start=np.array([s for _, s in scaled]),
        **groups,
    )


def _gemm(s: Mapping[str, FloatArray], fmt: NumberFormat, sms: float) -> Work:
    """``C[M, N] = A[M, K] W[N, K]^T``."""
    m, n, k = s["m"], s["n"], s["k"]
    moved = fmt.weight_bytes * n * k + fmt.activation_bytes * m * k + fmt.result_bytes * m * n
    ops = 2.0 * m * n * k
    waves = [_waves(np.ceil(m / a) * np.ceil(n / b), sms) for a, b in TILES]
    # Padding matters as far as arithmetic does.
    weight = ops / (ops + 150.0 * moved)
    scaled = [(np.log(m), 1.0), (np.log(n), 0.7), (np.log(k), 0.7)]
    scaled += [(weight * np.log(np.ceil(m / rows) * rows / m), 1.0) for rows in (64.0, 128.0, 256.0)]
    scaled += [(np.log(n * k), 0.4), (np.log(m * n), 0.3)]
    scaled += [(a, 0.1) for a in _alignment(m)]
    scaled += [(lost, 0.8) for lost, _ in waves]
    scaled += [((m == 1).astype(np.float64), 0.1)]
    scaled += [(waves[i][1], 0.3) for i in (0, 3, 5)]
    shape = _groups(n, k)
    # A tile's loop over K cannot be shortened by idle multiprocessors, and each wave of tiles runs it again; every result
    # is written by an epilogue.
    waves_of_128 = np.ceil(np.ceil(m / 128.0) * np.ceil(n / 128.0) / sms)
    return _work(moved, ops, [k, k * waves_of_128, m * n], scaled, shape=shape, model=shape)


def _pairs(s: Mapping[str, FloatArray], keys: FloatArray) -> FloatArray:
    """Query-key pairs of one head under a causal mask: ``sum_i min(past + i, window)`` over i = 1..isl."""
    isl, past = s["isl"], s["past"]
    free = np.clip(keys - past, 0.0, isl)  # queries whose whole past is inside the window
    return free * past + free * (free + 1.0) / 2.0 + (isl - free) * keys


def _context(s: Mapping[str, FloatArray], fmt: NumberFormat, sms: float) -> Work:
    """Attention of a prompt on itself and its past: two products per visible pair, causal, windowed."""
    b, isl, h, g, d = s["batch"], s["isl"], s["heads"], s["kv_heads"], s["head_dim"]
    span = isl + s["past"]
    window = np.where(s["window"] > 0, np.minimum(s["window"], span), span)
    pairs = _pairs(s, window)
    ops = 4.0 * b * h * d * pairs
    moved = b * (4.0 * isl * h * d + 2.0 * fmt.weight_bytes * span * g * d)
    tiles = [np.ceil(isl / rows) * b * h for rows in ATTENTION_ROWS]
    waves = [_waves(t, sms) for t in tiles]
    windowed = np.log(span / window)
    scaled = [(np.log(b), 0.5), (np.log(isl), 0.7), (np.log(h), 0.4), (np.log(g), 0.3), (np.log(h / g), 0.2)]
    scaled += [(np.log(d), 1.0), (windowed, 0.5), ((s["window"] > 0).astype(np.float64), 0.5)]
    scaled += [(np.log1p(s["past"]), 0.3), (np.log(b * h), 0.5)]
    scaled += [(lost, 0.6) for lost, _ in waves] + [(waves[1][1], 0.3)]
    model = _groups(h, g, d, s["window"])
    return _work(moved, ops, [b * h, b * isl * g], scaled, shape=model, model=model)


def _generation(s: Mapping[str, FloatArray], fmt: NumberFormat, sms: float) -> Work:
    """Attention of one new token on its KV cache: linear in the cache read; batch times KV heads work in parallel."""
    b, h, g, d = s["batch"], s["heads"], s["kv_heads"], s["head_dim"]
    length = np.where(s["window"] > 0, np.minimum(s["window"], s["kv_len"]), s["kv_len"])
    ops = 4.0 * b * h * d * length
    moved = b * (2.0 * fmt.weight_bytes * length * g * d + 4.0 * h * d)
    lost, idle = _waves(b * g, sms)
    scaled = [(np.log(b), 0.5), (np.log(length), 0.7), (np.log(h), 0.3), (np.log(g), 0.4), (np.log(h / g), 0.3)]
    scaled += [(np.log(d), 1.0), (np.log(s["kv_len"] / length), 0.3), ((s["window"] > 0).astype(np.float64), 0.5)]
    scaled += [(np.log(b * g), 0.5), (np.log(b * g * length), 0.4), (lost, 0.5), (idle, 0.3)]
    model = _groups(h, g, d, s["window"])
    return _work(moved, ops, [b * h, b * g], scaled, shape=model, model=model)


def distinct_experts(s: Mapping[str, FloatArray]) -> FloatArray:
    """Experts of one rank that a step touches: all pairs apart for a balanced load, popularity ``rank^-alpha`` else."""
    local = s["num_experts"] / s["ep"]
    pairs = s["tokens"] * s["top_k"] / s["ep"]
    touched = np.minimum(local, np.maximum(pairs, 1.0))
    for alpha, experts in {tuple(row) for row in np.stack([s["alpha"], s["num_experts"]], axis=1).tolist()}:
        if alpha == 0:
            continue
        here = (s["alpha"] == alpha) & (s["num_experts"] == experts)
        share = np.arange(1.0, experts + 1.0) ** -alpha
        share /= share.sum()
        drawn, where = np.unique(s["tokens"][here] * s["top_k"][here], return_inverse=True)
        seen = (1.0 - np.exp(-drawn[:, None] * share)).sum(axis=1)[where.reshape(-1)] / s["ep"][here]
        touched[here] = np.clip(seen, 1.0, local[here])
    return touched


def _moe(s: Mapping[str, FloatArray], fmt: NumberFormat, sms: float) -> Work:
    """Experts on one rank: weights of those that are touched, rows of all their pairs.

    Of ``matrices``, three where they are gated and two where they are not, all but the last widen a row to ``inter``.
    """
    matrices = s["matrices"]
    inter, local = s["inter"] / s["tp"], s["num_experts"] / s["ep"]
    loads = loads_of(s)
    pairs, touched = loads.pairs, loads.touched
    everywhere = s["tokens"] * s["top_k"]
    weights = matrices * s["hidden"] * inter
    moved = fmt.weight_bytes * weights * touched + fmt.activation_bytes * pairs * (2.0 * s["hidden"] + matrices * inter)
    ops = 2.0 * weights * pairs
    padded = [np.log(loads.blocks[:, i] * rows / pairs) for i, rows in enumerate(BLOCKS)]
    scaled = [(np.log(s["tokens"]), 0.6), (np.log(s["hidden"]), 0.4), (np.log(inter), 0.5), (np.log(local), 0.4)]
    scaled += [(np.log(s["top_k"]), 0.4), (np.log(s["ep"]), 0.3), (np.log(s["tp"]), 0.3), (np.log(pairs), 0.5)]
    scaled += [(s["alpha"], 0.4), ((s["alpha"] > 0).astype(np.float64), 0.6), (np.log(touched), 0.5)]
    scaled += [
        (np.log(pairs / touched), 0.5),
        (np.log(s["num_experts"]), 0.2),
        (np.log(loads.most / pairs), 0.3),
        (np.log(loads.tokens), 0.3),
    ]
    scaled += [(value, 0.3) for value in padded] + [(np.log(matrices), 0.3)]
    for rows in (1, 2, 3):
        for width in ((matrices - 1.0) * inter, s["hidden"]):
            scaled += [(value, 0.3) for value in _waves(loads.blocks[:, rows] * np.ceil(width / 128.0), sms)]
    model = _groups(s["hidden"], s["inter"], s["top_k"], s["num_experts"])
    shape = _groups(model.astype(np.float64), s["tp"], s["ep"], s["alpha"])
    here = loads.tokens * s["top_k"]
    fixed = [touched, loads.blocks[:, 0], pairs, s["tokens"], everywhere * s["hidden"], everywhere * inter]
    fixed += [here * s["hidden"], np.maximum(here - pairs, 0.0) * weights]
    return _work(moved, ops, fixed, scaled, shape=shape, model=model)


def _collective(s: Mapping[str, FloatArray], fmt: NumberFormat, sms: float) -> Work:
    """A collective over ranks: each link carries ``2 (r - 1) / r`` of the message at most (ring all-reduce)."""
    del fmt, sms
    moved = s["bytes"] * 2.0 * (s["ranks"] - 1.0) / s["ranks"]
    scaled = [(np.log(s["bytes"]), 0.7), (np.log(s["ranks"]), 0.7)]
    shape = _groups(s["bytes"], s["ranks"])
    return _work(
        np.maximum(moved, 1.0),
        np.zeros(moved.shape),
        [np.log2(s["ranks"] + 1.0)],
        scaled,
        shape=shape,
        model=_groups(s["ranks"]),
    )
