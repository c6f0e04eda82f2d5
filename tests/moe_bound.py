"""A SiLU layer of experts in float64, and a bound on how far the kernels may be from it."""

import numpy as np

from assay import reference
from assay.ops.int4 import PackedInt4

#: Weights that are looked at together: their float64 forms fit in a cache.
AT_ONCE = 1 << 20


def slices(matrix):
    """A packed matrix as packed matrices of some of its tiles of 32 rows each."""
    tiles = -(-matrix.n // 32)
    size, step = matrix.data.nbytes // tiles, max(1, AT_ONCE // (32 * matrix.k))
    for tile in range(0, tiles, step):
        rows = min(32 * step, matrix.n - 32 * tile)
        part = matrix.data[tile * size : (tile + step) * size]
        yield PackedInt4(rows, matrix.k, matrix.group_size, matrix.symmetric, part)


def error_and_value(x, x_error, packed_matrix, a16):
    """float64 x W^T with |x - given| <= x_error, and a bound on what the kernel adds to it and passes on.

    int8 activations: half a step of their group's scale each. float32 sums of K products: (K + 16) 2^-24 of the sum of
    sizes, taken with the codes' own size q + z, since w4a16 sums x q and -z x apart.
    """
    k, group = packed_matrix.k, packed_matrix.group_size
    error = x_error
    if not a16:
        largest = (np.abs(x) + x_error).reshape(len(x), -1, group).max(axis=-1)
        error = error + np.repeat(largest / 254 * (1 + 1e-5), group, axis=1)
    value, bound = np.zeros((2, len(x), packed_matrix.n))
    at = 0
    for part in slices(packed_matrix):
        qweight, scales, zeros = part.unpack()
        q = reference.unpack_nibbles(qweight, k).reshape(part.n, -1, group).astype(np.float64)
        zero = 8.0 if zeros is None else zeros[..., None].astype(np.float64)
        scale = scales[..., None].astype(np.float64)
        w = ((q - zero) * scale).reshape(part.n, k)
        size = ((q + zero) * np.abs(scale)).reshape(part.n, k)
        columns = slice(at, at + part.n)
        value[:, columns] = x @ w.T
        bound[:, columns] = error @ np.abs(w).T + (k + 16) * 2.0**-24 * ((np.abs(x) + error) @ size.T)
        at += part.n
    return value, bound


def bounded_layer(x, ids, w, packed, a16):
    """float64 output of a SiLU layer and the bound on the kernels' distance from it."""
    out, bound = np.zeros((2, len(x), packed.shape.hidden))
    for e in range(packed.shape.num_experts):
        tokens, slots = np.nonzero(ids == e)
        if not len(tokens):
            continue
        rows = x[tokens].astype(np.float64)
        up_matrix, down_matrix = packed.expert(e)
        c, c_error = error_and_value(rows, np.zeros_like(rows), up_matrix, a16)
        units = packed.shape.intermediate
        g, u, g_error, u_error = (
            v.reshape(len(v), -1, 2, 16)[:, :, i].reshape(len(v), -1)[:, :units] for v in (c, c_error) for i in (0, 1)
        )
        f = g / (1 + np.exp(-g))
        f_error = 1.1 * g_error + 1e-6 * np.abs(f)  # |silu'| < 1.1; vexp and four roundings
        h_error = f_error * (np.abs(u) + u_error) + np.abs(f) * u_error + 1e-6 * np.abs(f * u)
        y, y_error = error_and_value(f * u, h_error, down_matrix, a16)
        share = w[tokens, slots, None].astype(np.float64)
        np.add.at(out, tokens, share * y)
        np.add.at(bound, tokens, share * (y_error + (ids.shape[1] + 1) * 2.0**-24 * (np.abs(y) + y_error)))
    return out, bound
