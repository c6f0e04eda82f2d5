"""Naive numpy of every op: the specification, readable aloud.

Arguments are checked by :mod:`assay.ops`, which also offers these functions as ``backend="reference"``.
"""

import numpy as np

# ---- INT4 GEMM -----------------------------------------------------------------------------------------------------


def unpack_nibbles(qweight: np.ndarray, k: int) -> np.ndarray:
    """uint8 [N, ceil(K/2)], low nibble = even k, to uint8 [N, K]."""
    both = np.stack([qweight & 15, qweight >> 4], axis=-1)
    return both.reshape(qweight.shape[0], -1)[:, :k]


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [N, K] in 0..15 to uint8 [N, ceil(K/2)], low nibble = even k."""
    q = np.pad(q, ((0, 0), (0, q.shape[1] % 2)))
    return q[:, 0::2] | q[:, 1::2] << 4


def quantize_int4(w: np.ndarray, group_size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round-to-nearest INT4 with float16 scales.

    Symmetric (as GGUF's Q4_0): scale = m / -8 for the value m of largest size, w = scale (q - 8). Asymmetric: the
    group's range, widened to hold zero, over 15 steps, w = scale (q - zero). Codes are chosen for the scale as float16
    holds it.
    """
    n, k = w.shape
    groups = w.astype(np.float32).reshape(n, k // group_size, group_size)
    if symmetric:
        widest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
        scales = (widest / np.float32(-8)).astype(np.float16)
        zeros = None
        offset = np.float32(8)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = ((high - low) / np.float32(15)).astype(np.float16)
        step = scales.astype(np.float32)
        zeros = np.clip(np.rint(-low / np.where(step == 0, np.float32(1), step)), 0, 15).astype(np.uint8)
        offset = zeros[..., None].astype(np.float32)
    step = scales.astype(np.float32)[..., None]
    codes = np.rint(groups / np.where(step == 0, np.float32(1), step)) + offset
    q = np.clip(codes, 0, 15).astype(np.uint8).reshape(n, k)
    return pack_nibbles(q), scales, zeros


def dequantize_int4(
    qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, k: int, group_size: int
) -> np.ndarray:
    """w[n, k] = scale (q - zero), float32."""
    q = unpack_nibbles(qweight, k).reshape(len(qweight), -1, group_size).astype(np.float32)
    zero = np.float32(8) if zeros is None else zeros[..., None].astype(np.float32)
    return ((q - zero) * scales[..., None].astype(np.float32)).reshape(len(qweight), k)


def quantize_activations(a: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [M, K] and scales float32 [M, K / group_size] of w4a8's activations (assay.h)."""
    groups = a.astype(np.float32).reshape(len(a), a.shape[1] // group_size, group_size)
    amax = np.abs(groups).max(-1)
    finite = np.isfinite(groups).all(-1)
    live = finite & (amax >= np.float32(1e-30))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        to_code = np.where(live, np.float32(127) / amax, np.float32(0))
        codes = np.where(live[..., None], np.rint(groups * to_code[..., None]), 0)
    scale = np.where(live, amax / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))
    return codes.astype(np.int8).reshape(a.shape), scale.astype(np.float32)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 x y + z, rounded once but for the rare sum that float64 rounds onto a float32 tie."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


def w4a8_gemm(
    a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with int8 activations: assay.h's equation, group by group."""
    n, k = len(qweight), a.shape[1]
    codes, a_scale = quantize_activations(a, group_size)
    q = unpack_nibbles(qweight, k).astype(np.int64)
    c = np.zeros((len(a), n), np.float32)
    for g in range(k // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        zero = 8 if zeros is None else zeros[:, g, None].astype(np.int64)
        dot = codes[:, at].astype(np.int64) @ (q[:, at] - zero).T
        c = fma(dot.astype(np.float32), scales[None, :, g].astype(np.float32) * a_scale[:, g, None], c)
    return c


def quantize_int8(w: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round-to-nearest int8, w = scale q: scale = amax / 127 in float16, codes chosen for it, in -127..127."""
    groups = w.astype(np.float32).reshape(len(w), w.shape[1] // group_size, group_size)
    scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    step = scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(groups / np.where(step == 0, np.float32(1), step)), -127, 127)
    return codes.astype(np.int8).reshape(w.shape), scales


def w8a8_gemm(a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T, int8 weights q and int8 activations: w4a8's chain without a zero point."""
    codes, a_scale = quantize_activations(a, group_size)
    c = np.zeros((len(a), len(qweight)), np.float32)
    for g in range(a.shape[1] // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        dot = codes[:, at].astype(np.int64) @ qweight[:, at].astype(np.int64).T
        c = fma(dot.astype(np.float32), scales[None, :, g].astype(np.float32) * a_scale[:, g, None], c)
    return c


def w4a16_gemm(
    a: np.ndarray, qweight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
) -> np.ndarray:
    """C[M, N] = A[M, K] @ W[N, K].T with activations as they are: assay.h's chain, k by k."""
    m, n, k = len(a), len(qweight), a.shape[1]
    x = a.astype(np.float32)
    q = unpack_nibbles(qweight, k).astype(np.float32)
    c = np.zeros((m, n), np.float32)
    for g in range(k // group_size):
        padded = np.zeros((m, -(-group_size // 8) * 8), np.float32)
        padded[:, :group_size] = x[:, g * group_size : (g + 1) * group_size]
        lane = np.zeros((m, 8), np.float32)
        for step in padded.reshape(m, padded.shape[1] // 8, 8).transpose(1, 0, 2):
            lane = lane + step
        fold = ((lane[:, 0] + lane[:, 4]) + (lane[:, 2] + lane[:, 6])) + (
            (lane[:, 1] + lane[:, 5]) + (lane[:, 3] + lane[:, 7])
        )
        zero = np.full(n, 8, np.float32) if zeros is None else zeros[:, g].astype(np.float32)
        part = -zero[None, :] * fold[:, None]
        for i in range(g * group_size, (g + 1) * group_size):
            part = fma(x[:, i, None], q[None, :, i], part)
        c = fma(part, scales[None, :, g].astype(np.float32), c)
    return c


# ---- MoE routing ---------------------------------------------------------------------------------------------------

#: Statuses of a row, as in assay.h.
ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INF, ROW_BAD_ID = range(5)


def row_status(logits: np.ndarray) -> int:
    """Whether a row of logits is a distribution, and if not, why."""
    if np.isnan(logits).any():
        return ROW_NAN
    if (logits == np.inf).any():
        return ROW_INF
    return ROW_EMPTY if (logits == -np.inf).all() else ROW_OK


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of one row, in float64."""
    e = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return e / e.sum()


def moe_route(logits: np.ndarray, top_k: int, renormalize: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights float32 [T, k], ids int32 [T, k] and status int32 [T] of logits [T, E]: softmax, then the k largest.

    Ties go to the lower id; minus infinity is never chosen; what cannot be filled holds id -1 and weight 0.
    """
    weights = np.zeros((len(logits), top_k), np.float32)
    ids = np.full((len(logits), top_k), -1, np.int32)
    status = np.array([row_status(row) for row in logits], np.int32)
    for t in np.flatnonzero(status == ROW_OK):
        row = logits[t]
        order = np.argsort(-row, kind="stable")[:top_k]
        order = order[row[order] > -np.inf]
        p = softmax(row)[order]
        weights[t, : len(order)] = p / p.sum() if renormalize else p
        ids[t, : len(order)] = order
    return weights, ids, status


# ---- verification of speculative drafts ------------------------------------------------------------------------------

DOMAIN_ACCEPT, DOMAIN_RESIDUAL, DOMAIN_BONUS = 1, 2, 3


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011; Random123): four random words of a counter and a key."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF)
        k = (k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF)
    return c


def uniform(seed: int, position: int, domain: int, node: int = 0) -> float:
    """A float64 in (0, 1): 52 random bits and a half, so that neither end is ever reached."""
    position &= 2**64 - 1
    words = philox4x32((position & 0xFFFFFFFF, position >> 32, domain, node), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[1] << 32 | words[0]) >> 12) * 2.0**-52 + 2.0**-53


def sample(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulated weight exceeds u times the total; never one of weight 0."""
    cumulated = np.cumsum(weights)
    above = np.flatnonzero(cumulated > u * cumulated[-1])
    return int(above[0]) if len(above) else int(np.flatnonzero(weights)[-1])


def resample(p: np.ndarray, q: np.ndarray, u: float) -> int:
    """A token of (p - q)+, after a draft token was rejected; of p where that is all zero."""
    residual = np.maximum(p - q, 0)
    return sample(residual if residual.sum() > 0 else p, u)


def accepts(p: float, q: float, u: float) -> bool:
    """Strictly, so that p = 0 is never accepted and q = 0 < p always is."""
    return u * q < p


def verify_request(
    logits: np.ndarray, draft: np.ndarray, draft_probs: np.ndarray | None, temperature: float, uniforms: np.ndarray
) -> tuple[list[int], int]:
    """Tokens and status of one request: logits [K + 1, V], draft [K], draft_probs [K, V] or None (one-hot).

    uniforms [K + 2, K + 1]: row i accepts draft i, row K draws from the residual and row K + 1 from the last
    distribution; the column is the index of the token that is drawn. temperature 0 is greedy.
    """
    k, vocab = len(draft), logits.shape[1]
    ends = np.flatnonzero(draft == -1)
    length = int(ends[0]) if len(ends) else k
    if ((draft[:length] < 0) | (draft[:length] >= vocab)).any():
        return [], ROW_BAD_ID
    tokens: list[int] = []
    for i in range(length + 1):
        status = row_status(logits[i])
        if status:
            return [], status
        if temperature == 0:
            tokens.append(int(logits[i].argmax()))
            if i == length or tokens[i] != draft[i]:
                break
            continue
        p = softmax(logits[i], temperature)
        if i == length:
            tokens.append(sample(p, uniforms[k + 1, i]))
            break
        x = int(draft[i])
        q = np.eye(1, vocab, x)[0] if draft_probs is None else draft_probs[i].astype(np.float64)
        if not 0 <= q[x] < np.inf:
            return [], ROW_NAN
        if accepts(p[x], q[x], uniforms[i, i]):
            tokens.append(x)
            continue
        if not ((q >= 0) & (q < np.inf)).all():
            return [], ROW_NAN
        tokens.append(resample(p, q, uniforms[k, i]))
        break
    return tokens, ROW_OK


def verify_chain(
    logits: np.ndarray,
    draft_token_ids: np.ndarray,
    cu_num_draft_tokens: np.ndarray,
    draft_probs: np.ndarray | None,
    rule: str,
    temperature: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    uniforms: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output tokens int32 [B, max K + 1], accepted int32 [B], status int32 [B]: assay.h's rules, in float64."""
    cu = cu_num_draft_tokens.astype(np.int64)
    batch = len(cu) - 1
    out = np.full((batch, int(np.diff(cu).max(initial=0)) + 1), -1, np.int32)
    accepted = np.zeros(batch, np.int32)
    status = np.zeros(batch, np.int32)
    for b in range(batch):
        first, last = int(cu[b]), int(cu[b + 1])
        k = last - first
        if uniforms is not None:
            u = np.repeat(uniforms[first + 2 * b : last + 2 * b + 2, None], k + 1, axis=1)
        else:
            domains = [DOMAIN_ACCEPT] * k + [DOMAIN_RESIDUAL, DOMAIN_BONUS]
            at = [int(position[b]) + i for i in range(k + 1)]
            u = np.array([[uniform(int(seed[b]), p, domain) for p in at] for domain in domains])
        tokens, status[b] = verify_request(
            logits[first + b : last + b + 1],
            draft_token_ids[first:last],
            None if draft_probs is None else draft_probs[first:last],
            0.0 if rule == "greedy" else float(temperature[b]),
            u,
        )
        out[b, : len(tokens)] = tokens
        accepted[b] = max(len(tokens) - 1, 0)
    return out, accepted, status
